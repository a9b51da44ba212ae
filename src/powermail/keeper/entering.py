"""Owns how a process whose certificate may not read logs comes to serve readers: a keeper enters what they hold (laws 6, 10).

It notes where each log ended when it was compared, says in the index that it waits, and looks until the watermark of each has
come so far. It asks nodes nothing but their facts: a front end needs no right of a keeper, at its start either.
Danger: an end that was noted over another connection to the index, or of another incarnation, proves nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Index
from powermail.keeper.belief import known_row
from powermail.keeper.epochs import EpochKeeper
from powermail.keeper.leases import Leases
from powermail.keeper.reconcile import Reconciler
from powermail.storage.contract import Position, StorageNode

_LOOK_S = 1.0


class _Noted(NamedTuple):
    """Where the log of an incarnation ended when it was compared over this connection to the index."""

    incarnation: str
    connection: int
    end: Position


class Awaiting:
    """The waiting side, one for each process."""

    def __init__(self, world: World, cluster: Cluster, index: Index, epochs: EpochKeeper, leases: Leases) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._epochs = epochs
        self._leases = leases
        self._noted: dict[str, _Noted] = {}
        self._said_at = float("-inf")

    async def start(self, deadline_s: float = limits.NODE_OPEN_WAIT_S) -> None:
        """Waits so long at most; what is left goes on in the background (law 14)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._index.unsettled:
                    with suppress(Trouble):  # said by the worker, if it stays
                        await asyncio.gather(*(self.look(node) for node in self._cluster.admitted()))
                        await self.step()
                    await asyncio.sleep(_LOOK_S / 4 if self._index.unsettled else 0)

    async def look(self, node: StorageNode) -> float:
        """A worker's step for one node. Raises NodeTrouble, IndexTrouble."""
        index = self._index
        if not index.unsettled or index.catching_up or not index.numbering or node not in self._cluster.admitted():
            return _LOOK_S
        connection = index.connection
        facts = await node.facts()
        if await self._epochs.compare(node, facts):  # law 10: marks first
            return _LOOK_S
        noted = self._noted.get(node.id)
        if noted is None or noted[:2] != (facts.incarnation, connection):
            noted = self._noted[node.id] = _Noted(facts.incarnation, connection, facts.end)
        row = await known_row(index, node)
        if row is not None and row.incarnation == noted.incarnation and not row.owes_walk and row.watermark >= noted.end:
            self._epochs.note_settled(node.id, noted.incarnation, connection)
        return _LOOK_S

    async def step(self) -> float:
        """A worker's step: ends the wait of this process's readers when it may, else says that it waits. Raises Trouble."""
        index, now = self._index, self._world.clock.monotonic()
        await self._epochs.tell()  # nothing is leased either while this process alone knows of a loss
        if index.unsettled and now - self._said_at >= limits.PROCESS_NOTE_S:
            await self._leases.wait()
            self._said_at = now
        await self._epochs.step_here()
        if not index.unsettled and self._said_at > float("-inf"):
            self._said_at = float("-inf")
            await self._leases.wait_no_more()
        return _LOOK_S


class Entering:
    """The keeper's side: while a process waits, logs are entered to their ends, however young that is which lies there."""

    def __init__(self, cluster: Cluster, index: Index, reconciler: Reconciler, leases: Leases) -> None:
        self._cluster = cluster
        self._index = index
        self._reconciler = reconciler
        self._leases = leases

    async def step(self) -> float:
        """A worker's step. Raises IndexTrouble. A node in trouble is the business of its own worker `reconcile`."""
        if await self._leases.is_waited_for():
            await asyncio.gather(*(self._enter(node) for node in self._cluster.admitted()))
        return _LOOK_S

    async def _enter(self, node: StorageNode) -> None:
        with suppress(Trouble, TimeoutError):
            async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):  # law 14
                facts = await node.facts()
                row = await known_row(self._index, node)
                if row is not None and row.watermark < facts.end:  # marks alone would not move it
                    await self._reconciler.advance(node, 0.0, facts.end)
