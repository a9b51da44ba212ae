"""Moving an index that others may have open: nobody opens it any more, who has it open cannot write when it is gone, and what
is written to by somebody else is not published.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from powermail.app.moving import Mover
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.base.log import NullLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.index.moving import MOVED_AS
from powermail.index.postgres import PostgresIndex
from powermail.index.postgres.moving import PostgresSide
from powermail.index.sqlite import cluster_of
from tests.cli.support import make, powermail
from tests.cli.test_moving import Killed, columns, killed_at, move
from tests.servers import Database

Hook = Callable[[], Awaitable[None]]


@pytest.fixture
def in_database(data: str, postgresql: Database) -> str:
    """An installation whose index is in PostgreSQL."""
    assert move(data, postgresql.url).status == 0
    return data


def back(data: str, hook: Hook | None = None) -> Any:
    """A move back into the file, in this loop; `hook` is called when the rows are compared."""
    called = False

    async def progress(done: int, total: int) -> None:
        nonlocal called
        if hook is not None and done == total and not called:
            called = True
            await hook()

    return Mover(system_world(NullLog()), load_file(f"{data}/powermail.toml"), data, progress).index("sqlite")


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot say who uses it: not every engine can."""

    async def nobody(side: PostgresSide) -> int:
        return 0

    monkeypatch.setattr(PostgresSide, "users", nobody)


@contextlib.asynccontextmanager
async def opened(database: Database) -> AsyncIterator[PostgresIndex]:
    """A process that serves the index."""
    index = PostgresIndex(system_world(NullLog()), database.url)
    try:
        await index.open()
        await index.note_purged("before")
        yield index
    finally:
        await index.close()


def notes(database: Database) -> set[str]:
    """What the database says of the index in it."""
    return set(database.sql("SELECT name FROM meta").split())


def test_nobody_opens_an_index_that_is_ordered_to_leave(in_database: str, postgresql: Database) -> None:
    async def story() -> None:
        async def start() -> None:
            with pytest.raises(OperatorError, match=r"is being moved to .*index\.db.*--undo"):
                async with opened(postgresql):
                    raise AssertionError

        await back(in_database, start)

    asyncio.run(story())
    assert cluster_of(f"{in_database}/index.db") and "moved" in notes(postgresql)


@pytest.mark.usefixtures("blind")
def test_what_was_written_meanwhile_is_not_left_behind(in_database: str, postgresql: Database) -> None:
    """Laws 10, 11: the state is compared in the transaction that marks it, not before."""

    async def story() -> None:
        async with opened(postgresql) as index:

            async def write() -> None:
                await index.note_purged("late")

            with pytest.raises(IndexTrouble, match="was used meanwhile"):
                await back(in_database, write)
            await index.note_purged("later")  # it is served where it is

    asyncio.run(story())
    assert not {"moved", "leaving"} & notes(postgresql)
    assert move(in_database, "sqlite").status == 0
    with contextlib.closing(sqlite3.connect(f"{in_database}/index.db")) as db:
        assert {"late", "later"} <= {row[0] for row in db.execute("SELECT account FROM purged")}


@pytest.mark.usefixtures("blind")
def test_who_has_it_open_when_it_is_gone_writes_and_numbers_nothing(in_database: str, postgresql: Database) -> None:
    """One had a slot, one has a connection and none yet, one slept in a transaction that it had begun before."""

    async def story() -> None:
        async with opened(postgresql) as index:
            link = index._writers.all[1]
            await index._ready(link)
            await back(in_database)
            before = postgresql.sql("SELECT count(*) FROM purged")
            for _ in range(3):
                with pytest.raises(IndexTrouble):
                    await index.note_purged("late")
            with pytest.raises(IndexTrouble, match="was moved to"):
                await index._take_slot(link)
            with pytest.raises(IndexTrouble):
                await index.raise_epoch([], "lost")
            with pytest.raises(IndexTrouble):
                await index.totals()
            assert postgresql.sql("SELECT count(*) FROM purged") == before

    asyncio.run(story())


@pytest.mark.usefixtures("blind")
def test_a_transaction_that_was_under_way_is_waited_for(in_database: str, postgresql: Database) -> None:
    """It holds its slot's row: whoever marks the index waits, and then sees that it counted on."""

    async def story() -> None:
        async with opened(postgresql) as index:
            await index.note_purged("one")
            connection = await index._ready(index._readers.all[0])

            async def begin() -> None:
                await connection.execute("BEGIN")
                await connection.execute("UPDATE writers SET count = count + 1 WHERE stopped = 0")
                asyncio.get_running_loop().call_later(0.2, lambda: tasks.append(asyncio.ensure_future(end())))

            async def end() -> None:
                await connection.execute("COMMIT")

            tasks: list[asyncio.Task[None]] = []
            with pytest.raises(IndexTrouble, match="was used meanwhile"):
                await back(in_database, begin)
            await asyncio.gather(*tasks)

    asyncio.run(story())
    assert not {"moved", "leaving"} & notes(postgresql)


def test_a_move_that_is_killed_behind_its_order_is_told_of_and_goes_on_or_is_taken_back(
    in_database: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(3, monkeypatch), pytest.raises(Killed):
        move(in_database, "sqlite")
    assert "leaving" in notes(postgresql)
    for words in (("list", "postmaster@localhost"), ("verify",), ("rebuild",)):
        refused = powermail(*words, "--data", in_database)
        assert refused.status == 2 and "`powermail index move --undo`" in refused.sentence(), refused
    (finding,) = [one for one in powermail("config", "check", "--data", in_database, "--json").json()["findings"]
                  if "being moved" in one["what"]]  # fmt: skip
    assert "--undo" in finding["cure"]
    undone = powermail("index", "move", "--undo", "--data", in_database, "--json")
    assert undone.status == 0 and undone.json() == {"undone": True}, undone
    assert not list(Path(in_database).glob("index.db.moving*"))
    assert powermail("verify", "--data", in_database).status == 0
    assert powermail("index", "move", "--undo", "--data", in_database, "--json").json() == {"undone": False}
    assert move(in_database, "sqlite").status == 0
    refused = powermail("index", "move", "--undo", "--data", in_database)
    assert refused.status == 2 and "nothing to undo" in refused.sentence()
    refused = powermail("index", "move", "--undo", "--data", in_database, "--set", f"index.database={postgresql.url}")
    assert refused.status == 2 and "was moved to" in refused.sentence()


def test_a_move_that_fails_lets_the_index_be_served_where_it_is(
    in_database: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(side: Any, *args: Any) -> Any:
        raise IndexTrouble("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("powermail.index.moving._Move.run", fails)
        done = move(in_database, "sqlite")
        assert done.status == 1 and "the disk is full" in done.sentence()
    assert "leaving" not in notes(postgresql)
    assert powermail("verify", "--data", in_database).status == 0


@contextlib.contextmanager
def held(url: str, name: str) -> Iterator[None]:
    """A process that has a connection, of this name."""
    program = (
        f"import asyncio, asyncpg\nasync def main():\n c = await asyncpg.connect({url!r}, server_settings="
        f"{{'application_name': {name!r}}})\n print('ready', flush=True)\n await asyncio.sleep(60)\nasyncio.run(main())"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def test_a_database_that_others_use_is_not_moved_into(data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another move on its way there, or processes whose settings name it already. A directory is another matter."""
    monkeypatch.setattr("powermail.base.limits.INDEX_CONNECT_S", 1.0)
    with held(postgresql.url, "powermail"):
        done = move(data, postgresql.url)
        assert done.status == 2 and f"connections of PowerMail use {postgresql.url}" in done.sentence(), done
    assert "moving" not in notes(postgresql) and cluster_of(f"{data}/index.db")
    with held(postgresql.url, "powermail-directory"):
        assert move(data, postgresql.url).status == 0


def test_what_somebody_else_writes_in_between_is_never_published(
    data: str, postgresql: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the old one was marked, and another installation moves there: it has it, and the first says so."""
    with killed_at(1, monkeypatch, from_mark=True), pytest.raises(Killed):
        move(data, postgresql.url)
    make(tmp_path / "other")
    assert move(str(tmp_path / "other"), postgresql.url).status == 0
    done = move(data, postgresql.url)
    assert done.status == 2 and "has an index of cluster" in done.sentence(), done


def test_a_copy_that_somebody_spoilt_is_made_anew_from_the_one_that_nobody_changes(
    data: str, postgresql: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise neither could ever be served."""
    shutil.copytree(data, tmp_path / "third")
    with killed_at(1, monkeypatch, from_mark=True), pytest.raises(Killed):
        move(data, postgresql.url)
    with killed_at(5, monkeypatch), pytest.raises(Killed):  # another begins there, and dies
        move(str(tmp_path / "third"), postgresql.url)
    done = move(data, postgresql.url)
    assert done.status == 0 and done.json()["tables"], done
    assert powermail("verify", "--data", data).status == 0


def test_a_move_is_published_only_where_it_was_kept_for(
    data: str, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the mark and the last step another took the place."""
    real = PostgresSide.change
    spoilt = False

    async def change(side: PostgresSide, work: Any, provided: Any = ()) -> None:
        nonlocal spoilt
        if not spoilt and any(MOVED_AS not in str(rows) and "moved_from" in str(rows) for _, rows in work):
            spoilt = True
            postgresql.sql("UPDATE meta SET value = 'another' WHERE name = 'moving'")
        await real(side, work, provided)

    monkeypatch.setattr(PostgresSide, "change", change)
    done = move(data, postgresql.url)
    assert done.status == 1 and "was written to by somebody else" in done.sentence(), done
    assert spoilt and "cluster" not in notes(postgresql)
    assert move(data, postgresql.url).status == 0, "copied anew"
    assert columns(postgresql) and "cluster" in notes(postgresql)


@pytest.mark.parametrize(
    "to", ["ann:sesame@db/mail", "postgresql:ann:sesame@db/mail", "postgresql://ann:ses/ame@db/mail", "file"]
)
def test_an_address_that_is_none_is_not_repeated(data: str, to: str) -> None:
    for what in ("index", "directory"):
        refused = powermail(what, "move", "--to", to, "--data", data)
        assert refused.status == 2 and "address" in refused.sentence(), refused
        assert "ses" not in refused.err and "Traceback" not in refused.err
