"""Owns the codec of chunks: what a chunk that is one zstd frame may be, and taking it apart again (RFC 8878 §3.1.1).

A compressed chunk is exactly one whole frame that says how much it holds, at most what a record does, with no dictionary and
no larger window, and nothing behind it. What is anything else is refused where it would be written, and a damaged copy where
it is read: one walk over the frame's header and blocks decides both, without decompressing.

Many are taken apart in one call: each call gives up the interpreter lock, and getting it back may cost more than the work.

Danger: nothing is allocated by what a frame claims before that was compared with the limit. The library frees memory twice
when it takes several apart and one of them holds nothing, or is a skippable frame: it is never given such.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import COMPRESSED, Chunk

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SINGLE_SEGMENT: Final = 0x20  # of the descriptor: no window is named, it is as large as what the frame holds
_CHECKSUM: Final = 0x04
_NEVER: Final = 0x0B  # the reserved bit and the dictionary's
_SIZES: Final = (1, 2, 4, 8)  # octets of the field that says how much it holds, by the first two bits of the descriptor
_USUAL: Final = _MAGIC + b"\x60"  # of a small message: one segment, its octets in two, no checksum
_USUAL_HEAD: Final = Struct("<HI")  # octets beyond 256, the head of the first block and one octet of it
_OCTETS_MAX: Final = limits.RECORD_BODY_OCTETS_MAX
_BLOCKS_MAX: Final = 4096  # a frame of the largest record has 130; more, of no octets each, would only cost time


class BadFrame(Exception):
    """No chunk of ours: the text says why."""


def frame_octets(frame: bytes) -> int:
    """How much a frame holds. Raises BadFrame if it is not one whole frame as a chunk may be; its content may still be bad."""
    end = len(frame)
    if frame[:5] == _USUAL and end > 10:
        octets, block = _USUAL_HEAD.unpack_from(frame, 5)
        if block & 7 in (1, 5) and 10 + (block >> 3 & 0x1FFFFF) == end:  # one block, the last, and it ends with the frame
            return int(octets) + 256
    if end < 9 or frame[:4] != _MAGIC:
        raise BadFrame("it is no zstd frame")
    descriptor = frame[4]
    if descriptor & _NEVER:
        raise BadFrame("the frame wants a dictionary, or is of a later format")
    single = descriptor & _SINGLE_SEGMENT
    if descriptor < 64 and not single:
        raise BadFrame("the frame does not say how much it holds")
    width = _SIZES[descriptor >> 6]
    at = 5 if single else 6
    octets = int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0)
    if octets > _OCTETS_MAX:
        raise BadFrame(f"the frame claims {octets} octets")
    if not single and (8 + (frame[5] & 7)) << (7 + (frame[5] >> 3)) > _OCTETS_MAX:
        raise BadFrame("the window of the frame is too large")
    at += width
    for _ in range(_BLOCKS_MAX):
        block = int.from_bytes(frame[at : at + 3], "little")
        kind = block >> 1 & 3
        at += 4 if kind == 1 else 3 + (block >> 3)  # 1: one octet, repeated
        if at > end or kind == 3:
            raise BadFrame("the frame is cut short, or a block of it is of no kind that is known")
        if block & 1:
            break
    else:
        raise BadFrame("the frame has too many blocks")
    if descriptor & _CHECKSUM:
        at += 4
    if at != end:
        raise BadFrame("the frame is cut short" if at > end else "something follows the frame")
    return octets


# The frame that was looked at last, and what it holds: a message goes to several nodes of this process, one behind the other.
_LAST: Final[list[tuple[bytes | None, int]]] = [(None, 0)]


def flaw_of(chunk: Chunk) -> str:
    """Why a chunk is not to be written; "" if it may be."""
    number, flags, stored, octets = chunk
    if not flags:
        return "" if octets == len(stored) else f"chunk {number} is said to have {octets} octets, and has {len(stored)}"
    if flags != COMPRESSED:
        return f"chunk {number} has flags {flags}, which are not known"
    frame, held = _LAST[0]
    if frame is not stored:
        try:
            held = frame_octets(stored)
        except BadFrame as error:
            return f"chunk {number}: {error}"
        _LAST[0] = stored, held
    return "" if held == octets else f"chunk {number} is said to have {octets} octets, and its frame to hold {held}"


class Inflater:
    """Gives back what was compressed. Belongs to one thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def octets(self, chunk: Chunk) -> bytes:
        """A chunk's octets, as many as it says. Raises CopyDamaged."""
        flaw = flaw_of(chunk)
        octets = None if flaw else self._one(chunk.stored) if chunk.flags else chunk.stored
        if octets is None:
            raise CopyDamaged(flaw or f"chunk {chunk.number} does not decompress")
        return octets

    def many(self, frames: Sequence[bytes]) -> list[bytes | None]:
        """What frames hold, of which `frame_octets` said how much that is, and not nothing; None for one that is damaged."""
        if not frames:  # the library cannot be asked for nothing
            return []
        if len(frames) > 1:
            try:
                together: list[bytes | bytearray | memoryview] = list(frames)
                parts = self._zstd.multi_decompress_to_buffer(together)
                return [parts[number].tobytes() for number in range(len(parts))]
            except (zstandard.ZstdError, ValueError):  # one of them is damaged
                pass
        return [self._one(frame) for frame in frames]

    def _one(self, frame: bytes) -> bytes | None:
        try:
            return self._zstd.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError:
            return None
