"""P14: the database is away. Calls fail in bounded time, no stop hangs, what became of a call is found by its key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index.contract import FlagChange, Outcome
from powermail.index.postgres import PostgresIndex
from tests.index.sharing import WAIT_S, Wire, another, between, standby_has_all
from tests.index.support import CLUSTER, PostgresRig, begin_again, deliver, delivery, elsewhere, inbox, key, mailbox, uids
from tests.servers import Postgres, standby_of

QUICK = ("INDEX_COMMAND_S", "INDEX_CONNECT_S", "INDEX_TURN_S")


def hurry(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names or QUICK:
        monkeypatch.setattr(limits, name, 0.3)


def take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in QUICK:
        monkeypatch.setattr(limits, name, WAIT_S)


async def all_trouble(calls: list[Awaitable[Any]]) -> None:
    async with asyncio.timeout(WAIT_S):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, IndexTrouble) for answer in answers), answers


async def test_a_database_that_falls_silent_is_trouble_in_time_and_links_are_made_again(
    shared_rig: PostgresRig, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More callers than connections; no connection breaks by itself."""
    hurry(monkeypatch)
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open(CLUSTER)
    index.settled()
    await deliver(index, 1)
    box = await mailbox(index)
    wire.fall_silent()
    for start in (10, 100):
        calls: list[Awaitable[Any]] = [index.deliver(delivery(start + number)) for number in range(40)]
        calls += [index.entries(box, 0, 99, 9) for _ in range(20)]
        calls += [index.abort(key(900 + number), []) for number in range(5)]
        await all_trouble(calls)
    take_time(monkeypatch)
    wire.speak()
    for number in (10, 100):
        assert await index.deliver(delivery(number)) in (Outcome.ENTERED, Outcome.KNOWN)
        assert await index.deliver(delivery(number)) is Outcome.KNOWN
    found = await uids(index, box)
    assert len(found) == len(set(found)) == (await index.totals())["messages"]
    await index.close()


async def test_nothing_hangs_at_a_stop_while_the_database_is_silent(
    shared_rig: PostgresRig, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is given up: the nodes' records have it (law 6)."""
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open(CLUSTER)
    await deliver(index, 1)
    wire.fall_silent()
    monkeypatch.setattr(limits, "INDEX_CLOSE_S", 0.2)  # its sessions wait as long as ever
    waiting = [index.deliver(delivery(number)) for number in range(2, 400)]
    storing = asyncio.ensure_future(index.make_mailbox("ann", "Archive"))
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await index.close()
    await all_trouble([*waiting, storing])
    with pytest.raises(IndexTrouble):
        await index.usage("ann")


async def test_a_stop_says_so_for_each_connection_that_wrote_whatever_breaks(shared_rig: PostgresRig, wire: Wire) -> None:
    """Law 10: a connection that is cut while its slot is told to stop is made again, and the call does not fail."""
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open(CLUSTER)
    for heard in (False, True):
        await asyncio.gather(index.abort(key(1), []), index.abort(key(2), []))
        mine = [link.slot.number for link in index._writers.all if link.slot is not None]
        assert mine
        wire.cut = lambda heard=heard: heard
        await index.rest()
        async with shared_rig.beside() as beside:
            rows = await beside.fetch("SELECT stopped FROM writers WHERE id = ANY($1)", mine)
        assert all(row[0] >= 1 for row in rows)
    assert wire.cuts == 2
    await index.close()


async def test_a_stop_that_gets_no_connection_leaves_those_that_there_are(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shared_rig.running
    links = [await index._writers.take() for _ in index._writers.all]
    index._writers.give(links.pop())
    with monkeypatch.context() as patched:
        patched.setattr(limits, "INDEX_TURN_S", 0.05)
        with pytest.raises(IndexTrouble):
            await index.rest()
    index._writers.give(links.pop())
    assert sorted(map(id, index._writers._free)) == sorted(map(id, index._writers.all)), "each is free, and once"
    await index.rest()
    await deliver(index, 1)


async def test_a_standby_is_asked_for_nothing_until_it_is_the_primary(
    shared_rig: PostgresRig, wire: Wire, postgresql_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several hosts. The primary falls silent: trouble, in time, though a standby answers. Promoted, it is another timeline:
    numbers leap before anything is given out or shown (law 10).
    """
    standby = await asyncio.to_thread(standby_of, postgresql_server)
    try:
        there = urlsplit(wire.url(shared_rig.url))
        url = there._replace(netloc=f"{there.netloc},127.0.0.1:{standby.port}").geturl()
        async with another(shared_rig, url) as index:
            await deliver(index, 1, to=[inbox(), elsewhere()])
            box = await mailbox(index)
            await standby_has_all(postgresql_server, standby)
            hurry(monkeypatch)
            for link in (*index._writers.all, *index._readers.all):
                link.drop()
            wire.fall_silent()
            await all_trouble([index.deliver(delivery(2)), index.find_mailbox("ann", "INBOX"), index.abort(key(3), [])])
            take_time(monkeypatch)
            await asyncio.to_thread(postgresql_server.kill)
            await asyncio.to_thread(standby.promote)
            with pytest.raises(IndexLost):
                await index.deliver(delivery(2))
            with pytest.raises(IndexLost):
                await index.find_mailbox("ann", "INBOX")
            await begin_again(index)
            assert await index.deliver(delivery(2)) is Outcome.ENTERED
            assert await uids(index, box) == [1, 2 + limits.EPOCH_JUMP]
    finally:
        await asyncio.to_thread(standby.remove)
        postgresql_server.heal()
        wire.speak()


async def test_who_is_cancelled_in_begin_leaves_no_connection_in_a_snapshot(shared_rig: PostgresRig, wire: Wire) -> None:
    """The server has heard BEGIN and the driver does not know: the next reader would look at an old state for ever (law 10)."""
    index = PostgresIndex(shared_rig.world, wire.url(shared_rig.url), shared_rig.ids)
    await index.open()
    await index.epoch_facts()  # a connection that reads is there, and at rest
    assert any(link.connection is not None for link in index._readers.all)
    wire.fall_silent()
    reading = asyncio.create_task(index.proof(index.connection))
    while len(index._readers._free) == len(index._readers.all):
        await asyncio.sleep(0)  # it has a connection, and says BEGIN in the same turn
    reading.cancel()
    wire.speak()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert all(link.connection is None for link in index._readers.all)
    await index.close()


async def test_what_the_server_rolled_back_at_commit_did_not_happen(shared_rig: PostgresRig) -> None:
    """A statement of it failed, and who ran it went on: the server says so in its answer to COMMIT, and not as an error."""
    index = shared_rig.running
    tries: list[int] = []

    async def goes_on(db: Any) -> str:
        tries.append(len(tries))
        if len(tries) == 1:
            with suppress(asyncpg.PostgresError):
                await db.change("UPDATE counters SET value = 1 / 0")

            async def raised() -> bool:
                return True

            db.raise_count = raised
        return "done"

    before = index.mark()
    assert await index._write(goes_on) == "done" and tries == [0, 1]
    assert await index.lost(before) == "" and await index.lost(index.mark()) == ""


async def test_of_two_clusters_that_begin_in_one_database_one_has_it(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found it empty."""
    async with shared_rig.beside() as beside:
        await beside.execute("DELETE FROM meta")
        late = PostgresIndex(shared_rig.world, shared_rig.url, shared_rig.ids)

        async def first() -> None:
            await beside.execute("INSERT INTO meta VALUES ('cluster', $1)", CLUSTER)

        acted = between(monkeypatch, late, "_begin", first)
        await late.open("11" * 16)
        assert acted and late.cluster == CLUSTER
        await late.close()


async def test_a_mailbox_is_read_though_nobody_may_fold_its_tail(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: the connections that write are all busy, or wait for what somebody holds."""
    index = shared_rig.running
    await deliver(index, 1)
    box = await mailbox(index)
    monkeypatch.setattr(limits, "VIEW_TAIL_ROWS", 3)
    for flag in range(5):
        await index.store(box, [1], FlagChange.REPLACE, 1 << (flag % 2), None)
    links = [await index._writers.take() for _ in index._writers.all]
    monkeypatch.setattr(limits, "INDEX_TURN_S", 0.05)
    assert len(await index.view(box)) == 1
    for link in links:
        index._writers.give(link)
