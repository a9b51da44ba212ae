"""Background jobs survive what goes wrong, say it, slow down, and recover (law 14)."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.clock import SystemClock
from powermail.base.errors import InvariantBroken, NodeTrouble
from powermail.base.log import MemoryLog
from powermail.base.tasks import Tasks, Worker


class Job:
    """A step that goes wrong as often as a test says."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.done = asyncio.Event()

    async def step(self) -> float:
        if self.errors:
            raise self.errors.pop(0)
        self.done.set()
        return 60.0


class Resting(Worker):
    """Rests until the test goes on, and notes for how long it should."""

    def __init__(self, job: Job, log: MemoryLog, broken: list[BaseException]) -> None:
        super().__init__("job", job.step, SystemClock(), log, broken.append)
        self.rests: list[float] = []
        self.go_on = asyncio.Event()

    async def _rest(self, rest_s: float) -> None:
        self.rests.append(rest_s)
        await self.go_on.wait()
        self.go_on.clear()


async def until(condition: object) -> None:
    """Lets others run until it is so."""
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("bug"), AssertionError(), NodeTrouble("away"), OSError(5, "EIO")]
)
async def test_a_worker_survives_every_exception_and_says_so(error: Exception) -> None:
    log, job = MemoryLog(), Job(error)
    made = Resting(job, log, [])
    task = asyncio.create_task(made.run())
    await until(lambda: made.errors == 1)
    assert type(error).__name__ in made.trouble
    assert made.describe()["status"] == made.trouble
    made.go_on.set()
    await asyncio.wait_for(job.done.wait(), 5)
    await until(lambda: made.status == "idle")
    assert made.trouble == ""
    task.cancel()
    kinds = [line.split()[1] for line in log.lines]
    assert ("bug" in kinds) is not isinstance(error, NodeTrouble | OSError)


async def test_a_broken_invariant_ends_the_process_and_not_only_the_worker() -> None:
    broken: list[BaseException] = []
    error = InvariantBroken("two messages under one key")
    made = Resting(Job(error), MemoryLog(), broken)
    with pytest.raises(InvariantBroken):
        await made.run()
    assert broken == [error]


async def test_a_worker_in_trouble_slows_down() -> None:
    job = Job(*[RuntimeError("the same")] * 3)
    log = MemoryLog()
    made = Resting(job, log, [])
    task = asyncio.create_task(made.run())
    for number in (1, 2, 3):
        await until(lambda number=number: len(made.rests) == number)
        made.go_on.set()
    await asyncio.wait_for(job.done.wait(), 5)
    task.cancel()
    assert made.rests[:3] == [1.0, 2.0, 4.0]
    assert len([line for line in log.lines if "bug" in line]) == 1, "the same error is written once"


async def test_a_task_that_loses_a_cancellation_does_not_hold_up_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library does in which it waits: up to Python 3.11 `asyncio.wait_for` is one."""
    monkeypatch.setattr(limits, "TASK_CANCEL_AGAIN_S", 0.01)
    broken: list[BaseException] = []
    tasks, lost = Tasks(MemoryLog(), broken.append), 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    tasks.start(deaf(), "deaf")
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.cancel()
    assert lost == 2 and not tasks.count() and not broken
