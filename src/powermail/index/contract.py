"""Owns the contract of the index: the one truth of all front ends about mailboxes, copies and the queue.

Implementation: `index.sqlite.SqliteIndex`; PostgreSQL follows behind the same contract. Every method that changes
something returns only when the change is durable. IndexTrouble means: try later, nothing is known about the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from powermail.mail.envelope import Commit


class Delivery(NamedTuple):
    """A message with R durable copies, to be entered in mailboxes and queue."""

    key: bytes
    commit: Commit
    nodes: tuple[str, ...]


class MailboxFacts(NamedTuple):
    """One mailbox row. `octets` and `messages` are totals of its entries."""

    id: int
    account: str
    name: str
    uidvalidity: int
    uid_next: int
    modseq: int
    messages: int
    octets: int


class EntryFacts(NamedTuple):
    """One message in one mailbox."""

    uid: int
    key: bytes
    flags: int
    modseq: int
    octets: int
    received_at: float


class MessageFacts(NamedTuple):
    """One stored message and the nodes believed to hold a copy."""

    key: bytes
    octets: int
    sha256: bytes
    nodes: tuple[str, ...]
    references: int


class QueueRow(Struct):
    """One recipient elsewhere. Times are UTC."""

    id: int
    key: bytes
    destination: str
    domain: str
    reverse_path: str
    recipient: str
    notify: str
    orcpt: str
    envid: str
    ret: str
    smtputf8: bool
    octets: int
    created_at: float
    due_at: float
    attempts: int
    held: bool
    last_status: str


class NodeRow(NamedTuple):
    """What the index remembers of a node: reconcile's watermark belongs to one incarnation."""

    id: str
    incarnation: str
    segment: int
    offset: int
    blocked: bool
    missing_since: float


class Release(NamedTuple):
    """Outcome of removing entries: messages whose last reference went are due for deletion on their nodes."""

    removed: int
    dead: int


class CheckpointData(NamedTuple):
    """What changed in a mailbox since its last checkpoint."""

    mailbox: MailboxFacts
    since_modseq: int
    number: int
    entries: list[EntryFacts]
    expunged: list[int]


class Index(Protocol):
    """The index."""

    async def deliver(self, delivery: Delivery) -> bool:
        """Enters a message; many that wait share one transaction. Idempotent by key: False if it was known.

        Raises IndexTrouble.
        """

    async def abort(self, key: bytes, at: float) -> bool:
        """Remembers that a delivery failed. False if the message is entered already: then it is mail."""

    async def usage(self, account: str) -> int:
        """Octets in all mailboxes of an account."""

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        """A mailbox, or None as long as nothing was ever delivered to it."""

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        """All mailboxes by id."""

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        """Entries in order of UID. Raises IndexTrouble while the index may be short (P7)."""

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        """Removes entries for ever; deletes messages nobody refers to any more."""

    async def drop_mailboxes(self, account: str) -> Release:
        """Removes all mailboxes of an account (the operator's purge)."""

    async def queue_count(self, domain: str = "") -> int:
        """How many queue rows wait, all or for one domain."""

    async def message(self, key: bytes) -> MessageFacts | None:
        """What is known of a message."""

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        """The same for many; unknown keys are left out."""
