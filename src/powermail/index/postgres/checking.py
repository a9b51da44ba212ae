"""Owns what is wrong with a database of the index, as `powermail config check` asks; it changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import asyncpg

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.findings import POSTGRES_SETTINGS, Finding, of_postgres
from powermail.index.postgres.addresses import HISTORY, NOT_AS_WRITTEN, addresses, where_is
from powermail.index.postgres.schema import COMMAND, VERSION, VERSION_TABLE
from powermail.index.postgres.statements import Connection

ABOUT = "index.database"
_OLDEST = 15
_WRITTEN = "write index.database as docs/operations.md shows"
_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_SESSION = {"application_name": "powermail-check", "default_transaction_isolation": "read committed"}
_ISOLATION = ("read committed", "serializable")
_AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class _Host(NamedTuple):
    """One server of the address: whether it takes writes, and which history it is on."""

    about: str
    primary: bool
    system: str
    timeline: str
    found: list[Finding]


async def findings(url: str, cluster: str) -> list[Finding]:
    """What is wrong. `cluster` is that of the nodes; "" if it is not known."""
    try:
        each = addresses(url)
    except OperatorError as error:
        return [Finding(ABOUT, str(error), "set index.database to such an address")]
    answers = await asyncio.gather(*(_look(one, cluster) for one in each))
    hosts = [answer for answer in answers if isinstance(answer, _Host)]
    found = [answer for answer in answers if isinstance(answer, Finding)]
    found += [one for host in hosts for one in host.found]
    primaries = [host for host in hosts if host.primary]
    if not primaries:
        cure = "start the primary, or promote a synchronous standby, and name its host in index.database"
        found.append(Finding(ABOUT, "no host takes writes: mail is taken, and not shown before one does", cure))
    systems = {host.system for host in hosts if host.system}
    if len(systems) > 1 or len(primaries) > 1:
        names = ", ".join(host.about.removeprefix(f"{ABOUT} ") for host in (hosts if len(systems) > 1 else primaries))
        what = f"{names} are not copies of one database, of which one takes writes"
        found.append(Finding(ABOUT, what, "stop the one that must not be used, or name one only: numbers would be given twice"))
    return found


async def _look(url: str, cluster: str) -> _Host | Finding:
    about = f"{ABOUT} {where_is(url)}"
    connection: Connection | None = None
    try:
        async with asyncio.timeout(limits.INDEX_CONNECT_S + limits.INDEX_COMMAND_S):
            connection = await asyncpg.connect(
                url, timeout=limits.INDEX_CONNECT_S, command_timeout=limits.INDEX_COMMAND_S, server_settings=_SESSION
            )
            return await _of_host(connection, about, cluster)
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError) as error:
        return Finding(about, f"it lets nobody in with that: {error}", "put user and password right, or its pg_hba.conf")
    except asyncpg.InvalidCatalogNameError as error:
        return Finding(about, str(error), "make it: `CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0`")
    except NOT_AS_WRITTEN as error:
        return Finding(about, str(error), _WRITTEN)
    except (ValueError, TypeError):  # of a parameter that the driver reads, and whose text may be a secret
        return Finding(about, "a parameter behind ? has a value of no use", _WRITTEN)
    except _AWAY as error:
        cure = "start it, open its port to this machine, or take the host out of index.database"
        return Finding(about, f"it does not answer: {error or type(error).__name__}", cure)
    finally:
        if connection is not None:
            connection.terminate()


async def _of_host(connection: Connection, about: str, cluster: str) -> _Host:
    rows = await connection.fetch("SELECT name, setting FROM pg_settings WHERE name = ANY($1)", list(POSTGRES_SETTINGS))
    settings = {str(name): str(value) for name, value in rows}
    standby = await connection.fetchval("SELECT pg_is_in_recovery()")
    system, timeline, found = await _history(connection, about)
    if standby:
        return _Host(about, False, system, "", found + of_postgres(about, settings, {}, _OLDEST))
    states = await connection.fetch("SELECT coalesce(sync_state, ''), count(*) FROM pg_stat_replication GROUP BY 1")
    found += of_postgres(about, settings, {str(state): int(count) for state, count in states}, _OLDEST)
    isolation = await connection.fetchval("SHOW transaction_isolation")
    if isolation not in _ISOLATION:
        cure = "let `default_transaction_isolation` be what a session asks for: READ COMMITTED or SERIALIZABLE"
        found.append(Finding(about, f"transactions run as {isolation}, which lets deleted mail come back (law 7)", cure))
    found += await _room(connection, about)
    found += await _tables(connection, about, cluster, (system, timeline))
    return _Host(about, True, system, timeline, found)


async def _history(connection: Connection, about: str) -> tuple[str, str, list[Finding]]:
    """System and timeline: by them a restored or promoted server is noticed at once (law 10)."""
    try:
        if await connection.fetchval("SELECT pg_is_in_recovery()"):
            return str(await connection.fetchval("SELECT system_identifier::text FROM pg_control_system()")), "", []
        row = await connection.fetchrow(HISTORY)
        return (row[0], row[1], []) if row else ("", "", [])
    except asyncpg.InsufficientPrivilegeError:
        what = "the user may not see on which timeline the server is: a restored one is noticed by the nodes' marks only"
        functions = "pg_control_system(), pg_walfile_name(pg_lsn), pg_current_wal_insert_lsn()"
        cure = f"`GRANT EXECUTE ON FUNCTION {functions} TO` the user"
        return "", "", [Finding(about, what, cure)]
    except (asyncpg.UndefinedFunctionError, asyncpg.FeatureNotSupportedError):
        return "", "", []


async def _room(connection: Connection, about: str) -> list[Finding]:
    """Whether one more process finds room for its connections."""
    most = int(await connection.fetchval("SELECT setting FROM pg_settings WHERE name = 'max_connections'") or 0)
    used = int(await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
    needed = limits.INDEX_WRITERS + limits.INDEX_READERS_MAX
    if most and most - used < needed:
        what = f"{used} of {most} connections are taken: a process of PowerMail uses up to {needed}"
        return [Finding(about, what, "raise max_connections of the server")]
    return []


async def _tables(connection: Connection, about: str, cluster: str, history: tuple[str, str]) -> list[Finding]:
    """Version, rights, and whose index it is."""
    try:
        version = await connection.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")
    except asyncpg.UndefinedTableError:
        version = None
    except asyncpg.InsufficientPrivilegeError as error:
        return [Finding(about, f"the user may not read the tables: {error}", "connect as their owner")]
    if version != VERSION:
        what = "it has no tables of the index" if version is None else f"its tables are of version {version}, not {VERSION}"
        return [Finding(about, what, f"`{COMMAND}`, or `powermail index move` for an index that is in a file")]
    found = await _rights(connection, about)
    notes = {str(name): str(value) for name, value in await connection.fetch("SELECT name, value FROM meta")}
    if "moved" in notes:
        found.append(Finding(about, f"the index in it was moved to {notes['moved']}", "set index.database to where it is"))
    elif "leaving" in notes:
        cure = "run `powermail index move` again, to its end; or `powermail index move --undo`, and it is served where it is"
        found.append(Finding(about, f"the index in it is being moved {notes['leaving']}", cure))
    elif "moving" in notes:
        found.append(Finding(about, "an index is on its way into it", "run `powermail index move` again, to its end"))
    elif "cluster" not in notes:
        found.append(Finding(about, "its index belongs to no cluster yet", f"`{COMMAND}`"))
    elif cluster and notes["cluster"] != cluster:
        what = f"its index belongs to cluster {notes['cluster']}, the nodes to {cluster}"
        found.append(Finding(about, what, "set index.database to the database of this cluster"))
    known = notes.get("system", ""), notes.get("timeline", "")
    if history != known and all(history) and "cluster" in notes:
        what = "the server was restored or promoted since the index was last opened: commits may be lost (law 10)"
        found.append(Finding(about, what, "nothing: the next start raises the epoch and compares; readers wait meanwhile"))
    return found


async def _rights(connection: Connection, about: str) -> list[Finding]:
    text = (
        "SELECT t.table_name::text, r.name FROM information_schema.tables t CROSS JOIN unnest($1::text[]) r(name)"
        " WHERE t.table_schema = current_schema() AND t.table_name = ANY($2)"
        " AND NOT has_table_privilege(quote_ident(t.table_schema) || '.' || quote_ident(t.table_name), r.name) ORDER BY 1, 2"
    )
    rows: Sequence[Any] = await connection.fetch(text, list(_RIGHTS), list(await _names(connection)))
    if not rows:
        return []
    lacks = ", ".join(f"{right} on {table}" for table, right in rows[:3])
    return [Finding(about, f"the user lacks {lacks}", "let it own the tables: `ALTER TABLE ... OWNER TO` it, or GRANT ALL")]


async def _names(connection: Connection) -> list[str]:
    """The tables beside `meta` in its schema that belong to its owner: those of the index."""
    rows = await connection.fetch(
        "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema() AND tableowner ="
        " (SELECT tableowner FROM pg_tables WHERE schemaname = current_schema() AND tablename = 'meta')"
    )
    return [row[0] for row in rows]
