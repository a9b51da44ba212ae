"""The layout: which nodes there are; who may change it from which view; moves that outlive their keeper."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.contract import DropOrder, Index
from powermail.index.sharing import HAND_ON, MoveRow
from powermail.storage.contract import START, Position, Receipt
from powermail.storage.layout import NO_LAYOUT, Layout, LayoutChange, LayoutRow, Standing, may_be_lost
from tests.index.support import FAR, RIGS, SHARED, Rig, admit, deliver, incarnation, key, place, reconcile

A, B = LayoutChange("a", "north"), LayoutChange("b", "south", "b.example:2700", "here", 2)


async def made(index: Index) -> Layout:
    """A layout of two nodes."""
    found = await index.change_layout([B, A])
    assert found is not None
    return found


async def holders(index: Index) -> tuple[str, ...]:
    """Nodes that are believed to hold the first message."""
    facts = await index.message(key(1))
    assert facts is not None
    return facts.nodes


async def test_a_new_index_has_no_layout(index: Index) -> None:
    assert await index.layout() == NO_LAYOUT and await index.layout_version() == 0


async def test_nodes_are_entered_from_any_view_and_each_change_counts_once(index: Index) -> None:
    layout = await made(index)
    rows = (LayoutRow("a", "north"), LayoutRow("b", "south", "b.example:2700", "here", 2))
    assert layout == await index.layout() == Layout(1, rows)
    assert await index.change_layout([A, B]) == layout, "nothing differs"
    assert await index.layout_version() == 1
    for number, change in enumerate(
        [LayoutChange("a", state=Standing.BLOCKED), LayoutChange("b", priority=1), LayoutChange("a", state=Standing.ACTIVE),
         LayoutChange("a", state=Standing.DRAINING), LayoutChange("b", address="c.example:1", site="there")], 2,
    ):  # fmt: skip
        changed = await index.change_layout([change])
        assert changed is not None and changed.version == number == await index.layout_version()
    assert (await index.layout()).rows == (
        LayoutRow("a", "north", state=Standing.DRAINING),
        LayoutRow("b", "south", "c.example:1", "there", 1),
    )


DESTRUCTIVE = [
    LayoutChange("a", group="south"),
    LayoutChange("a", state=Standing.LEAVING),
    LayoutChange("a", state=Standing.EXPELLED),
]


@pytest.mark.parametrize("change", DESTRUCTIVE)
async def test_what_may_cost_redundancy_names_the_version_that_it_was_decided_by(index: Index, change: LayoutChange) -> None:
    """Compare-and-set: two that decide by one view cannot both."""
    layout = await made(index)
    with pytest.raises(OperatorError):
        await index.change_layout([change])
    assert await index.change_layout([change], layout.version - 1) is None
    assert await index.change_layout([change], layout.version + 1) is None
    assert await index.layout() == layout
    changed = await index.change_layout([change], layout.version)
    assert changed is not None and changed.version == layout.version + 1
    assert await index.change_layout([change], layout.version) is None, "by that view it was changed once"


async def test_a_member_is_of_the_group_that_the_layout_says(index: Index) -> None:
    layout = await made(index)
    await index.change_layout([LayoutChange("b", group="west")], layout.version)
    assert [row.group for row in await index.node_rows()] == ["north", "west", "west"]


async def test_one_bad_change_leaves_all_undone(index: Index) -> None:
    layout = await made(index)
    for bad in (LayoutChange("z", priority=3), LayoutChange("a", group="south")):
        with pytest.raises(OperatorError):
            await index.change_layout([LayoutChange("b", priority=9), bad])
    assert await index.layout() == layout


async def test_a_node_that_leaves_does_not_come_back_by_a_stale_view(index: Index) -> None:
    layout = await made(index)
    layout = await index.change_layout([LayoutChange("a", state=Standing.LEAVING)], layout.version) or layout
    for state in (Standing.ACTIVE, Standing.BLOCKED, Standing.DRAINING):
        with pytest.raises(OperatorError):
            await index.change_layout([LayoutChange("a", state=state)])
    assert await index.layout() == layout


async def test_expulsion_ends_the_row_in_the_same_transaction(index: Index) -> None:
    await made(index)
    await deliver(index, 1, nodes=("a", "b"))
    assert await index.expel("a", 7) is False, "decided by another view"
    assert await holders(index) == ("a", "b") and incarnation("a") not in index.mark().retired
    assert await index.expel("a", 1) is True
    layout = await index.layout()
    assert layout.version == 2 and [row.id for row in layout.members()] == ["b"] and layout.row("a") is None
    assert layout.rows[0] == LayoutRow("a", "north", state=Standing.EXPELLED), "settings that name it do not bring it back"
    assert await holders(index) == ("b",) and incarnation("a") in index.mark().retired
    again = await index.change_layout([LayoutChange("a", "west")])
    assert again is not None and again.row("a") == LayoutRow("a", "west"), "a new disk of that name may enter"
    assert await index.expel("nobody") is True


async def test_an_index_that_lost_changes_of_the_layout_is_told_them_again(index: Index) -> None:
    layout = await made(index)
    assert await index.restore_layout(layout) == layout and await index.layout_version() == 1, "it is no older"
    later = Layout(7, (LayoutRow("a", "north", priority=4), LayoutRow("z", "west")))
    put_back = Layout(7 + limits.LAYOUT_JUMP, later.rows)
    assert await index.restore_layout(later) == put_back == await index.layout()
    assert await index.restore_layout(later) == put_back, "once"


async def test_who_knows_more_than_the_one_that_put_a_layout_back_goes_by_that_all_the_same(index: Index) -> None:
    """Two layouts with one number would never be noticed: one process had seen a change that the other had not."""
    await made(index)
    earlier, last = Layout(7, (LayoutRow("a", "north"),)), Layout(8, (LayoutRow("a", "south"),))
    put_back = await index.restore_layout(earlier)
    assert put_back.version > last.version
    assert await index.restore_layout(last) == put_back == await index.layout()


async def test_no_layout_of_one_epoch_has_a_number_of_another(index: Index) -> None:
    """Laws 9, 11: what was changed in a history that is lost has numbers too, and who was paused or cut off goes by them."""
    layout = await made(index)
    lost = Layout(layout.version + 9, layout.rows)
    await index.raise_epoch([], "a test says so")
    raised = await index.layout()
    assert raised.rows == layout.rows and raised.version > lost.version and raised.version == await index.layout_version()
    for version in (layout.version, layout.version + 1, lost.version):  # decided in the history before
        assert await index.change_layout([LayoutChange("a", state=Standing.LEAVING)], version) is None
        assert await index.expel("a", version) is False
    assert await index.layout() == raised
    changed = await index.change_layout([LayoutChange("a", state=Standing.LEAVING)], raised.version)
    assert changed is not None and changed.version > raised.version and await index.layout_fence() == changed.version
    await index.raise_epoch([], "a test says so")
    again = await index.layout()
    assert again.rows == changed.rows and again.version > changed.version + limits.LAYOUT_JUMP
    assert await index.expel("a", again.version) and await index.layout_version() > again.version


async def test_changes_of_the_layout_that_were_lost_are_told_again_in_the_next_epoch_as_well(index: Index) -> None:
    layout = await made(index)
    later = Layout(layout.version + 1, (LayoutRow("a", "north", state=Standing.LEAVING),))
    await index.raise_epoch([], "a test says so")
    raised = await index.layout()
    assert may_be_lost(later, raised)
    put_back = await index.restore_layout(later)
    assert put_back == await index.layout() and put_back.rows == later.rows and put_back.version > raised.version
    assert await index.restore_layout(layout) == put_back, "once"
    await index.raise_epoch([], "a test says so")
    changed = await index.change_layout([LayoutChange("z", "west")])
    last = Layout(later.version + 1, layout.rows)
    assert changed is not None and may_be_lost(last, changed)
    assert await index.restore_layout(last) == changed, "what was changed in this epoch stays"


@pytest.mark.parametrize("kind", sorted(RIGS))
async def test_the_layout_is_there_after_a_start(room: Path, kind: str) -> None:
    rig: Rig = RIGS[kind](room, 1)
    index = await rig.start()
    layout = await made(index)
    move = MoveRow("drain a", "copying", 9, 4, 5.5, b"\x01\x00", "2 left")
    await index.note_move(move._replace(done=1))
    await index.note_move(move)
    await index.note_move(MoveRow("rebalance", "copying", 1, 0, 1.0))
    await rig.die()
    index = await rig.start()
    assert await index.layout() == layout and await index.layout_version() == 1
    assert await index.moves() == [move, MoveRow("rebalance", "copying", 1, 0, 1.0)]
    await index.end_move("rebalance")
    await index.end_move("rebalance")
    assert await index.moves() == [move]
    await rig.die()


@pytest.mark.parametrize("kind", sorted(SHARED))
async def test_of_many_that_decide_by_one_view_one_is_obeyed(room: Path, kind: str) -> None:
    rig = SHARED[kind](room, 1)
    index = await rig.start()
    layout = await made(index)
    wanted = [index.change_layout([LayoutChange("a", group=f"g{n}")], layout.version) for n in range(8)]
    additive = [index.change_layout([LayoutChange(f"n{n}", "new")]) for n in range(4)]
    found = await asyncio.gather(*wanted, *additive)
    assert sum(each is not None for each in found[:8]) <= 1 and all(each is not None for each in found[8:])
    after = await index.layout()
    assert after.version == layout.version + sum(each is not None for each in found)
    assert {row.id for row in after.rows} == {"a", "b", "n0", "n1", "n2", "n3"}, "no change is lost"
    await rig.die()


async def test_a_copy_is_let_go_only_when_enough_groups_have_another(index: Index) -> None:
    """Laws 6, 8: the end of the belief and the drop of exactly this copy are one transaction."""
    await deliver(index, 1, nodes=("a", "b", "c"))
    groups = {"a": "north", "b": "south", "c": "west"}
    copy = Receipt("a", incarnation("a"), place(1))
    for bad, among, required in (
        (copy._replace(incarnation="another"), groups, 2),
        (copy, {"a": "north", "b": "south"}, 2),
        (copy, {**groups, "c": "south"}, 2),
        (copy._replace(node="z"), groups, 1),
        (copy, groups, 3),
    ):
        assert await index.let_go(key(1), bad, FAR, among, required) is False
    assert await index.let_go(key(9), copy, FAR, groups, 2) is False
    await reconcile(index, "a", Position(4, 0))
    assert await index.let_go(key(1), copy, Position(3, 9), groups, 2) is False, "the belief may be in a later copy by now"
    assert await holders(index) == ("a", "b", "c") and await index.drops("a", 9) == []
    assert await index.let_go(key(1), copy, FAR, groups, 2) is True
    assert await holders(index) == ("b", "c") and await index.drops("a", 9) == [DropOrder(key(1), place(1))]
    assert await index.let_go(key(1), copy, FAR, groups, 2) is False, "it is not believed there any more"


# -- what those who went by an older layout may do no more, and what a disk that went leaves to do --------------------------


async def test_what_may_cost_redundancy_raises_the_fence_and_nothing_else_does(index: Index) -> None:
    """A node that was away meanwhile is told so when it is back: the index remembers below which version nobody may go."""
    layout = await made(index)
    assert await index.layout_fence() == 0
    for change in (LayoutChange("a", state=Standing.DRAINING), LayoutChange("b", priority=7), LayoutChange("c", "west")):
        changed = await index.change_layout([change])
        assert changed is not None
        layout = changed
    assert await index.layout_fence() == 0, "what is new, drained or used later costs nothing"
    for change in (LayoutChange("b", "north"), LayoutChange("a", state=Standing.LEAVING)):
        changed = await index.change_layout([change], layout.version)
        assert changed is not None
        layout = changed
        assert await index.layout_fence() == layout.version
    assert await index.change_layout([LayoutChange("b", priority=1)]) is not None
    assert await index.layout_fence() == layout.version
    assert await index.expel("a")
    assert await index.layout_fence() == await index.layout_version() == layout.version + 2
    put_back = await index.restore_layout(Layout(50, layout.rows))
    assert await index.layout_fence() == put_back.version, "nobody knows what was changed between"


async def test_a_disk_that_goes_leaves_a_move_that_hands_on_what_it_had(rig: Rig) -> None:
    """In the transaction that ends its membership: whoever dies behind it has forgotten nothing."""
    index = rig.index
    await admit(index)
    assert await index.moves() == []
    await index.admit_node("a", "north", incarnation("a"), "later boot", START, START)
    assert await index.moves() == [], "the same disk, opened again"
    await index.admit_node("a", "north", "another", "boot", START, START)
    rig.clock.at += 5
    assert await index.expel("b")
    assert await index.expel("never came")
    first, second = await index.moves()
    assert (first.name, second.name) == (f"{HAND_ON} a", f"{HAND_ON} b") and second.began_at == first.began_at + 5
    await index.end_move(first.name, first.began_at - 1)
    assert await index.moves() == [first, second], "it began anew since it was looked at"
    await index.end_move(first.name, first.began_at)
    await index.end_move(second.name)
    assert await index.moves() == []
