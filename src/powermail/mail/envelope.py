"""Owns the envelope and the commit record: what travels beside a message's octets and is stored with every copy."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field


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


class Commit(Struct, frozen=True, omit_defaults=True):
    """The record that makes a copy a message: enough to make entries and queue rows again from it (P15).

    `sizes` are the octets of each chunk, uncompressed; `sha256` is over the message's octets, in hex. Fields that are not
    known here are passed over: records of the first release carry `mark`.
    """

    octets: int
    sha256: str
    sizes: list[int]
    received_at: float  # UTC
    reverse_path: str  # "" is the null reverse-path <>
    targets: list[Target]
    envid: str = ""  # RFC 3461 §4.4
    ret: str = ""  # RFC 3461 §4.3: FULL or HDRS
    body: str = ""  # 7BIT, 8BITMIME or BINARYMIME as declared
    smtputf8: bool = False
    hops: int = 0
    plain: bool = False  # every line ends in CRLF and none begins with a dot: it can be sent as it is (RFC 5321 §4.5.2)
    extra: dict[str, Any] = field(default_factory=dict)  # fields of newer versions, kept as they are (P19)


class CommitForm(Struct, frozen=True):
    """What a reader of a small message needs of its commit record, and no more."""

    sizes: list[int]
    plain: bool = False
