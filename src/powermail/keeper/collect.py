"""Owns collection: tombstones and drops that the index has ordered are carried out on their node, and suspected copies are
looked at again (laws 1, 6, 8).

Deletions come from what the index decided, never from absence (P9). An order waits until its node has confirmed it.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index
from powermail.keeper.belief import end_of, known_row
from powermail.storage.contract import Held, NodeState, StorageNode

_REST_S = 2.0
_SUSPECTS_AT_ONCE = 64


class Collector:
    """Deletes on a node what was deleted in the index."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._suspect_after: dict[str, bytes] = {}

    async def step(self, node: StorageNode) -> float:
        """A batch of each kind for one node. Raises NodeTrouble, IndexTrouble."""
        if node not in self._cluster.admitted() or node.state is NodeState.FAILED:
            return _REST_S
        if await known_row(self._index, node) is None:
            return _REST_S
        more = await self._bury(node)
        more = await self._drop(node) or more
        await self._look_at_suspects(node)
        return 0.0 if more else _REST_S

    async def _bury(self, node: StorageNode) -> bool:
        connection = self._index.connection
        keys = await self._index.orders(node.id, limits.COLLECT_BATCH)
        if keys:
            mark = await self._index.proof(connection)  # law 10: it goes with the act, and counts what ordered it
            end = await node.delete(keys, mark, self._world.clock.now())
            await self._index.confirm_orders(node.id, keys, end)
            self._world.counters.add("keeper.collected", len(keys))
            self._world.log.event(Event.COLLECTED, node=node.id, messages=len(keys))
        return len(keys) == limits.COLLECT_BATCH

    async def _drop(self, node: StorageNode) -> bool:
        connection = self._index.connection
        drops = await self._index.drops(node.id, limits.COLLECT_BATCH)
        if drops:
            mark = await self._index.proof(connection)
            done = await node.drop([(drop.key, drop.position) for drop in drops], mark)
            await self._index.confirm_drops(node.id, drops, done)
            self._world.counters.add("keeper.dropped", len(drops))
            self._world.log.event(Event.COLLECTED, node=node.id, messages=len(drops), by="drop")
        return len(drops) == limits.COLLECT_BATCH

    async def _look_at_suspects(self, node: StorageNode) -> None:
        """A suspected copy that is good counts again; a bad one goes once there are enough good ones elsewhere."""
        connection = self._index.connection
        keys = await self._index.suspects(node.id, self._suspect_after.get(node.id, b""), _SUSPECTS_AT_ONCE)
        self._suspect_after[node.id] = keys[-1] if len(keys) == _SUSPECTS_AT_ONCE else b""
        groups = self._cluster.counted_there()
        live = {message.key: message for message in await self._index.messages(keys)}
        for key in keys:
            message = live.get(key)
            if message is None:  # it died since: a tombstone was ordered here too, and the suspicion went (law 8)
                continue
            end = await end_of(node)
            try:
                await node.verify(key)
            except CopyMissing:
                held = Held.ABSENT
            except CopyDamaged:
                elsewhere = {groups[name] for name in message.nodes if name in groups and name != node.id}
                if len(elsewhere) < self._cluster.copies_required:
                    continue  # it may be the best there is
                held = await node.discard(key, await self._index.proof(connection))
            else:
                held = Held.LIVE
            # Law 8: if it died, or the node has gone on meanwhile, nothing changes, and it is looked at again.
            if held is Held.LIVE:
                await self._index.believe([key], node.id, end)
            else:
                await self._index.clear_suspect(key, node.id, end)
