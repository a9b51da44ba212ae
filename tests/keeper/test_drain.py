"""A node leaves without a loss: its log is entered to its end, what depends on it is copied, and only then it is expelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from powermail.index.contract import Fate
from powermail.index.sharing import MoveRow
from powermail.keeper.drain import Drainer, dependence, seconds_left
from powermail.keeper.following import LayoutFollower, told
from powermail.keeper.rebalance import REBALANCE, Rebalancer, excess
from powermail.storage.contract import Held, NodeState
from powermail.storage.layout import Layout, LayoutChange, LayoutRow, Standing, changed_layout, format_layout
from tests.keeper.rig import NODES, Rig, go

Body = Callable[[Rig], Coroutine[Any, Any, None]]
FOUR = {**NODES, "d": "east"}


async def begin(rig: Rig) -> Drainer:
    """The nodes of the rig are in the layout, and a keeper may empty them."""
    rig.following = LayoutFollower(rig.world, rig.cluster, rig.index, "/layout")  # type: ignore[attr-defined]
    rig.cluster._make = lambda row: rig.nodes.get(row.id)
    await rig.following.start([LayoutChange(name, node.group) for name, node in rig.nodes.items()])  # type: ignore[attr-defined]
    return Drainer(rig.world, rig.cluster, rig.index, rig.reconciler, rig.following)  # type: ignore[attr-defined]


async def say(rig: Rig, change: LayoutChange) -> None:
    """The operator changes the layout."""
    layout = await rig.index.layout()
    assert await rig.index.change_layout([change], layout.version) is not None
    await rig.following.refresh()  # type: ignore[attr-defined]


async def drain(rig: Rig, node: str, verb: str = "drain") -> None:
    """The operator wants it emptied; on another machine: this process has not looked yet."""
    await rig.index.change_layout([LayoutChange(node, state=Standing.DRAINING)])
    await rig.index.note_move(MoveRow(f"{verb} {node}", "stopping", 0, 0, rig.world.clock.now()))


async def phase(rig: Rig) -> str:
    moves = await rig.index.moves()
    return moves[0].phase if moves else ""


async def until_out(rig: Rig, drainer: Drainer, node: str) -> None:
    """Keepers work until the node is no member."""
    for _ in range(50):
        await drainer.step()
        while await rig.index.under_copied_total(rig.repairer.counted_groups(), 2) != (0, 0):
            await rig.repairer.step()
            await asyncio.sleep(1)
        if node not in {row.id for row in await rig.index.node_rows()}:
            return
        await asyncio.sleep(1)
    raise AssertionError(f"it is a member still: {await rig.index.moves()}")


def test_a_drained_node_holds_nothing_that_is_not_redundant_without_it() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        keys = [await rig.deliver("ab") for _ in range(5)] + [await rig.deliver("bc")]
        await drain(rig, "a")
        await drainer.step()
        assert await phase(rig) == "copying"
        found = await dependence(rig.index, rig.cluster.counted(), "a", "north", 2)
        assert found.copies == 5 and found.only_here == 0
        await rig.repairer.step()
        await drainer.step()
        assert await phase(rig) == "drained"
        for key in keys:
            assert len({*await rig.believed(key)} - {"a"}) == 2
        assert "a" in {row.id for row in await rig.index.node_rows()}, "it stays a member until it is removed"
        await say(rig, LayoutChange("a", state=Standing.ACTIVE))
        await drainer.step()
        assert await rig.index.moves() == []

    go(body)


def test_mail_that_only_the_leaver_has_and_the_index_does_not_know_is_kept() -> None:
    """The end of its log after it stopped taking mail counts, not what the index knows."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        unknown = rig.key()
        await rig.put("a", unknown)
        await drain(rig, "a", "remove")
        await until_out(rig, drainer, "a")
        assert await rig.fate(unknown) is Fate.LIVE
        assert {*await rig.believed(unknown)} == {"b", "c"}
        for node in "bc":
            await rig.nodes[node].verify(unknown)

    go(body)


def test_a_removed_node_is_expelled_for_ever_and_closed() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = await rig.deliver("ab")
        incarnation = rig.nodes["a"].incarnation
        await drain(rig, "a", "remove")
        await until_out(rig, drainer, "a")
        layout = await rig.index.layout()
        assert layout.row("a") is None and layout.rows[0].state is Standing.EXPELLED
        assert await rig.index.moves() == []
        assert set(rig.cluster.nodes) == {"b", "c"} and {*await rig.believed(key)} == {"b", "c"}
        assert incarnation in rig.index.mark().retired
        await asyncio.sleep(1)
        assert rig.nodes["a"].state is NodeState.CLOSED
        await rig.check()

    go(body)


def test_nothing_is_taken_behind_the_end_that_was_entered() -> None:
    """A delivery that was placed before is refused by the fence, so that its front end looks for another node."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        stale = rig.nodes["a"].stamp()
        assert stale is not None
        await drain(rig, "a")
        await drainer.step()
        node = rig.nodes["a"]
        asked: list[object] = []
        try:
            await node.commit(rig.key(), [], rig.commit(), 0, stale, 0)  # type: ignore[arg-type]
        except Exception as error:
            asked.append(error)
        assert asked, "a stamp from before the fence is refused"

    go(body)


def test_a_node_is_not_removed_when_too_few_groups_would_be_left() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await rig.deliver("ab")
        await drain(rig, "c", "remove")
        await drain(rig, "b", "remove")
        for _ in range(5):
            await drainer.step()
            await asyncio.sleep(1)
        assert {row.id for row in await rig.index.node_rows()} == {"a", "b", "c"}
        moves = {move.name: move for move in await rig.index.moves()}
        assert "only 1 groups would be left" in moves["remove c"].note
        assert moves["remove b"].total - moves["remove b"].done == 1, "the copy that cannot be made keeps it"

    go(body)


def test_a_drain_waits_for_a_node_that_is_away() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await rig.deliver("ab")
        rig.away("a")
        await rig.watch()
        await drain(rig, "a", "remove")
        await drainer.step()
        (move,) = await rig.index.moves()
        assert move.phase == "stopping" and "away" in move.note
        assert (await rig.row("a")).missing_since > 0, "since when it is not known what it took"
        await rig.back("a")
        await until_out(rig, drainer, "a")

    go(body)


def test_a_keeper_that_dies_leaves_a_drain_to_the_next() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        for _ in range(4):
            await rig.deliver("ab")
        await drain(rig, "a", "remove")
        await drainer.step()
        await rig.restart()
        drainer = await begin(rig)
        assert rig.cluster.standing("a") is Standing.DRAINING
        await until_out(rig, drainer, "a")
        rig.index.settled()
        assert len(await rig.listed()) == 4

    go(body)


def test_an_unreadable_part_of_its_log_keeps_a_node_in() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = rig.key()
        await rig.put("a", key)
        rig.nodes["a"].damage(key)
        await drain(rig, "a", "remove")
        for _ in range(3):
            await drainer.step()
        (move,) = await rig.index.moves()
        assert "cannot be read" in move.note and "a" in rig.cluster.nodes

    go(body)


def test_a_layout_that_changed_meanwhile_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare-and-set: the operator took the drain back while the keeper was about to end it."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await drain(rig, "a", "remove")
        change = rig.index.change_layout

        async def late(changes: Any, version: int | None = None) -> Any:
            if version is not None and changes[0].state is Standing.LEAVING:
                await change([LayoutChange("a", state=Standing.ACTIVE)])
            return await change(changes, version)

        monkeypatch.setattr(rig.index, "change_layout", late)
        await drainer.step()
        await drainer.step()
        assert rig.cluster.standing("a") is Standing.ACTIVE
        assert "a" in {row.id for row in await rig.index.node_rows()}
        assert await rig.index.moves() == []

    go(body)


def test_the_time_left_is_told_by_what_was_done() -> None:
    move = MoveRow("drain a", "copying", 100, 25, 1000.0)
    assert seconds_left(move, 1050.0) == 150.0
    assert seconds_left(move._replace(done=0), 1050.0) is None
    assert seconds_left(move._replace(done=100), 1050.0) is None


# -- following ----------------------------------------------------------------------------------------------------------


def test_a_process_goes_on_with_the_last_layout_while_the_index_is_away() -> None:
    """P14."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        await say(rig, LayoutChange("c", state=Standing.BLOCKED))
        await rig.restart()
        again = LayoutFollower(rig.world, rig.cluster, rig.index, "/layout")
        rig.index.fail_next(kept=False)
        fails = rig.index.layout

        async def away() -> Any:
            return rig.index.transact(lambda: None) or await fails()

        rig.index.layout = away  # type: ignore[method-assign]
        await again.start([])
        assert rig.cluster.standing("c") is Standing.BLOCKED and rig.cluster.layout.version == 2
        rig.index.layout = fails  # type: ignore[method-assign]
        assert await again.step() > 0

    go(body)


def test_a_newer_layout_that_a_node_knows_is_gone_by_and_nothing_else() -> None:
    """P14: who is cut off from the database hears of it from the node that refused him."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        before = rig.cluster.layout
        newer = Layout(before.version + 3, tuple(row for row in before.rows if row.id != "c"))
        octets = format_layout(newer, rig.index.cluster)
        for version, bad in (
            (before.version, format_layout(Layout(before.version, ()), rig.index.cluster)),
            (newer.version, octets[:-1]),
            (newer.version, format_layout(newer, "another")),
        ):
            rig.following.learn(version, bad)  # type: ignore[attr-defined]
            assert rig.cluster.layout == before
        rig.following.learn(newer.version, octets)  # type: ignore[attr-defined]
        assert rig.cluster.layout == newer and set(rig.cluster.nodes) == {"a", "b"}

    go(body)


def test_an_index_put_back_is_told_the_layout_that_it_lost() -> None:
    async def body(rig: Rig) -> None:
        await begin(rig)
        backup = rig.store.snapshot()
        await say(rig, LayoutChange("c", priority=7))
        await rig.restart(backup)
        await begin(rig)
        layout = await rig.index.layout()
        assert layout.version > 2 and layout.row("c").priority == 7  # type: ignore[union-attr]
        assert rig.cluster.layout == layout

    go(body)


def test_a_lost_change_of_the_layout_is_not_taken_for_the_one_that_was_made_in_its_place() -> None:
    """Both would have one number, and whoever knew of the first would empty and expel nodes by it for ever."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        before = rig.cluster.layout
        lost = changed_layout(before, [LayoutChange("c", state=Standing.DRAINING)], before.version)
        assert lost is not None
        rig.cluster.apply(lost)
        await rig.index.raise_epoch([], "a test says so")
        await rig.index.change_layout([LayoutChange("a", priority=9)])
        await rig.following.step()  # type: ignore[attr-defined]
        assert rig.cluster.layout == await rig.index.layout()
        assert rig.cluster.standing("c") is Standing.ACTIVE

    go(body)


def test_settings_that_name_a_node_that_was_expelled_do_not_bring_it_back_and_blocked_nodes_stay_blocked() -> None:
    async def body(rig: Rig) -> None:
        await rig.index.set_node_flags("b", True, None)  # by the release before
        await begin(rig)
        assert rig.cluster.standing("b") is Standing.BLOCKED
        assert await rig.index.expel("a")
        await rig.restart()
        await begin(rig)
        await rig.following.start([LayoutChange("a", "elsewhere", told="said anew")])  # type: ignore[attr-defined]
        assert set(rig.cluster.counted()) == {"b", "c"}

    go(body)


def test_what_settings_say_counts_again_only_when_it_changes() -> None:
    async def body(rig: Rig) -> None:
        await begin(rig)

        def said(group: str, priority: int, address: str = "") -> LayoutChange:
            return LayoutChange("c", group, address or None, priority=priority, told=told(group, priority, address))

        async def start(change: LayoutChange) -> LayoutRow | None:
            await rig.following.start([change])  # type: ignore[attr-defined]
            return (await rig.index.layout()).row("c")

        await start(said("west", 1))
        await say(rig, LayoutChange("c", "moved", priority=9))
        row = await start(said("west", 1))
        assert row is not None and (row.group, row.priority) == ("moved", 9), "the operator's word is the later one"
        row = await start(said("west", 1, "c.example:1"))
        assert row is not None and (row.group, row.priority, row.address) == ("moved", 9, "c.example:1")
        row = await start(said("west", 2, "c.example:1"))
        assert row is not None and (row.group, row.priority) == ("moved", 2)
        row = await start(said("east", 2, "c.example:1"))
        assert row is not None and (row.group, row.priority) == ("east", 2)

    go(body)


# -- rebalancing ----------------------------------------------------------------------------------------------------------


def test_copies_move_from_full_disks_to_empty_ones_and_stay_redundant() -> None:
    async def body(rig: Rig) -> None:
        await begin(rig)
        keys = [await rig.deliver("ab") for _ in range(30)]
        for node in rig.nodes.values():
            node.free_octets = 2000
        assert set(excess(rig.cluster)) == {"a", "b"}
        rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)
        assert await rebalancer.step() > 1, "nobody has asked for it"
        await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))
        for _ in range(20):
            await rebalancer.step()
            await rig.each(rig.collector.step)
        assert await rig.index.moves() == [], "it came to its end"
        counts = dict.fromkeys(rig.nodes, 0)
        for key in keys:
            believed = await rig.believed(key)
            assert len(believed) == 2
            for name in rig.nodes:
                assert (await rig.held(name, key) is Held.LIVE) is (name in believed)
                counts[name] += name in believed
        assert min(counts.values()) > 0 and max(counts.values()) < 30
        await rig.check()

    go(body)


def test_a_rebalancing_that_can_move_nothing_comes_to_its_end() -> None:
    """Every other group has a copy already."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        for _ in range(10):
            await rig.deliver("ab")
        for node in rig.nodes.values():
            node.free_octets = 1000
        rig.nodes["c"].group = "south"
        rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)
        await say(rig, LayoutChange("c", group="south"))
        rig.nodes["b"].free_octets = 1 << 30  # c takes what b has, and b has not too much
        await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))
        for _ in range(10):
            await rebalancer.step()
        assert await rig.index.moves() == [] and "nothing more can be moved" in "\n".join(rig.log.lines)

    go(body)
