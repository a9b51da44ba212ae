"""Two processes keep one index at once: what one does is no loss to the other, and one goes on where the other stopped."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Fate
from tests.keeper.rig import Rig, two


async def keep(one: Rig, other: Rig, seconds: float) -> None:
    await asyncio.gather(one.keep(seconds), other.keep(seconds))


def epochs(rig: Rig) -> int:
    """How many were raised, by whichever process."""
    return rig.world.counters.get("law.11.epochs")


def test_two_that_write_and_keep_find_no_loss_in_what_the_other_did() -> None:
    async def body(one: Rig, other: Rig) -> None:
        await keep(one, other, 40)
        keys = []
        for _ in range(4):
            keys += [await one.deliver("ab"), await other.deliver("bc")]
            await keep(one, other, 15)
        await one.delete(keys[0])
        await other.delete(keys[1])
        await keep(one, other, 60)
        assert await one.listed() == await other.listed() == keys[2:]
        assert (one.index.epoch, other.index.epoch, epochs(one)) == (1, 1, 0)
        assert await one.index.orders_total("a") == await one.index.orders_total("b") == (0, 0), "both told the nodes"
        assert not [line for line in one.log.lines if "writer slot" in line or "epoch 1 of" in line], "no mark was refused"
        await one.check()

    two(body)


def test_two_that_notice_one_loss_raise_one_epoch_and_bring_the_index_back() -> None:
    async def body(one: Rig, other: Rig) -> None:
        await keep(one, other, 40)
        first = await other.deliver("ac")
        old = one.store.snapshot()
        kept, gone = await one.deliver("ab"), await other.deliver("bc")
        await one.delete(gone)
        await keep(one, other, 40)
        one.store.restore(old)
        await keep(one, other, 120)
        assert epochs(one) == 1 and one.index.epoch == other.index.epoch == 2
        assert one.numbering() and not one.catching_up()
        assert await one.listed() == await other.listed() == [first, kept]
        assert await one.fate(gone) is not Fate.LIVE
        box = await one.index.find_mailbox("amy", "INBOX")
        assert box is not None and box.uid_next > limits.EPOCH_JUMP
        await one.check()

    two(body)


def test_an_epoch_that_one_process_raised_before_it_died_is_begun_by_the_other() -> None:
    async def body(one: Rig, other: Rig) -> None:
        await keep(one, other, 40)
        key = await one.deliver("ab")
        await one.epochs.raise_epoch("a test")
        await one.index.close()  # and nothing more is heard of it
        with pytest.raises(IndexTrouble):
            await other.deliver("bc")
        await other.keep(90)
        assert epochs(one) == 1 and other.index.epoch == 2, "the same epoch, not one more"
        assert other.numbering() and not other.catching_up()
        assert key in await other.listed() and len(await other.listed()) == 2
        await other.check()

    two(body)


def test_a_keeper_that_was_held_up_in_an_epoch_changes_nothing_of_the_next() -> None:
    """It wakes between its look at the nodes and what it would write."""

    async def body(one: Rig, other: Rig) -> None:
        await keep(one, other, 40)
        await one.deliver("ab")
        await one.epochs.raise_epoch("a test")
        held, goes_on = asyncio.Event(), asyncio.Event()
        begin = one.index.begin_epoch

        async def late(epoch: int) -> bool:
            held.set()
            await goes_on.wait()
            return await begin(epoch)

        one.index.begin_epoch = late  # type: ignore[method-assign]
        first = asyncio.ensure_future(one.epochs.step())
        await held.wait()
        await other.epochs.raise_epoch("again")
        assert not other.numbering()
        goes_on.set()
        await first
        assert not other.numbering(), "the second epoch is durable nowhere yet"
        one.index.begin_epoch = begin  # type: ignore[method-assign]
        await keep(one, other, 90)
        assert other.numbering() and other.index.epoch == 3
        await one.check()

    two(body)


def test_a_node_that_one_process_admitted_is_no_witness_for_the_other() -> None:
    """Law 11: its disk was replaced after commits were lost, and before anybody noticed."""

    async def body(one: Rig, other: Rig) -> None:
        await keep(one, other, 60)
        await one.nodes["a"].close()
        await one.nodes["a"].initialise()
        one.away("b")
        await one.watch()
        assert (await other.row("a")).boot, "the other process has seen nothing of it"
        await other.epochs.raise_epoch("a test")
        assert not (await other.row("a")).boot
        await other.back("b")
        await keep(one, other, 150)
        assert other.numbering() and not other.catching_up() and (await other.row("a")).boot
        await one.check()

    two(body)
