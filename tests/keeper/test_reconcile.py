"""Reconcile: what logs hold behind their watermarks (law 6)."""

from __future__ import annotations

import asyncio

from powermail.base import limits
from powermail.index.contract import Batch, Fate
from powermail.storage.contract import Held, Origin, Unread
from tests.keeper.rig import Rig, go


def test_a_message_whose_front_end_died_is_entered() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        await rig.put("b", key)
        await rig.reconciler.settle()
        assert await rig.listed() == [key]
        assert await rig.believed(key) == ("a", "b")
        await rig.check()

    go(body)


def test_a_young_record_is_its_front_ends_own_business() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        await rig.each(rig.reconciler.step)
        assert await rig.listed() == []
        await asyncio.sleep(limits.RECONCILE_GRACE_S + 1)
        await rig.each(rig.reconciler.step)
        assert await rig.listed() == [key]

    go(body)


def test_a_commit_of_a_dead_key_gets_a_tombstone() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.index.abort(key, ["a"])
        await rig.put("b", key)
        await rig.reconciler.settle()
        assert await rig.index.orders("b", 10) == [key]
        assert await rig.listed() == []
        await rig.each(rig.collector.step)
        assert await rig.held("b", key) is Held.DEAD

    go(body)


def test_an_orphan_of_a_repair_whose_note_failed_is_dropped_not_entered() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")
        for _ in range(20):  # whatever the index says when the copy was made, its note is lost
            rig.index.fail_next(kept=False)
            try:
                await rig.repairer.step()
            except Exception as error:
                assert "did not answer" in str(error)
                break
        made = [name for name in "bc" if await rig.held(name, key) is Held.LIVE]
        assert len(made) == 1 and await rig.believed(key) == ("a",)
        await rig.delete(key)
        await rig.each(rig.collector.step)
        rows = rig.store.state.keys
        rows.pop(key)  # forgotten before the orphan's log was looked at, as an index that lost commits would have it
        await rig.reconciler.settle()
        assert await rig.fate(key) is None and await rig.listed() == []
        await rig.each(rig.collector.step)
        assert await rig.held(made[0], key) is Held.ABSENT, "a drop: it says nothing about the key"

    go(body)


def test_a_record_that_gave_EIO_once_is_entered_later() -> None:
    async def body(rig: Rig) -> None:
        hidden, after = rig.key(), rig.key()
        await rig.put("a", hidden)
        await rig.put("a", after)
        rig.nodes["a"].hide(hidden)
        await rig.reconciler.settle()
        assert await rig.listed() == [after]
        assert len(await rig.index.unread("a", 10)) == 1
        await rig.each(rig.reconciler.step)
        assert await rig.listed() == [after]
        rig.nodes["a"].hide(hidden, False)
        await rig.each(rig.reconciler.step)
        assert sorted(await rig.listed()) == sorted([hidden, after])
        assert await rig.index.unread("a", 10) == []

    go(body)


def test_a_commit_record_that_is_bad_when_it_is_read_is_entered_when_it_is_good_again() -> None:
    async def body(rig: Rig) -> None:
        key, after = rig.key(), rig.key()
        position = (await rig.put("a", key)).position
        await rig.put("a", after)
        rig.nodes["a"].damage(key)
        await rig.reconciler.settle()
        assert await rig.listed() == [after], "it hides nothing behind it"
        assert await rig.index.unread("a", 10) == [Unread(position, 0)]
        await rig.each(rig.reconciler.step)
        assert await rig.index.unread("a", 10) == [Unread(position, 0)]
        rig.nodes["a"]._bad.clear()
        await rig.each(rig.reconciler.step)
        assert sorted(await rig.listed()) == sorted([key, after])
        assert await rig.index.unread("a", 10) == []

    go(body)


def test_trouble_while_a_record_is_read_leaves_the_watermark_where_it_was() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        before = (await rig.row("a")).watermark
        rig.nodes["a"].fail_next("read_commit")
        await rig.reconciler.settle()
        assert (await rig.row("a")).watermark == before
        await rig.reconciler.settle()
        assert await rig.listed() == [key]

    go(body)


def test_a_hung_node_holds_up_no_other() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        dead = await rig.deliver("bc")
        await rig.delete(dead)
        rig.nodes["c"].hang()
        began = rig.world.clock.monotonic()
        await rig.reconciler.settle()
        assert rig.world.clock.monotonic() - began <= limits.NODE_OPEN_WAIT_S + 1
        assert await rig.listed() == [key]
        await rig.keep(20)
        assert await rig.held("b", dead) is Held.DEAD
        assert await rig.index.orders("c", 10) == [dead]
        await rig.marker.put_all()
        rig.nodes["c"].release()
        await rig.keep(60)
        assert await rig.index.orders("c", 10) == []

    go(body)


def test_another_keeper_that_was_quicker_is_noticed() -> None:
    async def body(rig: Rig) -> None:
        keys = [rig.key(), rig.key()]
        for key in keys:
            await rig.put("a", key)
        scan = rig.nodes["a"].scan
        row = await rig.row("a")

        async def late(*asked: object) -> object:
            answer = await scan(*asked)  # type: ignore[arg-type]
            rig.nodes["a"].scan = scan  # type: ignore[method-assign]
            other = Batch("a", row.incarnation, row.watermark, answer.items[0].position, answer.end, (), (), {})
            assert (await rig.index.reconcile(other)).moved
            return answer

        rig.nodes["a"].scan = late  # type: ignore[assignment,method-assign]
        await rig.reconciler.settle()
        assert sorted(await rig.listed()) == sorted(keys)

    go(body)


def test_an_idle_installation_commits_nothing() -> None:
    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        await rig.keep(2000)
        mark = rig.index.mark()
        ends = [(await node.facts()).end for node in rig.nodes.values()]
        await rig.keep(2000)
        assert rig.index.mark() == mark
        assert [(await node.facts()).end for node in rig.nodes.values()] == ends

    go(body)


def test_what_lies_before_the_birth_mark_is_never_entered() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        await rig.nodes["a"].rebirth()
        await rig.cluster.watch(rig.nodes["a"])
        rows = rig.store.state.nodes
        rows["a"] = rows["a"]._replace(watermark=rows["a"].watermark.__class__(0, 0))
        await rig.reconciler.settle()
        assert await rig.fate(key) is None
        assert [drop.key for drop in await rig.index.drops("a", 10)] == [key]

    go(body)


def test_a_tombstone_of_a_live_message_is_proof_of_lost_commits() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.nodes["a"].delete([key], rig.index.mark(), rig.world.clock.now())
        epoch = rig.index.epoch
        await rig.reconciler.settle()
        assert rig.index.epoch == epoch + 1 and rig.catching_up()
        await rig.keep(300)
        assert not rig.catching_up()
        assert await rig.listed() == []
        assert await rig.held("b", key) is Held.DEAD
        assert rig.index.epoch == epoch + 1, "one loss is one epoch"

    go(body)


def test_repair_copies_of_live_messages_are_believed() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.put("c", key, Origin.REPAIR)
        await rig.reconciler.settle()
        assert await rig.believed(key) == ("a", "b", "c")
        assert await rig.fate(key) is Fate.LIVE

    go(body)
