"""Owns files: the only room that opens, writes, syncs, renames and locks them.

Rules: data is durable only after `File.sync`; a created or renamed name only after `sync_directory`. The simulated
disk loses everything else in a crash. Calls block: they run in a lane, never on the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Sequence
from typing import Protocol


class File(Protocol):
    """An open file with positioned reads and writes."""

    def write(self, offset: int, buffers: Sequence[bytes | memoryview], durable: bool = False) -> None:
        """Writes all buffers, one behind the other, from `offset`; with `durable`, this write is on disk at return.

        Raises OSError; a failed durable write must be treated like a failed `sync`.
        """

    def read(self, offset: int, octets: int) -> bytes:
        """Reads up to `octets`; short only at the end of the file. Raises OSError."""

    def sync(self) -> None:
        """fdatasync: what was written before is durable when this returns. Raises OSError; never retry it (P18)."""

    def allocate(self, octets: int) -> None:
        """Makes the file at least `octets` long, zero-filled, with its space reserved. Raises OSError."""

    def truncate(self, octets: int) -> None:
        """Cuts the file."""

    def size(self) -> int:
        """Length in octets."""

    def close(self) -> None:
        """Closes; nothing is synced by it."""


class Lock(Protocol):
    """An exclusive lock held by this process until released or until the process dies."""

    def release(self) -> None:
        """Gives the lock back."""


class Disk(Protocol):
    """A tree of directories and files. Paths are `/`-separated strings."""

    def make_directory(self, path: str) -> None:
        """Makes the directory and its parents; fine if it exists."""

    def list(self, path: str) -> list[str]:
        """Names in a directory, sorted. Raises OSError."""

    def exists(self, path: str) -> bool:
        """True if the name exists."""

    def mark(self, path: str) -> tuple[int, int]:
        """(device, inode) of a name: notices a swapped or unmounted directory. Raises OSError."""

    def mode(self, path: str) -> int:
        """Permission bits of a name. Raises OSError."""

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> File:
        """Opens for reading and writing; on a read-only disk for reading: then writes fail. Raises OSError."""

    def read_file(self, path: str) -> bytes:
        """A whole small file. Raises OSError."""

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        """Writes a small file atomically and durably: temporary name, sync, rename, directory sync."""

    def rename(self, old: str, new: str) -> None:
        """Renames; durable after `sync_directory`."""

    def unlink(self, path: str) -> None:
        """Removes a file; durable after `sync_directory`."""

    def sync_directory(self, path: str) -> None:
        """Makes created, renamed and removed names of a directory durable."""

    def free_octets(self, path: str) -> int:
        """Octets an unprivileged writer may still use there."""

    def total_octets(self, path: str) -> int:
        """Size of the file system there."""

    def lock(self, path: str) -> Lock:
        """Takes an exclusive lock on a file. Raises BlockingIOError when another holder lives."""


class SystemFile:
    """A file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, buffers: Sequence[bytes | memoryview], durable: bool = False) -> None:
        total = 0
        for buffer in buffers:
            total += len(buffer)
        # RWF_DSYNC: write and fdatasync of this range in one call.
        try:
            written = os.pwritev(self._descriptor, buffers, offset, os.RWF_DSYNC if durable else 0)
        except OSError:
            if durable:
                self._distrust()
            raise
        if written == total:
            return
        rest = memoryview(b"".join(buffers))[written:]
        while rest:
            count = os.pwrite(self._descriptor, rest, offset + written)
            if count == 0:
                raise OSError(errno.EIO, "write made no progress")
            written += count
            rest = rest[count:]
        if durable:
            self.sync()

    def read(self, offset: int, octets: int) -> bytes:
        part = os.pread(self._descriptor, octets, offset)
        if len(part) == octets or not part:
            return part
        parts = [part]
        got = len(part)
        while got < octets:
            part = os.pread(self._descriptor, octets - got, offset + got)
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self._distrust()
            raise

    def _distrust(self) -> None:
        """After a failed fsync the kernel takes lost pages for clean: what is read next must come from the disk (P18)."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def allocate(self, octets: int) -> None:
        if octets > 0:
            os.posix_fallocate(self._descriptor, 0, octets)

    def truncate(self, octets: int) -> None:
        os.ftruncate(self._descriptor, octets)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        os.close(self._descriptor)


class SystemLock:
    """flock(2) on an open descriptor: the kernel releases it when the process dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Its descriptor: a child that inherits it holds the lock too, for as long as it lives."""
        return self._descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SystemDisk:
    """The machine's file systems."""

    def make_directory(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def list(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def mark(self, path: str) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    def mode(self, path: str) -> int:
        return os.stat(path).st_mode & 0o7777

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC
        if create or exclusive:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        try:
            return SystemFile(os.open(path, flags, 0o600))
        except OSError as error:
            if error.errno != errno.EROFS or create or exclusive:
                raise
            return SystemFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def read_file(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        temporary = f"{path}.new"
        descriptor = _open_alone(temporary, mode)
        try:
            view = memoryview(octets)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.rename(temporary, path)
        finally:
            os.close(descriptor)
        self.sync_directory(os.path.dirname(path))

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_octets(self, path: str) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def total_octets(self, path: str) -> int:
        return shutil.disk_usage(path).total

    def lock(self, path: str) -> Lock:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a lock does not need to write
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return SystemLock(descriptor)


def _open_alone(path: str, mode: int) -> int:
    """A file to be written anew and renamed, which no other process writes meanwhile: several share a data directory."""
    while True:
        # no link is followed: root may write in the directory of another user
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # for as long as another takes to write a small file
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass  # the other has renamed it just now, as below
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
