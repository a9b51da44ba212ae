"""Owns the simulated machines of a cluster: each with its own clock, its data directory, its disk if it serves a node, and the
one process on it, which can be killed and stopped at any instruction.

They lie under one tree, `HOST/data`, so that what befalls disks is the same as on one machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from powermail.base.certificates import Facts
from powermail.base.disk import Disk
from powermail.base.log import Log
from powermail.base.world import World
from powermail.sim.loop import PROGRAM, Program, SimLoop
from powermail.sim.net import SimContext
from powermail.sim.world import Machine, SimClock

T = TypeVar("T")
_FOREVER = 9e9


def data_of(host: str) -> str:
    """The data directory of a machine."""
    return f"{host}/data"


def host_of(node: str) -> str:
    """The machine that serves a node."""
    return f"node-{node}"


class Machines(Machine):
    """All machines. What survives the death of a process, of any of them."""

    def __init__(self, chance: random.Random, nodes: list[str], real: str) -> None:
        self.programs: dict[str, Program] = {}  # the process on each machine, since it started last
        self.clocks: dict[str, SimClock] = {}
        self._left: list[set[asyncio.Task[Any]]] = []  # kept: a task that is thrown away runs its last lines after its death
        super().__init__(chance, nodes, real)

    def place(self, node: str) -> str:
        return f"{data_of(host_of(node))}/nodes/{node}"

    def clock_of(self, host: str) -> SimClock:
        """The machine's own clock."""
        return self.clocks.setdefault(host, SimClock())

    def start(self, host: str) -> World:
        """A world for a new process on that machine; that of the one before is dead."""
        program = self.programs[host] = Program()
        self.disk.system.make_directory(data_of(host))
        return self.world_of(host, self.clock_of(host), lambda: self.programs[host] is program)

    def is_there(self, host: str) -> bool:
        """True while its process lives and runs."""
        return host in self.programs and self.programs[host].runs

    async def run_on(self, host: str, work: Callable[[], Awaitable[T]]) -> T:
        """Runs it as the process there does; who waits is not of it."""
        context = self._context(host)

        async def do() -> T:
            return await work()

        task = asyncio.get_running_loop().create_task(do(), context=context)
        try:
            return await asyncio.shield(task)  # one of a dead process never ends
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _context(self, host: str) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(PROGRAM.set, self.programs[host])
        return context

    def let_go_on(self, host: str, work: Callable[[], object]) -> None:
        """Lets go of what a dead process there had open: whatever ends with that, and in whatever order, does nothing more."""
        self._context(host).run(work)

    def kill_on(self, host: str) -> None:
        """kill -9 of the process on that machine."""
        if host in self.programs:
            self.programs[host].kill()
            self._left.append(asyncio.all_tasks())
        self.programs[host] = dead = Program()
        dead.kill()
        self.net.listeners = {port: entry for port, entry in self.net.listeners.items() if entry[0] != host}
        self.net.break_some(host, 1.0)
        prefix = f"{host}/"
        for path in [path for path in self.disk.system.locks if path.startswith(prefix)]:
            del self.disk.system.locks[path]
        for place, disk in self.disk.parts.items():
            if place.startswith(prefix):
                disk.locks.clear()
                disk.clear_faults()

    def cut_power_of(self, node: str) -> None:
        """The machine of a node loses its power: its disk keeps what was synced and any part of the rest."""
        self.kill_on(host_of(node))
        place = self.place(node)
        self._cut(place)
        self._settle(place)

    def pause(self, host: str) -> None:
        """SIGSTOP."""
        self.programs[host].pause()

    def go_on(self, host: str) -> None:
        """SIGCONT, also of one that was killed meanwhile."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self.programs[host].go_on(loop)


class SimPeerCertificate:
    """What stands for `base.tls.PeerCertificate`: the names in a file, shown by `SimContext`."""

    def __init__(self, paths: tuple[str, str, str], disk: Disk, log: Log) -> None:
        self.paths = paths
        self.facts = facts_of(disk.read_file(paths[0]))
        self._context = SimContext.of(self.facts.uris)

    def server(self) -> SimContext:
        """For a connection that comes in."""
        return self._context

    def client(self) -> SimContext:
        """For a connection that goes out."""
        return self._context

    def days_left(self, now: float) -> float:
        """Until it ends."""
        return (_FOREVER - now) / 86_400.0

    def reload(self) -> bool:
        """The file never changes."""
        return False


def facts_of(octets: bytes) -> Facts:
    """What stands for `base.tls.facts_of`: such a certificate names its bearer, and never ends."""
    return Facts(tuple(octets.decode().split()), 0.0, _FOREVER)


def names_of(cluster: str, identity: str, *roles: str) -> bytes:
    """What stands in a certificate file: an id in its roles."""
    return "\n".join(f"powermail://{cluster}/{role}/{identity}" for role in roles).encode()


class Through:
    """An object of a process as others use it: each call is that process's, and never ends if it was killed."""

    def __init__(self, machines: Machines, host: str, what: Any) -> None:
        self._machines = machines
        self._host = host
        self._what = what

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._what, name)
        if not callable(found):
            return found

        async def call(*args: Any) -> Any:
            return await self._machines.run_on(self._host, lambda: found(*args))

        return call
