"""Owns randomness: identities, salts, jitter and shuffles, all from one seedable source."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import MutableSequence
from typing import Any, Protocol

_POOL_OCTETS = 4096  # asked for at once: each call to the system gives up the interpreter lock


class Entropy(Protocol):
    """Randomness. The system one is cryptographic; the simulated one repeats from its seed."""

    def octets(self, count: int) -> bytes:
        """`count` random octets, fit for identities and secrets."""

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high]; for jitter, not secrets."""

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Shuffles in place."""


class SystemEntropy:
    """The operating system's randomness for secrets, a generator seeded from it for jitter."""

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(16))
        self._pool = b""
        self._used = 0

    def octets(self, count: int) -> bytes:
        if count > _POOL_OCTETS // 4:
            return os.urandom(count)
        if self._used + count > len(self._pool):
            self._pool, self._used = os.urandom(_POOL_OCTETS), 0
        self._used += count
        return self._pool[self._used - count : self._used]

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def shuffle(self, items: MutableSequence[Any]) -> None:
        self._random.shuffle(items)


class KeySource:
    """Makes message keys: UUIDv7 (RFC 9562 §5.7), rising within a process even when the clock does not (F23, F44).

    62 bits come from the entropy source for every key, so two front ends with equal clocks do not collide.
    """

    def __init__(self, now: Any, entropy: Entropy) -> None:
        self._now = now
        self._entropy = entropy
        self._last_ms = 0
        self._counter = 0

    def next(self) -> bytes:
        """Returns 16 octets: 48 bits of milliseconds, a 12-bit counter in the process, 62 random bits."""
        now_ms = int(self._now() * 1000)
        if now_ms > self._last_ms:
            self._last_ms = now_ms
            self._counter = 0
        else:
            self._counter += 1
            if self._counter > 0xFFF:
                self._last_ms += 1
                self._counter = 0
        tail = int.from_bytes(self._entropy.octets(8), "big") >> 2 | 1 << 63
        head = self._last_ms << 16 & 0xFFFF_FFFF_FFFF_FFFF | 0x7000 | self._counter
        return struct.pack(">QQ", head, tail)
