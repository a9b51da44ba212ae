"""Owns reading copies and names: commit records, chunks, small messages whole, what is held, checkpoints.

Belongs to the reading lane. What is read was found in the key index, so it is durable; each record's checksum is verified.
"""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing
from powermail.storage.contract import START, Chunk, Held, Item, Origin, Position, Whole
from powermail.storage.log import record as rec
from powermail.storage.log.keys import DEAD, LIVE, NOWHERE, OPEN, Entry, Place
from powermail.storage.log.ledger import Ledger
from powermail.storage.log.segments import Segments


class Reader:
    """Reads what the log holds. Raises OSError when the disk does not read, one of `BROKEN` when the key index does not."""

    def __init__(self, ledger: Ledger, segments: Segments, node: str) -> None:
        self._ledger = ledger
        self._segments = segments
        self._node = node

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
        """Small messages whose records lie one behind the other, each with one read; see the contract."""
        entries = self._ledger.keys.find_many(keys)
        return [self._read_whole(key, entries.get(key)) for key in keys]

    def _read_whole(self, key: bytes, entry: Entry | None) -> Whole | None:
        if entry is None or entry.state != LIVE:
            return None
        places = (*entry.chunks, entry.mark)
        segment, start, _ = places[0]
        end = start
        for place in places:
            if place.segment != segment or place.offset != end:
                return None
            end += place.room
        if end - start > limits.READ_SMALL_OCTETS_MAX:
            return None
        try:
            records = self._segments.read_span(segment, start, [place.room for place in places])
        except (CopyDamaged, OSError):
            return None
        for number, record in enumerate(records):
            kind, count = (rec.CHUNK, number) if number < len(entry.chunks) else (rec.COMMIT, len(entry.chunks))
            if record.key != key or record.type != kind or record.number != count:
                return None
        commit = rec.body_of(records[-1], self._segments.version(segment))
        return Whole(commit, [rec.chunk_of(record) for record in records[:-1]])

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
        found = []
        for name, entry in self._ledger.keys.names(rec.CHECKPOINT, after, limit):
            number = name.position.segment
            if entry.mark == NOWHERE:
                continue
            try:
                record = self._segments.read(entry.mark)
            except (CopyDamaged, OSError):
                continue  # another node has it; rebuild takes the best of all
            if (record.key, record.type, record.number) == (name.key, rec.CHECKPOINT, number):
                body = rec.body_of(record, self._segments.version(entry.mark.segment))
                found.append((record.key, record.number, body))
        return found
