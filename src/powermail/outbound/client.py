"""Owns one connection to a next hop: greeting, TLS, AUTH, pipelined transactions, bounded waits and replies (F04)."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from typing import NamedTuple

from powermail.base import limits
from powermail.base.world import World
from powermail.wire.dot import DotWriter
from powermail.wire.smtp_client import Reply, ReplyError, ReplyReader


class HopTrouble(Exception):
    """This connection is of no more use; what was not answered is tried again later. Always temporary."""


class Route(NamedTuple):
    """Where to send and how."""

    host: str
    port: int
    tls: str  # none, opportunistic, required, implicit
    context: ssl.SSLContext | None
    user: str
    password: str


class _Octets(asyncio.Protocol):
    """Collects replies."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.replies: list[Reply] = []
        self.error: Exception | None = None
        self._reader = ReplyReader()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self.replies += self._reader.feed(data)
        except ReplyError as error:
            self.error = error
            if self.transport is not None:
                self.transport.abort()
        self._wake.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = self.error or exc or ConnectionResetError("the next hop closed the connection")
        self._wake.set()
        self._room.set()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    async def reply(self, timeout_s: float) -> Reply:
        async with asyncio.timeout(timeout_s):
            while not self.replies:
                if self.error is not None:
                    raise HopTrouble(str(self.error)) from self.error
                self._wake.clear()
                await self._wake.wait()
        return self.replies.pop(0)

    async def room(self) -> None:
        async with asyncio.timeout(limits.SMTP_CLIENT_DATA_TIMEOUT_S):
            await self._room.wait()


class SmtpClient:
    """A connection that has said hello."""

    def __init__(self, world: World, route: Route, hostname: str) -> None:
        self._world = world
        self._route = route
        self._hostname = hostname
        self._octets = _Octets()
        self.extensions: dict[str, str] = {}
        self.transactions = 0

    async def connect(self) -> None:
        """Connects, upgrades, logs in. Raises HopTrouble."""
        route = self._route
        implicit = route.context if route.tls == "implicit" else None
        try:
            await self._world.net.connect(route.host, route.port, lambda: self._octets, implicit, route.host)
            self._expect(await self._octets.reply(limits.SMTP_CLIENT_REPLY_TIMEOUT_S), "greeting")
            await self._hello()
            if route.tls in ("opportunistic", "required"):
                await self._start_tls()
            if route.user:
                secret = base64.b64encode(f"\0{route.user}\0{route.password}".encode()).decode("ascii")
                self._expect(await self._ask(f"AUTH PLAIN {secret}"), "AUTH")
        except (OSError, TimeoutError) as error:
            self.abort()
            raise HopTrouble(f"{route.host}: {error or type(error).__name__}") from error
        except HopTrouble:
            self.abort()
            raise

    async def _start_tls(self) -> None:
        route = self._route
        if "STARTTLS" not in self.extensions:
            if route.tls == "required":
                raise HopTrouble("the next hop does not offer STARTTLS, which the route requires")
            return
        self._expect(await self._ask("STARTTLS"), "STARTTLS")
        if self._octets.replies:
            raise HopTrouble("octets before the TLS handshake")
        assert self._octets.transport is not None and route.context is not None
        self._octets.transport = await self._world.net.start_tls(
            self._octets.transport, self._octets, route.context, server_side=False, name=route.host
        )
        await self._hello()

    @staticmethod
    def _expect(reply: Reply, what: str) -> Reply:
        if not reply.positive:
            raise HopTrouble(f"{what} answered {reply.code} {reply.text}")
        return reply

    async def _hello(self) -> None:
        reply = await self._ask(f"EHLO {self._hostname}")
        if not reply.positive:
            reply = self._expect(await self._ask(f"HELO {self._hostname}"), "HELO")
        self.extensions = {}
        for line in reply.lines[1:]:
            name, _, rest = line.partition(" ")
            self.extensions[name.upper()] = rest

    def _write(self, octets: bytes) -> None:
        if self._octets.transport is None or self._octets.transport.is_closing():
            raise HopTrouble("the next hop closed the connection")
        self._octets.transport.write(octets)

    async def _ask(self, line: str) -> Reply:
        self._write(f"{line}\r\n".encode())
        return await self._octets.reply(limits.SMTP_CLIENT_REPLY_TIMEOUT_S)

    async def send(self, mail: str, recipients: list[str], body: AsyncIterator[bytes]) -> tuple[list[Reply], Reply | None]:
        """One transaction: (reply for each RCPT, reply to the message or None if no recipient was taken).

        `mail` and `recipients` are whole command lines. Raises HopTrouble; then nothing is known to be accepted.
        """
        self.transactions += 1
        lines = [mail, *recipients]
        try:
            if "PIPELINING" in self.extensions:
                self._write("".join(f"{line}\r\n" for line in lines).encode())
                replies = [await self._octets.reply(limits.SMTP_CLIENT_REPLY_TIMEOUT_S) for _ in lines]
            else:
                replies = [await self._ask(line) for line in lines]
            if not replies[0].positive:
                await self._ask("RSET")
                return [replies[0]] * len(recipients), None
            taken = [reply for reply in replies[1:] if reply.positive]
            if not taken:
                await self._ask("RSET")
                return replies[1:], None
            start = await self._ask("DATA")
            if start.code != 354:
                if start.positive:
                    raise HopTrouble(f"DATA answered {start.code}")
                return [start if reply.positive else reply for reply in replies[1:]], None
            writer = DotWriter(clean_cr=True)
            async for part in body:
                self._write(writer.feed(part))
                await self._octets.room()
            self._write(writer.end())
            return replies[1:], await self._octets.reply(limits.SMTP_CLIENT_DATA_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            self.abort()
            raise HopTrouble(f"{self._route.host}: {error or type(error).__name__}") from error
        except BaseException:
            self.abort()  # in the middle of a message only closing says that it is not whole
            raise

    async def quit(self) -> None:
        """Says goodbye."""
        try:
            await self._ask("QUIT")
        except (HopTrouble, OSError, TimeoutError):
            pass
        self.abort()

    def abort(self) -> None:
        """Closes at once."""
        if self._octets.transport is not None:
            self._octets.transport.abort()
