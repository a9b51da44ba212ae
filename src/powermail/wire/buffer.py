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
    """Octets that came in and were not used yet. `data` is them, to be looked at and never changed by others."""

    def __init__(self) -> None:
        self.data = self._data = bytearray()
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
        if self._skipping and not self._skipped():
            return None
        end = data.find(b"\n", self._scanned)
        if end < 0:
            if len(data) >= limit:
                data.clear()
                self._scanned = 0
                self._skipping = True
                raise LineTooLong
            self._scanned = len(data)
            return None
        self._scanned = 0
        if data.find(b"\r", 0, end) == end - 1 >= 0 and end < limit and data.find(b"\0", 0, end) < 0:
            line = bytes(data[: end - 1])
            del data[: end + 1]
            return line
        line = bytes(data[:end])
        del data[: end + 1]
        if end >= limit:
            raise LineTooLong
        raise BareLineEnd(line.removesuffix(b"\r"))

    def begins(self, octets: bytes) -> bool:
        """True if a line begins here, with these octets."""
        return self._skipped() and self._data.startswith(octets)

    def _skipped(self) -> bool:
        """Throws the rest of an overlong line away; True if a line begins here."""
        if self._skipping:
            end = self._data.find(b"\n")
            del self._data[: end + 1 if end >= 0 else len(self._data)]
            self._scanned = 0
            self._skipping = end < 0
        return not self._skipping

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
