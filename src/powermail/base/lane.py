"""Owns threads: a lane runs blocking work (disk, SQL, password hashing) off the event loop, in order.

One lane is one thread with one queue. Results that finish close together are handed to the event loop in one
wake-up, which is most of what a hop costs; while calls are out the loop also looks by itself, so that a result is not
kept back by the call behind it when that hangs. The simulator has a lane that runs the same calls in virtual time.

Danger: a call may hang for ever (a dead disk). Nobody waits for it without a bound: not a stop, and not the process,
which ends although the thread lives (law 14).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from powermail.base import limits

T = TypeVar("T")
_FLUSH_AFTER_S = 0.0003
_LOOK_EVERY_S = 0.25
_Item = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Lane(Protocol):
    """Runs calls one after the other, in the order given, away from the event loop."""

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Queues `call(*args)`. Cancelling the future does not stop the call."""

    def waiting(self) -> int:
        """How many calls are queued: the measure for refusing at the door."""

    def close(self) -> None:
        """Lets what is queued finish, then ends the lane; waits for it only so long. Idempotent."""


class ThreadLane:
    """A lane on a real thread, bound to the event loop it was made on."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._finished: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._out = 0  # calls whose results the loop has not seen
        self._looking = False
        self._began = 0.0  # when the thread began with what it does now; 0 while it waits
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(RuntimeError("lane is closed"))
            return future
        self._queue.put((future, call, args))
        self._out += 1
        if not self._looking:
            self._looking = True
            self._loop.call_later(_LOOK_EVERY_S, self._look)
        return future

    def waiting(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            hangs = self._began and time.monotonic() - self._began > limits.LANE_CLOSE_WAIT_S
            if not hangs:  # else it has been waited for long enough
                self._thread.join(limits.LANE_CLOSE_WAIT_S)

    def _work(self) -> None:
        take = self._queue.get
        finished = self._finished
        while True:
            item: _Item | tuple[()] | None = take()
            self._began = began = time.monotonic()
            while item:
                future, call, args = item
                item = ()  # nothing of a call is kept while the lane waits for the next one
                try:
                    finished.append((future, call(*args), None))
                except BaseException as error:  # noqa: BLE001  handed to whoever awaits, whatever it is
                    traceback.clear_frames(error.__traceback__)  # what the call held is let go of here, by its own thread
                    finished.append((future, None, error))
                del future, call, args
                if time.monotonic() - began > _FLUSH_AFTER_S:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            self._began = 0.0
            if finished:
                try:
                    self._loop.call_soon_threadsafe(self._collect)
                except RuntimeError:  # the loop has closed: nobody waits any more
                    return
            if item is None:
                return

    def _collect(self) -> None:
        """Hands out results. Only the loop takes from `_finished`, only the thread adds to it."""
        finished = self._finished
        while finished:
            future, result, error = finished.popleft()
            self._out -= 1
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _look(self) -> None:
        self._collect()
        self._looking = self._out > 0
        if self._looking:
            self._loop.call_later(_LOOK_EVERY_S, self._look)


def guard() -> AbstractContextManager[bool]:
    """A lock for the little that two lanes share; held for moments, never across I/O waits of the event loop."""
    return threading.Lock()
