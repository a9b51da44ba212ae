"""Owns the input buffer of line protocols: lines with a limit, raw octets, and dropping everything at a TLS switch.

Rules: memory stays bounded by `feed` size plus the line limit, because an overlong line is discarded as it comes;
a line ends at LF, and one that does not end in CRLF is told apart so that no session treats it as a command.
"""

from __future__ import annotations


class LineTooLong(Exception):
    """A line passed its limit; it has been, or is being, thrown away up to its end."""


class BareLineEnd(Exception):
    """A line ended in LF without CR, or holds a bare CR or NUL (RFC 5321 §2.3.8)."""


class InputBuffer:
    """Octets that came in and were not used yet."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._scanned = 0
        self._skipping = False

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, octets: bytes) -> None:
        """Adds octets from the peer."""
        self._data += octets

    def clear(self) -> None:
        """Drops everything: what came before a TLS handshake is never used after it (RFC 3207 §4.2)."""
        self._data.clear()
        self._scanned = 0
        self._skipping = False

    def line(self, limit: int) -> bytes | None:
        """The next line without its CRLF, or None if it is not complete.

        Raises LineTooLong once for a line of more than `limit` octets (CRLF included), BareLineEnd for a bad one.
        """
        data = self._data
        while True:
            end = data.find(b"\n", self._scanned)
            if self._skipping:
                if end < 0:
                    data.clear()
                    self._scanned = 0
                    return None
                del data[: end + 1]
                self._scanned = 0
                self._skipping = False
                continue
            if end < 0:
                if len(data) >= limit:
                    data.clear()
                    self._scanned = 0
                    self._skipping = True
                    raise LineTooLong
                self._scanned = len(data)
                return None
            line = bytes(data[:end])
            del data[: end + 1]
            self._scanned = 0
            if end >= limit:
                raise LineTooLong
            if line[-1:] != b"\r":
                raise BareLineEnd(line)
            line = line[:-1]
            if b"\r" in line or b"\0" in line:
                raise BareLineEnd(line)
            return line

    def has_line(self) -> bool:
        """True if a complete line waits (pipelining)."""
        return self._data.find(b"\n", self._scanned) >= 0

    def take(self, octets: int) -> bytes:
        """Up to `octets` raw octets."""
        part = bytes(self._data[:octets])
        del self._data[:octets]
        self._scanned = 0
        return part

    def take_all(self) -> bytes:
        """All that waits."""
        part = bytes(self._data)
        self._data.clear()
        self._scanned = 0
        return part

    def put_back(self, octets: bytes) -> None:
        """Returns octets that belong to what follows."""
        self._data[:0] = octets
        self._scanned = 0

    def peek(self, octets: int) -> bytes:
        """A look at the next octets without taking them."""
        return bytes(self._data[:octets])
