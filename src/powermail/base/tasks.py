"""Owns background work: tasks always have an owner, workers do one unit at a time, paced, listed, stoppable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.errors import InvariantBroken, Trouble
from powermail.base.log import Event, Log


class Tasks:
    """A set of tasks with one owner. A task that ends in an unexpected error is reported, never swallowed."""

    def __init__(self, log: Log, broken: Callable[[BaseException], None]) -> None:
        """`broken` is called when a storage invariant broke: the process must stop."""
        self._log = log
        self._broken = broken
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts `work`, which outlives whoever asked for it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def count(self) -> int:
        """How many tasks are alive."""
        return len(self._tasks)

    async def drain(self, timeout_s: float) -> None:
        """Waits for all tasks to finish by themselves; those left after the time are cancelled."""
        await self.wait(timeout_s)
        await self.cancel()

    async def wait(self, timeout_s: float) -> None:
        """Waits for all tasks to finish by themselves, for so long at most."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._tasks:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await asyncio.wait(list(self._tasks), timeout=left)

    async def cancel(self) -> None:
        """Cancels all tasks and waits until they are gone. One that goes on all the same is told again: a library that it waits
        in may have lost the word, and a stop must end.
        """
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=limits.TASK_CANCEL_AGAIN_S)

    def abandon(self) -> None:
        """Cancels all tasks and waits for none: their process was killed (simulator)."""
        for task in list(self._tasks):
            task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        report_bug(self._log, error, task.get_name())
        if isinstance(error, InvariantBroken):
            self._broken(error)


def report_bug(log: Log, error: BaseException, where: str) -> None:
    """Writes an error that should not have happened, with the place it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename.rsplit('/', 2)[-1]}:{trace.tb_lineno}" if trace else None
    log.event(Event.BUG, where=where, error=f"{type(error).__name__}: {error}", at=place)


class Worker:
    """A named background job: `step` does one unit and says how many seconds to rest before the next.

    It survives every exception (law 14): trouble is expected, is logged once per change of state and is retried with growing
    pauses; anything else is a bug of ours, written down each time it changes, retried as slowly, and shown as broken until a
    step succeeds. Only cancellation and a broken storage invariant end it.
    """

    def __init__(
        self, name: str, step: Callable[[], Awaitable[float]], clock: Clock, log: Log, broken: Callable[[BaseException], None]
    ) -> None:
        """`broken` is called when a storage invariant broke: the process must stop."""
        self.name = name
        self.status = "starting"
        self.units = 0
        self.errors = 0
        self.trouble = ""  # why it makes the installation degraded; "" while it works
        self._broken = broken
        self._began = 0.0
        self._working = False
        self._step = step
        self._clock = clock
        self._log = log
        self._pause_s = 0.0

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            self._began, self._working = self._clock.monotonic(), True
            try:
                rest_s = await self._step()
                self._succeeded()
            except (Trouble, OSError, TimeoutError) as error:
                rest_s = self._failed("waiting after", error)
            except InvariantBroken as error:
                self._failed("stopped by", error)
                self._broken(error)
                raise
            except Exception as error:  # noqa: BLE001  a job that ended would be missed only when it is needed
                before = self.trouble
                rest_s = self._failed("broken by", error)
                if self.trouble != before:
                    report_bug(self._log, error, f"worker {self.name}")
            self._working = False
            await self._rest(rest_s)

    def _succeeded(self) -> None:
        self.units += 1
        self._pause_s = 0.0
        if self.trouble:
            self._log.event(Event.TROUBLE, worker=self.name, over=True)
            self.trouble = ""
        self.status = "idle"

    def _failed(self, how: str, error: BaseException) -> float:
        self.errors += 1
        self._pause_s = min(limits.WORKER_PAUSE_MAX_S, max(1.0, self._pause_s * 2))
        text = f"{how} {type(error).__name__}: {error}"
        if text != self.trouble and isinstance(error, Trouble | OSError | TimeoutError):
            self._log.event(Event.TROUBLE, worker=self.name, error=f"{type(error).__name__}: {error}")
        self.status = self.trouble = text
        return self._pause_s

    async def _rest(self, rest_s: float) -> None:
        await asyncio.sleep(max(0.0, rest_s))

    def step_s(self) -> float:
        """How long the step under way has taken; 0 while it rests."""
        return self._clock.monotonic() - self._began if self._working else 0.0

    def describe(self) -> dict[str, Any]:
        """One line of `powermail status`."""
        status = self.status
        if (since := self.step_s()) >= limits.WORKER_LONG_S:
            status = f"working for {since:.0f} s"
        return {"name": self.name, "status": status, "units": self.units, "errors": self.errors}
