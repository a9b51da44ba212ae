"""Owns connections to MySQL and MariaDB, and what their errors mean.

The session is set to what all engines have in common: strict, `||` joins, no backslash escapes in strings, UTC. Each statement
outside of a transaction reads what is committed then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pymysql.err
from aiomysql.connection import Connection
from pymysql.constants import CR, ER, FIELD_TYPE

from powermail.base import limits
from powermail.base.database_url import Host
from powermail.base.errors import DirectoryTrouble, OperatorError, PowerMailError
from powermail.directory.contract import RowTrouble
from powermail.directory.database import Address
from powermail.directory.pool import Broken, Column, Contended, Refused, Row
from powermail.directory.rows import Value
from powermail.directory.statement import Statement

_MODE = "'STRICT_ALL_TABLES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO'"
_BEGIN = f"SET SESSION sql_mode = {_MODE}, time_zone = '+00:00'"
_NEVER = (ER.ACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR, ER.BAD_DB_ERROR, 1698)
_TWICE = (ER.DUP_ENTRY, 1586, 1859)
_FORBIDDEN = (3819, 4025, ER.BAD_NULL_ERROR, ER.DATA_TOO_LONG, ER.WARN_DATA_OUT_OF_RANGE, 1364, 1366, 1265)
_AGAIN = (ER.LOCK_DEADLOCK, ER.LOCK_WAIT_TIMEOUT, 1020)
_ROW = (ER.CANT_AGGREGATE_2COLLATIONS, ER.CANT_AGGREGATE_3COLLATIONS, ER.CANT_AGGREGATE_NCOLLATIONS, 1242, 1300, 1690, 3988)
_SERVER = (
    ER.CON_COUNT_ERROR,
    ER.SERVER_SHUTDOWN,
    ER.OPTION_PREVENTS_STATEMENT,  # --read-only: no primary
    ER.OUT_OF_RESOURCES,
    ER.QUERY_INTERRUPTED,
    1047,  # Galera: not ready for application use
    1053,
    1290,
    1792,
    1836,
    1927,
)
_NUMBERS = {
    FIELD_TYPE.TINY,
    FIELD_TYPE.SHORT,
    FIELD_TYPE.LONG,
    FIELD_TYPE.LONGLONG,
    FIELD_TYPE.INT24,
    FIELD_TYPE.DECIMAL,
    FIELD_TYPE.NEWDECIMAL,
    FIELD_TYPE.FLOAT,
    FIELD_TYPE.DOUBLE,
}
_TEXTS = {
    FIELD_TYPE.VARCHAR,
    FIELD_TYPE.VAR_STRING,
    FIELD_TYPE.STRING,
    FIELD_TYPE.BLOB,
    FIELD_TYPE.TINY_BLOB,
    FIELD_TYPE.MEDIUM_BLOB,
    FIELD_TYPE.LONG_BLOB,
    FIELD_TYPE.ENUM,
}
_WORDS = {number: name.lower() for name, number in vars(FIELD_TYPE).items() if name.isupper()}


def meaning(error: Exception, host: Host) -> PowerMailError:
    """The error of ours that one of the driver's is."""
    if not isinstance(error, pymysql.err.MySQLError):
        return Broken(f"directory: {host}: {error or type(error).__name__}")
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"directory: {host}: {error.args[-1] if error.args else type(error).__name__}"
    if code in _TWICE or code in _FORBIDDEN:
        return Refused(f"the directory refuses it: {error.args[-1]}", code in _TWICE)
    if code in _AGAIN:
        return Contended(text)
    if code in _ROW:
        return RowTrouble(text)
    if code in _SERVER or code < 1000 or (code >= CR.CR_ERROR_FIRST and code < 3000):
        return Broken(text)
    return DirectoryTrouble(text)


class MysqlSession:
    """One connection. Implements `pool.Session`."""

    def __init__(self, connection: Any, host: Host) -> None:
        self.host = host
        self._connection = connection

    async def _ask(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> Any:
        try:
            async with asyncio.timeout(wait_s):
                await self._connection.query(statement.written(values))
        except TimeoutError as error:
            raise Broken(f"directory: {self.host} did not answer within {wait_s:g} s") from error
        except (pymysql.err.MySQLError, OSError, RuntimeError) as error:
            raise meaning(error, self.host) from error
        except UnicodeError as error:
            raise RowTrouble(f"directory: {self.host}: not text: {error}") from error
        return self._connection._result

    async def rows(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> Sequence[Row]:
        result = await self._ask(statement, values, wait_s)
        return list(result.rows or ())

    async def change(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> int:
        return int((await self._ask(statement, values, wait_s)).affected_rows or 0)

    async def columns(self, statement: Statement, values: Mapping[str, Value], wait_s: float) -> list[Column]:
        result = await self._ask(statement, values, wait_s)
        return [Column(field.name, _kind(field.type_code)) for field in result.fields or ()]

    def end(self) -> None:
        self._connection.close()


def _kind(code: int) -> str:
    if code in _NUMBERS:
        return "number"
    if code == FIELD_TYPE.NULL:
        return "unknown"
    return "text" if code in _TEXTS else _WORDS.get(code, f"type {code}")


class MysqlConnector:
    """Makes connections to the hosts of an address: any, or only to one that takes changes."""

    def __init__(self, address: Address, primary: bool = False, read_only: bool = False) -> None:
        """`read_only`: nothing that is asked over them may change anything."""
        self._address = address
        self._primary = primary
        self._then = "SET SESSION TRANSACTION READ ONLY" if read_only else ""

    async def __call__(self, host: Host) -> MysqlSession:
        """Connects. Raises Broken, or OperatorError when it will never let us in."""
        address = self._address
        socket = host.name if host.name.startswith("/") else None
        connection: Any = Connection(
            host="localhost" if socket else host.name,
            port=host.port,
            unix_socket=socket,
            user=address.user,
            password=address.password,
            db=address.name,
            charset="utf8mb4",
            autocommit=True,
            connect_timeout=limits.DIRECTORY_CONNECT_S,
            init_command=_BEGIN,
            ssl=address.tls,
        )
        try:
            # The driver's own `connect` hands nothing out that could be closed when it is given up.
            await connection._connect()
            if self._then:
                await connection.query(self._then)
            if self._primary:
                await connection.query("SELECT @@read_only")
                if connection._result.rows[0][0]:
                    raise Broken(f"directory: {host} takes no changes")
        except (pymysql.err.MySQLError, OSError) as error:
            connection.close()
            if error.args and error.args[0] in _NEVER:
                raise OperatorError(f"directory.database: {host} says: {error.args[-1]}") from error
            raise Broken(f"directory: {host}: {error.args[-1] if error.args else type(error).__name__}") from error
        except BaseException:
            connection.close()
            raise
        return MysqlSession(connection, host)
