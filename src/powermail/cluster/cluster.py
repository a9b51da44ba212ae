"""Owns the view of all nodes: who is there, who takes mail, health probes, reopening what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import NodeTrouble, NotRedundant, OperatorError
from powermail.base.world import World
from powermail.cluster.placement import Candidate, place
from powermail.storage.contract import NodeState, StorageNode


class Cluster:
    """The nodes of a cluster as one front end sees them."""

    def __init__(self, world: World, nodes: Sequence[StorageNode], copies_required: int, policy: str) -> None:
        self.nodes: dict[str, StorageNode] = {node.id: node for node in nodes}
        self.copies_required = copies_required
        self._world = world
        self._policy = policy

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
        away = (NodeState.MISSING, NodeState.CLOSED, NodeState.OPENING)
        return [node for node in self.nodes.values() if node.state not in away]

    def place(self) -> list[StorageNode]:
        """Nodes for a new message, in order. Raises NotRedundant when fewer than R groups take mail (P6)."""
        candidates = []
        draws = []
        for node in self.nodes.values():
            if node.state is NodeState.READ_WRITE:
                stat = node.stat() if self._policy != "random" else None
                candidates.append(
                    Candidate(
                        node.id,
                        node.group,
                        node.priority,
                        stat.free_octets if stat else 0,
                        stat.waiting_octets if stat else 0,
                    )
                )
                draws.append(self._world.entropy.uniform(0.0, 1.0))
        order = place(candidates, self.copies_required, self._policy, draws)
        if not order:
            groups = len({candidate.group for candidate in candidates})
            raise NotRedundant(f"{groups} of {self.copies_required} groups take mail")
        return [self.nodes[name] for name in order]

    def takes_mail(self) -> bool:
        """True if enough groups are writable."""
        groups = {node.group for node in self.nodes.values() if node.state is NodeState.READ_WRITE}
        return len(groups) >= self.copies_required

    async def check_health(self) -> float:
        """One round of probes; tries to open what is away. Returns the pause to the next round."""
        await asyncio.gather(*(self._check(node) for node in self.nodes.values()))
        return limits.NODE_PROBE_INTERVAL_S

    async def _check(self, node: StorageNode) -> None:
        try:
            if node.state in (NodeState.MISSING, NodeState.OPENING):
                await node.open()
            elif node.state is not NodeState.CLOSED:
                await node.probe()
        except (NodeTrouble, OperatorError):
            pass  # the node has noted and logged its state

    async def close(self) -> None:
        """Closes all nodes."""
        for node in self.nodes.values():
            await node.close()
