"""Owns putting a new index in the place of an old one in the same database, at once (law 13).

The new one grows in a schema of its own, which nobody serves. Then one transaction moves the old tables into a schema that is
named for the day, where they stay, and the new ones to where the old ones were: there is never half of either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar
from urllib.parse import parse_qsl

import asyncpg

from powermail.base import limits
from powermail.base.database_url import with_parameters
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.index.moving import META
from powermail.index.postgres.addresses import OUT_OF_REACH, connect, where_is
from powermail.index.postgres.statements import Connection

T = TypeVar("T")
BUILDING = "powermail_rebuild"
NOTHING = "nothing was changed; run this again"
_TABLES = "SELECT tablename::text FROM pg_tables WHERE schemaname = $1 ORDER BY tablename"


def beside(url: str) -> str:
    """The same database, where tables are made and looked for in the schema of an index that is being built."""
    return with_parameters(url, {**dict(parse_qsl(url.partition("?")[2], keep_blank_values=True)), "search_path": BUILDING})


async def make_room(url: str, anew: bool) -> None:
    """Makes the schema of `beside`; `anew`: what an earlier run left in it goes. Raises OperatorError, IndexTrouble."""

    async def make(connection: Connection) -> None:
        if anew:
            await connection.execute(f"DROP SCHEMA IF EXISTS {BUILDING} CASCADE")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {BUILDING}")

    await _within(url, make, "run this again")


async def swap(url: str, stamp: str, before: Mapping[str, str]) -> str:
    """The index that was built is the index from now on; where the old one lies, "" if there was none. `before`: what the old
    one said of itself when it was decided to replace it. Raises OperatorError, IndexTrouble: each says whether it was done.
    """

    async def swapped(connection: Connection) -> str:
        place = await connection.fetchval("SELECT current_schema()")
        quoted = await connection.fetchval("SELECT quote_ident(current_schema())")
        new = [row[0] for row in await connection.fetch(_TABLES, BUILDING)]
        if not new:
            raise OperatorError("another rebuild has put its index in place meanwhile; nothing was changed by this one")
        old = [row[0] for row in await connection.fetch(_TABLES, place) if row[0] in new]
        notes = {}
        if META in old:
            notes = {str(name): str(value) for name, value in await connection.fetch(f"SELECT name, value FROM {quoted}.meta")}
        if notes != before:
            raise OperatorError(
                "the index in the database has changed hands meanwhile (it was moved, or made anew): see which one is to be "
                "used; nothing was changed"
            )
        aside = await _free_name(connection, f"powermail_before_{stamp}") if old else ""
        if aside:
            await connection.execute(f"CREATE SCHEMA {aside}")
        for table in old:
            await connection.execute(f"ALTER TABLE {quoted}.{table} SET SCHEMA {aside}")
        for table in new:
            await connection.execute(f"ALTER TABLE {BUILDING}.{table} SET SCHEMA {quoted}")
        await connection.execute(f"DROP SCHEMA {BUILDING}")
        return aside

    return await _within(url, swapped, "whether the new index is in its place now is not known: `powermail rebuild` again says")


async def _free_name(connection: Connection, name: str) -> str:
    """That of a schema that is not there yet: two may be set aside within the same second."""
    found, number = name, 1
    while await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", found):
        number += 1
        found = f"{name}_{number}"
    return found


async def _within(url: str, work: Callable[[Connection], Awaitable[T]], unknown: str) -> T:
    """Runs it in one transaction. `unknown` is said where the connection broke in COMMIT: then nobody knows yet."""
    connection, _ = await connect(url, limits.INDEX_LONG_S)
    committing = False
    try:
        await connection.execute("BEGIN")
        found = await work(connection)
        committing = True
        await connection.execute("COMMIT")
    except asyncpg.InsufficientPrivilegeError as error:
        cure = "`GRANT CREATE ON DATABASE ... TO` the user, who must own the tables"
        raise OperatorError(f"the database of the index: {error}: {cure}; nothing was changed") from error
    except (asyncpg.PostgresError, *OUT_OF_REACH) as error:
        lost = committing and (isinstance(error, OUT_OF_REACH) or connection.is_closed())
        raise IndexTrouble(f"{where_is(url)}: {error or type(error).__name__}: {unknown if lost else NOTHING}") from error
    finally:
        connection.terminate()
    return found
