"""Holds one node of each kind with what a test may do to it: reopen, damage, hide, hold, hang, move its clock.

The suite of the contract runs over all of them, so each hook does the same to every kind: a real disk with threads, a simulated
disk with lanes of virtual time, the node in memory, and each behind the node protocol.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, cast

from powermail.base.clock import SystemClock
from powermail.base.lane import ThreadLane
from powermail.base.log import MemoryLog
from powermail.base.tasks import Tasks
from powermail.base.world import World, system_world
from powermail.cluster.node_connection import Disconnected
from powermail.cluster.node_link import Where
from powermail.cluster.remote import RemoteNode
from powermail.noded.service import NodeService
from powermail.sim.disk import SimDisk
from powermail.sim.lane import SimLane
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import START, NodeState, Position, StorageNode
from powermail.storage.node import LocalNode
from tests.noded.certificates import Authority, uris
from tests.storage.bad_disk import BadDisk
from tests.storage.support import CLUSTER, PATH, SMALL, Ticks, in_file, in_memory, key


class ManualClock(SystemClock):
    """The wall clock of the machine, and a monotonic clock that a test moves."""

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks

    def monotonic(self) -> float:
        return self._ticks.now


class Gate:
    """Holds the lanes of a node until it is opened again: a disk that does not answer."""

    def __init__(self) -> None:
        self._shut: dict[str, None] = {}
        self._open = threading.Event()
        self._open.set()
        self._waiting: list[Callable[[], None]] = []

    def shut(self, *names: str) -> None:
        """Lanes whose names end so do nothing from now on."""
        self._open.clear()
        self._shut.update(dict.fromkeys(names))

    def open(self) -> None:
        """All goes on."""
        self._shut.clear()
        self._open.set()
        waiting, self._waiting = self._waiting, []
        for go_on in waiting:
            go_on()

    def holds(self, name: str) -> bool:
        """True for a lane that does nothing now."""
        return any(name.endswith(end) for end in self._shut)

    def pass_through(self, name: str) -> None:
        """In a thread: waits while the gate is shut for that lane."""
        while self.holds(name):
            self._open.wait(60.0)

    def later(self, go_on: Callable[[], None]) -> None:
        """In virtual time: called when the gate is opened."""
        self._waiting.append(go_on)


class GatedThreads:
    """A real lane behind a gate."""

    def __init__(self, name: str, gate: Gate) -> None:
        self._name, self._gate = name, gate
        self._lane = ThreadLane(name)

    def run(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        def gated() -> Any:
            self._gate.pass_through(self._name)
            return call(*args)

        return self._lane.run(gated)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lane, name)


class GatedTurns(SimLane):
    """A simulated lane behind a gate."""

    def __init__(self, name: str, gate: Gate) -> None:
        super().__init__(lambda: 0.0001, lambda: True)
        self._name, self._gate = name, gate

    def _work(self) -> None:
        if self._gate.holds(self._name):
            self._gate.later(self._work)
        else:
            super()._work()


class Rig(Protocol):
    """A node and what may be done to it."""

    node: StorageNode
    ticks: Ticks

    async def reopen(self, lose_index: bool = False) -> StorageNode:
        """Closes and opens again, in a process that knows nothing; the key index may be lost."""

    async def damage(self, number: int) -> None:
        """The copy that `key(number)` names fails its check from now on."""

    async def hide(self, number: int) -> None:
        """Its records cannot be read until `show`; the node may be opened again by it."""

    def show(self) -> None:
        """All can be read again."""

    async def lose(self, number: int) -> None:
        """The log is damaged so that nobody can tell that the key was there; the node is opened again."""

    def steady(self) -> None:
        """No cable is pulled from now on: what follows asks each thing once."""

    def hold(self) -> None:
        """Writes wait."""

    def hang(self) -> None:
        """Nothing ends."""

    def release(self) -> None:
        """All goes on."""

    async def end(self) -> None:
        """Clears away."""


class MemoryRig:
    """The node in memory."""

    def __init__(self) -> None:
        self.ticks = Ticks()
        self.made = MemoryNode("a", "rack-a", 3, self.ticks, SMALL.segment_octets)
        self.node: StorageNode = self.made
        self._hidden: list[bytes] = []

    async def reopen(self, lose_index: bool = False) -> StorageNode:
        await self.made.close()
        await self.made.open()
        return self.made

    async def damage(self, number: int) -> None:
        self.made.damage(key(number))

    async def hide(self, number: int) -> None:
        self._hidden.append(key(number))
        self.made.hide(key(number))

    def show(self) -> None:
        for hidden in self._hidden:
            self.made.hide(hidden, hidden=False)

    async def lose(self, number: int) -> None:
        self.made.lose(key(number))
        self.made.doubt()
        await self.reopen()

    def steady(self) -> None:
        pass

    def hold(self) -> None:
        self.made.hold()

    def hang(self) -> None:
        self.made.deadline_s = 0.2
        self.made.hang()

    def release(self) -> None:
        self.made.release()

    async def end(self) -> None:
        self.made.release()
        await self.made.close()


class LocalRig:
    """`LocalNode` on a disk, real or simulated."""

    def __init__(self, directory: Path | None) -> None:
        self.ticks = Ticks()
        self.gate = Gate()
        self.world: World = system_world(MemoryLog())
        self.world.clock = ManualClock(self.ticks)
        self._real = directory is not None
        self.disk = BadDisk(self.world.disk if self._real else SimDisk())
        self.world.disk = self.disk
        self.world.lane = self._lane
        self.path = str(directory / PATH) if directory is not None else PATH
        self.node: StorageNode = self.make()

    def _lane(self, name: str) -> Any:
        return GatedThreads(name, self.gate) if self._real else GatedTurns(name, self.gate)

    def make(self) -> LocalNode:
        """The node as a new process makes it."""
        keys = in_file if self._real else in_memory
        return LocalNode(self.world, CLUSTER, "a", self.path, "rack-a", 3, SMALL, keys)

    async def reopen(self, lose_index: bool = False) -> StorageNode:
        await self.node.close()
        if lose_index and self._real:
            for name in Path(self.path).glob("keys.db*"):
                name.unlink()
        self.node = self.make()
        await self.node.open()
        return self.node

    def segments(self) -> list[str]:
        """Paths of the log's segments, oldest first."""
        folder = f"{self.path}/segments"
        return [f"{folder}/{name}" for name in sorted(self.world.disk.list(folder)) if name.endswith(".seg")]

    def find(self, octets: bytes) -> list[tuple[str, int]]:
        """Where these octets stand in the log."""
        found = []
        for path in self.segments():
            content = self.disk.below.read_file(path)
            place = content.find(octets)
            while place >= 0:
                found.append((path, place))
                place = content.find(octets, place + 1)
        return found

    def overwrite(self, path: str, offset: int, octets: bytes) -> None:
        """What rot, or another program, does to a file."""
        if not self._real:
            content = self.disk.below.content[self.disk.below.names[path]]
            content[offset : offset + len(octets)] = octets
            return
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(octets)

    async def damage(self, number: int) -> None:
        for path, place in self.find(b"octets of %d." % number):
            self.overwrite(path, place, b"OCTETS")

    async def hide(self, number: int) -> None:
        for path, place in self.find(key(number)):
            self.disk.bad.setdefault(path, []).append((place - 16, place + 1))
        await self.reopen()  # else a scan goes by what was just written and reads nothing

    def show(self) -> None:
        self.disk.bad.clear()

    async def lose(self, number: int) -> None:
        for path, place in self.find(key(number)):
            self.overwrite(path, place - 16, bytes(40))
        await self.reopen(lose_index=True)

    def steady(self) -> None:
        pass

    def hold(self) -> None:
        self.gate.shut("-write")

    def hang(self) -> None:
        self.gate.shut("")

    def release(self) -> None:
        self.gate.open()

    async def end(self) -> None:
        self.release()
        self.show()
        await self.node.close()


class RemoteRig:
    """A node of another kind behind the node protocol: real sockets and TLS on the loopback, one certificate with all roles."""

    def __init__(self, below: MemoryRig | LocalRig, directory: Path) -> None:
        self.below = below
        self.ticks = below.ticks
        self.world: World = system_world(MemoryLog())
        self.world.clock = ManualClock(self.ticks)
        self.broken: list[BaseException] = []
        authority = Authority(directory)
        self._serves = authority.server(*uris(CLUSTER, "a", "node"))
        self._asks = authority.client(*uris(CLUSTER, "front-1", "front", "keeper", "operator"))
        self._tasks = Tasks(self.world.log, self.broken.append)

    async def begin(self) -> RemoteRig:
        """Serves the node, and knows it from far."""
        nodes = {"a": self.below.node}
        self.service = NodeService(self.world, CLUSTER, nodes, self._tasks, lambda: self._serves, self.broken.append)
        port = await self.service.listen("127.0.0.1", 0)
        where = Where(CLUSTER, "127.0.0.1", port, lambda: self._asks)
        self.remote = RemoteNode(self.world, "a", "rack-a", 3, where)
        self.node: StorageNode = self.remote
        return self

    async def _leave(self) -> None:
        await self.remote.close()
        await self.service.close()
        await self._tasks.drain(5.0)
        assert not self.broken

    async def reopen(self, lose_index: bool = False) -> StorageNode:
        await self._leave()
        await self.below.reopen(lose_index)
        await self.begin()
        await self.node.open()
        return self.node

    async def damage(self, number: int) -> None:
        await self.below.damage(number)

    async def hide(self, number: int) -> None:
        await self.below.hide(number)
        await self._again()

    def show(self) -> None:
        self.below.show()

    async def lose(self, number: int) -> None:
        await self.below.lose(number)
        await self._again()

    async def _again(self) -> None:
        """What lies below may be another opening of it now."""
        await self._leave()
        await self.begin()
        await self.node.open()

    def steady(self) -> None:
        pass

    def hold(self) -> None:
        self.below.hold()

    def hang(self) -> None:
        self.below.hang()

    def release(self) -> None:
        self.below.release()

    async def end(self) -> None:
        self.below.release()
        await self._leave()
        await self.below.end()


class Persistent:
    """A node over a network whose cables are pulled all the time: what was lost on the way is asked again.

    What the contract calls idempotent must bear that, and no lost answer may look like a definite one.
    """

    def __init__(self, remote: RemoteNode, chance: random.Random) -> None:
        self.remote = remote
        self.often = 0.15
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.remote, name)
        return self._again(found) if name in _ASKED_AGAIN else found

    def _again(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def ask(*args: Any) -> Any:
            while True:
                cut = self._chance.random() < self.often and self.remote.state is not NodeState.CLOSED
                if cut:
                    asyncio.get_running_loop().call_later(self._chance.random() * 0.002, self.remote.cut)
                try:
                    return await call(*args)
                except Disconnected:
                    if self.remote.state is NodeState.CLOSED:
                        raise
                    await self._back()
                finally:
                    if cut:  # what is shown without waiting is looked at next
                        await asyncio.sleep(0.003)
                        await self._back()

        return ask

    async def _back(self) -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    await self.remote.open()
                    return
                except Disconnected:
                    await asyncio.sleep(0.001)


_ASKED_AGAIN = frozenset(name for name, member in vars(StorageNode).items() if callable(member) and name[0] != "_") - {
    "open", "initialise", "close", "block", "stat", "stamp", "stamp_age_s",
} | {"hear"}  # fmt: skip


class CutRig(RemoteRig):
    """The same, cut at random moments."""

    async def begin(self) -> RemoteRig:
        await super().begin()
        self._node = Persistent(self.remote, random.Random(7))
        self.node = cast(StorageNode, self._node)
        return self

    def steady(self) -> None:
        self._node.often = 0.0


KINDS = ("real disk", "simulated disk", "memory", "remote disk", "remote memory", "remote, cut")


async def make_rig(kind: str, directory: Path) -> Rig:
    """An open, empty node of that kind."""
    rig: MemoryRig | LocalRig | RemoteRig
    rig = LocalRig(directory if kind == "real disk" else None) if kind.endswith("disk") else MemoryRig()
    if kind.startswith("remote"):
        rig = await (CutRig if kind.endswith("cut") else RemoteRig)(rig, directory).begin()
    await rig.node.initialise()
    await rig.node.open()
    return rig


async def then_reopened(rig: Rig, *loses: bool) -> AsyncIterator[StorageNode]:
    """The node as it is, then as it is after each reopening; True: its key index was lost meanwhile."""
    yield rig.node
    for lose_index in loses or (False,):
        yield await rig.reopen(lose_index)


async def walk(node: StorageNode, after: Position = START, limit: int = 1000) -> list[tuple[bytes, Any]]:
    """(key, origin) of all that scans show behind a place, in their order."""
    found: list[tuple[bytes, Any]] = []
    for _ in range(10_000):
        scan = await node.scan(after, limit, 0.0)
        found += [(item.key, item.origin) for item in scan.items]
        if scan.following == after:
            return found
        assert scan.following > after and len(scan.items) <= limit
        after = scan.following
    raise AssertionError("this scan never ends")


async def overdue(rig: Rig, *calls: Awaitable[Any]) -> list[Any]:
    """How these calls end when nothing ends in time: their results and errors. Moves the clock behind every deadline."""
    asked = [asyncio.ensure_future(call) for call in calls]
    waiting = asyncio.gather(*asked, return_exceptions=True)
    async with asyncio.timeout(20):
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.05)
            rig.ticks.now += 5.0
    return list(waiting.result())
