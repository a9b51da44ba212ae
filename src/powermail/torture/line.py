"""Owns the wire of the torture's clients: lines over a real connection, each wait with a deadline."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

_LINE_OCTETS_MAX = 2**22
CONNECT_S = 4.0
REPLY_S = 20.0  # a server that says nothing for so long is left


class Lost(Exception):
    """The connection is gone, was never there, or nothing comes."""


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # a throw-away cluster has certificates of its own
    return context


_TLS = _context()


class Line:
    """A client of SMTP or POP3 that says what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int, tls: bool = False, within_s: float = CONNECT_S) -> Line:
        """A connection. Raises Lost."""
        try:
            async with asyncio.timeout(within_s):
                context = _TLS if tls else None
                return cls(*await asyncio.open_connection(host, port, ssl=context, limit=_LINE_OCTETS_MAX))
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            raise Lost(f"{host}:{port}: {error or 'no answer'}") from error

    async def until(self, mark: bytes, within_s: float = REPLY_S) -> bytes:
        """What came up to and with `mark`. Raises Lost."""
        try:
            async with asyncio.timeout(within_s):
                return await self._reader.readuntil(mark)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Lost(str(error) or "no answer") from error

    def send(self, octets: bytes) -> None:
        """Sends without waiting for an answer."""
        self._writer.write(octets)

    async def reply(self, within_s: float = REPLY_S) -> bytes:
        """A whole SMTP reply; its last line."""
        while (line := await self.until(b"\r\n", within_s))[3:4] == b"-":
            pass
        return line.rstrip()

    async def ask(self, line: bytes) -> bytes:
        """Sends a line; the SMTP reply."""
        self.send(line + b"\r\n")
        return await self.reply()

    async def command(self, line: bytes) -> bytes:
        """Sends a line; the one line of a POP3 reply."""
        self.send(line + b"\r\n")
        return (await self.until(b"\r\n")).rstrip()

    async def listing(self, line: bytes) -> bytes | None:
        """Sends a line; the body of a multi-line POP3 reply, un-stuffed, or None for -ERR."""
        if not (await self.command(line)).startswith(b"+OK"):
            return None
        lines = []
        while (read := await self.until(b"\r\n")) != b".\r\n":
            lines.append(read[1:] if read.startswith(b".") else read)
        return b"".join(lines)

    async def close(self) -> None:
        """Just goes away."""
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
