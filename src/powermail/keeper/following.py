"""Owns following the layout: a process reads it at its start and then once a second, and goes by it without a restart.

The last one is kept in the data directory (`storage.layout` has its form), so that a process goes on with it, and also starts
with it, while the database is away (P14). An index that shows an older one than is known here has lost changes: they are put
back. Nodes of the settings enter the layout by themselves; what the settings say of one counts again only when they change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.remote import RemoteNode
from powermail.index.contract import Index
from powermail.storage.contract import StorageNode
from powermail.storage.layout import (
    NO_LAYOUT,
    Layout,
    LayoutChange,
    Standing,
    format_layout,
    keep_layout,
    may_be_lost,
    parse_layout,
)

TOLD_BETWEEN = "\t"  # group, priority, address and site, as the settings say them
_TOLD = 4


def told(group: str, priority: int, address: str, site: str = "") -> str:
    """What the settings say of a node, as it is remembered in its row. Without a site it is what the release before says of the
    same settings: else each of two that run side by side took the other's word for a change (P19).
    """
    return TOLD_BETWEEN.join([group, str(priority), address, *([site] if site else [])])


class LayoutFollower:
    """Keeps a cluster's view at the layout of the index."""

    def __init__(self, world: World, cluster: Cluster, index: Index, path: str) -> None:
        """`path` is the file in which the last layout is kept."""
        self._world = world
        self._cluster = cluster
        self._index = index
        self._path = path
        self._lane = world.lane("layout")
        self._kept = 0  # version in the file
        self._fence = 0  # oldest version that anybody may go by, as the index said last
        self._told: Sequence[LayoutChange] = ()  # what the settings say, until the index has taken it
        self._spread: dict[str, tuple[int, int]] = {}  # node to the version that its machine was told, and in which session

    def close(self) -> None:
        """Lets go of its lane."""
        self._lane.close()

    async def start(self, said: Sequence[LayoutChange]) -> None:
        """Goes by the layout of the index, or by the last one that was kept if the index does not answer; `said` is what the
        settings say of nodes. Raises IndexTrouble if neither is there.
        """
        self._told = said
        known = await self._lane.run(self._read)
        try:
            await self._take(known)
        except IndexTrouble as error:
            if known is NO_LAYOUT:
                raise
            self._world.log.event(Event.TROUBLE, worker="layout", error=str(error), kept=f"layout {known.version}")
            self._cluster.apply(known)
        expelled = {row.id for row in self._cluster.layout.rows if row.state is Standing.EXPELLED}
        for change in said:
            if change.id in expelled:  # also one that is new, and has the name of an old one
                why = f"the settings name it, and it was expelled; emptied, `powermail node replace {change.id}` lets it in"
                self._world.log.event(Event.TROUBLE, worker="layout", node=change.id, error=why)

    def _read(self) -> Layout:
        if not self._world.disk.exists(self._path):
            return NO_LAYOUT
        try:
            known = parse_layout(self._world.disk.read_file(self._path), self._index.cluster)
        except (OSError, ValueError) as error:
            self._world.log.event(Event.TROUBLE, worker="layout", error=f"{self._path}: {error}")
            return NO_LAYOUT
        self._kept = known.version
        return known

    async def step(self) -> float:
        """One look, by one cheap query. Raises IndexTrouble, OSError."""
        if self._told or await self._index.layout_version() != self._cluster.layout.version:
            await self._take(self._cluster.layout)
        await self._keep()
        return limits.LAYOUT_LOOK_S

    async def refresh(self) -> Layout:
        """Takes over at once what this process has changed; the layout now. Raises IndexTrouble."""
        await self._take(self._cluster.layout)
        return self._cluster.layout

    async def _take(self, known: Layout) -> None:
        layout = await self._index.layout()
        if may_be_lost(known, layout):
            found, layout = layout, await self._index.restore_layout(known)
            if layout != found and layout.rows == known.rows:
                self._world.counters.add("cluster.layouts_restored")
                self._world.log.event(
                    Event.TROUBLE, worker="layout", error="the index has lost changes of the layout: put back"
                )
        layout = await self._enter(layout)
        self._cluster.apply(layout)
        try:
            await self._keep()
        except OSError as error:
            self._world.log.event(Event.TROUBLE, worker="layout", error=f"{self._path}: {error}")

    async def _enter(self, layout: Layout) -> Layout:
        """Nodes of the settings that are new to the layout, or of which the settings say something new, are entered."""
        while changes := [change for change in self._told if _is_news(layout, change)]:
            rows = {row.id: row.blocked for row in await self._index.node_rows()}
            known = {row.id: row for row in layout.rows}
            entered = []
            for change in changes:
                if change.id in known:
                    entered.append(_said_anew(known[change.id].told, change))
                else:  # blocked, as the release before remembered it
                    entered.append(change._replace(state=Standing.BLOCKED) if rows.get(change.id) else change)
            layout = await self._index.change_layout(entered, layout.version) or await self._index.layout()
        self._told = ()
        return layout

    async def _keep(self) -> None:
        layout = self._cluster.layout
        if layout.version != self._kept:
            octets = format_layout(layout, self._index.cluster)
            await self._lane.run(keep_layout, self._world.disk, self._path, layout.version, octets)
            self._kept = layout.version

    def learn(self, version: int, octets: bytes) -> None:
        """A node refused this process because it knows of a newer layout: that is gone by, also while the database is away."""
        if version <= self._cluster.layout.version:
            return
        try:
            self._cluster.apply(parse_layout(octets, self._index.cluster))
        except ValueError as error:
            self._world.log.event(Event.TROUBLE, worker="layout", error=f"a node knows of layout {version}: {error}")

    # -- machines of nodes ----------------------------------------------------------------------------------------------

    async def spread(self) -> float:
        """The step of a keeper's worker: the machines of nodes know the layout, for those who are cut off from the database."""
        if self._owed():
            try:  # one that was away is told of what there is now, and may have missed a fence
                self._fence = await self._index.layout_fence()
                await self.refresh()
            except IndexTrouble as error:  # it hears what is known here (P14)
                self._world.log.event(Event.TROUBLE, worker="spread", error=str(error))
            await self._tell_all(self._owed(), self._fence)  # who could not be told is told in the next turn
        return limits.LAYOUT_LOOK_S

    def _owed(self) -> list[StorageNode]:
        version = self._cluster.layout.version
        return [node for node in self._cluster.readable() if self._spread.get(node.id) != (version, _session(node))]

    async def fence(self, node: StorageNode) -> None:
        """The layout is durable on a node's machine, which refuses from now on who goes by an older one: nothing of theirs is
        still to be written when this returns. In one process all go by one layout. Raises NodeTrouble.
        """
        await self._tell(node, self._cluster.layout.version)

    async def _tell(self, node: StorageNode, fence: int) -> None:
        layout, session = self._cluster.layout, _session(node)
        if isinstance(node, RemoteNode):
            octets = format_layout(layout, self._index.cluster)
            version, _, newer = await node.set_layout(layout.version, fence, octets)
            if newer:
                self.learn(version, newer)
        self._spread[node.id] = layout.version, session

    async def fence_all(self) -> list[str]:
        """`fence` on every node that is there, all at once; why some could not be told. `spread` does it where one was away."""
        return await self._tell_all(self._cluster.readable(), self._cluster.layout.version)

    async def _tell_all(self, nodes: Sequence[StorageNode], fence: int) -> list[str]:
        fence = min(fence, self._cluster.layout.version)

        async def tell(node: StorageNode) -> str:
            try:
                async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                    await self._tell(node, fence)
            except (NodeTrouble, OperatorError, TimeoutError) as error:
                return f"node {node.id} was not told: {error or 'no answer in time'}"
            return ""

        return [why for why in await asyncio.gather(*(tell(node) for node in nodes)) if why]


def _session(node: StorageNode) -> int:
    """Another one when another process may serve it, which was told nothing."""
    return node.session if isinstance(node, RemoteNode) else 0


def _said_anew(told: str, change: LayoutChange) -> LayoutChange:
    """Of what the settings say only that which they did not say before: the rest is the operator's since."""
    before, now = _words(told), _words(change.told or "")
    if len(before) != _TOLD or len(now) != _TOLD:
        return change
    group, priority, address, site = (old != new for old, new in zip(before, now, strict=True))
    return change._replace(
        group=change.group if group else None,
        priority=change.priority if priority else None,
        address=change.address if address else None,
        site=(change.site or "") if site else None,
    )


def _words(told: str) -> list[str]:
    words = told.split(TOLD_BETWEEN)
    return [*words, ""] if len(words) == _TOLD - 1 else words


def _is_news(layout: Layout, change: LayoutChange) -> bool:
    """True if the settings say of a node what they did not say before. One that was expelled stays so whatever they say."""
    row = next((row for row in layout.rows if row.id == change.id), None)
    return row is None or (row.state is not Standing.EXPELLED and row.told != (change.told or ""))
