"""Owns the simulated network: streams with delay, pieces of any size, stalls in one direction, and resets.

A stream is what TCP gives: octets in order or a broken connection. Loss and duplication of packets show only as delay. A
stall is a one-way cut: what was sent waits until it is over.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import ssl
from collections import deque
from collections.abc import Sequence
from typing import Any

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.net import Listener, ProtocolFactory

_HIGH_WATER_OCTETS = 65_536


Listening = tuple[str, ProtocolFactory, contextvars.Context]  # who listens, what takes a connection, as which process


class SimTransport:
    """One end of a connection."""

    def __init__(self, net: SimNetwork, factory: ProtocolFactory, peer_name: tuple[str, int]) -> None:
        self.peer: SimTransport
        self.owner = ""
        self.context = contextvars.copy_context()  # what comes here is heard by the process that this end belongs to
        self.names: Sequence[str] | None = None  # those of its certificate, once it has shown it
        self.secured: asyncio.Future[None] | None = None  # who waits for the other end's
        self._net = net
        self._protocol: Any = factory()
        self._peer_name = peer_name
        self._made = False
        self._closing = False
        self._lost = False
        self._paused = False
        self._held: list[bytes] = []  # came while reading was paused; None of it is lost
        self._held_eof = False
        self._sent: deque[bytes | None] = deque()  # on the way to the other end, which gets it in this order; None is its end
        self._on_the_way = 0
        self._full = False
        self._last_arrival = 0.0

    # -- what protocols call --------------------------------------------------------------------------------------

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Everyone's is the same here."""

    def get_write_buffer_size(self) -> int:
        return self._on_the_way

    def write(self, data: bytes) -> None:
        if self._closing or self._lost or not data:
            return
        self._on_the_way += len(data)
        if self._on_the_way > _HIGH_WATER_OCTETS and not self._full:
            self._full = True
            self._protocol.pause_writing()
        whole = self.owner in self._net.whole or self.peer.owner in self._net.whole
        for piece in (bytes(data),) if whole else self._net.pieces(bytes(data)):
            self._post(piece)

    def _post(self, piece: bytes | None) -> None:
        loop = asyncio.get_running_loop()
        self._sent.append(piece)
        self._last_arrival = max(self._last_arrival + 1e-6, loop.time() + self._net.delay(self))
        loop.call_at(self._last_arrival, self._arrive, context=self.peer.context)

    def _arrive(self) -> None:
        """The next piece is there: of several that are due in one turn, because the process stood still, also the first."""
        piece = self._sent.popleft()
        if piece is None:
            self.peer._take_eof()
            return
        self._on_the_way -= len(piece)
        if self._full and self._on_the_way <= _HIGH_WATER_OCTETS // 4 and not self._lost:
            self._full = False
            asyncio.get_running_loop().call_soon(self._room, context=self.context)
        self.peer._take(piece)

    def _room(self) -> None:
        if not (self._full or self._lost):
            self._protocol.resume_writing()

    def _take(self, piece: bytes) -> None:
        if self._lost or self._closing:
            return
        if self._paused:
            self._held.append(piece)
        else:
            self._give(piece)

    def _give(self, piece: bytes) -> None:
        """As asyncio hands octets to either kind of protocol."""
        if not isinstance(self._protocol, asyncio.BufferedProtocol):
            self._protocol.data_received(piece)
            return
        while piece and not (self._lost or self._closing):
            room = memoryview(self._protocol.get_buffer(len(piece)))
            size = min(len(room), len(piece))
            room[:size] = piece[:size]
            self._protocol.buffer_updated(size)
            piece = piece[size:]

    def secure(self, protocol: asyncio.BaseProtocol, names: Sequence[str], first: bytes) -> None:
        """This end of a connection between machines shows who it is; from now on `protocol` has it."""
        self.names = names
        self._protocol = protocol
        if first:
            self._give(first)
        for end in (self, self.peer):
            if end.secured is not None and not end.secured.done() and end.peer.names is not None:
                end.secured.set_result(None)

    def _take_eof(self) -> None:
        if self._lost:
            return
        if self._paused:
            self._held_eof = True
            return
        self._protocol.eof_received()
        self.lose(None)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        while self._held and not self._paused:
            self._give(self._held.pop(0))
        if self._held_eof and not self._paused:
            self._take_eof()

    def close(self) -> None:
        if self._closing or self._lost:
            return
        self._closing = True
        self._post(None)
        asyncio.get_running_loop().call_soon(self.lose, None)

    abort = close

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peercert" and self.peer.names is not None:
            return {"subjectAltName": tuple([("URI", each) for each in self.peer.names])}
        return self._peer_name if name == "peername" else default

    def made(self) -> None:
        """The connection is there."""
        if not self._lost:
            self._made = True
            self._protocol.connection_made(self)

    # -- what happens to it -----------------------------------------------------------------------------------------

    def lose(self, error: Exception | None) -> None:
        """The connection is gone for this end."""
        if not self._lost:
            self._lost = True
            self._net.connections.pop(self, None)
            if self.secured is not None and not self.secured.done():
                self.secured.set_exception(error or ConnectionResetError("closed in the handshake"))
                self.secured.exception()  # who waited may have given up
            if self._made:
                asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error, context=self.context)

    def reset(self) -> None:
        """Both ends see a broken connection; what was on its way may be lost."""
        for end in (self, self.peer):
            end.lose(ConnectionResetError("connection reset"))


class SimContext(ssl.SSLContext):
    """What a machine of a cluster shows of itself: the names of its certificate, and no octet of TLS."""

    names: Sequence[str]

    @classmethod
    def of(cls, names: Sequence[str]) -> SimContext:
        """One that shows these names."""
        context = cls(ssl.PROTOCOL_TLS_CLIENT)
        context.names = names
        return context


class SimListener:
    """A simulated listening socket."""

    def __init__(self, net: SimNetwork, port: int) -> None:
        self._net = net
        self.port = port

    def close(self) -> None:
        self._net.listeners.pop(self.port, None)


class SimNetwork:
    """All connections of one simulation. Implements `base.net.Network`, for one process by `named`."""

    def __init__(self, chance: random.Random) -> None:
        self.listeners: dict[int, Listening] = {}
        self.connections: dict[SimTransport, None] = {}
        self.stalled_until: dict[str, float] = {}  # what this owner sends waits until then
        self.cut_until: dict[tuple[str, str], float] = {}  # what the one sends to the other waits until then
        self.whole: dict[str, None] = {}  # what goes to these owners, or comes from them, is handed over as it was written
        self._chance = chance
        self._next_port = 20_000

    def named(self, owner: str) -> NamedNetwork:
        """The network as one process sees it."""
        return NamedNetwork(self, owner)

    def delay(self, transport: SimTransport) -> float:
        """How long octets take from there now."""
        delay = self._chance.expovariate(1 / 0.0005)
        if self._chance.random() < 0.01:
            delay += self._chance.uniform(0.05, 0.4)  # a lost packet, sent again
        return max(delay, self.waits_until(transport.owner, transport.peer.owner) - asyncio.get_running_loop().time())

    def waits_until(self, sender: str, receiver: str) -> float:
        """When what the one sends to the other comes through again; in the past if it does."""
        return max(self.stalled_until.get(sender, 0.0), self.cut_until.get((sender, receiver), 0.0))

    def pieces(self, data: bytes) -> list[bytes]:
        """The same octets as a network may hand them over."""
        if len(data) < 2 or self._chance.random() < 0.7:
            return [data]
        count = self._chance.randint(1, 3)
        ends = sorted(self._chance.randrange(1, len(data)) for _ in range(count))
        parts = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
        return [part for part in parts if part]

    def handshake_s(self) -> float:
        """How long two machines take to show each other who they are."""
        return self._chance.uniform(0.001, 0.01)

    def new_port(self) -> int:
        """A port nobody has."""
        self._next_port += 1
        return self._next_port

    def break_some(self, owner: str, part: float) -> None:
        """Resets that part of a process's connections."""
        for transport in list(self.connections):
            if transport.owner == owner and self._chance.random() < part:
                transport.reset()


class NamedNetwork:
    """The network as one process on one machine sees it."""

    def __init__(self, net: SimNetwork, owner: str) -> None:
        self._net = net
        self._owner = owner

    async def listen(self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None) -> Listener:
        port = port or self._net.new_port()
        if port in self._net.listeners:
            raise OperatorError(f"cannot listen on {host}:{port}: address in use")
        self._net.listeners[port] = (self._owner, factory, contextvars.copy_context())
        return SimListener(self._net, port)

    async def connect(
        self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None, name: str | None = None
    ) -> None:
        await asyncio.sleep(0.001)
        owner, accept, context = self._listening(port)
        if self._net.cut_until:
            async with asyncio.timeout(limits.SMTP_CLIENT_CONNECT_TIMEOUT_S):
                await self._reached(owner)
            owner, accept, context = self._listening(port)
        here = SimTransport(self._net, factory, (host, port))
        context = context.copy()
        there = context.run(SimTransport, self._net, accept, (f"10.0.0.{len(self._owner)}", self._net.new_port()))
        here.peer, there.peer = there, here
        here.owner, there.owner = self._owner, owner
        for end in (here, there):
            self._net.connections[end] = None
        asyncio.get_running_loop().call_soon(there.made, context=context)
        here.made()
        if isinstance(tls, SimContext):
            here.names, here.secured = tls.names, asyncio.get_running_loop().create_future()
            await here.secured

    def _listening(self, port: int) -> Listening:
        listening = self._net.listeners.get(port)
        if listening is None:
            raise ConnectionRefusedError(f"nobody listens on port {port}")
        return listening

    async def _reached(self, owner: str) -> None:
        """Waits while the way there or the way back is cut."""
        loop = asyncio.get_running_loop()
        while True:
            until = max(self._net.waits_until(self._owner, owner), self._net.waits_until(owner, self._owner))
            if until <= loop.time():
                return
            await asyncio.sleep(until - loop.time())

    async def start_tls(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        server_side: bool,
        name: str | None = None,
        first: bytes = b"",
    ) -> asyncio.Transport:
        if not isinstance(context, SimContext) or not isinstance(transport, SimTransport):
            raise ConnectionResetError("there is no TLS for clients in the simulation")
        await asyncio.sleep(self._net.handshake_s())
        if transport.is_closing():
            raise ConnectionResetError("closed in the handshake")
        transport.secure(protocol, context.names, first)
        return transport
