"""Owns admission: a node that was opened is compared with the index before it takes mail (laws 10, 12).

An ordinary reopening checks nothing. A new incarnation is taken in from the beginning of its log, and belief is checked against
it. An older state of a disk gets a new incarnation and a birth mark first: nothing before that mark is ever entered as mail.
When all before it was compared and nothing is ordered any more, the mark is lifted: an index restored later finds mail there.
Danger: an old disk that is believed brings back what was deleted (P8).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Fate, Index, NodeRow
from powermail.keeper.belief import compare_belief, end_of, is_good, is_proof, known_row
from powermail.keeper.epochs import EpochKeeper
from powermail.storage.contract import START, Held, Item, NodeFacts, Position, StorageNode

_REST_S = 10.0
_VERIFIED_AT_ONCE = 64


def is_older(row: NodeRow, facts: NodeFacts) -> bool:
    """True if a log of the same incarnation lacks the last opening that the index knows, or ended before what the index has
    seen of it when that opening was over (law 12). However far an older state has grown since, it forked off before.
    """
    end = facts.end
    if row.boot:
        if row.boot not in facts.boots:
            return True
        later = facts.boots.index(row.boot) + 1
        if later < len(facts.began):
            end = facts.began[later]
    return end < max(row.watermark, row.end_seen)


@dataclass
class _Past:
    """How far the comparison of one incarnation came in one epoch; a call that was interrupted goes on from here."""

    incarnation: str
    epoch: int
    belief_after: bytes = b""
    belief_done: bool = False
    missing: int = 0
    counted_after: bytes = b""
    counted: bool = False
    drops: int = 0
    settled_after: bytes = b""


class Admission:
    """Compares nodes with the index. The boot in a node's row is empty until all that this owes was done.

    `held`: drops that wait for the operator, by node; `confirmed`: nodes whose mass of drops the operator wants (P9).
    """

    def __init__(self, world: World, cluster: Cluster, index: Index, epochs: EpochKeeper) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._epochs = epochs
        self._past: dict[str, _Past] = {}
        self.held: dict[str, int] = {}
        self.confirmed: dict[str, None] = {}

    def confirm(self, node: str) -> int:
        """The operator wants the drops that are held back on a node; how many they are."""
        self.confirmed[node] = None
        return self.held.pop(node, 0)

    async def admit(self, node: StorageNode) -> None:
        """Compares a node that was opened; may be called again at any time, also for one that has taken mail meanwhile (P14).

        Raises IndexTrouble when nothing can be known now, OperatorError or NodeTrouble with the cure if it may take no part.
        """
        row = await self._row(node)  # before the disk is looked at: it takes the place of no later one
        facts = await node.facts()
        await self._epochs.compare(node, facts)  # law 10: marks first
        self._refuse_retired(node, facts)
        if row is None or row.incarnation != facts.incarnation:
            await self._take_in(node, facts, row)
        elif is_older(row, facts):
            self._world.log.event(Event.NODE_DAMAGE, node=node.id, error="an older state of this disk is back")
            self._world.counters.add("law.12.older")
            birth = await node.rebirth()  # durable before the index knows; a crash here is a new incarnation with a birth mark
            facts = await node.facts()
            assert facts.birth == birth
            await self._take_in(node, facts, row)
        row = await self._row(node)
        if row is None or row.incarnation != facts.incarnation:
            raise IndexTrouble(f"node {node.id} is being admitted elsewhere")
        if row.missing_since:
            await self._index.set_node_flags(node.id, None, 0.0)
        if not row.boot or facts.damaged:
            await self._check_belief(node, facts)
        if not row.boot and facts.birth > START and not self._index.catching_up:
            await self._count(node, facts)
        if row.boot or not (facts.birth > START or self._index.catching_up):
            await self._note_boot(node, facts)

    async def admit_known(self, node: StorageNode, may_take_in: Callable[[], Awaitable[bool]]) -> None:
        """The same where several processes look: an ordinary reopening is anybody's, but a disk that is new to the index, or an
        older state of one, is taken in by the one who `may_take_in`. Raises as `admit`; NodeTrouble to all others meanwhile.
        """
        facts = await node.facts()
        self._refuse_retired(node, facts)
        row = await self._row(node)
        ordinary = row is not None and row.incarnation == facts.incarnation and bool(row.boot) and not is_older(row, facts)
        if not ordinary and not await may_take_in():
            raise NodeTrouble(f"node {node.id} has a disk that is new or was put back: a keeper takes it in first")
        await self.admit(node)

    def _refuse_retired(self, node: StorageNode, facts: NodeFacts) -> None:
        if facts.incarnation in (*self._index.mark().retired, *facts.mark.retired):
            self._world.counters.add("law.12.retired")
            raise OperatorError(
                f"the disk of node {node.id} is one that was replaced or expelled before, and never comes back as it is: what "
                f"was deleted since would be there again. `powermail node salvage DIRECTORY` brings back what only it has; "
                f"then empty its directory and run `powermail node replace {node.id}`"
            )

    async def _row(self, node: StorageNode) -> NodeRow | None:
        return next((row for row in await self._index.node_rows() if row.id == node.id), None)

    async def _take_in(self, node: StorageNode, facts: NodeFacts, row: NodeRow | None) -> None:
        """Law 12: an incarnation that is new to the index, from its birth mark on; in the place of what it was seen beside."""
        before = row.incarnation if row is not None else ""
        if not await self._index.admit_node(node.id, node.group, facts.incarnation, "", facts.birth, facts.end, before):
            raise IndexTrouble(f"node {node.id} is being admitted elsewhere")
        self._past.pop(node.id, None)
        self._world.counters.add("law.12.incarnations")
        self._world.log.event(Event.NODE_STATE, node=node.id, state="admitted", incarnation=facts.incarnation)

    async def _note_boot(self, node: StorageNode, facts: NodeFacts) -> None:
        if facts.boots:
            await self._index.note_boot(node.id, facts.incarnation, facts.boots)
        self._past.pop(node.id, None)
        self.held.pop(node.id, None)
        self.confirmed.pop(node.id, None)

    def _progress(self, node: StorageNode, facts: NodeFacts) -> _Past:
        past, epoch = self._past.get(node.id), self._index.epoch
        if past is None or (past.incarnation, past.epoch) != (facts.incarnation, epoch):
            past = self._past[node.id] = _Past(facts.incarnation, epoch)
        return past

    async def _check_belief(self, node: StorageNode, facts: NodeFacts) -> None:
        """Law 12: of what is believed only that stays which the node says it has; repair makes the rest anew."""
        past = self._progress(node, facts)
        if facts.damaged:
            past.belief_after, past.belief_done = b"", False
        while not past.belief_done:
            keys = await self._index.copies_on(node.id, past.belief_after, limits.RECONCILE_BATCH)
            if not keys:
                past.belief_done = True
                break
            doubts = await compare_belief(self._index, node, keys)
            if doubts.lost and not self._index.catching_up:
                await self._epochs.raise_epoch(f"node {node.id} has a tombstone of a message that is listed")
            past.missing += doubts.missing
            past.belief_after = keys[-1]
        if past.missing:
            self._world.log.event(Event.NODE_DAMAGE, node=node.id, missing_copies=past.missing)
            past.missing = 0

    # -- what lies before the birth mark ------------------------------------------------------------------------------

    async def _count(self, node: StorageNode, facts: NodeFacts) -> None:
        """Raises NodeTrouble if more copies are to be dropped than may be without the operator's word (P9)."""
        past = self._progress(node, facts)
        while not past.counted:
            items = await node.inventory(past.counted_after, limits.RECONCILE_BATCH)
            if not items:
                past.counted = True
                break
            live = [item.key for item in _before(items, facts.birth)]
            fates = await self._index.fates(live)
            past.drops += len(live) - len(fates)
            past.counted_after = items[-1].key
        if past.drops > limits.COLLECT_MASS_MAX and node.id not in self.confirmed:
            if node.id not in self.held:
                self.held[node.id] = past.drops
                self._world.log.event(Event.COLLECT_HELD, node=node.id, messages=past.drops)
            raise NodeTrouble(
                f"{past.drops} copies on an older state of node {node.id} are unknown to the index and would be dropped: "
                f"run `powermail node confirm {node.id}` if that is right; until then it serves reads and takes no mail"
            )

    async def step(self, node: StorageNode) -> float:
        """Finishes what an admission left: what lies before a birth mark, and old copies without origin. Raises Trouble."""
        if node not in self._cluster.admitted() or self._index.catching_up:
            return _REST_S
        row = await known_row(self._index, node)
        if row is None or row.owes_walk:
            return _REST_S
        facts = await node.facts()
        if row.boot and not row.owes_compare:
            await self._lift_birth(node, row, facts)
            return _REST_S
        if facts.incarnation != row.incarnation:
            return _REST_S
        if not row.boot and facts.birth > START:
            await self._count(node, facts)
            if not await self._settle(node, facts, facts.birth):
                return _REST_S
        if row.owes_compare:
            if await self._index.unread(node.id, 1):
                return _REST_S  # what could not be read may be mail that was not entered yet
            if not await self._settle(node, facts, row.watermark):
                return _REST_S
            await self._index.note_compared(node.id)
        if not row.boot:
            await self._note_boot(node, facts)
        return _REST_S

    async def _lift_birth(self, node: StorageNode, row: NodeRow, facts: NodeFacts) -> None:
        """Law 12: what still lies before the birth mark is mail as any other, once all that was ordered there is confirmed, and
        nothing is there that cannot be read. Then the mark goes: an index that loses commits later must enter what is live.
        """
        if facts.birth == START or facts.incarnation != row.incarnation or facts.damaged or node.stat().damaged:
            return
        if await self._index.orders_total(node.id) == (0, 0) and not await self._index.unread(node.id, 1):
            await node.lift_birth()
            self._world.counters.add("law.12.lifted")

    async def _settle(self, node: StorageNode, facts: NodeFacts, below: Position) -> bool:
        """Law 12: copies of live rows are believed once verified, of dead ones ordered away, the others dropped.

        Of what was written before `below`. False if that came to an end before all was compared.
        """
        past = self._progress(node, facts)
        while True:
            end = await end_of(node)
            items = await node.inventory(past.settled_after, _VERIFIED_AT_ONCE)
            if end.incarnation != facts.incarnation:
                return False
            if not items:
                break
            if await is_proof(self._index, [item.key for item in items if item.held is Held.DEAD]):
                await self._epochs.raise_epoch(f"node {node.id} has a tombstone of a message that is listed")
                return False
            chosen = _before(items, below)
            fates = await self._index.fates([item.key for item in chosen])
            believed = {message.key for message in await self._index.messages(list(fates)) if node.id in message.nodes}
            settled: list[tuple[bytes, Held, Position]] = []
            for item in chosen:
                if fates.get(item.key) is Fate.LIVE:
                    if item.key in believed and item.position >= facts.birth:
                        continue
                    if not await is_good(self._world, self._index, node, item.key):
                        continue
                settled.append((item.key, item.held, item.position))
            if settled:
                result = await self._index.settle_inventory(node.id, end, settled, facts.birth, {}, False)
                if not result.moved or self._index.catching_up:
                    return False
            past.settled_after = items[-1].key
        past.settled_after = b""
        return True


def _before(items: list[Item], below: Position) -> list[Item]:
    """The live copies among these that were first written before a place in the log."""
    return [item for item in items if item.held is Held.LIVE and item.position < below]
