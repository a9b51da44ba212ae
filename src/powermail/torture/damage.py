"""Owns what is done to the directory of a node: bits flipped in its log, all of it taken away, an older state put back.

It works on files of a torture's own cluster, behind the back of the node; which octets of a segment were written is seen by the
last one that is not zero.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path


def flip(store: Path, count: int, chance: random.Random) -> int:
    """Flips `count` bits of what the log holds, in place; how many there were to flip."""
    used = [(path, len(path.read_bytes().rstrip(b"\0"))) for path in sorted((store / "segments").iterdir())]
    used = [(path, octets) for path, octets in used if octets]
    if not used:
        return 0
    for path, octets in chance.choices(used, [octets for _, octets in used], k=count):
        descriptor = os.open(path, os.O_RDWR)
        try:
            at = chance.randrange(octets)
            (was,) = os.pread(descriptor, 1, at)
            os.pwrite(descriptor, bytes([was ^ (1 << chance.randrange(8))]), at)
        finally:
            os.close(descriptor)
    return count


def empty(store: Path) -> None:
    """As a new disk: the directory is there, nothing in it."""
    for entry in store.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def keep(store: Path, aside: Path) -> None:
    """Copies the state of a stopped node's disk."""
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(store, aside)


def put_back(aside: Path, store: Path) -> None:
    """The disk of a stopped node is the one that was kept."""
    empty(store)
    shutil.copytree(aside, store, dirs_exist_ok=True)
    shutil.rmtree(aside)


def fill(directory: Path) -> Path:
    """Takes all room of a small file system of its own; the file that has it. Raises OSError where the room is large."""
    path = directory / "filler"
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    if free > _FILLED_OCTETS_MAX:
        raise OSError(f"{directory} is on a file system with {free >> 20} MiB free: that is not filled")
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free))
    return path


_FILLED_OCTETS_MAX = 2**30
