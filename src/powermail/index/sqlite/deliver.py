"""Owns entering messages, on SQLite: group commit of deliveries, and abort, which meets them on one row (laws 3, 4, 7).

Deliveries that wait share one transaction; where nothing is new but messages it is one statement over the view `arrivals`,
a transaction by itself, which is most of the index's speed. The law says: insert first, then look at watermarks in a later
statement. Here the look comes first and at a copy of the node rows in memory, which is the same only because this process is
the only writer and one lane runs its transactions: no watermark can move between the look and the commit.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.world import World
from powermail.index.contract import Delivery, Fate, Outcome, QueueRow
from powermail.index.laws import NumbersSpent
from powermail.index.sqlite import queue_form, schema
from powermail.index.sqlite.connection import Untouched
from powermail.index.sqlite.references import References
from powermail.index.sqlite.rows import ROWS_MAX, in_list, insert_many
from powermail.index.sqlite.schema import NO_NODES
from powermail.mail.envelope import Commit
from powermail.storage.contract import Receipt

_NODE = itemgetter(0)  # of a receipt
_ENTERED, _KNOWN, _ABORTED, _SETTLED = Outcome.ENTERED, Outcome.KNOWN, Outcome.ABORTED, Outcome.SETTLED
_LIVE = int(Fate.LIVE)
_Waiting = tuple[Delivery, "asyncio.Future[Outcome]"]


class Arrivals:
    """Rows of messages that are being entered: `copies` for the view of the same name, `queue` for what leaves, `returns` for
    senders that these leave without.
    """

    def __init__(self) -> None:
        self.copies: list[tuple[Any, ...]] = []
        self.queue: list[QueueRow] = []
        self.returns: list[tuple[str, str, float]] = []


class DeliverPart(References):
    """`deliver`, `abort` and `expect` of `index.contract.Copies` on SQLite."""

    def __init__(self, world: World, path: str) -> None:
        super().__init__(world, path)
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._expected = 0  # deliveries on their way, those that wait here included
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event = asyncio.Event()

    async def close(self) -> None:
        """Finishes what waits and closes."""
        while self._busy or self._waiting:
            self._idle.clear()
            await self._idle.wait()
        await super().close()

    # -- gathering -----------------------------------------------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> asyncio.Future[Outcome]:
        """As the contract says. Raises IndexTrouble at once when too many wait."""
        if len(self._waiting) >= limits.INDEX_WAITING_MAX:
            raise IndexTrouble(f"{limits.INDEX_WAITING_MAX} deliveries wait for the index")
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
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
        self._begin_change(clear=False)
        done = self._write_lane.run(self._in_deliver, [delivery for delivery, _ in batch])
        done.add_done_callback(lambda result: self._delivered(batch, result))

    def _delivered(self, batch: list[_Waiting], result: asyncio.Future[list[Outcome | Exception]]) -> None:
        self._busy = False
        self._end_change()
        if result.cancelled():
            error: BaseException | None = IndexTrouble("the index was closed")
        else:
            error = result.exception()
        outcomes: Sequence[Outcome | BaseException] = [error] * len(batch) if error is not None else result.result()
        for (delivery, future), outcome in zip(batch, outcomes, strict=True):
            if outcome is _ENTERED:
                self._count_used(delivery.commit)
            if future.done():  # nobody waits any more
                continue
            if isinstance(outcome, Outcome):
                future.set_result(outcome)
            else:
                trouble = outcome if isinstance(outcome, IndexTrouble) else IndexTrouble(f"index: {outcome}")
                if trouble is not outcome:
                    trouble.__cause__ = outcome
                future.set_exception(trouble)
        if self._waiting:
            self._gather()
        else:
            self._idle.set()

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
        boxes, sets = self._boxes, self._sets
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
        outcomes = self._in_enter(batch, arrivals)
        if arrivals.copies:
            count = self._slot.commits + 1
            arrivals.copies[-1] = (*arrivals.copies[-1][:-1], count)  # law 10
            self._in_put(arrivals)
            self._slot = self._slot._replace(commits=count)
            self._published = self._slot, self._shared
        return outcomes

    def _in_enter_batch(self, batch: list[Delivery]) -> list[Outcome] | Untouched[list[Outcome]]:
        arrivals = Arrivals()
        before = self._db.total_changes
        outcomes = self._in_enter(batch, arrivals)
        self._in_put(arrivals)
        return outcomes if self._db.total_changes != before else Untouched(outcomes)

    def _in_put(self, arrivals: Arrivals) -> None:
        self.numbered += len(arrivals.copies)
        insert_many(self._db, "INSERT INTO arrivals", 10, arrivals.copies)
        if arrivals.queue:
            queue_form.insert(self._db, arrivals.queue)
        if arrivals.returns:
            self._db.executemany(schema.ADD_RETURN, arrivals.returns)

    def _in_enter(self, batch: list[Delivery], arrivals: Arrivals) -> list[Outcome]:
        known = self._in_known([delivery.key for delivery in batch])
        outcomes: list[Outcome] = []
        due_at = self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S
        for key, commit, receipts in batch:
            fate = known.get(key)
            if fate is not None:  # law 3: who inserted first has decided
                outcomes.append(_ABORTED if fate == Fate.ABORTED else _KNOWN)
                continue
            if self._why_lost or not self.numbering:
                self._may_number()
            if self._settled(receipts):  # law 7
                outcomes.append(_SETTLED)
                continue
            known[key] = _LIVE
            nodes = tuple(map(_NODE, receipts))
            placement = self._sets.get(nodes)
            if placement is None:
                placement = self._sets[nodes] = self._placements.id(nodes)
            outcomes.append(_ENTERED if self._in_rows(key, commit, placement, due_at, arrivals) else _KNOWN)
        return outcomes

    def _in_known(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        return dict(self._db.execute(f"SELECT key, fate FROM messages WHERE key IN ({in_list(keys)})", keys).fetchall())

    def _settled(self, receipts: Sequence[Receipt]) -> bool:
        """Law 7: reconcile has passed that place, or it is not a place of a node as the index knows it."""
        passed = self._passed
        for node, incarnation, position in receipts:
            row = passed.get(node)
            if row is None or row[0] != incarnation or position < row[1]:
                return True
        return False

    def _in_rows(self, key: bytes, commit: Commit, placement: int, due_at: float, arrivals: Arrivals) -> bool:
        """Adds the rows of a new key, live with a reference for each target; False if no target is left, and it is dead at
        once (law 13): the caller then has nothing more to do.
        """
        at, octets, sha256 = commit.received_at, commit.shown_octets, bytes.fromhex(commit.sha256)
        copies, boxes = arrivals.copies, self._boxes
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
                box = self._in_box(target.account, target.mailbox)
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
            self._in_enter_dead(key, octets, sha256, placement)
            return False
        if skipped:
            copies[first] = (*copies[first][:4], copies[first][4] - skipped, *copies[first][5:])
        return True

    def _in_enter_dead(self, key: bytes, octets: int, sha256: bytes, placement: int) -> None:
        """All its targets were purged: a row that is dead, with orders for its nodes (laws 8, 13)."""
        self._db.execute(
            "INSERT INTO messages VALUES (?, ?, ?, ?, 0, ?, (SELECT value FROM counters WHERE name = 'round'))",
            (key, octets, sha256, NO_NODES, int(Fate.DEAD)),
        )
        self._in_order([(node, key) for node in self._placements.nodes(placement)])

    # -- deciding against ----------------------------------------------------------------------------------------------

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate:
        return await self._write(self._in_abort, key, asked)

    def _in_abort(self, key: bytes, asked: Sequence[str]) -> Fate | Untouched[Fate]:
        db = self._db
        db.execute(
            "INSERT INTO messages VALUES (?, 0, ?, ?, 0, ?, (SELECT value FROM counters WHERE name = 'round'))"
            " ON CONFLICT (key) DO NOTHING",
            (key, b"", NO_NODES, int(Fate.ABORTED)),
        )
        fate = Fate(db.execute("SELECT fate FROM messages WHERE key = ?", (key,)).fetchone()[0])
        if fate is not Fate.ABORTED:
            return Untouched(fate)
        self._in_order([(node, key) for node in asked])  # law 5: nodes are told only after this was decided
        return fate
