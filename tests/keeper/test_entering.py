"""A process that may not read logs: readers wait until a keeper has entered what they held (laws 6, 10). In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, Trouble
from powermail.keeper.entering import Awaiting, Entering
from powermail.keeper.leases import Leases
from tests.keeper.rig import Rig, two
from tests.keeper.test_job_leases import process


async def work(step: Callable[[], Awaitable[float]]) -> None:
    """As a worker does."""
    while True:
        try:
            rest = await step()
        except Trouble:
            rest = 1.0
        await asyncio.sleep(rest)


def waits(rig: Rig) -> bool:
    """Readers of this process wait."""
    return rig.index.unsettled


class Front:
    """A front end of another machine, and a keeper beside it."""

    def __init__(self, keeper: Rig, front: Rig) -> None:
        self.leases = Leases(front.world, front.index, process(front, "front"))
        self.awaiting = Awaiting(front.world, front.cluster, front.index, front.epochs, self.leases)
        of_keeper = Leases(keeper.world, keeper.index, process(keeper, "keeper"))
        self._entering = Entering(keeper.cluster, keeper.index, keeper.reconciler, of_keeper)
        self._others = [self.leases.show, of_keeper.show]

    async def works(self, seconds: float, keeper: bool = True) -> None:
        """Both work for so long."""
        steps = [*self._others, *([self._entering.step] if keeper else [])]
        tasks = [asyncio.create_task(work(step)) for step in steps]
        await self.awaiting.start(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_readers_of_a_front_end_wait_for_a_keeper_and_see_then_what_is_younger_than_its_grace() -> None:
    async def body(one: Rig, other: Rig) -> None:
        front = Front(one, other)
        key = other.key()
        await one.put("a", key)
        await one.put("b", key)  # acknowledged by a front end that died before it entered it
        await front.works(30.0, keeper=False)
        assert waits(other) and await front.leases.is_waited_for()
        with pytest.raises(IndexTrouble, match="catching up"):
            await other.listed()
        await front.works(limits.NODE_OPEN_WAIT_S)
        assert not waits(other)
        assert await other.listed() == [key]
        assert not await front.leases.is_waited_for(), "and says so"
        await other.check()

    two(body)


def test_what_came_behind_the_end_that_was_noted_is_not_waited_for_and_an_older_end_proves_nothing() -> None:
    async def body(one: Rig, other: Rig) -> None:
        front = Front(one, other)
        for node in one.nodes.values():
            await one.reconciler.advance(node, 0.0, (await node.facts()).end)
        key = other.key()
        await one.put("a", key)
        await one.put("b", key)
        for node in other.nodes.values():
            await front.awaiting.look(node)  # watermarks are where logs ended before the message
        with pytest.raises(Trouble, match="are there"):
            await front.awaiting.step()
        assert waits(other)
        await front.works(limits.NODE_OPEN_WAIT_S)
        assert await other.listed() == [key]

    two(body)


def test_a_keeper_enters_nothing_young_while_nobody_waits() -> None:
    async def body(one: Rig, other: Rig) -> None:
        leases = Leases(one.world, one.index, process(one, "keeper"))
        await leases.show()
        entering = Entering(one.cluster, one.index, one.reconciler, leases)
        key = one.key()
        await one.put("a", key)
        marks = {name: (await one.row(name)).watermark for name in one.nodes}
        await entering.step()
        assert {name: (await one.row(name)).watermark for name in one.nodes} == marks
        gone = Leases(other.world, other.index, process(other, "front"))
        await gone.wait()
        await asyncio.sleep(limits.PROCESS_LEASE_S + 1)
        await leases.show()
        assert not await leases.is_waited_for(), "one that died waits no more"

    two(body)
