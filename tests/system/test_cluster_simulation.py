"""A whole cluster in simulated worlds: front ends, keepers and nodes as processes of their own, on one database."""

from __future__ import annotations

import os

import pytest

from tests.system.seeds import simulated

SEEDS = int(os.environ.get("PM_TEST_CLUSTER_SEEDS", "4"))
SECONDS = 10
BRANCHES_WITHIN = 6  # seeds

# Faults, and what a seed of them must bring about: what never happens shows nothing.
FAULTS = ("database-stale", "cut", "node-killed", "front-killed")
BRANCHES = ("law.11.epochs", "law.11.caught_up", "law.10.marks", "cluster.links_lost", "keeper.jobs_taken", "keeper.reconciled")


@pytest.mark.timeout(900)
def test_no_client_of_a_cluster_sees_what_it_must_not() -> None:
    results = simulated(0, SEEDS, SECONDS, (), "--cluster")
    assert all(result["acked"] and result["listings"] and result["looks"] and result["faults"] for result in results)
    laws = [result["laws"] for result in results]
    for name in ("law.10.marks", "law.13.wholes", "keeper.collected", "keeper.jobs_taken", "keeper.reconciled"):
        assert any(counted.get(name) for counted in laws), name
    assert simulated(SEEDS - 1, 1, SECONDS, (), "--cluster")[0] == results[-1], "it is the same alone as behind others"


@pytest.mark.timeout(900)
def test_what_befalls_a_cluster_takes_the_branches_of_the_laws() -> None:
    left = list(BRANCHES)
    for seed in range(BRANCHES_WITHIN):
        laws = simulated(seed, 1, SECONDS, FAULTS, "--cluster")[0]["laws"]
        left = [name for name in left if not laws.get(name)]
        if not left:
            return
    raise AssertionError(f"{left} never happened")
