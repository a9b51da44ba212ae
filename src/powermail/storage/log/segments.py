"""Owns the segment files of a store: names, headers, open handles, reads of records and of stretches that may be damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.base.disk import Disk, File
from powermail.base.errors import CopyDamaged
from powermail.base.lane import guard
from powermail.storage.log import record as rec
from powermail.storage.log.keys import Place

OPEN_MAX_DEFAULT: Final = 256
WINDOW_OCTETS: Final = 4 * limits.MIB  # read at a time when walking
_WIDE_OCTETS: Final = WINDOW_OCTETS + rec.record_octets(limits.RECORD_BODY_OCTETS_MAX)
_PIECE_OCTETS: Final = (64 * limits.KIB, 4 * limits.KIB)  # what is read at a time around a hole
_HOLES_MAX: Final = 16  # in one window; the rest of it is taken as unreadable, so that a dying disk is not asked for ever


class Found(NamedTuple):
    """What a walk comes by: a record, or (None) a stretch that holds no valid one."""

    offset: int
    record: rec.Record | None
    room: int


class Segments:
    """The files below `segments/`. Reads may come from two lanes at once, writes from one."""

    def __init__(
        self, disk: Disk, path: str, codec: rec.Codec, version: Callable[[int], int], open_max: int = OPEN_MAX_DEFAULT
    ) -> None:
        self.version = version  # format of a segment, by its number
        self._disk = disk
        self._path = f"{path}/segments"
        self._codec = codec
        self._open_max = open_max
        self._files: dict[int, File] = {}
        self._pinned: dict[int, int] = {}
        self._guard = guard()

    def name(self, number: int) -> str:
        """Path of a segment."""
        return f"{self._path}/{number:010d}.seg"

    def numbers(self) -> list[int]:
        """All segments on the disk, in order. Raises OSError."""
        return sorted(int(n[:-4]) for n in self._disk.list(self._path) if n.endswith(".seg") and n[:-4].isdigit())

    # -- files --------------------------------------------------------------------------------------------------

    def create(self, number: int, header: bytes, octets: int) -> None:
        """Makes a new segment with its space reserved; durable when it returns. Raises OSError."""
        temporary = f"{self._path}/new"
        if self._disk.exists(temporary):
            self._disk.unlink(temporary)
        file = self._disk.open(temporary, exclusive=True)
        try:
            file.allocate(octets)
            file.write(0, [header])
            file.sync()
            self._disk.rename(temporary, self.name(number))
            self._disk.sync_directory(self._path)
        except OSError:
            file.close()
            for name in (temporary, self.name(number)):
                if self._disk.exists(name):
                    self._disk.unlink(name)
            raise
        with self._guard:
            self._files[number] = file

    def remove(self, number: int) -> None:
        """Deletes a segment, durably. Raises OSError."""
        with self._guard:
            file = self._files.pop(number, None)
            if file is not None and not self._pinned.get(number):
                file.close()
        self._disk.unlink(self.name(number))
        self._disk.sync_directory(self._path)

    def sync_names(self) -> None:
        """Makes the names of all segments durable. Raises OSError."""
        self._disk.sync_directory(self._path)

    def file(self, number: int) -> File:
        """The open file of a segment; stays valid until `release`. Raises OSError."""
        with self._guard:
            file = self._files.get(number)
            if file is None:
                if len(self._files) >= self._open_max:
                    self._close_some()
                file = self._files[number] = self._disk.open(self.name(number))
            self._pinned[number] = self._pinned.get(number, 0) + 1
            return file

    def release(self, number: int, file: File) -> None:
        """Gives a file back."""
        with self._guard:
            left = self._pinned[number] - 1
            if left:
                self._pinned[number] = left
            else:
                del self._pinned[number]
                if self._files.get(number) is not file:
                    file.close()

    def _close_some(self) -> None:
        for number in list(self._files)[: max(1, self._open_max // 4)]:
            if not self._pinned.get(number):
                self._files.pop(number).close()

    def close(self) -> None:
        """Closes all files; they are opened again when they are asked for (a disk that could not be written to may be now)."""
        with self._guard:
            for number, file in self._files.items():
                if not self._pinned.get(number):
                    file.close()
            self._files.clear()

    # -- changing -----------------------------------------------------------------------------------------------

    def write(self, number: int, offset: int, buffers: Sequence[bytes], durable: bool) -> None:
        """Writes buffers one behind the other. Raises OSError."""
        file = self.file(number)
        try:
            file.write(offset, buffers, durable)
        finally:
            self.release(number, file)

    def sync(self, number: int) -> None:
        """Makes a segment's octets durable. Raises OSError."""
        file = self.file(number)
        try:
            file.sync()
        finally:
            self.release(number, file)

    def cut(self, number: int, offset: int, size: int) -> None:
        """Makes what lies behind `offset` zeros again, durably; the segment keeps `size`. Raises OSError."""
        file = self.file(number)
        try:
            file.truncate(offset)
            if size > offset:
                file.allocate(size)
            file.sync()
        finally:
            self.release(number, file)

    # -- reading ------------------------------------------------------------------------------------------------

    def size(self, number: int) -> int:
        """Length of the file, reserved space included. Raises OSError."""
        file = self.file(number)
        try:
            return file.size()
        finally:
            self.release(number, file)

    def _pread(self, number: int, offset: int, octets: int) -> bytes:
        file = self.file(number)
        try:
            return file.read(offset, octets)
        finally:
            self.release(number, file)

    def readable(self, number: int, offset: int, octets: int) -> bool:
        """True if the disk reads a stretch, whatever stands there."""
        return not self._window(number, offset, octets)[1]

    def check_header(self, number: int) -> None:
        """Raises BadRecord when a segment does not begin as it should, or OSError."""
        found, _, _, _, version = rec.unpack_segment_header(self._pread(number, 0, rec.SEGMENT_HEADER_OCTETS))
        if found != number or version != self.version(number):
            raise rec.BadRecord(f"segment header says {found} of format {version}")

    def read(self, place: Place) -> rec.Record:
        """One record, checked. Raises CopyDamaged or OSError."""
        number, offset, room = place
        try:
            return self._codec.unpack(self._pread(number, offset, room), 0, number, offset)
        except rec.BadRecord as error:
            raise CopyDamaged(f"segment {number} offset {offset}: {error}") from error

    def read_rows(self, rows: Sequence[Sequence[Place]]) -> list[list[rec.Record] | None]:
        """Records that lie close together in one segment, in their order, checked, with one read; None for a row of which one
        is bad. Raises OSError.
        """
        number, start, _ = rows[0][0]
        _, last, room = rows[-1][-1]
        octets = self._pread(number, start, last + room - start)
        unpack = self._codec.unpack
        found: list[list[rec.Record] | None] = []
        for places in rows:
            try:
                found.append([unpack(octets, offset - start, number, offset) for _, offset, _ in places])
            except rec.BadRecord:
                found.append(None)
        return found

    def walk(self, number: int, base: int, end: int, full: bool) -> Iterator[Found]:
        """Walks a segment from `base` (a multiple of 8) to `end`, in bounded memory, around what cannot be read.

        With `full` there are records up to `end`: zeros there are a bad stretch. Without it they are room that was never
        used. Raises OSError only when the file cannot be opened.
        """
        position, want = base, WINDOW_OCTETS
        zeros = -1  # where zeros began that may be unused room, or damage if something follows
        while position < end:
            octets, holes = self._window(number, position, min(want, end - position))
            stop = position + len(octets)
            last = stop >= end or not octets
            consumed = position
            cut = -1
            for offset, record, room in self._codec.walk(octets, number, position):
                if record is None and not last and offset + room >= stop:
                    cut = offset  # perhaps a record that goes on behind the window
                    break
                if zeros >= 0:
                    yield Found(zeros, None, offset - zeros)
                    zeros = -1
                yield Found(offset, record, room)
                consumed = offset + room
            if cut >= 0:
                if cut > position or len(octets) <= WINDOW_OCTETS:
                    position, want = cut, _WIDE_OCTETS
                    continue
                start = zeros if zeros >= 0 else cut
                yield Found(start, None, cut + WINDOW_OCTETS - start)
                zeros, position, want = -1, cut + WINDOW_OCTETS, _WIDE_OCTETS
                continue
            if consumed < stop and zeros < 0:
                zeros = consumed
            if zeros >= 0 and any(hole >= consumed for hole in holes):
                yield Found(zeros, None, (stop if not last else end) - zeros)
                zeros = -1
                if last:
                    return
            position, want = stop, WINDOW_OCTETS
            if last:
                break
        if full and position < end and zeros < 0:
            zeros = position
        if full and zeros >= 0:
            yield Found(zeros, None, end - zeros)

    def _window(self, number: int, base: int, octets: int) -> tuple[bytes, list[int]]:
        """Octets of a segment, and where holes are that could not be read and are filled with zeros."""
        file = self.file(number)
        try:
            try:
                return file.read(base, octets), []
            except OSError:
                holes: list[int] = []
                return _read_around(file, base, octets, _PIECE_OCTETS, holes), holes
        finally:
            self.release(number, file)


def _read_around(file: File, base: int, octets: int, pieces: tuple[int, ...], holes: list[int]) -> bytes:
    parts = []
    for start in range(base, base + octets, pieces[0]):
        length = min(pieces[0], base + octets - start)
        if len(holes) >= _HOLES_MAX:
            parts.append(bytes(length))
            continue
        try:
            part = file.read(start, length)
        except OSError:
            if len(pieces) > 1:
                part = _read_around(file, start, length, pieces[1:], holes)
            else:
                holes.append(start)
                part = bytes(length)
        parts.append(part)
        if len(part) < length:
            break
    return b"".join(parts)
