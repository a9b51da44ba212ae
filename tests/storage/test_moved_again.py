"""Compaction moves what it has moved before (law 1)."""

from __future__ import annotations

from powermail.storage.contract import Held
from tests.storage.asks import NO_MARK, compact_all, held, put, text
from tests.storage.rigs import Rig, then_reopened
from tests.storage.support import key

ONCE, TWICE = range(5, 81, 5), range(20, 81, 20)  # copies that are left by the first and by the second compaction


async def test_a_copy_that_moved_twice_is_named_by_where_it_was_first_written(rig: Rig) -> None:
    """Receipts, beliefs and drops name that place for ever."""
    there = range(1, 81)
    receipts = {number: await put(rig.node, number, text(number, 400)) for number in there}
    for left in (ONCE, TWICE):
        await rig.node.delete([key(number) for number in there if number not in left], NO_MARK, 0.0)
        assert await compact_all(rig.node) > 0
        for number in range(1000, 1010):  # what was moved lies in a segment that is written to no more
            await put(rig.node, number * left.step, text(number, 400))
        there = left
    node = await rig.reopen(lose_index=True)
    found = {item.key: item.position for item in await node.inventory(b"", 1000) if item.held is Held.LIVE}
    assert {number: found[key(number)] for number in TWICE} == {number: receipts[number].position for number in TWICE}
    await node.drop([(key(number), receipts[number].position) for number in TWICE], NO_MARK)
    async for each in then_reopened(rig, True):
        assert await held(each, *TWICE) == ["absent"] * len(TWICE)
