"""Owns the view of all nodes: who is there, who takes mail, health probes, reopening what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from powermail.base import limits
from powermail.base.deadline import Patience
from powermail.base.errors import NodeTrouble, NotRedundant, OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.placement import Candidate, place
from powermail.storage.contract import NodeState, StorageNode

Admit = Callable[[StorageNode], Awaitable[None]]
_AWAY = (NodeState.MISSING, NodeState.CLOSED, NodeState.OPENING)


class Cluster:
    """The nodes of a cluster as one front end sees them."""

    def __init__(self, world: World, nodes: Sequence[StorageNode], copies_required: int, policy: str) -> None:
        self.nodes: dict[str, StorageNode] = {node.id: node for node in nodes}
        self.copies_required = copies_required
        self._world = world
        self._policy = policy
        self._admit: Admit | None = None
        self._admitted: dict[str, None] = {}
        self._refused: dict[str, str] = {}
        self._takers: list[StorageNode] = []  # nodes that took mail when last looked at, with their figures
        self._candidates: list[Candidate] = []
        self._looked_at = float("-inf")
        self._enough = False
        self._slow_until: dict[str, float] = {}
        self._checking = {node.id: asyncio.Lock() for node in nodes}
        self._orders: list[list[StorageNode]] = []  # placements drawn for these figures
        self._drawn = 0
        self.receipts = Patience(limits.NODE_RECEIPT_TIMEOUT_S)

    def node(self, name: str) -> StorageNode:
        """A node by its id. Raises NodeTrouble if there is none."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeTrouble(f"no node {name!r}") from None

    def groups(self) -> dict[str, str]:
        """Node to group."""
        return {node.id: node.group for node in self.nodes.values()}

    def readable(self) -> list[StorageNode]:
        """Nodes that serve reads, in order of id."""
        return [node for node in self.nodes.values() if node.state not in _AWAY]

    def admitted(self) -> list[StorageNode]:
        """Readable nodes whose log the keeper has compared with the index."""
        return [node for node in self.readable() if node.id in self._admitted]

    async def start(self, admit: Admit) -> None:
        """Opens all nodes. `admit` compares a node that was opened with the index, before it takes any mail."""
        self._admit = admit
        for node in self.nodes.values():
            await self._check(node)

    def place(self) -> list[StorageNode]:
        """Nodes for a new message, in order. Raises NotRedundant when fewer than R groups take mail (P6)."""
        candidates = self._look()
        if len(self._orders) < limits.PLACEMENT_DRAWS:
            order = self._draw(candidates)
            self._orders.append(order)
        else:
            self._drawn = (self._drawn + 1) % limits.PLACEMENT_DRAWS
            order = self._orders[self._drawn]
        return list(order)

    def _draw(self, candidates: Sequence[Candidate]) -> list[StorageNode]:
        draws = [self._world.entropy.uniform(0.0, 1.0) for _ in candidates]
        order = place(candidates, self.copies_required, self._policy, draws)
        if not order:
            groups = len({candidate.group for candidate in candidates})
            raise NotRedundant(f"{groups} of {self.copies_required} groups take mail")
        return [self.nodes[name] for name in order]

    def takes_mail(self) -> bool:
        """True if enough groups are writable."""
        self._look()
        return self._enough

    def _look(self) -> list[Candidate]:
        """The nodes that take mail, with figures at most PLACEMENT_LOOK_S old; a node that stops is noticed at once."""
        now = self._world.clock.monotonic()
        if self._enough and now - self._looked_at < limits.PLACEMENT_LOOK_S:
            for node in self._takers:
                if node.state is not NodeState.READ_WRITE:
                    break
            else:
                return self._candidates
        self._looked_at = now
        self._orders.clear()
        self._takers = [n for n in self.nodes.values() if n.state is NodeState.READ_WRITE and n.id in self._admitted]
        self._candidates = []
        for node in self._takers:
            stat = node.stat()
            if stat.write_s >= limits.NODE_SLOW_S:
                self.note_slow(node.id)
            self._candidates.append(
                Candidate(node.id, node.group, node.priority, stat.free_octets, stat.waiting_octets, self.is_slow(node.id))
            )
        self._enough = len({node.group for node in self._takers}) >= self.copies_required
        return self._candidates

    def note_slow(self, node: str) -> None:
        """A write, read or probe took too long there: for a while the node is used last (P20)."""
        if not self.is_slow(node):
            self._world.counters.add("cluster.slow")
            self._world.log.event(Event.NODE_STATE, node=node, state="slow")
        self._slow_until[node] = self._world.clock.monotonic() + limits.NODE_SLOW_REMEMBERED_S

    def is_slow(self, node: str) -> bool:
        """True while a node is used last."""
        return self._world.clock.monotonic() < self._slow_until.get(node, 0.0)

    async def check_health(self) -> float:
        """One round of probes; tries to open what is away. Returns the pause to the next round."""
        await asyncio.gather(*(self._check(node) for node in self.nodes.values()))
        return limits.NODE_PROBE_INTERVAL_S

    async def _check(self, node: StorageNode) -> None:
        async with self._checking[node.id]:  # one at a time: two would admit a node by turns
            await self._check_now(node)

    async def _check_now(self, node: StorageNode) -> None:
        try:
            if node.state in (NodeState.MISSING, NodeState.OPENING):
                self._admitted.pop(node.id, None)
                self._looked_at = float("-inf")
                await node.open()
            elif node.state is not NodeState.CLOSED:
                self._look()
                await node.probe()
                if node.stat().probe_s >= limits.NODE_SLOW_S:
                    self.note_slow(node.id)
            if node.id not in self._admitted and self._admit is not None and node.state not in _AWAY:
                await self._admit(node)
                self._admitted[node.id] = None
                self._looked_at = float("-inf")
        except (Trouble, OperatorError) as error:
            if node.state not in _AWAY and node.id not in self._admitted and self._refused.get(node.id) != str(error):
                self._refused[node.id] = str(error)  # once per change of state
                self._world.log.event(Event.TROUBLE, node=node.id, error=str(error))

    async def close(self) -> None:
        """Closes all nodes."""
        for node in self.nodes.values():
            await node.close()
