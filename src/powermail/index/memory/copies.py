"""Owns fates and copies, in memory: delivery and abort, reconcile, beliefs, orders, nodes, forgetting (laws 3-9, 12)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

from powermail.base.errors import IndexTrouble, OperatorError
from powermail.index import laws
from powermail.index.contract import (
    Batch,
    Damage,
    Delivery,
    DropOrder,
    Fate,
    MessageFacts,
    NodeRow,
    Outcome,
    Reconciled,
)
from powermail.index.laws import Deed
from powermail.index.memory.transaction import Transactions, Undo
from powermail.index.sharing import hand_on_row
from powermail.mail.envelope import Commit
from powermail.storage.contract import Dropped, End, Held, Position, Receipt, Unread
from powermail.storage.layout import LayoutChange, Standing, changed_layout, in_epoch


class CopyPart(Transactions):
    """`index.contract.Copies` in memory."""

    # -- deciding ---------------------------------------------------------------------------------------------------------

    def expect(self, count: int) -> None:
        """Nothing waits here."""

    def deliver(self, delivery: Delivery) -> asyncio.Future[Outcome]:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(self.transact(lambda: self._deliver(delivery)))
        except IndexTrouble as error:
            future.set_exception(error)
        return future

    def _deliver(self, delivery: Delivery) -> Outcome:
        row = self.state.keys.get(delivery.key)
        if row is not None:  # law 3: who inserts first decides
            raise Undo(Outcome.ABORTED if row.fate is Fate.ABORTED else Outcome.KNOWN)
        self._may_number()
        if any(self._settled(receipt) for receipt in delivery.receipts):
            raise Undo(Outcome.SETTLED)  # law 7: it was decided, and forgotten, before
        fate = self.enter(delivery.key, delivery.commit, [receipt.node for receipt in delivery.receipts])
        return Outcome.ENTERED if fate is Fate.LIVE else Outcome.KNOWN

    def _settled(self, receipt: Receipt) -> bool:
        """Law 7: reconcile has passed that place, or it is not a place of the node as the index knows it."""
        node = self.state.nodes.get(receipt.node)
        return node is None or node.incarnation != receipt.incarnation or receipt.position < node.watermark

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate:
        def aborting() -> Fate:
            row = self.state.keys.get(key)
            if row is not None and row.fate is not Fate.ABORTED:
                raise Undo(row.fate)
            if row is None:
                self.decide(key, Fate.ABORTED)  # law 3
            for node in asked:
                self.order(node, key)  # law 5: nodes are told only after this was decided
            return Fate.ABORTED

        return self.transact(aborting)

    async def message(self, key: bytes) -> MessageFacts | None:
        found = await self.messages([key])
        return found[0] if found else None

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        return [self._facts(key) for key in sorted(set(keys)) if self._fate(key) is Fate.LIVE]

    def _facts(self, key: bytes) -> MessageFacts:
        row = self.state.keys[key]
        nodes = tuple(sorted(node for held, node in self.state.copies if held == key))
        return MessageFacts(key, row.octets, row.sha256, nodes, row.refs)

    def _fate(self, key: bytes) -> Fate | None:
        row = self.state.keys.get(key)
        return None if row is None else row.fate

    async def fates(self, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        return {key: fate for key in keys if (fate := self._fate(key)) is not None}

    # -- comparing with nodes -------------------------------------------------------------------------------------------

    async def reconcile(self, batch: Batch) -> Reconciled:
        return self.transact(lambda: self._reconcile(batch))

    def _reconcile(self, batch: Batch) -> Reconciled:
        """Law 6, whole: the batch, the watermark and the end seen are one transaction."""
        s = self.state
        node = s.nodes.get(batch.node)
        if node is None or node.incarnation != batch.incarnation or node.watermark != batch.from_:
            raise Undo(Reconciled(False))
        died = [key for key in batch.tombstones if self._fate(key) is Fate.LIVE]
        if died and not node.owes_walk:
            raise Undo(Reconciled(False, lost=True))  # law 11: it died, and the index has forgotten that
        deeds = [
            (key, position, laws.deed(self._fate(key), origin, position < batch.birth))
            for key, position, origin in batch.copies
        ]
        self._need({key for key, _, deed in deeds if deed is Deed.ENTER}, batch.commits)
        if batch.end < node.end_seen:
            self._refuse_late(node.id, [(key, deed) for key, _, deed in deeds])
        entered = 0
        for key, position, origin in batch.copies:
            entered += self._do(
                laws.deed(self._fate(key), origin, position < batch.birth), node.id, key, position, batch.commits
            )
        self._bury(died)  # that commits were lost is known, and this node's walk is still owed
        for read in batch.read:
            s.unread.pop((node.id, read), None)
        self.note_unread(node.id, batch.unread)
        s.nodes[node.id] = node._replace(
            watermark=batch.to,
            end_seen=max(node.end_seen, batch.end),
            scan_round=node.scan_round if batch.round is None else max(node.scan_round, batch.round),
        )
        return Reconciled(True, entered)

    @staticmethod
    def _need(keys: set[bytes], commits: Mapping[bytes, Commit]) -> None:
        """Ends the transaction if commit records are missing."""
        if missing := tuple(sorted(key for key in keys if key not in commits)):
            raise Undo(Reconciled(False, missing=missing))

    def _refuse_late(self, node: str, deeds: Sequence[tuple[bytes, Deed | None]]) -> None:
        """Ends a transaction whose news of a node is older than what was seen since, if it adds a belief (law 8)."""
        s = self.state
        for key, deed in deeds:
            if deed is Deed.ENTER or (deed is Deed.BELIEVE and (key, node) not in s.copies and (key, node) not in s.suspects):
                raise Undo(Reconciled(False))

    def _do(self, deed: Deed, node: str, key: bytes, position: Position, commits: Mapping[bytes, Commit]) -> int:
        if deed is Deed.ENTER:
            return int(self.enter(key, commits[key], [node]) is Fate.LIVE)
        if deed is Deed.BELIEVE:
            if (key, node) not in self.state.suspects:  # what failed its check counts no more until the keeper has looked
                self.state.copies[key, node] = None
        elif deed is Deed.BURY:
            self.order(node, key)
        else:
            self.drop(node, key, position)  # never a tombstone: that there is no row says nothing about the key (law 6)
        return 0

    async def settle_inventory(
        self, node: str, end: End, items: Sequence[tuple[bytes, Held, Position]], birth: Position,
        commits: Mapping[bytes, Commit], enter: bool,
    ) -> Reconciled:  # fmt: skip
        def settling() -> Reconciled:
            row = self.state.nodes.get(node)
            if row is None or row.incarnation != end.incarnation:
                raise Undo(Reconciled(False))
            died = [key for key, held, _ in items if held is Held.DEAD and self._fate(key) is Fate.LIVE]
            if died and not (enter or row.owes_walk or row.owes_compare):
                raise Undo(Reconciled(False, lost=True))
            deeds = [(key, position, self._deed(row, key, held, position, birth, enter)) for key, held, position in items]
            self._need({key for key, _, deed in deeds if deed is Deed.ENTER}, commits)
            if self._is_late(node, end):
                self._refuse_late(node, [(key, deed) for key, _, deed in deeds])
            entered = 0
            for key, held, position in items:
                found = self._deed(row, key, held, position, birth, enter)
                entered += 0 if found is None else self._do(found, node, key, position, commits)
            if enter:
                self._bury([key for key, held, _ in items if held is Held.DEAD])
            else:  # an owed walk decides; what the first release aborted says nothing about the key
                for key in died:
                    self.state.copies.pop((key, node), None)
            return Reconciled(True, entered)

        return self.transact(settling)

    def _deed(self, node: NodeRow, key: bytes, held: Held, position: Position, birth: Position, enter: bool) -> Deed | None:
        """What an item of an inventory comes to (laws 11, 12); None: nothing."""
        if held is not Held.LIVE:
            return None
        fate = self._fate(key)
        if fate is not None:
            return Deed.BELIEVE if fate is Fate.LIVE else Deed.BURY
        if any((node.id, key) == (at, named) for at, named, _ in self.state.drops):
            return None
        if enter:
            return Deed.DROP if position < birth else Deed.ENTER  # the walk enters whatever the origin
        if node.owes_walk:
            return None  # what has no row may have been lost with it
        return Deed.DROP if position < node.watermark else None  # what lies at or above it is reconcile's

    def _bury(self, keys: Sequence[bytes]) -> None:
        """Tombstones were found: those keys are dead, whatever the index has kept of them (law 11)."""
        s = self.state
        for key in keys:
            if key not in s.keys:
                self.decide(key, Fate.DEAD)
        live = {key for key in keys if s.keys[key].fate is Fate.LIVE}
        shown: dict[int, list[int]] = defaultdict(list)
        for (mailbox, uid), entry in sorted(s.entries.items()):
            if entry.key in live:
                shown[mailbox].append(uid)
        for mailbox, uids in shown.items():
            self.leave(mailbox, uids)
        for number in [number for number, row in s.queue.items() if row.key in live]:
            del s.leases[number]
            s.attempts.pop(number, None)
            self.dereference(s.queue.pop(number).key)

    # -- belief ---------------------------------------------------------------------------------------------------------

    async def under_copied(
        self, groups: Mapping[str, str], required: int, after: bytes, limit: int, least: int = 0
    ) -> list[MessageFacts]:
        return [facts for facts in self._under_copied(groups, required, least) if facts.key > after][:limit]

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        found = self._under_copied(groups, required, 0)
        return len(found), sum(facts.octets for facts in found)

    def _under_copied(self, groups: Mapping[str, str], required: int, least: int) -> list[MessageFacts]:
        live = [self._facts(key) for key, row in sorted(self.state.keys.items()) if row.fate is Fate.LIVE]
        return [facts for facts in live if least <= len({groups[node] for node in facts.nodes if node in groups}) < required]

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return sorted(key for key, holder in self.state.copies if holder == node and key > after)[:limit]

    def _is_late(self, node: str, end: End) -> bool:
        """What was found there is of another disk, or older than what the index has seen since (law 8)."""
        row = self.state.nodes[node]
        return row.incarnation != end.incarnation or end.position < row.end_seen

    def _see(self, node: str, end: End) -> None:
        """Law 12: what was confirmed lies before this end. Nothing is confirmed by another disk."""
        row = self.state.nodes.get(node)
        if row is None or row.incarnation != end.incarnation:
            raise Undo(None)
        self._set_node(node, end_seen=max(row.end_seen, end.position))

    async def believe(self, keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
        def believing() -> list[bytes]:
            fates = {key: fate for key in sorted(set(keys)) if (fate := self._fate(key)) is not None}
            if node not in self.state.nodes:
                raise Undo([])
            died = [key for key, fate in fates.items() if fate is not Fate.LIVE]
            for key in died:
                self.order(node, key)  # law 8
            live = [] if self._is_late(node, end) else [key for key in fates if key not in died]
            for key in live:
                self.state.copies[key, node] = None
                self.state.suspects.pop((key, node), None)
            if not live and not died:
                raise Undo(live)
            return live

        return self.transact(believing)

    async def let_go(self, key: bytes, copy: Receipt, end: Position, groups: Mapping[str, str], required: int) -> bool:
        def letting_go() -> bool:
            s = self.state
            if self._fate(key) is not Fate.LIVE or copy.node not in s.nodes:
                raise Undo(False)
            if self._is_late(copy.node, End(copy.incarnation, end)):
                raise Undo(False)
            others = {groups[node] for held, node in s.copies if held == key and node != copy.node and node in groups}
            if (key, copy.node) not in s.copies or len(others) < required:
                raise Undo(False)
            del s.copies[key, copy.node]
            self.drop(copy.node, key, copy.position)
            return True

        return self.transact(letting_go)

    async def disbelieve(self, node: str, keys: Sequence[bytes], end: End) -> bool:
        def disbelieving() -> bool:
            row = self.state.nodes.get(node)
            if row is None or row.incarnation != end.incarnation:
                raise Undo(False)
            believed = [key for key in keys if (key, node) in self.state.copies]
            if believed and self._is_late(node, end):
                raise Undo(False)
            for key in dict.fromkeys(believed):
                del self.state.copies[key, node]
            return True

        return self.transact(disbelieving)

    async def note_bad(self, key: bytes, node: str, why: str) -> None:
        def noting() -> None:
            if self._fate(key) is Fate.LIVE and node in self.state.nodes:
                self.state.copies.pop((key, node), None)
                if (key, node) not in self.state.suspects:
                    count = self.state.damages[node].copies if node in self.state.damages else 0
                    self.state.damages[node] = Damage(count + 1, self._world.clock.now())
                self.state.suspects[key, node] = why

        self.transact(noting)

    async def damages(self) -> dict[str, Damage]:
        return dict(self.state.damages)

    async def forget_damages(self, node: str) -> None:
        self.transact(lambda: self.state.damages.pop(node, None))

    async def suspects(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return sorted(key for key, holder in self.state.suspects if holder == node and key > after)[:limit]

    async def clear_suspect(self, key: bytes, node: str, end: End) -> None:
        def clearing() -> None:
            if node not in self.state.nodes or self._is_late(node, end):
                raise Undo(None)
            self.state.suspects.pop((key, node), None)

        self.transact(clearing)

    # -- orders ---------------------------------------------------------------------------------------------------------

    async def orders(self, node: str, limit: int) -> list[bytes]:
        return sorted(key for at, key in self.state.orders if at == node)[:limit]

    async def confirm_orders(self, node: str, keys: Sequence[bytes], end: End) -> None:
        def confirming() -> None:
            self._see(node, end)
            for key in keys:
                self.state.orders.pop((node, key), None)

        self.transact(confirming)

    async def drops(self, node: str, limit: int) -> list[DropOrder]:
        return [DropOrder(key, position) for at, key, position in sorted(self.state.drops) if at == node][:limit]

    async def confirm_drops(self, node: str, drops: Sequence[DropOrder], done: Dropped) -> None:
        def confirming() -> None:
            s = self.state
            late = node in s.nodes and self._is_late(node, done.end)
            self._see(node, done.end)
            for key, position in drops:
                if (node, key, position) in s.drops:
                    del s.drops[node, key, position]
                    if key not in done.live and (key, node) in s.copies:
                        if late:
                            raise Undo(None)  # law 8: another copy may have been made since
                        del s.copies[key, node]  # law 6: the belief goes too

        self.transact(confirming)

    async def orders_total(self, node: str) -> tuple[int, int]:
        s = self.state
        return sum(at == node for at, _ in s.orders), sum(at == node for at, _, _ in s.drops)

    # -- nodes ----------------------------------------------------------------------------------------------------------

    async def node_rows(self) -> list[NodeRow]:
        return [row for _, row in sorted(self.state.nodes.items())]

    async def admit_node(
        self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position,
        instead_of: str | None = None,
    ) -> bool:  # fmt: skip
        def admitting() -> bool:
            s = self.state
            if incarnation in s.retired:
                raise OperatorError(f"node {node}: this disk was expelled; it returns only emptied")  # law 9
            old = s.nodes.get(node)
            if instead_of is not None and instead_of != (old.incarnation if old is not None else ""):
                return False
            if old is not None and old.incarnation == incarnation:  # nothing new but the names
                s.nodes[node] = old._replace(group=group, boot=boot)
                return True
            owes_walk = s.catching_up or (old is not None and old.owes_walk)
            blocked = old is not None and old.blocked
            # law 9: the round begins anew; law 11: a walk that was owed is owed by whatever comes in its place
            s.nodes[node] = NodeRow(node, group, incarnation, watermark, end, boot, 0, owes_walk, blocked, 0.0)
            s.newcomers = {**s.newcomers, node: incarnation}
            if old is not None:
                s.retired = tuple(sorted({*s.retired, old.incarnation}))  # law 9: that disk never comes back as it is
                self._hand_on(node)
                self.lose_checkpoints(node)  # law 13: a disk that takes another's place has not what lay there
            # Nothing before a new incarnation's birth is ever entered: what could not be read there matters no more.
            s.unread = {at: None for at in s.unread if at[0] != node}
            return True

        return self.transact(admitting)

    def _hand_on(self, node: str) -> None:
        move = hand_on_row(node, self._world.clock.now())
        self.state.moves[move.name] = move

    def _set_node(self, node: str, **values: object) -> None:
        s = self.state
        if node in s.nodes:
            s.nodes[node] = NodeRow(**{**s.nodes[node]._asdict(), **values})

    async def note_boot(self, node: str, incarnation: str, boots: Sequence[str]) -> None:
        def noting() -> None:
            row = self.state.nodes.get(node)
            if row is None or row.incarnation != incarnation or (row.boot and row.boot not in boots):
                raise Undo(None)
            if row.boot or not self.state.catching_up:  # law 11
                self._set_node(node, boot=boots[-1])

        self.transact(noting)

    async def note_compared(self, node: str) -> None:
        self.transact(lambda: self._set_node(node, owes_compare=False))

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        values = {"blocked": blocked, "missing_since": missing_since}
        self.transact(lambda: self._set_node(node, **{name: value for name, value in values.items() if value is not None}))

    async def expel(self, node: str, version: int | None = None) -> bool:
        def expelling() -> bool:
            s = self.state
            layout = in_epoch(s.layout, s.epoch)
            if version is not None and version != layout.version:
                raise Undo(False)
            if s.layout.row(node) is not None:
                found = changed_layout(layout, [LayoutChange(node, state=Standing.EXPELLED)], layout.version)
                assert found is not None
                s.layout, s.layout_fence = found, found.version
            row = s.nodes.pop(node, None)
            s.newcomers = {other: new for other, new in s.newcomers.items() if other != node}
            if row is not None:
                s.retired = tuple(sorted({*s.retired, row.incarnation}))  # law 9: for ever
                self._hand_on(node)
            s.orders = {at: None for at in s.orders if at[0] != node}
            s.drops = {at: None for at in s.drops if at[0] != node}
            s.unread = {at: None for at in s.unread if at[0] != node}
            s.copies = {at: None for at in s.copies if at[1] != node}
            s.suspects = {at: why for at, why in s.suspects.items() if at[1] != node}
            s.damages.pop(node, None)
            self.lose_checkpoints(node)
            return True

        return self.transact(expelling)

    async def unread(self, node: str, limit: int) -> list[Unread]:
        return sorted(stretch for at, stretch in self.state.unread if at == node)[:limit]

    # -- forgetting -----------------------------------------------------------------------------------------------------

    async def raise_round(self) -> int:
        def raising() -> int:
            s = self.state
            # law 10: after a round completed since it stopped, marks leave a slot out; after one more, which told every node
            # so and compared it, it is pruned
            for number, slot in list(s.slots.items()):
                if slot.ended is not None and slot.ended < self._scanned():
                    s.slots[number] = slot._replace(left_out=True, ended=s.round)
                    if slot.left_out:
                        del s.slots[number]
            s.round += 1
            return s.round

        return self.transact(raising)

    async def dead_total(self) -> int:
        return sum(row.fate is not Fate.LIVE for row in self.state.keys.values())

    async def forget(self, limit: int) -> int:
        return self.transact(lambda: self._forget(limit))

    def _forget(self, limit: int) -> int:
        """Law 9, whole: scanned by every member since, nothing ordered, nothing owed, nothing unread."""
        s = self.state
        scanned = self._scanned()
        if any(row.owes_walk for row in s.nodes.values()) or s.unread:
            raise Undo(0)
        ordered = {key for _, key in s.orders}
        old = sorted((row.round, key) for key, row in s.keys.items() if row.fate is not Fate.LIVE and row.round < scanned)
        forgotten = [key for _, key in old if key not in ordered][:limit]
        for key in forgotten:
            del s.keys[key]
        if forgotten:  # what is forgotten has tombstones wherever it lay: no checkpoint names it any more (law 13)
            s.gone = {at: gone for at, gone in s.gone.items() if at[1] in s.keys}
        return len(forgotten)

    def _scanned(self) -> int:
        """The round for which every member was scanned whole; 0 without members."""
        return min((row.scan_round for row in self.state.nodes.values()), default=0)

    async def forgotten(self, keys: Sequence[bytes]) -> list[bytes]:
        return [key for key in keys if key not in self.state.keys]
