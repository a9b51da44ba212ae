"""Lost commits (laws 10, 11): what proves them, what follows, and that no number is ever given twice (P10)."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble
from powermail.index.contract import FlagChange, Head, Index
from powermail.storage.contract import Mark, Origin, Position
from tests.index.support import (
    NOW,
    RIGS,
    MemoryRig,
    Rig,
    admit,
    begin_again,
    commit,
    deliver,
    delivery,
    inbox,
    key,
    mailbox,
    reconcile,
    scan_all,
    uids,
    walk_all,
)

JUMP, UNCLEAN = limits.EPOCH_JUMP, limits.UNCLEAN_JUMP


async def facts_of(index: Index, account: str = "ann", name: str = "INBOX") -> Any:
    facts = await index.find_mailbox(account, name)
    assert facts is not None
    return facts


async def last_uid(index: Index) -> int:
    return (await uids(index, await mailbox(index)))[-1]


# -- the facts that were found ------------------------------------------------------------------------------------------


async def test_the_same_backup_restored_twice_never_gives_a_uid_twice(rig: Rig) -> None:
    await admit(rig.index)
    await deliver(rig.index, 1, 2)
    backup, given = await rig.backup(), {}
    remembered = rig.index.mark()
    for number in range(3, 8):
        await deliver(rig.index, number)
        uid = await last_uid(rig.index)
        assert uid not in given
        given[uid] = number
        remembered = remembered.with_seen(rig.index.mark())
        index = await rig.lose(backup)
        assert await index.lost(remembered) != ""
        await begin_again(index, remembered)
        remembered = remembered.with_seen(index.mark())
    assert len(given) == 5


async def test_a_mailbox_without_a_checkpoint_never_comes_out_of_a_rebuild_with_the_same_uidvalidity(room: Path) -> None:
    """The new index knows nothing but what marks say; the clock has gone back."""
    for number, kind in enumerate(sorted(RIGS)):
        old, new = RIGS[kind](room, 2 * number), RIGS[kind](room, 2 * number + 1)
        await admit(await old.start())
        await deliver(old.index, 1)
        before, mark = await facts_of(old.index), old.index.mark()
        await old.die()
        new.clock.at = NOW - 1e8
        index = await new.start()
        await admit(index)
        await begin_again(index, mark)
        await deliver(index, 2)
        after = await facts_of(index)
        assert after.uidvalidity > before.uidvalidity + 1000
        await new.die()


async def test_a_hot_backup_whose_later_mail_was_all_read_and_deleted_is_noticed(rig: Rig) -> None:
    """No live record on any node tells of it: the mark that came with the tombstones does."""
    await admit(rig.index)
    await deliver(rig.index, 1)
    backup = await rig.backup()
    await deliver(rig.index, 2)
    await rig.index.expunge(await mailbox(rig.index), [2])
    remembered = rig.index.mark()
    index = await rig.lose(backup)
    assert await index.lost(remembered) != ""


async def test_a_hot_backup_put_back_before_any_mark_was_written_jumps_all_the_same(lone_rig: Rig) -> None:
    await admit(lone_rig.index)
    await deliver(lone_rig.index, 1)
    backup, remembered = await lone_rig.backup(), lone_rig.index.mark()
    await deliver(lone_rig.index, 2)
    index = await lone_rig.lose(backup)
    assert await index.lost(remembered) == "", "nothing shows it"
    await deliver(index, 3)
    assert await last_uid(index) == 2 + UNCLEAN


async def test_mail_that_reconcile_enters_late_burns_no_numbers(index: Index) -> None:
    for number in range(1, 6):
        await reconcile(index, "a", Position(2, number), [(number, Position(1, number), Origin.DELIVERY)],
                        commits=[(number, commit(number))])  # fmt: skip
    assert await uids(index, await mailbox(index)) == [1, 2, 3, 4, 5]


# -- starts -------------------------------------------------------------------------------------------------------------


async def test_numbers_go_on_after_a_process_that_said_that_it_stopped(rig: Rig) -> None:
    await admit(rig.index)
    await deliver(rig.index, 1)
    before = await facts_of(rig.index)
    await rig.stop()
    index = await rig.start()
    assert index.cluster == "00" * 16
    await deliver(index, 2)
    assert (await last_uid(index), (await facts_of(index)).modseq) == (2, before.modseq + 1)


async def test_each_mailbox_jumps_once_after_a_process_that_died(lone_rig: Rig) -> None:
    await admit(lone_rig.index)
    await deliver(lone_rig.index, 1, to=[inbox(), inbox("bob")])
    before = await facts_of(lone_rig.index)
    await lone_rig.die()
    index = await lone_rig.start()
    assert await facts_of(index) == before, "only when a number is given"
    await deliver(index, 2, 3)
    assert await uids(index, before.id) == [1, 2 + UNCLEAN, 3 + UNCLEAN]
    box = await mailbox(index, "bob")
    stored = await index.store(box, [1], FlagChange.ADD, 1, None)
    assert stored.modseq == before.modseq + UNCLEAN + 1
    await deliver(index, 4, to=[inbox("bob")])
    assert await uids(index, box) == [1, 2 + UNCLEAN]


async def test_what_is_written_behind_the_word_that_the_process_stops_takes_the_word_back(lone_rig: Rig) -> None:
    await admit(lone_rig.index)
    await lone_rig.index.rest()
    await deliver(lone_rig.index, 1)
    index = await lone_rig.lose(await lone_rig.backup())
    await deliver(index, 2)
    assert await last_uid(index) == 2 + UNCLEAN


async def test_the_first_uidvalidity_is_not_given_again_when_it_was_lost(lone_rig: Rig) -> None:
    """Nothing shows the loss, and no clock has moved."""
    await admit(lone_rig.index)
    backup = await lone_rig.backup()
    await deliver(lone_rig.index, 1)
    before = await facts_of(lone_rig.index)
    index = await lone_rig.lose(backup)
    await deliver(index, 2)
    assert (await facts_of(index)).uidvalidity > before.uidvalidity


async def test_a_mailbox_that_slept_through_many_starts_is_checkpointed_before_its_leap_is_too_far(lone_rig: Rig) -> None:
    await admit(lone_rig.index)
    index = lone_rig.index
    await deliver(index, 1)
    box = await mailbox(index)
    for _ in range(2):
        plan = await index.checkpoint_plan(box)
        if plan is not None:
            await index.checkpoint_done(plan, ("a", "b"), lone_rig.clock.at)
        assert await index.checkpoint_due(lone_rig.clock.at + 1e6, 9) == []
        for _ in range(JUMP // UNCLEAN // 2):
            await lone_rig.die()
            index = await lone_rig.start()
        assert await index.checkpoint_due(lone_rig.clock.at, 9) == [box]
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    await index.checkpoint_done(plan, ("a", "b"), lone_rig.clock.at)
    await deliver(index, 2)
    assert await last_uid(index) == 2 + JUMP


async def test_starts_that_use_up_numbers_make_a_checkpoint_due_and_then_wait_for_it(lone_rig: Rig) -> None:
    """Law 11: no mailbox gets more than a jump of numbers beyond its last durable checkpoint."""
    await admit(lone_rig.index)
    index, starts = lone_rig.index, 0
    await deliver(index, 1)
    box = await mailbox(index)
    first_due = None
    with pytest.raises(IndexTrouble):
        while True:
            await lone_rig.die()
            index, starts = await lone_rig.start(), starts + 1
            await deliver(index, 1 + starts)
            if first_due is None and await index.checkpoint_due(lone_rig.clock.at, 9):
                first_due = starts
    assert (first_due, starts) == (JUMP // UNCLEAN // 2, JUMP // UNCLEAN)
    with pytest.raises(IndexTrouble):
        await index.store(box, [1], FlagChange.ADD, 1, None)
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    await index.checkpoint_done(plan, ("a", "b"), lone_rig.clock.at)
    await deliver(index, 999)
    assert await last_uid(index) >= JUMP
    assert await index.audit() == []


# -- marks --------------------------------------------------------------------------------------------------------------


async def test_a_mark_counts_every_transaction(rig: Rig) -> None:
    await admit(rig.index)
    await deliver(rig.index, 1)  # a set of nodes that is new may be made by a transaction of its own
    before = rig.index.mark()
    await deliver(rig.index, 2)
    after = rig.index.mark()
    assert (await rig.index.lost(before)) == (await rig.index.lost(after)) == ""
    number = after.sequence
    assert after.slots[number][0] == before.slots[number][0]
    assert after.slots[number][1] == before.slots[number][1] + 1
    assert (after.epoch, after.uidvalidity) == (rig.index.epoch, (await facts_of(rig.index)).uidvalidity)


async def test_what_nodes_remember_of_a_later_epoch_or_writer_proves_a_loss(rig: Rig) -> None:
    mark = rig.index.mark()
    number = mark.sequence
    tag, count = mark.slots[number]
    for later in (
        Mark(epoch=mark.epoch + 1),
        Mark(number + 1, {}, mark.epoch),
        Mark(number, {number: (tag, count + 1)}, mark.epoch),
        Mark(number, {number: ("another", 0)}, mark.epoch),
    ):
        assert await rig.index.lost(later) != ""
        settled = Mark(later.sequence, later.slots, mark.epoch - 1)
        assert await rig.index.lost(settled) == "", "settled when the epoch was raised"
    assert await rig.index.lost(Mark()) == ""


async def test_a_writer_slot_is_pruned_only_by_a_round_completed_after_it_stopped(rig: Rig) -> None:
    await admit(rig.index)
    first = rig.index.mark()
    await scan_all(rig.index)
    await rig.stop()
    index = await rig.start()
    second = index.mark()
    assert set(first.slots) < set(second.slots)
    await scan_all(index)
    assert set(index.mark().slots) == set(second.slots), "the round before was completed too early"
    await scan_all(index)
    await index.forget(9)
    assert set(index.mark().slots) == {second.sequence}
    assert index.mark() == await index.proof(index.connection)
    number, (tag, count) = first.sequence, first.slots[first.sequence]
    more = Mark(second.sequence, {number: (tag, count + 99)}, second.epoch)
    assert await index.lost(more) != "", "it is compared until every node was told that it is left out"
    await scan_all(index)
    await scan_all(index)
    assert await index.lost(more) == ""
    assert (await index.lost(first)) == (await index.lost(second)) == "", "missing at or below the sequence: pruned"


async def test_a_process_that_finds_its_writer_slot_lower_stops_numbering_and_listing(room: Path) -> None:
    """The index failed over to a stale standby under a running process (law 10)."""
    rig = MemoryRig(room)
    index = await rig.start()
    await admit(index)
    await deliver(index, 1)
    stale = await rig.backup()
    await deliver(index, 2)
    await rig.put_back(stale)
    with pytest.raises(IndexLost):
        await index.deliver(delivery(3))
    with pytest.raises(IndexLost):
        await index.find_mailbox("ann", "INBOX")
    assert await index.lost(Mark()) != ""
    await begin_again(index)
    await deliver(index, 3)
    assert await last_uid(index) == 2 + JUMP


async def test_a_process_takes_a_new_writer_slot_each_time_it_connects(rig: Rig) -> None:
    """Law 10: what still travels of the old one's transactions never looks like the new one's."""
    before = rig.index.mark()
    await rig.die()
    again = await rig.start()
    after = again.mark()
    assert after.sequence == before.sequence + 1 and before.slots.items() <= after.slots.items()
    assert await again.proof(again.connection) == after


async def test_a_process_looks_at_its_old_slot_before_it_takes_a_new_one(room: Path) -> None:
    """Law 10: the index failed over under a running process. Lower: lost; as it was, or gone as pruned ones go: a new slot."""
    rig = MemoryRig(room)
    index = await rig.start()
    await admit(index)
    old, slot = await rig.backup(), index.mark().sequence
    await rig.put_back(old)
    connection = index.connection
    with pytest.raises(IndexTrouble):
        await index.find_mailbox("ann", "INBOX")
    assert index.unsettled, "it waits for the logs"
    await deliver(index, 1)
    mark = index.mark()
    assert mark.sequence == slot + 1 and set(mark.slots) == {slot, slot + 1}
    assert await index.proof(connection) == mark
    index.settled()
    await rig.put_back(old)
    with pytest.raises(IndexTrouble):
        await index.proof(connection)
    with pytest.raises(IndexLost):
        await index.proof(index.connection)
    with pytest.raises(IndexLost):
        await index.deliver(delivery(2))
    assert await index.lost(Mark()) != ""


async def test_a_mark_still_says_what_its_process_did_after_the_index_was_put_back(room: Path) -> None:
    """Law 10: the epoch and the counts are those of its last transaction, so that the node it goes to shows the loss."""
    rig = MemoryRig(room)
    index = await rig.start()
    await admit(index)
    old = await rig.backup()
    await index.abort(key(1), ["a"])
    await rig.put_back(old)
    assert await index.lost(index.mark()) != ""


async def test_readers_wait_after_a_process_that_died_and_not_after_one_that_stopped(lone_rig: Rig) -> None:
    """Laws 6, 10: what it had listed may be missing, and nothing else shows it (P7)."""
    await admit(lone_rig.index)
    await deliver(lone_rig.index, 1)
    box = await mailbox(lone_rig.index)
    lone_rig.settles = False
    await lone_rig.stop()
    index = await lone_rig.start()
    assert not index.unsettled and await uids(index, box) == [1]
    for _ in range(2):
        await lone_rig.die()
        index = await lone_rig.start()
        assert index.unsettled and not index.catching_up and index.numbering
        for read in (index.find_mailbox("ann", "INBOX"), index.entries(box, 0, 99, 9), index.view(box), index.tail(box, 0, 1)):
            with pytest.raises(IndexTrouble):
                await read
    await deliver(index, 2)
    index.settled()
    assert await uids(index, box) == [1, 2 + 2 * UNCLEAN]


async def test_no_transaction_gives_a_mailbox_more_numbers_than_a_leap_makes_up_for(rig: Rig) -> None:
    """Law 10: marks go to nodes between transactions; what one COPY or MOVE gives may be lost with it, and be given again."""
    index, most = rig.index, limits.NUMBERS_AT_ONCE_MAX
    await admit(index)
    await deliver(index, 1)
    box = await mailbox(index)
    there = (await index.make_mailbox("ann", "Archive")).id
    given = 1
    while given <= most:
        await asyncio.sleep(0)
        given += len(await index.copy(box, range(1, min(given, most + 1 - given) + 1), box))
    before = index.mark()
    for call in (index.copy(box, range(1, most + 2), there), index.move(box, range(1, most + 2), there)):
        with pytest.raises(ValueError, match=str(most)):
            await call
    assert index.mark() == before and await uids(index, there) == []
    numbered = index.numbered
    assert len(await index.copy(box, range(1, most + 1), there)) == most
    assert index.numbered - numbered >= most
    numbered = index.numbered
    assert len(await index.move(box, range(2, most + 9), there)) == most
    assert index.numbered - numbered >= most


async def test_numbers_of_deliveries_adoption_and_changes_are_counted(rig: Rig) -> None:
    index = rig.index
    await admit(index)
    counts = [index.numbered]
    await deliver(index, 1, 2, to=[inbox(), inbox("bob")])
    counts.append(index.numbered)
    await reconcile(index, "a", Position(2, 9), [(3, Position(1, 9), Origin.DELIVERY)], commits=[(3, commit(3))])
    counts.append(index.numbered)
    await index.store(await mailbox(index), [1], FlagChange.ADD, 1, None)
    counts.append(index.numbered)
    assert all(after - before >= least for before, after, least in zip(counts, counts[1:], (2, 1, 1), strict=False))


# -- a new epoch --------------------------------------------------------------------------------------------------------


async def test_an_epoch_rises_above_all_that_is_known_and_marks_prove_nothing_any_more(rig: Rig) -> None:
    await admit(rig.index)
    mine = rig.index.mark()
    marks = [
        Mark(40, {40: ("x", 900)}, 7, mine.uidvalidity + 500, ("old-1",)),
        Mark(3, {3: ("y", 5)}, 2, 5, ("old-2",)),
        Mark(mine.sequence, mine.slots, 3),
    ]
    assert await rig.index.raise_epoch(marks, "a test says so") == 8
    assert rig.index.epoch == 8
    after = rig.index.mark()
    assert (after.epoch, after.retired) == (8, ("old-1", "old-2"))
    assert after.uidvalidity >= mine.uidvalidity + 500 + JUMP
    assert after.sequence > 40
    for mark in marks:
        assert await rig.index.lost(mark) == ""
        assert after.with_seen(mark).with_seen(after) == mark.with_seen(after), "nodes come to remember the same"
    assert await rig.index.raise_epoch([], "again") == 9


async def test_nothing_is_numbered_before_the_epoch_has_begun_and_nothing_listed_before_the_walks(rig: Rig) -> None:
    """Laws 6, 11: deliveries and adoption as if the index were away, readers a temporary error and never a short list (P7)."""
    await admit(rig.index)
    await deliver(rig.index, 1)
    box = await mailbox(rig.index)
    await rig.index.raise_epoch([], "a test says so")
    for again in (False, True):
        index = rig.index
        if again:
            await rig.die()
            index = await rig.start()
        assert (index.catching_up, index.numbering) == (True, False)
        batch = reconcile(index, "a", Position(9, 0), [(3, Position(8, 0), Origin.DELIVERY)], commits=[(3, commit(3))])
        for call in (
            index.deliver(delivery(2)),
            batch,
            index.store(box, [1], FlagChange.ADD, 1, None),
            index.expunge(box, [1]),
            index.copy(box, [1], box),
            index.make_mailbox("bob", "INBOX"),
        ):
            with pytest.raises(IndexTrouble):
                await call
        assert await index.fates([key(2), key(3)]) == {}
    await index.begin_epoch(index.epoch)
    assert (index.catching_up, index.numbering) == (True, True)
    await deliver(index, 2)
    for read in (
        index.find_mailbox("ann", "INBOX"),
        index.entries(box, 0, 99, 9),
        index.view(box),
        index.tail(box, 0, 1),
    ):
        with pytest.raises(IndexTrouble):
            await read
    await walk_all(index)
    assert (index.catching_up, index.numbering) == (False, True)
    assert (await uids(index, box))[0] == 1
    assert await index.audit() == []


async def test_an_abort_is_decided_while_nothing_is_numbered(rig: Rig) -> None:
    """Law 3 needs no number."""
    await admit(rig.index)
    await rig.index.raise_epoch([], "a test says so")
    assert (await rig.index.abort(key(1), ["a"])).name == "ABORTED"
    assert await rig.index.orders("a", 9) == [key(1)]


async def test_heads_of_checkpoints_raise_numbers_before_any_is_given(rig: Rig) -> None:
    """Law 11: a mailbox jumps from the highest number known."""
    index = rig.index
    await admit(index)
    await deliver(index, 1, to=[inbox(), inbox("bob"), inbox("cat")])
    facts = {name: await facts_of(index, name) for name in ("ann", "bob", "cat")}
    heads = [
        Head("ann", "INBOX", facts["ann"].uidvalidity, 5000, 7000, 1),
        Head("bob", "INBOX", facts["bob"].uidvalidity, 1, 1, 1),
        Head("cat", "INBOX", facts["cat"].uidvalidity - 1, 5000, 7000, 1),
        Head("dan", "INBOX", facts["cat"].uidvalidity + 10 * JUMP, 5000, 7000, 1),
    ]
    await begin_again(index, heads=heads)
    await deliver(index, 2, to=[inbox(), inbox("bob"), inbox("cat"), inbox("dan")])
    last = {name: (await uids(index, await mailbox(index, name)))[-1] for name in ("ann", "bob", "cat", "dan")}
    assert last == {"ann": 5000 + JUMP, "bob": 2 + JUMP, "cat": 2 + JUMP, "dan": 1}
    after = {name: await facts_of(index, name) for name in ("ann", "bob", "cat", "dan")}
    assert after["ann"].modseq == 7000 + JUMP + 1
    assert [after[name].uidvalidity for name in facts] == [facts[name].uidvalidity for name in facts]
    assert after["dan"].uidvalidity > facts["cat"].uidvalidity + 10 * JUMP, "unknown ones teach the counter"


async def test_a_head_and_the_row_each_jump_from_their_own_epoch(rig: Rig) -> None:
    """Law 11: the row jumped in an epoch of which the backup knows nothing, and the checkpoint is older than that epoch."""
    index = rig.index
    await admit(index)
    await deliver(index, 1, to=[inbox(), inbox("bob")])
    ann, bob = await facts_of(index), await facts_of(index, "bob")
    heads = [Head("ann", "INBOX", ann.uidvalidity, 5000, 7000, 1), Head("bob", "INBOX", bob.uidvalidity, 5000, 7000, 3)]
    await index.raise_epoch([Mark(epoch=4)], "a test says so")
    for _ in range(2):
        await index.learn_heads(heads)  # of every node that has it
    await index.begin_epoch(index.epoch)
    await walk_all(index)
    await deliver(index, 2, to=[inbox(), inbox("bob")])
    assert await last_uid(index) == 5000 + 4 * JUMP
    assert (await uids(index, bob.id))[-1] == 2 + 4 * JUMP, "the row's own is farther"
    assert (await facts_of(index, "bob")).modseq > 7000 + 2 * JUMP


async def test_an_epoch_gives_no_mailbox_more_numbers_than_a_jump_beyond_what_nodes_show(rig: Rig) -> None:
    """Law 11: else a rebuild, which goes on from the checkpoint by a jump for each epoch, would give them again."""
    index = rig.index
    await admit(index)
    await deliver(index, 1)
    box = await mailbox(index)
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    await index.checkpoint_done(plan, ("a", "b"), NOW)
    shown = Head("ann", "INBOX", plan.mailbox.uidvalidity, plan.mailbox.uid_next + JUMP // 3, plan.mailbox.modseq, plan.epoch)
    await begin_again(index, heads=[shown])
    assert await index.far_heads(9) == []
    await deliver(index, 2)
    assert await last_uid(index) == shown.uid_next + JUMP
    later = shown._replace(uid_next=plan.mailbox.uid_next + JUMP)
    assert await index.raise_epoch([], "a test says so") == 3
    await index.learn_heads([later])
    (far,) = await index.far_heads(9)
    assert (far.uid_next, far.epoch) == (later.uid_next + 2 * JUMP, 3), "durable on R groups before a number is given"
    await index.begin_epoch(index.epoch)  # a keeper would have written it
    await walk_all(index)
    with pytest.raises(IndexTrouble):
        await index.deliver(delivery(3))
    assert await index.checkpoint_due(rig.clock.at, 9) == [box]


async def test_what_a_mailbox_reaches_is_written_and_it_goes_on_from_there(rig: Rig) -> None:
    """Law 11: no checkpoint can be written before the walks end, and they need numbers."""
    index = rig.index
    await admit(index)
    await deliver(index, 1, to=[inbox(), inbox("bob")])
    uidvalidity = (await facts_of(index)).uidvalidity
    await index.raise_epoch([], "a test says so")
    await index.learn_heads([Head("ann", "INBOX", uidvalidity, 9 * JUMP, 9 * JUMP + 5, 1)])
    far = await index.far_heads(9)
    assert far == [Head("ann", "INBOX", uidvalidity, 10 * JUMP, 10 * JUMP + 5, 2)]
    await index.heads_written(far, index.epoch)
    assert await index.far_heads(9) == []
    await index.begin_epoch(index.epoch)
    await walk_all(index)
    await deliver(index, 2)
    assert await last_uid(index) == 10 * JUMP
    assert await index.audit() == []


async def test_a_mailbox_without_room_for_its_leap_is_checkpointed_where_it_stands(lone_rig: Rig) -> None:
    """Laws 10, 11: it waits for that checkpoint, and would wait for ever."""
    index = lone_rig.index
    await admit(index)
    await deliver(index, 1)
    uidvalidity = (await facts_of(index)).uidvalidity
    await begin_again(index, heads=[Head("ann", "INBOX", uidvalidity, JUMP // 2 - 20, 9, 1)])
    box = await mailbox(index)
    for _ in range(JUMP // UNCLEAN // 2 + 1):
        await lone_rig.die()
        index = await lone_rig.start()
    with pytest.raises(IndexTrouble):
        await index.deliver(delivery(2))
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    await index.checkpoint_done(plan, ("a", "b"), lone_rig.clock.at)
    await deliver(index, 2)


@pytest.mark.parametrize("why", ["short", "later"])
async def test_a_mailbox_whose_uids_are_spent_begins_anew_with_all_its_messages(rig: Rig, why: str) -> None:
    """Law 11: a fresh UIDVALIDITY; flags stay, sessions reload, and changes still name what they named."""
    index = rig.index
    await admit(index)
    await deliver(index, 1, 2, 3)
    box = await mailbox(index)
    await index.store(box, [3], FlagChange.ADD, 4, None)
    await index.merge(box)
    await index.store(box, [1], FlagChange.ADD, 1, None)
    await index.expunge(box, [2])
    before, old = await index.view(box), await facts_of(index)
    if why == "short":
        head = Head("ann", "INBOX", old.uidvalidity, limits.UID_MAX - JUMP - 5, 10, 1)
    else:
        head = Head("ann", "INBOX", old.uidvalidity + 7, 3, 10, 1)
    await begin_again(index, heads=[head])
    stored = await index.store(box, [3], FlagChange.ADD, 2, None)
    assert stored.changed == (3,)
    assert (await facts_of(index)).uidvalidity == old.uidvalidity, "a change needs no UID and renames none"
    await deliver(index, 4)
    now = await facts_of(index)
    assert now.uidvalidity > max(old.uidvalidity, head.uidvalidity)
    view = await index.view(box)
    assert [(uid, name, bits) for uid, name, bits, *_ in view.rows()] == [(1, key(1), 1), (2, key(3), 6), (3, key(4), 0)]
    assert await index.tail(box, before.modseq, before.uid_next) is None
    assert await index.tail(box, stored.modseq, limits.UID_MAX) is None
    assert (now.uid_next, view.modseq > stored.modseq) == (4, True)
    assert await index.changed({box: stored.modseq}) == [box]
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    assert plan.whole
    assert await index.audit() == []


# -- any history --------------------------------------------------------------------------------------------------------


class History:
    """A cluster whose index is copied, put back and put back again; what nodes remember; and every number ever shown."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.chance = rig, random.Random(seed)
        self.remembered = Mark()
        self.heads: dict[tuple[str, str], Head] = {}
        self.far: list[Head] = []  # durable on nodes beside them
        self.backups: list[tuple[Any, bool]] = []
        self.shown: dict[tuple[str, int, int], bytes] = {}  # mailbox, UIDVALIDITY, UID: the key it means for ever
        self.validities: dict[int, str] = {}
        self.highest: dict[tuple[str, int], int] = {}  # MODSEQ
        self.number = 0

    def remember(self) -> None:
        self.remembered = self.remembered.with_seen(self.rig.index.mark())

    async def started(self) -> None:
        """What a process does before its first number (law 10)."""
        index = await self.rig.start()
        if await index.lost(self.remembered):
            await begin_again(index, self.remembered, heads=[*self.heads.values(), *self.far], far=self.far)
        self.remember()

    async def look(self) -> None:
        """Each pair of UIDVALIDITY and UID names one message for ever, and belongs to one mailbox (P10)."""
        for facts in await self.rig.index.mailboxes(0, 99):
            assert self.validities.setdefault(facts.uidvalidity, facts.name) == facts.name
            for entry in await self.rig.index.entries(facts.id, 0, 2**32, 9999):
                assert self.shown.setdefault((facts.name, facts.uidvalidity, entry.uid), entry.key) == entry.key

    async def step(self) -> None:
        index, chance = self.rig.index, self.chance
        what = chance.choice(["deliver"] * 6 + ["store", "expunge", "mark", "backup", "checkpoint", "restart", "lose", "lose"])
        boxes = await index.mailboxes(0, 99)
        if what == "deliver":
            self.number += 1
            name = chance.choice(["INBOX", "Work", f"New{chance.randrange(4)}"])
            await deliver(index, self.number, to=[inbox("ann", name)])
        elif what == "store" and boxes:
            await self.store(index, chance.choice(boxes))
        elif what == "expunge" and boxes:
            box = chance.choice(boxes).id
            await index.expunge(box, await uids(index, box))
        elif what == "mark":
            self.remember()
        elif what == "backup":
            self.backups.append((await self.rig.backup(), False))
        elif what == "checkpoint" and boxes:
            await self.checkpoint(index, chance.choice(boxes).id)
        elif what == "restart":
            await self.restart(chance.random() < 0.5)
        elif what == "lose" and self.backups:
            backup, _ = chance.choice(self.backups)
            await self.rig.die()
            await self.rig.put_back(backup)
            await self.started()

    async def store(self, index: Index, facts: Any) -> None:
        stored = await index.store(
            facts.id, await uids(index, facts.id), FlagChange.REPLACE, self.chance.randrange(1, 99), None
        )
        if stored.changed:
            name = facts.name, facts.uidvalidity
            assert stored.modseq > self.highest.get(name, 0), "MODSEQs only rise (P10)"
            self.highest[name] = stored.modseq

    async def checkpoint(self, index: Index, box: int) -> None:
        plan = await index.checkpoint_plan(box)
        if plan is not None:
            at = plan.mailbox
            self.heads[at.account, at.name] = Head(at.account, at.name, at.uidvalidity, at.uid_next, at.modseq, plan.epoch)
            self.remember()  # a checkpoint carries the mark, durable before it
            await index.checkpoint_done(plan, ("a", "b"), self.rig.clock.at)

    async def restart(self, clean: bool) -> None:
        if not clean:
            await self.rig.die()
        else:
            await self.rig.index.rest()
            self.remember()  # a mark at the stop (law 10)
            self.backups.append((await self.rig.backup(), True))
            await self.rig.die()
        await self.started()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_no_number_is_given_twice_whatever_is_put_back(room: Path, kind: str) -> None:
    for seed in range(60 if kind == "memory" else 20):
        rig = RIGS[kind](room, seed)
        history = History(rig, seed)
        await history.started()
        await admit(rig.index)
        for _ in range(60):
            await asyncio.sleep(0)
            await history.step()
            await history.look()
        assert await rig.index.audit() == [], f"seed {seed}"
        await rig.die()


# -- the audit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["totals", "refs", "entry", "fate"])
async def test_the_audit_finds_what_does_not_agree(rig: Rig, fault: str) -> None:
    await admit(rig.index)
    await deliver(rig.index, 1)
    assert await rig.index.audit() == []
    await rig.plant(fault)
    assert await rig.index.audit() != []
