"""Runs seeds of the simulator until one reports a problem: `python -m tests.planted.seeds SECONDS SEEDS [FAULTS] [cluster]`.

FAULTS have commas between them. Prints that problem and ends with 1; what only says that the simulation itself broke is
printed too, and ends with 2.
"""

from __future__ import annotations

import re
import sys

from powermail.sim.run import simulate

_BROKE = re.compile(r"^\w+ at \S+:\d+: ")  # an exception of the simulation itself: it says nothing about a promise


def main() -> int:
    """The first problem of the first seed that has one."""
    seconds, seeds, *kinds = sys.argv[1:]
    cluster = kinds[-1:] == ["cluster"]
    faults = kinds[: len(kinds) - cluster]
    for seed in range(1, int(seeds) + 1):
        outcome = simulate(seed, float(seconds), faults[0].split(",") if faults else (), cluster)
        for problem in outcome.problems:
            print(f"seed {seed}: {problem}")
            return 2 if _BROKE.match(problem) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
