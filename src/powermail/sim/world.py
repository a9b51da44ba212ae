"""Owns the simulated machine: its disks, its clock, and the process on it that can be killed at any moment."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable, MutableSequence
from typing import Any

from powermail.base.disk import File, Lock, SystemDisk
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

    dropped = 0

    def __init__(self, machine: Machine, lives: Callable[[], bool], who: str = "") -> None:
        self._machine = machine
        self._lives = lives
        self._who = who

    def event(self, event: Event, **fields: Any) -> None:
        if not self._lives():
            return  # a killed process says nothing more
        self._machine.trace.append(f"{asyncio.get_running_loop().time():.6f} {self._who}{format_text('', event, fields)}")
        if event is Event.INDEX_LATE:
            self._machine.late[fields["key"]] = None
        if event is Event.BUG:
            self._machine.bugs.append(self._machine.trace[-1])


class MachineDisk:
    """The disks of a machine under one tree: one for the data directory and one for each node. Implements `base.disk.Disk`."""

    def __init__(self, places: Iterable[str], real: str) -> None:
        """One disk at each of these places. `real` is a directory of the real machine, for what SQLite keeps."""
        self._real, self._real_disk = real, SystemDisk()
        self._serials: dict[int, int] = {}  # disks by identity: each has its own key index
        self._numbered: list[SimDisk] = []
        self.parts: dict[str, SimDisk] = {place: SimDisk() for place in places}
        self.system = SimDisk()
        self.system.make_directory(DATA)
        self.away: dict[str, None] = {}

    def part(self, path: str) -> SimDisk | SystemDisk:
        """The disk a path lies on. Raises FileNotFoundError when it was taken away."""
        if path == self._real or path.startswith(f"{self._real}/"):
            return self._real_disk
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
            if "/keys.db" in path:  # a real file, which goes with the simulated disk
                return os.path.exists(self.keys_path(path))
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
        if "/keys.db" in path:
            os.unlink(self.keys_path(path))
            return
        self.part(path).unlink(path)

    def keys_path(self, path: str) -> str:
        """Where the derived key index of the disk at `path` really lies: it goes with the disk, not with the place."""
        disk = self.part(path)
        assert isinstance(disk, SimDisk)
        self.same(disk, disk)
        return f"{self._real}/keys-{self._serials[id(disk)]}.db{path.rpartition('keys.db')[2]}"

    def same(self, disk: SimDisk, before: SimDisk) -> None:
        """What was derived from `before` lies on `disk` now."""
        if id(disk) not in self._serials:
            self._serials[id(disk)] = self._serials.get(id(before), len(self._numbered))
            self._numbered.append(disk)  # kept, so that no other disk ever has its identity

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
        self.disk = MachineDisk([self.place(name) for name in nodes], real)
        self.clock = SimClock()
        self.net = SimNetwork(chance)
        self.real = real
        self.trace: list[str] = []
        self.bugs: list[str] = []
        self.slow: dict[str, float] = {}  # lane name: seconds that each call takes more
        self.hung: dict[str, None] = {}  # lanes whose calls do not end
        self.ill: dict[str, str] = {}  # lane name: "error" (calls fail) or "unknown" (they are done, the answer is lost)
        self.late: dict[bytes, None] = {}  # messages that were acknowledged without the index (P14)
        self.generation = 0
        self.bases: dict[str, SimDisk] = {}  # what each disk held when it was last all durable
        self.taken: list[tuple[str, SimDisk]] = []  # disks that lay in a place before another did, as they were then
        self.settle()

    def place(self, node: str) -> str:
        """The directory of a node."""
        return f"{DATA}/nodes/{node}"

    def world(self) -> World:
        """A world for a new process on this machine; that of the process before is dead."""
        self.generation += 1
        mine = self.generation
        return self.world_of("server", self.clock, lambda: self.generation == mine)

    def world_of(self, name: str, clock: SimClock, lives: Callable[[], bool]) -> World:
        """A world for a process of that name, as long as it lives."""

        def lane(what: str) -> Lane:
            def delay() -> float:
                return self.chance.expovariate(1 / 0.0004) + self.slow.get(what, 0.0)

            return SimLane(delay, lives, lambda: what in self.hung, lambda: self._illness(what))

        who = "" if name == "server" else f"{name} "
        return World(clock, self.disk, self.net.named(name), SimEntropy(self.chance), lane, TraceLog(self, lives, who))

    def _illness(self, lane: str) -> Callable[[Callable[[], Any]], Any] | None:
        how = self.ill.get(lane)
        if how is None or self.chance.random() < 0.3:  # now and then one gets through
            return None

        def fail(call: Callable[[], Any]) -> Any:
            if how == "unknown":
                call()
            raise sqlite3.OperationalError("database is locked" if how == "error" else "disk I/O error")

        return fail

    def zero_page(self, path: str) -> None:
        """One page of a real file holds nothing but zeros."""
        if os.path.exists(path) and os.path.getsize(path):
            with open(path, "r+b") as file:
                file.seek(4096 * self.chance.randrange(max(1, os.path.getsize(path) // 4096)))
                file.write(bytes(4096))

    def replace_disk(self, prefix: str, disk: SimDisk) -> SimDisk:
        """Puts another disk in that place; the one that was there."""
        before = self.disk.parts[prefix]
        self.taken.append((prefix, before.clone()))
        self.disk.parts[prefix] = disk
        disk.settle()
        self.bases[prefix] = disk.clone()
        return before

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
        for prefix in self.disk.parts:
            self._cut(prefix)
        self.settle()

    def _cut(self, prefix: str) -> None:
        self.disk.parts[prefix] = self._after_cut(prefix, self.disk.parts[prefix])

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
        self.disk.same(disk, disk)
        self.disk.same(after, disk)
        return after

    def settle(self) -> None:
        """From here on a power cut can take only what comes later: called when everything has long been written back."""
        for prefix in self.disk.parts:
            self._settle(prefix)

    def _settle(self, prefix: str) -> None:
        disk = self.disk.parts[prefix]
        disk.settle()
        self.bases[prefix] = disk.clone()

    def snapshot_index(self) -> None:
        """A backup of the index, as an operator makes it while it is used (a hot copy). There must be an index."""
        source = sqlite3.connect(f"file:{self.real}/index.db?mode=ro", uri=True)
        target = sqlite3.connect(f"{self.real}/backup.db")
        source.backup(target)
        source.close()
        target.close()

    def unsaved_accounts(self) -> dict[str, bool]:
        """Each account, and whether one of its mailboxes has changed since its last durable checkpoint."""
        if not os.path.exists(f"{self.real}/index.db"):
            return {}
        db = sqlite3.connect(f"file:{self.real}/index.db?mode=ro", uri=True)
        try:
            rows = db.execute("SELECT account, max(due_at > 0 OR skipped) FROM mailboxes GROUP BY account ORDER BY account")
            return {account: bool(unsaved) for account, unsaved in rows.fetchall()}
        finally:
            db.close()

    def lose_index(self) -> None:
        """The index file is gone."""
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(f"{self.real}/index.db{suffix}"):
                os.unlink(f"{self.real}/index.db{suffix}")

    def restore_index(self) -> None:
        """The index file is what it was at the backup (F28)."""
        self.lose_index()
        shutil.copy(f"{self.real}/backup.db", f"{self.real}/index.db")
