"""Holds a disk some of whose stretches cannot be read, and whose writes may fail though they are done."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any


class BadFile:
    """An open file in which some stretches cannot be read, and whose next write may fail when it was done."""

    def __init__(self, file: Any, path: str, disk: BadDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, offset: int, buffers: Sequence[bytes | memoryview], durable: bool = False) -> None:
        self._file.write(offset, buffers, durable)
        if self._disk.write_error and "/segments/" in self._path:
            error, self._disk.write_error = self._disk.write_error, 0
            raise OSError(error, "injected: it failed, and yet it is written")

    def read(self, offset: int, octets: int) -> bytes:
        for start, end in self._disk.bad.get(self._path, []):
            if offset < end and start < offset + octets:
                raise OSError(errno.EIO, "injected: this stretch cannot be read")
        return bytes(self._file.read(offset, octets))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class BadDisk:
    """A disk some of whose stretches give EIO. `bad` maps paths to (start, end) of octets.

    `write_error` is what the next write to the log fails with, after its octets were written all the same.
    """

    def __init__(self, disk: Any) -> None:
        self.below = disk
        self.bad: dict[str, list[tuple[int, int]]] = {}
        self.write_error = 0

    def open(self, path: str, *args: Any, **named: Any) -> BadFile:
        return BadFile(self.below.open(path, *args, **named), path, self)

    def read_file(self, path: str) -> bytes:
        if self.bad.get(path):
            raise OSError(errno.EIO, "injected: this file cannot be read")
        return bytes(self.below.read_file(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)
