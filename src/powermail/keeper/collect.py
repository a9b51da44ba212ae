"""Owns collection: tombstones to every node that holds, or may hold, what nobody refers to any more; then space.

Rule (P9): deletions come from entries that somebody removed, never from absence. A node that is away gets its tombstones
when it returns, before anything else is believed of it (P8).
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index
from powermail.storage.contract import NodeState, Position

_ABORTED_KEPT_S = 7 * 86_400.0


class Collector:
    """Deletes on the nodes what was deleted in the index."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index

    async def step(self) -> float:
        """One batch for each node."""
        more = False
        for node in self._cluster.admitted():
            if node.state is NodeState.FAILED:
                continue
            keys = await self._index.deletions_due(node.id, limits.COLLECT_BATCH)
            if not keys:
                continue
            try:
                await node.delete(keys)
            except NodeTrouble:
                continue
            done = await self._index.confirm_deletions(node.id, keys)
            self._world.counters.add("keeper.collected", len(keys))
            self._world.log.event(Event.COLLECTED, node=node.id, messages=len(keys))
            for other in self._cluster.admitted():
                await other.forget_tombstones(done)
            more = more or len(keys) == limits.COLLECT_BATCH
        return 0.0 if more else 2.0

    async def compact(self) -> float:
        """Rewrites one segment of each node that is mostly dead and whole behind the watermark."""
        freed = 0
        rows = {row.id: row for row in await self._index.node_rows()}
        for node in self._cluster.admitted():
            row = rows.get(node.id)
            if row is None or row.incarnation != node.incarnation or node.state is NodeState.FAILED:
                continue
            try:
                freed += await node.compact(Position(row.segment, row.offset))
            except NodeTrouble as error:
                self._world.log.event(Event.TROUBLE, node=node.id, error=str(error))
        await self._index.forget_aborted(self._world.clock.now() - _ABORTED_KEPT_S)
        return 0.0 if freed else 30.0
