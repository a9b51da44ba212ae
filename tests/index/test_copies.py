"""Belief, suspicion, orders and drops (laws 6, 8), nodes (laws 9, 12), forgetting (law 9)."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.contract import DropOrder, Fate, Index
from powermail.storage.contract import START, Dropped, End, Held, Origin, Position, Unread
from tests.index.support import (
    NODES,
    begin_again,
    deliver,
    elsewhere,
    end_of,
    inbox,
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

END = Position(9, 0)


async def delete_all(index: Index, account: str = "ann") -> None:
    box = await mailbox(index, account)
    await index.expunge(box, await uids(index, box))


async def confirm_all(index: Index) -> None:
    for row in await index.node_rows():
        await index.confirm_orders(row.id, await index.orders(row.id, 999), End(row.incarnation, row.end_seen))


async def nodes_of(index: Index, number: int) -> tuple[str, ...]:
    facts = await index.message(key(number))
    assert facts is not None
    return facts.nodes


# -- belief -------------------------------------------------------------------------------------------------------------


async def test_messages_in_too_few_groups_are_found_by_key(index: Index) -> None:
    await deliver(index, 1, 2, 3)
    await deliver(index, 4, nodes=("a", "b", "c"))
    groups = {"a": "north", "b": "north", "c": "west"}
    assert [facts.key for facts in await index.under_copied(groups, 2, b"", 9)] == [key(1), key(2), key(3)]
    assert [facts.key for facts in await index.under_copied(groups, 2, key(1), 1)] == [key(2)]
    assert await index.under_copied_total(groups, 2) == (3, 101 + 102 + 103)
    assert await index.under_copied(NODES, 2, b"", 9) == []
    assert await index.under_copied_total({"a": "north"}, 1) == (0, 0)
    assert [facts.key for facts in await index.under_copied({"c": "west"}, 1, b"", 9)] == [key(1), key(2), key(3)]


async def test_of_messages_in_too_few_groups_those_in_so_many_can_be_asked_for(index: Index) -> None:
    await deliver(index, 1, 5, nodes=("c",))
    await deliver(index, 2, 4, nodes=("a", "b"))
    await deliver(index, 3, 6, nodes=("b", "c"))
    await deliver(index, 7, nodes=("a", "b", "c"))
    groups = {"a": "north", "b": "south"}  # c does not count

    async def found(required: int, least: int, after: int = 0, limit: int = 9) -> list[bytes]:
        behind = key(after) if after else b""
        return [facts.key for facts in await index.under_copied(groups, required, behind, limit, least)]

    assert await found(1, 0) == [key(1), key(5)]
    assert await found(2, 1) == [key(3), key(6)]
    assert await found(3, 2) == [key(2), key(4), key(7)], "c is one more copy, and no group"
    assert await found(3, 1) == [key(2), key(3), key(4), key(6), key(7)]
    assert await found(3, 1, 2, 2) == [key(3), key(4)]
    assert await found(9, 3) == []
    await index.note_bad(key(2), "a", "checksum")
    assert await found(2, 1) == [key(2), key(3), key(6)]


async def test_dead_messages_are_not_under_copied(index: Index) -> None:
    await deliver(index, 1)
    await delete_all(index)
    await index.abort(key(2), ["a"])
    assert await index.under_copied(NODES, 3, b"", 9) == []
    assert await index.under_copied_total(NODES, 3) == (0, 0)


async def test_belief_grows_and_goes(index: Index) -> None:
    await deliver(index, 1, 2)
    assert await index.believe([key(1)], "c", end_of("c"))
    assert await index.believe([key(1)], "c", end_of("c")), "said twice is fine"
    assert await nodes_of(index, 1) == ("a", "b", "c")
    assert await index.copies_on("c", b"", 9) == [key(1)]
    assert await index.disbelieve("a", [key(1), key(2), key(7)], end_of("a"))
    assert [facts.nodes for facts in await index.messages([key(2), key(1), key(9)])] == [("b", "c"), ("b",)]
    assert await index.copies_on("a", b"", 9) == []
    assert await index.copies_on("b", key(1), 9) == [key(2)]
    assert await index.copies_on("b", b"", 1) == [key(1)]


async def test_of_several_copies_those_are_believed_whose_messages_live(index: Index) -> None:
    """One note for a batch of repairs: what died meanwhile keeps the others from nothing (law 8)."""
    await deliver(index, 1, 2)
    await index.abort(key(4), ["a"])
    assert await index.believe([key(4), key(2), key(9), key(1), key(2)], "c", end_of("c")) == [key(1), key(2)]
    assert await index.copies_on("c", b"", 9) == [key(1), key(2)]
    assert await index.orders("c", 9) == [key(4)]
    await index.confirm_orders("c", [key(9)], end_of("c", Position(5, 0)))
    await index.abort(key(5), ["a"])
    await deliver(index, 3)
    assert await index.believe([key(5), key(3)], "c", end_of("c", Position(4, 0))) == []
    assert key(5) in await index.orders("c", 9) and await nodes_of(index, 3) == ("a", "b")
    assert await index.believe([], "c", end_of("c", Position(5, 0))) == []


async def test_a_copy_of_what_died_meanwhile_is_not_believed_but_ordered_away(index: Index) -> None:
    """Repair against deletion: whoever adds belief requires live (law 8)."""
    await deliver(index, 1)
    await delete_all(index)
    await index.abort(key(2), ["a"])
    assert not await index.believe([key(1)], "c", end_of("c"))
    assert not await index.believe([key(2)], "c", end_of("c"))
    assert await index.orders("c", 9) == [key(1), key(2)]
    assert not await index.believe([key(3)], "c", end_of("c"))
    assert await index.orders("c", 9) == [key(1), key(2)], "without a row reconcile will order a drop"


async def test_a_note_of_another_disk_adds_no_belief(index: Index) -> None:
    """Law 8: the copy was made on a disk that is gone."""
    await deliver(index, 1)
    await index.admit_node("c", "west", "c-2", "boot", START, START)
    assert not await index.believe([key(1)], "c", end_of("c"))
    assert await nodes_of(index, 1) == ("a", "b")
    assert await index.believe([key(1)], "c", End("c-2", START))
    assert await nodes_of(index, 1) == ("a", "b", "c")


async def test_a_note_that_comes_after_later_news_of_the_node_adds_no_belief(index: Index) -> None:
    """Law 8: what was found may have gone since, by an order or a drop, or on a walk."""
    await deliver(index, 1)
    await reconcile(index, "c", Position(4, 0))
    assert not await index.believe([key(1)], "c", end_of("c", Position(3, 9)))
    assert await nodes_of(index, 1) == ("a", "b")
    assert await index.believe([key(1)], "c", end_of("c", Position(4, 0)))
    await index.confirm_orders("c", [key(9)], end_of("c", Position(5, 0)))
    assert not await index.believe([key(1)], "c", end_of("c", Position(4, 9)))
    await begin_again(index)
    assert await index.walked("c", incarnation("c"), Position(6, 0), Position(6, 0), await index.raise_round(), index.epoch)
    assert not await index.believe([key(1)], "c", end_of("c", Position(5, 0)))
    await delete_all(index)
    assert not await index.believe([key(1)], "c", end_of("c", Position(5, 0)))
    assert key(1) in await index.orders("c", 9), "of what is dead no copy may stay, however old the news of it"


async def test_a_bad_copy_counts_no_more_until_the_keeper_has_looked(index: Index) -> None:
    await deliver(index, 1)
    await index.note_bad(key(1), "a", "checksum")
    assert await nodes_of(index, 1) == ("b",)
    assert [facts.key for facts in await index.under_copied(NODES, 2, b"", 9)] == [key(1)]
    assert await index.suspects("a", b"", 9) == [key(1)]
    assert await index.suspects("a", key(1), 9) == []
    await reconcile(index, "a", END, [(1, place(1), Origin.MOVED)])
    await index.settle_inventory("a", end_of("a"), [(key(1), Held.LIVE, place(1))], START, {}, False)
    assert await nodes_of(index, 1) == ("b",), "that its record is there does not make it good"
    await index.clear_suspect(key(1), "a", end_of("a"))
    assert await index.suspects("a", b"", 9) == []
    assert await index.believe([key(1)], "a", end_of("a"))
    assert await nodes_of(index, 1) == ("a", "b")


async def test_a_disk_that_damages_copies_leaves_a_trace_also_when_they_were_repaired(index: Index) -> None:
    await deliver(index, 1, 2)
    assert await index.damages() == {}
    await index.note_bad(key(1), "a", "checksum")
    await index.note_bad(key(1), "a", "the same, seen again")
    await index.note_bad(key(9), "a", "of no message")
    await index.believe([key(1)], "a", end_of("a"))
    await index.note_bad(key(2), "a", "checksum")
    found = await index.damages()
    assert list(found) == ["a"]
    assert found["a"].copies == 2 and found["a"].last_at > 0
    await index.forget_damages("a")
    assert await index.damages() == {}
    await index.note_bad(key(2), "b", "checksum")
    await index.expel("b")
    assert await index.damages() == {}


async def test_a_suspected_copy_is_ordered_away_when_the_message_dies(index: Index) -> None:
    """Law 8: every node believed or suspected; also one that was never believed."""
    await deliver(index, 1)
    await index.note_bad(key(1), "a", "checksum")
    await index.note_bad(key(1), "c", "given up on")
    await delete_all(index)
    assert [await index.orders(node, 9) for node in "abc"] == [[key(1)]] * 3
    assert await index.suspects("a", b"", 9) == await index.suspects("c", b"", 9) == []


# -- orders and drops ---------------------------------------------------------------------------------------------------


async def test_orders_wait_until_their_node_confirms(index: Index) -> None:
    await deliver(index, 1, 2, 3)
    await delete_all(index)
    assert await index.orders("a", 2) == [key(1), key(2)]
    assert await index.orders_total("a") == (3, 0)
    await index.confirm_orders("a", [key(1), key(2)], end_of("a"))
    assert await index.orders("a", 9) == [key(3)]
    assert await index.orders("b", 9) == [key(1), key(2), key(3)]


async def test_what_was_confirmed_lies_before_an_end_that_counts_as_seen(index: Index) -> None:
    """Law 12: a disk that ends before it is an older one, although reconcile has not come so far."""
    await deliver(index, 1, 2)
    await reconcile(index, "a", Position(4, 0), [(3, place(3), Origin.REPAIR)])
    await delete_all(index)
    await index.confirm_orders("a", [key(1)], end_of("a", Position(5, 0)))
    row = (await index.node_rows())[0]
    assert (row.watermark, row.end_seen) == (Position(4, 0), Position(5, 0))
    await index.confirm_drops("a", await index.drops("a", 9), Dropped((), end_of("a", Position(6, 0))))
    await index.confirm_orders("a", [key(2)], end_of("a", Position(5, 5)))
    assert (await index.node_rows())[0].end_seen == Position(6, 0), "it never falls"
    assert await index.orders_total("a") == (0, 0)


async def test_another_disk_confirms_nothing(index: Index) -> None:
    """What was written on a disk that is gone says nothing about the one in its place."""
    await deliver(index, 1)
    await reconcile(index, "a", Position(4, 0), [(3, place(3), Origin.REPAIR)])
    await delete_all(index)
    await index.admit_node("a", "north", "a-2", "boot", START, START)
    await index.confirm_orders("a", [key(1)], end_of("a"))
    await index.confirm_drops("a", await index.drops("a", 9), Dropped((), end_of("a")))
    assert await index.orders_total("a") == (1, 1)
    assert (await index.node_rows())[0].end_seen == START
    await index.confirm_orders("d", [key(1)], End("d-1", END))  # nor does a node that is no member


async def test_a_message_dies_with_its_last_reference_only(index: Index) -> None:
    await deliver(index, 1, to=[inbox(), inbox("bob"), elsewhere()])
    await delete_all(index)
    await delete_all(index, "bob")
    assert (await index.fates([key(1)])) == {key(1): Fate.LIVE}
    assert await index.orders("a", 9) == []
    await index.finish(await index.queue_rows(0, 9))
    assert (await index.fates([key(1)])) == {key(1): Fate.DEAD}
    assert await index.orders("a", 9) == [key(1)]


async def test_confirming_a_drop_removes_the_belief(index: Index) -> None:
    """Law 6: the key may have become live meanwhile; that copy of it is gone."""
    await reconcile(index, "c", END, [(1, place(1), Origin.REPAIR), (2, place(2), Origin.MOVED)])
    assert await index.orders_total("c") == (0, 2)
    await deliver(index, 1)
    await index.believe([key(1)], "c", end_of("c"))
    await index.confirm_drops("c", await index.drops("c", 1), Dropped((), end_of("c")))
    assert await nodes_of(index, 1) == ("a", "b")
    assert await index.drops("c", 9) == [DropOrder(key(2), place(2))]


async def test_a_drop_leaves_the_belief_in_another_copy_that_is_live_there(index: Index) -> None:
    """Law 6: the node says which, when it confirms."""
    await deliver(index, 1, 2, nodes=("b", "c"))
    await reconcile(index, "c", END, [(3, place(3), Origin.REPAIR), (4, place(4), Origin.REPAIR)])
    await deliver(index, 3, 4)
    for number in (3, 4):
        assert await index.believe([key(number)], "c", end_of("c"))
    await index.confirm_drops("c", await index.drops("c", 9), Dropped((key(4),), end_of("c")))
    assert await nodes_of(index, 3) == ("a", "b")
    assert await nodes_of(index, 4) == ("a", "b", "c")
    assert await index.orders_total("c") == (0, 0)


# -- nodes --------------------------------------------------------------------------------------------------------------


async def test_a_new_incarnation_begins_its_round_anew_and_keeps_orders_and_beliefs(index: Index) -> None:
    await deliver(index, 1, 2)
    box = await mailbox(index)
    await index.expunge(box, [1])
    await reconcile(index, "a", END, [(3, place(3), Origin.REPAIR)])
    await scan_all(index)
    await index.set_node_flags("a", True, 7.0)
    assert next(row for row in await index.node_rows() if row.id == "a").missing_since == 7.0
    await index.admit_node("a", "north", "a-2", "boot2", Position(4, 0), Position(5, 0))
    row = (await index.node_rows())[0]
    assert row[:8] == ("a", "north", "a-2", Position(4, 0), Position(5, 0), "boot2", 0, False)
    assert row.blocked, "the operator's word stays"
    assert await index.orders("a", 9) == [key(1)]
    assert await index.drops("a", 9) == [DropOrder(key(3), place(3))]
    assert await index.copies_on("a", b"", 9) == [key(2)]


async def test_a_boot_is_noted_for_the_incarnation_it_belongs_to(index: Index) -> None:
    await index.note_boot("a", incarnation("a"), ["boot", "second"])
    await index.note_boot("b", "another", ["boot", "second"])
    assert [row.boot for row in await index.node_rows()] == ["second", "boot", "boot"]


async def test_flags_of_a_node_are_set_each_by_itself(index: Index) -> None:
    await index.set_node_flags("b", True, None)
    await index.set_node_flags("b", None, 5.0)
    row = (await index.node_rows())[1]
    assert (row.blocked, row.missing_since) == (True, 5.0)
    await index.set_node_flags("b", False, 0.0)
    row = (await index.node_rows())[1]
    assert (row.blocked, row.missing_since) == (False, 0.0)


async def test_expulsion_ends_all_that_was_known_of_a_node_and_retires_it_for_ever(index: Index) -> None:
    """Law 9."""
    await deliver(index, 1, 2, 3, nodes=("a", "b", "c"))
    await index.expunge(await mailbox(index), [1])
    await index.note_bad(key(2), "c", "checksum")
    await reconcile(index, "c", END, [(4, place(4), Origin.REPAIR)], unread=[Unread(START, 9)])
    await index.expel("c")
    assert [row.id for row in await index.node_rows()] == ["a", "b"]
    assert await index.orders_total("c") == (0, 0)
    assert await index.copies_on("c", b"", 9) == await index.suspects("c", b"", 9) == []
    assert await index.unread("c", 9) == []
    assert await nodes_of(index, 3) == ("a", "b")
    assert index.mark().retired == (incarnation("c"),)
    await index.confirm_orders("a", [key(1)], end_of("a"))
    await index.confirm_orders("b", [key(1)], end_of("b"))
    await scan_all(index)
    assert await index.forget(9) == 1, "a node that was expelled holds nothing back"


async def test_notes_of_what_could_not_be_read_are_kept_until_cleared(index: Index) -> None:
    first, second = Unread(Position(1, 0), 10), Unread(Position(2, 0), 20)
    await reconcile(index, "a", END, unread=[second, first])
    assert await index.unread("a", 9) == [first, second]
    assert await index.unread("a", 1) == [first]
    assert await index.unread("b", 9) == []
    await reconcile(index, "a", END, read=[first])
    assert await index.unread("a", 9) == [second]


# -- forgetting (law 9) -------------------------------------------------------------------------------------------------


async def dead(index: Index) -> None:
    """A dead and an aborted key that every node has confirmed."""
    await deliver(index, 1)
    await delete_all(index)
    await index.abort(key(2), ["a"])
    await confirm_all(index)
    assert await index.dead_total() == 2


async def test_what_died_before_a_round_that_all_nodes_were_scanned_for_is_forgotten(index: Index) -> None:
    await dead(index)
    await scan_all(index)
    assert await index.forgotten([key(1), key(3)]) == [key(3)]
    assert await index.forget(1) == 1
    assert await index.forget(9) == 1
    assert await index.dead_total() == 0
    assert await index.forgotten([key(1), key(2)]) == [key(1), key(2)]


async def test_live_messages_are_never_forgotten(index: Index) -> None:
    await deliver(index, 1)
    await scan_all(index)
    await scan_all(index)
    assert await index.forget(9) == 0
    assert await index.forgotten([key(1)]) == []


async def test_what_died_in_the_round_that_was_scanned_for_is_kept(index: Index) -> None:
    await scan_all(index)
    await dead(index)
    assert await index.forget(9) == 0
    await scan_all(index)
    assert await index.forget(9) == 2


async def test_one_member_that_was_not_scanned_holds_forgetting_back(index: Index) -> None:
    await dead(index)
    number = await index.raise_round()
    await reconcile(index, "a", START, round_=number)
    await reconcile(index, "b", START, round_=number)
    assert await index.forget(9) == 0
    await reconcile(index, "c", START, round_=number)
    assert await index.forget(9) == 2


async def test_an_order_holds_forgetting_back_and_raises_the_round(index: Index) -> None:
    """Law 8: whoever inserts an order raises the key's round in the same transaction."""
    await dead(index)
    await scan_all(index)
    await reconcile(index, "c", END, [(1, place(1), Origin.DELIVERY)])
    assert await index.forget(9) == 1, "the other one"
    await index.confirm_orders("c", [key(1)], end_of("c"))
    assert await index.forget(9) == 0, "it was ordered in this round: a new one must see the log"
    await scan_all(index)
    assert await index.forget(9) == 1


async def test_an_unread_note_holds_forgetting_back(index: Index) -> None:
    await dead(index)
    note = Unread(Position(1, 0), 10)
    await reconcile(index, "b", END, unread=[note])
    await scan_all(index)
    assert await index.forget(9) == 0
    await reconcile(index, "b", await watermark(index, "b"), read=[note])
    assert await index.forget(9) == 2


async def test_an_owed_walk_holds_forgetting_back(index: Index) -> None:
    await dead(index)
    await scan_all(index)
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    assert all(row.owes_walk for row in await index.node_rows())
    await index.caught_up(index.epoch)
    assert await index.forget(9) == 0
    await walk_all(index)
    assert await index.forget(9) == 2


@pytest.mark.parametrize("how", ["new", "again"])
async def test_a_node_that_comes_anew_holds_forgetting_back(index: Index, how: str) -> None:
    await dead(index)
    await scan_all(index)
    if how == "new":
        await index.admit_node("d", "east", "d-1", "boot", START, START)
    else:
        await index.admit_node("a", "north", "a-2", "boot", START, START)
    assert await index.forget(9) == 0
    await scan_all(index)
    assert await index.forget(9) == 2


async def test_without_nodes_nothing_is_forgotten(index: Index) -> None:
    await index.abort(key(1), [])
    for node in NODES:
        await index.expel(node)
    await index.raise_round()
    assert await index.forget(9) == 0


async def test_a_node_admitted_while_the_index_catches_up_owes_a_walk(index: Index) -> None:
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    await index.admit_node("d", "east", "d-1", "boot", START, START)
    assert next(row for row in await index.node_rows() if row.id == "d").owes_walk
    await walk_all(index)
    await index.admit_node("e", "east", "e-1", "boot", START, START)
    assert not next(row for row in await index.node_rows() if row.id == "e").owes_walk


async def test_a_walk_counts_for_the_incarnation_that_was_walked(index: Index) -> None:
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    number = await index.raise_round()
    assert not await index.walked("a", "another", END, END, number, index.epoch)
    assert await index.walked("a", incarnation("a"), Position(3, 0), END, number, index.epoch)
    row = (await index.node_rows())[0]
    assert (row.owes_walk, row.watermark, row.end_seen, row.scan_round) == (False, Position(3, 0), END, number)
    await walk_all(index)


async def test_a_writer_slot_is_pruned_by_a_round_completed_after_it_stopped(index: Index) -> None:
    """Law 10: what nodes remember of it proves a loss until then, and nothing afterwards."""
    await deliver(index, 1)
    mark = index.mark()
    await scan_all(index)
    await index.forget(limits.COLLECT_BATCH)
    assert set(mark.slots) <= set(index.mark().slots), "its process goes on"
    assert await index.lost(mark) == ""


async def test_commit_records_of_what_is_known_are_not_asked_for(index: Index) -> None:
    await begin_again(index)
    await deliver(index, 1)
    found = await index.settle_inventory("c", end_of("c"), [(key(1), Held.LIVE, place(1))], START, {}, True)
    assert (found.moved, found.missing) == (True, ())


async def test_the_same_incarnation_admitted_again_is_where_it_was(index: Index) -> None:
    await reconcile(index, "a", END)
    await index.admit_node("a", "east", incarnation("a"), "boot2", START, START)
    row = (await index.node_rows())[0]
    assert (row.watermark, row.end_seen, row.group, row.boot) == (END, END, "east", "boot2")
    assert index.mark().retired == ()


async def test_a_disk_that_was_replaced_or_expelled_never_comes_back_as_it_is(index: Index) -> None:
    """Law 9: it returns only emptied, with another incarnation."""
    await index.admit_node("a", "north", "a-2", "boot", START, START)
    await index.expel("b")
    assert index.mark().retired == (incarnation("a"), incarnation("b"))
    for node in ("a", "b"):
        with pytest.raises(OperatorError):
            await index.admit_node(node, NODES[node], incarnation(node), "boot", START, START)
    await index.admit_node("b", "south", "b-2", "boot", START, START)
    assert [row.incarnation for row in await index.node_rows()] == ["a-2", "b-2", incarnation("c")]


async def test_a_walk_that_was_owed_is_owed_by_the_disk_that_comes_in_its_place(index: Index) -> None:
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    await index.caught_up(index.epoch)
    await index.admit_node("a", "north", "a-2", "boot", START, START)
    assert (await index.node_rows())[0].owes_walk
    await walk_all(index)
