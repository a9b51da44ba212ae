"""News of a node that come late (laws 6, 8, 12), what a walk could not read (law 11), and the order of the queue's states."""

from __future__ import annotations

import pytest

from powermail.index.contract import Batch, DropOrder, Fate, Index, Reconciled
from powermail.storage.contract import START, Dropped, End, Held, Origin, Position, Rank, Unread
from tests.index.support import (
    NODES,
    admit,
    begin_again,
    commit,
    deliver,
    elsewhere,
    end_of,
    incarnation,
    key,
    mailbox,
    place,
    reconcile,
    scan_all,
    uids,
    walk_all,
    watermark,
)

SEEN = Position(4, 0)
BEFORE = Position(3, 9)  # an end that was told before the index saw the other
LATE = [end_of("a", BEFORE), End("a-0", SEEN), End("another", Position(9, 9))]


async def nodes_of(index: Index, number: int) -> tuple[str, ...]:
    facts = await index.message(key(number))
    assert facts is not None
    return facts.nodes


async def end_seen(index: Index, node: str) -> Position:
    return next(row.end_seen for row in await index.node_rows() if row.id == node)


# -- statements about copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", LATE)
async def test_who_comes_late_ends_no_belief_so_that_the_copy_gets_its_tombstone(index: Index, end: End) -> None:
    """Law 8, P8: the copy was made anew since; believed nowhere, it would lie there for ever."""
    await deliver(index, 1)
    await reconcile(index, "a", SEEN)
    assert await index.disbelieve("a", [key(1), key(2)], end) is False
    assert await nodes_of(index, 1) == ("a", "b")
    box = await mailbox(index)
    await index.expunge(box, await uids(index, box))
    assert await index.orders("a", 9) == [key(1)]


async def test_what_is_not_believed_is_never_too_late_to_say(index: Index) -> None:
    await deliver(index, 1)
    await reconcile(index, "a", SEEN)
    assert await index.disbelieve("a", [key(2)], end_of("a", BEFORE)) is True
    assert await index.disbelieve("z", [key(2)], End("z-1", SEEN)) is False
    assert await index.disbelieve("a", [key(1)], end_of("a", SEEN)) is True
    assert await nodes_of(index, 1) == ("b",)


@pytest.mark.parametrize("end", LATE)
async def test_who_comes_late_ends_no_suspicion(index: Index, end: End) -> None:
    """Law 8, P8: a suspected copy gets its tombstone too."""
    await deliver(index, 1)
    await index.note_bad(key(1), "a", "checksum")
    await reconcile(index, "a", SEEN)
    await index.clear_suspect(key(1), "a", end)
    assert await index.suspects("a", b"", 9) == [key(1)]
    await index.clear_suspect(key(1), "a", end_of("a", SEEN))
    assert await index.suspects("a", b"", 9) == []


@pytest.mark.parametrize("enter", [True, False], ids=["walk", "comparison"])
async def test_an_inventory_that_is_older_than_a_drop_adds_no_belief(index: Index, enter: bool) -> None:
    await deliver(index, 1, nodes=("b", "c"))
    await reconcile(index, "a", SEEN)
    found = [(key(1), Held.LIVE, place(1))]
    for end in LATE:
        assert await index.settle_inventory("a", end, found, START, {}, enter) == Reconciled(False)
    assert await nodes_of(index, 1) == ("b", "c")
    assert (await index.settle_inventory("a", end_of("a", SEEN), found, START, {}, enter)).moved
    assert await nodes_of(index, 1) == ("a", "b", "c")
    assert (await index.settle_inventory("a", end_of("a", BEFORE), found, START, {}, enter)).moved, "it is known already"


async def test_an_inventory_that_is_older_than_a_drop_enters_nothing(index: Index) -> None:
    """Law 11: the drop that waited was carried out while the keeper slept, so nothing says any more that it is none."""
    await reconcile(index, "a", place(2), [(1, place(1), Origin.REPAIR)])
    found, commits = [(key(1), Held.LIVE, place(1))], {key(1): commit(1)}
    asked = end_of("a", await end_seen(index, "a"))
    await index.confirm_drops("a", await index.drops("a", 9), Dropped((), end_of("a", SEEN)))
    assert await index.settle_inventory("a", asked, found, START, commits, True) == Reconciled(False)
    assert await index.fates([key(1)]) == {}


async def test_an_inventory_that_is_late_still_orders_tombstones_and_drops(index: Index) -> None:
    """These are never wrong: the one needs a row that says so, the other names the copy."""
    await index.abort(key(1), [])
    await reconcile(index, "a", SEEN)
    found = [(key(1), Held.LIVE, place(1)), (key(2), Held.LIVE, place(2))]
    assert (await index.settle_inventory("a", end_of("a", BEFORE), found, START, {}, False)).moved
    assert await index.orders("a", 9) == [key(1)]
    assert await index.drops("a", 9) == [DropOrder(key(2), place(2))]


@pytest.mark.parametrize("known", [True, False], ids=["of a live message", "of no message"])
async def test_a_batch_that_is_older_than_what_was_seen_adds_no_belief(index: Index, known: bool) -> None:
    """Law 6: the copy was dropped while the keeper slept; the watermark stays, so whoever scans again finds what is there."""
    if known:
        await deliver(index, 1, nodes=("b", "c"))
    await index.confirm_orders("a", [], end_of("a", SEEN))
    batch = Batch("a", incarnation("a"), START, BEFORE, BEFORE, [(key(1), place(1), Origin.DELIVERY)], [], {key(1): commit(1)})
    assert await index.reconcile(batch) == Reconciled(False)
    assert await watermark(index, "a") == START
    assert await index.copies_on("a", b"", 9) == []
    assert (await index.reconcile(batch._replace(end=SEEN))).moved
    assert await index.copies_on("a", b"", 9) == [key(1)]


async def test_a_batch_that_is_late_and_believes_only_what_is_believed_is_taken(index: Index) -> None:
    """What deliveries have entered: a busy node keeps nobody from going on."""
    await deliver(index, 1)
    await index.confirm_orders("a", [], end_of("a", SEEN))
    copies = [(key(1), place(1), Origin.DELIVERY), (key(2), place(2), Origin.REPAIR)]
    assert (await index.reconcile(Batch("a", incarnation("a"), START, BEFORE, BEFORE, copies, [], {}))).moved
    assert await index.drops("a", 9) == [DropOrder(key(2), place(2))]
    await index.note_bad(key(1), "a", "checksum")
    again = Batch("a", incarnation("a"), BEFORE, BEFORE, BEFORE, copies[:1], [], {})
    assert (await index.reconcile(again)).moved, "a suspected copy is not believed, so nothing is added"
    assert await nodes_of(index, 1) == ("b",)


async def test_who_confirms_a_drop_late_ends_no_belief_in_a_copy_made_since(index: Index) -> None:
    await reconcile(index, "c", place(2), [(1, place(1), Origin.REPAIR)])
    await deliver(index, 1)
    drops = await index.drops("c", 9)
    assert await index.believe([key(1)], "c", end_of("c", BEFORE))
    await reconcile(index, "c", SEEN)
    await index.confirm_drops("c", drops, Dropped((), end_of("c", BEFORE)))
    assert await nodes_of(index, 1) == ("a", "b", "c")
    assert await index.drops("c", 9) == drops, "the node is to say it again"
    await index.confirm_drops("c", drops, Dropped((key(1),), end_of("c", BEFORE)))
    assert (await nodes_of(index, 1), await index.drops("c", 9)) == (("a", "b", "c"), [])


async def test_an_opening_that_was_compared_earlier_does_not_take_the_place_of_a_later_one(index: Index) -> None:
    """Law 12: a disk from between the two would pass for the one that is known."""
    await index.note_boot("a", incarnation("a"), ["boot", "second", "third"])
    await index.note_boot("a", incarnation("a"), ["boot", "second"])
    assert (await index.node_rows())[0].boot == "third"
    await index.note_boot("a", incarnation("a"), ["second", "third", "fourth"])
    assert (await index.node_rows())[0].boot == "fourth", "long chains forget their beginning"


# -- what could not be read -----------------------------------------------------------------------------------------------


async def test_a_walk_notes_what_it_could_not_read_with_the_watermark_that_passes_over_it(index: Index) -> None:
    """Laws 6, 11: who stops behind the one must have done the other."""
    bad = [Unread(place(2), 0), Unread(place(1), 0)]
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    number = await index.raise_round()
    assert not await index.walked("a", "another", SEEN, SEEN, number, index.epoch, bad)
    assert not await index.walked("a", incarnation("a"), SEEN, SEEN, number, index.epoch + 1, bad)
    assert await index.unread("a", 9) == []
    assert await index.walked("a", incarnation("a"), SEEN, SEEN, number, index.epoch, bad)
    assert (await watermark(index, "a"), await index.unread("a", 9)) == (SEEN, sorted(bad))
    await walk_all(index)
    await index.abort(key(1), [])
    await scan_all(index)
    assert await index.forget(9) == 0, "law 9: it may be mail of a key that died"


async def test_of_two_notes_at_one_place_the_longer_stays(index: Index) -> None:
    """A record that a walk could not read, and the stretch that begins with it: all of that is to be read."""
    await reconcile(index, "a", SEEN, unread=[Unread(place(1), 500), Unread(place(2), 0)])
    await reconcile(index, "a", SEEN, unread=[Unread(place(1), 0), Unread(place(2), 7)])
    assert await index.unread("a", 9) == [Unread(place(1), 500), Unread(place(2), 7)]


async def test_a_note_ends_with_the_batch_that_has_read_it_or_not_at_all(index: Index) -> None:
    notes = [Unread(place(1), 0), Unread(place(2), 9)]
    await reconcile(index, "a", SEEN, unread=notes)
    batch = Batch("a", incarnation("a"), SEEN, SEEN, SEEN, [(key(1), place(1), Origin.DELIVERY)], [], {}, read=notes)
    assert (await index.reconcile(batch)).missing == (key(1),)
    assert not (await index.reconcile(batch._replace(from_=BEFORE))).moved
    assert not (await index.reconcile(batch._replace(incarnation="another"))).moved
    assert await index.unread("a", 9) == notes
    done = batch._replace(commits={key(1): commit(1)}, unread=[Unread(place(2), 5)])
    assert await index.reconcile(done) == Reconciled(True, 1)
    assert await index.unread("a", 9) == [Unread(place(2), 5)], "what still cannot be read is noted again"
    assert await index.fates([key(1)]) == {key(1): Fate.LIVE}


# -- states of the queue ----------------------------------------------------------------------------------------------------


async def test_states_of_the_queue_are_ranked_in_the_order_in_which_they_are_read(index: Index) -> None:
    """Law 11: who slept may write an older one, and it does not count."""
    await deliver(index, 1, to=[elsewhere()])
    first, second = await index.queue_plan(9), await index.queue_plan(9)
    assert (first.rank, second.rank) == (Rank(index.epoch, 0, 1), Rank(index.epoch, 0, 2))
    assert first.side == second.side, "none of them is durable yet"
    await begin_again(index)
    assert (await index.queue_plan(9)).rank > second.rank


async def test_a_state_of_the_queue_is_never_written_over_the_last_durable_one(index: Index) -> None:
    first = await index.queue_plan(9)
    late = await index.queue_plan(9)
    await index.queue_done(first)
    second = await index.queue_plan(9)
    assert second.side != first.side
    assert (await index.queue_plan(9)).side == second.side, "it was not durable"
    await index.queue_done(second)
    await index.queue_done(late)
    third = await index.queue_plan(9)
    assert third.side == first.side, "an older one that is durable late changes nothing"
    await begin_again(index)
    await index.queue_done(third)
    assert (await index.queue_plan(9)).side == first.side, "nor one that was read before commits were lost"


async def test_what_could_not_be_read_yet_is_not_settled_for_the_queue(index: Index) -> None:
    """Law 13: its recipients elsewhere have no row yet, and are not done."""
    await reconcile(index, "a", SEEN, unread=[Unread(place(2), 0), Unread(place(1), 0)])
    await reconcile(index, "b", SEEN, unread=[Unread(Position(5, 0), 9)])
    marks = (await index.queue_plan(9)).watermarks
    assert marks == {"a": (incarnation("a"), place(1)), "b": (incarnation("b"), SEEN), "c": (incarnation("c"), START)}


async def test_a_disk_is_not_taken_in_beside_one_that_came_since(index: Index) -> None:
    """Law 12: a keeper saw a disk and slept while it was swapped once more; the one that is there now is not retired for it."""
    await admit(index)
    before = incarnation("a")
    assert await index.admit_node("a", NODES["a"], "a-3", "", START, START, before) is True
    assert await index.admit_node("a", NODES["a"], "a-2", "", START, START, before) is False
    assert await index.admit_node("z", "north", "z-1", "", START, START, "z-0") is False
    assert await index.admit_node("a", NODES["a"], "a-2", "", START, START, "") is False
    rows = {row.id: row.incarnation for row in await index.node_rows()}
    assert rows["a"] == "a-3" and "z" not in rows
    assert "a-3" not in index.mark().retired and before in index.mark().retired
    assert await index.admit_node("a", NODES["a"], "a-4", "", START, START) is True, "who names none does not care"
