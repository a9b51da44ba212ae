"""Owns the simulated machine: its disks, its clock, and the process on it that can be killed at any moment."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import sqlite3
from collections.abc import MutableSequence
from typing import Any

from powermail.base.disk import File, Lock
from powermail.base.lane import Lane
from powermail.base.log import Event, format_text
from powermail.base.world import World
from powermail.sim.disk import SimDisk, split
from powermail.sim.lane import SimLane
from powermail.sim.net import SimNetwork

DATA = "data"


class SimEntropy:
    """Randomness that repeats."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def octets(self, count: int) -> bytes:
        return self._chance.randbytes(count)

    def uniform(self, low: float, high: float) -> float:
        return self._chance.uniform(low, high)

    def shuffle(self, items: MutableSequence[Any]) -> None:
        self._chance.shuffle(items)


class SimClock:
    """Virtual time; the wall clock can be moved (F23)."""

    def __init__(self) -> None:
        self.skew_s = 1_800_000_000.0

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.skew_s


class TraceLog:
    """Every event with its virtual time: what two runs of one seed must have in common."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._generation = machine.generation

    def event(self, event: Event, **fields: Any) -> None:
        if self._generation != self._machine.generation:
            return  # a killed process says nothing more
        self._machine.trace.append(f"{asyncio.get_running_loop().time():.6f} {format_text('', event, fields)}")
        if event is Event.BUG:
            self._machine.bugs.append(self._machine.trace[-1])


class MachineDisk:
    """The disks of a machine under one tree: one for the data directory and one for each node. Implements `base.disk.Disk`."""

    def __init__(self, nodes: list[str]) -> None:
        self.parts: dict[str, SimDisk] = {f"{DATA}/nodes/{name}": SimDisk() for name in nodes}
        self.system = SimDisk()
        self.system.make_directory(DATA)
        self.away: dict[str, None] = {}

    def part(self, path: str) -> SimDisk:
        """The disk a path lies on. Raises FileNotFoundError when it was taken away."""
        for prefix, disk in self.parts.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                if prefix in self.away:
                    raise FileNotFoundError(errno.ENOENT, "the disk is away")
                return disk
        return self.system

    def all(self) -> list[SimDisk]:
        """Every disk."""
        return [self.system, *self.parts.values()]

    def make_directory(self, path: str) -> None:
        self.part(path).make_directory(path)

    def list(self, path: str) -> list[str]:
        return self.part(path).list(path)

    def exists(self, path: str) -> bool:
        try:
            return self.part(path).exists(path)
        except FileNotFoundError:
            return False

    def mark(self, path: str) -> tuple[int, int]:
        return self.part(path).mark(path)

    def mode(self, path: str) -> int:
        return self.part(path).mode(path)

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> File:
        return self.part(path).open(path, create, exclusive)

    def read_file(self, path: str) -> bytes:
        return self.part(path).read_file(path)

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        self.part(path).replace_file(path, octets, mode)

    def rename(self, old: str, new: str) -> None:
        self.part(old).rename(old, new)

    def unlink(self, path: str) -> None:
        self.part(path).unlink(path)

    def sync_directory(self, path: str) -> None:
        self.part(path).sync_directory(path)

    def free_octets(self, path: str) -> int:
        return self.part(path).free_octets(path)

    def total_octets(self, path: str) -> int:
        return self.part(path).total_octets(path)

    def lock(self, path: str) -> Lock:
        return self.part(path).lock(path)


class Machine:
    """What survives the death of a process: disks, clock, network."""

    def __init__(self, chance: random.Random, nodes: list[str], real: str) -> None:
        """`real` is a directory for what SQLite keeps; only committed transactions are ever seen there."""
        self.chance = chance
        self.disk = MachineDisk(nodes)
        self.clock = SimClock()
        self.net = SimNetwork(chance)
        self.real = real
        self.trace: list[str] = []
        self.bugs: list[str] = []
        self.slow: dict[str, float] = {}  # lane name: seconds that each call takes more
        self.generation = 0
        self.bases: dict[str, SimDisk] = {}  # what each disk held when it was last all durable
        self.settle()

    def world(self) -> World:
        """A world for a new process on this machine; that of the process before is dead."""
        self.generation += 1
        mine = self.generation

        def lane(name: str) -> Lane:
            def delay() -> float:
                return self.chance.expovariate(1 / 0.0004) + self.slow.get(name, 0.0)

            return SimLane(delay, lambda: self.generation == mine)

        return World(
            self.clock, self.disk, self.net.named("server"), SimEntropy(self.chance), lane, TraceLog(self), simulated=True
        )

    def note(self, what: str) -> None:
        """A line of the trace that is not an event of the program."""
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} -- {what}")

    def kill(self) -> None:
        """kill -9: connections break, no thread runs on; what was written stays in the page cache."""
        self.generation += 1
        self.net.listeners = {port: entry for port, entry in self.net.listeners.items() if entry[0] != "server"}
        self.net.break_some("server", 1.0)
        for disk in self.disk.all():
            disk.locks.clear()
            disk.clear_faults()

    def cut_power(self) -> None:
        """Kills, and each disk keeps what was synced and any part of the rest."""
        self.kill()
        for prefix, disk in self.disk.parts.items():
            self.disk.parts[prefix] = self._after_cut(prefix, disk)
        self.settle()

    def _after_cut(self, prefix: str, disk: SimDisk) -> SimDisk:
        durable, pending = split(disk.journal, len(disk.journal))
        order = {id(op): number for number, op in enumerate(disk.journal)}
        kept = [op for op in pending if self.chance.random() < 0.5]
        if kept and kept[-1].kind == "write":
            last = kept[-1]
            torn = last._replace(data=last.data[: self.chance.randrange(len(last.data) + 1)])
            order[id(torn)] = order[id(last)]
            kept[-1] = torn
        chosen = sorted([*durable, *kept], key=lambda op: order[id(op)])
        after = disk.image(self.bases[prefix], chosen)
        after.free = disk.free
        return after

    def settle(self) -> None:
        """From here on a power cut can take only what comes later: called when everything has long been written back."""
        for prefix, disk in self.disk.parts.items():
            disk.settle()
            self.bases[prefix] = disk.clone()

    def snapshot_index(self) -> None:
        """A backup of the index, as an operator makes it."""
        with sqlite3.connect(f"{self.real}/index.db") as source, sqlite3.connect(f"{self.real}/backup.db") as target:
            source.backup(target)
        source.close()
        target.close()

    def restore_index(self) -> None:
        """The index file is what it was at the backup (F28)."""
        for suffix in ("-wal", "-shm"):
            if os.path.exists(f"{self.real}/index.db{suffix}"):
                os.unlink(f"{self.real}/index.db{suffix}")
        shutil.copy(f"{self.real}/backup.db", f"{self.real}/index.db")
