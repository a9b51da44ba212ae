"""Owns the server side of SMTP's grammar: capabilities with their parameters, MAIL, RCPT and BDAT, replies.

Standards: RFC 5321; 1870 SIZE; 2920 PIPELINING; 3030 CHUNKING, BINARYMIME; 3207 STARTTLS; 3461 DSN; 4954 AUTH;
6152 8BITMIME; 6531 SMTPUTF8; 6533 ORCPT with utf-8; 9422 LIMITS; 2033 LMTP; 2034 enhanced codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from powermail.base import limits
from powermail.mail import status as st
from powermail.mail.address import Address, AddressError, has_control, parse_path
from powermail.mail.dsn import is_xtext
from powermail.mail.envelope import Envelope
from powermail.mail.status import Status

# Other protocols that reach a mail port through browsers and proxies (ALPACA): closed at the first line.
_FOREIGN: Final = frozenset({"GET", "POST", "PUT", "HEAD", "CONNECT", "OPTIONS", "DELETE", "PATCH", "TRACE", "SSH-2.0"})


class Need(Enum):
    """Whether something (TLS, a login) must be there, must not, or does not matter."""

    EITHER = "either"
    ONLY = "only with it"
    NEVER = "only without it"

    def met(self, there: bool) -> bool:
        """True if what is there is what is needed."""
        return self is Need.EITHER or there is (self is Need.ONLY)


# -- parameters: the value of each, or None if it is none -------------------------------------------------------------


def _size(value: str) -> int | None:  # RFC 1870 §3
    return int(value) if value.isascii() and value.isdigit() and len(value) <= 20 else None


def _body(value: str) -> str | None:
    return value.upper() if value.upper() in ("7BIT", "8BITMIME", "BINARYMIME") else None


def _flag(value: str) -> bool | None:
    return None if value else True


def _ret(value: str) -> str | None:  # RFC 3461 §4.3
    return value.upper() if value.upper() in ("FULL", "HDRS") else None


def _envid(value: str) -> str | None:  # RFC 3461 §4.4
    return value if value and len(value) <= limits.ENVID_OCTETS_MAX and is_xtext(value) else None


def _auth(value: str) -> str | None:  # RFC 4954 §5: accepted, not believed
    return value if is_xtext(value) else None


def _notify(value: str) -> str | None:  # RFC 3461 §4.1
    words = value.upper().split(",")
    good = words == ["NEVER"] or all(word in ("SUCCESS", "FAILURE", "DELAY") for word in words)
    return value.upper() if good else None


def _orcpt(value: str) -> str | None:  # RFC 3461 §4.2; RFC 6533 §3 lets `utf-8` hold characters beyond ASCII
    kind, separator, address = value.partition(";")
    if not separator or not address or len(value.encode()) > limits.ORCPT_OCTETS_MAX:
        return None
    if re.fullmatch(r"[A-Za-z0-9\-]+", kind) is None:
        return None
    if kind.lower() != "utf-8":
        return value if is_xtext(address) else None
    in_ascii = "".join(c for c in address if c.isascii())
    # Others stand for themselves, or as \x{HEXPOINT}, which must not hide a control character.
    points = [int(point, 16) for point in re.findall(r"\\x\{([0-9A-F]{2,6})\}", address)]
    hidden = any(point > 0x10FFFF or has_control(chr(point)) for point in points)
    return value if is_xtext(in_ascii) and not has_control(address) and not hidden else None


_Parser = Callable[[str], Any]


class Capability(NamedTuple):
    """A line of the reply to EHLO, when it is said, and the parameters that it allows."""

    line: str  # with the words of `Offer` in braces
    mail: Mapping[str, _Parser] = {}
    rcpt: Mapping[str, _Parser] = {}
    tls: Need = Need.EITHER
    login: Need = Need.EITHER

    @property
    def name(self) -> str:
        """Its first word."""
        return self.line.split(" ", 1)[0]


CAPABILITIES: Final = (
    Capability("PIPELINING"),
    Capability("SIZE {message_octets_max}", mail={"SIZE": _size}),
    Capability("8BITMIME", mail={"BODY": _body}),
    Capability("BINARYMIME"),  # one more value of BODY
    Capability("CHUNKING"),
    Capability("SMTPUTF8", mail={"SMTPUTF8": _flag}),
    Capability("DSN", mail={"RET": _ret, "ENVID": _envid}, rcpt={"NOTIFY": _notify, "ORCPT": _orcpt}),
    Capability("ENHANCEDSTATUSCODES"),
    Capability(f"LIMITS RCPTMAX={{recipients_max}} MAILMAX={limits.SMTP_TRANSACTIONS_MAX}"),  # RFC 9422
    Capability("STARTTLS", tls=Need.NEVER),
    Capability("AUTH {mechanisms}", mail={"AUTH": _auth}, tls=Need.ONLY, login=Need.NEVER),
)
_MAIL: Final = {name: parser for capability in CAPABILITIES for name, parser in capability.mail.items()}
_RCPT: Final = {name: parser for capability in CAPABILITIES for name, parser in capability.rcpt.items()}


class MailCommand(NamedTuple):
    """A parsed MAIL FROM: the envelope, the address in it (None for <>), and the size that it announces (0: none)."""

    envelope: Envelope
    sender: Address | None
    size: int


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
    path = "" if address is None else address.text
    if not rest:
        return MailCommand(Envelope(path), address, 0) if path.isascii() else st.NEEDS_SMTPUTF8
    found = _parameters(rest, _MAIL)
    if isinstance(found, Status):
        return found
    smtputf8 = "SMTPUTF8" in found
    if not smtputf8 and not path.isascii():
        return st.NEEDS_SMTPUTF8
    envelope = Envelope(path, found.get("BODY", ""), smtputf8, found.get("RET", ""), found.get("ENVID", ""))
    return MailCommand(envelope, address, found.get("SIZE", 0))


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
    found = _parameters(rest, _RCPT) if rest else {}
    if isinstance(found, Status):
        return found
    if not smtputf8 and not (address.ascii_only and rest.isascii()):
        return st.NEEDS_SMTPUTF8
    return RcptCommand(address, found.get("NOTIFY", ""), found.get("ORCPT", ""))


def _parameters(rest: str, parsers: Mapping[str, _Parser]) -> dict[str, Any] | Status:
    """The values of esmtp-params (RFC 5321 §4.1.2), each given at most once."""
    found: dict[str, Any] = {}
    for word in rest.split():
        name, _, text = word.partition("=")
        name = name.upper()
        parser = parsers.get(name)
        if parser is None:
            return st.PARAMETER_UNKNOWN
        value = parser(text)
        if value is None or name in found:
            return st.SYNTAX
        found[name] = value
    return found


def parse_bdat(argument: str) -> tuple[int, bool] | None:
    """Parses `size [LAST]` (RFC 3030 §2). None on a syntax error."""
    words = argument.split()
    octets = claimed_octets(argument)
    if octets is None or [word.upper() for word in words[1:]] not in ([], ["LAST"]):
        return None
    return octets, len(words) == 2


def claimed_octets(argument: str) -> int | None:
    """How many octets come behind a BDAT, whatever else it says; None if it says no number, or one beyond all sizes."""
    number = argument.split(maxsplit=1)[0] if argument.strip() else ""
    if not number.isascii() or not number.isdigit() or len(number.lstrip("0")) > 18:
        return None
    return int(number)


def format_reply(status: Status) -> bytes:
    """One reply line with its enhanced code (RFC 2034)."""
    return _LINES.get(status) or _format(status)


def _format(status: Status) -> bytes:
    if status.enhanced:
        return f"{status.code} {status.enhanced} {status.text}\r\n".encode()
    return f"{status.code} {status.text}\r\n".encode()


_LINES: Final = {
    status: _format(status) for status in vars(st).values() if isinstance(status, Status)
}  # those that are always so


def format_ehlo(host: str, extensions: Sequence[str]) -> bytes:
    """The multi-line reply to EHLO."""
    lines = [host, *extensions]
    return "".join(f"250{'-' if i < len(lines) - 1 else ' '}{line}\r\n" for i, line in enumerate(lines)).encode()
