"""Owns the server side of SMTP's grammar: the command table, MAIL and RCPT parameters, replies.

Standards: RFC 5321; 1870 SIZE; 2920 PIPELINING; 3030 CHUNKING, BINARYMIME; 3207 STARTTLS; 3461 DSN; 4954 AUTH;
6152 8BITMIME; 6531 SMTPUTF8; 9422 LIMITS; 2033 LMTP; 2034 enhanced codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.mail import status as st
from powermail.mail.address import Address, AddressError, parse_path
from powermail.mail.dsn import is_xtext
from powermail.mail.status import Status


class State(Enum):
    """Where a session stands (RFC 5321 §4.1.4)."""

    START = "no greeting yet"
    READY = "greeted"
    MAIL = "sender given"
    RCPT = "recipients given"
    BDAT = "in a BDAT sequence"

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call in Python for each command


class Rule(NamedTuple):
    """When a command is allowed. `last` commands may not be followed by pipelined ones (RFC 2920 §3.1)."""

    states: frozenset[State]
    last: bool = False
    argument: bool | None = None  # True: needed, False: forbidden, None: either


_ANY: Final = frozenset(State)
_GREETED: Final = frozenset({State.READY})
_OPEN: Final = frozenset({State.MAIL, State.RCPT})

COMMANDS: Final[dict[str, Rule]] = {
    "EHLO": Rule(_ANY, last=True, argument=True),
    "HELO": Rule(_ANY, last=True, argument=True),
    "LHLO": Rule(_ANY, last=True, argument=True),  # RFC 2033 §4.1
    "MAIL": Rule(_GREETED, argument=True),
    "RCPT": Rule(_OPEN, argument=True),
    "DATA": Rule(_OPEN, last=True, argument=False),
    "BDAT": Rule(frozenset({State.MAIL, State.RCPT, State.BDAT}), argument=True),
    "RSET": Rule(_ANY, argument=False),
    "NOOP": Rule(_ANY, last=True),
    "HELP": Rule(_ANY),
    "VRFY": Rule(_ANY, last=True, argument=True),
    "EXPN": Rule(_ANY, last=True, argument=True),
    "QUIT": Rule(_ANY, last=True, argument=False),
    "STARTTLS": Rule(_GREETED, last=True, argument=False),
    "AUTH": Rule(_GREETED, last=True, argument=True),
}

# Other protocols that reach a mail port through browsers and proxies (ALPACA): closed at the first line.
_FOREIGN: Final = frozenset({"GET", "POST", "PUT", "HEAD", "CONNECT", "OPTIONS", "DELETE", "PATCH", "TRACE", "SSH-2.0"})


class MailCommand(NamedTuple):
    """A parsed MAIL FROM."""

    reverse_path: Address | None
    size: int
    body: str
    smtputf8: bool
    ret: str
    envid: str


class RcptCommand(NamedTuple):
    """A parsed RCPT TO."""

    address: Address
    notify: str
    orcpt: str


def split_command(line: bytes) -> tuple[str, str]:
    """(verb in upper case, argument). Octets that are not UTF-8 become U+FFFD, which no grammar accepts."""
    text = line.decode("utf-8", "replace")
    verb, _, argument = text.partition(" ")
    return verb.upper(), argument.strip(" \t")


def is_foreign(verb: str) -> bool:
    """True for the first word of another protocol."""
    return verb in _FOREIGN or verb.startswith("\x16\x03")


def check_command(verb: str, argument: str, state: State) -> Status | None:
    """What the table says against a command here; None if it may run."""
    rule = COMMANDS.get(verb)
    if rule is None:
        return st.UNRECOGNISED
    if state not in rule.states:
        return st.BAD_SEQUENCE
    if rule.argument is True and not argument:
        return st.SYNTAX
    if rule.argument is False and argument:
        return st.SYNTAX
    return None


def parse_mail(argument: str) -> MailCommand | Status:
    """Parses `FROM:<path> parameters` (RFC 5321 §4.1.1.2)."""
    if argument[:5].upper() != "FROM:":
        return st.SYNTAX
    try:
        address, rest = parse_path(argument[5:].lstrip(" "))
    except AddressError as error:
        return st.BAD_SENDER.because(error)
    if address is not None and not address.domain:
        return st.BAD_SENDER
    size, body, smtputf8, ret, envid = 0, "", False, "", ""
    for name, value in _parameters(rest):
        if name == "SIZE" and value.isascii() and value.isdigit() and len(value) <= 20:  # RFC 1870 §3
            size = int(value)
        elif name == "BODY" and value.upper() in ("7BIT", "8BITMIME", "BINARYMIME"):
            body = value.upper()
        elif name == "SMTPUTF8" and not value:
            smtputf8 = True
        elif name == "RET" and value.upper() in ("FULL", "HDRS"):  # RFC 3461 §4.3
            ret = value.upper()
        elif name == "ENVID" and value and len(value) <= limits.ENVID_OCTETS_MAX and is_xtext(value):
            envid = value
        elif name == "AUTH" and is_xtext(value):  # RFC 4954 §5: accepted, not believed
            pass
        elif name in ("SIZE", "BODY", "SMTPUTF8", "RET", "ENVID", "AUTH"):
            return st.SYNTAX
        else:
            return st.PARAMETER_UNKNOWN
    if address is not None and not smtputf8 and not address.ascii_only:
        return st.NEEDS_SMTPUTF8
    return MailCommand(address, size, body, smtputf8, ret, envid)


def parse_rcpt(argument: str, smtputf8: bool) -> RcptCommand | Status:
    """Parses `TO:<path> parameters` (RFC 5321 §4.1.1.3)."""
    if argument[:3].upper() != "TO:":
        return st.SYNTAX
    try:
        address, rest = parse_path(argument[3:].lstrip(" "))
    except AddressError as error:
        return st.BAD_RECIPIENT.because(error)
    if address is None:
        return st.BAD_RECIPIENT
    notify = orcpt = ""
    for name, value in _parameters(rest):
        if name == "NOTIFY" and _is_notify(value):  # RFC 3461 §4.1
            notify = value.upper()
        elif name == "ORCPT" and len(value) <= limits.ORCPT_OCTETS_MAX and _is_orcpt(value):  # §4.2
            orcpt = value
        elif name in ("NOTIFY", "ORCPT"):
            return st.SYNTAX
        else:
            return st.PARAMETER_UNKNOWN
    if not smtputf8 and not address.ascii_only:
        return st.NEEDS_SMTPUTF8
    return RcptCommand(address, notify, orcpt)


def _parameters(rest: str) -> list[tuple[str, str]]:
    pairs = []
    for word in rest.split():
        name, _, value = word.partition("=")
        pairs.append((name.upper(), value))
    return pairs


def _is_notify(value: str) -> bool:
    words = value.upper().split(",")
    if words == ["NEVER"]:
        return True
    return bool(words) and all(word in ("SUCCESS", "FAILURE", "DELAY") for word in words)


def _is_orcpt(value: str) -> bool:
    kind, separator, address = value.partition(";")
    return bool(separator) and re.fullmatch(r"[A-Za-z0-9\-]+", kind) is not None and bool(address) and is_xtext(address)


def parse_bdat(argument: str) -> tuple[int, bool] | None:
    """Parses `size [LAST]` (RFC 3030 §2). None on a syntax error."""
    words = argument.split()
    if not 1 <= len(words) <= 2 or not words[0].isascii() or not words[0].isdigit() or len(words[0]) > 18:
        return None
    if len(words) == 2 and words[1].upper() != "LAST":
        return None
    return int(words[0]), len(words) == 2


def format_reply(status: Status) -> bytes:
    """One reply line with its enhanced code (RFC 2034)."""
    if status.enhanced:
        return f"{status.code} {status.enhanced} {status.text}\r\n".encode()
    return f"{status.code} {status.text}\r\n".encode()


def format_ehlo(host: str, extensions: Sequence[str]) -> bytes:
    """The multi-line reply to EHLO."""
    lines = [host, *extensions]
    return "".join(f"250{'-' if i < len(lines) - 1 else ' '}{line}\r\n" for i, line in enumerate(lines)).encode()
