"""Owns waiting for at most so long: one timer for all who wait, because most waits end in time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Waits of one length. A future that takes longer is cancelled, up to a quarter of that length late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched: deque[tuple[float, asyncio.Future[object]]] = deque()  # in order of their deadlines
        self._ticking = False

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises TimeoutError, or what the work raises."""
        future = work if isinstance(work, asyncio.Future) else asyncio.ensure_future(work)
        if not future.done():
            self._watch(future)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and not (task is not None and task.cancelling()):
                raise TimeoutError from None
            raise

    def _watch(self, future: asyncio.Future[T]) -> None:
        loop = asyncio.get_running_loop()
        self._watched.append((loop.time() + self._seconds, future))  # type: ignore[arg-type]
        if not self._ticking:
            self._ticking = True
            loop.call_later(self._seconds / 4, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        watched = self._watched
        while watched and (watched[0][1].done() or watched[0][0] <= now):
            watched.popleft()[1].cancel()
        self._ticking = bool(watched)
        if watched:
            loop.call_later(self._seconds / 4, self._tick, loop)
