"""Owns who brought which key: a front end may abort only what came with its own certificate's id.

The first who brings a key has it. What was here before anybody brought it belongs to nobody: a front end that brings the key
of an old message does not get it by that. Two generations are kept, so that a claim lives for NODE_CLAIM_S at least, unless
more than NODE_CLAIMS_MAX keys come meanwhile; an abort that comes later would not be confirmed anyway (law 5). That holds also
while the node does not say where its log ends: then all that is there may be another's, until it says so again.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.storage.contract import Position

_NOTHING_ABOVE = Position(1 << 62, 0)  # until it is known where the log ends, all that is here may be another's


class Claims:
    """Keys of one node, and the ids that brought them."""

    def __init__(self) -> None:
        self._now: dict[bytes, str] = {}
        self._before: dict[bytes, str] = {}
        self._floor_now = self._floor_before = _NOTHING_ABOVE  # what lies below was here before the generation began
        self._turned_at = float("-inf")

    def bring(self, key: bytes, peer: str) -> None:
        """Chunks or a commit of a key came from `peer`."""
        now = self._now
        if len(now) >= limits.NODE_CLAIMS_MAX and key not in now:
            self._begin()
            now = self._now
        now.setdefault(key, peer)

    def turn(self, now: float, end: Position | None) -> None:
        """Begins a new generation if it is time; `end` is where the log ends, None while that is not known.

        An end that is heard later than the generation began is a floor too: what lies above it was written since.
        """
        if now - self._turned_at >= limits.NODE_CLAIM_S:
            self._begin()
            self._turned_at = now
        if end is not None and self._floor_now == _NOTHING_ABOVE:
            self._floor_now = end

    def _begin(self) -> None:
        self._before, self._floor_before = self._now, self._floor_now
        self._now, self._floor_now = {}, _NOTHING_ABOVE

    def floor(self, key: bytes, peer: str) -> Position | None:
        """Where a copy that `peer` brought lies above; None if it did not bring the key."""
        if key in self._before:
            return self._floor_before if self._before[key] == peer else None
        return self._floor_now if self._now.get(key) == peer else None
