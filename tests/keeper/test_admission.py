"""Admission: what a node that was opened may be believed (laws 10, 12)."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble, OperatorError
from powermail.index.contract import Fate
from powermail.storage.contract import START, Held, NodeState, Origin
from tests.keeper.rig import Rig, go


async def _roll_back(rig: Rig, node: str, disk: object) -> None:
    await rig.nodes[node].close()
    rig.nodes[node].put_back(disk)  # type: ignore[arg-type]
    await rig.watch()


async def _replace(rig: Rig, node: str) -> None:
    await rig.nodes[node].close()
    await rig.nodes[node].initialise()
    await rig.watch()


def test_an_unknown_node_is_admitted_from_the_beginning_of_its_log() -> None:
    async def body(rig: Rig) -> None:
        row = await rig.row("a")
        facts = await rig.nodes["a"].facts()
        assert (row.incarnation, row.watermark, row.boot) == (facts.incarnation, START, facts.boots[-1])
        assert len(rig.cluster.admitted()) == 3

    go(body)


def test_an_ordinary_reopening_checks_nothing() -> None:
    async def body(rig: Rig) -> None:
        await rig.deliver()
        await rig.each(rig.reconciler.step)
        rig.nodes["a"].calls.clear()
        await rig.reopen("a")
        assert "has" not in rig.nodes["a"].calls and "inventory" not in rig.nodes["a"].calls
        assert (await rig.row("a")).boot == (await rig.nodes["a"].facts()).boots[-1]
        assert rig.nodes["a"] in rig.cluster.admitted()

    go(body)


def test_a_node_is_refused_no_mail_because_the_index_is_away() -> None:
    async def body(rig: Rig) -> None:
        await rig.nodes["a"].close()
        rig.index.fail_next(kept=False)
        await rig.watch()
        assert rig.cluster.takes_mail()
        assert rig.nodes["a"] not in rig.cluster.admitted()
        await rig.watch()  # asked again once the index answers
        assert rig.nodes["a"] in rig.cluster.admitted()

    go(body)


def test_a_new_disk_is_believed_only_in_what_it_holds() -> None:
    async def body(rig: Rig) -> None:
        key, hidden = await rig.deliver("ab"), await rig.deliver("ab")
        rig.nodes["a"].hide(hidden)
        await rig.reconciler.settle()
        assert await rig.index.unread("a", 10)
        await _replace(rig, "a")
        assert await rig.index.unread("a", 10) == [], "notes about the old disk hold nothing back"
        assert await rig.believed(key) == ("b",)
        assert (await rig.row("a")).boot
        await rig.keep(60)
        assert len(await rig.believed(key)) == 2
        await rig.check()

    go(body)


def test_a_disk_of_an_earlier_incarnation_brings_nothing_back() -> None:
    async def body(rig: Rig) -> None:
        keys = [await rig.deliver("ab") for _ in range(10)]
        await rig.keep(200)
        old = rig.nodes["a"].snapshot()
        await _replace(rig, "a")
        for key in keys:
            await rig.delete(key)
        await rig.keep(2000)
        assert [await rig.fate(key) for key in keys] == [None] * 10, "deleted and forgotten"
        await _roll_back(rig, "a", old)
        with pytest.raises(OperatorError, match="node replace"):
            await rig.admission.admit(rig.nodes["a"])
        await rig.keep(2000)
        assert await rig.listed() == []
        assert rig.nodes["a"] not in rig.cluster.admitted()

    go(body)


def test_an_older_disk_gets_a_birth_mark_and_brings_nothing_back() -> None:
    async def body(rig: Rig) -> None:
        kept = await rig.deliver("ab")
        gone = [await rig.deliver("ab") for _ in range(10)]
        await rig.keep(200)
        old = rig.nodes["a"].snapshot()
        for key in gone:
            await rig.delete(key)
        late = await rig.deliver("ab")
        await rig.keep(2000)
        before = rig.nodes["a"].incarnation
        await _roll_back(rig, "a", old)
        facts = await rig.nodes["a"].facts()
        assert facts.incarnation != before and facts.birth > START
        assert rig.nodes["a"] in rig.cluster.admitted(), "it takes mail at once"
        assert "a" not in await rig.believed(late)
        await rig.keep(300)
        assert sorted(await rig.listed()) == sorted([kept, late])
        assert [await rig.held("a", key) for key in gone] == [Held.ABSENT] * 10
        assert await rig.believed(kept) == ("a", "b")
        assert len(await rig.believed(late)) == 2
        assert (await rig.row("a")).boot == facts.boots[-1]
        await rig.check()

    go(body)


def test_a_disk_without_a_tombstone_that_it_confirmed_is_an_older_one() -> None:
    """Law 12: also when nobody has scanned the log since. It brought a copy back that no row and no order knew."""

    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.each(lambda node: rig.reconciler.advance(node, 0.0))
        node, before = rig.nodes["a"], rig.nodes["a"].incarnation
        old = node.snapshot()
        await rig.delete(key)
        await rig.collector.step(node)
        assert await rig.held("a", key) is Held.DEAD and await rig.index.orders("a", 10) == []
        await _roll_back(rig, "a", old)
        facts = await node.facts()
        assert facts.incarnation != before and facts.birth > START
        await rig.keep(2000)
        assert await rig.held("a", key) is not Held.LIVE
        assert await rig.listed() == []

    go(body)


def test_a_disk_that_still_has_what_it_dropped_is_an_older_one() -> None:
    async def body(rig: Rig) -> None:
        orphan = rig.key()
        await rig.put("a", orphan, Origin.REPAIR)
        await rig.each(lambda node: rig.reconciler.advance(node, 0.0))
        node, before = rig.nodes["a"], rig.nodes["a"].incarnation
        old = node.snapshot()
        await rig.collector.step(node)
        assert await rig.held("a", orphan) is Held.ABSENT
        await _roll_back(rig, "a", old)
        assert node.incarnation != before
        await rig.keep(300)
        assert await rig.held("a", orphan) is Held.ABSENT

    go(body)


def test_copies_on_an_older_disk_are_believed_only_when_they_are_good() -> None:
    async def body(rig: Rig) -> None:
        good, bad = await rig.deliver("ab"), await rig.deliver("ab")
        await rig.keep(200)
        old = rig.nodes["a"].snapshot()
        await rig.deliver("ab")
        await rig.keep(200)
        await rig.nodes["a"].close()
        rig.nodes["a"].put_back(old)
        rig.nodes["a"].damage(bad)
        await rig.watch()
        await rig.each(rig.admission.step)
        assert await rig.believed(good) == ("a", "b")
        assert await rig.believed(bad) == ("b",)

    go(body)


def test_a_crash_between_rebirth_and_the_index_enters_nothing() -> None:
    async def body(rig: Rig) -> None:
        gone = await rig.deliver("ab")
        await rig.keep(200)
        old = rig.nodes["a"].snapshot()
        await rig.delete(gone)
        await rig.keep(2000)
        await rig.nodes["a"].close()
        rig.nodes["a"].put_back(old)
        await rig.nodes["a"].open()
        await rig.nodes["a"].rebirth()  # and here the process died
        await rig.restart()
        await rig.keep(300)
        assert await rig.listed() == []
        assert await rig.held("a", gone) is Held.ABSENT

    go(body)


def test_masses_on_an_older_disk_wait_for_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COLLECT_MASS_MAX", 3)

    async def body(rig: Rig) -> None:
        gone = [await rig.deliver("ab") for _ in range(5)]
        await rig.keep(200)
        old = rig.nodes["a"].snapshot()
        for key in gone:
            await rig.delete(key)
        await rig.keep(2000)
        await _roll_back(rig, "a", old)
        assert rig.admission.held == {"a": 5}
        assert rig.nodes["a"] not in rig.cluster.admitted() and rig.nodes["a"].state is NodeState.READ_WRITE
        assert "node confirm a" in rig.cluster.trouble("a")
        await rig.keep(100)
        assert await rig.held("a", gone[0]) is Held.LIVE
        assert rig.admission.confirm("a") == 5
        await rig.keep(100)
        assert [await rig.held("a", key) for key in gone] == [Held.ABSENT] * 5
        assert rig.nodes["a"] in rig.cluster.admitted() and not rig.admission.confirmed

    go(body)


def test_a_recovery_that_reports_damage_has_its_belief_checked() -> None:
    async def body(rig: Rig) -> None:
        lost, doubted = await rig.deliver("ab"), await rig.deliver("ab")
        await rig.keep(200)
        rig.nodes["a"].lose(lost)
        rig.nodes["a"].doubt()
        await rig.reopen("a")
        assert await rig.believed(lost) == ("b",)
        assert lost in await rig.index.suspects("a", b"", 10), "it may still be there: a tombstone goes there too"
        assert await rig.believed(doubted) == ("a", "b")

    go(body)


def test_a_tombstone_of_what_is_believed_there_is_proof_of_lost_commits() -> None:
    async def body(rig: Rig) -> None:
        key = await rig.deliver("ab")
        await rig.nodes["a"].delete([key], rig.index.mark(), rig.world.clock.now())
        rig.nodes["a"].doubt()
        epoch = rig.index.epoch
        await rig.reopen("a")
        assert rig.index.epoch == epoch + 1
        assert "a" in await rig.believed(key), "the walk decides"

    go(body)


def test_an_expelled_disk_is_refused() -> None:
    async def body(rig: Rig) -> None:
        await rig.index.expel("a")
        await rig.marker.put_all()
        await rig.reopen("a")
        assert "a" not in [row.id for row in await rig.index.node_rows()]
        with pytest.raises(OperatorError):
            await rig.admission.admit(rig.nodes["a"])

    go(body)


def test_old_copies_without_origin_are_compared_once() -> None:
    async def body(rig: Rig) -> None:
        mine = await rig.deliver("ab")
        orphan = rig.key()
        await rig.put("a", orphan, Origin.REPAIR)
        facts = await rig.nodes["a"].facts()
        rows = rig.store.state.nodes
        rows["a"] = rows["a"]._replace(watermark=facts.end, end_seen=facts.end, owes_compare=True)
        await rig.each(rig.admission.step)
        assert not (await rig.row("a")).owes_compare
        assert [drop.key for drop in await rig.index.drops("a", 10)] == [orphan]
        assert await rig.fate(mine) is Fate.LIVE
        rig.nodes["a"].calls.clear()
        await rig.each(rig.admission.step)
        assert "inventory" not in rig.nodes["a"].calls

    go(body)


def test_trouble_of_the_index_is_told_as_such() -> None:
    async def body(rig: Rig) -> None:
        await rig.nodes["a"].close()
        await rig.nodes["a"].open()
        rig.index.fail_next(kept=False)
        with pytest.raises(IndexTrouble):
            await rig.admission.admit(rig.nodes["a"])
        rig.nodes["a"].fail_next("facts")
        with pytest.raises(NodeTrouble):
            await rig.admission.admit(rig.nodes["a"])

    go(body)
