"""Owns placement: which nodes take a message. A pure function of the nodes' figures and one random number.

Rules: never two nodes of one group; lower priority first across all groups, so a spare takes nothing while regular nodes
suffice (the original's defect 5), and a slow node nothing while quick ones do (P20); within a priority by policy. The rest of
the order is who steps in when one fails.

Where nodes stand in several sites, either copies go apart: each into a site that has fewer of this message's, the first one
near; or near nodes come before far ones. A site comes before a priority, and behind being slow; a group lies in one site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from powermail.base import limits


class Candidate(NamedTuple):
    """A node that takes new mail."""

    id: str
    group: str
    priority: int
    free_octets: int  # above what is reserved
    waiting_octets: int
    slow: bool = False
    site: str = ""
    far: bool = False  # in another site than who places


def place(candidates: Sequence[Candidate], required: int, policy: str, draws: Sequence[float], apart: bool = True) -> list[str]:
    """All candidates in the order to try them; the first `required` are in different groups if that is possible, and, with
    `apart`, in as many sites as these groups lie in.

    `draws` are random numbers in [0, 1), one for each candidate. Returns [] when there are too few groups.
    """
    if len({candidate.group for candidate in candidates}) < required:
        return []
    ranked = sorted(zip(candidates, draws, strict=True), key=lambda pair: _rank(pair[0], pair[1], policy, apart))
    chosen: list[Candidate] = []
    rest: list[tuple[int, str]] = []
    groups: dict[str, int] = {}
    for number, (candidate, _) in enumerate(ranked):
        seen = groups.get(candidate.group, 0)
        groups[candidate.group] = seen + 1
        if seen == 0:
            chosen.append(candidate)
        else:
            rest.append((seen * len(ranked) + number, candidate.id))
    if apart and any(candidate.site != chosen[0].site for candidate in chosen):
        chosen = _apart(chosen)
    return [candidate.id for candidate in chosen] + [node for _, node in sorted(rest)]


def thinned(candidates: Sequence[Candidate], draws: Sequence[float]) -> list[Candidate]:
    """Some of many candidates, by chance, so that placing costs no more with thousands: of each kind (site, slow or not,
    priority) so many that the first choice among them is hardly another than among all. All, if too few groups were left.
    """
    if len(candidates) <= limits.PLACEMENT_OF_A_KIND:
        return list(candidates)
    kinds: dict[tuple[str, bool, int], int] = {}
    kept = []
    for _, candidate in sorted(zip(draws, candidates, strict=True)):
        kind = candidate.site, candidate.slow, candidate.priority
        seen = kinds[kind] = kinds.get(kind, 0) + 1
        if seen <= limits.PLACEMENT_OF_A_KIND:
            kept.append(candidate)
    left = {(candidate.site, candidate.slow, candidate.group) for candidate in kept}
    groups = {(candidate.site, candidate.slow, candidate.group) for candidate in candidates}
    return kept if len(left) >= min(len(groups), limits.PLACEMENT_OF_A_KIND // 2) else list(candidates)


def _apart(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The best node of each site first, then the second of each, and so on; slow ones behind all others."""
    sites: dict[str, int] = {}
    turns: list[tuple[bool, int, int]] = []
    for number, candidate in enumerate(ranked):
        turn = sites[candidate.site] = sites.get(candidate.site, 0) + 1
        turns.append((candidate.slow, turn, number))
    return [ranked[number] for _, _, number in sorted(turns)]


def _rank(candidate: Candidate, draw: float, policy: str, apart: bool) -> tuple[bool, bool, int, bool, float]:
    """Sort key: slow nodes last, then by priority, then by policy; far nodes before a priority or behind it. By free space it
    is weighted random sampling (Efraimidis and Spirakis: draw ** (1/weight), largest first).
    """
    if policy == "spread-disk":
        weight = max(1.0, candidate.free_octets / 2**20)
        by_policy = -(max(draw, 1e-12) ** (1.0 / weight))
    elif policy == "spread-load":
        by_policy = candidate.waiting_octets + draw
    else:
        by_policy = draw
    far = candidate.far
    return candidate.slow, far and not apart, candidate.priority, far, by_policy
