"""Owns what a mailbox shows and its numbers, in the writing lane: its view, UIDs and MODSEQs, and which checkpoint is due.

UIDs and MODSEQs come from the mailbox row in the transaction that uses them (P10); `index.laws` says how they leap. The view
of a mailbox is the stored one with its tail: entries at or above its UIDNEXT, changes above its MODSEQ.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.base.world import World
from powermail.index import laws
from powermail.index.contract import EntryFacts, MailboxFacts
from powermail.index.sqlite.connection import Core
from powermail.index.sqlite.rows import insert_many
from powermail.index.view import Change, Op, View, pack_uids, unpack_uids

MAILBOX = "id, account, name, uidvalidity, uid_next, modseq, messages, octets"
ENTRY = "uid, key, flags, modseq, octets, received_at"
_NUMBERS = "uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq"


def read_facts(db: sqlite3.Connection, mailbox: int) -> MailboxFacts:
    """A mailbox row. Raises KeyError."""
    row = db.execute(f"SELECT {MAILBOX} FROM mailboxes WHERE id = ?", (mailbox,)).fetchone()
    if row is None:
        raise KeyError(mailbox)
    return MailboxFacts(*row)


def trimmed(db: sqlite3.Connection, mailbox: int) -> int:
    """The MODSEQ up to which changes are in the stored view only."""
    row = db.execute("SELECT modseq FROM views WHERE mailbox = ? AND part = 0", (mailbox,)).fetchone()
    return int(row[0]) if row else 0


def read_changes(db: sqlite3.Connection, mailbox: int, modseq: int) -> list[Change]:
    """Changes above a MODSEQ, in order."""
    rows = db.execute(
        "SELECT modseq, op, flags, uids FROM changes WHERE mailbox = ? AND modseq > ? ORDER BY modseq", (mailbox, modseq)
    )
    return [Change(number, Op(op), flags, unpack_uids(uids)) for number, op, flags, uids in rows]


def read_arrived(db: sqlite3.Connection, mailbox: int, uid_next: int) -> list[EntryFacts]:
    """Entries at or above a UIDNEXT, in order."""
    rows = db.execute(f"SELECT {ENTRY} FROM entries WHERE mailbox = ? AND uid >= ? ORDER BY uid", (mailbox, uid_next))
    return [EntryFacts(*row) for row in rows]


def read_view(db: sqlite3.Connection, mailbox: int) -> View:
    """The whole state, in the snapshot or transaction the connection is in. Raises KeyError, or IndexTrouble if damaged."""
    facts = read_facts(db, mailbox)
    parts = [row[0] for row in db.execute("SELECT state FROM views WHERE mailbox = ? ORDER BY part", (mailbox,))]
    try:
        view = View.unpack(parts) if parts else View(facts.uidvalidity, 1, 0)
    except ValueError as error:
        raise IndexTrouble(f"the view of mailbox {mailbox}: {error}") from error
    follow(db, view, facts)
    return view


def follow(db: sqlite3.Connection, view: View, facts: MailboxFacts) -> None:
    """Brings a view to where the mailbox is."""
    arrived, changes = read_arrived(db, facts.id, view.uid_next), read_changes(db, facts.id, view.modseq)
    view.follow(facts.uid_next, facts.modseq, arrived, changes)


class Box:
    """A mailbox by its name, for deliveries: `left` numbers may be given before its row must be looked at again; `due` tells
    that its next checkpoint has a date. A copy in memory, right because this process alone writes.
    """

    __slots__ = ("due", "id", "left")

    def __init__(self, number: int, left: int, due: bool) -> None:
        self.id = number
        self.left = left
        self.due = due


class Numbering(Core):
    """Mailboxes, their views and their numbers, for the parts that write."""

    def __init__(self, world: World, path: str) -> None:
        super().__init__(world, path)
        self._boxes: dict[tuple[str, str], Box] = {}
        self._views: dict[int, View] = {}  # used lately, the longest unused first; only the writing lane sees them
        self._views_messages = 0

    def _in_forget_caches(self) -> None:
        super()._in_forget_caches()
        self._boxes.clear()
        self._views.clear()
        self._views_messages = 0

    def _in_renumber_all(self) -> None:
        super()._in_renumber_all()
        self._boxes.clear()

    # -- views ---------------------------------------------------------------------------------------------------------

    def _in_view(self, mailbox: int) -> View:
        """The state now; the caller may not change it. Raises KeyError."""
        db = self._db
        facts = read_facts(db, mailbox)
        view = self._in_forget_view(mailbox)
        if view is None or view.uidvalidity != facts.uidvalidity or view.modseq < trimmed(db, mailbox):
            view = read_view(db, mailbox)
        elif view.modseq != facts.modseq:
            follow(db, view, facts)
        self._views[mailbox] = view
        self._views_messages += len(view)
        while self._views_messages > limits.INDEX_VIEWS_MESSAGES_MAX or len(self._views) > limits.INDEX_VIEWS_MAX:
            oldest = next(iter(self._views))
            if oldest == mailbox:  # alone it may be larger
                break
            self._in_forget_view(oldest)
        return view

    def _in_forget_view(self, mailbox: int) -> View | None:
        view = self._views.pop(mailbox, None)
        self._views_messages -= len(view) if view is not None else 0
        return view

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _may_number(self) -> None:
        """Raises IndexTrouble while no number may be given (law 11)."""
        if self._why_lost:
            raise IndexLost(self._why_lost)
        if not self.numbering:
            raise IndexTrouble("commits were lost: no numbers before the new epoch has begun")

    def _in_renumber(self, mailbox: int, count: int) -> laws.Numbers:
        """Makes a mailbox ready for `count` UIDs, or for one MODSEQ if 0 (laws 10, 11). Raises KeyError, NumbersSpent."""
        self._may_number()
        db = self._db
        row = db.execute(f"SELECT {_NUMBERS} FROM mailboxes WHERE id = ?", (mailbox,)).fetchone()
        if row is None:
            raise KeyError(mailbox)
        before = laws.Numbers(*row)
        fresh = laws.fresh_uidvalidity(self._in_uidvalidity(), self._world.clock.now())
        numbers = laws.renumbered(before, self._shared.epoch, self._shared.starts, fresh, count)
        if numbers.uidvalidity != before.uidvalidity:
            self._in_use_uidvalidity(fresh)
            return self._in_begin_anew(mailbox, numbers)
        if numbers != before:
            self._in_put_numbers(mailbox, numbers)
        return numbers

    def _in_put_numbers(self, mailbox: int, numbers: laws.Numbers) -> None:
        sets = ", ".join(f"{name} = ?" for name in _NUMBERS.split(", "))
        self._db.execute(f"UPDATE mailboxes SET {sets} WHERE id = ?", (*numbers, mailbox))

    def _in_begin_anew(self, mailbox: int, numbers: laws.Numbers) -> laws.Numbers:
        """UIDs ran short: under the fresh UIDVALIDITY what is here gets the first ones, and every old view is void (law 11)."""
        db = self._db
        dates = dict(db.execute("SELECT uid, received_at FROM entries WHERE mailbox = ?", (mailbox,)).fetchall())
        modseq = numbers.modseq + 1
        rows = [
            (uid, key, flags, modseq, octets, dates[old])
            for uid, (old, key, flags, _, octets, _) in enumerate(self._in_view(mailbox).rows(), 1)
        ]
        view = View(numbers.uidvalidity, 1, modseq)
        view.arrive(rows)
        for table in ("entries", "changes"):
            db.execute(f"DELETE FROM {table} WHERE mailbox = ?", (mailbox,))
        insert_many(db, "INSERT INTO entries", 7, [(mailbox, *row) for row in rows])
        self._in_put_view(mailbox, view.pack(), modseq, view.uid_next)
        numbers = numbers._replace(uid_next=view.uid_next, modseq=modseq, base_uid=view.uid_next)
        self._in_put_numbers(mailbox, numbers)
        db.execute("UPDATE mailboxes SET whole_modseq = 0 WHERE id = ?", (mailbox,))
        self._in_forget_view(mailbox)
        return numbers

    def _in_put_view(self, mailbox: int, parts: Sequence[bytes], modseq: int, uid_next: int) -> None:
        """Replaces the stored view."""
        self._db.execute("DELETE FROM views WHERE mailbox = ?", (mailbox,))
        self._db.executemany(
            "INSERT INTO views VALUES (?, ?, ?, ?, ?)",
            [(mailbox, number, modseq, uid_next, part) for number, part in enumerate(parts)],
        )

    def _in_uidvalidity(self) -> int:
        return int(self._db.execute("SELECT value FROM counters WHERE name = 'uidvalidity'").fetchone()[0])

    def _in_use_uidvalidity(self, fresh: int) -> None:
        """Notes a UIDVALIDITY as given: a name that comes again never repeats a pair."""
        if fresh > limits.UID_MAX:
            raise IndexTrouble("there is no UIDVALIDITY left")
        self._db.execute("UPDATE counters SET value = ? WHERE name = 'uidvalidity'", (fresh,))
        self._fresh = fresh

    def _in_take(self, mailbox: int, uids: int) -> tuple[int, int]:
        """The next `uids` UIDs and one MODSEQ: (first UID, MODSEQ)."""
        self.numbered += max(1, uids)
        before = self._in_renumber(mailbox, uids)
        after = before._replace(uid_next=before.uid_next + uids, modseq=before.modseq + 1)
        self._db.execute("UPDATE mailboxes SET uid_next = ?, modseq = ? WHERE id = ?", (after.uid_next, after.modseq, mailbox))
        self._in_set_due(mailbox, after)
        return before.uid_next, after.modseq

    def _in_change(self, mailbox: int, op: Op, flags: int, uids: Sequence[int]) -> int:
        """One row of changes, whatever its size; its MODSEQ."""
        _, modseq = self._in_take(mailbox, 0)
        self._db.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?)", (mailbox, modseq, int(op), flags, pack_uids(uids)))
        return modseq

    def _in_set_due(self, mailbox: int, numbers: laws.Numbers) -> bool:
        """A checkpoint falls due at the first change behind the last one (law 13), at once when numbers run out (law 11)."""
        now = self._world.clock.now()
        if laws.needs_checkpoint(numbers):
            self._db.execute("UPDATE mailboxes SET due_at = ? WHERE id = ? AND (due_at = 0 OR due_at > ?)", (now, mailbox, now))
            return True
        due = now + limits.CHECKPOINT_INTERVAL_S
        return self._db.execute("UPDATE mailboxes SET due_at = ? WHERE id = ? AND due_at = 0", (due, mailbox)).rowcount > 0

    # -- mailboxes by name ---------------------------------------------------------------------------------------------

    def _in_box(self, account: str, name: str) -> Box | None:
        """The mailbox of that name, made if it does not exist, ready for a number; None if the account was purged (law 13)."""
        box = self._boxes.get((account, name))
        if box is not None and box.left > 0:
            return box
        db = self._db
        row = db.execute("SELECT id, due_at FROM mailboxes WHERE account = ? AND name = ?", (account, name)).fetchone()
        if db.execute("SELECT 1 FROM purged WHERE account = ?", (account,)).fetchone():
            return None
        number = row[0] if row else self._in_make(account, name)
        numbers = self._in_renumber(number, 1)
        used = max(numbers.uid_next - numbers.base_uid, numbers.modseq - numbers.base_modseq)
        spent = laws.needs_checkpoint(numbers)
        if spent:
            self._in_set_due(number, numbers)
        left = (limits.EPOCH_JUMP if spent else limits.EPOCH_JUMP // 2) - used
        if len(self._boxes) >= limits.DIRECTORY_CACHE_MAX:
            self._boxes.clear()
        box = self._boxes[account, name] = Box(number, left, spent or bool(row and row[1]))
        return box

    def _in_make(self, account: str, name: str) -> int:
        """A new mailbox under a fresh UIDVALIDITY."""
        self._may_number()
        fresh = laws.fresh_uidvalidity(self._in_uidvalidity(), self._world.clock.now())
        self._in_use_uidvalidity(fresh)
        row = self._db.execute(
            "INSERT INTO mailboxes (account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq,"
            " messages, octets) VALUES (?, ?, ?, 1, 1, ?, ?, 1, 1, 0, 0) RETURNING id",
            (account, name, fresh, self._shared.epoch, self._shared.starts),
        ).fetchone()
        return int(row[0])
