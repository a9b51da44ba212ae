"""Owns listening sockets that several processes of one machine share: which of them takes the next connection.

The sockets are made once, by the parent of all, and inherited, so a connection waits in one queue of the kernel whoever comes
and goes: no process that ends, hangs or begins loses any. Each waits until the socket is readable and takes one connection
then. One that has more than its fair share, and a few, leaves the next ones to the others. What they know of each other is a
page of memory: when each was last there, and how many connections it has. Who was silent for a while does not count.

Danger: asyncio's own server takes all that waits at once, so that one process gets everything; SO_REUSEPORT gives each process
a queue of its own, which is lost with it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.errors import OperatorError
from powermail.base.net import Listener, ProtocolFactory, SocketNetwork

_SLOT_OCTETS = 16  # two doubles: when it was last there (CLOCK_MONOTONIC, one for all of the machine), and its connections


class Inherited(NamedTuple):
    """The listening sockets of one address as a child gets them: by their descriptors."""

    host: str
    port: int  # as the settings say: 0 is any
    descriptors: tuple[int, ...]
    shared: bool  # others take from it too


def make_board(slots: int) -> int:
    """The page that tells processes of each other; its descriptor."""
    board = os.memfd_create("powermail-board", os.MFD_CLOEXEC)
    os.ftruncate(board, slots * _SLOT_OCTETS)
    return board


class Board:
    """The page, mapped. A number is one aligned double: it is read as it was written, never half of it."""

    def __init__(self, descriptor: int) -> None:
        octets = os.fstat(descriptor).st_size
        self._map = mmap.mmap(descriptor, octets)
        self._values = memoryview(self._map).cast("d")
        self.slots = octets // _SLOT_OCTETS

    def note(self, slot: int, at: float, connections: int) -> None:
        """This process is there."""
        self._values[2 * slot + 1] = connections
        self._values[2 * slot] = at

    def clear(self, slot: int) -> None:
        """Its process is gone, or takes nothing any more."""
        self._values[2 * slot] = 0.0

    def connections(self, now: float) -> list[int]:
        """How many each process has that was there a moment ago."""
        there = range(self.slots)
        silent = now - limits.WORKER_SILENT_S
        return [int(self._values[2 * slot + 1]) for slot in there if self._values[2 * slot] > silent]

    def close(self) -> None:
        """Unmaps it."""
        self._values.release()
        self._map.close()


class Share:
    """One process's part in the connections of its machine."""

    def __init__(self, board: Board, slot: int, clock: Clock) -> None:
        self.open: Callable[[], int] = int  # how many connections this process has
        self._board = board
        self._slot = slot
        self._clock = clock
        self._left = False

    def note(self, waiting: int = 0) -> None:
        """Says to the others that this process is there, and what it has; `waiting` were taken and are not open yet."""
        if not self._left:
            self._board.note(self._slot, self._clock.monotonic(), self.open() + waiting)

    def may_take(self, waiting: int) -> bool:
        """True unless this process has more than its fair share and a few. The one that has fewest always may."""
        self.note(waiting)
        others = self._board.connections(self._clock.monotonic())
        return (self.open() + waiting) * len(others) < sum(others) + limits.WORKER_SLACK * max(1, len(others))

    def leave(self) -> None:
        """This process takes nothing any more: the others share what comes."""
        self._left = True
        self._board.clear(self._slot)


class SharedListener:
    """One inherited address in one process: one connection a readiness."""

    def __init__(
        self,
        ends: Sequence[socket.socket],
        factory: ProtocolFactory,
        tls: ssl.SSLContext | None,
        may_take: Callable[[], bool],
        taking: dict[asyncio.Task[None], None],
        left: Callable[[], None],
    ) -> None:
        """`taking` holds, for all listeners of the process, what was taken and is not open yet; `left` hears of the end."""
        self._ends = ends
        self._factory = factory
        self._tls = tls
        self._may_take = may_take
        self._taking = taking
        self._left = left
        self._closed = False
        self._loop = asyncio.get_running_loop()
        for end in ends:
            self._loop.add_reader(end, self._ready, end)

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._ends[0].getsockname()[1])

    def close(self) -> None:
        """Takes no more: what waits is for the other processes. Idempotent."""
        if not self._closed:
            self._closed = True
            self._left()
            for end in self._ends:
                self._loop.remove_reader(end)
                end.close()

    def _ready(self, end: socket.socket) -> None:
        if not self._may_take():
            self._rest(end, limits.WORKER_TURN_S)
            return
        try:
            taken, _ = end.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was quicker, or the client has left
        except OSError as error:  # no descriptor or no memory is left
            self._loop.call_exception_handler({"message": "a connection cannot be taken", "exception": error})
            self._rest(end, 1.0)
            return
        taken.setblocking(False)
        task = self._loop.create_task(self._open(taken))
        self._taking[task] = None
        task.add_done_callback(lambda done: self._taking.pop(done, None))

    def _rest(self, end: socket.socket, seconds: float) -> None:
        """Looks away for a moment: the socket stays readable until somebody has taken what waits."""
        self._loop.remove_reader(end)
        self._loop.call_later(seconds, self._again, end)

    def _again(self, end: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(end, self._ready, end)

    async def _open(self, taken: socket.socket) -> None:
        handshake_s = limits.TLS_HANDSHAKE_TIMEOUT_S if self._tls else None
        try:
            await self._loop.connect_accepted_socket(self._factory, taken, ssl=self._tls, ssl_handshake_timeout=handshake_s)
        except (OSError, TimeoutError):
            taken.close()  # the client has left, or knows no TLS


class SharedNetwork(SocketNetwork):
    """Real sockets, of which those for listening are inherited."""

    def __init__(self, inherited: Sequence[Inherited], share: Share | None) -> None:
        """Without `share` there are no others to leave anything to."""
        self._inherited = list(inherited)
        self._share = share
        self._taking: dict[asyncio.Task[None], None] = {}
        self._serves = False  # takes from what others take from too

    async def listen(self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None) -> Listener:
        """As the network's: the sockets are there already. Addresses that stand in the settings twice come in their order."""
        found = next((one for one in self._inherited if (one.host, one.port) == (host, port)), None)
        if found is None:
            raise OperatorError(f"{host}:{port} is new in the settings: addresses change with a restart of the whole")
        self._inherited.remove(found)
        share = self._share

        def may_take() -> bool:
            return share is None or not found.shared or share.may_take(len(self._taking))

        self._serves = self._serves or found.shared
        ends = [socket.socket(fileno=descriptor) for descriptor in found.descriptors]
        return SharedListener(ends, factory, tls, may_take, self._taking, self._leave if found.shared else _stay)

    def counts(self, connections: Callable[[], int]) -> None:
        """How many connections this process has is asked there."""
        if self._share is not None:
            self._share.open = connections

    async def step(self) -> float:
        """A worker's: this process is there. Not before it takes any: the others would leave what comes to it."""
        if self._share is not None and self._serves:
            self._share.note(len(self._taking))
        return limits.WORKER_NOTE_S

    def _leave(self) -> None:
        """A shared listener was closed: this process drains, and the others share what comes."""
        if self._share is not None:
            self._share.leave()

    async def taken(self) -> None:
        """Waits until what was taken is open, or has failed."""
        while self._taking:
            await asyncio.wait(list(self._taking))


def _stay() -> None:
    """What is this process's alone says nothing about the others."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for children to take from, one for each address that a name has. Raises OperatorError."""
    ends: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                end = socket.socket(family, kind, protocol)
            except OSError:
                continue  # this machine has no such family, as asyncio's own server finds too
            ends.append(end)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
            end.bind(address)
            end.listen(limits.LISTEN_BACKLOG)
            end.setblocking(False)
    except OSError as error:
        for end in ends:
            end.close()
        raise OperatorError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port or stop what uses it"
        ) from error
    return ends
