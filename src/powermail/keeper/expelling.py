"""Owns telling the nodes who was expelled: a certificate outlives its holder's membership by weeks, and nodes ask no index.

A node remembers durably what it was told, and cuts off who is connected. It is told at once by who expels, and by a keeper
until it has heard; again whenever it was connected anew, because another process may serve it since, that was told nothing.
"""

from __future__ import annotations

import asyncio

from powermail.base import limits
from powermail.base.errors import NodeTrouble, OperatorError, Trouble
from powermail.cluster.cluster import Cluster
from powermail.cluster.remote import RemoteNode
from powermail.index.contract import Index


class Expeller:
    """Tells nodes of other machines."""

    def __init__(self, cluster: Cluster, index: Index) -> None:
        self._cluster = cluster
        self._index = index
        self._told: dict[str, tuple[RemoteNode, int, tuple[str, ...]]] = {}  # node to (itself, its session, ids)

    async def step(self) -> float:
        """A worker's. Raises Trouble that names the nodes that are there and were not told, and why."""
        if missed := await self.tell_all():
            raise Trouble("; ".join(missed))
        return limits.EXPELLED_LOOK_S

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
        if not ids or self._told.get(node.id) == known:
            return ""
        try:
            async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                await node.expel(ids)
        except (NodeTrouble, OperatorError, TimeoutError) as error:
            return f"node {node.id} was not told who is expelled: {error or 'no answer in time'}"
        self._told[node.id] = known
        return ""
