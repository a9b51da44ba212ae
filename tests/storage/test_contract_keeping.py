"""What every storage node promises, sentence by sentence: scans, marks, checkpoints, compaction, deadlines."""

from __future__ import annotations

import random

import pytest

from powermail.base.errors import CommitRefused, MarkRefused, NodeTrouble, OlderCheckpoint
from powermail.storage.contract import START, Held, Mark, Origin, Position, Rank, Receipt, StorageNode
from tests.storage.asks import FAR, NAME, NO_MARK, chunk, compact_all, fresh, heard, held, put, text
from tests.storage.rigs import Rig, overdue, then_reopened, walk
from tests.storage.support import key

# -- scans (laws 2, 6, 9) -----------------------------------------------------------------------------------------


async def test_scan_shows_copies_and_tombstones_in_the_order_of_the_log(rig: Rig) -> None:
    order = list(range(1, 41))
    random.Random(1).shuffle(order)
    for number in order:
        await put(rig.node, number, origin=Origin.REPAIR if number % 3 else Origin.DELIVERY)
    await rig.node.delete([key(order[5]), key(77)], NO_MARK, 0.0)
    wanted: list[tuple[bytes, Origin | None]] = [
        (key(n), Origin.REPAIR if n % 3 else Origin.DELIVERY) for n in order if n != order[5]
    ]
    wanted += [(key(order[5]), None), (key(77), None)]
    async for node in then_reopened(rig):
        for limit in (1, 7, 1000):
            assert await walk(node, limit=limit) == wanted


async def test_scan_goes_on_where_it_ended(rig: Rig) -> None:
    node = rig.node
    for number in (1, 2, 3):
        await put(node, number)
    seen = START
    while (scan := await node.scan(seen, 2, 0.0)).following != seen:
        assert scan.incarnation == node.incarnation and scan.unread == []
        seen = scan.following
    end = (await node.facts()).end
    assert seen == scan.end == end
    late = await put(node, 100)
    assert late.position >= seen
    assert await walk(node, seen) == [(key(100), Origin.DELIVERY)]
    node = await rig.reopen()
    assert (key(100), Origin.DELIVERY) in await walk(node, seen)


async def test_scan_leaves_out_what_is_younger_than_asked(rig: Rig) -> None:
    """Comfort, not safety: a delivery under way finishes by itself."""
    await put(rig.node, 1)
    rig.ticks.now += 60.0
    late = await put(rig.node, 2)
    scan = await rig.node.scan(START, 10, 30.0)
    assert [item.key for item in scan.items] == [key(1)]
    assert scan.following <= late.position < scan.end
    rig.ticks.now += 31.0
    assert await rig.node.scan(scan.following, 10, 30.0) != scan
    found = await rig.node.scan(scan.following, 10, 30.0)
    assert [item.key for item in found.items] == [key(2)]


async def test_scan_shows_what_compaction_moved(rig: Rig) -> None:
    for number in range(1, 41):
        await put(rig.node, number, text(number, 400))
    watermark = (await rig.node.facts()).end
    await rig.node.delete([key(number) for number in range(1, 41) if number % 5], NO_MARK, 0.0)
    await compact_all(rig.node)
    async for node in then_reopened(rig, True):
        found = await walk(node, watermark)
        moved = [name for name, origin in found if origin is Origin.MOVED]
        assert moved and all(number % 5 == 0 for number in (int.from_bytes(name, "big") for name in moved))
        shown = [name for name, origin in await walk(node) if origin is not None]
        assert sorted(shown) == [key(number) for number in range(5, 41, 5)], "each copy once"
        for item in (await node.scan(watermark, 1000, 0.0)).items:
            if item.origin is Origin.MOVED:
                assert item.position < watermark, "the position is where it was first written"


async def test_what_cannot_be_read_is_named_and_read_again(rig: Rig) -> None:
    """Law 6: reconcile passes over nothing for ever."""
    for number in (1, 2, 3):
        await put(rig.node, number)
    await rig.hide(2)
    found: list[bytes] = []
    unread = []
    after = START
    while (scan := await rig.node.scan(after, 10, 0.0)).following != after:
        found += [item.key for item in scan.items]
        unread += scan.unread
        after = scan.following
    assert unread and key(2) not in found
    still = [await rig.node.reread(one) for one in unread]
    assert any(one is not None and one.unread for one in still)
    rig.show()
    for one in unread:
        again = await rig.node.reread(one)
        assert again is not None and again.unread == []
        found += [item.key for item in again.items]
    assert sorted(found) == [key(1), key(2), key(3)]


async def test_what_lay_in_a_segment_that_is_gone_is_not_unread(rig: Rig) -> None:
    for number in range(1, 41):
        await put(rig.node, number, text(number, 400))
    await rig.hide(1)
    (unread, *_) = (await rig.node.scan(START, 1, 0.0)).unread
    rig.show()
    await rig.node.delete([key(number) for number in range(1, 41)], NO_MARK, 0.0)
    await compact_all(rig.node)
    assert await rig.node.reread(unread) is None


async def test_the_inventory_names_every_key_in_order_and_in_pages(rig: Rig) -> None:
    for number in (5, 1, 4, 2):
        await put(rig.node, number, origin=Origin.REPAIR if number == 4 else Origin.DELIVERY)
    await rig.node.append(key(6), [chunk(0, b"open")])
    await rig.node.delete([key(3), key(2)], NO_MARK, 0.0)
    async for node in then_reopened(rig):
        items = await node.inventory(b"", 100)
        assert [(item.key, item.held.value) for item in items] == [
            (key(1), "live"),
            (key(2), "dead"),
            (key(3), "dead"),
            (key(4), "live"),
            (key(5), "live"),
        ]
        assert [item.origin for item in items if item.held is Held.LIVE] == [Origin.DELIVERY, Origin.REPAIR, Origin.DELIVERY]
        assert await node.inventory(b"", 2) == items[:2]
        assert await node.inventory(key(2), 2) == items[2:4]
        assert await node.inventory(key(5), 2) == []


# -- marks, epochs, birth (laws 10, 12) ---------------------------------------------------------------------------


async def test_marks_are_merged_and_kept(rig: Rig) -> None:
    node = rig.node
    await node.put_mark(Mark(2, {1: ("x", 5), 2: ("y", 7)}, 3, 100, ("old",)))
    await node.put_mark(Mark(1, {1: ("x", 9)}, 3, 50, ("older",)))
    wanted = Mark(2, {1: ("x", 9), 2: ("y", 7)}, 3, 100, ("old", "older"))
    assert (await node.facts()).mark == wanted
    node = await rig.reopen(lose_index=True)
    assert (await node.facts()).mark == wanted
    await node.put_mark(Mark(3, {3: ("z", 1)}, 3))
    assert (await node.facts()).mark == wanted.with_seen(Mark(3, {3: ("z", 1)}, 3))
    assert list((await node.facts()).mark.slots) == [3], "the others were pruned"
    await node.put_mark(Mark(2, {2: ("w", 1)}, 4))
    node = await rig.reopen(lose_index=True)
    assert (await node.facts()).mark == Mark(2, {2: ("w", 1)}, 4, 100, ("old", "older")), "what an epoch had ends with it"


_KNOWN = Mark(4, {2: ("x", 5), 4: ("y", 7)}, 3)
_REFUSED = {
    "older-epoch": Mark(9, {9: ("z", 1)}, 2, 500),
    "pruned": Mark(3, {3: ("w", 1)}, 3, 500),
    "given-twice": Mark(4, {4: ("w", 9)}, 3, 500),
}


@pytest.mark.parametrize("why", sorted(_REFUSED))
async def test_what_comes_of_an_older_epoch_or_of_a_slot_that_was_pruned_is_refused(rig: Rig, why: str) -> None:
    """Law 10: it may come of commits that are lost. Nothing is done, and what shows the loss stays."""
    mark, node = _REFUSED[why], rig.node
    for number in range(1, 41):
        await put(node, number, text(number, 400))
    await node.delete([key(number) for number in range(4, 40)], _KNOWN, 0.0)
    assert await node.compactable(FAR, 0.0) is not None
    await rig.damage(3)
    place = await node.verify(key(2))
    for call in (
        node.put_mark(mark),
        node.delete([key(1), key(2)], mark, 0.0),
        node.drop([(key(2), place)], mark),
        node.discard(key(3), mark),
        node.put_checkpoint(NAME, 0, b"x", mark),
        node.compact(FAR, [], mark),
    ):
        with pytest.raises(MarkRefused):
            await call
    async for again in then_reopened(rig):
        assert (await again.facts()).mark == _KNOWN
        assert await held(again, 1, 2) == ["live", "live"] and await held(again, 3) != ["absent"]
        assert await again.checkpoints(b"", 9) == []
    await rig.node.delete([key(1)], _KNOWN, 0.0)
    await rig.node.delete([key(2)], Mark(5, {2: ("x", 4), 4: ("y", 7), 5: ("w", 1)}, 3), 0.0)
    assert await held(rig.node, 1, 2) == ["dead", "dead"], "slots that are known, and new ones, are welcome"


async def test_what_cannot_be_undone_carries_a_mark(rig: Rig) -> None:
    """Law 10: tombstones, drops, checkpoints and compaction tell how far the index was."""
    for number in range(1, 41):
        await put(rig.node, number, text(number, 400))

    def at(count: int) -> Mark:
        return Mark(1, {1: ("tag", count)})

    await rig.node.delete([key(1)], at(1), 0.0)
    assert (await (await rig.reopen()).facts()).mark == at(1)
    await rig.node.drop([(key(2), await rig.node.verify(key(2)))], at(2))
    assert (await (await rig.reopen()).facts()).mark == at(2)
    await rig.node.put_checkpoint(NAME, 0, b"whole", at(3))
    assert (await (await rig.reopen()).facts()).mark == at(3)
    await rig.damage(3)
    assert await rig.node.discard(key(3), at(4)) is Held.ABSENT
    assert (await (await rig.reopen()).facts()).mark == at(4)
    await rig.node.delete([key(number) for number in range(4, 40)], NO_MARK, 0.0)
    assert await rig.node.compactable(FAR, 0.0) is not None
    await rig.node.compact(FAR, [], at(5))
    assert (await (await rig.reopen()).facts()).mark == at(5)


async def test_rebirth_is_a_new_incarnation_with_a_birth_mark(rig: Rig) -> None:
    """Law 12: nothing before the mark is ever entered as mail."""
    before = await put(rig.node, 1)
    end = (await rig.node.facts()).end
    birth = await rig.node.rebirth()
    assert rig.node.incarnation != before.incarnation
    assert before.position < end <= birth
    after = await put(rig.node, 2)
    assert after.position >= birth and after.incarnation == rig.node.incarnation
    incarnation = rig.node.incarnation
    node = await rig.reopen(lose_index=True)
    facts = await node.facts()
    assert (facts.incarnation, facts.birth) == (incarnation, birth)
    again = await node.rebirth()
    assert again > birth and node.incarnation not in (incarnation, before.incarnation)
    assert await put(node, 1) == Receipt("a", node.incarnation, before.position)


async def test_a_birth_mark_is_lifted_for_good(rig: Rig) -> None:
    """Law 12: what lies before it was compared with the index, and is mail as any other from now on."""
    await rig.node.lift_birth()  # fine if there is none
    receipt = await put(rig.node, 1)
    await rig.node.rebirth()
    incarnation = rig.node.incarnation
    await rig.node.lift_birth()
    assert (await rig.node.facts()).birth == START
    node = await rig.reopen(lose_index=True)
    facts = await node.facts()
    assert (facts.incarnation, facts.birth) == (incarnation, START), "it is the same disk"
    assert await put(node, 1) == Receipt("a", incarnation, receipt.position)
    assert await node.rebirth() >= facts.end


# -- checkpoints --------------------------------------------------------------------------------------------------


async def test_a_checkpoint_that_is_older_than_what_lies_under_its_name_is_refused(rig: Rig) -> None:
    """Law 11: a keeper that slept over its checkpoint would take back how far numbers had got."""
    node = rig.node
    for number in range(1, 30):
        await put(node, number, text(number, 400))
    await node.put_checkpoint(NAME, 0, b"new", NO_MARK, Rank(2, 7, 50))
    await node.put_checkpoint(NAME, 1, b"its other part", NO_MARK, Rank(2, 7, 50))
    for number in range(30, 60):
        await put(node, number, text(number, 400))
    wanted = [(NAME, 0, b"new"), (NAME, 1, b"its other part")]
    for turn in range(4):
        for older in (Rank(2, 7, 49), Rank(2, 6, 900), Rank(1, 9, 900), Rank()):
            for number in (0, 1, 2):
                with pytest.raises(OlderCheckpoint):
                    await node.put_checkpoint(NAME, number, b"old", NO_MARK, older)
        assert await node.checkpoints(b"", 10) == wanted
        if turn == 1:  # compaction moves it, and it stays as new as it was
            await node.delete([key(number) for number in range(1, 60)], NO_MARK, 0.0)
            assert await compact_all(node) > 0
        elif turn != 3:
            node = await rig.reopen(lose_index=turn == 2)
    other = key(99)
    await node.put_checkpoint(other, 0, b"another", NO_MARK, Rank(1, 1, 1))
    for newer in (Rank(2, 7, 50), Rank(2, 7, 51), Rank(2, 8, 1), Rank(3, 1, 1)):
        await node.put_checkpoint(NAME, 0, b"newer %d" % newer.modseq, NO_MARK, newer)
    assert (NAME, 0, b"newer 1") in await node.checkpoints(b"", 10)
    assert (other, 0, b"another") in await node.checkpoints(b"", 10)


async def test_checkpoints_are_kept_by_name_and_number(rig: Rig) -> None:
    first, second = b"a" * 16, b"b" * 16
    node = rig.node
    await node.put_checkpoint(second, 0, b"whole", NO_MARK)
    await node.put_checkpoint(first, 0, b"whole one", NO_MARK)
    await node.put_checkpoint(first, 1, b"delta", NO_MARK)
    wanted = [(first, 0, b"whole one"), (first, 1, b"delta"), (second, 0, b"whole")]
    async for node in then_reopened(rig, False, True):
        assert await node.checkpoints(b"", 10) == wanted
        assert await node.checkpoints(b"", 1) == wanted[:2], "the limit counts names"
        assert await node.checkpoints(first, 10) == wanted[2:]
    await node.put_checkpoint(first, 1, b"delta again", NO_MARK)
    assert (await node.checkpoints(b"", 10))[1] == (first, 1, b"delta again")
    await node.put_checkpoint(first, 0, b"whole again", NO_MARK)
    async for node in then_reopened(rig, True):
        assert await node.checkpoints(b"", 10) == [(first, 0, b"whole again"), wanted[2]]
    assert await walk(node) == [] and await node.inventory(b"", 10) == []


# -- compaction ---------------------------------------------------------------------------------------------------


async def test_compaction_frees_what_is_dead_and_keeps_the_rest(rig: Rig) -> None:
    for number in range(1, 101):
        await put(rig.node, number, text(number, 400))
    await rig.node.put_checkpoint(NAME, 0, b"kept", NO_MARK)
    dead = [number for number in range(1, 101) if number % 10]
    await rig.node.delete([key(number) for number in dead], NO_MARK, 0.0)
    before = (await heard(rig.node)).stat()
    assert await compact_all(rig.node) > 3
    after = (await heard(rig.node)).stat()
    assert after.log_octets < before.log_octets / 2 and after.segments < before.segments
    async for node in then_reopened(rig, True):
        for number in range(10, 101, 10):
            assert (await node.read_chunk(key(number), 0)).stored == text(number, 400)
        assert set(await held(node, *dead)) == {"dead"}
        assert await node.checkpoints(b"", 10) == [(NAME, 0, b"kept")]


async def test_compaction_touches_only_what_lies_whole_behind_the_watermark(node: StorageNode) -> None:
    """Law 10: it moves only what reconcile has seen."""
    for number in range(1, 41):
        await put(node, number, text(number, 400))
    second = next(item.position for item in await node.inventory(b"", 100) if item.position.segment == 2)
    await node.delete([key(number) for number in range(1, 41)], NO_MARK, 0.0)
    assert await node.compactable(START, 0.0) is None
    assert await node.compactable(Position(1, 1 << 30), 0.0) is None
    before = (await heard(node)).stat().segments
    while await node.compactable(second, 0.0) is not None:
        await node.compact(second, [], NO_MARK)
    assert (await heard(node)).stat().segments == before - 1
    assert await node.compact(START, [], NO_MARK) == 0


async def tombstones_among_dead_mail(node: StorageNode, numbers: range) -> list[bytes]:
    """Keys it never had, deleted at 100, each behind a message that dies at 500."""
    named = []
    for number in numbers:
        await put(node, number, text(number, 400))
        named.append(key(900 + number))
        await node.delete([named[-1]], NO_MARK, 100.0)
    await node.delete([key(number) for number in numbers], NO_MARK, 500.0)
    await put(node, 2000, text(2000, 1200))
    return named


async def test_tombstones_go_only_when_they_are_old_and_forgotten(rig: Rig) -> None:
    """Law 9: by the keeper's stated date, and until the row is forgotten."""
    named = await tombstones_among_dead_mail(rig.node, range(1, 41))
    asked: set[bytes] = set()
    for _ in range(1000):
        wanted = await rig.node.compactable(FAR, 200.0)
        if wanted is None:
            break
        asked.update(wanted)
        await rig.node.compact(FAR, [name for name in wanted if name in named[:20]], NO_MARK)
    assert asked & set(named) and asked <= set(named), "only those stated before the date are named"
    async for node in then_reopened(rig, True):
        answers = dict(zip(named, await node.has(named), strict=True))
        gone = [name for name in named if answers[name] is Held.ABSENT]
        assert gone and set(gone) <= set(named[:20]) & asked, "forgotten ones may go, no other"
        assert set(await held(node, *range(1, 41))) == {"dead"}, "too young to go"


async def test_a_tombstone_stays_while_a_dead_record_of_its_key_is_left(rig: Rig) -> None:
    """P8: else the message would be back when the key index is lost."""
    stay, go = range(1, 11), range(11, 51)
    for number in stay:  # the segments of these are not worth it
        await put(rig.node, number, text(number, 400))
    await rig.node.delete([key(1)], NO_MARK, 100.0)
    named = await tombstones_among_dead_mail(rig.node, go)
    forgotten = frozenset([key(1), *named, *[key(number) for number in go]])
    await compact_all(rig.node, forgotten, at=600.0)
    assert Held.ABSENT in await rig.node.has(named), "some tombstones went"
    assert await held(rig.node, 1) == ["dead"], "its record still lies in a segment that was not worth it"
    node = await rig.reopen(lose_index=True)
    assert await held(node, 1) == ["dead"]
    left = {item.key for item in await node.inventory(b"", 1000) if item.held is Held.LIVE}
    assert left == {key(2000), *[key(number) for number in stay if number > 1]}, "nothing came back"


async def test_mail_goes_on_between_the_steps_of_a_compaction(rig: Rig) -> None:
    for number in range(1, 101):
        await put(rig.node, number, text(number, 400))
    await rig.node.delete([key(number) for number in range(1, 101) if number % 4], NO_MARK, 0.0)
    number = 1000
    while await rig.node.compactable(FAR, 0.0) is not None:
        await rig.node.compact(FAR, [], NO_MARK)
        number += 1
        await put(rig.node, number)
        await rig.node.delete([key(4 * (number - 1000))], NO_MARK, 0.0)
        assert number < 2000
    async for node in then_reopened(rig, True):
        assert set(await held(node, *range(1001, number + 1))) == {"live"}
        assert set(await held(node, *[4 * n for n in range(1, min(26, number - 999))])) == {"dead"}


# -- deadlines (law 14) -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_every_call_ends_though_the_disk_hangs(rig: Rig) -> None:
    """Law 14: nobody waits for the sick; and the node itself can be closed."""
    node = rig.node
    receipt = await put(node, 1)
    stamp = await fresh(node)
    rig.hang()
    ends = await overdue(
        rig,
        node.probe(),
        node.append(key(2), [chunk(0, b"x")]),
        put(node, 3, stamp=stamp),
        node.cancel(key(2)),
        node.delete([key(4)], NO_MARK, 0.0),
        node.drop([(key(5), receipt.position)], NO_MARK),
        node.discard(key(1), NO_MARK),
        node.read_commit(key(1)),
        node.read_chunk(key(1), 0),
        node.read_small([key(1)]),
        node.has([key(1)]),
        node.verify(key(1)),
        node.fence(stamp),
        node.scan(START, 10, 0.0),
        node.inventory(b"", 10),
        node.put_mark(Mark(epoch=9)),
        node.rebirth(),
        node.lift_birth(),
        node.put_checkpoint(NAME, 0, b"x", NO_MARK),
        node.checkpoints(b"", 10),
        node.compactable(FAR, 0.0),
        node.compact(FAR, [], NO_MARK),
    )
    for number, end in enumerate(ends):
        assert isinstance(end, NodeTrouble) or number == 21, f"call {number}: {end!r}"
        assert not isinstance(end, CommitRefused), f"call {number}: a hang is no definite refusal"
    node.stat()
    (closed,) = await overdue(rig, node.close())
    assert closed is None and node.stamp() is None
    rig.release()


@pytest.mark.usefixtures("impatient")
async def test_a_write_that_ends_too_late_leaves_the_outcome_unknown(rig: Rig) -> None:
    """The caller hears trouble, and the copy may be there: what is there then is whole."""
    rig.hang()
    (outcome,) = await overdue(rig, put(rig.node, 1))
    assert isinstance(outcome, NodeTrouble) and not isinstance(outcome, CommitRefused)
    rig.release()
    await rig.node.probe()
    receipt = await put(rig.node, 1)
    assert await rig.node.verify(key(1)) == receipt.position
    assert await walk(rig.node) == [(key(1), Origin.DELIVERY)]
