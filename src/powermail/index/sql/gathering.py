"""Owns group commit: deliveries that wait share one transaction, and those on their way are waited for a moment."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Delivery, Outcome
from powermail.index.sql.core import Core

_ENTERED = Outcome.ENTERED
_Waiting = tuple[Delivery, "asyncio.Future[Outcome]"]


class Gathering(Core):
    """`deliver` and `expect` of `index.contract.Copies`. At most `_batches_max` batches are under way."""

    _batches_max = 1
    _batch_max = limits.INDEX_BATCH_MAX
    _enough = limits.INDEX_BATCH_MAX  # so many do not wait for more

    def _begin_gathering(self) -> None:
        self._waiting: list[_Waiting] = []
        self._busy = 0  # batches under way
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
        while self._busy or self._waiting or self._at_once:
            self._idle.clear()
            await self._idle.wait()

    def _refuse_waiting(self, why: IndexTrouble) -> None:
        """Nothing that waits is entered any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at_once = None, False
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
        if self._busy < self._batches_max and not self._at_once:
            self._gather()
        return future

    def expect(self, count: int) -> None:
        self._expected += count
        if self._waiting and self._busy < self._batches_max and not self._at_once:
            self._gather()

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
        batch = self._waiting[: self._batch_max]
        del self._waiting[: self._batch_max]
        self._busy += 1
        done = self._enter_batch([delivery for delivery, _ in batch])
        done.add_done_callback(lambda result: self._delivered(batch, result))
        if self._waiting and self._busy < self._batches_max:
            self._gather()

    def _delivered(self, batch: list[_Waiting], result: asyncio.Future[list[Outcome | Exception]]) -> None:
        self._busy -= 1
        if result.cancelled():
            error: BaseException | None = IndexTrouble("the index was closed")
        else:
            error = result.exception()
        outcomes: Sequence[Outcome | BaseException] = [error] * len(batch) if error is not None else result.result()
        self._entered(each[0] for each, outcome in zip(batch, outcomes, strict=True) if outcome is _ENTERED)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():  # nobody waits any more
                continue
            if isinstance(outcome, Outcome):
                future.set_result(outcome)
            else:
                trouble = outcome if isinstance(outcome, IndexTrouble) else IndexTrouble(f"index: {outcome}")
                if trouble is not outcome:
                    trouble.__cause__ = outcome
                future.set_exception(trouble)
        if self._waiting:
            if not self._at_once:
                self._gather()
        else:
            self._idle.set()
