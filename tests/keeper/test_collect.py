"""Collection: orders, drops and suspects (laws 1, 6, 8)."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, MarkRefused, NodeTrouble
from powermail.index.memory import MemoryIndex
from powermail.keeper.belief import end_of
from powermail.storage.contract import Held, Mark, Origin, Position
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


def test_a_suspicion_of_what_is_not_there_ends() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.index.note_bad(key, "c", "somebody saw one")
        assert await rig.index.suspects("c", b"", 10) == [key]
        await rig.collector.step(rig.nodes["c"])
        assert await rig.index.suspects("c", b"", 10) == [] and await rig.believed(key) == ("a", "b")

    go(body)


@pytest.mark.parametrize("ordered", ["tombstones", "drops"])
def test_a_whole_batch_is_followed_by_the_next_at_once(ordered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECT_BATCH", 3)

    async def body(rig: Rig) -> None:
        for _ in range(5):
            if ordered == "tombstones":
                await rig.delete(await rig.deliver("ab"))
            else:
                await rig.put("a", rig.key(), Origin.REPAIR)
        if ordered == "drops":
            await rig.reconciler.advance(rig.nodes["a"], 0.0)
        assert await rig.collector.step(rig.nodes["a"]) == 0.0
        assert await rig.collector.step(rig.nodes["a"]) > 0.0
        assert not await rig.index.orders("a", 10) and not await rig.index.drops("a", 10)

    go(body)


def test_a_suspicion_stays_until_the_index_takes_the_news() -> None:
    """Law 8: the node went on while its copy was read, so it is looked at again."""

    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.index.note_bad(key, "a", "bad")
        node = rig.nodes["a"]
        verify = node.verify

        async def slow(key: bytes) -> Position:
            node.verify = verify  # type: ignore[method-assign]
            await rig.put("a", rig.key())
            await rig.reconciler.advance(node, 0.0)
            return await verify(key)

        node.verify = slow  # type: ignore[method-assign]
        await rig.collector.step(node)
        assert await rig.index.suspects("a", b"", 10) == [key]
        assert await rig.believed(key) == ("b",)
        await rig.collector.step(node)
        assert await rig.index.suspects("a", b"", 10) == []
        assert await rig.believed(key) == ("a", "b")

    go(body)


def test_a_dropped_copy_leaves_the_belief_in_another_that_is_live_there() -> None:
    """Law 6: a copy was found bad and another was made in its place, before the drop of the first was carried out."""

    async def body(rig: Rig) -> None:
        orphan = rig.key()
        first = await rig.put("c", orphan, Origin.REPAIR)
        await rig.each(lambda node: rig.reconciler.advance(node, 0.0))
        node = rig.nodes["c"]
        assert [drop.position for drop in await rig.index.drops("c", 10)] == [first.position]
        await node.drop([(orphan, first.position)], rig.index.mark())  # and that was not noted
        await rig.deliver("ab", orphan)
        await rig.put("c", orphan, Origin.REPAIR)
        assert await rig.index.believe([orphan], "c", await end_of(node))
        await rig.collector.step(node)
        assert await rig.index.drops("c", 10) == []
        assert await rig.held("c", orphan) is Held.LIVE
        assert await rig.believed(orphan) == ("a", "b", "c")

    go(body)


def test_a_bad_copy_goes_only_when_there_are_enough_good_ones_elsewhere() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.nodes["a"].damage(key)
        await rig.index.note_bad(key, "a", "bad")
        await rig.each(rig.collector.step)
        assert await rig.held("a", key) is Held.LIVE, "it may be the best there is"
        await rig.put("c", key, Origin.REPAIR)
        await rig.index.believe([key], "c", await end_of(rig.nodes["c"]))
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


def test_a_tombstone_brings_the_count_of_whoever_ordered_it() -> None:
    """Law 10: another process deleted the message, and its transaction is lost afterwards: the node shows that."""

    async def body(rig: Rig) -> None:
        other = MemoryIndex(rig.world, rig.store)
        await other.open()
        key = await rig.deliver("ab")
        old = rig.store.snapshot()
        box = await rig.index.find_mailbox("amy", "INBOX")
        assert box is not None
        await other.expunge(box.id, [entry.uid for entry in await rig.index.entries(box.id, 0, 2**32, 9)])
        await rig.collector.step(rig.nodes["a"])
        assert await rig.held("a", key) is Held.DEAD
        mark = (await rig.nodes["a"].facts()).mark
        rig.store.restore(old)
        assert await rig.index.lost(mark) != ""

    go(body)


def test_orders_that_were_read_before_an_older_index_was_put_back_reach_no_node() -> None:
    """Law 10: with the counts of the older index they would hide that it lost the deletion."""

    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        key = await rig.deliver("ab")
        await rig.delete(key)
        orders = rig.index.orders

        async def then_put_back(node: str, limit: int) -> list[bytes]:
            keys = await orders(node, limit)
            rig.store.restore(old)
            return keys

        rig.index.orders = then_put_back  # type: ignore[method-assign]
        with pytest.raises(IndexTrouble):
            await rig.collector.step(rig.nodes["a"])
        assert await rig.held("a", key) is Held.LIVE

    go(body)


def test_a_node_that_knows_a_later_epoch_takes_no_tombstones_of_this_one() -> None:
    """Law 10: what is sent may come of commits that are lost; the node's own mark says that they are."""

    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.delete(key)
        await rig.nodes["a"].put_mark(Mark(epoch=2))
        with pytest.raises(MarkRefused):
            await rig.collector.step(rig.nodes["a"])
        assert await rig.held("a", key) is Held.LIVE and await rig.index.orders("a", 9) == [key]
        await rig.keep(60)
        assert rig.index.epoch == 3 and await rig.held("a", key) is Held.DEAD

    go(body)
