"""Owns the simulated lane: the same calls in the same order, each taking a little virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class SimLane:
    """Implements `base.lane.Lane`. `delay` says how long the next call takes; `alive` is False once the process was killed."""

    def __init__(self, delay: Callable[[], float], alive: Callable[[], bool]) -> None:
        self._delay = delay
        self._alive = alive
        self._queue: deque[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._closed = False
        self._busy = False

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(RuntimeError("lane is closed"))
            return future
        self._queue.append((future, call, args))
        if not self._busy:
            self._next()
        return future

    def waiting(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        self._closed = True

    def _next(self) -> None:
        self._busy = True
        asyncio.get_running_loop().call_later(self._delay(), self._work)

    def _work(self) -> None:
        if not self._alive():
            return  # killed: the call never happened, and nobody is told
        future, call, args = self._queue.popleft()
        try:
            result = call(*args)
        except Exception as error:  # noqa: BLE001  handed to whoever awaits, as a thread's would be
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)
        if self._queue:
            self._next()
        else:
            self._busy = False
