"""Owns waiting for at most so long: one timer for all who wait, because most waits end in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class Patience:
    """Waits of one length. A future that takes longer is cancelled, up to a quarter of that length late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched: dict[asyncio.Future[Any], float] = {}  # until when each is waited for, in that order
        self._ticking = False

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises TimeoutError, or what the work raises."""
        future: asyncio.Future[T] = work if isinstance(work, asyncio.Future) else asyncio.ensure_future(work)
        if future.done():
            return await future
        loop = asyncio.get_running_loop()
        self._watched[future] = loop.time() + self._seconds
        if not self._ticking:
            self._ticking = True
            loop.call_later(self._seconds / 4, self._tick, loop)
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and not (task is not None and task.cancelling()):
                raise TimeoutError from None
            raise
        finally:
            self._watched.pop(future, None)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for future in [future for future, until in self._watched.items() if until <= now]:
            future.cancel()
        self._ticking = bool(self._watched)
        if self._ticking:
            loop.call_later(self._seconds / 4, self._tick, loop)
