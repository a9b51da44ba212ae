"""Owns what a torture asks of the cluster that it takes apart; `cli` builds one on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from powermail.torture.fleet import Door
from powermail.torture.plan import Kind


class Machines(Protocol):
    """Machines by the names of `torture.plan`: each is a process with its children, a directory and an address. The database
    may be several: then its name means the one that is written to, and behind a fault the one that it hit.
    """

    @property
    def doors(self) -> Sequence[Door]:
        """Where the front ends are."""

    @property
    def kinds(self) -> Sequence[Kind]:
        """What can be done here: links are cut where machines have network namespaces, disks filled where they are mounts."""

    async def kill(self, name: str, whole: bool = True) -> None:
        """SIGKILL to all its processes, of which none is left at return; or to all but the first, which starts them again."""

    async def start(self, name: str) -> None:
        """Starts it again as it was started first; it is not waited for."""

    async def pause(self, name: str) -> None:
        """SIGSTOP to all its processes."""

    def resume(self, name: str) -> None:
        """SIGCONT."""

    async def cut(self, name: str, other: str, both: bool) -> None:
        """What `name` sends to `other` is lost, and with `both` what `other` sends to it."""

    async def mend(self) -> None:
        """No link is cut any more."""

    async def database_is_whole(self) -> bool:
        """True if it takes connections, and nothing that takes its place is missing."""

    async def ask(self, name: str, call: str, **arguments: object) -> Any:
        """Calls an operation of the server of a machine. Raises Trouble if it does not run or cannot."""

    def store(self, name: str) -> Path:
        """The directory of a machine's node."""

    def late(self) -> Iterable[str]:
        """Keys of messages for which a front end's log says that the index was late."""
