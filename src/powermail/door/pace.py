"""Owns the minimum data rate of what a client sends at length (S28): after a grace, so many octets a second on average."""

from __future__ import annotations

from powermail.base import limits


class Pace:
    """Of one body."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._octets = 0

    def too_slow(self, now: float, octets: int) -> bool:
        """Counts octets that came; True if they are too few by now."""
        self._octets += octets
        over = now - self._began - limits.SMTP_DATA_RATE_GRACE_S
        return over > 0 and self._octets < over * limits.SMTP_DATA_RATE_OCTETS_PER_S_MIN
