"""Owns the walk: after lost commits every key of a node is compared, not only what lies behind its watermark (law 11).

A tombstone makes the row dead, also when there is none yet; a live copy without a row becomes live whatever its origin, unless
it lies before the birth mark or its drop is pending. What lies before the birth mark and has no row is left alone here: once
the index has caught up, admission decides about it (law 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.index.contract import Fate, Index, NodeRow
from powermail.keeper.belief import compare_belief, end_of, is_good, read_commits
from powermail.mail.envelope import Commit
from powermail.storage.contract import End, Held, Item, NodeFacts, Position, StorageNode, Unread

_TRIES = 3  # of one page whose keys change while it is compared


@dataclass
class _Walk:
    """How far one node was walked. `end` is the log's end behind the fence: what comes later is reconcile's."""

    incarnation: str
    epoch: int
    end: Position
    round: int
    after: bytes = b""
    entered: int = 0
    bad: tuple[Unread, ...] = ()


class Walker:
    """Walks nodes that owe it; goes on where trouble stopped it."""

    def __init__(self, world: World, index: Index) -> None:
        self._world = world
        self._index = index
        self._walks: dict[str, _Walk] = {}

    async def walk(self, node: StorageNode, row: NodeRow, facts: NodeFacts) -> bool:
        """Walks a node to its end; False if the index knows another one by now. Raises NodeTrouble, IndexTrouble."""
        walk = self._walks.get(node.id)
        if walk is None or (walk.incarnation, walk.epoch) != (row.incarnation, self._index.epoch):
            walk = self._walks[node.id] = await self._begin(node, row)
        while True:
            end = await end_of(node)
            items = await node.inventory(walk.after, limits.RECONCILE_BATCH)
            if not items:
                break
            if end.incarnation != walk.incarnation or not await self._page(node, walk, end, facts.birth, items):
                return False  # or the node has gone on since: from here again
            walk.after = items[-1].key
        await self._check_belief(node)
        if walk.epoch != self._index.epoch:
            return False
        # Law 6: the watermark passes over what could not be read, so that is noted with it; it is tried again by reconcile.
        done = await self._index.walked(node.id, walk.incarnation, walk.end, walk.end, walk.round, walk.epoch, walk.bad)
        del self._walks[node.id]
        self._world.counters.add("law.11.walks")
        self._world.counters.add("law.11.entered", walk.entered)
        self._world.log.event(Event.RECONCILED, node=node.id, messages=walk.entered, by="walk")
        return done

    async def _begin(self, node: StorageNode, row: NodeRow) -> _Walk:
        epoch, round_ = self._index.epoch, await self._index.raise_round()  # law 9: first the round, then the stamp
        stamp = await node.fresh_stamp()  # one that was heard before may be older than the round
        if stamp is None:
            raise NodeTrouble(f"node {node.id} gives no stamp, so it cannot be walked yet")
        return _Walk(row.incarnation, epoch, await node.fence(stamp), round_)

    async def _page(self, node: StorageNode, walk: _Walk, end: End, birth: Position, items: Sequence[Item]) -> bool:
        known = await self._index.fates([item.key for item in items])
        settled: list[tuple[bytes, Held, Position]] = []
        unknown: dict[bytes, Position] = {}
        for item in items:
            if item.held is Held.LIVE:
                if item.position >= walk.end:
                    continue  # reconcile will come to it
                fate = known.get(item.key)
                if item.position < birth and fate in (None, Fate.LIVE):
                    if fate is None or not await is_good(self._world, self._index, node, item.key):
                        continue  # law 12: believed only when it was verified, never entered
                elif fate is None:
                    unknown[item.key] = item.position
            settled.append((item.key, item.held, item.position))
        commits: dict[bytes, Commit] = {}
        wanted = list(unknown)
        for _ in range(_TRIES):
            records = await read_commits(node, wanted)
            commits.update(records.good)
            for key, why in records.bad.items():
                self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=why)
                walk.bad = (*walk.bad, Unread(unknown[key], 0))
            settled = [each for each in settled if each[0] not in wanted or each[0] in records.good]
            result = await self._index.settle_inventory(node.id, end, settled, birth, commits, True)
            if not result.missing:
                walk.entered += result.entered
                return result.moved
            wanted = list(result.missing)
            unknown.update({key: position for key, _, position in settled if key in result.missing})
        raise NodeTrouble(f"keys of node {node.id} change while they are walked; again soon")

    async def _check_belief(self, node: StorageNode) -> None:
        after = b""
        while keys := await self._index.copies_on(node.id, after, limits.RECONCILE_BATCH):
            after = keys[-1]
            await compare_belief(self._index, node, keys)
