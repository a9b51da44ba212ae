"""Owns one accepted connection and the door it came through: octets in and out, deadlines, back-pressure, TLS, caps.

Deadlines are checked once a second for all connections of a door, which costs nothing per command. A client that has shut its
writing side is still answered; one that is lost, or has closed TLS (which knows no half), is not, and nothing that it asked
for is done any more.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from powermail.base import limits
from powermail.base.log import CID, Event
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.door.clients import Clients
from powermail.wire.proxy import plain_address

_PAUSE_OCTETS = 256 * limits.KIB


class Gone(Exception):
    """The peer has closed, or the connection was lost."""


class Connection(asyncio.Protocol):
    """One connection. The session's coroutine takes what came and writes replies."""

    def __init__(self, door: Door, awaits_tls: ssl.SSLContext | None = None) -> None:
        self.door = door
        self.awaits_tls = awaits_tls  # what the client's first octets, or those behind a PROXY header, begin
        self.client = ""
        self.port = 0
        self.tls = False
        self.deadline = math.inf
        self.counted = ""
        self.at_once: Callable[[bytes], bytes] | None = None  # answers octets while nobody has to be woken; gives the rest
        self.transport: asyncio.Transport | None = None
        self._incoming: list[bytes] = []
        self._incoming_octets = 0
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._closed = False
        self._ended = False  # nothing more comes, but the peer may still read
        self._paused = False
        self._task: asyncio.Task[Any] | None = None

    # -- asyncio's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername") or ("local", 0)
        self.client, self.port = plain_address(str(peer[0])), int(peer[1])
        self.tls = transport.get_extra_info("ssl_object") is not None
        if self._task is None:
            self._task = self.door.accept(self)

    def data_received(self, data: bytes) -> None:
        if self.at_once is not None and self._waiter is not None and self._writable is None and not self._incoming:
            data = self.at_once(data)
            if not data:
                return
        self._incoming.append(data)
        self._incoming_octets += len(data)
        if self._incoming_octets > _PAUSE_OCTETS and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._ended = True
        self._closed = self._closed or self.tls
        self._wake()
        return not self._closed

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._wake()
        if self._writable is not None:
            _fail(self._writable, Gone())

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        waiter, self._writable = self._writable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def expire(self) -> None:
        """The deadline has passed: whoever waits gets TimeoutError."""
        self.deadline = math.inf
        for waiter in (self._waiter, self._writable):
            if waiter is not None:
                _fail(waiter, TimeoutError())

    # -- the session's side -----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True when nothing that is written reaches the peer any more."""
        return self._closed

    async def receive(self, timeout_s: float) -> bytes:
        """What came in, waiting for it if needed. Raises TimeoutError, Gone when nothing more will come."""
        while not self._incoming:
            if self._closed or self._ended:
                raise Gone
            self._waiter = asyncio.get_running_loop().create_future()
            self.deadline = self.door.monotonic() + timeout_s
            await self._waiter
        self.deadline = math.inf
        if len(self._incoming) == 1:
            data = self._incoming[0]
        else:
            data = b"".join(self._incoming)
        self._incoming.clear()
        self._incoming_octets = 0
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def lost(self, timeout_s: float) -> None:
        """Waits until nothing that is written reaches the peer any more. Raises TimeoutError, Draining."""
        self.deadline = self.door.monotonic() + timeout_s
        while not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self.deadline = math.inf

    def drop_input(self) -> None:
        """Throws away what came and was not taken (RFC 3207 §4.2)."""
        self._incoming.clear()
        self._incoming_octets = 0

    def has_input(self) -> bool:
        """True if octets wait."""
        return bool(self._incoming)

    def write(self, octets: bytes) -> None:
        """Queues octets for the peer."""
        if self.transport is not None and not self._closed:
            self.transport.write(octets)

    @property
    def behind(self) -> bool:
        """True if the peer is far behind in reading."""
        return self._writable is not None

    async def flush(self) -> None:
        """Waits while the peer is far behind in reading. Raises TimeoutError, Gone."""
        if self._writable is not None:
            self.deadline = self.door.monotonic() + limits.REPLY_WRITE_TIMEOUT_S
            await self._writable
            self.deadline = math.inf

    async def start_tls(self, context: ssl.SSLContext, first: bytes = b"") -> None:
        """Switches to TLS; `first` are octets of the handshake that came already, everything else received before is dropped.

        Raises OSError, TimeoutError.
        """
        assert self.transport is not None
        # Dropped here, in the same step in which the transport gets its new owner: nothing in clear can come later, and
        # what a fast client sends behind its handshake is kept.
        self.drop_input()
        self.transport = await self.door.world.net.start_tls(self.transport, self, context, server_side=True, first=first)
        self.tls = True

    def cipher(self) -> str:
        """What TLS uses, for the trace field; empty without TLS."""
        ssl_object = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
        if ssl_object is None:
            return ""
        cipher = ssl_object.cipher()
        return f"{ssl_object.version()} {cipher[0]}" if cipher else ""

    def close(self) -> None:
        """Closes after what was written has gone out."""
        self._closed = True
        if self.transport is not None:
            self.transport.close()
        self._wake()

    def abort(self) -> None:
        """Closes at once, whatever waits to go out: the peer does not take it."""
        self._closed = True
        if self.transport is not None:
            self.transport.abort()
        self._wake()

    def stop(self) -> None:
        """Ends the session at its next wait for input."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(Draining())


def _fail(waiter: asyncio.Future[None], error: Exception) -> None:
    """Ends a wait, if anybody waits: a peer that is behind in reading may leave when nobody wants to write."""
    if not waiter.done():
        waiter.set_exception(error)
        waiter.exception()  # counts as seen


class Draining(Exception):
    """The server shuts down: say 421 or bye and close."""


Session = Callable[[Connection], Coroutine[Any, Any, None]]


class Door:
    """A listening service: caps on connections, deadlines, draining. One for each protocol."""

    def __init__(
        self,
        world: World,
        name: str,
        tasks: Tasks,
        session: Session,
        refuse: Callable[[Connection, str], bytes],
        connections_max: int,
        per_address_max: int,
        process: str = "",
    ) -> None:
        """`process` is a word that tells the sessions of several processes apart."""
        self.world = world
        self.name = name
        self.monotonic = world.clock.monotonic
        self.draining = False
        self._tasks = tasks
        self._session = session
        self._refuse = refuse
        self._max = connections_max
        self._clients = Clients(per_address_max)
        self._open: dict[Connection, None] = {}
        self._cid = f"{name}-{process}{int(world.clock.now()):x}"  # of this process and door; sessions count on
        self._accepted = 0

    def __call__(self) -> Connection:
        return Connection(self)

    def with_tls(self, context: ssl.SSLContext) -> Callable[[], Connection]:
        """The same door for clients that begin with TLS; their session does the handshake."""
        return lambda: Connection(self, context)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    @property
    def stressed(self) -> bool:
        """More than half of the connections are taken: idle ones get less time."""
        return len(self._open) * 2 > self._max

    def admit(self, connection: Connection) -> bool:
        """Counts the connection under its client's address; False over the cap."""
        if not self._clients.come(connection.client):
            return False
        connection.counted = connection.client
        return True

    def accept(self, connection: Connection) -> asyncio.Task[Any] | None:
        """A new connection: starts its session, or refuses it at the cap."""
        why = ""
        if self.draining:
            why = "shutting down"
        elif len(self._open) >= self._max or not self.admit(connection):
            why = "too many connections"
        if why:
            self.world.counters.add(f"{self.name}.connections_refused")
            self.world.log.event(Event.CONNECTION_REFUSED, door=self.name, client=connection.client, reason=why)
            connection.write(self._refuse(connection, why))
            connection.close()
            return None
        self._open[connection] = None
        self.world.counters.add(f"{self.name}.connections")
        return self._tasks.start(self._run(connection), f"{self.name}-session")

    async def _run(self, connection: Connection) -> None:
        self._accepted += 1
        CID.set(f"{self._cid}-{self._accepted}")  # this task's alone, and of what it starts
        try:
            await self._session(connection)
        except (Gone, ConnectionError):
            self.world.counters.add(f"{self.name}.lost")
        finally:
            connection.close()
            self._open.pop(connection, None)
            self.leave(connection)

    def leave(self, connection: Connection) -> None:
        """Uncounts the connection's address."""
        if connection.counted:
            self._clients.go(connection.counted)
            connection.counted = ""

    def sweep(self) -> None:
        """Ends waits whose deadline has passed; called once a second."""
        now = self.monotonic()
        for connection in list(self._open):
            if connection.deadline <= now:
                connection.expire()

    def drain(self) -> None:
        """Refuses the new; sessions end when they next wait for their client."""
        self.draining = True
        for connection in list(self._open):
            connection.stop()
