"""Jobs of several processes: one does each, another takes over when it dies, and all can be seen. In virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from powermail.app.keeping import Keeping
from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble
from powermail.base.tasks import Tasks
from powermail.index.sharing import JobLease
from powermail.keeper.leases import Leases, Process, seen
from powermail.mailbox.exclusive import Exclusive
from powermail.mailbox.maildrop import InUse, Maildrops
from powermail.message.opener import Opener
from tests.keeper.rig import Rig, go


def process(rig: Rig, part: str, machine: str = "one", died: str = "-") -> Process:
    """A process that starts now."""
    return Process(part, machine, 4711, "0.1.0", rig.world.clock.now(), rig.world.entropy.octets(8).hex(), died)


class Keeper:
    """A keeper with one job, which counts how often it was done."""

    def __init__(self, rig: Rig, machine: str) -> None:
        self.leases = Leases(rig.world, rig.index, process(rig, "keeper", machine))
        self.done = 0
        self._step = self.leases.leased("scrub a", self._work)
        self._tasks = [asyncio.create_task(self._loop(step)) for step in (self._step, self.leases.renew, self.leases.show)]

    async def _work(self) -> float:
        self.done += 1
        return 1.0

    async def _loop(self, step: object) -> None:
        while True:
            await asyncio.sleep(await step())  # type: ignore[operator]

    async def die(self) -> None:
        """Without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_a_job_is_one_keepers_until_it_dies_and_then_anothers_within_a_bound() -> None:
    async def body(rig: Rig) -> None:
        first, second = Keeper(rig, "one"), Keeper(rig, "two")
        await asyncio.sleep(300)
        done = first.done
        assert done > 250 and second.done == 0
        await first.die()
        await asyncio.sleep(limits.JOB_LEASE_S + limits.JOB_LOOK_S + 2)
        assert second.done > 0
        assert first.done == done
        assert rig.world.counters.get("keeper.jobs_taken") == 2
        await second.die()

    go(body)


def test_a_keeper_that_stops_in_good_order_is_followed_at_the_next_look() -> None:
    async def body(rig: Rig) -> None:
        first, second = Keeper(rig, "one"), Keeper(rig, "two")
        await asyncio.sleep(30)
        await first.die()
        await first.leases.stop()
        await asyncio.sleep(limits.JOB_LOOK_S + 1)
        assert second.done > 0
        assert [one.process.machine for one in seen(await rig.index.leases())] == ["two"]
        await second.die()

    go(body)


def test_a_keeper_that_was_held_up_finds_its_job_taken_and_leaves_it() -> None:
    async def body(rig: Rig) -> None:
        first, second = (Leases(rig.world, rig.index, process(rig, "keeper", name)) for name in ("one", "two"))
        assert await first.take("repair")
        assert not await second.take("repair")
        await asyncio.sleep(limits.JOB_LEASE_S + 1)
        assert await second.take("repair")
        assert not await first.take("repair")
        assert rig.world.counters.get("keeper.jobs_lost") == 1

    go(body)


def keeping_of(rig: Rig, cluster: Any) -> Keeping:
    """The keepers of a process that sees this cluster."""
    core = SimpleNamespace(owners=MagicMock(), following=MagicMock(), cluster=cluster, index=rig.index)
    core.epochs, core.reconciler, core.admission = (MagicMock(step=AsyncMock(return_value=1.0)) for _ in range(3))
    said: dict[str, Any] = {each.name: MagicMock() for each in fields(Keeping) if each.default_factory is MISSING}
    said |= {name: MagicMock(step=AsyncMock(return_value=1.0)) for name in ("collector", "compactor", "scrubber")}
    return Keeping(**{**said, "core": core, "forgetter": rig.forgetter, "repairer": rig.repairer})


def test_what_a_keeper_has_said_of_a_job_is_not_said_any_more_when_another_does_it() -> None:
    """Status says what every process knows: what one knew before it was held up would stand there for ever."""

    async def body(rig: Rig) -> None:
        leases, other = (Leases(rig.world, rig.index, process(rig, "keeper", name)) for name in ("one", "two"))
        steps = keeping_of(rig, rig.cluster).leased_jobs(leases)
        for job in ("forget", "repair"):
            await steps[job]()
        rig.forgetter.alarms = ["node c is away"]
        rig.repairer.unrepairable, rig.repairer.left, rig.repairer.rate = {b"key": "no group is left"}, 7, 0.5
        await asyncio.sleep(limits.JOB_LEASE_S + 1)
        for job in ("forget", "repair"):
            assert await other.take(job)
            await steps[job]()
        assert rig.forgetter.alarms == [] and rig.repairer.unrepairable == {} and rig.repairer.seconds_left() is None

    go(body)


class View:
    """What one process sees of the nodes."""

    def __init__(self, rig: Rig) -> None:
        self.apart = False
        self.nodes = rig.cluster.nodes
        self.watch = rig.cluster.watch
        self.away: set[str] = set()
        self.strange: set[str] = set()  # there, and not compared with the index yet

    def readable(self) -> list[Any]:
        return [node for name, node in self.nodes.items() if name not in self.away]

    def admitted(self) -> list[Any]:
        return [node for node in self.readable() if node.id not in self.strange]


@pytest.mark.parametrize("kind", ["reconcile", "collect", "compact", "scrub", "admission"])
@pytest.mark.parametrize("why", ["away", "strange"])
def test_a_job_on_a_node_is_anothers_while_this_keeper_cannot_do_it(kind: str, why: str) -> None:
    """One had the job that enters a node's log and might not take the node in; the other, who had, waited for that."""

    async def body(rig: Rig) -> None:
        one, two = View(rig), View(rig)
        steps, others = (
            keeping_of(rig, view).leased_jobs(Leases(rig.world, rig.index, process(rig, "keeper", name)))
            for name, view in (("one", one), ("two", two))
        )

        async def owners() -> dict[str, str]:
            return {lease.job: lease.owner.split(" ")[1] for lease in await rig.index.leases() if lease.job.startswith(kind)}

        everywhere = {f"{kind} {name}" for name in rig.cluster.nodes}
        for job in everywhere:
            await steps[job]()
            await others[job]()
        assert await owners() == dict.fromkeys(everywhere, "one")
        (one.away if why == "away" else one.strange).add("b")
        stays = kind == "admission" and why == "strange"  # who has it compares the node, which makes it one that takes part
        for _ in range(2):
            for job in everywhere:
                await steps[job]()
                await others[job]()
        assert await owners() == {job: "two" if job == f"{kind} b" and not stays else "one" for job in everywhere}
        two.away.add("b")
        await others[f"{kind} b"]()
        await steps[f"{kind} b"]()
        assert stays or f"{kind} b" not in await owners(), "nobody says that he does what nobody can do"
        one.away.clear()
        one.strange.clear()
        await steps[f"{kind} b"]()
        assert await owners() == dict.fromkeys(everywhere, "one")

    go(body)


def test_forgetting_waits_for_a_node_that_is_away_and_is_not_given_up() -> None:
    """It goes on from what it knows of all nodes."""

    async def body(rig: Rig) -> None:
        view = View(rig)
        leases = Leases(rig.world, rig.index, process(rig, "keeper", "one"))
        steps = keeping_of(rig, view).leased_jobs(leases)
        assert await leases.take("forget")
        view.away.add("b")
        await steps["scan b"]()
        assert [lease.job for lease in await rig.index.leases()] == ["forget"]

    go(body)


def test_a_job_that_rests_is_given_up_too_when_its_keeper_cannot_do_it_any_more() -> None:
    async def body(rig: Rig) -> None:
        one, other = (Leases(rig.world, rig.index, process(rig, "keeper", name)) for name in ("one", "two"))
        can = True

        async def rests() -> float:
            return 3600.0

        assert await one.leased("scrub a", rests, can=lambda: can)() == 3600.0
        await one.renew()
        assert not await other.take("scrub a")
        can = False
        await one.renew()
        assert await other.take("scrub a")

    go(body)


class Apart:
    """A keeper that sees the cluster its own way, and runs every job that is for one of all."""

    def __init__(self, rig: Rig, machine: str) -> None:
        self.view = View(rig)
        self.leases = Leases(rig.world, rig.index, process(rig, "keeper", machine))
        keeping = keeping_of(rig, self.view)
        for room in _ROOMS:
            setattr(keeping, room, MagicMock(step=AsyncMock(return_value=1.0), scan=AsyncMock(return_value=1.0)))
        steps = keeping.leased_jobs(self.leases)
        del steps["spread"]
        self._tasks = [asyncio.create_task(self._loop(step)) for step in (*steps.values(), self.leases.renew, self.leases.show)]

    async def _loop(self, step: Any) -> None:
        while True:
            await asyncio.sleep(await step())

    async def die(self) -> None:
        """Without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


_ROOMS = ("repairer", "checkpointer", "forgetter", "expeller", "drainer", "rebalancer")
_FOR_ONE = {"epochs", "repair", "checkpoint", "forget", "expelled", "drain", "rebalance", "enter"}


async def who_does(rig: Rig) -> dict[str, str]:
    """The machine of each job that is for one keeper of all."""
    return {each.job: each.owner.split(" ")[1] for each in await rig.index.leases() if each.job in _FOR_ONE}


def test_what_needs_all_nodes_is_done_by_who_sees_the_most() -> None:
    """One that is cut off from nodes, and not from the database, would keep repair and forgetting from all."""

    async def body(rig: Rig) -> None:
        one = Apart(rig, "one")
        await asyncio.sleep(5)
        two = Apart(rig, "two")
        await asyncio.sleep(60)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "one"), "they see the same"
        one.view.away.add("b")
        await asyncio.sleep(limits.JOB_VIEW_S / 2)
        one.view.away.clear()
        await asyncio.sleep(60)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "one"), "nodes come and go, and not for all at one moment"
        one.view.away.add("b")
        await asyncio.sleep(limits.JOB_VIEW_S + 3 * limits.JOB_LOOK_S)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "two")
        two.view.away.add("a")
        await asyncio.sleep(60)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "two"), "it sees no fewer than the other"
        one.view.away.clear()
        await asyncio.sleep(limits.JOB_VIEW_S + 3 * limits.JOB_LOOK_S)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "one")
        one.view.away.update("abc")
        await asyncio.sleep(limits.JOB_VIEW_S + 3 * limits.JOB_LOOK_S)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "two")
        await two.die()
        await asyncio.sleep(limits.PROCESS_LEASE_S + limits.JOB_LEASE_S)
        assert await who_does(rig) == dict.fromkeys(_FOR_ONE, "one"), "who is dead sees nothing"
        await one.die()
        shown = [lease.job for lease in await rig.index.leases() if lease.job.startswith("sees ")]
        assert len(shown) == 2, "what each said last"
        await one.leases.stop()
        assert [lease.job for lease in await rig.index.leases() if lease.owner == one.leases.process.owner] == []

    go(body)


def test_a_job_is_held_no_longer_than_its_lease_whatever_the_index_says_later() -> None:
    """The time counts from before it was asked for."""

    async def body(rig: Rig) -> None:
        leases = Leases(rig.world, rig.index, process(rig, "keeper"))
        assert await leases.take("repair")
        await asyncio.sleep(limits.JOB_LEASE_S - 0.5)
        await rig.index.release("repair", leases.process.owner)
        assert await rig.index.lease("repair", "somebody else", 60.0)
        assert await leases.take("repair"), "not asked again before it is over"
        await asyncio.sleep(1)
        assert not await leases.take("repair")

    go(body)


def test_processes_are_shown_with_their_jobs_and_those_that_died_unless_another_has_their_place() -> None:
    async def body(rig: Rig) -> None:
        keeper = Leases(rig.world, rig.index, process(rig, "keeper"))
        front = Leases(rig.world, rig.index, process(rig, "front1"))
        await keeper.show()
        await keeper.take("repair")
        await keeper.take("scrub a")
        await front.show()
        await rig.index.lease("maildrop 7", front.process.owner, limits.MAILDROP_LEASE_S)
        found = {one.process.part: one for one in seen(await rig.index.leases())}
        assert found["keeper"].jobs == ("repair", "scrub a")
        assert found["front1"].jobs == ()
        assert found["front1"].process == front.process
        await asyncio.sleep(limits.PROCESS_LEASE_S + 5)
        await keeper.show()
        found = {one.process.part: one for one in seen(await rig.index.leases())}
        assert found["front1"].silent_s == pytest.approx(limits.PROCESS_LEASE_S + 5, abs=1.0)
        assert found["keeper"].jobs == (), "it did not renew them"
        await asyncio.sleep(1)
        again = Leases(rig.world, rig.index, process(rig, "front1", died="signal-9,1"))
        await again.show()
        found = {one.process.part: one for one in seen(await rig.index.leases())}
        assert found["front1"].process.died == "signal-9,1"
        await asyncio.sleep(2 * limits.JOB_FORGOTTEN_S)
        await keeper.show()
        await keeper.clear()
        assert [lease.owner for lease in await rig.index.leases()] == [keeper.process.owner]

    go(body)


def test_who_took_the_place_of_a_process_that_died_is_told_by_signs_of_life_and_by_no_machines_clock() -> None:
    """The clock of that machine was set back between the two starts: the dead one seems to have started later."""

    async def body(rig: Rig) -> None:
        dead = Leases(rig.world, rig.index, process(rig, "keeper")._replace(since=2000.0, tag="aa"))
        await dead.show()
        await asyncio.sleep(limits.PROCESS_LEASE_S + 5)
        lives = Leases(rig.world, rig.index, process(rig, "keeper")._replace(since=1000.0, tag="bb"))
        await lives.show()
        assert [one.process.tag for one in seen(await rig.index.leases())] == ["bb"]

    go(body)


@pytest.mark.parametrize("owner", ["", "a b c", "keeper one x 0.1.0 1 aa -", "keeper one 1 0.1.0 y aa -", "a b 1 c 2 d e f"])
def test_an_owner_of_another_kind_is_no_process(owner: str) -> None:
    assert Process.parse(owner) is None
    assert seen([JobLease("process x", owner, 1.0)]) == []


def test_a_disk_that_is_new_is_taken_in_by_a_keeper_alone() -> None:
    """Two that took it in would put two birth marks (law 12)."""

    async def body(rig: Rig) -> None:
        node = rig.nodes["a"]

        async def never() -> bool:
            return False

        async def keeper() -> bool:
            return True

        await rig.admission.admit_known(node, never)  # an ordinary reopening: it was compared at the start
        await rig.index.expel("a")
        await node.close()
        await node.initialise()
        await node.open()
        with pytest.raises(NodeTrouble, match="a keeper takes it in first"):
            await rig.admission.admit_known(node, never)
        await rig.admission.admit_known(node, keeper)
        await rig.admission.admit_known(node, never)

    go(body)


def front(rig: Rig, owner: str) -> tuple[Maildrops, Exclusive]:
    """The maildrops of one front end."""
    tasks = Tasks(rig.log, lambda error: None)
    exclusive = Exclusive(rig.index, rig.world.clock, tasks, owner)
    return Maildrops(rig.index, Opener(rig.index, rig.fetcher), tasks, exclusive), exclusive


def test_a_maildrop_is_one_sessions_across_processes() -> None:
    """RFC 1939 §3: exclusive access, released when the session ends."""

    async def body(rig: Rig) -> None:
        (one, _), (two, _) = front(rig, "one"), front(rig, "two")
        drop = await one.open("ann")
        for other in (one, two):
            with pytest.raises(InUse):
                await other.open("ann")
        (await two.open("bob")).release()
        drop.release()
        again = await one.open("ann")  # before what gave it back has ended
        with pytest.raises(InUse):
            await two.open("ann")
        again.release()
        await asyncio.sleep(1)
        (await two.open("ann")).release()
        await asyncio.sleep(1)
        assert await rig.index.leases() == []

    go(body)


def test_a_maildrop_of_a_process_that_died_is_free_after_its_lease_and_a_long_session_keeps_its_own() -> None:
    async def body(rig: Rig) -> None:
        (one, long), (two, _) = front(rig, "one"), front(rig, "two")
        await one.open("ann")
        for _ in range(60):
            await asyncio.sleep(await long.step())
            with pytest.raises(InUse):
                await two.open("ann")
        await asyncio.sleep(limits.MAILDROP_LEASE_S + 1)  # nobody renews: its process died
        (await two.open("ann")).release()

    go(body)


def test_a_session_that_was_held_up_deletes_nothing_when_another_has_the_maildrop() -> None:
    """P11: what the other one lists must not go under its hands."""

    async def body(rig: Rig) -> None:
        (one, _), (two, _) = front(rig, "one"), front(rig, "two")
        key = await rig.deliver()
        held_up = await one.open("amy")
        await held_up.load()
        held_up.mark(1)
        await asyncio.sleep(limits.MAILDROP_LEASE_S + 1)
        drop = await two.open("amy")
        with pytest.raises(IndexTrouble, match="taken by another session"):
            await held_up.update()
        assert await rig.listed() == [key]
        await drop.load()
        drop.mark(1)
        assert await drop.update() == [key]
        drop.release()
        held_up.release()

    go(body)
