"""Owns the course of a torture: beats and scenes as they are planned, what is waited for, and the calm at the end.

Whatever waits has an end: what is not well by then is a violation. At the end all machines run and all links carry.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from powermail.base.errors import PowerMailError
from powermail.torture import damage
from powermail.torture.checker import Checker
from powermail.torture.fleet import Fleet
from powermail.torture.line import Line, Lost
from powermail.torture.machines import Machines
from powermail.torture.plan import (
    DATABASE,
    FRONTS,
    HEAD,
    LOSING,
    MACHINES,
    NODES,
    Kind,
    Plan,
    Scene,
    choose,
    has_parent,
    may_begin,
)

_LOOK_S = 0.2
_UP_S = 180.0  # a machine that was started again takes mail within this, also where others have the cores
_HEALED_S = 300.0
_GREETING_S = 10.0
_CALM_S = 240.0  # what the index was late for is entered within two minutes of both being there
_REST_S = 0.5  # a killed machine stays away about so long


class Course:
    """What has happened, for the report."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {kind.value: 0 for kind in Kind}
        self.flips = 0
        self.empty_s = 0.0  # the longest from the admission of an empty disk to full redundancy
        self.empty_messages = 0


class Conductor:
    """Does what the plan says."""

    def __init__(
        self, machines: Machines, plan: Plan, fleet: Fleet, checker: Checker, aside: Path, tell: Callable[[str], None]
    ) -> None:
        """`aside`: where the older state of a disk is kept meanwhile; `tell` hears what is done when, for who looks into a
        failure.
        """
        self.course = Course()
        self._heard = tell
        self._machines = machines
        self._plan = plan
        self._fleet = fleet
        self._checker = checker
        self._aside = aside
        self._chance = random.Random(f"damage {plan.seed}")
        self._up = dict.fromkeys(MACHINES, True)
        self._scene: Scene | None = None
        self._recovering: dict[asyncio.Task[None], None] = {}
        self._began = 0.0
        self._over = False

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    def _tell(self, text: str) -> None:
        self._heard(f"{asyncio.get_running_loop().time():.2f} {text}")

    def _count(self, kind: Kind) -> None:
        self.course.done[kind.value] += 1

    # -- the two streams ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The time of faults."""
        self._began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beats())
            group.create_task(self._scenes())
        while self._recovering:
            await asyncio.sleep(_LOOK_S)

    async def _beats(self) -> None:
        database_at = float("-inf")
        for beat in self._plan.beats:
            await asyncio.sleep(max(0.0, beat.at_s - self._now()))
            if self._over:
                return
            name = choose(beat, self._up, self._scene, self._now() - database_at)
            if name:
                database_at = self._now() if name == DATABASE else database_at
                self._count(Kind.KILL_DATABASE if name == DATABASE else Kind.KILL)
                whole = beat.whole or not has_parent(name)
                await self._kill(name, whole)
                self._recover(name, whole)

    async def _scenes(self) -> None:
        for scene in self._plan.scenes:
            if self._now() >= self._plan.seconds:
                break
            self._scene = scene  # from now on nobody is killed whom it spares
            if not await self._until(partial(self._may_begin, scene), _UP_S):
                continue
            if scene.kind in LOSING and not await self._well():
                break
            self._count(scene.kind)
            self._tell(f"{scene.kind.value} {scene.machine} {scene.other}".rstrip())
            await self._play(scene)
            self._tell(f"{scene.kind.value} {scene.machine} {scene.other} is over".replace("  ", " "))
            self._scene = None
            await asyncio.sleep(scene.rest_s)
        await asyncio.sleep(max(0.0, self._plan.seconds - self._now()))
        self._over = True

    async def _may_begin(self, scene: Scene) -> bool:
        return may_begin(scene, self._up)

    async def _play(self, scene: Scene) -> None:
        if scene.kind in (Kind.CUT, Kind.ONE_WAY, Kind.CUT_DATABASE):
            await self._machines.cut(scene.machine, scene.other, both=scene.kind is not Kind.ONE_WAY)
            await asyncio.sleep(scene.lasts_s)
            await self._machines.mend()
            if scene.machine in NODES:
                await self._back(scene.machine)
        elif scene.kind is Kind.PAUSE:
            await self._machines.pause(scene.machine)
            self._up[scene.machine] = False
            await asyncio.sleep(scene.lasts_s)
            self._machines.resume(scene.machine)
            await self._back(scene.machine)
        elif scene.kind is Kind.FULL:
            filler = damage.fill(self._machines.store(scene.machine).parent)
            try:
                await asyncio.sleep(scene.lasts_s)
            finally:
                filler.unlink()
            await self._back(scene.machine)
        elif scene.kind is Kind.EMPTIED:
            await self._emptied(scene.machine)
        elif scene.kind is Kind.OLD_DISK:
            await self._old_disk(scene)
        else:
            self.course.flips += await asyncio.to_thread(
                damage.flip, self._machines.store(scene.machine), scene.flips, self._chance
            )
            await self._asked(HEAD, "node_scrub", node=_id(scene.machine))
            await self._well()

    async def _emptied(self, name: str) -> None:
        await self._kill(name)
        await asyncio.to_thread(damage.empty, self._machines.store(name))
        await self._machines.start(name)
        found = await self._asked(HEAD, "status")
        if await self._asked(HEAD, "node_replace", node=_id(name)) is None:
            self._checker.violation("healing", f"{name} with an empty disk could not be replaced")
            return
        began = self._now()
        await self._back(name)
        if await self._well() and (took := self._now() - began) > self.course.empty_s:
            self.course.empty_s = took
            self.course.empty_messages = found["totals"].get("messages", 0) if found else 0

    async def _old_disk(self, scene: Scene) -> None:
        store = self._machines.store(scene.machine)
        await self._kill(scene.machine)
        await asyncio.to_thread(damage.keep, store, self._aside)
        await self._machines.start(scene.machine)
        await self._back(scene.machine)
        await asyncio.sleep(scene.lasts_s)
        await self._kill(scene.machine)
        await asyncio.to_thread(damage.put_back, self._aside, store)
        await self._machines.start(scene.machine)
        await self._back(scene.machine)
        await self._well()

    # -- machines -----------------------------------------------------------------------------------------------------

    async def _kill(self, name: str, whole: bool = True) -> None:
        self._up[name] = False
        self._tell(f"kill -9 {name}{'' if whole else ', all but its first process'}")
        await self._machines.kill(name, whole)

    def _recover(self, name: str, whole: bool) -> None:
        """Starts it again soon, unless it does so by itself; then it is waited for."""

        async def recover() -> None:
            if whole:
                await asyncio.sleep(_REST_S * self._chance.random())
                await self._machines.start(name)
            await self._back(name)

        task = asyncio.get_running_loop().create_task(recover())
        self._recovering[task] = None
        task.add_done_callback(lambda done: self._recovered(done, name))

    def _recovered(self, task: asyncio.Task[None], name: str) -> None:
        self._recovering.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._checker.violation("down", f"{name} could not be started again: {error!r}")

    async def _back(self, name: str) -> None:
        """Until it takes mail again, or serves as it did."""
        if await self._until(lambda: self._serves(name), _UP_S):
            self._up[name] = True
            self._tell(f"{name} is back")
        else:
            self._checker.violation("down", f"{name} does not serve {_UP_S:.0f} s after it was started again")

    async def _serves(self, name: str) -> bool:
        if name == DATABASE:
            return await self._machines.database_is_whole()
        if name in FRONTS:
            return await self._greets(name)
        if name == HEAD:
            return await self._quick(HEAD, "node_list") is not None
        seen = [await self._quick(other, "node_list") for other in (HEAD, *FRONTS) if self._up[other]]
        return all(found is not None and any(row["id"] == _id(name) and row["takes_mail"] for row in found) for found in seen)

    async def _greets(self, name: str) -> bool:
        (door,) = [door for door in self._machines.doors if door.name == name]
        try:
            line = await Line.open(door.host, door.smtp)
            try:
                return (await line.reply(_GREETING_S)).startswith(b"220")
            finally:
                await line.close()
        except Lost:
            return False

    async def _quick(self, name: str, call: str, **arguments: object) -> Any:
        """One question; None if it is not answered."""
        try:
            return await self._machines.ask(name, call, **arguments)
        except PowerMailError:
            return None

    async def _asked(self, name: str, call: str, **arguments: object) -> Any:
        """The same, asked until it is answered; None if that takes too long."""
        answer: list[Any] = []

        async def once() -> bool:
            found = await self._quick(name, call, **arguments)
            if found is not None:
                answer.append(found)
            return found is not None

        return answer[0] if await self._until(once, _UP_S) else None

    async def _until(self, holds: Callable[[], Awaitable[bool]], within_s: float) -> bool:
        """Waits until it holds; False if it does not in time."""
        ends_at = self._now() + within_s
        while not await holds():
            if self._now() > ends_at:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    # -- health -------------------------------------------------------------------------------------------------------

    async def _redundant(self) -> bool:
        status = await self._quick(HEAD, "status")
        return status is not None and not why_unwell(status)

    async def _well(self) -> bool:
        """Until every message has its copies on disks that were compared; False, and a violation, if that takes too long."""
        began = self._now()
        if await self._until(self._redundant, _HEALED_S):
            self._tell(f"fully redundant after {self._now() - began:.1f} s")
            return True
        why = why_unwell(await self._quick(HEAD, "status") or {})
        self._checker.violation("healing", f"after {_HEALED_S:.0f} s not redundant: {'; '.join(why)}")
        return False

    async def calm(self) -> None:
        """No more faults: all heals, and everything that was acknowledged is shown."""
        await self._machines.mend()
        for name in MACHINES:
            if not self._up[name]:
                await self._back(name)
        await self._well()
        accounts = self._checker.waited_for
        waited = await self._until(lambda: self._shown(accounts()), _CALM_S)
        if not waited:
            self._checker.violation("short", f"after {_CALM_S:.0f} s of calm not shown: {accounts()}")

    async def _shown(self, waited_for: dict[str, int]) -> bool:
        for account in waited_for:
            try:
                await self._fleet.read(self._chance.choice(self._machines.doors), account, delete=False)
            except Lost:
                continue
        return not self._checker.waited_for()

    async def last_look(self, accounts: list[str]) -> dict[str, list[str]]:
        """Every message of every mailbox, read; a mailbox that cannot be read is a violation."""
        found: dict[str, list[str]] = {}
        for account in accounts:

            async def once(account: str = account) -> bool:
                try:
                    keys = await self._fleet.read(self._machines.doors[0], account, delete=False, all_of_it=True)
                except Lost:
                    return False
                if keys is not None:
                    found[account] = keys
                return keys is not None

            if not await self._until(once, _CALM_S):
                self._checker.violation("damaged", f"{account} cannot be read whole in calm")
                found[account] = []
        self._checker.late(self._machines.late())
        verified = await self._asked(HEAD, "verify")
        for problem in verified["problems"] if verified is not None else ["`powermail verify` is not answered"]:
            self._checker.violation("store", f"verify: {problem}")
        return found


def why_unwell(status: dict[str, Any]) -> list[str]:
    """What a status says against full redundancy; empty: every message has its copies, on disks that were compared."""
    if not status:
        return ["the status is not answered"]
    found = [f"node {row['id']} is {row['state']}" for row in status["nodes"] if row["state"] != "read-write"]
    found += [f"node {row['id']} was not compared" for row in status["members"] if not row["compared"]]
    found += [f"node {row['id']} owes a walk" for row in status["members"] if row["owes_walk"]]
    found += [f"index: {text}" for text in status["degraded"] if text.startswith("index") or "catching up" in text]
    if len(status["members"]) < len(NODES):
        found.append(f"only {len(status['members'])} nodes are known")
    if thin := status["not_redundant"]["messages"]:
        found.append(f"{thin} messages are not redundant")
    return found


def _id(name: str) -> str:
    return name.removeprefix("node-")
