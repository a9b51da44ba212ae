"""Owns what happens to the header of a message that a user of ours submits (RFC 6409 §8), before it is stored.

Its authors are read strictly, as every reader will see them; a missing From, Date or Message-ID is put in front; Bcc fields
are taken out. Nothing else is touched. The header is held back until it is complete, and no longer than a bound.
"""

from __future__ import annotations

import re

from powermail.base import limits
from powermail.mail import status as st
from powermail.mail.address import Address, AddressError
from powermail.mail.mailboxes import parse_list
from powermail.mail.status import Status

_FIELDS = re.compile(rb"\r\n(?![ \t])")
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")


class Submission:
    """The octets of one submitted message pass through here."""

    def __init__(self, author: str, date: str, message_id: str) -> None:
        """`author`, `date` and `message_id` are what is said if the message does not."""
        self.authors: list[Address] = []  # of From and Sender, known when the header is
        self.refusal: Status | None = None
        self._given = {b"from": f"From: <{author}>", b"date": f"Date: {date}", b"message-id": f"Message-ID: <{message_id}>"}
        self._held: bytearray | None = bytearray()

    def feed(self, octets: bytes) -> bytes:
        """What is to be stored now."""
        held = self._held
        if held is None:
            return octets
        begin = max(0, len(held) - 3)
        held += octets
        end = 0 if held.startswith(b"\r\n") else held.find(b"\r\n\r\n", begin)
        if end < 0:
            if len(held) > limits.HEADER_SCAN_OCTETS_MAX:
                self.refusal = st.HEADER_SYNTAX.because("no end of the header within the bound")
            return b""
        size = end + 2 if end else 0
        return self._complete(bytes(held[:size])) + bytes(held[size:])

    def end(self) -> bytes:
        """The rest of a message that has no body."""
        return b"" if self._held is None else self._complete(bytes(self._held))

    def _complete(self, header: bytes) -> bytes:
        self._held = None
        if _BARE.search(header):
            self.refusal = st.HEADER_SYNTAX.because("bare CR, bare LF or NUL in the header")
            return header
        fields = _FIELDS.split(header)
        names = [_name(field) for field in fields]
        try:
            self._read_authors(fields, names)
        except (AddressError, UnicodeDecodeError) as error:
            self.refusal = st.HEADER_SYNTAX.because(f"From or Sender: {error}")
            return header
        missing = [line.encode() for name, line in self._given.items() if name not in names]
        kept = [field for field, name in zip(fields, names, strict=True) if name not in (b"bcc", b"resent-bcc")]
        return b"\r\n".join((*missing, *kept))

    def _read_authors(self, fields: list[bytes], names: list[bytes]) -> None:
        for name in (b"from", b"sender"):
            found = [field for field, each in zip(fields, names, strict=True) if each == name]
            if len(found) > 1:
                raise AddressError("two fields")
            if found:
                value = found[0].partition(b":")[2].replace(b"\r\n", b"").decode("utf-8")
                authors = parse_list(value)
                if not authors:
                    raise AddressError("nobody in it")
                self.authors += authors


def _name(field: bytes) -> bytes:
    """The name of a field in lower case, however it is folded and whatever stands before its colon."""
    name, colon, _ = field.partition(b":")
    return name.replace(b"\r\n", b"").strip(b" \t").lower() if colon else b""
