"""Owns how long each node takes to read, by its own history: when a read is late, whom to read last for a while, who is far.

A read that takes much longer than those before it on the same node is late, and another copy is asked beside it. The measure
is that of RFC 6298 (mean and deviation, smoothed by 1/8 and 1/4), by kind of read. Who was overtaken is read last for a while
(P20); so is who stands in another site than the reader, where that is said, and, among equals of that, who takes several times
as long as the quickest: nodes of another site, without anybody saying where they stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Generic, TypeVar

from powermail.base import limits

T = TypeVar("T")


class _History:
    """Reads of one kind on one node, in seconds."""

    __slots__ = ("deviation_s", "mean_s", "read_at")

    def __init__(self, took_s: float, now: float) -> None:
        self.mean_s = took_s
        self.deviation_s = took_s / 2
        self.read_at = now


class Pace:
    """What reads took. Kinds are read beside each other and never compared: a record is no chunk."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._histories: dict[tuple[str, str], _History] = {}  # by node and kind
        self._overtaken_until: dict[str, float] = {}
        self._ranks: dict[str, tuple[float, dict[str, int]]] = {}  # by kind, and until when they hold
        self._spared = float(limits.READ_LATE_BURST)  # reads that may still be asked twice, before others were in time

    def took(self, node: str, kind: str, seconds: float) -> None:
        """A read ended well."""
        now, history = self._monotonic(), self._histories.get((node, kind))
        self._spared = min(limits.READ_LATE_BURST, self._spared + limits.READ_LATE_SHARE)
        if history is None or now - history.read_at > limits.READ_HISTORY_S:
            self._histories[node, kind] = _History(seconds, now)
            return
        history.deviation_s += (abs(seconds - history.mean_s) - history.deviation_s) / 4
        history.mean_s += (seconds - history.mean_s) / 8
        history.read_at = now

    def late_s(self, node: str, kind: str) -> float:
        """After how long a read there is late."""
        history = self._histories.get((node, kind))
        if history is None:
            return limits.READ_LATE_UNKNOWN_S
        late_s = history.mean_s + 4 * history.deviation_s
        return min(max(late_s, limits.READ_LATE_MIN_S), limits.READ_LATE_MAX_S)

    def may_ask_twice(self, node: str) -> bool:
        """True if a late read there may be asked elsewhere too: always while it is overtaken, else so for a share of all reads:
        load that makes every node slow is not doubled.
        """
        if self.is_overtaken(node):
            return True
        if self._spared < 1.0:
            return False
        self._spared -= 1.0
        return True

    def overtaken(self, node: str) -> None:
        """Another copy was there first, although it was asked later."""
        self._overtaken_until[node] = self._monotonic() + limits.NODE_SLOW_REMEMBERED_S
        self._ranks.clear()

    def is_overtaken(self, node: str) -> bool:
        """True while a node is read last for that."""
        return self._monotonic() < self._overtaken_until.get(node, 0.0)

    def ranks(self, kind: str, elsewhere: Collection[str] = ()) -> dict[str, int]:
        """Whom to read behind the others, as they were a moment ago; who is not named is read first. 1 takes long, 2 is of
        those who stand elsewhere, 3 takes long there, 4 was overtaken.
        """
        now = self._monotonic()
        until, ranks = self._ranks.get(kind, (0.0, {}))
        if now < until:
            return ranks
        means = {
            node: history.mean_s
            for (node, of), history in self._histories.items()
            if of == kind and now - history.read_at <= limits.READ_HISTORY_S
        }
        far_s = max(limits.READ_NEAR_S, 4 * min(means.values(), default=0.0))
        ranks = {node: 1 for node, mean_s in means.items() if mean_s > far_s}
        ranks.update({node: 2 + ranks.get(node, 0) for node in elsewhere})
        ranks.update({node: 4 for node, over_at in self._overtaken_until.items() if now < over_at})
        self._ranks[kind] = now + limits.READ_RANKS_S, ranks
        return ranks


class Beside(Generic[T]):
    """A second read, begun when the first is late. The first good answer counts: the second ends the wait for the first.

    A read that is in time pays for one timer, and for no task.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, T] | None], late_s: float | None) -> None:
        """`start` gives the second read, or None if there can be none now: it is asked again. None as `late_s`: never."""
        self.task: asyncio.Task[T] | None = None
        self.good: asyncio.Task[T] | None = None  # the same, once it has a good answer that came first
        self._start = start
        self._late_s = late_s
        self._timer: asyncio.Timeout | None = None
        self._handle: asyncio.TimerHandle | None = None

    def watch(self, timer: asyncio.Timeout) -> None:
        """The first read begins now, within this time-out."""
        self._timer = timer
        self._wait()

    def _wait(self) -> None:
        if self._late_s is not None:
            self._handle = asyncio.get_running_loop().call_later(self._late_s, self._late)

    def _late(self) -> None:
        reading = self._start()
        if reading is None:
            self._wait()
        else:
            self.task = asyncio.get_running_loop().create_task(reading)
            self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[T]) -> None:
        if task.cancelled() or task.exception() is not None or self._timer is None:
            return
        self.good = task
        if not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    def over(self) -> None:
        """The first read has ended: no second one begins any more."""
        self._timer = None
        if self._handle is not None:
            self._handle.cancel()

    def let_go(self) -> None:
        """Nobody waits any more for the second either."""
        if self.task is not None:
            self.task.cancel()
