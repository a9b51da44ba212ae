"""Checkpoints: their octets, where they go, what they name, and that nothing damaged is believed (laws 10, 11, 13)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import zstandard
from hypothesis import given
from hypothesis import strategies as some

from powermail.base import limits
from powermail.base.errors import NotRedundant, Trouble
from powermail.base.lane import Lane
from powermail.index.contract import CheckpointPlan, EntryFacts, FlagChange, Head, MailboxFacts, QueuePlan, Tail
from powermail.index.view import Change, Op, View
from powermail.keeper.checkpoint import Checkpointer, heads, heads_record, pages_of, write_heads, write_purged
from powermail.keeper.checkpoint_form import (
    BadRecord,
    Kind,
    RecordHead,
    decode_head,
    decode_heads,
    decode_queue,
    decode_tail,
    decode_whole,
    encode_heads,
    encode_purged,
    encode_queue,
    encode_tail,
    encode_whole,
    record_name,
)
from powermail.storage.contract import NO_RANK, NodeState, Position, Rank
from tests.index.support import elsewhere, inbox, key
from tests.keeper.installation import Installation

TAG = b"12345678"


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Installation]:
    """An installation that runs, on either index."""
    installation = Installation(tmp_path, sqlite=request.param == "sqlite")
    await installation.start()
    yield installation
    await installation.stop()


async def records(place: Installation, node: str) -> list[tuple[bytes, RecordHead, bytes]]:
    """All records of a node."""
    return [(name, decode_head(octets), octets) async for page in pages_of(place.nodes[node]) for name, _, octets in page]


async def holders(place: Installation, kind: Kind) -> list[str]:
    """Nodes with a record of that kind."""
    return [node for node in place.nodes if any(head.kind is kind for _, head, _ in await records(place, node))]


# -- octets -------------------------------------------------------------------------------------------------------------


def plan_of(view: View, whole: bool, gone: tuple[bytes, ...] = (), left: tuple[bytes, ...] = ()) -> CheckpointPlan:
    """A plan for that state; a tail stands on MODSEQ 1."""
    facts = MailboxFacts(1, "ann", "INBOX", view.uidvalidity, view.uid_next, view.modseq, len(view), 0)
    return CheckpointPlan(facts, whole, view.modseq if whole else 1, 0, ("a", "b"), gone, False, left, (), 3, 1)


def view_of(count: int) -> View:
    """A mailbox of that many messages."""
    view = View(9, 1, 1)
    view.arrive((uid, key(uid), uid % 4, uid + 1, 100 + uid, 1000.0 + uid) for uid in range(1, count + 1))
    return view


@pytest.mark.parametrize("count", [0, 1, limits.VIEW_PART_ROWS + 1])
def test_a_whole_checkpoint_comes_back_as_it_was(count: int) -> None:
    view = view_of(count)
    gone = tuple(key(10**6 + number) for number in range(3 * count))
    octets = encode_whole(plan_of(view, True, gone, gone[::2]), view, {"$Forwarded": 64}, TAG, 5.0)
    whole = decode_whole(octets)
    assert list(whole.view.rows()) == list(view.rows())
    assert [each.key for each in whole.gone] == list(gone)
    assert [each.key for each in whole.gone if each.left] == list(gone[::2])
    assert whole.keywords == {"$Forwarded": 64}
    assert (whole.head.account, whole.head.name, whole.head.epoch, whole.head.parts) == ("ann", "INBOX", 3, len(octets))


def test_a_tail_is_cut_where_the_plan_was_made() -> None:
    plan = plan_of(view_of(3), False, (key(2),))
    later = plan.mailbox.modseq + 1
    entries = [EntryFacts(uid, key(uid), 0, modseq, 1, 0.0) for uid, modseq in ((1, 1), (2, 2), (3, 4), (4, later))]
    changes = [Change(modseq, Op.EXPUNGE, 0, (2,)) for modseq in (1, 3, later)]
    tail = decode_tail(encode_tail(plan, Tail(plan.mailbox, entries, changes), {}, TAG, 5.0))
    assert [entry[0] for entry in tail.entries] == [2, 3]  # what lies in the whole one, or came later, is not in it
    assert [change.modseq for change in tail.changes] == [3]
    assert tail.head.modseq == plan.mailbox.modseq


def test_parts_of_two_writings_are_not_one_checkpoint() -> None:
    view = view_of(limits.VIEW_PART_ROWS + 1)
    first, second = (encode_whole(plan_of(view, True), view, {}, tag, 5.0) for tag in (TAG, TAG[::-1]))
    for mixed in ([first[0], second[1]], first[:1], [first[1], first[0]], [*first, first[1]], []):
        with pytest.raises(BadRecord):
            decode_whole(mixed)


def test_the_queue_state_comes_back_as_it_was() -> None:
    marks = {"a": ("1" * 16, Position(3, 400)), "b": ("2" * 16, Position(1, 128))}
    rows = [(key(1), "far@example.net"), (key(1), "away@example.net")]
    head, found, waiting = decode_queue(encode_queue(QueuePlan(Rank(3, 0, 7), 1, marks, []), rows, 0, 1, TAG, 5.0))
    assert (head.kind, head.rank(), found, waiting) == (Kind.QUEUE, (3, 7), marks, rows)


def samples() -> list[bytes]:
    """One record of each kind."""
    view = view_of(5)
    tail = Tail(plan_of(view, False).mailbox, [EntryFacts(5, key(5), 0, 6, 1, 0.0)], [Change(6, Op.ADD_FLAGS, 1, (1, 2))])
    first = {
        "account": "ann", "name": "INBOX", "uidvalidity": 1, "uid_next": 2, "modseq": 2, "since": 0, "at": 0.0, "part": 0,
        "last": True, "entries": [[1, key(1).hex(), 0, 2, 10, 0.0]], "expunged": [],
    }  # fmt: skip
    return [
        encode_whole(plan_of(view, True, (key(9),)), view, {}, TAG, 5.0)[0],
        encode_tail(plan_of(view, False), tail, {}, TAG, 5.0)[0],
        encode_purged("ann", TAG, 5.0),
        encode_queue(QueuePlan(NO_RANK, 0, {"a": ("1", Position(1, 1))}, []), [(key(1), "x@example.net")], 0, 1, TAG, 5.0),
        encode_heads([Head("ann", "INBOX", 9, 5, 6, 1)], TAG, 5.0),
        zstandard.ZstdCompressor().compress(msgspec.json.encode(first)),
    ]


def believed(octets: bytes) -> None:
    """Reads a record by every reader; all but BadRecord is a failure."""
    readers = (decode_head, decode_queue, decode_heads, lambda one: decode_whole([one]), lambda one: decode_tail([one]))
    for read in readers:
        try:
            read(octets)
        except BadRecord:
            pass


@given(some.data())
def test_damaged_records_are_bad_and_nothing_else(data: some.DataObject) -> None:
    octets = bytearray(data.draw(some.sampled_from(samples())))
    for _ in range(data.draw(some.integers(1, 4))):
        octets[data.draw(some.integers(0, len(octets) - 1))] = data.draw(some.integers(0, 255))
    believed(bytes(octets[: data.draw(some.integers(0, len(octets)))]))
    believed(bytes(octets))


@given(some.binary(max_size=300))
def test_any_octets_are_bad_and_nothing_else(octets: bytes) -> None:
    believed(octets)
    believed(b"PMc2" + octets)


def test_a_record_that_would_fill_memory_is_refused_unread() -> None:
    head = samples()[2]
    length = int.from_bytes(head[4:8], "little")
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(8 * limits.RECORD_BODY_OCTETS_MAX))
    assert len(bomb) < 100_000
    for octets in (bomb, head[: 8 + length] + bomb):
        with pytest.raises(BadRecord):
            decode_head(octets) if octets is bomb else decode_queue(octets)
    with pytest.raises(BadRecord):
        decode_head(b"PMc2" + (1 << 31).to_bytes(4, "little") + bytes(100))


# -- writing --------------------------------------------------------------------------------------------------------------


async def test_the_first_checkpoint_is_whole_on_copies_required_groups(place: Installation) -> None:
    await place.deliver(1)
    assert await place.checkpoint() == 1
    at = await holders(place, Kind.WHOLE)
    assert len(at) == 2
    assert await holders(place, Kind.TAIL) == []
    assert await place.index.checkpoint_plan(await place.mailbox()) is None  # nothing is left to be written


async def test_two_nodes_of_one_group_are_one_holder(tmp_path: Path) -> None:
    place = Installation(tmp_path, groups={"a": "north", "b": "north", "c": "south"})
    await place.start()
    await place.deliver(1, nodes=("a", "c"))
    place.nodes["c"].fail_next("put_checkpoint")
    assert not await place.checkpointer.write_mailbox(await place.mailbox())
    assert await place.checkpointer.write_mailbox(await place.mailbox())
    plan = await place.index.checkpoint_plan(await place.mailbox())
    assert plan is None
    assert "c" in await holders(place, Kind.WHOLE)
    await place.stop()


async def test_a_tail_goes_to_the_nodes_that_hold_its_whole(place: Installation) -> None:
    for number in range(1, 30):
        await place.deliver(number)
    await place.checkpoint()
    for number in range(30, 36):
        await place.deliver(number)
        await place.checkpoint()
    assert await holders(place, Kind.TAIL) == await holders(place, Kind.WHOLE)
    node = (await holders(place, Kind.TAIL))[0]
    assert len([head for _, head, _ in await records(place, node) if head.kind is Kind.TAIL]) == 2  # two sides, no more


async def test_when_a_holder_takes_nothing_a_whole_one_goes_elsewhere(place: Installation) -> None:
    for number in range(1, 30):
        await place.deliver(number)
    await place.checkpoint()
    away = (await holders(place, Kind.WHOLE))[0]
    await place.deliver(30)
    place.nodes[away].fail()
    assert await place.checkpoint() == 1
    newest: dict[str, int] = {}
    for node in place.nodes:
        for _, head, _ in await records(place, node):
            if head.kind is Kind.WHOLE:
                newest[node] = max(newest.get(node, 0), head.base)
    new = max(newest.values())
    assert [node for node, base in newest.items() if base == new] == sorted(set(place.nodes) - {away})
    plan = await place.index.checkpoint_plan(await place.mailbox())
    assert plan is None


async def test_a_node_that_fails_midway_is_not_counted(place: Installation) -> None:
    await place.deliver(1)
    for node in place.nodes.values():
        node.fail_next("put_checkpoint")
    mailbox = await place.mailbox()
    assert not await place.checkpointer.write_mailbox(mailbox)
    plan = await place.index.checkpoint_plan(mailbox)
    assert plan is not None and plan.whole  # it is still owed
    assert await place.checkpointer.write_mailbox(mailbox)


async def test_one_mailbox_that_cannot_be_written_does_not_hold_up_the_others(place: Installation) -> None:
    for number, account in enumerate(("ann", "bob", "eve"), 1):
        await place.deliver(number, inbox(account))
    for node in place.nodes.values():
        node.fail_next("put_checkpoint")
    assert await place.checkpointer.write_due(float("inf")) == 2
    assert await place.checkpointer.write_due(float("inf")) == 0  # passed over for a while
    place.clock.pass_by(60.0)
    assert await place.checkpointer.write_due(float("inf")) == 1


async def test_a_checkpoint_brings_the_mark_of_the_index(place: Installation) -> None:
    await place.deliver(1)
    mark = place.index.mark()
    await place.checkpoint()
    at = await holders(place, Kind.WHOLE)
    for node in at:
        seen = (await place.nodes[node].facts()).mark
        assert all(seen.slots[number][1] >= count for number, (_, count) in mark.slots.items())


async def test_what_a_message_moved_to_is_written_before_the_mailbox_it_left(place: Installation) -> None:
    await place.deliver(1)
    await place.deliver(2, inbox(mailbox="Archive"))
    await place.checkpoint()
    source, there = await place.mailbox(), await place.mailbox(name="Archive")
    await place.index.move(source, await place.uids(1), there)
    for node in place.nodes.values():
        node.calls.clear()
    assert await place.checkpointer.write_mailbox(source)
    written = {}
    for name in place.nodes:
        for _, head, octets in await records(place, name):
            if head.name == "INBOX" and head.kind is Kind.WHOLE:
                written[head.modseq] = decode_whole([octets])
            elif head.name == "INBOX":
                written[head.modseq] = decode_tail([octets])  # type: ignore[assignment]
    newest = written[max(written)]
    assert [each.key for each in newest.gone] == [key(1)]
    assert not newest.gone[0].left and not newest.head.skipped
    assert await place.index.checkpoint_plan(there) is None


async def test_a_large_mailbox_is_packed_off_the_event_loop(place: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "VIEW_PART_ROWS", 20)
    lanes: list[str] = []
    make = place.world.lane

    def noted(name: str) -> Lane:
        lanes.append(name)
        return make(name)

    place.world.lane = noted
    for number in range(1, 41):
        await place.deliver(number, inbox("ann" if number > 19 else "bob"))
    await place.checkpoint()
    assert lanes == ["checkpoint"]  # for one of two
    found = {}
    for node in place.nodes:
        for _, head, octets in await records(place, node):
            if head.kind is Kind.WHOLE:
                found[head.account] = len(decode_whole([octets]).view)
    assert found == {"ann": 21, "bob": 19}


async def test_the_queue_state_names_what_waits_and_how_far_logs_are_settled(place: Installation) -> None:
    await place.deliver(1, elsewhere(), elsewhere("away@example.net"))
    await place.settle_logs()
    await place.checkpointer.write_queue()
    at = await holders(place, Kind.QUEUE)
    assert len(at) == 2
    octets = next(octets for _, head, octets in await records(place, at[0]) if head.kind is Kind.QUEUE)
    _, marks, rows = decode_queue(octets)
    assert sorted(rows) == [(key(1), "away@example.net"), (key(1), "far@example.net")]
    assert marks == {row.id: (row.incarnation, row.watermark) for row in await place.index.node_rows()}


async def test_the_queue_state_is_written_every_interval(place: Installation) -> None:
    await place.checkpointer.step()
    await place.checkpointer.step()
    calls = sum(node.calls.count("put_checkpoint") for node in place.nodes.values())
    assert calls == 2
    place.clock.pass_by(limits.CHECKPOINT_INTERVAL_S)
    await place.checkpointer.step()
    assert sum(node.calls.count("put_checkpoint") for node in place.nodes.values()) == 4


async def queue_states(place: Installation) -> dict[str, list[int]]:
    """Numbers of the states of the queue that each node has."""
    return {
        name: sorted(head.modseq for _, head, _ in await records(place, name) if head.kind is Kind.QUEUE)
        for name in place.nodes
    }


async def test_a_keeper_that_slept_writes_no_older_state_of_the_queue_over_a_newer_one(place: Installation) -> None:
    """Law 11."""
    other = Checkpointer(place.world, place.cluster, place.index)
    plan = place.index.queue_plan

    async def slept(limit: int) -> QueuePlan:
        place.index.queue_plan = plan  # type: ignore[method-assign]
        found = await plan(limit)
        for _ in range(2):
            await other.write_queue()
        return found

    place.nodes["c"].fail()
    place.index.queue_plan = slept  # type: ignore[method-assign]
    await place.checkpointer.write_queue()
    assert await queue_states(place) == {"a": [2, 3], "b": [2, 3], "c": []}
    assert place.world.counters.snapshot()["law.11.older_checkpoints"] == 1
    await place.checkpointer.write_queue()
    assert await queue_states(place) == {"a": [3, 4], "b": [3, 4], "c": []}


async def test_a_state_of_the_queue_that_could_not_be_written_leaves_the_last_one(place: Installation) -> None:
    await place.checkpointer.write_queue()
    await place.checkpointer.write_queue()
    assert sorted(number for numbers in (await queue_states(place)).values() for number in numbers) == [1, 1, 2, 2]
    for name in ("b", "c"):
        place.nodes[name].fail()
    for _ in range(3):
        with pytest.raises(NotRedundant):
            await place.checkpointer.write_queue()
    assert 2 in {number for numbers in (await queue_states(place)).values() for number in numbers}


async def test_too_few_groups_is_trouble_and_is_tried_again(place: Installation) -> None:
    await place.deliver(1)
    for name in ("a", "b"):
        place.nodes[name].fail()
    place.clock.pass_by(1000.0)
    with pytest.raises(Trouble):
        await place.checkpointer.step()
    await place.nodes["a"].restart()
    place.nodes["a"].block(False)
    await place.cluster.watch(place.nodes["a"])
    place.clock.pass_by(1000.0)
    assert await place.checkpointer.step() == 0.0


async def test_heads_show_the_numbers_of_all_checkpoints_also_of_incomplete_ones(place: Installation) -> None:
    await place.deliver(1, inbox(), inbox("bob"))
    await place.checkpoint()
    node = place.nodes[(await holders(place, Kind.WHOLE))[0]]
    view = view_of(limits.VIEW_PART_ROWS + 1)
    await node.put_checkpoint(b"y" * 16, 0, encode_whole(plan_of(view, True), view, {}, TAG, 5.0)[0], place.index.mark())
    await node.put_checkpoint(b"x" * 16, 0, b"damaged", place.index.mark())
    await node.put_checkpoint(bytes(16), 0, b"17", place.index.mark())  # the first release's count
    found = {head for each in place.nodes.values() async for page in heads(each, place.log) for head in page}
    known = {
        (facts.account, facts.name, facts.uidvalidity, facts.uid_next, facts.modseq, place.index.epoch)
        for facts in await place.index.mailboxes(0, 10)
    }
    assert {tuple(head) for head in found} == known | {("ann", "INBOX", 9, view.uid_next, view.modseq, 3)}
    assert sum("node-damage" in line for line in place.log.lines) == 1


async def test_far_heads_are_among_the_heads_and_no_later_record_replaces_them(place: Installation) -> None:
    far = [[Head("ann", "INBOX", 9, 100 * number, 200 * number, number)] for number in (1, 2)]
    for some_heads in far:
        await write_heads(list(place.nodes.values()), 2, heads_record(place.world, some_heads), place.index.mark())
    found = [head async for page in heads(place.nodes["a"], place.log) for head in page]
    assert sorted(found, key=lambda head: head.epoch) == far[0] + far[1]
    for name in ("a", "b"):
        place.nodes[name].fail()
    with pytest.raises(NotRedundant):
        await write_heads(list(place.nodes.values()), 2, heads_record(place.world, far[0]), place.index.mark())


async def test_purged_is_durable_on_copies_required_groups_before_anything_goes(place: Installation) -> None:
    await place.deliver(1)
    for name in ("a", "b"):
        place.nodes[name].fail()
    with pytest.raises(NotRedundant):
        await write_purged(place.world, place.cluster, place.index, "ann")
    await place.nodes["a"].restart()
    await write_purged(place.world, place.cluster, place.index, "ann")
    assert await holders(place, Kind.PURGED) == ["a", "c"]
    assert record_name(Kind.PURGED, "ann", "", 0) != record_name(Kind.PURGED, "bob", "", 0)


async def test_flags_and_keywords_are_in_the_checkpoint(place: Installation) -> None:
    await place.deliver(1)
    mailbox = await place.mailbox()
    bit = await place.index.keyword(mailbox, "$Junk")
    await place.index.store(mailbox, await place.uids(1), FlagChange.ADD, bit, None)
    await place.checkpoint()
    node = (await holders(place, Kind.WHOLE))[0]
    whole = decode_whole([octets for _, head, octets in await records(place, node) if head.kind is Kind.WHOLE])
    assert whole.keywords == {"$Junk": bit}
    assert list(whole.view.flags) == [bit]


async def test_a_keeper_that_slept_over_its_checkpoint_takes_nothing_back(place: Installation) -> None:
    """Law 11: its plan is older than what lies there by now; the nodes are well, and the next one is taken."""
    await place.deliver(1)
    mailbox = await place.mailbox()
    slept = await place.index.checkpoint_plan(mailbox)
    assert slept is not None
    for number in range(2, 6):
        await place.deliver(number)
        assert await place.checkpointer.write(await place.index.checkpoint_plan(mailbox, whole=True))
    before = {node: await records(place, node) for node in place.nodes}
    for side in (0, 1):
        await place.checkpointer.write(slept._replace(side=side))
    for node, seen in before.items():
        names = {name for name, _, _ in seen}
        assert [each for each in await records(place, node) if each[0] in names] == seen
    assert place.world.counters.get("law.11.older_checkpoints") > 0
    await place.deliver(6)
    assert await place.checkpointer.write(await place.index.checkpoint_plan(mailbox, whole=True))
    assert all(node.state is NodeState.READ_WRITE for node in place.nodes.values())
