"""Owns the embedded directory: one SQLite table, `accounts`, in which one INSERT makes a mailbox.

INSERT INTO accounts (address, password) VALUES ('ann@example.org', '{argon2id}...');
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.world import World
from powermail.directory.contract import Account
from powermail.mail.address import AddressError, parse, parse_canonical

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,           -- never used again, also after a DELETE
    address TEXT NOT NULL UNIQUE COLLATE NOCASE,    -- local-part@domain, or *@domain as catch-all
    password TEXT NOT NULL DEFAULT '',              -- {scheme}hash; empty: no login
    quota_octets INTEGER NOT NULL DEFAULT 0,        -- 0: unlimited
    forward TEXT NOT NULL DEFAULT '',               -- destinations, separated by blanks
    keep_copy INTEGER NOT NULL DEFAULT 0,           -- with forward: keep the mail here too
    enabled INTEGER NOT NULL DEFAULT 1,             -- 0: no login, no new mail
    send_per_hour INTEGER NOT NULL DEFAULT 0        -- 0: the configured default
)
"""
# No table of domains is needed; this answers whether one is ours. The text is exact but for quoted local parts with an @.
_DOMAIN = "substr(address, instr(address, '@') + 1)"
_DOMAINS = f"CREATE INDEX IF NOT EXISTS accounts_domain ON accounts({_DOMAIN} COLLATE NOCASE)"
_COLUMNS = "id, address, password, quota_octets, forward, keep_copy, enabled, send_per_hour"


def _account(row: tuple[Any, ...]) -> Account:
    return Account(
        str(row[0]), row[1], row[2] or "", max(0, row[3] or 0), _destinations(row[4]), bool(row[5]), bool(row[6]), row[7]
    )


def _destinations(text: str | None) -> tuple[str, ...]:
    return tuple((text or "").split())


def check_account(account: Account) -> Account:
    """The row as it may be stored. Raises OperatorError for an address or destination that is none (F01)."""
    try:
        address = parse_canonical(account.address)
        forward = []
        for destination in account.forward:
            if destination.startswith("-"):
                raise AddressError("begins with a dash")
            parsed = parse(destination)
            forward.append(parsed.text)
    except AddressError as error:
        raise OperatorError(f"{account.address!r} or one of its destinations is not an address: {error}") from error
    if len(forward) > limits.FORWARD_DESTINATIONS_MAX:
        raise OperatorError(f"more than {limits.FORWARD_DESTINATIONS_MAX} destinations")
    if any(" " in destination for destination in forward):
        raise OperatorError("a destination with a blank cannot be kept in the table")
    if address in (destination.lower() for destination in forward):
        raise OperatorError(f"{address} cannot forward to itself; use keep_copy to keep the mail")
    return account._replace(address=address, forward=tuple(forward))


class SqliteDirectory:
    """The embedded directory."""

    def __init__(self, world: World, path: str) -> None:
        self._path = path
        self._lane = world.lane("directory")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Opens or makes the file. Raises OperatorError."""
        try:
            await self._lane.run(self._open)
        except sqlite3.DatabaseError as error:
            raise OperatorError(f"the directory {self._path} cannot be used: {error}") from error

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=2)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(SCHEMA)
        self._db.execute(_DOMAINS)

    async def close(self) -> None:
        """Closes the file."""
        if self._db is not None:
            await self._lane.run(self._db.close)
        self._lane.close()

    def abandon(self) -> None:
        """Lets go of the file as it is; the lane is dead."""
        if self._db is not None:
            self._db.close()

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._lane.run(call, *args)
        except sqlite3.IntegrityError as error:
            raise OperatorError(f"the directory refuses it: {error}") from error
        except (sqlite3.Error, AttributeError) as error:
            raise DirectoryTrouble(f"directory: {error}") from error

    def _select(self, where: str, values: Sequence[Any]) -> list[Account]:
        assert self._db is not None
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM accounts {where}", values).fetchall()
        return [_account(row) for row in rows]

    async def find(self, address: str) -> Account | None:
        found = await self._run(self._select, "WHERE address = ?", (address,))
        return found[0] if found else None

    async def serves(self, domain: str) -> bool:
        return await self._run(self._serves, domain)

    def _serves(self, domain: str) -> bool:
        assert self._db is not None
        row = self._db.execute(f"SELECT 1 FROM accounts WHERE {_DOMAIN} = ? COLLATE NOCASE LIMIT 1", (domain,)).fetchone()
        return row is not None

    async def add(self, accounts: Sequence[Account]) -> int:
        return await self._run(self._add, accounts)

    def _add(self, accounts: Sequence[Account]) -> int:
        assert self._db is not None
        accounts = [check_account(account) for account in accounts]
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO accounts (address, password, quota_octets, forward, keep_copy, enabled, send_per_hour)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (a.address, a.password, a.quota_octets, " ".join(a.forward), a.keep_copy, a.enabled, a.send_per_hour)
                    for a in accounts
                ],
            )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return len(accounts)

    async def update(self, account: Account) -> bool:
        return await self._run(self._update, check_account(account))

    def _update(self, a: Account) -> bool:
        assert self._db is not None
        cursor = self._db.execute(
            "UPDATE accounts SET address = ?, password = ?, quota_octets = ?, forward = ?, keep_copy = ?, enabled = ?,"
            " send_per_hour = ? WHERE id = ?",
            (a.address, a.password, a.quota_octets, " ".join(a.forward), a.keep_copy, a.enabled, a.send_per_hour, a.id),
        )
        return cursor.rowcount == 1

    async def remove(self, address: str) -> Account | None:
        return await self._run(self._remove, address)

    def _remove(self, address: str) -> Account | None:
        assert self._db is not None
        rows = self._db.execute(f"DELETE FROM accounts WHERE address = ? RETURNING {_COLUMNS}", (address,)).fetchall()
        return _account(rows[0]) if rows else None

    async def all(self, after: str, limit: int) -> list[Account]:
        return await self._run(self._select, "WHERE address > ? ORDER BY address LIMIT ?", (after, limit))

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        return await self._run(self._ids, ids)

    def _ids(self, ids: Sequence[str]) -> dict[str, str]:
        assert self._db is not None
        rows = self._db.execute(
            f"SELECT CAST(id AS TEXT), address FROM accounts WHERE id IN ({', '.join('?' * len(ids))})",
            [int(number) for number in ids if number.isdigit()] + [-1] * sum(not n.isdigit() for n in ids),
        )
        return dict(rows.fetchall())
