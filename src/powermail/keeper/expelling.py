"""Owns telling the nodes who was expelled: a certificate outlives its holder's membership by weeks, and nodes ask no index.

A node remembers durably what it was told, and cuts off who is connected. It is told at once by who expels, and by a keeper
until it has heard; again whenever it was connected anew, because another process may serve it since, that was told nothing.

An index that was put back, or made anew, has forgotten expulsions that nodes remember: it takes what all of them know. At no
other time: who has stolen a keeper's key can tell nodes what it likes, and not the index. Whom a node refuses although the
index knows of no expulsion is said to the operator.
"""

from __future__ import annotations

import asyncio

from powermail.base import limits
from powermail.base.errors import NodeTrouble, OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.remote import RemoteNode
from powermail.index.contract import Index

_SHOWN = 5  # ids in one message


class Expeller:
    """Tells nodes of other machines, and hears them."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._told: dict[str, tuple[RemoteNode, int, tuple[str, ...]]] = {}  # node to (itself, its session, ids)
        self._strange: dict[str, str] = {}  # by node: whom it refuses without a reason that is known here

    async def step(self) -> float:
        """A worker's. Raises Trouble that names the nodes that are there and were not told, and why; and those that refuse
        somebody whom nobody has expelled.
        """
        await self._hear_all()
        missed = await self.tell_all()
        strange = [why for node, why in sorted(self._strange.items()) if node in self._cluster.nodes]
        if missed or strange:
            raise Trouble("; ".join([*missed, *strange]))
        return limits.EXPELLED_LOOK_S

    async def _hear_all(self) -> None:
        """An index that may have forgotten expulsions takes what nodes know of them. Raises IndexTrouble."""
        nodes = [node for node in self._cluster.nodes.values() if isinstance(node, RemoteNode)]
        if not nodes or await self._index.expelled_known():
            return
        epoch = (await self._index.epoch_facts()).epoch
        known = {holder.identity for holder in await self._index.holders() if holder.expelled_at}
        said = await asyncio.gather(*(self._hear(node) for node in nodes))
        # What was said by nobody but those who are known to be expelled is void.
        fresh = {name for each in said for name, by in (each or {}).items() if not by or not known.issuperset(by)} - known
        taken = await self._index.take_expelled(sorted(fresh), 0 if None in said else epoch)
        if taken:
            self._world.counters.add("keeper.expelled_heard", taken)
            self._world.log.event(Event.EXPELLED, ids=" ".join(sorted(fresh)[:_SHOWN]), told=taken, by="nodes that remember it")

    async def _hear(self, node: RemoteNode) -> dict[str, tuple[str, ...]] | None:
        """None if it cannot be asked now: it is asked again."""
        try:
            async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                return await node.expelled()
        except (NodeTrouble, OperatorError, TimeoutError) as error:
            self._world.log.event(Event.TROUBLE, worker="expelled", node=node.id, error=str(error) or "no answer in time")
            return None

    async def tell_all(self) -> list[str]:
        """Every node that is there hears of all who were expelled, if it has not; those that did not, with the reason. Those
        that are away hear it when they are back. Raises IndexTrouble.
        """
        there = [node for node in self._cluster.readable() if isinstance(node, RemoteNode)]
        if not there:
            return []
        ids = tuple(holder.identity for holder in await self._index.holders() if holder.expelled_at)
        found = await asyncio.gather(*(self._tell(node, ids) for node in there))
        return [why for why in found if why]

    async def _tell(self, node: RemoteNode, ids: tuple[str, ...]) -> str:
        known = node, node.session, ids
        if self._told.get(node.id) == known:
            return ""
        try:
            async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                await node.expel(ids)
        except (NodeTrouble, OperatorError, TimeoutError) as error:
            return f"node {node.id} was not told who is expelled: {error or 'no answer in time'}"
        self._told[node.id] = known
        await self._look_at(node, ids)
        return ""

    async def _look_at(self, node: RemoteNode, ids: tuple[str, ...]) -> None:
        """Whom a node refuses although nobody is known to have expelled them."""
        said = await self._hear(node)
        self._strange.pop(node.id, None)
        if strangers := sorted({*(said or {})} - {*ids}):
            self._world.counters.add("keeper.expelled_strange", len(strangers))
            names = ", ".join(strangers[:_SHOWN]) + (f" and {more} more" if (more := len(strangers) - _SHOWN) > 0 else "")
            self._strange[node.id] = (
                f"node {node.id} refuses {names}, whom nobody has expelled: `powermail cluster expel NAME` if that is right; "
                "else a keeper's key was stolen, and expelling its holder ends it"
            )
