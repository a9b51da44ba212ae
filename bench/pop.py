"""Owns the reading load: POP3 messages one by one, pipelined, and short sessions."""

from __future__ import annotations

import asyncio
import time

_END = b"\r\n.\r\n"


class Reader(asyncio.Protocol):
    """One connection that counts replies: lines, or whole messages."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._mark = b"\r\n"
        self._left = 0
        self._done: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"closed by the server: {exc}"))

    def data_received(self, data: bytes) -> None:
        start = max(0, len(self._data) - len(self._mark) + 1)
        self._data += data
        self._left -= self._data.count(self._mark, start)
        if self._left <= 0 and self._done is not None and not self._done.done() and self._data.endswith(self._mark):
            self._done.set_result(bytes(self._data[:200]))

    async def ask(self, octets: bytes, replies: int = 1, mark: bytes = b"\r\n") -> bytes:
        """Sends and waits for so many replies; the beginning of what came."""
        self._data.clear()
        self._left, self._mark = replies, mark
        self._done = asyncio.get_running_loop().create_future()
        if octets and self._transport is not None:
            self._transport.write(octets)
        answer = await self._done
        assert not answer.startswith(b"-ERR"), answer
        return answer

    def close(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.close()


async def login(port: int, user: str, password: str) -> tuple[Reader, int]:
    """A session after STAT, and the number of its messages."""
    reader = Reader()
    reader._left, reader._mark = 1, b"\r\n"
    reader._done = asyncio.get_running_loop().create_future()
    await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
    await reader._done
    await reader.ask(f"USER {user}\r\n".encode())
    await reader.ask(f"PASS {password}\r\n".encode())
    return reader, int((await reader.ask(b"STAT\r\n")).split()[1])


async def one_by_one(port: int, user: str, password: str) -> float:
    """Messages a second, each asked for when the one before has come."""
    reader, count = await login(port, user, password)
    began = time.perf_counter()
    for number in range(1, count + 1):
        await reader.ask(b"RETR %d\r\n" % number, mark=_END)
    took = time.perf_counter() - began
    await reader.ask(b"QUIT\r\n")
    reader.close()
    return count / took


async def pipelined(port: int, user: str, password: str) -> float:
    """Messages a second, all asked for at once (RFC 2449 §6.6)."""
    reader, count = await login(port, user, password)
    began = time.perf_counter()
    await reader.ask(b"".join(b"RETR %d\r\n" % number for number in range(1, count + 1)), count, _END)
    took = time.perf_counter() - began
    await reader.ask(b"QUIT\r\n")
    reader.close()
    return count / took


async def sessions(port: int, users: list[str], password: str, count: int, connections: int = 16) -> float:
    """Sessions a second of login, STAT, QUIT."""
    left = list(range(count))

    async def client() -> None:
        while left:
            number = left.pop()
            reader, _ = await login(port, users[number % len(users)], password)
            await reader.ask(b"QUIT\r\n")
            reader.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(connections)))
    return count / (time.perf_counter() - began)
