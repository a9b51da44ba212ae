"""Owns delivery status notifications: RFC 3464 in the multipart/report of RFC 6522.

One DSN per message and failure round, to a non-null reverse-path only; nothing a peer said can inject a line.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import NamedTuple

from powermail.mail.header import format_date

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]+")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")


class Failure(NamedTuple):
    """One recipient that will not get the message."""

    destination: str
    recipient: str
    orcpt: str
    enhanced: str
    diagnostic: str  # "smtp; 550 5.1.1 …" of the remote host, or ours
    remote: str


def printable(text: str, limit: int = 400) -> str:
    """Foreign text as one line of printable ASCII."""
    return _NOT_PRINTABLE.sub(" ", text)[:limit].strip()


def format_failure(
    host: str,
    reverse_path: str,
    key: bytes,
    boundary: str,
    at: datetime,
    arrived: datetime,
    envid: str,
    failures: list[Failure],
    header: bytes,
) -> bytes:
    """The whole DSN message with CRLF line ends; `header` is the header of the message that failed."""
    eight_bit = not header.isascii() or not reverse_path.isascii()
    lines = [
        f"From: Mail Delivery System <MAILER-DAEMON@{host}>",
        f"To: <{reverse_path}>",
        "Subject: Undelivered Mail Returned to Sender",
        f"Date: {format_date(at)}",
        f"Message-ID: <{key.hex()}@{host}>",
        "Auto-Submitted: auto-replied",  # RFC 3834 §5
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status; boundary="{boundary}"',
        *(["Content-Transfer-Encoding: 8bit"] if eight_bit else []),
        "",
        "This is a MIME-encapsulated message.",
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=us-ascii",
        "",
        f"This is the mail system at host {host}.",
        "",
        "Your message could not be delivered to the recipients below.",
        "It will not be tried again.",
        "",
    ]
    for failure in failures:
        lines += [f"<{printable(failure.recipient)}>: {printable(failure.diagnostic)}", ""]
    lines += [f"--{boundary}", "Content-Type: message/delivery-status", ""]
    lines.append(f"Reporting-MTA: dns; {host}")  # RFC 3464 §2.2.2
    if envid:
        lines.append(f"Original-Envelope-Id: {printable(decode_xtext(envid))}")  # §2.2.1
    lines += [f"Arrival-Date: {format_date(arrived)}", ""]
    for failure in failures:
        if failure.orcpt:
            kind, _, value = failure.orcpt.partition(";")
            lines.append(f"Original-Recipient: {printable(kind)};{printable(decode_xtext(value))}")  # §2.3.1
        lines.append(f"Final-Recipient: rfc822; {printable(failure.recipient)}")  # §2.3.2
        lines.append("Action: failed")
        lines.append(f"Status: {failure.enhanced}")
        if failure.remote:
            lines.append(f"Remote-MTA: dns; {printable(failure.remote)}")
        lines += [f"Diagnostic-Code: {printable(failure.diagnostic)}", ""]
    lines += [f"--{boundary}", "Content-Type: text/rfc822-headers", ""]
    if eight_bit:
        lines[-1:] = ["Content-Transfer-Encoding: 8bit", ""]
    head = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n"
    body = header.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\0", b"").replace(b"\n", b"\r\n")
    if not body.endswith(b"\r\n"):
        body += b"\r\n"
    return head + body.replace(b"--" + boundary.encode(), b"-_" + boundary.encode()) + f"\r\n--{boundary}--\r\n".encode()


def decode_xtext(text: str) -> str:
    """Decodes xtext (RFC 3461 §4); the result may hold anything, so it must pass `printable`."""
    return _XTEXT.sub(lambda match: chr(int(match.group(1), 16)), text)


def is_xtext(text: str) -> bool:
    """True if the text is xtext and does not decode to a control character (S34)."""
    if re.fullmatch(r"(?:[\x21-\x2a\x2c-\x3c\x3e-\x7e]|\+[0-9A-F]{2})*", text) is None:
        return False
    return all(ord(c) >= 32 and ord(c) != 127 for c in decode_xtext(text))
