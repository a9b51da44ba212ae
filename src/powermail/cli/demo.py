"""Owns the demo: a throw-away PowerMail as a real process, real SMTP and POP3, and storage taken away and given back.

Every step is checked; the exit status is not zero if one did not hold.
"""

from __future__ import annotations

import asyncio
import os
import poplib
import re
import shutil
import smtplib
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from powermail.base.settings import NodeSettings, load_file
from powermail.cli.samples import corpus, own_samples
from powermail.wire.dot import DotReader

_console = Console(highlight=False)
_WAIT_S = 60.0
_READERS = ("ann@demo.example", "bob@demo.example")
_MANY = 200


class StepFailed(Exception):
    """A step of the demo did not hold."""


class Peer:
    """A small receiving SMTP server: where forwards arrive."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, list[str], bytes]] = []
        self.port = 0

    async def start(self) -> None:
        """Listens on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender, recipients = "", list[str]()
        writer.write(b"220 peer ESMTP\r\n")
        try:
            while line := await reader.readline():
                verb = line[:4].upper()
                if verb == b"EHLO":
                    writer.write(b"250-peer\r\n250-PIPELINING\r\n250 8BITMIME\r\n")
                    continue
                if verb == b"DATA":
                    writer.write(b"354 go\r\n")
                    parser, body, done = DotReader(), b"", False
                    while not done:
                        part, _, done = parser.feed(await reader.readuntil(b"\n"))
                        body += part
                    self.messages.append((sender, recipients, body))
                elif verb == b"MAIL":
                    sender, recipients = line.decode().split("<", 1)[1].split(">")[0], []
                elif verb == b"RCPT":
                    recipients.append(line.decode().split("<", 1)[1].split(">")[0])
                writer.write(b"250 OK\r\n" if verb != b"QUIT" else b"221 bye\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class Demo:
    """The story, step by step."""

    def __init__(self, root: str, messages: list[tuple[str, bytes]]) -> None:
        self._data = f"{root}/data"
        self._away = f"{root}/away"
        self._messages = messages
        self._peer = Peer()
        self._ports: dict[str, int] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._password = ""
        self._sent: dict[str, list[bytes]] = {reader: [] for reader in _READERS}
        self._serial = 0

    # -- tools ----------------------------------------------------------------------------------------------------

    async def _command(self, *words: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "powermail", *words, "--data", self._data, "--json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        if process.returncode not in (0, 1):
            raise StepFailed(f"powermail {' '.join(words)}: {err.decode().strip()}")
        return msgspec.json.decode(out) if out.strip() else None

    async def _status(self) -> Any:
        return await self._command("status")

    async def _until(self, what: str, holds: Callable[[Any], bool]) -> float:
        """Waits until the status holds; the seconds it took."""
        began = time.monotonic()
        while time.monotonic() - began < _WAIT_S:
            if holds(await self._status()):
                return time.monotonic() - began
            await asyncio.sleep(0.1)
        raise StepFailed(f"after {_WAIT_S:.0f} s still not: {what}")

    def _expect(self, truth: bool, what: str) -> None:
        if not truth:
            raise StepFailed(what)

    def _send(self, recipients: list[str], octets: bytes) -> tuple[int, bytes]:
        """One message by real SMTP. Returns the final reply."""
        with smtplib.SMTP("127.0.0.1", self._ports["smtp"], timeout=30) as client:
            client.ehlo()
            code, text = client.mail("demo@sender.example")
            if code != 250:
                return code, text
            for recipient in recipients:
                code, text = client.rcpt(recipient)
                if code != 250:
                    return code, text
            code, text = client.docmd("DATA")
            if code != 354:
                return code, text
            stuffed = re.sub(rb"(?m)^\.", b"..", octets)
            client.send(stuffed + (b".\r\n" if stuffed.endswith(b"\r\n") else b"\r\n.\r\n"))
            return client.getreply()

    def _probe(self) -> tuple[int, bytes]:
        """A small new message for both readers."""
        self._serial += 1
        octets = b"Subject: probe %d\r\n\r\nnumber %d\r\n" % (self._serial, self._serial)
        code, text = self._send(list(_READERS), octets)
        if code == 250:
            for reader in _READERS:
                self._sent[reader].append(octets)
        return code, text

    def _read(self, reader: str) -> tuple[int, list[bytes]]:
        """(how many are listed, what can be read now) by real POP3 over TLS; trace fields taken off."""
        context = ssl._create_unverified_context()
        client = poplib.POP3_SSL("127.0.0.1", self._ports["pop3s"], timeout=60, context=context)
        poplib._MAXLINE = 2**24  # type: ignore[attr-defined]
        try:
            client.user(reader)
            client.pass_(self._password)
            count = client.stat()[0]
            found = []
            for number in range(1, count + 1):
                try:
                    _, lines, _ = client.retr(number)
                except poplib.error_proto:
                    continue
                found.append(_without_trace(b"\r\n".join(lines) + b"\r\n"))
            return count, found
        finally:
            client.quit()

    # -- steps ----------------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Starts the server."""
        await self._peer.start()
        await self._command_init()
        ports = ["smtp.listen", "smtp.submission", "smtp.submissions", "smtp.lmtp", "pop.listen", "pop.listen_tls"]
        words = [word for name in ports for word in ("--set", f'{name}=["127.0.0.1:0"]')]
        words += ["--set", f"outbound.smarthost=127.0.0.1:{self._peer.port}", "--set", "outbound.smarthost_tls=none"]
        words += ["--set", "cluster.repair_after_s=5", "--set", "log.json=true"]
        self._log = open(f"{self._data}.log", "w+b")  # noqa: SIM115  lives as long as the server
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "powermail", "serve", "--data", self._data, *words, stdout=self._log, stderr=self._log
        )
        for _ in range(200):
            await asyncio.sleep(0.1)
            self._read_ports()
            if len(self._ports) == 6 and os.path.exists(f"{self._data}/control.sock"):
                break
            self._expect(self._process.returncode is None, "the server did not start: " + self._tail())
        self._password = os.urandom(8).hex()
        for reader in _READERS:
            await self._command("account", "add", reader, "--password", self._password)
        rows = b"".join(b'{"address":"user%d@demo.example"}\n' % n for n in range(_MANY))
        with open(f"{self._data}.accounts", "wb") as file:
            file.write(rows)
        await self._command("account", "import", f"{self._data}.accounts")
        await self._command("forward", "add", "forward@demo.example", "away@elsewhere.example")
        return "three storage nodes in three directories, two copies of each message"

    async def _command_init(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "powermail", "init", "--data", self._data, "--hostname", "demo.example",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        self._expect(await process.wait() == 0, "init failed")
        self._nodes: list[NodeSettings] = load_file(f"{self._data}/powermail.toml").cluster.nodes

    def _read_ports(self) -> None:
        with open(f"{self._data}.log", "rb") as file:
            for line in file:
                if b'"event":"listening"' in line:
                    event = msgspec.json.decode(line)
                    self._ports[event["door"]] = int(event["address"].rpartition(":")[2])

    def _tail(self) -> str:
        with open(f"{self._data}.log", "rb") as file:
            return file.read()[-800:].decode("utf-8", "replace")

    async def send_all(self) -> str:
        """Sends every message to the readers."""
        refused = 0
        with Progress(console=_console, transient=True) as bar:
            task = bar.add_task("sending", total=len(self._messages))
            for number, (name, octets) in enumerate(self._messages):
                reader = _READERS[number % len(_READERS)]
                code, text = await asyncio.to_thread(self._send, [reader], octets)
                if code == 250:
                    self._sent[reader].append(octets)
                else:
                    refused += 1
                    _console.print(f"    {name} refused: {code} {text.decode()}", markup=False)
                bar.advance(task)
        self._expect(refused * 20 <= len(self._messages), f"{refused} messages were refused")
        return f"{len(self._messages) - refused} messages sent, {refused} refused"

    async def send_many(self) -> str:
        """One message for 200 recipients is stored once per copy."""
        before = await self._status()
        recipients = [f"user{n}@demo.example" for n in range(_MANY)]
        began = time.monotonic()
        code, _ = await asyncio.to_thread(self._send, recipients, b"Subject: all\r\n\r\nto everybody\r\n")
        took = time.monotonic() - began
        after = await self._status()
        self._expect(code == 250, f"answered {code}")
        entries = after["totals"]["entries"] - before["totals"]["entries"]
        stored = after["totals"]["messages"] - before["totals"]["messages"]
        self._expect((entries, stored) == (_MANY, 1), f"{entries} entries, {stored} messages stored")
        return f"{entries} mailboxes, stored once on 2 nodes, {took * 1000:.0f} ms"

    async def forward(self) -> str:
        """A forward reaches a real peer with a rewritten sender."""
        octets = b"Subject: onward\r\n\r\n.dots\r\n..too\r\n"
        code, _ = await asyncio.to_thread(self._send, ["forward@demo.example"], octets)
        self._expect(code == 250, f"answered {code}")
        for _ in range(100):
            if self._peer.messages:
                break
            await asyncio.sleep(0.1)
        self._expect(bool(self._peer.messages), "nothing arrived at the peer")
        sender, recipients, body = self._peer.messages[0]
        self._expect(recipients == ["away@elsewhere.example"], f"recipients {recipients}")
        self._expect(body.endswith(octets), "the octets changed on the way")
        self._expect(sender.startswith("SRS0="), f"sender {sender}")
        return f"arrived at the peer, sender rewritten to {sender}"

    async def show_copies(self) -> str:
        """`powermail list` shows where the copies lie."""
        found = await self._command("list", _READERS[0])
        self._expect(found["not_redundant"] == 0, "some are not redundant")
        for message in found["messages"][:3]:
            _console.print(f"    {message['key']}  nodes {' '.join(message['nodes'])}", markup=False)
        return f"{len(found['messages'])} messages, each on two nodes of different groups"

    def _path(self, number: int) -> str:
        return f"{self._data}/{self._nodes[number].path}"

    def _take(self, number: int) -> None:
        os.makedirs(self._away, exist_ok=True)
        os.rename(self._path(number), f"{self._away}/{number}")

    async def lose_one(self) -> str:
        """One storage directory goes away: mail is received and read without a gap."""
        stop, worst, count = asyncio.Event(), 0.0, 0

        async def stream() -> None:
            nonlocal worst, count
            while not stop.is_set():
                began = time.monotonic()
                code, text = await asyncio.to_thread(self._probe)
                worst = max(worst, time.monotonic() - began)
                self._expect(code == 250, f"answered {code} {text.decode()}")
                count += 1

        sending = asyncio.create_task(stream())
        try:
            await asyncio.sleep(0.5)
            self._take(0)
            await self._until("node noticed as missing", lambda s: s["nodes"][0]["state"] == "missing")
            await asyncio.sleep(1.0)
        finally:
            stop.set()
            await sending
        self._expect(worst < 5.0, f"a delivery took {worst:.1f} s")
        await self._compare_all()
        return f"{count} messages received meanwhile, slowest {worst * 1000:.0f} ms; everything readable"

    async def lose_two(self) -> str:
        """A second one goes: delivery answers 451, listings stay complete, what has a copy is read."""
        listed = {reader: len(self._sent[reader]) for reader in _READERS}
        self._take(1)
        await self._until("second node noticed", lambda s: s["nodes"][1]["state"] == "missing")
        code, text = await asyncio.to_thread(self._probe)
        self._expect(code in (450, 451), f"delivery answered {code} {text.decode()}")
        readable = 0
        for reader in _READERS:
            count, found = await asyncio.to_thread(self._read, reader)
            self._expect(count == listed[reader], f"{reader} lists {count} of {listed[reader]}")
            self._expect(all(octets in self._sent_canonical(reader) for octets in found), "a wrong message was served")
            readable += len(found)
        return f"answered {code}; listings complete; {readable} of {sum(listed.values())} messages still readable"

    async def give_back(self) -> str:
        """Both come back, one of them empty: everything heals to two copies."""
        os.rename(f"{self._away}/0", self._path(0))
        shutil.rmtree(f"{self._away}/1")
        os.makedirs(self._path(1))
        await self._until("first node back", lambda s: s["nodes"][0]["state"] == "read-write")
        await self._command("node", "replace", self._nodes[1].id)
        took = await self._until("full redundancy", lambda s: not s["degraded"] and s["not_redundant"]["messages"] == 0)
        return f"fully redundant again after {took:.1f} s"

    def _sent_canonical(self, reader: str) -> set[bytes]:
        return {octets if octets.endswith(b"\r\n") else octets + b"\r\n" for octets in self._sent[reader]}

    async def _compare_all(self) -> int:
        total = 0
        for reader in _READERS:
            count, found = await asyncio.to_thread(self._read, reader)
            wanted = sorted(o if o.endswith(b"\r\n") else o + b"\r\n" for o in self._sent[reader])
            self._expect(count == len(wanted), f"{reader}: {count} listed, {len(wanted)} sent")
            self._expect(sorted(found) == wanted, f"{reader}: octets differ")
            total += count
        return total

    async def read_back(self) -> str:
        """Everything is read over POP3 and compared octet for octet."""
        total = await self._compare_all()
        result = await self._command("verify")
        self._expect(not result["problems"], f"verify: {result['problems'][:3]}")
        return f"{total} messages equal octet for octet; verify found nothing"

    async def stop(self) -> None:
        """Ends the server by its drain."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            async with asyncio.timeout(40):
                await self._process.wait()
        if hasattr(self, "_log"):
            self._log.close()


def _without_trace(octets: bytes) -> bytes:
    """Takes our Return-Path and Received fields off."""
    match = re.match(rb"Return-Path: [^\r]*\r\nReceived: [^\r]*\r\n(?:\t[^\r]*\r\n)*", octets)
    return octets[match.end() :] if match else octets


async def demo(corpus_path: str | None) -> int:
    """Runs the story; 0 if every step held."""
    messages = corpus(corpus_path) if corpus_path else own_samples()
    root = tempfile.mkdtemp(prefix="powermail-demo-")
    story = Demo(root, messages)
    steps = [
        ("start a PowerMail", story.start),
        (f"send {len(messages)} messages", story.send_all),
        (f"one message for {_MANY} recipients", story.send_many),
        ("forward to another host", story.forward),
        ("where the copies lie", story.show_copies),
        ("take one storage directory away", story.lose_one),
        ("take a second one away", story.lose_two),
        ("give them back, one emptied", story.give_back),
        ("read everything back", story.read_back),
    ]
    failed = 0
    try:
        for number, (title, step) in enumerate(steps, 1):
            _console.print(f"[bold]{number}. {title}[/bold]")
            _console.print(f"    held: {await step()}", markup=False)
    except (StepFailed, OSError, smtplib.SMTPException, poplib.error_proto) as error:
        failed = 1
        _console.print(f"    DID NOT HOLD: {type(error).__name__}: {error}", markup=False)
    finally:
        await story.stop()
        if failed:
            _console.print(f"    kept for you to look at: {root}", markup=False)
        else:
            shutil.rmtree(root, ignore_errors=True)
    _console.print("every step held" if not failed else "the demo failed")
    return failed
