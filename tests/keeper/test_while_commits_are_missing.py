"""While it is not known which commits an index has lost, or not all was entered again, keepers conclude nothing (law 11)."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.index.sharing import MoveRow
from powermail.keeper.rebalance import REBALANCE, Rebalancer
from powermail.storage.contract import Held, Item, Position
from tests.keeper.rig import DAY_S, Rig, go
from tests.keeper.test_drain import begin, drain

MISSING = pytest.mark.parametrize("missing", ["numbers", "entries"])


def miss(rig: Rig, missing: str, there: bool) -> None:
    """The index as it is behind a loss, before the new epoch has begun, or before all was walked; and behind that."""
    if missing == "numbers":
        rig.index.state.numbering = there
    else:
        rig.index.state.catching_up = not there


@MISSING
def test_nothing_is_forgotten_and_no_round_begins(missing: str) -> None:
    async def body(rig: Rig) -> None:
        await rig.delete(await rig.deliver("ab"))
        await rig.each(rig.collector.step)
        round_ = await rig.index.raise_round()
        for name in "abc":
            await rig.reconciler.advance(rig.nodes[name], 0.0, None, round_)
        miss(rig, missing, there=False)
        rig.world.clock.skew_s += DAY_S  # type: ignore[attr-defined]
        before = rig.index.state.round
        for _ in range(3):
            await rig.forgetter.step()
        assert rig.index.state.round == before and await rig.index.dead_total() == 1
        assert not rig.world.counters.get("law.9.rounds")
        miss(rig, missing, there=True)
        await rig.keep(limits.ROUND_INTERVAL_S + 100)
        assert await rig.index.dead_total() == 0

    go(body)


@MISSING
def test_no_record_is_taken_out_of_a_log(missing: str) -> None:
    async def body(rig: Rig) -> None:
        asked: list[Position] = []

        async def compactable(below: Position, at: float) -> list[bytes] | None:
            asked.append(below)
            return None

        for node in rig.nodes.values():
            node.compactable = compactable  # type: ignore[method-assign]
        miss(rig, missing, there=False)
        await rig.each(rig.compactor.step)
        assert not asked
        miss(rig, missing, there=True)
        await rig.each(rig.compactor.step)
        assert len(asked) == len(rig.nodes)

    go(body)


def test_nothing_is_copied_before_numbers_are_given() -> None:
    """What seems thin may be believed on disks that the lost commits knew."""

    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")
        miss(rig, "numbers", there=False)
        assert await rig.repairer.step() > 0.0
        assert [await rig.held(name, key) for name in "abc"] == [Held.LIVE, Held.ABSENT, Held.ABSENT]
        miss(rig, "numbers", there=True)
        await rig.repairer.step()
        assert len(await rig.believed(key)) == 2

    go(body)


def test_no_copy_is_judged_before_all_was_entered() -> None:
    """A copy without a row may be of a message whose row is what was lost."""

    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        asked: list[bytes] = []
        inventory = rig.nodes["a"].inventory

        async def seen(after: bytes, limit: int) -> list[Item]:
            asked.append(after)
            return await inventory(after, limit)

        rig.nodes["a"].inventory = seen  # type: ignore[method-assign]
        miss(rig, "entries", there=False)
        await rig.scrubber.step(rig.nodes["a"])
        assert not asked
        miss(rig, "entries", there=True)
        await rig.scrubber.step(rig.nodes["a"])
        assert asked

    go(body)


@MISSING
def test_no_node_is_emptied_and_nothing_is_moved(missing: str) -> None:
    """What lies elsewhere is not known: a node that goes, and a copy that is let go of, may be the last."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        keys = [await rig.deliver("ab") for _ in range(20)]
        for node in rig.nodes.values():
            node.free_octets = 2000
        await drain(rig, "c")
        await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))
        rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)
        before = await rig.index.moves()
        miss(rig, missing, there=False)
        await drainer.step()
        await rebalancer.step()
        assert await rig.index.moves() == before
        assert [await rig.held("c", key) for key in keys] == [Held.ABSENT] * len(keys)
        miss(rig, missing, there=True)
        await drainer.step()
        assert await rig.index.moves() != before

    go(body)
