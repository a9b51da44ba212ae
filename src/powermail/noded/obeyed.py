"""Owns what the nodes of this machine obey of the cluster's membership: the newest layout, the fence, who was expelled.

The layout is octets and a version here: who makes it reads it. The fence is a version: whoever goes by an older layout is
refused, and gets this one. Versions and the fence only rise, and who was expelled stays so; but for what was said only by
those who are expelled themselves, which is void: a stolen certificate is to do no lasting harm.

It counts from the moment it is told, and is confirmed when it is durable: a machine that starts again refuses what it refused
before. It stands in one file beside the nodes, `obeyed`: a line `powermail-obeyed 1 SHA256` of what follows, which is JSON.

Danger: a file that is damaged is refused, never taken for one that says nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.base.disk import Disk
from powermail.base.errors import NodeTrouble, OperatorError
from powermail.base.world import World

_KIND = b"powermail-obeyed 1 "


class _Written(Struct, frozen=True):
    """What the file holds (P19: fields are only added)."""

    version: int = 0
    fence: int = 0
    layout: bytes = b""
    expelled: tuple[str, ...] = ()
    by: tuple[tuple[str, ...], ...] = ()  # who said so, for each of them; nothing if an older program wrote it


class Obeyed:
    """What is obeyed here. With a path it is durable, without one it lasts as long as the process."""

    def __init__(self, world: World, path: str = "") -> None:
        """Reads the file, if there is one. Blocks. Raises OperatorError."""
        found = _read(world.disk, path) if path else _Written()
        self.version = found.version
        self.fence = found.fence
        self.layout = found.layout
        by = found.by if len(found.by) == len(found.expelled) else ((),) * len(found.expelled)
        self.expelled: dict[str, tuple[str, ...]] = dict(zip(found.expelled, by, strict=True))  # id to some who said so
        self._world = world
        self._path = path
        self._durable = found
        self._writing = asyncio.Lock()

    def take(self, version: int, fence: int, layout: bytes) -> None:
        """A layout, if it is newer, and a fence, if it is higher. Raises OperatorError for another one of the same version."""
        if version == self.version and layout != self.layout:
            raise OperatorError(f"another layout of version {version} is known here: two were made with one number")
        if version > self.version:
            self.version, self.layout = version, layout
        self.fence = max(self.fence, fence)

    def expel(self, ids: Sequence[str], by: str = "", more: bool = False) -> tuple[int, int]:
        """Certificates of these ids admit nobody any more, says `by`; how many are new, and how many are void: what was said
        only by those whom `by` says to be expelled. A stolen certificate expels and fills the list until it is expelled itself.

        With `more` others follow, and what they say again is not void between. Raises OperatorError when there are too many.
        """
        found = dict(self.expelled)
        for name in ids:
            said = found.get(name)
            if said is None:
                found[name] = (by,) if by else ()
            elif by and said and by not in said and len(said) < limits.NODE_EXPELLED_BY_MAX:
                found[name] = (*said, by)
        told, void = len(found) - len(self.expelled), 0
        if not more or len(found) > limits.NODE_EXPELLED_MAX:
            out = {name for name, said in found.items() if by in said}
            kept = {name: said for name, said in found.items() if not said or not out.issuperset(said)}
            found, void = kept, len(found) - len(kept)
        if len(found) > limits.NODE_EXPELLED_MAX:
            raise OperatorError(
                f"{len(found)} ids would be expelled here, and {limits.NODE_EXPELLED_MAX} may be: make a new authority"
            )
        self.expelled = found
        return told, void

    async def keep(self) -> None:
        """Returns when all that is obeyed now is durable. Raises NodeTrouble: then a restart may forget it."""
        async with self._writing:
            now = _Written(self.version, self.fence, self.layout, tuple(self.expelled), tuple(self.expelled.values()))
            if now == self._durable or not self._path:
                return
            lane = self._world.lane("noded-obeyed")
            try:
                async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):  # law 14
                    await lane.run(_write, self._world.disk, self._path, now)
            except (OSError, TimeoutError) as error:
                raise NodeTrouble(f"{self._path} was not written: {error or 'it takes too long'}") from error
            finally:
                lane.close()
            self._durable = now


def _write(disk: Disk, path: str, written: _Written) -> None:
    body = msgspec.json.encode(written)
    disk.replace_file(path, _KIND + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read(disk: Disk, path: str) -> _Written:
    try:
        octets = disk.read_file(path)
    except FileNotFoundError:
        return _Written()
    except OSError as error:
        raise OperatorError(f"{path} cannot be read: {error.strerror}") from error
    head, _, body = octets.partition(b"\n")
    try:
        if head != _KIND + hashlib.sha256(body).hexdigest().encode():
            raise ValueError("its checksum is wrong, or it is of a later program")
        return msgspec.json.decode(body, type=_Written)
    except (ValueError, msgspec.DecodeError) as error:
        raise OperatorError(
            f"{path} is damaged: {error}. It says whom these nodes refuse: put it back from a backup, or remove it; then "
            "nobody is refused until a keeper that reaches the database tells it anew"
        ) from error
