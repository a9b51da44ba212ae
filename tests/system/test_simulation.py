"""The whole program in simulated worlds: seeds with faults, checked by what clients saw; and that a seed repeats."""

from __future__ import annotations

import os

import pytest

from powermail.sim.run import simulate
from tests.system.seeds import simulated

BLOCKS = int(os.environ.get("PM_TEST_SEED_BLOCKS", "3"))
PER_BLOCK = 12
SECONDS = 25
# Seeds that found something, and for how many seconds of faults; replayed for ever.
ONCE_FAILED = {
    **dict.fromkeys((101, 312, 10008, 100025, 100037, 400999), SECONDS),
    **dict.fromkeys((600550, 600623, 602061, 602741, 802974, 803379), 10),
}

# What keepers do between the faults; a block of seeds without it shows nothing.
KEPT = ("law.13.wholes", "keeper.collected", "keeper.compacted_octets", "keeper.forgotten", "law.10.marks")
MORE = 700_000  # seeds that are asked beside a block

# Faults, and the branches of the laws that four seeds of them must take: what never happens shows nothing.
BRANCHES = {
    ("old-index", "hot-index"): ("law.10.marks", "law.11.epochs", "law.11.walks", "law.11.entered", "law.11.caught_up"),
    ("disk-emptied", "disk-returned"): ("law.12.incarnations", "law.12.older", "keeper.repaired"),
    ("index-away", "index-hung", "kill"): ("delivery.index_late", "keeper.reconciled", "law.9.rounds", "keeper.forgotten"),
    ("answers-lost", "hung-disks"): ("law.5.closed", "cluster.replaced", "keeper.reconciled"),
    ("rot", "read-error", "disk-away"): ("cluster.replaced", "law.13.wholes", "law.13.tails", "keeper.collected"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_client_sees_what_it_must_not(block: int) -> None:
    results = simulated(block * PER_BLOCK, PER_BLOCK, SECONDS)
    assert all(result["acked"] and result["listings"] and result["looks"] and result["faults"] for result in results)
    missing = {name for name in KEPT if not any(result["laws"].get(name) for result in results)}
    for seed in range(MORE + 20 * block, MORE + 20 * block + 12):  # what comes rarely may have come in none of them
        if not missing:
            break
        (more,) = simulated(seed, 1, SECONDS)
        missing -= {name for name in missing if more["laws"].get(name)}
    assert not missing


@pytest.mark.timeout(600)
@pytest.mark.parametrize("faults", BRANCHES, ids=" ".join)
def test_the_branches_of_the_laws_are_taken(faults: tuple[str, ...]) -> None:
    results = simulated(1, 4, SECONDS, faults)
    for name in BRANCHES[faults]:
        assert sum(result["laws"].get(name, 0) for result in results), f"{name} never happened"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [seed for seed in ONCE_FAILED if seed >= BLOCKS * PER_BLOCK])
def test_seeds_that_once_failed(seed: int) -> None:
    simulated(seed, 1, ONCE_FAILED[seed])


@pytest.mark.timeout(600)
def test_a_seed_repeats_in_another_process() -> None:
    first, again = simulated(77, 1, SECONDS)[0], simulated(77, 1, SECONDS)[0]
    assert first == again
    assert simulated(78, 1, SECONDS)[0]["trace"] != first["trace"]


@pytest.mark.timeout(600)
def test_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    """What `powermail sim --shrink` stands on."""
    short, long = simulate(5, 5.0), simulate(5, 40.0)
    at = next(n for n, (a, b) in enumerate(zip(short.trace, long.trace, strict=False)) if a != b)
    assert float(long.trace[at].split()[0]) >= 1005.0


def test_a_fault_that_does_not_exist_is_said() -> None:
    outcome = simulate(1, 1.0, ("flood",))
    assert "no fault is called 'flood'" in outcome.problems[0]
