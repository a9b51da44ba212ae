"""Marks, and what follows when the index lost commits (laws 10, 11)."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble
from powermail.index.contract import Fate, Head
from powermail.storage.contract import Held, Mark, NodeFacts, Origin
from tests.keeper.rig import DAY_S, Rig, go


async def _mark(rig: Rig, node: str) -> Mark:
    facts: NodeFacts = await rig.nodes[node].facts()
    return facts.mark


def test_every_node_gets_the_mark_while_anything_is_committed() -> None:
    async def body(rig: Rig) -> None:
        await rig.each(rig.marker.step)
        first = rig.index.mark()
        assert await _mark(rig, "c") == first
        await rig.deliver("ab")
        await rig.each(rig.marker.step)
        assert await _mark(rig, "c") == first, "not at once"
        await asyncio.sleep(limits.MARK_INTERVAL_S)
        await rig.each(rig.marker.step)
        assert [await _mark(rig, node) for node in "abc"] == [rig.index.mark()] * 3
        box = await rig.index.find_mailbox("amy", "INBOX")
        assert box is not None
        before, given = rig.index.mark(), 0
        while given < limits.MARK_NUMBERS_MAX:
            assert await _mark(rig, "c") == before
            await rig.each(rig.marker.step)
            uids = [entry.uid for entry in await rig.index.entries(box.id, 0, 2**32, limits.NUMBERS_AT_ONCE_MAX)]
            given += len(await rig.index.copy(box.id, uids, box.id))
        await rig.each(rig.marker.step)
        assert await _mark(rig, "c") == rig.index.mark(), "so many numbers do not wait, however few transactions gave them"

    go(body)


def test_at_the_end_a_sick_node_keeps_no_mark_from_the_others() -> None:
    async def body(rig: Rig) -> None:
        rig.nodes["a"].hang()
        await rig.index.rest()
        await rig.marker.put_all(3.0)
        assert await _mark(rig, "b") == rig.index.mark()
        rig.nodes["a"].release()

    go(body)


def test_an_index_that_lost_commits_is_noticed_by_any_node() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        kept, gone = await rig.deliver("ab"), await rig.deliver("bc")
        await rig.delete(gone)
        await rig.keep(60)
        await rig.restart(old)
        assert rig.catching_up() and not rig.numbering()
        with pytest.raises(IndexTrouble):
            await rig.listed()
        await rig.keep(60)
        assert rig.numbering() and not rig.catching_up()
        assert await rig.listed() == [kept]
        assert await rig.fate(gone) is not Fate.LIVE
        assert rig.index.epoch == 2
        await rig.check()

    go(body)


def test_the_same_backup_restored_twice_gives_two_epochs() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        await rig.deliver("ab")
        await rig.keep(60)
        seen = {}
        for _ in range(2):
            await rig.restart(old)
            await rig.keep(60)
            await rig.deliver("ab")
            await rig.keep(60)
            box = await rig.index.find_mailbox("amy", "INBOX")
            assert box is not None
            seen[rig.index.epoch] = box.uidvalidity, box.uid_next
        assert len(seen) == 2 and len(set(seen.values())) == 2

    go(body)


def test_a_second_life_of_an_epoch_is_a_rival() -> None:
    async def body(rig: Rig) -> None:
        await rig.nodes["b"].put_mark(Mark(1, {1: ("another", 5)}, 2))  # of an index that was restored before, too
        await rig.epochs.raise_epoch("a test")
        assert rig.index.epoch == 2 and await rig.index.lost(await _mark(rig, "b")) == "", "pruned slots prove nothing"
        await rig.epochs._begin()
        assert rig.index.epoch == 3

    go(body)


def test_an_epoch_is_above_all_that_nodes_know() -> None:
    async def body(rig: Rig) -> None:
        await rig.nodes["b"].put_mark(Mark(epoch=7))
        await rig.epochs.raise_epoch("a test")
        await rig.epochs._begin()
        assert rig.index.epoch == 8 and rig.numbering()
        assert (await _mark(rig, "c")).epoch == 8

    go(body)


def test_nothing_is_numbered_before_the_epoch_is_durable_on_R_groups() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        rig.nodes["b"].fail("no writes")
        rig.nodes["c"].fail("no writes")
        await rig.epochs.raise_epoch("a test")
        with pytest.raises(NodeTrouble, match="1 of 2 groups"):
            await rig.epochs.step()
        assert not rig.numbering()
        await rig.put("a", key)
        await rig.each(rig.reconciler.step)
        assert await rig.fate(key) is None
        await rig.nodes["b"].close()
        await rig.watch()
        await rig.keep(30)
        assert rig.numbering()
        assert (await _mark(rig, "b")).epoch == rig.index.epoch

    go(body)


def test_marks_of_enough_groups_are_read_before_an_epoch_begins() -> None:
    async def body(rig: Rig) -> None:
        await rig.nodes["b"].put_mark(Mark(epoch=7))
        await rig.nodes["b"].close()
        await rig.nodes["c"].close()
        await rig.epochs.raise_epoch("a test")
        assert rig.index.epoch == 2
        with pytest.raises(NodeTrouble, match="marks of 2 groups"):
            await rig.epochs.step()
        await rig.watch()
        await rig.keep(30)
        assert rig.index.epoch >= 8 and rig.numbering()

    go(body)


def test_the_heads_of_checkpoints_are_learned_before_numbers_are_given() -> None:
    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        box = await rig.index.find_mailbox("amy", "INBOX")
        assert box is not None
        rig.heads["b"] = [Head("amy", "INBOX", box.uidvalidity, 500, 900, 1)]
        await rig.epochs.raise_epoch("a test")
        await rig.keep(30)
        await rig.deliver("ab")
        box = await rig.index.find_mailbox("amy", "INBOX")
        assert box is not None and box.uid_next > limits.EPOCH_JUMP + 500

    go(body)


def test_what_only_one_node_shows_of_numbers_stands_on_R_groups_before_a_number_is_given() -> None:
    """Law 11: a checkpoint was interrupted on one node, and the same backup is restored twice; the second time that node is
    away, and so nobody knows how far the mailbox had got, unless it was written when it was read.
    """

    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        await rig.keep(60)  # the nodes belong to its history
        box = await rig.index.find_mailbox("amy", "INBOX")
        assert box is not None
        old, given = rig.store.snapshot(), {}
        far = Head("amy", "INBOX", box.uidvalidity, box.uid_next + limits.EPOCH_JUMP, box.modseq + 5, 1)
        rig.heads["a"] = [far]
        for away in ("", "a"):
            await rig.restart(old, away=away)
            await rig.epochs.raise_epoch("a test")
            await rig.keep(120)
            key = await rig.deliver("bc")
            box = await rig.index.find_mailbox("amy", "INBOX")
            assert box is not None
            (uid,) = [e.uid for e in await rig.index.entries(box.id, 0, 1 << 32, 100) if e.key == key]
            assert uid not in given
            given[uid] = rig.index.epoch
        assert min(given) > far.uid_next + limits.EPOCH_JUMP - 10
        assert rig.world.counters.get("law.11.far_heads") == 2, "b or c had it the second time"

    go(body)


def test_an_epoch_that_was_interrupted_goes_on() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        rig.nodes["b"].fail("no writes")
        rig.nodes["c"].fail("no writes")
        await rig.epochs.raise_epoch("a test")
        with pytest.raises(NodeTrouble):
            await rig.epochs.step()
        await rig.restart()
        assert not rig.numbering()
        await rig.keep(60)
        assert rig.numbering() and not rig.catching_up()
        assert await rig.listed() == [key]

    go(body)


def test_readers_wait_until_enough_groups_were_walked() -> None:
    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        await rig.keep(15)
        rig.away("c")
        await rig.epochs.raise_epoch("a test")
        rig.nodes["b"].fail_next("inventory", times=3)
        await rig.epochs._begin()
        await rig.reconciler.step(rig.nodes["a"])
        with pytest.raises(NodeTrouble, match="walks of 2 groups"):
            await rig.epochs.step()
        with pytest.raises(IndexTrouble):
            await rig.listed()
        await rig.keep(60)
        assert len(await rig.listed()) == 1
        assert (await rig.row("c")).owes_walk, "it is walked when it comes back"
        await rig.back("c")
        await rig.keep(60)
        assert not (await rig.row("c")).owes_walk

    go(body)


def test_a_disk_that_was_replaced_meanwhile_does_not_count_as_walked() -> None:
    async def body(rig: Rig) -> None:
        await rig.keep(60)  # the nodes belong to its history
        old = rig.store.snapshot()
        key = await rig.deliver("ab")
        await rig.keep(60)
        await rig.nodes["a"].close()
        await rig.nodes["a"].initialise()  # before repair could make it anew
        await rig.restart(old)
        await rig.epochs._begin()
        rig.away("b")
        await rig.each(rig.reconciler.step)
        assert not (await rig.row("a")).owes_walk and not (await rig.row("c")).owes_walk
        with pytest.raises(NodeTrouble, match="walks of 2 groups are needed, 1 are there"):
            await rig.epochs.step()
        assert rig.catching_up(), "what lay on a and b is not known yet"
        await rig.back("b")
        await rig.keep(100)
        assert not rig.catching_up()
        assert await rig.listed() == [key]
        assert (await rig.row("a")).boot

    go(body)


def test_an_index_restored_after_compaction_lists_everything() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        for node in rig.nodes.values():
            node._segment_octets = 1024
        keys = []
        for number in range(40):
            key = await rig.deliver("ab")
            if number % 5:
                await rig.delete(key)
            else:
                keys.append(key)
        await rig.keep(3000)
        rig.world.clock.skew_s += 40 * DAY_S  # type: ignore[attr-defined]
        await rig.keep(3000)
        assert rig.compactor.freed["a"] > 0
        assert any(item.origin is Origin.MOVED for item in await rig.nodes["a"].inventory(b"", 1000))
        await rig.restart(old)
        await rig.keep(200)
        assert not rig.catching_up()
        assert sorted(await rig.listed()) == sorted(keys)
        await rig.check()

    go(body)


def test_a_walk_enters_nothing_that_lies_before_a_birth_mark() -> None:
    async def body(rig: Rig) -> None:
        orphan, mail = rig.key(), await rig.deliver("ab")
        await rig.put("a", orphan)
        await rig.nodes["a"].rebirth()
        await rig.watch()
        await rig.epochs.raise_epoch("a test")
        await rig.keep(200)
        assert await rig.listed() == [mail]
        assert await rig.held("a", orphan) is Held.ABSENT

    go(body)


def test_a_record_that_cannot_be_read_in_a_walk_is_entered_later() -> None:
    async def body(rig: Rig) -> None:
        key = rig.key()
        await rig.put("a", key)
        rig.nodes["a"].damage(key)
        await rig.epochs.raise_epoch("a test")
        await rig.keep(30)
        assert not (await rig.row("a")).owes_walk and await rig.fate(key) is None
        rig.nodes["a"]._bad.clear()
        await rig.keep(30)
        assert await rig.listed() == [key]

    go(body)


def test_a_slot_that_finds_its_row_lower_is_a_loss() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        kept = await rig.deliver("ab")
        await rig.deliver("ab")
        rig.store.restore(old)  # under the running process: a stale standby
        key = rig.key()
        with pytest.raises(IndexTrouble):
            await rig.index.abort(key, ["a"])
        with pytest.raises(NodeTrouble, match="walks"):
            await rig.epochs.step()
        assert rig.index.epoch == 2
        await rig.keep(60)
        assert rig.index.epoch == 2 and not rig.catching_up()
        assert kept in await rig.listed() and len(await rig.listed()) == 2

    go(body)


def test_one_loss_is_one_epoch_also_while_a_node_keeps_its_old_mark() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        await rig.deliver("ab")
        await rig.keep(60)
        await rig.restart(old)
        rig.nodes["c"].put_mark = _refuse  # type: ignore[method-assign]
        await rig.keep(300)
        assert rig.index.epoch == 2

    go(body)


async def _refuse(mark: Mark) -> None:
    raise NodeTrouble("no writes")


def test_a_walk_drops_nothing_that_lies_before_a_birth_mark() -> None:
    async def body(rig: Rig) -> None:
        old = rig.store.snapshot()
        key = await rig.deliver("ab")
        await rig.nodes["a"].rebirth()
        await rig.watch()
        await rig.marker.put_all()
        await rig.restart(old)
        await rig.epochs._begin()
        rig.away("b")
        await rig.each(rig.reconciler.step)
        assert not (await rig.row("a")).owes_walk
        assert await rig.fate(key) is None and await rig.index.drops("a", 10) == []
        await rig.back("b")
        rig.nodes["a"].calls.clear()
        await rig.keep(200)
        assert await rig.listed() == [key]
        assert {"a", "b"} <= set(await rig.believed(key))
        assert "drop" not in rig.nodes["a"].calls

    go(body)


def test_a_walk_ends_belief_in_what_is_not_there() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.keep(15)
        rig.nodes["a"].lose(key)
        await rig.epochs.raise_epoch("a test")
        await rig.epochs._begin()
        await rig.each(rig.reconciler.step)
        await rig.epochs.step()
        assert await rig.believed(key) == ("b",)

    go(body)


@pytest.mark.parametrize(("away", "complete"), [("", True), ("c", True), ("bc", False)])
def test_an_index_put_back_before_any_mark_shows_no_short_list(away: str, complete: bool) -> None:
    """Laws 6, 10: nothing tells of the loss but that no process said that it stopped. One node away keeps nobody waiting."""

    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        old = rig.store.snapshot()
        await rig.deliver("ab")
        keys = await rig.listed()
        await rig.restart(old, away)
        assert not rig.catching_up(), "no mark tells of it"
        with pytest.raises(IndexTrouble):
            await rig.listed()
        await rig.reconciler.settle()
        if complete:
            await rig.epochs.step()
        else:
            with pytest.raises(NodeTrouble, match="2 groups are needed"):
                await rig.epochs.step()
            for node in away:
                await rig.back(node)
            await rig.keep(60)
        assert await rig.listed() == keys
        assert rig.index.epoch == 1

    go(body)


def test_who_follows_a_process_that_stopped_in_good_order_waits_for_no_log() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.index.rest()
        await rig.restart(away="bc")
        assert await rig.listed() == [key]

    go(body)


def test_logs_entered_over_an_earlier_connection_count_for_nothing() -> None:
    """Law 10: the index failed over to a standby under a running process; who had compared compares again."""

    async def body(rig: Rig) -> None:
        await rig.deliver("ab")
        await rig.restart()
        await rig.reconciler.settle()
        await rig.epochs.step()
        assert len(await rig.listed()) == 1
        rig.store.restore(rig.store.snapshot())
        with pytest.raises(IndexTrouble):
            await rig.listed()
        with pytest.raises(NodeTrouble, match="logs of 2 groups"):
            await rig.epochs.step()
        await rig.reconciler.settle()
        await rig.epochs.step()
        assert len(await rig.listed()) == 1 and rig.index.epoch == 1

    go(body)
