"""Owns reading copies and names: commit records, chunks, small messages whole, what is held, checkpoints.

Belongs to the reading lane. What is read was found in the key index, so it is durable; each record's checksum is verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing
from powermail.storage.contract import START, Chunk, Held, Item, Origin, Position, Whole
from powermail.storage.frames import BadFrame, Inflater, frame_octets
from powermail.storage.log import record as rec
from powermail.storage.log.keys import DEAD, LIVE, NOWHERE, OPEN, Entry, Name, Place
from powermail.storage.log.ledger import Ledger
from powermail.storage.log.segments import Segments

_Row = tuple[tuple[Place, ...], int]  # the records of a small message, its place in the answer
_GAP_OCTETS: Final = 16 * limits.KIB  # reading so much for nothing costs less than another read


class Reader:
    """Reads what the log holds. Raises OSError when the disk does not read, one of `BROKEN` when the key index does not."""

    def __init__(self, ledger: Ledger, segments: Segments, node: str) -> None:
        self._ledger = ledger
        self._segments = segments
        self._node = node
        self._inflater = Inflater()

    # -- one copy ---------------------------------------------------------------------------------------------------

    def _live_entry(self, key: bytes) -> Entry:
        entry = self._ledger.keys.find(key)
        if entry is None or entry.state != LIVE:
            raise CopyMissing(f"no message {key.hex()} on node {self._node}")
        return entry

    def _read(self, place: Place, key: bytes, kind: int, number: int | None) -> rec.Record:
        for attempt in (1, 2):
            try:
                record = self._segments.read(place)
                break
            except FileNotFoundError as error:
                # Compaction may have moved the record between the look-up and the read: look once more.
                entry = self._ledger.keys.find(key)
                fresh = None
                if entry is not None and entry.state in (LIVE, OPEN) and (number is None or number < len(entry.chunks)):
                    fresh = entry.mark if number is None else entry.chunks[number]
                if attempt == 2 or fresh is None or fresh in (place, NOWHERE):
                    raise CopyDamaged(f"a segment of {key.hex()} is gone") from error
                place = fresh
        if record.key != key or record.type != kind or (number is not None and record.number != number):
            raise CopyDamaged(f"another record stands where {key.hex()} should")
        return record

    def read_commit(self, key: bytes) -> bytes:
        """The commit record's body. Raises CopyMissing, CopyDamaged."""
        return self._commit(self._live_entry(key).mark, key)

    def _commit(self, mark: Place, key: bytes) -> bytes:
        record = self._read(mark, key, rec.COMMIT, None)
        if not record.flags & rec.FLAG_MOVED:
            return record.body
        # A record that was moved while it was looked for lies in the newest format, as this one does.
        return rec.body_of(record, self._segments.version(mark.segment))

    def read_chunk(self, key: bytes, number: int) -> Chunk:
        """One chunk, also of a stream that is still open. Raises CopyMissing, CopyDamaged."""
        entry = self._ledger.keys.find(key)
        if entry is None or entry.state not in (LIVE, OPEN) or number >= len(entry.chunks) or entry.chunks[number] == NOWHERE:
            raise CopyMissing(f"no chunk {number} of {key.hex()} on node {self._node}")
        return rec.chunk_of(self._read(entry.chunks[number], key, rec.CHUNK, number))

    def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        """Small messages whose records lie one behind the other, neighbours with one read; see the contract."""
        entries = self._ledger.keys.find_many(keys)
        rows = [(places, at) for at, key in enumerate(keys) if (places := _together(entries.get(key)))]
        rows.sort()
        found: list[Whole | None] = [None] * len(keys)
        left = limits.READ_SMALL_ALL_OCTETS_MAX
        for stretch in _stretches(rows):
            left = self._read_stretch(stretch, keys, found, left)
        return found

    def _read_stretch(self, stretch: Sequence[_Row], keys: Sequence[bytes], found: list[Whole | None], left: int) -> int:
        """Reads messages that lie close together into `found`, as long as they hold no more than `left` octets, uncompressed;
        what is left then. None stays there for one that is not good, or too much: no frame is taken apart for it.
        """
        try:
            rows = self._segments.read_rows([places for places, _ in stretch])
        except OSError:
            if len(stretch) > 1:  # a bad place of the disk costs no neighbour
                for row in stretch:
                    left = self._read_stretch([row], keys, found, left)
            return left
        version = self._segments.version(stretch[0][0][0].segment)
        frames, packed = [], []
        for (_, at), records in zip(stretch, rows, strict=True):
            if records is None or not _are(records, keys[at]):
                continue
            *chunks, commit = records
            try:
                octets = [_octets_of(chunk) for chunk in chunks]
            except BadFrame:
                continue
            room = sum(octets) + len(commit.body)
            if room > left:
                continue
            left -= room
            for number, chunk in enumerate(chunks):
                if chunk.flags & rec.FLAG_COMPRESSED and octets[number]:
                    frames.append(chunk.body)
                    packed.append((at, number))
            parts = [chunk.body if count else b"" for chunk, count in zip(chunks, octets, strict=True)]
            found[at] = Whole(rec.body_of(commit, version), parts)
        for (at, number), part in zip(packed, self._inflater.many(frames), strict=True):
            whole = found[at]
            if part is None:
                found[at] = None
            elif whole is not None:
                whole.parts[number] = part
        return left

    def verify(self, key: bytes) -> Position:
        """Checks every record of a copy; where it was first written. Raises CopyMissing, CopyDamaged."""
        entry = self._live_entry(key)
        self._read(entry.mark, key, rec.COMMIT, None)
        for number, place in enumerate(entry.chunks):
            self._read(place, key, rec.CHUNK, number)
        return entry.position()

    # -- many -------------------------------------------------------------------------------------------------------

    def held(self, key: bytes) -> tuple[Held, Position]:
        """What is known of a key, and where its copy was first written."""
        entry = self._ledger.keys.find(key)
        return self._said(entry), entry.position() if entry is not None and entry.state == LIVE else START

    def has(self, keys: Sequence[bytes]) -> list[Held]:
        """What is known of each key."""
        entries = self._ledger.keys.find_many(keys)
        return [self._said(entries.get(key)) for key in keys]

    def _said(self, entry: Entry | None) -> Held:
        if entry is not None and entry.state == LIVE:
            return Held.LIVE
        if entry is not None and entry.state == DEAD:
            return Held.DEAD
        return Held.UNKNOWN if self._ledger.damage.blind() else Held.ABSENT

    def inventory(self, after: bytes, limit: int) -> list[Item]:
        """Live copies and tombstones in key order."""
        return [
            Item(key, Held.LIVE, entry.position(), Origin(entry.origin))
            if entry.state == LIVE
            else Item(key, Held.DEAD, Position(entry.mark.segment, entry.mark.offset), Origin.DELIVERY)
            for key, entry in self._ledger.keys.inventory(after, limit)
        ]

    def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        """Records of checkpoints in the order of their names and numbers; those that cannot be read are left out."""
        names = self._ledger.keys.names(rec.CHECKPOINT, after, limit)
        return [record for name, entry in names if (record := self._checkpoint(name, entry)) is not None]

    def checkpoints_page(self, after: bytes, limit: int, skip: int) -> tuple[list[tuple[bytes, int, bytes]], int]:
        """A part of the same; see the contract."""
        names = self._ledger.keys.names(rec.CHECKPOINT, after, limit)
        found: list[tuple[bytes, int, bytes]] = []
        octets = 0
        for number, (name, entry) in enumerate(names[skip:], skip):
            octets += entry.mark.room
            if found and octets > limits.NODE_PAGE_OCTETS:
                return found, number
            record = self._checkpoint(name, entry)
            if record is not None:
                found.append(record)
        return found, 0

    def _checkpoint(self, name: Name, entry: Entry) -> tuple[bytes, int, bytes] | None:
        if entry.mark == NOWHERE:
            return None
        try:
            record = self._segments.read(entry.mark)
        except (CopyDamaged, OSError):
            return None  # another node has it; rebuild takes the best of all
        if (record.key, record.type, record.number) != (name.key, rec.CHECKPOINT, name.position.segment):
            return None
        return record.key, record.number, rec.body_of(record, self._segments.version(entry.mark.segment))


def _octets_of(chunk: rec.Record) -> int:
    """How much a chunk holds, uncompressed. Raises BadFrame."""
    return frame_octets(chunk.body) if chunk.flags & rec.FLAG_COMPRESSED else len(chunk.body)


def _together(entry: Entry | None) -> tuple[Place, ...]:
    """The places of a small live message, the commit's last, if they lie one behind the other; else ()."""
    if entry is None or entry.state != LIVE:
        return ()
    places = (*entry.chunks, entry.mark)
    segment, start, _ = places[0]
    end = start
    for place in places:
        if place[0] != segment or place[1] != end:
            return ()
        end += place[2]
    return places if end - start <= limits.READ_SMALL_OCTETS_MAX else ()


def _stretches(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    """Rows in the order of the log, by what is read at once."""
    first, end = 0, START
    begin = 0
    for number, (places, _) in enumerate(rows):
        segment, start, _ = places[0]
        after = places[-1].offset + places[-1].room
        near = segment == end.segment and start - end.offset <= _GAP_OCTETS and after - begin <= limits.READ_STRETCH_OCTETS_MAX
        if not near:
            if number:
                yield rows[first:number]
            first, begin = number, start
        end = Position(segment, after)
    if rows:
        yield rows[first:]


def _are(records: Sequence[rec.Record], key: bytes) -> bool:
    """True if these are the chunks and the commit of a message."""
    last = len(records) - 1
    return all(
        record.key == key and record.number == number and record.type == (rec.CHUNK if number < last else rec.COMMIT)
        for number, record in enumerate(records)
    )
