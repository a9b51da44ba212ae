"""What a disk takes with it that goes without a word, expelled or replaced, is made anew by those that stay (P10, P15)."""

from __future__ import annotations

import asyncio

import pytest

from powermail.index.contract import Head
from powermail.index.sharing import HAND_ON
from powermail.keeper.checkpoint import Checkpointer, heads_record, write_heads, write_purged
from powermail.keeper.checkpoint_form import Kind
from powermail.keeper.drain import Drainer
from powermail.storage.layout import LayoutChange, Standing
from tests.keeper.rig import DAY_S, Rig, go
from tests.keeper.test_drain import FOUR, begin, say
from tests.keeper.test_leaving import kinds

NOTES = {Kind.PURGED, Kind.HEADS}


async def with_notes(rig: Rig, on: str) -> Drainer:
    """A keeper, and far heads and a note of a purge on these two nodes alone."""
    drainer = await begin(rig)
    mark = await rig.index.proof(rig.index.connection)
    far = heads_record(rig.world, [Head("amy", "INBOX", 7, 1000, 1000, 1)])
    await write_heads([rig.nodes[name] for name in on], 2, far, mark)
    others = "".join(name for name in rig.nodes if name not in on)
    for name in others:
        rig.away(name)
    await rig.watch()
    await write_purged(rig.world, rig.cluster, rig.index, "bob")
    for name in others:
        await rig.back(name)
    assert [await kinds(rig, name) for name in on + others] == [NOTES] * len(on) + [set()] * len(others)
    return drainer


async def forced_out(rig: Rig, node: str) -> None:
    """Its machine burnt down, and the operator expels it."""
    rig.away(node)
    await rig.watch()
    assert await rig.index.expel(node, (await rig.index.layout()).version)


async def handing_on(rig: Rig) -> list[str]:
    """Notes of the moves that hand on; none when all was."""
    return [move.note for move in await rig.index.moves() if move.name.startswith(f"{HAND_ON} ")]


def test_notes_that_lie_on_too_few_groups_without_an_expelled_node_are_handed_on() -> None:
    """P10, law 13: nobody asked it for anything when it went."""

    async def body(rig: Rig) -> None:
        drainer = await with_notes(rig, "ab")
        await forced_out(rig, "a")
        await drainer.step()
        assert await kinds(rig, "c") == NOTES and await handing_on(rig) == []
        assert rig.world.counters.get("keeper.handed_on") == 1

    go(body)


def test_notes_that_lay_on_a_disk_that_was_replaced_are_handed_on() -> None:
    """The new one has nothing of what the old one had; nobody was expelled."""

    async def body(rig: Rig) -> None:
        drainer = await with_notes(rig, "ab")
        rig.nodes["a"].miss()
        await rig.nodes["a"].initialise()
        await rig.watch()
        await drainer.step()
        assert await handing_on(rig) == []
        assert [await kinds(rig, name) for name in "abc"] == [NOTES] * 3

    go(body)


def test_a_keeper_that_dies_before_it_handed_on_leaves_that_to_the_next() -> None:
    async def body(rig: Rig) -> None:
        await with_notes(rig, "ab")
        await forced_out(rig, "a")
        assert await kinds(rig, "c") == set()
        await rig.restart()
        await (await begin(rig)).step()
        assert await kinds(rig, "c") == NOTES and await handing_on(rig) == []

    go(body)


def test_what_only_a_node_that_is_away_may_have_is_waited_for() -> None:
    """The expelled one and it had the notes: who hands on without it has lost them."""

    async def body(rig: Rig) -> None:
        drainer = await with_notes(rig, "ab")
        rig.away("b")
        await forced_out(rig, "a")
        for _ in range(3):
            await drainer.step()
        assert ["b" in note for note in await handing_on(rig)] == [True]
        await rig.back("b")
        await drainer.step()
        assert await kinds(rig, "c") == await kinds(rig, "d") == NOTES and await handing_on(rig) == []

    go(body, FOUR)


def test_notes_wait_for_groups_enough() -> None:
    """With one group less than R they cannot lie on R: it is said, and done when a node comes."""

    async def body(rig: Rig) -> None:
        drainer = await with_notes(rig, "ab")
        await forced_out(rig, "a")
        await say(rig, LayoutChange("c", state=Standing.DRAINING))
        await drainer.step()
        assert any("only 1 groups" in note for note in await handing_on(rig))
        await say(rig, LayoutChange("c", state=Standing.ACTIVE))
        await drainer.step()
        assert await kinds(rig, "c") == NOTES and await handing_on(rig) == []

    go(body)


def test_a_checkpoint_that_was_being_written_to_a_node_that_is_expelled_is_written_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law 13: it lies on fewer than R groups, and nothing would be due any more."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        checkpointer = Checkpointer(rig.world, rig.cluster, rig.index)
        await rig.deliver("bc")
        await say(rig, LayoutChange("c", state=Standing.BLOCKED))
        done = rig.index.checkpoint_done

        async def late(*args: object) -> None:
            await say(rig, LayoutChange("c", state=Standing.ACTIVE))
            await forced_out(rig, "a")
            await rig.following.refresh()  # type: ignore[attr-defined]
            monkeypatch.setattr(rig.index, "checkpoint_done", done)
            await done(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(rig.index, "checkpoint_done", late)
        await checkpointer.write_due(rig.world.clock.now() + DAY_S)
        assert Kind.WHOLE not in await kinds(rig, "c")
        await checkpointer.write_due(rig.world.clock.now())
        assert Kind.WHOLE in await kinds(rig, "b") and Kind.WHOLE in await kinds(rig, "c")

    go(body)


def test_a_checkpoint_that_was_being_written_to_a_disk_that_is_replaced_is_written_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(rig: Rig) -> None:
        await begin(rig)
        checkpointer = Checkpointer(rig.world, rig.cluster, rig.index)
        await rig.deliver("ab")
        done = rig.index.checkpoint_done
        holders: list[str] = []

        async def late(plan: object, nodes: list[str], *rest: object) -> None:
            if not holders:
                holders.extend(nodes)
                rig.nodes[nodes[0]].miss()
                await rig.nodes[nodes[0]].initialise()
                await rig.watch()
            await done(plan, nodes, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(rig.index, "checkpoint_done", late)
        await checkpointer.write_due(rig.world.clock.now() + DAY_S)
        await checkpointer.write_due(rig.world.clock.now())
        found = [name for name in rig.nodes if Kind.WHOLE in await kinds(rig, name)]
        assert len(found) >= 2, "R groups have it"

    go(body)


def test_the_state_of_the_queue_is_written_anew_when_a_holder_of_it_goes() -> None:
    """Law 13: what waits to leave would be known to fewer than R groups until the next interval."""

    async def body(rig: Rig) -> None:
        await begin(rig)
        await say(rig, LayoutChange("c", state=Standing.BLOCKED))
        checkpointer = Checkpointer(rig.world, rig.cluster, rig.index)
        await checkpointer.step()
        await say(rig, LayoutChange("c", state=Standing.ACTIVE))
        await checkpointer.step()
        assert Kind.QUEUE in await kinds(rig, "a") and Kind.QUEUE not in await kinds(rig, "c")
        await forced_out(rig, "a")
        await rig.following.refresh()  # type: ignore[attr-defined]
        await asyncio.sleep(1)
        await checkpointer.step()
        assert Kind.QUEUE in await kinds(rig, "c")

    go(body)


def test_a_node_that_was_expelled_gets_no_certificate_although_who_expelled_it_died() -> None:
    """The command ends the membership first, and the identity behind it."""

    async def body(rig: Rig) -> None:
        drainer = await begin(rig)
        await say(rig, LayoutChange("a", address="192.0.2.1:2700"))
        await forced_out(rig, "a")
        assert await rig.index.holders() == []
        await rig.following.refresh()  # type: ignore[attr-defined]
        await drainer.step()
        assert [holder.identity for holder in await rig.index.holders() if holder.expelled_at] == ["a"]

    go(body)
