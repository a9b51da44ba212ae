"""A whole cluster in simulated worlds: front ends, keepers and nodes as processes of their own, on one database."""

from __future__ import annotations

import os

import pytest

from tests.system.seeds import simulated

PER_BLOCK = 10
BLOCKS = int(os.environ.get("PM_TEST_CLUSTER_SEEDS", "100")) // PER_BLOCK
SECONDS = 4
ONCE_FAILED = (900_004, 910_312, 910_347, 910_420, 910_433, 920_278, 920_319, 941_352)
BRANCHES_WITHIN = 6  # seeds

# What keepers do between the faults; a block of seeds without it shows nothing.
KEPT = ("law.10.marks", "law.13.wholes", "keeper.collected", "keeper.jobs_taken", "keeper.reconciled")
# Faults, and what a seed of them must bring about: what never happens shows nothing.
FAULTS = ("database-stale", "cut", "node-killed", "front-killed")
BRANCHES = ("law.11.epochs", "law.11.caught_up", "law.10.marks", "cluster.links_lost", "keeper.jobs_taken", "keeper.reconciled")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_client_of_a_cluster_sees_what_it_must_not(block: int) -> None:
    results = simulated(block * PER_BLOCK, PER_BLOCK, SECONDS, (), "--cluster")
    assert all(result["acked"] and result["listings"] and result["looks"] and result["faults"] for result in results)
    for name in KEPT:
        assert any(result["laws"].get(name) for result in results), name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [seed for seed in ONCE_FAILED if seed >= BLOCKS * PER_BLOCK])
def test_seeds_of_a_cluster_that_once_failed(seed: int) -> None:
    simulated(seed, 1, SECONDS, (), "--cluster")


@pytest.mark.timeout(900)
def test_a_seed_of_a_cluster_is_the_same_alone_as_behind_others() -> None:
    assert simulated(1, 3, SECONDS, (), "--cluster")[-1] == simulated(3, 1, SECONDS, (), "--cluster")[0]


@pytest.mark.timeout(900)
def test_what_befalls_a_cluster_takes_the_branches_of_the_laws() -> None:
    left = list(BRANCHES)
    for seed in range(BRANCHES_WITHIN):
        laws = simulated(seed, 1, 2 * SECONDS, FAULTS, "--cluster")[0]["laws"]
        left = [name for name in left if not laws.get(name)]
        if not left:
            return
    raise AssertionError(f"{left} never happened")
