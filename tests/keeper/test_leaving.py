"""What a node may not take with it: last copies that no belief tells of, checkpoints, notes; what is away does not count."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from powermail.base.errors import NotRedundant
from powermail.index.contract import Fate, Head
from powermail.index.sharing import MoveRow
from powermail.keeper.checkpoint import Checkpointer, heads_record, pages_of, write_heads, write_purged
from powermail.keeper.checkpoint_form import Kind, decode_head
from powermail.keeper.drain import Drainer
from powermail.keeper.rebalance import REBALANCE, Rebalancer
from powermail.storage.contract import START, Held
from powermail.storage.layout import LayoutChange, Standing
from tests.keeper.rig import DAY_S, Rig, go
from tests.keeper.test_drain import FOUR, begin, drain, say, until_out


async def note(rig: Rig, drainer: Drainer, steps: int = 4) -> str:
    """What keeps a node in after some looks; it is a member still."""
    for _ in range(steps):
        await drainer.step()
        await asyncio.sleep(1)
    (move,) = await rig.index.moves()
    assert move.name.split(" ")[1] in {row.id for row in await rig.index.node_rows()}
    assert rig.cluster.standing(move.name.split(" ")[1]) is Standing.DRAINING
    return move.note


async def kinds(rig: Rig, node: str) -> set[Kind]:
    """Kinds of the records that a node holds."""
    return {decode_head(octets).kind async for page in pages_of(rig.nodes[node]) for _, _, octets in page}


def test_a_suspected_copy_that_may_be_the_last_one_keeps_a_node_in() -> None:
    """P1: nobody believes in it, so nothing depends on it by what is counted."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = await rig.deliver("ab")
        rig.nodes["b"].lose(key)
        for node in "ab":
            await rig.index.note_bad(key, node, "a read failed")
        await drain(rig, "a", "remove")
        assert "suspected" in await note(rig, drainer)
        await rig.each(rig.collector.step)  # it is good
        await until_out(rig, drainer, "a")
        for node in "bc":
            await rig.nodes[node].verify(key)

    go(body)


def test_a_node_that_was_not_compared_whole_stays_in() -> None:
    """Law 12: what lies before its birth mark is believed only once it was looked at."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await rig.deliver("ab")
        rig.index._set_node("a", owes_compare=True)
        await drain(rig, "a", "remove")
        await drainer.step()
        await rig.repairer.step()
        assert "not compared" in await note(rig, drainer)
        await rig.index.note_compared("a")
        await until_out(rig, drainer, "a")

    go(body)


def test_what_lies_beside_the_leaver_only_on_nodes_that_are_away_keeps_it_in() -> None:
    """P1, P13: with it the last copy but one that can be read would go."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = await rig.deliver("abc")
        rig.away("b")
        await rig.watch()
        await drain(rig, "a", "remove")
        assert "away" in await note(rig, drainer)
        assert {"a", "c"} <= {*await rig.believed(key)}
        await rig.back("b")
        await until_out(rig, drainer, "a")

    go(body, FOUR)


def test_groups_that_are_away_are_none_to_leave_the_mail_to() -> None:
    """P6: what is left would take no mail."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        rig.away("b")
        await rig.watch()
        await drain(rig, "a", "remove")
        assert "only 1 groups would be left that are there" in await note(rig, drainer)

    go(body)


def test_checkpoints_are_written_to_others_before_their_holder_goes() -> None:
    """Law 13, P15: two holders that leave one after the other leave no mailbox without a checkpoint."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        checkpointer = Checkpointer(rig.world, rig.cluster, rig.index)
        await rig.deliver("bc")
        await say(rig, LayoutChange("c", state=Standing.BLOCKED))
        assert await checkpointer.write_due(rig.world.clock.now() + DAY_S) == 1
        await say(rig, LayoutChange("c", state=Standing.ACTIVE))
        assert Kind.WHOLE in await kinds(rig, "a") and Kind.WHOLE not in await kinds(rig, "c")
        await drain(rig, "a", "remove")
        assert "checkpoints" in await note(rig, drainer)
        assert await checkpointer.write_due(rig.world.clock.now()) == 1
        await until_out(rig, drainer, "a")
        assert Kind.WHOLE in await kinds(rig, "b") and Kind.WHOLE in await kinds(rig, "c")

    go(body)


def test_notes_that_lie_on_too_few_groups_without_the_leaver_are_handed_on() -> None:
    """Laws 11, 13: fewer groups are asked for them from then on."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        mark = await rig.index.proof(rig.index.connection)
        far = heads_record(rig.world, [Head("amy", "INBOX", 7, 1000, 1000, 1)])
        await write_heads([rig.nodes["a"], rig.nodes["b"]], 2, far, mark)
        rig.away("c")
        await rig.watch()
        await write_purged(rig.world, rig.cluster, rig.index, "bob")
        await rig.back("c")
        assert await kinds(rig, "c") == set()
        await drain(rig, "a", "remove")
        await until_out(rig, drainer, "a")
        assert await kinds(rig, "c") == {Kind.PURGED, Kind.HEADS}

    go(body)


@pytest.mark.parametrize("state", [Standing.DRAINING, Standing.LEAVING])
def test_a_note_on_a_node_that_is_about_to_go_does_not_count(state: Standing) -> None:
    """Law 13: PURGED lies on R groups that stay."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        await say(rig, LayoutChange("a", state=state))
        rig.away("c")
        await rig.watch()
        with pytest.raises(NotRedundant):
            await write_purged(rig.world, rig.cluster, rig.index, "bob")
        await rig.back("c")
        await write_purged(rig.world, rig.cluster, rig.index, "bob")

    go(body)


def test_no_copy_is_let_go_because_of_one_that_is_away() -> None:
    """P13: what is away may not come back; and nothing is copied in vain meanwhile."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        keys = [await rig.deliver("ab") for _ in range(10)]
        for node in rig.nodes.values():
            node.free_octets = 1000
        rig.away("b")
        await rig.watch()
        await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))
        rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)
        for _ in range(5):
            await rebalancer.step()
        assert await rig.index.drops("a", 99) == []
        assert [await rig.believed(key) for key in keys] == [("a", "b")] * len(keys)

    go(body)


def test_since_when_a_node_was_not_heard_is_forgotten_when_it_is_there() -> None:
    """Two keepers, or one that has just begun, may have noted it while it came back."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await rig.index.set_node_flags("a", None, 5.0)
        await drainer.step()
        assert (await rig.row("a")).missing_since == 0.0

    go(body)


def test_an_index_put_back_that_knows_an_expelled_node_as_a_member_ends_that() -> None:
    """Law 9: it would hold back forgetting, and count as a group that is away, for ever."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = await rig.deliver("ab")
        incarnation = rig.nodes["a"].incarnation
        backup = rig.store.snapshot()
        await drain(rig, "a", "remove")
        await until_out(rig, drainer, "a")
        await rig.restart(backup)
        drainer = await begin(rig)
        assert "a" in {row.id for row in await rig.index.node_rows()} and rig.cluster.standing("a") is Standing.EXPELLED
        await drainer.step()
        assert "a" not in {row.id for row in await rig.index.node_rows()}
        assert incarnation in rig.index.mark().retired and "a" not in await rig.believed(key)

    go(body)


def test_a_new_disk_that_entered_under_the_name_of_an_expelled_one_stays() -> None:
    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        assert await rig.index.expel("a")
        await rig.following.refresh()  # type: ignore[attr-defined]
        expelled = rig.cluster.layout
        assert await rig.index.change_layout([LayoutChange("a", "north")]) is not None
        await rig.index.admit_node("a", "north", "another", "boot", START, START)
        assert rig.cluster.layout == expelled, "this process has not looked yet"
        await drainer.step()
        assert (await rig.row("a")).incarnation == "another"

    go(body)


def test_a_node_whose_disk_is_full_or_dying_is_emptied_too() -> None:
    """It has no stamp, so that no commit comes in behind the end of its log: it is the one that is to be taken out."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        key = await rig.deliver("ab")
        rig.nodes["a"].fail()
        rig.nodes["a"].stamp = lambda: None  # type: ignore[method-assign]
        await drain(rig, "a", "remove")
        await until_out(rig, drainer, "a")
        assert {*await rig.believed(key)} == {"b", "c"}

    go(body)


def test_a_drain_that_was_taken_back_while_a_keeper_counted_stays_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting goes through all messages; this process may have seen the newer layout before it is done."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await drain(rig, "a", "remove")
        counting = rig.index.under_copied_total

        async def taken_back(groups: Mapping[str, str], required: int) -> tuple[int, int]:
            found = await counting(groups, required)
            if rig.cluster.standing("a") is Standing.DRAINING:
                await say(rig, LayoutChange("a", state=Standing.ACTIVE))
            return found

        monkeypatch.setattr(rig.index, "under_copied_total", taken_back)
        for _ in range(3):
            await drainer.step()
        assert rig.cluster.standing("a") is Standing.ACTIVE and await rig.index.moves() == []

    go(body)


def test_a_node_that_took_mail_between_two_drains_is_not_called_drained_before_that_is_entered() -> None:
    """The first drain's row may outlive it: what it says of the log is old."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await say(rig, LayoutChange("a", state=Standing.DRAINING))
        key = rig.key()
        await rig.put("a", key)
        await rig.index.note_move(MoveRow("drain a", "copying", 0, 0, rig.world.clock.now()))
        await drainer.step()
        assert await rig.fate(key) is Fate.LIVE

    go(body)


def test_a_bad_copy_is_kept_while_the_good_ones_are_away() -> None:
    """It may be the best there is, should they never come back."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        key = await rig.deliver("abc")
        rig.nodes["a"].damage(key)
        await rig.index.note_bad(key, "a", "a read failed")
        rig.away("b")
        await rig.watch()
        await rig.collector.step(rig.nodes["a"])
        assert await rig.held("a", key) is Held.LIVE
        await rig.back("b")
        await rig.collector.step(rig.nodes["a"])
        assert await rig.held("a", key) is not Held.LIVE

    go(body)


def test_settings_that_name_a_node_that_was_expelled_are_told_so_at_the_start() -> None:
    """A new disk under an old name would be left out without a word."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        assert await rig.index.expel("a")
        await rig.following.start([LayoutChange("a", "north"), LayoutChange("b", "south")])  # type: ignore[attr-defined]
        (line,) = [line for line in rig.log.lines if "was expelled" in line]
        assert "node replace a" in line

    go(body)
