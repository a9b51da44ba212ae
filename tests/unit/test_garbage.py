"""When Python looks for garbage, and for how long at most."""

from __future__ import annotations

import gc
import time

from powermail.base import garbage
from tests.conftest import BLOCKED_S


def test_no_look_but_the_rare_one_at_all_takes_long() -> None:
    """However much a server keeps: a million objects, all of them kept, as a cache that fills."""
    garbage.settle()
    looks: dict[int, list[float]] = {0: [], 1: [], 2: []}
    began = 0.0

    def looked(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            looks[info["generation"]].append(time.thread_time() - began)

    gc.callbacks.append(looked)
    try:
        kept = [[number] for number in range(1_000_000)]
    finally:
        gc.callbacks.remove(looked)
    assert len(kept) == 1_000_000 and len(looks[0]) > 30 and len(looks[1]) > 5 and not looks[2]
    assert max(looks[0]) < BLOCKED_S / 2 and max(looks[1]) < BLOCKED_S / 2
