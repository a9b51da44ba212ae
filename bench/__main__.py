"""Delivers over real SMTP into 1,000 mailboxes of a throw-away server and reads by POP3; prints a table.

Until the message is in the mailbox: the 250 comes after R durable copies and the index commit. CPU is that of the server
process alone. Everything runs on one machine, so the load generator takes its share of the cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
import time

import msgspec
import uvloop

BODY = b"From: a@b.example\r\nSubject: bench\r\n\r\n"
_words = random.Random(1)
BODY += b"".join(bytes(_words.choices(b"abcdefghijklmnopqrstuvwxyz ", k=70)) + b"\r\n" for _ in range(56)) + b".\r\n"
MAILBOXES = 1000
DOORS = ("smtp.listen", "smtp.submission", "smtp.submissions", "smtp.lmtp", "pop.listen", "pop.listen_tls")


class Server:
    """A throw-away PowerMail as a process of its own."""

    def __init__(self, copies: int) -> None:
        self.root = tempfile.mkdtemp(prefix="powermail-bench-")
        self.data = f"{self.root}/data"
        self.copies = copies
        self.ports: dict[str, int] = {}

    async def command(self, *words: str) -> None:
        """Runs the command line."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "powermail", *words, "--data", self.data, stdout=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 0, words

    async def start(self) -> None:
        """Starts it with 1,000 mailboxes."""
        await self.command("init", "--hostname", "bench.example")
        words = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')]
        for setting in (
            f"cluster.copies_required={self.copies}",
            "smtp.connections_per_address_max=1000",
            "pop.plaintext_login=true",
            "log.json=true",
        ):
            words += ["--set", setting]
        with open(f"{self.root}/log", "wb") as log:  # noqa: ASYNC230
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "powermail", "serve", "--data", self.data, *words, stdout=log, stderr=log
            )
        while len(self.ports) < len(DOORS) or not os.path.exists(f"{self.data}/control.sock"):
            await asyncio.sleep(0.1)
            assert self.process.returncode is None
            with open(f"{self.root}/log", "rb") as log_file:  # noqa: ASYNC230
                for line in log_file:
                    if b'"listening"' in line:
                        event = msgspec.json.decode(line)
                        self.ports[event["door"]] = int(event["address"].rpartition(":")[2])
        with open(f"{self.root}/accounts", "w", encoding="ascii") as file:  # noqa: ASYNC230
            for n in range(MAILBOXES):
                file.write(f'{{"address": "u{n}@bench.example", "password": "{{plain}}secret"}}\n')
        await self.command("account", "import", f"{self.root}/accounts")

    def cpu_s(self) -> float:
        """CPU seconds of the process so far."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written_octets(self) -> int:
        """Octets the process has caused to be written to disk."""
        with open(f"/proc/{self.process.pid}/io", encoding="ascii") as file:
            return int(dict(line.split(": ") for line in file.read().splitlines())["write_bytes"])

    async def stop(self) -> None:
        """Ends it and clears away."""
        self.process.terminate()
        await self.process.wait()
        shutil.rmtree(self.root)


async def sender(port: int, count: int, seed: int, latencies: list[float]) -> None:
    """One connection that waits for every reply."""
    chance = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()
    writer.write(b"EHLO bench\r\n")
    while (await reader.readline())[3:4] == b"-":
        pass
    for _ in range(count):
        for line in (b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<u%d@bench.example>\r\n" % chance.randrange(MAILBOXES)):
            writer.write(line)
            assert (await reader.readline()).startswith(b"250")
        writer.write(b"DATA\r\n")
        await reader.readline()
        began = time.perf_counter()
        writer.write(BODY)
        assert (await reader.readline()).startswith(b"250")
        latencies.append(time.perf_counter() - began)
    writer.close()


async def deliver(server: Server, connections: int, messages: int) -> str:
    """One row of the table."""
    latencies: list[float] = []
    cpu, octets, began = server.cpu_s(), server.written_octets(), time.perf_counter()
    each = messages // connections
    await asyncio.gather(*(sender(server.ports["smtp"], each, n, latencies) for n in range(connections)))
    took = time.perf_counter() - began
    done = len(latencies)
    p99 = statistics.quantiles(latencies, n=100)[98] * 1000
    return (
        f"R={server.copies} connections={connections:<4} delivered/s={done / took:7.0f}  p99 of the final reply={p99:6.1f} ms  "
        f"CPU per 1,000={1000 * (server.cpu_s() - cpu) / done:5.2f} s  "
        f"written per message={(server.written_octets() - octets) / done / 1024:5.1f} KiB"
    )


async def read(server: Server, mailboxes: int) -> str:
    """POP3: login, STAT, RETR of everything one by one, QUIT."""
    count, began = 0, time.perf_counter()
    for n in range(mailboxes):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["pop3"])
        await reader.readline()
        for line in (b"USER u%d@bench.example\r\n" % n, b"PASS secret\r\n", b"STAT\r\n"):
            writer.write(line)
            answer = await reader.readline()
        for number in range(1, int(answer.split()[1]) + 1):
            writer.write(b"RETR %d\r\n" % number)
            await reader.readuntil(b"\r\n.\r\n")
            count += 1
        writer.close()
    took = time.perf_counter() - began
    return f"R={server.copies} POP3 one connection: {count / took:.0f} messages/s, {mailboxes} sessions in {took:.1f} s"


async def main() -> None:
    """All rows."""
    for copies in (1, 2):
        server = Server(copies)
        await server.start()
        try:
            await deliver(server, 8, 400)  # warm
            for connections in (1, 32, 128):
                print(await deliver(server, connections, 600 if connections == 1 else 6000), flush=True)
            print(await read(server, 200), flush=True)
        finally:
            await server.stop()


if __name__ == "__main__":
    uvloop.run(main())
