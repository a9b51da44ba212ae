"""Owns lost commits, on SQLite: the proof by marks, epochs, what is learned from checkpoints, walks, and rest (laws 10, 11)."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index import laws
from powermail.index.contract import Head
from powermail.index.sqlite.connection import Shared, Slot, Untouched
from powermail.index.sqlite.numbers import Numbering
from powermail.index.sqlite.schema import DROP_ENTRIES_BY_KEY, LEFT_OUT
from powermail.storage.contract import Mark, Position

_NUMBERS = "id, uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq"


class EpochPart(Numbering):
    """`index.contract.Epochs` on SQLite."""

    def lost(self, mark: Mark) -> str:
        mine = self.mark()
        return self._why_lost or laws.loss(mark, mine.epoch, mine.sequence, {**self._shared.left_out, **mine.slots})

    async def proof(self, connection: int) -> Mark:
        if connection != self.connection:
            raise IndexTrouble("what was read is of another connection to the index")
        return await self._read(self._proof, *self._published)

    def _proof(self, mine: Slot, shared: Shared) -> Mark:
        """In one snapshot, behind those of all that was read before; law 10's counts of all slots. Writes nothing."""
        db = self._reader
        counters = dict(db.execute("SELECT name, value FROM counters").fetchall())
        rows = db.execute("SELECT id, tag, count FROM writers WHERE stopped <> ? ORDER BY id", (LEFT_OUT,))
        slots = {number: (tag, count) for number, tag, count in rows}
        tag, count = slots.get(mine.number, ("", 0))
        if counters["epoch"] == shared.epoch and (tag != mine.tag or count < mine.commits):
            self._why_lost = f"writer slot {mine.number} is not where this process left it"
            raise IndexLost(self._why_lost)
        retired = tuple(row[0] for row in db.execute("SELECT incarnation FROM retired ORDER BY incarnation"))
        return Mark(counters["sequence"], slots, counters["epoch"], counters["uidvalidity"], retired)

    async def raise_epoch(self, marks: Sequence[Mark], why: str) -> int:
        epoch = await self._write(self._in_raise_epoch, marks, why)
        self._why_lost = ""
        return epoch

    def _in_raise_epoch(self, marks: Sequence[Mark], why: str) -> int:
        """Slots are numbered on from the highest that is known: what nodes know of those that were lost proves nothing more."""
        db = self._db
        known = [self.mark(), *marks]
        epoch = max(mark.epoch for mark in known) + 1
        uidvalidity = max(mark.uidvalidity for mark in known) + limits.EPOCH_JUMP
        self._in_set("epoch", epoch)
        self._in_set("uidvalidity", min(uidvalidity, limits.UID_MAX))
        self._in_set("sequence", max(mark.sequence for mark in known))
        self._in_set("catching_up", 1)
        self._in_set("waiting", 1)
        for incarnation in sorted({each for mark in marks for each in mark.retired}):
            db.execute("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (incarnation,))
        db.execute("UPDATE nodes SET owes_walk = 1, scan_round = 0")
        db.execute(
            "INSERT INTO meta VALUES ('epoch_why', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (why[:500],)
        )
        db.execute("DELETE FROM writers")
        self._in_new_slot()
        return epoch

    async def learn_heads(self, heads: Sequence[Head]) -> None:
        await self._write(self._in_learn_heads, heads)

    def _in_learn_heads(self, heads: Sequence[Head]) -> None:
        db = self._db
        highest = max((head.uidvalidity for head in heads), default=0)
        db.execute("UPDATE counters SET value = max(value, ?) WHERE name = 'uidvalidity'", (highest,))
        self._stale = True
        for head in heads:
            row = db.execute(
                f"SELECT {_NUMBERS} FROM mailboxes WHERE account = ? AND name = ?", (head.account, head.name)
            ).fetchone()
            if row is None:
                continue
            numbers = laws.Numbers(*row[1:])
            learned = laws.learned(numbers, head)
            if learned != numbers:
                self._in_put_numbers(row[0], learned)
                self._in_set_due(row[0], learned)
        self._boxes.clear()

    async def far_heads(self, limit: int) -> list[Head]:
        return await self._read(self._far_heads, limit)

    def _far_heads(self, limit: int) -> list[Head]:
        """One look at all mailboxes; a jump of epochs moves the bound too, so it is as it will be."""
        epoch, starts = self._shared.epoch, self._shared.starts
        rows = self._reader.execute(
            f"SELECT account, name, {_NUMBERS} FROM mailboxes WHERE"
            " max(uid_next - base_uid, modseq - base_modseq) + max(0, ? - start) * ? >= ? ORDER BY id LIMIT ?",
            (starts, limits.UNCLEAN_JUMP, limits.EPOCH_JUMP // 2, limit),
        )
        far = [(account, name, laws.reaches(laws.Numbers(*values), epoch, starts)) for account, name, _, *values in rows]
        return [Head(account, name, n.uidvalidity, n.uid_next, n.modseq, n.epoch) for account, name, n in far if n is not None]

    async def heads_written(self, heads: Sequence[Head]) -> None:
        await self._write(self._in_heads_written, heads)

    def _in_heads_written(self, heads: Sequence[Head]) -> None:
        for account, name, uidvalidity, uid_next, modseq, epoch in heads:
            row = self._db.execute(
                "SELECT id FROM mailboxes WHERE account = ? AND name = ? AND uidvalidity = ?", (account, name, uidvalidity)
            ).fetchone()
            if row is not None:
                numbers = laws.Numbers(uid_next, modseq, uidvalidity, epoch, self._shared.starts, uid_next, modseq)
                self._in_put_numbers(row[0], numbers)
                self._in_set_due(row[0], numbers)
        self._boxes.clear()

    async def begin_epoch(self) -> None:
        await self._write(self._in_set, "waiting", 0)

    async def walked(self, node: str, incarnation: str, watermark: Position, end: Position, round: int) -> bool:
        return await self._write(self._in_walked, node, incarnation, watermark, end, round)

    def _in_walked(self, node: str, incarnation: str, watermark: Position, end: Position, round: int) -> bool | Untouched[bool]:
        row = self._members.get(node)
        if row is None or row.incarnation != incarnation:
            return Untouched(False)
        self._db.execute(
            "UPDATE nodes SET segment = ?, place = ?, end_segment = ?, end_place = ?, scan_round = ?, owes_walk = 0"
            " WHERE id = ? AND incarnation = ?",
            (*max(row.watermark, watermark), *max(row.end_seen, end), max(row.scan_round, round), node, incarnation),
        )
        if not self._db.execute("SELECT 1 FROM nodes WHERE owes_walk = 1").fetchone():
            self._db.execute(DROP_ENTRIES_BY_KEY)  # only walks ask by key
        self._stale = True
        return True

    async def caught_up(self) -> None:
        if not self.numbering:
            raise IndexTrouble("the new epoch has not begun")
        await self._write(self._in_set, "catching_up", 0)
        self.settled()  # walks find more than reconcile does

    async def rest(self) -> None:
        await self._write(self._in_rest)

    def _in_rest(self) -> None:
        """The slot says that it stopped; a later transaction says again that it goes on (law 10)."""
        self._resting = True
