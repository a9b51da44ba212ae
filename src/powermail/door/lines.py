"""Owns what the session of every line protocol does: who really connects, TLS from the first octet, waiting, draining.

The PROXY header of a listed balancer stands before the TLS handshake, or inside it; it is looked for where it is.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod

from powermail.base import limits
from powermail.door.clients import Networks
from powermail.door.connection import Connection, Draining
from powermail.wire.proxy import ProxyError, parse_proxy

_HANDSHAKE = 0x16  # the first octet of a TLS handshake


class LineSession(ABC):
    """One client. A protocol says how it serves, and its last words; `run` does the rest."""

    def __init__(self, connection: Connection, proxies: Networks) -> None:
        self.connection = connection
        self._proxies = proxies
        self._replies: list[bytes] = []
        self._replies_octets = 0
        self._first = b""  # octets behind a PROXY header

    async def run(self) -> None:
        """Serves the client until it leaves."""
        try:
            if await self._arrive():
                await self.serve()
        except Draining:
            self.last_words("shutting down")
        except TimeoutError:
            self.last_words("timeout")
        finally:
            self.send()
            self.ended()

    # -- what a protocol says -------------------------------------------------------------------------------------

    @abstractmethod
    async def serve(self) -> None:
        """Serves a client that is known and, where its port says so, behind TLS. Raises TimeoutError, Draining, Gone."""

    @abstractmethod
    def last_words(self, why: str) -> None:
        """Says why the server ends the session: shutting down, timeout, too many connections."""

    def ended(self) -> None:  # noqa: B027  nothing to clear away is the usual case
        """The session is over."""

    # -- octets ---------------------------------------------------------------------------------------------------

    def say(self, octets: bytes) -> None:
        """Adds a reply; it goes out with others, at the latest before the next wait for the client."""
        self._replies.append(octets)
        self._replies_octets += len(octets)

    def send(self) -> None:
        """Sends what was said."""
        if self._replies:
            self.connection.write(b"".join(self._replies))
            self._replies.clear()
            self._replies_octets = 0

    async def push(self, octets: bytes) -> None:
        """Adds output; sends, and waits for the reader, when much is there. Raises TimeoutError, Gone."""
        self.say(octets)
        if self._replies_octets >= limits.SMTP_OUT_BUFFER_OCTETS:
            self.send()
            await self.connection.flush()

    async def receive(self, timeout_s: float) -> bytes:
        """Sends what was said, and gives the client's next octets. Raises TimeoutError, Draining, Gone."""
        self.send()
        if self._first:
            first, self._first = self._first, b""
            return first
        await self.connection.flush()
        return await self.connection.receive(timeout_s)

    def has_input(self) -> bool:
        """True if the client has said something that was not looked at."""
        return bool(self._first) or self.connection.has_input()

    async def start_tls(self, context: ssl.SSLContext) -> bool:
        """Sends what was said and shakes hands; False if that failed. Octets in clear are dropped (RFC 3207 §4.2)."""
        self.send()
        self._first = b""
        return await self._shake_hands(context, b"")

    async def _shake_hands(self, context: ssl.SSLContext, first: bytes) -> bool:
        door = self.connection.door
        try:
            await self.connection.start_tls(context, first)
        except (OSError, TimeoutError):
            door.world.counters.add(f"{door.name}.tls_failed")
            return False
        return True

    # -- arriving -------------------------------------------------------------------------------------------------

    async def _arrive(self) -> bool:
        connection = self.connection
        behind = connection.client in self._proxies
        context = connection.awaits_tls
        if context is not None:
            connection.awaits_tls = None
            if behind:
                self._first = await connection.receive(limits.TLS_HANDSHAKE_TIMEOUT_S)
                if self._first[0] != _HANDSHAKE:
                    behind = False
                    if not await self._read_proxy():
                        return False
            first, self._first = self._first, b""
            if not first and connection.has_input():  # it did not wait for our task to begin
                first = await connection.receive(limits.TLS_HANDSHAKE_TIMEOUT_S)
            if not await self._shake_hands(context, first):
                return False
        return not behind or await self._read_proxy()

    async def _read_proxy(self) -> bool:
        """Reads the header and takes the client that it names; what stands behind it is kept."""
        connection = self.connection
        door = connection.door
        octets = self._first
        while True:
            try:
                parsed = parse_proxy(octets) if octets else None
            except ProxyError:
                door.world.counters.add(f"{door.name}.proxy_errors")
                return False
            if parsed is not None:
                break
            octets += await connection.receive(limits.TLS_HANDSHAKE_TIMEOUT_S)
        client, used = parsed
        self._first = octets[used:]
        if client is not None:
            door.leave(connection)
            connection.client, connection.port = client
            if not door.admit(connection):
                self.last_words("too many connections")
                return False
        return True
