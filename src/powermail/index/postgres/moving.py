"""Owns a database of PostgreSQL as one side of a move (`index.moving`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import asyncpg

from powermail.base import limits
from powermail.base.database_url import shown_url
from powermail.base.errors import IndexTrouble
from powermail.index.moving import Answer, Changed, Side, Table, Work
from powermail.index.postgres.addresses import OUT_OF_REACH, connect
from powermail.index.postgres.schema import VERSION, VERSION_TABLE
from powermail.index.postgres.statements import Connection, History, text_of

T = TypeVar("T")
_LOOK_S = 0.02
_COLUMNS = (
    "SELECT table_name::text, column_name::text FROM information_schema.columns WHERE table_schema = current_schema()"
    " ORDER BY table_name, ordinal_position"
)
_KEYS = (
    "SELECT k.table_name::text, k.column_name::text FROM information_schema.table_constraints c"
    " JOIN information_schema.key_column_usage k ON k.constraint_name = c.constraint_name AND k.table_name = c.table_name"
    " AND k.table_schema = c.table_schema WHERE c.constraint_type = 'PRIMARY KEY' AND c.table_schema = current_schema()"
    " ORDER BY k.table_name, k.ordinal_position"
)
_USERS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'powermail'"
    " AND pid <> pg_backend_pid()"
)


class PostgresSide(Side):
    """The database, over one connection; a directory may be in it too."""

    alone = False
    shared = True

    def __init__(self, url: str) -> None:
        self.name = shown_url(url)
        self._url = url
        self._open: Connection | None = None
        self._history = History("", "")

    async def open(self) -> None:
        """Connects to the host that takes writes. Raises IndexTrouble, OperatorError."""
        self._open, self._history = await connect(self._url, limits.INDEX_LONG_S)

    @property
    def _connection(self) -> Connection:
        assert self._open is not None, "it is open"
        return self._open

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (asyncpg.PostgresError, *OUT_OF_REACH) as error:
            raise IndexTrouble(f"{self.name}: {error or type(error).__name__}") from error

    async def is_current(self) -> bool:
        """True if the tables are there, and of this version."""
        if VERSION_TABLE not in {table for table, _ in await self.rows(_COLUMNS)}:
            return False
        return await self.rows(f"SELECT version_num FROM {VERSION_TABLE}") == [(VERSION,)]

    async def tables(self) -> dict[str, Table]:
        columns: dict[str, list[str]] = {}
        keys: dict[str, list[str]] = {}
        for text, found in ((_COLUMNS, columns), (_KEYS, keys)):
            for table, column in await self.rows(text):
                if table != VERSION_TABLE:
                    found.setdefault(table, []).append(column)
        return {name: Table(tuple(columns[name]), tuple(key)) for name, key in keys.items()}

    async def rows(self, text: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        found = await self._ask(self._connection.fetch(text_of(text), *args))
        return [tuple(row) for row in found]

    async def change(self, work: Work, provided: Sequence[Answer] = ()) -> None:
        await self._ask(self._change(work, provided))

    async def _change(self, work: Work, provided: Sequence[Answer]) -> None:
        async with self._connection.transaction():
            for text, args, wanted in provided:
                if await self.rows(text, args) != list(wanted):
                    raise Changed(f"{self.name} is not as it was")
            for text, rows in work:
                await self._connection.executemany(text_of(text), rows)

    async def history(self) -> dict[str, str]:
        return {"system": self._history.system, "timeline": self._history.timeline}

    async def users(self) -> int:
        """A connection that was ended a moment ago is still counted: it is waited for."""
        until = asyncio.get_running_loop().time() + limits.INDEX_CONNECT_S
        while (count := int((await self.rows(_USERS))[0][0])) and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(_LOOK_S)
        return count

    async def close(self) -> None:
        """Ends the connection, when the server knows it."""
        if self._open is not None and not self._open.is_closed():
            try:
                await self._open.close(timeout=limits.INDEX_CONNECT_S)
            except (TimeoutError, *OUT_OF_REACH):
                self._open.terminate()
