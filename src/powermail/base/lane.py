"""Owns threads: a lane runs blocking work (disk, SQL, password hashing) off the event loop, in order.

One lane is one thread with one queue. Results that finish close together are handed to the event loop in one
wake-up, which is most of what a hop costs. The simulator has a lane that runs the same calls in virtual time.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_FLUSH_AFTER_S = 0.0003
_Item = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Lane(Protocol):
    """Runs calls one after the other, in the order given, away from the event loop."""

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Queues `call(*args)`. Cancelling the future does not stop a call that has begun."""

    def waiting(self) -> int:
        """How many calls are queued: the measure for refusing at the door."""

    def close(self) -> None:
        """Lets what is queued finish, then ends the lane. Idempotent."""


class ThreadLane:
    """A lane on a real thread, bound to the event loop it was made on."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"lane-{name}", daemon=True)
        self._thread.start()

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(RuntimeError("lane is closed"))
            return future
        self._queue.put((future, call, args))
        return future

    def waiting(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        take = self._queue.get
        finished: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        while True:
            item = take()
            began = time.monotonic()
            while item is not None:
                future, call, args = item
                try:
                    finished.append((future, call(*args), None))
                except BaseException as error:  # noqa: BLE001  handed to whoever awaits, whatever it is
                    finished.append((future, None, error))
                if time.monotonic() - began > _FLUSH_AFTER_S:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if finished:
                batch, finished = finished, []
                try:
                    self._loop.call_soon_threadsafe(_settle, batch)
                except RuntimeError:  # the loop has closed: nobody waits any more
                    return
            if item is None:
                return


def guard() -> AbstractContextManager[bool]:
    """A lock for the little that two lanes share; held for moments, never across I/O waits of the event loop."""
    return threading.Lock()


def _settle(batch: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in batch:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
