"""`docs/rescue.py` gets mail out of node directories without the program, in both formats; what was deleted stays gone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from powermail.base.disk import SystemDisk
from powermail.base.entropy import SystemEntropy
from powermail.storage.contract import COMPRESSED, Chunk, Position
from powermail.storage.identity import make_store
from powermail.storage.log import record as rec
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import Operation
from tests.fixtures.release_1 import VARIANTS, facts, unpack
from tests.storage.support import CLUSTER, Ticks, compact_all, drop, in_file, key, tombstone

OPTIONS = Options(segment_octets=16_384, reserve_octets=0)


def rescue(output: Path, *nodes: Path) -> dict[str, list[str]]:
    """Runs the script; SHA-256 of what it wrote, by folder."""
    command = [sys.executable, "docs/rescue.py", str(output), *map(str, nodes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        folder.name: sorted(hashlib.sha256(message.read_bytes()).hexdigest() for message in (folder / "new").iterdir())
        for folder in sorted(output.iterdir())
    }


def message(number: int, octets: bytes) -> Operation:
    """A message of account 7, in two chunks, one of them compressed."""
    packed = zstandard.ZstdCompressor().compress(octets[:1000])
    chunks = [Chunk(0, COMPRESSED, packed, 1000), Chunk(1, 0, octets[1000:], len(octets) - 1000)]
    record = (
        b'{"octets":%d,"sha256":"%s","sizes":[1000,%d],"received_at":1.5,"reverse_path":"","targets":[{"account":"7"}]}'
        % (
            len(octets),
            hashlib.sha256(octets).hexdigest().encode(),
            len(octets) - 1000,
        )
    )
    return Operation(rec.COMMIT, key(number), chunks, record, 2)


def octets_of(number: int, variant: bytes = b"") -> bytes:
    """A message."""
    return b"Subject: rescue %d\r\n\r\n" % number + variant + b"text " * 300


def test_it_turns_segments_into_maildir(tmp_path: Path) -> None:
    """Moved by compaction, dropped on one node, deleted on one node, two copies of one key: what counts is written once."""
    stores: list[SegmentStore] = []
    for name in ("a", "b"):
        make_store(SystemDisk(), str(tmp_path / name), CLUSTER, name, SystemEntropy())
        stores.append(
            SegmentStore.open(SystemDisk(), str(tmp_path / name), CLUSTER, name, in_file, OPTIONS, Ticks(), name.encode() * 8)
        )
    places: dict[tuple[int, int], Position] = {}
    for at, store in enumerate(stores):
        for number in range(1, 41):
            (place,) = store.write([message(number, octets_of(number))])
            assert isinstance(place, Position)
            places[at, number] = place
    first, second = stores
    gone = [number for number in range(1, 31) if number % 6]
    for store in stores:
        store.write([tombstone(number) for number in gone])
        compact_all(store)
    second.write([tombstone(40)])  # the other node was away
    for store in stores:
        store.write([drop(36, places[stores.index(store), 36])])
    first.write([drop(39, places[0, 39])])  # bad there, good on the other
    first.write([drop(12, places[0, 12])])  # a moved copy, and another takes its place
    first.write([message(12, octets_of(12))])
    for store in stores:
        store.close()
    wanted = [number for number in range(1, 40) if number not in gone and number != 36]
    assert rescue(tmp_path / "out", tmp_path / "a", tmp_path / "b") == {
        "7": sorted(hashlib.sha256(octets_of(number)).hexdigest() for number in wanted)
    }


def test_a_damaged_copy_is_replaced_by_another_nodes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_store(SystemDisk(), str(tmp_path / name), CLUSTER, name, SystemEntropy())
        store = SegmentStore.open(SystemDisk(), str(tmp_path / name), CLUSTER, name, in_file, OPTIONS, Ticks())
        store.write([message(number, octets_of(number)) for number in (1, 2)])
        store.close()
    (segment,) = (tmp_path / "a" / "segments").iterdir()
    octets = bytearray(segment.read_bytes())
    octets[octets.index(b"text ", 200)] ^= 1
    segment.write_bytes(octets)
    found = rescue(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert found == {"7": sorted(hashlib.sha256(octets_of(number)).hexdigest() for number in (1, 2))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_reads_what_the_first_release_wrote(variant: str, tmp_path: Path) -> None:
    old = facts(variant)
    data = unpack(tmp_path, variant)
    found = rescue(tmp_path / "out", *[data / "nodes" / name for name in "abc"])
    for address, mailbox in old.mailboxes.items():
        there = found[mailbox.account]
        assert sorted(set(there) | set(mailbox.sha256)) == sorted(set(there))
        assert set(old.adopted.get(address, [])) <= set(there)
    assert sorted(found["queue"]) == sorted(row.sha256 for row in old.queue)
