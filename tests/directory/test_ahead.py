"""What one question answers beside the row that was asked for: where a forward leads to, on servers of a database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from powermail.base.counters import Counters
from powermail.base.world import World
from powermail.directory.accounts import SqlDirectory
from powermail.directory.contract import Account, RowTrouble
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.directory.server import Server
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.owners import Owners
from powermail.mail.address import parse
from tests.directory.backends import KINDS, Made, made
from tests.directory.test_contract import LOOSE
from tests.servers import Database

_TTL_S = 600.0
_IDN = [f"{what}{domain}" for what in ("ann@", "*@", "") for domain in ("b\u00fccher.example", "xn--bcher-kva.example")]
# A forward, where it leads to, and what a look-up of it asks for besides; letters have no case, here as everywhere.
ASKED = [
    ("to-ann@example.org", "Ann@Example.ORG", []),
    ("to-none@example.org", "none@example.org", ["*@example.org", "example.org"]),
    ("to-elsewhere@example.org", "x@else.example", ["*@else.example", "else.example"]),
    ("to-tag@example.org", "ann+tag@example.org", ["ann@example.org"]),
    ("to-odd@example.org", '"o\'neill"@example.org', ["o'neill@example.org", "*@example.org", "example.org"]),
    ("to-two@example.org", "ann@example.org bob@example.org", ["ann@example.org", "bob@example.org"]),
    ("to-idn@example.org", "ann@b\u00fccher.example", _IDN),
    ("to-xn@example.org", "ann@xn--bcher-kva.example", _IDN),
    ("to-bad@example.org", "no-address", []),
]


@pytest.fixture(params=[kind for kind in KINDS if kind != "sqlite"])
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh database of each server."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def backend(database: Database, world: World, tmp_path: Any) -> AsyncIterator[Made]:
    found = await made(database.server.kind, world, tmp_path, database)
    found.sql(
        "INSERT INTO accounts (address) VALUES ('ann@example.org'), ('bob@example.org')",
        *(f"INSERT INTO accounts (address, forward) VALUES ('{name}', '{_quoted(to)}')" for name, to, _ in ASKED),
    )
    yield found
    await found.directory.close()


def _quoted(text: str) -> str:
    return text.replace("'", "''")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server is asked for from now on, in order: addresses and domains."""
    names: list[str] = []
    rows = Server.rows

    async def counted(self: Server, statement: Any, values: Any = None) -> Any:
        values = values or {}
        names.extend(str(value) for value in values.values())
        return await rows(self, statement, values)

    monkeypatch.setattr(Server, "rows", counted)
    return names


def resolver_of(world: World, directory: Any) -> Resolver:
    return Resolver(DirectoryCache(directory, world.clock, Counters(), _TTL_S, _TTL_S), "+")


@pytest.mark.parametrize(("address", "to", "besides"), ASKED)
async def test_where_a_forward_leads_to_comes_with_it(
    backend: Made, world: World, asked: list[str], address: str, to: str, besides: list[str]
) -> None:
    """And what is found is the same as by questions of their own."""
    found = await resolver_of(world, backend.directory).resolve(parse(address))
    assert asked == [address, *besides]
    asked.clear()
    assert isinstance(backend.directory, SqlDirectory)
    backend.directory._ours = False
    assert found == await resolver_of(world, backend.directory).resolve(parse(address))
    assert asked[0] == address and (to == "no-address" or len(asked) > 1)


async def test_a_mailbox_behind_a_forward_is_one_question(backend: Made, world: World, asked: list[str]) -> None:
    resolver = resolver_of(world, backend.directory)
    found = await resolver.resolve(parse("to-ann@example.org"))
    assert [account.address for account in found.hosted] == ["ann@example.org"] and asked == ["to-ann@example.org"]
    assert (await resolver.resolve(parse("ann@example.org"))).hosted == found.hosted and len(asked) == 1, "it is known now"


async def test_a_row_behind_a_forward_that_cannot_be_read_is_trouble_for_who_needs_it(backend: Made, world: World) -> None:
    kind = backend.kind
    directory = backend.directory
    backend.sql("DROP TABLE accounts", f"CREATE TABLE accounts ({LOOSE[kind]})")
    backend.sql(
        "INSERT INTO accounts (id, address, quota_octets) VALUES (1, 'bad@example.org', '50M')",
        "INSERT INTO accounts (id, address, forward) VALUES (2, 'to-bad@example.org', 'bad@example.org')",
        "INSERT INTO accounts (id, address) VALUES (3, 'twice@example.org')",
        "INSERT INTO accounts (id, address) VALUES (4, 'twice@example.org')",
        "INSERT INTO accounts (id, address, forward) VALUES (5, 'to-twice@example.org', 'twice@example.org')",
    )
    assert isinstance(directory, SqlDirectory)
    account, ahead = await directory.find_ahead("to-bad@example.org")
    assert account is not None and account.id == "2" and ahead == {}
    with pytest.raises(RowTrouble, match=r"row bad@example\.org: quota_octets"):
        await resolver_of(world, directory).resolve(parse("to-bad@example.org"))
    assert (await directory.find_ahead("to-twice@example.org"))[1] == {}, "which of them answers is not for this to say"


async def test_a_table_that_is_not_of_our_making_is_asked_for_one_row_at_a_time(
    backend: Made, world: World, asked: list[str]
) -> None:
    """It may be a view, which a join would read as a whole."""
    backend.sql("DROP TABLE accounts_version")
    again = await backend.again()
    asked.clear()
    try:
        found = await resolver_of(world, again).resolve(parse("to-ann@example.org"))
        assert [account.address for account in found.hosted] == ["ann@example.org"]
        assert asked == ["to-ann@example.org", "ann@example.org"]
    finally:
        await again.close()


async def test_both_rows_are_found_by_the_index(backend: Made, database: Database) -> None:
    """However many there are: nothing is read as a whole."""
    directory = backend.directory
    assert isinstance(directory, SqlDirectory)
    await directory.add([Account("", f"u{number}@example.org", forward=(f"v{number}@example.org",)) for number in range(3000)])
    text = directory._find_ahead.text.replace(":address", "'u7@example.org'")
    if database.server.kind == "postgresql":
        plan = database.sql("ANALYZE accounts", f"EXPLAIN {text}")
        assert plan.count("Index Scan using accounts_address") == 2 and "Seq Scan" not in plan
    else:
        backend.sql("ANALYZE TABLE accounts")
        lines = [line.split("\t") for line in database.sql(f"EXPLAIN {text}").splitlines()]
        assert [line[5] if len(line) > 5 else line for line in lines if "accounts_address" in line] == ["accounts_address"] * 2


async def test_a_mailbox_whose_id_was_anothers_gets_no_mail_by_a_forward_either(
    backend: Made, world: World, tmp_path: Any
) -> None:
    """X11: the rows that came with it are compared as any other, by one question to the index."""
    index = SqliteIndex(world, str(tmp_path / "index.db"))
    await index.open("c")
    try:
        ann = await backend.directory.find("ann@example.org")
        assert ann is not None
        await index.note_owners({ann.id: "old@example.org"})
        owners = Owners(world, backend.directory, index)
        account, ahead = await owners.find_ahead("to-ann@example.org")
        assert account is not None and ahead == {}
        for _ in range(2):
            with pytest.raises(RowTrouble, match=r"belonged to old@example\.org"):
                await resolver_of(world, owners).resolve(parse("to-ann@example.org"))
        bob = Account("", "to-bob@example.org", forward=("bob@example.org",))
        await backend.directory.add([bob])
        questions = []
        ask = index.owners

        async def counted(accounts: Any) -> Any:
            questions.append(accounts)
            return await ask(accounts)

        index.owners = counted  # type: ignore[method-assign]
        assert (await resolver_of(world, owners).resolve(parse("to-bob@example.org"))).known
        assert len(questions) == 1 and len(questions[0]) == 2
    finally:
        await index.close()
