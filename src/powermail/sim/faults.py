"""Owns the faults of a simulation: which may happen, and that damage stays within what R copies must bear.

What takes data away for good (an emptied disk, rot) happens to one node at a time and only while every message is redundant;
so whatever a client then misses is our bug.
"""

from __future__ import annotations

import asyncio
import random
from typing import Protocol

from powermail.sim.disk import SimDisk
from powermail.sim.world import DATA, Machine


class Site(Protocol):
    """What faults may do with the running installation."""

    machine: Machine
    node_names: list[str]

    def let_go(self) -> None:
        """Closes what a killed process had open."""

    def forget_deletions(self, since: float) -> None:
        """Deletions since then may be undone: they were only in what a backup does not have."""

    async def restart(self, pause_s: float) -> None:
        """Starts a new process after a kill."""

    async def healed(self, within_s: float) -> bool:
        """Waits until every message is redundant. False if it takes too long."""

    async def operation(self, name: str, **arguments: object) -> object:
        """An operator's command; None while it cannot be done."""


class Faults:
    """Draws faults for a seed: a random part of all kinds (a swarm), one after the other."""

    def __init__(self, site: Site, chance: random.Random) -> None:
        self.happened: dict[str, int] = {}
        self._site = site
        self._chance = chance
        kinds = {
            "kill": self._kill,
            "power-cut": self._power_cut,
            "disk-away": self._disk_away,
            "disk-emptied": self._disk_emptied,
            "rot": self._rot,
            "disk-full": self._disk_full,
            "write-error": self._write_error,
            "slow-disk": self._slow_disk,
            "hanging-disk": self._hanging_disk,
            "resets": self._resets,
            "stall": self._stall,
            "clock-jump": self._clock_jump,
            "old-index": self._old_index,
        }
        count = chance.randint(3, len(kinds))
        self._kinds = {name: kinds[name] for name in sorted(chance.sample(sorted(kinds), count))}

    async def run(self, until: float) -> None:
        """One fault after the other until that time; all are over at the end."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(self._chance.uniform(0.5, 5.0))
            name = self._chance.choice(list(self._kinds))
            self._site.machine.note(f"fault {name}")
            await self._kinds[name]()
            self.happened[name] = self.happened.get(name, 0) + 1

    def _node(self) -> str:
        return self._chance.choice(self._site.node_names)

    async def _kill(self) -> None:
        self._site.machine.kill()
        await self._site.restart(self._chance.uniform(0.1, 2.0))

    async def _power_cut(self) -> None:
        self._site.machine.cut_power()
        await self._site.restart(self._chance.uniform(0.5, 5.0))

    async def _disk_away(self) -> None:
        prefix = f"{DATA}/nodes/{self._node()}"
        self._site.machine.disk.away[prefix] = None
        await asyncio.sleep(self._chance.uniform(0.5, 20.0))
        self._site.machine.disk.away.pop(prefix, None)

    async def _disk_emptied(self) -> None:
        if not await self._site.healed(120.0):
            return
        name = self._node()
        prefix = f"{DATA}/nodes/{name}"
        machine = self._site.machine
        machine.disk.away[prefix] = None
        await asyncio.sleep(self._chance.uniform(2.0, 10.0))
        machine.disk.parts[prefix] = SimDisk()
        machine.disk.parts[prefix].make_directory(prefix)
        machine.bases[prefix] = machine.disk.parts[prefix].clone()
        machine.disk.away.pop(prefix, None)
        for _ in range(120):  # refused while a write still hangs there: the operator tries again
            if await self._site.operation("node_replace", node=name) is not None:
                break
            await asyncio.sleep(1.0)
        await self._site.healed(300.0)

    async def _rot(self) -> None:
        if not await self._site.healed(120.0):
            return
        name = self._node()
        disk = self._site.machine.disk.parts[f"{DATA}/nodes/{name}"]
        segments = sorted(path for path in disk.names if path.endswith(".seg"))
        if not segments:
            return
        content = disk.content[disk.names[self._chance.choice(segments)]]
        for _ in range(self._chance.randint(1, 8)):
            content[self._chance.randrange(len(content))] ^= 1 << self._chance.randrange(8)
        self._site.machine.settle()
        await self._site.operation("node_scrub", node=name)
        await self._site.healed(300.0)

    async def _disk_full(self) -> None:
        disk = self._site.machine.disk.parts[f"{DATA}/nodes/{self._node()}"]
        disk.free = 1000
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        disk.free = 1 << 40

    async def _write_error(self) -> None:
        """A node that fails stays failed until the process starts anew (P18)."""
        disk = self._site.machine.disk.parts[f"{DATA}/nodes/{self._node()}"]
        disk.fail(self._chance.choice(["write", "sync"]), self._chance.randint(1, 30))
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        disk.clear_faults()
        self._site.machine.kill()
        await self._site.restart(self._chance.uniform(0.1, 2.0))

    async def _slow(self, seconds: float) -> None:
        lane = f"{self._node()}-{self._chance.choice(['write', 'read'])}"
        self._site.machine.slow[lane] = seconds
        await asyncio.sleep(self._chance.uniform(2.0, 15.0))
        self._site.machine.slow.pop(lane, None)

    async def _slow_disk(self) -> None:
        await self._slow(self._chance.uniform(0.05, 1.0))

    async def _hanging_disk(self) -> None:
        await self._slow(self._chance.uniform(15.0, 40.0))

    async def _resets(self) -> None:
        self._site.machine.net.break_some("server", self._chance.uniform(0.2, 1.0))

    async def _stall(self) -> None:
        until = asyncio.get_running_loop().time() + self._chance.uniform(0.5, 8.0)
        self._site.machine.net.stalled_until[self._chance.choice(["server", "fleet", "peer"])] = until

    async def _clock_jump(self) -> None:
        self._site.machine.clock.skew_s += self._chance.uniform(-300.0, 300.0)

    async def _old_index(self) -> None:
        machine = self._site.machine
        machine.snapshot_index()
        backup_at = asyncio.get_running_loop().time()
        await asyncio.sleep(self._chance.uniform(1.0, 10.0))
        machine.kill()
        self._site.let_go()
        machine.restore_index()
        self._site.forget_deletions(backup_at)
        await self._site.restart(self._chance.uniform(0.1, 2.0))
