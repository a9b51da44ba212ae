"""Owns what goes to the nodes, in memory: which checkpoint is due, what it must name, what it made durable (law 13)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import CheckpointPlan, Fate, QueuePlan
from powermail.index.memory.mailboxes import MailboxPart
from powermail.index.memory.state import Gone, MailboxRow
from powermail.index.memory.transaction import STARTS_BEHIND, Undo
from powermail.storage.contract import Rank


class CheckpointPart(MailboxPart):
    """`index.contract.Checkpoints` in memory."""

    async def checkpoint_due(self, now: float, limit: int) -> list[int]:
        due = sorted((row.due, row.id) for row in self.state.mailboxes.values() if row.due is not None and row.due <= now)
        return [mailbox for _, mailbox in due][:limit]

    async def checkpoint_plan(self, mailbox: int, whole: bool = False) -> CheckpointPlan | None:
        row = self.state.mailboxes.get(mailbox)
        if row is not None and self.state.starts - row.numbers.start >= STARTS_BEHIND and self.state.numbering:
            with contextlib.suppress(IndexTrouble):  # what has no room for the leap is written where it stands
                row = self.transact(lambda: self.number(mailbox, 0))  # before it must leap too far (law 11)
        if row is None:
            return None
        if row.base and row.written == row.numbers.modseq and not row.skipped:
            if row.due is not None:
                self.transact(lambda: self._not_due(mailbox))
            return None
        changes = self.changes_of(mailbox, row.base)
        arrived = [entry for entry in self.rows_of(mailbox) if entry.uid >= row.base_uid]
        tail_rows = len(arrived) + sum(len(change.uids) for change in changes)
        gone = not row.holders or any(node not in self.state.nodes for node in row.holders)
        outgrown = laws.wants_whole(row.base, row.messages, tail_rows, gone, row.skipped)
        if whole := whole or outgrown or row.trimmed > row.base:
            await self.merge(mailbox)
        return self._plan(self.mailbox(mailbox), whole)

    def _not_due(self, mailbox: int) -> None:
        self.state.mailboxes[mailbox] = self.mailbox(mailbox)._replace(due=None)

    def _plan(self, row: MailboxRow, whole: bool) -> CheckpointPlan:
        s = self.state
        since = 0 if whole else row.base
        gone = {key: each for (at, key), each in sorted(s.gone.items()) if at == row.id and each.modseq > since}
        dead = {key for key in gone if key not in s.keys or s.keys[key].fate is not Fate.LIVE}
        named = {key: None for key, each in gone.items() if key in dead or self._durable(each)}
        account = {each.id for each in s.mailboxes.values() if each.account == row.account}
        shown = {entry.key for (at, _), entry in s.entries.items() if at in account}
        return CheckpointPlan(
            mailbox=row.facts(),
            whole=whole,
            base=row.numbers.modseq if whole else row.base,
            side=1 - (row.whole_side if whole else row.tail_side),
            nodes=row.holders,
            gone=tuple(named),
            skipped=len(named) < len(gone),
            left=tuple(key for key in named if key in dead or key not in shown),
            first=tuple(sorted({each.to for key, each in gone.items() if key not in named})),
            epoch=row.numbers.epoch,
            base_uid=row.numbers.uid_next if whole else row.base_uid,
            planned_in=s.epoch,
        )

    def _durable(self, gone: Gone) -> bool:
        """A moved key is named as expunged only once the destination's checkpoint is durable (law 13)."""
        to = self.state.mailboxes.get(gone.to)
        return to is None or to.written >= gone.to_modseq

    async def checkpoint_done(
        self, plan: CheckpointPlan, nodes: Sequence[str], now: float, incarnations: Mapping[str, str] | None = None
    ) -> None:
        def done() -> None:
            row = self.state.mailboxes.get(plan.mailbox.id)
            if row is None or row.numbers.uidvalidity != plan.mailbox.uidvalidity or plan.planned_in != self.state.epoch:
                return
            if not plan.whole and row.base != plan.base:  # law 13: its whole one was lost, or replaced, meanwhile
                return
            at, numbers = plan.mailbox, row.numbers
            if row.written > at.modseq:
                return  # law 13: another keeper was quicker
            sooner = now if row.due is None else min(row.due, now)
            if not self._stay(nodes, incarnations or {}):  # law 13: a holder went, or its disk did, while it was written
                self.state.mailboxes[row.id] = row._replace(due=sooner)
                return
            if plan.side == (row.whole_side if plan.whole else row.tail_side):  # with the same: both may lie there in pieces
                self.state.mailboxes[row.id] = row._replace(skipped=True, due=sooner)
                return
            numbers = numbers._replace(  # law 11: JUMP numbers more
                base_uid=max(numbers.base_uid, at.uid_next), base_modseq=max(numbers.base_modseq, at.modseq)
            )
            behind = numbers.modseq > at.modseq or plan.skipped
            row = row._replace(
                numbers=numbers,
                written=at.modseq,
                skipped=plan.skipped,
                due=now + limits.CHECKPOINT_INTERVAL_S if behind else None,
            )
            if plan.whole:
                row = row._replace(base=plan.base, base_uid=plan.base_uid, whole_side=plan.side, holders=tuple(sorted(nodes)))
            else:
                row = row._replace(tail_side=plan.side, holders=tuple(sorted({*row.holders, *nodes})))
            self.state.mailboxes[row.id] = row

        self.transact(done)

    def _stay(self, nodes: Sequence[str], incarnations: Mapping[str, str]) -> bool:
        members = [self.state.nodes.get(node) for node in nodes]
        return all(row is not None and incarnations.get(row.id, row.incarnation) == row.incarnation for row in members)

    async def checkpoints_lost(self, node: str) -> int:
        return self.transact(lambda: self.lose_checkpoints(node))

    async def thin_checkpoints(self) -> int:
        return sum(row.due == laws.LOST_DUE for row in self.state.mailboxes.values())

    async def queue_plan(self, limit: int) -> QueuePlan:
        def planning() -> QueuePlan:
            s = self.state
            s.queue_planned += 1
            watermarks = {
                name: (row.incarnation, min([row.watermark, *(note.position for at, note in s.unread if at == name)]))
                for name, row in sorted(s.nodes.items())
            }
            rank = Rank(s.epoch, 0, s.queue_planned)
            return QueuePlan(rank, 1 - s.queue_done[1], watermarks, self._queue_open(0, limit))

        return self.transact(planning)

    async def queue_open(self, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        return self._queue_open(after, limit)

    def _queue_open(self, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        rows = [(number, row.key, row.destination) for number, row in sorted(self.state.queue.items()) if number > after]
        return rows[:limit]

    async def queue_done(self, plan: QueuePlan) -> None:
        def done() -> None:
            s = self.state
            if plan.rank.epoch != s.epoch:
                raise Undo(None)
            s.queue_done = max(s.queue_done, (plan.rank.modseq, plan.side))

        self.transact(done)
