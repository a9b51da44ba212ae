"""Owns what the log holds: segments and their sizes, what counts in them, its durable end; and the changes of a write.

The key index is changed only when the records behind a change are durable (law 1): until then changes wait in `Changes`.
How a record changes what is known of its key stands here once, for writes, recovery and compaction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from powermail.storage.contract import START, Mark, Origin, Position
from powermail.storage.log import record as rec
from powermail.storage.log.damage import Damage
from powermail.storage.log.keys import BEFORE_ALL, DEAD, LIVE, NAMED, NOWHERE, OPEN, Entry, Facts, KeyIndex, Name, Place

RECENT_MAX: Final = 200_000  # records remembered for those who follow the log

THE_MARK: Final = Name(rec.MARK, rec.NO_KEY)
THE_BOOT: Final = Name(rec.BOOT, rec.NO_KEY)

Shown = tuple[int, bytes, Origin | None]  # offset, key, origin; None: a tombstone


class Passage(NamedTuple):
    """What one write added to the log, as far as a scan shows it, in order."""

    segment: int
    start: int
    end: int
    at: float  # monotonic
    shown: list[Shown]


class Changes:
    """What a write will change once it is durable. Looked up before the key index by the lane that writes."""

    def __init__(self, keys: KeyIndex) -> None:
        self._keys = keys
        self._known: dict[bytes | Name, Entry | None] = {}  # what `look` found
        self.fresh: dict[bytes, Entry] = {}  # whole messages of deliveries, unknown before, in the segment written to
        self.fresh_octets = 0
        self.after: dict[bytes | Name, Entry | None] = {}
        self.before: dict[bytes | Name, Entry | None] = {}
        self.shown: list[Shown] = []  # but those of `fresh`
        self.mark: Mark | None = None
        self.boots: tuple[rec.Boot, ...] | None = None
        self.last = NOWHERE

    def get(self, key: bytes | Name) -> Entry | None:
        """What will be known of a key or name."""
        if isinstance(key, bytes) and key in self.fresh:
            return self.fresh[key]
        if key in self.after:
            return self.after[key]
        return self._before(key)

    def look(self, keys: Sequence[bytes]) -> None:
        """Asks the key index at once for keys that `get` and `put` will want."""
        found = self._keys.get_many(keys)
        self._known.update((key, found.get(key)) for key in keys)

    def _before(self, key: bytes | Name) -> Entry | None:
        return self._known[key] if key in self._known else self._keys.get(key)

    def put(self, key: bytes | Name, entry: Entry | None) -> None:
        """Changes what will be known."""
        if key not in self.before:
            fresh = self.fresh.pop(key, None) if isinstance(key, bytes) else None
            if fresh is not None and isinstance(key, bytes):
                self.fresh_octets -= sum(place.room for place in fresh.chunks) + fresh.mark.room
                self.shown.append((fresh.mark.offset, key, Origin.DELIVERY))
                self.before[key] = None
            else:
                self.before[key] = self._before(key)
        self.after[key] = entry

    def touched(self) -> list[bytes]:
        """Messages that would change."""
        return [*self.fresh, *(key for key in self.after if isinstance(key, bytes))]


class Ledger:
    """What is known of the log. Changed by the writing lane only; single attributes may be read from anywhere."""

    def __init__(self, keys: KeyIndex, damage: Damage) -> None:
        self.keys = keys
        self.damage = damage
        facts = keys.facts()
        self.live = dict(facts.live)  # octets of records that count, by segment
        self.passing = dict(facts.passing)  # those of them that may go one day: tombstones and drops
        self.sizes: dict[int, int] = {}  # octets up to the end of the last record, by segment
        self.number = 0  # of the segment that is written to
        self.end = 0  # where the next record goes in it
        self.capacity = 0  # room it has
        self.durable = START  # everything before it is durable, and known to the key index
        self.last = facts.last
        self.mark = Mark()
        self.boot = ""  # this opening's; "" until its record is durable
        self.boots: tuple[rec.Boot, ...] = ()  # law 12
        self.strays: dict[bytes, dict[int, Place]] = {}  # chunks of a copy whose commit may follow another's
        self.streams: dict[bytes, float] = {}  # keys whose chunks come in: when the last one came
        self.recent: list[Passage] = []
        self.recent_since = START  # `recent` holds all that was written from here on
        self._recent_count = 0
        self.failed = ""  # why nothing at all is written any more (P18)
        self.full = ""  # why no new mail is written until there is room again
        self.unready = ""  # why the boot record could not be written

    # -- applying records -----------------------------------------------------------------------------------------

    def apply(self, record: rec.Record, place: Place, version: int, changes: Changes) -> None:
        """Brings `changes` forward by one record. Raises BadRecord when its body makes no sense."""
        changes.last = place
        kind = record.type
        if kind == rec.CHUNK:
            self._apply_chunk(record, place, changes)
        elif kind == rec.COMMIT:
            self._apply_commit(record, place, version, changes)
        elif kind in (rec.TOMBSTONE, rec.ABORT):
            entry = changes.get(record.key)
            older = _remains(entry)
            if entry is not None and entry.state == DEAD:
                older = tuple(number for number in older if number in self.sizes or number >= self.number)
            changes.put(record.key, Entry(DEAD, place, (), older=older))
            changes.shown.append((place.offset, record.key, None))
        elif kind == rec.DROP:
            self._apply_drop(record, place, changes)
        elif kind == rec.CHECKPOINT:
            self._apply_checkpoint(record, place, version, changes)
        else:
            if kind == rec.MARK:
                changes.mark = (changes.mark or self.mark).with_seen(rec.unpack_mark(record.body))
            elif kind == rec.BOOT:
                changes.boots = rec.unpack_boots(record.body)
            changes.put(Name(kind, rec.NO_KEY), Entry(NAMED, place, ()))

    def _apply_chunk(self, record: rec.Record, place: Place, changes: Changes) -> None:
        entry = changes.get(record.key)
        if entry is None:
            entry = Entry(OPEN, NOWHERE, ())
        elif entry.state == DEAD or (entry.mark != NOWHERE and record.number >= len(entry.chunks)):
            if entry.state != DEAD:
                self.strays.setdefault(record.key, {})[record.number] = place
            changes.put(record.key, entry._replace(older=_with(entry.older, [place.segment])))
            return
        chunks = [*entry.chunks, *[NOWHERE] * (record.number + 1 - len(entry.chunks))]
        replaced, chunks[record.number] = chunks[record.number], place
        state = LIVE if entry.mark != NOWHERE and NOWHERE not in chunks else OPEN
        older = _with(entry.older, _segments([replaced])) if replaced.segment != place.segment else entry.older
        changes.put(record.key, entry._replace(state=state, chunks=tuple(chunks), older=older))

    def _apply_commit(self, record: rec.Record, place: Place, version: int, changes: Changes) -> None:
        key, count = record.key, record.number
        entry = changes.get(key)
        if entry is not None and entry.state == DEAD:
            changes.put(key, entry._replace(older=_with(entry.older, [place.segment])))
            return
        first = rec.first_of(record, Position(place.segment, place.offset), version)
        origin = rec.origin_of(record.flags)
        chunks = [NOWHERE] * count
        older: tuple[int, ...] = ()
        if entry is not None:
            stale = [*entry.chunks[count:], *([entry.mark] if entry.mark.segment != place.segment else [])]
            known = dict(enumerate(entry.chunks[:count])) | self.strays.pop(key, {})
            # All chunks of another copy lie behind the commit of the one before it.
            other = entry.position() != first and not (version == 1 and record.flags & rec.FLAG_MOVED)
            for number, chunk in known.items():
                if other and chunk[:2] < entry.mark[:2]:
                    stale.append(chunk)
                elif number < count:
                    chunks[number] = chunk
            older = _with(entry.older, _segments(stale))
        state = OPEN if NOWHERE in chunks else LIVE
        here = first == (place.segment, place.offset)
        changes.put(key, Entry(state, place, tuple(chunks), origin, None if here else first, older))
        changes.shown.append((place.offset, key, origin))

    def _apply_drop(self, record: rec.Record, place: Place, changes: Changes) -> None:
        position = rec.unpack_position(record.body)
        name = Name(rec.DROP, record.key, position)
        entry, known = changes.get(record.key), changes.get(name)
        older = _with(known.older if known is not None else (), [position.segment])
        if entry is not None and entry.state != DEAD and entry.mark != NOWHERE and entry.position() == position:
            older = _with(older, _remains(entry))
            changes.put(record.key, None)
        elif entry is not None:
            older = _with(older, entry.older)
        changes.put(name, Entry(NAMED, place, (), older=older))

    def _apply_checkpoint(self, record: rec.Record, place: Place, version: int, changes: Changes) -> None:
        """Number 0 replaces what was first written before it; what was replaced stays so, wherever its records lie."""
        key, number = record.key, record.number
        name, head = Name(rec.CHECKPOINT, key, Position(number, 0)), Name(rec.CHECKPOINT, key)
        whole = changes.get(head) or Entry(NAMED, NOWHERE, ())
        first = rec.first_of(record, Position(place.segment, place.offset), version)
        if version == 1 and record.flags & rec.FLAG_MOVED and not number:
            first = whole.position() if whole.mark != NOWHERE else BEFORE_ALL  # moving it replaced nothing
        before = changes.get(name)
        if whole.position() > first or (before is not None and before.position() > first):
            return
        moved = None if first == (place.segment, place.offset) else first
        if number:
            changes.put(head, whole._replace(older=_with(whole.older, [number])))
            changes.put(name, Entry(NAMED, place, (), first=moved))
            return
        kept = []
        for other in whole.older:
            part = Name(rec.CHECKPOINT, key, Position(other, 0))
            entry = changes.get(part)
            if entry is not None and entry.position() > first:
                kept.append(other)
            elif entry is not None:
                changes.put(part, None)
        changes.put(head, Entry(NAMED, place, (), first=moved, older=tuple(kept), rank=rec.rank_of(record, version)))

    # -- accepting ------------------------------------------------------------------------------------------------

    def accept(self, changes: Changes) -> None:
        """Makes changes known: their records are written, and durable but for chunks."""
        if changes.fresh:
            self.keys.put_new(changes.fresh)
            self.live[self.number] = self.live.get(self.number, 0) + changes.fresh_octets
        for key, entry in changes.after.items():
            before = changes.before[key]
            self._weigh(key, before, -1)
            self._weigh(key, entry, 1)
            self.keys.put(key, entry, before)
        if changes.mark is not None:
            self.mark = changes.mark
        if changes.boots is not None:
            self.boots = changes.boots
        if changes.last != NOWHERE:
            self.last = changes.last

    def forget(self, key: bytes | Name) -> None:
        """What is known of a key or name counts no more, without a record that says so."""
        before = self.keys.get(key)
        if before is not None:
            self._weigh(key, before, -1)
            self.keys.put(key, None, before)

    def _weigh(self, key: bytes | Name, entry: Entry | None, sign: int) -> None:
        if entry is None or entry.state == OPEN:
            return
        live = self.live
        for segment, _, room in (*entry.chunks, entry.mark):
            if segment:
                live[segment] = live.get(segment, 0) + sign * room
        if entry.state == DEAD or (isinstance(key, Name) and key.kind == rec.DROP):
            segment, _, room = entry.mark
            self.passing[segment] = self.passing.get(segment, 0) + sign * room

    def show(self, changes: Changes, start: int, at: float) -> None:
        """Remembers what a write shows to those who follow the log, and that the log is durable up to its end."""
        shown: list[Shown] = [(entry[1][1], key, Origin.DELIVERY) for key, entry in changes.fresh.items()]
        if changes.shown:
            shown = sorted([*shown, *changes.shown], key=_offset)
        if shown:
            self.recent.append(Passage(self.number, start, self.end, at, shown))
            self._recent_count += len(shown)
            if self._recent_count > RECENT_MAX:
                self._thin()
        if self.number:
            self.sizes[self.number] = self.end
        self.durable = Position(self.number, self.end)  # last: whoever sees it finds all before it in the key index

    def _thin(self) -> None:
        gone = 0
        while self._recent_count > RECENT_MAX // 2:
            self._recent_count -= len(self.recent[gone].shown)
            gone += 1
        kept = self.recent[gone:]
        self.recent_since = Position(kept[0].segment, kept[0].start) if kept else self.durable
        self.recent = kept

    def behind(self, after: Position) -> int:
        """Index in `recent` of the passage in which, or behind which, `after` lies."""
        return max(0, bisect_right(self.recent, after, key=lambda passage: Position(passage.segment, passage.start)) - 1)

    def facts(self) -> Facts:
        """For the key index: the log as it is now, all of it durable."""
        end = Position(self.number, self.end)
        return Facts(end, self.last, dict(self.live), dict(self.passing), {**self.sizes, self.number: self.end})

    # -- asking ---------------------------------------------------------------------------------------------------

    def remains(self, entry: Entry, but: int) -> bool:
        """True if a segment other than `but` may hold records that a tombstone or drop killed."""
        return any(number in self.sizes and number != but for number in entry.older)

    def dead_octets(self, number: int) -> int:
        """Octets of a segment that nothing counts any more."""
        return self.sizes[number] - rec.SEGMENT_HEADER_OCTETS - self.live.get(number, 0)

    def log_octets(self) -> int:
        """Octets of the log that hold records."""
        return sum(self.sizes.values())

    def live_octets(self) -> int:
        """Octets of records that still count."""
        return sum(self.live.values())

    def remove(self, number: int) -> None:
        """A segment is gone."""
        self.sizes.pop(number, None)
        self.live.pop(number, None)
        self.passing.pop(number, None)
        self.damage.forget(number)


def _offset(shown: Shown) -> int:
    return shown[0]


def _segments(places: Iterable[Place]) -> list[int]:
    return [place.segment for place in places if place != NOWHERE]


def _with(older: tuple[int, ...], numbers: Iterable[int]) -> tuple[int, ...]:
    more = [number for number in numbers if number not in older]
    return tuple(sorted({*older, *more})) if more else older


def _remains(entry: Entry | None) -> tuple[int, ...]:
    """Segments in which records of a key stand that a tombstone or drop kills."""
    if entry is None:
        return ()
    if entry.state == DEAD:
        return entry.older
    return _with(entry.older, _segments([*entry.chunks, entry.mark]))
