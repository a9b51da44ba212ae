"""Owns what is known of stretches of the log that hold no valid record, or cannot be read: the file `quarantine`.

A stretch stays noted until its segment is gone or it reads well again. *Blind* are those that were passed over when the key
index was made: only they can hide a copy or a tombstone of a key that the index does not know.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

from powermail.base.disk import Disk
from powermail.base.lane import guard

_OF_SEGMENT_MAX: Final = 100  # more in one segment become one that covers them


class Stretch(Struct, frozen=True):
    """A line of the file. What the first release noted may have been passed over blindly."""

    segment: int
    offset: int
    octets: int
    why: str = ""
    blind: bool = True

    @property
    def end(self) -> int:
        """First offset behind it."""
        return self.offset + self.octets


class Damage:
    """All stretches. `note` may come from two lanes; only the writing lane calls `load`, `forget` and `save`."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._name = f"{path}/quarantine"
        self._stretches: dict[int, list[Stretch]] = {}
        self._guard = guard()
        self._unsaved = False

    def load(self) -> None:
        """Reads what was noted before; what cannot be read is found again by whoever comes by."""
        try:
            lines = self._disk.read_file(self._name).splitlines() if self._disk.exists(self._name) else []
            for line in lines:
                stretch = msgspec.json.decode(line, type=Stretch)
                self._stretches.setdefault(stretch.segment, []).append(stretch)
        except (OSError, ValueError):
            self._unsaved = True

    def save(self) -> None:
        """Writes what is new. Raises OSError; then it is tried again the next time."""
        with self._guard:
            if not self._unsaved:
                return
            lines = [msgspec.json.encode(stretch) for stretches in self._stretches.values() for stretch in stretches]
        self._disk.replace_file(self._name, b"".join(line + b"\n" for line in lines))
        self._unsaved = False

    def note(self, segment: int, offset: int, octets: int, why: str, blind: bool) -> bool:
        """Notes a stretch; True if it is news."""
        with self._guard:
            known = self._stretches.setdefault(segment, [])
            for stretch in known:
                if stretch.offset <= offset and offset + octets <= stretch.end and (stretch.blind or not blind):
                    return False
            touching = [s for s in known if s.offset <= offset + octets and offset <= s.end]
            if len(known) - len(touching) >= _OF_SEGMENT_MAX:
                touching = known
            start = min(offset, *(s.offset for s in touching), offset)
            end = max(offset + octets, *(s.end for s in touching), offset + octets)
            merged = Stretch(segment, start, end - start, why, blind or any(s.blind for s in touching))
            self._stretches[segment] = sorted([*(s for s in known if s not in touching), merged], key=lambda s: s.offset)
            self._unsaved = True
            return True

    def heal(self, segment: int, offset: int, octets: int, bad: list[tuple[int, int]]) -> None:
        """What was noted within a stretch is only (offset, octets) of `bad` any more."""
        with self._guard:
            known, end = self._stretches.get(segment, []), offset + octets
            inside = [s for s in known if s.offset < end and offset < s.end] if octets else []
            if not inside:
                return
            blind = any(s.blind for s in inside)
            rest = [s for s in known if s not in inside]
            rest += [Stretch(segment, start, length, inside[0].why, blind) for start, length in bad]
            for s in inside:  # one that is larger was looked at in part
                parts = ((s.offset, offset - s.offset), (end, s.end - end))
                rest += [Stretch(segment, start, length, s.why, s.blind) for start, length in parts if length > 0]
            self._unsaved = True
            if rest:
                self._stretches[segment] = sorted(rest, key=lambda s: s.offset)
            else:
                del self._stretches[segment]

    def blind_at(self, segment: int, offset: int) -> bool:
        """True if the key index was made without what stands there."""
        return any(s.blind and s.offset <= offset < s.end for s in list(self._stretches.get(segment, ())))

    def forget(self, segment: int) -> None:
        """The segment is gone."""
        with self._guard:
            if self._stretches.pop(segment, None):
                self._unsaved = True

    def segments(self) -> list[int]:
        """Segments with a noted stretch."""
        return list(self._stretches)

    def count(self) -> int:
        """How many stretches."""
        return sum(map(len, list(self._stretches.values())))

    def blind(self) -> bool:
        """True if a key that the index does not know may yet be in the log."""
        return any(stretch.blind for stretches in list(self._stretches.values()) for stretch in stretches)
