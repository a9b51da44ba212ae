"""Two processes send from one queue: while both live, no message is sent twice."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.tasks import Worker
from tests.cluster.support import virtual
from tests.outbound.hop import ScriptedHop
from tests.outbound.rig import Rig


def beside(rig: Rig) -> Rig:
    """A second process on the same queue."""
    other = copy.copy(rig)
    other.start()
    return other


def working(*rigs: Rig) -> list[asyncio.Task[None]]:
    """Their jobs, as processes run them."""
    tasks = []
    for rig in rigs:
        world = rig.office.world
        worker = Worker("outbound", rig.outbound.step, world.clock, world.log, rig.office.bugs.append)
        tasks.append(asyncio.get_running_loop().create_task(worker.run()))
    return tasks


class Cut:
    """An index that one process does not reach any more, while others do."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            raise IndexTrouble("the database does not answer")

        return call


@virtual
async def test_each_of_many_is_sent_by_one_of_two() -> None:
    one = await Rig.open()
    other = beside(one)
    tasks = working(one, other)
    names = [f"user{number}" for number in range(30)]
    for name in names:
        await one.queue(name)
    await asyncio.sleep(60)
    assert sorted(one.hop.recipients()) == sorted(names)
    assert await one.rows() == {}
    for task in tasks:
        task.cancel()
    await one.close()


@virtual
async def test_what_takes_longer_than_a_lease_is_sent_by_who_began_it() -> None:
    """It is renewed all the time."""
    one = await Rig.open(ScriptedHop({"MAIL": f"SLEEP {limits.QUEUE_LEASE_S - 10:.0f}|NEXT"}))
    other = beside(one)
    await one.queue("one")
    await one.outbound.step()
    tasks = working(one, other)
    await asyncio.sleep(2 * limits.QUEUE_LEASE_S)
    assert one.hop.recipients() == ["one"]
    assert one.office.world.counters.get("outbound.leases_lost") == 0
    for task in tasks:
        task.cancel()
    await one.close()


@virtual
async def test_who_cannot_renew_its_leases_stops_sending_before_they_are_over() -> None:
    """The hop is slow, and the index is away from one of the two: the other sends it, and the hop gets it once."""
    one = await Rig.open(ScriptedHop({"MAIL": "SLEEP 280|NEXT"}))
    other = beside(one)
    await one.queue("one")
    await one.outbound.step()
    one.outbound._index = Cut(one.office.index)
    tasks = working(one)
    await asyncio.sleep(limits.QUEUE_LEASE_S - limits.QUEUE_LEASE_MARGIN_S / 2)
    assert one.office.world.counters.get("outbound.leases_lost") == 1, "nobody else has it yet"
    assert not one.outbound._in_hand
    one.hop.script = {}
    tasks += working(other)
    await asyncio.sleep(limits.QUEUE_LEASE_S)
    assert one.hop.recipients() == ["one"]
    assert await other.rows() == {}
    for task in tasks:
        task.cancel()
    await one.close()


@virtual
async def test_who_wakes_after_its_lease_is_over_lets_go_of_what_another_has() -> None:
    """It was stopped for so long (SIGSTOP, a machine that was moved) that another took its rows."""
    one = await Rig.open(ScriptedHop({"MAIL": "SLEEP 290|NEXT"}))
    other = beside(one)
    await one.queue("one")
    await one.outbound.step()
    rows = await one.office.index.queue_rows(0, 9)
    await one.office.index.release_leases(one.outbound._owner)  # as if it were over
    assert [row.id for row in await one.office.index.lease_due("another", rows[0].due_at + 1, 600.0, 9)] == [rows[0].id]
    one.outbound._next_renewal = 0.0
    await one.outbound.step()
    await asyncio.sleep(1)
    assert not one.outbound._in_hand and one.office.world.counters.get("outbound.leases_lost") == 1
    assert one.hop.recipients() == []
    await one.outbound.stop()
    assert len(await other.rows()) == 1, "it is the other's"
    await one.close()
