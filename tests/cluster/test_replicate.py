"""R receipts of R groups, frozen stamps, spares within the window, and what is known when that fails (laws 2, 5)."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import NeverAsked, NodeReadOnly, NotRedundant
from powermail.cluster.replicate import NotStored
from powermail.storage.contract import Held, Mark, NodeState, Origin, Stamp
from tests.cluster.support import Recorder, make_cluster, make_world, record, replication, store, three, unreachable, virtual

KEY = b"k" * 16
LONG = b"0123456789abcdef" * (3 * limits.CHUNK_OCTETS // 16) + b"tail"


@virtual
async def test_r_receipts_of_r_groups() -> None:
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    commit, receipts = await store(cluster, KEY, b"short")
    assert sorted(receipt.node for receipt in receipts) == ["a", "b"]
    assert receipts[0].incarnation == cluster.node(receipts[0].node).incarnation
    assert commit.octets == 5
    assert await a.has([KEY]) == await b.has([KEY]) == [Held.LIVE]
    assert await c.has([KEY]) == [Held.ABSENT]
    assert [origin for _, _, origin in a.asked] == [Origin.DELIVERY]


@virtual
async def test_two_receipts_of_one_group_are_not_two() -> None:
    a, b, c = Recorder("a", "g1"), Recorder("b", "g2"), Recorder("a2", "g1", 2)
    cluster = await make_cluster(make_world(), a, b, c)
    b.fail_next("commit", error=unreachable())
    with pytest.raises(NotStored):
        await store(cluster, KEY, b"short")
    assert not c.asked, "its group has a receipt already"


@virtual
async def test_a_spare_of_the_failed_group_is_kept_for_it() -> None:
    a, b, c = Recorder("a", "g1"), Recorder("b", "g2"), Recorder("a2", "g1", 2)
    cluster = await make_cluster(make_world(), a, b, c)
    a.fail_next("commit", error=unreachable())
    _, receipts = await store(cluster, KEY, b"short")
    assert sorted(receipt.node for receipt in receipts) == ["a2", "b"]


@virtual
async def test_a_spare_is_asked_once_and_those_passed_by_are_kept() -> None:
    a, b = Recorder("a", "g1"), Recorder("b", "g2")
    a2, c, b2 = Recorder("a2", "g1", 2), Recorder("c", "g3", 3), Recorder("b2", "g2", 4)
    cluster = await make_cluster(make_world(), a, b, a2, c, b2)
    for node in (b, c):
        node.fail_next("commit", error=unreachable())
    _, receipts = await store(cluster, KEY, b"short")
    assert sorted(receipt.node for receipt in receipts) == ["a", "b2"]
    assert [len(node.asked) for node in (a, b, a2, c, b2)] == [1, 1, 0, 1, 1]


@virtual
async def test_stamps_are_frozen_when_the_first_node_is_asked_not_while_it_streams() -> None:
    """Law 2: a stream of an hour commits with stamps of now; all of one moment, also that of a spare fed later."""
    a, b, c = three()
    world = make_world()
    cluster = await make_cluster(world, a, b, c)
    message = replication(cluster)
    await message.write(LONG)
    await asyncio.sleep(3600)
    b.fail_next("commit", error=unreachable())
    c.append_s = 1.0
    asked_at = world.clock.monotonic()
    _, receipts = await message.commit(record)
    assert sorted(receipt.node for receipt in receipts) == ["a", "c"]
    assert c.asked[0][0] >= asked_at + 3.0
    for node in (a, b, c):
        boot = (await node.facts()).boots[-1]
        assert [stamp for _, stamp, _ in node.asked] == [Stamp(boot, asked_at)]


@virtual
async def test_a_slow_spare_is_fed_only_within_the_window() -> None:
    """Law 2: a node that is fed for 42 s was asked when the message had long been decided about."""
    a, b, c = three()
    world = make_world()
    cluster = await make_cluster(world, a, b, c)
    message = replication(cluster)
    await message.write(LONG * 4)
    b.fail_next("commit", error=unreachable())
    c.append_s = 3.5  # each is in time, all together are not
    began = world.clock.monotonic()
    with pytest.raises(NotStored) as raised:
        await message.commit(record)
    assert world.clock.monotonic() - began <= limits.COMMIT_WINDOW_S - limits.SPARE_MARGIN_S
    assert c.appends[-1] <= began + limits.COMMIT_WINDOW_S - limits.SPARE_MARGIN_S
    assert not c.asked
    assert raised.value.undecided == ("a", "b")
    await message.cancel()
    assert c.calls[-1] == "cancel"


@virtual
async def test_a_node_without_a_stamp_is_not_asked() -> None:
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    message = replication(cluster)
    await message.write(LONG)
    b.miss()
    _, receipts = await message.commit(record)
    assert sorted(receipt.node for receipt in receipts) == ["a", "c"]
    assert not b.asked
    assert [node.id for node in message.abandoned] == ["b"]


@virtual
async def test_a_silent_node_is_replaced_in_time_and_may_hold_it() -> None:
    a, b, c = three()
    world = make_world()
    cluster = await make_cluster(world, a, b, c)
    b.hold()
    c.fail_next("commit", error=unreachable())
    began = world.clock.monotonic()
    with pytest.raises(NotStored) as raised:
        await store(cluster, KEY, b"short")
    assert raised.value.undecided == ("a", "b", "c")
    assert world.clock.monotonic() - began < 5.1
    assert cluster.is_slow("b")
    b.release()
    await asyncio.sleep(0.1)
    assert await b.has([KEY]) == [Held.LIVE], "it was asked, so what it did is durable"


@virtual
async def test_two_silent_nodes_take_no_longer_than_one() -> None:
    """P20, and the window is needed for feeding spares."""
    a, b, c = three()
    d = Recorder("d", "g4", 2)
    world = make_world()
    cluster = await make_cluster(world, a, b, c, d)
    message = replication(cluster)
    await message.write(LONG)
    a.hold()
    b.hold()
    d.append_s = c.append_s = 0.5
    a.deadline_s = b.deadline_s = 60.0
    began = world.clock.monotonic()
    _, receipts = await message.commit(record)
    assert sorted(receipt.node for receipt in receipts) == ["c", "d"]
    assert world.clock.monotonic() - began < 5.1 + 2 * 3 * 0.5
    a.release()
    b.release()
    assert await a.has([KEY]) == await b.has([KEY]) == [Held.LIVE], "what was asked late is done late: reconcile finds it"


@virtual
async def test_a_definite_refusal_is_told_from_an_unknown_outcome() -> None:
    """Law 5: only the node's own definite word counts, and its absence in time does not."""
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    message = replication(cluster)
    await message.write(b"short")
    a.fill()  # CommitRefused: the key is not here
    b.fail_next("commit", done=True, error=NodeReadOnly("refused, but it may be here"))
    c.fail_next("commit", error=ZeroDivisionError("a bug"))
    with pytest.raises(NotStored) as raised:
        await message.commit(record)
    assert raised.value.refused == ("a",)
    assert raised.value.undecided == ("b", "c")
    assert await b.has([KEY]) == [Held.LIVE]


@virtual
async def test_a_tombstone_or_a_commit_raised_at_once_is_heard_too() -> None:
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)

    def broken(*_: object) -> None:
        raise unreachable()

    a.commit = broken  # type: ignore[assignment, method-assign]
    _, receipts = await store(cluster, KEY, b"short")
    assert sorted(receipt.node for receipt in receipts) == ["b", "c"]


@virtual
async def test_a_stream_goes_on_with_another_node_and_earlier_chunks_are_read_back() -> None:
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    message = replication(cluster)
    for start in range(0, len(LONG), 100_000):
        if start == 600_000:
            b.fail_next("append", error=unreachable())
        await message.write(LONG[start : start + 100_000])
    _, receipts = await message.commit(record)
    assert sorted(receipt.node for receipt in receipts) == ["a", "c"]
    parts = [(await c.read_chunk(KEY, number)).stored for number in range(4)]
    assert b"".join(parts) == LONG
    assert [node.id for node in message.abandoned] == ["b"]


@virtual
async def test_a_stream_without_nodes_left_is_refused_and_let_go() -> None:
    """Law 5: no node was asked, so nobody is told to abort; CANCEL writes nothing."""
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    message = replication(cluster)
    await message.write(LONG)
    for node in (b, c):
        node.fail_next("append", error=unreachable())
    with pytest.raises(NotRedundant):
        await message.write(LONG)
    ends = {node.id: (await node.facts()).end for node in (a, b, c)}
    await message.cancel()
    for node in (a, b, c):
        assert "delete" not in node.calls
        assert "cancel" in node.calls
        assert (await node.facts()).end == ends[node.id]
        assert node.state is NodeState.READ_WRITE


@virtual
async def test_burying_is_confirmed_by_every_node_that_may_hold_it() -> None:
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    for node in (b, c):
        node.fail_next("commit", done=True, error=unreachable())
    message = replication(cluster)
    with pytest.raises(NotStored):
        await message.commit(record)
    c.fail_next("delete", done=True, error=unreachable())
    assert not await message.bury(Mark(), 1.5)
    assert await message.bury(Mark(), 1.5)
    assert [await node.has([KEY]) for node in (a, b, c)] == [[Held.DEAD]] * 3


@virtual
async def test_a_spare_is_fed_by_the_age_of_its_own_stamp() -> None:
    """Law 2: feeding ends when its stamp reaches W - 2 s; a stamp that was heard by a ping is not of now."""
    a, b, c, d = *three(), Recorder("d", "g4", 3)
    world = make_world()
    cluster = await make_cluster(world, a, b, c, d)
    message = replication(cluster)
    await message.write(LONG * 2)
    c.stamp_age_s = lambda: limits.COMMIT_WINDOW_S - limits.SPARE_MARGIN_S - 3.0  # type: ignore[method-assign]
    b.fail_next("commit", error=unreachable())
    c.append_s = d.append_s = 1.0
    began = world.clock.monotonic()
    _, receipts = await message.commit(record)
    assert sorted(receipt.node for receipt in receipts) == ["a", "d"]
    assert not c.asked and c.appends[-1] <= began + 3.0 and len(c.appends) == 2
    assert d.asked[0][0] > began + 8.0, "that of another is younger"


@virtual
async def test_a_node_that_was_never_asked_holds_nothing() -> None:
    """Law 5: it needs no abort, and leaves no outcome unknown; what it was streamed is let go of."""
    a, b, c = three()
    cluster = await make_cluster(make_world(), a, b, c)
    message = replication(cluster)
    await message.write(LONG)
    for node in (a, b, c):
        node.fail_next("commit", error=NeverAsked("the link went before it was sent"))
    with pytest.raises(NotStored) as raised:
        await message.commit(record)
    assert raised.value.undecided == raised.value.refused == ()
    assert {node.id for node in message.abandoned} == {"a", "b", "c"}
    await message.cancel()
    assert "delete" not in a.calls + b.calls + c.calls and a.calls[-1] == "cancel"
    message = replication(cluster, b"l" * 16)
    b.fail_next("commit", done=True, error=unreachable())
    c.fail_next("commit", error=NeverAsked("the link went before it was sent"))
    with pytest.raises(NotStored) as raised:
        await message.commit(record)
    assert raised.value.undecided == ("a", "b")
