"""Owns the client side of SMTP's grammar: reading replies within bounds, whatever a hostile next hop sends (F04)."""

from __future__ import annotations

import re
from typing import NamedTuple

from powermail.base import limits

_REPLY = re.compile(rb"([2-5][0-9][0-9])([ -]?)(.*)", re.DOTALL)
_ENHANCED = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: |$)")


class ReplyError(Exception):
    """What came is not an SMTP reply, or too long: a temporary failure of that host."""


class Reply(NamedTuple):
    """One reply. `text` joins its lines with a blank; it is foreign text and must be quoted when shown."""

    code: int
    enhanced: str
    text: str
    lines: tuple[str, ...]

    @property
    def positive(self) -> bool:
        """2xx or 3xx."""
        return self.code < 400


class ReplyReader:
    """Octets in, replies out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._octets = 0

    def feed(self, octets: bytes) -> list[Reply]:
        """Returns the replies that are complete now. Raises ReplyError; the connection is then of no more use."""
        self._buffer += octets
        replies: list[Reply] = []
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > limits.SMTP_CLIENT_REPLY_LINE_OCTETS_MAX:
                    raise ReplyError("reply line too long")
                return replies
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
                replies.append(_assemble(self._lines))
                self._lines = []
                self._octets = 0


def _assemble(lines: list[bytes]) -> Reply:
    texts = tuple(line[4:].decode("utf-8", "replace") for line in lines)
    enhanced = _ENHANCED.match(texts[0])
    return Reply(int(lines[0][:3]), enhanced.group(1) if enhanced else "", " ".join(texts), texts)
