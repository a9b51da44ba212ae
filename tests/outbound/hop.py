"""A next hop that follows a script, on the simulated network or on sockets: how, is a table from a moment to what it does.

A moment is a verb (`MAIL`), a verb and a word of its line (`RCPT bad`), or CONNECT, BODY (the first octets of a message), END
(the dot behind it), TLS (the handshake is to begin). What it does then is a row of steps, with `|` between them:

    250 fine        that line
    RAW 250 fi      these octets, as they are; \\r and \\n are written so
    SLEEP 40        nothing for so many seconds, whatever comes
    SILENT          no reply; without other steps, to this moment
    CLOSE           closes
    RESET           closes without reading what came
    DEAF            reads no more
    NEXT            what would have come without the script

Without a script it takes everything. `messages` are those that it said 250 to, as it saw them.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from powermail.base.net import Network

Script = Mapping[str, str]


class Taken(NamedTuple):
    """A message as the hop took it."""

    sender: str  # the whole line behind MAIL
    recipients: tuple[str, ...]  # the whole lines behind RCPT, of those that got 2yz
    body: bytes
    session: int
    tls: bool


class ScriptedHop:
    """The server. `script` may be changed at any time."""

    def __init__(self, script: Script | None = None, offers: str = "PIPELINING,8BITMIME,SIZE 0") -> None:
        self.script: dict[str, str] = dict(script or {})
        self.forgetful = False  # reads one command of what comes together and loses the others, although it offers PIPELINING
        self.once = False  # each line of the script counts for one time only
        self.offers = [word for word in offers.split(",") if word]
        self.tls_offers: list[str] | None = None  # other ones under TLS
        self.messages: list[Taken] = []
        self.sessions: list[Session] = []
        self.lines: list[str] = []  # every command of all sessions
        self.login: Callable[[Session, str], str] | None = None  # what AUTH lines are answered with
        self.context: ssl.SSLContext | None = None
        self.port = 0

    async def start(self, net: Network, port: int = 0) -> int:
        """Listens; the port."""
        listener = await net.listen("127.0.0.1", port, lambda: Session(self))
        self.port = listener.port
        self.close = listener.close
        return self.port

    def recipients(self) -> list[str]:
        """Local parts of everybody who got a message, in order."""
        return [line.split("<")[1].split("@")[0] for taken in self.messages for line in taken.recipients]


class Session(asyncio.Protocol):
    """One connection."""

    def __init__(self, hop: ScriptedHop) -> None:
        self.hop = hop
        self.number = len(hop.sessions)
        self.tls = False
        self.closed = False
        self.in_auth = False
        self._transport: Any = None
        self._buffer = b""
        self._body: bytearray | None = None
        self._body_seen = False
        self._steps: deque[str] = deque()
        self._busy = False
        self.reads = 0  # how often octets came
        self._sender = ""
        self._recipients: list[str] = []
        self._normal: tuple[str, Callable[[], None]] = ("", lambda: None)

    # -- octets ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        first = self._transport is None
        self._transport = transport
        if first:
            self.hop.sessions.append(self)
            self._at("CONNECT", "", "220 hop", lambda: None)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self._buffer += data
        self._work()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def say(self, octets: bytes) -> None:
        """Sends octets now, asked for or not."""
        if not self.closed:
            self._transport.write(octets)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._busy and not self.closed:
            if self._steps:
                self._step(self._steps.popleft())
            elif self._body is not None:
                if not self._take_body():
                    return
            elif b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                if self.hop.forgetful:
                    self._buffer = b""
                self._command(line.decode("utf-8", "replace").rstrip("\r"))
            else:
                return

    def _at(self, moment: str, line: str, reply: str, then: Callable[[], None]) -> None:
        """What the script says for a moment, or the reply that is right, after which `then` holds."""
        script, at = self.hop.script, ""
        found = None
        for key, steps in script.items():
            verb, _, word = key.partition(" ")
            if verb == moment and (not word or word in line):
                found, at = steps, key
                if word:
                    break
        if found is not None and self.hop.once:
            del script[at]
        self._normal = (reply, then)
        if found is None:
            self._steps.append("NEXT")
        else:
            self._steps.extend(found.split("|"))
            words = found.split("|")[0]
            if words[:1] == ("3" if moment == "DATA" else "2") and "NEXT" not in found and moment != "STARTTLS":
                then()  # it behaves as it says
        self._work()

    def _step(self, step: str) -> None:
        word, _, rest = step.partition(" ")
        if word == "NEXT":
            reply, then = self._normal
            self.say(reply.encode() + b"\r\n")
            then()
        elif word == "RAW":
            self.say(rest.encode("latin-1").decode("unicode_escape").encode("latin-1"))
        elif word == "SLEEP":
            self._busy = True
            asyncio.get_running_loop().call_later(float(rest), self._awake)
        elif word == "DEAF":
            self._transport.pause_reading()
            self._busy = True
        elif word == "CLOSE":
            self.closed = True
            self._transport.close()
        elif word == "RESET":
            self.closed = True
            self._transport.abort()
        elif word != "SILENT":
            self.say(step.encode() + b"\r\n")

    def _awake(self) -> None:
        self._busy = False
        self._work()

    # -- SMTP -----------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        self.hop.lines.append(line)
        verb = line[:4].upper().strip()
        if self.in_auth or verb == "AUTH":
            assert self.hop.login is not None
            reply = self.hop.login(self, line)
            self.in_auth = reply.startswith("334")
            self._at("AUTH", line, reply, lambda: None)
        elif verb == "EHLO":
            offers = self.hop.tls_offers if self.tls and self.hop.tls_offers is not None else self.hop.offers
            lines = ["hop", *offers]
            reply = "\r\n".join(f"250{'-' if n < len(lines) - 1 else ' '}{each}" for n, each in enumerate(lines))
            self._at(verb, line, reply, lambda: None)
        elif verb == "STAR":
            self._at("STARTTLS", line, "220 go", self._secure)
        elif verb == "MAIL":
            self._at(verb, line, "250 2.1.0 sender fine", lambda: self._begin(line))
        elif verb == "RCPT":
            self._at(verb, line, "250 2.1.5 recipient fine", lambda: self._recipients.append(line[5:]))
        elif verb == "DATA":
            reply = "354 go" if self._recipients else "503 no recipients"
            self._at(verb, line, reply, self._open_body if self._recipients else lambda: None)
        elif verb == "RSET":
            self._at(verb, line, "250 forgotten", lambda: self._begin(""))
        elif verb == "QUIT":
            self._at(verb, line, "221 bye", self._leave)
        else:
            self._at(verb, line, "500 what", lambda: None)

    def _begin(self, line: str) -> None:
        if line and self._sender:
            raise AssertionError("a transaction is open: 503 nested MAIL")
        self._sender, self._recipients = line[5:], []

    def _leave(self) -> None:
        self._steps.append("CLOSE")

    def _open_body(self) -> None:
        self._body, self._body_seen = bytearray(b"\r\n"), False

    def _take_body(self) -> bool:
        assert self._body is not None
        if self._buffer and not self._body_seen:
            self._body_seen = True
            if any(key.startswith("BODY") for key in self.hop.script):
                self._at("BODY", "", "", lambda: None)
                return True
        self._body += self._buffer
        self._buffer = b""
        end = self._body.find(b"\r\n.\r\n")
        if end < 0:
            return False
        body, self._buffer = bytes(self._body[2 : end + 2]).replace(b"\r\n.", b"\r\n"), bytes(self._body[end + 5 :])
        self._body = None
        taken = Taken(self._sender, tuple(self._recipients), body, self.number, self.tls)
        self._sender, self._recipients = "", []
        self._at("END", "", "250 2.0.0 taken", lambda: self.hop.messages.append(taken))
        return True

    def _secure(self) -> None:
        if "TLS" in self.hop.script:
            self._at("TLS", "", "", lambda: None)
            return
        self._busy = True
        asyncio.get_running_loop().create_task(self._handshake())

    async def _handshake(self) -> None:
        assert self.hop.context is not None
        self._buffer = b""  # what comes from now on is TLS's
        try:
            loop = asyncio.get_running_loop()
            self._transport = await loop.start_tls(self._transport, self, self.hop.context, server_side=True)
        except (OSError, ConnectionError):
            self.closed = True
            return
        self.tls = True
        self._awake()


def encoded(text: str) -> str:
    """base64, for AUTH."""
    return base64.b64encode(text.encode()).decode()
