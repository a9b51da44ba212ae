"""Owns what the index in memory remembers: rows that never change in place, in dicts that are copied for a transaction."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from powermail.base.clock import Clock
from powermail.index.contract import Attempt, Damage, EntryFacts, Fate, MailboxFacts, NodeRow, QueueRow
from powermail.index.laws import Numbers
from powermail.index.sharing import Holder, MoveRow, Token
from powermail.index.view import Change, View
from powermail.storage.contract import Position, Unread
from powermail.storage.layout import NO_LAYOUT, Layout


class MailboxRow(NamedTuple):
    """One mailbox: what it shows of itself, what its numbers may be, and where its checkpoints stand."""

    id: int
    account: str
    name: str
    numbers: Numbers
    messages: int = 0
    octets: int = 0
    keywords: tuple[str, ...] = ()
    trimmed: int = 0  # changes up to this MODSEQ are in the stored view only
    due: float | None = None  # when a checkpoint is due; None: nothing changed since the last one
    base: int = 0  # MODSEQ of the last whole checkpoint; 0: there is none that counts
    base_uid: int = 0  # its UIDNEXT
    written: int = 0  # MODSEQ up to which checkpoints are durable
    whole_side: int = 1
    tail_side: int = 1
    holders: tuple[str, ...] = ()  # nodes with the whole one
    skipped: bool = False

    def facts(self) -> MailboxFacts:
        """The row as the contract shows it."""
        numbers = self.numbers
        return MailboxFacts(
            self.id,
            self.account,
            self.name,
            numbers.uidvalidity,
            numbers.uid_next,
            numbers.modseq,
            self.messages,
            self.octets,
        )


class KeyRow(NamedTuple):
    """One key: its fate (law 3), the round it was decided in (law 9), and how many entries and queue rows refer to it."""

    fate: Fate
    round: int
    refs: int = 0
    octets: int = 0
    sha256: bytes = b""


class Gone(NamedTuple):
    """A key expunged from a mailbox, until it is forgotten; `to` is where it was moved, 0 if it was not (law 13)."""

    modseq: int
    to: int
    to_modseq: int


class Lease(NamedTuple):
    """Who works on a queue row, or does a job, and until when."""

    owner: str = ""
    until: float = 0.0


class Slot(NamedTuple):
    """A writer slot (law 10). `ended` is the round in which it stopped, None while its process may go on."""

    tag: str
    commits: int
    stopped: bool = False
    ended: int | None = None
    left_out: bool = False  # no mark tells of it any more; `ended` is the round since when


@dataclass
class State:
    """All that is committed."""

    cluster: str = ""
    epoch: int = 1
    starts: int = 0  # openings that followed one which did not say that it stopped
    sequence: int = 0
    uidvalidity: int = 0
    round: int = 1
    catching_up: bool = False
    numbering: bool = True
    last_mailbox: int = 0
    last_queue: int = 0
    slots: dict[int, Slot] = field(default_factory=dict)
    mailboxes: dict[int, MailboxRow] = field(default_factory=dict)
    entries: dict[tuple[int, int], EntryFacts] = field(default_factory=dict)  # by mailbox and UID; insert-only
    changes: dict[tuple[int, int], Change] = field(default_factory=dict)  # by mailbox and MODSEQ
    views: dict[int, View] = field(default_factory=dict)  # never changed in place
    gone: dict[tuple[int, bytes], Gone] = field(default_factory=dict)
    keys: dict[bytes, KeyRow] = field(default_factory=dict)
    copies: dict[tuple[bytes, str], None] = field(default_factory=dict)  # believed
    suspects: dict[tuple[bytes, str], str] = field(default_factory=dict)
    damages: dict[str, Damage] = field(default_factory=dict)  # by node
    orders: dict[tuple[str, bytes], None] = field(default_factory=dict)
    drops: dict[tuple[str, bytes, Position], None] = field(default_factory=dict)
    nodes: dict[str, NodeRow] = field(default_factory=dict)
    newcomers: dict[str, str] = field(default_factory=dict)  # incarnations admitted since the index was known to be whole
    unread: dict[tuple[str, Unread], None] = field(default_factory=dict)
    queue: dict[int, QueueRow] = field(default_factory=dict)  # rows are replaced, never changed
    leases: dict[int, Lease] = field(default_factory=dict)
    jobs: dict[str, Lease] = field(default_factory=dict)
    tallies: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # (period, count) by kind and name
    layout: Layout = NO_LAYOUT
    layout_fence: int = 0
    expelled_in: int = 0
    moves: dict[str, MoveRow] = field(default_factory=dict)
    attempts: dict[int, tuple[Attempt, ...]] = field(default_factory=dict)  # by queue row
    queue_planned: int = 0  # number of the last checkpoint of the queue that was begun
    queue_done: tuple[int, int] = (0, 0)  # (number, side) of the last that became durable
    held_domains: dict[str, None] = field(default_factory=dict)
    returns: dict[str, tuple[str, float]] = field(default_factory=dict)  # (original, until) by address
    purged: dict[str, None] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # address by account
    tokens: dict[str, Token] = field(default_factory=dict)
    holders: dict[str, Holder] = field(default_factory=dict)  # of certificates, by identity
    retired: tuple[str, ...] = ()

    def copy(self) -> State:
        """The same state on its own: what lies in the dicts never changes in place."""
        return State(**{each.name: copy.copy(getattr(self, each.name)) for each in fields(self)})


class MemoryStore:
    """What a database file is: it stays when the process that had it open is gone."""

    def __init__(self) -> None:
        self.state = State()
        self.lives = 1  # how often it was put back, which ends all connections to it
        self.clock: Clock | None = None  # of who opened it first: the one clock of all who share it

    def snapshot(self) -> State:
        """A hot backup."""
        return self.state.copy()

    def restore(self, snapshot: State) -> None:
        """Puts a backup back: all commits since are lost, and all connections end."""
        self.state = snapshot.copy()
        self.lives += 1
