"""Logs of the first release: they open, go on, and never lose what they held."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from powermail.base.disk import SystemDisk
from powermail.storage.contract import COMPRESSED, START, Held, Origin
from powermail.storage.identity import Identity
from powermail.storage.log import record as rec
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import Operation
from tests.fixtures.release_1 import VARIANTS, OldFacts, facts, unpack
from tests.storage.support import Ticks, commit, compact_all, in_file, in_memory, key

OPTIONS = Options(segment_octets=65536, reserve_octets=0)
CASES = [(variant, node) for variant in VARIANTS for node in "abc"]


def identity(path: Path) -> Identity:
    """What the file says."""
    return msgspec.json.decode((path / "identity").read_bytes(), type=Identity)


def open_at(path: Path, lose_index: bool = False, boot: int = 1) -> SegmentStore:
    """Opens a node's directory as the program does; without its key index if it was lost."""
    make_keys = in_memory if lose_index else in_file
    cluster = msgspec.json.decode((path / "identity").read_bytes(), type=dict[str, object])["cluster"]
    return SegmentStore.open(
        SystemDisk(), str(path), str(cluster), path.name, make_keys, OPTIONS, Ticks(), boot.to_bytes(8, "big")
    )


def octets_of(store: SegmentStore, name: bytes) -> bytes:
    """A message as it was accepted."""
    import zstandard

    commit_record = msgspec.json.decode(store.reader.read_commit(name), type=dict[str, object])
    sizes = commit_record["sizes"]
    assert isinstance(sizes, list)
    parts = [store.reader.read_chunk(name, number) for number in range(len(sizes))]
    unpacker = zstandard.ZstdDecompressor()
    octets = b"".join(unpacker.decompress(p.stored) if p.flags & COMPRESSED else p.stored for p in parts)
    assert hashlib.sha256(octets).hexdigest() == commit_record["sha256"]
    return octets


def check_old(store: SegmentStore, old: OldFacts, node: str) -> None:
    """All that the first release's log held, and nothing else."""
    wanted = old.nodes[node]
    items = store.reader.inventory(b"", 1 << 20)
    assert sorted(item.key.hex() for item in items if item.held is Held.LIVE) == wanted.live
    assert sorted(item.key.hex() for item in items if item.held is Held.DEAD) == wanted.dead
    for name in wanted.live:
        octets_of(store, bytes.fromhex(name))
    kept = [(name.hex(), n, hashlib.sha256(octets).hexdigest()) for name, n, octets in store.reader.checkpoints(b"", 100)]
    assert kept == wanted.checkpoints


@pytest.mark.parametrize("lose_index", [False, True])
@pytest.mark.parametrize(("variant", "node"), CASES)
def test_version_1_is_read(variant: str, node: str, lose_index: bool, tmp_path: Path) -> None:
    """Also by a program whose key index was lost, or is one that it cannot read; aborts are tombstones."""
    old = facts(variant)
    path = unpack(tmp_path, variant) / "nodes" / node
    before = {segment.name: segment.read_bytes() for segment in (path / "segments").iterdir()}
    store = open_at(path, lose_index)
    check_old(store, old, node)
    assert store.recovery.damaged == 0
    (scan,) = [store.scanner.scan(START, 10_000, 0.0)]
    shown = {item.key.hex(): item.origin for item in scan.items}
    assert sorted(name for name, origin in shown.items() if origin is not None) == old.nodes[node].live
    assert sorted(name for name, origin in shown.items() if origin is None) == old.nodes[node].dead
    assert set(shown.values()) <= {Origin.DELIVERY, Origin.MOVED, None}, "repair copies of that release say no origin"
    made = identity(path)
    assert made.format == 2 and made.incarnation == store.facts().incarnation
    for name, octets in before.items():
        assert (path / "segments" / name).read_bytes() == octets, "segments of version 1 are left as they are"
    newer = [segment for segment in (path / "segments").iterdir() if segment.name not in before]
    assert newer and all(segment.read_bytes()[8:12] == b"\x02\x00\x00\x00" for segment in newer)
    store.close()


@pytest.mark.parametrize("lose_index", [False, True])
@pytest.mark.parametrize(("variant", "node"), CASES)
def test_version_1_goes_on(variant: str, node: str, lose_index: bool, tmp_path: Path) -> None:
    """Its copies are dropped, deleted and moved like any other; where they lie is where they were first written."""
    old = facts(variant).nodes[node]
    path = unpack(tmp_path, variant) / "nodes" / node
    store = open_at(path, lose_index)
    names = [bytes.fromhex(name) for name in old.live]
    places = {name: store.reader.verify(name) for name in names}
    gone, dropped, kept = names[0:6], names[6:9], names[9:]
    moved_one = next((i.key for i in store.scanner.scan(START, 1000, 0.0).items if i.origin is Origin.MOVED), dropped[0])
    if moved_one in kept:
        kept.remove(moved_one)
        dropped.append(moved_one)
    elif moved_one in gone:
        gone.remove(moved_one)
        dropped.append(moved_one)
    operations = [Operation(rec.TOMBSTONE, name, body=rec.pack_date(100.0)) for name in gone]
    operations += [Operation(rec.DROP, name, body=rec.pack_position(places[name])) for name in dropped]
    assert not any(isinstance(outcome, Exception) for outcome in store.write([*operations, commit(1), commit(2)]))
    for number in (3, 4):
        store.write([commit(number)])
    assert isinstance(store.write([Operation(rec.COMMIT, bytes.fromhex(old.dead[0]), (), b"{}", 0)])[0], Exception)
    store.settle(True)
    compact_all(store)
    for again in (store, None, None):
        if again is None:
            store.close()
            again = store = open_at(path, lose_index, boot=7)
        for name in kept:
            assert again.reader.verify(name) == places[name]
            octets_of(again, name)
        assert set(again.reader.has(gone)) == {Held.DEAD}
        assert not set(again.reader.has(dropped)) & {Held.LIVE, Held.DEAD}
        assert again.reader.has([key(1), key(4)]) == [Held.LIVE, Held.LIVE]
    store.close()


def test_a_cut_while_the_first_segment_of_version_2_is_made_harms_nothing(tmp_path: Path) -> None:
    """Identity first, then the roll: after each file operation the directory opens and holds all."""
    old = facts("stopped")
    for calls in range(1, 12):
        path = unpack(tmp_path / str(calls), "stopped") / "nodes" / "a"
        try:
            open_at_broken(path, calls)
        except OSError:
            pass
        store = open_at(path, boot=3)
        check_old(store, old, "a")
        assert not isinstance(store.write([commit(1)])[0], Exception)
        store.close()


class Broken(SystemDisk):
    """A disk whose n-th changing call, and all later ones, fail."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def _count(self) -> None:
        self._left -= 1
        if self._left <= 0:
            raise OSError(5, "injected")

    def open(self, path: str, create: bool = False, exclusive: bool = False):  # type: ignore[no-untyped-def]
        if create or exclusive:
            self._count()
        return super().open(path, create, exclusive)

    def rename(self, old: str, new: str) -> None:
        self._count()
        super().rename(old, new)

    def sync_directory(self, path: str) -> None:
        self._count()
        super().sync_directory(path)

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        self._count()
        super().replace_file(path, octets, mode)


def open_at_broken(path: Path, calls: int) -> None:
    """Opens on a disk that fails in the middle of it, and leaves everything as it is then."""
    cluster = identity_cluster(path)
    store = SegmentStore.open(Broken(calls), str(path), cluster, "a", in_memory, OPTIONS, Ticks(), bytes(7) + b"\x02")
    try:
        store.close()
    except OSError:
        pass


def identity_cluster(path: Path) -> str:
    """The cluster it belongs to."""
    return str(msgspec.json.decode((path / "identity").read_bytes(), type=dict[str, object])["cluster"])
