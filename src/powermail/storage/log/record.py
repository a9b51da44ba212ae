"""Owns the octets of the log: segment headers and records, packed and checked. See docs/disk.md.

A record is a 48-octet header, a body, and zeros up to a multiple of 8. Its checksum covers the store's secret salt, the
segment number, the offset, the header and the body: a mail body can never pass for a record, and a block that the disk
put in the wrong place is noticed.

Format 2 differs from format 1 by its types (drop, mark, boot, birth), by the date in a tombstone, and by the place where
a moved commit or part of a checkpoint was first written, in front of its body. The version stands in the segment's header.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from powermail.base.digest import hash_octets
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import NO_RANK, Chunk, Mark, Origin, Position, Rank
from powermail.storage.frames import BadFrame, frame_octets

MAGIC: Final = b"PMr1"
SEGMENT_MAGIC: Final = b"PMSEGv1\n"
SEGMENT_FORMAT: Final = 2
HEADER_OCTETS: Final = 48
CHECKSUM_OCTETS: Final = 16
SEGMENT_HEADER_OCTETS: Final = 128
ALIGN: Final = 8

CHUNK: Final = 1
COMMIT: Final = 2
ABORT: Final = 3  # format 1 only: a tombstone
TOMBSTONE: Final = 4
CHECKPOINT: Final = 5
DROP: Final = 6
MARK: Final = 7
BOOT: Final = 8
BIRTH: Final = 9
TYPES: Final = frozenset({CHUNK, COMMIT, ABORT, TOMBSTONE, CHECKPOINT, DROP, MARK, BOOT, BIRTH})

FLAG_COMPRESSED: Final = 1  # of a chunk: the body is one zstd frame
FLAG_MOVED: Final = 2  # written by compaction
FLAG_REPAIR: Final = 4  # of a commit: written by repair, not by a delivery

NO_KEY: Final = bytes(16)  # of marks, boots and births

_SMALL_OCTETS: Final = 16_384
_HEAD: Final = struct.Struct("<4sBBHII16s")  # magic, type, flags, zero, body octets, number, key
_PLACE: Final = struct.Struct("<QQ")
_RANK: Final = struct.Struct("<QQQ")
_DATE: Final = struct.Struct("<d")
_SEGMENT: Final = struct.Struct("<8sIIQ16s16s32s")
_BOOT: Final = struct.Struct("<8sQQ")
_BLANK: Final = bytes(65_536)
_PADDING: Final = tuple(bytes(count) for count in range(ALIGN))


class BadRecord(Exception):
    """No valid record stands there."""


class Record(NamedTuple):
    """One record. `number` is the chunk's or checkpoint's number, a commit's count of chunks, 0 elsewhere."""

    type: int
    flags: int
    number: int
    key: bytes
    body: bytes


class Boot(NamedTuple):
    """An opening of the log, in hex, and where the log ended when it began (law 12)."""

    id: str
    began: Position


def record_octets(body_octets: int) -> int:
    """Room a record takes, padding included."""
    return (HEADER_OCTETS + body_octets + ALIGN - 1) & -ALIGN


# -- bodies ---------------------------------------------------------------------------------------------------------


def pack_position(position: Position) -> bytes:
    """A place in 16 octets: the body of a drop, the front of a moved commit."""
    return _PLACE.pack(*position)


def unpack_position(octets: bytes) -> Position:
    """A place from the first 16 octets. Raises BadRecord."""
    if len(octets) < _PLACE.size:
        raise BadRecord("a place is cut")
    return Position(*_PLACE.unpack_from(octets))


def pack_rank(rank: Rank) -> bytes:
    """How new a part of a checkpoint is, in 24 octets: the front of its body."""
    return _RANK.pack(*rank)


def rank_of(record: Record, version: int) -> Rank:
    """How new a part of a checkpoint is; in format 1 nothing says so. Raises BadRecord."""
    if version == 1:
        return NO_RANK
    start = _PLACE.size if record.flags & FLAG_MOVED else 0
    if len(record.body) < start + _RANK.size:
        raise BadRecord("a rank is cut")
    return Rank(*_RANK.unpack_from(record.body, start))


def pack_date(at: float) -> bytes:
    """The body of a tombstone: the keeper's stated date, UTC seconds."""
    return _DATE.pack(at)


def unpack_date(octets: bytes) -> float:
    """The date in a tombstone's body; 0 for those of format 1, which say none."""
    return float(_DATE.unpack(octets)[0]) if len(octets) == _DATE.size else 0.0


def pack_mark(mark: Mark) -> bytes:
    """The body of a mark."""
    return msgspec.msgpack.encode(mark)


def unpack_mark(octets: bytes) -> Mark:
    """A mark from a body. Raises BadRecord."""
    try:
        return msgspec.msgpack.decode(octets, type=Mark)
    except ValueError as error:
        raise BadRecord(f"mark: {error}") from error


def pack_boots(boots: Sequence[Boot]) -> bytes:
    """The body of a boot: the chain of openings, oldest first."""
    return b"".join(_BOOT.pack(bytes.fromhex(boot), *began) for boot, began in boots)


def unpack_boots(octets: bytes) -> tuple[Boot, ...]:
    """A chain of openings from a body. Raises BadRecord."""
    if len(octets) % _BOOT.size:
        raise BadRecord("a chain of openings is cut")
    return tuple(Boot(boot.hex(), Position(*began)) for boot, *began in _BOOT.iter_unpack(octets))


def origin_of(flags: int) -> Origin:
    """Who wrote a commit record."""
    if flags & FLAG_MOVED:
        return Origin.MOVED
    return Origin.REPAIR if flags & FLAG_REPAIR else Origin.DELIVERY


def first_of(record: Record, lies: Position, version: int) -> Position:
    """Where a commit or a part of a checkpoint was first written. Raises BadRecord.

    A record that was moved in format 1 does not say: then it is where it lies.
    """
    return unpack_position(record.body) if record.flags & FLAG_MOVED and version > 1 else lies


def body_of(record: Record, version: int) -> bytes:
    """What was asked to be written into a commit or a part of a checkpoint."""
    if version == 1:
        return record.body
    start = (_PLACE.size if record.flags & FLAG_MOVED else 0) + (_RANK.size if record.type == CHECKPOINT else 0)
    return record.body[start:] if start else record.body


def moved(record: Record, lies: Position, version: int) -> Record:
    """The record as compaction writes it anew in format 2. Raises BadRecord."""
    body = record.body
    if record.type in (COMMIT, CHECKPOINT):
        rank = pack_rank(rank_of(record, version)) if record.type == CHECKPOINT else b""
        body = pack_position(first_of(record, lies, version)) + rank + body_of(record, version)
    return record._replace(type=TOMBSTONE if record.type == ABORT else record.type, flags=record.flags | FLAG_MOVED, body=body)


def chunk_of(record: Record) -> Chunk:
    """The chunk in a chunk record. Raises CopyDamaged if it is compressed and no frame as chunks are (`storage.frames`)."""
    flags = record.flags & FLAG_COMPRESSED
    try:
        octets = frame_octets(record.body) if flags else len(record.body)
    except BadFrame as error:
        raise CopyDamaged(f"chunk {record.number} of {record.key.hex()}: {error}") from error
    return Chunk(record.number, flags, record.body, octets)


# -- records --------------------------------------------------------------------------------------------------------


class Codec:
    """Packs and checks records of one store."""

    def __init__(self, salt: bytes) -> None:
        self._salted = hashlib.sha256(salt)

    def _checksum(self, segment: int, offset: int, head: bytes, body: bytes | memoryview) -> bytes:
        digest = self._salted.copy()
        digest.update(_PLACE.pack(segment, offset) + head)
        hash_octets(digest, body)
        return digest.digest()[:CHECKSUM_OCTETS]

    def pack(self, record: Record, segment: int, offset: int) -> list[bytes]:
        """The buffers to write at that place."""
        kind, flags, number, key, body = record
        head = _HEAD.pack(MAGIC, kind, flags, 0, len(body), number, key)
        padding = _PADDING[-(HEADER_OCTETS + len(body)) % ALIGN]
        if len(body) <= _SMALL_OCTETS:  # one buffer: copying it costs less than another entry of the gathered write
            return [b"".join((head, self._checksum(segment, offset, head, body), body, padding))]
        return [head + self._checksum(segment, offset, head, body), body, padding]

    def pack_small(self, segment: int, offset: int, key: bytes, chunk: Chunk, body: bytes, flags: int) -> tuple[bytes, int]:
        """A message of one small chunk and its commit as one buffer; and the room that the chunk takes."""
        stored = chunk[2]
        octets = len(stored)
        room = (HEADER_OCTETS + octets + 7) & -8
        head = _HEAD.pack(MAGIC, CHUNK, chunk[1], 0, octets, 0, key)
        digest = self._salted.copy()
        digest.update(_PLACE.pack(segment, offset) + head)
        hash_octets(digest, stored)
        end = _HEAD.pack(MAGIC, COMMIT, flags, 0, len(body), 1, key)
        closing = self._salted.copy()
        if len(body) < 1024:
            closing.update(b"".join((_PLACE.pack(segment, offset + room), end, body)))
        else:
            closing.update(_PLACE.pack(segment, offset + room) + end)
            hash_octets(closing, body)
        parts = (
            head,
            digest.digest()[:CHECKSUM_OCTETS],
            stored,
            _PADDING[-octets & 7],
            end,
            closing.digest()[:CHECKSUM_OCTETS],
            body,
            _PADDING[-len(body) & 7],
        )
        return b"".join(parts), room

    def unpack(self, octets: bytes, start: int, segment: int, offset: int) -> Record:
        """Reads the record that begins at `octets[start]`, which is `offset` in `segment`. Raises BadRecord."""
        first = start + HEADER_OCTETS
        if len(octets) < first:
            raise BadRecord("too short")
        magic, kind, flags, zero, length, number, key = _HEAD.unpack_from(octets, start)
        if magic != MAGIC or zero or kind not in TYPES:
            raise BadRecord("not a record")
        if len(octets) - first < length:
            raise BadRecord("body is cut")
        checksum = start + _HEAD.size
        body = octets[first : first + length]
        if self._checksum(segment, offset, octets[start:checksum], body) != octets[checksum:first]:
            raise BadRecord("checksum")
        return Record(kind, flags, number, key, body)

    def walk(self, octets: bytes, segment: int, base: int) -> Iterator[tuple[int, Record | None, int]]:
        """Walks octets that stand at `base` of a segment.

        Yields (offset, record, room), or (offset, None, room) for a bad stretch. Behind one it looks for the next valid
        record at every multiple of 8, so damage never hides what lies behind it. Zeros up to the end yield nothing.
        """
        position = 0
        end = len(octets)
        while position < end:
            try:
                record = self.unpack(octets, position, segment, base + position)
            except BadRecord:
                if _blank(octets, position):
                    return
                following = self._next_valid(octets, segment, base, position + ALIGN)
                if following is None:
                    yield base + position, None, end - position
                    return
                yield base + position, None, following - position
                position = following
                continue
            room = record_octets(len(record.body))
            yield base + position, record, room
            position += room

    def _next_valid(self, octets: bytes, segment: int, base: int, position: int) -> int | None:
        while True:
            found = octets.find(MAGIC, position)
            if found < 0:
                return None
            if found % ALIGN == 0:
                try:
                    self.unpack(octets, found, segment, base + found)
                except BadRecord:
                    pass
                else:
                    return found
            position = found + 1


def _blank(octets: bytes, start: int) -> bool:
    """True if only zeros follow. By blocks: nearly all of a new segment is that, and each start looks at all of it.

    The file system is not asked for holes: one that wrongly calls written octets a hole would take back what was shown (law 1).
    """
    block = len(_BLANK)
    return all(_BLANK.startswith(octets[at : at + block]) for at in range(start, len(octets), block))


# -- segments -------------------------------------------------------------------------------------------------------


def pack_segment_header(number: int, cluster: bytes, store: bytes, salt: bytes, version: int = SEGMENT_FORMAT) -> bytes:
    """The first 128 octets of a segment; the salt stands in it so that a lone segment can be rescued."""
    head = _SEGMENT.pack(SEGMENT_MAGIC, version, 0, number, cluster, store, salt)
    return (head + hashlib.sha256(head).digest()[:16]).ljust(SEGMENT_HEADER_OCTETS, b"\0")


def unpack_segment_header(octets: bytes) -> tuple[int, bytes, bytes, bytes, int]:
    """(number, cluster, store, salt, version). Raises BadRecord."""
    if len(octets) < SEGMENT_HEADER_OCTETS:
        raise BadRecord("segment header is cut")
    head = octets[: _SEGMENT.size]
    if hashlib.sha256(head).digest()[:16] != octets[_SEGMENT.size : _SEGMENT.size + 16]:
        raise BadRecord("segment header checksum")
    magic, version, _, number, cluster, store, salt = _SEGMENT.unpack(head)
    if magic != SEGMENT_MAGIC or not 1 <= version <= SEGMENT_FORMAT:
        raise BadRecord(f"segment format {version} is newer than this program")
    return number, cluster, store, salt, version
