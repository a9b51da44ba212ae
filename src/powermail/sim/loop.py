"""Owns virtual time: an event loop that never waits and that runs what is ready in an order drawn from the seed."""

from __future__ import annotations

import asyncio
import random
import traceback
from asyncio import base_events
from collections.abc import Callable
from typing import Any


class NothingLeft(RuntimeError):
    """Everybody waits and no timer is set: a deadlock, which a real process would sit in for ever."""


class _Selector:
    """Waits by moving the clock."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        """There are no sockets; time passes at once."""
        if timeout is None:
            raise NothingLeft("every task waits and no timer is set")
        self._loop.pass_time(timeout)
        return []


class SimLoop(base_events.BaseEventLoop):
    """asyncio in virtual time. No threads, no sockets: what needs them gets its simulated part from the `World`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._selector = _Selector(self)
        self._virtual = 1000.0
        self._order = random.Random(seed)
        self.steps = 0

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual

    def pass_time(self, seconds: float) -> None:
        """Moves the clock."""
        self._virtual += seconds

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        self.steps += len(ready)
        if len(ready) > 1:
            handles = list(ready)
            self._order.shuffle(handles)
            ready.clear()
            ready.extend(handles)
        super()._run_once()  # type: ignore[misc]

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""


def run(work: Any, seed: int, complain: Callable[[str], None]) -> tuple[Any, SimLoop]:
    """Runs a coroutine to its end in a loop of its own; its result and the loop. `complain` hears of errors nobody awaited."""
    loop = SimLoop(seed)

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):  # not what cancelling a killed process leaves behind
            trace = traceback.extract_tb(error.__traceback__)
            place = f" at {trace[-1].filename.rsplit('/', 2)[-1]}:{trace[-1].lineno}" if trace else ""
            complain(f"nobody awaited {type(error).__name__}: {error}{place} ({context.get('message')})")

    loop.set_exception_handler(handle)
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work), loop
    finally:
        left = asyncio.all_tasks(loop)  # of killed processes, which wait for what never comes
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=60.0))
        asyncio.set_event_loop(None)
        loop.close()
