"""Owns which files a database of SQLite is: the file, its log (-wal), the table of that (-shm), and a journal (-journal).

What lies beside a file is played into it by whoever opens it next. So they are renamed together, and a file that gets a name is
the only one of that name.

Danger: a log that is left behind by a file that went, or was replaced, changes the next file of that name without a word. The
file goes first, so that nobody opens it without its log; who is killed between leaves a log alone, which goes in the next run.
"""

from __future__ import annotations

from powermail.base.clock import Clock, utc
from powermail.base.disk import Disk
from powermail.base.errors import OperatorError

SUFFIXES = ("", "-wal", "-shm", "-journal")


def present(disk: Disk, path: str) -> list[str]:
    """The paths of what lies under the name, the file itself first."""
    return [path + suffix for suffix in SUFFIXES if disk.exists(path + suffix)]


def name_aside(disk: Disk, path: str, why: str, clock: Clock) -> str:
    """A name that nothing has, for what is to be set aside: also for the second of a second, or after a clock was set back."""
    aside = f"{path}.{why}-{utc(clock.now()):%Y%m%d-%H%M%S}"
    while present(disk, aside):
        aside += "-"
    return aside


def set_aside(disk: Disk, path: str, aside: str) -> bool:
    """Gives all that lies under a name another one; False if there was nothing. Durable at return. Raises OSError."""
    there = present(disk, path)
    for one in there:
        disk.rename(one, aside + one.removeprefix(path))
    if there:
        disk.sync_directory(_directory(path))
    return bool(there)


def remove(disk: Disk, path: str) -> None:
    """Takes away all that lies under a name, the file first. Raises OSError."""
    there = present(disk, path)
    for one in there:
        disk.unlink(one)
    if there:
        disk.sync_directory(_directory(path))


def put_in_place(disk: Disk, made: str, path: str) -> None:
    """A finished file gets its name, under which nothing lies; both are durable at return. Raises OperatorError, OSError."""
    if beside := [one for one in present(disk, made) if one.endswith(("-wal", "-journal"))]:
        raise OperatorError(f"{beside[0]} is there: another program has {made} open; end that, and run this again")
    if there := present(disk, path):
        raise OperatorError(f"{there[0]} exists; move it away first")
    file = disk.open(made)
    try:
        file.sync()
    finally:
        file.close()
    disk.rename(made, path)
    for one in present(disk, made):  # the table of a log that is no more
        disk.unlink(one)
    disk.sync_directory(_directory(path))


def _directory(path: str) -> str:
    return path.rpartition("/")[0] or "."
