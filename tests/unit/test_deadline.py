"""Waiting for at most so long: who is late is told, who is done is let go of, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from powermail.base.deadline import Patience
from powermail.sim.loop import SimLoop, run

_LENGTH_S = 4.0
_STEP_S = _LENGTH_S / 4  # so late it may be


def go(work: Callable[[Patience, SimLoop], Awaitable[None]]) -> None:
    """Runs a test."""

    async def body() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        await work(Patience(_LENGTH_S), loop)

    complaints: list[str] = []
    run(body(), 1, complaints.append)
    assert complaints == []


def test_each_of_many_has_its_own_deadline_by_one_timer() -> None:
    async def work(patience: Patience, loop: SimLoop) -> None:
        async def wait(after_s: float, takes_s: float) -> tuple[str, float]:
            await asyncio.sleep(after_s)
            began = loop.time()
            try:
                await patience.wait(asyncio.sleep(takes_s))
            except TimeoutError:
                return "late", loop.time() - began
            return "done", loop.time() - began

        results = await asyncio.gather(*(wait(number / 8, 1.0 if number % 3 else 60.0) for number in range(64)))
        for number, (what, took_s) in enumerate(results):
            if number % 3:
                assert what == "done" and took_s == pytest.approx(1.0)
            else:
                assert what == "late" and _LENGTH_S <= took_s <= _LENGTH_S + _STEP_S
        assert not [handle for _, _, handle in loop._timers if not handle.cancelled() and handle.when() > loop.time() + _STEP_S]

    go(work)


@pytest.mark.parametrize("how", ["done", "failed", "late", "given up", "done before"])
def test_what_is_over_is_let_go_of_at_once(how: str) -> None:
    """Else each delivery would be kept for as long as it may take."""

    async def work(patience: Patience, loop: SimLoop) -> None:
        future: asyncio.Future[str] = loop.create_future()
        if how == "done before":
            future.set_result("so it is")
        waiting = asyncio.ensure_future(patience.wait(future))
        await asyncio.sleep(_STEP_S / 2)
        assert len(patience._watched) == (how != "done before")
        if how == "done":
            future.set_result("so it is")
        elif how == "failed":
            future.set_exception(ValueError("so it is"))
        elif how == "given up":
            waiting.cancel()
        elif how == "late":
            await asyncio.sleep(_LENGTH_S + _STEP_S)
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        expected = {"failed": ValueError, "late": TimeoutError, "given up": asyncio.CancelledError}
        assert isinstance(result, expected.get(how, str)) and not patience._watched
        assert future.cancelled() == (how in ("late", "given up"))
        await asyncio.sleep(_LENGTH_S)
        assert not patience._ticking, "nobody waits: no timer is set"

    go(work)
