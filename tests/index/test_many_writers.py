"""Several processes write to one index, on several machines (laws 10, 11): what one of them knows is old for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index.contract import Head, Index
from powermail.index.postgres import PostgresIndex
from powermail.storage.contract import Mark, Position
from tests.index.conftest import databases_of
from tests.index.sharing import WAIT_S, another, blocked, standby_has_all
from tests.index.support import (
    CLUSTER,
    NOW,
    SHARED,
    MemoryRig,
    PostgresRig,
    admit,
    begin_again,
    deliver,
    delivery,
    elsewhere,
    inbox,
    incarnation,
    mailbox,
    scan_all,
    uids,
    walk_all,
)
from tests.servers import Database, Postgres, standby_of

JUMP = limits.EPOCH_JUMP


class Pair:
    """Two processes on one index. Both run on clocks of their own."""

    def __init__(self, rig: MemoryRig | PostgresRig) -> None:
        self.rig = rig
        self.one = rig.index
        self.rigs = [rig]

    async def more(self) -> Index:
        """One more process."""
        if isinstance(self.rig, PostgresRig):
            process = PostgresRig(Path(), 90 + len(self.rigs), self.rig.url, self.rig.ids)
        else:
            process = SHARED["memory"](Path(), 90 + len(self.rigs))
            process.store = self.rig.store
        process.clock.at = self.rig.clock.at
        self.rigs.append(process)
        return await process.start()


@pytest_asyncio.fixture(params=sorted(SHARED))
async def pair(request: pytest.FixtureRequest, room: Path) -> AsyncIterator[Pair]:
    """An index with three nodes, where any number of processes may write."""
    rig = SHARED[request.param](room, 1)
    await rig.start()
    await admit(rig.index)
    made = Pair(rig)
    yield made
    assert await rig.index.audit() == []
    for each in made.rigs:
        await each.die()


# -- marks --------------------------------------------------------------------------------------------------------------


async def test_what_another_process_has_done_is_no_loss(pair: Pair) -> None:
    """Law 10: nodes heard of it; who has not looked since reads the index before it claims anything."""
    other = await pair.more()
    await pair.one.proof(pair.one.connection)
    for number in range(1, 20):
        await deliver(other, number)
    remembered = (await other.proof(other.connection)).with_seen(other.mark())
    assert await pair.one.lost(remembered) == ""
    third = await pair.more()
    await deliver(third, 30)
    assert await pair.one.lost(remembered.with_seen(third.mark())) == "", "nor is a process that came later"


async def test_an_epoch_that_another_process_began_is_no_loss(pair: Pair) -> None:
    other = await pair.more()
    before = pair.one.mark()
    await begin_again(other, before)
    assert await pair.one.lost(await other.proof(other.connection)) == ""
    assert await pair.one.lost(before) == "", "of an older epoch, which was settled"
    facts = await pair.one.epoch_facts()
    assert (facts.epoch, facts.numbering, facts.catching_up, facts.why) == (2, True, False, "")
    assert (pair.one.epoch, pair.one.numbering, pair.one.catching_up) == (2, True, False)


async def test_what_a_process_knew_of_the_others_shows_that_the_index_went_back(pair: Pair) -> None:
    """Law 10: its own slot is where it left it, and it has read that somebody else's was higher."""
    other = await pair.more()
    await deliver(pair.one, 1)
    backup = await pair.rig.backup()
    await deliver(other, 2)
    known = await pair.one.proof(pair.one.connection)
    assert known.slots[other.mark().sequence][1] > 0
    await pair.rig.put_back(backup)
    with pytest.raises(IndexTrouble):
        await pair.one.proof(pair.one.connection)
    assert await pair.one.lost(Mark()) != ""
    await begin_again(pair.one, known)
    assert await pair.one.lost(known) == ""


async def test_a_slot_that_is_in_no_mark_any_more_is_in_none_again(pair: Pair) -> None:
    """Law 10: nodes were told that it is gone, and would refuse whatever names it. Whoever had it takes another."""
    before = pair.one.mark().sequence
    other = await pair.more()
    await deliver(other, 1)
    mine = {number for number in other.mark().slots if number > before}
    await other.rest()  # a stop that was given up; or a process that was silent for a day
    while mine.intersection((await pair.one.proof(pair.one.connection)).slots):
        await scan_all(pair.one)
    told = await pair.one.proof(pair.one.connection)
    await deliver(other, 2)
    after = await other.proof(other.connection)
    assert told.refusal(after) == "", "every node takes it"
    assert told.with_seen(after).refusal(await pair.one.proof(pair.one.connection)) == ""
    assert other.mark().sequence > told.sequence and await other.lost(after) == ""


async def test_a_mark_for_a_node_names_no_slot_that_was_pruned_since_the_process_looked(pair: Pair) -> None:
    """Law 10: a node that was told so refuses what names it, and goes on refusing it."""
    gone = await pair.more()
    await pair.one.proof(pair.one.connection)
    await deliver(gone, 1)
    await gone.rest()
    third = await pair.more()
    old = pair.one.mark()
    for _ in range(3):
        await scan_all(third)
    told = await third.proof(third.connection)
    assert told.refusal(old) != ""
    assert told.refusal(await pair.one.proof(pair.one.connection)) == ""


# -- epochs -------------------------------------------------------------------------------------------------------------


async def test_of_two_keepers_that_find_one_loss_one_raises_the_epoch(pair: Pair) -> None:
    """Law 11: a needless epoch costs every mailbox a jump and every node a walk."""
    other = await pair.more()
    found_in = pair.one.epoch
    lost = Mark(9, {9: ("x", 5)}, found_in)
    raised = await asyncio.gather(pair.one.raise_epoch([lost], "found", found_in), other.raise_epoch([lost], "found", found_in))
    assert sorted(raised) == [0, found_in + 1]
    assert await other.raise_epoch([], "a tombstone of a message that is listed", found_in) == 0, "settled by that epoch"
    assert await other.raise_epoch([Mark(epoch=7)], "found", found_in) == 8, "what proves a loss of this epoch, too"
    assert await pair.one.raise_epoch([], "found in it", 8) == 9
    assert await pair.one.raise_epoch([], "as the operator says") == 10


async def test_one_process_goes_on_with_the_epoch_that_another_raised(pair: Pair) -> None:
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    other = await pair.more()
    epoch = await pair.one.raise_epoch([], "a test says so")
    facts = await other.epoch_facts()
    assert (facts.epoch, facts.numbering, facts.catching_up) == (epoch, False, True)
    await other.learn_heads([])
    assert await other.begin_epoch(epoch) and await pair.one.begin_epoch(epoch), "twice is once"
    await deliver(pair.one, 2)
    await walk_all(other)
    assert await uids(pair.one, box) == [1, 2 + JUMP]


async def test_nothing_of_an_epoch_is_done_by_who_comes_when_another_has_begun(pair: Pair) -> None:
    """Law 11: a keeper that was held up changes nothing of what came after."""
    await deliver(pair.one, 1)
    (facts,) = await pair.one.mailboxes(0, 9)
    late = await pair.more()
    epoch = await late.raise_epoch([], "a test says so")
    head = Head("ann", "INBOX", facts.uidvalidity, 7 * JUMP, 9, 1)
    number, rows = await late.raise_round(), await late.node_rows()
    now = await pair.one.raise_epoch([], "again")
    assert not await late.begin_epoch(epoch)
    assert not await late.heads_written([head], epoch)
    for row in rows:
        assert not await late.walked(row.id, row.incarnation, Position(1, 0), Position(1, 0), number, epoch)
    assert not await late.caught_up(epoch)
    seen = await pair.one.epoch_facts()
    assert (seen.epoch, seen.numbering, seen.catching_up) == (now, False, True)
    assert all(row.owes_walk for row in await pair.one.node_rows())
    with pytest.raises(IndexTrouble):
        await pair.one.deliver(delivery(2))
    assert await pair.one.begin_epoch(now)
    await walk_all(pair.one)
    await deliver(pair.one, 2)
    assert (await uids(pair.one, await mailbox(pair.one)))[-1] == 2 + 2 * JUMP, "the late head was not written"


async def test_a_checkpoint_that_was_planned_before_commits_were_lost_does_not_count(pair: Pair) -> None:
    """Law 13: it shows what the index may not have any more; a whole one of what there is stays due."""
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    late = await pair.more()
    plan = await late.checkpoint_plan(box)
    assert plan is not None
    await begin_again(pair.one)
    await late.checkpoint_done(plan, ("a", "b"), NOW)
    assert await pair.one.checkpoint_due(NOW + 1e6, 9) == [box]
    fresh = await late.checkpoint_plan(box)
    assert fresh is not None and (fresh.base, fresh.planned_in) != (plan.base, plan.planned_in)
    await late.checkpoint_done(fresh, ("a", "b"), NOW)
    assert await pair.one.checkpoint_due(NOW + 1e6, 9) == []


async def test_a_keeper_that_slept_does_not_say_that_its_older_checkpoint_is_the_last(pair: Pair) -> None:
    """Law 13: two wrote sides of one mailbox. The next one would be written over the newest that there is."""
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    late = await pair.more()
    old = await late.checkpoint_plan(box)
    assert old is not None and old.whole
    newest = old
    for number in (2, 3):  # to the other side, and back
        await deliver(pair.one, number)
        found = await pair.one.checkpoint_plan(box, whole=True)
        assert found is not None
        await pair.one.checkpoint_done(found, ("a", "b"), NOW)
        newest = found
    assert newest.side != old.side
    await late.checkpoint_done(old, ("b", "c"), NOW)
    await deliver(pair.one, 4)
    following = await pair.one.checkpoint_plan(box)
    assert following is not None
    assert (following.base, following.nodes) == (newest.base, ("a", "b")), "a tail of the newest"
    tail = await late.checkpoint_plan(box)
    assert tail is not None and not tail.whole
    await deliver(pair.one, 5)
    newer = await pair.one.checkpoint_plan(box)
    assert newer is not None
    await pair.one.checkpoint_done(newer, ("a", "b"), NOW)
    await late.checkpoint_done(tail, ("a", "b"), NOW)
    await deliver(pair.one, 6)
    following = await pair.one.checkpoint_plan(box)
    assert following is not None and not following.whole and following.side != newer.side
    following = await pair.one.checkpoint_plan(box, whole=True)
    assert following is not None and following.side != newest.side


@pytest.mark.parametrize("whole", [True, False])
async def test_two_keepers_that_wrote_the_same_side_make_a_whole_one_due_on_the_other(pair: Pair, whole: bool) -> None:
    """Law 13: records of both may lie under one name, and no reader puts pieces of two together."""
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    late = await pair.more()
    if not whole:
        first = await pair.one.checkpoint_plan(box)
        assert first is not None
        await pair.one.checkpoint_done(first, ("a", "b"), NOW)
        await deliver(pair.one, 2)
    plans = [await index.checkpoint_plan(box) for index in (pair.one, late)]
    assert plans[0] is not None and plans[0] == plans[1] and plans[0].whole is whole
    await pair.one.checkpoint_done(plans[0], ("a", "b"), NOW)
    assert await pair.one.checkpoint_due(NOW + 1e6, 9) == []
    await late.checkpoint_done(plans[0], ("a", "c"), NOW + 1)
    assert await pair.one.checkpoint_due(NOW + 1, 9) == [box]
    again = await pair.one.checkpoint_plan(box)
    assert again is not None and again.whole
    assert not whole or again.side != plans[0].side
    await pair.one.checkpoint_done(again, ("a", "b"), NOW + 2)
    assert await pair.one.checkpoint_due(NOW + 1e6, 9) == []


async def test_readers_wait_until_the_epoch_has_begun_and_no_walk_ends_that(pair: Pair) -> None:
    epoch = await pair.one.raise_epoch([], "a test says so")
    with pytest.raises(IndexTrouble):
        await pair.one.caught_up(epoch)


async def test_numbers_that_were_given_meanwhile_do_not_go_back_when_heads_are_written_or_learned_late(pair: Pair) -> None:
    """Law 11: another keeper has begun the epoch, and mail comes in."""
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    (facts,) = await pair.one.mailboxes(0, 9)
    late = await pair.more()
    epoch = await pair.one.raise_epoch([], "a test says so")
    head = Head("ann", "INBOX", facts.uidvalidity, 5, 9, 1)
    far = head._replace(uid_next=facts.uid_next + JUMP, modseq=facts.modseq + JUMP, epoch=epoch)
    assert await pair.one.begin_epoch(epoch)
    await walk_all(pair.one)
    await deliver(pair.one, 2, 3, 4)
    assert await late.heads_written([far], epoch)
    await deliver(pair.one, 5)
    await late.learn_heads([head])
    await deliver(pair.one, 6)
    assert await uids(pair.one, box) == [1, *(number + JUMP for number in range(2, 7))]


async def test_mail_that_comes_in_while_heads_are_learned_gets_no_number_twice(pair: Pair) -> None:
    """Two keepers at once, and a delivery beside them."""
    await deliver(pair.one, 1)
    box = await mailbox(pair.one)
    (facts,) = await pair.one.mailboxes(0, 9)
    late = await pair.more()
    await begin_again(pair.one)
    heads = [Head("ann", "INBOX", facts.uidvalidity, 5 + each, 9 + each, 1) for each in range(3)]
    work: list[Awaitable[object]] = []
    for number in range(10, 30):
        work += [deliver(pair.one, number), late.learn_heads(heads)]
    await asyncio.gather(*work)
    found = await uids(pair.one, box)
    assert len(found) == len(set(found)) == 21 and await pair.one.audit() == []


async def test_a_node_that_another_process_admitted_is_no_witness_of_a_loss_before_that(pair: Pair) -> None:
    """Law 11: its history does not go back far enough, whoever finds the loss, until the index was found to be whole since."""
    keeper = await pair.more()
    first = (await pair.one.epoch_facts()).newcomers
    assert first == {node: incarnation(node) for node in "abc"}
    await pair.one.know_newcomers(first)
    await pair.one.admit_node("c", "west", "c-2", "boot", Position(0, 0), Position(0, 0))
    assert (await keeper.epoch_facts()).newcomers == {"c": "c-2"}
    await keeper.know_newcomers({"c": "c-1"})
    await keeper.raise_epoch([], "a test says so")
    assert {row.id: row.boot for row in await keeper.node_rows()} == {"a": "boot", "b": "boot", "c": ""}
    await pair.one.note_boot("c", "c-2", ["boot"])
    await pair.one.note_boot("a", "a-1", ["boot", "next"])
    assert {row.id: row.boot for row in await pair.one.node_rows()} == {"a": "next", "b": "boot", "c": ""}, (
        "not before the walks"
    )
    assert (await keeper.epoch_facts()).newcomers == {}


@pytest.mark.parametrize("written", [False, True])
async def test_numbers_that_are_given_while_heads_are_learned_or_written_stay_given(
    shared_rig: PostgresRig, written: bool
) -> None:
    """Law 11: the row of a mailbox is locked before it is read."""
    index = shared_rig.running
    await deliver(index, 1)
    (facts,) = await index.mailboxes(0, 9)
    head = Head("ann", "INBOX", facts.uidvalidity, facts.uid_next + 1, facts.modseq + 9, 1)
    async with shared_rig.beside() as other:
        giving = other.transaction()
        await giving.start()
        await other.execute("UPDATE mailboxes SET uid_next = uid_next + 5, messages = messages")
        late = asyncio.ensure_future(index.heads_written([head], 1) if written else index.learn_heads([head]))
        async with shared_rig.beside() as watch:
            await blocked(watch)
        await giving.commit()
        await late
    (after,) = await index.mailboxes(0, 9)
    assert (after.uid_next, after.modseq) == (facts.uid_next + 5, facts.modseq + 9)


# -- PostgreSQL: another history ----------------------------------------------------------------------------------------


async def test_a_proof_over_a_connection_to_another_history_is_none(shared_rig: PostgresRig) -> None:
    """Law 10: a link that was never used before reaches a promoted standby, or a backup that was restored elsewhere."""
    index = shared_rig.running
    await deliver(index, 1)
    box = await mailbox(index)
    connection = index.connection
    async with shared_rig.beside() as beside:
        await beside.execute("UPDATE meta SET value = '77' WHERE name = 'system'")
    for link in index._readers.all:
        link.drop()
    with pytest.raises(IndexLost):
        await index.proof(connection)
    assert index.connection > connection, "what was read before proves nothing"
    for call in (index.proof(index.connection), index.view(box), index.deliver(delivery(2))):
        with pytest.raises(IndexLost):
            await call
    facts = await index.epoch_facts()
    assert "77" in facts.why and index.unsettled
    await index.raise_epoch([], facts.why, facts.epoch)
    assert await index.begin_epoch(index.epoch)
    await walk_all(index)
    assert (await index.proof(index.connection)).epoch == index.epoch


class Restored:
    """A database, its earlier states, and the operator who puts one of them in its place."""

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.database = server.create(databases_of(server).template.name)

    def _alone(self, name: str) -> None:
        self.server.sql("", f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def copy(self) -> Database:
        """Its state now."""
        self._alone(self.database.name)
        return self.server.create(self.database.name)

    def put_back(self, copy: Database) -> None:
        """The same address leads to that state from now on."""
        self._alone(self.database.name)
        gone = f"{self.database.name}_gone"
        self.server.sql("", f"ALTER DATABASE {self.database.name} RENAME TO {gone}")
        self.server.sql("", f"ALTER DATABASE {copy.name} RENAME TO {self.database.name}")
        self.server.drop(gone)


@pytest_asyncio.fixture
async def restored(postgresql_server: Postgres) -> AsyncIterator[Restored]:
    made = await asyncio.to_thread(Restored, postgresql_server)
    yield made
    await asyncio.to_thread(made.database.drop)


async def test_a_backup_that_is_restored_under_running_processes_is_noticed_by_each(
    shared_rig: PostgresRig, restored: Restored
) -> None:
    """Law 10: by who wrote what is missing, by its slot; by who knew of it; by who is new, from what any node remembers."""
    writer = PostgresIndex(shared_rig.world, restored.database.url)
    await writer.open(CLUSTER)
    await admit(writer)
    writer.settled()
    reader = PostgresIndex(shared_rig.world, restored.database.url)
    await reader.open(CLUSTER)
    await deliver(writer, 1)
    copy = await asyncio.to_thread(restored.copy)
    await deliver(writer, 2)
    connection = writer.connection
    remembered = await reader.proof(reader.connection)
    await asyncio.to_thread(restored.put_back, copy)
    with pytest.raises(IndexTrouble):
        await writer.proof(connection)
    with pytest.raises(IndexLost):
        await writer.deliver(delivery(3))
    assert await reader.lost(Mark()) != "", "it has seen what is missing"
    fresh = PostgresIndex(shared_rig.world, restored.database.url)
    await fresh.open(CLUSTER)
    assert await fresh.lost(Mark()) == "" and fresh.unsettled
    why = await fresh.lost(remembered)
    assert why != ""
    raised = await asyncio.gather(
        fresh.raise_epoch([remembered], why, 1), reader.raise_epoch([remembered], why, 1), writer.raise_epoch([], "", 1)
    )
    assert sorted(raised) == [0, 0, 2], "one epoch for all"
    assert await reader.begin_epoch(2)
    await walk_all(fresh)
    for number, index in enumerate((writer, reader, fresh), 10):
        await deliver(index, number)
        assert await index.lost(remembered) == ""
    writer.settled()
    assert await uids(writer, await mailbox(writer)) == [1, 2 + JUMP, 3 + JUMP, 4 + JUMP], "no number is given twice"
    for index in (writer, reader, fresh):
        await index.close()


async def _until(what: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await what():
            await asyncio.sleep(0.02)


async def test_a_standby_that_was_behind_when_it_was_promoted_is_noticed_by_each(
    shared_rig: PostgresRig, postgresql_server: Postgres
) -> None:
    """Law 10: another timeline, and less than processes and nodes have seen: an epoch, walks, and no number twice (P10)."""
    standby = await asyncio.to_thread(standby_of, postgresql_server)
    try:
        there = urlsplit(shared_rig.url)
        url = there._replace(netloc=f"{there.netloc},127.0.0.1:{standby.port}").geturl()
        async with another(shared_rig, url) as writer, another(shared_rig, url) as reader:
            await deliver(writer, 1)
            box = await mailbox(writer)
            await standby_has_all(postgresql_server, standby)
            cut = "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()"
            await asyncio.to_thread(standby.sql, "", *cut)

            async def behind() -> bool:
                return await asyncio.to_thread(standby.sql, "", "SELECT count(*) FROM pg_stat_wal_receiver") == "0\n"

            await _until(behind)
            await deliver(writer, 2, 3)
            remembered = await reader.proof(reader.connection)
            await asyncio.to_thread(postgresql_server.kill)
            await asyncio.to_thread(standby.promote)
            for index in (writer, reader):
                with pytest.raises(IndexTrouble):
                    await index.proof(index.connection)
                with pytest.raises(IndexLost):
                    await index.deliver(delivery(4))
                with pytest.raises(IndexLost):
                    await index.entries(box, 0, 99, 9)
            assert (await writer.epoch_facts()).why != "" and (await reader.epoch_facts()).why != ""
            await begin_again(reader, remembered)
            assert await writer.lost(remembered) == ""
            await deliver(writer, 4)
            with pytest.raises(IndexTrouble):
                await uids(writer, box)
            assert writer.unsettled, "2 and 3 were listed: first logs are entered to their ends (P7)"
            writer.settled()
            assert await uids(writer, box) == [1, 2 + JUMP], "2 and 3 are never given again"
    finally:
        await asyncio.to_thread(standby.remove)
        postgresql_server.heal()


# -- PostgreSQL: one clock for leases -----------------------------------------------------------------------------------


async def test_leases_go_by_the_databases_clock_whatever_time_a_machine_takes_it_to_be(shared_rig: PostgresRig) -> None:
    """Two front ends whose clocks are years apart send no message twice, and no job is done by two."""
    first, second = PostgresIndex(shared_rig.world, shared_rig.url), PostgresIndex(shared_rig.world, shared_rig.url)
    for index in (first, second):
        await index.open(CLUSTER)
    await deliver(first, 1, to=[elsewhere(), inbox()])
    (row,) = await first.lease_due("first", NOW + 10, 300.0, 9)
    assert await first.lease("scrub a", "first", 300.0)
    for years in (-9, 9):
        shared_rig.clock.at = NOW + years * 365 * 86400.0
        assert await second.lease_due("second", NOW + 10, 300.0, 9) == []
        assert not await second.lease("scrub a", "second", 300.0)
    assert await second.renew_leases("second", [row.id], 300.0) == [row.id]
    assert await first.renew_leases("first", [row.id], 0.1) == []
    assert await first.lease("scrub a", "first", 0.1)
    await _until(lambda: second.lease("scrub a", "second", 60.0))

    async def taken() -> bool:
        return bool(await second.lease_due("second", NOW + 10, 300.0, 9))

    await _until(taken)
    await first.finish([row], "first")
    assert await second.queue_count() == 1, "it is the second's by now"
    await second.finish([row], "second")
    for index in (first, second):
        await index.close()


async def test_a_row_that_another_has_tried_meanwhile_is_not_tried_again_before_its_time(shared_rig: PostgresRig) -> None:
    """It was found due, and then it was leased, tried and deferred by somebody else, before its row could be locked."""
    index = shared_rig.running
    await deliver(index, 1, to=[elsewhere()])
    async with shared_rig.beside() as other:
        deferred = other.transaction()
        await deferred.start()
        await other.execute("UPDATE queue SET due_at = $1", NOW + 900)
        late = asyncio.ensure_future(index.lease_due("late", NOW + 10, 60.0, 9))
        async with shared_rig.beside() as watch:
            await blocked(watch)
        await deferred.commit()
        assert await late == []
    assert len(await index.lease_due("late", NOW + 900, 60.0, 9)) == 1
