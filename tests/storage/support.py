"""Makes stores, messages and operations for the storage tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from powermail.base.entropy import SystemEntropy
from powermail.sim.disk import SimDisk
from powermail.storage.contract import NO_RANK, START, Chunk, Mark, Origin, Position, Scan, Unread
from powermail.storage.identity import make_store, read_identity
from powermail.storage.log import record as rec
from powermail.storage.log.keys import KeyIndex, MemoryKeyIndex, SqliteKeyIndex
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import FENCE, Operation

CLUSTER = "00" * 16
PATH = "node"
SMALL = Options(segment_octets=2048, reserve_octets=0)
FAR = Position(1 << 40, 0)
NO_MARK = Mark()


class Ticks:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def in_memory(path: str, store: bytes) -> KeyIndex:
    """A key index that is thrown away."""
    return MemoryKeyIndex()


def in_file(path: str, store: bytes) -> KeyIndex:
    """The key index of production."""
    return SqliteKeyIndex(path, store)


def fresh_disk() -> SimDisk:
    """A disk with an empty store, all durable."""
    disk = SimDisk()
    make_store(disk, PATH, CLUSTER, "a", SystemEntropy())
    disk.settle()
    return disk


def open_store(
    disk: Any,
    options: Options = SMALL,
    boot: int = 0,
    ticks: Callable[[], float] | None = None,
    path: str = PATH,
    make_keys: Callable[[str, bytes], KeyIndex] = in_memory,
) -> SegmentStore:
    """Opens as a new process would; the key index in memory makes recovery read the whole log."""
    if isinstance(disk, SimDisk):
        disk.locks.clear()
    return SegmentStore.open(disk, path, CLUSTER, "a", make_keys, options, ticks or Ticks(), boot.to_bytes(8, "big"))


def key(number: int) -> bytes:
    """A key that rises with the number."""
    return number.to_bytes(16, "big")


def body(number: int, chunk: int = 0) -> bytes:
    """Octets that belong to one chunk of one message."""
    return hashlib.sha256(b"%d %d" % (number, chunk)).digest() * (3 + number % 7)


def chunks_of(number: int, chunks: int = 1) -> list[Chunk]:
    """All chunks of one message."""
    return [Chunk(n, 0, body(number, n), len(body(number, n))) for n in range(chunks)]


def record(number: int) -> bytes:
    """The commit record of one message."""
    return b'{"message":%d}' % number


def commit(number: int, chunks: int = 1, origin: Origin = Origin.DELIVERY, under: int | None = None) -> Operation:
    """A whole message in one operation; `under` is the number of its key when that is another one."""
    flags = rec.FLAG_REPAIR if origin is Origin.REPAIR else 0
    name = key(number if under is None else under)
    return Operation(rec.COMMIT, name, chunks_of(number, chunks), record(number), chunks, flags)


def stream(number: int, chunk: int) -> Operation:
    """One chunk of a message that streams in."""
    return Operation(rec.CHUNK, key(number), [chunks_of(number, chunk + 1)[chunk]])


def last(number: int, chunks: int) -> Operation:
    """The commit of a message all of whose chunks were streamed."""
    return Operation(rec.COMMIT, key(number), (), record(number), chunks)


def tombstone(number: int, at: float = 0.0) -> Operation:
    """A deletion, stated at that date."""
    return Operation(rec.TOMBSTONE, key(number), body=rec.pack_date(at))


def drop(number: int, position: Position) -> Operation:
    """Takes one copy away."""
    return Operation(rec.DROP, key(number), body=rec.pack_position(position))


def checkpoint(name: bytes, number: int, octets: bytes) -> Operation:
    """A record of a checkpoint."""
    return Operation(rec.CHECKPOINT, name, body=rec.pack_rank(NO_RANK) + octets, number=number)


def marked(mark: Mark) -> Operation:
    """The mark that goes before tombstones, drops and checkpoints in their batch (law 10)."""
    return Operation(rec.MARK, mark=mark)


def count(number: int) -> Mark:
    """A mark of an index that has committed so many transactions."""
    return Mark(1, {1: ("tag", number)})


def held(store: SegmentStore, *numbers: int) -> list[str]:
    """What it says of each key, in words."""
    return [answer.value for answer in store.reader.has([key(number) for number in numbers])]


def live(store: SegmentStore) -> list[int]:
    """Numbers of the live keys."""
    items = store.reader.inventory(b"", 1 << 20)
    return [int.from_bytes(item.key, "big") for item in items if item.held.value == "live"]


def shown(store: SegmentStore, after: Position = START, limit: int = 1000) -> list[tuple[int, Origin | None]]:
    """All that scans show behind a place, in their order."""
    found: list[tuple[int, Origin | None]] = []
    while True:
        scan = store.scanner.scan(after, limit, 0.0)
        found += [(int.from_bytes(item.key, "big"), item.origin) for item in scan.items]
        if scan.following == after:
            return found
        after = scan.following


def reread(store: SegmentStore, unread: Unread) -> Scan | None:
    """Tries a stretch again, as a node does with its two lanes."""
    again = store.scanner.look_again(unread)
    if again is None:
        return None
    if again.records:
        store.admit(unread, again)
    return store.scanner.shown_again(unread, again)


def put(store: SegmentStore, *operations: Operation) -> list[Position]:
    """Writes one batch that must not fail; the positions of its commits, and the ends that its fences answer."""
    outcomes = store.write(operations)
    assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    return [
        outcome
        for operation, outcome in zip(operations, outcomes, strict=True)
        if isinstance(outcome, Position) and operation.kind in (rec.COMMIT, FENCE)
    ]


def segments(disk: SimDisk) -> list[str]:
    """Paths of the segments, oldest first."""
    return sorted(name for name in disk.names if name.endswith(".seg"))


def records(disk: SimDisk) -> list[tuple[Position, rec.Record]]:
    """All valid records of the log, in its order."""
    codec = rec.Codec(bytes.fromhex(read_identity(disk, PATH, CLUSTER, "a").salt))
    found = []
    for path in segments(disk):
        number = int(path[-14:-4])
        octets = bytes(disk.content[disk.names[path]])[rec.SEGMENT_HEADER_OCTETS :]
        for offset, record, _ in codec.walk(octets, number, rec.SEGMENT_HEADER_OCTETS):
            if record is not None:
                found.append((Position(number, offset), record))
    return found


def compact_all(store: SegmentStore, forgotten: Sequence[bytes] = (), at: float = 0.0) -> int:
    """Steps until nothing is worth it; how many there were."""
    for steps in range(1000):
        wanted = store.compaction.compactable(FAR, at)
        if wanted is None:
            return steps
        store.compaction.compact(FAR, [name for name in wanted if name in forgotten], NO_MARK)
    raise AssertionError("compaction never ends")
