"""Lanes: calls in order, results and errors to whoever asked, and nobody waits for a call that hangs (law 14)."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator

import pytest

from powermail.base import limits
from powermail.base.lane import ThreadLane


@pytest.fixture
async def lane() -> AsyncIterator[ThreadLane]:
    made = ThreadLane("test")
    yield made
    made.close()


def _raise(error: BaseException) -> None:
    raise error


async def test_calls_run_in_order_on_one_other_thread(lane: ThreadLane) -> None:
    seen: list[tuple[int, int]] = []
    calls = [lane.run(lambda n: seen.append((n, threading.get_ident())), number) for number in range(100)]
    await asyncio.gather(*calls)
    assert [number for number, _ in seen] == list(range(100))
    assert {thread for _, thread in seen} == {lane._thread.ident} != {threading.get_ident()}


async def test_results_and_errors_reach_whoever_asked(lane: ThreadLane) -> None:
    good, bad = lane.run(divmod, 7, 2), lane.run(_raise, OSError(5, "injected"))
    assert await good == (3, 1)
    with pytest.raises(OSError, match="injected"):
        await bad
    assert await lane.run(int, "4") == 4, "an error does not end the lane"


async def test_what_a_failed_call_held_is_let_go_of_by_its_own_thread(lane: ThreadLane) -> None:
    """A cursor of SQLite that another thread lets go of resets a statement that is in use again."""
    threads: list[int] = []

    class Held:
        def __del__(self) -> None:
            threads.append(threading.get_ident())

    def fail() -> None:
        held = Held()
        raise OSError(5, f"injected with {held!r}")

    with pytest.raises(OSError, match="injected"):
        await lane.run(fail)
    assert threads == [lane._thread.ident]


async def test_a_lane_that_waits_keeps_no_result(lane: ThreadLane) -> None:
    class Large:
        """What a call may return."""

    kept = weakref.ref(await lane.run(Large))
    async with asyncio.timeout(5):
        while kept() is not None:
            await asyncio.sleep(0)


async def test_who_gives_up_waiting_does_not_stop_the_call(lane: ThreadLane) -> None:
    gate, done = threading.Event(), threading.Event()
    first = lane.run(gate.wait, 10)
    second = lane.run(done.set)
    second.cancel()
    gate.set()
    assert await first
    assert await lane.run(done.is_set)


async def test_waiting_counts_what_is_queued(lane: ThreadLane) -> None:
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        gate.wait(10)

    held = lane.run(hold)
    while not began.is_set():  # the thread takes it in its own time
        await asyncio.sleep(0)
    calls = [lane.run(int) for _ in range(3)]
    assert lane.waiting() == 3
    gate.set()
    await asyncio.gather(held, *calls)
    assert lane.waiting() == 0


async def test_a_result_is_not_kept_back_by_a_call_behind_it_that_hangs(lane: ThreadLane) -> None:
    """Both are taken in one go, and the second never ends: the first is answered all the same."""
    both, gate = threading.Event(), threading.Event()
    lane.run(both.wait, 10)  # so that the next two are queued when the thread comes to them
    first, hung = lane.run(int, "1"), lane.run(gate.wait, 30)
    both.set()
    assert await asyncio.wait_for(first, 5) == 1
    assert not hung.done()
    gate.set()
    assert await hung


async def test_closing_finishes_what_is_queued(lane: ThreadLane) -> None:
    done: list[int] = []
    for number in range(50):
        lane.run(done.append, number)
    lane.close()
    assert done == list(range(50))
    with pytest.raises(RuntimeError, match="closed"):
        await lane.run(int)
    lane.close()


async def test_closing_waits_for_a_call_that_hangs_only_so_long(lane: ThreadLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead disk: the stop goes on, and so does the process (the thread is a daemon)."""
    monkeypatch.setattr(limits, "LANE_CLOSE_WAIT_S", 0.1)
    gate = threading.Event()
    hung = lane.run(gate.wait, 30)
    began = time.monotonic()
    lane.close()
    assert time.monotonic() - began < 5
    assert lane._thread.daemon and lane._thread.is_alive()
    gate.set()
    assert await hung, "when the disk wakes up, the lane ends as it should"
    lane._thread.join(5)
    assert not lane._thread.is_alive()


async def test_closing_does_not_wait_for_what_has_hung_for_long(lane: ThreadLane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LANE_CLOSE_WAIT_S", 0.0)
    began, gate = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        gate.wait(30)

    hung = lane.run(hang)
    while not began.is_set():
        await asyncio.sleep(0)
    monkeypatch.setattr(lane._thread, "join", lambda wait: pytest.fail("it was waited for again"))
    lane.close()
    gate.set()
    await hung


def test_a_lane_outlives_its_loop() -> None:
    """The loop closed while a call was under way: its result is nobody's, and the thread ends."""
    gate = threading.Event()

    async def leave() -> ThreadLane:
        lane = ThreadLane("test")
        lane.run(gate.wait, 30)
        return lane

    lane = asyncio.run(leave())
    gate.set()
    lane._thread.join(5)
    assert not lane._thread.is_alive()
