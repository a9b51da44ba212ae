"""The directory's table: what it refuses, what one bad row does, and whose an id is."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from powermail.base.log import MemoryLog
from powermail.base.world import World, system_world
from powermail.directory.contract import Account, RowTrouble
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.owners import Owners

FIRST_RELEASE = """
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, address TEXT NOT NULL UNIQUE COLLATE NOCASE, password TEXT NOT NULL DEFAULT '',
    quota_octets INTEGER NOT NULL DEFAULT 0, forward TEXT NOT NULL DEFAULT '', keep_copy INTEGER NOT NULL DEFAULT 0,
    enabled INTEGER NOT NULL DEFAULT 1, send_per_hour INTEGER NOT NULL DEFAULT 0)
"""
OWN = "CREATE TABLE accounts (id, address, password, quota_octets, forward, keep_copy, enabled, send_per_hour, remark)"


@pytest.fixture
async def world() -> World:
    return system_world(MemoryLog())


@pytest.fixture
async def opened(world: World, tmp_path: Path) -> AsyncIterator[list[SqliteDirectory]]:
    """Directories to be closed at the end."""
    made: list[SqliteDirectory] = []
    yield made
    for directory in made:
        await directory.close()


async def open_one(world: World, path: Path, opened: list[SqliteDirectory]) -> SqliteDirectory:
    directory = SqliteDirectory(world, str(path / "directory.db"))
    opened.append(directory)
    await directory.open()
    return directory


def sql(path: Path, *statements: str) -> None:
    """As an operator writes: by the sqlite3 command."""
    with closing(sqlite3.connect(path / "directory.db")) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("quota_octets", "'50M'"),
        ("quota_octets", "-1"),
        ("quota_octets", "1.5"),
        ("enabled", "'no'"),
        ("enabled", "2"),
        ("enabled", "NULL"),
        ("keep_copy", "'yes'"),
        ("send_per_hour", "'many'"),
        ("password", "x'00ff'"),
        ("id", "'seven'"),
        ("id", "0"),
    ],
)
async def test_the_table_refuses_what_is_no_row(
    world: World, tmp_path: Path, opened: list[SqliteDirectory], column: str, value: str
) -> None:
    await open_one(world, tmp_path, opened)
    with pytest.raises(sqlite3.IntegrityError):
        sql(tmp_path, f"INSERT INTO accounts (address, {column}) VALUES ('ann@example.org', {value})")


async def test_the_table_refuses_what_is_no_address(world: World, tmp_path: Path, opened: list[SqliteDirectory]) -> None:
    await open_one(world, tmp_path, opened)
    for bad in ("ann", "@example.org", "ann@", "ann@example.org' || char(10) || 'X"):
        with pytest.raises(sqlite3.IntegrityError):
            sql(tmp_path, f"INSERT INTO accounts (address) VALUES ('{bad}')")


async def test_one_insert_makes_a_mailbox_with_an_id_of_63_random_bits(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    directory = await open_one(world, tmp_path, opened)
    sql(tmp_path, *(f"INSERT INTO accounts (address, password) VALUES ('u{n}@example.org', '{{plain}}x')" for n in range(20)))
    await directory.add([Account("", f"v{n}@example.org") for n in range(20)])
    ids = [int(account.id) for account in await directory.all("", 100)]
    assert len(set(ids)) == 40
    assert all(0 < number < 2**63 for number in ids)
    assert max(ids) > 2**55 and min(b - a for a, b in zip(sorted(ids), sorted(ids)[1:], strict=False)) > 2**30


async def test_a_restored_directory_gives_no_id_again(world: World, tmp_path: Path, opened: list[SqliteDirectory]) -> None:
    """With a backup put back, a new account once got the id, and the mail, of one made after the backup."""
    directory = await open_one(world, tmp_path, opened)
    await directory.copy_to(str(tmp_path / "backup.db"))
    await directory.add([Account("", "ann@example.org")])
    lost = await directory.find("ann@example.org")
    await directory.close()
    opened.clear()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"directory.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "backup.db").rename(tmp_path / "directory.db")
    directory = await open_one(world, tmp_path, opened)
    await directory.add([Account("", "bob@example.org")])
    fresh = await directory.find("bob@example.org")
    assert lost is not None and fresh is not None and lost.id != fresh.id


async def test_the_table_of_the_first_release_is_brought_on_with_its_ids(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    sql(
        tmp_path,
        FIRST_RELEASE,
        "INSERT INTO accounts (id, address, forward) VALUES (7, 'Ann@example.org', 'x@example.net')",
        "INSERT INTO accounts (id, address, quota_octets) VALUES (8, 'bob@example.org', -5)",
    )
    directory = await open_one(world, tmp_path, opened)
    ann, bob = await directory.all("", 9)
    assert (ann.id, ann.address, ann.forward, bob.id, bob.quota_octets) == ("7", "Ann@example.org", ("x@example.net",), "8", 0)
    assert await directory.find("ann@example.org") == ann
    await directory.add([Account("", "cat@example.org")])
    assert int((await directory.all("bob@example.org", 9))[0].id) > 100
    with pytest.raises(sqlite3.IntegrityError):
        sql(tmp_path, "UPDATE accounts SET enabled = 'no'")
    assert await directory.doubts() == (3, [])


async def test_a_table_that_could_not_be_brought_on_is_when_its_rows_were_mended(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    sql(tmp_path, FIRST_RELEASE, "INSERT INTO accounts (id, address, enabled) VALUES (7, 'ann@example.org', 'no')")
    await (await open_one(world, tmp_path, opened)).close()
    opened.clear()
    sql(tmp_path, "UPDATE accounts SET enabled = 1, send_as = 'bob@example.org'")
    directory = await open_one(world, tmp_path, opened)
    assert await directory.doubts() == (1, [])
    assert await directory.find("ann@example.org") == Account("7", "ann@example.org", send_as=("bob@example.org",))


async def test_a_view_of_ones_own_is_a_directory(world: World, tmp_path: Path, opened: list[SqliteDirectory]) -> None:
    """No table of ours is needed, and none is made."""
    sql(
        tmp_path,
        "CREATE TABLE users (number INTEGER, mail TEXT)",
        "INSERT INTO users VALUES (7, 'ann@example.org')",
        "CREATE VIEW accounts AS SELECT number AS id, mail AS address, '' AS password, 0 AS quota_octets, '' AS forward,"
        " 0 AS keep_copy, 1 AS enabled, 0 AS send_per_hour FROM users",
    )
    directory = await open_one(world, tmp_path, opened)
    assert await directory.find("ann@example.org") == Account("7", "ann@example.org")
    assert await directory.serves("example.org")


@pytest.mark.parametrize("table", [FIRST_RELEASE, OWN], ids=["first release", "a table of one's own"])
async def test_one_bad_row_hurts_itself_only(world: World, tmp_path: Path, opened: list[SqliteDirectory], table: str) -> None:
    """Whoever wrote it: its address is trouble, all others are served, lists go on, and it is named."""
    bad = {
        "quota@example.org": ("quota_octets", "'50M'"),
        "flag@example.org": ("enabled", "'no'"),
        "octets@example.org": ("password", "x'ff'"),
        "text@example.org": ("forward", "CAST(x'ff40' AS TEXT)"),
        "rate@example.org": ("send_per_hour", "1.5"),
    }
    sql(
        tmp_path,
        table,
        "INSERT INTO accounts (id, address) VALUES (1, 'ann@example.org')",
        "INSERT INTO accounts (id, address) VALUES (2, 'zoe@example.org')",
        *(
            f"INSERT INTO accounts (id, address, {column}) VALUES ({number}, '{address}', {value})"
            for number, (address, (column, value)) in enumerate(bad.items(), 10)
        ),
    )
    directory = await open_one(world, tmp_path, opened)
    for address, (column, _) in bad.items():
        with pytest.raises(RowTrouble, match=f"row {address}: {column} is"):
            await directory.find(address)
    assert (await directory.find("zoe@example.org")) == Account("2", "zoe@example.org")
    assert [account.address for account in await directory.all("", 2)] == ["ann@example.org"]
    assert [account.address for account in await directory.all("ann@example.org", 2)] == ["zoe@example.org"]
    count, doubts = await directory.doubts()
    assert count == 7
    assert {doubt.address for doubt in doubts} == {"", *bad}
    assert any("table" in doubt.problem for doubt in doubts if not doubt.address)


async def test_doubts_name_what_can_be_read_and_not_used(world: World, tmp_path: Path, opened: list[SqliteDirectory]) -> None:
    directory = await open_one(world, tmp_path, opened)
    sql(
        tmp_path,
        "INSERT INTO accounts (address, forward) VALUES ('f@example.org', 'ok@example.net not-an-address')",
        "INSERT INTO accounts (address, password) VALUES ('s@example.org', '{rot13}frperg')",
        "INSERT INTO accounts (address) VALUES ('a b@example.org')",
        "INSERT INTO accounts (address) VALUES ('*@example.org')",
        "INSERT INTO accounts (address, send_as) VALUES ('t@example.org', 'ok@example.net *@example.net nobody')",
    )
    _, doubts = await directory.doubts()
    assert [doubt.address for doubt in doubts] == ["a b@example.org", "f@example.org", "s@example.org", "t@example.org"]
    assert "send_as names nobody" in doubts[3].problem
    assert "not-an-address" in doubts[1].problem and "{rot13}" in doubts[2].problem


async def test_an_id_that_belonged_to_another_address_is_refused_and_shown(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    directory = await open_one(world, tmp_path, opened)
    index = SqliteIndex(world, str(tmp_path / "index.db"))
    await index.open("00" * 16)
    try:
        sql(tmp_path, "INSERT INTO accounts (id, address) VALUES (7, 'ann@example.org')")
        owners = Owners(world, directory, index)
        assert await owners.find("ann@example.org") is not None
        assert owners.alarms() == []
        await owners.step()
        assert await index.owners(["7"]) == {"7": "ann@example.org"}
        sql(tmp_path, "DELETE FROM accounts", "INSERT INTO accounts (id, address) VALUES (7, 'bob@example.org')")
        for asked in (owners, Owners(world, directory, index)):  # in the process that saw both, and in the next
            with pytest.raises(RowTrouble, match=r"id 7 belonged to ann@example\.org"):
                await asked.find("bob@example.org")
            assert "bob@example.org has the id 7 of ann@example.org" in asked.alarms()[0]
        await index.note_owners({"7": "bob@example.org"})
        owners.forget("7")
        assert await owners.find("bob@example.org") is not None
        assert owners.alarms() == []
    finally:
        await index.close()


async def test_an_owner_is_the_same_however_his_row_is_written(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    directory = await open_one(world, tmp_path, opened)
    index = SqliteIndex(world, str(tmp_path / "index.db"))
    await index.open("00" * 16)
    try:
        for written in ("ann@xn--bcher-kva.test", "Ann@b\u00fccher.test", "ANN@XN--BCHER-KVA.TEST"):
            owners = Owners(world, directory, index)
            assert await owners.mismatches([Account("7", written)]) == []
            await owners.step()
    finally:
        await index.close()


async def test_who_was_never_seen_is_believed_while_the_index_is_away(
    world: World, tmp_path: Path, opened: list[SqliteDirectory]
) -> None:
    """P14: known recipients are still accepted."""
    directory = await open_one(world, tmp_path, opened)
    await directory.add([Account("", "ann@example.org")])
    index = SqliteIndex(world, str(tmp_path / "index.db"))
    owners = Owners(world, directory, index)  # which was never opened
    assert await owners.find("ann@example.org") is not None
    await index.close()
