"""Tables of somebody else: statements are checked with the column named, rows are read as what they are, nothing is changed."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.world import World
from powermail.directory.contract import Account, RowTrouble
from powermail.directory.database import parse
from powermail.directory.file import SqliteFile
from powermail.directory.foreign import ForeignDirectory, Texts
from powermail.directory.server import Server
from tests.servers import Database

Make = Callable[..., ForeignDirectory]
TABLE = (
    "CREATE TABLE users (number INTEGER, mail VARCHAR(200), hash VARCHAR(200), mb INTEGER, sends TEXT, active INTEGER)",
    "INSERT INTO users VALUES (7, 'ann@example.org', '{plain}x', 3, 'a@x.yy, b@x.yy', 1)",
    "INSERT INTO users VALUES (8, 'two@example.org', '', 0, NULL, 1), (9, 'two@example.org', '', 0, NULL, 1)",
    "INSERT INTO users VALUES (10, 'bad@example.org', '', -5, NULL, 1), (11, 'flag@example.org', '', 0, NULL, 7)",
)
FIND = "SELECT number AS id, hash AS password, mb * 1048576 AS quota_octets, sends AS send_as, active AS enabled FROM users"
SERVES = "SELECT 1 FROM users WHERE mail LIKE '%@' || :domain"


@pytest.fixture
async def make(database: Database | None, world: World, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes directories on a database with the table above, on each engine."""
    if database is not None:
        database.sql(*TABLE)
    else:
        with closing(sqlite3.connect(tmp_path / "users.db")) as db:
            for statement in TABLE:
                db.execute(statement)
            db.commit()
    opened: list[ForeignDirectory] = []

    async def last_known(ids: Sequence[str]) -> dict[str, str]:
        return {"7": "ann@example.org"}

    def made(
        find: str = f"{FIND} WHERE mail = :address", serves: str = SERVES, identify: str = "", listing: str = ""
    ) -> ForeignDirectory:
        texts = Texts(find, serves, identify, listing)
        if database is None:
            directory = ForeignDirectory(world, SqliteFile(world, str(tmp_path / "users.db")), texts, last_known)
        else:
            kind = database.server.kind
            server = Server(world, kind, parse(kind, database.url), 2, read_only=True)
            directory = ForeignDirectory(world, server, texts, last_known)
        opened.append(directory)
        return directory

    yield made
    for directory in opened:
        await directory.close()


async def test_columns_by_name_make_an_account(make: Make) -> None:
    directory = make()
    await directory.open()
    assert await directory.find("ann@example.org") == Account(
        "7", "ann@example.org", "{plain}x", 3 * 1048576, send_as=("a@x.yy", "b@x.yy")
    )
    assert await directory.find("nobody@example.org") is None
    assert await directory.serves("example.org") and not await directory.serves("example.net")


async def test_a_row_that_cannot_be_read_is_trouble_for_its_address_only(make: Make) -> None:
    directory = make()
    await directory.open()
    with pytest.raises(RowTrouble, match=r"row bad@example\.org: quota_octets is -5242880"):
        await directory.find("bad@example.org")
    with pytest.raises(RowTrouble, match=r"row flag@example\.org: enabled is 7"):
        await directory.find("flag@example.org")
    with pytest.raises(RowTrouble, match=r"row two@example\.org: two mailboxes"):
        await directory.find("two@example.org")
    assert await directory.find("ann@example.org") is not None


async def test_rows_and_lists_of_destinations_are_one_forward(make: Make) -> None:
    rows = (
        "SELECT 5 AS id, 'b@x.yy' AS forward WHERE :address = 'a@x.yy' UNION ALL SELECT 4, 'c@x.yy, d@x.yy' WHERE :local = 'a'"
        " UNION ALL SELECT 9, 'A@x.yy' WHERE :address = 'a@x.yy' AND :domain = 'x.yy'"
    )
    directory = make(find=rows)
    await directory.open()
    found = await directory.find("a@x.yy")
    assert found is not None and (found.id, found.hosted, found.keep_copy) == ("4", True, True)
    assert sorted(found.forward) == ["b@x.yy", "c@x.yy", "d@x.yy"]
    mixed = make(
        find="SELECT 4 AS id, 'b@x.yy' AS forward, '' AS password UNION ALL SELECT 5, '', '{plain}x' WHERE :address <> ''"
    )
    assert await mixed.find("a@x.yy") == Account("5", "a@x.yy", "{plain}x", forward=("b@x.yy",)), "the mailbox is the account"
    alone = make(find="SELECT 5 AS id, :address AS forward, 0 AS keep_copy")
    await alone.open()
    assert await alone.find("a@x.yy") == Account("5", "a@x.yy"), "who forwards to himself only is a mailbox"


@pytest.mark.parametrize(
    ("which", "text", "told"),
    [
        ("find", "SELECT number AS id FROM userz WHERE mail = :address", r"directory\.find: .*userz"),
        ("find", "SELECT numbr AS id FROM users WHERE mail = :address", r"directory\.find: .*numbr"),
        (
            "find",
            "SELECT number AS id, mb AS quota FROM users WHERE mail = :address",
            r"directory\.find: column quota is none of id",
        ),
        ("find", "SELECT hash AS password FROM users WHERE mail = :address", r"directory\.find: there is no column id"),
        (
            "find",
            "SELECT number AS id, mb AS id FROM users WHERE mail = :address",
            r"directory\.find: column id is there twice",
        ),
        ("find", "SELECT number AS id FROM users WHERE mail = :mail", r"directory\.find: there is no parameter :mail"),
        ("find", "SELECT number AS id FROM users", r"directory\.find: it does not ask for :address"),
        ("serves", "SELECT 1 FROM users", r"directory\.serves: it does not ask for :domain"),
        ("find", "UPDATE users SET mb = 0", r"directory\.find: it begins with neither SELECT nor WITH"),
        ("serves", "SELECT 1 FROM domainz WHERE name = :domain", r"directory\.serves: .*domainz"),
        ("serves", "SELECT 1 FROM users WHERE mail = :address", r"directory\.serves: there is no parameter :address"),
        ("identify", "SELECT mail FROM userz WHERE number = :id", r"directory\.identify: .*userz"),
        ("listing", f"{FIND} WHERE mail > :after LIMIT :limit", r"directory\.listing: there is no column address"),
    ],
)
async def test_a_statement_that_cannot_be_used_is_named_at_the_start(make: Make, which: str, text: str, told: str) -> None:
    with pytest.raises(OperatorError, match=told):
        await make(**{which: text}).open()


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("mail AS quota_octets", "column quota_octets is text, not a number"),
        ("mail AS enabled", r"column enabled is text, not a number \(0 or 1\) or a boolean"),
        ("number AS password", "column password is number, not text"),
        ("number AS forward", "column forward is number, not text"),
        ("current_timestamp AS id", "column id is (timestamptz|datetime), not"),
    ],
)
async def test_a_column_of_the_wrong_type_is_named_at_the_start(
    make: Make, database: Database | None, column: str, told: str
) -> None:
    directory = make(find=f"SELECT {column}{'' if 'AS id' in column else ', number AS id'} FROM users WHERE mail = :address")
    if database is None:  # a column of SQLite has no type: each row says what it is
        await directory.open()
        return
    with pytest.raises(OperatorError, match=f"directory.find: {told}"):
        await directory.open()


async def test_nothing_is_ever_changed(make: Make) -> None:
    directory = make()
    await directory.open()
    ann = await directory.find("ann@example.org")
    assert ann is not None
    for call in (
        lambda: directory.add([ann]),
        lambda: directory.put([], [ann]),
        lambda: directory.update(ann),
        lambda: directory.remove("ann@example.org"),
        lambda: directory.among(["ann@example.org"]),
    ):
        with pytest.raises(OperatorError, match="kept elsewhere"):
            await call()
    with pytest.raises(OperatorError, match="kept elsewhere"):
        directory.check(ann)


async def test_a_statement_cannot_change_anything_either(make: Make, database: Database | None) -> None:
    """The connection is for reading, whatever functions a statement calls."""
    if database is None:
        directory = make(find="WITH x AS (SELECT 1) DELETE FROM users WHERE mail = :address")
    elif database.server.kind == "mysql":
        body = "CREATE FUNCTION spoil() RETURNS INT MODIFIES SQL DATA BEGIN DELETE FROM users; RETURN 1; END"
        database.sql(f"DELIMITER //\n{body} //\nDELIMITER ")
        directory = make(find="SELECT spoil() AS id, :address AS address")
    else:
        directory = make(find="WITH x AS (DELETE FROM users RETURNING number) SELECT number AS id FROM x WHERE :address <> ''")
    with pytest.raises((OperatorError, DirectoryTrouble), match=r"(?i)read.?only"):
        await directory.find("ann@example.org")
    fine = make()
    assert await fine.find("ann@example.org") is not None


async def test_ids_are_those_of_last_known_addresses_or_as_a_statement_says(make: Make) -> None:
    plain = make()
    await plain.open()
    assert await plain.ids(["7", "8", "99"]) == {"7": "ann@example.org"}
    asked = make(identify="SELECT mail FROM users WHERE number = :id")
    await asked.open()
    assert await asked.ids(["7", "10", "99", "x"]) == {"7": "ann@example.org", "10": "bad@example.org"}


async def test_a_listing_goes_through_all_rows_and_names_bad_ones(make: Make) -> None:
    listing = (
        f"{FIND.replace(' FROM', ', mail AS address FROM')} WHERE mail > :after AND number <> 9 ORDER BY mail LIMIT :limit"
    )
    directory = make(listing=listing)
    await directory.open()
    assert [account.id for account in await directory.all("", 1)] == ["7"]
    assert [account.id for account in await directory.all("ann@example.org", 1)] == ["8"]
    count, doubts = await directory.doubts()
    assert count == 4 and [doubt.address for doubt in doubts] == ["bad@example.org", "flag@example.org"]
    without = make()
    await without.open()
    with pytest.raises(OperatorError, match=r"directory\.listing is not set"):
        await without.all("", 9)


async def test_an_address_that_the_table_has_no_letters_for_is_its_own_trouble(make: Make, database: Database | None) -> None:
    """Whoever writes to such an address must not take the directory away from others."""
    if database is not None and database.server.kind == "mysql":
        database.sql("ALTER TABLE users CONVERT TO CHARACTER SET latin1")
    directory = make()
    await directory.open()
    try:
        assert await directory.find("\u65e5\u672c@example.org") is None
    except RowTrouble:
        pass
    assert await directory.find("ann@example.org") is not None
