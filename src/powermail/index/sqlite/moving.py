"""Owns a file of SQLite as one side of a move (`index.moving`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from powermail.base.errors import IndexTrouble
from powermail.base.world import World
from powermail.index.moving import Answer, Changed, Side, Table, Work
from powermail.index.sqlite import migration, schema
from powermail.index.sqlite.connection import connect
from powermail.index.sqlite.statements import text_of

T = TypeVar("T")


class SqliteSide(Side):
    """The file, in a lane of its own."""

    alone = True
    shared = False  # the lock of the data directory says so

    def __init__(self, world: World, path: str) -> None:
        self.name = path
        self._world = world
        self._lane = world.lane("index-move")
        self._open: sqlite3.Connection | None = None

    async def open(self, make: bool = False) -> None:
        """Opens the file as it is; with `make`, one that is missing or half made gets its tables. Raises IndexTrouble."""
        await self._run(self._connect, make)

    def _connect(self, make: bool) -> None:
        db = self._open = connect(self.name, write=True, create=make)
        if make:
            db.execute("BEGIN IMMEDIATE")
            migration.prepare(db, self.name, "", self._world.clock.now())
            db.execute("COMMIT")

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._lane.run(call, *args)
        except sqlite3.Error as error:
            raise IndexTrouble(f"{self.name}: {error}") from error

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._open is not None, "it is open"
        return self._open

    async def tables(self) -> dict[str, Table]:
        return await self._run(self._tables)

    def _tables(self) -> dict[str, Table]:
        found = {}
        for (name,) in self._db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
        ).fetchall():
            columns = self._db.execute("SELECT name, pk FROM pragma_table_info(?) ORDER BY cid", (name,)).fetchall()
            key = sorted((place, column) for column, place in columns if place)
            found[str(name)] = Table(tuple(column for column, _ in columns), tuple(column for _, column in key))
        return found

    async def rows(self, text: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return await self._run(lambda: self._db.execute(text_of(text), args).fetchall())

    async def change(self, work: Work, provided: Sequence[Answer] = ()) -> None:
        await self._run(self._change, work, provided)

    def _change(self, work: Work, provided: Sequence[Answer]) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for text, args, wanted in provided:
                if db.execute(text_of(text), args).fetchall() != list(wanted):
                    raise Changed(f"{self.name} is not as it was")
            for text, rows in work:
                db.executemany(text_of(text), rows)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    async def history(self) -> dict[str, str]:
        return {"version": str(schema.VERSION)}

    async def users(self) -> int:
        """The lock of the data directory says it."""
        return 0

    async def close(self) -> None:
        """Closes the file: its log is in it then."""
        if self._open is not None:
            await self._run(self._open.close)
        self._lane.close()
