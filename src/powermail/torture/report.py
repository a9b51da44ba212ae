"""Owns the report of a torture: the figures, the violations, and whether it held."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from powermail.torture.checker import KINDS, Violation


class Limits(Struct):
    """What must not be exceeded; seconds."""

    gap_s: float  # P20: without an acknowledged message
    empty_s: float  # P13: from the admission of an empty disk to full redundancy


class Report(Struct):
    """What `powermail torture` says. Times of the story are those of one clock, in seconds."""

    held: bool
    seed: int
    seconds: float
    built_s: float  # until the first fault
    took_s: float
    ground: str
    faults: dict[str, int]
    flipped_bits: int
    not_tried: list[str]
    acked: int
    refused: int
    unknown: int
    unsent: int
    listings: int
    retrieved: int
    deleted: int
    looks: int
    longest_gap_s: float
    gap_at: float
    gap_of: dict[str, float]
    stalled_s: float  # the longest that the clients themselves stood still: nobody else was served then either
    empty_disk_s: float
    empty_disk_messages: int
    counts: dict[str, int]
    violations: list[Violation]
    kept: str = ""  # where the logs are, if anything did not hold


_SHOWN = 20
_SAID = {
    "lost": "acknowledged and lost",
    "damaged": "not what was sent",
    "ghost": "shown although refused",
    "doubled": "duplicates without a retry",
    "short": "short listings",
    "resurrected": "resurrected",
    "number": "UID violations",
    "refused": "refused for good",
    "gap": "too long without receiving",
    "healing": "not healed in time",
    "store": "findings of `verify`",
    "down": "not back in time",
    "bug": "faults of the program",
}


def facts(report: Report) -> Iterator[tuple[str, object]]:
    """What is printed for people, line by line."""
    faults = ", ".join(f"{name} {count}" for name, count in report.faults.items() if count)
    yield "seed", report.seed
    yield "faults", f"{faults} in {report.seconds:.0f} s, {report.ground}"
    calm_s = report.took_s - report.built_s - report.seconds
    yield "took", f"{report.took_s:.0f} s: {report.built_s:.0f} s to build, {calm_s:.0f} s until all was well and read"
    if report.flipped_bits:
        yield "bits flipped", report.flipped_bits
    for text in report.not_tried:
        yield "not tried", text
    yield (
        "messages",
        (
            f"{report.acked} acknowledged, {report.refused} refused for now, {report.unknown} without an answer, "
            f"{report.unsent} broken off"
        ),
    )
    yield "read", f"{report.listings} listings, {report.retrieved} retrieved, {report.deleted} deleted, {report.looks} looks"
    each = ", ".join(f"{name} {gap:.1f} s" for name, gap in report.gap_of.items())
    yield "longest gap", f"{report.longest_gap_s:.1f} s without a message received, from {report.gap_at:.1f}; {each}"
    yield "own stalls", f"the clients themselves stood still for up to {report.stalled_s:.1f} s"
    if report.empty_disk_s:
        yield "empty disk", f"{report.empty_disk_messages} messages redundant again after {report.empty_disk_s:.1f} s"
    for kind in KINDS:
        yield _SAID[kind], report.counts[kind]
    for violation in report.violations[:_SHOWN]:
        yield f"{violation.rule} broken", violation.text
    if (more := sum(report.counts.values()) - _SHOWN) > 0:
        yield "and", f"{more} more"
    if report.kept:
        yield "kept", f"what was said and done, and the stores, lie in {report.kept}"
    yield "all held" if report.held else "FAILED", "yes" if report.held else "what was promised did not hold"
