"""Moving an installation into a database, and back: all goes along, a kill at any point loses nothing, never do both serve."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from powermail.base.disk import SystemDisk
from powermail.base.log import NullLog
from powermail.base.world import system_world
from powermail.index.moving import MOVED_AS, OF_ONE_ENGINE
from powermail.index.postgres.moving import PostgresSide
from powermail.index.sqlite import SqliteIndex
from powermail.index.sqlite.moving import SqliteSide
from tests.cli.moving_rows import contents, fill
from tests.cli.support import Done, make, powermail
from tests.servers import Database

WAIT_S = 120.0
NOT_COMPARED = ("meta", "writers")  # each side has rows of its own there


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped installation whose index has rows in every table."""
    data = tmp_path_factory.mktemp("filled") / "data"
    make(data)
    counts = fill(str(data / "index.db"))
    assert len(counts) > 20 and all(count for table, count in counts.items() if table != "nodes"), counts
    return data


@pytest.fixture
def data(filled: Path, tmp_path: Path) -> str:
    """A copy of it."""
    shutil.copytree(filled, tmp_path / "data", symlinks=True)
    return str(tmp_path / "data")


def columns(database: Database) -> dict[str, set[str]]:
    """What tables and columns a database has."""
    found: dict[str, set[str]] = {}
    text = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
    for line in database.sql(text).splitlines():
        table, column = line.split("\t")
        found.setdefault(table, set()).add(column)
    return found


def is_whole(database: Database, before: dict[str, list[Any]]) -> dict[str, int]:
    """The database has as many rows in each table as there were; how many."""
    parts = (f"SELECT '{table}', count(*) FROM {table}" for table in before if table not in NOT_COMPARED)
    rows = [line.split("\t") for line in database.sql(" UNION ALL ".join(parts)).splitlines()]
    found = {table: int(count) for table, count in rows}
    assert found == {table: len(before[table]) for table in found}
    return found


def move(data: str, to: str, *more: str) -> Done:
    return powermail("index", "move", "--to", to, "--data", data, "--json", *more)


def aside(data: str) -> str:
    """The file that was set aside."""
    (path,) = Path(data).glob("index.db.moved-*")
    return str(path)


def test_every_table_goes_to_postgresql_and_back(data: str, postgresql: Database) -> None:
    before = contents(f"{data}/index.db")
    done = move(data, postgresql.url)
    assert done.status == 0, done
    told = {row["table"]: row["rows"] for row in done.json()["tables"]}
    assert set(told) == set(before) - {"meta"}, "the schema is walked: a table that was added is moved"
    assert all(len(row["sha256"]) == 64 for row in done.json()["tables"])
    assert {table: told[table] for table in told if table not in NOT_COMPARED} == is_whole(postgresql, before)
    assert done.json()["set_aside"] == aside(data) and not os.path.exists(f"{data}/index.db")
    back = move(data, "sqlite")
    assert back.status == 0, back
    after = contents(f"{data}/index.db")
    sequence = [dict(found["counters"]).pop("sequence") for found in (before, after)]
    assert sequence[0] < sequence[1], "writer slots are numbered on (law 10)"
    for found, number in zip((before, after), sequence, strict=True):
        found["counters"].remove(("sequence", number))
        for name in NOT_COMPARED:
            found.pop(name)
    assert after == before


def test_both_engines_have_the_same_tables_but_for_what_is_said(data: str, postgresql: Database) -> None:
    """A column that one engine has alone stands in `OF_ONE_ENGINE`, or a move refuses."""
    assert move(data, postgresql.url).status == 0
    there = columns(postgresql)
    there.pop("index_version")
    tables = contents(aside(data))
    assert set(there) == set(tables)
    with contextlib.closing(sqlite3.connect(aside(data))) as db:
        here = {name: {row[1] for row in db.execute(f"PRAGMA table_info({name})")} for name in tables}
    odd = {(name, column) for name in here for column in here[name] ^ there[name]}
    assert odd == set(OF_ONE_ENGINE)


def test_the_old_index_is_never_served_again_and_says_why(data: str, postgresql: Database) -> None:
    assert move(data, postgresql.url).status == 0
    assert f'database = "{postgresql.url}"' in Path(f"{data}/powermail.toml").read_text()
    for words in (("--set", "index.database="), ("--set", "index.database=", "--set", f"index.path={aside(data)}")):
        refused = powermail("serve", "--data", data, *words)
        assert refused.status == 2 and f"moved to {postgresql.url}" in refused.sentence(), refused
    rebuilt = powermail("rebuild", "--data", data, "--set", "index.database=")
    assert rebuilt.status == 2 and "moved to" in rebuilt.sentence(), rebuilt
    shutil.copy(aside(data), f"{data}/index.db")  # put back by hand
    refused = powermail("serve", "--data", data, "--set", "index.database=")
    assert refused.status == 2 and "moved to" in refused.sentence()
    os.unlink(f"{data}/index.db.moved")
    refused = powermail("serve", "--data", data, "--set", "index.database=")
    assert refused.status == 2 and "moved to" in refused.sentence()


def test_a_database_that_was_left_is_never_served_again(data: str, postgresql: Database) -> None:
    assert move(data, postgresql.url).status == 0
    assert move(data, "sqlite").status == 0
    assert 'database = ""' in Path(f"{data}/powermail.toml").read_text()
    refused = powermail("list", "ann@example.org", "--data", data, "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and f"moved to {data}/index.db" in refused.sentence()


def test_a_move_beside_a_server_is_refused(data: str, postgresql: Database) -> None:
    with open(f"{data}/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (("index", "move", "--to", postgresql.url), ("directory", "move", "--to", postgresql.url)):
            done = powermail(*words, "--data", data)
            assert done.status == 2 and f"a server runs on {data}: stop it first" in done.sentence()


def test_a_database_in_use_is_refused_and_stays_as_it_is(data: str, postgresql: Database, tmp_path: Path) -> None:
    assert move(data, postgresql.url).status == 0
    make(tmp_path / "other")
    count = postgresql.sql("SELECT count(*) FROM entries")
    done = move(str(tmp_path / "other"), postgresql.url)
    assert done.status == 2 and "has an index of cluster" in done.sentence()
    assert postgresql.sql("SELECT count(*) FROM entries") == count
    assert powermail("list", "postmaster@localhost", "--data", str(tmp_path / "other")).status == 0


def test_a_database_that_others_use_is_not_moved_away(data: str, postgresql: Database) -> None:
    assert move(data, postgresql.url).status == 0
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import asyncio, asyncpg\nasync def main():\n c = await asyncpg.connect({postgresql.url!r}, "
         "server_settings={'application_name': 'powermail'})\n print('ready', flush=True)\n await asyncio.sleep(60)\n"
         "asyncio.run(main())"], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        done = move(data, "sqlite")
        assert done.status == 2 and "connections of PowerMail use" in done.sentence(), done
    finally:
        holder.kill()
        holder.communicate()


def test_a_dry_run_says_what_would_go_and_changes_nothing(data: str, postgresql: Database) -> None:
    before = contents(f"{data}/index.db")
    done = move(data, postgresql.url, "--dry-run")
    assert done.status == 0 and done.json()["moved"] is False
    assert {row["table"]: row["rows"] for row in done.json()["tables"]} == {table: len(rows) for table, rows in before.items()}
    assert contents(f"{data}/index.db") == before and columns(postgresql) == {}


# -- kills ------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing after this happens."""


@contextlib.contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, from_mark: bool = False) -> Iterator[list[str]]:
    """What is durable happens only before the given step; yields the names of what happened. `from_mark`: steps are counted
    from the one on that says in the old index that it was moved.
    """
    done: list[str] = []
    counting = not from_mark

    def counted(kind: Any, name: str) -> None:
        real = getattr(kind, name)

        def sync(self: Any, *args: Any) -> Any:
            nonlocal counting
            counting = counting or (name == "change" and f"'{MOVED_AS}'" in repr(args))
            if counting and len(done) == step:
                raise Killed(name)
            if counting:
                done.append(name)
            return real(self, *args)

        patch.setattr(kind, name, sync)

    with monkeypatch.context() as patch:
        for kind, name in (
            (SqliteSide, "change"), (PostgresSide, "change"), (SystemDisk, "rename"), (SystemDisk, "replace_file"),
            (SystemDisk, "unlink"),
        ):  # fmt: skip
            counted(kind, name)
        yield done


def servable(data: str, database: Database) -> tuple[bool, bool]:
    """Whether a server would take the file, and whether it would take the database; nothing is changed by the look."""
    path = Path(f"{data}/index.db")
    file = path.exists() and not Path(f"{path}.moved").exists()
    if file:
        with contextlib.closing(sqlite3.connect(path)) as db:
            file = "moved" not in {row[0] for row in db.execute("SELECT name FROM meta")}
    notes = database.sql("SELECT name FROM meta").split() if "meta" in columns(database) else []
    return file, "cluster" in notes and not {"moved", "moving"} & set(notes)


def killed_again_and_again(data: str, to: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Runs a move that is killed again and again, until one comes to its end; what could be served after each kill."""
    seen = [servable(data, database)]
    copying = [(0, False), (25, False), (0, True)]  # the last: all is copied and compared
    for step, from_mark in [*copying, (1, True), *[(1, False)] * 20]:
        with killed_at(step, monkeypatch, from_mark) as done, contextlib.suppress(Killed):
            assert move(data, to).status == 0
            seen.append(servable(data, database))
            assert len(seen) > 7, "it was killed"
            return seen
        assert len(done) == step
        seen.append(servable(data, database))
    raise AssertionError("it does not go on where it was")


@pytest.mark.parametrize("back", [False, True])
def test_a_move_that_is_killed_at_any_point_goes_on_and_never_do_both_serve(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    before = contents(f"{data}/index.db")
    if back:
        assert move(data, postgresql.url).status == 0
    seen = killed_again_and_again(data, "sqlite" if back else postgresql.url, postgresql, monkeypatch)
    assert (True, True) not in seen
    first, last = ((False, True), (True, False)) if back else ((True, False), (False, True))
    assert seen[0] == first and seen[-1] == last
    assert (False, False) in seen, "it was killed between the old one's end and the new one's beginning too"
    if back:
        after = contents(f"{data}/index.db")
        assert {name: len(rows) for name, rows in after.items() if name not in NOT_COMPARED} == {
            name: len(rows) for name, rows in before.items() if name not in NOT_COMPARED
        }
    else:
        is_whole(postgresql, before)


async def purge_somebody(path: str) -> None:
    index = SqliteIndex(system_world(NullLog()), path)
    await index.open()
    await index.note_purged("somebody")
    await index.close()


def test_an_index_that_was_served_between_two_runs_is_moved_anew(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 10: every transaction raises a writer slot, so that nothing of before is taken for what is now."""
    with killed_at(30, monkeypatch), pytest.raises(Killed):
        move(data, postgresql.url)
    asyncio.run(purge_somebody(f"{data}/index.db"))  # it is still served
    refused = powermail("index", "migrate", "--data", data, "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and "powermail index move" in refused.sentence(), "what is half there is nobody's"
    before = contents(f"{data}/index.db")
    assert move(data, postgresql.url).status == 0
    is_whole(postgresql, before)
    assert postgresql.sql("SELECT account FROM purged WHERE account = 'somebody'").strip() == "somebody"


def test_a_row_that_is_not_what_it_was_is_named_and_the_index_stays(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(0, monkeypatch, from_mark=True), pytest.raises(Killed):
        move(data, postgresql.url)
    postgresql.sql("UPDATE changes SET flags = flags + 1 WHERE modseq = 7")
    refused = move(data, postgresql.url)
    assert refused.status == 1 and "changes" in refused.sentence() and "[7, 7]" in refused.sentence(), refused
    assert servable(data, postgresql) == (True, False)
    assert move(data, postgresql.url).status == 0, "the next run begins anew"
    assert postgresql.sql("SELECT count(*) FROM changes").strip() == "40"


KILLED = """
import os, signal, sys
from powermail.cli.main import main
from powermail.index.postgres.moving import PostgresSide
from powermail.index.postgres.statements import text_of

calls, real = 0, PostgresSide._change

async def change(side, work, provided):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        await side._connection.execute("BEGIN")
        for text, rows in work:
            await side._connection.executemany(text_of(text), rows)
        os.kill(os.getpid(), signal.SIGKILL)
    await real(side, work, provided)

PostgresSide._change = change
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("step", [1, 12, 40])
def test_a_move_goes_on_after_kill_9_in_the_middle_of_a_page(data: str, postgresql: Database, step: int) -> None:
    """A process of its own: the page that was on its way is not there, whatever had been sent of it."""
    before = contents(f"{data}/index.db")
    words = [sys.executable, "-c", KILLED, str(step), "index", "move", "--to", postgresql.url, "--data", data]
    killed = subprocess.run(words, capture_output=True, timeout=WAIT_S, check=False)
    assert killed.returncode == -signal.SIGKILL, killed
    assert servable(data, postgresql) == (True, False)
    assert move(data, postgresql.url).status == 0
    is_whole(postgresql, before)
    assert servable(data, postgresql) == (False, True)
