"""Forgetting: rounds (law 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from powermail.base import limits
from powermail.base.errors import CommitRefused, NodeTrouble
from powermail.index.contract import Fate
from powermail.keeper.walk import Walker
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import Chunk, Held, Mark, Origin, Position, Stamp
from tests.keeper.rig import DAY_S, Rig, go


def test_dead_rows_are_forgotten_after_a_round() -> None:
    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("ab") for _ in range(3)]
        await rig.index.abort(aborted := rig.key(), ["a", "b"])
        for key in keys:
            await rig.delete(key)
        await rig.keep(30)
        assert await rig.index.dead_total() == 4
        await rig.keep(limits.ROUND_INTERVAL_S + 100)
        assert await rig.index.dead_total() == 0
        assert await rig.held("a", aborted) is Held.DEAD, "tombstones stay longer"

    go(body)


def test_abort_rows_are_not_forgotten_while_a_node_is_away() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("c", key)
        await rig.index.abort(key, ["a", "b", "c"])
        rig.away("c")
        await rig.keep(2000)
        rig.world.clock.skew_s += 8 * DAY_S  # type: ignore[attr-defined]
        await rig.keep(2000)
        assert await rig.fate(key) is Fate.ABORTED
        assert any("node c is away" in alarm and "expel c" in alarm for alarm in rig.forgetter.alarms)
        await rig.back("c")
        await rig.keep(3000)
        assert await rig.held("c", key) is Held.DEAD
        assert await rig.fate(key) is None
        assert rig.forgetter.alarms == []
        assert await rig.listed() == []

    go(body)


def test_a_commit_that_slept_through_a_round_is_refused() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.index.abort(key, ["b"])
        await rig.each(rig.collector.step)
        await rig.forgetter.step()
        stamp = rig.nodes["a"].stamp()
        await asyncio.sleep(1)
        rig.forgetter._raised_at = float("-inf")  # without the wait, which is comfort
        await rig.each(rig.forgetter.scan)
        chunk = Chunk(0, 0, b"x", 1)
        try:
            await rig.nodes["a"].commit(key, [chunk], rig.commit(), 1, stamp, Origin.DELIVERY)
        except CommitRefused:
            pass
        else:
            raise AssertionError("a stamp that is older than the fence")
        await rig.keep(1000)
        assert await rig.fate(key) is None and await rig.held("a", key) is Held.ABSENT

    go(body)


def test_a_stretch_that_cannot_be_read_holds_forgetting_back() -> None:
    async def body(rig: Rig) -> None:
        hidden = rig.key()
        await rig.put("a", hidden)
        rig.nodes["a"].hide(hidden)
        await rig.delete(await rig.deliver("ab"))
        await rig.keep(2000)
        assert await rig.index.dead_total() == 1
        assert any("cannot be read" in alarm for alarm in rig.forgetter.alarms)
        rig.nodes["a"].hide(hidden, False)
        await rig.keep(2000)
        assert await rig.index.dead_total() == 0
        assert await rig.listed() == [hidden]

    go(body)


def test_a_node_without_a_stamp_is_not_scanned_for_a_round() -> None:
    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        await rig.forgetter.step()
        await asyncio.sleep(100)
        rig.nodes["a"].stamp = lambda: None  # type: ignore[method-assign]
        try:
            await rig.forgetter.scan(rig.nodes["a"])
        except NodeTrouble as error:
            assert "stamp" in str(error)
        else:
            raise AssertionError("it must not count as scanned")
        assert (await rig.row("a")).scan_round == 0

    go(body)


def test_a_new_incarnation_is_scanned_anew() -> None:
    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        await rig.keep(60)
        await rig.forgetter.step()
        await rig.nodes["c"].close()
        await rig.nodes["c"].initialise()
        await rig.watch()
        assert (await rig.row("c")).scan_round == 0
        await rig.keep(2000)
        assert await rig.index.dead_total() == 0

    go(body)


def heard_before(node: MemoryNode) -> None:
    """A node from far: the stamp that is known was heard by a ping, some time ago."""
    known, now = node.stamp(), node.stamp

    async def fresh() -> Stamp | None:
        return now()

    node.stamp, node.fresh_stamp = lambda: known, fresh  # type: ignore[method-assign]


def test_a_round_and_a_walk_name_a_stamp_that_is_younger_than_the_round() -> None:
    """Laws 9, 11: what was stamped between the last ping and the round would pass the fence."""

    async def body(rig: Rig) -> None:
        fenced: dict[str, Stamp] = {}
        for name, node in rig.nodes.items():
            heard_before(node)
            node.fence = partial(_named, fenced, node.fence, name)  # type: ignore[method-assign]
        await asyncio.sleep(1)
        between = {name: Stamp("", rig.world.clock.monotonic()) for name in rig.nodes}
        await asyncio.sleep(0.001)
        await rig.delete(await rig.deliver("ab"))
        await rig.forgetter.step()
        rig.forgetter._raised_at = float("-inf")
        await rig.each(rig.forgetter.scan)
        assert fenced.keys() == rig.nodes.keys() and all(fenced[name].at > between[name].at for name in fenced)
        fenced.clear()
        walker, node = Walker(rig.world, rig.index), rig.nodes["a"]
        await walker.walk(node, await rig.row("a"), await node.facts())
        assert fenced["a"].at > between["a"].at

    go(body)


async def _named(fenced: dict[str, Stamp], fence: Callable[[Stamp], Awaitable[Position]], name: str, stamp: Stamp) -> Position:
    fenced[name] = stamp
    return await fence(stamp)


def test_a_node_knows_the_mark_before_it_is_fenced_for_a_round() -> None:
    """Law 10: a round says which writer slots are no more, so the scan brings the mark that says which there are."""

    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        await rig.forgetter.step()
        await asyncio.sleep(100)
        node, done = rig.nodes["a"], list[str]()
        put_mark, fence = node.put_mark, node.fence

        async def marked(mark: Mark) -> None:
            done.append("mark")
            assert mark == await rig.index.proof(rig.index.connection)
            await put_mark(mark)

        async def fenced(stamp: Stamp) -> Position:
            done.append("fence")
            return await fence(stamp)

        node.put_mark, node.fence = marked, fenced  # type: ignore[method-assign]
        await rig.forgetter.scan(node)
        assert done == ["mark", "fence"]

    go(body)


def test_a_node_that_is_away_is_an_alarm_once_it_holds_deletions_back_for_longer_than_a_scan_takes() -> None:
    async def body(rig: Rig) -> None:
        patience = 2 * limits.COMMIT_WINDOW_S + limits.RECONCILE_GRACE_S
        rig.away("c")
        await rig.watch()
        await asyncio.sleep(10 * patience)
        await rig.forgetter.step()
        assert rig.forgetter.alarms == [], "nothing is held back"
        await rig.delete(await rig.deliver("ab"))
        await rig.each(rig.collector.step)
        await rig.forgetter.step()  # raises the round
        await asyncio.sleep(patience - 1)
        await rig.forgetter.step()
        assert rig.forgetter.alarms == [], "it may be about to come"
        await asyncio.sleep(2)
        await rig.forgetter.step()
        (alarm,) = rig.forgetter.alarms
        assert "node c is away and holds back forgetting 1 deletions" in alarm

    go(body)


def test_the_comfort_of_a_round_begins_when_it_is_raised() -> None:
    """However long the index took to raise it."""

    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        raised, raise_round = 0.0, rig.index.raise_round

        async def slowly() -> int:
            nonlocal raised
            await asyncio.sleep(30)
            number = await raise_round()
            raised = rig.world.clock.monotonic()
            return number

        rig.index.raise_round = slowly  # type: ignore[method-assign]
        await rig.forgetter.step()
        left = await rig.forgetter.scan(rig.nodes["a"])
        assert left == raised + 2 * limits.COMMIT_WINDOW_S - rig.world.clock.monotonic()

    go(body)
