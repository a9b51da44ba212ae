"""Owns the pace of simulated time: what takes minutes in production happens every few virtual seconds here.

So checkpoints, rounds of forgetting and compaction fall between the faults of a short run. Relations between limits stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from powermail.base import limits
from powermail.keeper import compact, forget

PACE: Final = [
    (limits, "CHECKPOINT_INTERVAL_S", 6.0),
    (limits, "ROUND_INTERVAL_S", 8.0),
    (limits, "RECONCILE_INTERVAL_S", 3.0),
    (limits, "RECONCILE_GRACE_S", 10.0),
    (limits, "VIEW_TAIL_ROWS", 20),
    (limits, "VIEW_PART_ROWS", 16),
    (limits, "COMPACT_STEP_OCTETS", 64 * limits.KIB),
    (limits, "COMPACT_DEAD_FRACTION", 0.25),
    (limits, "SCRUB_DAYS_MAX", 0.002),
    (compact, "_IDLE_S", 5.0),
    (forget, "_COMFORT_S", 5.0),
]


@contextmanager
def hurried() -> Iterator[None]:
    """Within it, what `PACE` says holds."""
    before = [(room, name, getattr(room, name)) for room, name, _ in PACE]
    for room, name, value in PACE:
        setattr(room, name, value)
    try:
        yield
    finally:
        for room, name, value in before:
            setattr(room, name, value)
