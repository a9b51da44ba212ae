"""A keeper, or the operator's command, is killed at any transaction of a change of membership: the next one goes on with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from powermail.index.sharing import MoveRow
from powermail.keeper.checkpoint import Checkpointer
from powermail.keeper.checkpoint_form import Kind
from powermail.keeper.drain import Drainer
from powermail.keeper.rebalance import REBALANCE, Rebalancer
from powermail.storage.contract import Held
from powermail.storage.layout import Standing
from tests.keeper.rig import DAY_S, Rig, go
from tests.keeper.test_drain import FOUR, begin, drain
from tests.keeper.test_expelled import NOTES, with_notes
from tests.keeper.test_leaving import kinds

_LAST = 400  # no work here has so many transactions


class Killed(BaseException):
    """The process is gone."""


def kill_at(rig: Rig, number: int, kept: bool) -> None:
    """The process ends at its so many-th transaction from now, before the index has it or behind that."""
    whole, left = rig.index.transact, number

    def transact(*args: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and not kept:
            raise Killed
        answer = whole(*args, **named)
        if left < 0:
            raise Killed
        return answer

    rig.index.transact = transact  # type: ignore[method-assign]


class Keeping:
    """What of a keeper works on membership."""

    def __init__(self, rig: Rig, drainer: Drainer) -> None:
        self.rig = rig
        self.drainer = drainer
        self.checkpointer = Checkpointer(rig.world, rig.cluster, rig.index)
        self.rebalancer = Rebalancer(rig.world, rig.cluster, rig.index, rig.fetcher)

    async def turn(self) -> None:
        rig = self.rig
        await self.drainer.step()
        await rig.repairer.step()
        await self.rebalancer.step()
        await self.checkpointer.write_due(rig.world.clock.now())
        for node in list(rig.cluster.nodes.values()):
            await rig.admission.step(node)
            await rig.reconciler.step(node)
            await rig.collector.step(node)
        await asyncio.sleep(1)

    async def until_done(self) -> None:
        for _ in range(60):
            await self.turn()
            under_way = [move for move in await self.rig.index.moves() if move.phase != "drained"]
            thin = await self.rig.index.under_copied_total(self.rig.repairer.counted_groups(), 2)
            if not under_way and thin == (0, 0) and not await self.rig.index.checkpoint_due(5e9, 1):
                return
        raise AssertionError(f"it does not come to its end: {await self.rig.index.moves()}")


Begin = Callable[[Rig], Awaitable[list[bytes]]]
Say = Callable[[Rig], Awaitable[None]]
Check = Callable[[Rig, list[bytes]], Awaitable[None]]


async def mail(rig: Rig) -> list[bytes]:
    """Messages, checkpoints and notes that depend on node a."""
    await with_notes(rig, "ab")
    keys = [await rig.deliver("ab") for _ in range(3)]
    assert await Checkpointer(rig.world, rig.cluster, rig.index).write_due(rig.world.clock.now() + DAY_S)
    return keys


async def redundant(rig: Rig, keys: list[bytes], but: str = "") -> None:
    """Every message has two good copies where they count, and is listed."""
    rig.index.settled()
    assert set(keys) <= set(await rig.listed())
    for key in keys:
        there = [name for name in await rig.believed(key) if name in rig.cluster.counted() and name != but]
        assert len({rig.nodes[name].group for name in there}) >= 2
        for name in there:
            await rig.nodes[name].verify(key)
    await rig.check()


async def say_remove(rig: Rig) -> None:
    await drain(rig, "a", "remove")


async def removed(rig: Rig, keys: list[bytes]) -> None:
    assert "a" not in {row.id for row in await rig.index.node_rows()} and "a" not in rig.cluster.nodes
    await redundant(rig, keys, "a")
    for name in "bcd":
        assert await kinds(rig, name) >= NOTES
    assert sum([Kind.WHOLE in await kinds(rig, name) for name in "bcd"]) >= 2


async def say_drain(rig: Rig) -> None:
    await drain(rig, "a")


async def drained(rig: Rig, keys: list[bytes]) -> None:
    assert rig.cluster.standing("a") is Standing.DRAINING and "a" in rig.cluster.nodes
    await redundant(rig, keys, "a")


async def say_expel(rig: Rig) -> None:
    rig.away("a")
    await rig.watch()
    assert await rig.index.expel("a", (await rig.index.layout()).version)


async def say_replace(rig: Rig) -> None:
    """As the operator's command, which he says again when it was killed."""
    if rig.nodes["a"].incarnation == rig.old:  # type: ignore[attr-defined]
        rig.nodes["a"].miss()
        await rig.nodes["a"].initialise()
    await rig.index.forget_damages("a")
    await rig.cluster.watch(rig.nodes["a"])


async def replaced(rig: Rig, keys: list[bytes]) -> None:
    assert (await rig.row("a")).incarnation == rig.nodes["a"].incarnation != rig.old  # type: ignore[attr-defined]
    await redundant(rig, keys)
    for name in "abc":
        assert await kinds(rig, name) >= NOTES


async def say_rebalance(rig: Rig) -> None:
    for node in rig.nodes.values():
        node.free_octets = 2000
    await rig.index.note_move(MoveRow(REBALANCE, "moving", 10, 0, rig.world.clock.now()))


async def rebalanced(rig: Rig, keys: list[bytes]) -> None:
    await redundant(rig, keys)
    for key in keys:
        believed = await rig.believed(key)
        for name in rig.nodes:
            assert (await rig.held(name, key) is Held.LIVE) is (name in believed), "no copy is left that nobody knows of"


CHANGES: dict[str, tuple[Say, Check]] = {
    "drain": (say_drain, drained),
    "remove": (say_remove, removed),
    "expel": (say_expel, removed),
    "replace": (say_replace, replaced),
    "rebalance": (say_rebalance, rebalanced),
}


async def is_said(rig: Rig, change: str) -> bool:
    """Whether the operator finds that what he said has begun; else he says it again."""
    row = (await rig.index.layout()).row("a")
    if change == "drain":
        return row is not None and row.state is Standing.DRAINING
    if change == "remove":
        return row is None or any(move.name == "remove a" for move in await rig.index.moves())
    return change == "expel" and row is None


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_it_goes_on_wherever_it_was_killed(change: str, kept: bool) -> None:
    say, check = CHANGES[change]
    killed = 0

    def at(number: int) -> bool:
        """True if there was a transaction so late."""
        nonlocal killed
        happened = False

        async def body(rig: Rig) -> None:
            nonlocal happened
            keys = await mail(rig)
            keeping = Keeping(rig, await begin(rig))
            rig.old = rig.nodes["a"].incarnation  # type: ignore[attr-defined]
            kill_at(rig, number, kept)
            try:
                await say(rig)
                for _ in range(6):
                    await keeping.turn()
            except Killed:
                happened = True
            await rig.restart()
            drainer = await begin(rig)
            if not await is_said(rig, change):
                await say(rig)
            await Keeping(rig, drainer).until_done()
            await check(rig, keys)

        go(body, FOUR)
        return happened

    number = 0
    while number < _LAST and at(number):
        killed += 1
        number += 1 + number // 8
    assert killed > 2, "it had transactions to be killed at"
