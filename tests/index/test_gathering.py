"""When a transaction of deliveries begins: one after the other, unless one is slow or a whole batch waits; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Delivery, Outcome
from powermail.index.postgres import PostgresIndex
from powermail.index.sql.gathering import Gathering
from powermail.index.sqlite import SqliteIndex
from powermail.sim.loop import SimLoop, run
from tests.index.support import MemoryRig, delivery

OVERLAP_S, GATHER_S = limits.INDEX_OVERLAP_S, limits.INDEX_GATHER_S
WHOLE, ENOUGH = limits.INDEX_SHARED_BATCH_MAX, limits.INDEX_SHARED_ENOUGH
LATE_S = 3600.0  # so long nothing else happens
QUICK_S = OVERLAP_S / 10

_ENTERED = Outcome.ENTERED
_Outcomes = list[Outcome | Exception]


class Begun(NamedTuple):
    """A transaction that has begun: when, with which messages, and what ends it."""

    at: float
    numbers: list[int]
    end: asyncio.Future[None]


class Entering(Gathering):
    """Its transactions last until the test ends them."""

    begun: list[Begun]

    async def _until(self, batch: list[Delivery], end: asyncio.Future[None]) -> _Outcomes:
        await end
        return [_ENTERED] * len(batch)

    def _work(self, batch: list[Delivery]) -> Coroutine[Any, Any, _Outcomes]:
        loop = asyncio.get_running_loop()
        numbers = [int.from_bytes(each.key, "big") for each in batch]
        self.begun.append(Begun(loop.time(), numbers, loop.create_future()))
        return self._until(batch, self.begun[-1].end)


class Shared(Entering, PostgresIndex):
    """As where others write too."""

    def _enter_batch(self, batch: list[Delivery]) -> asyncio.Future[_Outcomes]:
        return self._start(self._work(batch))


class Alone(Entering, SqliteIndex):
    """As where one process alone writes."""

    def _enter_batch(self, batch: list[Delivery]) -> asyncio.Future[_Outcomes]:
        self._begin_change(clear=False)
        return asyncio.ensure_future(self._work(batch))


class Trial:
    """An index whose server is the test, and what was delivered to it."""

    def __init__(self, index: Shared | Alone) -> None:
        self.index = index
        self.index.begun = []
        self.outcomes: dict[int, asyncio.Future[Outcome]] = {}
        self.started_at = asyncio.get_running_loop().time()

    def deliver(self, *numbers: int) -> None:
        """These come now."""
        self.outcomes.update({number: self.index.deliver(delivery(number)) for number in numbers})

    def begun(self) -> list[tuple[float, list[int]]]:
        """Transactions so far: seconds since the start, and messages."""
        return [(round(each.at - self.started_at, 6), each.numbers) for each in self.index.begun]

    async def end(self, which: int, error: Exception | None = None) -> None:
        """A transaction ends, and all that follows at once has happened."""
        end = self.index.begun[which].end
        if error is None:
            end.set_result(None)
        else:
            end.set_exception(error)
        await turns()

    def entered(self, *numbers: int) -> bool:
        """True if these are all that were entered by now."""
        return list(numbers) == [number for number, each in self.outcomes.items() if each.done() and each.result() is _ENTERED]


async def turns() -> None:
    """What is due now is done, and no time passes."""
    for _ in range(20):
        await asyncio.sleep(0)


def timers() -> int:
    """How many timers are set."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    return sum(not handle.cancelled() for _, _, handle in loop._timers)


def go(work: Callable[[Trial], Awaitable[None]], alone: bool = False) -> None:
    """Runs a test in virtual time."""

    async def body() -> None:
        world = MemoryRig(Path()).world
        trial = Trial(Alone(world, "none") if alone else Shared(world, "postgresql://nobody@nowhere/none"))
        await work(trial)
        for outcome in trial.outcomes.values():
            outcome.cancel()  # of what is left, nobody waits for anything

    complaints: list[str] = []
    run(body(), 1, complaints.append)
    assert complaints == []


def test_what_comes_while_a_quick_one_is_under_way_goes_as_one_when_it_ends() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        for number in range(2, 2 + 2 * ENOUGH):
            await asyncio.sleep(0.0005)
            trial.deliver(number)
        assert trial.begun() == [(0.0, [1])], "however many wait, if they are no whole batch"
        await trial.end(0)
        assert [numbers for _, numbers in trial.begun()] == [[1], [*range(2, 2 + 2 * ENOUGH)]]
        assert trial.begun()[1][0] < OVERLAP_S and trial.entered(1)

    go(work)


def test_who_is_on_his_way_is_still_waited_for_when_one_ends() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await turns()
        trial.index.expect(2)
        trial.deliver(2)
        await asyncio.sleep(QUICK_S)
        await trial.end(0)
        assert len(trial.begun()) == 1
        await asyncio.sleep(GATHER_S / 2)
        trial.deliver(3)
        await turns()
        assert trial.begun()[1:] == [(round(QUICK_S + GATHER_S / 2, 6), [2, 3])]

    go(work)


def test_beside_a_slow_one_another_begins_with_all_that_came_meanwhile() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await asyncio.sleep(QUICK_S)
        trial.deliver(2)
        await asyncio.sleep(OVERLAP_S - 2 * QUICK_S)
        trial.deliver(3)
        await turns()
        assert trial.begun() == [(0.0, [1])]
        await asyncio.sleep(LATE_S)
        assert trial.begun()[1:] == [(OVERLAP_S, [2, 3])]
        await trial.end(1)
        assert trial.entered(2, 3), "the slow one holds up nobody"

    go(work)


def test_what_comes_when_one_has_been_slow_for_long_begins_at_once() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await asyncio.sleep(LATE_S)
        trial.deliver(2)
        await turns()
        assert trial.begun()[1:] == [(LATE_S, [2])]

    go(work)


def test_beside_a_slow_one_who_is_on_his_way_is_waited_for_a_moment() -> None:
    async def work(trial: Trial) -> None:
        trial.index.expect(3)
        trial.deliver(1)
        await asyncio.sleep(QUICK_S)  # it was waited for the others
        trial.deliver(2)
        await asyncio.sleep(LATE_S)
        assert trial.begun() == [(GATHER_S, [1]), (round(GATHER_S + OVERLAP_S + GATHER_S, 6), [2])]

    go(work)


async def beside_each_other(trial: Trial) -> None:
    """The first is slow, the second has just begun beside it, and a third message waits."""
    trial.deliver(1)
    await turns()
    trial.deliver(2)
    await asyncio.sleep(OVERLAP_S + QUICK_S)
    trial.deliver(3)


def test_beside_a_slow_one_and_a_quick_one_none_begins_before_the_quick_one_is_slow() -> None:
    """Which of them was first says nothing."""

    async def work(trial: Trial) -> None:
        await beside_each_other(trial)
        await trial.end(0)
        assert trial.begun() == [(0.0, [1]), (OVERLAP_S, [2])]
        await asyncio.sleep(LATE_S)
        assert trial.begun()[2:] == [(2 * OVERLAP_S, [3])]

    go(work)


def test_when_a_quick_one_ends_the_next_begins_beside_the_one_that_is_slow() -> None:
    async def work(trial: Trial) -> None:
        await beside_each_other(trial)
        await trial.end(1)
        assert trial.begun()[2:] == [(round(OVERLAP_S + QUICK_S, 6), [3])]

    go(work)


def test_a_whole_batch_begins_at_once() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(0)
        await turns()
        trial.deliver(*range(1, WHOLE))
        await turns()
        assert len(trial.begun()) == 1, "one is missing"
        trial.deliver(WHOLE)
        await turns()
        assert trial.begun()[1:] == [(0.0, [*range(1, WHOLE + 1)])]

    go(work)


def test_never_are_there_more_than_so_many_at_once() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(0)
        await turns()
        trial.deliver(*range(1, 3 * WHOLE))
        await asyncio.sleep(LATE_S)
        assert len(trial.begun()) == limits.INDEX_WRITERS == 2 and timers() == 0, "however slow they are, and whoever waits"
        await trial.end(0)
        assert [len(numbers) for _, numbers in trial.begun()] == [1, WHOLE, WHOLE]
        await trial.end(1)
        assert [len(numbers) for _, numbers in trial.begun()] == [1, WHOLE, WHOLE], "what is left is no whole batch"
        await trial.end(2)
        assert [len(numbers) for _, numbers in trial.begun()] == [1, WHOLE, WHOLE, WHOLE - 1]
        await trial.end(3)
        assert trial.entered(*range(3 * WHOLE)) and timers() == 0

    go(work)


def test_where_one_alone_writes_none_begins_beside_another() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(0)
        await turns()
        trial.deliver(*range(1, 3 * limits.INDEX_BATCH_MAX))
        await asyncio.sleep(LATE_S)
        assert len(trial.begun()) == 1
        await trial.end(0)
        assert [len(numbers) for _, numbers in trial.begun()] == [1, limits.INDEX_BATCH_MAX]

    go(work, alone=True)


@pytest.mark.parametrize("slow", [False, True])
def test_one_that_ends_in_an_error_leaves_nothing_behind(slow: bool) -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await asyncio.sleep(LATE_S if slow else QUICK_S)
        await trial.end(0, ValueError("so it is"))
        with pytest.raises(IndexTrouble, match="so it is") as caught:
            await trial.outcomes.pop(1)
        assert isinstance(caught.value.__cause__, ValueError) and timers() == 0
        trial.deliver(2)
        await turns()
        trial.deliver(3)
        await turns()
        assert [numbers for _, numbers in trial.begun()] == [[1], [2]], "it is as if it had never been: one after the other"
        await trial.end(1)
        assert [numbers for _, numbers in trial.begun()] == [[1], [2], [3]]
        await trial.end(2)
        assert trial.entered(2, 3) and timers() == 0

    go(work)


def test_what_waits_when_the_index_is_closed_is_entered() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await turns()
        trial.deliver(2)
        closing = asyncio.ensure_future(trial.index.close())
        await asyncio.sleep(QUICK_S)
        await trial.end(0)
        assert not closing.done() and [numbers for _, numbers in trial.begun()] == [[1], [2]]
        await trial.end(1)
        await closing
        assert trial.entered(1, 2) and timers() == 0

    go(work)


def test_what_hangs_when_the_index_is_closed_is_given_up_with_all_that_waits() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await asyncio.sleep(LATE_S)
        trial.deliver(2)
        await turns()
        trial.deliver(3)
        await trial.index.close()
        await turns()
        assert [numbers for _, numbers in trial.begun()] == [[1], [2]] and timers() == 0
        for outcome in trial.outcomes.values():
            with pytest.raises(IndexTrouble, match="closed"):
                await outcome

    go(work)


def test_what_is_refused_while_a_quick_one_is_under_way_leaves_no_timer() -> None:
    async def work(trial: Trial) -> None:
        trial.deliver(1)
        await turns()
        trial.deliver(2)
        assert timers() == 1
        trial.index._refuse_waiting(IndexTrouble("so it is"))
        assert timers() == 0
        with pytest.raises(IndexTrouble, match="so it is"):
            await trial.outcomes.pop(2)
        await trial.end(0)
        assert trial.entered(1) and len(trial.begun()) == 1

    go(work)
