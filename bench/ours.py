"""Owns a throw-away PowerMail as a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile

import msgspec

MAILBOXES = 1000
PASSWORD = "secret"
DOORS = ("smtp.listen", "smtp.submission", "smtp.submissions", "smtp.lmtp", "pop.listen", "pop.listen_tls")
_NAMES = ("smtp", "submission", "submissions", "lmtp", "pop3", "pop3s")


def mailbox(number: int) -> str:
    """The address of a mailbox of the bench."""
    return f"u{number}@bench.example"


class Server:
    """PowerMail with 1,000 mailboxes and three nodes below one directory."""

    def __init__(self, copies: int) -> None:
        self.root = tempfile.mkdtemp(prefix="powermail-bench-")
        self.data = f"{self.root}/data"
        self.copies = copies
        self.ports: dict[str, int] = {}
        self.more: tuple[str, ...] = ()  # settings

    async def command(self, *words: str) -> None:
        """Runs the command line."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "powermail", *words, "--data", self.data, stdout=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 0, words

    async def start(self) -> None:
        """Makes it and starts it."""
        await self.command("init", "--hostname", "bench.example")
        with open(f"{self.root}/accounts", "w", encoding="ascii") as file:  # noqa: ASYNC230
            for n in range(MAILBOXES):
                file.write(f'{{"address": "{mailbox(n)}", "password": "{{plain}}{PASSWORD}"}}\n')
        await self.command("account", "import", f"{self.root}/accounts")
        await self.serve()

    async def serve(self) -> None:
        """Starts the process and waits until its doors are open."""
        words = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')]
        for setting in (
            f"cluster.copies_required={self.copies}",
            "smtp.connections_per_address_max=1000",
            "pop.connections_per_address_max=1000",
            "pop.plaintext_login=true",
            "log.json=true",
            *self.more,
        ):
            words += ["--set", setting]
        with open(f"{self.root}/log", "wb") as log:  # noqa: ASYNC230
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "powermail", "serve", "--data", self.data, *words, stdout=log, stderr=log
            )
        self.ports = {}
        while len(self.ports) < len(_NAMES) or not os.path.exists(f"{self.data}/control.sock"):
            await asyncio.sleep(0.1)
            assert self.process.returncode is None, "the server ended"
            with open(f"{self.root}/log", "rb") as log_file:  # noqa: ASYNC230
                for line in log_file:
                    if b'"listening"' in line:
                        event = msgspec.json.decode(line)
                        self.ports[event["door"]] = int(event["address"].rpartition(":")[2])

    async def log_octets(self) -> tuple[int, int]:
        """(octets of records in all logs, copies of messages)."""
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "powermail", "node", "list", "--json", "--data", self.data],
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        nodes = msgspec.json.decode(output)
        return sum(node["log_octets"] for node in nodes), sum(node["messages"] for node in nodes)

    def roots(self) -> list[int]:
        """The processes that are measured."""
        return [self.process.pid]

    async def delivered(self, count: int) -> None:
        """Waits until so many more messages are in mailboxes: they are, when the reply has come."""

    async def halt(self) -> None:
        """Ends the process; the data stays."""
        self.process.terminate()
        await self.process.wait()

    async def stop(self) -> None:
        """Ends it and clears away."""
        await self.halt()
        shutil.rmtree(self.root)
