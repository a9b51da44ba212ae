"""Keepers and sites: repair fills the site without a copy, nothing moves into fewer sites, what lies together is dispersed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from powermail.index.contract import Fate
from powermail.index.sharing import MoveRow
from powermail.keeper.disperse import Disperser, sites_of_copies, wanted_sites
from powermail.keeper.following import LayoutFollower, told
from powermail.keeper.rebalance import REBALANCE, Rebalancer
from powermail.keeper.repair import Repairer
from powermail.storage.contract import Held
from powermail.storage.layout import LayoutChange, Standing
from tests.keeper.rig import Rig, go
from tests.keeper.test_drain import say

SITES = {"a": "north", "b": "north", "c": "south", "d": "south"}


def sited(work: Callable[[Rig, Disperser], Coroutine[Any, Any, None]], apart: bool = True) -> None:
    """A rig of four groups in two sites."""

    async def body(rig: Rig) -> None:
        rig.following = LayoutFollower(rig.world, rig.cluster, rig.index, "/layout")  # type: ignore[attr-defined]
        rig.cluster._make = lambda row: rig.nodes.get(row.id)
        rig.cluster._wants_apart = apart
        said = [LayoutChange(name, f"group {name}", site=site) for name, site in SITES.items()]
        await rig.following.start(said)  # type: ignore[attr-defined]
        await work(rig, Disperser(rig.world, rig.cluster, rig.index, rig.repairer))

    go(body, {name: f"group {name}" for name in SITES})


async def lie(rig: Rig, keys: list[bytes]) -> list[set[str]]:
    """Sites in which each message lies, as the index believes and the nodes have it."""
    found = []
    for key in keys:
        believed = await rig.believed(key)
        for name in rig.nodes:
            assert (await rig.held(name, key) is Held.LIVE) is (name in believed)
        assert len(believed) == 2, "no more copies than are required, and no fewer"
        found.append({SITES[name] for name in believed})
    return found


async def too_few(rig: Rig) -> int:
    """Messages in fewer sites than they could lie in, as the status counts them."""
    return (await rig.index.under_copied_total(sites_of_copies(rig.cluster), wanted_sites(rig.cluster)))[0]


def test_what_came_while_sites_were_cut_off_is_brought_apart_when_they_are_back() -> None:
    """And keeps its copies, one in each; a message that was apart already is left alone."""

    async def body(rig: Rig, disperser: Disperser) -> None:
        apart = [await rig.deliver("ac") for _ in range(3)]
        for name in "cd":
            rig.away(name)
        await rig.watch()
        together = [await rig.deliver("ab") for _ in range(3)]
        await disperser.step()
        assert [await rig.believed(key) for key in together] == [("a", "b")] * 3 and await too_few(rig) == 0, (
            "it cannot be helped"
        )
        for name in "cd":
            await rig.back(name)
        assert await too_few(rig) == 3
        before = [await rig.believed(key) for key in apart]
        while await disperser.step() == 0.0:
            await rig.each(rig.collector.step)
        assert await lie(rig, [*together, *apart]) == [{"north", "south"}] * 6
        assert [await rig.believed(key) for key in apart] == before
        assert await too_few(rig) == 0 and rig.world.counters.get("keeper.dispersed") == 3
        await rig.check()

    sited(body)


def test_with_near_copies_nothing_is_dispersed() -> None:
    async def body(rig: Rig, disperser: Disperser) -> None:
        key = await rig.deliver("ab")
        assert await disperser.step() > 1 and await rig.believed(key) == ("a", "b")

    sited(body, apart=False)


def test_a_message_that_dies_meanwhile_stays_dead() -> None:
    """P8: law 8 says no to the copy, and orders its tombstone."""

    async def body(rig: Rig, disperser: Disperser) -> None:
        key = await rig.deliver("ab")
        copy = rig.fetcher.copy

        async def dies(*asked: Any) -> Any:
            receipt = await copy(*asked)
            await rig.delete(key)
            return receipt

        rig.fetcher.copy = dies  # type: ignore[method-assign,assignment]
        await disperser.step()
        await rig.keep(120)
        assert await rig.fate(key) in (Fate.DEAD, None)
        assert all([await rig.held(name, key) is not Held.LIVE for name in rig.nodes])
        await rig.check()

    sited(body)


def test_nothing_is_let_go_of_because_of_a_copy_that_is_only_believed() -> None:
    """P1: the belief may be wrong, as after a disk has lost something."""

    async def body(rig: Rig, disperser: Disperser) -> None:
        keys = [await rig.deliver("ab") for _ in range(8)]
        for number, key in enumerate(keys):
            rig.nodes["ab"[number % 2]].lose(key)
        while await disperser.step() == 0.0:
            await rig.each(rig.collector.step)
        for number, key in enumerate(keys):
            left = [name for name in rig.nodes if await rig.held(name, key) is Held.LIVE]
            assert len(left) == 2 and "ba"[number % 2] in left and {SITES[name] for name in left} == {"north", "south"}

    sited(body)


def test_what_is_thin_is_repairs_first_and_repair_fills_the_other_site() -> None:
    async def body(rig: Rig, disperser: Disperser) -> None:
        thin = [await rig.deliver("a") for _ in range(10)]
        await disperser.step()
        assert [await rig.believed(key) for key in thin] == [("a",)] * 10
        while await rig.repairer.step() == 0.0:
            await asyncio.sleep(0.1)
        assert await lie(rig, thin) == [{"north", "south"}] * 10
        assert await disperser.step() > 1, "there is nothing left to do"

    sited(body)


def test_repair_does_not_wait_for_a_site_that_is_away() -> None:
    """R groups are a promise (P13), sites a wish."""

    async def body(rig: Rig, disperser: Disperser) -> None:
        key = await rig.deliver("ac")
        for name in "cd":
            rig.away(name)
        repairer = Repairer(rig.world, rig.cluster, rig.index, rig.fetcher, 10.0)
        await rig.watch()
        await repairer.step()
        await asyncio.sleep(11)
        while await repairer.step() == 0.0:
            await asyncio.sleep(1)
        assert set(await rig.believed(key)) == {"a", "b", "c"}

    sited(body)


def test_rebalancing_moves_nothing_into_fewer_sites() -> None:
    async def body(rig: Rig, disperser: Disperser) -> None:
        keys = [await rig.deliver("ac") for _ in range(30)]
        for name, node in rig.nodes.items():
            node.free_octets = 1 << 40 if name == "d" else 3000  # the emptiest by far
        rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)
        await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))
        for _ in range(20):
            await rebalancer.step()
            await rig.each(rig.collector.step)
        assert await lie(rig, keys) == [{"north", "south"}] * 30
        assert "d" in {name for key in keys for name in await rig.believed(key)}, "it moved what it could"

    sited(body)


def test_a_node_that_is_emptied_leaves_its_messages_in_two_sites() -> None:
    async def body(rig: Rig, disperser: Disperser) -> None:
        keys = [await rig.deliver("ac") for _ in range(5)]
        await say(rig, LayoutChange("c", state=Standing.DRAINING))
        while await rig.repairer.step() == 0.0:
            await asyncio.sleep(0.1)
        for key in keys:
            assert {SITES[name] for name in await rig.believed(key) if name != "c"} == {"north", "south"}

    sited(body)


def test_a_site_in_the_settings_counts_again_only_when_it_changes() -> None:
    """As group, priority and address do; and settings without one say what the release before them did (P19)."""
    assert told("g", 1, "") == "g\t1\t" and told("g", 1, "", "north") == "g\t1\t\tnorth"

    async def body(rig: Rig, disperser: Disperser) -> None:
        async def start(site: str) -> str:
            following = LayoutFollower(rig.world, rig.cluster, rig.index, "/layout")
            await following.start([LayoutChange("a", "group a", site=site or None, told=told("group a", 1, "", site))])
            row = (await rig.index.layout()).row("a")
            assert row is not None
            return row.site

        assert await start("") == "north"
        assert await start("east") == "east"
        await say(rig, LayoutChange("a", site="moved"))
        assert await start("east") == "moved"
        assert await start("west") == "west"
        assert await start("") == "", "the settings say no more that it stands there"

    sited(body)
