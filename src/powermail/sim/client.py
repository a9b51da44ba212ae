"""Owns the simulated clients' wire: a line client over the simulated network, and the receiving peer of forwards."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from powermail.base.net import Network

_WAIT_S = 90.0


class Lost(Exception):
    """The connection is gone, or the server does not answer."""


class LineClient(asyncio.Protocol):
    """Sends what it is told and waits for lines."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._data = bytearray()
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, net: Network, port: int) -> LineClient:
        """A connection. Raises Lost."""
        client = cls()
        try:
            await net.connect("server", port, lambda: client)
        except OSError as error:
            raise Lost from error
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def until(self, mark: bytes) -> bytes:
        """What came up to and with `mark`. Raises Lost."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _WAIT_S
        while (end := self._data.find(mark)) < 0:
            if self._gone or loop.time() >= deadline:
                raise Lost
            self._waiter = loop.create_future()
            timer = loop.call_at(deadline, self._wake)
            await self._waiter
            timer.cancel()
        part = bytes(self._data[: end + len(mark)])
        del self._data[: end + len(mark)]
        return part

    def send(self, octets: bytes) -> None:
        """Queues octets."""
        self._transport.write(octets)

    async def reply(self) -> bytes:
        """A whole SMTP reply; its last line."""
        while (line := await self.until(b"\r\n"))[3:4] == b"-":
            pass
        return line

    async def ask(self, line: bytes) -> bytes:
        """Sends a line; the SMTP reply."""
        self.send(line + b"\r\n")
        return await self.reply()

    async def command(self, line: bytes) -> bytes:
        """Sends a line; the one line of a POP3 reply."""
        self.send(line + b"\r\n")
        return await self.until(b"\r\n")

    async def listing(self, line: bytes) -> bytes | None:
        """Sends a line; the body of a multi-line POP3 reply, un-stuffed, or None for -ERR."""
        if not (await self.command(line)).startswith(b"+OK"):
            return None
        if self._data[:3] == b".\r\n" or await self._starts_with_end():
            await self.until(b".\r\n")
            return b""
        body = await self.until(b"\r\n.\r\n")
        return (b"\r\n" + body[:-3]).replace(b"\r\n.", b"\r\n")[2:]

    async def _starts_with_end(self) -> bool:
        while len(self._data) < 3:
            before = len(self._data)
            self._waiter = asyncio.get_running_loop().create_future()
            if self._gone:
                raise Lost
            await self._waiter
            if len(self._data) == before and self._gone:
                raise Lost
        return self._data[:3] == b".\r\n"

    def close(self) -> None:
        """Just goes away."""
        if self._transport is not None:
            self._transport.close()


class Peer(asyncio.Protocol):
    """A receiving SMTP server elsewhere, now and then in trouble."""

    taken: dict[tuple[int, str], int]  # (message number, recipient): how often it was taken
    chance: random.Random
    trouble = False

    def __init__(self) -> None:
        self._transport: Any = None
        self._data = bytearray()
        self._in_data = False
        self._recipients: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(b"220 peer ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self._data += data
        while True:
            if self._in_data:
                end = self._data.find(b"\r\n.\r\n")
                if end < 0:
                    return
                message = bytes(self._data[: end + 2])
                del self._data[: end + 5]
                self._in_data = False
                self._take(message)
            else:
                end = self._data.find(b"\r\n")
                if end < 0:
                    return
                line = bytes(self._data[:end])
                del self._data[: end + 2]
                self._command(line)

    def _command(self, line: bytes) -> None:
        verb = line[:4].upper()
        reply = b"250 ok"
        if verb == b"EHLO":
            reply = b"250-peer\r\n250-PIPELINING\r\n250 8BITMIME"
        elif verb == b"MAIL":
            self._recipients = []
            if self.trouble and self.chance.random() < 0.5:
                reply = b"451 4.3.0 in trouble"
        elif verb == b"RCPT":
            self._recipients.append(line[9:].decode().partition(">")[0].lower())
        elif verb == b"DATA":
            self._in_data = True
            reply = b"354 go"
        elif verb == b"QUIT":
            reply = b"221 bye"
        self._transport.write(reply + b"\r\n")
        if verb == b"QUIT":
            self._transport.close()

    def _take(self, message: bytes) -> None:
        number = number_of(message)
        if self.trouble and self.chance.random() < 0.3:
            self._transport.write(b"451 4.3.0 in trouble\r\n")
            return
        for recipient in self._recipients:
            at = (number, recipient)
            self.taken[at] = self.taken.get(at, 0) + 1
        self._transport.write(b"250 taken\r\n")


def number_of(message: bytes) -> int:
    """The number a message of the fleet carries; -1 for any other."""
    at = message.find(b"X-Number: ")
    return int(message[at + 10 :].split(b"\r\n", 1)[0]) if at >= 0 else -1
