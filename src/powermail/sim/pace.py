"""Owns the pace of simulated time: what takes minutes in production happens every few virtual seconds here.

So checkpoints, rounds of forgetting and compaction fall between the faults of a short run. Relations between limits stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from powermail.base import limits

PACE: Final = {
    "CHECKPOINT_INTERVAL_S": 12.0,
    "ROUND_INTERVAL_S": 15.0,
    "RECONCILE_INTERVAL_S": 3.0,
    "RECONCILE_GRACE_S": 10.0,
    "VIEW_TAIL_ROWS": 20,
    "VIEW_PART_ROWS": 16,
    "COMPACT_STEP_OCTETS": 64 * limits.KIB,
    "SCRUB_DAYS_MAX": 0.002,
}


@contextmanager
def hurried() -> Iterator[None]:
    """Within it, the limits of `PACE` hold."""
    before = {name: getattr(limits, name) for name in PACE}
    for name, value in PACE.items():
        setattr(limits, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(limits, name, value)
