"""Owns the simulated network: streams with delay, pieces of any size, stalls in one direction, and resets.

A stream is what TCP gives: octets in order or a broken connection. Loss and duplication of packets show only as delay. A
stall is a one-way cut: what was sent waits until it is over.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from typing import Any

from powermail.base.errors import OperatorError
from powermail.base.net import Listener, ProtocolFactory

_HIGH_WATER_OCTETS = 65_536


class SimTransport:
    """One end of a connection."""

    def __init__(self, net: SimNetwork, protocol: asyncio.BaseProtocol, peer_name: tuple[str, int]) -> None:
        self.peer: SimTransport
        self.owner = ""
        self._net = net
        self._protocol: Any = protocol
        self._peer_name = peer_name
        self._closing = False
        self._lost = False
        self._paused = False
        self._held: list[bytes] = []  # came while reading was paused; None of it is lost
        self._held_eof = False
        self._on_the_way = 0
        self._full = False
        self._last_arrival = 0.0

    # -- what protocols call --------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._closing or self._lost or not data:
            return
        self._on_the_way += len(data)
        if self._on_the_way > _HIGH_WATER_OCTETS and not self._full:
            self._full = True
            self._protocol.pause_writing()
        for piece in self._net.pieces(bytes(data)):
            self._post(lambda piece=piece: self._arrive(piece))  # type: ignore[misc]

    def _post(self, what: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._last_arrival = max(self._last_arrival + 1e-6, loop.time() + self._net.delay(self))
        loop.call_at(self._last_arrival, what)

    def _arrive(self, piece: bytes) -> None:
        self._on_the_way -= len(piece)
        if self._full and self._on_the_way <= _HIGH_WATER_OCTETS // 4 and not self._lost:
            self._full = False
            self._protocol.resume_writing()
        self.peer._take(piece)

    def _take(self, piece: bytes) -> None:
        if self._lost or self._closing:
            return
        if self._paused:
            self._held.append(piece)
        else:
            self._protocol.data_received(piece)

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
            self._protocol.data_received(self._held.pop(0))
        if self._held_eof and not self._paused:
            self._take_eof()

    def close(self) -> None:
        if self._closing or self._lost:
            return
        self._closing = True
        self._post(self.peer._take_eof)
        asyncio.get_running_loop().call_soon(self.lose, None)

    abort = close

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._peer_name if name == "peername" else default

    # -- what happens to it -----------------------------------------------------------------------------------------

    def lose(self, error: Exception | None) -> None:
        """The connection is gone for this end."""
        if not self._lost:
            self._lost = True
            self._net.connections.pop(self, None)
            self._protocol.connection_lost(error)

    def reset(self) -> None:
        """Both ends see a broken connection; what was on its way may be lost."""
        for end in (self, self.peer):
            end.lose(ConnectionResetError("connection reset"))


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
        self.listeners: dict[int, tuple[str, ProtocolFactory]] = {}
        self.connections: dict[SimTransport, None] = {}
        self.stalled_until: dict[str, float] = {}  # what this owner sends waits until then
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
        stalled = self.stalled_until.get(transport.owner, 0.0)
        return max(delay, stalled - asyncio.get_running_loop().time())

    def pieces(self, data: bytes) -> list[bytes]:
        """The same octets as a network may hand them over."""
        if len(data) < 2 or self._chance.random() < 0.7:
            return [data]
        count = self._chance.randint(1, 3)
        ends = sorted(self._chance.randrange(1, len(data)) for _ in range(count))
        parts = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
        return [part for part in parts if part]

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
    """The network of one process."""

    def __init__(self, net: SimNetwork, owner: str) -> None:
        self._net = net
        self._owner = owner

    async def listen(self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None) -> Listener:
        port = port or self._net.new_port()
        if port in self._net.listeners:
            raise OperatorError(f"cannot listen on {host}:{port}: address in use")
        self._net.listeners[port] = (self._owner, factory)
        return SimListener(self._net, port)

    async def connect(
        self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None, name: str | None = None
    ) -> None:
        await asyncio.sleep(0.001)
        listening = self._net.listeners.get(port)
        if listening is None:
            raise ConnectionRefusedError(f"nobody listens on port {port}")
        owner, accept = listening
        here = SimTransport(self._net, factory(), (host, port))
        there = SimTransport(self._net, accept(), (f"10.0.0.{len(self._owner)}", self._net.new_port()))
        here.peer, there.peer = there, here
        here.owner, there.owner = self._owner, owner
        for end in (here, there):
            self._net.connections[end] = None
        there._protocol.connection_made(there)
        here._protocol.connection_made(here)

    async def start_tls(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        server_side: bool,
        name: str | None = None,
        first: bytes = b"",
    ) -> asyncio.Transport:
        raise ConnectionResetError("there is no TLS in the simulation")
