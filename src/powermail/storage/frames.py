"""Owns taking apart what is stored compressed: a chunk that is one zstd frame, which says how much it holds.

Many are taken apart in one call: each call gives up the interpreter lock, and getting it back may cost more than the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import COMPRESSED, Chunk


class Inflater:
    """Gives back what was compressed. Belongs to one thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def octets(self, chunk: Chunk) -> bytes:
        """A chunk's octets. Raises CopyDamaged."""
        octets = self._one(chunk.stored) if chunk.flags & COMPRESSED else chunk.stored
        if octets is None:
            raise CopyDamaged(f"chunk {chunk.number} does not decompress")
        return octets

    def many(self, frames: Sequence[bytes]) -> list[bytes | None]:
        """What frames hold; None for one that is damaged."""
        if not frames:  # the library cannot be asked for nothing
            return []
        try:
            if max(map(zstandard.frame_content_size, frames)) <= limits.CHUNK_OCTETS:
                together: list[bytes | bytearray | memoryview] = list(frames)
                parts = self._zstd.multi_decompress_to_buffer(together)
                return [parts[number].tobytes() for number in range(len(parts))]
        except (zstandard.ZstdError, ValueError):  # one of them is damaged, or does not say how much it holds
            pass
        return [self._one(frame) for frame in frames]

    def _one(self, frame: bytes) -> bytes | None:
        try:
            return self._zstd.decompress(frame, max_output_size=limits.RECORD_BODY_OCTETS_MAX)
        except zstandard.ZstdError:
            return None
