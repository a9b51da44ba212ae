"""Owns how a message's octets become chunks, and come back from them."""

from __future__ import annotations

from typing import NamedTuple

import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.mail.envelope import CommitForm
from powermail.storage.contract import COMPRESSED, Chunk, Whole

_COMPRESS_MIN_OCTETS = 256


class Packer:
    """Makes chunks, compressed where it helps."""

    def __init__(self, compress: bool) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1, write_content_size=True) if compress else None

    def chunk(self, number: int, octets: bytes) -> Chunk:
        """One chunk as stored."""
        if self._compressor is not None and len(octets) >= _COMPRESS_MIN_OCTETS:
            packed = self._compressor.compress(octets)
            if len(packed) < len(octets) - len(octets) // 8:
                return Chunk(number, COMPRESSED, packed, len(octets))
        return Chunk(number, 0, octets, len(octets))


class Small(NamedTuple):
    """A whole small message; `plain` as its commit record says."""

    octets: bytes
    plain: bool


class Unpacker:
    """Gives back what a `Packer` packed."""

    def __init__(self) -> None:
        self._decompress = zstandard.ZstdDecompressor().decompress

    def octets(self, chunk: Chunk) -> bytes:
        """A chunk's octets. Raises CopyDamaged."""
        if not chunk.flags & COMPRESSED:
            return chunk.stored
        try:
            return self._decompress(chunk.stored, max_output_size=limits.RECORD_BODY_OCTETS_MAX)
        except zstandard.ZstdError as error:
            raise CopyDamaged(f"chunk {chunk.number} does not decompress") from error

    def whole(self, whole: Whole) -> Small:
        """A small message. Raises CopyDamaged when its chunks are not as its commit record says."""
        parts = [self.octets(chunk) for chunk in whole.chunks]
        form = CommitForm.parse(whole.commit)
        if [len(part) for part in parts] != form.sizes:
            raise CopyDamaged("chunks of another size than the commit record says")
        return Small(parts[0] if len(parts) == 1 else b"".join(parts), form.plain)
