"""Owns rebalancing: copies move from nodes whose disks are filled more than the others' to those that are filled less.

A copy moves as it is repaired, verified on the way; only when the other one is believed, and the message is redundant without
the first, is that let go: a drop of exactly this copy is ordered in one transaction with the end of the belief (law 6).
What there is to do is told by what the nodes say of themselves, so a keeper that begins anew goes on where another has ended.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.index.contract import Index, MessageFacts
from powermail.index.sharing import MoveRow
from powermail.keeper.belief import end_of
from powermail.storage.contract import Held, Receipt, StorageNode

REBALANCE = "rebalance"


def uneven(cluster: Cluster) -> dict[str, int]:
    """Octets that each node of mail has more (or fewer, if negative) than its share, by which all disks are filled alike.

    What lies on it and what is free count, not what else is on its disk.
    """
    held = {node.id: node.stat() for node in cluster.nodes.values() if cluster.is_writable(node)}
    room = sum(stat.live_octets + stat.free_octets for stat in held.values())
    live = sum(stat.live_octets for stat in held.values())
    if not room:
        return {}
    return {name: stat.live_octets - int((stat.live_octets + stat.free_octets) * live / room) for name, stat in held.items()}


def excess(cluster: Cluster) -> dict[str, int]:
    """Of those, nodes that are beyond the slack, with the octets that are to leave them."""
    found = {}
    for name, more in uneven(cluster).items():
        stat = cluster.nodes[name].stat()
        if more > limits.REBALANCE_SLACK * (stat.live_octets + stat.free_octets):
            found[name] = more
    return found


class Rebalancer:
    """Goes on with the rebalancing that the operator has asked for."""

    def __init__(self, world: World, cluster: Cluster, index: Index, fetcher: Fetcher) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._fetcher = fetcher
        self._left: dict[str, int] = {}  # octets that are still to leave each node, in this pass
        self._after = b""
        self._moved_of_pass = -1  # copies; -1: there was no pass yet

    async def step(self) -> float:
        """Moves a batch. Raises IndexTrouble."""
        move = next((move for move in await self._index.moves() if move.name == REBALANCE), None)
        if move is None or self._index.catching_up or not self._index.numbering:
            self._left, self._moved_of_pass = {}, -1
            return limits.MOVE_IDLE_S
        if not self._left and not await self._begin_pass(move):
            return limits.MOVE_IDLE_S
        name = next(iter(self._left))
        source = self._cluster.nodes.get(name)
        keys = await self._index.copies_on(name, self._after, limits.REBALANCE_BATCH)
        if source is None or not keys or source not in self._cluster.admitted():
            self._done_with(name)
            await self._index.note_move(move._replace(after=b""))
            return limits.MOVE_LOOK_S
        self._after = keys[-1]
        moved = 0
        stat = source.stat()
        mean = stat.live_octets // max(1, stat.messages)  # of small ones most is their record
        for message in await self._index.messages(keys):
            if name in message.nodes and await self._moved(message, source):
                moved += 1
                self._left[name] -= max(message.octets, mean)
                if self._left[name] <= 0:
                    self._done_with(name)
                    break
        self._moved_of_pass += moved
        done = move.done + moved
        note = f"{max(0, sum(self._left.values()))} octets are to leave {' '.join(self._left)}" if self._left else ""
        await self._index.note_move(move._replace(done=done, total=max(move.total, done), after=self._after, note=note))
        return 0.0 if moved else limits.MOVE_LOOK_S / 10

    async def _begin_pass(self, move: MoveRow) -> bool:
        """Looks what is uneven now; False while there is nothing to do, or when that was all. Raises IndexTrouble."""
        for name in self._cluster.nodes:
            if (await self._index.orders_total(name))[1]:
                return False  # what was let go of lies there still, and counts until it is dropped
        left = excess(self._cluster)
        if not left or self._moved_of_pass == 0:
            why = "nothing more can be moved: other groups have copies already" if left else ""
            await self._index.end_move(REBALANCE)
            self._world.log.event(Event.MOVE, move=REBALANCE, state="ended", copies=move.done, why=why or None)
            self._moved_of_pass = -1
            return False
        self._left, self._after, self._moved_of_pass = left, move.after, 0  # where a keeper that ended had come to
        return True

    def _done_with(self, name: str) -> None:
        """This pass is over for a node; what it still has too much is seen when its drops were carried out."""
        del self._left[name]
        self._after = b""

    async def _moved(self, message: MessageFacts, source: StorageNode) -> bool:
        target = await self._target(message, source)
        if target is None:
            return False
        counted = self._cluster.counted_there()
        groups = {counted[name] for name in (*message.nodes, target.id) if name in counted and name != source.id}
        if len(groups) < self._cluster.copies_required:
            return False  # what is away may not come back: this copy is needed, and another beside it would be in vain
        key = message.key
        try:
            end = await end_of(target)
            held = (await target.has([key]))[0]
            if held is Held.DEAD or held is Held.UNKNOWN:
                return False
            if held is Held.LIVE:
                await target.verify(key)
            else:
                await self._fetcher.copy(key, source, target)
            there = await end_of(source)
            position = await source.verify(key)
        except (CopyMissing, CopyDamaged, NodeTrouble) as error:  # scrub and repair find what is bad
            self._world.log.event(Event.TROUBLE, worker=REBALANCE, key=key, node=target.id, error=str(error))
            return False
        if not await self._index.believe([key], target.id, end):
            return False
        copy = Receipt(source.id, there.incarnation, position)
        counted, required = self._cluster.counted_there(), self._cluster.copies_required
        if not await self._index.let_go(key, copy, there.position, counted, required):
            return False
        self._world.counters.add("keeper.moved")
        return True

    async def _target(self, message: MessageFacts, source: StorageNode) -> StorageNode | None:
        """The node that has the most room below its share, of no group in which another copy lies; where copies go apart, the
        message lies in no fewer sites then.
        """
        groups = self._cluster.groups()
        others = {groups[name] for name in message.nodes if name in groups and name != source.id}
        site = self._cluster.site_of
        kept = {site(name) for name in message.nodes if name in groups and name != source.id}
        sites = len({*kept, site(source.id)}) if self._cluster.apart else 0
        shares = uneven(self._cluster)
        rows = {row.id: row for row in await self._index.node_rows()}
        found = [
            node
            for node in self._cluster.admitted()
            if node.id in shares
            and shares[node.id] < 0
            and node.id not in message.nodes
            and node.group not in others
            and len({*kept, site(node.id)}) >= sites
            and node.priority <= source.priority
            and (row := rows.get(node.id)) is not None
            and row.incarnation == node.incarnation
            and not row.owes_walk
        ]
        return min(found, key=lambda node: shares[node.id], default=None)
