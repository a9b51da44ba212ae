"""Owns entering messages, on SQLite: what group commit of deliveries runs in the writing lane (laws 3, 4, 7).

Deliveries that wait share one transaction; where nothing is new but messages it is one statement over the view `arrivals`,
a transaction by itself, which is most of the index's speed. The law says: insert first, then look at watermarks in a later
statement. Here the look comes first and at a copy of the node rows in memory, which is the same only because this process is
the only writer and one lane runs its transactions: no watermark can move between the look and the commit.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Delivery, Fate, Outcome, QueueRow
from powermail.index.laws import NumbersSpent
from powermail.index.sql import queue_form
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import Transaction, Untouched
from powermail.index.sql.mailboxes import MailboxPart
from powermail.index.sqlite.connection import SqliteCore
from powermail.index.sqlite.rows import ROWS_MAX, in_list, insert_many
from powermail.index.sqlite.statements import Writer, drive, text_of
from powermail.mail.envelope import Commit
from powermail.storage.contract import Receipt

_NODE = itemgetter(0)  # of a receipt
_ENTERED, _KNOWN, _ABORTED, _SETTLED = Outcome.ENTERED, Outcome.KNOWN, Outcome.ABORTED, Outcome.SETTLED
_LIVE, _DECIDED_AGAINST = int(Fate.LIVE), int(Fate.ABORTED)


class Arrivals:
    """Rows of messages that are being entered: `copies` for the view of the same name, `queue` for what leaves, `returns` for
    senders that these leave without.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[Any, ...]] = []
        self.queue: list[QueueRow] = []
        self.returns: list[tuple[str, str, float]] = []


class DeliverPart(MailboxPart, SqliteCore):
    """`deliver`, `expect` and `usage` of `index.contract.Copies` on SQLite."""

    async def close(self) -> None:
        """Finishes what waits and closes."""
        await self._gathered()
        await super().close()

    def _enter_batch(self, batch: list[Delivery]) -> asyncio.Future[list[Outcome | Exception]]:
        self._begin_change(clear=False)
        return self._write_lane.run(self._in_deliver, batch)

    def _entered(self, deliveries: Iterable[Delivery]) -> None:
        self._end_change()
        for delivery in deliveries:
            self._count_used(delivery.commit)

    async def usage(self, account: str) -> int:
        """Octets, from memory where nothing changed since: exact, because only this process writes."""
        used = self._used.get(account)
        if used is not None:
            return used
        changes, quiet = self._changes, not self._under_way
        used = await self._ask(self._usage, account)
        if quiet and changes == self._changes:  # else a change came between, and the figure may be old
            if len(self._used) >= limits.DIRECTORY_CACHE_MAX:
                self._used.clear()
            self._used[account] = used
        return used

    def _count_used(self, commit: Commit) -> None:
        """Usage stays exact, because only this process writes; targets of purged accounts are counted by nobody."""
        for target in commit.targets:
            if target.account in self._used:
                self._used[target.account] += commit.shown_octets

    # -- entering ------------------------------------------------------------------------------------------------------

    def _in_deliver(self, batch: list[Delivery]) -> list[Outcome | Exception]:
        """One transaction for all; if that fails, one for each, so that one bad delivery harms no other."""
        try:
            if self._is_plain(batch):
                return list(self._in_deliver_plain(batch))
            entered: list[Outcome] = self._in_transaction(self._in_enter_batch, (batch,))
            return list(entered)
        except sqlite3.OperationalError as error:  # locked, full, failing: it would be the same for each
            self._in_forget_caches()
            return [error] * len(batch)
        except (sqlite3.Error, IndexTrouble, NumbersSpent, OverflowError) as error:
            self._in_forget_caches()
            if len(batch) == 1:
                return [error]
        outcomes: list[Outcome | Exception] = []
        for delivery in batch:
            try:
                outcomes.append(self._in_transaction(self._in_enter_batch, ([delivery],))[0])
            except (sqlite3.Error, IndexTrouble, NumbersSpent, OverflowError) as error:
                outcomes.append(error)
        return outcomes

    def _is_plain(self, batch: list[Delivery]) -> bool:
        """True if one statement, which is a transaction by itself, enters the batch: nothing is new but messages."""
        if len(batch) > ROWS_MAX or self._why_lost or not self.numbering:
            return False
        rows = 0
        boxes, sets = self._writer.boxes, self._writer.sets.of_receipts
        for _, commit, receipts in batch:
            if tuple(map(_NODE, receipts)) not in sets:
                return False
            for target in commit.targets:
                box = boxes.get((target.account, target.mailbox))
                if target.destination or box is None or box.left <= ROWS_MAX:
                    return False
                rows += 1
        return 0 < rows <= ROWS_MAX

    def _in_deliver_plain(self, batch: list[Delivery]) -> list[Outcome]:
        arrivals = Arrivals()
        outcomes = drive(self._in_enter(self._writer, batch, arrivals))
        if arrivals.copies:
            count = self._slot.commits + 1
            arrivals.copies[-1] = (*arrivals.copies[-1][:-1], count)  # law 10
            self._in_put(arrivals)
            self._slot = self._slot._replace(commits=count)
            self._published = self._slot, self._shared
        return outcomes

    async def _in_enter_batch(self, db: Writer, batch: list[Delivery]) -> list[Outcome] | Untouched[list[Outcome]]:
        arrivals = Arrivals()
        before = db.changes
        outcomes = await self._in_enter(db, batch, arrivals)
        self._in_put(arrivals)
        return outcomes if db.changes != before else Untouched(outcomes)

    async def _in_hold_boxes(self, db: Transaction, entering: Sequence[tuple[bytes, Commit]], dying: Sequence[bytes]) -> None:
        """Nobody else writes."""

    async def _in_enter_found(self, db: Transaction, node: str, found: Sequence[tuple[bytes, Commit]]) -> int:
        arrivals, entered = Arrivals(), 0
        placement = await db.placements.id([node])
        due_at = self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S
        for key, commit in found:
            entered += await self._in_rows(db, key, commit, placement, due_at, arrivals)
        self._in_put(arrivals)
        return entered

    def _in_put(self, arrivals: Arrivals) -> None:
        self.numbered += len(arrivals.copies)
        insert_many(self._db, "INSERT INTO arrivals", 10, arrivals.copies)
        if arrivals.queue:
            rows = [queue_form.values(row, None) for row in arrivals.queue]
            insert_many(self._db, queue_form.INSERT, queue_form.WIDTH, rows)
        if arrivals.returns:
            self._db.executemany(text_of(queue_form.ADD_RETURN), arrivals.returns)

    async def _in_enter(self, db: Writer, batch: list[Delivery], arrivals: Arrivals) -> list[Outcome]:
        known = self._in_known([delivery.key for delivery in batch])
        outcomes: list[Outcome] = []
        numbers = db.sets.of_receipts
        due_at = self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S
        for key, commit, receipts in batch:
            fate = known.get(key)
            if fate is not None:  # law 3: who inserted first has decided
                outcomes.append(_ABORTED if fate == _DECIDED_AGAINST else _KNOWN)
                continue
            if self._why_lost or not self.numbering:
                await self._in_may_number(db)
            if self._settled(receipts):  # law 7
                outcomes.append(_SETTLED)
                continue
            known[key] = _LIVE
            nodes = tuple(map(_NODE, receipts))
            placement = numbers.get(nodes)
            if placement is None:
                placement = numbers[nodes] = db.sets.id(nodes)
            if self._one_row(key, commit, placement, due_at, arrivals.copies):
                outcomes.append(_ENTERED)
            else:
                outcomes.append(_ENTERED if await self._in_rows(db, key, commit, placement, due_at, arrivals) else _KNOWN)
        return outcomes

    def _in_known(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        return dict(self._db.execute(f"SELECT key, fate FROM messages WHERE key IN ({in_list(keys)})", keys).fetchall())

    def _settled(self, receipts: Sequence[Receipt]) -> bool:
        """Law 7: reconcile has passed that place, or it is not a place of a node as the index knows it."""
        passed = self._writer.passed
        for node, incarnation, position in receipts:
            row = passed.get(node)
            if row is None or row[0] != incarnation or position < row[1]:
                return True
        return False

    def _one_row(self, key: bytes, commit: Commit, placement: int, due_at: float, copies: list[tuple[Any, ...]]) -> bool:
        """Adds the row of a message for one mailbox that is known and has numbers left, as `_in_rows` does; False if it is not
        such a one.
        """
        if len(commit.targets) != 1:
            return False
        target = commit.targets[0]
        box = self._writer.boxes.get((target.account, target.mailbox))
        if box is None or box.left <= 0 or target.destination:
            return False
        due = None
        box.left -= 1
        if not box.due:
            due, box.due = due_at, True
        octets, sha256, at = commit.as_text or commit.octets, bytes.fromhex(commit.sha256), commit.received_at
        copies.append((key, octets, sha256, placement, 1, box.id, target.flags, at, due, None))
        return True

    async def _in_rows(
        self, db: Transaction, key: bytes, commit: Commit, placement: int, due_at: float, arrivals: Arrivals
    ) -> bool:
        """Adds the rows of a new key, live with a reference for each target; False if no target is left, and it is dead at
        once (law 13): the caller then has nothing more to do.
        """
        at, octets, sha256 = commit.received_at, commit.shown_octets, bytes.fromhex(commit.sha256)
        copies, boxes = arrivals.copies, db.boxes
        first, refs, skipped = len(copies), len(commit.targets), 0
        for target in commit.targets:
            if target.destination:
                arrivals.queue.append(QueueRow.of(0, key, commit, target))
                if target.original:
                    arrivals.returns.append((target.reverse_path.lower(), target.original, at + limits.RETURN_S))
                if refs:
                    copies.append((key, octets, sha256, placement, refs, None, 0, at, None, None))
                    refs = 0
                continue
            box = boxes.get((target.account, target.mailbox))
            if box is None or box.left <= 0:
                box = await self._in_box(db, target.account, target.mailbox)
                if box is None:
                    skipped += 1
                    continue
            due = None
            box.left -= 1
            if not box.due:
                due, box.due = due_at, True
            copies.append((key, octets, sha256, placement, refs, box.id, target.flags, at, due, None))
            refs = 0
        if len(copies) == first:  # no target is left
            await self._in_enter_dead(db, key, octets, sha256, placement)
            return False
        if skipped:
            copies[first] = (*copies[first][:4], copies[first][4] - skipped, *copies[first][5:])
        return True

    async def _in_enter_dead(self, db: Transaction, key: bytes, octets: int, sha256: bytes, placement: int) -> None:
        """All its targets were purged: a row that is dead, with orders for its nodes (laws 8, 13)."""
        await db.change(
            "INSERT INTO messages VALUES (?, ?, ?, ?, 0, ?, (SELECT value FROM counters WHERE name = 'round'))",
            (key, octets, sha256, NO_NODES, int(Fate.DEAD)),
        )
        await self._in_order(db, [(node, key) for node in await db.placements.nodes(placement)])
