"""Owns the embedded directory: one SQLite table, `accounts`, in which one INSERT makes a mailbox.

INSERT INTO accounts (address, password) VALUES ('ann@example.org', '{argon2id}...');

Ids are random: whatever backup of this file is put back, no new account ever gets the id, and so the mail, of another. The
table refuses what is not a row (STRICT, CHECK). One of an earlier release is brought on when it is opened, with its ids; if a
row of it is not what the table takes, or somebody changed its shape, it stays as it is, and each bad row hurts itself only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.world import World
from powermail.directory import rows
from powermail.directory.contract import Account, Doubt, RowTrouble
from powermail.directory.rows import ID_MAX, Value
from powermail.mail.address import has_control

T = TypeVar("T")

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS accounts (
    id INTEGER NOT NULL UNIQUE DEFAULT (random() & {ID_MAX}) CHECK (id > 0),  -- 63 random bits; never used again
    address TEXT NOT NULL PRIMARY KEY COLLATE NOCASE                          -- local-part@domain, or *@domain as catch-all
        CHECK (address LIKE '_%@_%' AND address NOT GLOB '*[' || char(1) || '-' || char(31) || ']*'),
    password TEXT NOT NULL DEFAULT '',                                        -- {{scheme}}hash; empty: no login
    quota_octets INTEGER NOT NULL DEFAULT 0 CHECK (quota_octets >= 0),        -- 0: unlimited
    forward TEXT NOT NULL DEFAULT '',                                         -- destinations, separated by blanks
    keep_copy INTEGER NOT NULL DEFAULT 0 CHECK (keep_copy IN (0, 1)),         -- with forward: keep the mail here too
    enabled INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),             -- 0: no login, no new mail
    send_per_hour INTEGER NOT NULL DEFAULT 0 CHECK (send_per_hour >= 0),      -- 0: the configured default
    send_as TEXT NOT NULL DEFAULT ''                                          -- other senders it may use, separated by blanks
) STRICT, WITHOUT ROWID
"""
# No table of domains is needed; this answers whether one is ours. The text is exact but for quoted local parts with an @.
_DOMAIN = "substr(address, instr(address, '@') + 1)"
_DOMAINS = f"CREATE INDEX IF NOT EXISTS accounts_domain ON accounts({_DOMAIN} COLLATE NOCASE)"
_COLUMNS = ", ".join(rows.COLUMNS)
_INSERT = f"INSERT INTO accounts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE = (
    "UPDATE accounts SET address = ?, password = ?, quota_octets = ?, forward = ?, keep_copy = ?, enabled = ?,"
    " send_per_hour = ?, send_as = ? WHERE id = ?"
)


EMPTY = "''"  # as SQL writes it


def _values(account: Account) -> tuple[str | int, ...]:
    a = account
    forward = " ".join(a.forward)
    flags = int(a.keep_copy), int(a.enabled)
    return a.address, a.password, a.quota_octets, forward, *flags, a.send_per_hour, " ".join(a.send_as)


def _as_text(octets: bytes) -> str:
    """Text that is not UTF-8 is the trouble of its row alone."""
    return octets.decode("utf-8", "surrogateescape")


class SqliteDirectory:
    """The embedded directory."""

    def __init__(self, world: World, path: str) -> None:
        self._path = path
        self._world = world
        self._lane = world.lane("directory")
        self._db: sqlite3.Connection | None = None
        self._why_old = ""  # why the table is not of the form above

    async def open(self, make: bool = True) -> None:
        """Opens the file; with `make`, one that is missing is made. Raises OperatorError."""
        try:
            await self._lane.run(self._open, make)
        except sqlite3.DatabaseError as error:
            raise OperatorError(f"the directory {self._path} cannot be used: {error}") from error

    def _open(self, make: bool) -> None:
        if not make and not self._there():  # an empty one would refuse every recipient for good
            raise OperatorError(
                f"the directory {self._path} is missing: is its disk mounted? `powermail restore` puts one back from a backup; "
                "to begin with an empty one, make an empty file there"
            )
        db = self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=2)
        db.text_factory = _as_text
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("BEGIN IMMEDIATE")
        try:
            self._bring_on(db)
            db.execute(SCHEMA)
            shape = db.execute("SELECT type FROM sqlite_master WHERE name = 'accounts'").fetchone()[0]
            names = [row[1] for row in db.execute("PRAGMA table_info(accounts)")]
            if "send_as" not in names and shape == "table":  # younger than the other columns
                db.execute("ALTER TABLE accounts ADD COLUMN send_as TEXT NOT NULL DEFAULT ''")
            if shape == "table":
                db.execute(_DOMAINS)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _there(self) -> bool:
        try:
            sqlite3.connect(f"file:{quote(self._path)}?mode=ro", uri=True).close()
        except sqlite3.OperationalError:
            return False
        return True

    def _bring_on(self, db: sqlite3.Connection) -> None:
        """A table of the first release becomes one of this: rows and ids stay. What does not fit leaves it as it is."""
        found = db.execute("SELECT sql FROM sqlite_master WHERE name = 'accounts'").fetchone()
        if found is None or "STRICT" in found[0].rpartition(")")[2].upper():
            return
        names = tuple(row[1] for row in db.execute("PRAGMA table_info(accounts)"))
        more = db.execute("SELECT count(*) FROM sqlite_master WHERE tbl_name = 'accounts' AND type = 'trigger'").fetchone()[0]
        if names not in (rows.COLUMNS, rows.COLUMNS[:-1]) or "AUTOINCREMENT" not in found[0] or more:
            self._why_old = "the table accounts has a shape of your own: it does not refuse rows that cannot be used"
            return
        db.execute("SAVEPOINT bring_on")
        try:
            db.execute("DROP INDEX IF EXISTS accounts_domain")
            db.execute("ALTER TABLE accounts RENAME TO accounts_before")
            db.execute(SCHEMA)
            db.execute(
                "INSERT INTO accounts SELECT id, address, coalesce(password, ''), max(0, coalesce(quota_octets, 0)),"
                " coalesce(forward, ''), coalesce(keep_copy, 0), coalesce(enabled, 1), coalesce(send_per_hour, 0),"
                f" {'send_as' if names == rows.COLUMNS else EMPTY} FROM accounts_before"
            )
            db.execute("DROP TABLE accounts_before")
        except sqlite3.IntegrityError as error:
            db.execute("ROLLBACK TO bring_on")
            self._why_old = f"rows of an earlier release stand in the way of a strict table ({error}): mend them and start anew"
        db.execute("RELEASE bring_on")

    async def close(self) -> None:
        """Closes the file."""
        if self._db is not None:
            await self._lane.run(self._db.close)
        self._lane.close()

    def abandon(self) -> None:
        """Lets go of the file as it is; the lane is dead."""
        if self._db is not None:
            self._db.close()

    async def copy_to(self, path: str) -> None:
        """Copies the file as it is at one moment, and checks the copy. Raises DirectoryTrouble."""
        await self._run(self._copy_to, path)

    def _copy_to(self, path: str) -> None:
        assert self._db is not None
        copy = sqlite3.connect(f"file:{quote(path)}?mode=rwc", uri=True)
        try:
            self._db.backup(copy)
            if copy.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("the copy is damaged")
        finally:
            copy.close()

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._lane.run(call, *args)
        except sqlite3.IntegrityError as error:
            raise OperatorError(f"the directory refuses it: {error}") from error
        except (sqlite3.Error, AttributeError) as error:
            raise DirectoryTrouble(f"directory: {error}") from error

    def _select(self, where: str, values: Sequence[Any]) -> list[tuple[Value, ...]]:
        assert self._db is not None
        try:
            return self._db.execute(f"SELECT {_COLUMNS} FROM accounts {where}", values).fetchall()
        except sqlite3.OperationalError as error:
            if "send_as" not in str(error):
                raise
            # A view or table of the operator's own that does not have it: nobody has other senders.
            return self._db.execute(f"SELECT {_COLUMNS.removesuffix('send_as')} '' FROM accounts {where}", values).fetchall()

    async def find(self, address: str) -> Account | None:
        if has_control(address):
            return None  # no row has it
        found = await self._run(self._select, "WHERE address = ?", (address,))
        return rows.read(found[0]) if found else None

    async def serves(self, domain: str) -> bool:
        return not has_control(domain) and await self._run(self._serves, domain)

    def _serves(self, domain: str) -> bool:
        assert self._db is not None
        row = self._db.execute(f"SELECT 1 FROM accounts WHERE {_DOMAIN} = ? COLLATE NOCASE LIMIT 1", (domain,)).fetchone()
        return row is not None

    def check(self, account: Account) -> Account:
        return rows.check(account)

    async def add(self, accounts: Sequence[Account]) -> int:
        await self.put(accounts, ())
        return len(accounts)

    async def put(self, new: Sequence[Account], known: Sequence[Account]) -> None:
        await self._run(self._put, [rows.check(account) for account in new], [rows.check(account) for account in known])

    def _put(self, new: Sequence[Account], known: Sequence[Account]) -> None:
        assert self._db is not None
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for account in new:
                try:
                    self._db.execute(_INSERT, (int(account.id or self._fresh_id()), *_values(account)))
                except sqlite3.IntegrityError as error:
                    if "UNIQUE" not in str(error):
                        raise
                    raise OperatorError(f"the directory refuses it: {account.address} exists") from error
            self._db.executemany(_UPDATE, [(*_values(account), account.id) for account in known])
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _fresh_id(self) -> int:
        """63 random bits, from the world's source: that two are alike is for 10 million accounts one in 180,000."""
        return int.from_bytes(self._world.entropy.octets(8), "big") >> 1 or 1

    async def update(self, account: Account) -> bool:
        try:
            return await self._run(self._update, rows.check(account))
        except OperatorError as error:
            if isinstance(error.__cause__, sqlite3.IntegrityError) and "UNIQUE" in str(error):
                raise OperatorError(f"the directory refuses it: {account.address} exists") from error
            raise

    def _update(self, account: Account) -> bool:
        assert self._db is not None
        return self._db.execute(_UPDATE, (*_values(account), account.id)).rowcount == 1

    async def remove(self, address: str) -> Account | None:
        found = await self._run(self._remove, address)
        return rows.read(found[0]) if found else None

    def _remove(self, address: str) -> list[tuple[Value, ...]]:
        assert self._db is not None
        return self._db.execute(f"DELETE FROM accounts WHERE address = ? RETURNING {_COLUMNS}", (address,)).fetchall()

    async def all(self, after: str, limit: int) -> list[Account]:
        while found := await self._run(self._select, "WHERE address > ? ORDER BY address LIMIT ?", (after, limit)):
            accounts = []
            for row in found:
                try:
                    accounts.append(rows.read(row))
                except RowTrouble:
                    continue  # `doubts` names it
            if accounts or not isinstance(found[-1][1], str):
                return accounts
            after = found[-1][1]
        return []

    async def among(self, addresses: Sequence[str]) -> dict[str, Account]:
        found: dict[str, Account] = {}
        for start in range(0, len(addresses), 500):
            part = addresses[start : start + 500]
            for row in await self._run(self._select, f"WHERE address IN ({', '.join('?' * len(part))})", part):
                account = rows.read(row)
                found[account.address.lower()] = account
        return found

    async def doubts(self) -> tuple[int, list[Doubt]]:
        doubts = [Doubt("", self._why_old)] if self._why_old else []
        count, after = 0, ""
        while found := await self._run(self._select, "WHERE address > ? ORDER BY address LIMIT 2000", (after,)):
            count += len(found)
            doubts += [Doubt(rows.shown(row[1]), problem) for row in found if (problem := rows.doubt(row))]
            last = found[-1][1]
            if not isinstance(last, str):  # octets come behind all text, in no order that could be gone on from
                break
            after = last
        return count, doubts

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        return await self._run(self._ids, [int(number) for number in ids if number.isdecimal() and int(number) <= ID_MAX])

    def _ids(self, numbers: Sequence[int]) -> dict[str, str]:
        assert self._db is not None
        found = self._db.execute(
            f"SELECT CAST(id AS TEXT), address FROM accounts WHERE id IN ({', '.join('?' * len(numbers))})", numbers
        )
        return dict(found.fetchall())
