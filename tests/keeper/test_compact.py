"""Compaction: space of what is dead and forgotten (laws 9, 10)."""

from __future__ import annotations

from powermail.storage.contract import Held
from tests.keeper.rig import DAY_S, Rig, go


async def _fill_and_delete(rig: Rig, count: int = 40) -> list[bytes]:
    for node in rig.nodes.values():
        node._segment_octets = 1024
    keys = [await rig.deliver("ab") for _ in range(count)]
    for key in keys:
        await rig.delete(key)
    return keys


def test_space_comes_back_in_steps() -> None:
    async def body(rig: Rig) -> None:
        await _fill_and_delete(rig)
        kept = await rig.deliver("ab")
        before = rig.nodes["a"].stat().log_octets
        await rig.keep(500)
        assert rig.nodes["a"].stat().log_octets < before / 2
        assert rig.compactor.freed["a"] > 0
        assert await rig.held("a", kept) is Held.LIVE

    go(body)


def test_nothing_moves_before_reconcile_has_seen_it() -> None:
    async def body(rig: Rig) -> None:
        await _fill_and_delete(rig)
        await rig.each(rig.collector.step)
        await rig.each(rig.compactor.step, 5)
        assert "compact" not in rig.nodes["a"].calls
        await rig.reconciler.settle()
        await rig.each(rig.compactor.step, 5)
        assert "compact" in rig.nodes["a"].calls

    go(body)


def test_nothing_moves_after_a_stretch_that_could_not_be_read() -> None:
    async def body(rig: Rig) -> None:
        hidden = rig.key()
        await rig.put("a", hidden)
        rig.nodes["a"].hide(hidden)
        await _fill_and_delete(rig)
        await rig.each(rig.collector.step)
        await rig.reconciler.settle()
        await rig.each(rig.compactor.step, 5)
        assert "compact" not in rig.nodes["a"].calls and "compact" in rig.nodes["b"].calls

    go(body)


def test_nothing_moves_while_a_walk_is_owed() -> None:
    async def body(rig: Rig) -> None:
        await _fill_and_delete(rig)
        await rig.each(rig.collector.step)
        await rig.reconciler.settle()
        await rig.epochs.raise_epoch("a test")
        await rig.each(rig.compactor.step, 5)
        assert "compact" not in rig.nodes["a"].calls

    go(body)


def test_tombstones_stay_for_their_days_and_until_their_row_is_forgotten() -> None:
    async def body(rig: Rig) -> None:
        node = rig.nodes["a"]
        keys = await _fill_and_delete(rig, 5)
        await rig.each(rig.collector.step)
        await rig.deliver("ab")
        await rig.reconciler.settle()
        for days, forgotten, gone in ((29, True, False), (31, False, False), (31, True, True)):
            disk, rows, skew = node.snapshot(), rig.store.state.keys, rig.world.clock.skew_s  # type: ignore[attr-defined]
            rig.world.clock.skew_s += days * DAY_S  # type: ignore[attr-defined]
            if forgotten:
                rig.store.state.keys = {key: row for key, row in rig.store.state.keys.items() if key not in keys}
            while (await node.compactable((await rig.row("a")).watermark, 0.0)) is not None:
                await rig.compactor.step(node)
            held = [await rig.held("a", key) for key in keys]
            assert (Held.ABSENT in held) == gone, (days, forgotten, held)
            node._disk, rig.store.state.keys, rig.world.clock.skew_s = disk, rows, skew  # type: ignore[attr-defined]

    go(body)


def test_permission_to_compact_carries_the_mark() -> None:
    async def body(rig: Rig) -> None:
        await _fill_and_delete(rig)
        await rig.each(rig.collector.step)
        await rig.reconciler.settle()
        mark = rig.index.mark()
        await rig.each(rig.compactor.step)
        assert (await rig.nodes["a"].facts()).mark == mark

    go(body)
