"""`powermail rebuild`: what can be used stays until its successor is whole, what an earlier run has left is looked at, and no
node is passed over without a word.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest

from powermail.base import limits
from powermail.base.disk import SystemDisk
from powermail.base.sqlite_files import SUFFIXES
from powermail.storage.layout import Layout, LayoutRow, format_layout
from tests.cli.support import Done, make, powermail
from tests.cli.test_backup import log_of_another, tables
from tests.cli.test_moving import Killed, killed_at, move
from tests.servers import Database, Postgres


def rebuild(data: str, *words: str) -> Done:
    return powermail("rebuild", "--data", data, "--json", *words)


def shown(data: str) -> list[str]:
    """What the directory and the index know of, by a command that opens both."""
    assert powermail("verify", "--data", data).status == 0
    return [row["address"] for row in powermail("account", "list", "--data", data, "--json").json()]


# -- an index in a file ------------------------------------------------------------------------------------------------------


def test_a_good_index_stays_in_its_place_until_the_new_one_is_whole(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Path(f"{data}/index.db").read_bytes()
    os.rename(f"{data}/nodes/b/identity", f"{data}/nodes/b/away")
    refused = rebuild(data, "--yes")
    assert refused.status == 2 and "node b cannot be read" in refused.json()["error"], refused
    assert Path(f"{data}/index.db").read_bytes() == before and not list(Path(data).glob("*before-rebuild*"))
    os.rename(f"{data}/nodes/b/away", f"{data}/nodes/b/identity")

    def full(disk: SystemDisk, old: str, new: str) -> None:
        raise OSError(28, "No space left on device", new)

    with monkeypatch.context() as patch:
        patch.setattr(SystemDisk, "rename", full)
        assert rebuild(data, "--yes").status == 2
    assert Path(f"{data}/index.db").read_bytes() == before
    done = rebuild(data, "--yes")
    assert done.status == 0, done
    (aside,) = Path(data).glob("index.db.before-rebuild-*")
    assert aside.read_bytes() == before and shown(data)


@pytest.mark.parametrize("gone", [True, False])
def test_a_log_that_was_left_behind_is_not_played_into_a_new_index(data: str, gone: bool) -> None:
    path = Path(data, "index.db")
    if gone:
        path.unlink()
    for suffix in SUFFIXES[1:]:
        Path(f"{path}{suffix}").write_bytes(log_of_another(path))
    assert rebuild(data, "--yes").status == 0
    assert "foreign_table" not in tables(path)
    if gone:  # else it was played into the old one when that was looked at, as it would be by anybody
        assert len([one for one in os.listdir(data) if "before-rebuild" in one]) == 3, "nothing is thrown away"
    assert shown(data)


# -- which nodes there are -----------------------------------------------------------------------------------------------------


def lay(data: str, *rows: LayoutRow) -> None:
    """Writes a layout as a process keeps it."""
    cluster = json.loads(Path(f"{data}/nodes/a/identity").read_text())["cluster"]
    octets = format_layout(Layout(9, rows), cluster)
    Path(f"{data}/layout").write_bytes(octets)


LOCAL = tuple(LayoutRow(name, f"rack-{name}") for name in "abc")


def test_a_layout_that_is_damaged_is_not_passed_over(data: str) -> None:
    """It names nodes of other machines, whose mail would be missing without a word."""
    assert powermail("verify", "--data", data).status == 0  # which keeps one
    path = Path(f"{data}/layout")
    whole = path.read_bytes()
    for octets in (b"", whole[:-3], whole.replace(b"rack-a", b"rack-x"), os.urandom(100), whole[:80] + b"\xff" + whole[81:]):
        path.write_bytes(octets)
        refused = rebuild(data, "--yes")
        assert refused.status == 2 and "is damaged" in refused.json()["error"], refused
        assert "--by-settings" in refused.json()["error"] and "files/layout" in refused.json()["error"]
        assert not list(Path(data).glob("*before-rebuild*"))
    assert rebuild(data, "--yes", "--by-settings").status == 0
    path.write_bytes(whole)
    assert rebuild(data, "--yes").status == 0


def test_a_layout_that_is_missing_in_a_cluster_is_not_passed_over(data: str) -> None:
    assert rebuild(data, "--yes").status == 0, "one machine without a layout is as a release before left it"
    assert powermail("cluster", "init", "--data", data).status == 0
    Path(f"{data}/layout").unlink(missing_ok=True)
    refused = rebuild(data, "--yes")
    assert refused.status == 2 and "is missing" in refused.json()["error"] and "--by-settings" in refused.json()["error"]
    assert rebuild(data, "--yes", "--by-settings").status == 0


def test_a_node_that_nobody_here_reaches_is_named(data: str) -> None:
    """Only the process that has its path reads it."""
    lay(data, *LOCAL, LayoutRow("far", "rack-far"))
    refused = rebuild(data, "--yes")
    assert refused.status == 2 and "node far of group rack-far" in refused.json()["error"], refused
    done = rebuild(data, "--yes", "--without", "far")
    assert done.status == 1 and "without node far" in done.json()["left_out"][0], done


# -- an index in a database ----------------------------------------------------------------------------------------------------


class BrokenOff(NamedTuple):
    """A rebuild into a database that was killed when the nodes were read, and before the new index had its place."""

    data: Path
    database: Database


@pytest.fixture(scope="module")
def once_broken_off(tmp_path_factory: pytest.TempPathFactory, _postgresql_of_this_process: Postgres) -> Iterator[BrokenOff]:
    """One that nobody changes."""
    _postgresql_of_this_process.heal()
    data, database = tmp_path_factory.mktemp("broken-off") / "data", _postgresql_of_this_process.create()
    make(data)
    assert move(str(data), database.url).status == 0
    with pytest.MonkeyPatch.context() as patch, killed_at(0, patch, from_mark=True), pytest.raises(Killed):
        rebuild(str(data), "--yes")
    assert (data / "index.rebuilding.db.result").exists()
    yield BrokenOff(data, database)
    database.drop()


@pytest.fixture
def in_copy(once_broken_off: BrokenOff, postgresql_server: Postgres, tmp_path: Path) -> Iterator[BrokenOff]:
    """A copy of it, with a copy of its database."""
    shutil.copytree(once_broken_off.data, tmp_path / "data", symlinks=True)
    database = postgresql_server.create(template=once_broken_off.database.name)
    settings = tmp_path / "data" / "powermail.toml"
    settings.write_text(settings.read_text().replace(once_broken_off.database.url, database.url))
    yield BrokenOff(tmp_path / "data", database)
    database.drop()


@pytest.fixture
def broken_off(in_copy: BrokenOff) -> str:
    """Its directory."""
    return str(in_copy.data)


def why(done: Done) -> str:
    """Why what an earlier run had read was not used."""
    assert done.status in (0, 1) and "error" not in done.json(), done
    return str(done.json()["began_anew"])


def test_a_rebuild_that_was_killed_goes_on_with_what_it_has_read(broken_off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr("powermail.keeper.rebuild.Rebuilder.run")
        assert why(rebuild(broken_off, "--yes")) == ""
    assert shown(broken_off) and not list(Path(broken_off).glob("index.rebuilding*"))


def test_what_was_read_otherwise_is_not_used_and_that_is_said(broken_off: str) -> None:
    assert "it was read from all nodes, and is wanted without c" in why(rebuild(broken_off, "--yes", "--without", "c"))
    assert shown(broken_off)


def test_what_was_read_of_other_nodes_is_not_used(broken_off: str) -> None:
    lay(broken_off, *LOCAL[:2], LayoutRow("c", "rack-b"))
    assert "other nodes now, or other groups" in why(rebuild(broken_off, "--yes"))


def test_what_was_read_before_an_index_was_served_again_is_not_used(broken_off: str) -> None:
    """Law 11: whoever served since has found that the nodes know of a later epoch, and raised it."""
    assert powermail("node", "block", "a", "--data", broken_off).status == 0
    assert "an index was served since" in why(rebuild(broken_off, "--yes"))
    assert shown(broken_off)


@pytest.mark.parametrize("harm", ["old", "cut", "no result", "of the release before"])
def test_what_is_old_or_damaged_is_not_used(broken_off: str, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, result = Path(f"{broken_off}/index.rebuilding.db"), Path(f"{broken_off}/index.rebuilding.db.result")
    if harm == "old":
        monkeypatch.setattr(limits, "REBUILD_LEFT_S", 0.0)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif harm == "no result":
        result.write_bytes(b"\xff\xfe")
    else:
        result.write_text('{"mailboxes": 1}')
    said = why(rebuild(broken_off, "--yes"))
    assert {"old": "it is older than", "cut": "is damaged"}.get(harm, "") in said
    assert shown(broken_off)


def test_a_rebuild_that_was_done_is_not_taken_for_the_next_one(broken_off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when all was done but the file; the index was used since, and another rebuild is wanted now."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("powermail.app.rebuilding._Halfway.clear", lambda self: (_ for _ in ()).throw(Killed()))
        rebuild(broken_off, "--yes")
    assert shown(broken_off)
    refused = rebuild(broken_off)
    assert refused.status == 2 and "can be used" in refused.json()["error"], refused
    assert rebuild(broken_off, "--yes").status == 0 and shown(broken_off)


def test_several_indexes_are_set_aside_within_one_second(in_copy: BrokenOff, monkeypatch: pytest.MonkeyPatch) -> None:
    data, name = str(in_copy.data), "powermail_before_20261126_000000"
    monkeypatch.setattr("powermail.app.rebuilding.utc", lambda at: datetime.datetime(2026, 11, 26, tzinfo=datetime.UTC))
    for _ in range(3):
        done = rebuild(data, "--yes")
        assert done.status == 0, done

    async def found() -> list[str]:
        connection = await asyncpg.connect(in_copy.database.url)
        rows = await connection.fetch("SELECT nspname::text FROM pg_namespace WHERE starts_with(nspname, $1) ORDER BY 1", name)
        await connection.close()
        return [row[0] for row in rows]

    assert asyncio.run(found()) == [name, f"{name}_2", f"{name}_3"]


def test_an_index_that_is_elsewhere_is_not_made_anew_where_it_was(data: str, postgresql: Database) -> None:
    """Two indexes of one history would give one number twice."""
    assert move(data, postgresql.url).status == 0 and move(data, "sqlite").status == 0
    refused = rebuild(data, "--yes", "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and "was moved to" in refused.json()["error"], refused


def test_an_index_on_its_way_is_not_made_anew_where_it_goes(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(4, monkeypatch), pytest.raises(Killed):
        move(data, postgresql.url)
    refused = rebuild(data, "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and "`powermail index move` again" in refused.json()["error"], refused


@pytest.mark.parametrize("late", [True, False])
def test_a_commit_whose_answer_is_lost_is_not_said_to_have_changed_nothing(
    in_copy: BrokenOff, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """It was done or not: the sentence says how to learn it, and the next run does."""
    data, real = str(in_copy.data), asyncpg.Connection.execute
    swapping = False

    async def execute(connection: asyncpg.Connection, text: str, *args: object) -> object:
        nonlocal swapping
        swapping = swapping or "SET SCHEMA" in text
        if text == "COMMIT" and swapping:
            if late:
                await real(connection, text)
            connection.terminate()
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        return await real(connection, text, *args)

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "execute", execute)
        done = rebuild(data, "--yes")
    said = done.json()["error"]
    assert done.status == 1 and "is not known" in said and "`powermail rebuild` again" in said, done
    assert "nothing was changed" not in said
    done = rebuild(data)
    assert done.status == 0 if late else done.status == 2 and "can be used" in done.json()["error"], done
    assert rebuild(data, "--yes").status == 0 and shown(data)


def test_the_index_of_another_cluster_is_not_replaced(data: str, postgresql: Database, tmp_path: Path) -> None:
    """Somebody wrote the wrong address: --yes is no leave to take another installation's index away."""
    make(tmp_path / "other")
    assert move(str(tmp_path / "other"), postgresql.url).status == 0
    refused = rebuild(data, "--yes", "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and "belongs to cluster" in refused.json()["error"], refused
    assert shown(str(tmp_path / "other"))
