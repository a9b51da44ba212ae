"""Owns the log in its order: what stands behind a place, for those who follow it (laws 2, 6, 9, 11).

Belongs to the reading lane. What was written a short time ago is answered from memory, the rest from the disk. A scan shows
what is durable and counts, and names every stretch that could hide something: nothing is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.storage.contract import Origin, Position, Scan, Scanned, Unread
from powermail.storage.log import record as rec
from powermail.storage.log.keys import DEAD, LIVE, Place
from powermail.storage.log.ledger import Ledger
from powermail.storage.log.segments import Segments

SCAN_OCTETS_MAX: Final = 8 * limits.MIB  # read by one call, so that others get their turn


class Again(NamedTuple):
    """What a noted stretch holds after all, and what of it (offset, octets) is still bad, or was not looked at yet.

    `end` is where the segment ends, when the stretch had been taken to go on to the end of the file; else 0.
    """

    records: list[tuple[Place, rec.Record]]
    bad: list[tuple[int, int]]
    end: int = 0


class Scanner:
    """Shows the log. Raises OSError when the disk is away, one of `BROKEN` when the key index does not answer."""

    def __init__(
        self, ledger: Ledger, segments: Segments, incarnation: Callable[[], str], monotonic: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._segments = segments
        self._incarnation = incarnation
        self._monotonic = monotonic
        self._opened_at = monotonic()
        self._opened_end = ledger.durable  # before it, nobody knows when something was written

    def scan(self, after: Position, limit: int, age_s: float) -> Scan:
        """What stands behind `after` and is older than `age_s`; see the contract."""
        ledger = self._ledger
        end = ledger.durable
        now = self._monotonic()
        stop = min(end, self._young(now - age_s))
        if after < self._opened_end and now - self._opened_at < age_s:
            return Scan(self._incarnation(), [], after, end, [])
        if after >= stop:
            return Scan(self._incarnation(), [], after, end, [])
        if after >= ledger.recent_since and after >= self._opened_end:
            return self._from_memory(after, limit, stop, end)
        return self._from_disk(after, limit, stop, end)

    def _young(self, before: float) -> Position:
        """Where what was written later than `before` begins."""
        recent = self._ledger.recent
        low, high = 0, len(recent)
        while low < high:
            middle = (low + high) // 2
            if recent[middle].at > before:
                high = middle
            else:
                low = middle + 1
        return Position(recent[low].segment, recent[low].start) if low < len(recent) else self._ledger.durable

    # -- from memory ------------------------------------------------------------------------------------------------

    def _from_memory(self, after: Position, limit: int, stop: Position, end: Position) -> Scan:
        found: list[Scanned] = []
        recent = self._ledger.recent
        for passage in recent[self._ledger.behind(after) :]:
            if Position(passage.segment, passage.start) >= stop:
                break
            for offset, key, origin in passage.shown:
                position = Position(passage.segment, offset)
                if position < after:
                    continue
                if len(found) >= limit:
                    return Scan(self._incarnation(), found, position, end, [])
                shown = self._shown(key, position, origin)
                if shown is not None:
                    found.append(shown)
        return Scan(self._incarnation(), found, stop, end, [])

    def _shown(self, key: bytes, lies: Position, origin: Origin | None) -> Scanned | None:
        """How a record is shown, if it is what counts for its key."""
        entry = self._ledger.keys.find(key)
        if entry is None or (entry.mark.segment, entry.mark.offset) != lies:
            return None
        if origin is None:
            return Scanned(key, lies, None) if entry.state == DEAD else None
        return Scanned(key, entry.position(), origin) if entry.state == LIVE else None

    def _of_record(self, record: rec.Record, lies: Position) -> Scanned | None:
        if record.type == rec.COMMIT:
            return self._shown(record.key, lies, rec.origin_of(record.flags))
        if record.type in (rec.TOMBSTONE, rec.ABORT):
            return self._shown(record.key, lies, None)
        return None

    # -- from the disk ----------------------------------------------------------------------------------------------

    def _from_disk(self, after: Position, limit: int, stop: Position, end: Position) -> Scan:
        found: list[Scanned] = []
        unread: list[Unread] = []
        budget = SCAN_OCTETS_MAX
        for number in sorted(self._ledger.sizes):
            if number < after.segment:
                continue
            if number > stop.segment:
                break
            size = min(self._ledger.sizes.get(number, 0), stop.offset if number == stop.segment else 1 << 62)
            base = max(after.offset & -rec.ALIGN if number == after.segment else 0, rec.SEGMENT_HEADER_OCTETS)
            following = self._walk(number, base, size, after, limit, budget, found, unread)
            if following is not None:
                return Scan(self._incarnation(), found, following, end, unread)
            budget -= max(0, size - base)
            if budget <= 0:
                break
        else:
            return Scan(self._incarnation(), found, stop, end, unread)
        return Scan(self._incarnation(), found, min(stop, Position(number + 1, 0)), end, unread)

    def _walk(
        self,
        number: int,
        base: int,
        size: int,
        after: Position,
        limit: int,
        budget: int,
        found: list[Scanned],
        unread: list[Unread],
    ) -> Position | None:
        """Goes through one segment; where to go on in it, or None when it was gone through."""
        try:
            for offset, record, room in self._segments.walk(number, base, size, full=True):
                lies = Position(number, offset)
                if len(found) >= limit or offset - base >= budget:
                    return lies
                if lies < after:
                    continue  # places that the first release gave out lie within a record
                if record is None:
                    unread.append(Unread(lies, room))
                    self._ledger.damage.note(number, offset, room, "found by a scan", blind=False)
                    continue
                shown = self._of_record(record, lies)
                if shown is not None:
                    found.append(shown)
        except OSError as error:
            if number in self._ledger.sizes and not isinstance(error, FileNotFoundError):
                unread.append(Unread(Position(number, base), max(size - base, rec.ALIGN)))
                self._ledger.damage.note(number, base, max(size - base, rec.ALIGN), f"{error}", blind=False)
            elif number in self._ledger.sizes:
                raise  # not compaction: the directory is away
        return None

    # -- again ------------------------------------------------------------------------------------------------------

    def look_again(self, unread: Unread) -> Again | None:
        """What a stretch holds now, as far as one call goes: the rest is named with what is still bad. None when its segment
        is gone.
        """
        number, base = unread.position
        if number not in self._ledger.sizes:
            return None
        size = self._ledger.sizes[number]
        one = not unread.octets  # the record that begins there, whatever its length
        end = size if one else min(base + unread.octets, size)
        base = max(base, rec.SEGMENT_HEADER_OCTETS)
        unknown = end == size and not one and self._ledger.damage.blind_at(number, base)  # where the segment ends
        again = Again([], [])
        last = base
        try:
            for offset, record, room in self._segments.walk(number, base, end, full=not unknown):
                shown = len(again.records) + len(again.bad)
                if shown >= limits.REREAD_RECORDS_MAX or last - base >= limits.REREAD_OCTETS_MAX:
                    again.bad.append((last, end - last))
                    break
                last = offset + room
                if record is None:
                    again.bad.append((offset, room))
                else:
                    again.records.append((Place(number, offset, room), record))
                if one:
                    break
        except FileNotFoundError:
            return None
        except OSError:
            return Again([], [(base, unread.octets)])
        return again._replace(end=last) if unknown and not again.bad else again

    def shown_again(self, unread: Unread, again: Again) -> Scan:
        """The answer, once what was found is known to the key index: also of which messages it was the last part that was
        missing, wherever their commit record lies.
        """
        number, base = unread.position
        found: dict[Scanned, None] = {}
        for place, record in again.records:
            shown = self._of_record(record, Position(place.segment, place.offset))
            if record.type == rec.CHUNK and (entry := self._ledger.keys.find(record.key)) is not None:
                shown = Scanned(record.key, entry.position(), Origin(entry.origin)) if entry.state == LIVE else None
            if shown is not None:
                found[shown] = None
        bad = [Unread(Position(number, offset), octets) for offset, octets in again.bad]
        return Scan(self._incarnation(), list(found), Position(number, base + unread.octets), self._ledger.durable, bad)
