"""Scrub: every copy gets a verdict, every belief is compared (law 12)."""

from __future__ import annotations

import asyncio

from powermail.base import limits
from powermail.keeper.belief import end_of
from powermail.storage.contract import Held, Origin
from tests.keeper.rig import HOUR_S, Rig, go


def test_missing_copies_are_found() -> None:
    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("ab") for _ in range(5)]
        await rig.keep(100)
        for key in keys:
            rig.nodes["a"].lose(key)
        await rig.each(rig.scrubber.step)
        assert [await rig.believed(key) for key in keys] == [("b",)] * 5
        await rig.keep(100)
        assert [len(await rig.believed(key)) for key in keys] == [2] * 5
        await rig.check()

    go(body)


def test_bad_copies_are_found_and_made_anew() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.keep(100)
        rig.nodes["a"].damage(key)
        await rig.keep(300)
        assert rig.scrubber.bad >= 1
        believed = await rig.believed(key)
        assert len(believed) == 2
        for node in believed:
            await rig.nodes[node].verify(key)
        assert await rig.index.suspects("a", b"", 10) == []

    go(body)


def test_copies_that_nobody_believes_in_are_believed_or_dropped() -> None:
    async def body(rig: Rig) -> None:
        mine, orphan, dead = await rig.deliver("ab"), rig.key(), await rig.deliver("ab")
        await rig.put("a", orphan)
        rows = rig.store.state.nodes
        end = (await rig.nodes["a"].facts()).end
        rows["a"] = rows["a"]._replace(watermark=end, end_seen=end)  # passed over, as no log is
        await rig.index.disbelieve("a", [mine, dead], await end_of(rig.nodes["a"]))
        await rig.delete(dead)
        await rig.each(rig.scrubber.step)
        assert await rig.believed(mine) == ("a", "b")
        assert [drop.key for drop in await rig.index.drops("a", 10)] == [orphan]
        assert await rig.index.orders("a", 10) == [dead]

    go(body)


def test_what_lies_behind_no_watermark_is_left_to_reconcile() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        await rig.each(rig.scrubber.step)
        assert await rig.index.drops("a", 10) == []
        await rig.reconciler.settle()
        assert await rig.listed() == [key]

    go(body)


def test_nothing_is_dropped_while_a_part_of_the_log_could_not_be_read() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        rig.nodes["a"].hide(key)
        await rig.reconciler.settle()
        rig.nodes["a"].hide(key, False)
        await rig.each(rig.scrubber.step)
        assert await rig.index.drops("a", 10) == [], "it may be mail that is not entered yet"
        await rig.reconciler.settle()
        assert await rig.listed() == [key]

    go(body)


def test_a_tombstone_of_a_live_message_is_proof_of_lost_commits() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.keep(100)
        await rig.nodes["c"].delete([key], rig.index.mark(), 0.0)
        rig.store.state.nodes["c"] = (await rig.row("c"))._replace(watermark=(await rig.nodes["c"].facts()).end)
        epoch = rig.index.epoch
        await rig.each(rig.scrubber.step)
        assert rig.index.epoch == epoch + 1
        await rig.keep(100)
        assert await rig.listed() == [] and rig.index.epoch == epoch + 1

    go(body)


def test_each_copy_gets_a_verdict_in_time_and_the_place_survives_restarts() -> None:
    async def body(rig: Rig) -> None:
        count = 100
        keys = [await rig.deliver("ab") for _ in range(count)]
        await rig.keep(100)
        node = rig.nodes["a"]
        assert 0 < rig.scrubber._pace(node) * count / 20 < limits.SCRUB_DAYS_MAX * 86_400 / 2 + 1
        verified: set[bytes] = set()
        verify = node.verify

        async def noting(key: bytes) -> object:
            verified.add(key)
            return await verify(key)

        node.verify = noting  # type: ignore[assignment,method-assign]
        for _ in range(8):  # a process that lives for two steps only
            for _ in range(2):
                await rig.scrubber.step(node)
            rig.scrubber._kept_at = float("-inf")
            await rig.scrubber._keep()
            await rig.restart()
        assert verified == set(keys)

    go(body)


def test_progress_is_shown() -> None:
    async def body(rig: Rig) -> None:
        for _ in range(50):
            await rig.deliver("ab")
        await rig.reconciler.settle()
        await rig.scrubber.step(rig.nodes["a"])
        shown = rig.scrubber.progress(rig.nodes["a"])
        assert (shown["done"], shown["checked"], shown["whole_at"]) == (0.4, 20, 0.0)
        await asyncio.sleep(1)
        await rig.keep(HOUR_S)
        assert rig.scrubber.progress(rig.nodes["a"])["whole_at"] > 0

    go(body)


def test_the_operator_checks_a_node_at_once() -> None:
    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("ab") for _ in range(5)]
        rig.nodes["a"].damage(keys[1])
        after, bad = await rig.scrubber.check(rig.nodes["a"], b"", 3)
        assert (after, bad) == (keys[2], 1)
        after, bad = await rig.scrubber.check(rig.nodes["a"], after, 3)
        assert (after, bad) == (keys[4], 0)
        assert await rig.scrubber.check(rig.nodes["a"], after, 3) == (b"", 0)
        assert rig.scrubber.checked == 5

    go(body)


def test_a_copy_without_belief_that_is_bad_is_not_believed() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.put("c", key, Origin.REPAIR)
        rig.nodes["c"].damage(key)
        rig.store.state.nodes["c"] = (await rig.row("c"))._replace(watermark=(await rig.nodes["c"].facts()).end)
        await rig.each(rig.scrubber.step)
        assert await rig.believed(key) == ("a", "b")
        assert await rig.held("c", key) is Held.LIVE

    go(body)
