"""Owns lost commits: the proof by marks, epochs, what is learned from checkpoints, walks, and rest (laws 10, 11).

Whoever calls, on whatever machine, may be late: what belongs to an epoch is done while the row that says which one it is stays
locked, and rows of mailboxes are locked before they are read, because another may be numbering already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index import laws
from powermail.index.contract import EpochFacts, Head
from powermail.index.sql.core import LEFT_OUT
from powermail.index.sql.engine import Again, Reading, Transaction, Untouched
from powermail.index.sql.references import References
from powermail.storage.contract import Mark, Position, Unread

_NUMBERS = "uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq"


class Found(NamedTuple):
    """What one look at the index found of it as a whole: the mark, slots that no mark tells of any more, and all counters."""

    mark: Mark
    left_out: dict[int, tuple[str, int]]
    counters: dict[str, int]

    def loss(self, mark: Mark, who: str = "a node") -> str:
        """Why a mark proves that commits were lost; "" if it does not (law 10)."""
        return laws.loss(mark, self.mark.epoch, self.mark.sequence, self.slots, who)

    @property
    def slots(self) -> dict[int, tuple[str, int]]:
        """All that were not pruned."""
        return {**self.left_out, **self.mark.slots}


async def find(db: Reading) -> Found:
    """All slots and all counters; in one snapshot, or in a transaction that changes them."""
    counters = dict(await db.rows("SELECT name, value FROM counters"))
    shown: dict[int, tuple[str, int]] = {}
    left_out: dict[int, tuple[str, int]] = {}
    for number, tag, count, stopped in await db.rows("SELECT id, tag, count, stopped FROM writers ORDER BY id"):
        (left_out if stopped == LEFT_OUT else shown)[number] = tag, count
    retired = tuple(row[0] for row in await db.rows("SELECT incarnation FROM retired ORDER BY incarnation"))
    mark = Mark(counters["sequence"], shown, counters["epoch"], counters["uidvalidity"], retired)
    return Found(mark, left_out, counters)


async def _stand(db: Reading) -> tuple[Found, dict[str, str]]:
    return await find(db), dict(await db.rows("SELECT node, incarnation FROM newcomers ORDER BY node"))


class EpochPart(References):
    """`index.contract.Epochs`."""

    def _note_found(self, found: Found) -> None:
        """What was read is known now; where nobody else writes, it was."""

    async def epoch_facts(self) -> EpochFacts:
        found, newcomers = await self._read(_stand)
        self._note_found(found)
        counters = found.counters
        begun, catching_up = not counters["waiting"], bool(counters["catching_up"])
        doubted = bool(self._why_lost) and self._doubted()
        return EpochFacts(counters["epoch"], begun, catching_up, self._why_lost, newcomers, doubted)

    async def lost(self, mark: Mark, begun: bool = True) -> str:
        known = self.mark()  # before the look: all of it must be there
        found = await self._read(find)
        if self._why_lost:
            return self._why_lost
        why = found.loss(mark) or found.loss(known, "this process")
        if not begun and not why:
            why = laws.rival(mark, found.mark.epoch, found.slots)
        self._note_found(found)
        return why

    async def proof(self, connection: int) -> Mark:
        """In one snapshot, behind those of all that was read before; law 10's counts of all slots. Writes nothing."""
        self._prove(connection)
        epoch, mine = self._mine()
        known = self.mark()
        found = await self._read(find)
        if found.mark.epoch != epoch:
            self._note_found(found)
        self._prove(connection)
        why = found.loss(known, "this process")
        for slot in mine:
            tag, count = found.mark.slots.get(slot.number, ("", 0) if self.alone else (slot.tag, slot.commits))
            if found.mark.epoch == epoch and (tag != slot.tag or count < slot.commits):
                why = f"writer slot {slot.number} is not where this process left it"
        if why:
            self._lose(why, found.mark.epoch)
            raise IndexLost(why)
        self._note_found(found)
        return found.mark

    def _prove(self, connection: int) -> None:
        """Raises IndexLost, or IndexTrouble if what was read over a connection proves nothing any more (law 10)."""
        if self._why_lost:
            raise IndexLost(self._why_lost)
        if connection != self.connection:
            raise IndexTrouble("what was read is of another connection to the index")

    async def raise_epoch(self, marks: Sequence[Mark], why: str, found_in: int | None = None, asked: bool = False) -> int:
        epoch = await self._write(self._in_raise_epoch, marks, why, found_in, asked)
        if epoch:
            self._why_lost = ""
        return epoch

    async def _in_raise_epoch(
        self, db: Transaction, marks: Sequence[Mark], why: str, found_in: int | None, asked: bool
    ) -> int | Untouched[int]:
        """Slots are numbered on from the highest that is known: what nodes know of those that were lost proves nothing more.
        What is raised is locked before it is read: others count on meanwhile.
        """
        members = await db.lock_nodes()
        await db.lock_counters("epoch", "sequence", "uidvalidity", "catching_up", "waiting")
        if await db.lock_nodes() != members:
            raise Again("a node was admitted meanwhile")
        found = await find(db)
        known = [found.mark, self.mark(), *marks]
        if found_in is not None and found_in < found.mark.epoch and not any(found.loss(mark) for mark in known):
            return Untouched(0)
        epoch = max(mark.epoch for mark in known) + 1
        uidvalidity = max(mark.uidvalidity for mark in known) + limits.EPOCH_JUMP
        await self._in_set(db, "epoch", epoch)
        await self._in_set(db, "uidvalidity", min(uidvalidity, limits.UID_MAX))
        await self._in_set(db, "sequence", max(mark.sequence for mark in known))
        walk = self._needs_walk(found, marks, asked)
        if walk:
            await self._in_set(db, "catching_up", 1)
        await self._in_set(db, "waiting", 1)
        for incarnation in sorted({each for mark in marks for each in mark.retired}):
            await db.change("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (incarnation,))
        if walk:
            await db.change("UPDATE nodes SET owes_walk = 1, scan_round = 0")
        await db.change(  # the history of these does not go back to before the loss
            "UPDATE nodes SET boot = '' WHERE EXISTS"
            " (SELECT 1 FROM newcomers c WHERE c.node = nodes.id AND c.incarnation = nodes.incarnation)"
        )
        await db.change("DELETE FROM newcomers")
        await self._in_epoch_raised(db)
        await db.change(
            "INSERT INTO meta VALUES ('epoch_why', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (why[:500],)
        )
        await db.lock_slots()
        await db.change("DELETE FROM writers")
        await db.new_slot()
        db.stale = True
        return epoch

    def _doubted(self) -> bool:
        """True if all that `_why_lost` says is that the database's own history is another: commits may be lost, or none."""
        return False

    def _needs_walk(self, found: Found, marks: Sequence[Mark], asked: bool) -> bool:
        """False if nothing but the database's own history says that commits were lost, and that only that they may be."""
        return True

    async def know_newcomers(self, nodes: Mapping[str, str]) -> None:
        await self._write(self._in_know_newcomers, sorted(nodes.items()))

    async def _in_know_newcomers(self, db: Transaction, nodes: Sequence[tuple[str, str]]) -> None:
        self._check_found()
        await db.lock_counters("epoch")  # who raises it empties the table
        await db.many("DELETE FROM newcomers WHERE node = ? AND incarnation = ?", nodes)

    async def _in_still(self, db: Transaction, epoch: int) -> bool:
        """True if it is still this epoch, and stays it until the transaction ends (law 11). Raises IndexLost: what was done of
        it may be lost, though nobody has raised the next one.
        """
        self._check_found()
        row = await db.one("SELECT value FROM counters WHERE name = 'epoch' FOR UPDATE")
        return bool(row[0] == epoch)

    async def learn_heads(self, heads: Sequence[Head]) -> None:
        await self._write(self._in_learn_heads, heads)

    async def _in_learn_heads(self, db: Transaction, heads: Sequence[Head]) -> None:
        for number, head in await self._in_locked(db, heads):
            row = await db.one(f"SELECT {_NUMBERS} FROM mailboxes WHERE id = ?", (number,))
            if row is None:
                continue
            numbers = laws.Numbers(*row)
            learned = laws.learned(numbers, head)
            if learned != numbers:
                await self._in_put_numbers(db, number, learned)
                await self._in_set_due(db, number, learned)
        highest = max((head.uidvalidity for head in heads), default=0)
        await db.change("UPDATE counters SET value = greatest(value, ?) WHERE name = 'uidvalidity'", (highest,))
        db.stale = True
        db.boxes.clear()

    async def _in_locked(self, db: Transaction, heads: Sequence[Head]) -> list[tuple[int, Head]]:
        """The mailboxes that these are of. Others may be numbering already: each row is locked before it is read."""
        meant: list[tuple[int, Head]] = []
        for head in heads:
            row = await db.one("SELECT id FROM mailboxes WHERE account = ? AND name = ?", (head.account, head.name))
            if row is not None:
                meant.append((row[0], head))
        await db.lock_mailboxes(*(number for number, _ in meant))
        return meant

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
        far = [(account, name, laws.reaches(laws.Numbers(*values), epoch, starts)) for account, name, *values in rows]
        return [Head(account, name, n.uidvalidity, n.uid_next, n.modseq, n.epoch) for account, name, n in far if n is not None]

    async def heads_written(self, heads: Sequence[Head], epoch: int) -> bool:
        return await self._write(self._in_heads_written, heads, epoch)

    async def _in_heads_written(self, db: Transaction, heads: Sequence[Head], epoch: int) -> bool | Untouched[bool]:
        starts = await db.counter("starts")
        for number, head in await self._in_locked(db, heads):
            row = await db.one(f"SELECT {_NUMBERS} FROM mailboxes WHERE id = ?", (number,))
            if row is not None and row[2] == head.uidvalidity:
                numbers = laws.written(laws.Numbers(*row), head, starts)
                await self._in_put_numbers(db, number, numbers)
                await self._in_set_due(db, number, numbers)
        db.boxes.clear()
        return True if await self._in_still(db, epoch) else Untouched(False)

    async def begin_epoch(self, epoch: int) -> bool:
        return await self._write(self._in_begin_epoch, epoch)

    async def _in_begin_epoch(self, db: Transaction, epoch: int) -> bool | Untouched[bool]:
        if not await self._in_still(db, epoch):
            return Untouched(False)
        await self._in_set(db, "waiting", 0)
        return True

    async def walked(
        self, node: str, incarnation: str, watermark: Position, end: Position, round: int, epoch: int,
        unread: Sequence[Unread] = (),
    ) -> bool:  # fmt: skip
        return await self._write(self._in_walked, node, incarnation, watermark, end, round, epoch, unread)

    async def _in_walked(
        self, db: Transaction, node: str, incarnation: str, watermark: Position, end: Position, round: int, epoch: int,
        unread: Sequence[Unread],
    ) -> bool | Untouched[bool]:  # fmt: skip
        row = await db.member(node)
        if row is None or row.incarnation != incarnation or not await self._in_still(db, epoch):
            return Untouched(False)  # a walk that began before commits were lost has seen what they brought
        await db.change(
            "UPDATE nodes SET segment = ?, place = ?, end_segment = ?, end_place = ?, scan_round = ?, owes_walk = 0"
            " WHERE id = ? AND incarnation = ?",
            (*max(row.watermark, watermark), *max(row.end_seen, end), max(row.scan_round, round), node, incarnation),
        )
        await self._in_note_unread(db, node, unread)  # with the watermark that passes over it (law 6)
        if not await db.one("SELECT 1 FROM nodes WHERE owes_walk = 1"):
            await self._in_find_by_key_no_more(db)
        db.stale = True
        return True

    async def caught_up(self, epoch: int, connection: int | None = None) -> bool:
        looked_over = self.connection if connection is None else connection
        done = await self._write(self._in_caught_up, epoch, looked_over)
        if done and looked_over == self.connection:
            self.settled()  # walks find more than reconcile does
        return done

    async def _in_caught_up(self, db: Transaction, epoch: int, connection: int) -> bool | Untouched[bool]:
        """What walks came to may be missing where another connection leads, their end too."""
        if connection != self.connection:
            raise IndexTrouble("the walks that have ended were looked at over another connection to the index")
        if not await self._in_still(db, epoch):
            return Untouched(False)
        if (await db.one("SELECT value FROM counters WHERE name = 'waiting'"))[0]:
            raise IndexTrouble("the new epoch has not begun")
        await self._in_set(db, "catching_up", 0)
        return True

    async def rest(self) -> None:
        await self._write(self._in_rest)

    async def _in_rest(self, db: Transaction) -> None:
        """The slot says that it stopped; a later transaction says again that it goes on (law 10)."""
        db.resting = True
