"""Owns what goes to the nodes: which checkpoint is due, what it must name, what it made durable (law 13).

Due mailboxes are found by an index on the time, whatever their number; a mailbox enters it at its first change behind a
checkpoint and leaves it with the next one, so deliveries to a mailbox that is due already do not touch it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import CheckpointPlan, MailboxFacts, QueuePlan
from powermail.index.sql.core import STARTS_BEHIND
from powermail.index.sql.engine import Reading, Transaction, Untouched, split
from powermail.index.sql.mailboxes import MailboxPart
from powermail.index.sql.nodes import NodePart
from powermail.index.sql.numbers import MAILBOX, trimmed
from powermail.index.view import unpack_uids
from powermail.storage.contract import Position, Rank

_LOST_ROWS = 5000  # mailboxes that lose their checkpoint in one transaction
_STATE = (
    "checkpoint_modseq, whole_modseq, whole_uid, whole_side, tail_side, skipped, epoch, start, due_at,"
    " (SELECT value FROM counters WHERE name = 'epoch'), (SELECT value FROM counters WHERE name = 'starts'),"
    " (SELECT value FROM counters WHERE name = 'waiting'), (SELECT nodes FROM holders h WHERE h.id = m.holders)"
)


class _State(NamedTuple):
    """Where the checkpoints of a mailbox stand."""

    modseq: int
    base: int
    base_uid: int
    whole_side: int
    tail_side: int
    skipped: bool
    epoch: int
    start: int
    due_at: float
    planned_in: int  # the index's epoch, in the same snapshot
    starts: int
    waiting: int
    nodes: tuple[str, ...]


class CheckpointPart(MailboxPart, NodePart):
    """`index.contract.Checkpoints`."""

    async def checkpoint_due(self, now: float, limit: int) -> list[int]:
        return await self._ask(self._checkpoint_due, now, limit)

    async def _checkpoint_due(self, db: Reading, now: float, limit: int) -> list[int]:
        rows = await db.rows(
            "SELECT id FROM mailboxes WHERE due_at > 0 AND due_at <= ? ORDER BY due_at, id LIMIT ?", (now, limit)
        )
        return [row[0] for row in rows]

    async def checkpoint_plan(self, mailbox: int, whole: bool = False) -> CheckpointPlan | None:
        found = await self._read(self._checkpoint_state, mailbox)
        if found is None:
            return None
        facts, state = found
        if state.starts - state.start >= STARTS_BEHIND and not state.waiting:
            with contextlib.suppress(IndexTrouble):  # what has no room for the leap is written where it stands
                await self._write(self._in_leap, mailbox)  # before it must leap too far (law 11)
            found = await self._read(self._checkpoint_state, mailbox)
            if found is None:
                return None
            facts, state = found
        if state.base and state.modseq == facts.modseq and not state.skipped:
            if state.due_at:
                await self._write(self._in_not_due, mailbox, facts.modseq)
            return None
        whole = whole or await self._read(self._wants_whole, facts, state)
        if whole:
            await self.merge(mailbox)
        return await self._read(self._plan, mailbox, whole)

    async def _in_leap(self, db: Transaction, mailbox: int) -> None:
        await self._in_renumber(db, mailbox, 0)

    async def _in_not_due(self, db: Transaction, mailbox: int, modseq: int) -> None:
        await db.change(
            "UPDATE mailboxes SET due_at = 0 WHERE id = ? AND modseq = ? AND checkpoint_modseq = ?", (mailbox, modseq, modseq)
        )
        db.boxes.clear()

    async def _checkpoint_state(self, db: Reading, mailbox: int) -> tuple[MailboxFacts, _State] | None:
        row = await db.one(f"SELECT {MAILBOX}, {_STATE} FROM mailboxes m WHERE id = ?", (mailbox,))
        if row is None:
            return None
        *values, nodes = row[8:]
        return MailboxFacts(*row[:8]), _State._make([*values, split(nodes or "")])

    async def _wants_whole(self, db: Reading, facts: MailboxFacts, state: _State) -> bool:
        if await trimmed(db, facts.id) > state.base:
            return True
        rows: int = (await db.one("SELECT count(*) FROM entries WHERE mailbox = ? AND uid >= ?", (facts.id, state.base_uid)))[0]
        for (uids,) in await db.rows("SELECT uids FROM changes WHERE mailbox = ? AND modseq > ?", (facts.id, state.base)):
            rows += len(unpack_uids(uids))
        members = {row[0] for row in await db.rows("SELECT id FROM nodes")}
        gone = not state.nodes or not members.issuperset(state.nodes)
        return laws.wants_whole(state.base, facts.messages, rows, gone, state.skipped)

    async def _plan(self, db: Reading, mailbox: int, whole: bool) -> CheckpointPlan | None:
        found = await self._checkpoint_state(db, mailbox)
        if found is None:
            return None
        facts, state = found
        rows = await db.rows(
            "SELECT g.key, g.to_mailbox, coalesce(m.checkpoint_modseq >= g.to_modseq, true), coalesce(k.fate = 1, false)"
            " FROM gone g LEFT JOIN mailboxes m ON m.id = g.to_mailbox LEFT JOIN messages k ON k.key = g.key"
            " WHERE g.mailbox = ? AND g.modseq > ? ORDER BY g.key",
            (mailbox, 0 if whole else state.base),
        )
        # A moved key is named as expunged only once the destination's checkpoint is durable; a dead one in any case.
        named = [key for key, _, durable, lives in rows if durable or not lives]
        first = sorted({to for _, to, durable, lives in rows if lives and not durable})
        dead = {key for key, _, _, lives in rows if not lives}
        left = dead.union(await self._left(db, facts.account, [key for key in named if key not in dead]))
        return CheckpointPlan(
            mailbox=facts,
            whole=whole,
            base=facts.modseq if whole else state.base,
            side=1 - (state.whole_side if whole else state.tail_side),
            nodes=state.nodes,
            gone=tuple(named),
            skipped=bool(first),
            left=tuple(key for key in named if key in left),
            first=tuple(first),
            epoch=state.epoch,
            base_uid=facts.uid_next if whole else state.base_uid,
            planned_in=state.planned_in,
        )

    async def _left(self, db: Reading, account: str, keys: Sequence[bytes]) -> list[bytes]:
        """Those that no mailbox of the account shows any more; looked for only where keys are gone and live elsewhere."""
        shown = {
            row[0]
            for row in await db.rows_in(
                "SELECT e.key FROM mailboxes m JOIN entries e ON e.mailbox = m.id WHERE m.account = ? AND e.key IN",
                keys,
                "",
                (account,),
            )
        }
        return [key for key in keys if key not in shown]

    async def checkpoint_done(
        self, plan: CheckpointPlan, nodes: Sequence[str], now: float, incarnations: Mapping[str, str] | None = None
    ) -> None:
        await self._write(self._in_checkpoint_done, plan, nodes, now, incarnations or {})

    async def _in_checkpoint_done(
        self, db: Transaction, plan: CheckpointPlan, nodes: Sequence[str], now: float, incarnations: Mapping[str, str]
    ) -> Untouched[None] | None:
        """The mailbox may get JUMP numbers more (law 11). What was planned in an older epoch shows what may have been lost.
        What is older than one that is durable counts for nothing, or the next one would be written over the newest there is.
        """
        at = plan.mailbox
        members = [await db.member(node) for node in sorted(set(nodes))]  # locked: whoever ends one sees what is noted here
        stay = all(row is not None and incarnations.get(row.id, row.incarnation) == row.incarnation for row in members)
        self._check_found()
        if plan.planned_in != await db.counter("epoch"):
            return Untouched(None)
        row = await db.one(
            "SELECT modseq, coalesce((SELECT nodes FROM holders h WHERE h.id = m.holders), ''), whole_modseq, whole_side,"
            " tail_side, checkpoint_modseq FROM mailboxes m WHERE id = ? AND uidvalidity = ? FOR UPDATE",
            (at.id, at.uidvalidity),
        )
        if row is None or (not plan.whole and row[2] != plan.base):  # law 13: its whole one was lost, or replaced, meanwhile
            return Untouched(None)
        if row[5] > at.modseq:
            return Untouched(None)
        if not stay:  # law 13: a holder went, or its disk did, while it was written
            await self._in_due_by(db, at.id, now)
            db.boxes.pop((at.account, at.name), None)
            return None
        if plan.side == (row[3] if plan.whole else row[4]):
            # Another keeper was quicker with the same: the records of both may lie there in pieces. A whole one on the other
            # side is due at once, and the one before it counts until then.
            await db.change("UPDATE mailboxes SET skipped = 1 WHERE id = ?", (at.id,))
            await self._in_due_by(db, at.id, now)
            db.boxes.pop((at.account, at.name), None)
            return None
        behind = row[0] > at.modseq or plan.skipped
        holders = await self._in_holders(db, nodes if plan.whole else {*split(row[1]), *nodes})
        where = "whole_modseq = ?, whole_uid = ?, whole_side = ?" if plan.whole else "tail_side = ?"
        values = (plan.base, plan.base_uid, plan.side) if plan.whole else (plan.side,)
        await db.change(
            f"UPDATE mailboxes SET {where}, holders = ?, checkpoint_modseq = ?, skipped = ?,"
            " base_uid = greatest(base_uid, ?), base_modseq = greatest(base_modseq, ?), due_at = ? WHERE id = ?",
            (
                *values, holders, at.modseq, int(plan.skipped), at.uid_next, at.modseq,
                now + limits.CHECKPOINT_INTERVAL_S if behind else 0, at.id,
            ),
        )  # fmt: skip
        db.boxes.pop((at.account, at.name), None)
        return None

    async def _in_holders(self, db: Transaction, nodes: Sequence[str] | set[str]) -> int:
        """The number of a set of nodes that hold a checkpoint."""
        row = await db.one(
            "INSERT INTO holders (id, nodes) VALUES (?, ?) ON CONFLICT (nodes) DO UPDATE SET nodes = excluded.nodes"
            " RETURNING id",
            (db.new_id("holders"), " ".join(sorted(nodes))),
        )
        return int(row[0])

    async def checkpoints_lost(self, node: str) -> int:
        lost = 0
        while part := await self._write(self._in_lose_some, node):
            lost += part
        return lost

    async def _in_lose_some(self, db: Transaction, node: str) -> int | Untouched[int]:
        """A bounded part of the mailboxes whose checkpoint lay there."""
        held = [number for number, nodes in await db.rows("SELECT id, nodes FROM holders") if number and node in split(nodes)]
        locked = await db.rows_in(
            "SELECT id FROM mailboxes WHERE holders IN", held, "ORDER BY id LIMIT ? FOR UPDATE", (), (_LOST_ROWS,)
        )
        lost = "UPDATE mailboxes SET holders = 0, whole_modseq = 0, checkpoint_modseq = 0, due_at = ? WHERE id IN"
        await db.change_in(lost, [row[0] for row in locked], (laws.LOST_DUE,))
        db.boxes.clear()
        return len(locked) or Untouched(0)

    async def thin_checkpoints(self) -> int:
        return await self._ask(self._thin_checkpoints)

    async def _thin_checkpoints(self, db: Reading) -> int:
        rows = await db.rows("SELECT count(*) FROM mailboxes WHERE due_at > 0 AND due_at <= ?", (laws.LOST_DUE,))
        return int(rows[0][0])

    async def admit_node(
        self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position,
        instead_of: str | None = None,
    ) -> bool:  # fmt: skip
        """A disk that takes another's place has not what lay there."""
        rows = {row.id: row for row in await self.node_rows()}
        if node not in rows:
            await self.clear_left(node)  # of one that was expelled by who came to no end with it
        before = rows[node].incarnation if node in rows else ""
        if instead_of is not None and instead_of != before:
            return False
        another = before not in ("", incarnation)
        if another and incarnation not in self.mark().retired:
            await self.checkpoints_lost(node)
        return await super().admit_node(node, group, incarnation, boot, watermark, end, instead_of)

    async def expel(self, node: str, version: int | None = None) -> bool:
        """A whole checkpoint is due of what had one there: its holders are not what they were."""
        await self.checkpoints_lost(node)
        if not await super().expel(node, version):
            return False
        await self.clear_left(node)
        return True

    async def queue_plan(self, limit: int) -> QueuePlan:
        return await self._write(self._in_queue_plan, limit)

    async def _in_queue_plan(self, db: Transaction, limit: int) -> QueuePlan:
        """The number first, whose row stays locked: who has a higher one reads later. Then how far logs are settled, and last
        what waits, so that whatever lies behind is named or done.
        """
        row = await db.one(
            "INSERT INTO counters VALUES ('queue_planned', 1)"
            " ON CONFLICT (name) DO UPDATE SET value = counters.value + 1 RETURNING value"
        )
        number: int = row[0]
        said = dict(await db.rows("SELECT name, value FROM counters WHERE name IN ('epoch', 'queue_done')"))
        watermarks = {
            node: (incarnation, Position(segment, place))
            for node, incarnation, segment, place in await db.rows(
                "SELECT id, incarnation, segment, place FROM nodes ORDER BY id"
            )
        }
        for node, segment, place in await db.rows("SELECT node, segment, place FROM unread"):  # law 6: not settled yet
            if node in watermarks:
                incarnation, watermark = watermarks[node]
                watermarks[node] = incarnation, min(watermark, Position(segment, place))
        rows = await self._queue_open(db, 0, limit)
        return QueuePlan(Rank(said["epoch"], 0, number), 1 - said.get("queue_done", 0) % 2, watermarks, rows)

    async def queue_open(self, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        return await self._read(self._queue_open, after, limit)

    async def _queue_open(self, db: Reading, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        rows = await db.rows("SELECT id, key, destination FROM queue WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [(number, key, destination) for number, key, destination in rows]

    async def queue_done(self, plan: QueuePlan) -> None:
        await self._write(self._in_queue_done, plan)

    async def _in_queue_done(self, db: Transaction, plan: QueuePlan) -> Untouched[None] | None:
        """One counter tells the number, twice, and the side: nothing of a later one is taken back."""
        row = await db.one("SELECT value FROM counters WHERE name = 'epoch'")
        if row[0] != plan.rank.epoch:  # law 11: numbers may be given anew since
            return Untouched(None)
        await db.change(
            "INSERT INTO counters VALUES ('queue_done', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = greatest(counters.value, excluded.value)",
            (2 * plan.rank.modseq + plan.side,),
        )
        return None
