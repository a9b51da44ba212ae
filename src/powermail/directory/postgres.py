"""Owns connections to PostgreSQL, and what its errors mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from powermail.base import limits
from powermail.base.database_url import Host
from powermail.base.errors import DirectoryTrouble, OperatorError, PowerMailError
from powermail.directory.contract import RowTrouble
from powermail.directory.database import Address
from powermail.directory.pool import Broken, Column, Contended, Refused, Row
from powermail.directory.rows import Value
from powermail.directory.statement import Statement

_SETTINGS = {
    "application_name": "powermail-directory",
    "timezone": "UTC",
    "datestyle": "ISO",
    "standard_conforming_strings": "on",
}
_NEVER = ("28", "3D", "3F")  # classes: authorization, no such database, no such schema
_SERVER = ("08", "53", "57", "58", "XX")  # classes: connection, resources, operator intervention, system, internal
_ROW = ("21", "22")  # classes: cardinality, data
_ROW_TOO = ("42P21", "42P22")  # collations that cannot be compared
_KINDS = {
    **dict.fromkeys(("int2", "int4", "int8", "numeric", "float4", "float8", "oid"), "number"),
    **dict.fromkeys(("text", "varchar", "bpchar", "char", "name", "citext", "uuid", "unknown"), "text"),
    "bool": "flag",
}
_READ_ONLY = "25006"
# The third is what the driver says of a session that the server ended without being asked.
_TROUBLE = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)


def meaning(error: Exception, host: Host) -> PowerMailError:
    """The error of ours that one of the driver's is."""
    text = f"directory: {host}: {error or type(error).__name__}"
    if not isinstance(error, asyncpg.PostgresError):
        if isinstance(error, ValueError):  # the value cannot be sent as what the statement takes
            return RowTrouble(text)
        return Broken(text)
    state = str(error.sqlstate or "")
    if state.startswith("23"):
        return Refused(f"the directory refuses it: {error}", isinstance(error, asyncpg.UniqueViolationError))
    if state in ("40001", "40P01"):
        return Contended(text)
    if state.startswith(_ROW) or state in _ROW_TOO:
        return RowTrouble(text)
    if state.startswith(_SERVER) or state == _READ_ONLY or not state:
        return Broken(text)
    return DirectoryTrouble(text)


class PostgresSession:
    """One connection. Implements `pool.Session`."""

    def __init__(self, connection: Any, host: Host) -> None:
        self.host = host
        self._connection = connection

    async def rows(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> Sequence[Row]:
        try:
            given = [values[name] for name in statement.order]
            found: Sequence[Row] = await self._connection.fetch(statement.numbered, *given, timeout=wait_s)
        except _TROUBLE as error:
            raise meaning(error, self.host) from error
        return found

    async def change(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> int:
        try:
            given = [values[name] for name in statement.order]
            said = await self._connection.execute(statement.numbered, *given, timeout=wait_s)
        except _TROUBLE as error:
            raise meaning(error, self.host) from error
        count = str(said).rpartition(" ")[2]
        return int(count) if count.isdecimal() else 0

    async def columns(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> list[Column]:
        try:
            prepared = await self._connection.prepare(statement.numbered, timeout=wait_s)
        except _TROUBLE as error:
            raise meaning(error, self.host) from error
        return [Column(one.name, _KINDS.get(one.type.name, one.type.name)) for one in prepared.get_attributes()]

    def end(self) -> None:
        self._connection.terminate()


class PostgresConnector:
    """Makes connections to the hosts of an address: any, or only to one that takes changes."""

    def __init__(self, address: Address, primary: bool = False, read_only: bool = False) -> None:
        """`read_only`: nothing that is asked over them may change anything."""
        self._address = address
        self._primary = primary
        self._settings = {**_SETTINGS, "default_transaction_read_only": "on"} if read_only else _SETTINGS

    async def __call__(self, host: Host) -> PostgresSession:
        """Connects. Raises Broken, or OperatorError when it will never let us in."""
        address = self._address
        connection: Any = None
        try:
            connection = await asyncpg.connect(
                host=host.name,
                port=host.port,
                user=address.user,
                password=address.password,  # also an empty one: nothing is taken from the home of who runs us
                database=address.name,
                ssl=address.tls or False,
                timeout=limits.DIRECTORY_CONNECT_S,
                command_timeout=limits.DIRECTORY_LONG_S,
                server_settings=self._settings,
            )
            if self._primary and await connection.fetchval("SHOW transaction_read_only") == "on":
                raise Broken(f"directory: {host} takes no changes")
        except (*_TROUBLE, ValueError) as error:
            if connection is not None:
                connection.terminate()
            state = str(getattr(error, "sqlstate", "") or "")
            if state.startswith(_NEVER):
                raise OperatorError(f"directory.database: {host} says: {error}") from error
            raise Broken(f"directory: {host}: {error or type(error).__name__}") from error
        except BaseException:
            if connection is not None:
                connection.terminate()
            raise
        return PostgresSession(connection, host)
