"""Owns an SQLite file of somebody else, asked by the operator's own statements: it is never changed, and never made."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import quote

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble
from powermail.base.world import World
from powermail.directory.contract import RowTrouble
from powermail.directory.pool import Broken, Column, Row
from powermail.directory.rows import Value
from powermail.directory.statement import Statement

T = TypeVar("T")


def _as_text(octets: bytes) -> str:
    """Text that is not UTF-8 is the trouble of its row alone."""
    return octets.decode("utf-8", "surrogateescape")


class SqliteFile:
    """A file, opened when it is first asked. Implements `foreign.Asked`."""

    def __init__(self, world: World, path: str) -> None:
        self._path = path
        self._lane = world.lane("directory")
        self._db: sqlite3.Connection | None = None

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            where = f"file:{quote(self._path)}?mode=rw"
            wait_s = limits.DIRECTORY_STATEMENT_S
            db = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False, timeout=wait_s)
            db.execute("PRAGMA query_only=ON")
            db.text_factory = _as_text
            self._db = db
        return self._db

    async def _run(
        self, call: Callable[[Statement, Mapping[str, Value]], T], asked: Statement, values: Mapping[str, Value]
    ) -> T:
        try:
            return await self._lane.run(call, asked, values)
        except sqlite3.OperationalError as error:
            told = f"directory: {self._path}: {error}"
            if self._db is None or error.sqlite_errorcode & 0xFF in (
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_FULL,
            ):
                raise Broken(told) from error
            raise DirectoryTrouble(told) from error
        except (sqlite3.DataError, UnicodeError, OverflowError) as error:
            raise RowTrouble(f"directory: {self._path}: {error}") from error
        except sqlite3.Error as error:
            raise DirectoryTrouble(f"directory: {self._path}: {error}") from error

    def _rows(self, asked: Statement, values: Mapping[str, Value]) -> list[Row]:
        return self._opened().execute(asked.marked, [values[name] for name in asked.names]).fetchall()

    def _columns(self, asked: Statement, values: Mapping[str, Value]) -> list[Column]:
        """Their kinds are those of each value: the types of tables are only what was meant."""
        cursor = self._opened().execute(asked.marked, [values[name] for name in asked.names])
        found = [Column(str(one[0]), "unknown") for one in cursor.description]
        cursor.close()
        return found

    async def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        return await self._run(self._rows, statement, values)

    async def listed(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        return await self._run(self._rows, statement, values)

    async def columns(self, statement: Statement, values: Mapping[str, Value]) -> list[Column]:
        return await self._run(self._columns, statement, values)

    async def close(self) -> None:
        if self._db is not None:
            await self._lane.run(self._db.close)
        self._lane.close()

    def abandon(self) -> None:
        if self._db is not None:
            self._db.close()
