"""Owns the segment files of a store: names, headers, open handles, reads of single records."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base.disk import Disk, File
from powermail.base.errors import CopyDamaged
from powermail.base.lane import guard
from powermail.storage import record as rec
from powermail.storage.keyindex import Place

OPEN_MAX_DEFAULT = 256


class Segments:
    """The files below `segments/`. Reads may come from two lanes at once, writes from one."""

    def __init__(self, disk: Disk, path: str, codec: rec.Codec, open_max: int = OPEN_MAX_DEFAULT) -> None:
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
        """All segments on the disk, in order."""
        return sorted(int(n[:-4]) for n in self._disk.list(self._path) if n.endswith(".seg") and n[:-4].isdigit())

    def create(self, number: int, header: bytes, octets: int) -> File:
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
            if self._disk.exists(temporary):
                self._disk.unlink(temporary)
            raise
        with self._guard:
            self._files[number] = file
        return file

    def remove(self, number: int) -> None:
        """Deletes a segment. Raises OSError."""
        with self._guard:
            file = self._files.pop(number, None)
            if file is not None and not self._pinned.get(number):
                file.close()
        self._disk.unlink(self.name(number))
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

    def read(self, place: Place) -> rec.Record:
        """One record, checked. Raises CopyDamaged or OSError."""
        file = self.file(place.segment)
        try:
            octets = file.read(place.offset, place.room)
        finally:
            self.release(place.segment, file)
        try:
            return self._codec.unpack(octets, 0, place.segment, place.offset)
        except rec.BadRecord as error:
            raise CopyDamaged(f"segment {place.segment} offset {place.offset}: {error}") from error

    def read_span(self, number: int, start: int, rooms: Sequence[int]) -> list[rec.Record]:
        """Records that lie one behind the other, checked, with one read. Raises CopyDamaged or OSError."""
        file = self.file(number)
        try:
            octets = file.read(start, sum(rooms))
        finally:
            self.release(number, file)
        records = []
        position = 0
        for room in rooms:
            try:
                records.append(self._codec.unpack(octets, position, number, start + position))
            except rec.BadRecord as error:
                raise CopyDamaged(f"segment {number} offset {start + position}: {error}") from error
            position += room
        return records

    def read_all(self, number: int, start: int = 0) -> bytes:
        """A segment's octets from `start`. Raises OSError."""
        file = self.file(number)
        try:
            return file.read(start, max(0, file.size() - start))
        finally:
            self.release(number, file)

    def close(self) -> None:
        """Closes all files."""
        with self._guard:
            for number, file in self._files.items():
                if not self._pinned.get(number):
                    file.close()
            self._files.clear()
