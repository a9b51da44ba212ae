"""Owns group commit: deliveries that wait share one transaction, and those on their way are waited for a moment.

A transaction costs its round trips however many it enters, so one follows the other, and what comes meanwhile goes together
in the next. Two things end that. A transaction that is slow (a synchronous standby, another site) does not hold up the rest:
after `INDEX_OVERLAP_S` another begins beside it. And a whole batch that waits has nothing to gain by waiting on.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Delivery, Outcome
from powermail.index.sql.core import Core

_ENTERED = Outcome.ENTERED
_Waiting = tuple[Delivery, "asyncio.Future[Outcome]"]


class _Batch:
    """Deliveries of one transaction that is under way. `slow`: another may begin beside it; `timer` says when that is so."""

    __slots__ = ("deliveries", "slow", "timer")

    def __init__(self, deliveries: list[_Waiting]) -> None:
        self.deliveries = deliveries
        self.slow = False
        self.timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        """Nothing begins beside it that does not begin anyway."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None


class Gathering(Core):
    """`deliver` and `expect` of `index.contract.Copies`. At most `_batches_max` batches are under way, and beside one that
    is quick only a whole one begins.
    """

    _batches_max = 1
    _batch_max = limits.INDEX_BATCH_MAX
    _enough = limits.INDEX_BATCH_MAX  # so many do not wait for more

    def _begin_gathering(self) -> None:
        self._waiting: list[_Waiting] = []
        self._batches: list[_Batch] = []
        self._expected = 0  # deliveries on their way, those that wait here included
        self._timer: asyncio.TimerHandle | None = None
        self._at_once = False  # the timer is one that waits for nobody
        self._idle: asyncio.Event = asyncio.Event()

    @abstractmethod
    def _enter_batch(self, batch: list[Delivery]) -> asyncio.Future[list[Outcome | Exception]]:
        """Enters them in one transaction; what became of each."""

    @abstractmethod
    def _entered(self, deliveries: Iterable[Delivery]) -> None:
        """A batch is over; these of it were entered."""

    async def _gathered(self) -> None:
        """Waits until nothing waits."""
        while self._batches or self._waiting or self._at_once:
            self._idle.clear()
            await self._idle.wait()

    def _refuse_waiting(self, why: IndexTrouble) -> None:
        """Nothing that waits is entered any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at_once = None, False
        for batch in self._batches:
            batch.stop_timer()
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_exception(why)
        self._idle.set()

    def deliver(self, delivery: Delivery) -> asyncio.Future[Outcome]:
        """As the contract says. Raises IndexTrouble at once when too many wait."""
        if len(self._waiting) >= limits.INDEX_WAITING_MAX:
            raise IndexTrouble(f"{limits.INDEX_WAITING_MAX} deliveries wait for the index")
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((delivery, future))
        self._go_on()
        return future

    def expect(self, count: int) -> None:
        self._expected += count
        self._go_on()

    def _go_on(self) -> None:
        """Gathers for the next transaction, if there is something for one and it may begin."""
        if self._waiting and not self._at_once and self._may_begin():
            self._gather()

    def _may_begin(self) -> bool:
        """True if no batch is under way; or if those that are have been for long, or what waits would fill one."""
        if len(self._batches) >= self._batches_max:
            return False
        return len(self._waiting) >= self._batch_max or all(batch.slow for batch in self._batches)

    def _gather(self) -> None:
        """Starts a transaction when all who are on their way have come, or enough of them, or after a moment."""
        loop = asyncio.get_running_loop()
        if len(self._waiting) >= min(self._expected, self._enough):
            if self._timer is not None:
                self._timer.cancel()
            self._at_once = True
            self._timer = loop.call_later(0, self._deliver_next)
        elif self._timer is None:
            self._timer = loop.call_later(limits.INDEX_GATHER_S, self._deliver_next)

    def _deliver_next(self) -> None:
        self._timer, self._at_once = None, False
        batch = _Batch(self._waiting[: self._batch_max])
        del self._waiting[: self._batch_max]
        self._batches.append(batch)
        if self._batches_max > 1:  # else nothing ever begins beside it
            batch.timer = asyncio.get_running_loop().call_later(limits.INDEX_OVERLAP_S, self._is_slow, batch)
        done = self._enter_batch([delivery for delivery, _ in batch.deliveries])
        done.add_done_callback(partial(self._delivered, batch))
        self._go_on()

    def _is_slow(self, batch: _Batch) -> None:
        batch.slow, batch.timer = True, None
        self._go_on()

    def _delivered(self, batch: _Batch, result: asyncio.Future[list[Outcome | Exception]]) -> None:
        batch.stop_timer()
        self._batches.remove(batch)
        deliveries = batch.deliveries
        if result.cancelled():
            error: BaseException | None = IndexTrouble("the index was closed")
        else:
            error = result.exception()
        outcomes: Sequence[Outcome | BaseException] = [error] * len(deliveries) if error is not None else result.result()
        self._entered(each[0] for each, outcome in zip(deliveries, outcomes, strict=True) if outcome is _ENTERED)
        for (_, future), outcome in zip(deliveries, outcomes, strict=True):
            if future.done():  # nobody waits any more
                continue
            if isinstance(outcome, Outcome):
                future.set_result(outcome)
            else:
                trouble = outcome if isinstance(outcome, IndexTrouble) else IndexTrouble(f"index: {outcome}")
                if trouble is not outcome:
                    trouble.__cause__ = outcome
                future.set_exception(trouble)
        self._go_on()
        if not self._waiting:
            self._idle.set()
