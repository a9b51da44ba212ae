"""Owns reconciliation: the nodes' logs against the index.

One rule: above a node's watermark, a committed record that the index has never seen is mail and is entered; below it,
what the index does not know was deleted. So a front end that died between receipts and index commit loses nothing (F42),
and an old disk that comes back brings nothing back (F16, P8).

Every commit record carries how many transactions the index had committed then. An index that counts fewer has lost some, to a
backup or a stale standby (F26, F28): the epoch rises, readers wait until every log was walked, and what a tombstone stands for
is deleted again.
"""

from __future__ import annotations

from collections import deque

import msgspec

from powermail.base import limits
from powermail.base.entropy import key_time
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Delivery, Index, NodeRow
from powermail.mail.envelope import Commit
from powermail.storage.contract import START, Position, StorageNode

_decode = msgspec.json.Decoder(Commit).decode
MARK_NAME = bytes(16)


class Reconciler:
    """Walks logs behind watermarks."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self.held: dict[str, int] = {}  # deletions that wait for the operator, by node (P9)
        self.confirmed: dict[str, None] = {}  # nodes whose mass deletion the operator has confirmed
        self._revised: dict[str, None] = {}  # nodes whose tombstones were looked at since the epoch rose

    async def admit(self, node: StorageNode) -> None:
        """Compares a node that was just opened with what the index remembers of it. Raises Trouble."""
        rows = {row.id: row for row in await self._index.node_rows()}
        row = rows.get(node.id)
        await self._check_commits(node, row)
        if row is not None:
            node.block(row.blocked)
        if row is None:
            await self._index.set_node(node.id, node.incarnation, 0, 0)
        elif row.incarnation != node.incarnation:
            # Another disk, or the same made anew: all it holds is unseen, and it may lack what the old one held.
            await self._index.set_node(node.id, node.incarnation, 0, 0)
            await self._verify_belief(node)
        elif await node.end() < Position(row.segment, row.offset):
            await self._rolled_back(node, row)
        await self._index.set_node_flags(node.id, None, 0.0)

    async def _rolled_back(self, node: StorageNode, row: NodeRow) -> None:
        """An old state of the disk is back: what the index does not know was deleted meanwhile."""
        if node.id in self.held and node.id not in self.confirmed:
            raise NodeTrouble(f"{self.held[node.id]} deletions on node {node.id} wait for `powermail node confirm {node.id}`")
        self._world.log.event(Event.NODE_DAMAGE, node=node.id, error="an older state of this disk is back")
        position, unknown = START, []
        while True:
            found, following = await node.scan(position, limits.RECONCILE_BATCH, 0.0, True)
            unknown += await self._index.note_copies(node.id, [item.key for item in found])
            if following == position:
                break
            position = following
        await self._verify_belief(node)
        if len(unknown) > limits.COLLECT_MASS_MAX and node.id not in self.confirmed:
            # The node keeps its old watermark and takes no mail, so the question survives a restart; reading goes on.
            self.held[node.id] = len(unknown)
            self._world.log.event(Event.COLLECT_HELD, node=node.id, messages=len(unknown))
            raise NodeTrouble(f"{len(unknown)} deletions wait for `powermail node confirm {node.id}`")
        await self._index.order_deletions(node.id, unknown)
        self.confirmed.pop(node.id, None)
        incarnation = await node.new_incarnation()
        end = await node.end()
        await self._index.set_node(node.id, incarnation, end.segment, end.offset)

    async def _verify_belief(self, node: StorageNode) -> None:
        """Drops the belief in copies that the node does not have; repair makes them anew."""
        after, dropped = b"", 0
        while keys := await self._index.copies_on(node.id, after, limits.RECONCILE_BATCH):
            after = keys[-1]
            present = await node.has(keys)
            missing = [key for key, there in zip(keys, present, strict=True) if not there]
            if missing:
                await self._index.drop_copies(node.id, missing)
                dropped += len(missing)
        if dropped:
            self._world.log.event(Event.NODE_DAMAGE, node=node.id, missing_copies=dropped)

    async def _check_commits(self, node: StorageNode, row: NodeRow | None) -> None:
        """The node has seen more transactions of the index than the index has: it lost commits (F26, F28)."""
        seen = 0
        for name, _, body in await node.checkpoints(b"", 1):
            if name == MARK_NAME:
                seen = int(body)
        newest: deque[bytes] = deque(maxlen=limits.COMMITS_LOOKED_AT)
        position = Position(row.segment, row.offset) if row is not None and row.incarnation == node.incarnation else START
        while True:
            found, following = await node.scan(position, limits.RECONCILE_BATCH, 0.0, False)
            newest.extend(item.key for item in found)
            if following == position:
                break
            position = following
        for key in newest:
            try:
                seen = max(seen, _decode(await node.read_commit(key)).mark)
            except (CopyMissing, CopyDamaged, msgspec.DecodeError):
                continue  # scrub and repair will see to it
        if seen > self._index.commits:
            await self._index.set_commits(seen)
            epoch = await self._index.raise_epoch()
            self._revised.clear()
            self._world.log.event(Event.EPOCH_RAISED, epoch=epoch, node=node.id)

    async def settle(self) -> None:
        """One pass while no delivery is under way, at start and stop: everything durable is entered, however young."""
        await self._pass(0.0)

    async def step(self) -> float:
        """One pass over all nodes."""
        await self._pass(0.0 if self._index.catching_up else limits.RECONCILE_GRACE_S)
        return limits.RECONCILE_INTERVAL_S

    async def _pass(self, age_s: float) -> None:
        entered = 0
        walked: dict[str, None] = {}
        rows = {row.id: row for row in await self._index.node_rows()}
        for node in self._cluster.admitted():
            row = rows.get(node.id)
            if row is None or row.incarnation != node.incarnation:
                continue
            try:
                entered += await self._walk(node, Position(row.segment, row.offset), age_s)
                if self._index.catching_up and node.id not in self._revised:
                    await self._revise(node)
                    self._revised[node.id] = None
            except NodeTrouble as error:
                self._world.log.event(Event.TROUBLE, worker="reconcile", node=node.id, error=str(error))
                continue  # the others' logs are walked all the same (F11)
            walked[node.id] = None
        if entered:
            self._world.log.event(Event.RECONCILED, messages=entered)
        missing = {node.group for node in self._cluster.nodes.values() if node.id not in walked}
        if self._index.catching_up and len(missing) < self._cluster.copies_required:
            await self._index.caught_up()  # every message has a copy on a node that was walked

    async def _revise(self, node: StorageNode) -> None:
        """Deletes again what was deleted in commits that the index lost: the node's tombstones are the record of it (P8)."""
        after, gone = b"", 0
        while keys := await self._index.copies_on(node.id, after, limits.RECONCILE_BATCH):
            after = keys[-1]
            buried = [key for key, dead in zip(keys, await node.deleted(keys), strict=True) if dead]
            if buried:
                gone += await self._index.forget_messages(buried)
        if gone:
            self._world.log.event(Event.COLLECTED, node=node.id, messages=gone, by="tombstones")

    async def _walk(self, node: StorageNode, position: Position, age_s: float) -> int:
        entered = 0
        while True:
            found, following = await node.scan(position, limits.RECONCILE_BATCH, age_s, False)
            for key in await self._index.note_copies(node.id, [item.key for item in found]):
                entered += await self._enter(node, key)
            if following == position:
                return entered
            position = following
            await self._index.set_node(node.id, node.incarnation, position.segment, position.offset)

    async def _enter(self, node: StorageNode, key: bytes) -> bool:
        try:
            commit = _decode(await node.read_commit(key))
        except CopyMissing:
            return False  # aborted or deleted between the look and the read
        except (CopyDamaged, msgspec.DecodeError) as error:
            self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
            return False
        new = await self._index.deliver(Delivery(key, commit, (node.id,), late=True))
        if new:
            self._world.counters.add("keeper.reconciled")
            self._world.log.event(
                Event.DELIVERED, key=key, by="reconcile", age_s=self._world.clock.now() - key_time(key), node=node.id
            )
        return new
