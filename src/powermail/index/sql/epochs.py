"""Owns lost commits: the proof by marks, epochs, what is learned from checkpoints, walks, and rest (laws 10, 11)."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index import laws
from powermail.index.contract import Head
from powermail.index.sql.core import LEFT_OUT
from powermail.index.sql.engine import Reading, Transaction, Untouched
from powermail.index.sql.references import References
from powermail.storage.contract import Mark, Position

_NUMBERS = "id, uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq"


async def read_mark(db: Reading) -> Mark:
    """All slots that marks tell of, and the epoch; in one snapshot."""
    counters = dict(await db.rows("SELECT name, value FROM counters"))
    rows = await db.rows("SELECT id, tag, count FROM writers WHERE stopped <> ? ORDER BY id", (LEFT_OUT,))
    slots = {number: (tag, count) for number, tag, count in rows}
    retired = tuple(row[0] for row in await db.rows("SELECT incarnation FROM retired ORDER BY incarnation"))
    return Mark(counters["sequence"], slots, counters["epoch"], counters["uidvalidity"], retired)


class EpochPart(References):
    """`index.contract.Epochs`."""

    def lost(self, mark: Mark) -> str:
        mine = self.mark()
        return self._why_lost or laws.loss(mark, mine.epoch, mine.sequence, {**self._left_out(), **mine.slots})

    async def proof(self, connection: int) -> Mark:
        """In one snapshot, behind those of all that was read before; law 10's counts of all slots. Writes nothing."""
        if connection != self.connection:
            raise IndexTrouble("what was read is of another connection to the index")
        epoch, mine = self._mine()
        mark = await self._read(read_mark)
        for slot in mine:
            tag, count = mark.slots.get(slot.number, ("", 0) if self.alone else (slot.tag, slot.commits))
            if mark.epoch == epoch and (tag != slot.tag or count < slot.commits):
                self._why_lost = f"writer slot {slot.number} is not where this process left it"
                raise IndexLost(self._why_lost)
        if connection != self.connection:
            raise IndexTrouble("the connection to the index broke meanwhile")
        return mark

    async def raise_epoch(self, marks: Sequence[Mark], why: str) -> int:
        epoch = await self._write(self._in_raise_epoch, marks, why)
        self._why_lost = ""
        return epoch

    async def _in_raise_epoch(self, db: Transaction, marks: Sequence[Mark], why: str) -> int:
        """Slots are numbered on from the highest that is known: what nodes know of those that were lost proves nothing more."""
        await db.rows("SELECT id FROM nodes ORDER BY id FOR UPDATE")
        known = [await read_mark(db), self.mark(), *marks]
        epoch = max(mark.epoch for mark in known) + 1
        uidvalidity = max(mark.uidvalidity for mark in known) + limits.EPOCH_JUMP
        await self._in_set(db, "epoch", epoch)
        await self._in_set(db, "uidvalidity", min(uidvalidity, limits.UID_MAX))
        await self._in_set(db, "sequence", max(mark.sequence for mark in known))
        walk = self._needs_walk(marks)
        if walk:
            await self._in_set(db, "catching_up", 1)
        await self._in_set(db, "waiting", 1)
        for incarnation in sorted({each for mark in marks for each in mark.retired}):
            await db.change("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (incarnation,))
        if walk:
            await db.change("UPDATE nodes SET owes_walk = 1, scan_round = 0")
        await self._in_epoch_raised(db)
        await db.change(
            "INSERT INTO meta VALUES ('epoch_why', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (why[:500],)
        )
        await db.change("DELETE FROM writers")
        await db.new_slot()
        return epoch

    async def learn_heads(self, heads: Sequence[Head]) -> None:
        await self._write(self._in_learn_heads, heads)

    async def _in_learn_heads(self, db: Transaction, heads: Sequence[Head]) -> None:
        highest = max((head.uidvalidity for head in heads), default=0)
        await db.change("UPDATE counters SET value = greatest(value, ?) WHERE name = 'uidvalidity'", (highest,))
        db.stale = True
        for head in heads:
            row = await db.one(f"SELECT {_NUMBERS} FROM mailboxes WHERE account = ? AND name = ?", (head.account, head.name))
            if row is None:
                continue
            numbers = laws.Numbers(*row[1:])
            learned = laws.learned(numbers, head)
            if learned != numbers:
                await self._in_put_numbers(db, row[0], learned)
                await self._in_set_due(db, row[0], learned)
        db.boxes.clear()

    async def far_heads(self, limit: int) -> list[Head]:
        return await self._read(self._far_heads, limit)

    async def _far_heads(self, db: Reading, limit: int) -> list[Head]:
        """One look at all mailboxes; a jump of epochs moves the bound too, so it is as it will be."""
        counters = dict(await db.rows("SELECT name, value FROM counters"))
        epoch, starts = counters["epoch"], counters["starts"]
        rows = await db.rows(
            f"SELECT account, name, {_NUMBERS} FROM mailboxes WHERE"
            " greatest(uid_next - base_uid, modseq - base_modseq) + greatest(0, ? - start) * ? >= ? ORDER BY id LIMIT ?",
            (starts, limits.UNCLEAN_JUMP, limits.EPOCH_JUMP // 2, limit),
        )
        far = [(account, name, laws.reaches(laws.Numbers(*values), epoch, starts)) for account, name, _, *values in rows]
        return [Head(account, name, n.uidvalidity, n.uid_next, n.modseq, n.epoch) for account, name, n in far if n is not None]

    async def heads_written(self, heads: Sequence[Head]) -> None:
        await self._write(self._in_heads_written, heads)

    async def _in_heads_written(self, db: Transaction, heads: Sequence[Head]) -> None:
        for account, name, uidvalidity, uid_next, modseq, epoch in heads:
            row = await db.one(
                "SELECT id FROM mailboxes WHERE account = ? AND name = ? AND uidvalidity = ?", (account, name, uidvalidity)
            )
            if row is not None:
                numbers = laws.Numbers(uid_next, modseq, uidvalidity, epoch, await db.counter("starts"), uid_next, modseq)
                await self._in_put_numbers(db, row[0], numbers)
                await self._in_set_due(db, row[0], numbers)
        db.boxes.clear()

    async def begin_epoch(self) -> None:
        await self._write(self._in_set, "waiting", 0)

    async def walked(self, node: str, incarnation: str, watermark: Position, end: Position, round: int) -> bool:
        return await self._write(self._in_walked, node, incarnation, watermark, end, round)

    async def _in_walked(
        self, db: Transaction, node: str, incarnation: str, watermark: Position, end: Position, round: int
    ) -> bool | Untouched[bool]:
        row = await db.member(node)
        if row is None or row.incarnation != incarnation:
            return Untouched(False)
        await db.change(
            "UPDATE nodes SET segment = ?, place = ?, end_segment = ?, end_place = ?, scan_round = ?, owes_walk = 0"
            " WHERE id = ? AND incarnation = ?",
            (*max(row.watermark, watermark), *max(row.end_seen, end), max(row.scan_round, round), node, incarnation),
        )
        if not await db.one("SELECT 1 FROM nodes WHERE owes_walk = 1"):
            await self._in_find_by_key_no_more(db)
        db.stale = True
        return True

    async def caught_up(self) -> None:
        if not self.numbering:
            raise IndexTrouble("the new epoch has not begun")
        await self._write(self._in_set, "catching_up", 0)
        self.settled()  # walks find more than reconcile does

    async def rest(self) -> None:
        await self._write(self._in_rest)

    async def _in_rest(self, db: Transaction) -> None:
        """The slot says that it stopped; a later transaction says again that it goes on (law 10)."""
        db.resting = True
