"""The simulated database server answers as PostgreSQL does, as far as transactions of the index can tell: the same dialogs with
both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from powermail.base import limits
from powermail.index.postgres.deliver import _CLAIM, _ENTER, _LOCK, _LOOK_AND_LOCK, _SETTLED
from powermail.index.postgres.statements import text_of
from powermail.index.sql.engine import NODE_COLUMNS
from powermail.sim.net import SimNetwork
from powermail.sim.server import DatabaseServer, SimConnection, connector
from tests.index.conftest import databases_of
from tests.index.support import NOW

Open = Callable[[], Awaitable[Any]]
_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_PUT = "INSERT INTO counters VALUES ($1, $2)"
_ADD = "UPDATE counters SET value = value + $2 WHERE name = $1"
_READ = "SELECT value FROM counters WHERE name = $1"
_MAILBOX = (
    "INSERT INTO mailboxes (id, account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq, messages,"
    " octets) VALUES ($1, $2, 'INBOX', 7, 1, 1, 1, 0, 1, 1, 0, 0)"
)


def _strange(text: str) -> None:
    raise AssertionError(text)


@pytest_asyncio.fixture(params=["postgres", "simulated"])
async def connect(request: pytest.FixtureRequest, room: Path) -> AsyncIterator[Open]:
    """Opens connections to a server with the empty tables of an index; what waits for a lock waits for a second."""
    made: list[Any] = []
    if request.param == "postgres":
        url = databases_of(request.getfixturevalue("postgresql_server")).take(0).url

        async def open_one() -> Any:
            made.append(await asyncpg.connect(url, server_settings={"lock_timeout": "1000"}))
            return made[-1]

        first = await open_one()
        tables = await first.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'index_version'"
        )
        await first.execute(f"TRUNCATE {', '.join(row[0] for row in tables)}")
    else:
        net = SimNetwork(random.Random(1))
        server = DatabaseServer(net, f"{room}/central.db", random.Random(2), lambda: NOW, _strange)
        await server.start()

        async def open_one() -> Any:
            connection, _ = await connector(net)("postgresql://here@db/index")
            made.append(connection)
            return connection

        first = await open_one()
        for name in ("counters", "placements"):
            await first.execute(f"DELETE FROM {name}")
    for name in ("epoch", "starts", "waiting"):
        await first.execute(_PUT, name, 1)
    yield open_one
    for connection in made:
        connection.terminate()
    await asyncio.sleep(0)


async def _waits(asked: asyncio.Future[Any]) -> None:
    """It has been asked for, and has no answer yet: whoever holds what it needs has not ended."""
    done, _ = await asyncio.wait([asked], timeout=0.2)
    assert not done


async def test_each_statement_sees_what_is_committed_by_then(connect: Open) -> None:
    """READ COMMITTED: what law 7 stands on."""
    one, other = await connect(), await connect()
    await one.execute("BEGIN")
    assert await one.fetchval(_READ, "epoch") == 1
    await other.execute(_ADD, "epoch", 4)
    assert await one.fetchval(_READ, "epoch") == 5
    await one.execute(_ADD, "starts", 1)
    assert (await one.fetchval(_READ, "starts"), await other.fetchval(_READ, "starts")) == (2, 1)
    await other.execute(_ADD, "epoch", 1)
    assert (await one.fetchval(_READ, "epoch"), await one.fetchval(_READ, "starts")) == (6, 2)
    await one.execute("COMMIT")
    assert await other.fetchval(_READ, "starts") == 2


async def test_a_snapshot_sees_one_moment(connect: Open) -> None:
    one, other = await connect(), await connect()
    await one.execute(_SNAPSHOT)
    assert await one.fetchval(_READ, "epoch") == 1
    await other.execute(_ADD, "epoch", 4)
    assert await one.fetchval(_READ, "epoch") == 1
    await one.execute("ROLLBACK")
    assert await one.fetchval(_READ, "epoch") == 5


async def test_who_comes_second_waits_and_goes_on_from_what_the_first_has_left(connect: Open) -> None:
    one, other = await connect(), await connect()
    await one.execute("BEGIN")
    await one.execute(_ADD, "epoch", 1)
    second = asyncio.ensure_future(other.execute(_ADD, "epoch", 10))
    await _waits(second)
    await one.execute("COMMIT")
    assert await second == "UPDATE 1"
    assert await one.fetchval(_READ, "epoch") == 12


async def test_a_key_is_inserted_by_one_of_two(connect: Open) -> None:
    """Law 3: who waits for the first finds the row, or makes it if the first was undone."""
    one, other = await connect(), await connect()
    claim = text_of(_CLAIM)
    values = [b"k"], [1], [b"s"], [0], [1]
    for end, found in (("ROLLBACK", 1), ("COMMIT", 0)):
        await one.execute("BEGIN")
        assert len(await one.fetch(claim, *values)) == 1
        await other.execute("BEGIN")
        second = asyncio.ensure_future(other.fetch(claim, *values))
        await _waits(second)
        await one.execute(end)
        assert len(await second) == found
        await other.execute("ROLLBACK")


async def test_rows_that_are_locked_are_waited_for_and_read_anew(connect: Open) -> None:
    one, other = await connect(), await connect()
    await one.execute(_MAILBOX, 4, "ann")
    await one.execute("BEGIN")
    locked = await one.fetch(text_of(_LOCK), ["ann", "nobody"], ["INBOX", "INBOX"])
    assert [tuple(row)[:4] for row in locked] == [(4, "ann", "INBOX", 1)]
    second = asyncio.ensure_future(other.fetch(text_of(_LOCK), ["ann"], ["INBOX"]))
    await _waits(second)
    await one.execute("UPDATE mailboxes SET uid_next = 9 WHERE id = 4")
    await one.execute("COMMIT")
    assert [row[3] for row in await second] == [9]


async def test_weak_locks_go_together_and_strong_ones_do_not(connect: Open) -> None:
    """A node that is named by a new set of nodes stays a member, while reconcile goes on."""
    one, other = await connect(), await connect()
    await one.execute(f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ('a', 'r', 'i', 0, 0, 0, 0, 'b', 0, 0, 0, 0, 0)")
    await one.execute("BEGIN")
    assert len(await one.fetch("SELECT id FROM nodes WHERE id = ANY($1) ORDER BY id FOR KEY SHARE", ["a"])) == 1
    await other.execute("BEGIN")
    assert await other.fetchval("SELECT place FROM nodes WHERE id = $1 FOR NO KEY UPDATE", "a") == 0
    assert await other.execute("UPDATE nodes SET place = 5 WHERE id = $1", "a") == "UPDATE 1"
    await other.execute("COMMIT")
    expel = asyncio.ensure_future(other.execute("DELETE FROM nodes WHERE id = $1", "a"))
    await _waits(expel)
    await one.execute("ROLLBACK")
    assert await expel == "DELETE 1"


async def test_of_a_ring_of_those_who_wait_one_is_told(connect: Open) -> None:
    one, other = await connect(), await connect()
    for connection, name in ((one, "epoch"), (other, "starts")):
        await connection.execute("BEGIN")
        await connection.execute(_ADD, name, 1)
    both = [one.execute(_ADD, "starts", 1), other.execute(_ADD, "epoch", 1)]
    ends = await asyncio.gather(*both, return_exceptions=True)
    told = [end for end in ends if isinstance(end, Exception)]
    # The one that has waited for a lock as long as anybody does is told so.
    assert told and isinstance(told[0], (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError)), ends
    for connection in (one, other):
        await connection.execute("ROLLBACK")


async def test_a_transaction_that_failed_is_only_rolled_back(connect: Open) -> None:
    one = await connect()
    await one.execute("BEGIN")
    await one.execute(_ADD, "starts", 1)
    with pytest.raises(asyncpg.UniqueViolationError):
        await one.execute(_PUT, "epoch", 1)
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await one.fetchval(_READ, "epoch")
    await one.execute("ROLLBACK")
    assert await one.fetchval(_READ, "starts") == 1


async def test_nobody_waits_for_a_lock_for_ever(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INDEX_LOCK_S", 1.0)
    one, other = await connect(), await connect()
    await one.execute("BEGIN")
    await one.execute(_ADD, "epoch", 1)
    with pytest.raises(asyncpg.LockNotAvailableError):
        await other.execute(_ADD, "epoch", 1)


async def test_what_a_dead_client_had_not_committed_did_not_happen(connect: Open) -> None:
    one, other = await connect(), await connect()
    await one.execute("BEGIN")
    await one.execute(_ADD, "epoch", 1)
    waiting = asyncio.ensure_future(other.execute(_ADD, "epoch", 10))
    await _waits(waiting)
    one.terminate()
    assert await waiting == "UPDATE 1"
    assert await other.fetchval(_READ, "epoch") == 11


async def test_a_batch_enters_as_deliveries_do(connect: Open) -> None:
    """The statements of a delivery, one after the other: insert, look and lock, enter."""
    one = await connect()
    await one.execute(_MAILBOX, 4, "ann")
    await one.execute(_MAILBOX, 5, "bob")
    await one.execute("INSERT INTO placements VALUES (7, 'a b')")
    await one.execute("INSERT INTO purged VALUES ('bob')")
    await one.execute(f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ('a', 'r', 'i', 2, 100, 2, 100, 'b', 0, 0, 0, 0, 0)")
    await one.execute("BEGIN")
    marks = ["a"], ["i"], [2], [200]
    rows = await one.fetch(text_of(_LOOK_AND_LOCK), ["ann", "bob"], ["INBOX"] * 2, *marks, ["ann", "bob"], [7], ["a b"])
    assert [(row[0], row[1], row[2], row[3], row[6], row[9]) for row in rows] == [
        (0, ["bob"], 1, 1, 4, 1),
        (0, ["bob"], 1, 1, 5, 1),
    ]
    behind = await one.fetch(text_of(_SETTLED), [b"k", b"l"], ["a", "a"], ["i", "j"], [2, 2], [50, 200])
    assert sorted(row[0] for row in behind) == [b"k", b"l"]
    entered = await one.execute(
        text_of(_ENTER),
        *([4, 5], [2, 1], [30, 5], [9.0, 9.0]),
        *([4, 4, 5], [0, 1, 0], [b"k", b"l", b"k"], [0, 0, 0], [10, 20, 5], [1.5, 2.5, 1.5]),
    )
    assert entered == "INSERT 0 3"
    await one.execute("COMMIT")
    found = await one.fetch("SELECT mailbox, uid, key, modseq FROM entries ORDER BY mailbox, uid")
    assert [tuple(row) for row in found] == [(4, 1, b"k", 2), (4, 2, b"l", 3), (5, 1, b"k", 2)]
    facts = await one.fetch("SELECT uid_next, modseq, messages, octets, due_at FROM mailboxes ORDER BY id")
    assert [tuple(row) for row in facts] == [(3, 3, 2, 30, 9.0), (2, 2, 1, 5, 9.0)]


async def test_a_simulated_standby_that_lagged_behind_shows_what_it_had(room: Path) -> None:
    net = SimNetwork(random.Random(1))
    server = DatabaseServer(net, f"{room}/central.db", random.Random(2), lambda: NOW, _strange)
    await server.start()
    one, history = await connector(net)("postgresql://here@db/index")
    await one.execute(_PUT, "kept", 1)
    server.copy("standby")
    await one.execute(_PUT, "lost", 1)
    await one.execute("BEGIN")
    await one.execute(_PUT, "never", 1)
    server.die()
    with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
        await one.fetchval(_READ, "kept")
    server.promote("standby")
    await server.start()
    other, after = await connector(net)("postgresql://here@db/index")
    assert isinstance(other, SimConnection)
    assert [await other.fetchval(_READ, name) for name in ("kept", "lost", "never")] == [1, None, None]
    assert (after.system, after.timeline) == (history.system, "2")
    other.terminate()
