"""Owns lost commits, in memory: marks, epochs, walks (laws 10, 11); and totals and the audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import EpochFacts, Fate, Head
from powermail.index.memory.transaction import Transactions, Undo
from powermail.storage.contract import Mark, Position, Unread


class EpochPart(Transactions):
    """`index.contract.Epochs` in memory."""

    @property
    def catching_up(self) -> bool:
        """Readers wait: not every log was walked since commits were lost."""
        return self.state.catching_up

    @property
    def numbering(self) -> bool:
        """False while nothing may get a number."""
        return self.state.numbering

    @property
    def epoch(self) -> int:
        return self.state.epoch

    async def proof(self, connection: int) -> Mark:
        if connection != self.connection:
            raise IndexTrouble("what was read is of another connection to the index")
        return self.prove()

    def _slots(self) -> dict[int, tuple[str, int]]:
        """All that were not pruned."""
        return {number: (slot.tag, slot.commits) for number, slot in self.state.slots.items()}

    async def epoch_facts(self) -> EpochFacts:
        s = self.state
        return EpochFacts(s.epoch, s.numbering, s.catching_up, self._why_lost, dict(s.newcomers))

    async def lost(self, mark: Mark, begun: bool = True) -> str:
        s = self.state
        if self._why_lost:
            return self._why_lost
        why = laws.loss(mark, s.epoch, s.sequence, self._slots())
        why = why or laws.loss(self.mark(), s.epoch, s.sequence, self._slots(), "this process")
        return why or ("" if begun else laws.rival(mark, s.epoch, self._slots()))

    async def raise_epoch(self, marks: Sequence[Mark], why: str, found_in: int | None = None, asked: bool = False) -> int:
        def raising() -> int:
            s = self.state
            known = [self._committed(), self.mark(), *marks]
            if found_in is not None and found_in < s.epoch:
                if not any(laws.loss(mark, s.epoch, s.sequence, self._slots()) for mark in known):
                    raise Undo(0)
            s.epoch = max(mark.epoch for mark in known) + 1
            s.uidvalidity = max(mark.uidvalidity for mark in known) + limits.EPOCH_JUMP
            s.retired = tuple(sorted({incarnation for mark in known for incarnation in mark.retired}))
            # Slots are numbered on from the highest known: what nodes know of those that were lost proves nothing any more.
            s.sequence = max(mark.sequence for mark in known)
            s.slots = {}
            s.numbering, s.catching_up = False, True
            for row in s.nodes.values():
                new = s.newcomers.get(row.id) == row.incarnation  # its history does not go back to before the loss
                boot = "" if new else row.boot
                s.nodes[row.id] = row._replace(owes_walk=True, scan_round=0, boot=boot)  # its round begins anew (law 9)
            s.newcomers = {}
            return s.epoch

        lost, self._lost = self._lost, ("", 0)
        try:
            epoch = self.transact(raising, anew=True)
        except BaseException:
            self._lost = lost
            raise
        if not epoch:
            self._lost = lost
        return epoch

    async def know_newcomers(self, nodes: Mapping[str, str]) -> None:
        def knowing() -> None:
            s = self.state
            s.newcomers = {node: inc for node, inc in s.newcomers.items() if nodes.get(node) != inc}

        self.transact(knowing)

    async def learn_heads(self, heads: Sequence[Head]) -> None:
        def learning() -> None:
            s = self.state
            rows = {(row.account, row.name): row.id for row in s.mailboxes.values()}
            for head in heads:
                s.uidvalidity = max(s.uidvalidity, head.uidvalidity)
                if (mailbox := rows.get((head.account, head.name))) is not None:
                    row = s.mailboxes[mailbox]
                    numbers = laws.learned(row.numbers, head)
                    if numbers != row.numbers:
                        s.mailboxes[mailbox] = row._replace(numbers=numbers)
                        self._touch(mailbox)

        self.transact(learning)

    async def far_heads(self, limit: int) -> list[Head]:
        s, found = self.state, []
        for row in s.mailboxes.values():
            if (far := laws.reaches(row.numbers, s.epoch, s.starts)) is not None:
                found.append(Head(row.account, row.name, far.uidvalidity, far.uid_next, far.modseq, far.epoch))
        return found[:limit]

    def _still(self, epoch: int) -> None:
        """Ends a transaction that belongs to an epoch, if it is another one by now (law 11)."""
        if self.state.epoch != epoch:
            raise Undo(False)

    async def heads_written(self, heads: Sequence[Head], epoch: int) -> bool:
        def noting() -> bool:
            self._still(epoch)
            s = self.state
            rows = {(row.account, row.name): row.id for row in s.mailboxes.values()}
            for head in heads:
                row = s.mailboxes.get(rows.get((head.account, head.name), 0))
                if row is not None and row.numbers.uidvalidity == head.uidvalidity:
                    s.mailboxes[row.id] = row._replace(numbers=laws.written(row.numbers, head, s.starts))
                    self._touch(row.id)
            return True

        return self.transact(noting)

    async def begin_epoch(self, epoch: int) -> bool:
        def beginning() -> bool:
            self._still(epoch)
            self.state.numbering = True
            return True

        return self.transact(beginning)

    async def walked(
        self, node: str, incarnation: str, watermark: Position, end: Position, round: int, epoch: int,
        unread: Sequence[Unread] = (),
    ) -> bool:  # fmt: skip
        def walking() -> bool:
            row = self.state.nodes.get(node)
            if row is None or row.incarnation != incarnation:
                raise Undo(False)
            self._still(epoch)
            self.state.nodes[node] = row._replace(
                watermark=max(row.watermark, watermark),
                end_seen=max(row.end_seen, end),
                scan_round=max(row.scan_round, round),
                owes_walk=False,
            )
            self.note_unread(node, unread)
            return True

        return self.transact(walking)

    async def caught_up(self, epoch: int, connection: int | None = None) -> bool:
        looked_over = self.connection if connection is None else connection

        def catching() -> bool:
            if looked_over != self.connection:
                raise IndexTrouble("the walks that have ended were looked at over another connection to the index")
            self._still(epoch)
            if not self.state.numbering:
                raise IndexTrouble("the new epoch has not begun")
            self.state.catching_up = False
            return True

        done = self.transact(catching)
        if done:
            self.settled()  # walks find more than reconcile does
        return done

    async def rest(self) -> None:
        self.transact(lambda: None, stopping=True)  # law 10: a later transaction says again that it goes on

    # -- what status and tests ask ------------------------------------------------------------------------------------

    async def totals(self) -> dict[str, int]:
        """Sizes for status."""
        s = self.state
        return {
            "mailboxes": len(s.mailboxes),
            "entries": len(s.entries),
            "messages": sum(row.fate is Fate.LIVE for row in s.keys.values()),
            "queue": len(s.queue),
            "orders": len(s.orders),
            "drops": len(s.drops),
            "suspects": len(s.suspects),
        }

    async def audit(self) -> list[str]:
        """Recounts what can be recounted; what does not agree."""
        s, problems = self.state, []
        for row in s.mailboxes.values():
            entries, view = self.rows_of(row.id), self.view_of(row.id)
            if (row.messages, row.octets) != (len(entries), sum(entry.octets for entry in entries)):
                problems.append(
                    f"mailbox {row.id}: {row.messages} messages and {row.octets} octets are not what its entries say"
                )
            if [(entry.uid, entry.key) for entry in entries] != [(uid, key) for uid, key, *_ in view.rows()]:
                problems.append(f"mailbox {row.id}: its view does not show its entries")
            if any(each.uid >= row.numbers.uid_next or each.modseq > row.numbers.modseq for each in entries):
                problems.append(f"mailbox {row.id}: its numbers lie behind its entries")
        references = Counter([entry.key for entry in s.entries.values()] + [row.key for row in s.queue.values()])
        for key, decided in s.keys.items():
            refs = decided.refs
            if refs != references[key] or (decided.fate is Fate.LIVE) != (refs > 0):
                problems.append(f"message {key.hex()}: {refs} references, {references[key]} found, {decided.fate.name}")
        problems += [f"message {key.hex()}: shown, but not known" for key in references if key not in s.keys]
        for key, node in (*s.copies, *s.suspects):
            if key not in s.keys or s.keys[key].fate is not Fate.LIVE:
                problems.append(f"message {key.hex()}: not live, but believed or suspected on {node}")
        for node, key in s.orders:
            if key in s.keys and s.keys[key].fate is Fate.LIVE:
                problems.append(f"message {key.hex()}: live, but a tombstone is ordered on {node}")
        return problems
