"""Owns delivery status notifications: RFC 3464 in the multipart/report of RFC 6522, RFC 6533 for addresses beyond ASCII.

A notice goes to a non-null reverse-path only; nothing a peer said can inject a line. What a recipient asked for (NOTIFY,
RFC 3461 §4.1) says `asks`. An address is written down as it is, or encoded as the RFC says, and never cut or mangled.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import Enum
from typing import NamedTuple

from powermail.mail.header import format_date

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]+")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_NOT_QCHAR = re.compile(r"[^\x21-\x2a\x2c-\x3c\x3e-\x5b\x5d-\x7e]")  # RFC 6533 §3: QCHAR has no "+", "=", "\"


class Action(Enum):
    """What a notice says about a recipient (RFC 3464 §2.3.3)."""

    FAILED = "failed"
    DELAYED = "delayed"
    DELIVERED = "delivered"
    RELAYED = "relayed"  # given to a system that sends no notices of success

    @property
    def wanted_as(self) -> str:
        """The word of NOTIFY that asks for it."""
        return {Action.FAILED: "FAILURE", Action.DELAYED: "DELAY"}.get(self, "SUCCESS")


class Report(NamedTuple):
    """What became of one recipient. `recipient` is the address as its sender gave it."""

    recipient: str
    orcpt: str  # as it stands in the envelope: type and xtext
    action: Action
    enhanced: str
    diagnostic: str  # "smtp; 550 5.1.1 …" of the remote host, or ours
    remote: str = ""
    retry_until: datetime | None = None  # of a delay


class Notice(NamedTuple):
    """A whole notice. `returned` is the message it is about, or only its header if not `whole`."""

    host: str
    to: str
    key: bytes
    boundary: str
    at: datetime
    arrived: datetime
    envid: str
    reports: list[Report]
    returned: bytes
    whole: bool = False


def asks(notify: str, action: Action) -> bool:
    """True if a recipient with this NOTIFY wants to hear of it. Nothing said asks for failures (RFC 3461 §4.1)."""
    return action.wanted_as in (notify.upper() or "FAILURE").split(",")


def printable(text: str, limit: int = 400) -> str:
    """Foreign text as one line of printable ASCII."""
    return _NOT_PRINTABLE.sub(" ", text)[:limit].strip()


_WORDS = {
    Action.FAILED: (
        "Undelivered Mail Returned to Sender",
        "Your message could not be delivered to the recipients below.",
        "It will not be tried again.",
    ),
    Action.DELAYED: (
        "Delayed Mail (still being retried)",
        "Your message has not been delivered to the recipients below yet.",
        "It is tried again; you need not send it again.",
    ),
    Action.DELIVERED: (
        "Successful Mail Delivery Report",
        "Your message was delivered to the recipients below.",
        "You asked for this notice.",
    ),
    Action.RELAYED: (
        "Successful Mail Delivery Report",
        "Your message was given to the mail systems of the recipients below, which send no such notices.",
        "You asked for this notice.",
    ),
}


def format_notice(notice: Notice) -> bytes:
    """The whole message with CRLF line ends. To a sender beyond ASCII its parts are those of RFC 6533, else plain ones."""
    utf8 = not notice.to.isascii()
    boundary = f"--{notice.boundary}"
    subject, first, second = _WORDS[notice.reports[0].action]
    status = "global-delivery-status" if utf8 else "delivery-status"
    text = [f"This is the mail system at host {notice.host}.", "", first, second, ""]
    for report in notice.reports:
        text += [f"<{_CONTROL.sub(' ', report.recipient)}>: {printable(report.diagnostic)}", ""]
    returned = _returned(notice, utf8)
    eight_bit = utf8 or not returned.isascii() or not "".join(text).isascii()
    lines = [
        f"From: Mail Delivery System <MAILER-DAEMON@{notice.host}>",
        f"To: <{notice.to}>",
        f"Subject: {subject}",
        f"Date: {format_date(notice.at)}",
        f"Message-ID: <{notice.key.hex()}@{notice.host}>",
        "Auto-Submitted: auto-replied",  # RFC 3834 §5
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type={status}; boundary="{notice.boundary}"',
        *(["Content-Transfer-Encoding: 8bit"] if eight_bit else []),
        "",
        "This is a MIME-encapsulated message.",
        "",
        boundary,
        *_part_head("text/plain", not "".join(text).isascii(), charset=True),
        *text,
        boundary,
        *_part_head(f"message/{status}", utf8),
        *_fields(notice, utf8),
        boundary,
        *_part_head(_returned_type(notice, utf8, returned), not returned.isascii()),
    ]
    head = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n"
    return head + returned.replace(boundary.encode(), b"-_" + notice.boundary.encode()) + f"\r\n{boundary}--\r\n".encode()


def _part_head(kind: str, eight_bit: bool, charset: bool = False) -> list[str]:
    named = f"; charset={'utf-8' if eight_bit else 'us-ascii'}" if charset else ""
    return [f"Content-Type: {kind}{named}", *(["Content-Transfer-Encoding: 8bit"] if eight_bit else []), ""]


def _returned_type(notice: Notice, utf8: bool, returned: bytes) -> str:
    """RFC 6522 §3, RFC 6533 §5: a header beyond ASCII is of another type."""
    if notice.whole:
        return "message/global" if utf8 else "message/rfc822"
    return "message/global-headers" if utf8 and not returned.isascii() else "text/rfc822-headers"


def _returned(notice: Notice, utf8: bool) -> bytes:
    octets = notice.returned.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\0", b"").replace(b"\n", b"\r\n")
    return octets if octets.endswith(b"\r\n") else octets + b"\r\n"


def _fields(notice: Notice, utf8: bool) -> list[str]:
    """The fields that machines read: one group for the message, one for each recipient (RFC 3464 §2.1)."""
    lines = [f"Reporting-MTA: dns; {notice.host}"]  # §2.2.2
    if notice.envid:
        lines.append(f"Original-Envelope-Id: {printable(decode_xtext(notice.envid))}")  # §2.2.1
    lines += [f"Arrival-Date: {format_date(notice.arrived)}", ""]
    for report in notice.reports:
        if report.orcpt:
            kind, _, value = report.orcpt.partition(";")
            original = _EMBEDDED.sub(_embedded, value) if kind.lower() == "utf-8" else decode_xtext(value)
            lines.append(f"Original-Recipient: {_typed(printable(kind), original, utf8)}")  # §2.3.1
        lines.append(f"Final-Recipient: {_typed('rfc822', report.recipient, utf8)}")  # §2.3.2
        lines.append(f"Action: {report.action.value}")
        lines.append(f"Status: {report.enhanced}")
        if report.remote:
            lines.append(f"Remote-MTA: dns; {printable(report.remote)}")
        if report.diagnostic:
            lines.append(f"Diagnostic-Code: {printable(report.diagnostic)}")
        if report.retry_until is not None:
            lines.append(f"Will-Retry-Until: {format_date(report.retry_until)}")  # §2.3.9
        lines.append("")
    return lines


def _typed(kind: str, address: str, utf8: bool) -> str:
    """An address with its type (RFC 6533 §3): one beyond ASCII is `utf-8`, spelt out or encoded as the message allows."""
    address = _CONTROL.sub(" ", address)
    if address.isascii():
        return f"{kind}; {address}"
    return f"utf-8; {address if utf8 else encode_utf8_address(address)}"


def encode_utf8_address(address: str) -> str:
    """utf-8-addr-xtext (RFC 6533 §3): an address beyond ASCII in ASCII."""
    return _NOT_QCHAR.sub(lambda match: f"\\x{{{ord(match.group()):02X}}}", address)


def orcpt_parameter(orcpt: str, utf8: bool) -> str:
    """ORCPT as a hop takes it: without SMTPUTF8 a `utf-8` address goes encoded (RFC 6533 §3)."""
    kind, _, value = orcpt.partition(";")
    return orcpt if utf8 or orcpt.isascii() else f"{kind};{encode_utf8_address(_EMBEDDED.sub(_embedded, value))}"


def _embedded(match: re.Match[str]) -> str:
    number = int(match.group(1), 16)
    return chr(number) if number < 0xD800 or 0xDFFF < number < 0x110000 else "?"


def decode_xtext(text: str) -> str:
    """Decodes xtext (RFC 3461 §4); the result may hold anything, so it must pass `printable`."""
    return _XTEXT.sub(lambda match: chr(int(match.group(1), 16)), text)


def is_xtext(text: str) -> bool:
    """True if the text is xtext and does not decode to a control character (S34)."""
    if re.fullmatch(r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x7e]|\+[0-9A-F]{2})*", text) is None:
        return False
    return all(ord(c) >= 32 and ord(c) != 127 for c in decode_xtext(text))
