"""Owns feeding hashes without needless hand-overs of the interpreter lock."""

from __future__ import annotations

from typing import Any, Final

_SMALL_OCTETS: Final = 16_384
_LOCKED_OCTETS: Final = 2047


def hash_octets(digest: Any, octets: bytes | memoryview) -> None:
    """Adds octets to a hash. hashlib gives up the interpreter lock for 2048 octets and more; for little, getting it back
    costs more than hashing.
    """
    if len(octets) > _SMALL_OCTETS:
        digest.update(octets)
        return
    for start in range(0, len(octets), _LOCKED_OCTETS):
        digest.update(octets[start : start + _LOCKED_OCTETS])
