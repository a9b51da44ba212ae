"""Owns which version of the tables this program needs, and how a start looks whether they are of it; it changes nothing."""

from __future__ import annotations

import asyncpg

from powermail.base.errors import OperatorError
from powermail.index.postgres.statements import Connection

VERSION = "6"
VERSION_TABLE = "index_version"
COMMAND = "powermail index migrate"
# One row: what has become of the index, if it is not to be served here (`index.moving`).
MOVED = (
    "SELECT max(CASE name WHEN 'moved' THEN 'was moved to ' ELSE 'is being moved ' END || value) FROM meta"
    " WHERE name IN ('moved', 'leaving')"
)


async def check(connection: Connection) -> None:
    """Raises OperatorError if the tables are missing, or of another version."""
    try:
        found = await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")
    except asyncpg.UndefinedTableError:
        found = None
    if found is None:
        raise OperatorError(f"the database has no tables of the index yet: run `{COMMAND}`")
    if found != VERSION:
        raise OperatorError(
            f"the tables of the index are of version {found}, this program needs {VERSION}:"
            f" run `{COMMAND}` of the newer program"
        )
    notes = dict(await connection.fetch("SELECT name, value FROM meta WHERE name IN ('moving', 'moved', 'leaving')"))
    if "moved" in notes:
        raise OperatorError(f"the index in this database was moved to {notes['moved']}, and is what it was then")
    if "leaving" in notes:
        raise OperatorError(
            f"the index in this database is being moved {notes['leaving']}: run that command again, to its end, or `powermail "
            "index move --undo`, and it is served where it is"
        )
    if "moving" in notes:
        raise OperatorError("an index is on its way into this database: run `powermail index move` again to its end")
