"""A whole PowerMail in this process on real sockets and a real disk; checked for consistency after every test."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from powermail.app.compose import PowerMail
from powermail.app.setup import initialise
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world

DOORS = ["smtp.listen", "smtp.submission", "smtp.submissions", "smtp.lmtp", "pop.listen", "pop.listen_tls"]


class Client:
    """A line client that speaks exactly what a test tells it to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def line(self) -> str:
        """One line of the server."""
        async with asyncio.timeout(20):
            return (await self.reader.readline()).decode("utf-8", "replace").rstrip("\r\n")

    async def reply(self) -> str:
        """A whole SMTP reply; its last line."""
        while True:
            line = await self.line()
            if line[3:4] != "-":
                return line

    async def ask(self, octets: bytes | str) -> str:
        """Sends a line (CRLF added to str) or octets; the reply."""
        self.send(octets)
        return await self.reply()

    def send(self, octets: bytes | str) -> None:
        """Sends without waiting."""
        self.writer.write(octets if isinstance(octets, bytes) else f"{octets}\r\n".encode())

    async def closed(self) -> bool:
        """True when the server has closed."""
        async with asyncio.timeout(20):
            return await self.reader.read() == b""

    async def start_tls(self) -> None:
        """Upgrades this connection."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        await self.writer.start_tls(context, server_hostname="localhost")

    def close(self) -> None:
        """Just goes away."""
        self.writer.close()


class Running:
    """A started PowerMail and short ways to use it."""

    def __init__(self, powermail: PowerMail, data: Path) -> None:
        self.powermail = powermail
        self.data = data
        self.problems_expected = False
        self.clients: list[Client] = []

    async def connect(self, door: str = "smtp") -> Client:
        """A connection that has read the greeting; closed at the end of the test if the test has not."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.powermail.listening[door], limit=2**24)
        client = PopClient(reader, writer) if door.startswith("pop") else Client(reader, writer)
        self.clients.append(client)
        await (client.line() if door.startswith("pop") else client.reply())
        return client

    async def operation(self, name: str, **arguments: object) -> object:
        """Calls an operator's operation."""

        async def progress(done: int, total: int) -> None:
            pass

        return await self.powermail.operations.call(name, dict(arguments), progress)

    async def mailbox(self, address: str, password: str = "{plain}secret", **more: object) -> None:
        """Makes a mailbox or a forward."""
        values: dict[str, object] = {"quota_octets": 0, "forward": [], "keep_copy": False, **more}
        await self.operation("account_add", address=address, password=password, **values)

    async def send(self, recipients: list[str], octets: bytes, sender: str = "sender@example.org") -> str:
        """One message over SMTP (octets already stuffed); the final reply."""
        client = await self.connect()
        await client.ask("EHLO test.example")
        await client.ask(f"MAIL FROM:<{sender}>")
        for recipient in recipients:
            reply = await client.ask(f"RCPT TO:<{recipient}>")
            if not reply.startswith("250"):
                client.close()
                return reply
        await client.ask("DATA")
        reply = await client.ask(octets + b"\r\n.\r\n")
        client.send("QUIT")
        client.close()
        return reply

    async def log_in(self, address: str) -> PopClient:
        """A POP3 session behind its login."""
        client = await self.connect("pop3")
        assert isinstance(client, PopClient)
        await client.start_tls_pop()
        await client.ask_pop(f"USER {address}")
        await client.ask_pop("PASS secret")
        return client

    async def read(self, address: str) -> list[bytes]:
        """All messages of an address by POP3, without our trace fields."""
        client = await self.log_in(address)
        count = int((await client.ask_pop("STAT")).split()[1])
        found = []
        for number in range(1, count + 1):
            assert (await client.ask_pop(f"RETR {number}")).startswith("+OK")
            found.append(without_trace(await client.multiline()))
        await client.ask_pop("QUIT")
        client.close()
        return found


class PopClient(Client):
    """The same for POP3."""

    async def ask_pop(self, line: str) -> str:
        self.send(line)
        return await self.line()

    async def multiline(self) -> bytes:
        """A dot-ended response, un-stuffed."""
        octets = b"\r\n"  # the end mark may be the first line
        async with asyncio.timeout(20):
            while not octets.endswith(b"\r\n.\r\n"):
                octets += await self.reader.readuntil(b".\r\n")
        return octets[:-3].replace(b"\r\n.", b"\r\n")[2:]

    async def start_tls_pop(self) -> None:
        assert (await self.ask_pop("STLS")).startswith("+OK")
        await self.start_tls()


def without_trace(octets: bytes) -> bytes:
    """Takes our Return-Path and Received fields off."""
    match = re.match(rb"Return-Path: [^\r]*\r\nReceived: [^\r]*\r\n(?:\t[^\r]*\r\n)*", octets)
    assert match
    return octets[match.end() :]


async def start(data: Path, *overrides: str) -> PowerMail:
    """Starts on free ports."""
    log = MemoryLog()
    world = system_world(log)
    words = [f'{name}=["127.0.0.1:0"]' for name in DOORS]
    settings = load_file(str(data / "powermail.toml"), [*words, "cluster.reserve_octets=0", *overrides])

    def broken(error: BaseException) -> None:
        raise AssertionError("a storage invariant broke") from error

    powermail = PowerMail(world, settings, str(data), broken)
    try:
        await powermail.start()
    except BaseException:
        await powermail.stop(0.1)
        raise
    return powermail


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A PowerMail with nobody in it but the postmaster."""
    data = tmp_path / "data"
    await initialise(system_world(MemoryLog()), str(data), "localhost")
    powermail = await start(data)
    made = Running(powermail, data)
    yield made
    for client in made.clients:
        client.close()
        try:
            await client.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass
    try:
        result = await made.operation("verify")
        bugs = [line for line in made.powermail.world.log.lines if " bug " in f" {line} "]  # type: ignore[attr-defined]
    finally:
        await made.powermail.stop(0.5)
    if not made.problems_expected:
        assert msgspec.to_builtins(result)["problems"] == []
    assert bugs == []
