"""Owns the index on SQLite: WAL with `synchronous=FULL`, one writing lane with group commit, one reading lane.

Law: UIDs and MODSEQs come from the mailbox row in the transaction that enters the message (P10); a mailbox last numbered
in an older epoch jumps first. Every table change of one call is one transaction.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.base.world import World
from powermail.index import schema
from powermail.index.contract import (
    Delivery,
    EntryFacts,
    MailboxFacts,
    MessageFacts,
    Release,
    RestoredMessage,
)
from powermail.index.rows import ROWS_MAX, Placements, in_list, insert_many, release
from powermail.index.sqlite_keeping import KeepingStatements
from powermail.index.sqlite_queue import QueueStatements
from powermail.mail.envelope import Commit, Target

T = TypeVar("T")

_QUEUE_HEAD = (
    "INSERT INTO queue (key, destination, domain, reverse_path, recipient, notify, orcpt, envid, ret, smtputf8,"
    " octets, created_at, due_at, attempts, held, last_status, lease_owner, lease_until)"
)
_MAILBOX = "id, account, name, uidvalidity, uid_next, modseq, messages, octets"


def connect(path: str, write: bool) -> sqlite3.Connection:
    """Opens the file as this program needs it. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=512, timeout=limits.INDEX_BUSY_TIMEOUT_S
    )
    if write:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA wal_autocheckpoint=8000")
    else:
        connection.execute("PRAGMA query_only=ON")
    connection.execute("PRAGMA cache_size=-32768")
    return connection


class SqliteIndex(QueueStatements, KeepingStatements):
    """The index in one SQLite file."""

    def __init__(self, world: World, path: str) -> None:
        self._world = world
        self._path = path
        self._write_lane = world.lane("index-write")
        self._read_lane = world.lane("index-read")
        self._mailbox_ids: dict[tuple[str, str], tuple[int, int]] = {}
        self._waiting: list[tuple[Delivery, asyncio.Future[bool]]] = []
        self._busy = False
        self._expected = 0  # deliveries on their way, those that wait here included
        self._timer: asyncio.TimerHandle | None = None
        self._used: dict[str, int] = {}  # octets of accounts asked for lately; exact, because only this process writes
        self._changes = 0
        self._epoch = 1
        self._commits = 0
        self.batches = 0
        self.catching_up = False
        self.cluster = ""

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self, cluster: str = "") -> None:
        """Opens or, with `cluster`, makes the database. Raises OperatorError."""
        try:
            await self._write_lane.run(self._open, cluster)
            self._reader = await self._read_lane.run(connect, self._path, False)
        except sqlite3.DatabaseError as error:
            raise OperatorError(
                f"the index {self._path} cannot be used: {error}; move it away and run `powermail rebuild`"
            ) from error

    def _open(self, cluster: str) -> None:
        self._db = connect(self._path, write=True)
        if self._db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("integrity check failed")
        for statement in schema.TABLES:
            self._db.execute(statement)
        for statement in schema.ARRIVALS:
            self._db.execute(statement)
        self._db.execute(
            "INSERT OR IGNORE INTO meta VALUES ('version', ?), ('epoch', '1'), ('commits', '0'), ('cluster', ?)",
            (str(schema.VERSION), cluster),
        )
        meta = dict(self._db.execute("SELECT name, value FROM meta").fetchall())
        if int(meta["version"]) > schema.VERSION:
            raise OperatorError(f"the index {self._path} was written by a newer version of this program")
        self._epoch = int(meta["epoch"])
        self._commits = int(meta["commits"])
        self.cluster = meta["cluster"]
        self.catching_up = bool(meta.get("catching_up"))
        self._placements = Placements(self._db)

    async def close(self) -> None:
        """Finishes what waits and closes."""
        while self._busy or self._waiting:
            await asyncio.sleep(0.001)
        if hasattr(self, "_reader"):
            await self._read_lane.run(self._reader.close)
            await self._write_lane.run(self._db.close)
        self._write_lane.close()
        self._read_lane.close()

    def abandon(self) -> None:
        """Lets go of the file as it is; the lanes are dead."""
        for connection in ("_reader", "_db"):
            if hasattr(self, connection):
                getattr(self, connection).close()

    async def _write(self, call: Callable[..., T], *args: Any) -> T:
        """Runs `call(*args)` in one transaction on the writing lane."""
        self._changes += 1
        self._used.clear()
        return await self._guard(self._write_lane.run(self._transaction, call, args))

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        return await self._guard(self._read_lane.run(call, *args))

    @staticmethod
    async def _guard(future: asyncio.Future[T]) -> T:
        try:
            return await future
        except sqlite3.Error as error:
            raise IndexTrouble(f"index: {error}") from error

    def _transaction(self, call: Callable[..., T], args: tuple[Any, ...]) -> T:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            result = call(*args)
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'commits'", (self._commits + 1,))
            self._db.execute("COMMIT")
            self._commits += 1
        except BaseException:
            self._mailbox_ids.clear()
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._placements.load()
            raise
        return result

    # -- delivering --------------------------------------------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((delivery, future))
        if not self._busy:
            self._gather()
        return future

    def expect(self, count: int) -> None:
        self._expected += count
        if self._waiting and not self._busy:
            self._gather()

    def _gather(self) -> None:
        """Starts a transaction when all who are on their way have come, or after a moment."""
        loop = asyncio.get_running_loop()
        if len(self._waiting) >= self._expected:
            if self._timer is not None:
                self._timer.cancel()
            self._busy = True
            self._timer = loop.call_later(0, self._deliver_next)
        elif self._timer is None:
            self._timer = loop.call_later(limits.INDEX_GATHER_S, self._deliver_next)

    def _deliver_next(self) -> None:
        self._timer = None
        batch = self._waiting[: limits.INDEX_BATCH_MAX]
        del self._waiting[: limits.INDEX_BATCH_MAX]
        self._busy = True
        self.batches += 1
        done = self._write_lane.run(self._deliver_batch, [delivery for delivery, _ in batch])
        done.add_done_callback(lambda result: self._delivered(batch, result))

    def _delivered(
        self, batch: list[tuple[Delivery, asyncio.Future[bool]]], result: asyncio.Future[list[bool | Exception]]
    ) -> None:
        self._busy = False
        error = result.exception()
        outcomes: Sequence[bool | BaseException] = [error] * len(batch) if error is not None else result.result()
        self._changes += 1
        for (delivery, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                self._used.clear()  # nobody waits any more, but it may have been entered
                continue
            if isinstance(outcome, bool):
                future.set_result(outcome)
                if outcome:
                    self._count_used(delivery.commit)
            else:
                trouble = IndexTrouble(f"index: {outcome}")
                trouble.__cause__ = outcome
                future.set_exception(trouble)
        if self._waiting:
            self._gather()

    def _deliver_batch(self, batch: list[Delivery]) -> list[bool | Exception]:
        """One transaction for all; if that fails, one for each, so that one bad delivery harms no other."""
        try:
            if not self._is_plain(batch):
                return list(self._transaction(self._enter, (batch, None)))
            outcomes: list[bool | Exception] = list(self._enter(batch, self._commits + 1))
            self._commits += True in outcomes
            return outcomes
        except sqlite3.Error as error:
            if len(batch) == 1:
                return [error]
        outcomes = []
        for delivery in batch:
            try:
                outcomes.append(self._transaction(self._enter, ([delivery], None))[0])
            except sqlite3.Error as error:
                outcomes.append(error)
        return outcomes

    def _is_plain(self, batch: list[Delivery]) -> bool:
        """True if one statement, which is a transaction by itself, enters the batch: nothing is new but messages."""
        rows = 0
        for _, commit, nodes, late in batch:
            if late or not self._placements.has(nodes):
                return False
            for target in commit.targets:
                if target.destination or (target.account, target.mailbox) not in self._mailbox_ids:
                    return False
                rows += 1
        return rows <= ROWS_MAX

    def _enter(self, batch: list[Delivery], commits: int | None) -> list[bool]:
        known = self._known([delivery.key for delivery in batch])
        queue: list[tuple[Any, ...]] = []
        arrivals: list[tuple[Any, ...]] = []
        outcomes: list[bool] = []
        for key, commit, nodes, late in batch:
            if key in known:
                outcomes.append(False)
                continue
            known[key] = None
            at, octets = commit.received_at, commit.octets
            sha256, placement, refs = bytes.fromhex(commit.sha256), self._placements.id(nodes), len(commit.targets)
            for target in commit.targets:
                mailbox = None
                if target.destination:
                    queue.append(_queue_row(key, at, commit, target))
                else:
                    mailbox = self._mailbox_id(target.account, target.mailbox, at)
                    if late:
                        self._skip(mailbox, limits.LATE_JUMP)
                if mailbox is not None or refs:
                    arrivals.append((key, octets, sha256, placement, refs, mailbox, target.flags, at, self._epoch, None))
                refs = 0
            outcomes.append(True)
        if arrivals and commits is not None:
            arrivals[-1] = (*arrivals[-1][:-1], commits)
        insert_many(self._db, "INSERT INTO arrivals", 10, arrivals)
        insert_many(self._db, _QUEUE_HEAD, 18, queue)
        return outcomes

    def _skip(self, mailbox: int, count: int) -> None:
        """Leaves numbers out."""
        self._db.execute("UPDATE mailboxes SET uid_next = uid_next + ?1, modseq = modseq + ?1 WHERE id = ?2", (count, mailbox))

    async def restore_messages(self, messages: Sequence[RestoredMessage]) -> int:
        return await self._write(self._restore_messages, messages)

    def _restore_messages(self, messages: Sequence[RestoredMessage]) -> int:
        """A message that no mailbox and no queue row shows any more was deleted: its tombstones are ordered."""
        queue: list[tuple[Any, ...]] = []
        arrivals: list[tuple[Any, ...]] = []
        for key, commit, sha256, nodes, targets in messages:
            known = self._db.execute("SELECT 1 FROM messages WHERE key = ?", (key,)).fetchone()
            if not targets and known is None:
                self._db.executemany("INSERT OR IGNORE INTO deletions VALUES (?, ?)", [(node, key) for node in nodes])
                continue
            self._db.execute(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET refs = refs + excluded.refs",
                (key, commit.octets, sha256, self._placements.id(nodes), len(targets)),
            )
            for target in targets:
                if target.destination:
                    queue.append(_queue_row(key, commit.received_at, commit, target, "held by rebuild: sent or not is unknown"))
                else:
                    mailbox = self._mailbox_id(target.account, target.mailbox, commit.received_at)
                    at = commit.received_at
                    arrivals.append((key, commit.octets, sha256, None, 0, mailbox, target.flags, at, self._epoch, None))
        insert_many(self._db, "INSERT INTO arrivals", 10, arrivals)
        insert_many(self._db, _QUEUE_HEAD, 18, queue)
        return len(queue)

    def _jump(self, mailbox: int) -> None:
        """Commits may be lost: numbers leap, so none is ever given twice (P10)."""
        self._skip(mailbox, limits.EPOCH_JUMP)
        self._db.execute("UPDATE mailboxes SET epoch = ? WHERE id = ?", (self._epoch, mailbox))

    def _mailbox_id(self, account: str, name: str, at: float) -> int:
        cached = self._mailbox_ids.get((account, name))
        if cached is not None:
            return cached[0]
        row = self._db.execute("SELECT id, epoch FROM mailboxes WHERE account = ? AND name = ?", (account, name)).fetchone()
        if row is None:
            row = self._db.execute(
                "INSERT INTO mailboxes (account, name, uidvalidity, uid_next, modseq, epoch, messages, octets)"
                " VALUES (?, ?, ?, 1, 1, ?, 0, 0) RETURNING id, epoch",
                (account, name, self._new_uidvalidity(at), self._epoch),
            ).fetchone()
        if len(self._mailbox_ids) >= limits.DIRECTORY_CACHE_MAX:
            self._mailbox_ids.clear()
        self._mailbox_ids[account, name] = (row[0], row[1])
        return int(row[0])

    def _new_uidvalidity(self, at: float) -> int:
        """Higher than any given before, so a name that comes again never repeats a pair."""
        last = int(self._meta(self._db, "uidvalidity") or 0)
        fresh = max(int(at) & limits.UID_MAX, last + 1)
        self._set_meta("uidvalidity", str(fresh))
        return fresh

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, None]:
        marks = in_list(keys)
        rows = self._db.execute(
            f"SELECT key FROM messages WHERE key IN ({marks}) UNION ALL SELECT key FROM deletions WHERE key IN ({marks})"
            f" UNION ALL SELECT key FROM aborted WHERE key IN ({marks})",
            [*keys, *keys, *keys],
        )
        return {row[0]: None for row in rows}

    async def abort(self, key: bytes, at: float) -> bool:
        return await self._write(self._abort, key, at)

    def _abort(self, key: bytes, at: float) -> bool:
        if self._db.execute("SELECT 1 FROM messages WHERE key = ?", (key,)).fetchone():
            return False
        self._db.execute("INSERT OR IGNORE INTO aborted VALUES (?, ?)", (key, at))
        return True

    # -- meta --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _meta(db: sqlite3.Connection, name: str) -> str | None:
        row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _set_meta(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epoch

    @property
    def commits(self) -> int:
        return self._commits

    async def set_commits(self, commits: int) -> None:
        await self._write(self._set_commits, commits)

    def _set_commits(self, commits: int) -> None:
        self._commits = max(self._commits, commits)

    async def raise_epoch(self) -> int:
        """Commits may be lost: from now on mailboxes jump, and readers wait until reconcile has caught up (P7, P10)."""
        epoch = await self._write(self._raise_epoch)
        self._epoch = epoch
        self.catching_up = True
        return epoch

    def _raise_epoch(self) -> int:
        epoch = self._epoch + 1
        self._set_meta("epoch", str(epoch))
        self._set_meta("catching_up", "1")
        return epoch

    async def caught_up(self) -> None:
        """Reconcile has seen every node's log: listings are complete again."""
        await self._write(self._set_meta, "catching_up", "")
        self.catching_up = False

    # -- reading -----------------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        if self.catching_up:
            raise IndexTrouble("the index is catching up with the storage nodes")

    async def usage(self, account: str) -> int:
        used = self._used.get(account)
        if used is not None:
            return used
        changes = self._changes
        used = await self._read(self._usage, account)
        if changes == self._changes:  # else a delivery came between, and the figure may be old
            if len(self._used) >= limits.DIRECTORY_CACHE_MAX:
                self._used.clear()
            self._used[account] = used
        return used

    def _count_used(self, commit: Commit) -> None:
        for target in commit.targets:
            if target.account in self._used:
                self._used[target.account] += commit.octets

    def _usage(self, account: str) -> int:
        row = self._reader.execute("SELECT sum(octets) FROM mailboxes WHERE account = ?", (account,)).fetchone()
        return row[0] or 0

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        self._complete()
        return await self._read(self._find_mailbox, account, name)

    def _find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        row = self._reader.execute(
            f"SELECT {_MAILBOX} FROM mailboxes WHERE account = ? AND name = ?", (account, name)
        ).fetchone()
        return MailboxFacts(*row) if row else None

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        return await self._read(self._mailboxes, after, limit)

    def _mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        rows = self._reader.execute(f"SELECT {_MAILBOX} FROM mailboxes WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [MailboxFacts(*row) for row in rows]

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        self._complete()
        return await self._read(self._entries, mailbox, after_uid, below_uid, limit)

    def _entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        rows = self._reader.execute(
            "SELECT uid, key, flags, modseq, octets, received_at FROM entries"
            " WHERE mailbox = ? AND uid > ? AND uid < ? ORDER BY uid LIMIT ?",
            (mailbox, after_uid, below_uid, limit),
        )
        return [EntryFacts(*row) for row in rows]

    async def message(self, key: bytes) -> MessageFacts | None:
        found = await self.messages([key])
        return found[0] if found else None

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        return await self._read(self._messages, keys)

    def _messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        rows = self._reader.execute(
            "SELECT m.key, m.octets, m.sha256, p.nodes, m.refs FROM messages m JOIN placements p ON p.id = m.placement"
            f" WHERE m.key IN ({in_list(keys)}) ORDER BY m.key",
            keys,
        )
        return [MessageFacts(r[0], r[1], r[2], tuple(r[3].split(" ")) if r[3] else (), r[4]) for r in rows]

    # -- removing ----------------------------------------------------------------------------------------------------

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        return await self._write(self._expunge, mailbox, uids)

    def _expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        removed, dead = 0, 0
        for start in range(0, len(uids), 500):
            part = uids[start : start + 500]
            rows = self._db.execute(
                f"DELETE FROM entries WHERE mailbox = ? AND uid IN ({in_list(part)}) RETURNING uid, key, octets",
                (mailbox, *part),
            ).fetchall()
            if not rows:
                continue
            count, octets = len(rows), sum(row[2] for row in rows)
            modseq, epoch = self._db.execute(
                "UPDATE mailboxes SET modseq = modseq + 1, messages = messages - ?, octets = octets - ? WHERE id = ?"
                " RETURNING modseq, epoch",
                (count, octets, mailbox),
            ).fetchone()
            if epoch < self._epoch:
                self._jump(mailbox)
                modseq += limits.EPOCH_JUMP
            self._db.executemany(
                "INSERT OR REPLACE INTO expunged VALUES (?, ?, ?)", [(mailbox, row[0], modseq) for row in rows]
            )
            removed += count
            dead += release(self._db, self._placements, [row[1] for row in rows])
        return Release(removed, dead)

    async def forget_messages(self, keys: Sequence[bytes]) -> int:
        return await self._write(self._forget_messages, keys)

    def _forget_messages(self, keys: Sequence[bytes]) -> int:
        count = 0
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = in_list(part)
            count += int(self._db.execute(f"SELECT count(*) FROM messages WHERE key IN ({marks})", part).fetchone()[0])
            shown = self._db.execute(f"SELECT mailbox, uid FROM entries WHERE key IN ({marks}) ORDER BY 1", part).fetchall()
            for mailbox, rows in groupby(shown, key=lambda row: int(row[0])):
                self._expunge(mailbox, [row[1] for row in rows])
            waiting = self._db.execute(f"DELETE FROM queue WHERE key IN ({marks}) RETURNING key", part).fetchall()
            release(self._db, self._placements, [row[0] for row in waiting])
        return count

    async def drop_mailboxes(self, account: str) -> Release:
        removed, dead = 0, 0
        while True:
            part = await self._write(self._drop_some, account)
            removed += part.removed
            dead += part.dead
            if not part.removed:
                return Release(removed, dead)

    def _drop_some(self, account: str) -> Release:
        """A bounded part of an account's entries; the mailbox rows go when they are empty."""
        row = self._db.execute("SELECT id FROM mailboxes WHERE account = ? AND messages > 0 LIMIT 1", (account,)).fetchone()
        if row is None:
            self._db.execute("DELETE FROM expunged WHERE mailbox IN (SELECT id FROM mailboxes WHERE account = ?)", (account,))
            self._db.execute("DELETE FROM mailboxes WHERE account = ?", (account,))
            self._mailbox_ids.clear()
            return Release(0, 0)
        uids = self._db.execute("SELECT uid FROM entries WHERE mailbox = ? LIMIT 5000", (row[0],)).fetchall()
        if not uids:
            self._db.execute("UPDATE mailboxes SET messages = 0, octets = 0 WHERE id = ?", (row[0],))
            return self._drop_some(account)
        return self._expunge(row[0], [uid for (uid,) in uids])


def _queue_row(key: bytes, at: float, commit: Commit, target: Target, held: str = "") -> tuple[Any, ...]:
    destination = target.destination
    return (
        key,
        destination,
        destination.rpartition("@")[2],
        target.reverse_path,
        target.recipient or destination,
        target.notify,
        target.orcpt,
        commit.envid,
        commit.ret,
        int(commit.smtputf8),
        commit.octets,
        at,
        at,
        0,
        int(bool(held)),
        held,
        "",
        0,
    )
