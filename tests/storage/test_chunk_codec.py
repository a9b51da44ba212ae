"""What a compressed chunk may be (RFC 8878): whatever else is given is refused where it would be written and damaged where
it is read, on every node, and no claim of a frame takes memory or brings the process down.
"""

from __future__ import annotations

import random

import pytest
import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged, NodeTrouble
from powermail.storage.contract import COMPRESSED, Chunk, StorageNode
from powermail.storage.frames import BadFrame, Inflater, flaw_of, frame_octets
from powermail.storage.log import record as rec
from powermail.storage.log.write import Operation
from tests.storage.asks import held
from tests.storage.bad_disk import BadDisk
from tests.storage.support import fresh_disk, key, open_store, put

TEXT = b"what is said again is said in fewer octets; " * 40
FRAME = zstandard.ZstdCompressor(level=1).compress(TEXT)
_DICTIONARY = zstandard.train_dictionary(1024, [b"sample %d of what is said " % n + bytes([n % 7]) * 60 for n in range(400)])
_SKIPPED = b"\x50\x2a\x4d\x18\x05\x00\x00\x00aside"


def claiming(octets: int) -> bytes:
    """A frame of one block of three octets that claims to hold so many."""
    return b"\x28\xb5\x2f\xfd\xe0" + octets.to_bytes(8, "little") + (3 << 3 | 1).to_bytes(3, "little") + b"abc"


def windowed(exponent: int) -> bytes:
    """A good frame of three octets whose window is 1 KiB times two to that power."""
    return (
        b"\x28\xb5\x2f\xfd\x80"
        + bytes([exponent << 3])
        + (3).to_bytes(4, "little")
        + (3 << 3 | 1).to_bytes(3, "little")
        + b"abc"
    )


BAD: dict[str, tuple[bytes, int]] = {
    "no frame": (b"no frame at all", 15),
    "nothing": (b"", 0),
    "a magic number alone": (FRAME[:4], len(TEXT)),
    "no content size": (zstandard.ZstdCompressor(write_content_size=False).compress(TEXT), len(TEXT)),
    "another size than is stated": (FRAME, len(TEXT) + 1),
    "truncated": (FRAME[:-1], len(TEXT)),
    "truncated in its checksum": (zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)[:-2], len(TEXT)),
    "trailing garbage": (FRAME + b"x", len(TEXT)),
    "two frames": (FRAME + FRAME, len(TEXT)),
    "two frames, both stated": (FRAME + FRAME, 2 * len(TEXT)),
    "a skippable frame": (_SKIPPED, 5),
    "a skippable frame behind": (FRAME + _SKIPPED, len(TEXT)),
    "a skippable frame before": (_SKIPPED + FRAME, len(TEXT)),
    "a dictionary": (zstandard.ZstdCompressor(dict_data=_DICTIONARY).compress(TEXT), len(TEXT)),
    "a claim of 2^63": (claiming(1 << 63), 1 << 63),
    "a claim of a terabyte": (claiming(1 << 40), 1 << 40),
    "a claim just above the limit": (claiming(limits.RECORD_BODY_OCTETS_MAX + 1), limits.RECORD_BODY_OCTETS_MAX + 1),
    "a window of 32 MiB": (windowed(15), 3),
    "a window of 2 TiB": (windowed(31), 3),
    "a reserved bit": (FRAME[:4] + bytes([FRAME[4] | 8]) + FRAME[5:], len(TEXT)),
    "a block of no kind": (claiming(3)[:13] + (3 << 3 | 7).to_bytes(3, "little") + b"abc", 3),
    "blocks without end": (b"\x28\xb5\x2f\xfd\x20\x00" + bytes(3 * 100_000) + b"\x01\x00\x00", 0),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_frame_of_ours_has_a_flaw_and_does_not_inflate(what: str) -> None:
    stored, octets = BAD[what]
    chunk = Chunk(0, COMPRESSED, stored, octets)
    assert flaw_of(chunk)
    with pytest.raises(CopyDamaged):
        Inflater().octets(chunk)


@pytest.mark.parametrize("what", BAD)
async def test_it_is_refused_in_commit_and_append_and_nothing_of_it_stays(node: StorageNode, what: str) -> None:
    stored, octets = BAD[what]
    if octets >= 1 << 63:
        return  # no number of the wire; what is local says the same of it as of the next
    bad = Chunk(0, COMPRESSED, stored, octets)
    with pytest.raises(NodeTrouble):
        await node.append(key(1), [bad])
    with pytest.raises(NodeTrouble):
        await node.commit(key(1), [bad], b"{}", 1, node.stamp(), 0)  # type: ignore[arg-type]
    assert await held(node, 1) == ["absent"]
    good = Chunk(0, COMPRESSED, FRAME, len(TEXT))
    await node.commit(key(1), [good], b"{}", 1, node.stamp(), 0)  # type: ignore[arg-type]
    assert await node.read_chunk(key(1), 0) == good, "the connection goes on, and so does the key"


@pytest.mark.parametrize(
    "chunk", [Chunk(0, 0, b"plain", 6), Chunk(0, 0, b"plain", 4), Chunk(0, 2, b"plain", 5), Chunk(0, 3, FRAME, len(TEXT))]
)
async def test_lengths_that_lie_and_flags_of_later_versions_are_refused(node: StorageNode, chunk: Chunk) -> None:
    """R04, R14."""
    for call in (node.append(key(1), [chunk]), node.commit(key(1), [chunk], b"{}", 1, node.stamp(), 0)):  # type: ignore[arg-type]
        with pytest.raises(NodeTrouble):
            await call
    assert await held(node, 1) == ["absent"]


@pytest.mark.parametrize("what", [name for name in BAD if name != "another size than is stated"])
def test_what_lies_in_a_log_all_the_same_is_a_damaged_copy(what: str) -> None:
    """Written by an earlier program: its record is whole, its content is none."""
    stored, octets = BAD[what]
    store = open_store(BadDisk(fresh_disk()))
    for number, frame in ((1, stored), (2, FRAME), (3, stored)):
        put(store, Operation(rec.COMMIT, key(number), [Chunk(0, COMPRESSED, frame, octets)], b"{}", 1))
    with pytest.raises(CopyDamaged):
        store.reader.read_chunk(key(1), 0)
    found = store.reader.read_small([key(number) for number in (1, 2, 3)])
    assert [whole and whole.parts for whole in found] == [None, [TEXT], None]


def test_small_messages_hold_no_more_than_the_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of some octets may hold 16 MiB, and a small message many frames: none is taken apart beyond the bound."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2 * limits.MIB))
    assert len(bomb) < 1000
    store = open_store(BadDisk(fresh_disk()))
    for number in range(1, 5):
        put(store, Operation(rec.COMMIT, key(number), [Chunk(0, COMPRESSED, bomb, 2 * limits.MIB)], b"{}", 1))
    asked: list[int] = []
    many = Inflater.many

    def counted(inflater: Inflater, frames: list[bytes]) -> list[bytes | None]:
        asked.append(len(frames))
        return many(inflater, frames)

    monkeypatch.setattr(Inflater, "many", counted)
    found = store.reader.read_small([key(number) for number in range(1, 5)])
    assert [whole is not None for whole in found] == [True, False, False, False] and sum(asked) == 1


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("checksum", [False, True])
def test_whatever_the_library_makes_of_octets_in_one_call_is_a_chunk(level: int, checksum: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum)
    inflater, chance = Inflater(), random.Random(7)
    for octets in (0, 1, 255, 256, 257, 5000, 131_072, 131_073, limits.CHUNK_OCTETS):
        for content in (bytes(octets), chance.randbytes(octets), (TEXT * (octets // len(TEXT) + 1))[:octets]):
            frame = compressor.compress(content)
            assert frame_octets(frame) == octets and inflater.octets(Chunk(0, COMPRESSED, frame, octets)) == content


def test_no_octet_of_a_frame_can_be_changed_so_that_it_holds_more_than_it_says() -> None:
    """Many at once and one by one say the same of each, and the process lives."""
    chance, inflater = random.Random(11), Inflater()
    for _ in range(3000):
        octets = bytearray(FRAME)
        for _ in range(chance.randrange(1, 3)):
            octets[chance.randrange(len(octets))] = chance.randrange(256)
        frame = bytes(octets)
        try:
            said = frame_octets(frame)
        except BadFrame:
            continue
        together = inflater.many([FRAME, frame, FRAME]) if said else [TEXT, b"", TEXT]
        try:
            alone = inflater.octets(Chunk(0, COMPRESSED, frame, said))
        except CopyDamaged:
            alone = None
        assert together == [TEXT, alone, TEXT] and (alone is None or len(alone) == said)
