"""Owns what the machines of a local cluster stand on: addresses of the loopback, or network namespaces of their own.

Namespaces are unnamed and hang on processes: when these end, however that happens, nothing of them is left. Who has them is
in a namespace of his own too (`enclose` starts this program anew in one, with a mount namespace), so neither the network nor
the mounts of the machine are touched. A link is cut one way by a neighbour entry with an address that no card has
(ip-neighbour(8)): what is sent is lost, silently, and what comes is heard.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from powermail.base.errors import OperatorError

_ENCLOSED = "PM_ENCLOSED"  # set in the process that `enclose` has started
_TOOLS = ("ip", "unshare", "nsenter", "setpriv")
_NOBODY = "02:00:00:00:00:01"  # locally administered, and no card of ours has it
_BRIDGE = "machines"
_NET = "10.77.0"
_WAIT_S = 10.0


class Ground(Protocol):
    """Where machines are, and how a command is run on one of them."""

    @property
    def net(self) -> str:
        """The first three numbers of all their addresses."""

    def enter(self, machine: str) -> list[str]:
        """The head of a command that is to run on a machine."""

    def database(self, place: str) -> str:
        """The address at which the database is reached over the network; "": by its socket alone."""


class Loopback:
    """All of 127.0.0.0/8 is this machine."""

    def __init__(self, doors: Sequence[int], numbers: Sequence[int]) -> None:
        """Addresses at which nobody listens at these ports. Raises OperatorError."""
        self.net = _free_net(doors, numbers)

    def enter(self, machine: str) -> list[str]:
        """There is nothing to enter."""
        return []

    def database(self, place: str) -> str:
        """By its socket: the loopback is everybody's."""
        return ""


def _free_net(doors: Sequence[int], numbers: Sequence[int]) -> str:
    for third in range(7, 255):
        try:
            for port in doors:
                for last in numbers:
                    with socket.socket() as end:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        end.bind((f"127.0.{third}.{last}", port))
        except OSError:
            continue
        return f"127.0.{third}"
    raise OperatorError(
        "no addresses 127.0.N.x can be listened at: this demo is for Linux, where all of 127.0.0.0/8 is the loopback"
    )


class Namespaces:
    """A network namespace for each machine, on a bridge in that of this process, which has the address of the first machine."""

    net = _NET

    def __init__(self, numbers: Mapping[str, int]) -> None:
        """`numbers`: the last number of the address of each machine with a namespace."""
        self._numbers = dict(numbers)
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._cut: list[tuple[str, str]] = []

    async def build(self) -> None:
        """Makes them. Raises OperatorError."""
        await self._ip("", "link", "set", "lo", "up")
        await self._ip("", "link", "add", _BRIDGE, "type", "bridge")
        await self._ip("", "addr", "add", f"{_NET}.1/24", "dev", _BRIDGE)
        await self._ip("", "link", "set", _BRIDGE, "up")
        for name in self._numbers:
            held = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sleep", "infinity"]
            self._holders[name] = subprocess.Popen(held, stdin=subprocess.DEVNULL)  # noqa: ASYNC220  it begins at once
        for name, number in self._numbers.items():
            await self._entered(name)
            there, pid = f"m{number}", str(self._holders[name].pid)
            await self._ip("", "link", "add", there, "type", "veth", "peer", "name", "eth0", "netns", pid)
            await self._ip("", "link", "set", there, "master", _BRIDGE, "up")
            await self._ip(name, "addr", "add", f"{_NET}.{number}/24", "dev", "eth0")
            await self._ip(name, "link", "set", "eth0", "up")
            await self._ip(name, "link", "set", "lo", "up")

    async def _entered(self, name: str) -> None:
        """Until its holder is in a namespace of its own."""
        ours, pid = os.readlink("/proc/self/ns/net"), self._holders[name].pid
        async with asyncio.timeout(_WAIT_S):
            while os.readlink(f"/proc/{pid}/ns/net") == ours:
                await asyncio.sleep(0.01)

    async def _ip(self, machine: str, *words: str) -> None:
        command = [*self.enter(machine), "ip", *words]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said = (await process.communicate())[0].decode("utf-8", "replace").strip()
        if process.returncode:
            raise OperatorError(f"{' '.join(command)}: {said}")

    def enter(self, machine: str) -> list[str]:
        """Those without a namespace of their own are in ours."""
        if machine not in self._holders:
            return []
        return ["nsenter", "--target", str(self._holders[machine].pid), "--net", "--"]

    def database(self, place: str) -> str:
        """At an address, so that it can be cut off."""
        return self.at("postgresql")

    def at(self, machine: str) -> str:
        """Its address."""
        return f"{_NET}.{self._numbers.get(machine, 1)}"

    async def cut(self, machine: str, other: str) -> None:
        """What `machine` sends to `other` is lost."""
        device = "eth0" if machine in self._holders else _BRIDGE
        await self._ip(machine, "neigh", "replace", self.at(other), "lladdr", _NOBODY, "nud", "permanent", "dev", device)
        self._cut.append((machine, other))

    async def mend(self) -> None:
        """Everything that is sent arrives again."""
        while self._cut:
            machine, other = self._cut.pop()
            device = "eth0" if machine in self._holders else _BRIDGE
            await self._ip(machine, "neigh", "del", self.at(other), "dev", device)

    def close(self) -> None:
        """Lets go of them: a namespace ends with the last process in it."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
        self._holders.clear()


def _shell() -> list[str]:
    """What encloses a process: as root, or as somebody who may have a user namespace and stays who he is in it."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", *user, "--net", "--mount", "--"]


def is_enclosed() -> bool:
    """True in a process that `enclose` has started."""
    return bool(os.environ.get(_ENCLOSED))


def why_not_enclosed() -> str:
    """Why there can be no namespaces here; "" if there can."""
    if lacking := [tool for tool in _TOOLS if not shutil.which(tool)]:
        return f"{', '.join(lacking)} is not installed (packages iproute2 and util-linux)"
    probe = "mount -t tmpfs -o size=1m tmpfs /mnt && ip link add probe type bridge"
    done = subprocess.run([*_shell(), "sh", "-c", probe], capture_output=True, text=True, timeout=_WAIT_S, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def enclose() -> None:
    """Starts this program anew in namespaces of its own; it does not return."""
    environment = {**os.environ, _ENCLOSED: "1"}
    words = [*_shell(), sys.executable, "-m", "powermail", *sys.argv[1:]]
    os.execvpe(words[0], words, environment)  # noqa: S606  our own program


def mount(place: str, octets: int) -> None:
    """A small file system in memory, which only this process and those that it starts see. Raises OperatorError."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={octets},mode=0700", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OperatorError(f"cannot mount a file system at {place}: {done.stderr.strip()}")
