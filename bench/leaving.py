"""Owns the measurement of what leaves: messages of 4 KiB from a full queue to a sink, over pooled sessions.

The queue is filled while there is no route; then the process is started anew with one, everything is made due, and it is
timed from there until the sink has said 250 to the last. The sink takes its share of the same cores.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import time

import msgspec
import uvloop

from bench import machine
from bench.load import Plan, send
from bench.ours import MAILBOXES, Server, mailbox

_DOMAINS = 50
_ROUNDS = 3


class Sink(asyncio.Protocol):
    """Takes every message and keeps none."""

    taken = 0
    sessions = 0
    wanted = 0
    done: asyncio.Event

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
                if Sink.taken == Sink.wanted:
                    Sink.done.set()
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

    async def looked_at(self) -> None:
        """Waits until every row was tried once without a route, and is due later."""
        while True:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "powermail", "queue", "list", "--json", "--data", self.data],
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            if all(row["last_status"] for row in msgspec.json.decode(output)):
                return
            await asyncio.sleep(1.0)


async def measure(messages: int) -> None:
    """Prints one row."""
    server = Forwarding(2)
    listener = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    rates, cpus = [], []
    try:
        await server.start()
        for _ in range(_ROUNDS):
            server.more = ()
            await server.serve()
            plan = Plan(server.ports["smtp"], [mailbox(number).encode() for number in range(MAILBOXES)], messages)
            await send(plan, 32)
            assert not plan.failures, plan.failures[:3]
            await server.looked_at()
            await server.halt()
            server.more = (f"outbound.smarthost=127.0.0.1:{port}", "outbound.smarthost_tls=none")
            Sink.done, Sink.wanted = asyncio.Event(), Sink.taken + messages
            await server.serve()
            cpu, began = machine.cpu_s(server.roots()), time.perf_counter()
            await server.command("queue", "retry", "--all")
            async with asyncio.timeout(300):
                await Sink.done.wait()
            rates.append(messages / (time.perf_counter() - began))
            cpus.append(1000 * (machine.cpu_s(server.roots()) - cpu) / messages)
            await server.halt()
        rate, cpu = statistics.median(rates), statistics.median(cpus)
        print(
            f"outbound: {rate:.0f} messages/s ({min(rates):.0f} to {max(rates):.0f}) of 4 KiB to a sink over"
            f" {Sink.sessions / _ROUNDS:.0f} sessions, CPU {cpu:.2f} s per 1,000",
            flush=True,
        )
    finally:
        listener.close()
        shutil.rmtree(server.root)


if __name__ == "__main__":
    uvloop.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5000))
