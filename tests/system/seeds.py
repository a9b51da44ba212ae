"""Owns how tests run the simulator: by its command, as people do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec


def simulated(first: int, count: int, seconds: int, faults: Sequence[str] = (), *words: str) -> list[dict[str, Any]]:
    """What seeds gave, of all faults or some; nothing was found. The command runs its first seed twice and compares traces."""
    words += ("--first", str(first), "--seeds", str(count), "--seconds", str(seconds), "--jobs", "1", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "powermail", "sim", *words, *(word for fault in faults for word in ("--only", fault))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = msgspec.json.decode(done.stdout)
    assert [result["seed"] for result in results] == list(range(first, first + count))
    return results
