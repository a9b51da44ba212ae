"""Owns how a message's octets become chunks, and what a small one is when it comes back."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import zstandard

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


def joined(whole: Whole) -> Small:
    """A small message. Raises CopyDamaged when its chunks are not as its commit record says."""
    parts = whole.parts
    try:
        form = CommitForm.parse(whole.commit)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CopyDamaged("commit record cannot be read") from error
    if [len(part) for part in parts] != form.sizes:
        raise CopyDamaged("chunks of another size than the commit record says")
    return Small(parts[0] if len(parts) == 1 else b"".join(parts), form.plain)
