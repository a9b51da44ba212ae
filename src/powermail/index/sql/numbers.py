"""Owns what a mailbox shows and its numbers, for whoever writes: its view, UIDs and MODSEQs, and which checkpoint is due.

UIDs and MODSEQs come from the mailbox row in the transaction that uses them (P10); `index.laws` says how they leap. The view
of a mailbox is the stored one with its tail: entries at or above its UIDNEXT, changes above its MODSEQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import EntryFacts, MailboxFacts
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Again, Box, Reading, Transaction
from powermail.index.view import Change, Op, View, pack_uids, unpack_uids

MAILBOX = "id, account, name, uidvalidity, uid_next, modseq, messages, octets"
_FRESH = 0  # stands for a UIDVALIDITY that is still to be given
ENTRY = "uid, key, flags, modseq, octets, received_at"
_FACTS = f"SELECT {MAILBOX} FROM mailboxes WHERE id = ?"
_LOCKED_FACTS = f"{_FACTS} FOR UPDATE"
_TAKE_UIDVALIDITIES = (
    "UPDATE counters SET value = CASE value WHEN 0 THEN ? ELSE value + 1 END + ? WHERE name = 'uidvalidity' RETURNING value"
)
_NUMBERS = "uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq"


async def read_facts(db: Reading, mailbox: int, lock: bool = False) -> MailboxFacts:
    """A mailbox row; with `lock`, nobody else changes it until the transaction ends. Raises KeyError."""
    row = await db.one(_LOCKED_FACTS if lock else _FACTS, (mailbox,))
    if row is None:
        raise KeyError(mailbox)
    return MailboxFacts(*row)


async def trimmed(db: Reading, mailbox: int) -> int:
    """The MODSEQ up to which changes are in the stored view only."""
    row = await db.one("SELECT modseq FROM views WHERE mailbox = ? AND part = 0", (mailbox,))
    return int(row[0]) if row else 0


async def read_changes(db: Reading, mailbox: int, modseq: int, messages: int) -> list[Change]:
    """Changes above a MODSEQ, in order; one may name all `messages`."""
    rows = await db.rows(
        "SELECT modseq, op, flags, uids FROM changes WHERE mailbox = ? AND modseq > ? ORDER BY modseq", (mailbox, modseq)
    )
    return await db.aside(messages if rows else 0, _changes, rows)


def _changes(rows: Sequence[Sequence[Any]]) -> list[Change]:
    return [Change(number, Op(op), flags, unpack_uids(uids)) for number, op, flags, uids in rows]


async def read_arrived(db: Reading, mailbox: int, uid_next: int) -> list[EntryFacts]:
    """Entries at or above a UIDNEXT, in order."""
    rows = await db.rows(f"SELECT {ENTRY} FROM entries WHERE mailbox = ? AND uid >= ? ORDER BY uid", (mailbox, uid_next))
    return await db.aside(len(rows), _entries, rows)


def _entries(rows: Sequence[Sequence[Any]]) -> list[EntryFacts]:
    return [EntryFacts(*row) for row in rows]


async def read_view(db: Reading, mailbox: int) -> View:
    """The whole state, in the snapshot or transaction the connection is in. Raises KeyError, or IndexTrouble if damaged."""
    facts = await read_facts(db, mailbox)
    parts = [row[0] for row in await db.rows("SELECT state FROM views WHERE mailbox = ? ORDER BY part", (mailbox,))]
    try:
        rows = facts.messages + len(parts[1:]) * limits.VIEW_PART_ROWS
        view = await db.aside(rows, View.unpack, parts) if parts else View(facts.uidvalidity, 1, 0)
    except ValueError as error:
        raise IndexTrouble(f"the view of mailbox {mailbox}: {error}") from error
    await follow(db, view, facts)
    return view


async def follow(db: Reading, view: View, facts: MailboxFacts) -> None:
    """Brings a view to where the mailbox is."""
    arrived = await read_arrived(db, facts.id, view.uid_next)
    changes = await read_changes(db, facts.id, view.modseq, facts.messages)
    rows = len(arrived) + (facts.messages if changes else 0)
    await db.aside(rows, view.follow, facts.uid_next, facts.modseq, arrived, changes)


class Numbering(Core):
    """Mailboxes, their views and their numbers, for the parts that write."""

    # -- views ---------------------------------------------------------------------------------------------------------

    async def _in_view(self, db: Transaction, mailbox: int) -> View:
        """The state now; the caller may not change it. Raises KeyError."""
        facts = await read_facts(db, mailbox, lock=True)
        view = await db.known_view(mailbox)
        fits = view is not None and view.uidvalidity == facts.uidvalidity and view.modseq <= facts.modseq
        if view is None or not fits or view.modseq < await trimmed(db, mailbox):
            view = await read_view(db, mailbox)
        elif view.modseq != facts.modseq:
            await follow(db, view, facts)
        db.keep_view(mailbox, view)
        return view

    # -- numbers -------------------------------------------------------------------------------------------------------

    async def _in_renumber(self, db: Transaction, mailbox: int, count: int) -> laws.Numbers:
        """Makes a mailbox ready for `count` UIDs, or for one MODSEQ if 0 (laws 10, 11). Raises KeyError, NumbersSpent."""
        await self._in_may_number(db)
        row = await db.one(f"SELECT {_NUMBERS} FROM mailboxes WHERE id = ? FOR UPDATE", (mailbox,))
        if row is None:
            raise KeyError(mailbox)
        before = laws.Numbers(*row)
        numbers = laws.renumbered(before, await db.counter("epoch"), await db.counter("starts"), _FRESH, count)
        if numbers.uidvalidity == _FRESH:
            fresh = await self._in_fresh_uidvalidity(db)
            return await self._in_begin_anew(db, mailbox, numbers._replace(uidvalidity=fresh))
        if numbers != before:
            await self._in_put_numbers(db, mailbox, numbers)
        return numbers

    async def _in_put_numbers(self, db: Transaction, mailbox: int, numbers: laws.Numbers) -> None:
        sets = ", ".join(f"{name} = ?" for name in _NUMBERS.split(", "))
        await db.change(f"UPDATE mailboxes SET {sets} WHERE id = ?", (*numbers, mailbox))

    async def _in_begin_anew(self, db: Transaction, mailbox: int, numbers: laws.Numbers) -> laws.Numbers:
        """UIDs ran short: under the fresh UIDVALIDITY what is here gets the first ones, and every old view is void (law 11)."""
        dates = dict(await db.rows("SELECT uid, received_at FROM entries WHERE mailbox = ?", (mailbox,)))
        modseq = numbers.modseq + 1
        rows = [
            (uid, key, flags, modseq, octets, dates[old])
            for uid, (old, key, flags, _, octets, _) in enumerate((await self._in_view(db, mailbox)).rows(), 1)
        ]
        view = View(numbers.uidvalidity, 1, modseq)
        view.arrive(rows)
        for table in ("entries", "changes"):
            await db.change(f"DELETE FROM {table} WHERE mailbox = ?", (mailbox,))
        await db.put("INSERT INTO entries", 7, [(mailbox, *row) for row in rows])
        await self._in_put_view(db, mailbox, view.pack(), modseq, view.uid_next)
        numbers = numbers._replace(uid_next=view.uid_next, modseq=modseq, base_uid=view.uid_next)
        await self._in_put_numbers(db, mailbox, numbers)
        await db.change("UPDATE mailboxes SET whole_modseq = 0 WHERE id = ?", (mailbox,))
        db.forget_view(mailbox)
        return numbers

    async def _in_put_view(self, db: Transaction, mailbox: int, parts: Sequence[bytes], modseq: int, uid_next: int) -> None:
        """Replaces the stored view."""
        await db.change("DELETE FROM views WHERE mailbox = ?", (mailbox,))
        await db.many(
            "INSERT INTO views VALUES (?, ?, ?, ?, ?)",
            [(mailbox, number, modseq, uid_next, part) for number, part in enumerate(parts)],
        )

    async def _in_fresh_uidvalidity(self, db: Transaction) -> int:
        """The next UIDVALIDITY, noted as given: a name that comes again never repeats a pair."""
        return (await self._in_fresh_uidvalidities(db, 1))[0]

    async def _in_fresh_uidvalidities(self, db: Transaction, count: int) -> range:
        """The next `count` of them: the first as `laws.fresh_uidvalidity` says, each other behind the one before. One
        statement takes them all, and holds the counter: all who make mailboxes wait for it.
        """
        without = laws.fresh_uidvalidity(0, self._world.clock.now())
        last = int((await db.one(_TAKE_UIDVALIDITIES, (without, count - 1)))[0])
        if last > limits.UID_MAX:
            raise IndexTrouble("there is no UIDVALIDITY left")
        db.fresh = last
        return range(last - count + 1, last + 1)

    async def _in_take(self, db: Transaction, mailbox: int, uids: int) -> tuple[int, int]:
        """The next `uids` UIDs and one MODSEQ: (first UID, MODSEQ)."""
        self.numbered += max(1, uids)
        before = await self._in_renumber(db, mailbox, uids)
        after = before._replace(uid_next=before.uid_next + uids, modseq=before.modseq + 1)
        await db.change("UPDATE mailboxes SET uid_next = ?, modseq = ? WHERE id = ?", (after.uid_next, after.modseq, mailbox))
        await self._in_set_due(db, mailbox, after)
        return before.uid_next, after.modseq

    async def _in_change(self, db: Transaction, mailbox: int, op: Op, flags: int, uids: Sequence[int]) -> int:
        """One row of changes, whatever its size; its MODSEQ."""
        _, modseq = await self._in_take(db, mailbox, 0)
        await db.change("INSERT INTO changes VALUES (?, ?, ?, ?, ?)", (mailbox, modseq, int(op), flags, pack_uids(uids)))
        return modseq

    async def _in_set_due(self, db: Transaction, mailbox: int, numbers: laws.Numbers) -> bool:
        """A checkpoint falls due at the first change behind the last one (law 13), at once when numbers run out (law 11)."""
        now = self._world.clock.now()
        if laws.needs_checkpoint(numbers):
            await self._in_due_by(db, mailbox, now)
            return True
        due = now + limits.CHECKPOINT_INTERVAL_S
        return await db.change("UPDATE mailboxes SET due_at = ? WHERE id = ? AND due_at = 0", (due, mailbox)) > 0

    async def _in_due_by(self, db: Transaction, mailbox: int, moment: float) -> None:
        """A checkpoint is due by then; what was due before stays so."""
        await db.change(
            "UPDATE mailboxes SET due_at = ? WHERE id = ? AND (due_at = 0 OR due_at > ?)", (moment, mailbox, moment)
        )

    # -- mailboxes by name ---------------------------------------------------------------------------------------------

    async def _in_box(self, db: Transaction, account: str, name: str) -> Box | None:
        """The mailbox of that name, made if it does not exist, ready for a number; None if the account was purged (law 13)."""
        box = db.boxes.get((account, name))
        if box is not None and box.left > 0:
            return box
        row = await db.one("SELECT id, due_at FROM mailboxes WHERE account = ? AND name = ?", (account, name))
        if await db.one("SELECT 1 FROM purged WHERE account = ?", (account,)):
            return None
        number = row[0] if row else await self._in_make(db, account, name)
        numbers = await self._in_renumber(db, number, 1)
        used = max(numbers.uid_next - numbers.base_uid, numbers.modseq - numbers.base_modseq)
        spent = laws.needs_checkpoint(numbers)
        if spent:
            await self._in_set_due(db, number, numbers)
        left = (limits.EPOCH_JUMP if spent else limits.EPOCH_JUMP // 2) - used
        if len(db.boxes) >= limits.DIRECTORY_CACHE_MAX:
            db.boxes.clear()
        box = db.boxes[account, name] = Box(number, left, spent or bool(row and row[1]))
        return box

    async def _in_make(self, db: Transaction, account: str, name: str) -> int:
        """A new mailbox under a fresh UIDVALIDITY. Where others write too, the row comes first and the counter last."""
        await self._in_may_number(db)
        fresh = await self._in_fresh_uidvalidity(db) if db.alone else 0
        row = await db.one(
            "INSERT INTO mailboxes (id, account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq,"
            " messages, octets) VALUES (?, ?, ?, ?, 1, 1, ?, ?, 1, 1, 0, 0) ON CONFLICT (account, name) DO NOTHING"
            " RETURNING id",
            (db.new_id("mailboxes"), account, name, fresh, await db.counter("epoch"), await db.counter("starts")),
        )
        if row is None:
            raise Again(f"mailbox {name} of {account} was made meanwhile")
        if not db.alone:
            await self._in_name(db, [row[0]], [account])
        return int(row[0])

    async def _in_name(self, db: Transaction, made: Sequence[int], accounts: Sequence[str]) -> None:
        """Gives new mailboxes their UIDVALIDITYs. Whoever notes that an account was purged takes the same counter, so that a
        mailbox is made before that, and seen by who purges, or not at all (law 13).
        """
        fresh = await self._in_fresh_uidvalidities(db, len(made))
        await db.many("UPDATE mailboxes SET uidvalidity = ? WHERE id = ?", list(zip(fresh, made, strict=True)))
        if await db.rows_in("SELECT account FROM purged WHERE account IN", sorted(set(accounts))):
            raise Again("an account was purged meanwhile")
