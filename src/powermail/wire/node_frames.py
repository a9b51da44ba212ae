"""Owns the frames of the node protocol: twenty-four octets of header, meta, body (docs/peer-protocol.md).

    offset  octets  field, little-endian
    0       4       payload octets: meta and body together, at most NODE_PAYLOAD_OCTETS_MAX
    4       1       verb
    5       1       flags: MORE, another piece of this body follows
    6       2       meta octets
    8       8       operation number
    16      8       the xxh3-64 of the meta plus the xxh3-64 of the body, modulo 2^64

The two sums are added, so that a body that goes to R nodes is summed up once. The sum finds what memory and programs do to
octets; what the network does, and forgery, is found by TLS, and P2 holds from end to end by SHA-256.

Danger: nothing is allocated by what a header claims. The receive buffer is as large as the largest frame, for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

from powermail.base import limits

HEADER: Final = Struct("<IBBHQQ")
HEADER_OCTETS: Final = HEADER.size
MORE: Final = 1  # flag: another piece of this body follows
MODULUS: Final = (1 << 64) - 1

Frame = tuple[int, int, int, bytes, bytes]  # verb, flags, operation number, meta, body

checksum_of: Callable[[bytes | memoryview], int] = xxh3_64_intdigest
EMPTY_SUM: Final = checksum_of(b"")


Piece = tuple[bytes | memoryview, int]  # a part of a body as it travels, and its sum: made once for all nodes it goes to
Pieces = tuple[Piece, ...]
NO_BODY: Final[Pieces] = ((b"", EMPTY_SUM),)


def pieces_of(body: bytes) -> Pieces:
    """A body in the pieces in which it travels; at least one."""
    size = limits.NODE_PIECE_OCTETS
    if len(body) <= size:
        return ((body, checksum_of(body)),)
    view = memoryview(body)
    parts = [view[start : start + size] for start in range(0, len(body), size)]
    return tuple([(part, checksum_of(part)) for part in parts])


def add_frames(out: list[bytes | memoryview], verb: int, number: int, meta: bytes, pieces: Pieces) -> int:
    """Adds one operation, or one answer, to what goes out; the payload octets it has in all.

    Only the first frame has the meta. Raises ValueError when the meta is too long.
    """
    meta_octets = len(meta)
    if meta_octets > limits.NODE_META_OCTETS_MAX:
        raise ValueError(f"a meta of {meta_octets} octets")
    body, total = pieces[0]
    octets = meta_octets + len(body)
    flags = MORE if len(pieces) > 1 else 0
    out += (HEADER.pack(octets, verb, flags, meta_octets, number, (checksum_of(meta) + total) & MODULUS), meta, body)
    if flags:
        last = len(pieces) - 1
        for place in range(1, last + 1):
            body, total = pieces[place]
            body_octets = len(body)
            flags = MORE if place < last else 0
            out += (HEADER.pack(body_octets, verb, flags, 0, number, (EMPTY_SUM + total) & MODULUS), body)
            octets += body_octets
    return octets


class FrameReader:
    """Takes octets into its one buffer and gives frames, the same for every chunking.

    `fault` is why nothing is read any more: (name for counting, text for the peer); "" while all is well.
    """

    def __init__(self) -> None:
        self.fault = ("", "")
        self.frames = 0  # that were complete, for deadlines by progress
        self._view = memoryview(bytearray(HEADER_OCTETS + limits.NODE_PAYLOAD_OCTETS_MAX))
        self._filled = 0

    def room(self) -> memoryview:
        """Where the next octets are put; `received` then says how many they are."""
        return self._view[self._filled :]

    @property
    def begun(self) -> bool:
        """True while a frame has begun and is not complete."""
        return self._filled > 0

    def feed(self, octets: bytes | memoryview) -> list[Frame]:
        """The frames that end in these octets."""
        frames: list[Frame] = []
        while len(octets):
            part = octets[: len(self._view) - self._filled]
            self._view[self._filled : self._filled + len(part)] = part
            frames += self.received(len(part))
            octets = octets[len(part) :]
        return frames

    def received(self, count: int) -> list[Frame]:
        """So many octets were put into `room`: the frames that they complete, up to a fault."""
        frames: list[Frame] = []
        if self.fault[0]:
            return frames
        view, start, end = self._view, 0, self._filled + count
        unpack, digest = HEADER.unpack_from, checksum_of
        while end - start >= HEADER_OCTETS:
            payload_octets, verb, flags, meta_octets, number, total = unpack(view, start)
            if payload_octets > limits.NODE_PAYLOAD_OCTETS_MAX or meta_octets > payload_octets:
                self.fault = ("oversized", f"a frame claims {payload_octets} octets, {meta_octets} of them meta")
                break
            begin = start + HEADER_OCTETS
            following = begin + payload_octets
            if following > end:
                break
            middle = begin + meta_octets
            meta, body = view[begin:middle].tobytes(), view[middle:following].tobytes()
            if (digest(meta) + digest(body)) & MODULUS != total:
                self.fault = ("checksum", "a frame does not have its checksum")
                break
            frames.append((verb, flags, number, meta, body))
            start = following
        if start:
            left = end - start
            if left:
                view[:left] = view[start:end]
            end = left
        self._filled = 0 if self.fault[0] else end
        self.frames += len(frames)
        return frames
