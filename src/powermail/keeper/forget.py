"""Owns forgetting: rounds, after which rows of dead and aborted keys may go (law 9).

A round is raised; then each member node gives a fresh stamp, is fenced with it and scanned to its end. What was decided before
the round and has no orders left is forgotten. A node that is away holds this back, at about 100 octets a deletion: `alarms`
says so. Danger: a row that is forgotten while a commit of its key may still arrive brings a deleted message back (P8).
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index, NodeRow
from powermail.keeper.belief import known_row
from powermail.keeper.reconcile import Reconciler
from powermail.storage.contract import NodeState, StorageNode

_FORGET_BATCH = 1000
_LOOK_S = 10.0
_COMFORT_S = 2 * limits.COMMIT_WINDOW_S  # deliveries under way end by themselves meanwhile


class Forgetter:
    """Runs one round after the other while there is anything to forget. What it remembers may be lost: a new round begins."""

    def __init__(self, world: World, cluster: Cluster, index: Index, reconciler: Reconciler) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._reconciler = reconciler
        self._round: int | None = None  # under way
        self._raised_at = float("-inf")
        self._began_at = world.clock.monotonic()
        self._ripe = True  # there may be rows to forget; trying when there are none would be a commit each time
        self.alarms: list[str] = []

    async def step(self) -> float:
        """Forgets a bounded piece, and begins a round when one is due. Raises IndexTrouble."""
        if self._index.catching_up or not self._index.numbering:
            return _LOOK_S
        left = await self._index.dead_total()
        rows = await self._index.node_rows()
        if self._round is not None and all(row.scan_round >= self._round for row in rows):
            self._round, self._ripe = None, True
        if left and self._ripe:
            forgotten = await self._index.forget(_FORGET_BATCH)
            if forgotten:
                self._world.counters.add("keeper.forgotten", forgotten)
                return 0.0
            self._ripe = False
        await self._look(rows, left)
        now = self._world.clock.monotonic()
        if left and self._round is None and now - self._raised_at >= limits.ROUND_INTERVAL_S:
            self._round = await self._index.raise_round()  # law 9: first the round, then the stamps
            self._raised_at = self._world.clock.monotonic()  # raised by now, however long that took
            self._world.counters.add("law.9.rounds")
        return _LOOK_S

    async def scan(self, node: StorageNode) -> float:
        """Scans one node for the round that is under way. Raises NodeTrouble, IndexTrouble."""
        round_ = self._round
        if round_ is None or node not in self._cluster.admitted():
            return _LOOK_S
        early = self._raised_at + _COMFORT_S - self._world.clock.monotonic()
        if early > 0:
            return early
        row = await known_row(self._index, node)
        if row is None or row.owes_walk or row.scan_round >= round_:
            return _LOOK_S
        stamp = await node.fresh_stamp()  # one that was heard before may be older than the round
        if stamp is None:
            raise NodeTrouble(f"node {node.id} gives no stamp, so round {round_} waits for it")
        await node.put_mark(await self._index.proof(self._index.connection))  # law 10: which writer slots stay
        end = await node.fence(stamp)  # laws 2, 9: nothing older than this stamp is taken behind that end
        await self._reconciler.advance(node, 0.0, end, round_)
        return _LOOK_S

    def let_go(self) -> None:
        """Another keeper does this now, and says what holds it back."""
        self.alarms = []

    async def _look(self, rows: list[NodeRow], left: int) -> None:
        """What holds forgetting back, for status."""
        alarms = []
        since = max(self._raised_at, self._began_at)  # a node that opens a moment later than the others is no alarm
        if left and self._world.clock.monotonic() - since > _COMFORT_S + limits.RECONCILE_GRACE_S:
            there = {node.id for node in self._cluster.admitted() if node.state is not NodeState.FAILED}
            for row in rows:
                if row.id not in there:
                    alarms.append(
                        f"node {row.id} is away and holds back forgetting {left} deletions; if it does not come back: "
                        f"`powermail node expel {row.id}`"
                    )
                elif await self._index.unread(row.id, 1):
                    alarms.append(
                        f"parts of the log of node {row.id} cannot be read, which holds back forgetting {left} deletions"
                    )
        self.alarms = alarms
