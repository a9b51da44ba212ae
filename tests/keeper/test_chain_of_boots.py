"""An older state of a disk that has grown again is known by its chain of boots (law 12)."""

from __future__ import annotations

from powermail.index.contract import NodeRow
from powermail.sim.memory import Disk
from powermail.storage.contract import START, Held
from tests.keeper.rig import Rig, go


async def grown_and_refused(rig: Rig, old: Disk, row: NodeRow, gone: list[bytes]) -> None:
    """An older state of a's disk is put back and grows past all that the index has seen: nothing comes back with it."""
    node, before = rig.nodes["a"], rig.nodes["a"].incarnation
    await node.close()
    node.put_back(old)
    await node.open()
    while (await node.facts()).end <= max(row.watermark, row.end_seen):
        await rig.put("a", rig.key())
    await rig.watch()
    facts = await node.facts()
    assert facts.incarnation != before
    assert facts.birth > START
    await rig.keep(300)
    assert await rig.listed() == []
    assert [await rig.held("a", key) for key in gone] == [Held.ABSENT] * len(gone)


def test_an_older_disk_whose_log_is_as_long_as_before_is_noticed() -> None:
    """It took mail before anybody compared it, so its end tells nothing."""

    async def body(rig: Rig) -> None:
        gone = [await rig.deliver("ab") for _ in range(3)]
        await rig.keep(200)
        node = rig.nodes["a"]
        old = node.snapshot()
        await rig.reopen("a")
        for key in gone:
            await rig.delete(key)
        await rig.keep(2000)
        assert [await rig.fate(key) for key in gone] == [None] * 3, "deleted and forgotten"
        row = await rig.row("a")
        await grown_and_refused(rig, old, row, gone)

    go(body)


def test_an_older_disk_that_forked_off_within_the_last_opening_that_the_index_knows_is_noticed() -> None:
    """Its chain has that opening, and its log is longer than before: only where the next one began tells."""

    async def body(rig: Rig) -> None:
        gone = [await rig.deliver("ab") for _ in range(3)]
        await rig.keep(200)
        node = rig.nodes["a"]
        old = node.snapshot()
        for key in gone:
            await rig.delete(key)
        await rig.keep(2000)
        assert [await rig.fate(key) for key in gone] == [None] * 3, "deleted and forgotten"
        row = await rig.row("a")
        assert row.boot in old.boots, "it is the same opening"
        await grown_and_refused(rig, old, row, gone)

    go(body)


def test_a_disk_that_grew_before_it_was_compared_is_no_older_one() -> None:
    """An ordinary reopening while the index was away: it took mail behind all that the index has seen."""

    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        await rig.keep(200)
        node, before = rig.nodes["a"], rig.nodes["a"].incarnation
        for _ in range(3):
            await node.restart()
            await rig.put("a", rig.key())
        await rig.watch()
        facts = await node.facts()
        assert (facts.incarnation, facts.birth) == (before, START)
        assert (await rig.row("a")).boot == facts.boots[-1]
        await rig.keep(300)
        assert len(await rig.listed()) == 4

    go(body)
