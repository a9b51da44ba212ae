"""Owns the deadlines of calls on a node's lanes (law 14): who waits is answered in time, also when the disk hangs for ever.

The call itself cannot be stopped: what is overdue has an unknown outcome, and goes on whenever the disk does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.lane import Lane

T = TypeVar("T")
_LOOK_EVERY_S: Final = 0.5


class Overdue(NodeTrouble):
    """The call did not end in time; its outcome is unknown."""


class Turns:
    """Calls of one lane, each with its deadline. One timer serves them all; a call costs a place in a queue.

    Calls of a lane end in their order, so the first that is not done is the one under way.
    """

    def __init__(self, lane: Lane, what: str, monotonic: Callable[[], float]) -> None:
        self.lane = lane
        self._what = what
        self._monotonic = monotonic
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._watching = False

    def run(self, call: Callable[..., T], *args: Any, within_s: float = limits.NODE_CALL_TIMEOUT_S) -> asyncio.Future[T]:
        """Queues `call(*args)`; the future raises Overdue when it is not done within the time."""
        future = self.lane.run(call, *args)
        pending = self._pending
        while pending and pending[0][1].done():
            pending.popleft()  # results are not kept longer than who waits for them does
        pending.append((self._monotonic() + within_s, future))
        if not self._watching:
            self._watching = True
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)
        return future

    def abandon(self) -> None:
        """Nobody waits any more: the process was killed (simulator)."""
        self._pending.clear()

    def _look(self) -> None:
        now = self._monotonic()
        left: deque[tuple[float, asyncio.Future[Any]]] = deque()
        for deadline, future in self._pending:
            if future.done():
                continue
            if deadline <= now:
                future.set_exception(Overdue(f"{self._what} takes too long"))
            else:
                left.append((deadline, future))
        self._pending = left
        self._watching = bool(left)
        if left:
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)
