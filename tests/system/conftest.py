"""A whole PowerMail in this process on real sockets and a real disk; checked for consistency after every test."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from powermail.app.compose import PowerMail
from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.index.contract import EntryFacts, MailboxFacts
from powermail.index.sqlite import SqliteIndex
from powermail.storage.contract import StorageNode
from tests.system.sick import SickDisk

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


class Place(Protocol):
    """A PowerMail that serves: how to reach it."""

    clients: list[Client]

    def port(self, door: str) -> int:
        """Where that door listens."""

    async def operation(self, name: str, **arguments: object) -> object:
        """Calls an operator's operation."""

    async def connect(self, door: str = "smtp") -> Client:
        """A connection that has read the greeting; closed at the end of the test if the test has not."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port(door), limit=2**24)
        client = PopClient(reader, writer) if door.startswith("pop") else Client(reader, writer)
        self.clients.append(client)
        await (client.line() if door.startswith("pop") else client.reply())
        return client

    async def mailbox(self, address: str, password: str = "{plain}secret", **more: object) -> None:
        """Makes a mailbox or a forward."""
        values: dict[str, object] = {"quota_octets": 0, "forward": [], "keep_copy": False, **more}
        await self.operation("account_add", address=address, password=password, **values)

    async def send(self, recipients: list[str], octets: bytes, sender: str = "sender@example.org") -> str:
        """One message over SMTP (octets already stuffed); the final reply, or the first that refuses a command."""
        client = await self.connect()
        await client.ask("EHLO test.example")
        rest = [(f"RCPT TO:<{recipient}>", "250") for recipient in recipients]
        for command, wanted in ((f"MAIL FROM:<{sender}>", "250"), *rest, ("DATA", "354")):
            reply = await client.ask(command)
            if not reply.startswith(wanted):
                client.close()
                return reply
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
        return [without_trace(octets) for octets in await self.retrieve(address)]

    async def retrieve(self, address: str) -> list[bytes]:
        """The same as they are."""
        client = await self.log_in(address)
        count = int((await client.ask_pop("STAT")).split()[1])
        found = []
        for number in range(1, count + 1):
            assert (await client.ask_pop(f"RETR {number}")).startswith("+OK")
            found.append(await client.multiline())
        await client.ask_pop("QUIT")
        client.close()
        return found

    async def fill(self, count: int, start_at: int = 0) -> list[bytes]:
        """Sends numbered messages to ann; their octets."""
        sent = []
        for number in range(start_at, start_at + count):
            octets = b"S: %d\r\n\r\n%s" % (number, hashlib.sha256(b"%d" % number).hexdigest().encode() * 20)
            assert (await self.send(["ann@local.example"], octets)).startswith("250")
            sent.append(octets + b"\r\n")
        return sent

    async def dele(self, address: str, *numbers: int) -> None:
        """Deletes messages by POP3."""
        client = await self.log_in(address)
        for number in numbers:
            assert (await client.ask_pop(f"DELE {number}")).startswith("+OK")
        assert (await client.ask_pop("QUIT")).startswith("+OK")
        client.close()

    async def status(self) -> dict[str, Any]:
        """What `powermail status` shows; that there is no route outward is no trouble here, where mostly none is set."""
        status = await self.operation("status")
        assert isinstance(status, dict)
        status["degraded"] = [said for said in status["degraded"] if "there is no route" not in said]
        return status

    async def until(self, what: str, holds: Callable[[dict[str, Any]], bool], within_s: float = 20.0) -> dict[str, Any]:
        """Waits for the workers to bring the status so far; the status then."""
        ends_at = time.monotonic() + within_s
        while not holds(status := await self.status()):
            assert time.monotonic() < ends_at, f"after {within_s} s still not: {what}; {status}"
            await asyncio.sleep(0.05)
        return status


class Running(Place):
    """A started PowerMail in this process and short ways to use it."""

    def __init__(self, powermail: PowerMail, data: Path, disk: SickDisk | None = None) -> None:
        self.powermail = powermail
        self.data = data
        self.disk = disk or SickDisk()
        self.problems_expected = False
        self.bugs_expected = False
        self.clients: list[Client] = []

    @property
    def index(self) -> SqliteIndex:
        """The index of the process that runs now."""
        found = self.powermail.core.index
        assert isinstance(found, SqliteIndex)
        return found

    @property
    def nodes(self) -> list[StorageNode]:
        """Its nodes, in order of their names."""
        return [node for _, node in sorted(self.powermail.core.cluster.nodes.items())]

    def lines(self, word: str = "") -> list[str]:
        """Lines of its log with that word in them."""
        log = self.powermail.world.log
        assert isinstance(log, MemoryLog)
        return [line for line in log.lines if f" {word} " in f" {line} "] if word else list(log.lines)

    async def stop(self) -> None:
        """Stops in good order."""
        await self.powermail.stop(0.5)

    async def start(self, *overrides: str) -> None:
        """Starts again."""
        self.powermail = await start(self.data, *overrides, disk=self.disk)

    async def each(self, step: Callable[[StorageNode], Awaitable[Any]]) -> None:
        """One step of a job that has a loop for each node, on every node."""
        for node in self.nodes:
            await step(node)

    async def inbox(self, address: str = "ann@local.example") -> MailboxFacts:
        """The facts of an INBOX that has, or had, mail."""
        account = await self.powermail.core.directory.find(address)
        assert account is not None
        facts = await self.index.find_mailbox(account.id, "INBOX")
        assert facts is not None
        return facts

    async def entries(self, address: str = "ann@local.example") -> list[EntryFacts]:
        """Its entries."""
        facts = await self.inbox(address)
        return await self.index.entries(facts.id, 0, 1 << 32, 1 << 20)

    async def heal(self) -> None:
        """Lets keeper work until every message has its copies and nothing is owed."""
        core, keeping = self.powermail.core, self.powermail.keeping
        status: dict[str, Any] = {}
        for _ in range(100):
            await self.each(core.cluster.watch)
            await self.each(core.admission.step)
            await core.reconciler.settle()
            await self.each(keeping.collector.step)
            await keeping.repairer.step()
            await keeping.forgetter.step()
            await keeping.drainer.step()
            status = await self.status()
            if not status["degraded"] and not any(node["owed"] for node in status["nodes"]):
                return
        raise AssertionError(f"not healed: {status['degraded']} {status['nodes']}")

    def port(self, door: str) -> int:
        """Where that door listens."""
        return self.powermail.front.listening[door]

    async def operation(self, name: str, **arguments: object) -> object:
        """Calls an operator's operation."""

        async def progress(done: int, total: int) -> None:
            pass

        return await self.powermail.operations.call(name, dict(arguments), progress)


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


async def start(data: Path, *overrides: str, disk: SickDisk | None = None) -> PowerMail:
    """Starts on free ports."""
    log = MemoryLog()
    world = system_world(log)
    if disk is not None:
        world.disk = disk
    words = [f'{name}=["127.0.0.1:0"]' for name in DOORS]
    # Segments are small, so that no test waits for the unused room of large ones to be looked through at each start.
    words += ["cluster.reserve_octets=0", f"cluster.segment_octets={4 * limits.MIB}"]
    settings = load_file(str(data / "powermail.toml"), [*words, *overrides])

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
async def running(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    """A PowerMail with nobody in it but the postmaster; its parameters, if any, are settings for its first start."""
    data = tmp_path / "data"
    await initialise(system_world(MemoryLog()), str(data), "localhost")
    disk = SickDisk()
    made = Running(await start(data, *getattr(request, "param", ()), disk=disk), data, disk)
    yield made
    disk.end_all()
    for client in made.clients:
        client.close()
        try:
            await client.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass
    try:
        result = await made.operation("verify")
        bugs = made.lines("bug")
    finally:
        await made.powermail.stop(0.5)
    if not made.problems_expected:
        assert msgspec.to_builtins(result)["problems"] == []
    if not made.bugs_expected:
        assert bugs == []
