"""The contract of a directory, on every engine: what the table refuses, what one bad row does, whose an id is."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base.errors import OperatorError
from powermail.directory.contract import Account, RowTrouble
from tests.directory.backends import Made

REFUSED = [
    ("quota_octets", "'50M'"),
    ("quota_octets", "-1"),
    ("quota_octets", "9223372036854775808"),
    ("enabled", "'no'"),
    ("enabled", "2"),
    ("enabled", "NULL"),
    ("keep_copy", "'yes'"),
    ("keep_copy", "-1"),
    ("send_per_hour", "'many'"),
    ("send_per_hour", "-1"),
    ("forward", "NULL"),
    ("id", "'seven'"),
    ("id", "0"),
    ("address", "'ann'"),
    ("address", "'@example.org'"),
    ("address", "'ann@'"),
    ("address", "NULL"),
]
# Quotes, backslashes, marks of formats and comments, what an SQL text could be broken with, letters of four octets.
NASTY = (
    "o'neill@example.org",
    '"a\\\\b"@example.org',
    '"a\\\\\'b"@example.org',
    '"a b"@example.org',
    "per%cent%s@example.org",
    "under_score@example.org",
    "'or'1'='1@example.org",
    "--@example.org",
    "#x@example.org",
    "$1{x}@example.org",
    "?@example.org",
    "\U0001d51e\u00e9@b\u00fccher.test",
)


async def test_the_table_refuses_what_is_no_row(backend: Made) -> None:
    for column, value in REFUSED:
        rest = "" if column == "address" else ", address"
        given = "" if column == "address" else ", 'ann@example.org'"
        with pytest.raises(AssertionError):
            await asyncio.to_thread(backend.sql, f"INSERT INTO accounts ({column}{rest}) VALUES ({value}{given})")
    assert await backend.directory.doubts() == (0, [])


async def test_the_table_refuses_an_address_of_two_lines(backend: Made) -> None:
    newline = "chr(10)" if backend.kind == "postgresql" else "char(10)"
    text = f"concat('ann@example.org', {newline}, 'X')" if backend.kind == "mysql" else f"'ann@example.org' || {newline} || 'X'"
    with pytest.raises(AssertionError):
        backend.sql(f"INSERT INTO accounts (address) VALUES ({text})")


async def test_one_insert_makes_a_mailbox_with_an_id_of_63_random_bits(backend: Made) -> None:
    directory = backend.directory
    backend.sql(*(f"INSERT INTO accounts (address, password) VALUES ('u{n}@example.org', '{{plain}}x')" for n in range(20)))
    await directory.add([Account("", f"v{n}@example.org") for n in range(20)])
    first = await directory.find("u0@example.org")
    assert first == Account(first.id if first else "", "u0@example.org", "{plain}x")
    ids = [int(account.id) for account in await directory.all("", 100)]
    assert len(set(ids)) == 40
    assert all(0 < number < 2**63 for number in ids)
    assert max(ids) > 2**55 and min(b - a for a, b in zip(sorted(ids), sorted(ids)[1:], strict=False)) > 2**25
    assert await directory.ids([*map(str, ids[:3]), "1"]) == {
        account.id: account.address for account in await directory.all("", 3)
    }


async def test_letters_have_no_case_and_everything_else_is_compared_octet_by_octet(backend: Made) -> None:
    directory = backend.directory
    backend.sql("INSERT INTO accounts (address) VALUES ('Ann@Example.ORG')")
    found = await directory.find("ann@example.org")
    assert found is not None and found.address == "Ann@Example.ORG"
    assert await directory.serves("example.org")
    with pytest.raises(AssertionError):
        backend.sql("INSERT INTO accounts (address) VALUES ('ann@example.org')")
    await directory.add(
        [Account("", "\u00e4nn@example.org"), Account("", "\u00e0nn@example.org"), Account("", "stra\u00dfe@e.org")]
    )
    for other in ("\u00e1nn@example.org", "strasse@e.org", "ann@example.org ", "ann@example.orgx", "nn@example.org"):
        assert await directory.find(other) is None, other
    assert not await directory.serves("xample.org") and not await directory.serves("example.or")
    assert (await directory.remove("ANN@example.org")) == found
    assert await directory.find("ann@example.org") is None


async def test_no_address_is_ever_read_as_sql(backend: Made) -> None:
    directory = backend.directory
    to = tuple(address for address in NASTY if " " not in address and address[0] != "-")
    password = "{plain}'\\\"%s--\U0001d51e"
    await directory.add([Account("", address, password, 7, tuple(one for one in to if one != address)) for address in NASTY])
    for address in NASTY:
        found = await directory.find(address)
        assert found is not None and set(found.forward) == set(to) - {address} and found.password == password, address
    assert {account.address for account in await directory.all("", 99)} == set(NASTY)
    assert set(await directory.among(NASTY)) == set(NASTY)
    for address in NASTY:
        removed = await directory.remove(address)
        assert removed is not None and removed.address == address
    assert await directory.doubts() == (0, [])


async def test_names_that_no_row_can_have_are_no_trouble(backend: Made) -> None:
    """A login name is whatever a client sent."""
    for name in ("*@x\0y", "a\nb@example.org", "*@\ud800", "x" * 5000 + "@example.org", "*@", ""):
        assert await backend.directory.find(name) is None, name
    assert not await backend.directory.serves("x\0y")


async def test_what_was_entered_is_read_back(backend: Made) -> None:
    full = Account("", "ann@example.org", "{plain}x", 2**40, ("a@b.cc", "d@e.ff"), True, False, 2**33, ("g@h.ii", "*@j.kk"))
    await backend.directory.add([full])
    found = await backend.directory.find("ann@example.org")
    assert found is not None and found == full._replace(id=found.id)
    changed = found._replace(address="Bob@example.org", quota_octets=0, forward=(), enabled=True, send_as=())
    assert await backend.directory.update(changed)
    assert await backend.directory.update(changed), "also when nothing changes"
    assert await backend.directory.find("ann@example.org") is None
    assert await backend.directory.find("bob@example.org") == changed._replace(address="bob@example.org")
    assert not await backend.directory.update(changed._replace(id="12345"))
    assert await backend.directory.remove("nobody@example.org") is None


async def test_many_rows_are_entered_whole_or_not_at_all(backend: Made) -> None:
    directory = backend.directory
    await directory.add([Account("", "ann@example.org")])
    ann = await directory.find("ann@example.org")
    assert ann is not None
    with pytest.raises(OperatorError, match=r"ann@example\.org exists"):
        await directory.add([Account("", "bob@example.org"), Account("", "ANN@example.org")])
    with pytest.raises(OperatorError, match=r"bob@example\.org exists"):
        await directory.add([Account("", "bob@example.org"), Account("", "cat@example.org"), Account("", "Bob@example.org")])
    for bad in (
        Account("", "nobody"),
        Account("", "q@example.org", quota_octets=-1),
        Account("", "q@example.org", quota_octets=2**63),
    ):
        with pytest.raises(OperatorError):
            await directory.put([Account("", "bob@example.org"), bad], [])
    assert [account.address for account in await directory.all("", 9)] == ["ann@example.org"]
    assert await directory.ids(["99999999999999999999999", "x", "-1", "\u0663"]) == {}
    many = [Account("", f"m{number:04}@example.org") for number in range(450)]
    await directory.put(many, [ann._replace(quota_octets=5)])
    assert (await directory.doubts())[0] == 451
    assert len(await directory.among([account.address for account in many])) == 450
    with pytest.raises(OperatorError, match=r"m0001@example\.org exists"):
        await directory.update(ann._replace(address="m0001@example.org"))
    found = await directory.find("ann@example.org")
    assert found is not None and found.quota_octets == 5


async def test_pages_go_through_all_rows_in_order(backend: Made) -> None:
    names = ["a@x.yy", "B@x.yy", "c@x.yy", "\u00e9@x.yy", "*@x.yy"]
    backend.sql(*(f"INSERT INTO accounts (address) VALUES ('{name}')" for name in names))
    seen: list[str] = []
    while page := await backend.directory.all(seen[-1] if seen else "", 2):
        seen += [account.address for account in page]
    assert seen == ["*@x.yy", "a@x.yy", "B@x.yy", "c@x.yy", "\u00e9@x.yy"]


_KEY = "address_key VARCHAR(200) COLLATE utf8mb4_bin AS (lower(address))"
LOOSE = {
    "postgresql": "id TEXT, address TEXT, password TEXT, quota_octets TEXT, forward TEXT, keep_copy TEXT, enabled INTEGER,"
    " send_per_hour NUMERIC, send_as TEXT",
    "mysql": "id VARCHAR(40), address VARCHAR(200) COLLATE utf8mb4_bin, password BLOB, quota_octets TEXT, forward TEXT,"
    f" keep_copy TEXT, enabled INTEGER, send_per_hour DECIMAL(9,2), send_as TEXT, {_KEY}",
    "sqlite": "id, address, password, quota_octets, forward, keep_copy, enabled, send_per_hour, send_as",
}


async def test_one_bad_row_hurts_itself_only(backend: Made) -> None:
    """Whoever made the table: a bad row's address is trouble, all others are served, lists go on, and it is named."""
    backend.sql("DROP TABLE accounts", f"CREATE TABLE accounts ({LOOSE[backend.kind]})")
    bad = {
        "quota@example.org": ("quota_octets", "'50M'"),
        "flag@example.org": ("enabled", "7"),
        "rate@example.org": ("send_per_hour", "1.5"),
    }
    backend.sql(
        "INSERT INTO accounts (id, address) VALUES (1, 'ann@example.org')",
        "INSERT INTO accounts (id, address) VALUES (2, 'zoe@example.org')",
        *(
            f"INSERT INTO accounts (id, address, {column}) VALUES ({number}, '{address}', {value})"
            for number, (address, (column, value)) in enumerate(bad.items(), 10)
        ),
    )
    directory = backend.directory
    for address, (column, _) in bad.items():
        with pytest.raises(RowTrouble, match=f"row {address}: {column} is"):
            await directory.find(address)
    assert (await directory.find("zoe@example.org")) == Account("2", "zoe@example.org")
    assert [account.address for account in await directory.all("", 2)] == ["ann@example.org"]
    assert [account.address for account in await directory.all("ann@example.org", 2)] == ["zoe@example.org"]
    count, doubts = await directory.doubts()
    assert count == 5
    assert {doubt.address for doubt in doubts} >= set(bad)


async def test_doubts_name_what_can_be_read_and_not_used(backend: Made) -> None:
    backend.sql(
        "INSERT INTO accounts (address, forward) VALUES ('f@example.org', 'ok@example.net not-an-address')",
        "INSERT INTO accounts (address, password) VALUES ('s@example.org', '{rot13}frperg')",
        "INSERT INTO accounts (address) VALUES ('a b@example.org')",
        "INSERT INTO accounts (address) VALUES ('*@example.org')",
        "INSERT INTO accounts (address, send_as) VALUES ('t@example.org', 'ok@example.net *@example.net nobody')",
    )
    _, doubts = await backend.directory.doubts()
    assert [doubt.address for doubt in doubts] == ["a b@example.org", "f@example.org", "s@example.org", "t@example.org"]
    assert "send_as names nobody" in doubts[3].problem
    assert "not-an-address" in doubts[1].problem and "{rot13}" in doubts[2].problem


async def test_what_another_process_wrote_is_seen_at_once(backend: Made) -> None:
    """No connection reads in an old snapshot."""
    for number in range(3):
        assert await backend.directory.find(f"u{number}@example.org") is None
        backend.sql(f"INSERT INTO accounts (address) VALUES ('u{number}@example.org')")
        assert await backend.directory.find(f"u{number}@example.org") is not None


async def test_changes_at_once_meet_and_all_or_one_of_them_stands(backend: Made) -> None:
    directory = backend.directory
    same = await asyncio.gather(*(directory.add([Account("", "ann@example.org")]) for _ in range(6)), return_exceptions=True)
    assert [type(one) for one in same if isinstance(one, BaseException)] == [OperatorError] * 5
    await asyncio.gather(*(directory.add([Account("", f"u{number}@example.org")]) for number in range(20)))
    assert (await directory.doubts())[0] == 21
