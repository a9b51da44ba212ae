"""Owns the simulated database server as its clients meet it: connections over the simulated network, and what befalls them.

A session is a stream like any other, so that delays, cuts and resets of the network fall on it by themselves: a COMMIT whose
answer was lost was done or was not. The far end speaks `asyncpg.Connection`, as far as the index uses it.

The server dies and comes back as it was; a standby takes its place, which has all that was committed, or lags behind; a backup
is put back. Whoever promotes begins a new timeline, whoever restores another system.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import asyncpg
import msgspec

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.postgres.statements import History
from powermail.sim.database import STRANGE, Answer, Refused, Store, Work, is_read
from powermail.sim.net import NamedNetwork, SimNetwork

HOST = "db"
PORT = 5432
_HEAD = 4
_HISTORY = "the history that the server is on"
_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class _Frames:
    """Messages in a stream of octets."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> list[Any]:
        """The messages that are whole now."""
        self._data += data
        found = []
        while len(self._data) >= _HEAD:
            end = _HEAD + int.from_bytes(self._data[:_HEAD], "big")
            if len(self._data) < end:
                break
            found.append(msgspec.msgpack.decode(self._data[_HEAD:end]))
            del self._data[:end]
        return found


def _frame(message: Any) -> bytes:
    octets = msgspec.msgpack.encode(message)
    return len(octets).to_bytes(_HEAD, "big") + octets


class DatabaseServer:
    """The server, whichever machine it is on at the time."""

    def __init__(
        self, net: SimNetwork, path: str, chance: random.Random, now: Callable[[], float], strange: Callable[[str], None]
    ) -> None:
        """`path` is a file of the real machine; `now` the server's clock, UTC. `strange` hears of what cannot be run here."""
        self.strange = strange
        self.chance = chance
        self.history = History("1", "1")
        self.store = Store(path, now)
        self.refuses = 0.0  # the part of statements that end in a serialization failure or a deadlock
        self.loses = 0  # so many of the next COMMITs, and of changes without BEGIN, are never answered
        self.slow_s = 0.0  # that each statement takes
        self.counts: dict[str, int] = {}  # what happened here, by a word
        self._net = net
        self._own: NamedNetwork = net.named(HOST)
        self._sessions: dict[_Session, None] = {}

    def count(self, what: str) -> None:
        """It happened once more."""
        self.counts[what] = self.counts.get(what, 0) + 1

    async def start(self) -> None:
        """Takes connections."""
        await self._own.listen(HOST, PORT, lambda: _Session(self))

    def die(self) -> None:
        """All connections break; what was not committed is rolled back; nobody listens."""
        self._net.listeners.pop(PORT, None)
        self._net.break_some(HOST, 1.0)
        for session in list(self._sessions):
            session.end()

    def copy(self, name: str) -> None:
        """What a standby or a backup has at this moment."""
        self.store.copy(name)

    def promote(self, name: str = "") -> None:
        """A standby takes the place of the dead server: with all that was committed, or as the copy `name` is."""
        self.history = self.history._replace(timeline=str(int(self.history.timeline) + 1))
        if name:
            self.store.become(name)

    def restore(self, name: str) -> None:
        """An older backup of the rows is put back, under the same server: nothing but the rows says so."""
        self.store.become(name)

    def joined(self, session: _Session) -> None:
        """A client is there."""
        self._sessions[session] = None

    def left(self, session: _Session) -> None:
        """It is gone."""
        self._sessions.pop(session, None)


class _Session(asyncio.Protocol):
    """One client's connection, as the server sees it."""

    def __init__(self, server: DatabaseServer) -> None:
        self._server = server
        self._frames = _Frames()
        self._transport: Any = None
        self._asked: deque[tuple[str, Sequence[Any], bool]] = deque()
        self._work: Work | None = None
        self._serving: asyncio.Task[None] | None = None
        self._idle_since = 0.0
        self._watching = False
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._server.joined(self)

    def data_received(self, data: bytes) -> None:
        for text, args, many in self._frames.take(data):
            self._asked.append((text, [tuple(row) for row in args] if many else tuple(args), many))
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """The session is over: what it had not committed did not happen."""
        self._over = True
        self._server.left(self)
        if self._serving is not None:
            self._serving.cancel()
        if self._work is not None:
            self._server.store.rollback(self._work)
            self._work = None

    def _look(self) -> None:
        """Ends the session if it is idle in a transaction for longer than it may be."""
        self._watching = False
        if self._work is None or self._over:
            return
        loop = asyncio.get_running_loop()
        left_s = self._idle_since + limits.INDEX_IDLE_S - loop.time()
        if self._serving is None and left_s <= 0:
            self._server.count("idle-sessions-ended")
            self.end()
            self._transport.close()
            return
        self._watching = True
        loop.call_later(max(left_s, 0.1), self._look)

    def _next(self) -> None:
        """Does what is asked, in order: at once, unless it has to wait for something."""
        while self._asked and self._serving is None and not self._over:
            text, args, many = self._asked.popleft()
            if self._server.slow_s or self._may_wait(text):
                waiting = self._server.slow_s
                answer = None if waiting else self._at_once(text, args, many)
                if answer is None:
                    self._serving = asyncio.get_running_loop().create_task(self._later(waiting, text, args, many))
                    return
                self._answer(answer)
            else:
                self._answer(self._end_or_begin(text))

    def _answer(self, answer: tuple[Any, ...]) -> None:
        if self._over:
            return
        loop = asyncio.get_running_loop()
        self._idle_since = loop.time()
        if self._work is not None and not self._watching:
            self._watching = True
            loop.call_later(limits.INDEX_IDLE_S, self._look)
        self._transport.write(_frame(answer))

    @staticmethod
    def _may_wait(text: str) -> bool:
        return text not in ("BEGIN", "COMMIT", "ROLLBACK", _SNAPSHOT, _HISTORY)

    def _at_once(self, text: str, args: Sequence[Any], many: bool) -> tuple[Any, ...] | None:
        """The answer; None if others hold what it needs."""
        try:
            self._refuse(text)
            return self._server.store.run_at_once(self._work, text, args, many)
        except Refused as refused:
            return self._refused(refused)

    def _refuse(self, text: str) -> None:
        """Raises Refused now and then, as the server chooses."""
        work, server = self._work, self._server
        changes = work.snapshot is None if work is not None else not is_read(text)
        if changes and server.refuses and server.chance.random() < server.refuses:
            if work is not None:
                server.store.fail(work)
            raise Refused(server.chance.choice(["SerializationError", "DeadlockDetectedError"]), "by the server's choice")

    def _refused(self, refused: Refused) -> tuple[Any, ...]:
        self._server.count(refused.name)
        if refused.name == STRANGE:
            self._server.strange(str(refused))
        return refused.name, str(refused)

    async def _later(self, waiting: float, text: str, args: Sequence[Any], many: bool) -> None:
        if waiting:
            await asyncio.sleep(waiting)
        answer: tuple[Any, ...]
        if not self._may_wait(text):
            answer = self._end_or_begin(text)
        else:
            lost = self._work is None and not is_read(text) and self._server.loses > 0
            if lost and not self._loses("statements"):
                self._cut()
                return
            try:
                answer = tuple(await self._server.store.run(self._work, text, args, many, limits.INDEX_LOCK_S))
            except Refused as refused:
                answer = self._refused(refused)
            if lost:
                self._cut()
                return
        self._serving = None
        self._answer(answer)
        self._next()

    def _end_or_begin(self, text: str) -> tuple[Any, ...]:
        store = self._server.store
        if text == _HISTORY:
            return [tuple(self._server.history)], "SELECT 1"
        if text == "COMMIT":
            return tuple(self._commit())
        if text == "ROLLBACK":
            if self._work is not None:
                store.rollback(self._work)
            self._work = None
        else:
            self._work = store.begin(text == _SNAPSHOT)
        return [], text

    def _loses(self, what: str) -> bool:
        """The answer to a change will be lost; True if it is to be done."""
        self._server.loses -= 1
        done = self._server.chance.random() < 0.5
        self._server.count(f"{what}-lost-{'done' if done else 'undone'}")
        return done

    def _cut(self) -> None:
        """The connection breaks, without an answer."""
        self._over = True
        self._transport.reset()

    def _commit(self) -> Answer:
        work, self._work = self._work, None
        server = self._server
        if server.loses and work is not None and work.writes:
            (server.store.commit if self._loses("commits") else server.store.rollback)(work)
            self._cut()
        elif work is not None:
            server.store.commit(work)
        return Answer([], "COMMIT")


class SimConnection(asyncio.Protocol):
    """The client's end: what the index uses of `asyncpg.Connection`."""

    def __init__(self) -> None:
        self._frames = _Frames()
        self._transport: Any = None
        self._waiter: asyncio.Future[Any] | None = None
        self._closed = False
        self._in_transaction = False
        self._late_at = 0.0  # what is asked now must be answered by then
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._frames.take(data):
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._waiter is not None and not self._waiter.done():
            lost = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            self._waiter.set_exception(lost)

    def terminate(self) -> None:
        """As asyncpg's: closes it as it is, without a word."""
        if not self._closed:
            self._closed = True
            if self._transport is not None:
                self._transport.close()

    def is_closed(self) -> bool:
        """As asyncpg's."""
        return self._closed

    def is_in_transaction(self) -> bool:
        """As asyncpg's."""
        return self._in_transaction

    async def _ask(self, text: str, args: Sequence[Any], many: bool = False) -> Answer:
        if self._closed:
            raise asyncpg.InterfaceError("connection is closed")
        if self._waiter is not None:
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        self._transport.write(_frame((text, tuple(args), many)))
        self._late_at = loop.time() + limits.INDEX_COMMAND_S
        if self._timer is None:
            self._timer = loop.call_at(self._late_at, self._look)
        try:
            found = await waiter
        except (TimeoutError, asyncio.CancelledError):
            self.terminate()  # what becomes of it is not waited for
            raise
        finally:
            self._waiter = None
        if isinstance(found[0], str):
            error: Exception = getattr(asyncpg, found[0])(found[1])
            raise error
        if text.startswith(("BEGIN", "COMMIT", "ROLLBACK")):
            self._in_transaction = text.startswith("BEGIN")
        return Answer([tuple(row) for row in found[0]], found[1])

    def _look(self) -> None:
        """One timer for all that is asked, one after the other: few of them wait for long."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._late_at:
            self._timer = loop.call_at(self._late_at, self._look)
        else:
            self._waiter.set_exception(TimeoutError())

    async def fetch(self, text: str, *args: Any) -> list[tuple[Any, ...]]:
        """As asyncpg's."""
        return (await self._ask(text, args)).rows

    async def fetchrow(self, text: str, *args: Any) -> tuple[Any, ...] | None:
        """As asyncpg's."""
        rows = (await self._ask(text, args)).rows
        return rows[0] if rows else None

    async def fetchval(self, text: str, *args: Any) -> Any:
        """As asyncpg's."""
        row = await self.fetchrow(text, *args)
        return row[0] if row is not None else None

    async def execute(self, text: str, *args: Any) -> str:
        """As asyncpg's."""
        return (await self._ask(text, args)).status

    async def executemany(self, text: str, rows: Sequence[Sequence[Any]]) -> None:
        """As asyncpg's."""
        await self._ask(text, [tuple(row) for row in rows], many=True)

    def transaction(self) -> _Block:
        """As asyncpg's."""
        return _Block(self)


class _Block:
    """`async with connection.transaction()`."""

    def __init__(self, connection: SimConnection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        await self._connection.execute("BEGIN")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.execute("COMMIT" if error is None else "ROLLBACK")


def connector(net: SimNetwork) -> Callable[..., Any]:
    """What takes the place of `index.postgres.addresses.connect`: the user in the address is the machine that asks."""

    async def connect(url: str, patience_s: float | None = None) -> tuple[SimConnection, History]:
        machine = url.partition("://")[2].partition("@")[0]
        connection = SimConnection()
        try:
            async with asyncio.timeout(limits.INDEX_CONNECT_S):
                await net.named(machine).connect(HOST, PORT, lambda: connection)
                system, timeline = await connection.fetchrow(_HISTORY) or ("", "")
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            connection.terminate()
            raise IndexTrouble(f"{HOST}: {error or type(error).__name__}") from error
        except BaseException:
            connection.terminate()
            raise
        return connection, History(system, timeline)

    return connect
