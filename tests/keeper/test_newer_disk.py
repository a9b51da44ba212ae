"""An index that lost commits meets disks that came since: they are newer, and what they hold is mail (laws 10, 11, 12)."""

from __future__ import annotations

from typing import Any

import pytest

from powermail.base.errors import IndexTrouble
from powermail.keeper import admission
from powermail.storage.contract import START, Held, Mark, StorageNode
from tests.keeper.rig import Rig, go


async def _replace(rig: Rig, node: str, seconds: float = 300.0) -> None:
    """An empty disk takes its place, and repair fills it."""
    await rig.nodes[node].close()
    await rig.nodes[node].initialise()
    await rig.watch()
    await rig.keep(seconds)


async def _roll_back(rig: Rig, node: str) -> None:
    """Its disk is put back as it was before a message came; repair makes good what it lacks."""
    old = rig.nodes[node].snapshot()
    await rig.deliver("ab")
    await rig.keep(200)
    await rig.nodes[node].close()
    rig.nodes[node].put_back(old)
    await rig.watch()
    await rig.keep(300)


@pytest.mark.parametrize("unmarked", ["", "a", "c"])
def test_disks_that_were_replaced_since_the_backup_hold_mail(unmarked: str) -> None:
    """All of them, one after the other, so that no copy is left that a delivery wrote; one may show no sign of the loss."""

    async def body(rig: Rig) -> None:
        early = await rig.deliver("ab")
        await rig.keep(200)
        backup = rig.store.snapshot()
        late, gone = await rig.deliver("ab"), await rig.deliver("bc")
        for node in "abc":
            await _replace(rig, node)
        await rig.delete(gone)
        last = await rig.deliver("ac")
        await rig.keep(300)
        if unmarked:
            rig.nodes[unmarked]._disk.mark = Mark()
        before = {name: node.incarnation for name, node in rig.nodes.items()}
        await rig.restart(backup)
        await rig.keep(600)
        assert sorted(await rig.listed()) == sorted([early, late, last])
        assert rig.index.epoch == 2
        for key in (early, late, last):
            assert len(await rig.believed(key)) >= 2
        assert {name: node.incarnation for name, node in rig.nodes.items()} == before, "none is an older one"
        assert [(await node.facts()).birth for node in rig.nodes.values()] == [START] * 3
        await rig.check()

    go(body)


def test_disks_that_were_once_rolled_back_hold_mail_after_lost_commits() -> None:
    """One after the other, each repaired. Their birth marks were lifted: what is left before them was compared."""

    async def body(rig: Rig) -> None:
        backup = rig.store.snapshot()
        key = await rig.deliver("ab")
        await rig.keep(200)
        for node in "ab":
            await _roll_back(rig, node)
        kept = await rig.listed()
        assert key in kept and len(kept) == 3
        await rig.restart(backup)
        await rig.keep(2000)
        assert sorted(await rig.listed()) == sorted(kept)
        assert await rig.held("a", key) is Held.LIVE
        assert len(await rig.believed(key)) == 2
        await rig.check()

    go(body)


def test_a_birth_mark_lasts_until_all_that_was_ordered_before_it_is_done() -> None:
    """Law 12: until then a copy of what was deleted may lie there."""

    async def body(rig: Rig) -> None:
        gone = [await rig.deliver("ab") for _ in range(3)]
        await rig.keep(200)
        node = rig.nodes["a"]
        old = node.snapshot()
        for key in gone:
            await rig.delete(key)
        await rig.keep(2000)
        await node.close()
        node.put_back(old)
        await rig.watch()
        birth = (await node.facts()).birth
        assert birth > START
        await rig.each(rig.admission.step, 3)
        assert len(await rig.index.drops("a", 10)) == 3
        assert (await node.facts()).birth == birth
        await rig.each(rig.collector.step)
        node.doubt()
        await rig.each(rig.admission.step, 3)
        assert (await node.facts()).birth == birth, "what could not be read may come back"
        node.doubt(False)
        await rig.each(rig.admission.step)
        assert (await node.facts()).birth == START
        assert (await rig.row("a")).boot
        await rig.restart()
        await rig.keep(300)
        assert await rig.listed() == []

    go(body)


async def _rest(node: StorageNode) -> float:
    return 60.0


@pytest.mark.parametrize("how", ["new disk", "older state"])
def test_an_index_that_goes_back_under_a_running_process_hears_of_the_disk_that_took_the_place_of_another(how: str) -> None:
    """A stale standby: it knows the disk that there was, and what lay on it; nobody opens the node anew (law 12)."""

    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("ab"), await rig.deliver("ac")]
        await rig.keep(60)
        node, old = rig.nodes["a"], rig.store.snapshot()
        if how == "new disk":
            node.miss()
            await node.initialise()
        else:
            await node.rebirth()
        await rig.watch()
        await rig.keep(60)
        assert (await rig.row("a")).incarnation == node.incarnation
        rig.store.restore(old)
        assert (await rig.row("a")).incarnation != node.incarnation
        await rig.keep(120)
        row = await rig.row("a")
        assert rig.index.epoch == 2 and (row.incarnation, bool(row.boot), row.owes_walk) == (node.incarnation, True, False)
        for key in keys:
            believed = await rig.believed(key)
            assert len(believed) >= 2 and {await rig.held(name, key) for name in believed} == {Held.LIVE}
        late = await rig.deliver("ab")
        assert set(await rig.believed(late)) == {"a", "b"}

    go(body)


def test_what_an_older_disk_was_compared_with_in_an_epoch_that_is_over_is_compared_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drops that were ordered in commits that are lost are not ordered any more: else what was deleted stays there for ever."""
    monkeypatch.setattr(admission, "_VERIFIED_AT_ONCE", 1)

    async def body(rig: Rig) -> None:
        gone = [await rig.deliver("ab") for _ in range(3)]
        await rig.keep(200)
        node = rig.nodes["a"]
        disk = node.snapshot()
        for key in gone:
            await rig.delete(key)
        await rig.keep(3000)  # until nobody knows of them any more
        assert [await rig.fate(key) for key in gone] == [None] * 3
        settle, calls = rig.index.settle_inventory, 0

        async def interrupted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise IndexTrouble("it went")
            return await settle(*args)

        monkeypatch.setattr(rig.index, "settle_inventory", interrupted)
        await node.close()
        node.put_back(disk)
        await rig.watch()
        old = rig.store.snapshot()
        with pytest.raises(IndexTrouble, match="it went"):
            await rig.admission.step(node)
        assert await rig.index.orders_total("a") != (0, 0)
        rig.store.restore(old)
        monkeypatch.undo()
        monkeypatch.setattr(
            rig.scrubber, "step", _rest
        )  # it comes to them too, but days later, and the birth mark may be gone by then
        await rig.keep(600)
        assert rig.index.epoch == 2 and Held.LIVE not in [await rig.held("a", key) for key in gone]
        assert await rig.listed() == []

    go(body)
