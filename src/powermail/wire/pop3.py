"""Owns POP3's grammar (RFC 1939; 2449 CAPA, RESP-CODES; 2595 STLS; 5034 AUTH; 6856 UTF8; 3206 SYS, AUTH codes)."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NamedTuple


class State(Enum):
    """RFC 1939 §3."""

    AUTHORIZATION = "before login"
    TRANSACTION = "logged in"


class Rule(NamedTuple):
    """Where a command is allowed and how many arguments it takes at least and at most."""

    states: frozenset[State]
    arguments_min: int
    arguments_max: int


_BEFORE: Final = frozenset({State.AUTHORIZATION})
_AFTER: Final = frozenset({State.TRANSACTION})
_BOTH: Final = _BEFORE | _AFTER

COMMANDS: Final[dict[str, Rule]] = {
    "USER": Rule(_BEFORE, 1, 1),  # the argument is the rest of the line, blanks included
    "PASS": Rule(_BEFORE, 1, 1),  # here too
    "APOP": Rule(_BEFORE, 2, 2),
    "AUTH": Rule(_BEFORE, 0, 2),
    "STLS": Rule(_BEFORE, 0, 0),
    "UTF8": Rule(_BEFORE, 0, 0),
    "CAPA": Rule(_BOTH, 0, 0),
    "QUIT": Rule(_BOTH, 0, 0),
    "NOOP": Rule(_AFTER, 0, 0),
    "STAT": Rule(_AFTER, 0, 0),
    "LIST": Rule(_AFTER, 0, 1),
    "UIDL": Rule(_AFTER, 0, 1),
    "RETR": Rule(_AFTER, 1, 1),
    "TOP": Rule(_AFTER, 2, 2),
    "DELE": Rule(_AFTER, 1, 1),
    "RSET": Rule(_AFTER, 0, 0),
}


class Command(NamedTuple):
    """A verb in upper case and its arguments."""

    verb: str
    arguments: list[str]


def parse_command(line: bytes) -> Command:
    """Splits a line. PASS and USER keep blanks in their one argument: they are part of a secret, and of a name."""
    text = line.decode("utf-8", "replace")
    verb, separator, rest = text.partition(" ")
    verb = verb.upper()
    if verb in ("PASS", "USER"):
        return Command(verb, [rest] if separator else [])
    return Command(verb, rest.split())


def check_command(command: Command, state: State) -> str | None:
    """The error text against a command here, or None."""
    rule = COMMANDS.get(command.verb)
    if rule is None:
        return "unknown command"
    if state not in rule.states:
        return "not now"
    if not rule.arguments_min <= len(command.arguments) <= rule.arguments_max:
        return "wrong number of arguments"
    return None


def parse_number(text: str, low: int) -> int | None:
    """A message number or line count; None unless plain decimal digits and at least `low` (P05)."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    value = int(text)
    return value if value >= low else None


def ok(text: str = "") -> bytes:
    """A positive reply."""
    return f"+OK {text}\r\n".encode() if text else b"+OK\r\n"


def err(text: str, code: str = "") -> bytes:
    """A negative reply, with a response code of RFC 2449 §8 or RFC 3206 where one fits."""
    return f"-ERR [{code}] {text}\r\n".encode() if code else f"-ERR {text}\r\n".encode()


_EMPTY_LINE = re.compile(rb"\n\r?\n")  # with LF alone in binary messages, which are sent with CRLF


class TopReader:
    """Header, empty line and the first lines of the body (RFC 1939 §7), from a message in pieces; each octet is seen once."""

    def __init__(self, lines: int) -> None:
        self.done = False
        self._lines = lines
        self._in_body = False
        self._tail = b"\n"  # what stands before the piece: an empty header ends with the first line

    def feed(self, octets: bytes) -> bytes:
        """What belongs to the answer. After `done`, nothing does."""
        if self.done:
            return b""
        begin = 0
        if not self._in_body:
            data = self._tail + octets
            end = _EMPTY_LINE.search(data)
            if end is None:
                self._tail = data[-2:]
                return octets
            self._in_body = True
            begin = end.end() - len(self._tail)
        count = octets.count(b"\n", begin)
        if count < self._lines:
            self._lines -= count
            return octets
        self.done = True
        rest = octets[begin:].split(b"\n", self._lines)[-1] if self._lines else octets[begin:]
        return octets[: len(octets) - len(rest)]
