"""Many small messages at once: neighbours come with one read, and nothing bad costs another message."""

from __future__ import annotations

import pytest
import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.sim.disk import SimDisk
from powermail.storage.contract import COMPRESSED, Chunk
from powermail.storage.frames import Inflater, frame_octets
from powermail.storage.log import record as rec
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import Operation
from tests.storage.bad_disk import BadDisk, BadFile
from tests.storage.support import PATH, body, commit, fresh_disk, key, open_store, put, tombstone

LOG = f"{PATH}/segments/0000000001.seg"
WIDE = Options(segment_octets=1 << 20, reserve_octets=0)


def compressed(octets: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(octets)


def filled(disk: BadDisk, count: int) -> SegmentStore:
    """A store with messages 1 to `count`, one behind the other."""
    store = open_store(disk, WIDE)
    put(store, *[commit(number) for number in range(1, count + 1)])
    return store


def read(store: SegmentStore, *numbers: int) -> list[list[bytes] | None]:
    """The octets of each, in chunks."""
    return [whole and whole.parts for whole in store.reader.read_small([key(number) for number in numbers])]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, octets) of each read of the log."""
    asked: list[tuple[int, int]] = []
    plain = BadFile.read

    def counted(file: BadFile, offset: int, octets: int) -> bytes:
        asked.append((offset, octets))
        return plain(file, offset, octets)

    monkeypatch.setattr(BadFile, "read", counted)
    return asked


def test_neighbours_are_read_at_once_in_whatever_order_they_are_asked_for(reads: list[tuple[int, int]]) -> None:
    store = filled(BadDisk(fresh_disk()), 20)
    reads.clear()
    wanted = [7, 3, 20, 4, 99, 1, 7]
    assert read(store, *wanted) == [[body(number)] if number <= 20 else None for number in wanted]
    assert len(reads) == 1
    assert read(store) == [] and len(reads) == 1


def test_what_lies_far_apart_is_not_read_together(reads: list[tuple[int, int]]) -> None:
    store = filled(BadDisk(fresh_disk()), 3)
    put(store, Operation(rec.CHUNK, key(50), [Chunk(0, 0, bytes(200_000), 200_000)]), commit(4))
    reads.clear()
    assert read(store, 4, 2) == [[body(4)], [body(2)]]
    assert len(reads) == 2 and sum(octets for _, octets in reads) < 5000


def test_one_read_is_bounded(reads: list[tuple[int, int]]) -> None:
    store = open_store(BadDisk(fresh_disk()), WIDE)
    large = [Chunk(0, 0, bytes([number]) * 50_000, 50_000) for number in range(12)]
    put(store, *[Operation(rec.COMMIT, key(number), [large[number]], b"{}", 1) for number in range(12)])
    reads.clear()
    assert read(store, *range(12)) == [[chunk.stored] for chunk in large]
    assert 1 < len(reads) < 6 and all(octets <= limits.READ_STRETCH_OCTETS_MAX for _, octets in reads)


def test_a_place_that_does_not_read_costs_no_neighbour() -> None:
    plain = fresh_disk()
    filled(BadDisk(plain), 9).abandon()
    disk = BadDisk(plain.clone())  # its files are opened by the names they have now
    store = open_store(disk, WIDE)
    position = store.reader.held(key(5))[1]
    disk.bad[LOG] = [(position.offset + 60, position.offset + 61)]
    assert read(store, *range(1, 10)) == [[body(number)] if number != 5 else None for number in range(1, 10)]


@pytest.mark.parametrize("at", [0, 4, 9, 20, 35, 47, 48])
def test_a_record_that_rotted_costs_no_neighbour(at: int) -> None:
    plain = fresh_disk()
    store = filled(BadDisk(plain), 9)
    position = store.reader.held(key(5))[1]
    flip(plain, position.offset + at)
    assert read(store, *range(1, 10)) == [[body(number)] if number != 5 else None for number in range(1, 10)]


def flip(disk: SimDisk, offset: int) -> None:
    """One octet of the log becomes another."""
    octets = disk.content[disk.names[LOG]]
    octets[offset] ^= 1


def test_a_log_that_was_cut_costs_only_what_is_gone() -> None:
    plain = fresh_disk()
    store = filled(BadDisk(plain), 9)
    position = store.reader.held(key(8))[1]
    del plain.content[plain.names[LOG]][position.offset + 30 :]
    assert read(store, 9, 8, 7, 1) == [None, None, [body(7)], [body(1)]]


def test_what_is_dead_or_has_no_commit_yet_is_not_read() -> None:
    store = filled(BadDisk(fresh_disk()), 3)
    put(store, tombstone(2), Operation(rec.CHUNK, key(4), [Chunk(0, 0, b"open", 4)]))
    assert read(store, 1, 2, 3, 4) == [[body(1)], None, [body(3)], None]


def test_a_frame_that_is_none_costs_its_message_and_no_other() -> None:
    store = open_store(BadDisk(fresh_disk()), WIDE)
    good, long = b"well " * 300, bytes(limits.CHUNK_OCTETS + 1)
    frames = [compressed(good), b"no frame at all", compressed(good)[:-3], compressed(b""), compressed(long)]
    put(store, *[Operation(rec.COMMIT, key(n), [Chunk(0, COMPRESSED, frame, 1)], b"{}", 1) for n, frame in enumerate(frames)])
    assert read(store, *range(5)) == [[good], None, None, [b""], [long]]


def test_frames_are_taken_apart_together_as_one_by_one() -> None:
    inflater = Inflater()
    rotten = compressed(b"rotten " * 50)
    rotten = rotten[:-4] + bytes([rotten[-4] ^ 0xFF]) + rotten[-3:]
    for frames in (
        [],
        [compressed(b"a" * 999)],
        [compressed(b"a" * 999)] * 3,
        [compressed(b"one"), rotten, compressed(b"two")],
    ):
        alone: list[bytes | None] = []
        for frame in frames:
            try:
                alone.append(inflater.octets(Chunk(0, COMPRESSED, frame, frame_octets(frame))))
            except CopyDamaged:
                alone.append(None)
        assert inflater.many(frames) == alone
    assert inflater.octets(Chunk(0, 0, b"as it is", 8)) == b"as it is"
