"""Makes worlds in virtual time, clusters of nodes in memory, and messages, for the tests of cluster, message and delivery."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from powermail.base.errors import NodeTrouble
from powermail.base.log import MemoryLog
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.cluster.packing import Packer
from powermail.cluster.replicate import Replication
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.sim.disk import SimDisk
from powermail.sim.lane import SimLane
from powermail.sim.loop import SimLoop
from powermail.sim.memory import MemoryNode
from powermail.sim.net import SimNetwork
from powermail.sim.world import SimClock, SimEntropy
from powermail.storage.contract import Chunk, Origin, Receipt, Stamp


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in virtual time: what takes 20 s takes none. An exception that nobody hears of fails it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        loop = SimLoop(1)
        unheard: list[Any] = []
        loop.set_exception_handler(lambda _, context: unheard.append(context))
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(test(*args, **kwargs))
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            asyncio.set_event_loop(None)
            loop.close()
        assert not unheard

    del run.__wrapped__  # or it would be taken for a coroutine function
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def make_world(seed: int = 1) -> World:
    """A simulated machine; its log is a MemoryLog."""
    chance = random.Random(seed)
    return World(
        SimClock(),
        SimDisk(),
        SimNetwork(chance).named("server"),
        SimEntropy(chance),
        lambda name: SimLane(lambda: 0.0004, lambda: True),
        MemoryLog(),
    )


class Recorder(MemoryNode):
    """A node in memory that remembers with which stamps, and when, it was asked to commit, and how long an append takes."""

    def __init__(self, node: str, group: str, priority: int = 1) -> None:
        super().__init__(node, group, priority)
        self.asked: list[tuple[float, Stamp | None, Origin]] = []
        self.appends: list[float] = []
        self.append_s = 0.0

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        await asyncio.sleep(self.append_s)
        self.appends.append(asyncio.get_running_loop().time())
        await super().append(key, chunks)

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        self.asked.append((asyncio.get_running_loop().time(), stamp, origin))
        return super().commit(key, chunks, commit, count, stamp, origin)


async def admit_all(node: object) -> None:
    """A keeper that finds every node in order."""


async def make_cluster(world: World, *nodes: MemoryNode, copies: int = 2) -> Cluster:
    """A cluster that has started."""
    cluster = Cluster(world, nodes, copies, "random")
    await cluster.start(admit_all)
    return cluster


def three() -> tuple[Recorder, Recorder, Recorder]:
    """Nodes in three groups; with two copies the third is used last."""
    return Recorder("a", "g1"), Recorder("b", "g2"), Recorder("c", "g3", 2)


def replication(cluster: Cluster, key: bytes = b"k" * 16) -> Replication:
    """A message on its way; nothing is compressed, so that its length is what lies on the nodes."""
    return Replication(cluster._world, cluster, Packer(False), key)


def record(octets: int, sha256: str, sizes: list[int]) -> Commit:
    """A commit record for one mailbox."""
    return Commit(
        octets, sha256, list(sizes), 1.5, Envelope("from@elsewhere.example"), [Target(account="7", recipient="to@here.example")]
    )


async def store(cluster: Cluster, key: bytes, octets: bytes) -> tuple[Commit, tuple[Receipt, ...]]:
    """Makes a message durable."""
    message = replication(cluster, key)
    await message.write(octets)
    return await message.commit(record)


def unreachable() -> NodeTrouble:
    """The trouble of a node whose answer is lost."""
    return NodeTrouble("the answer was lost")


async def read_whole(fetcher: Fetcher, key: bytes, nodes: Sequence[str]) -> bytes:
    """A message as its reader gets it: it has the checksum that it was accepted with."""
    commit = await fetcher.commit(key, nodes)
    octets = b"".join([part async for part in fetcher.chunks(key, nodes, commit)])
    assert hashlib.sha256(octets).hexdigest() == commit.sha256
    return octets
