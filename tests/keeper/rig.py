"""Puts keepers, an index and nodes together in memory and in virtual time, and lets tests do to them what machines suffer."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any

from powermail.base.errors import Trouble
from powermail.base.log import MemoryLog
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.index.contract import Delivery, Fate, Head, NodeRow, Outcome
from powermail.index.memory import MemoryIndex, MemoryStore
from powermail.keeper.admission import Admission
from powermail.keeper.checkpoint import heads
from powermail.keeper.collect import Collector
from powermail.keeper.compact import Compactor
from powermail.keeper.epochs import EpochKeeper, Marker
from powermail.keeper.forget import Forgetter
from powermail.keeper.reconcile import Reconciler
from powermail.keeper.repair import Repairer
from powermail.keeper.scrub import Scrubber
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.sim.disk import SimDisk
from powermail.sim.lane import SimLane
from powermail.sim.loop import run
from powermail.sim.memory import MemoryNode
from powermail.sim.net import SimNetwork
from powermail.sim.world import SimClock, SimEntropy
from powermail.storage.contract import Chunk, Held, NodeState, Origin, Receipt, StorageNode

NODES = {"a": "north", "b": "south", "c": "west"}
HOUR_S = 3600.0
DAY_S = 86_400.0


def go(work: Callable[[Rig], Coroutine[Any, Any, None]], nodes: dict[str, str] | None = None, copies: int = 2) -> None:
    """Runs a test in virtual time on a rig that has started."""

    async def body() -> None:
        rig = Rig(nodes or NODES)
        rig.copies_required = copies
        await rig.start()
        await work(rig)

    complaints: list[str] = []
    run(body(), 1, complaints.append)
    assert not complaints, complaints


def two(work: Callable[[Rig, Rig], Coroutine[Any, Any, None]]) -> None:
    """Runs a test in virtual time on two processes with one index and the same nodes, each with all keepers."""

    async def body() -> None:
        one = Rig(NODES)
        one.alone = False
        await one.start()
        await work(one, await one.beside())

    complaints: list[str] = []
    run(body(), 1, complaints.append)
    assert not complaints, complaints


class Rig:
    """Nodes that stay, and a process (index, cluster, keepers) that can end and start again."""

    alone = True  # as where one process alone writes
    copies_required = 2

    def __init__(self, nodes: dict[str, str]) -> None:
        chance = random.Random(1)
        self.log = MemoryLog()
        self.world = World(
            SimClock(),
            SimDisk(),
            SimNetwork(chance).named("server"),
            SimEntropy(chance),
            lambda name: SimLane(lambda: 0.001, lambda: True),
            self.log,
        )
        self.nodes = {name: MemoryNode(name, group) for name, group in nodes.items()}
        self.store = MemoryStore()
        self.heads: dict[str, list[Head]] = {}
        self.made = 0

    async def start(self) -> None:
        """A new process: opens what is there."""
        self.index = MemoryIndex(self.world, self.store, self.alone)
        await self.index.open("00" * 16)
        self.cluster = Cluster(self.world, list(self.nodes.values()), self.copies_required, "random")
        self.fetcher = Fetcher(self.world, self.cluster, self.index.note_bad)
        self.epochs = EpochKeeper(self.world, self.cluster, self.index, self.read_heads)
        self.marker = Marker(self.world, self.cluster, self.index)
        self.admission = Admission(self.world, self.cluster, self.index, self.epochs)
        self.reconciler = Reconciler(self.world, self.cluster, self.index, self.epochs)
        self.forgetter = Forgetter(self.world, self.cluster, self.index, self.reconciler)
        self.collector = Collector(self.world, self.cluster, self.index)
        self.repairer = Repairer(self.world, self.cluster, self.index, self.fetcher, 300.0)
        self.scrubber = Scrubber(self.world, self.cluster, self.index, self.epochs, "/scrub.json")
        self.compactor = Compactor(self.world, self.cluster, self.index, 30)
        await self.cluster.start(self.admission.admit, epoch=lambda: self.index.epoch)

    async def beside(self) -> Rig:
        """A second process on the same nodes and the same index."""
        other = copy.copy(self)
        await other.start()
        return other

    async def restart(self, backup: Any = None, away: str = "") -> None:
        """The process ends without a word; perhaps an older index is put back, or nodes are away; it starts again."""
        await self.cluster.close()
        for node in away:
            self.away(node)
        await self.index.close()
        if backup is not None:
            self.store.restore(backup)
        await self.start()

    async def read_heads(self, node: StorageNode) -> AsyncIterator[list[Head]]:
        """What checkpoints of a node say."""
        yield self.heads.get(node.id, [])
        async for page in heads(node):
            yield page

    # -- mail ---------------------------------------------------------------------------------------------------------

    def commit(self, octets: bytes = b"Subject: x\r\n\r\nhello\r\n") -> bytes:
        """A commit record."""
        commit = Commit(
            octets=len(octets),
            sha256=hashlib.sha256(octets).hexdigest(),
            sizes=[len(octets)],
            received_at=self.world.clock.now(),
            envelope=Envelope(),
            targets=[Target(account="amy")],
        )
        return commit.format()

    def key(self) -> bytes:
        """A new message key."""
        return self.world.keys.next()

    async def put(self, node: str, key: bytes, origin: Origin = Origin.DELIVERY) -> Receipt:
        """A copy on one node that the index is not told of."""
        there = self.nodes[node]
        stamp = there.stamp() if origin is Origin.DELIVERY else None
        octets = b"Subject: x\r\n\r\nhello\r\n"
        return await there.commit(key, [Chunk(0, 0, octets, len(octets))], self.commit(), 1, stamp, origin)

    async def deliver(self, nodes: Iterable[str] = "ab", key: bytes = b"") -> bytes:
        """An acknowledged message."""
        key = key or self.key()
        receipts = tuple([await self.put(node, key) for node in nodes])
        commit = Commit.parse(self.commit())
        assert await self.index.deliver(Delivery(key, commit, receipts)) is Outcome.ENTERED
        return key

    async def delete(self, key: bytes) -> None:
        """A reader expunges a message."""
        mailbox = await self.index.find_mailbox("amy", "INBOX")
        assert mailbox is not None
        uids = [entry.uid for entry in await self.index.entries(mailbox.id, 0, 1 << 32, 10_000) if entry.key == key]
        assert (await self.index.expunge(mailbox.id, uids)).dead == 1

    async def listed(self) -> list[bytes]:
        """Keys in the mailbox."""
        mailbox = await self.index.find_mailbox("amy", "INBOX")
        return [] if mailbox is None else [e.key for e in await self.index.entries(mailbox.id, 0, 1 << 32, 100_000)]

    async def fate(self, key: bytes) -> Fate | None:
        """What the index decided about a key."""
        return (await self.index.fates([key])).get(key)

    async def held(self, node: str, key: bytes) -> Held:
        """What a node says of a key."""
        return (await self.nodes[node].has([key]))[0]

    async def row(self, node: str) -> NodeRow:
        """What the index remembers of a node."""
        return next(row for row in await self.index.node_rows() if row.id == node)

    async def believed(self, key: bytes) -> tuple[str, ...]:
        """Nodes that are believed to hold a copy."""
        facts = await self.index.message(key)
        return () if facts is None else facts.nodes

    # -- keepers ------------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """One look at each node's health."""
        for node in self.nodes.values():
            await self.cluster.watch(node)

    async def reopen(self, node: str) -> None:
        """A node goes away and comes back."""
        await self.nodes[node].close()
        await self.watch()

    def away(self, node: str) -> None:
        """A node's disk is away until `back`."""
        self.nodes[node].miss()
        self.nodes[node].fail_next("open", times=100_000)

    async def back(self, node: str) -> None:
        """It is there again."""
        self.nodes[node]._planned.pop("open", None)
        await self.watch()

    async def each(self, step: Callable[[StorageNode], Awaitable[float]], times: int = 1) -> None:
        """Steps of a job on every node that is there; trouble is that node's."""
        for _ in range(times):
            for node in self.nodes.values():
                if node.state in (NodeState.MISSING, NodeState.CLOSED):
                    continue
                try:
                    await step(node)
                except Trouble as error:
                    self.log.lines.append(f"step on {node.id}: {error}")

    async def keep(self, seconds: float = 300.0) -> None:
        """All keepers for a while, each node in its own loop, as workers would."""
        until = self.world.clock.monotonic() + seconds
        jobs = [
            self._work(self.epochs.step, until),
            self._work(self.forgetter.step, until),
            self._work(self.repairer.step, until),
        ]
        for node in self.nodes.values():
            for step in (
                self.cluster.watch,
                self.marker.step,
                self.admission.step,
                self.reconciler.step,
                self.forgetter.scan,
                self.collector.step,
                self.scrubber.step,
                self.compactor.step,
            ):
                jobs.append(self._work(lambda step=step, node=node: step(node), until))  # type: ignore[misc]
        await asyncio.gather(*jobs)

    async def _work(self, step: Callable[[], Awaitable[float]], until: float) -> None:
        while self.world.clock.monotonic() < until:
            try:
                rest = await step()
            except Trouble as error:
                self.log.lines.append(f"step: {error}")
                rest = 5.0
            await asyncio.sleep(max(0.001, rest))

    def catching_up(self) -> bool:
        """Readers wait."""
        return self.index.catching_up

    def numbering(self) -> bool:
        """Numbers are given."""
        return self.index.numbering

    async def check(self) -> None:
        """What must hold when all is quiet."""
        assert await self.index.audit() == []
