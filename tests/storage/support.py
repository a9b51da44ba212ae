"""Makes stores and messages for the storage tests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from powermail.base.entropy import SystemEntropy
from powermail.sim.disk import SimDisk
from powermail.storage import record as rec
from powermail.storage.contract import Chunk
from powermail.storage.identity import make_store
from powermail.storage.keyindex import MemoryKeyIndex
from powermail.storage.store import Operation, Options, SegmentStore

CLUSTER = "00" * 16
PATH = "node"
SMALL = Options(segment_octets=2048, reserve_octets=0)


class Ticks:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fresh_disk() -> SimDisk:
    """A disk with an empty store, all durable."""
    disk = SimDisk()
    make_store(disk, PATH, CLUSTER, "a", SystemEntropy())
    disk.settle()
    return disk


def open_store(disk: SimDisk, options: Options = SMALL) -> SegmentStore:
    """Opens with the key index in memory: recovery reads the whole log."""
    disk.locks.clear()
    return SegmentStore.open(disk, PATH, CLUSTER, "a", lambda path, store: MemoryKeyIndex(), options, Ticks())


def key(number: int) -> bytes:
    """A key that rises with the number."""
    return number.to_bytes(16, "big")


def body(number: int, chunk: int = 0) -> bytes:
    """Octets that belong to one chunk of one message."""
    return hashlib.sha256(b"%d %d" % (number, chunk)).digest() * (3 + number % 7)


def commit(number: int, chunks: int = 1) -> Operation:
    """A whole message in one operation."""
    parts = [Chunk(n, 0, body(number, n), len(body(number, n))) for n in range(chunks)]
    return Operation(rec.COMMIT, key(number), parts, b'{"message":%d}' % number, chunks)


@dataclass
class Promises:
    """What was acknowledged, by key."""

    live: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    dead: dict[bytes, None] = field(default_factory=dict)
    asked: dict[bytes, tuple[int, int]] = field(default_factory=dict)


def check(store: SegmentStore, promises: Promises, where: str = "") -> None:
    """Acknowledged is there, deleted is not, and what is there is whole."""
    for name, (number, chunks) in promises.live.items():
        store.verify(name)
        for chunk in range(chunks):
            assert store.read_chunk(name, chunk).stored == body(number, chunk), f"{where}: octets of {number}"
    for name in promises.dead:
        assert store.has([name]) == [False], f"{where}: {name.hex()} came back"
    for name in store.live_keys(b"", 1 << 20):
        assert name in promises.asked, f"{where}: a message nobody sent"
        number, chunks = promises.asked[name]
        for chunk in range(chunks):
            assert store.read_chunk(name, chunk).stored == body(number, chunk), f"{where}: half a message"
