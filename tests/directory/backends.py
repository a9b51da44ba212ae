"""Directories of our own table on each engine, for the suites that are the same for all."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from powermail.base.world import World
from powermail.directory.accounts import SqlDirectory
from powermail.directory.contract import Backend
from powermail.directory.database import parse
from powermail.directory.sqlite import SqliteDirectory
from tests.servers import Database

KINDS = ("sqlite", "postgresql", "mysql")
Sql = Callable[..., str]


class Made:
    """A directory that is open, and `sql`: how an operator writes into the same database. Raises AssertionError."""

    def __init__(self, kind: str, directory: Backend, sql: Sql, again: Callable[[], Awaitable[Backend]]) -> None:
        self.kind = kind
        self.directory = directory
        self.sql = sql
        self.again = again


def sqlite_sql(path: Path) -> Sql:
    """As an operator writes: by a client of his own."""

    def sql(*statements: str) -> str:
        lines = []
        with closing(sqlite3.connect(path)) as db:
            try:
                for statement in statements:
                    lines += ["\t".join(str(value) for value in row) for row in db.execute(statement)]
                db.commit()
            except sqlite3.Error as error:
                raise AssertionError(str(error)) from error
        return "\n".join(lines)

    return sql


async def made(kind: str, world: World, path: Path, database: Database | None) -> Made:
    """A fresh one; who asks for it closes it."""
    if kind == "sqlite":

        async def again() -> Backend:
            directory = SqliteDirectory(world, str(path / "directory.db"))
            await directory.open()
            return directory

        return Made(kind, await again(), sqlite_sql(path / "directory.db"), again)
    assert database is not None

    async def open_sql() -> Backend:
        directory = SqlDirectory(world, kind, parse(kind, database.url))
        await directory.open()
        return directory

    first = SqlDirectory(world, kind, parse(kind, database.url))
    assert await first.initialise() == [1]
    await first.open()
    return Made(kind, first, database.sql, open_sql)
