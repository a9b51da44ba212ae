"""Owns time: `monotonic` for waiting, `now` for what is written down."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Two clocks; the wall clock may jump, so nothing waits by it and nothing is ordered by it alone (F23)."""

    def monotonic(self) -> float:
        """Seconds since some fixed point; never goes back."""

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC. Every stored `_at` is one of these."""


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    now = staticmethod(time.time)


def utc(at: float) -> datetime:
    """Returns a stored time as an aware datetime."""
    return datetime.fromtimestamp(at, UTC)
