"""Owns a mailbox's whole state as of one MODSEQ, and how changes bring it forward. Pure: no SQL, no I/O.

A view is what IMAP selects, what is stored in `views` and what goes to the nodes as a checkpoint, in bounded parts. Columns
lie in arrays as narrow as what is in them: 33 octets a message in memory, 16 of them its key, 36 where a mailbox has up to 17
keywords; wider when a number does not fit. Packed 4 to 9, and the 11 that are left of a key.
A change is one STORE, COPY or EXPUNGE, whatever its size.

Rules: arrivals and changes of one tail may be told apart and brought in the one behind the other, because no change names
what came later. What changes nothing is left alone: only messages that really change get the new MODSEQ (RFC 7162 §3.1).
What does not unpack is a ValueError, never a shorter mailbox (P7).

A packed part, before zstd: `PMv1`, UIDVALIDITY (u32), UIDNEXT, MODSEQ (u64), number of the part, parts, rows (u32), then the
columns UIDs, flags, MODSEQs, octets, dates, each as width (u8), first, lowest (i64) and its numbers less the lowest, all
lowest octets first, then the next ones; UIDs, MODSEQs and dates as steps. Then the keys, octet by octet in the same way.
Everything is little endian.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import accumulate, chain, islice
from operator import sub
from typing import NamedTuple

import zstandard

from powermail.base import limits

KEY_OCTETS = 16
_MAGIC = b"PMv1"
_HEAD = struct.Struct("<4sIQQIII")
_COLUMN = struct.Struct("<Bqq")
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FLAGS_IN, _NUMBERS_IN, _DATES_IN = "BHIQ", "IQ", "Iq"  # what a column may lie in, narrowest first
_ARRIVALS = 4096  # taken in at a time
_COLUMNS = 5
_PART_ROWS_MAX = 16 * limits.VIEW_PART_ROWS  # what a reader takes: parts may grow by so much in later versions
_PART_OCTETS_MAX = _HEAD.size + _COLUMNS * _COLUMN.size + _PART_ROWS_MAX * (8 * _COLUMNS + KEY_OCTETS)

Entry = tuple[int, bytes, int, int, int, float]  # UID, key, flags, MODSEQ, octets, date


class Op(IntEnum):
    """What a change does to its UIDs."""

    REPLACE_FLAGS = 1
    ADD_FLAGS = 2
    REMOVE_FLAGS = 3
    EXPUNGE = 4


_FLAGS: dict[Op, Callable[[int, int], int]] = {
    Op.REPLACE_FLAGS: lambda old, new: new,
    Op.ADD_FLAGS: lambda old, new: old | new,
    Op.REMOVE_FLAGS: lambda old, new: old & ~new,
}


def changed_flags(old: int, op: Op, flags: int) -> int:
    """The flags of a message after a change of them. Raises KeyError for EXPUNGE."""
    return _FLAGS[op](old, flags)


class Change(NamedTuple):
    """One row of `changes`. `uids` rise."""

    modseq: int
    op: Op
    flags: int
    uids: tuple[int, ...]


class View:
    """The state of a mailbox. UIDs rise; `modseqs`, `flags`, `octets`, `dates` (seconds) and `keys` go with them by place."""

    def __init__(self, uidvalidity: int, uid_next: int, modseq: int) -> None:
        self.uidvalidity = uidvalidity
        self.uid_next = uid_next
        self.modseq = modseq
        self.uids = array("I")
        self.flags = array(_FLAGS_IN[0])
        self.modseqs = array(_NUMBERS_IN[0])
        self.octets = array(_NUMBERS_IN[0])
        self.dates = array(_DATES_IN[0])
        self.keys = bytearray()  # 16 octets each

    def __len__(self) -> int:
        return len(self.uids)

    def place(self, uid: int) -> int:
        """0-based place of a UID, or -1 if it is not here."""
        place = bisect_left(self.uids, uid)
        return place if place < len(self.uids) and self.uids[place] == uid else -1

    def key(self, place: int) -> bytes:
        """Message key at a place."""
        return bytes(self.keys[place * KEY_OCTETS : (place + 1) * KEY_OCTETS])

    def rows(self) -> Iterator[Entry]:
        """All messages in order of UID, as they are now."""
        for place, (uid, flags, modseq, octets, date) in enumerate(
            zip(self.uids, self.flags, self.modseqs, self.octets, map(float, self.dates), strict=True)
        ):
            yield uid, self.key(place), flags, modseq, octets, date

    def copy(self) -> View:
        """The same state on its own."""
        other = View(self.uidvalidity, self.uid_next, self.modseq)
        other.uids, other.flags, other.modseqs = self.uids[:], self.flags[:], self.modseqs[:]
        other.octets, other.dates, other.keys = self.octets[:], self.dates[:], self.keys[:]
        return other

    # -- going forward -------------------------------------------------------------------------------------------------

    def arrive(self, entries: Iterable[Entry]) -> None:
        """Takes new messages, UIDs rising and above all that were here. Raises ValueError if they are not."""
        entries = iter(entries)
        while part := list(islice(entries, _ARRIVALS)):
            uids, keys, flags, modseqs, octets, dates = zip(*part, strict=True)
            last = self.uids[-1] if self.uids else 0
            for uid, key in zip(uids, keys, strict=True):
                if not last < uid <= limits.UID_MAX or len(key) != KEY_OCTETS:
                    raise ValueError(f"UID {uid} does not follow {last}")
                last = uid
            self._extend(uids, flags, modseqs, octets, list(map(int, dates)))
            self.keys += b"".join(keys)
            self.modseq = max(self.modseq, *modseqs)
            self.uid_next = max(self.uid_next, last + 1)

    def _extend(
        self,
        uids: Sequence[int],
        flags: Sequence[int],
        modseqs: Sequence[int],
        octets: Sequence[int],
        dates: Sequence[int],
    ) -> None:
        self.uids.extend(uids)
        self.flags = _extended(self.flags, flags, _FLAGS_IN)
        self.modseqs = _extended(self.modseqs, modseqs, _NUMBERS_IN)
        self.octets = _extended(self.octets, octets, _NUMBERS_IN)
        self.dates = _extended(self.dates, dates, _DATES_IN)

    def apply(self, change: Change) -> tuple[int, ...]:
        """Makes one change; the UIDs that really changed. UIDs that are not here are passed over."""
        self.modseq = max(self.modseq, change.modseq)
        if change.op is Op.EXPUNGE:
            return self._expunge(change.uids)
        new = _FLAGS[change.op]
        self.flags = _extended(self.flags, (change.flags,), _FLAGS_IN)  # wide enough for what comes
        self.modseqs = _extended(self.modseqs, (change.modseq,), _NUMBERS_IN)
        del self.flags[-1], self.modseqs[-1]
        uids, flags, modseqs, count = self.uids, self.flags, self.modseqs, len(self.uids)
        changed = []
        place = 0
        for uid in change.uids:
            if place >= count or uids[place] != uid:
                place = bisect_left(uids, uid, place)
                if place == count:
                    break
                if uids[place] != uid:
                    continue
            old = flags[place]
            after = new(old, change.flags)
            if after != old:
                flags[place] = after
                modseqs[place] = change.modseq
                changed.append(uid)
            place += 1
        return tuple(changed)

    def follow(self, uid_next: int, modseq: int, entries: Iterable[Entry], changes: Iterable[Change]) -> None:
        """Brings a tail in: what came behind this view, and the numbers the mailbox has now, also those whose message left."""
        self.arrive(entries)
        for change in changes:
            self.apply(change)
        self.uid_next = max(self.uid_next, uid_next)
        self.modseq = max(self.modseq, modseq)

    def _expunge(self, gone: Sequence[int]) -> tuple[int, ...]:
        places = [place for place in map(self.place, gone) if place >= 0]
        if not places:
            return ()
        removed = tuple(self.uids[place] for place in places)
        # What stays lies between the places that go: one slice each is much quicker than one deletion each.
        spans = list(zip(chain((0,), (place + 1 for place in places)), chain(places, (len(self),)), strict=True))
        for name in ("uids", "flags", "modseqs", "octets", "dates"):
            column = getattr(self, name)
            kept = array(column.typecode)
            for start, end in spans:
                kept += column[start:end]
            setattr(self, name, kept)
        keys = memoryview(self.keys)
        self.keys = bytearray().join(keys[start * KEY_OCTETS : end * KEY_OCTETS] for start, end in spans)
        return removed

    # -- packing ---------------------------------------------------------------------------------------------------------

    def pack(self, part_rows: int = limits.VIEW_PART_ROWS) -> list[bytes]:
        """The state as parts of at most `part_rows` messages each; at least one. Raises ValueError for what needs 64 bits."""
        assert 0 < part_rows <= _PART_ROWS_MAX
        parts = max(1, -(-len(self) // part_rows))
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        packed = []
        try:
            for number in range(parts):
                start, end = number * part_rows, min(len(self), (number + 1) * part_rows)
                packed.append(compressor.compress(self._pack_part(number, parts, start, end)))
        except struct.error as error:
            raise ValueError(f"a view that cannot be packed: {error}") from error
        return packed

    def _pack_part(self, number: int, parts: int, start: int, end: int) -> bytes:
        keys = self.keys[start * KEY_OCTETS : end * KEY_OCTETS]
        return b"".join(
            (
                _HEAD.pack(_MAGIC, self.uidvalidity, self.uid_next, self.modseq, number, parts, end - start),
                _pack_column(self.uids[start:end], steps=True),
                _pack_column(self.flags[start:end], steps=False),
                _pack_column(self.modseqs[start:end], steps=True),
                _pack_column(self.octets[start:end], steps=False),
                _pack_column(self.dates[start:end], steps=True),
                *(keys[place::KEY_OCTETS] for place in range(KEY_OCTETS)),
            )
        )

    @classmethod
    def unpack(cls, parts: Sequence[bytes]) -> View:
        """The state that `pack` packed. Raises ValueError if a part is damaged, missing, or of another state."""
        view: View | None = None
        try:
            for number, packed in enumerate(parts):
                octets = _decompressed(packed)
                magic, uidvalidity, uid_next, modseq, mine, count, rows = _HEAD.unpack_from(octets)
                if view is None:
                    view = cls(uidvalidity, uid_next, modseq)
                same = (view.uidvalidity, view.uid_next, view.modseq) == (uidvalidity, uid_next, modseq)
                if not same or magic != _MAGIC or (mine, count) != (number, len(parts)):
                    raise ValueError("parts that do not belong together")
                view._unpack_rows(memoryview(octets)[_HEAD.size :], rows)
        except (zstandard.ZstdError, struct.error, OverflowError) as error:
            raise ValueError(f"a damaged view: {error}") from error
        if view is None:
            raise ValueError("a view without parts")
        view._check()
        return view

    def _unpack_rows(self, octets: memoryview, rows: int) -> None:
        if rows > _PART_ROWS_MAX:
            raise ValueError("a part that is too large")
        uids, octets = _unpack_column(octets, rows, steps=True)
        flags, octets = _unpack_column(octets, rows, steps=False)
        modseqs, octets = _unpack_column(octets, rows, steps=True)
        sizes, octets = _unpack_column(octets, rows, steps=False)
        dates, octets = _unpack_column(octets, rows, steps=True)
        if len(octets) != rows * KEY_OCTETS:
            raise ValueError("a part of the wrong length")
        keys = bytearray(rows * KEY_OCTETS)
        for place in range(KEY_OCTETS):
            keys[place::KEY_OCTETS] = octets[place * rows : (place + 1) * rows]
        self._extend(uids, flags, modseqs, sizes, dates)
        self.keys += keys

    def _check(self) -> None:
        """Raises ValueError if the state cannot be that of a mailbox."""
        if not self.uids:
            return
        if self.uids[0] < 1 or self.uids[-1] >= self.uid_next or min(map(sub, self.uids[1:], self.uids), default=1) < 1:
            raise ValueError("a view whose UIDs do not rise")
        if max(self.modseqs) > self.modseq:
            raise ValueError("a view with messages of a later MODSEQ")


def _extended(column: array[int], numbers: Sequence[int], codes: str) -> array[int]:
    """The column with more numbers behind it, in a wider array if one does not fit. Raises OverflowError if none fits."""
    count = len(column)
    while True:
        try:
            column.extend(numbers)
            return column
        except OverflowError:
            del column[count:]
            wider = codes[codes.index(column.typecode) + 1 :]
            if not wider:
                raise
            column = array(wider[0], column)


def _pack_column(values: Sequence[int], steps: bool) -> bytes:
    """Width, first, lowest, and the numbers (or the steps between them) less the lowest, octets of one weight together."""
    first = values[0] if values else 0
    numbers: Sequence[int] = list(map(sub, islice(values, 1, None), values)) if steps else values
    lowest, highest = min(numbers, default=0), max(numbers, default=0)
    head = _COLUMN.pack(width := _width(highest - lowest), first, lowest)
    if not width:
        return head
    packed = array(_CODES[width], [number - lowest for number in numbers])
    if sys.byteorder == "big":
        packed.byteswap()
    octets = packed.tobytes()
    return head + b"".join(octets[place::width] for place in range(width))


def _width(span: int) -> int:
    """How many octets a number up to `span` takes: 0, 1, 2, 4 or 8."""
    return next(width for width, end in ((0, 1), (1, 1 << 8), (2, 1 << 16), (4, 1 << 32), (8, 1 << 64)) if span < end)


def _unpack_column(octets: memoryview, rows: int, steps: bool) -> tuple[Sequence[int], memoryview]:
    """The numbers of a column, and what lies behind it. Raises ValueError or struct.error."""
    width, first, lowest = _COLUMN.unpack_from(octets)
    octets = octets[_COLUMN.size :]
    count = max(0, rows - 1) if steps else rows
    if not rows:
        return (), octets
    if not width:
        return (
            range(first, first + lowest * rows, lowest) if steps and lowest else [first if steps else lowest] * rows
        ), octets
    if width not in _CODES or len(octets) < count * width:
        raise ValueError("a part of the wrong length")
    mixed = bytearray(count * width)
    for place in range(width):
        mixed[place::width] = octets[place * count : (place + 1) * count]
    packed = array(_CODES[width], bytes(mixed))
    if sys.byteorder == "big":
        packed.byteswap()
    numbers = map(lowest.__add__, packed)
    return list(accumulate(chain((first,), numbers)) if steps else numbers), octets[count * width :]


def _decompressed(packed: bytes) -> bytes:
    """One frame, bounded before anything of it is read. Raises ValueError or ZstdError."""
    octets = zstandard.get_frame_parameters(packed).content_size
    if octets > _PART_OCTETS_MAX:
        raise ValueError("a part that is too large")
    return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)


# -- UIDs of a change ------------------------------------------------------------------------------------------------------


def pack_uids(uids: Sequence[int]) -> bytes:
    """Rising UIDs as runs: how many are left out before it, how many it has less one, each in groups of 7 bits, lowest first.

    Raises ValueError if they do not rise.
    """
    packed = bytearray()
    after = start = end = 0  # the run lies in [start, end); `after` is where the one before it ended
    for uid in uids:
        if start and uid == end:
            end += 1
            continue
        if uid < max(1, end):
            raise ValueError(f"UID {uid} does not follow {end - 1}")
        if start:
            _put_run(packed, start - after, end - start)
            after = end
        start, end = uid, uid + 1
    if end > limits.UID_MAX + 1:
        raise ValueError(f"UID {end - 1} is beyond {limits.UID_MAX}")
    if start:
        _put_run(packed, start - after, end - start)
    return bytes(packed)


def unpack_uids(packed: bytes, count_max: int = limits.CHANGE_UIDS_MAX) -> tuple[int, ...]:
    """The UIDs that `pack_uids` packed. Raises ValueError if they are damaged or more than `count_max`."""
    runs: list[range] = []
    numbers = _numbers(packed)
    count = end = 0
    for gap in numbers:
        length = next(numbers, -1) + 1
        start, end = end + gap, end + gap + length
        count += length
        if not gap or length < 1 or count > count_max or end > limits.UID_MAX + 1:
            raise ValueError("damaged UIDs")
        runs.append(range(start, end))
    return tuple(chain.from_iterable(runs))


def _put_run(packed: bytearray, gap: int, length: int) -> None:
    for number in (gap, length - 1):
        while number > 0x7F:
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)


def _numbers(packed: bytes) -> Iterator[int]:
    number = shift = 0
    for octet in packed:
        number |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            yield number
            number = shift = 0
        elif shift > 35:
            raise ValueError("damaged UIDs")
    if shift:
        raise ValueError("damaged UIDs")
