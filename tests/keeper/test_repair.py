"""Repair: what is thin becomes whole again (P13)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Fate, MessageFacts
from powermail.keeper import endangered
from powermail.keeper.repair import at_once
from powermail.storage.contract import End, Held, Origin, Receipt, StorageNode
from tests.keeper.rig import Rig, go

FIVE = {"a": "north", "b": "south", "c": "west", "d": "east", "e": "up"}


def test_a_thin_message_gets_a_copy_in_another_group() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")
        await rig.repairer.step()
        believed = await rig.believed(key)
        assert len(believed) == 2 and "a" in believed
        origins = [item.origin for node in believed for item in await rig.nodes[node].inventory(b"", 10)]
        assert sorted(origins) == [Origin.DELIVERY, Origin.REPAIR]
        assert rig.repairer.rate > 0

    go(body)


def test_a_spare_gets_copies_only_while_regular_groups_cannot() -> None:
    async def body(rig: Rig) -> None:
        rig.nodes["c"].priority = 9
        first = await rig.deliver("a")
        await rig.repairer.step()
        assert await rig.believed(first) == ("a", "b")
        rig.away("b")
        await rig.watch()
        await rig.repairer.step()  # it is missed from now on
        await asyncio.sleep(301)
        while await rig.repairer.step() == 0.0:
            await asyncio.sleep(1)
        assert await rig.believed(first) == ("a", "b", "c")

    go(body)


def test_64_unrepairable_messages_starve_nobody() -> None:
    async def body(rig: Rig) -> None:
        lost = [await rig.deliver("a") for _ in range(limits.REPAIR_BATCH)]
        thin = [await rig.deliver("a") for _ in range(3)]
        assert max(lost) < min(thin), "they come first"
        for key in lost:
            rig.nodes["a"].damage(key)
        await rig.keep(60)
        assert [len(await rig.believed(key)) for key in thin] == [2, 2, 2]
        assert rig.repairer.unrepairable_total == limits.REPAIR_BATCH
        assert set(rig.repairer.unrepairable) <= set(lost) and rig.repairer.unrepairable
        assert [await rig.held("a", key) for key in lost] == [Held.LIVE] * len(lost), "nothing is thrown away"

    go(body)


def test_totals_are_not_counted_for_every_batch() -> None:
    async def body(rig: Rig) -> None:
        for _ in range(3 * limits.REPAIR_BATCH):
            await rig.deliver("a")
        count, counted = rig.index.under_copied_total, []

        async def counting(*asked: object) -> tuple[int, int]:
            counted.append(asked)
            return await count(*asked)  # type: ignore[arg-type]

        rig.index.under_copied_total = counting  # type: ignore[method-assign,assignment]
        for _ in range(4):
            await rig.repairer.step()
        assert len(counted) == 1
        assert rig.repairer.left == 0

    go(body)


def test_a_bad_source_is_noted_and_another_is_used() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.nodes["a"].damage(key)
        rig.away("b")
        await rig.repairer.step()
        await asyncio.sleep(301)
        await rig.repairer.step()
        assert await rig.index.suspects("a", b"", 10) == [key]
        assert await rig.held("a", key) is Held.LIVE, "it may be the best there is"
        await rig.back("b")
        await rig.keep(100)
        believed = await rig.believed(key)
        assert len(believed) == 2
        for node in believed:
            await rig.nodes[node].verify(key)
        await rig.check()

    go(body)


def test_a_copy_that_is_there_already_is_believed_and_not_made_again() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")
        await rig.put("b", key, Origin.REPAIR)
        await rig.put("c", key, Origin.REPAIR)
        await rig.repairer.step()
        assert len(await rig.believed(key)) == 2
        assert not any("append" in node.calls for node in rig.nodes.values())

    go(body)


def before_the_note(rig: Rig, meanwhile: Callable[[str], Awaitable[None]]) -> list[str]:
    """What happens between the next copy and the note about it; the list then names the node of the copy."""
    believe, names = rig.index.believe, list[str]()

    async def late(keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
        rig.index.believe = believe  # type: ignore[method-assign]
        names.append(node)
        await meanwhile(node)
        return await believe(keys, node, end)

    rig.index.believe = late  # type: ignore[method-assign]
    return names


def test_a_copy_of_a_message_that_died_meanwhile_is_ordered_away() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")
        before_the_note(rig, lambda _: rig.delete(key))
        await rig.repairer.step()
        assert await rig.fate(key) is Fate.DEAD
        await rig.each(rig.collector.step)
        assert Held.LIVE not in [await rig.held(node, key) for node in "abc"]

    go(body)


def behind_the_copy(rig: Rig, meanwhile: Callable[[str], Awaitable[None]]) -> list[str]:
    """The same, right behind the next copy."""
    copy, names = rig.fetcher.copy, list[str]()

    async def late(key: bytes, source: StorageNode, target: StorageNode) -> Receipt:
        rig.fetcher.copy = copy  # type: ignore[method-assign]
        receipt = await copy(key, source, target)
        names.append(target.id)
        await meanwhile(target.id)
        return receipt

    rig.fetcher.copy = late  # type: ignore[method-assign]
    return names


@pytest.mark.parametrize("when", [before_the_note, behind_the_copy], ids=["before the note", "behind the copy"])
@pytest.mark.parametrize("replaced", [True, False], ids=["its disk was replaced", "it was dropped"])
def test_a_repaired_copy_that_went_before_its_note_is_not_believed(
    replaced: bool, when: Callable[[Rig, Callable[[str], Awaitable[None]]], list[str]]
) -> None:
    """Law 8: the note is of a disk that is gone, or older than the drop that was confirmed while the keeper slept."""

    async def body(rig: Rig) -> None:
        key = await rig.deliver("a")

        async def goes(node: str) -> None:
            if replaced:
                await rig.nodes[node].close()
                await rig.nodes[node].initialise()
                await rig.watch()
                return
            done = await rig.nodes[node].drop([(key, await rig.nodes[node].verify(key))], rig.index.mark())
            await rig.index.confirm_drops(node, [], done)

        names = when(rig, goes)
        await rig.repairer.step()
        assert await rig.held(names[0], key) is Held.ABSENT
        assert await rig.believed(key) == ("a",)
        await rig.keep(60)
        assert len(await rig.believed(key)) == 2

    go(body)


def test_a_node_that_hangs_delays_repair_once() -> None:
    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("a") for _ in range(20)]
        rig.nodes["b"].hang()
        began = rig.world.clock.monotonic()
        while min([len(await rig.believed(key)) for key in keys]) < 2:
            await rig.repairer.step()
        assert rig.world.clock.monotonic() - began < 3 * limits.NODE_CALL_TIMEOUT_S
        rig.nodes["b"].release()

    go(body)


def test_what_waits_for_the_index_or_a_node_waits_together() -> None:
    """P13: 10,000 messages in a minute, where each takes some milliseconds of waiting."""

    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("a") for _ in range(limits.REPAIR_BATCH)]
        copy, believe, under_way, most, notes = rig.fetcher.copy, rig.index.believe, 0, 0, 0

        async def slow(key: bytes, source: StorageNode, target: StorageNode) -> Receipt:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.1)
            under_way -= 1
            return await copy(key, source, target)

        async def note(keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
            nonlocal notes
            notes += 1
            await asyncio.sleep(0.1)
            return await believe(keys, node, end)

        rig.fetcher.copy, rig.index.believe = slow, note  # type: ignore[method-assign]
        began = rig.world.clock.monotonic()
        assert await rig.repairer.step() == 0.0
        assert [len(await rig.believed(key)) for key in keys] == [2] * len(keys)
        assert rig.world.clock.monotonic() - began < 0.4
        assert most == limits.REPAIR_BATCH and notes == 2, "b and c take them"

    go(body)


def test_large_messages_are_repaired_alone() -> None:
    """So much is in memory and on its way at the same time, whatever the size of messages."""
    large, small = limits.REPAIR_AT_ONCE_OCTETS, 1000
    sizes = [small] * 20 + [large, small, large // 2, large // 2, large + 1, small]
    facts = [MessageFacts(b"%02d" % number, size, b"", ("a",), 1) for number, size in enumerate(sizes)]
    some = list(at_once(facts))
    assert [message for batch in some for message in batch] == facts
    assert [len(batch) for batch in some] == [20, 1, 2, 1, 1, 1]


def test_what_was_copied_when_the_index_was_away_is_repaired_the_next_time() -> None:
    async def body(rig: Rig) -> None:
        thin = [await rig.deliver("a") for _ in range(20)]
        believe, failing = rig.index.believe, [True]

        async def fails(keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
            if failing:
                failing.pop()
                raise IndexTrouble("locked")
            return await believe(keys, node, end)

        rig.index.believe = fails  # type: ignore[method-assign]
        with pytest.raises(IndexTrouble):
            await rig.repairer.step()
        assert not failing
        await rig.repairer.step()
        assert [len(await rig.believed(key)) for key in thin] == [2] * len(thin)

    go(body)


def test_short_absences_are_not_repaired_around() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.away("b")
        await rig.keep(200)
        assert await rig.believed(key) == ("a", "b")
        await rig.keep(200)
        assert await rig.believed(key) == ("a", "b", "c")

    go(body)


def test_two_short_absences_are_no_long_one() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        for _ in range(3):
            rig.away("b")
            await rig.keep(200)
            await rig.back("b")
            await rig.keep(20)
        assert await rig.believed(key) == ("a", "b")

    go(body)


def test_what_repair_says_for_status_rises_falls_and_goes_with_the_job() -> None:
    async def body(rig: Rig) -> None:
        early = rig.key()
        for _ in range(2 * limits.REPAIR_BATCH):
            await rig.deliver("a")
        rig.nodes["a"].damage(lost := await rig.deliver("a"))
        await rig.repairer.step()
        assert rig.repairer.left == limits.REPAIR_BATCH + 1 and rig.repairer.rate > 0
        assert rig.repairer.seconds_left() == round(rig.repairer.left / rig.repairer.rate, 1)
        for _ in range(3):
            await rig.repairer.step()
        assert rig.repairer.unrepairable.keys() == {lost} and rig.repairer.unrepairable_total == 1
        await rig.repairer.step()  # it is in the middle of a turn
        rig.repairer.let_go()
        assert (rig.repairer.left, rig.repairer.rate, rig.repairer.seconds_left()) == (0, 0.0, None)
        assert (rig.repairer.unrepairable, rig.repairer.unrepairable_total) == ({}, 0)
        await rig.deliver("a", early)
        await rig.repairer.step()
        assert len(await rig.believed(early)) == 2, "it is ours again, from the beginning"

    go(body)


async def in_groups(rig: Rig, keys: Sequence[bytes]) -> list[int]:
    return [len(await rig.believed(key)) for key in keys]


def test_what_is_in_the_fewest_groups_is_repaired_first_and_until_it_is_whole() -> None:
    async def body(rig: Rig) -> None:
        two = [await rig.deliver("ab") for _ in range(limits.REPAIR_BATCH)]
        one = [await rig.deliver("a") for _ in range(10)]
        assert max(two) < min(one), "by key it would come last"
        await rig.repairer.step()
        assert await in_groups(rig, one) == [2] * 10
        assert sorted(await in_groups(rig, two)) == [2] * 10 + [3] * 54, "the batch is filled"
        assert rig.repairer.left == 20, "with two copies of three it is thin as before"
        await rig.repairer.step()
        assert await in_groups(rig, one + two) == [3] * 74, "in one turn"
        assert rig.repairer.left == 0

    go(body, FIVE, 3)


def test_a_batch_of_the_most_endangered_is_followed_by_the_next_of_them() -> None:
    async def body(rig: Rig) -> None:
        two = [await rig.deliver("ab") for _ in range(10)]
        one = [await rig.deliver("a") for _ in range(2 * limits.REPAIR_BATCH)]
        for _ in range(2):
            await rig.repairer.step()
        assert await in_groups(rig, two) == [2] * 10
        assert await in_groups(rig, one) == [2] * len(one)
        await rig.repairer.step()
        assert await in_groups(rig, two) == [3] * 10

    go(body, FIVE, 3)


@pytest.mark.parametrize("remembered", [10_000, 10])
def test_endangered_messages_that_cannot_be_helped_are_tried_once_in_a_turn(
    remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often repair looks for what is worse off, and also when they are too many to be remembered."""
    monkeypatch.setattr(endangered, "_REMEMBERED_MAX", remembered)

    async def body(rig: Rig) -> None:
        lost = [await rig.deliver("a") for _ in range(2 * limits.REPAIR_BATCH)]
        thin = [await rig.deliver("bc") for _ in range(3 * limits.REPAIR_BATCH)]
        rig.away("a")
        await rig.watch()
        for _ in range(5):
            await rig.repairer.step()
            await asyncio.sleep(5)
        assert await in_groups(rig, thin) == [3] * len(thin)
        await rig.repairer.step()
        assert rig.repairer.unrepairable_total == len(lost)
        await rig.back("a")
        for _ in range(4):
            await rig.repairer.step()
        assert await in_groups(rig, lost) == [3] * len(lost), "they are tried again in the next turn"

    go(body, FIVE, 3)


def test_a_second_loss_in_a_turn_is_helped_before_the_rest_of_the_turn() -> None:
    async def body(rig: Rig) -> None:
        whole = [await rig.deliver("bcd") for _ in range(3)]
        bad = await rig.deliver("b")
        rig.nodes["b"].damage(bad)  # what cannot be helped is passed
        thin = [await rig.deliver("ae") for _ in range(5 * limits.REPAIR_BATCH)]
        for _ in range(2):
            await rig.repairer.step()
        for node in "cd":
            await rig.nodes[node].close()
            await rig.nodes[node].initialise()
        await rig.watch()
        assert await in_groups(rig, whole) == [1] * 3
        await asyncio.sleep(5)
        await rig.repairer.step()
        assert await in_groups(rig, whole) == [2] * 3
        await rig.repairer.step()
        assert await in_groups(rig, whole) == [3] * 3, "among its new equals it is behind those that were tried, and comes"
        assert 2 in await in_groups(rig, thin), "the turn goes on"
        assert rig.repairer.unrepairable_total == 0, "the turn is not over"

    go(body, FIVE, 3)
