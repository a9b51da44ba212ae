"""The column of other senders: younger than the table, and missing in tables of an operator's own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from powermail.base.errors import OperatorError
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.directory.contract import Account
from powermail.directory.sqlite import SCHEMA, SqliteDirectory

OLDER = SCHEMA.replace("CHECK (send_per_hour >= 0),", "CHECK (send_per_hour >= 0)").replace(
    next(line for line in SCHEMA.splitlines() if "send_as" in line), ""
)


async def read(path: Path, script: str, address: str = "ann@example.org") -> Account | None:
    """What a directory made by this script says of an address."""
    with closing(sqlite3.connect(path / "directory.db")) as db:
        db.executescript(script)
    directory = SqliteDirectory(system_world(MemoryLog()), str(path / "directory.db"))
    try:
        await directory.open()
        return await directory.find(address)
    finally:
        await directory.close()


async def test_a_table_without_the_column_gets_it(tmp_path: Path) -> None:
    assert "send_as" not in OLDER
    found = await read(tmp_path, f"{OLDER}; INSERT INTO accounts (address) VALUES ('ann@example.org')")
    assert found is not None
    assert found.send_as == ()
    found = await read(tmp_path, "UPDATE accounts SET send_as = 'a@b.cc  *@d.ee'")
    assert found is not None
    assert found.send_as == ("a@b.cc", "*@d.ee")


async def test_a_table_of_ones_own_that_lost_it_is_read(tmp_path: Path) -> None:
    directory = SqliteDirectory(system_world(MemoryLog()), str(tmp_path / "directory.db"))
    await directory.open()
    try:
        with closing(sqlite3.connect(tmp_path / "directory.db")) as db:
            db.executescript(f"DROP TABLE accounts; {OLDER}; INSERT INTO accounts (address) VALUES ('ann@example.org')")
        found = await directory.find("ann@example.org")
    finally:
        await directory.close()
    assert found is not None
    assert found.send_as == ()


async def test_senders_are_kept_in_their_one_form_and_refused_if_they_are_none(tmp_path: Path) -> None:
    directory = SqliteDirectory(system_world(MemoryLog()), str(tmp_path / "directory.db"))
    await directory.open()
    try:
        await directory.add([Account("", "ann@example.org", send_as=("Sales@Example.org", "*@xn--bcher-kva.test"))])
        found = await directory.find("ann@example.org")
        assert found is not None
        assert found.send_as == ("sales@example.org", "*@b\u00fccher.test")
        for bad in ("x", "a b@c.dd", "*"):
            with pytest.raises(OperatorError, match="is not an address"):
                await directory.update(found._replace(send_as=(bad,)))
    finally:
        await directory.close()
