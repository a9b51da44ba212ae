"""Owns the simulated lane: the same calls in the same order, each taking a little virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


_HANG_LOOK_S = 0.25
Ill = Callable[[], "Callable[[Callable[[], Any]], Any] | None"]


class SimLane:
    """Implements `base.lane.Lane`. `delay` says how long the next call takes; `alive` is False once the process was killed.

    `hung` is True while calls do not end; `ill` may give a function that runs a call in its own way, to let it fail or to lose
    its answer.
    """

    def __init__(
        self,
        delay: Callable[[], float],
        alive: Callable[[], bool],
        hung: Callable[[], bool] = lambda: False,
        ill: Ill = lambda: None,
    ) -> None:
        self._delay = delay
        self._alive = alive
        self._hung = hung
        self._ill = ill
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
        if self._hung():
            asyncio.get_running_loop().call_later(_HANG_LOOK_S, self._work)
            return
        future, call, args = self._queue.popleft()
        ill = self._ill()
        try:
            result = call(*args) if ill is None else ill(partial(call, *args))
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
