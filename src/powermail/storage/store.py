"""Owns one node's log and its laws: what is durable, what is visible, what recovery believes. No asyncio here.

Laws
  1. A result of `write` is success only after fdatasync of every segment the operation touched.
  2. After a failed write or fsync nothing more is acknowledged (P18); only a full disk recovers by itself.
  3. Abort and tombstone are final for a key, wherever in the log they stand.
  4. A commit counts when all its chunks are there; behind damage, reading goes on (a torn tail is cut, the middle never).
"""

from __future__ import annotations

import errno
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
import zstandard
from msgspec import Struct

from powermail.base import limits
from powermail.base.disk import Disk, Lock
from powermail.base.errors import CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble, OperatorError
from powermail.storage import keyindex as ki
from powermail.storage import record as rec
from powermail.storage.contract import START, Chunk, Position, Scanned, Whole
from powermail.storage.identity import Identity, read_identity, write_identity
from powermail.storage.keyindex import NOWHERE, Entry, KeyIndex, Place
from powermail.storage.segments import OPEN_MAX_DEFAULT, Segments

_RECENT_MAX: Final = 200_000
_SCAN_WINDOW_OCTETS: Final = 4 * limits.MIB
_QUARANTINE_MAX: Final = 1000


class Operation(NamedTuple):
    """One thing to make durable (chunks alone need not be)."""

    kind: int
    key: bytes
    chunks: Sequence[Chunk] = ()
    body: bytes = b""
    number: int = 0


class Recovery(Struct):
    """What opening found."""

    clean: bool = True
    records: int = 0
    torn_octets: int = 0
    damaged: int = 0
    incomplete: int = 0
    rebuilt: bool = False


class _Batch:
    """Records that got their places and wait to be written together."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.buffers: list[bytes] = []
        self.written: list[tuple[rec.Record, Place]] = []
        self.sync = False


class Options(NamedTuple):
    """How a store behaves."""

    segment_octets: int = limits.SEGMENT_OCTETS_DEFAULT
    reserve_octets: int = limits.NODE_RESERVE_OCTETS_DEFAULT
    open_segments: int = OPEN_MAX_DEFAULT


class SegmentStore:
    """A node's directory, opened. All methods but the reading ones belong to one lane."""

    def __init__(
        self,
        disk: Disk,
        path: str,
        identity: Identity,
        lock: Lock,
        make_keys: Callable[[str, bytes], KeyIndex],
        options: Options,
        monotonic: Callable[[], float],
    ) -> None:
        self.identity = identity
        self.recovery = Recovery()
        self.damaged = 0
        self._disk = disk
        self._path = path
        self._lock = lock
        self._options = options
        self._monotonic = monotonic
        self._codec = rec.Codec(bytes.fromhex(identity.salt))
        self._segments = Segments(disk, path, self._codec, options.open_segments)
        self._make_keys = make_keys
        self._keys = self._open_keys()
        self._live: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._number = 0
        self._end = 0
        self._capacity = 0
        self._recent: deque[tuple[Position, bytes, float]] = deque(maxlen=_RECENT_MAX)
        self._opened_at = monotonic()
        self._old_end = START
        self._mark = disk.mark(f"{path}/identity")
        self._seen_at = float("-inf")
        self._dirty = False  # chunks were written that no fsync covers yet
        self._undo: list[tuple[bytes, Entry | None, Entry | None]] | None = None
        self.failed = ""  # why nothing at all is written any more (P18)
        self.full = ""  # why no new mail is written until there is room again

    # -- opening ----------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        disk: Disk,
        path: str,
        cluster: str,
        node: str,
        make_keys: Callable[[str, bytes], KeyIndex],
        options: Options,
        monotonic: Callable[[], float],
    ) -> SegmentStore:
        """Locks, checks and recovers a store. Raises OperatorError with the reason it is refused, or OSError."""
        identity = read_identity(disk, path, cluster, node)
        try:
            lock = disk.lock(f"{path}/lock")
        except BlockingIOError as error:
            raise OperatorError(f"node {node}: another process serves {path}") from error
        try:
            store = cls(disk, path, identity, lock, make_keys, options, monotonic)
            store._recover()
        except BaseException:
            lock.release()
            raise
        return store

    def _open_keys(self) -> KeyIndex:
        path = f"{self._path}/keys.db"
        store = bytes.fromhex(self.identity.store)
        try:
            return self._make_keys(path, store)
        except (sqlite3.DatabaseError, msgspec.DecodeError, ValueError):
            self.recovery.rebuilt = True
            for suffix in ("", "-wal", "-shm"):
                if self._disk.exists(path + suffix):
                    self._disk.unlink(path + suffix)
            return self._make_keys(path, store)

    def _recover(self) -> None:
        numbers = self._segments.numbers()
        start = self._keys.complete_up_to()
        if start.segment and start.segment not in numbers:
            start = Position(min((n for n in numbers if n > start.segment), default=start.segment), 0)
        self._live = self._keys.live_octets()
        open_keys: dict[bytes, None] = dict.fromkeys(self._keys.keys(ki.OPEN, b"", 1 << 30))
        for number in numbers:
            if number < start.segment:
                self._sizes[number] = self._segment_size(number)
                continue
            base = start.offset if number == start.segment else 0
            self._replay(number, base, number == numbers[-1], open_keys)
        for key in open_keys:
            entry = self._keys.get(key)
            if entry is not None and entry.state == ki.OPEN:
                self.recovery.incomplete += entry.mark != NOWHERE
                self._keys.put(key, None, entry)
        self._live = {n: octets for n, octets in self._live.items() if n in self._sizes}
        self._old_end = Position(self._number, self._end)
        self.damaged = self.recovery.damaged
        self.recovery.clean = not (self.recovery.records or self.recovery.torn_octets or self.recovery.rebuilt)

    def _segment_size(self, number: int) -> int:
        file = self._segments.file(number)
        try:
            return file.size()
        finally:
            self._segments.release(number, file)

    def _replay(self, number: int, base: int, last: bool, open_keys: dict[bytes, None]) -> None:
        octets = self._segments.read_all(number, base)
        end = base
        if base == 0:
            try:
                rec.unpack_segment_header(octets)
            except rec.BadRecord as error:
                self._quarantine(number, 0, rec.SEGMENT_HEADER_OCTETS, str(error))
            octets = octets[rec.SEGMENT_HEADER_OCTETS :]
            end = base = rec.SEGMENT_HEADER_OCTETS
        size = base + len(octets)
        for offset, record, room in self._codec.walk(octets, number, base):
            if record is None:
                if last and offset + room >= size:
                    self.recovery.torn_octets += room
                    self._cut(number, offset, size)
                else:
                    self._quarantine(number, offset, room, "no valid record")
                continue
            self.recovery.records += 1
            self._apply(record, Place(number, offset, room))
            if record.type in (rec.CHUNK, rec.COMMIT):
                open_keys[record.key] = None
            end = offset + room
        self._sizes[number] = end
        if last:
            self._number, self._end, self._capacity = number, end, size

    def _cut(self, number: int, offset: int, size: int) -> None:
        """Makes a torn, never acknowledged tail zeros again."""
        file = self._segments.file(number)
        try:
            file.truncate(offset)
            file.allocate(size)
            file.sync()
        finally:
            self._segments.release(number, file)

    def _quarantine(self, number: int, offset: int, octets: int, why: str) -> None:
        self.recovery.damaged += 1
        name = f"{self._path}/quarantine"
        known = self._disk.read_file(name).splitlines() if self._disk.exists(name) else []
        line = msgspec.json.encode({"segment": number, "offset": offset, "octets": octets, "why": why})
        if line not in known and len(known) < _QUARANTINE_MAX:
            self._disk.replace_file(name, b"\n".join([*known, line]) + b"\n")

    # -- applying records --------------------------------------------------------------------------------------

    def _apply(self, record: rec.Record, place: Place) -> None:
        """Brings the key index forward by one record; the same for live appends, recovery and compaction."""
        key = record.key
        if record.type == rec.CHECKPOINT:
            self._apply_checkpoint(record, place)
            return
        entry = self._keys.get(key)
        if record.type in (rec.CHUNK, rec.COMMIT):
            if entry is not None and entry.state not in (ki.OPEN, ki.LIVE):
                self._keys.put(key, entry._replace(chunks=(*entry.chunks, place)), entry)
                return
            chunks = list(entry.chunks) if entry is not None else []
            mark = entry.mark if entry is not None else NOWHERE
            if record.type == rec.CHUNK:
                chunks += [NOWHERE] * (record.number + 1 - len(chunks))
                chunks[record.number] = place
            else:
                chunks += [NOWHERE] * (record.number - len(chunks))
                mark = place
            complete = mark != NOWHERE and NOWHERE not in chunks
            self._replace(key, entry, Entry(ki.LIVE if complete else ki.OPEN, mark, tuple(chunks)))
            return
        state = ki.DELETED if record.type == rec.TOMBSTONE else ki.ABORTED
        if entry is None:
            dead: tuple[Place, ...] = ()
        elif entry.state in (ki.OPEN, ki.LIVE):
            dead = tuple(p for p in (*entry.chunks, entry.mark) if p != NOWHERE)
        else:
            dead = entry.chunks
            if entry.state == ki.FORGOTTEN:
                state = ki.FORGOTTEN
        self._replace(key, entry, Entry(state, place, dead))

    def _apply_checkpoint(self, record: rec.Record, place: Place) -> None:
        name = b"\xff" + record.key
        entry = self._keys.get(name)
        places = list(entry.chunks) if entry is not None and (record.number or record.flags & rec.FLAG_MOVED) else []
        places += [NOWHERE] * (record.number + 1 - len(places))
        places[record.number] = place
        self._replace(name, entry, Entry(ki.CHECKPOINTED, NOWHERE, tuple(places)))

    def _replace(self, key: bytes, before: Entry | None, after: Entry | None) -> None:
        if self._undo is not None:
            self._undo.append((key, before, after))
        for entry, sign in ((before, -1), (after, 1)):
            if entry is None:
                continue
            if entry.state in (ki.LIVE, ki.CHECKPOINTED):
                for place in entry.chunks:
                    self._live[place.segment] = self._live.get(place.segment, 0) + sign * place.room
            if entry.state in (ki.LIVE, ki.DELETED, ki.ABORTED):
                self._live[entry.mark.segment] = self._live.get(entry.mark.segment, 0) + sign * entry.mark.room
        self._keys.put(key, after, before)

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, operations: Sequence[Operation], writable: bool = True) -> list[Exception | None]:
        """Makes a batch durable with one gathered write and one fdatasync; one outcome for each operation.

        With `writable` False only deletes and aborts are taken (full or blocked node).
        """
        outcomes: list[Exception | None] = [None] * len(operations)
        if self.failed:
            return [NodeReadOnly(self.failed)] * len(operations)
        writable = writable and not self.full
        self._undo = []
        batch = _Batch(self._end)
        try:
            self._check_present()
            for number, operation in enumerate(operations):
                if not writable and operation.kind in (rec.CHUNK, rec.COMMIT, rec.CHECKPOINT):
                    outcomes[number] = NodeReadOnly(self.full or "this node takes no new mail")
                    continue
                if operation.kind == rec.COMMIT and self._append_message(operation, batch):
                    continue
                try:
                    records = self._records_of(operation)
                except NodeTrouble as error:
                    outcomes[number] = error
                    continue
                batch.sync = batch.sync or operation.kind != rec.CHUNK
                for record in records:
                    self._append(record, batch)
            self._flush(batch.buffers, batch.start, batch.sync)
        except OSError as error:
            undo, self._undo = self._undo, None
            for key, before, after in reversed(undo):
                self._replace(key, after, before)
            self._end = batch.start
            return self._write_failed(error, operations)
        self._undo = None
        now = self._monotonic()
        for record, place in batch.written:
            if record.type == rec.COMMIT:
                self._recent.append((Position(place.segment, place.offset), record.key, now))
        self._sizes[self._number] = self._end
        return outcomes

    def _append(self, record: rec.Record, batch: _Batch) -> None:
        """Gives a record its place and its octets; writes when a segment or a gathered write is full."""
        room = rec.record_octets(len(record.body))
        if self._end + room > self._capacity:
            self._flush(batch.buffers, batch.start, sync=bool(self._number))
            batch.buffers = []
            self._roll(room)
            batch.start = self._end
        batch.buffers += self._codec.pack(record, self._number, self._end)
        place = Place(self._number, self._end, room)
        self._end += room
        batch.written.append((record, place))
        self._apply(record, place)
        if len(batch.buffers) >= limits.APPEND_BATCH_RECORDS_MAX:
            self._flush(batch.buffers, batch.start, sync=False)
            batch.buffers, batch.start = [], self._end

    def _append_message(self, operation: Operation, batch: _Batch) -> bool:
        """The common case, a whole message that nothing is known of, at once; False: it must go the long way."""
        _, key, chunks, body, count = operation
        records = [rec.Record(rec.CHUNK, chunk.flags, chunk.number, key, chunk.stored) for chunk in chunks]
        if len(records) != count or count > 4 or self._keys.get(key) is not None:
            return False
        records.append(rec.Record(rec.COMMIT, 0, count, key, body))
        end = self._end
        rooms = [rec.record_octets(len(record.body)) for record in records]
        if end + sum(rooms) > self._capacity or [record.number for record in records[:-1]] != list(range(count)):
            return False
        places = []
        for record, room in zip(records, rooms, strict=True):
            batch.buffers += self._codec.pack(record, self._number, end)
            places.append(Place(self._number, end, room))
            end += room
        self._end = end
        batch.sync = True
        batch.written.append((records[-1], places[-1]))
        self._replace(key, None, Entry(ki.LIVE, places[-1], tuple(places[:-1])))
        if len(batch.buffers) >= limits.APPEND_BATCH_RECORDS_MAX:
            self._flush(batch.buffers, batch.start, sync=False)
            batch.buffers, batch.start = [], self._end
        return True

    def _check_present(self) -> None:
        """A directory that was taken away or swapped is noticed (F12, F33).

        What was written in the moment between two looks is as if the directory had been taken away just after it.
        """
        now = self._monotonic()
        if now - self._seen_at < limits.NODE_PRESENCE_CHECK_S:
            return
        self._seen_at = now
        if self._disk.mark(f"{self._path}/identity") != self._mark:
            raise FileNotFoundError(errno.ENOENT, "the directory was replaced")

    def _flush(self, buffers: list[bytes], start: int, sync: bool) -> None:
        if not self._number or not (buffers or sync):
            return
        file = self._segments.file(self._number)
        try:
            if sync and buffers and not self._dirty:
                file.write(start, buffers, durable=True)
                return
            if buffers:
                self._dirty = True
                file.write(start, buffers)
            if sync:
                file.sync()
                self._dirty = False
        finally:
            self._segments.release(self._number, file)

    def _write_failed(self, error: OSError, operations: Sequence[Operation]) -> list[Exception | None]:
        """Nothing of the batch is promised. What may have reached the disk is dealt with by aborts and recovery."""
        text = f"{error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            self.full = f"full: {text}"
            return [NodeReadOnly(self.full)] * len(operations)
        if error.errno == errno.ENOENT:
            self.failed = f"missing: {text}"
        else:
            self.failed = f"failed: {text}"
        return [NodeReadOnly(self.failed)] * len(operations)

    def _roll(self, room: int) -> None:
        number = self._number + 1
        # On a nearly full disk segments are small, so that tombstones still find room in the reserve.
        size = min(self._options.segment_octets, self._disk.free_octets(self._path) // 4)
        size = max(size, rec.SEGMENT_HEADER_OCTETS + room)
        identity = self.identity
        header = rec.pack_segment_header(
            number, bytes.fromhex(identity.cluster), bytes.fromhex(identity.store), bytes.fromhex(identity.salt)
        )
        self._segments.create(number, header, size)
        if self._number:
            self._sizes[self._number] = self._end
        self._number, self._end, self._capacity = number, rec.SEGMENT_HEADER_OCTETS, size
        self._sizes[number] = self._end

    def _records_of(self, operation: Operation) -> list[rec.Record]:
        kind, key, chunks, body, number = operation
        if kind == rec.CHECKPOINT:
            return [rec.Record(kind, 0, number, key, body)]
        entry = self._keys.get(key)
        state = entry.state if entry is not None else ki.OPEN
        if kind in (rec.TOMBSTONE, rec.ABORT):
            if state in (ki.DELETED, ki.FORGOTTEN) or (kind == rec.ABORT and state == ki.ABORTED):
                return []
            return [rec.Record(kind, 0, 0, key, b"")]
        if state in (ki.DELETED, ki.FORGOTTEN, ki.ABORTED):
            raise NodeTrouble("this key was deleted or aborted here")
        if state == ki.LIVE:
            return []
        have = entry.chunks if entry is not None else ()
        present = {n for n, place in enumerate(have) if place != NOWHERE}
        records = [rec.Record(rec.CHUNK, c.flags, c.number, key, c.stored) for c in chunks if c.number not in present]
        if kind == rec.COMMIT:
            present.update(chunk.number for chunk in chunks)
            if len(present) != number:
                raise NodeTrouble(f"commit of {number} chunks, but {len(present)} are here")
            records.append(rec.Record(rec.COMMIT, 0, number, key, body))
        return records

    def due(self) -> bool:
        """True if `settle` has something worth doing."""
        return self._keys.due()

    def settle(self, everything: bool = False) -> bool:
        """Lets the key index catch up a little, never ahead of what is durable. True if more waits. Raises OSError."""
        if self._dirty and not self.failed:
            self._flush([], self._end, sync=True)
        return self._keys.settle(Position(self._number, self._end), self._live, everything)

    # -- space --------------------------------------------------------------------------------------------------

    def free_octets(self) -> int:
        """Room for new mail: free on the file system and in the current segment. Raises OSError."""
        return self._disk.free_octets(self._path) + max(0, self._capacity - self._end)

    def total_octets(self) -> int:
        """Size of the file system. Raises OSError."""
        return self._disk.total_octets(self._path)

    def probe(self) -> None:
        """A real write and fsync beside the log. Raises OSError."""
        self._seen_at = float("-inf")
        self._check_present()
        file = self._disk.open(f"{self._path}/probe", create=True)
        try:
            file.write(0, [b"powermail probe\n"])
            file.sync()
        finally:
            file.close()

    def resume(self) -> None:
        """Forgets that the disk was full. Only for that: a failed fsync stays (P18)."""
        if self.full and self._number:
            self._cut(self._number, self._end, self._end)
            self._capacity = self._end
        self.full = ""

    def log_octets(self) -> int:
        """Octets of the log that hold records."""
        return sum(self._sizes.values())

    def live(self) -> int:
        """Octets of records that still count."""
        return sum(self._live.values())

    def segment_count(self) -> int:
        """How many segments."""
        return len(self._sizes)

    def messages(self) -> int:
        """How many live messages."""
        return self._keys.count()

    def end(self) -> Position:
        """Where the next record goes."""
        return Position(self._number, self._end)

    # -- reading (from any lane) -----------------------------------------------------------------------------

    def _live_entry(self, key: bytes) -> Entry:
        entry = self._keys.find(key)
        if entry is None or entry.state != ki.LIVE:
            raise CopyMissing(f"no message {key.hex()} on node {self.identity.node}")
        return entry

    def read_commit(self, key: bytes) -> bytes:
        """The commit record's body."""
        return self._read(self._live_entry(key).mark, key, rec.COMMIT, None).body

    def read_chunk(self, key: bytes, number: int) -> Chunk:
        """One chunk, also of a stream that is still open."""
        entry = self._keys.find(key)
        if entry is None or entry.state not in (ki.LIVE, ki.OPEN) or number >= len(entry.chunks):
            raise CopyMissing(f"no chunk {number} of {key.hex()} on node {self.identity.node}")
        return _chunk(self._read(entry.chunks[number], key, rec.CHUNK, number))

    def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        """Small messages whose records lie one behind the other, each with one read; see the contract."""
        entries = self._keys.find_many(keys)
        return [self._read_whole(key, entries.get(key)) for key in keys]

    def _read_whole(self, key: bytes, entry: Entry | None) -> Whole | None:
        if entry is None or entry.state != ki.LIVE:
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
        return Whole(records[-1].body, [_chunk(record) for record in records[:-1]])

    def _read(self, place: Place, key: bytes, kind: int, number: int | None) -> rec.Record:
        for attempt in (1, 2):
            try:
                record = self._segments.read(place)
                break
            except FileNotFoundError as error:
                # Compaction may have moved the record between the look-up and the read: look once more.
                entry = self._keys.find(key)
                fresh = None
                if entry is not None and entry.state in (ki.LIVE, ki.OPEN):
                    fresh = entry.mark if number is None else entry.chunks[number]
                if attempt == 2 or fresh is None or fresh == place:
                    raise CopyDamaged(f"a segment of {key.hex()} is gone") from error
                place = fresh
        if record.key != key or record.type != kind or (number is not None and record.number != number):
            raise CopyDamaged(f"another record stands where {key.hex()} should")
        return record

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Which are live here."""
        entries = self._keys.find_many(keys)
        return [(entry := entries.get(key)) is not None and entry.state == ki.LIVE for key in keys]

    def deleted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which have a tombstone here."""
        entries = self._keys.find_many(keys)
        return [(entry := entries.get(key)) is not None and entry.state in (ki.DELETED, ki.FORGOTTEN) for key in keys]

    def verify(self, key: bytes) -> None:
        """Checks every record of a copy."""
        entry = self._live_entry(key)
        self._read(entry.mark, key, rec.COMMIT, None)
        for number, place in enumerate(entry.chunks):
            self._read(place, key, rec.CHUNK, number)

    def discard(self, key: bytes) -> None:
        """Forgets a copy that fails its check; its records stay where they are and count no more."""
        try:
            self.verify(key)
        except (CopyDamaged, OSError):
            self._replace(key, self._keys.get(key), None)
        except CopyMissing:
            pass

    def live_keys(self, after: bytes, limit: int) -> list[bytes]:
        """Keys of live messages in order."""
        return [k for k in self._keys.keys(ki.LIVE, after, limit) if len(k) == 16]

    def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        """Checkpoint records in order."""
        found = []
        for name in self._keys.keys(ki.CHECKPOINTED, b"\xff" + after, limit):
            entry = self._keys.find(name)
            for place in entry.chunks if entry is not None else ():
                if place == NOWHERE:
                    continue
                try:
                    record = self._segments.read(place)
                except (CopyDamaged, OSError):
                    continue  # another node has it; rebuild takes the best of all
                found.append((record.key, record.number, record.body))
        return sorted(found, key=lambda item: item[:2])

    def scan(self, after: Position, limit: int, age_s: float, moved: bool) -> tuple[list[Scanned], Position]:
        """Live messages committed behind `after`; see the contract."""
        now = self._monotonic()
        if after >= self._old_end and not moved and (len(self._recent) < _RECENT_MAX or after >= self._recent[0][0]):
            return self._scan_recent(after, limit, now - age_s)
        if now - self._opened_at < age_s:
            return [], after
        return self._scan_log(after, limit, moved)

    def _scan_recent(self, after: Position, limit: int, before: float) -> tuple[list[Scanned], Position]:
        found: list[Scanned] = []
        position = after
        for place, key, at in list(self._recent):
            if place < after:
                continue
            if at > before or len(found) >= limit:
                break
            position = Position(place.segment, place.offset + 1)
            if self.has([key])[0]:
                found.append(Scanned(key, place))
        return found, position

    def _scan_log(self, after: Position, limit: int, moved: bool) -> tuple[list[Scanned], Position]:
        found: list[Scanned] = []
        stop = Position(self._number, self._end) if moved else self._old_end
        if not moved and after >= self._old_end and self._recent:
            stop = self._recent[0][0]
        for number in sorted(self._sizes):
            if number < after.segment:
                continue
            base = after.offset if number == after.segment else 0
            base = max((base + rec.ALIGN - 1) & -rec.ALIGN, rec.SEGMENT_HEADER_OCTETS)
            size = min(self._sizes[number], stop.offset) if number == stop.segment else self._sizes[number]
            while base < size and number <= stop.segment:
                octets = self._window(number, base, size)
                for offset, record, room in self._codec.walk(octets, number, base):
                    if record is None or record.type != rec.COMMIT or (record.flags & rec.FLAG_MOVED and not moved):
                        continue
                    entry = self._keys.find(record.key)
                    if entry is None or entry.state != ki.LIVE or entry.mark != Place(number, offset, room):
                        continue
                    found.append(Scanned(record.key, Position(number, offset)))
                    if len(found) >= limit:
                        return found, Position(number, offset + room)
                base += len(octets)
        return found, max(after, stop)

    def _window(self, number: int, base: int, size: int) -> bytes:
        """Some octets of a segment from `base`, ending at the end of a record."""
        file = self._segments.file(number)
        try:
            want = min(size - base, _SCAN_WINDOW_OCTETS)
            octets = file.read(base, want)
            if base + want >= size:
                return octets
            end = 0
            for offset, record, room in self._codec.walk(octets, number, base):
                if record is not None:
                    end = offset - base + room
            if end:
                return octets[:end]
            return file.read(base, size - base)
        finally:
            self._segments.release(number, file)

    # -- keeping ---------------------------------------------------------------------------------------------------

    def new_incarnation(self, incarnation: str) -> None:
        """Writes a new incarnation into the identity. Raises OSError."""
        self.identity = msgspec.structs.replace(self.identity, incarnation=incarnation)
        write_identity(self._disk, self._path, self.identity)
        self._mark = self._disk.mark(f"{self._path}/identity")

    def forget_tombstones(self, keys: Sequence[bytes]) -> None:
        """Lets compaction drop these tombstones."""
        for key in keys:
            entry = self._keys.get(key)
            if entry is not None and entry.state == ki.DELETED:
                self._replace(key, entry, entry._replace(state=ki.FORGOTTEN))

    def compact(self, below: Position) -> int:
        """Rewrites the deadest sealed segment before `below` if it is worth it; octets freed. Raises OSError."""
        best, best_dead = 0, 0
        for number, size in self._sizes.items():
            if number >= self._number or number >= below.segment:
                continue
            dead = size - rec.SEGMENT_HEADER_OCTETS - self._live.get(number, 0)
            if dead > best_dead and dead >= limits.COMPACT_DEAD_FRACTION * size:
                best, best_dead = number, dead
        if not best or self.failed:
            return 0
        before = self._end + self.log_octets()
        size = self._sizes[best]
        moves: list[rec.Record] = []
        octets = self._segments.read_all(best)[:size]
        base = rec.SEGMENT_HEADER_OCTETS
        for offset, record, room in self._codec.walk(octets[base:], best, base):
            if record is None:
                self._quarantine(best, offset, room, "found by compaction")
                if self._holds_damage(best, offset, room):
                    return 0
                continue
            if self._still_counts(record, Place(best, offset, room)):
                moves.append(record._replace(flags=record.flags | rec.FLAG_MOVED))
        self._move(moves)
        self.settle(everything=True)
        self._segments.remove(best)
        self._sizes.pop(best)
        self._live.pop(best, None)
        return max(0, before - self._end - self.log_octets())

    def _holds_damage(self, segment: int, offset: int, room: int) -> bool:
        """True if a live message has a record in that stretch: it must be repaired before the segment may go."""
        after = b""
        while keys := self._keys.keys(ki.LIVE, after, 1000):
            for key in keys:
                entry = self._keys.get(key)
                for place in (*entry.chunks, entry.mark) if entry is not None else ():
                    if place.segment == segment and offset <= place.offset < offset + room:
                        return True
            after = keys[-1]
        return False

    def _still_counts(self, record: rec.Record, place: Place) -> bool:
        name = b"\xff" + record.key if record.type == rec.CHECKPOINT else record.key
        entry = self._keys.get(name)
        if entry is None:
            return False
        if record.type in (rec.CHUNK, rec.CHECKPOINT):
            return entry.state in (ki.LIVE, ki.OPEN, ki.CHECKPOINTED) and place in entry.chunks
        if entry.mark != place:
            return False
        if entry.state in (ki.LIVE, ki.DELETED):
            return True
        remains = any(p.segment in self._sizes and p.segment != place.segment for p in entry.chunks)
        if not remains:
            self._replace(record.key, entry, None)
        return remains

    def _move(self, moves: list[rec.Record]) -> None:
        batch = _Batch(self._end)
        for record in moves:
            self._append(record, batch)
        self._flush(batch.buffers, batch.start, sync=True)
        self._sizes[self._number] = self._end

    def close(self) -> None:
        """Settles, closes and unlocks."""
        try:
            if not self.failed.startswith("missing"):
                self.settle(everything=True)
        finally:
            self._keys.close()
            self._segments.close()
            self._lock.release()


def _chunk(record: rec.Record) -> Chunk:
    flags = record.flags & rec.FLAG_COMPRESSED
    octets = zstandard.frame_content_size(record.body) if flags else len(record.body)
    return Chunk(record.number, flags, record.body, octets)
