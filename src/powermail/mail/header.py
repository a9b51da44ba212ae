"""Owns header fields: our trace fields (RFC 5321 §4.4), and the little reading of others that receiving needs.

Stored octets are never changed: our fields are put in front, nothing else is touched (P2).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from powermail.mail.envelope import Peer

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNSAFE = re.compile(r"[^\x21-\x7e\u00a0-\U0010ffff]|[()\\<>;,\"]")
_RECEIVED = re.compile(rb"\n(?i:received)[ \t]*:")  # a line break first: the search then skips to the few there are
_MESSAGE_ID = re.compile(rb"\n(?i:message-id)[ \t]*:[ \t]*(?:\r?\n[ \t]+)?([^\r\n]{0,998})")
_HEADER_END = re.compile(rb"\n\r?\n")


@lru_cache(maxsize=8)
def format_second(second: int) -> str:
    """The date-time of a second since 1970 UTC."""
    return format_date(datetime.fromtimestamp(second, UTC))


def format_date(at: datetime) -> str:
    """RFC 5322 §3.3 date-time in UTC; independent of the locale."""
    return (
        f"{_DAYS[at.weekday()]}, {at.day} {_MONTHS[at.month - 1]} {at.year:04d} "
        f"{at.hour:02d}:{at.minute:02d}:{at.second:02d} +0000"
    )


def safe_word(text: str) -> str:
    """A client-given name, fit for a Received comment: no space, control, bracket or quote survives (S35)."""
    return _UNSAFE.sub("?", text)[:255]


def count_received(octets: bytes | memoryview) -> int:
    """How many Received fields the header at the start of `octets` has (RFC 5321 §6.3)."""
    return len(_RECEIVED.findall(b"\n" + header_of(octets)))


def message_id(header: bytes) -> str:
    """The first Message-ID of a header as it stands there, for the log; "" if there is none."""
    found = _MESSAGE_ID.search(b"\n" + header)
    return found[1].decode("utf-8", "replace").strip() if found else ""


def header_of(octets: bytes | memoryview) -> bytes:
    """The header of a message, without the empty line; all of it if there is none."""
    data = bytes(octets)
    if data[:1] in (b"\r", b"\n"):
        return b""
    end = _HEADER_END.search(data)
    return data[: end.start() + 1] if end else data


def received_field(peer: Peer, host: str, key: bytes, date: str, recipient: str) -> bytes:
    """Our Received field (RFC 5321 §4.4): from, by, with, id, for (only with a single recipient), date."""
    lines = [f"Received: from {safe_word(peer.hello) or 'unknown'} ({peer.client})"]
    if peer.cipher:
        lines.append(f"\t({peer.cipher})")
    lines.append(f"\tby {host} (PowerMail) with {peer.protocol} id {key.hex()}")
    if recipient:
        lines.append(f"\tfor <{recipient}>; {date}")
    else:
        lines[-1] += f"; {date}"
    return ("\r\n".join(lines) + "\r\n").encode("utf-8", "replace")


def return_path_field(reverse_path: str) -> bytes:
    """The Return-Path field that final delivery adds (RFC 5321 §4.4)."""
    return f"Return-Path: <{reverse_path}>\r\n".encode("utf-8", "replace")
