"""The database is on another history by now: what nodes, and other processes, make of it (laws 10, 11)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from powermail.base.errors import IndexLost, IndexTrouble, NodeTrouble
from powermail.cluster.cluster import Cluster
from powermail.index.contract import FlagChange, Head
from powermail.index.postgres import PostgresIndex
from powermail.index.postgres import connection as connections
from powermail.index.postgres.addresses import connect
from powermail.keeper.epochs import EpochKeeper, Marker
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import START, Mark, StorageNode
from powermail.storage.layout import Layout, LayoutChange
from tests.index.sharing import another, between, blocked
from tests.index.support import NODES, PostgresRig, begin_again, deliver, delivery, mailbox, uids, walk_all


def promoted(monkeypatch: pytest.MonkeyPatch, *indexes: PostgresIndex, timeline: str = "2") -> None:
    """From now on every new connection is to a standby that was promoted; those that there are stay, but for one that reads and
    one that writes of each of these indexes.
    """

    async def connect_there(url: str, patience_s: float | None = None) -> Any:
        made, history = await connect(url, patience_s)
        return made, history._replace(timeline=timeline)

    monkeypatch.setattr(connections, "connect", connect_there)
    for index in indexes:
        for links in (index._readers, index._writers):
            links._free[0].drop()


async def no_heads(node: StorageNode) -> AsyncIterator[list[Head]]:
    pages: list[list[Head]] = []
    for page in pages:
        yield page


async def brought_back(epochs: EpochKeeper, what: str = "the logs of") -> None:
    """A step, which says what lacks before readers are let in."""
    with pytest.raises(NodeTrouble, match=what):
        await epochs.step()


class Keeping:
    """A process that keeps: nodes in memory, which are members of the index, and what brings it back."""

    def __init__(self, rig: PostgresRig, index: PostgresIndex) -> None:
        self.index = index
        self.nodes = {name: MemoryNode(name, group, 1, rig.clock.monotonic) for name, group in NODES.items()}
        self.cluster = Cluster(rig.world, list(self.nodes.values()), 2, "random")
        self.epochs = EpochKeeper(rig.world, self.cluster, index, no_heads)

    async def start(self, *nodes: str) -> None:
        """Opens these nodes, which are of the index's history."""
        for name in nodes or tuple(NODES):
            node = self.nodes[name]
            await node.open()
            node._disk.incarnation = f"{name}-1"  # as messages of these tests have it
            facts = await node.facts()
            await self.index.admit_node(node.id, node.group, facts.incarnation, facts.boots[-1], START, START)
        await self.index.know_newcomers({name: node.incarnation for name, node in self.nodes.items()})
        await self.cluster.start(self._nothing)

    async def _nothing(self, node: StorageNode) -> None:
        """It was admitted."""

    async def remember(self, mark: Mark, *nodes: str) -> None:
        """These nodes have seen this."""
        for name in nodes:
            await self.nodes[name].put_mark(mark)

    async def owing(self) -> list[str]:
        """Nodes that owe a walk."""
        return [row.id for row in await self.index.node_rows() if row.owes_walk]


@pytest_asyncio.fixture
async def keeping(shared_rig: PostgresRig) -> AsyncIterator[Keeping]:
    made = Keeping(shared_rig, shared_rig.running)
    await made.start()
    yield made
    await made.cluster.close()


# -- only the timeline is another (fault of a fail-over) ---------------------------------------------------------------


async def test_nodes_are_asked_before_an_epoch_is_raised_because_of_a_new_timeline(
    shared_rig: PostgresRig, keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 10: one of them remembers more than the promoted standby has. Each owes a walk."""
    index = keeping.index
    async with another(shared_rig) as gone:
        stale = await shared_rig.backup()
        await deliver(gone, 1)
        await keeping.remember(await gone.proof(gone.connection), "b")
    await shared_rig.put_back(stale)
    promoted(monkeypatch, index)
    await brought_back(keeping.epochs, "walks of")
    assert index.epoch == 2 and await keeping.owing() == ["a", "b", "c"]
    assert (await index.epoch_facts()).catching_up


async def test_a_new_timeline_costs_no_walk_when_nodes_remember_no_more(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 10: the epoch rises, numbers leap, and readers wait for logs only."""
    index = keeping.index
    await deliver(index, 1)
    for node in "abc":
        await keeping.remember(await index.proof(index.connection), node)
    promoted(monkeypatch, index)
    await brought_back(keeping.epochs)
    facts = await index.epoch_facts()
    assert (facts.epoch, facts.numbering, facts.catching_up) == (2, True, False)
    assert await keeping.owing() == [] and index.unsettled


@pytest.mark.parametrize("away", ["bc", "c"])
async def test_the_epoch_of_a_new_timeline_waits_for_nodes_of_enough_groups(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    """Law 11: who is not asked may remember more. G-R+1 groups are two of three here."""
    index = keeping.index
    for node in away:
        keeping.nodes[node].miss()
    promoted(monkeypatch, index)
    if len(away) == 1:
        await brought_back(keeping.epochs)
        assert index.epoch == 2 and await keeping.owing() == []
        return
    await brought_back(keeping.epochs, "marks of")
    assert index.epoch == 1
    with pytest.raises(IndexTrouble):
        await index.deliver(delivery(1))
    await keeping.nodes["b"].open()
    await brought_back(keeping.epochs)
    assert index.epoch == 2 and await keeping.owing() == []


async def test_a_newcomer_is_no_witness_that_a_promoted_standby_has_lost_nothing(
    shared_rig: PostgresRig, keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: its history may begin behind the loss."""
    index = keeping.index
    keeping.nodes["c"].miss()
    async with shared_rig.beside() as beside:
        await beside.execute("INSERT INTO newcomers SELECT id, incarnation FROM nodes WHERE id < 'c'")
    promoted(monkeypatch, index)
    await brought_back(keeping.epochs, "marks of")
    assert index.epoch == 1


async def test_one_node_that_is_looked_at_raises_no_epoch_because_of_a_new_timeline(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark proves nothing, and the others are asked first."""
    index = keeping.index
    promoted(monkeypatch, index)
    node = keeping.nodes["a"]
    assert await keeping.epochs.compare(node, await node.facts()), "nothing more is done with it now"
    assert index.epoch == 1
    await keeping.remember(Mark(99, {99: ("x", 1)}, 1), "b")
    await brought_back(keeping.epochs, "walks of")
    assert index.epoch == 2 and await keeping.owing() == ["a", "b", "c"]


async def test_who_raises_an_epoch_and_has_not_asked_owes_walks(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shared_rig.running
    promoted(monkeypatch, index)
    assert (await index.epoch_facts()).doubted
    await index.raise_epoch([], "a test says so")
    assert index.catching_up and all(row.owes_walk for row in await index.node_rows())
    assert not (await index.epoch_facts()).doubted


async def test_a_process_that_keeps_nothing_raises_the_epoch_too(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front end alone, whose keepers have connections that live: it asks nodes and raises it by itself."""
    index = keeping.index
    promoted(monkeypatch, index)
    with pytest.raises(IndexLost):
        await index.proof(index.connection)
    with pytest.raises(NodeTrouble, match="the logs of"):
        await keeping.epochs.step_here()
        assert index.epoch == 2 and not index.numbering, "a keeper begins it"
        await keeping.epochs.step()
    assert index.epoch == 2 and index.unsettled


async def test_who_looked_before_an_epoch_had_begun_hears_by_itself_when_all_waits_are_over(
    keeping: Keeping, shared_rig: PostgresRig
) -> None:
    """A keeper whose jobs are another's: nothing else of what it does asks how the index stands."""
    index = keeping.index
    async with another(shared_rig) as idle:
        idle.settled()
        epochs = EpochKeeper(shared_rig.world, keeping.cluster, idle, no_heads)
        assert await index.raise_epoch([], "a test says so") == 2
        await idle.epoch_facts()
        assert (idle.epoch, idle.numbering, idle.catching_up, idle.unsettled) == (2, False, True, False)
        assert await index.begin_epoch(2)
        await epochs.step_here()
        assert (idle.numbering, idle.catching_up) == (True, True)
        await walk_all(index)
        await epochs.step_here()
        assert (idle.numbering, idle.catching_up) == (True, False)


# -- the other processes -----------------------------------------------------------------------------------------------


async def test_a_process_that_comes_when_the_epoch_has_begun_lists_nothing_at_once(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: it has shown what the promoted standby may lack, and finds an index that is content with its history."""
    keeper = shared_rig.running
    async with another(shared_rig) as front:
        front.settled()
        await deliver(front, 1)
        box = await mailbox(front)
        before = front.connection
        promoted(monkeypatch, keeper, front)
        facts = await keeper.epoch_facts()
        assert facts.doubted
        assert await keeper.raise_epoch([], facts.why, facts.epoch, True) == 2
        assert await keeper.begin_epoch(2) and not keeper.catching_up
        with pytest.raises(IndexTrouble):
            await front.entries(box, 0, 99, 9)
        assert front.unsettled and front.connection > before
        with pytest.raises(IndexTrouble):
            await front.proof(before)
        await deliver(front, 2)
        front.settled()
        assert len(await uids(front, box)) == 2


async def test_no_connection_to_the_history_before_is_read_when_one_was_to_the_next(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The primary that was cut off still answers over what was connected then."""
    index = shared_rig.running
    await deliver(index, 1)
    box = await mailbox(index)
    for _ in range(3):
        await asyncio.gather(*(index.entries(box, 0, 99, 9) for _ in range(4)))
    old = [link for link in (*index._readers.all, *index._writers.all) if link.connection is not None]
    assert len(old) > 2
    promoted(monkeypatch, index)
    await begin_again(index)
    index.settled()
    await asyncio.gather(*(index.entries(box, 0, 99, 9) for _ in range(8)), deliver(index, 2), deliver(index, 3))
    assert {link.history.timeline for link in index._readers.all + index._writers.all if link.connection is not None} == {"2"}


async def test_a_primary_that_was_left_behind_is_asked_for_nothing(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back, takes writes as before, and nobody has told it that another was promoted."""
    index = shared_rig.running
    await deliver(index, 1)
    promoted(monkeypatch, index)
    await begin_again(index)
    promoted(monkeypatch, index, timeline="1")
    for links in (index._readers, index._writers):
        for link in links.all:
            link.drop()
    with pytest.raises(IndexTrouble) as refused:
        await index.deliver(delivery(2))
    assert "timeline" in str(refused.value) and not isinstance(refused.value, IndexLost) and index.epoch == 2
    promoted(monkeypatch, index)
    await deliver(index, 2)


async def test_what_was_read_in_another_epoch_is_proven_by_no_mark_of_this_one(shared_rig: PostgresRig) -> None:
    """Law 10: the same connection, and the same server; another process found that commits were lost."""
    index = shared_rig.running
    await deliver(index, 1)
    connection = index.connection
    async with another(shared_rig) as other:
        await begin_again(other)
    with pytest.raises(IndexTrouble):
        await index.proof(connection)
    assert (await index.proof(index.connection)).epoch == 2


async def test_the_last_mark_of_a_process_that_has_not_heard_of_the_epoch_is_of_it(
    shared_rig: PostgresRig, keeping: Keeping
) -> None:
    """Law 10: at a stop every node gets one, whatever others did since this process looked."""
    marker = Marker(shared_rig.world, keeping.cluster, keeping.index)
    async with another(shared_rig) as other:
        epoch = await begin_again(other)
    assert keeping.index.epoch < epoch
    await marker.put_all()
    for node in keeping.nodes.values():
        assert (await node.facts()).mark.epoch == epoch


# -- raising -----------------------------------------------------------------------------------------------------------


async def test_no_slot_is_given_twice_when_one_is_taken_while_the_epoch_rises(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 10: what was counted is locked before it is read."""
    index = shared_rig.running
    fresh = PostgresIndex(shared_rig.world, shared_rig.url, shared_rig.ids)
    opening: list[asyncio.Future[Any]] = []

    async def beside() -> None:
        opening.append(asyncio.ensure_future(fresh.open()))
        async with shared_rig.beside() as watch:
            waiting = asyncio.ensure_future(blocked(watch))
            await asyncio.wait([waiting, *opening], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    acted = between(monkeypatch, index, "_in_set", beside)
    await index.raise_epoch([], "a test says so")
    await opening[0]
    assert acted and await index.begin_epoch(index.epoch)
    await asyncio.gather(fresh.abort(b"1" * 16, []), index.abort(b"2" * 16, []), fresh.abort(b"3" * 16, []))
    mine = {link.slot.number for link in index._writers.all if link.slot is not None}
    others = {link.slot.number for link in fresh._writers.all if link.slot is not None}
    assert mine and others and not mine & others
    async with shared_rig.beside() as watch:
        assert await watch.fetchval("SELECT value FROM counters WHERE name = 'sequence'") >= max(mine | others)
    await walk_all(index)
    await fresh.close()


async def test_no_uidvalidity_is_given_twice_when_one_is_taken_while_the_epoch_rises(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P10: the counter leaps from where it is, not from where it was."""
    index = shared_rig.running
    async with another(shared_rig) as other:
        making: list[asyncio.Future[Any]] = []

        async def beside() -> None:
            making.append(asyncio.ensure_future(other.make_mailbox("ann", "INBOX")))
            async with shared_rig.beside() as watch:
                waiting = asyncio.ensure_future(blocked(watch))
                await asyncio.wait([waiting, *making], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()

        between(monkeypatch, index, "_in_set", beside)
        await index.raise_epoch([], "a test says so")
        ended = await asyncio.gather(*making, return_exceptions=True)
        with_number = [facts for facts in ended if not isinstance(facts, BaseException)]
        assert await index.begin_epoch(index.epoch)
        await walk_all(index)
        async with shared_rig.beside() as watch:
            counter = await watch.fetchval("SELECT value FROM counters WHERE name = 'uidvalidity'")
        assert all(facts.uidvalidity <= counter for facts in with_number)


async def test_a_layout_that_is_changed_while_the_epoch_rises_has_no_number_that_another_was_read_with(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laws 9, 11: whoever read the other would go by it for ever."""
    index = shared_rig.running
    await index.change_layout([LayoutChange("a", "north")])
    async with another(shared_rig) as other:

        async def raise_and_read() -> Layout:
            await other.raise_epoch([], "a test says so")
            return await other.layout()

        reading: list[asyncio.Future[Layout]] = []

        async def beside() -> None:
            reading.append(asyncio.ensure_future(raise_and_read()))
            async with shared_rig.beside() as watch:
                waiting: asyncio.Future[Any] = asyncio.ensure_future(blocked(watch))
                await asyncio.wait([waiting, *reading], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()

        between(monkeypatch, index, "_in_write_layout", beside)
        await index.change_layout([LayoutChange("a", priority=7)])
        read, now = await reading[0], await index.layout()
        assert read.version != now.version or read.rows == now.rows
        assert await other.begin_epoch(other.epoch)
        await walk_all(other)


# -- what a process finds by itself ------------------------------------------------------------------------------------


async def test_who_finds_commits_lost_lets_nobody_read_until_logs_were_entered_whoever_raises_the_epoch(
    shared_rig: PostgresRig,
) -> None:
    """Law 10: a front end that nobody told would stay deaf, or list what is short."""
    async with another(shared_rig) as front:
        front.settled()
        stale = await shared_rig.backup()
        await deliver(front, 1)
        await shared_rig.put_back(stale)
        with pytest.raises(IndexTrouble):
            await front.proof(front.connection)
        assert front.unsettled
        await begin_again(shared_rig.index, front.mark())
        assert (await front.epoch_facts()).why == ""
        with pytest.raises(IndexTrouble):
            await front.find_mailbox("ann", "INBOX")
        front.settled()
        assert await front.find_mailbox("ann", "INBOX") is None


async def test_a_view_that_was_read_in_another_history_is_not_written(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: the stored view would show what is not there any more. The audit compares them."""
    index = shared_rig.running
    await deliver(index, 1)
    box = await mailbox(index)
    stale = await shared_rig.backup()
    await deliver(index, 2)
    await index.store(box, [1, 2], FlagChange.ADD, 1, None)
    async with another(shared_rig) as other:

        async def lose() -> None:
            await shared_rig.put_back(stale)
            await begin_again(other, index.mark())

        between(monkeypatch, index, "_write", lose)
        assert not await index.merge(box)
    assert await index.audit() == []


async def test_a_walk_that_ended_in_the_history_before_ends_no_walk_of_this_one(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: what it entered may be lost, and the watermark would pass it over. The epoch is the same one so far."""
    index = shared_rig.running
    epoch = await index.raise_epoch([], "a test says so")
    assert await index.begin_epoch(epoch)
    rows = await index.node_rows()
    promoted(monkeypatch, index)
    for row in rows:
        with pytest.raises(IndexLost):
            await index.walked(row.id, row.incarnation, row.watermark, row.end_seen, 1, epoch)
    with pytest.raises(IndexLost):
        await index.caught_up(epoch)
    assert all(row.owes_walk for row in await index.node_rows()) and (await index.epoch_facts()).catching_up


async def test_readers_of_a_history_that_came_while_the_last_walks_ended_wait_for_logs(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: walks of the one before say nothing of it."""
    index = shared_rig.running
    epoch = await index.raise_epoch([], "a test says so")
    assert await index.begin_epoch(epoch)
    number = await index.raise_round()
    for row in await index.node_rows():
        assert await index.walked(row.id, row.incarnation, row.watermark, row.end_seen, number, epoch)
    looked_over = index.connection

    async def meanwhile() -> None:
        promoted(monkeypatch, index)
        index._readers._free[0].drop()
        with pytest.raises(IndexLost):
            await index.proof(index.connection)

    between(monkeypatch, index, "_in_caught_up", meanwhile)
    with pytest.raises(IndexTrouble):
        await index.caught_up(epoch, looked_over)
    assert index.unsettled and (await index.epoch_facts()).why != ""


async def test_a_checkpoint_of_the_history_before_is_not_the_last_one(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 13: it may show what is lost, and nobody has raised the epoch yet."""
    index = shared_rig.running
    await deliver(index, 1)
    box = await mailbox(index)
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    promoted(monkeypatch, index)
    with pytest.raises(IndexLost):
        await index.checkpoint_done(plan, ("a", "b"), 0.0)
    await begin_again(index)
    assert await index.checkpoint_due(9e12, 9) == [box]
