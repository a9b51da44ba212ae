"""Owns batches: what is asked of a node's log is written with one gathered write and made durable with one fdatasync.

Rules
- A result is success only when its records are durable; the key index learns of them only then (law 1).
- The records of one operation lie in one segment; what was gathered is made durable before the log goes on in a new one, so
  that a segment that cannot be made refuses only what comes behind it.
- After a failed write the log is cut back to its durable end before anything else is written; after a failed fsync nothing
  more is written at all, unless only the disk was full (P18).
- A refusal is definite (`CommitRefused`, law 5) only if nothing was written, and no copy and no tombstone is here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.base.disk import Disk
from powermail.base.errors import CommitRefused, MarkRefused, NodeReadOnly, NodeTrouble, OlderCheckpoint
from powermail.storage.contract import Chunk, Mark, Position
from powermail.storage.identity import Identity
from powermail.storage.log import record as rec
from powermail.storage.log.keys import BROKEN, DEAD, LIVE, NOWHERE, Entry, Name, Place
from powermail.storage.log.ledger import Changes, Ledger
from powermail.storage.log.segments import Segments

# Operations that are no records, beside the types of `record`.
CANCEL: Final = 101  # lets go of a stream
REFUSE: Final = 102  # a commit that is refused; says whether definitely, behind all that was asked before (law 5)
FENCE: Final = 103  # nothing; answers the durable end behind all that was asked before (law 2)

FULL_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SMALL_OCTETS: Final = 16_384
_ANSWERED_BY_THE_END: Final = frozenset({FENCE, rec.MARK, rec.TOMBSTONE, rec.DROP})
_NEW_MAIL: Final = frozenset({rec.CHUNK, rec.COMMIT, rec.CHECKPOINT})
_OF_OLD_MAIL: Final = frozenset({rec.TOMBSTONE, rec.DROP})  # its keys are rarely in memory

Outcome = Position | Exception | None


class Operation(NamedTuple):
    """One thing to make durable (chunks alone need not be).

    COMMIT: `chunks` that are not here yet, `body` of the commit, `number` of chunks in all, `flags` for its origin.
    TOMBSTONE: `body` is the date. DROP: `body` is the position. CHECKPOINT: `key` is the name,
    `body` begins with the rank. MARK: `mark`; the others
    that come with one name it too, and are refused with it (law 10).
    """

    kind: int
    key: bytes = b""
    chunks: Sequence[Chunk] = ()
    body: bytes = b""
    number: int = 0
    flags: int = 0
    mark: Mark | None = None


class Writer:
    """Writes to the log. Belongs to the writing lane, all of it."""

    def __init__(
        self,
        disk: Disk,
        path: str,
        ledger: Ledger,
        segments: Segments,
        codec: rec.Codec,
        identity: Callable[[], Identity],
        segment_octets: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._disk = disk
        self._path = path
        self._ledger = ledger
        self._segments = segments
        self._codec = codec
        self._identity = identity
        self._segment_octets = segment_octets
        self._monotonic = monotonic
        self._present = disk.mark(f"{path}/identity")
        self._seen_at = float("-inf")
        self._dirty = False  # something was written that no fsync covers yet
        self._torn = False  # a write failed: something may stand behind the durable end
        self._doubtful: dict[bytes, None] = {}  # keys of which a record may stand there
        self._buffers: list[bytes] = []
        self._start = 0  # where `_buffers` go
        self._piece = 0  # where what is not durable yet began
        self._changes = Changes(ledger.keys)
        self._accepted: Mark | None = None  # the mark that was judged last, if it was not refused

    # -- batches ----------------------------------------------------------------------------------------------------

    def write(self, operations: Sequence[Operation], writable: bool = True) -> list[Outcome]:
        """Makes a batch durable; one outcome for each operation.

        Positions answer COMMIT (where the copy was first written), and FENCE, MARK, TOMBSTONE and DROP (the durable end). With
        `writable` False no new mail is taken (full or blocked node). Raises one of `BROKEN` when the key index does: all
        outcomes are unknown then.
        """
        ledger = self._ledger
        outcomes: list[Outcome] = [None] * len(operations)
        if not ledger.boot or ledger.failed:
            reason = ledger.failed or ledger.unready
            return [ledger.durable if op.kind == FENCE else self._refusal(op, reason) for op in operations]
        writable = writable and not ledger.full
        gathered = reached = 0  # operations before `gathered` are durable; those before `reached` may have been written
        sync = False
        try:
            self._begin()
            if deleted := [operation.key for operation in operations if operation.kind in _OF_OLD_MAIL]:
                self._changes.look(deleted)
            for number, operation in enumerate(operations):
                reached = number + 1
                kind = operation[0]
                if kind == rec.COMMIT and writable:
                    sync = True
                    position = self._append_small(operation) or self._append_whole(operation)
                    if position is not None:
                        outcomes[number] = position
                        continue
                elif kind != rec.CHUNK:
                    sync = True
                answer, records = self._records_of(operation, writable)
                if records:
                    room = sum(rec.record_octets(len(record.body)) for record in records)
                    if ledger.end + room > ledger.capacity:
                        reached = number
                        self._flush(sync=bool(ledger.number))
                        gathered = number
                        self._roll(room)
                        reached = number + 1
                    position = self._append_all(records)
                    if kind == rec.COMMIT:
                        answer = position
                outcomes[number] = answer
            reached = len(operations)
            self._flush(sync)
        except OSError as error:
            self._failed(error)
            for number in range(gathered, len(operations)):
                if number < reached:
                    outcomes[number] = NodeTrouble(f"this write failed: {error.strerror or error}")
                else:
                    outcomes[number] = self._refusal(operations[number], ledger.failed or ledger.full)
        except BROKEN as error:
            ledger.failed = f"key index: {error}"
            raise
        for number, operation in enumerate(operations):
            if outcomes[number] is None and operation[0] in _ANSWERED_BY_THE_END:
                outcomes[number] = ledger.durable  # laws 2, 12
        return outcomes

    def _begin(self) -> None:
        """Before anything is written: the directory is there, and the log ends where it is durable or known."""
        if self._torn:
            self._mend()
        self._check_present()
        self._buffers = []
        self._start = self._piece = self._ledger.end
        self._changes = Changes(self._ledger.keys)

    def _check_present(self) -> None:
        """A directory that was taken away or swapped is noticed (F12, F33).

        What was written in the moment between two looks is as if the directory had been taken away just after it.
        """
        now = self._monotonic()
        if now - self._seen_at < limits.NODE_PRESENCE_CHECK_S:
            return
        self._seen_at = now
        if self._disk.mark(f"{self._path}/identity") != self._present:
            raise FileNotFoundError(errno.ENOENT, "the directory was replaced")

    def present(self) -> None:
        """Looks at once whether the directory is there. Raises OSError."""
        self._seen_at = float("-inf")
        self._check_present()

    def renamed(self) -> None:
        """The identity was replaced by this process. Raises OSError."""
        self._present = self._disk.mark(f"{self._path}/identity")

    # -- appending --------------------------------------------------------------------------------------------------

    def _append_small(self, operation: Operation) -> Position | None:
        """The common case, a small new message of one chunk, packed as one; None: it must go another way."""
        _, key, chunks, body, count, flags, _ = operation
        if count != 1 or len(chunks) != 1 or flags:
            return None
        chunk = chunks[0]
        stored = len(chunk[2])
        ledger, changes = self._ledger, self._changes
        end = ledger.end
        second = (rec.HEADER_OCTETS + len(body) + 7) & -8
        room = ((rec.HEADER_OCTETS + stored + 7) & -8) + second
        if stored > _SMALL_OCTETS or len(body) > _SMALL_OCTETS or chunk[0] or end + room > ledger.capacity:
            return None
        if key in changes.fresh or key in changes.after or ledger.keys.get(key) is not None:
            return None
        number = ledger.number
        buffer, first = self._codec.pack_small(number, end, key, chunk, body, flags)
        commit = end + first
        place = Place(number, commit, second)
        self._buffers.append(buffer)
        changes.fresh[key] = Entry(LIVE, place, (Place(number, end, first),))
        changes.fresh_octets += room
        changes.last = place
        ledger.end = end + room
        if len(self._buffers) >= limits.APPEND_BATCH_RECORDS_MAX:
            self._write_out()
        return Position(number, commit)

    def _append_whole(self, operation: Operation) -> Position | None:
        """A new message of a few chunks that are all here; None: it must go the long way."""
        _, key, chunks, body, count, flags, _ = operation
        if len(chunks) != count or count > 4 or flags or [chunk.number for chunk in chunks] != list(range(count)):
            return None
        if key in self._changes.after or self._changes.get(key) is not None:
            return None
        records = [rec.Record(rec.CHUNK, chunk.flags, chunk.number, key, chunk.stored) for chunk in chunks]
        records.append(rec.Record(rec.COMMIT, 0, count, key, body))
        rooms = [rec.record_octets(len(record.body)) for record in records]
        ledger = self._ledger
        end, number = ledger.end, ledger.number
        if end + sum(rooms) > ledger.capacity:
            return None
        places = []
        for record, room in zip(records, rooms, strict=True):
            self._buffers += self._codec.pack(record, number, end)
            places.append(Place(number, end, room))
            end += room
        ledger.end = end
        mark = places.pop()
        self._changes.fresh[key] = Entry(LIVE, mark, tuple(places))
        self._changes.fresh_octets += sum(rooms)
        self._changes.last = mark
        if len(self._buffers) >= limits.APPEND_BATCH_RECORDS_MAX:
            self._write_out()
        return Position(number, mark.offset)

    def _append_all(self, records: Sequence[rec.Record]) -> Position:
        """Gives records their places, one behind the other; where the last one lies. The segment has room for them."""
        ledger = self._ledger
        place = NOWHERE
        for record in records:
            place = Place(ledger.number, ledger.end, rec.record_octets(len(record.body)))
            ledger.apply(record, place, rec.SEGMENT_FORMAT, self._changes)
            self._buffers += self._codec.pack(record, place.segment, place.offset)
            ledger.end += place.room
            if len(self._buffers) >= limits.APPEND_BATCH_RECORDS_MAX:
                self._write_out()
        return Position(place.segment, place.offset)

    # -- operations -------------------------------------------------------------------------------------------------

    def _records_of(self, operation: Operation, writable: bool) -> tuple[Outcome, list[rec.Record]]:
        """What an operation answers if nothing fails, and the records it needs."""
        kind, key, _, body, number, _, mark = operation
        if kind == rec.COMMIT:
            return self._commit(operation, writable)
        if kind in _NEW_MAIL and not writable:
            return NodeReadOnly(self._ledger.full or "this node takes no new mail"), []
        if kind == rec.CHUNK:
            return self._chunks(operation)
        if mark is not None and (why := self.refusal(mark)):
            return MarkRefused(why), []
        if kind == rec.CHECKPOINT:
            return self._checkpoint(rec.Record(kind, 0, number, key, body))
        if kind == rec.MARK:
            assert mark is not None
            return None, self.news(mark)
        if kind == REFUSE:
            return self._refusal(operation, body.decode()), []
        entry = self._changes.get(key) if kind != FENCE else None
        if kind == rec.TOMBSTONE:
            self._ledger.streams.pop(key, None)
            dead = entry is not None and entry.state == DEAD
            return None, [] if dead else [rec.Record(kind, 0, 0, key, body)]
        if kind == rec.DROP:
            here = entry is not None and entry.state == LIVE and entry.position() == rec.unpack_position(body)
            # A copy that cannot be read now may come back when its stretch reads well again.
            return None, [rec.Record(kind, 0, 0, key, body)] if here or self._ledger.damage.blind() else []
        if kind == CANCEL and entry is not None and entry.state not in (LIVE, DEAD) and entry.mark == NOWHERE:
            self._ledger.streams.pop(key, None)
            self._changes.put(key, None)
        return None, []

    def news(self, mark: Mark) -> list[rec.Record]:
        """The record that remembers a mark, if it says anything that is not remembered yet (law 10)."""
        known = self._changes.mark or self._ledger.mark
        merged = known.with_seen(mark)
        return [] if merged == known else [rec.Record(rec.MARK, 0, 0, rec.NO_KEY, rec.pack_mark(merged))]

    def refusal(self, mark: Mark) -> str:
        """Why what comes with a mark is refused; "" if it is not (law 10)."""
        if mark is self._accepted:  # operations of one call name the same, and no other comes between
            return ""
        why = (self._changes.mark or self._ledger.mark).refusal(mark)
        self._accepted = None if why else mark
        return why

    def _checkpoint(self, record: rec.Record) -> tuple[Outcome, list[rec.Record]]:
        """Law 11: what is newer stays, whoever wakes late."""
        known = self._changes.get(Name(rec.CHECKPOINT, record.key))
        if known is not None and known.rank > rec.rank_of(record, rec.SEGMENT_FORMAT):
            return OlderCheckpoint("a newer checkpoint is here"), []
        return None, [record]

    def _chunks(self, operation: Operation) -> tuple[Outcome, list[rec.Record]]:
        key = operation.key
        entry = self._changes.get(key)
        if entry is not None and entry.state == DEAD:
            return NodeTrouble("this key was deleted here"), []
        if entry is not None and entry.state == LIVE and key not in self._ledger.streams:
            return None, []
        self._ledger.streams[key] = self._monotonic()
        return None, _missing(entry, operation)

    def _commit(self, operation: Operation, writable: bool) -> tuple[Outcome, list[rec.Record]]:
        key = operation.key
        entry = self._changes.get(key)
        # Over a copy that lost a chunk all is written anew, the commit too, although the last chunk completes the old one.
        if entry is not None and entry.state == LIVE and key not in self._ledger.streams:
            return entry.position(), []  # idempotent: durable here, or with this batch (law 1)
        if not writable:
            return self._refusal(operation, self._ledger.full or "this node takes no new mail"), []
        if entry is not None and entry.state == DEAD:
            return NodeTrouble("this key was deleted here"), []  # law 1
        present = {n for n in range(operation.number) if _is_here(entry, n)} | self._ledger.strays.get(key, {}).keys()
        present.update(chunk.number for chunk in operation.chunks)
        if not present >= set(range(operation.number)):
            return self._refusal(operation, f"commit of {operation.number} chunks, but {len(present)} are here"), []  # law 2
        self._ledger.streams.pop(key, None)
        records = _missing(entry, operation)
        records.append(rec.Record(rec.COMMIT, operation.flags, operation.number, key, operation.body))
        return None, records

    def _refusal(self, operation: Operation, reason: str) -> NodeTrouble:
        """How an operation of which nothing was written is refused (law 5)."""
        if operation.kind not in (rec.COMMIT, REFUSE):
            return NodeReadOnly(reason)
        key = operation.key
        entry = self._changes.get(key)
        here = entry is not None and (entry.state in (LIVE, DEAD) or entry.mark != NOWHERE)
        if here or key in self._doubtful or self._ledger.damage.blind():
            return NodeTrouble(f"{reason}; but something is known of this key")
        return CommitRefused(reason)

    # -- the disk ---------------------------------------------------------------------------------------------------

    def _write_out(self) -> None:
        """A gathered write is full; what it holds counts only behind the next flush. Raises OSError."""
        if self._buffers:
            self._dirty = True
            self._segments.write(self._ledger.number, self._start, self._buffers, durable=False)
        self._buffers, self._start = [], self._ledger.end

    def _flush(self, sync: bool) -> None:
        """Writes what was gathered, makes it durable if asked to, and then known. Raises OSError."""
        ledger = self._ledger
        if sync and ledger.number:
            if self._buffers and not self._dirty:
                self._dirty = True  # if it fails
                self._segments.write(ledger.number, self._start, self._buffers, durable=True)
            else:
                self._write_out()
                if self._dirty:
                    self._segments.sync(ledger.number)
            self._dirty = False
        else:
            self._write_out()
        changes, start = self._changes, self._piece
        self._buffers, self._changes = [], Changes(ledger.keys)
        self._start = self._piece = ledger.end
        ledger.accept(changes)
        if ledger.number and not self._dirty:
            ledger.show(changes, start, self._monotonic())

    def _roll(self, room: int) -> None:
        """Begins a new segment; all before it is durable. Raises OSError."""
        ledger = self._ledger
        number = max(ledger.number, *ledger.sizes, 0) + 1
        # On a nearly full disk segments are small, so that tombstones still find room in the reserve.
        size = min(self._segment_octets, self._disk.free_octets(self._path) // 4)
        size = max(size, rec.SEGMENT_HEADER_OCTETS + room)
        identity = self._identity()
        header = rec.pack_segment_header(
            number, bytes.fromhex(identity.cluster), bytes.fromhex(identity.store), bytes.fromhex(identity.salt)
        )
        self._segments.create(number, header, size)
        ledger.number, ledger.end, ledger.capacity = number, rec.SEGMENT_HEADER_OCTETS, size
        ledger.sizes[number] = ledger.end
        ledger.durable = Position(number, ledger.end)
        self._start = self._piece = ledger.end

    def _failed(self, error: OSError) -> None:
        """Nothing that was gathered is promised, and none of it may be refused for good until the log was cut back."""
        if self._dirty:
            self._torn = True
            self._doubtful.update(dict.fromkeys(self._changes.touched()))
        self._ledger.end = self._piece
        self._changes = Changes(self._ledger.keys)
        self._buffers = []
        self.broke(error)

    def broke(self, error: OSError) -> None:
        """The disk failed: nothing more is written, or (when it is only full) no new mail."""
        ledger = self._ledger
        text = f"{error.strerror or error}"
        if error.errno in FULL_ERRORS:
            ledger.full = f"full: {text}"
        elif error.errno == errno.ENOENT:
            ledger.failed = f"missing: {text}"
        else:
            ledger.failed = f"failed: {text}"

    def _mend(self) -> None:
        """Cuts the log back to its durable end. Raises OSError; then it is tried again before the next write."""
        ledger = self._ledger
        end = ledger.durable.offset
        if ledger.number:
            self._segments.cut(ledger.number, end, end)
        ledger.end = ledger.capacity = end  # the room behind it may not be there any more: the next write begins a segment
        if ledger.number:
            ledger.sizes[ledger.number] = end
        for key in list(ledger.streams):
            entry = ledger.keys.get(key)
            lost = entry is not None and any(
                place.segment == ledger.number and place.offset >= end for place in (*entry.chunks, entry.mark)
            )
            if lost:
                ledger.forget(key)
                del ledger.streams[key]
        self._doubtful = {}
        self._torn = self._dirty = False

    # -- single steps -----------------------------------------------------------------------------------------------

    def append(self, records: Sequence[rec.Record]) -> None:
        """Makes records durable, whoever asks; each in its own place. Raises OSError, after which the log is as before."""
        ledger = self._ledger
        try:
            self._begin()
            for record in records:
                room = rec.record_octets(len(record.body))
                if ledger.end + room > ledger.capacity:
                    self._flush(sync=bool(ledger.number))
                    self._roll(room)
                self._append_all([record])
            self._flush(sync=True)
        except OSError as error:
            self._failed(error)
            raise

    def seal(self) -> None:
        """The next write begins a new segment."""
        self._ledger.capacity = self._ledger.end

    def resume(self) -> None:
        """Forgets that the disk was full. Only for that: a failed fsync stays (P18). Raises OSError."""
        if self._torn and not self._ledger.failed:
            self._mend()
        self._ledger.full = ""

    def settle(self, everything: bool = False) -> bool:
        """Lets the key index catch up a little, never ahead of what is durable. True if more waits. Raises OSError."""
        ledger = self._ledger
        if ledger.failed or self._torn or not ledger.number:
            return False
        try:
            if self._dirty:
                self._begin()
                self._flush(sync=True)
            return ledger.keys.settle(ledger.facts(), everything)
        except OSError as error:
            self._failed(error)
            raise


def _missing(entry: Entry | None, operation: Operation) -> list[rec.Record]:
    """Records of the chunks that are not here yet."""
    return [
        rec.Record(rec.CHUNK, chunk.flags, chunk.number, operation.key, chunk.stored)
        for chunk in operation.chunks
        if not _is_here(entry, chunk.number)
    ]


def _is_here(entry: Entry | None, number: int) -> bool:
    """True if a chunk came for the commit that comes. Those before a commit of this key belong to that one (`ledger`)."""
    if entry is None or number >= len(entry.chunks):
        return False
    place = entry.chunks[number]
    return place != NOWHERE and place[:2] > entry.mark[:2]
