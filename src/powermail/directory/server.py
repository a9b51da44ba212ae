"""Owns a database server as directories ask it: look-ups on any host, changes and lists on the primary, each within its limit.

A look-up that finds its connection gone, or no answer on it, is tried once more on a new one, on another host if there is one:
a server that was restarted, or failed over, costs no error. After a change this process asks the primary for a while, so that
it finds what it wrote.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble
from powermail.base.world import World
from powermail.directory.contract import RowTrouble
from powermail.directory.database import Address
from powermail.directory.pool import Broken, Column, Contended, Pool, Refused, Row, Session
from powermail.directory.rows import Value
from powermail.directory.statement import Statement

T = TypeVar("T")
_NOTHING: Mapping[str, Value] = {}
_COMMIT, _ROLLBACK = Statement("COMMIT"), Statement("ROLLBACK")


class Server:
    """The hosts of one address."""

    def __init__(self, world: World, kind: str, address: Address, size: int, read_only: bool = False) -> None:
        """`kind` is postgresql or mysql. `read_only`: nothing may be changed over it. Opens nothing yet."""
        self.kind = kind
        self._clock = world.clock
        self._asking = Pool(connector(kind, address, False, read_only), address.hosts, world.clock, size)
        self._changing = self._asking
        if len(address.hosts) > 1 and not read_only:
            self._changing = Pool(connector(kind, address, True, False), address.hosts, world.clock, size)
        self._changed_at = float("-inf")

    async def rows(self, statement: Statement, values: Mapping[str, Value] = _NOTHING) -> Sequence[Row]:
        """A look-up. Raises DirectoryTrouble, RowTrouble, OperatorError."""
        recent = self._clock.monotonic() - self._changed_at < limits.DIRECTORY_LAG_S
        pool = self._changing if recent else self._asking
        try:
            return await pool.rows(statement, values, limits.DIRECTORY_STATEMENT_S)
        except Broken:
            pass
        return await self._asking.rows(statement, values, limits.DIRECTORY_STATEMENT_S)

    async def listed(self, statement: Statement, values: Mapping[str, Value] = _NOTHING) -> Sequence[Row]:
        """What an operator wants to see: as the primary has it, and it may take long. Raises as `rows`."""
        return await self.with_session(lambda session: session.rows(statement, values, limits.DIRECTORY_LONG_S))

    async def with_session(self, call: Callable[[Session], Awaitable[T]]) -> T:
        """Something on one connection to the primary; once more if the connection was gone. Raises as `rows`."""
        try:
            async with self._changing.session() as session:
                return await call(session)
        except Broken:
            pass
        async with self._changing.session() as session:
            return await call(session)

    async def transaction(self, begin: str, call: Callable[[Session], Awaitable[T]]) -> T:
        """Runs `call` in one transaction, and again if it met another one: it must be able to. Raises as `rows`, Refused."""
        for last in [False] * (limits.DIRECTORY_TRIES_MAX - 1) + [True]:
            try:
                return await self._once(Statement(begin), call)
            except Contended:
                if last:
                    raise
        raise AssertionError

    async def _once(self, begin: Statement, call: Callable[[Session], Awaitable[T]]) -> T:
        wait_s = limits.DIRECTORY_LONG_S
        async with self._changing.session() as session:
            await session.change(begin, _NOTHING, wait_s)
            try:
                done = await call(session)
                await session.change(_COMMIT, _NOTHING, wait_s)
            except Broken:
                raise  # the connection goes, and what was not committed with it
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    raise
                await session.change(_ROLLBACK, _NOTHING, wait_s)
                if isinstance(error, RowTrouble):  # a value that the database has no room for
                    raise Refused(str(error), False) from error
                raise
        self._changed_at = self._clock.monotonic()
        return done

    async def columns(self, statement: Statement, values: Mapping[str, Value]) -> list[Column]:
        """The columns that a statement would answer with. Raises as `rows`."""
        return await self.with_session(lambda session: session.columns(statement, values, limits.DIRECTORY_LONG_S))

    def abandon(self) -> None:
        """Ends all connections."""
        self._asking.close()
        self._changing.close()

    async def close(self) -> None:
        """Ends all connections."""
        self.abandon()


def connector(kind: str, address: Address, primary: bool, read_only: bool) -> Callable[..., Awaitable[Session]]:
    """Loads the driver that is needed, and no other."""
    if kind == "postgresql":
        from powermail.directory.postgres import PostgresConnector

        return PostgresConnector(address, primary, read_only)
    from powermail.directory.mysql import MysqlConnector

    return MysqlConnector(address, primary, read_only)


async def reached(call: Awaitable[None]) -> DirectoryTrouble | None:
    """Awaits a look at the start: the trouble of a server that is away, which is no reason not to start (P14)."""
    try:
        await call
    except DirectoryTrouble as error:
        return error
    return None
