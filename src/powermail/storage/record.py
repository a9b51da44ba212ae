"""Owns the octets of the log: segment headers and records, packed and checked. See docs/disk.md.

A record is a 48-octet header, a body, and zeros up to a multiple of 8. Its checksum covers the store's secret salt, the
segment number, the offset, the header and the body: a mail body can never pass for a record, and a block that the disk
put in the wrong place is noticed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from powermail.base.digest import hash_octets

MAGIC: Final = b"PMr1"
SEGMENT_MAGIC: Final = b"PMSEGv1\n"
HEADER_OCTETS: Final = 48
CHECKSUM_OCTETS: Final = 16
SEGMENT_HEADER_OCTETS: Final = 128
ALIGN: Final = 8

CHUNK: Final = 1
COMMIT: Final = 2
ABORT: Final = 3
TOMBSTONE: Final = 4
CHECKPOINT: Final = 5
TYPES: Final = frozenset({CHUNK, COMMIT, ABORT, TOMBSTONE, CHECKPOINT})

FLAG_COMPRESSED: Final = 1
FLAG_MOVED: Final = 2  # written by compaction, not by a delivery

_SMALL_OCTETS: Final = 16_384
_HEAD: Final = struct.Struct("<4sBBHII16s")  # magic, type, flags, zero, body octets, number, key
_PLACE: Final = struct.Struct("<QQ")
_SEGMENT: Final = struct.Struct("<8sIIQ16s16s32s")


class BadRecord(Exception):
    """No valid record stands there."""


class Record(NamedTuple):
    """One record. `number` is the chunk's or checkpoint's number, 0 elsewhere."""

    type: int
    flags: int
    number: int
    key: bytes
    body: bytes


def record_octets(body_octets: int) -> int:
    """Room a record takes, padding included."""
    return (HEADER_OCTETS + body_octets + ALIGN - 1) & -ALIGN


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
        padding = bytes(-(HEADER_OCTETS + len(body)) % ALIGN)
        if len(body) <= _SMALL_OCTETS:  # one buffer: copying it costs less than another entry of the gathered write
            return [b"".join((head, self._checksum(segment, offset, head, body), body, padding))]
        return [head + self._checksum(segment, offset, head, body), body, padding]

    def unpack(self, octets: bytes | memoryview, start: int, segment: int, offset: int) -> Record:
        """Reads the record that begins at `octets[start]`, which is `offset` in `segment`. Raises BadRecord."""
        view = memoryview(octets)
        if len(view) - start < HEADER_OCTETS:
            raise BadRecord("too short")
        head = bytes(view[start : start + _HEAD.size])
        magic, kind, flags, zero, length, number, key = _HEAD.unpack(head)
        if magic != MAGIC or zero or kind not in TYPES:
            raise BadRecord("not a record")
        first = start + HEADER_OCTETS
        if len(view) - first < length:
            raise BadRecord("body is cut")
        body = view[first : first + length]
        if self._checksum(segment, offset, head, body) != view[start + _HEAD.size : first]:
            raise BadRecord("checksum")
        return Record(kind, flags, number, key, bytes(body))

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
                following = self._next_valid(octets, segment, base, position + ALIGN)
                if following is None:
                    if octets[position:].strip(b"\0"):
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


def pack_segment_header(number: int, cluster: bytes, store: bytes, salt: bytes) -> bytes:
    """The first 128 octets of a segment; the salt stands in it so that a lone segment can be rescued."""
    head = _SEGMENT.pack(SEGMENT_MAGIC, 1, 0, number, cluster, store, salt)
    return (head + hashlib.sha256(head).digest()[:16]).ljust(SEGMENT_HEADER_OCTETS, b"\0")


def unpack_segment_header(octets: bytes) -> tuple[int, bytes, bytes, bytes]:
    """(number, cluster, store, salt). Raises BadRecord."""
    if len(octets) < SEGMENT_HEADER_OCTETS:
        raise BadRecord("segment header is cut")
    head = octets[: _SEGMENT.size]
    if hashlib.sha256(head).digest()[:16] != octets[_SEGMENT.size : _SEGMENT.size + 16]:
        raise BadRecord("segment header checksum")
    magic, version, _, number, cluster, store, salt = _SEGMENT.unpack(head)
    if magic != SEGMENT_MAGIC or version != 1:
        raise BadRecord(f"segment format {version} is newer than this program")
    return number, cluster, store, salt
