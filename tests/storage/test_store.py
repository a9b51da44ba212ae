"""The laws of one node's log: damage, full disks, failed fsyncs, hung disks, identity, drops, what is shown."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import CommitRefused, CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble, OperatorError
from powermail.sim.disk import SimDisk, cuts
from powermail.storage.contract import START, Chunk, Held, Origin, Position, Unread
from powermail.storage.identity import read_identity
from powermail.storage.log import record as rec
from powermail.storage.log.store import SegmentStore
from powermail.storage.log.write import CANCEL, FENCE, REFUSE, Operation
from tests.storage.bad_disk import BadDisk
from tests.storage.promises import Promises, check
from tests.storage.support import (
    CLUSTER,
    PATH,
    body,
    checkpoint,
    commit,
    compact_all,
    count,
    drop,
    fresh_disk,
    held,
    key,
    last,
    live,
    marked,
    open_store,
    put,
    records,
    reread,
    segments,
    shown,
    stream,
    tombstone,
)


def after_cut(disk: SimDisk, base: SimDisk, everything: bool) -> SimDisk:
    """The disk when the power fails now: what was synced, or all that was written."""
    states = list(cuts(disk.journal, len(disk.journal)))
    return disk.image(base, states[1] if everything and len(states) > 1 else states[0])


# -- what is written ------------------------------------------------------------------------------------------------


def test_commit_is_idempotent_and_delete_wins() -> None:
    store = open_store(fresh_disk())
    first, second = put(store, commit(1), commit(1))
    assert first == second and live(store) == [1]
    end = store.facts().end
    assert put(store, commit(1)) == [first]
    assert store.facts().end == end
    put(store, tombstone(1), tombstone(2))
    outcome = store.write([commit(1), commit(2)])
    assert all(isinstance(error, NodeTrouble) and not isinstance(error, CommitRefused) for error in outcome)
    assert live(store) == []


def test_a_delete_in_the_same_batch_wins_over_the_commit_before_it() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1), tombstone(1), commit(2))
    assert isinstance(store.write([tombstone(3), commit(3)])[1], NodeTrouble)
    for current in (store, open_store(disk)):
        assert held(current, 1, 2, 3) == ["dead", "live", "dead"]


def test_a_tombstone_is_final_wherever_it_stands() -> None:
    """Law 1: also for a recovery that meets a commit of its key behind it."""
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(2), tombstone(1))
    codec = rec.Codec(bytes.fromhex(read_identity(disk, PATH, CLUSTER, "a").salt))
    number, end = store.facts().end
    octets = b"".join(codec.pack(rec.Record(rec.CHUNK, 0, 0, key(1), body(1)), number, end))
    octets += b"".join(codec.pack(rec.Record(rec.COMMIT, 0, 1, key(1), b"{}"), number, end + len(octets)))
    disk.content[disk.names[segments(disk)[0]]][end : end + len(octets)] = octets
    again = open_store(disk)
    assert held(again, 1, 2) == ["dead", "live"]
    put(again, commit(3))
    assert held(open_store(disk), 1, 2, 3) == ["dead", "live", "live"]


def test_a_drop_and_another_copy_in_one_batch() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    (first,) = put(store, commit(1))
    (second,) = put(store, drop(1, first), commit(7001, under=1))
    assert second > first
    for current in (store, open_store(disk)):
        assert current.reader.verify(key(1)) == second
        assert current.reader.read_chunk(key(1), 0).stored == body(7001)


def test_a_drop_written_behind_another_copy_takes_only_its_own() -> None:
    """Its position names the copy, also for a recovery that reads the log from its beginning."""
    disk = fresh_disk()
    store = open_store(disk)
    (first,) = put(store, commit(1))
    put(store, drop(1, first))
    (second,) = put(store, commit(7001, under=1))
    put(store, drop(1, first))
    assert open_store(disk).reader.verify(key(1)) == second


def test_streams_side_by_side_and_cancelled_ones() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    for chunk in range(3):
        put(store, stream(1, chunk), stream(2, chunk), stream(3, chunk))
    put(store, Operation(FENCE))
    end = store.facts().end
    put(store, Operation(CANCEL, key(2)))
    assert store.facts().end == end
    put(store, last(1, 3))
    assert isinstance(store.write([last(2, 3)])[0], CommitRefused)
    put(store, last(3, 3))
    for current in (store, open_store(disk)):
        assert live(current) == [1, 3]
        assert [current.reader.read_chunk(key(3), n).stored for n in range(3)] == [body(3, n) for n in range(3)]


def test_a_stream_that_was_let_go_lends_no_chunk_to_a_later_one_of_its_key() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, stream(1, 0), stream(1, 1))
    put(store, Operation(CANCEL, key(1)))
    put(store, commit(7001, under=1))
    for current in (store, open_store(disk)):
        assert current.reader.read_chunk(key(1), 0).stored == body(7001)
        with pytest.raises(CopyMissing):
            current.reader.read_chunk(key(1), 1)


def test_a_fence_answers_the_durable_end() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    position, end = put(store, commit(1), Operation(FENCE))
    assert position < end <= store.facts().end


# -- law 1: durable before it is shown ------------------------------------------------------------------------------


class Watched(SimDisk):
    """A disk that calls `watch` before each operation, as another lane may run at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.watch: Callable[[str], None] | None = None

    def fault(self, kind: str) -> None:
        if self.watch is not None and kind in ("write", "sync", "allocate", "create"):
            watch, self.watch = self.watch, None
            watch(kind)
            self.watch = watch
        super().fault(kind)


def watched() -> Watched:
    """Such a disk with an empty store on it."""
    plain, disk = fresh_disk(), Watched()
    disk.content, disk.names, disk.directories = plain.content, plain.names, plain.directories
    disk._next = plain._next
    return disk


@pytest.mark.parametrize("acts", ["small", "many", "stream", "delete", "drop"])
def test_what_is_shown_is_durable(acts: str) -> None:
    """Whatever a scan, `has`, or a read says while a batch is under way is there after a power cut at that moment."""
    disk = watched()
    store = open_store(disk)
    positions = put(store, *[commit(number) for number in range(1, 4)])
    put(store, stream(30, 0))
    disk.settle()
    base = disk.clone()
    moments = []

    def watch(kind: str) -> None:
        cut = after_cut(disk, base, everything=False)
        says = {number: store.reader.has([key(number)])[0] for number in range(1, 60)}
        scanned = list(store.scanner.scan(START, 1000, 0.0).items)
        moments.append((kind, cut, says, scanned, store.facts().end))

    disk.watch = watch
    batch = {
        "small": [commit(10), commit(11)],
        "many": [commit(number) for number in range(10, 40)],
        "stream": [last(30, 1)],
        "delete": [tombstone(1), tombstone(2), tombstone(50)],
        "drop": [drop(1, positions[0]), commit(7001, under=1)],
    }[acts]
    put(store, *batch)
    disk.watch = None
    assert moments
    for kind, cut, says, scanned, end in moments:
        again = open_store(cut)
        assert again.facts().end >= end, f"at {kind}: the end that was told is gone"
        for number, answer in says.items():
            if answer in (Held.LIVE, Held.DEAD):
                (there,) = again.reader.has([key(number)])
                assert there is answer, f"at {kind}: {number} was {answer.value}, after the cut it is {there.value}"
        places = {item.key: item.position for item in again.reader.inventory(b"", 1000)}
        for item in scanned:
            assert places.get(item.key) == item.position, f"at {kind}: {item.key.hex()} was shown and is gone"


@pytest.mark.parametrize("kind", ["write", "sync", "allocate"])
def test_a_failed_fsync_or_write_is_never_acknowledged_and_stops_the_node(kind: str) -> None:
    """EIO at every n-th call: what was acknowledged before stays, nothing after (P18), and it is never shown."""
    number = 0
    while True:
        number += 1
        disk = fresh_disk()
        store = open_store(disk)
        disk.fail(kind, number)
        promises = Promises()
        for n in range(1, 30):
            promises.asked[n] = [(n, 1)]
            (outcome,) = store.write([commit(n)])
            if isinstance(outcome, Position):
                promises.live[n] = (n, 1, outcome)
            elif isinstance(outcome, CommitRefused):
                promises.refused[n] = None
        if kind in disk._faults:  # it never came to that call
            assert number > 2
            return
        assert store.failed
        assert isinstance(store.write([commit(99)])[0], NodeReadOnly)
        check(store, promises)
        assert live(store) == sorted(promises.live), "what failed is not shown"
        check(open_store(disk), promises)


def failed_and_written(error: int) -> tuple[BadDisk, SegmentStore]:
    """A store with messages 1 and 2 whose write of 3, 4 and 5 failed, and yet their octets are on the disk."""
    disk = BadDisk(fresh_disk())
    store = open_store(disk)
    put(store, commit(1), commit(2))
    disk.write_error = error
    outcomes = store.write([commit(n) for n in (3, 4, 5)])
    assert all(isinstance(outcome, NodeTrouble) and not isinstance(outcome, CommitRefused) for outcome in outcomes)
    assert live(store) == [1, 2]
    assert set(live(open_store(disk.below.clone()))) > {1, 2}, "a restart now brings some of them"
    return disk, store


def test_after_a_failed_write_the_same_key_is_no_definite_refusal() -> None:
    """Law 5: its record lies in the tail and is live after a restart."""
    _, store = failed_and_written(errno.EIO)
    for operation in (commit(4), Operation(REFUSE, key(4), body=b"late")):
        (outcome,) = store.write([operation])
        assert isinstance(outcome, NodeTrouble) and not isinstance(outcome, CommitRefused)
    assert isinstance(store.write([commit(9)])[0], CommitRefused), "nothing is known of this one"


@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_failed_write_left_behind_never_comes_to_life(resumed: bool) -> None:
    """It would be live behind the watermark: reconcile has passed, and the node has said that it is not here."""
    disk, store = failed_and_written(errno.ENOSPC)
    if not resumed:
        put(store, tombstone(50))  # a full disk takes deletions; this one takes the place of 3
        assert live(open_store(disk.below.clone())) == [1, 2]
    store.resume()
    put(store, commit(10))
    assert held(store, 3, 4, 5) == ["absent"] * 3
    assert isinstance(store.write([Operation(REFUSE, key(4), body=b"late")])[0], CommitRefused)
    again = open_store(disk.below)
    assert live(again) == [1, 2, 10]
    assert [number for number, origin in shown(again) if origin is not None] == [1, 2, 10]


def test_what_recovery_shows_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1: written and not synced when the process died, shown by the next one, and then the power fails."""
    monkeypatch.setattr(limits, "APPEND_BATCH_RECORDS_MAX", 2)
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    disk.settle()
    base = disk.clone()
    disk.fail("sync", 1)
    outcomes = store.write([commit(n) for n in (2, 3, 4)])
    assert all(isinstance(outcome, NodeTrouble) for outcome in outcomes)
    said = live(open_store(disk))
    assert said != [1], "some were written before the sync failed"
    assert live(open_store(after_cut(disk, base, everything=False))) == said


# -- full disks ---------------------------------------------------------------------------------------------------


def test_a_full_disk_takes_no_mail_but_deletes_and_comes_back() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    disk.fail("allocate", 1, errno.ENOSPC)
    outcomes = {n: store.write([commit(n)])[0] for n in range(2, 12)}
    assert any(isinstance(outcome, NodeReadOnly) for outcome in outcomes.values())
    assert store.full and not store.failed
    put(store, tombstone(1))
    store.resume()
    (late,) = put(store, commit(50))
    promises = Promises(dead={1: None}, asked={n: [(n, 1)] for n in (*range(1, 12), 50)})
    promises.live = {n: (n, 1, outcome) for n, outcome in outcomes.items() if isinstance(outcome, Position)}
    promises.live[50] = (50, 1, late)
    promises.refused = {n: None for n, outcome in outcomes.items() if isinstance(outcome, CommitRefused)}
    check(open_store(disk), promises)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("everything", [False, True])
def test_a_batch_refused_at_the_roll_of_a_segment_is_not_live_after_restart(error: int, everything: bool) -> None:
    """Its octets had been written with the segment before; refused for good, it must not come back."""
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    disk.settle()
    base = disk.clone()
    disk.fail("allocate", 1, error)
    numbers = list(range(2, 30))
    outcomes = dict(zip(numbers, store.write([commit(n) for n in numbers]), strict=True))
    disk.clear_faults()
    refused = [n for n, outcome in outcomes.items() if isinstance(outcome, CommitRefused)]
    taken = {n: outcome for n, outcome in outcomes.items() if isinstance(outcome, Position)}
    assert taken, "what was flushed before the roll stands"
    assert not set(live(store)) & set(refused) and set(taken) <= set(live(store))
    for image in (disk, after_cut(disk, base, everything)):
        again = open_store(image)
        assert not set(live(again)) & set(refused), "refused, and live after the restart"
        for n, position in taken.items():
            assert again.reader.verify(key(n)) == position


def test_resume_never_cuts_what_was_acknowledged() -> None:
    """A tombstone that was acknowledged while the disk was full was cut off when it had room again."""
    disk = fresh_disk()
    store = open_store(disk)
    numbers = list(range(1, 6))
    put(store, *[commit(n) for n in numbers])
    for again in range(3):
        disk.fail("allocate", 1, errno.ENOSPC)
        n = 100 * (again + 1)
        while not store.full:
            n += 1
            store.write([commit(n)])
        disk.clear_faults()
        put(store, marked(count(again)), tombstone(numbers[again]))
        end = store.facts().end
        store.resume()
        assert store.facts().end >= end
        put(store, commit(900 + again))
        store.resume()
        again_opened = open_store(disk.clone())
        assert held(again_opened, *numbers[: again + 1]) == ["dead"] * (again + 1)
        assert held(again_opened, 900 + again) == ["live"]
        assert again_opened.facts().mark == count(again)


def test_a_full_disk_opens_for_reading() -> None:
    """A node on a full disk must neither refuse to open nor take mail without a durable boot (law 12)."""
    disk = fresh_disk()
    store = open_store(disk, boot=1)
    (position,) = put(store, commit(1))
    while disk.content[disk.names[segments(disk)[-1]]][-64:].strip(b"\0") == b"" and store.facts().end.segment == 1:
        put(store, commit(100 + store.facts().end.offset))
    image = disk.clone()
    for kind in ("write", "allocate", "create"):
        _every(image, kind, errno.ENOSPC)
    again = open_store(image, boot=2)
    assert again.boot == "" and again.full and not again.failed
    assert again.reader.verify(key(1)) == position
    assert shown(again)[0] == (1, Origin.DELIVERY)
    assert len(again.facts().boots) == 1, "an opening whose record is not durable is not in the chain"
    assert isinstance(again.write([commit(2)])[0], NodeReadOnly)
    image.clear_faults()
    image.fault = SimDisk.fault.__get__(image)  # type: ignore[method-assign]
    again.resume()
    assert again.boot and again.facts().boots[-1] == again.boot and len(again.facts().boots) == 2
    put(again, commit(2), tombstone(1))
    assert held(open_store(image, boot=3), 1, 2) == ["dead", "live"]


def _every(disk: SimDisk, kind: str, error: int) -> None:
    """From now on every operation of that kind fails."""
    before = disk.fault

    def fault(what: str) -> None:
        if what == kind:
            raise OSError(error, "injected")
        before(what)

    disk.fault = fault  # type: ignore[method-assign, assignment]


# -- damage -------------------------------------------------------------------------------------------------------


def test_damage_anywhere_is_noticed_and_hides_nothing_behind_it() -> None:
    """A flipped octet at every place of a small store: the others stay readable, the bad one is never served."""
    clean = fresh_disk()
    store = open_store(clean)
    put(store, *[commit(n) for n in range(1, 5)])
    used = store.facts().end.offset
    (name,) = segments(clean)
    for offset in range(rec.SEGMENT_HEADER_OCTETS, used):
        disk = clean.clone()
        disk.content[disk.names[name]][offset] ^= 0x55
        again = open_store(disk)
        served = 0
        for n in range(1, 5):
            try:
                again.reader.verify(key(n))
                assert again.reader.read_chunk(key(n), 0).stored == body(n)
                served += 1
            except (CopyDamaged, CopyMissing):
                torn = n == 4 and again.recovery.torn_octets > 0  # what ends the log may never have been durable
                assert again.reader.has([key(n)])[0] is (Held.ABSENT if torn else Held.UNKNOWN)
        assert served >= 3, f"offset {offset}: only {served} of 4"
        put(again, commit(9))
        assert held(open_store(disk), 9) == ["live"]


def test_a_body_that_looks_like_a_record_is_not_one() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    start = store.facts().end.offset
    put(store, commit(1))
    (name,) = segments(disk)
    forged = bytes(disk.content[disk.names[name]][start : store.facts().end.offset])
    put(store, Operation(rec.COMMIT, key(2), [Chunk(0, 0, forged, len(forged))], b"{}", 1))
    put(store, tombstone(1))
    assert live(open_store(disk)) == [2]


def test_a_sender_who_knows_the_format_cannot_write_a_record() -> None:
    """M14: the checksum covers a salt that nobody outside knows. The mail holds records right for the place where it lies."""
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    codec = rec.Codec(bytes(32))
    number, start = store.facts().end
    place = start + rec.HEADER_OCTETS + 16
    forged = b"".join(codec.pack(rec.Record(rec.TOMBSTONE, 0, 0, key(1), rec.pack_date(1.0)), number, place))
    put(store, Operation(rec.COMMIT, key(2), [Chunk(0, 0, bytes(16) + forged, 16 + len(forged))], b"{}", 1))
    put(store, commit(3))
    segment = disk.content[disk.names[segments(disk)[0]]]
    assert bytes(segment[place : place + 4]) == rec.MAGIC
    segment[start] ^= 0xFF  # now recovery looks for records inside the damage
    again = open_store(disk)
    assert held(again, 1, 3) == ["live", "live"]


def test_a_record_in_another_place_is_not_one() -> None:
    """F8: the disk gives back a block of somewhere else."""
    disk = fresh_disk()
    store = open_store(disk)
    start = store.facts().end.offset
    put(store, commit(1))
    middle = store.facts().end.offset
    put(store, commit(1 + 7))  # as long as the first
    put(store, commit(2))
    segment = disk.content[disk.names[segments(disk)[0]]]
    length = middle - start
    segment[middle : middle + length] = segment[start:middle]
    again = open_store(disk)
    assert held(again, 1, 8, 2) == ["live", "unknown", "live"]
    with pytest.raises(CopyDamaged):
        store.reader.verify(key(8))


def bad_store(numbers: range, bad: int) -> tuple[BadDisk, str, tuple[int, int]]:
    """A disk with a store of those messages, and the segment and octets where the records of `bad` lie."""
    plain = fresh_disk()
    disk = BadDisk(plain)
    store = open_store(disk)
    for n in numbers:
        put(store, commit(n))
    for path in segments(plain):
        content = bytes(plain.content[plain.names[path]])
        place = content.find(key(bad))
        if place >= 0:
            plain.locks.clear()
            return disk, path, (place - 16, place + 200)
    raise AssertionError("it is not in the log")


def test_an_unreadable_record_is_named_and_read_again() -> None:
    """Law 6: EIO once must not pass over a record for ever; all others are shown."""
    disk, path, stretch = bad_store(range(1, 20), 5)
    disk.bad[path] = [stretch]
    store = open_store(disk)
    found: dict[int, Any] = {}
    unread: list[Unread] = []
    after = START
    while (scan := store.scanner.scan(after, 4, 0.0)).following != after:
        found |= {int.from_bytes(item.key, "big"): item.position for item in scan.items}
        unread += scan.unread
        after = scan.following
    assert unread and 5 not in found
    hidden = set(range(1, 20)) - set(found)
    assert all(store.reader.has([key(n)])[0] in (Held.UNKNOWN, Held.LIVE) for n in hidden), "absence is not inferred"
    assert reread(store, unread[0]) is not None
    disk.bad.clear()
    for one in unread:
        again = reread(store, one)
        assert again is not None and not again.unread
        found |= {int.from_bytes(item.key, "big"): item.position for item in again.items}
    assert sorted(found) == list(range(1, 20))


@pytest.mark.parametrize(("records_max", "octets_max"), [(3, limits.MIB), (1000, 600)])
def test_a_stretch_is_read_again_in_parts(monkeypatch: pytest.MonkeyPatch, records_max: int, octets_max: int) -> None:
    """A whole segment may come back at once: one call shows a part of it, names the rest, and nothing is passed over."""
    disk, path, stretch = bad_store(range(1, 20), 5)
    disk.bad[path] = [(0, 1 << 30)]
    store = open_store(disk)
    unread: list[Unread] = []
    after, found = START, list[int]()
    while (scan := store.scanner.scan(after, 100, 0.0)).following != after:
        found += [int.from_bytes(item.key, "big") for item in scan.items]
        unread, after = unread + scan.unread, scan.following
    hidden = set(range(1, 20)) - set(found)
    assert len(hidden) > 4 and store.damaged() == 1
    monkeypatch.setattr(limits, "REREAD_RECORDS_MAX", records_max)
    monkeypatch.setattr(limits, "REREAD_OCTETS_MAX", octets_max)
    disk.bad.clear()
    segment = disk.below.content[disk.below.names[path]]
    good, segment[slice(*stretch)] = segment[slice(*stretch)], b"?" * (stretch[1] - stretch[0])  # but one
    shown, parts = list[int](), 0

    def look_at(notes: list[Unread]) -> list[Unread]:
        """As the keeper goes about it: what is named anew takes the place of the note."""
        nonlocal parts
        left: list[Unread] = []
        while notes:
            note, *notes = notes
            again = reread(store, note)
            assert again is not None and len(again.items) <= min(records_max, 5)
            if again.unread == [note]:
                left.append(note)
            else:
                notes, parts = [*again.unread, *notes], parts + 1
            shown.extend([int.from_bytes(item.key, "big") for item in again.items])
        return left

    left = look_at(unread)
    assert parts > 2 and sorted(shown) == sorted(hidden - {5}), "each once"
    segment[slice(*stretch)] = good
    assert look_at(left) == []
    assert sorted(shown) == sorted(hidden)
    assert store.damaged() == 0, "the quarantine has healed with it"


def test_an_unreadable_segment_is_noted_and_the_rest_is_served() -> None:
    disk, path, _ = bad_store(range(1, 30), 5)
    assert len(segments(disk.below)) > 3
    disk.bad[path] = [(0, 1 << 30)]
    again = open_store(disk)
    assert again.facts().damaged
    answers = dict(zip(range(1, 30), again.reader.has([key(n) for n in range(1, 30)]), strict=True))
    assert answers[5] is Held.UNKNOWN
    served = [n for n, answer in answers.items() if answer is Held.LIVE]
    assert len(served) > 15
    for n in served:
        assert again.reader.read_chunk(key(n), 0).stored == body(n)
    assert again.reader.has([key(99)]) == [Held.UNKNOWN]
    put(again, commit(99))
    assert held(again, 99) == ["live"]


# -- scans --------------------------------------------------------------------------------------------------------


def test_scan_by_the_recent_list_and_by_the_log_say_the_same() -> None:
    """Law 6: the quick way and the long way must not differ, whatever is between them."""
    disk = fresh_disk()
    store = open_store(disk)
    positions = {n: put(store, commit(n))[0] for n in range(1, 25)}
    put(store, tombstone(7), tombstone(70), drop(9, positions[9]))
    put(store, commit(7009, under=9), commit(30, origin=Origin.REPAIR))
    put(store, checkpoint(b"c" * 16, 0, b"whole"))
    for n in range(40, 60):
        put(store, commit(n))
    put(store, *[tombstone(n) for n in range(40, 60)])
    compact_all(store)
    here, there = shown(store), shown(open_store(disk))
    assert here == there
    assert shown(store, limit=3) == here
    for after in (Position(1, 0), positions[12], store.facts().end):
        assert shown(store, after) == shown(open_store(disk), after)


def test_scan_after_a_restart_waits_for_its_age() -> None:
    disk = fresh_disk()
    put(open_store(disk), commit(1))
    again = open_store(disk)
    scan = again.scanner.scan(START, 10, 30.0)
    assert scan.items == [] and scan.following == START


# -- identity -----------------------------------------------------------------------------------------------------


def test_foreign_missing_and_second_are_refused() -> None:
    disk = fresh_disk()
    with pytest.raises(OperatorError, match="another cluster"):
        read_identity(disk, PATH, "11" * 16, "a")
    with pytest.raises(OperatorError, match="swapped or cloned"):
        read_identity(disk, PATH, CLUSTER, "b")
    with pytest.raises(OperatorError, match="is its disk mounted"):
        read_identity(disk, "elsewhere", CLUSTER, "a")
    open_store(disk)
    disk.locks[f"{PATH}/lock"] = None
    with pytest.raises(OperatorError, match="another process"):
        open_store(BadDisk(disk))


def test_a_newer_format_is_refused_with_the_reason() -> None:
    disk = fresh_disk()
    disk.replace_file(f"{PATH}/identity", disk.read_file(f"{PATH}/identity").replace(b'"format":2', b'"format":3'))
    with pytest.raises(OperatorError, match="newer than this program"):
        open_store(disk)


def test_rebirth_is_durable_before_it_is_answered() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    disk.settle()
    base = disk.clone()
    birth = store.rebirth("00" * 7 + "99")
    again = open_store(after_cut(disk, base, everything=False))
    assert (again.facts().incarnation, again.facts().birth) == ("00" * 7 + "99", birth)
    assert again.reader.verify(key(1)) < birth <= put(again, commit(2))[0]


def test_a_lifted_birth_mark_stays_lifted_after_a_power_cut() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    put(store, commit(1))
    store.rebirth("00" * 7 + "99")
    disk.settle()
    base = disk.clone()
    store.lift_birth()
    again = open_store(after_cut(disk, base, everything=False))
    assert (again.facts().incarnation, again.facts().birth) == ("00" * 7 + "99", START)
    store.fail("it is sick")
    with pytest.raises(NodeReadOnly):
        store.lift_birth()


def test_marks_are_written_only_when_they_are_news() -> None:
    """Law 10: each batch of tombstones carries one; the log must not grow by it."""
    store = open_store(fresh_disk())
    put(store, marked(count(5)), tombstone(1))
    before = store.facts().end
    put(store, marked(count(5)), tombstone(2))
    grown = store.facts().end.offset - before.offset
    assert grown == rec.record_octets(8)
    assert store.facts().mark == count(5)


def test_no_tombstone_outlives_its_mark() -> None:
    """Law 10: durable before or with the act. Where sectors of one write were kept out of order, recovery says so."""
    disk = fresh_disk()
    store = open_store(disk)
    put(store, *[commit(n) for n in range(1, 12)])
    disk.settle()
    base = disk.clone()
    put(store, marked(count(9)), *[tombstone(n) for n in range(1, 12)])
    tried = 0
    for length in range(len(disk.journal) + 1):
        for ops in cuts(disk.journal, length, 64):
            again = open_store(disk.image(base, ops))
            if Held.DEAD in again.reader.has([key(n) for n in range(1, 12)]):
                tried += again.facts().mark == count(9)
                assert again.facts().mark == count(9) or again.facts().damaged
    assert tried


def without_chunk(bad: int) -> SimDisk:
    """A disk with a message of three chunks of which one is damaged, and another behind it."""
    disk = fresh_disk()
    put(open_store(disk), commit(1, 3), commit(2))
    (name,) = segments(disk)
    for place, found in records(disk):
        if (found.type, found.key, found.number) == (rec.CHUNK, key(1), bad):
            disk.content[disk.names[name]][place.offset + rec.HEADER_OCTETS] ^= 0x55
    return disk


@pytest.mark.parametrize("bad", range(3))
@pytest.mark.parametrize("streamed", [False, True], ids=["in one", "streamed"])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_a_copy_made_again_over_one_that_lost_a_chunk_is_whole(bad: int, streamed: bool, chunks: int) -> None:
    """Nothing of the damaged copy is taken for a part of the new one, whether that is cut alike or not (law 1)."""
    disk = without_chunk(bad)
    store = open_store(disk)
    assert held(store, 1, 2) == ["unknown", "live"]
    repair = commit(1, chunks, Origin.REPAIR)
    if streamed:
        for chunk in repair.chunks:
            put(store, Operation(rec.CHUNK, key(1), [chunk]))
        repair = repair._replace(chunks=())
    (position,) = put(store, repair)
    for each in (store, open_store(disk)):
        assert held(each, 1, 2) == ["live", "live"]
        each.reader.verify(key(1))
        assert [each.reader.read_chunk(key(1), n).stored for n in range(chunks)] == [body(1, n) for n in range(chunks)]
        assert {item.key: item.position for item in each.reader.inventory(b"", 10)}[key(1)] == position
