"""The whole program in simulated worlds: seeds with faults, checked by what clients saw; and that a seed repeats."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from powermail.sim.run import simulate

BLOCKS = int(os.environ.get("PM_TEST_SEED_BLOCKS", "10"))
PER_BLOCK = 10
ONCE_FAILED = (3, 4, 7, 11, 12, 502, 2224)  # seeds that found something; replayed for ever


def simulated(first: int, count: int) -> list[dict[str, object]]:
    """Runs the command as people do."""
    done = subprocess.run(
        [sys.executable, "-m", "powermail", "sim", "--first", str(first), "--seeds", str(count), "--jobs", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, object]] = msgspec.json.decode(done.stdout)
    assert [result["seed"] for result in results] == list(range(first, first + count))
    return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_client_sees_what_it_must_not(block: int) -> None:
    results = simulated(block * PER_BLOCK, PER_BLOCK)
    assert all(result["acked"] and result["listings"] and result["faults"] for result in results)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [seed for seed in ONCE_FAILED if seed >= BLOCKS * PER_BLOCK])
def test_seeds_that_once_failed(seed: int) -> None:
    simulated(seed, 1)


@pytest.mark.timeout(300)
def test_a_seed_repeats_in_another_process() -> None:
    first, again = simulated(77, 1)[0], simulated(77, 1)[0]
    assert first == again
    assert simulated(78, 1)[0]["trace"] != first["trace"]


def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    """What `powermail sim --shrink` stands on."""
    short, long = simulate(5, 5.0), simulate(5, 40.0)
    at = next(n for n, (a, b) in enumerate(zip(short.trace, long.trace, strict=False)) if a != b)
    assert float(long.trace[at].split()[0]) >= 1005.0
