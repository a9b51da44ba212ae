"""Owns the measurement of what leaves: messages of 4 KiB from a full queue to a sink, over pooled sessions, R = 2.

    python -m bench.leaving [MESSAGES]                      three rounds of this tree
    python -m bench.leaving MESSAGES OTHER_TREE [PAIRS]     this tree and another by turns, and their ratios

The queue is filled while there is no route; then all of it is made due, and the process is started anew with one. It is
measured from the moment that the sink has a tenth of the messages until it has all of them: messages a second, and CPU of the
whole process. The sink takes its share of the same cores; what it can take from a client that only repeats itself is measured
first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, NamedTuple

import uvloop

from bench import machine
from bench.load import Plan, send
from bench.ours import MAILBOXES, Server, mailbox
from bench.pairs import interval, within

_DOMAINS = 50
_ROUNDS = 3
_PAIRS = 6
_SESSIONS = 20
_SINK_MESSAGES = 40_000


class Sink(asyncio.Protocol):
    """Takes every message and keeps none. `at` is what is to be done when so many were taken."""

    taken = 0
    sessions = 0
    at: ClassVar[dict[int, Callable[[], None]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._buffer = b""
        self._body = False
        Sink.sessions += 1
        self._say(b"220 sink\r\n")

    def _say(self, octets: bytes) -> None:
        self._transport.write(octets)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        replies = b""
        while True:
            if self._body:
                end = self._buffer.find(b"\r\n.\r\n")
                if end < 0:
                    break
                self._buffer, self._body = self._buffer[end + 5 :], False
                replies += b"250 2.0.0 taken\r\n"
                Sink.taken += 1
                if Sink.taken in Sink.at:
                    Sink.at.pop(Sink.taken)()
                continue
            line, separator, rest = self._buffer.partition(b"\r\n")
            if not separator:
                break
            self._buffer = rest
            verb = line[:4].upper()
            if verb == b"EHLO":
                replies += b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 0\r\n"
            elif verb == b"DATA":
                self._buffer = b"\r\n" + rest
                replies += b"354 go\r\n"
                self._body = True
            else:
                replies += b"221 bye\r\n" if verb == b"QUIT" else b"250 2.1.0 fine\r\n"
        if replies:
            self._say(replies)


class Forwarding(Server):
    """Every mailbox is a forward."""

    async def start(self) -> None:
        await self.command("init", "--hostname", "bench.example")
        with open(f"{self.root}/accounts", "w", encoding="ascii") as file:  # noqa: ASYNC230
            for n in range(MAILBOXES):
                file.write(f'{{"address": "{mailbox(n)}", "forward": ["to{n}@d{n % _DOMAINS}.example"]}}\n')
        await self.command("account", "import", f"{self.root}/accounts")


class Repeater(asyncio.Protocol):
    """A client that says the same for ever, one message and the next one's envelope in each write."""

    def __init__(self, octets: bytes, until: asyncio.Future[None]) -> None:
        self._octets = octets
        self._until = until

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(b"EHLO repeater\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")

    def data_received(self, data: bytes) -> None:
        if b"354" in data:
            if Sink.taken >= _SINK_MESSAGES:
                self._transport.abort()
                if not self._until.done():
                    self._until.set_result(None)
                return
            self._transport.write(self._octets)


async def sink_alone(port: int) -> float:
    """What the sink takes a second."""
    body = b"Subject: x\r\n\r\n" + b"a line of text that is not short at all\r\n" * 100
    loop = asyncio.get_running_loop()
    until: asyncio.Future[None] = loop.create_future()
    octets = body + b".\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
    began, Sink.taken = time.perf_counter(), 0
    for _ in range(_SESSIONS):
        await loop.create_connection(lambda: Repeater(octets, until), "127.0.0.1", port)
    await until
    return _SINK_MESSAGES / (time.perf_counter() - began)


class Figure(NamedTuple):
    """One round."""

    rate: float  # messages/s
    cpu_s: float  # for 1,000


async def round_of(server: Forwarding, port: int, messages: int) -> Figure:
    """Fills the queue and lets it out."""
    server.more = ()
    await server.serve()
    plan = Plan(server.ports["smtp"], [mailbox(number).encode() for number in range(MAILBOXES)], messages)
    await send(plan, 32)
    assert not plan.failures, plan.failures[:3]
    await server.halt()
    await server.command("queue", "retry", "--all")
    server.more = (f"outbound.smarthost=127.0.0.1:{port}", "outbound.smarthost_tls=none")
    seen: list[tuple[float, float]] = []
    done = asyncio.Event()

    def look() -> None:
        seen.append((machine.cpu_s(server.roots()), time.perf_counter()))
        if len(seen) == 2:
            done.set()

    first = messages // 10
    Sink.taken, Sink.at = 0, {first: look, messages: look}
    await server.serve()
    async with asyncio.timeout(300):
        await done.wait()
    await server.halt()
    (cpu, began), (after, ended) = seen
    return Figure((messages - first) / (ended - began), 1000 * (after - cpu) / (messages - first))


async def alone(port: int, messages: int) -> None:
    """Prints one row."""
    server = Forwarding(2)
    try:
        await server.start()
        Sink.sessions = 0
        found = [await round_of(server, port, messages) for _ in range(_ROUNDS)]
    finally:
        shutil.rmtree(server.root)
    rates, cpus = [figure.rate for figure in found], [figure.cpu_s for figure in found]
    print(
        f"outbound: {statistics.median(rates):.0f} messages/s ({min(rates):.0f} to {max(rates):.0f}) of 4 KiB to a sink over"
        f" {Sink.sessions / _ROUNDS:.0f} sessions, CPU {statistics.median(cpus):.2f} s per 1,000"
        f" ({min(cpus):.2f} to {max(cpus):.2f})",
        flush=True,
    )


async def _into(found: dict[int, Figure], side: int, figure: Awaitable[Figure]) -> None:
    found[side] = await figure


async def against(port: int, messages: int, other: str, pairs: int) -> None:
    """Prints the rounds of both trees, and the ratios of this one to the other."""
    trees = os.getcwd(), os.path.abspath(other)
    servers = Forwarding(2), Forwarding(2)
    rows: list[tuple[Figure, Figure]] = []
    try:
        for tree, server in zip(trees, servers, strict=True):
            await within(tree, server.start())
        for number in range(pairs):
            found: dict[int, Figure] = {}
            for side in (0, 1) if number % 2 else (1, 0):
                await within(trees[side], _into(found, side, round_of(servers[side], port, messages)))
            rows.append((found[0], found[1]))
            print(
                f"  pair {number + 1}: {found[0].rate:.0f} / {found[1].rate:.0f} messages/s,"
                f" CPU {found[0].cpu_s:.2f} / {found[1].cpu_s:.2f} s per 1,000",
                flush=True,
            )
    finally:
        for server in servers:
            shutil.rmtree(server.root)
    for what, field in (("messages/s", 0), ("CPU per 1,000", 1)):
        mine, his = (statistics.median(row[side][field] for row in rows) for side in (0, 1))
        mean, low, high = interval([row[0][field] / row[1][field] for row in rows])
        print(
            f"outbound, {pairs} pairs, {what}: {mine:.2f} / {his:.2f}, ratio {mean:.3f} ({low:.3f} to {high:.3f})", flush=True
        )


async def measure(messages: int, other: str = "", pairs: int = _PAIRS) -> None:
    """Measures this tree, or this and another one by turns, and prints it."""
    listener = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    print(f"the sink alone: {await sink_alone(port):.0f} messages/s over {_SESSIONS} sessions", flush=True)
    if other:
        await against(port, messages, other, pairs)
    else:
        await alone(port, messages)
    listener.close()


async def main() -> None:
    """What the command line asks for."""
    messages, other, pairs = [*sys.argv[1:], *("5000", "", str(_PAIRS))[len(sys.argv) - 1 :]][:3]
    print(machine.interpreter(), flush=True)
    await measure(int(messages), other, int(pairs))


if __name__ == "__main__":
    uvloop.run(main())
