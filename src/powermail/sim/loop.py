"""Owns virtual time: an event loop that never waits and that runs what is ready in an order drawn from the seed.

Half of what a simulation costs is the loop's own work, so it is asyncio's without what nobody needs here: debug mode, sockets,
threads, and timers that compare themselves.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import traceback
from asyncio import base_events
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVarTuple

Ts = TypeVarTuple("Ts")


class NothingLeft(RuntimeError):
    """Everybody waits and no timer is set: a deadlock, which a real process would sit in for ever."""


class Program:
    """A simulated process among several: whatever it has set going runs in its context, and ends or stops with it."""

    def __init__(self) -> None:
        self.runs = True
        self._paused = False
        self._held: list[_Handle] = []

    def kill(self) -> None:
        """kill -9: not one instruction more, wherever it is."""
        self.runs = self._paused = False
        self._held.clear()

    def pause(self) -> None:
        """SIGSTOP: not one instruction more, until it goes on."""
        if self.runs:
            self.runs, self._paused = False, True

    def go_on(self, loop: SimLoop) -> None:
        """SIGCONT: what came due meanwhile is done now, with what it knew before."""
        if self._paused:
            self.runs, self._paused = True, False
            held, self._held = self._held, []
            loop.put_back(held)

    def hold(self, handle: _Handle) -> None:
        """Something of it is due while it does not run."""
        if self._paused:
            self._held.append(handle)


PROGRAM: contextvars.ContextVar[Program | None] = contextvars.ContextVar("program", default=None)


class _Handle(asyncio.TimerHandle):
    """A call that is due, now or at its time."""

    __slots__ = ()
    _callback: Any
    _args: Any
    _context: contextvars.Context
    _cancelled: bool

    def __init__(
        self, when: float, callback: Any, args: Any, loop: asyncio.AbstractEventLoop, context: contextvars.Context | None
    ) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False
        self._repr = None
        self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None


class SimLoop(base_events.BaseEventLoop):
    """asyncio in virtual time. No threads, no sockets: what needs them gets its simulated part from the `World`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._virtual = 1000.0
        self._order = random.Random(seed)
        self._timers: list[tuple[float, int, _Handle]] = []
        self._due: deque[_Handle] = deque()
        self._timed = 0  # timers so far: of two for the same instant the one that was set first comes first
        self.steps = 0
        self.ending = False  # what is left is let go of, whatever became of its program

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        handle = _Handle(self._virtual, callback, args, self, context)
        self._due.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        handle = _Handle(when, callback, args, self, context)
        self._timed += 1
        heapq.heappush(self._timers, (when, self._timed, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        return self.call_at(self._virtual + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        due, timers = self._due, self._timers
        if not due:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if timers:
                self._virtual = max(self._virtual, timers[0][0])  # nothing to do: time passes at once
            elif not self._stopping:  # type: ignore[attr-defined]
                raise NothingLeft("every task waits and no timer is set")
        now = self._virtual
        while timers and timers[0][0] <= now:
            due.append(heapq.heappop(timers)[2])
        count = len(due)
        self.steps += count
        if count > 1:
            handles = list(due)
            self._order.shuffle(handles)
            due.clear()
            due.extend(handles)
        for _ in range(count):
            handle = due.popleft()
            if handle._cancelled:
                continue
            program = handle._context.get(PROGRAM)
            if program is None or program.runs or self.ending:
                handle._run()
            else:
                program.hold(handle)

    def put_back(self, handles: Iterable[_Handle]) -> None:
        """These are due."""
        self._due.extend(handles)

    def close(self) -> None:
        """Lets go of all that was still to be called."""
        self._due.clear()
        self._timers.clear()
        super().close()

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
        loop.ending = True
        left = asyncio.all_tasks(loop)  # of killed processes, which wait for what never comes
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=60.0))
        for task in left:
            if task.done() and not task.cancelled():
                task.exception()  # whatever it met after its death is no finding
        asyncio.set_event_loop(None)
        loop.close()
