"""Owns placement: which nodes take a message. A pure function of the nodes' figures and one random number.

Rules: never two nodes of one group; lower priority first across all groups, so a spare takes nothing while regular nodes
suffice (the original's defect 5), and a slow node nothing while quick ones do (P20); within a priority by policy. The rest of
the order is who steps in when one fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A node that takes new mail."""

    id: str
    group: str
    priority: int
    free_octets: int  # above what is reserved
    waiting_octets: int
    slow: bool = False


def place(candidates: Sequence[Candidate], required: int, policy: str, draws: Sequence[float]) -> list[str]:
    """All candidates in the order to try them; the first `required` are in different groups if that is possible.

    `draws` are random numbers in [0, 1), one for each candidate. Returns [] when there are too few groups.
    """
    if len({candidate.group for candidate in candidates}) < required:
        return []
    ranked = sorted(zip(candidates, draws, strict=True), key=lambda pair: _rank(pair[0], pair[1], policy))
    chosen: list[str] = []
    rest: list[tuple[int, str]] = []
    groups: dict[str, int] = {}
    for number, (candidate, _) in enumerate(ranked):
        seen = groups.get(candidate.group, 0)
        groups[candidate.group] = seen + 1
        if seen == 0:
            chosen.append(candidate.id)
        else:
            rest.append((seen * len(ranked) + number, candidate.id))
    return chosen + [node for _, node in sorted(rest)]


def _rank(candidate: Candidate, draw: float, policy: str) -> tuple[bool, int, float]:
    """Sort key: slow nodes last, then by priority, then by policy. By free space it is weighted random sampling (Efraimidis and
    Spirakis: draw ** (1/weight), largest first).
    """
    if policy == "spread-disk":
        weight = max(1.0, candidate.free_octets / 2**20)
        return candidate.slow, candidate.priority, -(max(draw, 1e-12) ** (1.0 / weight))
    if policy == "spread-load":
        return candidate.slow, candidate.priority, candidate.waiting_octets + draw
    return candidate.slow, candidate.priority, draw
