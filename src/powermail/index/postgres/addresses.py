"""Owns the way to a server that takes writes: all addresses are tried at once, each with its own time.

A driver that tries one address after the other within one time never reaches the second when the first is silent. What a server
says of itself is looked at before anything is asked of it: that it is no standby, that no transaction sees a snapshot older
than its statements (law 7), that a commit is durable when it says so (P10).
"""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg

from powermail.base import limits
from powermail.base.database_url import parse_database_url, with_parameters
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.base.net import keep_alive
from powermail.base.settings import INDEX_KINDS
from powermail.index.postgres.statements import Connection, History

_ISOLATION = {"read committed", "serializable"}  # what law 7 holds at; a snapshot of the whole transaction brings mail back
_SETTINGS = {"application_name": "powermail", "default_transaction_isolation": "read committed"}
# The server's own look at whether the client's machine lives. An engine that knows none of these goes without.
_KEEPALIVES = (
    "SELECT set_config('tcp_keepalives_idle', $1, false), set_config('tcp_keepalives_interval', $1, false),"
    " set_config('tcp_keepalives_count', $2, false), set_config('tcp_user_timeout', $3, false)"
)
_LOOK = (
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
    " current_setting('synchronous_commit'), current_setting('server_encoding')"
)
# The history that a server is on: who restores it or promotes a standby begins a new timeline (law 10).
HISTORY = (
    "SELECT system_identifier::text, ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int::text"
    " FROM pg_control_system()"
)
OUT_OF_REACH = (
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what the driver says of a session that the server ended without being asked
)  # of a connection: nothing more is to be had from it; DataError, which is an InterfaceError too, is looked for first


# What no waiting mends: whoever wrote the address must.
NOT_AS_WRITTEN = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.UndefinedObjectError,  # a parameter behind ? that is no setting of the server
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.InvalidParameterValueError,
    asyncpg.exceptions.ClientConfigurationError,
)


def addresses(url: str) -> list[str]:
    """The URL for each host of one with several. Raises OperatorError."""
    found = parse_database_url(url, INDEX_KINDS, "the database of the index")
    whole = with_parameters(url, {name: value for name, value in found.query if name != "target_session_attrs"})
    kind, _, rest = whole.partition("://")
    user, at, _ = rest.rpartition("@")  # nothing behind the hosts has one
    tail = rest[len(user + at + ",".join(found.texts)) :]
    return [f"{kind}://{user}{at}{host}{tail}" for host in found.texts]


def where_is(url: str) -> str:
    """The host of one of `addresses`, as people are told."""
    return url.partition("://")[2].partition("?")[0].partition("/")[0].rpartition("@")[2]


def _settings(patience_s: float | None) -> dict[str, str]:
    """What a session begins with. The server ends what takes too long, and lets go of what it held: a client that hangs, or
    whose machine is gone, does not hold up the others (units: ms).
    """
    whole, idle, lock = limits.INDEX_COMMAND_S, limits.INDEX_IDLE_S, limits.INDEX_LOCK_S
    if patience_s is not None:
        whole = idle = lock = patience_s
    times = {"statement_timeout": whole, "idle_in_transaction_session_timeout": idle, "lock_timeout": lock}
    return {**_SETTINGS, **{name: str(max(1, round(seconds * 1000))) for name, seconds in times.items()}}


async def connect(url: str, patience_s: float | None = None) -> tuple[Connection, History]:
    """A connection to the first address that takes writes. Raises IndexTrouble, OperatorError (its settings).

    `patience_s`: of a command that may take long where nobody waits for it, instead of the limits of those that serve.
    """
    tries = [asyncio.ensure_future(_try(each, patience_s)) for each in addresses(url)]
    reasons: list[str] = []
    refused: OperatorError | None = None
    found: tuple[Connection, History] | None = None
    try:
        for done in asyncio.as_completed(tries):
            try:
                found = await done
                break
            except OperatorError as error:
                refused = error
            except IndexTrouble as error:
                reasons.append(str(error))
    finally:
        for task in tries:
            task.cancel()
        for result in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(result, tuple) and result is not found:
                result[0].terminate()
    if found is not None:
        return found
    if refused is not None:
        raise refused
    raise IndexTrouble(f"the database does not answer: {'; '.join(sorted(set(reasons)))}")


async def _try(url: str, patience_s: float | None) -> tuple[Connection, History]:
    where = where_is(url)
    connection: Connection | None = None
    try:
        async with asyncio.timeout(limits.INDEX_CONNECT_S):
            connection = await asyncpg.connect(
                url,
                timeout=limits.INDEX_CONNECT_S,
                command_timeout=limits.INDEX_COMMAND_S if patience_s is None else patience_s,
                server_settings=_settings(patience_s),
                statement_cache_size=512,
                max_cached_statement_lifetime=0,
            )
            history = await _look(connection, where)
            await _keep_alive(connection)
            return connection, history
    except BaseException as error:
        if connection is not None:
            connection.terminate()
        if isinstance(error, NOT_AS_WRITTEN) and connection is None:
            raise OperatorError(f"the database of the index at {where}: {error}") from error
        if isinstance(error, (*OUT_OF_REACH, asyncpg.PostgresError)):
            raise IndexTrouble(f"{where}: {error or type(error).__name__}") from error
        if isinstance(error, (ValueError, TypeError)):  # of a parameter that the driver reads, and whose text may be a secret
            raise OperatorError(f"the database of the index at {where}: a parameter behind ? has a value of no use") from None
        raise


async def _keep_alive(connection: Connection) -> None:
    """Both kernels ask whether the other is there: a connection that nothing travels over does not look alive for ever."""
    seconds, count = max(1, round(limits.INDEX_KEEPALIVE_S)), limits.INDEX_KEEPALIVES
    with contextlib.suppress(asyncpg.PostgresSyntaxError, asyncpg.UndefinedObjectError, asyncpg.FeatureNotSupportedError):
        await connection.fetchrow(_KEEPALIVES, str(seconds), str(count), str(seconds * (count + 1) * 1000))
    keep_alive(connection._transport, seconds, count)


async def _look(connection: Connection, where: str) -> History:
    isolation, read_only, commit, encoding = await connection.fetchrow(_LOOK) or ("", "", "", "")
    if read_only == "on":
        raise IndexTrouble(f"{where} takes no writes")
    if isolation not in _ISOLATION:
        raise OperatorError(
            f"{where} runs transactions as {isolation}: PowerMail needs READ COMMITTED, or SERIALIZABLE (law 7)"
        )
    if commit == "off":
        raise OperatorError(f"{where}: synchronous_commit is off, so that what was answered may be lost; set it to on")
    if encoding not in ("UTF8", "SQL_ASCII"):
        raise OperatorError(f"{where}: the database stores text as {encoding}; make one with ENCODING 'UTF8'")
    try:
        row = await connection.fetchrow(HISTORY)
    except (asyncpg.UndefinedFunctionError, asyncpg.FeatureNotSupportedError, asyncpg.InsufficientPrivilegeError):
        return History("", "")
    return History(row[0], row[1]) if row else History("", "")
