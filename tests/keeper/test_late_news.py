"""Keepers whose news of a node come late: what they saw may have gone or come since, and what they could not read stays noted
(laws 6, 8, 11).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from powermail.base.errors import IndexTrouble, NodeTrouble
from powermail.keeper.belief import compare_belief, end_of
from powermail.storage.contract import Held, Origin, Position
from tests.keeper.rig import Rig, go


def before_its_answer(of: object, name: str, act: Callable[[], Awaitable[Any]], times: int = 1) -> None:
    """Between what a method found and its answer, something else happens; so often."""
    method = getattr(of, name)
    left = times

    async def slow(*args: Any) -> Any:
        nonlocal left
        found = await method(*args)
        if left:
            left -= 1
            await act()
        return found

    setattr(of, name, slow)


def test_a_copy_that_was_made_while_a_node_was_asked_stays_believed() -> None:
    """P8: it would lie there without a belief, and no tombstone would be ordered when its message dies."""

    async def body(rig: Rig) -> None:
        key, node = await rig.deliver("ab"), rig.nodes["a"]
        await rig.reconciler.advance(node, 0.0)
        await node.drop([(key, await node.verify(key))], rig.index.mark())

        async def repaired() -> None:
            await rig.put("a", key, Origin.REPAIR)
            assert await rig.index.believe([key], "a", await end_of(node))
            assert await rig.reconciler.advance(node, 0.0)

        before_its_answer(node, "has", repaired)
        assert (await compare_belief(rig.index, node, [key])).missing == 0
        assert await rig.believed(key) == ("a", "b")
        await rig.delete(key)
        assert key in await rig.index.orders("a", 10)

    go(body)


def test_a_node_that_never_stands_still_is_compared_later() -> None:
    async def body(rig: Rig) -> None:
        key, node = await rig.deliver("ab"), rig.nodes["a"]
        await node.drop([(key, await node.verify(key))], rig.index.mark())

        async def goes_on() -> None:
            await rig.put("a", rig.key())
            await rig.reconciler.advance(node, 0.0)

        before_its_answer(node, "has", goes_on, 100)
        with pytest.raises(NodeTrouble):
            await compare_belief(rig.index, node, [key])
        del node.has
        assert (await compare_belief(rig.index, node, [key])).missing == 1

    go(body)


def test_a_copy_that_is_dropped_while_it_is_scrubbed_is_not_believed() -> None:
    async def body(rig: Rig) -> None:
        key, node = await rig.deliver("ab"), rig.nodes["a"]
        await rig.reconciler.advance(node, 0.0)
        await rig.index.disbelieve("a", [key], await end_of(node))

        async def dropped() -> None:
            done = await node.drop([(key, (await node.inventory(b"", 9))[0].position)], rig.index.mark())
            await rig.index.confirm_drops("a", [], done)

        before_its_answer(node, "verify", dropped)
        await rig.scrubber.step(node)
        assert await rig.held("a", key) is Held.ABSENT
        assert await rig.believed(key) == ("b",)
        await rig.scrubber.step(node)
        assert await rig.believed(key) == ("b",)

    go(body)


def test_what_a_scrub_found_too_late_is_looked_at_again_at_once() -> None:
    """Not after a whole round, which takes a week."""

    async def body(rig: Rig) -> None:
        key, node = await rig.deliver("ab"), rig.nodes["a"]
        await rig.reconciler.advance(node, 0.0)
        await rig.index.disbelieve("a", [key], await end_of(node))

        async def goes_on() -> None:
            await rig.put("a", rig.key())
            await rig.reconciler.advance(node, 0.0)

        before_its_answer(node, "verify", goes_on)
        await rig.scrubber.step(node)
        assert await rig.believed(key) == ("b",)
        await rig.scrubber.step(node)
        assert await rig.believed(key) == ("a", "b")

    go(body)


def test_a_copy_that_is_dropped_while_a_log_is_scanned_is_not_believed_and_the_log_is_scanned_again() -> None:
    async def body(rig: Rig) -> None:
        key, other, node = await rig.deliver("ab"), rig.key(), rig.nodes["c"]
        await rig.put("c", key, Origin.REPAIR)
        await rig.put("c", other)

        async def dropped() -> None:
            done = await node.drop([(key, await node.verify(key))], rig.index.mark())
            await rig.index.confirm_drops("c", [], done)

        before_its_answer(node, "scan", dropped)
        assert await rig.reconciler.advance(node, 0.0)
        assert await rig.believed(key) == ("a", "b")
        assert await rig.believed(other) == ("c",)

    go(body)


def test_a_copy_that_a_walk_entered_late_is_not_mail_when_its_drop_was_carried_out() -> None:
    """Law 11: the walk saw it while its drop waited; when it asked the index, the drop was confirmed."""

    async def body(rig: Rig) -> None:
        orphan, node = rig.key(), rig.nodes["a"]
        await rig.put("a", orphan, Origin.REPAIR)
        await rig.reconciler.advance(node, 0.0)
        assert [drop.key for drop in await rig.index.drops("a", 10)] == [orphan]
        await rig.epochs.raise_epoch("a test")
        record = await node.read_commit(orphan)

        async def carried_out() -> None:
            await rig.collector.step(node)
            assert await rig.held("a", orphan) is Held.ABSENT

            async def as_it_was(key: bytes) -> bytes:
                return record

            node.read_commit = as_it_was  # type: ignore[method-assign]

        await rig.epochs._begin()
        before_its_answer(node, "inventory", carried_out)
        await rig.reconciler.step(node)
        assert (await rig.row("a")).owes_walk and await rig.fate(orphan) is None
        await rig.reconciler.step(node)
        assert not (await rig.row("a")).owes_walk
        assert await rig.fate(orphan) is None

    go(body)


@pytest.mark.parametrize("origin", [Origin.DELIVERY, Origin.MOVED])
def test_what_a_walk_could_not_read_is_entered_later_also_when_the_keeper_dies_behind_it(origin: Origin) -> None:
    """Laws 6, 11: the watermark and the note of what it passed over are one transaction; mail it is whatever its origin."""

    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key, origin)
        rig.nodes["a"].damage(key)
        await rig.epochs.raise_epoch("a test")
        await rig.epochs._begin()
        walked = rig.index.walked

        async def last_words(*args: Any) -> bool:
            assert await walked(*args)
            raise IndexTrouble("the process ends here")

        rig.index.walked = last_words  # type: ignore[assignment, method-assign]
        with pytest.raises(IndexTrouble):
            await rig.reconciler.step(rig.nodes["a"])
        row = await rig.row("a")
        assert not row.owes_walk and row.watermark > Position(0, 0) and await rig.fate(key) is None
        rig.nodes["a"]._bad.clear()
        await rig.restart()
        await rig.keep(30)
        assert await rig.listed() == [key]
        assert await rig.index.drops("a", 10) == [] and await rig.index.unread("a", 10) == []

    go(body)


def test_a_second_keeper_that_takes_a_disk_in_takes_no_note_away() -> None:
    """Law 6: it found the disk as new as the first did, and comes when that has read the log already."""

    async def body(rig: Rig) -> None:
        key, node = rig.key(), rig.nodes["a"]
        await node.close()
        await node.initialise()
        await node.open()
        rows = rig.index.node_rows

        async def before() -> list[Any]:
            """As the index was before the first one."""
            rig.index.node_rows = rows  # type: ignore[method-assign]
            found = await rows()
            await rig.admission.admit(node)
            await rig.put("a", key)
            node.damage(key)
            assert await rig.reconciler.advance(node, 0.0)
            assert len(await rig.index.unread("a", 10)) == 1
            return found

        rig.index.node_rows = before  # type: ignore[method-assign]
        with pytest.raises(IndexTrouble, match="is being admitted elsewhere"):
            await rig.admission.admit(node)  # law 12: it takes the place of what it has seen, or of nothing
        await rig.admission.admit(node)
        assert len(await rig.index.unread("a", 10)) == 1
        node._bad.clear()
        await rig.keep(30)
        assert await rig.listed() == [key]

    go(body)
