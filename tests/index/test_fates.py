"""Delivery and abort meet on one row (laws 3-5), late deliveries (law 7), reconcile's table (law 6), walks (law 11)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Batch, Delivery, DropOrder, Fate, Index, Outcome, Reconciled
from powermail.index.postgres import PostgresIndex
from powermail.storage.contract import START, End, Held, Origin, Position, Receipt, Unread
from tests.index.support import (
    MemoryRig,
    Rig,
    SqliteRig,
    admit,
    begin_again,
    commit,
    deliver,
    delivery,
    elsewhere,
    end_of,
    inbox,
    incarnation,
    key,
    mailbox,
    numbers_of,
    place,
    reconcile,
    scan_all,
    watermark,
)

END = Position(9, 0)


async def fate(index: Index, number: int) -> Fate | None:
    return (await index.fates([key(number)])).get(key(number))


async def kill(index: Index, number: int) -> None:
    """The user deletes a message, and every node confirms."""
    box = await mailbox(index)
    uid = next(e.uid for e in await index.entries(box, 0, 2**32, 999) if e.key == key(number))
    assert (await index.expunge(box, [uid])).dead == 1
    for row in await index.node_rows():
        await index.confirm_orders(row.id, await index.orders(row.id, 999), End(row.incarnation, row.end_seen))


# -- laws 3-5 -----------------------------------------------------------------------------------------------------------


async def test_a_delivery_is_entered_in_all_its_targets(index: Index) -> None:
    index.expect(1)
    assert await index.deliver(delivery(1, inbox(), inbox("bob", flags=3), elsewhere())) is Outcome.ENTERED
    index.expect(-1)
    facts = await index.message(key(1))
    assert facts is not None
    assert facts == (key(1), 101, bytes.fromhex(f"{1:064x}"), ("a", "b"), 3)
    (entry,) = await index.entries(await mailbox(index, "bob"), 0, 99, 9)
    assert (entry.key, entry.flags, entry.octets, entry.received_at) == (key(1), 3, 101, commit(1).received_at)
    assert [row.destination for row in await index.queue_rows(0, 9)] == ["far@example.net"]
    totals = await index.totals()
    assert (totals["mailboxes"], totals["entries"], totals["messages"], totals["queue"]) == (2, 2, 1, 1)


async def test_a_delivery_that_is_repeated_is_known_and_entered_once(index: Index) -> None:
    """P5."""
    await deliver(index, 1)
    assert await index.deliver(delivery(1)) is Outcome.KNOWN
    assert await numbers_of(index, await mailbox(index)) == [1]


async def test_many_deliveries_at_once_are_all_entered_in_order(index: Index) -> None:
    futures = [index.deliver(delivery(number)) for number in range(1, 400)]
    assert set(await asyncio.gather(*futures)) == {Outcome.ENTERED}
    shown = await numbers_of(index, await mailbox(index))
    assert sorted(shown) == list(range(1, 400))
    assert shown == sorted(shown) or isinstance(index, PostgresIndex), "two connections enter two batches at once there"


async def test_deliveries_that_wait_are_bounded(room: Path) -> None:
    """A locked index holds no more than so many in memory; the next is told at once, and those that wait are entered."""
    rig = SqliteRig(room)
    index = await rig.start()
    await admit(index)
    waiting = [index.deliver(delivery(number)) for number in range(1, limits.INDEX_WAITING_MAX + 1)]
    with pytest.raises(IndexTrouble):
        index.deliver(delivery(limits.INDEX_WAITING_MAX + 1))
    waiting[0].cancel()
    assert {*await asyncio.gather(*waiting[1:])} == {Outcome.ENTERED}
    assert await fate(index, 1) is Fate.LIVE, "cancelling does not stop what has begun"
    assert await fate(index, limits.INDEX_WAITING_MAX + 1) is None
    await rig.die()


async def test_an_abort_that_was_quicker_refuses_the_delivery(index: Index) -> None:
    assert await index.abort(key(1), ["a", "b"]) is Fate.ABORTED
    assert await index.deliver(delivery(1)) is Outcome.ABORTED
    assert await index.find_mailbox("ann", "INBOX") is None
    assert await index.orders("a", 9) == await index.orders("b", 9) == [key(1)]
    assert await index.orders("c", 9) == [], "only nodes that were asked to commit"


async def test_a_delivery_that_was_quicker_refuses_the_abort(index: Index) -> None:
    await deliver(index, 1)
    assert await index.abort(key(1), ["a", "b"]) is Fate.LIVE
    assert await index.orders("a", 9) == []
    assert await fate(index, 1) is Fate.LIVE


async def test_an_abort_of_what_was_read_and_deleted_meanwhile_says_dead(index: Index) -> None:
    await deliver(index, 1)
    await kill(index, 1)
    assert await index.abort(key(1), ["c"]) is Fate.DEAD
    assert await index.deliver(delivery(1)) is Outcome.KNOWN
    assert await numbers_of(index, await mailbox(index)) == []


async def test_an_abort_that_is_repeated_orders_the_nodes_that_were_asked_since(index: Index) -> None:
    assert await index.abort(key(1), ["a"]) is Fate.ABORTED
    assert await index.abort(key(1), ["b"]) is Fate.ABORTED
    assert await index.orders("a", 9) == await index.orders("b", 9) == [key(1)]


async def test_a_message_whose_accounts_were_all_purged_is_dead_and_ordered_away(index: Index) -> None:
    """Law 13: nothing is entered for an account that was purged."""
    await index.note_purged("ann")
    assert await index.deliver(delivery(1)) in (Outcome.ENTERED, Outcome.KNOWN)
    assert await fate(index, 1) is Fate.DEAD
    assert await index.orders("a", 9) == await index.orders("b", 9) == [key(1)]
    assert await index.deliver(delivery(2, inbox(), inbox("bob"))) is Outcome.ENTERED
    facts = await index.message(key(2))
    assert facts is not None
    assert facts.references == 1
    assert await index.find_mailbox("ann", "INBOX") is None


# -- law 7 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("receipt", "settled"),
    [
        (Receipt("a", incarnation("a"), Position(1, 500)), False),  # the place to go on from: not seen yet
        (Receipt("a", incarnation("a"), Position(1, 499)), True),
        (Receipt("a", incarnation("a"), Position(0, 900)), True),
        (Receipt("a", "another", Position(5, 0)), True),
        (Receipt("unknown", incarnation("a"), Position(5, 0)), True),
    ],
)
async def test_a_receipt_that_reconcile_has_passed_was_settled_before(index: Index, receipt: Receipt, settled: bool) -> None:
    """A message that was delivered by reconcile, read, deleted and forgotten must not come back (law 7)."""
    await reconcile(index, "a", Position(1, 500))
    late = Delivery(key(1), commit(1), (Receipt("b", incarnation("b"), place(1)), receipt))
    assert await index.deliver(late) is (Outcome.SETTLED if settled else Outcome.ENTERED)
    assert await fate(index, 1) is (None if settled else Fate.LIVE)
    assert (await index.find_mailbox("ann", "INBOX") is None) is settled


async def test_a_settled_delivery_harms_no_other_in_its_transaction(index: Index) -> None:
    await reconcile(index, "a", place(2))
    outcomes = await asyncio.gather(*[index.deliver(delivery(number)) for number in (1, 2, 3)])
    assert outcomes == [Outcome.SETTLED, Outcome.ENTERED, Outcome.ENTERED]
    assert await numbers_of(index, await mailbox(index)) == [2, 3]


async def test_a_delivery_behind_the_watermark_is_known_while_its_row_is_there(index: Index) -> None:
    """Law 4: live or dead by reconcile before counts as entered."""
    found = await reconcile(index, "a", END, [(1, place(1), Origin.DELIVERY)], commits=[(1, commit(1))])
    assert found == Reconciled(True, 1)
    assert await index.deliver(delivery(1)) is Outcome.KNOWN
    assert await numbers_of(index, await mailbox(index)) == [1]


async def test_a_deleted_and_forgotten_message_does_not_come_back_with_its_late_delivery(index: Index) -> None:
    await reconcile(index, "a", END, [(1, place(1), Origin.DELIVERY)], commits=[(1, commit(1))])
    await kill(index, 1)
    await scan_all(index)
    assert await index.forget(9) == 1
    assert await index.deliver(delivery(1)) is Outcome.SETTLED
    assert await numbers_of(index, await mailbox(index)) == []


# -- law 6 --------------------------------------------------------------------------------------------------------------


async def test_reconcile_enters_what_a_delivery_wrote_and_nobody_entered(index: Index) -> None:
    record = commit(1, inbox(flags=5), elsewhere())
    assert await reconcile(index, "a", END, [(1, place(1), Origin.DELIVERY)], commits=[(1, record)]) == Reconciled(True, 1)
    facts = await index.message(key(1))
    assert facts is not None
    assert (facts.nodes, facts.references) == (("a",), 2)
    assert await reconcile(index, "b", END, [(1, place(1), Origin.DELIVERY)]) == Reconciled(True)
    facts = await index.message(key(1))
    assert facts is not None
    assert facts.nodes == ("a", "b"), "the other copy of a live message is believed"


@pytest.mark.parametrize("origin", Origin)
async def test_reconcile_believes_a_copy_of_what_is_live(index: Index, origin: Origin) -> None:
    await deliver(index, 1)
    assert await reconcile(index, "c", END, [(1, place(1), origin)]) == Reconciled(True)
    assert await index.copies_on("c", b"", 9) == [key(1)]


@pytest.mark.parametrize("origin", Origin)
async def test_reconcile_orders_a_tombstone_for_a_copy_of_what_is_dead_or_aborted(index: Index, origin: Origin) -> None:
    await deliver(index, 1)
    await kill(index, 1)
    await index.abort(key(2), ["a"])
    assert await reconcile(index, "c", END, [(1, place(1), origin), (2, place(2), origin)]) == Reconciled(True)
    assert await index.orders("c", 9) == [key(1), key(2)]
    assert await index.copies_on("c", b"", 9) == []


@pytest.mark.parametrize("origin", [Origin.REPAIR, Origin.MOVED])
async def test_an_orphan_that_repair_or_compaction_wrote_is_dropped_and_never_entered(index: Index, origin: Origin) -> None:
    """A repair whose note failed, then the deletion by the user: the orphan is no new mail, and says nothing of its key."""
    assert await reconcile(index, "a", END, [(1, place(1), origin)], commits=[(1, commit(1))]) == Reconciled(True)
    assert await index.drops("a", 9) == [DropOrder(key(1), place(1))]
    assert await index.orders("a", 9) == []
    assert await fate(index, 1) is None


async def test_what_lies_before_the_birth_mark_is_never_entered(index: Index) -> None:
    """Law 12: a disk of an earlier incarnation put back."""
    await reconcile(index, "a", END, [(1, place(1), Origin.DELIVERY)], commits=[(1, commit(1))], birth=Position(1, 1001))
    assert await index.drops("a", 9) == [DropOrder(key(1), place(1))]
    await reconcile(index, "b", END, [(1, place(1), Origin.DELIVERY)], commits=[(1, commit(1))], birth=place(1))
    assert await fate(index, 1) is Fate.LIVE


async def test_a_tombstone_of_a_live_message_proves_lost_commits_and_changes_nothing(index: Index) -> None:
    await deliver(index, 1)
    found = await reconcile(index, "c", END, [(2, place(2), Origin.DELIVERY)], [1], [(2, commit(2))])
    assert (found.moved, found.lost) == (False, True)
    assert await fate(index, 1) is Fate.LIVE
    assert await fate(index, 2) is None
    assert await watermark(index, "c") == START


async def test_tombstones_of_what_is_dead_aborted_or_unknown_prove_nothing(index: Index) -> None:
    await deliver(index, 1)
    await kill(index, 1)
    await index.abort(key(2), ["a"])
    assert await reconcile(index, "a", END, tombstones=[1, 2, 3]) == Reconciled(True)
    assert await fate(index, 3) is None


async def test_reconcile_asks_for_commit_records_it_needs_and_changes_nothing_before(index: Index) -> None:
    await deliver(index, 2)
    found = [(number, place(number), Origin.DELIVERY) for number in (1, 2, 3)]
    assert await reconcile(index, "c", END, found, commits=[(3, commit(3))]) == Reconciled(False, missing=(key(1),))
    assert await fate(index, 3) is None
    assert await watermark(index, "c") == START
    assert await reconcile(index, "c", END, found, commits=[(1, commit(1)), (3, commit(3))]) == Reconciled(True, 2)


async def test_two_keepers_cannot_both_move_a_watermark(index: Index) -> None:
    batch = Batch("a", incarnation("a"), START, END, END, [(key(1), place(1), Origin.DELIVERY)], [], {key(1): commit(1)})
    assert await index.reconcile(batch) == Reconciled(True, 1)
    assert await index.reconcile(batch) == Reconciled(False)
    assert await index.reconcile(batch._replace(from_=END, incarnation="another")) == Reconciled(False)
    assert await index.reconcile(batch._replace(from_=END, node="unknown")) == Reconciled(False)
    assert await numbers_of(index, await mailbox(index)) == [1]


async def test_a_batch_sets_watermark_end_and_notes_in_one(index: Index) -> None:
    note = Unread(Position(2, 0), 512)
    await index.reconcile(Batch("a", incarnation("a"), START, Position(3, 5), END, [], [], {}, START, [note], None))
    row = (await index.node_rows())[0]
    assert (row.id, row.watermark, row.end_seen, row.scan_round) == ("a", Position(3, 5), END, 0)
    assert await index.unread("a", 9) == [note]
    number = await index.raise_round()
    await reconcile(index, "a", END, round_=number)
    assert (await index.node_rows())[0].scan_round == number


async def test_reconcile_skips_targets_of_a_purged_account(index: Index) -> None:
    await index.note_purged("ann")
    record = commit(1, inbox(), inbox("bob"))
    await reconcile(index, "a", END, [(1, place(1), Origin.DELIVERY), (2, place(2), Origin.DELIVERY)],
                    commits=[(1, record), (2, commit(2))])  # fmt: skip
    assert await fate(index, 1) is Fate.LIVE
    assert await fate(index, 2) is Fate.DEAD, "no target is left"
    assert await index.orders("a", 9) == [key(2)]


async def test_a_moved_record_of_the_same_copy_changes_nothing(index: Index) -> None:
    await deliver(index, 1)
    await reconcile(index, "a", Position(5, 0), [(1, place(1), Origin.DELIVERY)])
    await reconcile(index, "a", END, [(1, place(1), Origin.MOVED)])
    facts = await index.message(key(1))
    assert facts is not None
    assert facts.nodes == ("a", "b")
    assert await index.drops("a", 9) == []


# -- inventories: scrub's and law 12's comparison -------------------------------------------------------------------------


async def settle(
    index: Index, items: list[tuple[int, Held, Position]], birth: Position, enter: bool, *commits: int
) -> Reconciled:
    found = [(key(number), held, position) for number, held, position in items]
    return await index.settle_inventory(
        "a", end_of("a"), found, birth, {key(number): commit(number) for number in commits}, enter
    )


async def test_a_comparison_believes_buries_and_drops_what_lies_behind_the_watermark(index: Index) -> None:
    await deliver(index, 1, nodes=("b", "c"))
    await index.abort(key(2), ["b"])
    await reconcile(index, "a", Position(5, 0))
    items = [(1, Held.LIVE, place(1)), (2, Held.LIVE, place(2)), (3, Held.LIVE, place(3)), (4, Held.LIVE, Position(5, 0))]
    items += [(5, Held.DEAD, START), (6, Held.ABSENT, START), (7, Held.UNKNOWN, START)]
    assert (await settle(index, items, START, False)).moved
    assert await index.copies_on("a", b"", 9) == [key(1)]
    assert await index.orders("a", 9) == [key(2)]
    assert await index.drops("a", 9) == [DropOrder(key(3), place(3))], "what lies before the watermark is reconcile's"
    assert await index.fates([key(n) for n in range(3, 8)]) == {}


async def test_a_comparison_that_finds_a_tombstone_of_a_live_message_proves_lost_commits(index: Index) -> None:
    await deliver(index, 1)
    found = await settle(index, [(1, Held.DEAD, START)], START, False)
    assert (found.moved, found.lost) == (False, True)


async def test_a_comparison_with_another_incarnation_does_nothing(index: Index) -> None:
    await deliver(index, 1)
    found = await index.settle_inventory("c", End("another", END), [(key(1), Held.LIVE, START)], START, {}, False)
    assert found == Reconciled(False)
    assert await index.copies_on("c", b"", 9) == []


# -- inventories: the walk of law 11 ------------------------------------------------------------------------------------


async def test_a_walk_enters_whatever_the_origin_and_kills_what_has_a_tombstone(rig: Rig) -> None:
    """An index restored from a backup after compaction: the moved records are found, and what was deleted stays deleted."""
    index = rig.index
    await admit(index)
    await deliver(index, 1, to=[inbox(), inbox("bob"), elsewhere()])
    await deliver(index, 2)
    await begin_again(index)
    items = [(1, Held.DEAD, START), (2, Held.LIVE, place(2)), (3, Held.LIVE, place(3)), (4, Held.DEAD, START)]
    assert (await settle(index, items, START, True)).missing == (key(3),)
    assert await settle(index, items, START, True, 3) == Reconciled(True, 1)
    assert await index.fates([key(n) for n in range(1, 5)]) == {
        key(1): Fate.DEAD,
        key(2): Fate.LIVE,
        key(3): Fate.LIVE,
        key(4): Fate.DEAD,
    }
    assert await numbers_of(index, await mailbox(index)) == [2, 3]
    assert await numbers_of(index, await mailbox(index, "bob")) == []
    assert await index.queue_count() == 0
    assert key(1) in await index.orders("b", 9), "orders as in law 8"
    assert await index.audit() == []


async def test_a_walk_enters_nothing_before_the_birth_mark_and_nothing_whose_drop_waits(index: Index) -> None:
    await reconcile(index, "a", place(2), [(1, place(1), Origin.REPAIR)])
    items = [(1, Held.LIVE, place(1)), (2, Held.LIVE, place(2)), (3, Held.LIVE, place(3))]
    assert await settle(index, items, place(3), True, 1, 2, 3) == Reconciled(True, 1)
    assert await index.fates([key(n) for n in range(1, 4)]) == {key(3): Fate.LIVE}
    assert await index.drops("a", 9) == [DropOrder(key(1), place(1)), DropOrder(key(2), place(2))]


async def test_a_walk_tells_sessions_what_left(index: Index) -> None:
    await deliver(index, 1, 2)
    box = await mailbox(index)
    view = await index.view(box)
    await settle(index, [(1, Held.DEAD, START)], START, True)
    tail = await index.tail(box, view.modseq, view.uid_next)
    assert tail is not None
    view.follow(tail.facts.uid_next, tail.facts.modseq, tail.entries, tail.changes)
    assert [view.key(place_) for place_ in range(len(view))] == [key(2)]


async def test_while_a_walk_is_owed_tombstones_prove_nothing_new_and_missing_rows_mean_nothing(index: Index) -> None:
    """Law 11: that commits were lost is known; a comparison then changes as little as it can, and reconcile buries."""
    await deliver(index, 1, 2)
    await reconcile(index, "a", Position(5, 0))
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    items = [(1, Held.DEAD, START), (3, Held.LIVE, place(3))]
    assert (await settle(index, items, START, False)) == Reconciled(True)
    facts = await index.message(key(1))
    assert facts is not None
    assert facts.nodes == ("b",), "that node holds no copy"
    assert await index.drops("a", 9) == []
    assert await reconcile(index, "a", END, tombstones=[1]) == Reconciled(True)
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.DEAD, key(2): Fate.LIVE}
    await index.caught_up(index.epoch)
    assert await numbers_of(index, await mailbox(index)) == [2]


# -- answers that never came ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
async def test_what_is_asked_again_after_no_answer_is_done_once(room: Path, kept: bool) -> None:
    """Law 10: a writer slot that is higher by one is this process's own commit, whose answer it never heard."""
    rig = MemoryRig(room)
    index = await rig.start()
    await admit(index)
    rig.running.fail_next(kept)
    with pytest.raises(IndexTrouble):
        await index.deliver(delivery(1))
    assert (await fate(index, 1) is Fate.LIVE) is kept
    assert await index.deliver(delivery(1)) is (Outcome.KNOWN if kept else Outcome.ENTERED)
    rig.running.fail_next(kept)
    with pytest.raises(IndexTrouble):
        await index.abort(key(2), ["a"])
    assert await index.abort(key(2), ["a"]) is Fate.ABORTED
    assert await numbers_of(index, await mailbox(index)) == [1]
    assert await index.lost(index.mark()) == ""
