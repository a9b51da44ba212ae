"""Owns the faults of a simulation: which may happen, and that damage stays within what R copies must bear.

Several streams of faults run at once, so they overlap. What takes data away for good (an emptied or older disk, rot) happens to
one node at a time and only while every message is redundant; so whatever a client then misses is our bug.
"""

from __future__ import annotations

import asyncio
import errno
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from powermail.base.errors import OperatorError
from powermail.sim.disk import ROOM, SimDisk
from powermail.sim.world import Machine

Kind = Callable[[], Awaitable[None]]
_STREAMS = 3
JUMP_S = 300.0  # how far a clock jumps at most
_HEAL_S = 240.0
_HIDING = frozenset({"disk-away", "write-error", "answers-lost", "hung-disk", "hung-disks"})
_WALKED_S = 5.0  # within that an index that was put back has read what nodes know
_LOOKED_S = 15.0  # after that the process has seen what lies in a node's place
_LONG_S = 45.0  # how long an old copy of a disk is kept at most: deletions since were forgotten, and their tombstones went


class Installed(Protocol):
    """What faults of disks may do with the running installation."""

    node_names: list[str]

    @property
    def machine(self) -> Machine:
        """What survives the death of a process."""

    async def healed(self, within_s: float) -> bool:
        """Waits until every message is redundant. False if it takes too long."""

    async def operation(self, name: str, **arguments: object) -> object:
        """An operator's command; None while it cannot be done."""


class Site(Installed, Protocol):
    """What faults may do with an installation of one process."""

    @property
    def tombstone_s(self) -> float:
        """How long tombstones stay at least."""

    def let_go(self) -> None:
        """Closes what a killed process had open."""

    def forget_deletions(self, since: float) -> None:
        """Deletions since then may be undone, unless a node holds a tombstone: they were only in what a backup lacks."""

    async def restart(self, pause_s: float) -> None:
        """Starts a new process after a kill."""

    def forget_unsaved(self, without: str) -> None:
        """Deletions that stand in no durable checkpoint may be undone, unless a node that is read holds a tombstone."""

    async def checkpointed(self) -> None:
        """Writes the checkpoints that are due."""

    async def rebuild(self, without: str) -> None:
        """Makes the index anew from the nodes, while nothing serves; the node `without`, if there is one, is left out."""


S = TypeVar("S", bound=Installed)


class DiskFaults(ABC, Generic[S]):
    """Draws faults for a seed: a random part of all kinds (a swarm), in several streams at once. Here are those of disks."""

    def __init__(self, site: S, chance: random.Random, only: Sequence[str] = ()) -> None:
        """`only` names the kinds that may happen, all of them then; else the seed draws some. Raises OperatorError."""
        self.happened: dict[str, int] = {}
        self._site = site
        self._machine = site.machine
        self._chance = chance
        self._damage = asyncio.Lock()  # one loss of data at a time: what R copies must bear
        self._old_disks: dict[str, SimDisk] = {}
        self._hiding = 0  # so many faults run that may keep a node from being read
        self._bare = False  # a disk and commits were lost at once: every other node must be there until all is well
        self._absent = ""  # a node that a rebuild was told to do without: until it is back, no copy may be unreadable
        kinds = self._all()
        unknown = [name for name in only if name not in kinds]
        if unknown:
            raise OperatorError(f"no fault is called {unknown[0]!r}; there are {', '.join(sorted(kinds))}")
        drawn = sorted(chance.sample(sorted(kinds), chance.randint(4, len(kinds))))
        self._kinds = {name: kinds[name] for name in only or drawn}

    def _all(self) -> dict[str, Kind]:
        """Every kind by its name."""
        return {
            "disk-away": self._disk_away,
            "disk-emptied": self._disk_emptied,
            "disk-returned": self._disk_returned,
            "rot": self._rot,
            "disk-full": self._disk_full,
            "no-space": self._no_space,
            "write-error": self._write_error,
            "answers-lost": self._answers_lost,
            "read-error": self._read_error,
            "slow-disk": self._slow_disk,
            "hung-disk": self._hung_disk,
            "hung-disks": self._hung_disks,
            "keys-zeroed": self._keys_zeroed,
            "directory-away": self._directory_away,
            "blocked": self._blocked,
        }

    @abstractmethod
    async def _restarted(self, nodes: Sequence[str]) -> None:
        """What serves these nodes ends and starts anew."""

    async def run(self, until: float) -> None:
        """Faults until that time; all are over at the end."""
        await asyncio.gather(*(self._stream(until, number) for number in range(_STREAMS)))

    async def _stream(self, until: float, number: int) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(self._chance.uniform(0.5, 5.0 * _STREAMS))
            name = self._chance.choice(list(self._kinds))
            while self._bare and name in _HIDING:
                await asyncio.sleep(1.0)
            self._machine.note(f"fault {name}, stream {number}")
            self._hiding += name in _HIDING
            await self._kinds[name]()
            self._hiding -= name in _HIDING
            self._machine.note(f"over: {name}, stream {number}")
            self.happened[name] = self.happened.get(name, 0) + 1

    def _node(self) -> str:
        return self._chance.choice(self._site.node_names)

    def _disk(self, node: str) -> SimDisk:
        return self._machine.disk.parts[self._machine.place(node)]

    # -- data that is gone -------------------------------------------------------------------------------------------

    async def _disk_emptied(self) -> None:
        """A new disk in the place of one that is lost; the old one may come back later."""
        async with self._damage:
            if not await self._site.healed(_HEAL_S):
                return
            name = self._node()
            prefix = self._machine.place(name)
            self._machine.disk.away[prefix] = None
            await asyncio.sleep(self._chance.uniform(2.0, 10.0))
            self._old_disks[name] = await self._replaced(name)
            await self._site.healed(_HEAL_S)

    async def _replaced(self, name: str) -> SimDisk:
        """Puts an empty disk in the place of a node's and tells the node; the disk that was there."""
        prefix = self._machine.place(name)
        empty = SimDisk()
        empty.make_directory(prefix)
        before = self._machine.replace_disk(prefix, empty)
        self._machine.disk.away.pop(prefix, None)
        for attempt in range(120):  # refused while a write still hangs there: the operator tries again
            if await self._site.operation("node_replace", node=name) is not None:
                break
            if attempt >= _LOOKED_S and await self._works(name):
                break
            await asyncio.sleep(1.0)
        return before

    async def obey(self, name: str) -> None:
        """The operator does what a node's message says: a disk that may never come back as it is is emptied and replaced."""
        for node in await self._nodes():
            if node["id"] == name and "empty its directory" in node["reason"]:
                self._machine.note(f"the operator empties node {name}")
                await self._replaced(name)

    async def _works(self, name: str) -> bool:
        """True if the node is in use: it was replaced, and the process ended before it could say so."""
        return any(node["id"] == name and node["state"] == "read-write" for node in await self._nodes())

    async def _nodes(self) -> list[dict[str, str]]:
        for _ in range(120):
            nodes = await self._site.operation("node_list")
            if isinstance(nodes, list):
                return nodes
            await asyncio.sleep(1.0)
        return []

    async def _disk_returned(self) -> None:
        """The disk that was replaced, or an older state of this one, is put back (F16, F31)."""
        async with self._damage:
            name = self._node()
            prefix = self._machine.place(name)
            old = self._old_disks.pop(name, None)
            if old is None:
                old = self._older_state(name)
                await asyncio.sleep(self._chance.uniform(5.0, 30.0) if self._chance.random() < 0.5 else _LONG_S)
            if not await self._site.healed(_HEAL_S):
                return
            self._machine.disk.away[prefix] = None
            await asyncio.sleep(self._chance.uniform(2.0, 10.0))
            old.clear_faults()
            old.locks.clear()
            self._machine.replace_disk(prefix, old)
            self._machine.disk.away.pop(prefix, None)
            await asyncio.sleep(5.0)
            await self._site.operation("node_confirm", node=name)
            await self.obey(name)
            await self._site.healed(_HEAL_S)

    def _older_state(self, name: str) -> SimDisk:
        disk = self._disk(name)
        disk.settle()  # a copy of a disk that is used holds at least what was synced; here it holds all
        old = disk.clone()
        self._machine.bases[self._machine.place(name)] = disk.clone()
        return old

    async def _rot(self) -> None:
        async with self._damage:
            if not await self._site.healed(_HEAL_S):
                return
            name = self._node()
            disk = self._disk(name)
            segments = sorted(path for path in disk.names if path.endswith(".seg"))
            if not segments:
                return
            content = disk.content[disk.names[self._chance.choice(segments)]]
            for _ in range(self._chance.randint(1, 8)):
                content[self._chance.randrange(len(content))] ^= 1 << self._chance.randrange(8)
            self._machine.settle()
            await self._site.operation("node_scrub", node=name)
            await self._site.healed(_HEAL_S)

    # -- disks in trouble --------------------------------------------------------------------------------------------

    async def _disk_away(self) -> None:
        prefix = self._machine.place(self._node())
        self._machine.disk.away[prefix] = None
        await asyncio.sleep(self._chance.uniform(0.5, 20.0))
        self._machine.disk.away.pop(prefix, None)

    async def _disk_full(self) -> None:
        name = self._node()
        disk = self._disk(name)
        disk.free = 1000
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        for there in (disk, self._disk(name)):  # another may lie there by now: after a power cut, or put in its place
            there.free = ROOM

    async def _no_space(self) -> None:
        disk = self._disk(self._node())
        disk.fail(self._chance.choice(["write", "allocate"]), self._chance.randint(1, 10), errno.ENOSPC)
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        disk.clear_faults()

    async def _write_error(self) -> None:
        """A node that fails an fsync stays failed until the process starts anew (P18)."""
        name = self._node()
        disk = self._disk(name)
        disk.fail(self._chance.choice(["write", "sync"]), self._chance.randint(1, 30))
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        disk.clear_faults()
        await self._restarted([name])

    async def _answers_lost(self) -> None:
        """Several nodes write what they are asked and say that they could not; the process ends soon after."""
        names = self._chance.sample(self._site.node_names, self._chance.randint(2, len(self._site.node_names)))
        for name in names:
            self._disk(name).fail("answer", self._chance.randint(1, 4))
        await asyncio.sleep(self._chance.uniform(0.5, 6.0))
        for name in names:
            self._disk(name).clear_faults()
        await self._restarted(names)

    async def _read_error(self) -> None:
        disk = self._disk(self._node())
        for _ in range(self._chance.randint(1, 5)):
            if not self._absent:
                disk.fail("read", self._chance.randint(1, 10))
            await asyncio.sleep(self._chance.uniform(0.2, 2.0))
        disk.clear_faults()

    async def _slow_disk(self) -> None:
        lane = f"{self._node()}-{self._chance.choice(['write', 'read'])}"
        self._machine.slow[lane] = self._chance.uniform(0.05, 1.0)
        await asyncio.sleep(self._chance.uniform(2.0, 15.0))
        self._machine.slow.pop(lane, None)

    async def _hung_disk(self) -> None:
        """Calls of a disk do not end, for longer than anybody waits; deaths of the process fall into it."""
        name = self._node()
        lanes = [f"{name}-{which}" for which in self._chance.choice([["write"], ["read"], ["write", "read"]])]
        for lane in lanes:
            self._machine.hung[lane] = None
        await asyncio.sleep(self._chance.uniform(5.0, 90.0))
        for lane in lanes:
            self._machine.hung.pop(lane, None)

    async def _hung_disks(self) -> None:
        """Writes to several nodes do not end for a while, and then they do: their answers come too late for anybody."""
        names = self._chance.sample(self._site.node_names, self._chance.randint(2, len(self._site.node_names)))
        for name in names:
            self._machine.hung[f"{name}-write"] = None
        await asyncio.sleep(self._chance.uniform(3.0, 25.0))
        for name in names:
            self._machine.hung.pop(f"{name}-write", None)

    async def _keys_zeroed(self) -> None:
        """A page of a node's derived key index is lost; the node makes it anew (law 14)."""
        name = self._node()
        prefix = self._machine.place(name)
        if prefix in self._machine.disk.away:
            return
        path = self._machine.disk.keys_path(f"{prefix}/keys.db")
        self._machine.zero_page(path)
        if self._chance.random() < 0.5:
            await self._restarted([name])

    async def _blocked(self) -> None:
        name = self._node()
        await self._site.operation("node_block", node=name, blocked=True)
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        for _ in range(600):
            if await self._site.operation("node_block", node=name, blocked=False) is not None:
                return
            await asyncio.sleep(1.0)

    async def _ill(self, lanes: list[str], how: str) -> None:
        for lane in lanes:
            self._machine.ill[lane] = how
        await asyncio.sleep(self._chance.uniform(1.0, 30.0))
        for lane in lanes:
            self._machine.ill.pop(lane, None)

    async def _directory_away(self) -> None:
        await self._ill(["directory"], "error")


class Faults(DiskFaults[Site]):
    """What may befall one process that does everything, with its index in a file."""

    def __init__(self, site: Site, chance: random.Random, only: Sequence[str] = ()) -> None:
        super().__init__(site, chance, only)
        self._process = asyncio.Lock()  # one death of the process at a time

    def _all(self) -> dict[str, Kind]:
        return super()._all() | {
            "kill": self._kill,
            "power-cut": self._power_cut,
            "index-away": self._index_away,
            "index-unknown": self._index_unknown,
            "index-hung": self._index_hung,
            "slow-index": self._slow_index,
            "resets": self._resets,
            "stall": self._stall,
            "clock-jump": self._clock_jump,
            "old-index": self._old_index,
            "hot-index": self._hot_index,
            "rebuild": self._rebuild,
        }

    # -- the process --------------------------------------------------------------------------------------------------

    async def _kill(self) -> None:
        async with self._process:
            self._machine.kill()
            await self._site.restart(self._chance.uniform(0.1, 2.0))

    async def _restarted(self, nodes: Sequence[str]) -> None:
        await self._kill()

    async def _power_cut(self) -> None:
        async with self._process:
            self._machine.cut_power()
            await self._site.restart(self._chance.uniform(0.5, 5.0))

    # -- the index -----------------------------------------------------------------------------------------

    async def _index_away(self) -> None:
        await self._ill(["index-write", "index-read"], "error")

    async def _index_unknown(self) -> None:
        await self._ill(["index-write"], "unknown")

    async def _index_hung(self) -> None:
        self._machine.hung["index-write"] = None
        await asyncio.sleep(self._chance.uniform(1.0, 40.0))
        self._machine.hung.pop("index-write", None)

    async def _slow_index(self) -> None:
        """Slow, but within what a 250 waits for: then what is acknowledged is listed at once."""
        self._machine.slow["index-write"] = self._chance.uniform(0.02, 0.3)
        await asyncio.sleep(self._chance.uniform(2.0, 15.0))
        self._machine.slow.pop("index-write", None)

    async def _old_index(self) -> None:
        """A backup is put under a process that is down (F28)."""
        async with self._process:  # not while the index is being made anew
            self._machine.snapshot_index()
            backup_at = asyncio.get_running_loop().time()
        await asyncio.sleep(self._chance.uniform(1.0, min(40.0, self._site.tombstone_s - _WALKED_S)))
        async with self._process:
            await self._restore(backup_at)

    async def _hot_index(self) -> None:
        """A copy taken while it is used is put back, then the same again: no number may be given twice."""
        async with self._process:
            self._machine.snapshot_index()
            backup_at = asyncio.get_running_loop().time()
            for _ in range(self._chance.randint(1, 3)):
                await asyncio.sleep(self._chance.uniform(0.2, 20.0))
                await self._restore(backup_at)

    async def _restore(self, backup_at: float) -> None:
        """Not while a disk is lost and another is not read: no index that is older than both knows what these two alone had.

        Nor one that is older than tombstones: what was deleted since is believed for ever, and lies nowhere (law 9).
        """
        if asyncio.get_running_loop().time() - backup_at > self._site.tombstone_s - _WALKED_S:
            return
        if not self._damage.locked():
            await self._put_back(backup_at, self._chance.choice([0, 0, 1, 2, 3]))
        elif not self._hiding:
            self._bare = True
            await self._put_back(backup_at, 0)
            await self._site.healed(_HEAL_S)
            self._bare = False

    async def _put_back(self, backup_at: float, sick_nodes: int) -> None:
        self._machine.kill()
        self._site.forget_deletions(backup_at)
        self._site.let_go()
        self._machine.restore_index()
        sick = asyncio.ensure_future(self._sick_for_a_while(sick_nodes))
        await self._site.restart(self._chance.uniform(0.1, 2.0))
        await sick

    async def _sick_for_a_while(self, count: int) -> None:
        """Some nodes hang or are absent when the process starts (law 11 with some groups only)."""
        names = self._chance.sample(self._site.node_names, count)
        away = self._chance.random() < 0.5
        for name in names:
            if away:
                self._machine.disk.away[self._machine.place(name)] = None
            else:
                self._machine.hung.update({f"{name}-write": None, f"{name}-read": None})
        await asyncio.sleep(self._chance.uniform(2.0, 30.0) if names else 0.0)
        for name in names:
            self._machine.disk.away.pop(self._machine.place(name), None)
            self._machine.hung.pop(f"{name}-write", None)
            self._machine.hung.pop(f"{name}-read", None)

    async def _rebuild(self) -> None:
        """The index is lost at any moment; the operator makes it anew, sometimes killed in the middle of it, sometimes twice,
        sometimes without a node, which comes back before or after the start.
        """
        async with self._process, self._damage:
            if not await self._site.healed(_HEAL_S):
                return
            for _ in range(self._chance.choice([1, 1, 2])):
                if self._chance.random() < 0.3:
                    await self._site.checkpointed()
                await asyncio.sleep(self._chance.uniform(0.0, 8.0))
                await self._rebuild_once(self._node() if self._chance.random() < 0.35 else "")
                if not await self._site.healed(_HEAL_S):
                    return

    async def _rebuild_once(self, without: str) -> None:
        prefix = self._machine.place(without)
        self._machine.kill()
        self._site.forget_unsaved(without)
        self._site.let_go()
        self._machine.lose_index()
        if without:
            self._absent = without
            self._machine.disk.away[prefix] = None
        await self._site.rebuild(without)
        if self._chance.random() < 0.5:
            self._machine.disk.away.pop(prefix, None)
        await self._site.restart(self._chance.uniform(0.1, 2.0))
        if without:
            await asyncio.sleep(self._chance.uniform(0.0, 8.0))
            self._machine.disk.away.pop(prefix, None)
            self._absent = ""

    # -- network and clock -------------------------------------------------------------------------------------------

    async def _resets(self) -> None:
        self._machine.net.break_some("server", self._chance.uniform(0.2, 1.0))

    async def _stall(self) -> None:
        until = asyncio.get_running_loop().time() + self._chance.uniform(0.5, 8.0)
        self._machine.net.stalled_until[self._chance.choice(["server", "fleet", "peer"])] = until

    async def _clock_jump(self) -> None:
        self._machine.clock.skew_s += self._chance.uniform(-JUMP_S, JUMP_S)
