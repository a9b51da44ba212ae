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
from powermail.index.postgres.connection import _CLOCK
from powermail.index.postgres.deliver import _CLAIM, _ENTER, _LOCK, _LOOK_AND_LOCK, _SETTLED
from powermail.index.postgres.leases import _RELEASE, _take
from powermail.index.postgres.statements import text_of
from powermail.index.sql.core import LEFT_OUT
from powermail.index.sql.engine import NODE_COLUMNS
from powermail.sim.loop import run
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


class Leases:
    """Takes and gives back a job over one connection with a writer slot; what the server says: was the slot there, was
    anything changed.
    """

    def __init__(self, connection: Any, number: int) -> None:
        self._connection = connection
        self._number = number
        self.count = 0

    async def begin(self) -> Leases:
        await self._connection.execute("INSERT INTO writers VALUES ($1, 'tag', 0, 0, 0, 0)", self._number)
        return self

    async def take(self, owner: str, seconds: float = 60.0) -> tuple[int, ...]:
        return await self._ask(_take(_CLOCK), "scrub a", owner, seconds, limits.LEASE_S_MAX)

    async def release(self, owner: str) -> tuple[int, ...]:
        return await self._ask(_RELEASE, "scrub a", owner)

    async def _ask(self, text: str, *args: Any) -> tuple[int, ...]:
        slot = (self._number, "tag", self.count, LEFT_OUT)
        found = tuple(await self._connection.fetchrow(text_of(text), *slot, *args, 0, 1.5, *slot))
        self.count += found[1]
        return found


TAKEN, REFUSED, NO_SLOT = (1, 1), (1, 0), (0, 0)


async def leased(connection: Any) -> list[tuple[str, Any]]:
    """Who has the job, and for how long from now."""
    rows = await connection.fetch(f"SELECT owner, until - {_CLOCK} FROM leases")
    return [(owner, pytest.approx(left_s, abs=5.0)) for owner, left_s in rows]


async def test_a_lease_is_taken_refused_renewed_and_given_back(connect: Open) -> None:
    connection = await connect()
    await connection.execute(_PUT, "round", 7)
    one = await Leases(connection, 1).begin()
    assert await one.take("me") == TAKEN and await leased(connection) == [("me", 60.0)]
    assert await one.take("me", 90.0) == TAKEN and await leased(connection) == [("me", 90.0)]
    assert await one.take("you") == REFUSED and await one.release("you") == REFUSED
    assert await leased(connection) == [("me", 90.0)]
    for since_s in (-61.0, limits.LEASE_S_MAX + 60.0):  # it is over; it was dated by a clock that ran ahead
        await connection.execute(f"UPDATE leases SET owner = 'other', until = {_CLOCK} + $1", since_s)
        assert await one.take("you") == TAKEN and await leased(connection) == [("you", 60.0)]
    assert await one.release("you") == TAKEN and await leased(connection) == []
    assert await one.release("you") == REFUSED
    writers = await connection.fetch("SELECT count, stopped, round, used_at FROM writers")
    assert [tuple(row) for row in writers] == [(5, 0, 7, 1.5)]


async def test_a_lease_is_neither_taken_nor_given_back_without_the_slot(connect: Open) -> None:
    connection = await connect()
    await connection.execute(_PUT, "round", 7)
    one = await Leases(connection, 1).begin()
    assert await one.take("me") == TAKEN
    for changed in ("count = 0", "count = 1, stopped = 2", "stopped = 0, tag = 'moved'"):
        await connection.execute(f"UPDATE writers SET {changed}")
        assert await one.take("me") == NO_SLOT and await one.release("me") == NO_SLOT
    assert await leased(connection) == [("me", 60.0)]


async def test_a_slot_that_others_write_to_is_waited_for_and_counted_as_they_left_it(connect: Open) -> None:
    """Whoever thinks that it has died notes so; then it goes on."""
    first, second = await connect(), await connect()
    await first.execute(_PUT, "round", 7)
    one = await Leases(first, 1).begin()
    for change, answer, count in (
        ("stopped = 1", TAKEN, 1),
        ("stopped = 1, count = count", TAKEN, 2),
        ("tag = 'x'", NO_SLOT, 2),
    ):
        await second.execute("BEGIN")
        await second.execute(f"UPDATE writers SET {change}")
        asked = asyncio.ensure_future(one.take("me"))
        await _waits(asked)
        await second.execute("COMMIT")
        assert await asked == answer
        assert [tuple(row) for row in await first.fetch("SELECT count, stopped FROM writers")] == [(count, 0)]


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_of_two_that_take_a_lease_at_once_the_second_waits_for_the_first(connect: Open, end: str) -> None:
    first, second = await connect(), await connect()
    await first.execute(_PUT, "round", 7)
    one, other = await Leases(first, 1).begin(), await Leases(second, 2).begin()
    await first.execute("BEGIN")
    assert await one.take("me") == TAKEN
    asked = asyncio.ensure_future(other.take("you"))
    await _waits(asked)
    await first.execute(end)
    assert await asked == (REFUSED if end == "COMMIT" else TAKEN)
    assert await leased(first) == [("me" if end == "COMMIT" else "you", 60.0)]


@pytest.mark.parametrize("seed", range(4))
async def test_a_simulated_server_loses_answers_to_what_is_changed_without_begin(room: Path, seed: int) -> None:
    net = SimNetwork(random.Random(1))
    server = DatabaseServer(net, f"{room}/central.db", random.Random(seed), lambda: NOW, _strange)
    await server.start()
    one, _ = await connector(net)("postgresql://here@db/index")
    await one.execute(_PUT, "kept", 1)
    server.loses = 1
    assert await one.fetchval(_READ, "kept") == 1 and server.loses == 1
    with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
        await one.execute(_ADD, "kept", 1)
    other, _ = await connector(net)("postgresql://here@db/index")
    done = server.counts.get("statements-lost-done", 0)
    assert await other.fetchval(_READ, "kept") == 1 + done and server.loses == 0
    assert done + server.counts.get("statements-lost-undone", 0) == 1
    other.terminate()


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


def test_each_statement_has_its_own_time_to_be_answered(room: Path) -> None:
    """Of the simulated connection alone, which sets one timer for all of them."""

    async def body() -> None:
        net, loop = SimNetwork(random.Random(1)), asyncio.get_running_loop()
        server = DatabaseServer(net, f"{room}/central.db", random.Random(2), lambda: NOW, _strange)
        await server.start()
        connection, _ = await connector(net)("postgresql://here@db/index")
        server.slow_s = 0.7 * limits.INDEX_COMMAND_S
        for _ in range(4):  # all together it takes longer than any of them may
            assert await connection.fetchval(_READ, "none") is None
        server.slow_s = 2 * limits.INDEX_COMMAND_S
        began = loop.time()
        with pytest.raises(TimeoutError):
            await connection.fetchval(_READ, "none")
        assert loop.time() - began == pytest.approx(limits.INDEX_COMMAND_S)
        assert connection.is_closed()
        server.die()
        server.store.close()

    complaints: list[str] = []
    run(body(), 1, complaints.append)
    assert complaints == []
