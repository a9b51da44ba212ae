r"""Owns dot transparency (RFC 5321 §4.5.2, RFC 1939 §3): un-stuffing what comes in, stuffing what goes out.

Danger: only CRLF "." CRLF ends data. `\n.\n`, `\n.\r\n`, `\r\n.\n`, `\r.\r` do not (SMTP smuggling, CVE-2023-51764 and
kin). Rule for the octets: a bare LF in DATA is stored as CRLF; NUL, bare CR and 8-bit octets are stored as they came.
"""

from __future__ import annotations

import re

_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_END = b"\r\n.\r\n"


def has_bare_lf(octets: bytes) -> bool:
    """True if some LF has no CR before it."""
    return octets.count(b"\n") != octets.count(b"\r\n")


class DotReader:
    """Takes the octets after 354 and gives the message, un-stuffed exactly once, with CRLF line ends."""

    def __init__(self) -> None:
        # The CRLF of the DATA command stands before the first line, so a message may be just ".CRLF".
        self._held = b"\r\n"
        self._first = True
        self.plain = True  # so far every line ended in CRLF, and none begins with a dot

    def feed(self, octets: bytes) -> tuple[bytes, bytes, bool]:
        """Returns (message octets, octets behind the end, whether the end has come). After the end, feed no more."""
        data = self._held + octets
        end = data.find(_END)
        rest = b""
        done = end >= 0
        if done:
            rest = data[end + 5 :]
            data = data[: end + 2]
            self._held = b""
        else:
            keep = _open_end(data)
            self._held = data[len(data) - keep :] if keep else b""
            data = data[: len(data) - keep] if keep else data
        if b"\r\n." in data:
            data = data.replace(b"\r\n.", b"\r\n")
            self.plain = False
        if data and has_bare_lf(data):
            self.plain = False  # a line that begins with a dot may have come of it
            data = _BARE_LF.sub(b"\r\n", data)
        if self._first and data:
            self._first = False
            data = data[2:]
        return data, rest, done


class LineEnds:
    """The text of BDAT chunks with CRLF line ends, as DATA gives it: a bare LF becomes CRLF, the last line is ended.

    `plain` is as in `DotReader`. With `binary` (BODY=BINARYMIME, RFC 3030 §3) the octets stay as they are, and `added` counts
    those that readers of text will get beside them.
    """

    def __init__(self, binary: bool) -> None:
        self.plain = not binary
        self.added = 0
        self._binary = binary
        self._last = b"\r\n"  # of what came before, for a line end or a dot that is cut apart

    def feed(self, octets: bytes) -> bytes:
        """The octets to store for these."""
        if not octets:
            return octets
        before = b"\r" if self._last.endswith(b"\r") else b""
        data = before + octets
        if self._binary:
            self.added += data.count(b"\n") - data.count(b"\r\n")
            self._last = (self._last + octets[-2:])[-2:]
            return octets
        if has_bare_lf(data):
            data = _BARE_LF.sub(b"\r\n", data)
        data = data[len(before) :]
        if self.plain and (b"\r\n." in data or b"\r\n." in self._last + data[:2]):
            self.plain = False
        self._last = (self._last + data[-2:])[-2:]
        return data

    def end(self) -> bytes:
        """What is missing to the end of the last line."""
        missing = b"" if self._last.endswith(b"\n" if self._binary else b"\r\n") else b"\r\n"
        if self._binary:
            self.added += len(missing)
            return b""
        return missing


def _open_end(data: bytes) -> int:
    """How many octets at the end may still be part of CRLF "." CRLF or of a line end."""
    for size in (4, 3, 2, 1):
        if _END.startswith(data[-size:]) and len(data) >= size:
            return size
    return 0


class DotWriter:
    """Stuffs a message for sending, in pieces, and ends it with CRLF "." CRLF.

    LF is always sent as CRLF, so no peer can see an end of data that is not there. With `clean_cr`, a bare CR is sent
    as CRLF too (outbound SMTP, F02); POP3 sends it as it is.
    """

    def __init__(self, clean_cr: bool = False) -> None:
        self._at_line_start = True
        self._held_cr = False
        self._clean_cr = clean_cr

    def feed(self, octets: bytes) -> bytes:
        """The octets to send for this piece."""
        if not octets:
            return b""
        if self._held_cr:
            octets = b"\r" + octets
            self._held_cr = False
        if octets.endswith(b"\r"):
            self._held_cr = True
            octets = octets[:-1]
            if not octets:
                return b""
        if has_bare_lf(octets):
            octets = _BARE_LF.sub(b"\r\n", octets)
        if self._clean_cr and octets.count(b"\r") != octets.count(b"\r\n"):
            octets = _BARE_CR.sub(b"\r\n", octets)
        starts = self._at_line_start and octets.startswith(b".")
        self._at_line_start = octets.endswith(b"\r\n")
        if b"\r\n." in octets:
            octets = octets.replace(b"\r\n.", b"\r\n..")
        return b"." + octets if starts else octets

    def end(self) -> bytes:
        """The rest and the end mark; adds a CRLF only if the message does not end in one."""
        tail = b""
        if self._held_cr:
            tail = b"\r\n" if self._clean_cr else b"\r"
            self._at_line_start = self._clean_cr
        if self._at_line_start:
            return tail + b".\r\n"
        return tail + b"\r\n.\r\n"


def stuff(octets: bytes) -> bytes:
    """A whole message stuffed, with its end mark."""
    if has_bare_lf(octets) or not octets.endswith(b"\r\n"):
        writer = DotWriter()
        return writer.feed(octets) + writer.end()
    if b"\r\n." in octets:
        octets = octets.replace(b"\r\n.", b"\r\n..")
    return b"".join((b"." if octets.startswith(b".") else b"", octets, b".\r\n"))
