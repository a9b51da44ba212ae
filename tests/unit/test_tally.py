"""Limits that hold in all processes together: counts are shared late, never lost, and by digests only."""

from __future__ import annotations

import pytest

from powermail.app.tallies import Tallying
from powermail.base import limits
from powermail.base.clock import SystemClock
from powermail.base.errors import IndexTrouble
from powermail.base.tally import Tally
from powermail.directory.limiter import FailureLimiter
from powermail.index.memory import MemoryIndex
from tests.keeper.rig import Rig, go


def process(index: MemoryIndex) -> tuple[FailureLimiter, Tallying]:
    """What one front end counts."""
    limiter, tallying = FailureLimiter(SystemClock()), Tallying(index)
    tallying.share(limiter.minute, limiter.day)
    return limiter, tallying


def test_failures_at_one_front_end_count_at_the_other_after_the_next_look() -> None:
    async def body(rig: Rig) -> None:
        (one, telling), (two, learning) = process(rig.index), process(rig.index)
        for _ in range(limits.AUTH_FAILURES_PER_MINUTE_MAX[0]):
            one.failed("192.0.2.1", "ann")
        assert one.refused("192.0.2.1") and not two.refused("192.0.2.1")
        await telling.step()
        await learning.step()
        assert one.refused("192.0.2.1") and two.refused("192.0.2.1") and not two.refused("198.51.100.1")
        assert two.delay_s("192.0.2.1", "ann") == one.delay_s("192.0.2.1", "ann")

    go(body)


def test_what_each_counts_below_the_limit_is_above_it_together() -> None:
    async def body(rig: Rig) -> None:
        both = [process(rig.index) for _ in range(2)]
        for limiter, _ in both:
            for _ in range(limits.AUTH_FAILURES_PER_MINUTE_MAX[0] // 2 + 1):
                limiter.failed("192.0.2.1", "ann")
            assert not limiter.refused("192.0.2.1")
        for _, tallying in (*both, both[0]):
            await tallying.step()
        assert all(limiter.refused("192.0.2.1") for limiter, _ in both)

    go(body)


def test_counts_that_could_not_be_told_are_told_later() -> None:
    async def body(rig: Rig) -> None:
        (one, telling), (two, learning) = process(rig.index), process(rig.index)
        one.failed("192.0.2.1", "ann")
        rig.index.fail_next(kept=False)
        with pytest.raises(IndexTrouble):
            await telling.step()
        await telling.step()
        await learning.step()
        assert two.minute.known("192.0.2.1/32") == two.day.known("192.0.2.1/32") == 1

    go(body)


def test_nobody_sees_what_was_typed_as_a_name() -> None:
    tally = Tally("failed-minute", 60.0)
    tally.add("before anybody shares it")
    tally.share()
    tally.add("account hunter2", 3)
    taken = tally.take()
    assert list(taken.values()) == [3] and "hunter2" not in str(taken)
    tally.learn(taken)
    assert tally.known("account hunter2") == 3
