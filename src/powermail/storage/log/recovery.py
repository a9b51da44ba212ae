"""Owns what opening a log believes: where it ends, what counts, what is damaged.

Rules
- The key index says up to where it is complete; from there the log is read. An index that is damaged, or describes a log
  that is not this one, is thrown away and made again.
- A bad stretch at the very end of the last segment, readable and with nothing valid behind it, is a torn tail that was never
  shown: it is cut. Any other bad stretch is damage: noted, read over, never cut (law 1).
- What was found is made durable before it is shown: a process may have died between a write and its fsync (law 1).
- A segment that cannot be read is noted, and the rest is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import CopyDamaged
from powermail.storage.contract import START, Position
from powermail.storage.log import record as rec
from powermail.storage.log.keys import DEAD, LIVE, NOWHERE, OPEN, Name, Place
from powermail.storage.log.ledger import THE_BOOT, THE_MARK, Changes, Ledger
from powermail.storage.log.segments import Segments
from powermail.storage.log.write import FULL_ERRORS, Writer

_ACCEPT_EVERY: Final = 4096  # records


class Recovered(Struct):
    """What opening found."""

    clean: bool = True
    records: int = 0
    torn_octets: int = 0
    damaged: int = 0  # bad stretches that were not known before
    incomplete: int = 0  # commits whose chunks are not all here
    rebuilt: bool = False  # the key index was made again


class StaleKeyIndex(Exception):
    """The key index describes another log than this one."""


class Recovery:
    """Brings ledger and key index to the end of the log. Belongs to the writing lane."""

    def __init__(self, ledger: Ledger, segments: Segments, found: Recovered) -> None:
        self._ledger = ledger
        self._segments = segments
        self._found = found
        self._torn: tuple[int, int] | None = None  # (segment, offset) of a tail to cut

    def run(self) -> None:
        """Reads what must be read. Raises StaleKeyIndex, one of `BROKEN`, or OSError when the directory is away."""
        ledger = self._ledger
        ledger.damage.load()
        numbers = self._segments.numbers()
        facts = ledger.keys.facts()
        start = facts.complete
        self._found.rebuilt = self._found.rebuilt and bool(numbers)
        self._check_keys(numbers, start, facts.last)
        for number in numbers:
            if number < start.segment:
                ledger.sizes[number] = facts.sizes.get(number) or self._size(number)
            else:
                base = start.offset if number == start.segment else 0
                self._replay(number, base, number == numbers[-1])
        if numbers:
            ledger.number = numbers[-1]
            ledger.end = ledger.sizes[ledger.number]
        ledger.strays = {}
        self._sweep({*facts.live} - {*numbers})
        self._settle_open()
        self._remember()
        for number in [n for n in ledger.damage.segments() if n not in ledger.sizes]:
            ledger.damage.forget(number)
        ledger.durable = ledger.recent_since = Position(ledger.number, ledger.end) if numbers else START
        found = self._found
        found.clean = not (found.records or found.torn_octets or found.rebuilt or found.damaged)

    def _check_keys(self, numbers: Sequence[int], start: Position, last: Place) -> None:
        """The key index must not be ahead of the log: then the log lost its end, or is an older one (law 12)."""
        if start == START:
            return
        if not numbers or start.segment > numbers[-1]:
            raise StaleKeyIndex("it is ahead of the log")
        if last.segment not in numbers:
            return
        try:
            self._segments.read(last)
        except CopyDamaged as error:
            raise StaleKeyIndex("the last record it knows is not there") from error
        except OSError:
            return  # the disk does not read there: that is damage, not another log

    def _size(self, number: int) -> int:
        try:
            return self._segments.size(number)
        except OSError as error:
            self._note(number, 0, rec.SEGMENT_HEADER_OCTETS, f"{error}", blind=False)
            return rec.SEGMENT_HEADER_OCTETS

    def _note(self, number: int, offset: int, octets: int, why: str, blind: bool) -> None:
        news = self._ledger.damage.note(number, offset, octets, why, blind)
        self._found.damaged += news or self._found.rebuilt  # a new key index does not know what the old one knew of it

    # -- reading the log ----------------------------------------------------------------------------------------------

    def _replay(self, number: int, base: int, last: bool) -> None:
        ledger = self._ledger
        ledger.number = number
        size = limits.SEGMENT_OCTETS_DEFAULT  # if nobody knows
        try:
            size = self._segments.size(number)
            if base == 0:
                self._header(number)
                base = rec.SEGMENT_HEADER_OCTETS
            end = self._walk(number, base, size, last)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            self._note(number, base, max(size - base, rec.ALIGN), f"{error}", blind=True)
            end = max(base, size)
        ledger.sizes[number] = end
        if last:
            sealed = number in ledger.damage.segments() or self._segments.version(number) != rec.SEGMENT_FORMAT
            ledger.capacity = end if sealed else max(size, end)
        if ledger.keys.due() and not ledger.strays:
            ledger.end = end
            ledger.keys.settle(ledger.facts(), everything=True)

    def _header(self, number: int) -> None:
        try:
            self._segments.check_header(number)
        except rec.BadRecord as error:
            self._note(number, 0, rec.SEGMENT_HEADER_OCTETS, str(error), blind=False)

    def _walk(self, number: int, base: int, size: int, last: bool) -> int:
        """Reads a segment into the key index; where its last record ends."""
        ledger = self._ledger
        version = self._segments.version(number)
        changes = Changes(ledger.keys)
        end, count = base, 0
        bad: list[tuple[int, int]] = []
        for offset, record, room in self._segments.walk(number, base, size, full=False):
            if record is None:
                bad.append((offset, room))
                continue
            count += 1
            end = offset + room
            try:
                ledger.apply(record, Place(number, offset, room), version, changes)
            except rec.BadRecord as error:
                self._note(number, offset, room, str(error), blind=True)
            if count % _ACCEPT_EVERY == 0:
                ledger.accept(changes)
                changes = Changes(ledger.keys)
        ledger.accept(changes)
        self._found.records += count
        for offset, room in bad:
            if last and offset >= end and self._segments.readable(number, offset, room):
                self._found.torn_octets += offset + room - end
                self._torn = (number, end)
            else:
                self._note(number, offset, room, "no valid record", blind=True)
                end = max(end, offset + room)
        return end

    # -- what follows from it -------------------------------------------------------------------------------------------

    def _sweep(self, missing: set[int]) -> None:
        """Segments are gone that the key index counts on: by a crash behind their removal, or by somebody's hand."""
        if not missing:
            return
        ledger = self._ledger
        lost = []
        for key, entry in ledger.keys.everything():
            if any(place.segment in missing for place in (*entry.chunks, entry.mark) if place != NOWHERE):
                lost.append((key, entry.state))
        for key, state in lost:
            ledger.forget(key)
            self._found.damaged += state == LIVE
        for number in missing:
            ledger.live.pop(number, None)
            ledger.passing.pop(number, None)

    def _settle_open(self) -> None:
        """Streams ended with the process that fed them (law 2). A commit whose chunks are lost stays known, as such."""
        for key in self._ledger.keys.open_keys():
            entry = self._ledger.keys.get(key)
            if entry is None or entry.state != OPEN:
                continue
            if entry.mark == NOWHERE:
                self._ledger.forget(key)
            else:
                self._found.incomplete += 1

    def _remember(self) -> None:
        """The mark and the chain of boots, when the records that say so lie before what was read."""
        ledger = self._ledger
        for name in (THE_MARK, THE_BOOT):
            entry = ledger.keys.get(name)
            if entry is None:
                continue
            try:
                record = self._segments.read(entry.mark)
                if name == THE_MARK:
                    ledger.mark = rec.unpack_mark(record.body).with_seen(ledger.mark)
                elif not ledger.boots:
                    ledger.boots = rec.unpack_boots(record.body)
            except (CopyDamaged, rec.BadRecord, OSError):
                self._found.damaged += 1  # a lower mark, a broken chain: both are noticed by who compares (laws 10, 12)

    # -- making it durable ----------------------------------------------------------------------------------------------

    def make_durable(self, writer: Writer) -> None:
        """Cuts a torn tail, and makes durable what is going to be shown. Raises OSError."""
        ledger = self._ledger
        if not ledger.number or self._found.clean:
            return
        if self._torn is not None:
            number, offset = self._torn
            try:
                self._segments.cut(number, offset, ledger.capacity)
            except OSError as error:
                if error.errno not in FULL_ERRORS:
                    raise
                self._segments.cut(number, offset, offset)
                writer.seal()
        elif ledger.number in ledger.sizes:
            self._segments.sync(ledger.number)
        self._segments.sync_names()


def admit(ledger: Ledger, records: Sequence[tuple[Place, rec.Record]], version: int) -> Changes:
    """What records change that could not be read before: they lie earlier in the log than what is known of their keys."""
    changes = Changes(ledger.keys)
    for place, record in records:
        key, kind = record.key, record.type
        if kind in (rec.CHUNK, rec.COMMIT):
            _admit_message(ledger, place, record, version, changes)
        elif kind in (rec.TOMBSTONE, rec.ABORT):
            entry = changes.get(key)
            if entry is None or entry.state != DEAD:
                ledger.apply(record, place, version, changes)
        elif kind == rec.DROP:
            if changes.get(Name(kind, key, rec.unpack_position(record.body))) is None:
                ledger.apply(record, place, version, changes)
        elif changes.get(Name(kind, key if kind == rec.CHECKPOINT else rec.NO_KEY, Position(record.number, 0))) is None:
            ledger.apply(record, place, version, changes)
    changes.last = NOWHERE
    return changes


def _admit_message(ledger: Ledger, place: Place, record: rec.Record, version: int, changes: Changes) -> None:
    key = record.key
    entry = changes.get(key)
    if entry is not None and (place in entry.chunks or entry.mark == place):
        return
    if entry is not None and entry.state in (LIVE, DEAD):
        older = tuple(sorted({*entry.older, place.segment}))
        changes.put(key, entry._replace(older=older))
        return
    if record.type == rec.COMMIT:
        first = rec.first_of(record, Position(place.segment, place.offset), version)
        if changes.get(Name(rec.DROP, key, first)) is not None:
            return
    elif entry is not None and record.number < len(entry.chunks) and entry.chunks[record.number] != NOWHERE:
        return
    ledger.apply(record, place, version, changes)
