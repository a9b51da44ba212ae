"""Owns disks that are sick where a test says so: errors, and calls that hang in their thread until they are let go.

The key index of a node is an SQLite file that does not go through here; tests that need it sick too change the file itself, or
put the node on a file system of its own (`mounted`), which can be full or frozen as a whole.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from powermail.base.disk import File, Lock, SystemDisk

READS = ("read",)
WRITES = ("write", "sync", "allocate", "truncate", "replace_file", "sync_directory", "unlink", "rename", "create")
ALL = ()  # every call
THAW_AFTER_S = 90  # a frozen file system is thawed by then, whatever became of the test


class Fault(NamedTuple):
    """What befalls calls below a path: `calls` by name, all if there are none.

    They raise `error`, or take `seconds` longer, or else hang until `over`.
    """

    path: str
    calls: tuple[str, ...]
    over: threading.Event
    error: int = 0
    seconds: float = 0.0


class SickDisk(SystemDisk):
    """The machine's file systems, with faults. A call that hung goes on, and may succeed, when the fault is over."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def fail(self, path: Path, error: int, calls: tuple[str, ...] = ALL) -> Fault:
        """From now on these calls below `path` raise OSError(error)."""
        return self._add(Fault(str(path), calls, threading.Event(), error=error))

    def slow(self, path: Path, seconds: float, calls: tuple[str, ...] = ALL) -> Fault:
        """From now on these calls below `path` take so much longer."""
        return self._add(Fault(str(path), calls, threading.Event(), seconds=seconds))

    def hang(self, path: Path, calls: tuple[str, ...] = ALL) -> Fault:
        """From now on these calls below `path` do not return."""
        return self._add(Fault(str(path), calls, threading.Event()))

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def end(self, fault: Fault) -> None:
        """The disk is well again in this respect."""
        if fault in self._faults:
            self._faults.remove(fault)
        fault.over.set()

    def end_all(self) -> None:
        """The disk is well again."""
        for fault in list(self._faults):
            self.end(fault)

    def meet(self, path: str, call: str) -> None:
        """What a call on a path meets now. Raises OSError."""
        for fault in list(self._faults):
            if f"{path}/".startswith(f"{fault.path}/") and (not fault.calls or call in fault.calls):
                if fault.error:
                    raise OSError(fault.error, os.strerror(fault.error), path)
                if fault.seconds:
                    time.sleep(fault.seconds)
                else:
                    fault.over.wait()

    # -- the calls ------------------------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        self.meet(path, "make_directory")
        super().make_directory(path)

    def list(self, path: str) -> list[str]:
        self.meet(path, "list")
        return super().list(path)

    def exists(self, path: str) -> bool:
        self.meet(path, "exists")
        return super().exists(path)

    def mark(self, path: str) -> tuple[int, int]:
        self.meet(path, "mark")
        return super().mark(path)

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> File:
        self.meet(path, "create" if create or exclusive else "open")
        return SickFile(super().open(path, create, exclusive), path, self)

    def read_file(self, path: str) -> bytes:
        self.meet(path, "read_file")
        return super().read_file(path)

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        self.meet(path, "replace_file")
        super().replace_file(path, octets, mode)

    def rename(self, old: str, new: str) -> None:
        self.meet(old, "rename")
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        self.meet(path, "unlink")
        super().unlink(path)

    def sync_directory(self, path: str) -> None:
        self.meet(path, "sync_directory")
        super().sync_directory(path)

    def free_octets(self, path: str) -> int:
        self.meet(path, "free_octets")
        return super().free_octets(path)

    def total_octets(self, path: str) -> int:
        self.meet(path, "total_octets")
        return super().total_octets(path)

    def lock(self, path: str) -> Lock:
        self.meet(path, "lock")
        return super().lock(path)


class SickFile:
    """A file on such a disk."""

    def __init__(self, file: File, path: str, disk: SickDisk) -> None:
        self._file = file
        self._path = path
        self._disk = disk

    def write(self, offset: int, buffers: Sequence[bytes | memoryview], durable: bool = False) -> None:
        self._disk.meet(self._path, "write")
        self._file.write(offset, buffers, durable)

    def read(self, offset: int, octets: int) -> bytes:
        self._disk.meet(self._path, "read")
        return self._file.read(offset, octets)

    def sync(self) -> None:
        self._disk.meet(self._path, "sync")
        self._file.sync()

    def allocate(self, octets: int) -> None:
        self._disk.meet(self._path, "allocate")
        self._file.allocate(octets)

    def truncate(self, octets: int) -> None:
        self._disk.meet(self._path, "truncate")
        self._file.truncate(octets)

    def size(self) -> int:
        self._disk.meet(self._path, "size")
        return self._file.size()

    def close(self) -> None:
        self._file.close()


# -- file systems of their own -----------------------------------------------------------------------------------------------


def need_mounts() -> None:
    """Skips, and says so, where nothing can be mounted; the same facts are tried by injection beside."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices: a file system of its own was NOT tried")


@contextmanager
def mounted(directory: Path, octets: int) -> Iterator[None]:
    """An ext4 of that size on a directory; what was in it is moved there."""
    image, aside = directory.with_name(f"{directory.name}.image"), directory.with_name(f"{directory.name}.aside")
    with image.open("wb") as file:
        file.truncate(octets)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    directory.rename(aside)
    directory.mkdir()
    subprocess.run(["mount", "-o", "loop,noatime", str(image), str(directory)], check=True)
    try:
        for path in aside.iterdir():
            subprocess.run(["cp", "-a", str(path), str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@contextmanager
def frozen(directory: Path) -> Iterator[None]:
    """Every write below a mount point hangs."""
    words = ["sh", "-c", f"fsfreeze -f '{directory}' && echo frozen && timeout {THAW_AFTER_S} cat; fsfreeze -u '{directory}'"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as thawing:
        assert thawing.stdout is not None and thawing.stdin is not None
        assert thawing.stdout.readline() == b"frozen\n"
        try:
            yield
        finally:
            thawing.stdin.close()


def fill_up(directory: Path) -> Path:
    """Takes all the room of the file system there; the file that holds it."""
    ballast = directory / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError:
                continue
    finally:
        os.close(descriptor)
    return ballast
