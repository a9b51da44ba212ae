"""The laws of one node's log: damage, full disks, failed fsyncs, identity, compaction, scanning."""

from __future__ import annotations

import errno

import pytest

from powermail.base.errors import CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble, OperatorError
from powermail.storage import record as rec
from powermail.storage.contract import START, Chunk, Position
from powermail.storage.identity import read_identity
from powermail.storage.store import Operation
from tests.storage.support import CLUSTER, PATH, Promises, body, check, commit, fresh_disk, key, open_store


def promises_of(*numbers: int) -> Promises:
    """Messages that must be there."""
    held = {key(number): (number, 1) for number in numbers}
    return Promises(dict(held), {}, dict(held))


def test_commit_is_idempotent_and_delete_wins() -> None:
    store = open_store(fresh_disk())
    assert store.write([commit(1), commit(1)]) == [None, None]
    assert store.messages() == 1
    end = store.end()
    assert store.write([commit(1)]) == [None]
    assert store.end() == end
    assert store.write([Operation(rec.TOMBSTONE, key(1)), Operation(rec.TOMBSTONE, key(2))]) == [None, None]
    outcome = store.write([commit(1), commit(2)])
    assert all(isinstance(error, NodeTrouble) for error in outcome)
    assert store.messages() == 0


def test_commit_without_all_chunks_is_refused() -> None:
    store = open_store(fresh_disk())
    (error,) = store.write([Operation(rec.COMMIT, key(1), [Chunk(1, 0, b"x", 1)], b"{}", 2)])
    assert isinstance(error, NodeTrouble)
    assert store.has([key(1)]) == [False]


def test_abort_is_final_though_the_commit_comes_later_in_the_log() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    assert store.write([Operation(rec.ABORT, key(1))]) == [None]
    (error,) = store.write([commit(1)])
    assert isinstance(error, NodeTrouble)
    assert open_store(disk).has([key(1)]) == [False]


@pytest.mark.parametrize("kind", ["write", "sync", "allocate"])
def test_a_failed_fsync_or_write_is_never_acknowledged_and_stops_the_node(kind: str) -> None:
    """EIO at every n-th call: what was acknowledged before stays, nothing after (P18)."""
    number = 0
    while True:
        number += 1
        disk = fresh_disk()
        store = open_store(disk)
        disk.fail(kind, number)
        promises = Promises()
        for n in range(1, 30):
            promises.asked[key(n)] = (n, 1)
            (error,) = store.write([commit(n)])
            if error is None:
                promises.live[key(n)] = (n, 1)
        if disk.planned(kind):
            assert number > 3
            return
        assert store.failed
        assert isinstance(store.write([commit(99)])[0], NodeReadOnly)
        check(store, promises)
        check(open_store(disk), promises)


def test_a_full_disk_takes_no_mail_but_deletes_and_comes_back() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    assert store.write([commit(1)]) == [None]
    disk.fail("allocate", 1, errno.ENOSPC)
    outcomes = [store.write([commit(n)])[0] for n in range(2, 12)]
    assert any(isinstance(error, NodeReadOnly) for error in outcomes)
    assert store.full
    assert not store.failed
    assert store.write([Operation(rec.TOMBSTONE, key(1))]) == [None]
    store.resume()
    assert store.write([commit(50)]) == [None]
    good = [n for n, error in zip(range(2, 12), outcomes, strict=True) if error is None]
    promises = promises_of(50, *good)
    promises.asked.update({key(n): (n, 1) for n in range(2, 12)})
    promises.dead[key(1)] = None
    check(open_store(disk), promises)


def test_damage_anywhere_is_noticed_and_hides_nothing_behind_it() -> None:
    """A flipped octet at every place of a small store: the others stay readable, the bad one is never served."""
    clean = fresh_disk()
    store = open_store(clean)
    store.write([commit(n) for n in range(1, 5)])
    used = store.end().offset
    name = next(name for name in clean.names if name.endswith(".seg"))
    for offset in range(rec.SEGMENT_HEADER_OCTETS, used):
        disk = clean.clone()
        disk.content[disk.names[name]][offset] ^= 0x55
        again = open_store(disk)
        served = 0
        for n in range(1, 5):
            try:
                assert again.read_chunk(key(n), 0).stored == body(n)
                again.verify(key(n))
                served += 1
            except (CopyDamaged, CopyMissing):
                pass
        assert served >= 3, f"offset {offset}: only {served} of 4"
        assert again.write([commit(9)]) == [None]
        assert open_store(disk).has([key(9)]) == [True]


def test_a_body_that_looks_like_a_record_is_not_one() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    store.write([commit(1)])
    segment = disk.content[disk.names[next(n for n in disk.names if n.endswith(".seg"))]]
    forged = bytes(segment[rec.SEGMENT_HEADER_OCTETS : store.end().offset])
    store.write([Operation(rec.COMMIT, key(2), [Chunk(0, 0, bytes(8 - 48 % 8) + forged, 1)], b"{}", 1)])
    store.write([Operation(rec.TOMBSTONE, key(1))])
    assert open_store(disk).live_keys(b"", 10) == [key(2)]


def test_a_sender_who_knows_the_format_cannot_write_a_record() -> None:
    """M14: the checksum covers a salt that nobody outside knows. The mail holds records right for the place where it lies."""
    disk = fresh_disk()
    store = open_store(disk)
    store.write([commit(1)])
    codec = rec.Codec(bytes(32))
    number, start = store.end()
    place = start + rec.HEADER_OCTETS + 16
    forged = b"".join(codec.pack(rec.Record(rec.TOMBSTONE, 0, 0, key(1), b""), number, place))
    store.write([Operation(rec.COMMIT, key(2), [Chunk(0, 0, bytes(16) + forged, 16 + len(forged))], b"{}", 1)])
    segment = disk.content[disk.names[next(n for n in disk.names if n.endswith(".seg"))]]
    assert bytes(segment[place : place + 4]) == rec.MAGIC
    segment[start] ^= 0xFF  # now recovery looks for records inside the damage
    again = open_store(disk)
    assert again.has([key(1)]) == [True]


def test_a_record_in_another_place_is_not_one() -> None:
    """F8: the disk gives back a block of somewhere else."""
    disk = fresh_disk()
    store = open_store(disk)
    start = store.end().offset or rec.SEGMENT_HEADER_OCTETS
    store.write([commit(1)])
    middle = store.end().offset
    store.write([commit(1 + 7)])  # as long as the first
    segment = disk.content[disk.names[next(n for n in disk.names if n.endswith(".seg"))]]
    length = middle - start
    segment[middle : middle + length] = segment[start:middle]
    again = open_store(disk)
    assert again.has([key(1), key(8)]) == [True, False]
    with pytest.raises(CopyDamaged):
        store.verify(key(8))


def test_a_tombstone_stays_while_its_dead_record_lies_in_another_segment() -> None:
    """P8: compaction of the tombstone's segment first, then the key index is lost: the message must not come back."""
    disk = fresh_disk()
    store = open_store(disk)
    numbers = list(range(1, 12))
    store.write([commit(n) for n in numbers])  # segment 1 stays mostly live
    while store.end().segment < 3:
        store.write([commit(len(numbers) + 1 + len(store.live_keys(b"", 1000)))])
    tombstones_at = store.end().segment
    fillers = list(range(500, 520))
    assert store.write([Operation(rec.TOMBSTONE, key(2))]) == [None]
    for n in fillers:
        store.write([commit(n)])
    store.write([Operation(rec.TOMBSTONE, key(n)) for n in fillers])
    store.forget_tombstones([key(n) for n in fillers])
    while store.compact(Position(1 << 40, 0)):
        pass
    assert tombstones_at not in store._sizes, "the segment with the tombstone was compacted"
    assert 1 in store._sizes, "the segment with the dead record was not"
    assert open_store(disk).has([key(2)]) == [False]


def test_compaction_keeps_what_counts_and_frees_the_rest() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    for n in range(1, 60):
        store.write([commit(n)])
    dead = [n for n in range(1, 60) if n % 5]
    store.write([Operation(rec.TOMBSTONE, key(n)) for n in dead])
    before = store.log_octets()
    assert store.compact(START) == 0
    rounds = 0
    while store.compact(Position(1 << 40, 0)):
        rounds += 1
    assert rounds > 3
    assert store.log_octets() < before * 0.7
    promises = promises_of(*[n for n in range(1, 60) if n % 5 == 0])
    promises.dead.update({key(n): None for n in dead})
    check(store, promises)
    check(open_store(disk), promises)
    assert store.live() == open_store(disk).live()


def test_scan_gives_each_message_once_and_only_after_its_age() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    for n in range(1, 40):
        store.write([commit(n)])
    store.write([Operation(rec.TOMBSTONE, key(7))])
    assert store.scan(START, 100, 30.0, False) == ([], START)
    for current in (store, open_store(disk)):
        position, found = START, []
        while True:
            items, following = current.scan(position, 6, 0.0, False)
            found += [item.key for item in items]
            if following == position:
                break
            position = following
        assert found == [key(n) for n in range(1, 40) if n != 7]
    assert current.write([commit(50)]) == [None]
    items, _ = current.scan(position, 6, 0.0, False)
    assert [item.key for item in items] == [key(50)]


def test_foreign_missing_and_second_are_refused() -> None:
    disk = fresh_disk()
    with pytest.raises(OperatorError, match="another cluster"):
        read_identity(disk, PATH, "11" * 16, "a")
    with pytest.raises(OperatorError, match="swapped or cloned"):
        read_identity(disk, PATH, CLUSTER, "b")
    with pytest.raises(OperatorError, match="is its disk mounted"):
        read_identity(disk, "elsewhere", CLUSTER, "a")
    open_store(disk)
    with pytest.raises(OperatorError, match="another process"):
        from powermail.storage.keyindex import MemoryKeyIndex
        from powermail.storage.store import SegmentStore
        from tests.storage.support import SMALL, Ticks

        SegmentStore.open(disk, PATH, CLUSTER, "a", lambda path, store: MemoryKeyIndex(), SMALL, Ticks())


def test_checkpoints_replace_and_add() -> None:
    disk = fresh_disk()
    store = open_store(disk)
    name = bytes(range(16))
    for number, octets in ((0, b"old"), (1, b"delta"), (0, b"whole"), (1, b"one"), (2, b"two")):
        assert store.write([Operation(rec.CHECKPOINT, name, (), octets, number)]) == [None]
    wanted = [(name, 0, b"whole"), (name, 1, b"one"), (name, 2, b"two")]
    assert store.checkpoints(b"", 10) == wanted
    assert open_store(disk).checkpoints(b"", 10) == wanted
