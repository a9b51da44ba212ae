"""Owns waiting for at most so long: cheaper than a time-out context, because most waits end in time."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def within(future: asyncio.Future[T], seconds: float) -> T:
    """The result of `future`, which is cancelled when it takes longer. Raises TimeoutError, or what the future raises."""
    if future.done():
        return future.result()
    timer = future.get_loop().call_later(seconds, future.cancel)
    try:
        return await future
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if future.cancelled() and not (task is not None and task.cancelling()):
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
