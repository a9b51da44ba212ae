"""Which checkpoint is due, what it must name, and what it makes durable (law 13)."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.index.contract import CheckpointPlan, FlagChange, Head, Index
from powermail.storage.contract import START
from tests.index.support import (
    NOW,
    Rig,
    admit,
    begin_again,
    deliver,
    elsewhere,
    end_of,
    inbox,
    incarnation,
    key,
    mailbox,
    scan_all,
)

INTERVAL = limits.CHECKPOINT_INTERVAL_S
FAR = NOW + 1e6


async def planned(index: Index, box: int) -> CheckpointPlan:
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    return plan


async def written(index: Index, box: int, at: float = NOW, nodes: tuple[str, ...] = ("a", "b")) -> CheckpointPlan:
    """Plans a checkpoint and says that it is durable."""
    plan = await planned(index, box)
    await index.checkpoint_done(plan, nodes, at)
    return plan


async def test_a_checkpoint_is_due_an_interval_after_the_first_change(rig: Rig) -> None:
    index = rig.index
    await admit(index)
    assert await index.checkpoint_due(FAR, 9) == []
    await deliver(index, 1)
    box = await mailbox(index)
    rig.clock.at += 100
    await deliver(index, 2)
    await index.store(box, [1], FlagChange.ADD, 1, None)
    assert await index.checkpoint_due(NOW + INTERVAL - 1, 9) == []
    assert await index.checkpoint_due(NOW + INTERVAL, 9) == [box]
    await written(index, box)
    assert await index.checkpoint_due(FAR, 9) == []
    assert await index.checkpoint_plan(box) is None, "nothing changed since"
    rig.clock.at = NOW + 5000
    await index.expunge(box, [1])
    assert await index.checkpoint_due(NOW + 5000 + INTERVAL - 1, 9) == []
    assert await index.checkpoint_due(NOW + 5000 + INTERVAL, 9) == [box]


async def test_the_longest_due_come_first(rig: Rig) -> None:
    index = rig.index
    await admit(index)
    for number, account in enumerate(["cat", "ann", "bob"]):
        rig.clock.at = NOW - 50 * number
        await deliver(index, number + 1, to=[inbox(account)])
    ids = {facts.account: facts.id for facts in await index.mailboxes(0, 9)}
    assert await index.checkpoint_due(FAR, 9) == [ids["bob"], ids["ann"], ids["cat"]]
    assert await index.checkpoint_due(FAR, 1) == [ids["bob"]]
    assert await index.checkpoint_due(NOW - 50 + INTERVAL, 9) == [ids["bob"], ids["ann"]]


async def test_the_first_checkpoint_is_whole_and_the_next_ones_are_its_tails(index: Index) -> None:
    await deliver(index, 1, 2)
    box = await mailbox(index)
    first = await written(index, box)
    assert (first.whole, first.base, first.skipped, first.gone) == (True, first.mailbox.modseq, False, ())
    assert (first.mailbox, first.base_uid, first.epoch) == ((await index.mailboxes(0, 1))[0], 3, index.epoch)
    await deliver(index, 3)
    second = await written(index, box)
    assert (second.whole, second.base, second.base_uid, second.nodes) == (False, first.base, 3, ("a", "b"))
    tail = await index.tail(box, second.base, second.base_uid)
    assert tail is not None
    assert [entry.key for entry in tail.entries] == [key(3)]
    await deliver(index, 4)
    third = await planned(index, box)
    assert (third.whole, third.base) == (False, first.base), "a tail always begins at the whole one"
    assert third.side != second.side, "the one before counts until this one is complete"


async def test_a_tail_can_be_taken_after_any_plan(index: Index) -> None:
    """What was merged for readers since the whole one may not be missing from its tail: then a whole one is due."""
    await deliver(index, 1, 2)
    box = await mailbox(index)
    await written(index, box)
    await index.store(box, [1], FlagChange.ADD, 1, None)
    await index.merge(box)
    plan = await planned(index, box)
    assert plan.whole or await index.tail(box, plan.base, plan.base_uid) is not None
    assert list((await index.view(box)).flags) == [1, 0]


async def test_whole_checkpoints_alternate_sides_whatever_lies_between(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    sides = []
    for number in range(2, 6):
        plan = await written(index, box)
        assert plan.whole
        sides.append(plan.side)
        await deliver(index, 2 * number)
        assert not (await written(index, box)).whole
        await deliver(index, 2 * number + 1)
        assert await index.checkpoints_lost("a") == 1
    assert sides in ([0, 1, 0, 1], [1, 0, 1, 0])


async def test_a_tail_that_outweighs_the_mailbox_makes_a_whole_one_due(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box)
    await deliver(index, *range(2, limits.VIEW_TAIL_ROWS + 2))
    assert not (await planned(index, box)).whole
    await deliver(index, limits.VIEW_TAIL_ROWS + 2, limits.VIEW_TAIL_ROWS + 3)
    plan = await planned(index, box)
    assert plan.whole
    assert len(await index.view(box)) == plan.mailbox.messages


async def test_a_tail_written_while_its_whole_one_was_lost_leaves_the_whole_one_due(index: Index) -> None:
    """Law 13: the tail alone says nothing."""
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box)
    await deliver(index, 2)
    tail = await planned(index, box)
    assert not tail.whole
    assert await index.checkpoints_lost("a") == 1
    await index.checkpoint_done(tail, ("b", "c"), NOW)
    assert await index.checkpoint_due(NOW, 9) == [box]
    assert (await planned(index, box)).whole


async def test_a_lost_holder_makes_a_whole_one_due_at_once(index: Index) -> None:
    await deliver(index, 1, to=[inbox(), inbox("bob")])
    boxes = [await mailbox(index), await mailbox(index, "bob")]
    await written(index, boxes[0], nodes=("a", "b"))
    await written(index, boxes[1], nodes=("b", "c"))
    assert await index.checkpoints_lost("a") == 1
    assert await index.checkpoint_due(NOW, 9) == [boxes[0]]
    assert (await written(index, boxes[0], nodes=("b", "c"))).whole
    assert await index.checkpoint_due(FAR, 9) == []
    assert await index.checkpoints_lost("a") == 0
    assert await index.checkpoints_lost("b") == 2


async def test_what_changed_while_a_checkpoint_was_written_is_due_again(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    plan = await planned(index, box)
    await deliver(index, 2)
    await index.checkpoint_done(plan, ("a", "b"), NOW + 50)
    assert await index.checkpoint_due(NOW + 49 + INTERVAL, 9) == []
    assert await index.checkpoint_due(NOW + 50 + INTERVAL, 9) == [box]
    following = await planned(index, box)
    assert (following.whole, following.base) == (False, plan.base)


async def test_a_mailbox_that_is_gone_has_no_plan_and_its_checkpoint_does_no_harm(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    plan = await planned(index, box)
    await index.purge("ann")
    await index.checkpoint_done(plan, ("a", "b"), NOW)
    assert await index.checkpoint_plan(box) is None
    assert await index.checkpoint_due(FAR, 9) == []


async def test_an_expelled_holder_makes_a_whole_one_due(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box, nodes=("b", "c"))
    await index.expel("c")
    assert await index.checkpoint_due(NOW, 9) == [box]
    assert (await planned(index, box)).whole


async def test_a_holder_that_comes_anew_makes_a_whole_one_due(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box, nodes=("b", "c"))
    await index.admit_node("c", "west", "c-1", "later", START, START)
    assert await index.checkpoint_due(NOW, 9) == [], "the same disk has what it had"
    await index.admit_node("c", "west", "c-2", "boot", START, START)
    assert await index.checkpoint_due(NOW, 9) == [box]
    assert (await planned(index, box)).whole


async def test_what_lost_its_checkpoint_is_counted_and_due_before_all_others_until_it_has_one(rig: Rig) -> None:
    """A disk that goes next may be the only one left with it (P15)."""
    index = rig.index
    await admit(index, "a", "b", "c")
    await deliver(index, 1, to=[inbox(), inbox("bob"), inbox("cal")])
    waiting, boxes = await mailbox(index, "cal"), [await mailbox(index, "bob"), await mailbox(index)]
    for box in boxes:
        await written(index, box, nodes=("a", "b"))
    rig.clock.at = FAR
    assert await index.thin_checkpoints() == 0, "one that never had a checkpoint has lost none"
    await index.admit_node("a", "north", "a-2", "boot", START, START)
    assert await index.thin_checkpoints() == 2 and await index.checkpoint_due(FAR, 9) == [*sorted(boxes), waiting]
    for box in boxes:
        await deliver(index, 2 + box, to=[inbox("bob"), inbox()], nodes=("b", "c"))
        await index.store(box, [1], FlagChange.ADD, 1, None)
    # One was written while another disk went, one by two keepers at once.
    plan = await planned(index, boxes[0])
    await index.checkpoint_done(plan, ("b", "c"), FAR, {"c": "another"})
    assert await index.thin_checkpoints() == 2 and await index.checkpoint_due(FAR, 2) == sorted(boxes)
    await written(index, boxes[0], FAR, ("b", "c"))
    assert await index.thin_checkpoints() == 1
    await index.checkpoint_done(await planned(index, boxes[1]), ("b", "c"), FAR)
    assert await index.thin_checkpoints() == 0
    assert await index.checkpoints_lost("b") == 2 and await index.thin_checkpoints() == 2
    plan = await planned(index, boxes[0])
    await index.checkpoint_done(plan._replace(side=1 - plan.side), ("a", "c"), FAR)
    assert await index.thin_checkpoints() == 2, "another keeper's, so it counts for nothing"


async def test_a_holder_of_tails_only_is_a_holder(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box, nodes=("a", "b"))
    await deliver(index, 2)
    await written(index, box, nodes=("b", "c"))
    assert await index.checkpoints_lost("c") == 1
    assert (await planned(index, box)).whole


async def test_a_whole_one_is_planned_when_it_is_asked_for(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    first = await written(index, box)
    await deliver(index, 2)
    plan = await index.checkpoint_plan(box, whole=True)
    assert plan is not None
    assert (plan.whole, plan.base, plan.side != first.side) == (True, plan.mailbox.modseq, True)


# -- what is named as expunged ------------------------------------------------------------------------------------------


async def test_what_was_expunged_is_named_until_it_is_forgotten(index: Index) -> None:
    """Law 13: else a rebuild would enter it again in the mailbox its commit record names, also what is dead: no node may have
    its tombstone yet.
    """
    await deliver(index, 1, 2, to=[inbox(), inbox("bob"), elsewhere()])
    await deliver(index, 3)
    box, other = await mailbox(index), await mailbox(index, "bob")
    await index.expunge(box, [1, 3])
    plan = await written(index, box)
    assert (plan.gone, plan.left, plan.skipped) == ((key(1), key(3)), (key(1), key(3)), False)
    await index.expunge(box, [2])
    delta = await written(index, box)
    assert (delta.whole, set(delta.gone) - {key(1), key(3)}) == (False, {key(2)})
    await index.checkpoints_lost("a")
    assert (await planned(index, box)).gone == (key(1), key(2), key(3)), "a whole one names all"
    await index.expunge(other, [1])
    await index.finish([row for row in await index.queue_rows(0, 9) if row.key == key(1)])
    await index.checkpoints_lost("a")
    plan = await planned(index, box)
    assert (plan.gone, plan.left) == ((key(1), key(2), key(3)),) * 2, "it is dead now, and no node knows it"
    assert key(1) in (await planned(index, other)).left
    for node in ("a", "b"):
        await index.confirm_orders(node, [key(1), key(3)], end_of(node))
    await scan_all(index)
    assert await index.forget(9) == 2
    assert (await planned(index, box)).gone == (key(2),), "tombstones stand for what was forgotten"
    assert (await planned(index, other)).gone == ()


async def test_a_moved_key_that_died_is_named_without_waiting_for_where_it_was_moved(index: Index) -> None:
    """Law 13: nothing shows it any more, so nothing can be lost between the two checkpoints."""
    await deliver(index, 1)
    box, work = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await index.move(box, [1], work)
    await index.expunge(work, [1])
    for each in (box, work):
        plan = await planned(index, each)
        assert (plan.gone, plan.left, plan.skipped, plan.first) == ((key(1),), (key(1),), False, ())


async def test_what_came_and_went_between_two_checkpoints_is_named_by_the_tail(index: Index) -> None:
    """It is in no entry and in no state that a rebuild could compare; a POP3 mailbox consists of such messages."""
    await deliver(index, 1)
    box = await mailbox(index)
    await written(index, box)
    await deliver(index, 2)
    await index.expunge(box, [2])
    plan = await planned(index, box)
    assert (plan.whole, plan.gone, plan.left) == (False, (key(2),), (key(2),))


async def test_what_came_back_is_not_named(index: Index) -> None:
    await deliver(index, 1)
    box, work = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await index.copy(box, [1], work)
    await index.copy(box, [1], box)
    await index.expunge(box, [1])
    assert (await planned(index, box)).gone == (), "another entry still shows it"
    await index.expunge(box, [2])
    plan = await planned(index, box)
    assert (plan.gone, plan.left) == ((key(1),), ()), "another mailbox of the account still shows it"
    await index.copy(work, [1], box)
    assert (await planned(index, box)).gone == ()


async def test_a_moved_key_is_named_only_once_the_destination_is_durable(index: Index) -> None:
    """Law 13: a disaster between the two checkpoints must show the message twice rather than never."""
    await deliver(index, 1, 2)
    box, work = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await written(index, work)
    await index.move(box, [1], work)
    plan = await written(index, box)
    assert (plan.gone, plan.skipped, plan.first) == ((), True, (work,))
    assert sorted(await index.checkpoint_due(NOW + INTERVAL, 9)) == sorted([work, box]), "a whole one follows"
    moved = await written(index, work)
    assert moved.gone == ()
    plan = await written(index, box)
    assert (plan.whole, plan.gone, plan.skipped, plan.first) == (True, (key(1),), False, ())
    assert await index.checkpoint_plan(box) is None


async def test_a_key_that_moves_on_is_named_once_it_is_durable_where_it_moved_to(index: Index) -> None:
    await deliver(index, 1)
    box, work = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    trash = (await index.make_mailbox("ann", "Trash")).id
    await index.move(box, [1], work)
    await index.move(work, [1], trash)
    await written(index, work)
    assert (await planned(index, box)).first == (trash,)
    await written(index, trash)
    assert (await planned(index, box)).gone == (await planned(index, work)).gone == (key(1),)


async def test_two_mailboxes_that_swap_messages_do_not_wait_for_each_other_for_ever(index: Index) -> None:
    await deliver(index, 1)
    await deliver(index, 2, to=[inbox("ann", "Work")])
    box, work = await mailbox(index), await mailbox(index, "ann", "Work")
    await index.move(box, [1], work)
    await index.move(work, [1], box)
    assert (await written(index, box)).skipped
    assert (await written(index, work)).gone == (key(2),)
    assert (await written(index, box)).gone == (key(1),)
    assert await index.checkpoint_due(FAR, 9) == []


async def test_a_key_moved_to_a_mailbox_that_is_gone_is_named(index: Index) -> None:
    await deliver(index, 1, to=[inbox(), inbox("bob")])
    box, other = await mailbox(index), (await index.make_mailbox("cat", "INBOX")).id
    await index.move(box, [1], other)
    assert (await planned(index, box)).skipped
    await index.purge("cat")
    plan = await planned(index, box)
    assert (plan.gone, plan.skipped) == ((key(1),), False)


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
async def test_what_was_written_of_another_uidvalidity_is_not_taken_for_this_one(index: Index, whole: bool) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    if not whole:
        await written(index, box)
        await deliver(index, 2)
    plan = await planned(index, box)
    assert plan.whole is whole
    later = Head("ann", "INBOX", plan.mailbox.uidvalidity + 1, 5, 5, 1)
    await begin_again(index, heads=[later])
    await deliver(index, 3)
    await index.checkpoint_done(plan, ("a", "b"), NOW)
    following = await planned(index, box)
    assert following.whole
    assert following.mailbox.uidvalidity > later.uidvalidity


@pytest.mark.parametrize("how", ["expelled", "replaced", "never came"])
async def test_a_checkpoint_counts_only_where_all_its_holders_are_members_still(rig: Rig, how: str) -> None:
    """Law 13: else it lies on fewer than R groups, and nothing is due any more."""
    index = rig.index
    await admit(index)
    await deliver(index, 1)
    box = await mailbox(index)
    plan = await planned(index, box)
    written_to = {"a": incarnation("a"), "b": incarnation("b")}
    if how == "expelled":
        assert await index.expel("b")
    elif how == "replaced":
        await index.admit_node("b", "south", "another", "boot", START, START)
    else:
        written_to = {"a": incarnation("a"), "z": "z"}
    rig.clock.at += 7
    await index.checkpoint_done(plan, list(written_to), rig.clock.at, written_to)
    assert await index.checkpoint_due(rig.clock.at, 9) == [box]
    again = await planned(index, box)
    assert again.whole and again.nodes == ()
    holders = {"a": incarnation("a"), "c": incarnation("c")}
    await index.checkpoint_done(again, list(holders), rig.clock.at, holders)
    assert await index.checkpoint_due(FAR, 9) == []
