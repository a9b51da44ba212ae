"""Owns putting a new index in the place of an old one in the same database, at once (law 13).

The new one grows in a schema of its own, which nobody serves. Then one transaction moves the old tables into a schema that is
named for the day, where they stay, and the new ones to where the old ones were: there is never half of either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.postgres.addresses import connect
from powermail.index.postgres.statements import Connection

T = TypeVar("T")
BUILDING = "powermail_rebuild"
_TABLES = "SELECT tablename::text FROM pg_tables WHERE schemaname = $1 ORDER BY tablename"


def beside(url: str) -> str:
    """The same database, where tables are made and looked for in the schema of an index that is being built."""
    parsed = urlsplit(url)
    query = urlencode({**dict(parse_qsl(parsed.query)), "search_path": BUILDING})
    return urlunsplit((parsed.scheme, parsed.netloc, parsed.path, query, ""))


async def make_room(url: str, anew: bool) -> None:
    """Makes the schema of `beside`; `anew`: what an earlier run left in it goes. Raises OperatorError, IndexTrouble."""

    async def make(connection: Connection) -> None:
        if anew:
            await connection.execute(f"DROP SCHEMA IF EXISTS {BUILDING} CASCADE")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {BUILDING}")

    await _within(url, make)


async def swap(url: str, stamp: str) -> str:
    """The index that was built is the index from now on; where the old one lies, "" if there was none. Raises OperatorError,
    IndexTrouble: nothing was changed.
    """

    async def swapped(connection: Connection) -> str:
        place = await connection.fetchval("SELECT current_schema()")
        new = [row[0] for row in await connection.fetch(_TABLES, BUILDING)]
        old = [row[0] for row in await connection.fetch(_TABLES, place) if row[0] in new]
        aside = f"powermail_before_{stamp}" if old else ""
        if aside:
            await connection.execute(f"CREATE SCHEMA {aside}")
        quoted = await connection.fetchval("SELECT quote_ident(current_schema())")
        for table in old:
            await connection.execute(f"ALTER TABLE {quoted}.{table} SET SCHEMA {aside}")
        for table in new:
            await connection.execute(f"ALTER TABLE {BUILDING}.{table} SET SCHEMA {quoted}")
        await connection.execute(f"DROP SCHEMA {BUILDING}")
        return aside

    return await _within(url, swapped)


async def _within(url: str, work: Callable[[Connection], Awaitable[T]]) -> T:
    connection, _ = await connect(url, limits.INDEX_LONG_S)
    try:
        async with connection.transaction():
            return await work(connection)
    except asyncpg.InsufficientPrivilegeError as error:
        cure = "`GRANT CREATE ON DATABASE ... TO` the user, who must own the tables"
        raise OperatorError(f"the database of the index: {error}: {cure}; nothing was changed") from error
    except asyncpg.PostgresError as error:
        raise OperatorError(f"the database of the index: {error}; nothing was changed") from error
    finally:
        connection.terminate()
