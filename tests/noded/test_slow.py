"""Slow is not dead, and dead is not slow (P20): real nodes that are stopped for a while, or whose answers are late."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.world import World, system_world
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.cluster.node_connection import Disconnected
from powermail.cluster.node_link import Where
from powermail.cluster.remote import RemoteNode
from powermail.storage.contract import NodeState, Receipt
from tests.cluster.support import admit_all, store
from tests.noded.certificates import Authority, uris
from tests.noded.installation import until
from tests.storage.support import key

CLUSTER = "00" * 16
LATE_S = 0.4  # more than NODE_SLOW_S


class Line:
    """The line to a node: what the node says comes `late_s` later."""

    def __init__(self, port: int) -> None:
        self.late_s = 0.0
        self.port = 0
        self._to = port
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        """Begins."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.append(writer)
        there = await asyncio.open_connection("127.0.0.1", self._to)
        self._ends.append(there[1])
        create = asyncio.get_running_loop().create_task
        self._tasks += [create(self._carry(reader, there[1], False)), create(self._carry(there[0], writer, True))]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            while octets := await reader.read(1 << 16):
                if late and self.late_s:
                    loop.call_later(self.late_s, _write, writer, octets)  # timers of one length keep their order
                else:
                    writer.write(octets)
        except ConnectionError:
            pass  # either end was cut
        writer.close()

    async def close(self) -> None:
        """Ends."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for end in self._ends:
            end.close()
        await asyncio.gather(*(end.wait_closed() for end in self._ends), return_exceptions=True)


def _write(writer: asyncio.StreamWriter, octets: bytes) -> None:
    if not writer.is_closing():
        writer.write(octets)


class Site:
    """Three nodes as processes, a cluster that uses them over lines, and its loops of health."""

    def __init__(
        self, world: World, nodes: dict[str, RemoteNode], lines: dict[str, Line], processes: dict[str, Process]
    ) -> None:
        self.world = world
        self.nodes = nodes
        self.lines = lines
        self.cluster = Cluster(world, list(nodes.values()), 2, "random")
        self._processes = processes
        self._stored = 0

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to the process of a node."""
        os.kill(self._processes[name].pid, number)

    async def deliver(self) -> tuple[Receipt, ...]:
        """Stores a message; its receipts."""
        self._stored += 1
        return (await store(self.cluster, key(self._stored), b"message %d" % self._stored))[1]

    async def watch(self, node: RemoteNode) -> None:
        """A loop of health, as the keeper has."""
        while True:
            await asyncio.sleep(await self.cluster.watch(node))


@asynccontextmanager
async def site(directory: Path) -> AsyncIterator[Site]:
    """Serves, and clears away."""
    authority, processes, lines = Authority(directory), dict[str, Process](), dict[str, Line]()
    context = authority.client(*uris(CLUSTER, "front-1", "front", "keeper"))
    world, nodes = system_world(MemoryLog()), dict[str, RemoteNode]()
    loops: list[asyncio.Task[None]] = []
    try:
        for name in "abc":
            paths = [*authority.issue(*uris(CLUSTER, name, "node")), authority.path]
            (directory / name).mkdir()
            words = ["-m", "tests.noded.machine", CLUSTER, name, f"g-{name}", str(directory / name), *paths]
            processes[name] = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=PIPE, stdout=PIPE)
        for name, process in processes.items():
            assert process.stdout is not None
            line = lines[name] = Line(int(await process.stdout.readline()))
            await line.open()
            nodes[name] = RemoteNode(world, name, f"g-{name}", 1, Where(CLUSTER, "127.0.0.1", line.port, lambda: context))
        made = Site(world, nodes, lines, processes)
        await made.cluster.start(admit_all)
        loops += [asyncio.ensure_future(made.watch(node)) for node in nodes.values()]
        yield made
        await made.cluster.close()
    finally:
        for loop in loops:
            loop.cancel()
        for line in lines.values():
            await line.close()
        for process in processes.values():
            process.kill()
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()


async def test_a_node_that_is_stopped_is_slow_then_dead_then_back(tmp_path: Path) -> None:
    """Mail goes on all the while; a pause that is shorter than the patience for pings costs no connection."""
    async with site(tmp_path) as here:
        node, count = here.nodes["c"], here.world.counters.get
        await asyncio.gather(*(here.deliver() for _ in range(20)))
        here.signal("c", signal.SIGSTOP)
        await until(lambda: node.stat().write_s > limits.NODE_SLOW_S)
        here.signal("c", signal.SIGCONT)
        await node.hear()
        assert node.state.value == "read-write" and count("cluster.links_lost") == 0, "it was slow"
        here.signal("c", signal.SIGSTOP)
        waiting = asyncio.ensure_future(node.facts())
        await until(lambda: here.cluster.is_slow("c"))
        for _ in range(20):
            assert "c" not in {receipt.node for receipt in await here.deliver()}, "it is used last"
        await until(lambda: node.state is NodeState.MISSING)
        with pytest.raises(Disconnected):
            await asyncio.wait_for(waiting, 1)
        assert node.stamp() is None
        await here.deliver()
        here.signal("c", signal.SIGCONT)
        await until(lambda: node.state is NodeState.READ_WRITE)
        assert (await node.facts()).incarnation == node.incarnation and count("cluster.links_lost") == 1


async def test_a_node_whose_answers_are_late_is_neither_waited_for_nor_given_up(tmp_path: Path) -> None:
    """p99 at most twice the healthy one: of 100 that come, not two may have to wait for it, delivered or read."""
    async with site(tmp_path) as here:
        fetcher = Fetcher(here.world, here.cluster, _noted)
        read, answered = here.nodes["c"].read_commit, list[bytes]()

        async def reading(key: bytes) -> bytes:
            found = await read(key)
            answered.append(key)  # and somebody waited for it
            return found

        here.nodes["c"].read_commit = reading  # type: ignore[method-assign]
        stored = [await here.deliver() for _ in range(60)]
        both = next(number for number, receipts in enumerate(stored, 1) if "c" in {receipt.node for receipt in receipts})
        holders = [receipt.node for receipt in stored[both - 1]]
        for _ in range(60):
            await fetcher.commit(key(both), holders)
        assert len(answered) > 5
        answered.clear()
        here.lines["c"].late_s = LATE_S
        waited = 0
        for _ in range(400):
            waited += "c" in {receipt.node for receipt in await here.deliver()}
            await fetcher.commit(key(both), holders)
        assert waited <= 4 and len(answered) <= 4, (waited, len(answered))
        assert here.nodes["c"].state is NodeState.READ_WRITE and here.world.counters.get("cluster.links_lost") == 0


async def _noted(key: bytes, node: str, why: str) -> None:
    raise AssertionError(f"a copy on {node} is bad: {why}")
