"""Owns the load: SMTP or LMTP connections that send messages as fast as the replies come, and note how long those take.

One connection has one message on the way at a time. With `pipelining` the envelope goes in one write (RFC 2920); the last
octet of the body to the final reply is what is timed. A message costs the generator about 0.03 ms.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

_words = random.Random(1)
MESSAGE_4K = (
    b"From: a@b.example\r\nSubject: bench\r\n\r\n"
    + b"".join(bytes(_words.choices(b"abcdefghijklmnopqrstuvwxyz ", k=70)) + b"\r\n" for _ in range(56))
    + b".\r\n"
)


@dataclass
class Plan:
    """What all connections of one run share."""

    port: int
    recipients: list[bytes]
    messages: int
    lmtp: bool = False
    pipelining: bool = True
    body: bytes = MESSAGE_4K
    sender: bytes = b"a@b.example"
    per_message: int = 1  # recipients of each message
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: int = 0


class Sender(asyncio.Protocol):
    """One connection."""

    def __init__(self, plan: Plan, seed: int, done: asyncio.Future[None]) -> None:
        self._plan = plan
        self._chance = random.Random(seed)
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._data = b""
        self._expected = [1]  # replies still to come before the next step
        self._step = self._hello
        self._commands: list[bytes] = []
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._plan.failures.append(f"connection lost: {exc}")
            self._done.set_result(None)

    def _write(self, octets: bytes) -> None:
        assert self._transport is not None
        self._transport.write(octets)

    def data_received(self, data: bytes) -> None:
        data = self._data + data
        lines = data.split(b"\r\n")
        self._data = lines.pop()
        for line in lines:
            if line[3:4] == b"-":
                continue
            if line[:1] not in b"23":
                self._plan.failures.append(line.decode("utf-8", "replace"))
            self._expected[0] -= 1
            if not self._expected[0]:
                self._step()

    def _hello(self) -> None:
        self._expected[0] = 1
        self._step = self._next
        self._write(b"LHLO bench.example\r\n" if self._plan.lmtp else b"EHLO bench.example\r\n")

    def _next(self) -> None:
        plan = self._plan
        if plan.started >= plan.messages or plan.failures:
            self._expected[0] = 1
            self._step = self._end
            self._write(b"QUIT\r\n")
            return
        plan.started += 1
        if plan.per_message == 1:
            chosen = [self._chance.choice(plan.recipients)]
        else:
            chosen = plan.recipients[: plan.per_message]
        self._commands = [
            b"MAIL FROM:<%s>\r\n" % plan.sender,
            *(b"RCPT TO:<%s>\r\n" % name for name in chosen),
            b"DATA\r\n",
        ]
        if plan.pipelining:
            self._expected[0] = len(self._commands)
            self._step = self._body
            self._write(b"".join(self._commands))
        else:
            self._one()

    def _one(self) -> None:
        self._expected[0] = 1
        self._step = self._one if len(self._commands) > 1 else self._body
        self._write(self._commands.pop(0))

    def _body(self) -> None:
        self._expected[0] = self._plan.per_message if self._plan.lmtp else 1
        self._step = self._stored
        self._write(self._plan.body)
        self._began = time.perf_counter()

    def _stored(self) -> None:
        self._plan.latencies.append(time.perf_counter() - self._began)
        self._next()

    def _end(self) -> None:
        assert self._transport is not None
        self._done.set_result(None)
        self._transport.close()


async def send(plan: Plan, connections: int) -> float:
    """Sends the plan's messages over so many connections; seconds until the last reply."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    ends = []
    for number in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda n=number, d=done: Sender(plan, n, d), "127.0.0.1", plan.port)  # type: ignore[misc]
        ends.append(done)
    await asyncio.gather(*ends)
    return time.perf_counter() - began
