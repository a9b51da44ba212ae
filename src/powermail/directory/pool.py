"""Owns connections to a database of several hosts: bounded, raced, never waited for without a limit, let go of when in doubt.

The hosts are tried in order, the next one when the one before has failed or not answered in time, each with a time-out of its
own: the drivers' pools give one time-out to all of them, and a host that is cut off eats it. A connection whose call ended in
any other way than an answer is not used again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.database_url import Host
from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.directory.rows import Value
from powermail.directory.statement import Statement

Row = Sequence[Value]


class Broken(DirectoryTrouble):
    """This server cannot be asked: gone, hung, starting, or no primary. Another may answer."""

    away = True


class Contended(DirectoryTrouble):
    """A transaction met another one and was undone: it may be tried again."""


class Refused(OperatorError):
    """A constraint of the database forbids it. `twice` is true where a value exists already."""

    def __init__(self, text: str, twice: bool) -> None:
        super().__init__(text)
        self.twice = twice


class Column(NamedTuple):
    """A column of a statement's answer. `kind` is number, text, flag, unknown (told by values only), or the server's word."""

    name: str
    kind: str


class Session(Protocol):
    """One connection, used by one call at a time.

    All raise Broken, Contended, Refused, RowTrouble where this value cannot be asked for, else DirectoryTrouble.
    """

    host: Host

    async def rows(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> Sequence[Row]:
        """What a statement answers; outside of a transaction it sees all that was committed."""

    async def change(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> int:
        """How many rows a statement changed."""

    async def columns(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> list[Column]:
        """The columns that it would answer with."""

    def end(self) -> None:
        """Closes the connection without waiting for the server."""


class Pool:
    """At most so many connections. Those that rest are kept, the last used on top."""

    def __init__(self, connect: Callable[[Host], Awaitable[Session]], hosts: Sequence[Host], clock: Clock, size: int) -> None:
        """`connect` raises DirectoryTrouble, or OperatorError when that host will never let us in."""
        self._connect = connect
        self._hosts = list(hosts)
        self._clock = clock
        self._room = asyncio.Semaphore(size)
        self._resting: deque[tuple[Session, float]] = deque()
        self._closed = False

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A connection for one call. Raises DirectoryTrouble, OperatorError."""
        session = await self._taken()
        error: BaseException | None = None
        try:
            yield session
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._given(session, error)

    async def rows(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> Sequence[Row]:
        """What one statement answers, on any connection: most of what is ever asked. Raises as `Session.rows`."""
        session = await self._taken()
        error: BaseException | None = None
        try:
            return await session.rows(statement, values, wait_s)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._given(session, error)

    async def _taken(self) -> Session:
        await self._room.acquire()
        try:
            return self._rested() or await self._raced()
        except BaseException:
            self._room.release()
            raise

    def _given(self, session: Session, error: BaseException | None) -> None:
        """Back from a call: kept if the server said itself what came of it."""
        self._room.release()
        if isinstance(error, Broken):
            self._suspect(session.host)
        answered = error is None or (isinstance(error, DirectoryTrouble | OperatorError) and not isinstance(error, Broken))
        if answered and not self._closed:
            self._resting.append((session, self._clock.monotonic()))
        else:
            session.end()

    def _rested(self) -> Session | None:
        oldest = self._clock.monotonic() - limits.DIRECTORY_IDLE_S
        while self._resting and self._resting[0][1] < oldest:
            self._resting.popleft()[0].end()
        return self._resting.pop()[0] if self._resting else None

    def _suspect(self, host: Host) -> None:
        """Nothing to this host is used again, and it is tried last from now on."""
        for session, _ in [one for one in self._resting if one[0].host == host]:
            session.end()
        self._resting = deque(one for one in self._resting if one[0].host != host)
        self._hosts.remove(host)
        self._hosts.append(host)

    async def _raced(self) -> Session:
        """A new connection, to the first host that gives one."""
        left = list(self._hosts)
        trying: set[asyncio.Task[Session]] = set()
        troubles: list[BaseException] = []
        won: Session | None = None
        try:
            while won is None and (left or trying):
                if left:
                    trying.add(asyncio.create_task(self._tried(left.pop(0))))
                wait_s = limits.DIRECTORY_NEXT_HOST_S if left else None
                done, _ = await asyncio.wait(trying, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is not None:
                        trying.discard(task)
                        troubles.append(error)
                    elif won is None:
                        trying.discard(task)
                        won = task.result()
        finally:
            for task in trying:
                task.cancel()
            for late in await asyncio.gather(*trying, return_exceptions=True):
                if not isinstance(late, BaseException):
                    late.end()
        if won is not None:
            return won
        for error in troubles:
            if isinstance(error, OperatorError):  # says what to do
                raise error
        raise troubles[0]

    async def _tried(self, host: Host) -> Session:
        try:
            async with asyncio.timeout(limits.DIRECTORY_CONNECT_S):
                return await self._connect(host)
        except TimeoutError as error:
            raise Broken(f"{host} did not answer within {limits.DIRECTORY_CONNECT_S:g} s") from error

    def close(self) -> None:
        """Ends what rests, and each other connection when its call is over."""
        self._closed = True
        while self._resting:
            self._resting.pop()[0].end()
