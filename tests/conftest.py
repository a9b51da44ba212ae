"""Every test watches the event loop: a step that blocks it fails the test (X06)."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from powermail.base.lane import ThreadLane

pytest_plugins = ["tests.servers"]  # fixtures: a real PostgreSQL and MariaDB for each test process

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a program that is started a thousand times is compiled once

BLOCKED_S = 0.25  # CPU of one step; the promise is 50 ms, the rest is for slow machines and the tests' own work
_LOOK_S = 0.1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that may take longest come first, or one core ends with them while the other rests."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout") if mark.args), default=0))


def pytest_collection_finish() -> None:
    """Thousands of collected tests are no garbage: looking through them takes longer than any step may."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a test has to say though it passed, by `record_property("said", ...)`."""
    for report in terminalreporter.getreports("passed"):
        for name, said in report.user_properties if report.when == "call" else ():
            if name == "said":
                terminalreporter.write_line(str(said))


_run = ThreadLane.run


def _run_checked(lane: ThreadLane, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """A cursor that leaves its lane is reset by another thread while its statement may be in use again."""

    def checked(*given: Any) -> Any:
        result = call(*given)
        assert not isinstance(result, sqlite3.Cursor), f"{call} hands out a cursor"
        return result

    return _run(lane, checked, *args)


ThreadLane.run = _run_checked  # type: ignore[assignment, method-assign]


def queued_s() -> float:
    """How long this thread has been ready to run and had no core: a busy machine is no blocked event loop."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:
        return 0.0


@pytest.fixture(autouse=True)
def nothing_blocks_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times every step that an asyncio loop runs: its own CPU, and CPU or waiting of what it calls."""
    run = asyncio.Handle._run
    slow: list[str] = []
    looked_at, queued = float("-inf"), 0.0
    garbage_s, collecting_since = 0.0, 0.0  # all of the runner's heap is looked through: that is no step of the program's

    def collects(phase: str, info: dict[str, int]) -> None:
        nonlocal garbage_s, collecting_since
        if phase == "start":
            collecting_since = time.thread_time()
        elif info["generation"] == 2:
            garbage_s += time.thread_time() - collecting_since

    def timed(handle: asyncio.Handle) -> None:
        nonlocal looked_at, queued, garbage_s
        garbage_s = 0.0
        cpu, wall = time.thread_time(), time.monotonic()
        if wall - looked_at > _LOOK_S:
            looked_at, queued = wall, queued_s()
        run(handle)
        cpu, wall = time.thread_time() - cpu - garbage_s, time.monotonic() - wall - garbage_s
        if cpu > BLOCKED_S or (wall > 8 * BLOCKED_S and wall - (queued_s() - queued) > 8 * BLOCKED_S):
            slow.append(f"{cpu:.2f} s CPU, {wall:.2f} s in all: {handle!r}")

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    gc.callbacks.append(collects)
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)  # a command that serves has set those of a server
    gc.callbacks.remove(collects)
    assert not slow, "the event loop was blocked: " + "; ".join(slow[:3])
