"""Owns the client side of SMTP as a machine without I/O: octets in, answers out, whatever a hostile next hop says (F04).

A session is a row of states, moved by the commands we send and by the replies that come (`RULES`). Each reply belongs to the
oldest command that has none; that is all SMTP has to tell replies apart, so the machine trusts a row of replies only as
long as it is in step:

    a reply when nothing is asked, or of a kind that the command cannot have    the session is out of step
    421, at any time, asked for or not                                         the hop leaves; the reply counts
    4yz or 5yz while the body is on its way                                     the reply to the message, come early
    any octet between "220 go" and the TLS handshake                            injected (RFC 3207 §4.2)
    what is no reply: too long, other codes, NUL                                nonsense

What ended a session says `end`; an ended session takes nothing and gives nothing. RFC 5321 §4.2, §4.3.2; RFC 2920; RFC 3207;
RFC 4954.
"""

from __future__ import annotations

import re
from collections import deque
from enum import Enum
from typing import NamedTuple

from powermail.base import limits

_REPLY = re.compile(rb"([1-5][0-9][0-9])(?:([ -])(.*))?", re.DOTALL)
_ENHANCED = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |$)")
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")  # ehlo-keyword, RFC 5321 §4.1.1.1


class ReplyError(Exception):
    """What came is not an SMTP reply, or too long: a temporary failure of that host."""


class Reply(NamedTuple):
    """One reply. `text` joins its lines with a blank; it is foreign text and must be quoted when shown."""

    code: int
    enhanced: str
    text: str
    lines: tuple[str, ...]

    @property
    def kind(self) -> int:
        """The first digit: only 2 is success."""
        return self.code // 100


class ReplyReader:
    """Octets in, replies out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._octets = 0

    @property
    def empty(self) -> bool:
        """True if no part of a reply waits for its rest."""
        return not self._buffer and not self._lines

    def add(self, octets: bytes) -> None:
        """More octets; `next` takes the replies."""
        self._buffer += octets

    def next(self) -> Reply | None:
        """The next reply that is complete. Raises ReplyError; the connection is then of no more use."""
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > limits.SMTP_CLIENT_REPLY_LINE_OCTETS_MAX:
                    raise ReplyError("reply line too long")
                return None
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            if len(line) > limits.SMTP_CLIENT_REPLY_LINE_OCTETS_MAX:
                raise ReplyError("reply line too long")
            match = _REPLY.fullmatch(line)
            if not match or b"\0" in line:
                raise ReplyError("not an SMTP reply")
            if self._lines and self._lines[0][:3] != line[:3]:
                raise ReplyError("reply codes differ between lines")
            self._lines.append(line)
            self._octets += len(line)
            if self._octets > limits.SMTP_CLIENT_REPLY_OCTETS_MAX:
                raise ReplyError("reply too long")
            if match.group(2) != b"-":
                lines, self._lines, self._octets = self._lines, [], 0
                return _assemble(lines)


def _assemble(lines: list[bytes]) -> Reply:
    texts = tuple(line[4:].decode("utf-8", "replace") for line in lines)
    enhanced = _ENHANCED.match(texts[0])
    return Reply(int(lines[0][:3]), enhanced.group(1) if enhanced else "", " ".join(texts), texts)


class Verb(Enum):
    """What a reply can answer. GREETING is not asked for, END is the dot behind a message, RESPONSE a line of SASL."""

    __hash__ = object.__hash__  # each is one object; Enum's own hashes the name, in Python
    GREETING = "the connection"
    EHLO = "EHLO"
    HELO = "HELO"
    STARTTLS = "STARTTLS"
    AUTH = "AUTH"
    RESPONSE = "the response to AUTH"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    END = "the message"
    RSET = "RSET"
    QUIT = "QUIT"


class State(Enum):
    """Where a session stands."""

    CONNECTED = "connected"  # the greeting is awaited
    GREETED = "greeted"  # says hello next: also after TLS, when all that was said before is forgotten
    READY = "ready"  # no transaction
    SECURING = "securing"  # the hop said "220 go": not one octet may come in clear
    LOGIN = "login"  # a challenge of SASL waits for its response
    OPEN = "open"  # a transaction has begun
    BODY = "body"  # the hop said 354
    LEAVING = "leaving"  # QUIT was said
    OVER = "over"


class Rule(NamedTuple):
    """One line of the table. A reply whose code or class is in neither `good` nor 4yz, 5yz is out of step."""

    before: tuple[State, ...]  # in which it may be sent
    first: bool  # it waits for the replies to all before it (RFC 2920 §3.1)
    last: bool  # nothing is sent behind it before its reply
    sent: State | None  # where sending it leads; None: nowhere
    good: tuple[int, ...]  # codes (or classes: 2) that it asks for
    after: State | None  # where such a reply leads
    refused: State | None  # where 4yz and 5yz lead


_G, _R, _O = State.GREETED, State.READY, State.OPEN
RULES: dict[Verb, Rule] = {
    #                before                     first  last   sent        good       after            refused
    Verb.GREETING: Rule((State.CONNECTED,), True, True, None, (2,), _G, State.OVER),
    Verb.EHLO: Rule((_G,), True, True, None, (2,), _R, None),
    Verb.HELO: Rule((_G,), True, True, None, (2,), _R, State.OVER),
    Verb.STARTTLS: Rule((_R,), True, True, None, (220,), State.SECURING, None),
    Verb.AUTH: Rule((_R,), True, True, None, (235, 334), _R, None),
    Verb.RESPONSE: Rule((State.LOGIN,), True, True, None, (235, 334), _R, _R),
    Verb.MAIL: Rule((_R,), False, False, _O, (2,), None, None),
    Verb.RCPT: Rule((_O,), False, False, None, (2,), None, None),
    Verb.DATA: Rule((_O,), False, True, None, (354,), State.BODY, None),
    Verb.END: Rule((State.BODY,), True, False, _R, (2,), None, None),
    Verb.RSET: Rule((_R, _O), True, True, None, (2,), _R, State.OVER),
    Verb.QUIT: Rule((_G, _R, _O), True, True, State.LEAVING, (2,), None, None),
}


class Fault(Enum):
    """Why a session ended."""

    CLOSED = "closed"  # the connection
    LEFT = "left"  # 421, a refused greeting, or after QUIT
    NONSENSE = "nonsense"  # not SMTP
    OUT_OF_STEP = "out of step"  # the replies that were read may belong to other commands
    INJECTED = "injected"  # octets in clear behind "220 go"
    LATE = "late"  # no reply in time; said by whoever has a clock
    GIVEN_UP = "given up"  # by us


class End(NamedTuple):
    """How a session ended."""

    fault: Fault
    text: str


class Answer(NamedTuple):
    """A reply, and what it is to."""

    verb: Verb
    reply: Reply


class ClientError(Exception):
    """We asked for what the state of the session does not allow: a mistake of ours."""


class SmtpClient:
    """One session. `extensions` are those of the last EHLO; all are forgotten at the switch to TLS (RFC 3207 §4.2)."""

    def __init__(self) -> None:
        self.state = State.CONNECTED
        self.end: End | None = None
        self.extensions: dict[str, str] = {}
        self._asked: deque[Verb] = deque([Verb.GREETING])
        self._reader = ReplyReader()

    # -- what is asked --------------------------------------------------------------------------------------------

    def ask(self, verb: Verb, argument: str = "") -> bytes:
        """The octets of a command; none if the session has ended, or has unread octets that belong to nothing, which ends it.

        Raises ClientError.
        """
        if self.end is None and not self._asked and not self._reader.empty:
            self.give_up(Fault.OUT_OF_STEP, "it sent what it was not asked for")
        if self.end is not None:
            return b""
        rule = RULES[verb]
        line = argument if verb is Verb.RESPONSE else f"{verb.value} {argument}" if argument else verb.value
        if self.state not in rule.before or verb in (Verb.GREETING, Verb.END):
            raise ClientError(f"{verb.name} is not for a session that is {self.state.value}")
        if self._asked and (rule.first or RULES[self._asked[-1]].last):
            raise ClientError(f"{verb.name} must wait for the reply to {self._asked[-1].name}")
        if "\r" in line or "\n" in line or "\0" in line:
            raise ClientError(f"{verb.name} is to be one line")  # F01: no address becomes a second command
        self._asked.append(verb)
        if rule.sent is not None:
            self.state = rule.sent
        return f"{line}\r\n".encode()

    def ended_body(self) -> None:
        """All of the message goes with its dot: the next reply is its outcome, and another transaction may begin behind it
        (RFC 2920 §3.1).
        """
        if self.end is not None:
            return
        if self.state is not State.BODY or self._asked:
            raise ClientError(f"there is no message to end in a session that is {self.state.value}")
        self._asked.append(Verb.END)
        self.state = RULES[Verb.END].sent or self.state

    # -- what comes -----------------------------------------------------------------------------------------------

    def receive(self, octets: bytes) -> list[Answer]:
        """The answers that these octets complete. Afterwards `end` says whether the session goes on."""
        answers: list[Answer] = []
        if self.end is not None or not octets:
            return answers
        self._reader.add(octets)
        try:
            while self.end is None and not self._injected():
                reply = self._reader.next()
                if reply is None:
                    break
                answers += self._take(reply)
        except ReplyError as error:
            self.give_up(Fault.NONSENSE, str(error))
        return answers

    def _injected(self) -> bool:
        if self.state is State.SECURING and not self._reader.empty:
            self.give_up(Fault.INJECTED, "it sent octets in clear behind its reply to STARTTLS")
        return self.end is not None

    def _take(self, reply: Reply) -> list[Answer]:
        if not self._asked:
            return self._unasked(reply)
        verb = self._asked.popleft()
        rule = RULES[verb]
        answer = [Answer(verb, reply)]
        if reply.code == 421:  # RFC 5321 §3.8: to any command
            self.give_up(Fault.LEFT, f"it left: {reply.code} {reply.text}")
        elif reply.kind in rule.good or reply.code in rule.good:
            if verb in (Verb.EHLO, Verb.HELO):
                self.extensions = _extensions(reply) if verb is Verb.EHLO else {}
            self.state = State.LOGIN if reply.code == 334 else rule.after or self.state
        elif reply.kind in (4, 5):
            self.state = rule.refused or self.state
        else:
            self.give_up(Fault.OUT_OF_STEP, f"it answered {verb.value} with {reply.code}")
        if self.state is State.OVER and self.end is None:
            self.give_up(Fault.LEFT, f"it answered {verb.value} with {reply.code} {reply.text}")
        return answer

    def _unasked(self, reply: Reply) -> list[Answer]:
        """A reply to nothing."""
        if reply.code == 421:
            self.give_up(Fault.LEFT, f"it left: {reply.code} {reply.text}")
            return [Answer(Verb.END, reply)] if self.state is State.BODY else []
        if self.state is State.BODY and reply.kind in (4, 5):
            self.state = State.LEAVING  # it has read enough; the message is not sent to its end
            return [Answer(Verb.END, reply)]
        self.give_up(Fault.OUT_OF_STEP, f"it said {reply.code} when it was not asked")
        return []

    def closed(self) -> None:
        """The hop closed, or the connection was lost; what was read counts."""
        behind = f" behind {self._asked[0].value}" if self._asked else ""
        self.give_up(Fault.CLOSED, f"it closed the connection{behind}")

    def give_up(self, fault: Fault, text: str) -> None:
        """Ends the session; the first reason stays."""
        if self.end is None:
            self.end = End(fault, text)

    def secured(self) -> None:
        """TLS stands. Everything from before is forgotten (RFC 3207 §4.2)."""
        if self.state is not State.SECURING or self._asked:
            raise ClientError(f"no TLS for a session that is {self.state.value}")
        self.state = State.GREETED
        self.extensions = {}
        self._reader = ReplyReader()

    # -- how it stands --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many replies are owed."""
        return len(self._asked)

    @property
    def clean(self) -> bool:
        """True if another transaction may begin: none is open, no reply is owed, no octet is unread."""
        return self.end is None and self.state is State.READY and not self._asked and self._reader.empty

    def mechanisms(self) -> tuple[str, ...]:
        """SASL mechanisms that the hop offers (RFC 4954 §4)."""
        return tuple(dict.fromkeys(self.extensions.get("AUTH", "").upper().split()))


def _extensions(reply: Reply) -> dict[str, str]:
    """What EHLO offers, by keyword. `AUTH=LOGIN` is how old servers, and old clients' friends, spell it."""
    found: dict[str, str] = {}
    for line in reply.lines[1:]:
        match = _KEYWORD.match(line)
        if match is None:
            continue
        name, rest = match.group().upper(), line[match.end() :].lstrip("= ").rstrip()
        found[name] = f"{found[name]} {rest}" if name == "AUTH" and name in found else rest
    return found
