"""Owns the pace of compaction: segments of a node that are mostly dead give their space back, a bounded step at a time.

Only what lies behind the watermark moves, and nothing after a stretch that could not be read: it may be mail that was not
entered yet (laws 6, 10). Tombstones stay for `tombstone_days` by the date the keeper stated, and until their row is
forgotten (law 9).
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index
from powermail.keeper.belief import known_row
from powermail.storage.contract import NodeState, StorageNode

_DAY_S = 86_400.0
_IDLE_S = 30.0
_PAUSE_S = 0.5  # between steps, so that mail comes first


class Compactor:
    """Compacts one node after the other, each in its own time. `freed` is in octets."""

    def __init__(self, world: World, cluster: Cluster, index: Index, tombstone_days: float) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._tombstone_s = tombstone_days * _DAY_S
        self.freed: dict[str, int] = {}

    async def step(self, node: StorageNode) -> float:
        """One bounded step on one node. Raises NodeTrouble, IndexTrouble."""
        if node not in self._cluster.admitted() or node.state is NodeState.FAILED:
            return _IDLE_S
        if self._index.catching_up or not self._index.numbering:
            return _IDLE_S  # the walk needs what is there
        connection = self._index.connection
        row = await known_row(self._index, node)
        if row is None or row.owes_walk or row.owes_compare:
            return _IDLE_S
        notes = await self._index.unread(node.id, limits.RECONCILE_BATCH)
        below = min([row.watermark, *(note.position for note in notes)])
        dead = await node.compactable(below, self._world.clock.now() - self._tombstone_s)
        if dead is None:
            return _IDLE_S
        forgotten = await self._index.forgotten(dead) if dead else []
        mark = await self._index.proof(connection)  # law 10: permission carries the mark
        freed = await node.compact(below, forgotten, mark)
        if freed:
            self.freed[node.id] = self.freed.get(node.id, 0) + freed
            self._world.counters.add("keeper.compacted_octets", freed)
            self._world.log.event(Event.COMPACTED, node=node.id, octets=freed)
        return _PAUSE_S
