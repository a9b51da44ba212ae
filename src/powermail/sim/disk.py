"""Owns a disk in memory that remembers every operation, so that each state a power cut can leave may be built and tried.

Model: a write is durable after `sync` of its file, or by itself if it was a durable write; a name after `sync_directory`.
Everything else may be there or not, in any combination, and the last write may be torn at any sector. Faults: the n-th
operation of a kind can fail with an error, as strace's injection does to a real process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SECTOR_OCTETS = 512
ROOM = 1 << 40  # octets of a disk, and those free on it unless something fills it


class Op(NamedTuple):
    """One operation as it was done. `target` is an inode number, or a path for names."""

    kind: str  # write, size, sync, link, unlink, syncdir
    target: int | str
    offset: int = 0
    data: bytes = b""
    durable: bool = False


class SimFile:
    """An open simulated file."""

    def __init__(self, disk: SimDisk, inode: int) -> None:
        self._disk = disk
        self._inode = inode

    def write(self, offset: int, buffers: Sequence[bytes | memoryview], durable: bool = False) -> None:
        self._disk.fault("write")
        if durable:
            self._disk.fault("sync")
        data = b"".join(buffers)
        content = self._disk.content[self._inode]
        if len(content) < offset + len(data):
            content.extend(bytes(offset + len(data) - len(content)))
        content[offset : offset + len(data)] = data
        self._disk.journal.append(Op("write", self._inode, offset, data, durable and not self._disk.lies))
        self._disk.fault("answer")  # it was written, and the answer says that it was not

    def read(self, offset: int, octets: int) -> bytes:
        self._disk.fault("read")
        return bytes(self._disk.content[self._inode][offset : offset + octets])

    def sync(self) -> None:
        self._disk.fault("sync")
        if not self._disk.lies:
            self._disk.journal.append(Op("sync", self._inode))

    def allocate(self, octets: int) -> None:
        self._disk.fault("allocate")
        content = self._disk.content[self._inode]
        if len(content) < octets:
            content.extend(bytes(octets - len(content)))
            self._disk.journal.append(Op("size", self._inode, octets))

    def truncate(self, octets: int) -> None:
        del self._disk.content[self._inode][octets:]
        self._disk.journal.append(Op("size", self._inode, octets))

    def size(self) -> int:
        return len(self._disk.content[self._inode])

    def close(self) -> None:
        pass


class SimLock:
    """A lock of a simulated process."""

    def __init__(self, disk: SimDisk, path: str) -> None:
        self._disk = disk
        self._path = path

    def release(self) -> None:
        self._disk.locks.pop(self._path, None)


class SimDisk:
    """A tree in memory. Implements `base.disk.Disk`."""

    def __init__(self) -> None:
        self.content: dict[int, bytearray] = {}
        self.names: dict[str, int] = {}
        self.directories: dict[str, int] = {"": 0}
        self.locks: dict[str, None] = {}
        self.journal: list[Op] = []
        self.lies = False  # a drive that says it has synced and has not (F6)
        self.free = ROOM
        self._next = 1
        self._faults: dict[str, list[int]] = {}
        self._errors: dict[str, int] = {}

    # -- faults -------------------------------------------------------------------------------------------------

    def fail(self, kind: str, number: int, error: int = errno.EIO) -> None:
        """The `number`-th next operation of that kind (1 is the next) fails with `error`."""
        self._faults[kind] = [number]
        self._errors[kind] = error

    def fault(self, kind: str) -> None:
        """Counts down; raises the planned OSError."""
        left = self._faults.get(kind)
        if left is None:
            return
        left[0] -= 1
        if left[0] == 0:
            del self._faults[kind]
            raise OSError(self._errors[kind], os.strerror(self._errors[kind]))

    def clear_faults(self) -> None:
        """Nothing fails any more."""
        self._faults.clear()
        self.lies = False

    # -- the Disk contract ----------------------------------------------------------------------------------------

    def make_directory(self, path: str) -> None:
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            self.directories.setdefault("/".join(parts[:end]), self._new())

    def _new(self) -> int:
        self._next += 1
        return self._next

    def list(self, path: str) -> list[str]:
        if path not in self.directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory")
        prefix = f"{path}/"
        found = {name[len(prefix) :].split("/")[0] for name in (*self.names, *self.directories) if name.startswith(prefix)}
        return sorted(found)

    def exists(self, path: str) -> bool:
        return path in self.names or path in self.directories

    def mark(self, path: str) -> tuple[int, int]:
        if path not in self.names and path not in self.directories:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return 1, self.names.get(path, self.directories.get(path, 0))

    def mode(self, path: str) -> int:
        return 0o600

    def open(self, path: str, create: bool = False, exclusive: bool = False) -> SimFile:
        inode = self.names.get(path)
        if inode is not None and exclusive:
            raise FileExistsError(errno.EEXIST, "exists")
        if inode is None:
            if not (create or exclusive):
                raise FileNotFoundError(errno.ENOENT, "no such file")
            self.fault("create")
            inode = self._new()
            self.content[inode] = bytearray()
            self._link(path, inode)
        return SimFile(self, inode)

    def _link(self, path: str, inode: int) -> None:
        self.names[path] = inode
        self.journal.append(Op("link", path, inode))

    def read_file(self, path: str) -> bytes:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        return bytes(self.content[self.names[path]])

    def replace_file(self, path: str, octets: bytes, mode: int = 0o600) -> None:
        if f"{path}.new" in self.names:
            self.unlink(f"{path}.new")
        file = self.open(f"{path}.new", create=True)
        file.write(0, [octets])
        file.sync()
        self.rename(f"{path}.new", path)
        self.sync_directory(path.rpartition("/")[0])

    def rename(self, old: str, new: str) -> None:
        self.fault("rename")
        inode = self.names[old]
        self._link(new, inode)
        del self.names[old]
        self.journal.append(Op("unlink", old))

    def unlink(self, path: str) -> None:
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        del self.names[path]
        self.journal.append(Op("unlink", path))

    def sync_directory(self, path: str) -> None:
        self.fault("sync")
        if not self.lies:
            self.journal.append(Op("syncdir", path))

    def free_octets(self, path: str) -> int:
        return self.free

    def total_octets(self, path: str) -> int:
        return ROOM

    def lock(self, path: str) -> SimLock:
        if path in self.locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self.locks[path] = None
        return SimLock(self, path)

    # -- power cuts -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Takes what is there now as durable and starts a new journal."""
        self.journal.clear()

    def image(self, base: SimDisk, ops: Sequence[Op]) -> SimDisk:
        """A new disk: `base` with these operations done to it."""
        disk = SimDisk()
        disk.content = {inode: bytearray(data) for inode, data in base.content.items()}
        disk.names = dict(base.names)
        disk.directories = dict(self.directories)
        disk._next = self._next
        for op in ops:
            _redo(disk, op)
        disk.names = {path: inode for path, inode in disk.names.items() if inode in disk.content}
        return disk

    def clone(self) -> SimDisk:
        """A copy of what is there now."""
        return self.image(self, [])


def _redo(disk: SimDisk, op: Op) -> None:
    if op.kind == "write":
        assert isinstance(op.target, int)
        content = disk.content.setdefault(op.target, bytearray())
        if len(content) < op.offset + len(op.data):
            content.extend(bytes(op.offset + len(op.data) - len(content)))
        content[op.offset : op.offset + len(op.data)] = op.data
    elif op.kind == "size":
        assert isinstance(op.target, int)
        content = disk.content.setdefault(op.target, bytearray())
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
    elif op.kind == "link":
        disk.names[str(op.target)] = op.offset
        disk.content.setdefault(op.offset, bytearray())
    elif op.kind == "unlink":
        disk.names.pop(str(op.target), None)


def split(journal: Sequence[Op], length: int) -> tuple[list[Op], list[Op]]:
    """(durable, pending) operations of a prefix; pending ones may be there after a cut or not."""
    durable: list[Op] = []
    pending: list[Op] = []
    synced: dict[int | str, None] = {}  # files and directories with a sync behind where we are; from the end to the start
    for op in reversed(journal[:length]):
        if op.kind in ("sync", "syncdir"):
            synced[op.target] = None
        elif op.kind in ("write", "size"):
            (durable if op.durable or op.target in synced else pending).append(op)
        elif op.kind in ("link", "unlink"):
            (durable if str(op.target).rpartition("/")[0] in synced else pending).append(op)
    return durable[::-1], pending[::-1]


def cuts(journal: Sequence[Op], length: int, sector: int = SECTOR_OCTETS) -> Iterator[list[Op]]:
    """The operations a power cut behind `length` operations may leave, in many combinations."""
    durable, pending = split(journal, length)
    order = {id(op): number for number, op in enumerate(journal)}

    def merged(chosen: Sequence[Op]) -> list[Op]:
        return sorted([*durable, *chosen], key=lambda op: order.get(id(op), 1 << 60))

    yield merged([])
    if pending:
        yield merged(pending)
    for number in range(len(pending)):
        yield merged([*pending[:number], *pending[number + 1 :]])
        if len(pending) > 1:
            yield merged([pending[number]])
    # The power fails while the next write is under way: any part of it may have reached the disk.
    under_way = journal[length] if length < len(journal) else None
    if under_way is None or under_way.kind != "write":
        return
    size = len(under_way.data)
    for others in ([], pending) if pending else ([],):
        for end in range(0, size, sector if size >= 64 else 1):
            rest = under_way.data[end:]
            for data in (under_way.data[:end], under_way.data[:end] + bytes(len(rest)), bytes(end) + rest):
                torn = under_way._replace(data=data)
                order[id(torn)] = length
                yield merged([*others, torn])
