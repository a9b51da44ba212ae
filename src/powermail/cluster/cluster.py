"""Owns the view of all nodes: who is there, who takes mail, one loop of health for each.

A node's trouble, whatever it is, is that node's state with its reason: it takes no mail, the others go on (law 14). Which nodes
there are is the layout's to say, and health never changes it. Nodes come and go while it runs: `nodes` is replaced as a whole,
so that whoever goes through it sees the nodes there were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.deadline import Patience
from powermail.base.errors import IndexTrouble, InvariantBroken, NodeTrouble, NotRedundant, OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.tasks import report_bug
from powermail.base.world import World
from powermail.cluster.placement import Candidate, place, thinned
from powermail.cluster.remote import RemoteNode
from powermail.storage.contract import NodeState, Stamp, StorageNode
from powermail.storage.layout import COUNTS, NO_LAYOUT, Layout, LayoutRow, Standing

Admit = Callable[[StorageNode], Awaitable[None]]
Make = Callable[[LayoutRow], StorageNode | None]  # a node of the layout, not opened yet; None if it is out of reach from here
_READ_WRITE, _ACTIVE = NodeState.READ_WRITE, Standing.ACTIVE  # looked up once: a member of an enumeration is found by a call
_AWAY = (NodeState.MISSING, NodeState.CLOSED, NodeState.OPENING)


class _Opened(NamedTuple):
    """An opening of a node, as it is compared with an index: one that lost commits may know another disk there."""

    incarnation: str
    boot: str
    epoch: int


class _Watched:
    """What is known of one node beside its own state."""

    def __init__(self) -> None:
        self.looking = asyncio.Lock()  # one look at a time: two would admit a node by turns
        self.admitted: _Opened | None = None  # what was compared with the index
        self.provisional = False  # the index could not be asked: it takes mail all the same (P14)
        self.refused: _Opened | None = None  # what may not take part
        self.trouble = ""  # why the last look failed


class Cluster:
    """The nodes of a cluster as one front end sees them."""

    def __init__(
        self,
        world: World,
        nodes: Sequence[StorageNode],
        copies_required: int,
        policy: str,
        make: Make | None = None,
        reserve_octets: int = 0,
        site: str = "",
        apart: bool = True,
    ) -> None:
        """`nodes` are there from the beginning; `make` makes those that a layout names beside them. A node with less free space
        than `reserve_octets` takes no mail. `site` is where this process stands, "" if nobody said; `apart`: the copies of a
        message go into different sites, else into this one first.
        """
        self.nodes: dict[str, StorageNode] = {node.id: node for node in nodes}
        self.layout = NO_LAYOUT
        self.when_changed: list[Callable[[], None]] = []  # called when nodes came or went, or copies go apart or no more
        self.copies_required = copies_required
        self._world = world
        self._policy = policy
        self._make = make
        self._reserve_octets = reserve_octets
        self.site = site
        self.apart = False  # copies of a message go into different sites
        self._wants_apart = apart
        self._sited = False  # there are several sites, and every node says its own: else the first to say so would get all mail
        self.far: frozenset[str] = frozenset()  # nodes that stand in another site than this process, or nobody knows where
        self._rows: dict[str, LayoutRow] = {}
        self._leaving: dict[asyncio.Task[None], str] = {}  # nodes that went, while they are closed
        self._admit: Admit | None = None
        self._epoch: Callable[[], int] = lambda: 0
        self._watched = {node.id: _Watched() for node in nodes}
        self._opening: list[asyncio.Task[float]] = []
        self._closed = False
        self._takers: list[StorageNode] = []  # nodes that took mail when last looked at, with their figures
        self._proof: list[StorageNode] = []  # of them, one of each of R groups: while these are well, there are enough
        self._candidates: list[Candidate] = []
        self._looked_at = float("-inf")
        self._enough = False
        self._slow_until: dict[str, float] = {}
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

    def site_of(self, name: str) -> str:
        """Where a node stands, "" if nobody said."""
        row = self._rows.get(name)
        return row.site if row is not None else ""

    def standing(self, name: str) -> Standing:
        """What the layout says of a node; without one all that there are are active."""
        row = self._rows.get(name)
        if row is None:
            return Standing.EXPELLED if self.layout.version else _ACTIVE
        return row.state

    def counted(self) -> dict[str, str]:
        """Node to group of those whose copies count for redundancy: not of nodes that are about to go."""
        return {name: group for name, group in self.groups().items() if self.standing(name) in COUNTS}

    def counted_there(self) -> dict[str, str]:
        """Of those, nodes that are there: because of what is away, and may not come back, nothing is let go."""
        counted = self.counted()
        return {node.id: node.group for node in self.admitted() if node.id in counted}

    def shown_state(self, node: StorageNode) -> str:
        """The word for what a node does now: one that could take mail, and is not to, is what the layout says."""
        standing = self.standing(node.id)
        taken = node.state is NodeState.READ_WRITE and standing is not Standing.ACTIVE
        return standing.value if taken else node.state.value

    def takes(self, node: StorageNode) -> bool:
        """True if this process would place a copy there now: it is well, was compared with the index, and gives stamps."""
        return self._takes(node)

    @staticmethod
    def states() -> list[str]:
        """All words that `shown_state` may say."""
        return [*[state.value for state in NodeState], Standing.DRAINING.value, Standing.LEAVING.value]

    def is_writable(self, node: StorageNode) -> bool:
        """True if a node takes new copies: the layout has it so, and it is well."""
        return node.state is _READ_WRITE and self.standing(node.id) is _ACTIVE

    # -- the layout -----------------------------------------------------------------------------------------------

    def apply(self, layout: Layout) -> None:
        """Goes by this layout from now on, without a restart; one that is no newer than the last changes nothing.

        New nodes are made, and opened by their own loops. Nodes that are no members any more, or that have another address, are
        closed behind what they still do: what was asked of them goes on to its end, and counts as it did then.
        """
        if layout.version <= self.layout.version:
            return
        before, self.layout = self.nodes, layout
        rows = {row.id: row for row in layout.members()}
        nodes: dict[str, StorageNode] = {}
        for row in rows.values():
            known, node = self._rows.get(row.id), before.get(row.id)
            if known is not None and known.address != row.address and isinstance(node, RemoteNode):
                node = None  # it is reached elsewhere now
            if node is None and self._make is not None:
                node = self._make(row)
            if node is None:
                continue
            node.group, node.priority = row.group, row.priority
            if isinstance(node, RemoteNode):
                node.follow(layout.version)  # its machine refuses who goes by an older one than it was told
            nodes[row.id] = node
        self._rows = rows
        self.far = frozenset(name for name, row in rows.items() if self.site and row.site != self.site)
        sites = {row.site for row in rows.values() if row.state in COUNTS}
        self._sited = len(sites) > 1 and "" not in sites
        went_apart, self.apart = self.apart, self._wants_apart and self._sited
        for name, node in nodes.items():
            if before.get(name) is not node:
                self._watched[name] = _Watched()
        self.nodes = nodes
        self._looked_at, self._enough = float("-inf"), False
        for name, node in before.items():
            if nodes.get(name) is not node:
                self._let_go(node)
        self._world.log.event(Event.LAYOUT, version=layout.version, nodes=" ".join(nodes))
        if nodes.keys() != before.keys() or self._leaving or self.apart is not went_apart:
            for tell in self.when_changed:
                tell()

    def _let_go(self, node: StorageNode) -> None:
        async def closing() -> None:
            try:
                await node.close()
            except (Trouble, OSError) as error:
                self._world.log.event(Event.TROUBLE, node=node.id, error=str(error))

        task = asyncio.get_running_loop().create_task(closing(), name=f"let go of {node.id}")
        self._leaving[task] = node.id
        task.add_done_callback(lambda done: self._leaving.pop(done, None))

    # -- who is there ---------------------------------------------------------------------------------------------

    def readable(self) -> list[StorageNode]:
        """Nodes that serve reads, in order of id."""
        return [node for node in self.nodes.values() if node.state not in _AWAY]

    def find_readable(self, name: str) -> StorageNode | None:
        """A node that serves reads; None if it does not."""
        node = self.nodes.get(name)
        return node if node is not None and node.state not in _AWAY else None

    def admitted(self) -> list[StorageNode]:
        """Readable nodes whose log the keeper has compared with the index."""
        return [node for node in self.readable() if self._watched[node.id].admitted is not None]

    def trouble(self, name: str) -> str:
        """Why a node takes no part although it is configured: it cannot be opened, probed or admitted; "" if it does."""
        return self._watched[name].trouble if name in self._watched else ""

    def stamps(self, nodes: Sequence[StorageNode]) -> dict[str, Stamp]:
        """The stamps that these nodes have now, to be frozen for a delivery (law 2); who has none is left out."""
        return {node.id: stamp for node in nodes if (stamp := node.stamp()) is not None}

    def place(self) -> list[StorageNode]:
        """Nodes for a new message, in order. Raises NotRedundant when fewer than R groups take mail (P6)."""
        order = self._next(self._look())
        if any(node.state is not _READ_WRITE for node in order[: self.copies_required]):  # it stopped since
            self._looked_at = float("-inf")
            order = self._next(self._look())
        return list(order)

    def _next(self, candidates: Sequence[Candidate]) -> list[StorageNode]:
        if len(self._orders) < limits.PLACEMENT_DRAWS:
            order = self._draw(candidates)
            self._orders.append(order)
            return order
        self._drawn = (self._drawn + 1) % limits.PLACEMENT_DRAWS
        return self._orders[self._drawn]

    def _draw(self, candidates: Sequence[Candidate]) -> list[StorageNode]:
        draws = [self._world.entropy.uniform(0.0, 1.0) for _ in candidates]
        order = place(candidates, self.copies_required, self._policy, draws, self._wants_apart)
        if not order:
            groups = len({candidate.group for candidate in candidates})
            raise NotRedundant(f"{groups} of {self.copies_required} groups take mail")
        return [self.nodes[name] for name in order[: self.copies_required + limits.PLACEMENT_SPARES]]

    def takes_mail(self) -> bool:
        """True if enough groups are writable."""
        if any(node.state is not _READ_WRITE for node in self._proof):
            self._looked_at = float("-inf")
        self._look()
        return self._enough

    def _look(self) -> list[Candidate]:
        """The nodes that take mail, or some of many, with figures at most PLACEMENT_LOOK_S old, or older where there are very
        many: what it costs does not grow with them.
        """
        now = self._world.clock.monotonic()
        held_s = limits.PLACEMENT_LOOK_S * max(1.0, len(self._takers) / limits.PLACEMENT_NODES)
        if self._enough and now - self._looked_at < held_s:
            return self._candidates
        self._looked_at = now
        self._orders.clear()
        self._takers = [node for node in self.nodes.values() if self._takes(node)]
        self._candidates = []
        for node in self._takers:
            stat = node.stat()
            if stat.write_s >= limits.NODE_SLOW_S:
                self.note_slow(node.id)
            self._candidates.append(
                Candidate(
                    node.id,
                    node.group,
                    node.priority,
                    stat.free_octets - self._reserve_octets,
                    stat.waiting_octets,
                    self.is_slow(node.id),
                    self.site_of(node.id) if self._sited else "",
                    self._sited and node.id in self.far,
                )
            )
        groups = {node.group: node for node in self._takers}
        self._enough = len(groups) >= self.copies_required
        self._proof = list(groups.values())[: self.copies_required]
        if len(self._candidates) > limits.PLACEMENT_OF_A_KIND:
            draws = [self._world.entropy.uniform(0.0, 1.0) for _ in self._candidates]
            self._candidates = thinned(self._candidates, draws)
        return self._candidates

    def _takes(self, node: StorageNode) -> bool:
        watched = self._watched[node.id]
        if not self.is_writable(node) or watched.trouble or node.stat().free_octets < self._reserve_octets:
            return False
        if watched.admitted is None and not watched.provisional:
            return False
        return node.stamp() is not None  # law 2

    def note_slow(self, node: str) -> None:
        """A write, read or probe took too long there: for a while the node is used last (P20)."""
        if not self.is_slow(node):
            self._world.counters.add("cluster.slow")
            self._world.log.event(Event.NODE_STATE, node=node, state="slow")
        self._slow_until[node] = self._world.clock.monotonic() + limits.NODE_SLOW_REMEMBERED_S

    def is_slow(self, node: str) -> bool:
        """True while a node is used last."""
        return self._world.clock.monotonic() < self._slow_until.get(node, 0.0)

    # -- health ---------------------------------------------------------------------------------------------------

    async def start(self, admit: Admit, wait_s: float = limits.NODE_OPEN_WAIT_S, epoch: Callable[[], int] = lambda: 0) -> None:
        """Opens all nodes, each by itself, and waits a while for the slow ones: they go on opening while the others serve.

        `admit` compares a node that was opened with the index. It raises IndexTrouble if that cannot be known now, anything
        else if the node may not take part. `epoch` is the index's: in each that begins, every node is compared anew (law 12).
        """
        self._admit, self._epoch = admit, epoch
        if not self.nodes:
            return
        create = asyncio.get_running_loop().create_task
        self._opening = [create(self.watch(node), name=f"open {node.id}") for node in self.nodes.values()]
        await asyncio.wait(self._opening, timeout=wait_s)
        for task in self._opening:
            if task.done():
                task.result()
            else:
                self._world.log.event(Event.TROUBLE, task=task.get_name(), error="takes long; the other nodes serve meanwhile")
                task.add_done_callback(_retrieve)  # its own loop looks again, and finds the same

    async def watch(self, node: StorageNode) -> float:
        """One look at a node: opens it if it is away, else probes it; admits it if it is not. The pause to the next look.

        Raises nothing but InvariantBroken: any other exception is this node's trouble (law 14).
        """
        if self.nodes.get(node.id) is not node:
            return limits.NODE_PROBE_INTERVAL_S  # it went: its loop ends soon
        watched = self._watched[node.id]
        async with watched.looking:
            if self._closed or self.nodes.get(node.id) is not node:
                return limits.NODE_PROBE_INTERVAL_S
            try:
                await self._look_at(node, watched)
                trouble = ""
            except InvariantBroken:
                raise
            except (Trouble, OperatorError, OSError) as error:
                trouble = str(error) or type(error).__name__
            except Exception as error:  # noqa: BLE001  law 14: whatever it is, it is this node's
                trouble = f"{type(error).__name__}: {error}"
                if trouble != watched.trouble:
                    report_bug(self._world.log, error, f"node {node.id}")
            if trouble != watched.trouble:  # once per change of state
                watched.trouble = trouble
                self._looked_at = float("-inf")
                self._world.log.event(Event.TROUBLE, node=node.id, error=trouble or None, over=not trouble or None)
        return limits.NODE_PROBE_INTERVAL_S

    async def _look_at(self, node: StorageNode, watched: _Watched) -> None:
        if node.state in _AWAY:
            watched.admitted, watched.provisional = None, False
            self._looked_at = float("-inf")
            await node.open()
        else:
            if node.state is NodeState.FAILED:
                await node.open()  # what can be made anew is; fine if there is nothing to do
            self._look()
            await node.probe()
            if node.stat().probe_s >= limits.NODE_SLOW_S:
                self.note_slow(node.id)
        if self._admit is not None and node.state not in _AWAY and watched.admitted != self._opened_as(node, watched):
            await self._admission(node, watched, self._admit)

    def _opened_as(self, node: StorageNode, watched: _Watched) -> _Opened:
        """Which opening of which incarnation this is; a node that has no stamp now is still the one it was."""
        stamp = node.stamp()
        known = watched.admitted or watched.refused
        boot = stamp.boot if stamp is not None else known.boot if known else ""
        return _Opened(node.incarnation, boot, self._epoch())

    async def _admission(self, node: StorageNode, watched: _Watched, admit: Admit) -> None:
        """One that was admitted in an epoch that is over stays so until it is known whether it still may."""
        epoch, before = self._epoch(), watched.admitted
        if before is not None and before._replace(epoch=epoch) != self._opened_as(node, watched):
            watched.admitted = None
        try:
            await admit(node)
        except IndexTrouble as error:
            if watched.refused is not None and watched.refused._replace(epoch=self._epoch()) == self._opened_as(node, watched):
                raise  # it was found out before why it may not take part
            if watched.admitted is None and not watched.provisional:
                watched.provisional = True  # P14: it may take mail; admitted when the index answers
                self._world.log.event(Event.TROUBLE, node=node.id, error=f"not compared with the index yet: {error}")
        except Exception:
            watched.admitted, watched.provisional = None, False
            watched.refused = self._opened_as(node, watched)
            raise
        else:
            watched.admitted = self._opened_as(node, watched)._replace(epoch=epoch)  # what it was compared in
            watched.provisional, watched.refused = False, None
        finally:
            self._looked_at = float("-inf")

    async def close(self) -> None:
        """Closes all nodes at once; who does not answer is left behind after a while (law 14)."""
        self._closed = True
        self._looked_at = float("-inf")
        for opening in self._opening:
            opening.cancel()
        if self._leaving:
            await asyncio.wait(list(self._leaving), timeout=2 * limits.NODE_CALL_TIMEOUT_S)
        if not self.nodes:
            return
        closing = {asyncio.ensure_future(node.close()): node for node in self.nodes.values()}
        await asyncio.wait(closing, timeout=2 * limits.NODE_CALL_TIMEOUT_S)
        for task, node in closing.items():
            late = task.cancel()
            error = NodeTrouble("it did not close in time") if late or task.cancelled() else task.exception()
            if error is not None:
                self._world.log.event(Event.TROUBLE, node=node.id, error=f"{type(error).__name__}: {error}")


def _retrieve(task: asyncio.Task[float]) -> None:
    """An exception of a task that nobody waits for any more counts as seen."""
    if not task.cancelled():
        task.exception()
