"""Owns repair: messages with copies in fewer than R groups are copied, verified on the way, until they have R again (P13)."""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NotRedundant, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.index.contract import Index, MessageFacts
from powermail.storage.contract import NodeState, StorageNode


class Repairer:
    """Makes what is thin whole again."""

    def __init__(self, world: World, cluster: Cluster, index: Index, fetcher: Fetcher, repair_after_s: float) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._fetcher = fetcher
        self._repair_after_s = repair_after_s
        self._away_since: dict[str, float] = {}
        self._suspect_at: tuple[bytes, str] = (b"", "")
        self.left = 0
        self.rate = 0.0  # messages per second, while repairing

    def counted_groups(self) -> dict[str, str]:
        """Nodes whose copies count: all but those away for longer than the setting, and those that failed."""
        now = self._world.clock.monotonic()
        counted = {}
        for node in self._cluster.nodes.values():
            if node.state in (NodeState.MISSING, NodeState.FAILED, NodeState.OPENING):
                since = self._away_since.setdefault(node.id, now)
                if now - since >= self._repair_after_s:
                    continue
            else:
                self._away_since.pop(node.id, None)
            counted[node.id] = node.group
        return counted

    async def step(self) -> float:
        """Repairs one batch."""
        counted = self.counted_groups()
        required = self._cluster.copies_required
        thin = await self._index.under_copied(counted, required, b"", limits.REPAIR_BATCH)
        await self._clear_suspects(counted)
        if not thin:
            self.left, self.rate = 0, 0.0
            return 2.0
        began = self._world.clock.monotonic()
        self.left = (await self._index.under_copied_total(counted, required))[0]
        repaired = 0
        for message in thin:
            repaired += await self._repair(message, counted)
        self.left -= repaired
        self.rate = repaired / max(0.001, self._world.clock.monotonic() - began)
        return 0.0 if repaired else 5.0

    async def _repair(self, message: MessageFacts, counted: dict[str, str]) -> bool:
        have = {counted[name] for name in message.nodes if name in counted}
        try:
            targets = [node for node in self._cluster.place() if node.group not in have]
        except NotRedundant:
            targets = [
                node for node in self._cluster.admitted() if node.state is NodeState.READ_WRITE and node.group not in have
            ]
        if not targets:
            return False
        for source in self._sources(message):
            for target in targets:
                try:
                    await target.discard(message.key)
                    await self._fetcher.copy(message.key, source, target)
                except (CopyMissing, CopyDamaged) as error:
                    self._world.log.event(Event.COPY_BAD, key=message.key, node=source.id, error=str(error))
                    await self._index.note_repair(message.key, source.id, str(error))
                    break
                except Trouble:
                    continue
                await self._index.add_copy(message.key, target.id)
                self._world.counters.add("keeper.repaired")
                return True
        self._world.counters.add("keeper.unrepairable")
        return False

    async def _clear_suspects(self, counted: dict[str, str]) -> None:
        """Looks again at copies that do not count: bad ones are forgotten, once there are enough good ones elsewhere."""
        rows = await self._index.suspects(self._suspect_at, limits.REPAIR_BATCH)
        self._suspect_at = rows[-1] if rows else (b"", "")
        admitted = {node.id: node for node in self._cluster.admitted() if node.state is not NodeState.FAILED}
        for key, name in rows:
            node = admitted.get(name)
            message = await self._index.message(key)
            if message is None or name not in self._cluster.nodes:
                await self._index.clear_suspect(key, name)
                continue
            enough = len({counted[other] for other in message.nodes if other in counted}) >= self._cluster.copies_required
            if node is None or not enough:
                continue
            try:
                await node.discard(key)
                if (await node.has([key]))[0]:
                    await self._index.add_copy(key, name)  # good after all: it came too late, or was read badly
                else:
                    await self._index.clear_suspect(key, name)
            except Trouble:
                continue

    def _sources(self, message: MessageFacts) -> list[StorageNode]:
        return [node for node in self._cluster.readable() if node.id in message.nodes]


class Scrubber:
    """Reads every copy of every node in turn, at a pace, and reports the bad ones."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._at: dict[str, bytes] = {}
        self.checked = 0
        self.bad = 0

    async def check(self, node: StorageNode, after: bytes, limit: int) -> tuple[bytes, int]:
        """Verifies some copies behind `after`; (last key or b"" at the end, how many were bad)."""
        keys = await node.live_keys(after, limit)
        bad = 0
        for key in keys:
            try:
                await node.verify(key)
            except CopyMissing:
                continue  # deleted meanwhile
            except CopyDamaged as error:
                bad += 1
                self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
                await self._index.note_repair(key, node.id, str(error))
        self.checked += len(keys)
        self.bad += bad
        return (keys[-1] if keys else b""), bad

    async def step(self) -> float:
        """A few copies of each node; the pace keeps the disks free for mail."""
        for node in self._cluster.admitted():
            self._at[node.id], _ = await self.check(node, self._at.get(node.id, b""), 20)
        return 1.0
