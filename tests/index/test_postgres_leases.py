"""A lease on PostgreSQL is one statement, and as sound as the transaction in whose place it is (law 10)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index.moving import _NO_SLOTS
from powermail.index.postgres import PostgresIndex
from powermail.index.postgres.statements import Writer
from powermail.index.sharing import JobLease
from tests.index.sharing import WAIT_S, Wire, another, between, blocked, counted_statements
from tests.index.support import CLUSTER, NOW, PostgresRig

HOLD = "UPDATE leases SET until = until"


def slots(index: PostgresIndex) -> list[Any]:
    """The writer slots of a process, as it knows them."""
    return [link.slot for link in index._writers.all if link.slot is not None]


async def test_a_lease_is_taken_refused_renewed_and_given_back_by_one_statement_each(shared_rig: PostgresRig) -> None:
    index = shared_rig.running
    assert await index.lease("scrub b", "me", 60.0)
    calls: list[tuple[Awaitable[Any], Any, int]] = [
        (index.lease("scrub a", "me", 60.0), True, 1),
        (index.lease("scrub a", "me", 60.0), True, 1),
        (index.lease("scrub a", "you", 60.0), False, 0),
        (index.release("scrub a", "you"), None, 0),
        (index.release("scrub a", "me"), None, 1),
    ]
    for call, answer, counted in calls:
        (before,) = slots(index)
        async with counted_statements(index) as statements:
            assert await call == answer
        assert len(statements) == 1 and statements[0].startswith("WITH "), statements
        assert slots(index) == [before._replace(commits=before.commits + counted)], "law 10: what changed is counted"
        assert await index.lost(index.mark()) == ""


async def test_of_processes_that_ask_at_once_one_has_it(shared_rig: PostgresRig) -> None:
    async with another(shared_rig) as other:
        for number in range(10):
            asked = [each.lease(f"scrub {number}", str(place), 60.0) for place, each in enumerate((shared_rig.index, other))]
            assert sorted(await asyncio.gather(*asked)) == [False, True]


async def test_who_waited_for_another_that_then_took_it_is_refused(shared_rig: PostgresRig) -> None:
    """The statement began when the lease was over, and it is judged as it is when its row is free."""
    index = shared_rig.running
    assert await index.lease("scrub a", "old", 60.0)
    shared_rig.clock.at += 100
    async with shared_rig.beside() as other, shared_rig.beside() as watch:
        async with other.transaction():
            await other.execute("UPDATE leases SET owner = 'new', until = $1", NOW + 160)
            late = asyncio.ensure_future(index.lease("scrub a", "late", 60.0))
            await blocked(watch)
        assert await late is False
    assert await index.leases() == [JobLease("scrub a", "new", NOW + 160)]


async def test_what_is_held_for_long_is_trouble_in_time(shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await shared_rig.index.lease("scrub a", "me", 60.0)
    monkeypatch.setattr(limits, "INDEX_LOCK_S", 0.1)
    async with another(shared_rig) as index, shared_rig.beside() as other:
        async with other.transaction():
            await other.execute(HOLD)
            async with asyncio.timeout(WAIT_S):
                for call in (index.lease("scrub a", "me", 60.0), index.release("scrub a", "me")):
                    with pytest.raises(IndexTrouble):
                        await call
        assert await index.lease("scrub a", "me", 60.0)


@pytest.mark.parametrize("heard", [False, True])
async def test_a_lease_whose_answer_is_lost_is_taken_or_given_back_once_more(
    shared_rig: PostgresRig, wire: Wire, heard: bool
) -> None:
    """Nobody knows whether it was done; the slot that it may have raised is looked at, and it is no loss (law 10)."""
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open(CLUSTER)
    wire.word = b"the owner"
    for cuts in (1, 3):
        wire.cut = lambda: heard
        assert await index.lease("scrub a", "the owner", 60.0)
        assert [lease.owner for lease in await index.leases()] == ["the owner"] and wire.cuts == cuts
        wire.cut = lambda: heard
        await index.release("scrub a", "the owner")
        assert await index.leases() == [] and wire.cuts == cuts + 1
        assert await index.lost(index.mark()) == "" and len(slots(index)) == 1
    await index.close()


async def test_an_index_that_lost_commits_gives_nothing(shared_rig: PostgresRig) -> None:
    """Its rows were put back while a connection lived: nothing but the slot says so (law 10)."""
    async with another(shared_rig) as index:
        assert await index.lease("scrub a", "me", 60.0)
        stale = await shared_rig.backup()
        assert await index.lease("scrub b", "me", 60.0), "it counts, and so its loss is seen"
        await shared_rig.put_back(stale)
        for _ in range(2):
            with pytest.raises(IndexLost):
                await index.lease("scrub c", "me", 60.0)
            with pytest.raises(IndexLost):
                await index.release("scrub a", "me")
        async with shared_rig.beside() as beside:
            assert [row[0] for row in await beside.fetch("SELECT job FROM leases")] == ["scrub a"]


async def test_an_index_that_was_moved_away_gives_nothing(shared_rig: PostgresRig) -> None:
    """What keeps a process that slept meanwhile from changing it are the slots."""
    async with another(shared_rig) as index:
        assert await index.lease("scrub a", "me", 60.0)
        async with shared_rig.beside() as beside:
            before = await beside.fetch("SELECT * FROM leases")
            await beside.execute(_NO_SLOTS)
            for call in (index.release("scrub a", "me"), index.lease("scrub b", "me", 60.0)):
                with pytest.raises(IndexTrouble):
                    await call
            assert await beside.fetch("SELECT * FROM leases") == before


async def test_a_lease_whose_slot_is_taken_away_meanwhile_is_not_given(shared_rig: PostgresRig) -> None:
    async with another(shared_rig) as index:
        assert await index.lease("scrub a", "me", 60.0)
        async with shared_rig.beside() as other, shared_rig.beside() as watch:
            async with other.transaction():
                await other.execute(_NO_SLOTS)
                late = asyncio.ensure_future(index.lease("scrub b", "me", 60.0))
                await blocked(watch)
            with pytest.raises(IndexTrouble):
                await late
            assert await other.fetchval("SELECT count(*) FROM leases") == 1


async def test_what_goes_on_at_the_server_when_its_connection_broke_undoes_nothing_later(
    shared_rig: PostgresRig, wire: Wire
) -> None:
    """It gives a job back, and waits; its process has asked again and taken the job anew before it is done."""
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open(CLUSTER)
    assert await index.lease("scrub a", "me", 60.0)

    async def again() -> bool:
        await index.release("scrub a", "me")
        return await index.lease("scrub a", "me", 60.0)

    async with shared_rig.beside() as other, shared_rig.beside() as watch:
        async with other.transaction():
            await other.execute(HOLD)
            asked = asyncio.ensure_future(again())
            await blocked(watch)
            wire.break_all()
            await blocked(watch, 2)
            statements = await watch.fetch("SELECT query FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            assert sum("FROM writers" in row[0] and "FOR UPDATE" in row[0] for row in statements) == 1, "it looks at its slot"
        assert await asked
        assert [lease.owner for lease in await index.leases()] == ["me"]
        assert await index.lost(index.mark()) == ""
    await index.close()


async def test_who_was_only_slow_takes_another_slot_and_the_lease(shared_rig: PostgresRig) -> None:
    async with another(shared_rig) as index:
        for statement in ("UPDATE writers SET stopped = 2 WHERE id = $1", "DELETE FROM writers WHERE id = $1"):
            (before,) = slots(index)
            async with shared_rig.beside() as beside:
                assert await beside.execute(statement, before.number) in ("UPDATE 1", "DELETE 1")
            assert await index.lease("scrub a", "me", 60.0)
            (after,) = slots(index)
            assert after.number > before.number and after.commits == 1
            assert not await shared_rig.index.lease("scrub a", "you", 60.0)


async def test_who_is_cancelled_in_a_lease_leaves_it_to_its_end(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has begun goes on, whoever waits for it: the slot is where the process takes it to be."""
    index = shared_rig.running
    cancelled, goes_on = asyncio.Event(), asyncio.Event()

    async def stops() -> None:
        cancelled.set()
        await goes_on.wait()

    between(monkeypatch, Writer, "run_counted", stops)
    asked = asyncio.ensure_future(index.lease("scrub a", "me", 60.0))
    await cancelled.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    goes_on.set()
    async with asyncio.timeout(WAIT_S):
        while not await index.leases():
            await asyncio.sleep(0.01)
    assert await index.lease("scrub a", "me", 60.0) and await index.lost(index.mark()) == ""
