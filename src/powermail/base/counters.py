"""Owns counts of what happened and what was refused: every limit and every refusal has one."""

from __future__ import annotations


class Counters:
    """Named totals since start. Names are `room.fact`, lower case."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Raises the total of `name`."""
        self._totals[name] = self._totals.get(name, 0) + count

    def get(self, name: str) -> int:
        """The total of `name`, 0 if it never happened."""
        return self._totals.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        """All totals, sorted by name."""
        return dict(sorted(self._totals.items()))
