"""Owns giving space back: what still counts of a segment is moved to the end of the log in paced steps, then it is removed.

Rules
- Only segments wholly behind the watermark (law 10), and sealed ones.
- A tombstone goes only when the keeper says that its key is forgotten (law 9), it was stated long enough ago, and no segment
  is left that may hold a record that it killed. A drop goes when none is left that may hold what it dropped (law 1).
- What is let go is let go only when the segment is gone: until then its tombstones refuse, as the log says.
- Chunks of streams that nobody feeds any more are not moved.
- A damaged segment is emptied first of all, and goes once no live key has a record within the damaged stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.base.errors import MarkRefused
from powermail.storage.contract import Mark, Position
from powermail.storage.log import record as rec
from powermail.storage.log.keys import DEAD, LIVE, NAMED, NOWHERE, OPEN, Entry, Name, Place
from powermail.storage.log.ledger import Ledger
from powermail.storage.log.segments import Segments
from powermail.storage.log.write import Writer

_LOOKED_AT_MAX: Final = 4  # segments read by one search
_REST_S: Final = 86_400.0  # how long a segment is left alone whose tombstones are still needed, by the keeper's dates


class _Tombstone(NamedTuple):
    key: bytes
    at: float
    room: int


class Compaction:
    """Empties one segment at a time. `looking` belongs to the reading lane, `compact` to the writing lane, one at a time."""

    def __init__(self, ledger: Ledger, segments: Segments, writer: Writer, monotonic: Callable[[], float]) -> None:
        self._ledger = ledger
        self._segments = segments
        self._writer = writer
        self._monotonic = monotonic
        self._number = 0  # the segment that is emptied
        self._cursor = 0  # how far it is
        self._at = 0.0  # the keeper's date by which it was chosen
        self._tombstones: list[_Tombstone] = []  # in it, that could go if the keeper says so
        self._gone: dict[bytes | Name, Place] = {}  # what goes with it
        self._resting: dict[int, float] = {}  # segment: not before the keeper's date
        self._stuck: dict[int, int] = {}  # emptied, but a live key has a record in its damage: octets that counted then

    # -- looking ----------------------------------------------------------------------------------------------------

    def compactable(self, below: Position, at: float) -> list[bytes] | None:
        """The whole search at once; see the contract."""
        answer = None
        for step in self.looking(below, at):
            answer = step
        return answer

    def looking(self, below: Position, at: float) -> Iterator[list[bytes] | None]:
        """Looks for the segment most worth rewriting, a window at each step; the last step's answer counts."""
        ledger = self._ledger
        if ledger.failed or not ledger.boot:
            yield None
            return
        if self._eligible(self._number, below):
            yield self._wishes(at)
            return
        self._number = 0
        fed = self._fed(ledger.keys.find)
        for number in self._candidates(below, at, fed)[:_LOOKED_AT_MAX]:
            tombstones: list[_Tombstone] = []
            try:
                for _ in self._read_tombstones(number, at, tombstones):
                    yield None
            except OSError:
                self._stuck[number] = ledger.live.get(number, 0)  # it cannot even be opened
                continue
            if self._worth(number, sum(t.room for t in tombstones) - fed.get(number, 0)):
                self._number, self._cursor, self._at = number, rec.SEGMENT_HEADER_OCTETS, at
                self._tombstones, self._gone = tombstones, {}
                yield self._wishes(at)
                return
            self._resting[number] = at + _REST_S
        yield None

    def _wishes(self, at: float) -> list[bytes]:
        return [tombstone.key for tombstone in self._tombstones if tombstone.at < at]

    def _eligible(self, number: int, below: Position) -> bool:
        return number in self._ledger.sizes and number < below.segment and number != self._ledger.number

    def _alive(self, fed_at: float) -> bool:
        return self._monotonic() - fed_at < limits.STREAM_ABANDONED_S

    def _fed(self, look: Callable[[bytes], Entry | None]) -> dict[int, int]:
        """Octets in each segment of streams that go on: they count as long as these do. `look` is the lane's own."""
        found: dict[int, int] = {}
        for key, fed_at in list(self._ledger.streams.items()):
            entry = look(key) if self._alive(fed_at) else None
            for place in entry.chunks if entry is not None and entry.state == OPEN else ():
                found[place.segment] = found.get(place.segment, 0) + place.room
        return found

    def _candidates(self, below: Position, at: float, fed: dict[int, int]) -> list[int]:
        """Segments that may be worth it, best first: damaged ones, then by what could be freed."""
        ledger = self._ledger
        damaged = set(ledger.damage.segments())
        found = []
        for number in list(ledger.sizes):
            if not self._eligible(number, below) or self._stuck.get(number) == ledger.live.get(number, 0):
                continue
            hoped = ledger.dead_octets(number) + ledger.passing.get(number, 0) - fed.get(number, 0)
            if number in damaged:
                found.append((0, -hoped, number))
            elif self._resting.get(number, at) <= at and hoped >= limits.COMPACT_DEAD_FRACTION * ledger.sizes[number]:
                found.append((1, -hoped, number))
        return [number for _, _, number in sorted(found)]

    def _worth(self, number: int, more: int) -> bool:
        """True if enough of a segment goes: what counts no more, and `more`."""
        ledger = self._ledger
        if number in ledger.damage.segments():
            return True
        return ledger.dead_octets(number) + more >= limits.COMPACT_DEAD_FRACTION * ledger.sizes[number]

    def _read_tombstones(self, number: int, at: float, found: list[_Tombstone]) -> Iterator[None]:
        if not self._ledger.passing.get(number, 0):
            return
        seen = 0
        for offset, record, room in self._segments.walk(
            number, rec.SEGMENT_HEADER_OCTETS, self._ledger.sizes[number], full=True
        ):
            if offset - seen >= limits.COMPACT_STEP_OCTETS:
                seen = offset
                yield
            if record is None:
                continue
            place = Place(number, offset, room)
            if record.type in (rec.TOMBSTONE, rec.ABORT):
                entry = self._ledger.keys.find(record.key)
                stated = rec.unpack_date(record.body)
                if entry is not None and entry.state == DEAD and entry.mark == place and stated < at:
                    if not self._ledger.remains(entry, number):
                        found.append(_Tombstone(record.key, stated, room))
            elif record.type == rec.DROP:
                drop = self._ledger.keys.find(_drop_name(record))
                if drop is not None and drop.mark == place and not self._ledger.remains(drop, number):
                    found.append(_Tombstone(b"", float("inf"), room))  # needs nobody's word

    def busy(self) -> bool:
        """True while a segment is being emptied."""
        return bool(self._number)

    # -- emptying ---------------------------------------------------------------------------------------------------

    def compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        """One step; see the contract. Raises MarkRefused, or OSError when the disk fails or is full: then nothing was lost."""
        if why := self._writer.refusal(mark):
            raise MarkRefused(why)  # law 10
        number = self._number
        if not self._eligible(number, below) or self._ledger.failed or not self._ledger.boot:
            self._number = 0
            return 0
        allowed = {key for key in forgotten if key}
        if self._cursor == rec.SEGMENT_HEADER_OCTETS:
            going = sum(t.room for t in self._tombstones if t.key in allowed or not t.key)
            if not self._worth(number, going - self._fed(self._ledger.keys.get).get(number, 0)):
                self._resting[number] = self._at + _REST_S
                self._number = 0
                return 0
        if self._cursor < self._ledger.sizes[number]:
            return self._move_some(number, allowed, mark)
        return self._remove(number, mark)

    def _move_some(self, number: int, allowed: set[bytes], mark: Mark) -> int:
        moves: list[rec.Record] = []
        cursor, size = self._cursor, self._ledger.sizes[number]
        stop = cursor + limits.COMPACT_STEP_OCTETS
        kept = 0
        for offset, record, room in self._segments.walk(number, cursor, size, full=True):
            if offset >= stop:
                break
            cursor = offset + room
            if record is None:
                self._ledger.damage.note(number, offset, room, "found by compaction", blind=False)
                continue
            if self._counts(record, Place(number, offset, room), allowed):
                moves.append(rec.moved(record, Position(number, offset), self._segments.version(number)))
                kept += room
        else:
            cursor = size
        self._writer.append([*self._writer.news(mark), *moves])  # law 10
        freed = max(0, cursor - self._cursor - kept)
        self._cursor = cursor
        return freed

    def _counts(self, record: rec.Record, place: Place, allowed: set[bytes]) -> bool:
        """True if a record must live on elsewhere. Notes what goes with the segment."""
        kind, key = record.type, record.key
        if kind in (rec.CHUNK, rec.COMMIT):
            return self._message_counts(key, place)
        if kind in (rec.TOMBSTONE, rec.ABORT):
            entry = self._ledger.keys.get(key)
            if entry is None or entry.state != DEAD or entry.mark != place:
                return False
            if key in allowed and not self._ledger.remains(entry, place.segment):
                self._gone[key] = place  # law 9
                return False
            return True
        if kind == rec.DROP:
            name = _drop_name(record)
            entry = self._ledger.keys.get(name)
            if entry is None or entry.mark != place:
                return False
            if not self._ledger.remains(entry, place.segment):
                self._gone[name] = place  # law 1
                return False
            return True
        entry = self._ledger.keys.get(Name(kind, key, Position(record.number, 0)))
        return entry is not None and entry.mark == place

    def _message_counts(self, key: bytes, place: Place) -> bool:
        entry = self._ledger.keys.get(key)
        if entry is None or entry.state == DEAD or (place not in entry.chunks and entry.mark != place):
            return False
        if entry.state == LIVE:
            return True
        fed_at = self._ledger.streams.get(key)
        if fed_at is not None and self._alive(fed_at):
            return True
        self._ledger.streams.pop(key, None)
        self._ledger.forget(key)
        return False

    def _remove(self, number: int, mark: Mark) -> int:
        """Removes an emptied segment, unless something in its damage still counts."""
        ledger, keys = self._ledger, self._ledger.keys
        going = {key: entry for key, place in self._gone.items() if (entry := _at(keys.get(key), place)) is not None}
        counts = ledger.live.get(number, 0) - sum(entry.mark.room for entry in going.values())
        self._number = 0
        if counts > 0:
            self._stuck[number] = ledger.live.get(number, 0)
            return 0
        self._writer.append(self._writer.news(mark))  # law 10
        self._writer.settle(everything=True)
        try:
            self._segments.remove(number)
        except OSError as error:
            self._writer.broke(error)  # P18: nobody knows whether it is gone
            raise
        for key in going:
            ledger.forget(key)
        ledger.remove(number)
        self._stuck.pop(number, None)
        self._resting.pop(number, None)
        self._writer.settle(everything=True)
        return rec.SEGMENT_HEADER_OCTETS  # all else was counted as it was passed


def _at(entry: Entry | None, place: Place) -> Entry | None:
    return entry if entry is not None and entry.state in (DEAD, NAMED) and entry.mark == place and place != NOWHERE else None


def _drop_name(record: rec.Record) -> Name:
    return Name(rec.DROP, record.key, rec.unpack_position(record.body))
