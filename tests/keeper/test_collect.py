"""Collection: orders, drops and suspects (laws 1, 6, 8)."""

from __future__ import annotations

from powermail.base.errors import NodeTrouble
from powermail.storage.contract import Held, Origin
from tests.keeper.rig import Rig, go


def test_a_deletion_reaches_every_node_that_holds_a_copy_with_the_mark() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.delete(key)
        mark = rig.index.mark()
        await rig.each(rig.collector.step)
        assert [await rig.held(node, key) for node in "abc"] == [Held.DEAD, Held.DEAD, Held.ABSENT]
        assert (await rig.nodes["a"].facts()).mark == mark
        assert await rig.index.orders_total("a") == (0, 0)

    go(body)


def test_an_order_waits_until_its_node_has_confirmed() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.delete(key)
        rig.nodes["a"].fail_next("delete", done=True)
        await rig.each(rig.collector.step)
        assert await rig.index.orders("a", 10) == [key]
        await rig.each(rig.collector.step)
        assert await rig.index.orders("a", 10) == []

    go(body)


def test_a_full_node_deletes() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.nodes["a"].fill()
        await rig.delete(key)
        await rig.each(rig.collector.step)
        assert await rig.held("a", key) is Held.DEAD

    go(body)


def test_a_drop_takes_one_copy_and_says_nothing_about_the_key() -> None:
    async def body(rig: Rig) -> None:
        orphan = rig.key()
        await rig.put("c", orphan, Origin.REPAIR)
        await rig.reconciler.settle()
        await rig.each(rig.collector.step)
        assert await rig.held("c", orphan) is Held.ABSENT
        assert await rig.index.orders_total("c") == (0, 0)

    go(body)


def test_a_suspected_copy_that_is_good_counts_again() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.index.note_bad(key, "a", "read badly once")
        await rig.index.note_bad(key, "b", "read badly once")
        assert await rig.believed(key) == ()
        await rig.each(rig.collector.step)
        assert await rig.believed(key) == ("a", "b")
        assert await rig.index.suspects("a", b"", 10) == []

    go(body)


def test_a_bad_copy_goes_only_when_there_are_enough_good_ones_elsewhere() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.nodes["a"].damage(key)
        await rig.index.note_bad(key, "a", "bad")
        await rig.each(rig.collector.step)
        assert await rig.held("a", key) is Held.LIVE, "it may be the best there is"
        await rig.put("c", key, Origin.REPAIR)
        await rig.index.believe(key, "c")
        await rig.each(rig.collector.step)
        assert await rig.held("a", key) is Held.ABSENT
        assert await rig.index.suspects("a", b"", 10) == []
        assert await rig.believed(key) == ("b", "c")

    go(body)


def test_a_suspected_copy_gets_a_tombstone_when_its_message_dies() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.index.note_bad(key, "a", "bad")
        await rig.delete(key)
        await rig.each(rig.collector.step)
        assert await rig.held("a", key) is Held.DEAD

    go(body)


def test_a_node_in_trouble_tells_its_own_worker() -> None:
    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        rig.nodes["a"].hang()
        try:
            await rig.collector.step(rig.nodes["a"])
        except NodeTrouble:
            pass
        else:
            raise AssertionError("trouble is said, not passed over")
        rig.nodes["a"].release()

    go(body)
