"""Owns repair: messages with copies in fewer than R groups are copied, verified on the way, until they have R again (P13).

Those in the fewest groups come first (`keeper.endangered`); what cannot be repaired is passed, and tried again in the next
turn. A copy that was made but could not be noted is reconcile's: believed if the message lives, dropped if not (law 6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble, NotRedundant
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.index.contract import Index, MessageFacts
from powermail.keeper.belief import Looks, compare_belief
from powermail.keeper.endangered import Turn, spanned
from powermail.storage.contract import End, Held, NodeState, StorageNode

_REST_S = 5.0  # when nothing is thin
_COUNT_INTERVAL_S = 30.0
_AVOID_S = 30.0  # a node that was in trouble
_LISTED_MAX = 100  # unrepairable messages that are named
_OCTETS_PER_S_MIN = limits.MIB  # slower copying is trouble


class _Copy(NamedTuple):
    """A copy on a node, found or made when its log ended at `end` or later (law 8); None: there is none, and `why`."""

    node: str
    end: End | None
    why: str


class Repairer:
    """Makes what is thin whole again. `left`, `rate` (messages a second) and `unrepairable` (key to why) are for status."""

    def __init__(self, world: World, cluster: Cluster, index: Index, fetcher: Fetcher, repair_after_s: float) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._fetcher = fetcher
        self._repair_after_s = repair_after_s
        self._away_since: dict[str, float] = {}
        self._avoided: dict[str, float] = {}  # nodes in trouble, until when
        self._turn = Turn(world, index)
        self._counted_at = float("-inf")
        self._began_at: float | None = None  # of the repairs under way
        self._repaired = 0
        self._failed: dict[bytes, str] = {}  # in this turn
        self._failures = 0
        self.left = 0
        self.rate = 0.0
        self.unrepairable: dict[bytes, str] = {}  # of the last whole turn, at most _LISTED_MAX
        self.unrepairable_total = 0

    def counted_groups(self) -> dict[str, str]:
        """Nodes whose copies count: not those that are about to go, nor those away or failed for longer than the setting."""
        now = self._world.clock.monotonic()
        counted = {}
        here = self._cluster.counted()
        for node in self._cluster.nodes.values():
            if node.id not in here:
                continue
            if node.state in (NodeState.MISSING, NodeState.FAILED, NodeState.OPENING):
                since = self._away_since.setdefault(node.id, now)
                if now - since >= self._repair_after_s:
                    continue
            else:
                self._away_since.pop(node.id, None)
            counted[node.id] = node.group
        return counted

    def seconds_left(self) -> float | None:
        """Time to full redundancy as far as it can be told."""
        return round(self.left / self.rate, 1) if self.rate and self.left else None

    async def step(self) -> float:
        """Repairs one batch. Raises IndexTrouble."""
        if not self._index.numbering:
            return _REST_S  # what commits were lost is not known yet
        counted, required, turn = self.counted_groups(), self._cluster.copies_required, self._turn
        thin = await turn.next(counted, required)
        if not thin:
            return self._end_turn()
        await self._count(counted, required)
        takers = await self.takers()
        repaired = 0
        for some in at_once(thin):
            whys = await self._mend_all(some, counted, takers)
            helped = {key for key, why in whys.items() if not why}
            for message in some:
                if message.key in helped:
                    self._note_progress(spanned(message, counted) + 1 >= required)
                elif (why := whys[message.key]) != _OVER:
                    self._note_failure(message.key, why)
            turn.passed(some, helped, counted)
            repaired += len(helped)
        return 0.0 if repaired else 1.0

    def _end_turn(self) -> float:
        nothing = not self._turn.met
        self._turn = Turn(self._world, self._index)
        self.unrepairable, self._failed = self._failed, {}
        self.unrepairable_total, self._failures = self._failures, 0
        if nothing:
            self._rest()
        return _REST_S if nothing or self.unrepairable_total else 0.0

    def _rest(self) -> None:
        self.left, self.rate, self._began_at = 0, 0.0, None
        self._counted_at = float("-inf")

    def let_go(self) -> None:
        """Another keeper does this now, and says how far it is; from the beginning when it is ours again."""
        self._rest()
        self._turn, self._failed, self._failures = Turn(self._world, self._index), {}, 0
        self.unrepairable, self.unrepairable_total = {}, 0

    async def _count(self, counted: dict[str, str], required: int) -> None:
        now = self._world.clock.monotonic()
        if now - self._counted_at >= _COUNT_INTERVAL_S:
            self._counted_at = now
            self.left = (await self._index.under_copied_total(counted, required))[0]

    def _note_progress(self, whole: bool) -> None:
        now = self._world.clock.monotonic()
        if self._began_at is None:
            self._began_at, self._repaired = now, 0
        self._repaired += 1
        self.rate = self._repaired / max(1.0, now - self._began_at)
        if whole:  # with one copy of three it is thin as before, and comes once more
            self.left = max(0, self.left - 1)
        self._world.counters.add("keeper.repaired")

    def _note_failure(self, key: bytes, why: str) -> None:
        self._failures += 1
        if len(self._failed) < _LISTED_MAX:
            self._failed[key] = why
        self._world.counters.add("keeper.unrepairable")

    async def takers(self) -> frozenset[str]:
        """Nodes that may get copies: not while they owe a walk, by which a copy without its note would become mail (law 11)."""
        rows = {row.id: row for row in await self._index.node_rows()}
        return frozenset(
            node.id
            for node in self._cluster.admitted()
            if self._cluster.is_writable(node)
            and (row := rows.get(node.id)) is not None
            and row.incarnation == node.incarnation
            and not row.owes_walk
        )

    # -- one message ------------------------------------------------------------------------------------------------

    async def mend(
        self, message: MessageFacts, counted: dict[str, str], takers: frozenset[str], source: StorageNode | None = None
    ) -> str:
        """Makes one more copy, on one of `takers`; why it could not, "" if it did, _OVER if there is nothing to do any more.
        `source` is a disk that is no member, from which it is to be copied. Raises IndexTrouble.
        """
        return (await self._mend_all([message], counted, takers, source))[message.key]

    async def _mend_all(
        self,
        messages: Sequence[MessageFacts],
        counted: dict[str, str],
        takers: frozenset[str],
        source: StorageNode | None = None,
    ) -> dict[bytes, str]:
        """The same for several: what waits for disks waits together, and their notes are one for each node."""
        looks = Looks([message.key for message in messages])
        copies = await asyncio.gather(
            *(self._make(message, counted, takers, source, looks) for message in messages), return_exceptions=True
        )
        whys, made = dict[bytes, str](), dict[str, tuple[End, list[bytes]]]()
        for message, copy in zip(messages, copies, strict=True):
            if isinstance(copy, BaseException):
                raise copy
            whys[message.key] = copy.why
            if copy.end is not None:
                made.setdefault(copy.node, (copy.end, []))[1].append(message.key)
        for node, (end, keys) in made.items():
            believed = await self._index.believe(keys, node, end)
            for key in keys:
                if key in believed:
                    self._world.log.event(Event.COPY_REPAIRED, key=key, node=node)
                else:
                    whys[key] = _OVER  # law 8: it died meanwhile, or the node has gone on: once more
        return whys

    async def _make(
        self,
        message: MessageFacts,
        counted: dict[str, str],
        takers: frozenset[str],
        source: StorageNode | None,
        looks: Looks,
    ) -> _Copy:
        """Makes the copy, and notes nothing yet."""
        have = {counted[name] for name in message.nodes if name in counted}
        targets = [node for node in self._order(takers) if node.group not in have and not self._is_avoided(node)]
        if self._cluster.apart:  # into a site that has none first
            sites = {self._cluster.site_of(name) for name in message.nodes if name in counted}
            targets.sort(key=lambda node: self._cluster.site_of(node.id) in sites)
        if not targets:
            return _Copy("", None, "no node of another group takes it")
        why = "no node with a copy is there"
        for each in [source] if source is not None else self._sources(message):
            for target in targets:
                copy, next_source = await self._copy(message, each, target, looks)
                if copy.end is not None:
                    return copy
                why = copy.why
                if next_source:
                    break
        return _Copy("", None, why)

    async def _copy(self, message: MessageFacts, source: StorageNode, target: StorageNode, looks: Looks) -> tuple[_Copy, bool]:
        """And whether another source must be tried first."""
        key = message.key
        patience = limits.NODE_CALL_TIMEOUT_S + message.octets / _OCTETS_PER_S_MIN
        try:
            async with asyncio.timeout(patience):
                look = await looks.at(target)
                held = look.held[key]
                if held is Held.DEAD:
                    return _Copy(target.id, None, f"{target.id} has a tombstone of it"), False
                if held is not Held.LIVE or not await self._is_good_there(key, source, target):
                    await self._fetcher.copy(key, source, target)
        except (CopyMissing, CopyDamaged) as error:
            self._world.log.event(Event.COPY_BAD, key=key, node=source.id, error=str(error))
            await self._note_bad(message, source, error)
            return _Copy(target.id, None, f"{source.id}: {error}"), True
        except (NodeTrouble, TimeoutError) as error:
            why = str(error) or "no answer in time"
            if not self._is_avoided(target):  # said once, not for each of a batch
                self._world.log.event(Event.TROUBLE, worker="repair", key=key, node=target.id, error=why)
            self._avoided[target.id] = self._world.clock.monotonic() + _AVOID_S
            return _Copy(target.id, None, f"{source.id} to {target.id}: {why}"), False
        return _Copy(target.id, look.end, ""), False

    async def _is_good_there(self, key: bytes, source: StorageNode, target: StorageNode) -> bool:
        """Whether the target has a good copy already. A bad one makes room only when the source is known to be good."""
        try:
            await target.verify(key)
        except CopyMissing:
            return False
        except CopyDamaged:
            if source is target:
                raise
            await source.verify(key)
            # law 10: what says that it is bad is the node alone, and nothing of the index
            return await target.discard(key, await self._index.proof(self._index.connection)) is Held.LIVE
        return True

    async def _note_bad(self, message: MessageFacts, source: StorageNode, error: CopyMissing | CopyDamaged) -> None:
        if source.id not in message.nodes:
            return
        if isinstance(error, CopyDamaged):
            await self._index.note_bad(message.key, source.id, str(error))
            return
        try:
            await compare_belief(self._index, source, [message.key])
        except NodeTrouble as trouble:
            self._world.log.event(Event.TROUBLE, worker="repair", node=source.id, error=str(trouble))

    def _is_avoided(self, node: StorageNode) -> bool:
        return self._world.clock.monotonic() < self._avoided.get(node.id, 0.0)

    def _order(self, takers: frozenset[str]) -> list[StorageNode]:
        """Nodes that take copies: as placement wants, also when fewer than R groups take mail."""
        try:
            placed: Sequence[StorageNode] = self._cluster.place()
        except NotRedundant:
            placed = self._cluster.admitted()
        return [node for node in placed if node.id in takers]

    def _sources(self, message: MessageFacts) -> list[StorageNode]:
        """Nodes to copy from: believed ones first, near ones before far ones; then the others, because belief may be old."""
        readable = [node for node in self._cluster.readable() if node.incarnation]
        slow, far = self._cluster.is_slow, self._cluster.far
        readable.sort(key=lambda node: (node.id not in message.nodes, self._is_avoided(node), slow(node.id), node.id in far))
        return readable


def at_once(thin: Sequence[MessageFacts]) -> Iterator[list[MessageFacts]]:
    """In their order, as many together as have no more octets than may be on their way."""
    some: list[MessageFacts] = []
    octets = 0
    for message in thin:
        if some and octets + message.octets > limits.REPAIR_AT_ONCE_OCTETS:
            yield some
            some, octets = [], 0
        some.append(message)
        octets += message.octets
    if some:
        yield some


_OVER = "over"
