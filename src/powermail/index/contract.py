"""Owns the contract of the index: the one truth of all front ends about mailboxes, copies and the queue.

Implementation: `index.sqlite.SqliteIndex`; PostgreSQL follows behind the same contract. Every method that changes
something returns only when the change is durable. IndexTrouble means: try later, nothing is known about the outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from powermail.mail.envelope import Commit, Target


class Delivery(NamedTuple):
    """A message with R durable copies, to be entered in mailboxes and queue."""

    key: bytes
    commit: Commit
    nodes: tuple[str, ...]
    late: bool = False  # found by reconcile: it may have had numbers that were lost, so its mailboxes jump a little


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


class CheckpointPlan(NamedTuple):
    """A checkpoint to be written: what changed above `since_modseq`, or with 0 the whole mailbox under the other name."""

    mailbox: MailboxFacts
    since_modseq: int
    number: int  # of its first record
    side: int  # a whole checkpoint takes the other of two names, so that the old one counts until it is complete


class RestoredMessage(NamedTuple):
    """A message that a rebuild found on nodes, with the targets that no checkpoint shows."""

    key: bytes
    commit: Commit
    sha256: bytes
    nodes: tuple[str, ...]
    targets: list[Target]


class Index(Protocol):
    """The index."""

    def expect(self, count: int) -> None:
        """So many more deliveries (or fewer, if negative) are on their way: worth waiting a moment for in one transaction."""

    def deliver(self, delivery: Delivery) -> asyncio.Future[bool]:
        """Enters a message; many that wait share one transaction. Idempotent by key: False if it was known.

        The future raises IndexTrouble; cancelling it does not stop what has begun.
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

    catching_up: bool

    @property
    def epoch(self) -> int:
        """The current epoch."""

    async def totals(self) -> dict[str, int]:
        """Sizes for status."""

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        """(account, messages, octets) of accounts that have mailboxes, in order."""

    async def audit(self) -> list[str]:
        """Recounts what can be recounted; returns what does not agree."""

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        """Rows by id, for the operator."""

    async def queue_row(self, number: int) -> QueueRow | None:
        """One row."""

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        """Holds, releases or makes due; an empty list means all."""

    async def node_rows(self) -> list[NodeRow]:
        """What is remembered of all nodes."""

    async def set_node(self, node: str, incarnation: str, segment: int, offset: int) -> None:
        """Sets incarnation and watermark."""

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        """Sets what is not None."""

    async def note_copies(self, node: str, keys: Sequence[bytes]) -> list[bytes]:
        """Believes that `node` holds these; returns the keys the index has never seen."""

    async def drop_copies(self, node: str, keys: Sequence[bytes]) -> None:
        """No longer believes that `node` holds these."""

    async def add_copy(self, key: bytes, node: str) -> bool:
        """A repaired copy is durable. False if the message went away meanwhile."""

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        """Keys believed to be on a node, in order."""

    async def under_copied(self, groups: Mapping[str, str], required: int, after: bytes, limit: int) -> list[MessageFacts]:
        """Messages whose copies on the nodes in `groups` (node to group) span fewer than `required` groups."""

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        """(messages, octets) of the same."""

    async def deletions_due(self, node: str, limit: int) -> list[bytes]:
        """Keys whose tombstone that node has not confirmed."""

    async def deletions_total(self, node: str) -> int:
        """How many wait for a node."""

    async def confirm_deletions(self, node: str, keys: Sequence[bytes]) -> list[bytes]:
        """The tombstones are durable there; returns the keys that no other node still owes."""

    async def order_deletions(self, node: str, keys: Sequence[bytes]) -> None:
        """Orders tombstones for keys a node should not hold."""

    async def note_repair(self, key: bytes, node: str, why: str) -> None:
        """A copy that does not count: it is bad, or its node was given up on while it stored."""

    async def suspects(self, after: tuple[bytes, str], limit: int) -> list[tuple[bytes, str]]:
        """(key, node) of copies that do not count, in order."""

    async def clear_suspect(self, key: bytes, node: str) -> None:
        """The node holds no copy of it any more."""

    async def forget_aborted(self, before: float) -> None:
        """Drops old abort notes."""

    @property
    def commits(self) -> int:
        """How many transactions are durable: the mark that every commit record carries, by which lost ones are noticed."""

    async def set_commits(self, commits: int) -> None:
        """Moves the count up to what the nodes have seen."""

    async def forget_messages(self, keys: Sequence[bytes]) -> int:
        """Removes messages that a node holds tombstones of, with all their entries and queue rows; how many there were."""

    async def raise_epoch(self) -> int:
        """Commits may be lost: mailboxes jump, readers wait for reconcile."""

    async def caught_up(self) -> None:
        """Reconcile has seen every node's log."""

    async def checkpoint_due(self, before: float, limit: int) -> list[int]:
        """Mailboxes that changed since their last checkpoint."""

    async def checkpoint_plan(self, mailbox: int) -> CheckpointPlan | None:
        """What must be written: a delta, or all when the deltas outweigh the mailbox."""

    async def checkpoint_entries(self, plan: CheckpointPlan, after_uid: int, limit: int) -> list[EntryFacts]:
        """Some of its entries, in order of UID; newer states of them are fine, the next delta has them too."""

    async def checkpoint_expunged(self, plan: CheckpointPlan, after_uid: int, limit: int) -> list[int]:
        """Some of its expunged UIDs, in order."""

    async def checkpoint_done(self, plan: CheckpointPlan, records: int, rows: int, at: float) -> None:
        """All its records are on R nodes."""

    async def restore_mailbox(
        self, facts: MailboxFacts, entries: Sequence[EntryFacts], held: Mapping[bytes, tuple[int, bytes, tuple[str, ...]]]
    ) -> int:
        """Rebuild: enters a mailbox as of its checkpoint; how many entries have no copy any more."""

    async def restore_messages(self, messages: Sequence[RestoredMessage]) -> int:
        """Rebuild: enters what checkpoints do not show; how many queue rows were made, all held."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow]:
        """Takes due queue rows."""

    async def finish(self, rows: list[QueueRow]) -> None:
        """These recipients are done."""

    async def defer(self, rows: list[QueueRow], due_at: list[float], status: str) -> None:
        """Tries again later."""

    async def release_leases(self, owner: str) -> None:
        """Gives back what an owner has leased."""

    async def queue_count(self, domain: str = "") -> int:
        """How many queue rows wait, all or for one domain."""

    async def message(self, key: bytes) -> MessageFacts | None:
        """What is known of a message."""

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        """The same for many; unknown keys are left out."""
