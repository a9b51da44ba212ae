"""Owns sockets: listening, connecting and the switch to TLS, all with `asyncio.Protocol` objects.

Danger: octets received before a TLS switch must be dropped by the protocol (CVE-2011-0411 class); that is
the protocol's duty, this room only swaps the transport.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from powermail.base import limits
from powermail.base.errors import OperatorError

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class Listener(Protocol):
    """A socket that accepts connections."""

    @property
    def port(self) -> int:
        """The bound port, also when 0 was asked for."""

    def close(self) -> None:
        """Stops accepting; open connections go on."""


class Network(Protocol):
    """Makes connections."""

    async def listen(self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None) -> Listener:
        """Accepts connections on host:port. Raises OperatorError when the address cannot be bound."""

    async def connect(
        self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None, name: str | None = None
    ) -> None:
        """Connects within the limit. Raises OSError or TimeoutError."""

    async def start_tls(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        server_side: bool,
        name: str | None = None,
        first: bytes = b"",
    ) -> asyncio.Transport:
        """Upgrades a connection; `first` are octets of the peer's handshake that were read already.

        Raises OSError (ssl.SSLError is one) or TimeoutError.
        """


@dataclass(frozen=True)
class SocketListener:
    """A listening socket of the event loop."""

    server: asyncio.Server

    @property
    def port(self) -> int:
        return int(self.server.sockets[0].getsockname()[1])

    def close(self) -> None:
        self.server.close()


class SocketNetwork:
    """Real sockets."""

    async def listen(self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None) -> Listener:
        loop = asyncio.get_running_loop()
        handshake = limits.TLS_HANDSHAKE_TIMEOUT_S if tls else None
        try:
            server = await loop.create_server(
                factory,
                host or None,
                port,
                ssl=tls,
                backlog=limits.LISTEN_BACKLOG,
                ssl_handshake_timeout=handshake,
                reuse_address=True,
            )
        except OSError as error:
            raise OperatorError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port or stop what uses it"
            ) from error
        return SocketListener(server)

    async def connect(
        self, host: str, port: int, factory: ProtocolFactory, tls: ssl.SSLContext | None = None, name: str | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limits.SMTP_CLIENT_CONNECT_TIMEOUT_S):
            await loop.create_connection(factory, host, port, ssl=tls, server_hostname=name if tls else None)

    async def start_tls(
        self,
        transport: asyncio.Transport,
        protocol: asyncio.BaseProtocol,
        context: ssl.SSLContext,
        server_side: bool,
        name: str | None = None,
        first: bytes = b"",
    ) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        upgrading = loop.start_tls(
            transport,
            protocol,
            context,
            server_side=server_side,
            server_hostname=name,
            ssl_handshake_timeout=limits.TLS_HANDSHAKE_TIMEOUT_S,
        )
        upgraded = await (_upgrade_with(upgrading, transport, first) if first else upgrading)
        if upgraded is None:
            raise ConnectionResetError("the connection ended during the TLS handshake")
        return upgraded


async def _upgrade_with(
    upgrading: Coroutine[Any, Any, asyncio.Transport | None], transport: asyncio.Transport, first: bytes
) -> asyncio.Transport | None:
    """An upgrade whose protocol gets `first` before anything that the transport reads.

    Its first step gives the transport its new protocol, and asks the loop to connect the two and then to read; what is asked
    of the loop behind that comes between.
    """
    loop = asyncio.get_running_loop()
    transport.pause_reading()
    task = loop.create_task(upgrading)
    await asyncio.sleep(0)

    def give() -> None:
        protocol: Any = transport.get_protocol()
        octets = first
        while octets and not transport.is_closing():
            room = protocol.get_buffer(len(octets))
            size = min(len(room), len(octets))
            room[:size] = octets[:size]
            protocol.buffer_updated(size)
            octets = octets[size:]

    loop.call_soon(give)
    return await task


def keep_alive(transport: asyncio.BaseTransport, seconds: int, count: int) -> None:
    """The kernel asks a silent peer `count` times, every `seconds`; then the connection breaks. A local socket needs none."""
    own = transport.get_extra_info("socket")
    if own is None or own.family not in (socket.AF_INET, socket.AF_INET6):
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds), ("TCP_KEEPINTVL", seconds), ("TCP_KEEPCNT", count)):
        if hasattr(socket, name):  # not every system has all
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def descriptors() -> int:
    """How many files and sockets this process may have open, raised to what the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def is_host(text: str) -> bool:
    """True if it may be the name or the IP address of a host, as far as its letters say."""
    if not text or any(letter.isspace() or not letter.isprintable() or letter in "@/\\'\"" for letter in text):
        return False
    try:
        return bool(text.encode("idna"))  # as sockets do: none is looked up whose labels are empty or too long
    except UnicodeError:
        return False


def parse_host_port(text: str, setting: str = "") -> tuple[str, int]:
    """Reads `host:port`, `[v6]:port` or `:port`. Raises OperatorError, which names the setting, if it is one."""
    host, separator, port_text = text.rpartition(":")
    name = host.removeprefix("[").removesuffix("]")
    of = f"{setting}: " if setting else ""
    if "@" in text:  # perhaps somebody wrote a password there
        raise OperatorError(f"{of}a user and a password are no part of host:port")
    number = int(port_text) if separator and len(port_text) <= 5 and port_text.isascii() and port_text.isdecimal() else -1
    if not 0 <= number <= 65535 or (name and not is_host(name)) or (":" in name and not _is_address(name)):
        raise OperatorError(f"{of}{text!r} is not host:port")
    return name, number


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
