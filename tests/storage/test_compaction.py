"""Compaction of one node's log: what it moves, what it lets go, what it must not touch."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import Held, Origin
from powermail.storage.log import record as rec
from powermail.storage.log.write import CANCEL, Operation
from tests.storage.support import (
    FAR,
    NO_MARK,
    body,
    commit,
    compact_all,
    drop,
    fresh_disk,
    held,
    key,
    last,
    live,
    open_store,
    put,
    records,
    segments,
    shown,
    stream,
    tombstone,
)


def test_abandoned_streams_are_not_copied_by_compaction() -> None:
    """Chunks of a stream that was let go, or whose front end died, count no more."""
    disk = fresh_disk()
    store = open_store(disk)
    for number in range(1, 21):
        put(store, stream(number, 0))
        put(store, stream(number, 1))
    put(store, *[Operation(CANCEL, key(number)) for number in range(1, 11)])
    for number in range(500, 510):
        put(store, commit(number))
    before = store.log_octets()
    assert compact_all(store) > 0
    freed = before - store.log_octets()
    abandoned = sum(rec.record_octets(len(body(n, c))) for n in range(1, 11) for c in (0, 1))
    assert freed > abandoned / 2, "of those that were let go"
    again = open_store(disk)
    assert compact_all(again) > 0
    kept = sum(rec.record_octets(len(body(n))) + rec.record_octets(len(b'{"message":500}')) for n in range(500, 510))
    assert again.log_octets() < kept + 3 * 2048 + 1500, "nor those whose process died"
    assert live(again) == list(range(500, 510))


def test_a_stream_that_goes_on_survives_the_compaction_of_its_first_chunks() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, stream(1, 0))
    for number in range(2, 30):
        put(store, commit(number))
    put(store, *[tombstone(number) for number in range(2, 30)])
    assert compact_all(store) > 0
    put(store, stream(1, 1), last(1, 2))
    for current in (store, open_store(disk)):
        assert [current.reader.read_chunk(key(1), n).stored for n in range(2)] == [body(1, 0), body(1, 1)]


@pytest.mark.parametrize("moved", [False, True])
def test_a_drop_survives_compaction_and_recovery(moved: bool) -> None:
    """Law 1: it stays until the segment of the copy is gone, and holds for the copy wherever it was moved."""
    disk = fresh_disk()
    store = open_store(disk)
    positions = {n: put(store, commit(n))[0] for n in range(1, 31)}
    keep = [n for n in positions if not n % 5]
    if moved:
        put(store, *[tombstone(n) for n in positions if n % 5])
        compact_all(store)
        assert any(origin is Origin.MOVED for _, origin in shown(store))
    put(store, *[drop(n, positions[n]) for n in keep])
    for n in range(100, 130):
        put(store, commit(n))
    put(store, *[tombstone(n) for n in range(100, 130)])
    compact_all(store)
    for current in (store, open_store(disk), open_store(disk)):
        assert not set(live(current)) & set(keep), "a dropped copy came back"
        assert [answer for answer in held(current, *keep) if answer != "absent"] == []
    again = open_store(disk)
    put(again, *[commit(7000 + n, under=n) for n in keep])
    compact_all(again)
    last_one = open_store(disk)
    for n in keep:
        assert last_one.reader.read_chunk(key(n), 0).stored == body(7000 + n)


def test_a_drop_that_was_moved_behind_another_copy_takes_only_its_own() -> None:
    """Law 1: the segment of what it dropped stays, its own is compacted, and recovery meets the new copy first."""
    disk = fresh_disk()
    store = open_store(disk)
    first, *_ = put(store, *[commit(n) for n in range(1, 16)])
    fillers = list(range(100, 112))
    put(store, *[commit(n) for n in fillers[:6]])
    put(store, drop(1, first))
    put(store, *[commit(n) for n in fillers[6:]])
    (second,) = put(store, commit(7001, under=1))
    put(store, *[tombstone(n) for n in fillers])
    put(store, *[commit(n) for n in range(200, 206)])
    assert compact_all(store) > 0
    assert segments(disk)[0].endswith("1.seg"), "the dropped copy is still on the disk"
    for current in (store, open_store(disk)):
        assert current.reader.verify(key(1)) == second
        assert current.reader.read_chunk(key(1), 0).stored == body(7001)
    walked = [record for _, record in records(disk) if record.type == rec.DROP and record.flags & rec.FLAG_MOVED]
    assert walked, "the drop was moved"


def test_what_one_step_moves_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paced: a write has to wait for one step, not for a segment."""
    monkeypatch.setattr(limits, "COMPACT_STEP_OCTETS", 512)
    disk = fresh_disk()
    store = open_store(disk)
    for n in range(1, 31):
        put(store, commit(n))
    put(store, *[tombstone(n) for n in range(1, 31) if n % 4])
    steps = 0
    while store.compaction.compactable(FAR, 0.0) is not None:
        before = store.facts().end
        store.compaction.compact(FAR, [], NO_MARK)
        after = store.facts().end
        if before.segment == after.segment:
            assert after.offset - before.offset <= 512 + 600, "more than a step"
        steps += 1
        assert steps < 200
    assert steps > 5
    assert live(open_store(disk)) == list(range(4, 31, 4))


def test_a_tombstone_stays_while_its_dead_record_lies_in_another_segment() -> None:
    """P8: compaction of the tombstone's segment first, then the key index is lost: the message must not come back."""
    disk = fresh_disk()
    store = open_store(disk)
    numbers = list(range(1, 12))
    put(store, *[commit(n) for n in numbers])  # their segments stay mostly live
    while store.facts().end.segment < 4:
        put(store, commit(len(numbers) + 1 + len(live(store))))
    fillers = list(range(500, 520))
    put(store, tombstone(2, 100.0))
    for n in fillers:
        put(store, commit(n))
    put(store, *[tombstone(n, 100.0) for n in fillers])
    before = len(segments(disk))
    forgotten = [key(2), *[key(n) for n in fillers]]
    assert compact_all(store, forgotten, 200.0) > 0
    assert len(segments(disk)) < before
    assert held(open_store(disk), 2) == ["dead"]


def test_damage_found_by_compaction_keeps_its_segment() -> None:
    """What cannot be read may be the only copy that can still be repaired from here."""
    disk = fresh_disk()
    store = open_store(disk)
    for n in range(1, 31):
        put(store, commit(n))
    put(store, *[tombstone(n) for n in range(1, 31) if n % 6])
    path = next(p for p in segments(disk) if key(6) in disk.content[disk.names[p]])
    content = disk.content[disk.names[path]]
    content[content.index(body(6)) + 3] ^= 1
    for _ in range(200):
        if store.compaction.compactable(FAR, 0.0) is None:
            break
        store.compaction.compact(FAR, [], NO_MARK)
    with pytest.raises(CopyDamaged):
        store.reader.verify(key(6))
    for n in (12, 18, 24, 30):
        assert store.reader.read_chunk(key(n), 0).stored == body(n)
    assert store.reader.has([key(6)])[0] in (Held.LIVE, Held.UNKNOWN)
