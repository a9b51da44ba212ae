"""Owns the pace of simulated time: what takes minutes in production happens every few virtual seconds here.

So checkpoints, rounds of forgetting and compaction fall between the faults of a short run. Relations between limits stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

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
# Of a cluster: several processes look at everything many times a second. Less often here, in the same relations.
CLUSTER_PACE: Final = [
    (limits, "JOB_LOOK_S", 5.0),
    (limits, "JOB_RENEW_S", 5.0),
    (limits, "JOB_LEASE_S", 15.0),
    (limits, "LAYOUT_LOOK_S", 2.0),
    (limits, "NODE_PROBE_INTERVAL_S", 2.0),
    (limits, "NODE_STAT_INTERVAL_S", 0.3),
]


@contextmanager
def put(values: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within it, these names of these rooms stand for these values."""
    before = [(room, name, getattr(room, name)) for room, name, _ in values]
    for room, name, value in values:
        setattr(room, name, value)
    try:
        yield
    finally:
        for room, name, value in before:
            setattr(room, name, value)
