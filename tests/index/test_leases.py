"""Who does which background job: taken, renewed and given back by its owner only, by the index's own clock."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.index.contract import Index
from powermail.index.sharing import JobLease
from tests.index.support import NOW, Rig


async def test_a_job_has_one_owner_until_its_lease_is_over(index: Index, rig: Rig) -> None:
    assert await index.leases() == []
    assert await index.lease("scrub a", "one", 60.0)
    assert not await index.lease("scrub a", "two", 60.0)
    assert await index.lease("scrub b", "two", 30.0), "another job is another lease"
    assert await index.leases() == [JobLease("scrub a", "one", NOW + 60), JobLease("scrub b", "two", NOW + 30)]
    rig.clock.at += 59
    assert not await index.lease("scrub a", "two", 60.0)
    rig.clock.at += 1
    assert await index.lease("scrub a", "two", 60.0)
    assert not await index.lease("scrub a", "one", 60.0), "who comes back later has lost it"
    assert (await index.leases())[0] == JobLease("scrub a", "two", NOW + 120)


async def test_an_owner_renews_what_it_has(index: Index, rig: Rig) -> None:
    for _ in range(5):
        assert await index.lease("scrub a", "one", 60.0)
        rig.clock.at += 40
        assert not await index.lease("scrub a", "two", 60.0)
    rig.clock.at += 40
    assert await index.lease("scrub a", "one", 60.0), "it is over, and nobody took it"


async def test_only_the_owner_releases_a_job(index: Index) -> None:
    assert await index.lease("scrub a", "one", 60.0)
    await index.release("scrub a", "two")
    await index.release("scrub b", "two")
    assert not await index.lease("scrub a", "two", 60.0)
    await index.release("scrub a", "one")
    await index.release("scrub a", "one")
    assert await index.leases() == []
    assert await index.lease("scrub a", "two", 60.0)


async def test_a_clock_that_ran_ahead_keeps_no_job_for_ever(index: Index, rig: Rig) -> None:
    rig.clock.at += 365 * 86400.0
    assert await index.lease("scrub a", "one", limits.LEASE_S_MAX)
    assert await index.lease("scrub b", "one", limits.LEASE_S_MAX)
    rig.clock.at = NOW
    assert await index.lease("scrub a", "two", 60.0)
    assert await index.leases() == [JobLease("scrub a", "two", NOW + 60), JobLease("scrub b", "one", 0.0)], (
        "or all others would seem to be over for a year"
    )
    for seconds in (0.0, -1.0, limits.LEASE_S_MAX + 1):
        with pytest.raises(ValueError, match="at most"):
            await index.lease("scrub b", "two", seconds)


async def test_who_asks_for_what_another_has_writes_nothing(index: Index) -> None:
    """Law 10: a transaction is counted when it changes something; many ask, and one has it."""
    assert await index.lease("scrub a", "one", 60.0)
    before = index.mark()
    assert not await index.lease("scrub a", "two", 60.0)
    await index.release("scrub a", "two")
    assert index.mark() == before
