"""Owns the envelope, who gave it to us, and the commit record: what travels beside a message's octets and is stored with it.

An `Envelope` is made in one place, from the MAIL command (`wire.smtp.parse_mail`), and carried whole by the commit record
and the queue row. `Commit.parse` and `Commit.format` are the only way from a record to its octets and back: JSON, in which
the envelope's fields stand beside the record's own.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field


class Envelope(Struct, frozen=True):
    """What a MAIL command says of a message, but for its size, which is a word and no more."""

    reverse_path: str = ""  # "" is the null reverse-path <>
    body: str = ""  # 7BIT, 8BITMIME or BINARYMIME as declared (RFC 6152, 3030)
    smtputf8: bool = False  # RFC 6531 §3.4
    ret: str = ""  # RFC 3461 §4.3: FULL or HDRS
    envid: str = ""  # RFC 3461 §4.4, still in xtext


class Peer(Struct, frozen=True):
    """Who gave us a message, and how: what our Received field says (RFC 5321 §4.4)."""

    client: str  # its address as it stands in brackets (`[192.0.2.1]`, `[IPv6:2001:db8::1]`), or a name of ours
    hello: str  # what it called itself
    protocol: str  # SMTP, ESMTP, ESMTPS, ESMTPSA, LMTP … (RFC 3848)
    cipher: str = ""  # empty without TLS


class Target(Struct, frozen=True, omit_defaults=True):
    """Where one recipient's copy goes: an entry in a mailbox, or a queue row for a destination elsewhere."""

    account: str = ""  # directory id of the account; empty for a destination
    mailbox: str = "INBOX"
    flags: int = 0
    destination: str = ""  # an address elsewhere; empty for a mailbox
    reverse_path: str = ""  # sender on the onward envelope ("" is <>)
    recipient: str = ""  # the forward-path as the sender gave it
    notify: str = ""  # RFC 3461 §4.1: NEVER or a list of SUCCESS, FAILURE, DELAY
    orcpt: str = ""  # RFC 3461 §4.2, still in xtext
    original: str = ""  # the sender, where `reverse_path` is a token that stands for it (`delivery.srs`)


class Commit(Struct, frozen=True):
    """The record that makes a copy a message: enough to make entries and queue rows again from it (P15).

    `sizes` are the octets of each chunk, uncompressed; `sha256` is over the message's octets, in hex.
    """

    octets: int
    sha256: str
    sizes: list[int]
    received_at: float  # UTC
    envelope: Envelope
    targets: list[Target]
    hops: int = 0
    plain: bool = False  # every line ends in CRLF and none begins with a dot: it can be sent as it is (RFC 5321 §4.5.2)
    extra: dict[str, Any] = field(default_factory=dict)  # fields of newer versions, kept as they are (P19)
    as_text: int = 0  # octets of a binary message with the line ends that readers get (RFC 3030 §3); 0: `octets`

    @property
    def shown_octets(self) -> int:
        """What readers get of it, and what counts in their mailboxes."""
        return self.as_text or self.octets

    @staticmethod
    def parse(octets: bytes) -> Commit:
        """Reads a stored record. Raises msgspec.DecodeError. Unknown fields are passed over: the first release wrote `mark`."""
        s = _parse(octets)
        envelope = Envelope(s.reverse_path, s.body, s.smtputf8, s.ret, s.envid)
        return Commit(s.octets, s.sha256, s.sizes, s.received_at, envelope, s.targets, s.hops, s.plain, s.extra, s.as_text)

    def format(self) -> bytes:
        """The record as it is stored."""
        e = self.envelope
        return _format(
            _Stored(
                self.octets, self.sha256, self.sizes, self.received_at, e.reverse_path, self.targets,
                e.envid, e.ret, e.body, e.smtputf8, self.hops, self.plain, self.extra, self.as_text,
            )
        )  # fmt: skip


class CommitForm(Struct, frozen=True):
    """What a reader of a small message needs of its commit record, and no more."""

    sizes: list[int]
    plain: bool = False

    @staticmethod
    def parse(octets: bytes) -> CommitForm:
        """Reads it from a stored record. Raises msgspec.DecodeError."""
        return _parse_form(octets)


class _Stored(Struct, frozen=True, omit_defaults=True):
    """The stored form (docs/disk.md): as `Commit`, and flat."""

    octets: int
    sha256: str
    sizes: list[int]
    received_at: float
    reverse_path: str
    targets: list[Target]
    envid: str = ""
    ret: str = ""
    body: str = ""
    smtputf8: bool = False
    hops: int = 0
    plain: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    as_text: int = 0


_parse = msgspec.json.Decoder(_Stored).decode
_parse_form = msgspec.json.Decoder(CommitForm).decode
_format = msgspec.json.Encoder().encode
