"""Owns what is wrong with a database of the directory, as `powermail config check` asks; it changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from powermail.base import limits
from powermail.base.database_url import Host
from powermail.base.errors import PowerMailError
from powermail.base.findings import POSTGRES_SETTINGS, Finding, of_postgres
from powermail.directory.database import Address
from powermail.directory.pool import Session
from powermail.directory.schema import VERSION
from powermail.directory.server import connector
from powermail.directory.statement import Statement

ABOUT = "directory.database"
_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_MYSQL_SETTINGS = (
    "version",
    "read_only",
    "tx_isolation",
    "transaction_isolation",
    "sql_mode",
    "character_set_database",
    "autocommit",
    "innodb_flush_log_at_trx_commit",
    "innodb_doublewrite",
)
_POSTGRES_OLDEST = 13
_MARIADB_OLDEST, _MYSQL_OLDEST = (10, 2), (8, 0)  # CHECK, generated columns and expressions as defaults


class _Told(NamedTuple):
    """What one host came to: whether it takes changes, and what is wrong."""

    primary: bool
    found: list[Finding]


async def findings(kind: str, address: Address, ours: bool) -> list[Finding]:
    """What is wrong. `kind` is postgresql or mysql; `ours`: with our own table, not statements of the operator's."""
    connect = connector(kind, address, primary=False, read_only=True)
    told = await asyncio.gather(*(_look(kind, connect, host, ours) for host in address.hosts))
    found = [one for each in told for one in each.found]
    if not any(each.primary for each in told) and ours:
        cure = "start the primary, and name its host in directory.database"
        found.append(Finding(ABOUT, "no host takes changes: accounts cannot be made or changed", cure))
    return found


async def _look(kind: str, connect: Callable[[Host], Awaitable[Session]], host: Host, ours: bool) -> _Told:
    about = f"{ABOUT} {host}"
    session: Session | None = None
    try:
        async with asyncio.timeout(limits.DIRECTORY_CONNECT_S + limits.DIRECTORY_RESOLVE_S):
            session = await connect(host)
            return await (_postgres if kind == "postgresql" else _mysql)(session, about, ours)
    except (PowerMailError, TimeoutError) as error:
        cure = "start it, let the user in, or take the host out of directory.database"
        return _Told(False, [Finding(about, f"it cannot be asked: {error or 'no answer'}", cure)])
    finally:
        if session is not None:
            session.end()


async def _asked(session: Session, text: str) -> list[tuple[str, ...]]:
    rows = await session.rows(Statement(text), {}, limits.DIRECTORY_RESOLVE_S)
    return [tuple("" if value is None else str(value) for value in row) for row in rows]


async def _named(session: Session, text: str) -> dict[str, str]:
    """Rows of a name and a value."""
    return {row[0]: row[1] for row in await _asked(session, text)}


# -- PostgreSQL ---------------------------------------------------------------------------------------------------------


async def _postgres(session: Session, about: str, ours: bool) -> _Told:
    names = ", ".join(f"'{name}'" for name in POSTGRES_SETTINGS)
    settings = await _named(session, f"SELECT name, setting FROM pg_settings WHERE name IN ({names})")
    settings.pop("default_transaction_read_only", None)  # this session asked for that itself
    follows = await _asked(session, "SELECT CASE WHEN pg_is_in_recovery() THEN 1 ELSE 0 END")
    primary = follows[0][0] == "0"
    standbys: dict[str, int] = {}
    if primary:
        rows = await _asked(session, "SELECT coalesce(sync_state, ''), count(*) FROM pg_stat_replication GROUP BY 1")
        standbys = {state: int(count) for state, count in rows}
    found = of_postgres(about, settings, standbys, _POSTGRES_OLDEST)
    if ours:
        found += await _our_table(session, about, primary, _rights_of_postgres)
    return _Told(primary, found)


async def _rights_of_postgres(session: Session) -> set[str]:
    asked = ", ".join(f"CASE WHEN has_table_privilege('accounts', '{right}') THEN '{right}' ELSE '' END" for right in _RIGHTS)
    return set((await _asked(session, f"SELECT {asked}"))[0])


# -- MySQL, MariaDB -------------------------------------------------------------------------------------------------------


def _version(text: str) -> tuple[int, ...]:
    """`10.11.6-MariaDB-0+deb12u1` as (10, 11)."""
    return tuple(int(part) for part in text.split("-")[0].split(".")[:2] if part.isdecimal())


def of_mysql(about: str, settings: Mapping[str, str], ours: bool) -> list[Finding]:
    """What is wrong with the settings of a server."""
    found: list[Finding] = []
    version = settings.get("version", "")
    oldest = _MARIADB_OLDEST if "mariadb" in version.lower() else _MYSQL_OLDEST
    if ours and _version(version) < oldest:
        wanted = ".".join(map(str, oldest))
        found.append(Finding(about, f"version {version} does not know what our table is made of", f"use {wanted} or later"))
    isolation = settings.get("transaction_isolation") or settings.get("tx_isolation", "")
    if isolation.upper().replace("-", " ") == "READ UNCOMMITTED":
        what = "transactions read what others have not committed: mail for an account that never comes to be"
        found.append(Finding(about, what, "`SET GLOBAL transaction_isolation = 'READ-COMMITTED'`, and in my.cnf"))
    if "STRICT_" not in settings.get("sql_mode", "STRICT_"):
        what = "sql_mode is not strict: an INSERT of yours whose values do not fit is cut in silence"
        found.append(Finding(about, what, "add STRICT_ALL_TABLES to sql_mode in my.cnf"))
    charset = settings.get("character_set_database", "utf8mb4")
    if charset != "utf8mb4":
        what = f"the database's character set is {charset}: not every address can be kept in tables of yours"
        found.append(Finding(about, what, "`ALTER DATABASE ... CHARACTER SET utf8mb4`"))
    if settings.get("autocommit", "ON").upper() in ("OFF", "0"):
        what = "autocommit is off: an INSERT of yours is not there before you say COMMIT"
        found.append(Finding(about, what, "`SET GLOBAL autocommit = ON`, and in my.cnf"))
    for name, good in (("innodb_flush_log_at_trx_commit", "1"), ("innodb_doublewrite", "ON")):
        value = settings.get(name, good)
        if value.upper() not in (good, "1" if good == "ON" else good):
            what = f"{name} is {value}: accounts that were made are lost, or pages damaged, when the machine dies"
            found.append(Finding(about, what, f"`SET GLOBAL {name} = {good}`, and in my.cnf"))
    return found


async def _mysql(session: Session, about: str, ours: bool) -> _Told:
    names = ", ".join(f"'{name}'" for name in _MYSQL_SETTINGS)
    # Those of the server: a session of ours has set some for itself.
    settings = await _named(session, f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})")
    database = await _asked(
        session, "SELECT default_character_set_name FROM information_schema.schemata WHERE schema_name = DATABASE()"
    )
    settings["character_set_database"] = database[0][0] if database else "utf8mb4"
    primary = settings.get("read_only", "OFF").upper() in ("OFF", "0")
    found = of_mysql(about, settings, ours)
    if ours:
        engine = await _asked(
            session, "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'accounts'"
        )
        if engine and engine[0][0] not in ("InnoDB", ""):
            what = f"the table accounts is of the engine {engine[0][0]}, which knows no transactions"
            found.append(Finding(about, what, "`ALTER TABLE accounts ENGINE = InnoDB`"))
        found += await _our_table(session, about, primary, _rights_of_mysql)
    return _Told(primary, found)


async def _rights_of_mysql(session: Session) -> set[str]:
    who = "CONCAT('''', REPLACE(CURRENT_USER(), '@', '''@'''), '''')"
    rows = await _asked(
        session,
        f"SELECT privilege_type FROM information_schema.user_privileges WHERE grantee = {who} UNION"
        f" SELECT privilege_type FROM information_schema.schema_privileges WHERE grantee = {who}"
        " AND DATABASE() LIKE table_schema"
        f" UNION SELECT privilege_type FROM information_schema.table_privileges WHERE grantee = {who}"
        " AND table_schema = DATABASE() AND table_name = 'accounts'",
    )
    return {row[0].upper() for row in rows}


# -- both ---------------------------------------------------------------------------------------------------------------------


async def _our_table(
    session: Session, about: str, primary: bool, rights_of: Callable[[Session], Awaitable[set[str]]]
) -> list[Finding]:
    """Whether it is there, of this version, and may be changed."""
    here = "table_schema = DATABASE()" if rights_of is _rights_of_mysql else "table_schema = current_schema()"
    tables = await _asked(
        session,
        f"SELECT table_name FROM information_schema.tables WHERE {here} AND table_name IN ('accounts', 'accounts_version')",
    )
    there = {row[0] for row in tables}
    if "accounts" not in there:
        return [Finding(about, "it has no table accounts, or the user may not see it", "`powermail directory init` makes it")]
    if "accounts_version" in there:
        version = (await _asked(session, "SELECT max(version) FROM accounts_version"))[0][0]
        if version != str(VERSION):
            cure = "`powermail directory init` brings it on"
            return [Finding(about, f"the table accounts is of version {version or 0}, this program needs {VERSION}", cure)]
    lacks = [right for right in _RIGHTS if right not in await rights_of(session)] if primary else []
    if not lacks:
        return []
    what = f"the user lacks {', '.join(lacks)} on the table accounts: some commands cannot do their work"
    return [Finding(about, what, f"`GRANT {', '.join(lacks)} ON accounts TO` the user")]
