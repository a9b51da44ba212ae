"""Owns the contracts of the index: the one truth of all front ends about mailboxes, copies, the queue and checkpoints.

Contracts of one object: `Mailboxes` (what each mailbox shows), `Copies` (fates, copies, nodes), `Queue`, `Checkpoints` (what
goes to the nodes so that the index can be made anew), `Epochs` (lost commits), and those of who shares it (`index.sharing`).
Implementations: `index.memory`, `index.sqlite` and `index.postgres`; one suite for all (`tests/index`). The protocol they keep
is docs/laws.md.

Rules: a method that changes something returns only when the change is durable, as one transaction whose last statement
raises the writer slot's count (law 10). IndexTrouble means: try later, nothing is known about the outcome. While the index
catches up after lost commits (`catching_up`), listings and logins to mailboxes are IndexTrouble, never short (P7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

from msgspec import Struct

from powermail.index.sharing import Identities, Leases, Membership, Tallies
from powermail.index.view import Change, View
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import START, Dropped, End, Held, Mark, Origin, Position, Rank, Receipt, Unread


class Fate(IntEnum):
    """What was decided about a key; the row that says so is the only decider (law 3)."""

    LIVE = 1
    DEAD = 2
    ABORTED = 3


class Outcome(Enum):
    """What entering a delivery came to (laws 4, 7)."""

    ENTERED = "entered"  # live: entered by this call
    KNOWN = "known"  # live or dead already: reconcile was quicker, or it was read and deleted meanwhile
    ABORTED = "aborted"  # an abort was quicker
    SETTLED = "settled"  # a receipt lies behind a watermark, or of another incarnation: decided and forgotten before


class Delivery(NamedTuple):
    """A message with R durable copies in R groups, to be entered in mailboxes and queue."""

    key: bytes
    commit: Commit
    receipts: tuple[Receipt, ...]


# -- mailboxes ------------------------------------------------------------------------------------------------------


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
    """One message in one mailbox. `flags` and `modseq` are as delivered or copied; later changes are in the view."""

    uid: int
    key: bytes
    flags: int
    modseq: int
    octets: int
    received_at: float


class Release(NamedTuple):
    """Outcome of removing references: how many went, and how many messages died with their last one (law 8)."""

    removed: int
    dead: int


class Stored(NamedTuple):
    """Outcome of STORE: the MODSEQ it got (0 if nothing changed), the UIDs that changed, and those that had changed since the
    MODSEQ that the client named (RFC 7162 §3.1.3), which were left alone.
    """

    modseq: int
    changed: tuple[int, ...]
    conflicts: tuple[int, ...]


class FlagChange(Enum):
    """How STORE changes flags (RFC 9051 §6.4.6)."""

    REPLACE = "replace"
    ADD = "add"
    REMOVE = "remove"


class Tail(NamedTuple):
    """What a mailbox has more than a view of it: entries and changes behind it, in order, in one snapshot."""

    facts: MailboxFacts
    entries: list[EntryFacts]
    changes: list[Change]


class Mailboxes(Protocol):
    """What each mailbox shows. UIDs and MODSEQs come from the mailbox row in the transaction that uses them (P10)."""

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        """A mailbox, or None as long as nothing was ever delivered to it."""

    async def make_mailbox(self, account: str, name: str) -> MailboxFacts:
        """The mailbox of that name, made if it does not exist."""

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        """All mailboxes by id."""

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        """(account, messages, octets) of accounts that have mailboxes, in order."""

    async def usage(self, account: str) -> int:
        """Octets in all mailboxes of an account."""

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        """Entries in order of UID. Raises IndexTrouble while the index may be short (P7)."""

    async def view(self, mailbox: int) -> View:
        """The whole state of a mailbox: the stored view with its tail applied. Raises IndexTrouble, KeyError if it is gone."""

    async def tail(self, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        """What came behind a view that is at `modseq` and `uid_next`; None if the changes since were trimmed: take `view`."""

    async def changed(self, known: Mapping[int, int]) -> list[int]:
        """Which of these mailboxes (id to MODSEQ) have a higher MODSEQ, or are gone: the change notice, one query."""

    async def store(
        self, mailbox: int, uids: Sequence[int], how: FlagChange, flags: int, unchanged_since: int | None
    ) -> Stored:
        """Changes flags of those that exist; one change row whatever its size, only for what really changes."""

    async def keyword(self, mailbox: int, name: str) -> int:
        """The flag bit of a keyword in a mailbox, assigned on first use (RFC 9051 §2.3.2).

        Raises ValueError when all are used.
        """

    async def keywords(self, mailbox: int) -> dict[str, int]:
        """The flag bits that keywords have in a mailbox, by name. COPY and MOVE go by the name."""

    async def copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        """(UID, UID there) of the copies, in order; keys are locked and must be live, else nothing is copied (law 8).

        All or nothing, in one transaction: raises ValueError for more than `limits.NUMBERS_AT_ONCE_MAX` (law 10).
        """

    async def move(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        """The same, and they leave this mailbox in the same transaction (RFC 6851 §3.3)."""

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        """Removes entries for ever; a message whose last reference goes dies, with orders for its copies (law 8)."""

    async def merge(self, mailbox: int) -> bool:
        """Folds the tail into the stored view and trims the changes; False if somebody else did."""

    async def purge(self, account: str) -> Release:
        """Removes all mailboxes of an account, in bounded transactions. PURGED must lie on R groups before (law 13)."""

    async def note_purged(self, account: str) -> None:
        """From now on nothing is entered for this account: adoption, walk and rebuild skip its targets (law 13)."""

    async def purged(self, after: str, limit: int) -> list[str]:
        """Accounts so noted, in order."""

    async def note_owners(self, owners: Mapping[str, str]) -> None:
        """Remembers the address that each of these accounts belongs to, instead of what was remembered."""

    async def owners(self, accounts: Sequence[str]) -> dict[str, str]:
        """The address that each account was last known by; those never noted are left out."""


# -- copies -----------------------------------------------------------------------------------------------------------


class MessageFacts(NamedTuple):
    """One live message and the nodes believed to hold a copy."""

    key: bytes
    octets: int
    sha256: bytes
    nodes: tuple[str, ...]
    references: int


class NodeRow(NamedTuple):
    """What the index remembers of a member node. `watermark` and `end_seen` belong to `incarnation` (laws 6, 12)."""

    id: str
    group: str
    incarnation: str
    watermark: Position
    end_seen: Position
    boot: str  # the last opening the index has compared; "" until all that its admission owes was done (law 12)
    scan_round: int  # scanned whole for this round (law 9)
    owes_walk: bool  # after lost commits, until it was walked whole (law 11)
    blocked: bool  # as an earlier release remembers it: now it stands in the layout, which takes it over from here
    missing_since: float  # UTC; 0 while it is there
    owes_compare: bool = False  # its copies of the first release have no origin: compare once what it has with the index


class Batch(NamedTuple):
    """What reconcile found behind a watermark (law 6). `commits` gives the decoded record of keys the index may not know."""

    node: str
    incarnation: str
    from_: Position
    to: Position
    end: Position
    copies: Sequence[tuple[bytes, Position, Origin]]
    tombstones: Sequence[bytes]
    commits: Mapping[bytes, Commit]
    birth: Position = START
    unread: Sequence[Unread] = ()
    round: int | None = None  # set by the batch that reaches the end reported behind the fence of this round (law 9)
    read: Sequence[Unread] = ()  # notes that end: what they stand for is in this batch, or its segment is gone


class Reconciled(NamedTuple):
    """Outcome of a batch. `moved` False: another keeper was quicker (compare-and-set failed), or the index has seen a later end
    of the log, and a copy that would be believed now may have gone since (law 8): who still wants to know looks again.
    `missing`: keys whose commit records are needed first; `lost`: a tombstone of a live key, so the index lost commits. In
    these cases nothing was changed.
    """

    moved: bool
    entered: int = 0
    missing: tuple[bytes, ...] = ()
    lost: bool = False


class Damage(NamedTuple):
    """Copies of a node that failed a check, each counted when it was noted: how many, and when last (UTC)."""

    copies: int
    last_at: float


class DropOrder(NamedTuple):
    """A copy that a node is to drop, named by the position it was first written at."""

    key: bytes
    position: Position


class Copies(Protocol):
    """Fates of keys, which nodes hold what, and what nodes are still to do."""

    def expect(self, count: int) -> None:
        """So many more deliveries (or fewer, if negative) are on their way: worth waiting a moment for in one transaction."""

    def deliver(self, delivery: Delivery) -> asyncio.Future[Outcome]:
        """Enters a message (laws 3, 4, 7); many that wait share one transaction. Idempotent by key.

        The future raises IndexTrouble; cancelling it does not stop what has begun. Raises IndexTrouble at once when more than
        `INDEX_WAITING_MAX` wait.
        """

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate:
        """Decides against a delivery unless it was decided before: the fate the key has now. ABORTED: tombstones are ordered
        on the nodes that were asked to commit (laws 3, 5).
        """

    async def message(self, key: bytes) -> MessageFacts | None:
        """What is known of a live message."""

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        """The same for many; keys that are not live are left out."""

    async def fates(self, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        """The fates of keys; those without a row are left out."""

    async def reconcile(self, batch: Batch) -> Reconciled:
        """Enters what a log holds behind the watermark, as law 6's table says; one transaction, compare-and-set. Void, too, if
        it would add a belief and the index has seen a later end than the batch's (law 8).
        """

    async def settle_inventory(
        self, node: str, end: End, items: Sequence[tuple[bytes, Held, Position]], birth: Position,
        commits: Mapping[bytes, Commit], enter: bool,
    ) -> Reconciled:  # fmt: skip
        """Compares keys of a node's inventory, read when its log ended at `end` or later, with the index. Void if the node is
        of another incarnation, or if something would be entered or believed and a later end was seen (law 8).

        With `enter`, the walk of law 11: a tombstone makes the row dead, also when there is none yet; a live copy without a row
        becomes live unless it lies before `birth` or its drop waits. Without: the scrub's comparison and law 12's: a copy of a
        live row is believed, of a dead one ordered away, without a row dropped (only behind the watermark: what lies at or
        above it is reconcile's). A tombstone of a live key proves lost commits, but while the node owes a walk, or a
        comparison, it only ends the belief; while it owes a walk nothing is dropped.
        """

    async def under_copied(
        self, groups: Mapping[str, str], required: int, after: bytes, limit: int, least: int = 0
    ) -> list[MessageFacts]:
        """Live messages whose copies on the nodes in `groups` (node to group) span fewer than `required` groups, and `least` or
        more, by key.
        """

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        """(messages, octets) of those that span fewer than `required`."""

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        """Keys believed to be on a node, in order."""

    async def believe(self, keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
        """Good copies are durable there, as was found when the log ended at `end` or later; those that are believed now. Locks
        the rows and requires live: not if one is dead or aborted, and a tombstone is ordered there, nor if there is none:
        reconcile will order a drop (laws 6, 8). None is if the node is of another incarnation by now, or if the index has seen
        a later end of its log: what was found may have gone since, and who still wants to know looks again.
        """

    async def let_go(self, key: bytes, copy: Receipt, end: Position, groups: Mapping[str, str], required: int) -> bool:
        """A good copy is not needed where it is: it is believed there no more, and a drop of it is ordered, in one transaction.
        False, and nothing changed, unless the message is live and believed on nodes in `groups` (node to group) that span
        `required` groups without it, and the copy, found when its log ended at `end` or later, is of the node's present
        incarnation, of which no later end was seen: the belief may be in another copy by now (laws 6, 8).
        """

    async def disbelieve(self, node: str, keys: Sequence[bytes], end: End) -> bool:
        """`node` held none of these when its log ended at `end` or later: they are believed there no more. False, and nothing
        changed, if it is of another incarnation, or if one is believed there and a later end was seen: the copy may have been
        made since, and one without a belief gets no tombstone when its message dies (law 8).
        """

    async def note_bad(self, key: bytes, node: str, why: str) -> None:
        """A copy failed its check: it counts no more, and is suspected to lie there until the keeper has looked: `believe` or
        `clear_suspect`. That its record is seen there (`reconcile`, `settle_inventory`) does not make it good. A late note
        harms nothing: the keeper looks, and what is suspected gets its tombstone too.
        """

    async def damages(self) -> dict[str, Damage]:
        """What each node's disk has done to copies, by node: it stays when they were repaired."""

    async def forget_damages(self, node: str) -> None:
        """The node has another disk."""

    async def suspects(self, node: str, after: bytes, limit: int) -> list[bytes]:
        """Keys of suspected copies on a node, in order."""

    async def clear_suspect(self, key: bytes, node: str, end: End) -> None:
        """The node held no copy of it when its log ended at `end` or later. Nothing is changed if it is of another incarnation,
        or if a later end was seen: there may be one by now (law 8).
        """

    async def orders(self, node: str, limit: int) -> list[bytes]:
        """Keys whose tombstone that node has not confirmed, in order (law 8)."""

    async def confirm_orders(self, node: str, keys: Sequence[bytes], end: End) -> None:
        """The tombstones are durable there, before `end`, which counts as seen from now on: a disk without them is an older one
        (law 12). Nothing is changed if the node is of another incarnation by now.
        """

    async def drops(self, node: str, limit: int) -> list[DropOrder]:
        """Copies that node is to drop (laws 6, 12)."""

    async def confirm_drops(self, node: str, drops: Sequence[DropOrder], done: Dropped) -> None:
        """They are gone there: the belief goes too, unless the node says that another copy is live there (law 6). Its end
        counts as seen, and another incarnation changes nothing, as in `confirm_orders`. Nothing is changed either if a belief
        would go and a later end was seen: another copy may have been made since, so the node is to say it again (law 8).
        """

    async def orders_total(self, node: str) -> tuple[int, int]:
        """(tombstones, drops) that wait for a node."""

    # -- nodes --------------------------------------------------------------------------------------------------------

    async def node_rows(self) -> list[NodeRow]:
        """All member nodes, by id."""

    async def admit_node(
        self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position,
        instead_of: str | None = None,
    ) -> bool:  # fmt: skip
        """Remembers an incarnation that is new here: its watermark, `scan_round` begins anew (law 9); orders and drops stay,
        beliefs stay until they were checked. While the index catches up it owes a walk. The incarnation that the node had
        before, if another, is retired: that disk never comes back as it is (law 9), checkpoints on it count as lost, and the
        move that hands on its notes begins (`sharing.HAND_ON`).

        False, and nothing changed, if the node is not of the incarnation `instead_of` any more ("": it had none): who looked
        at a disk, and slept while it was swapped again, would retire the one that is there now. None: whatever it had.
        """

    async def note_boot(self, node: str, incarnation: str, boots: Sequence[str]) -> None:
        """The last of these openings, all that the node tells of, was compared with the index (law 12). Void if the one noted
        before is none of them: it is a later one. The first one of an incarnation is not noted while the index catches up: its
        history does not go back far enough (law 11).
        """

    async def note_compared(self, node: str) -> None:
        """Every key the node has was compared with the index (`settle_inventory` without `enter`): `owes_compare` ends."""

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        """Sets what is not None."""

    async def expel(self, node: str, version: int | None = None) -> bool:
        """Ends a node's membership: its orders, drops, beliefs, suspicions and notes go; its incarnation is retired (law 9),
        its row of the layout says so, the move that hands on its notes begins. False, and nothing changed, if `version` is
        given and the layout has another.
        """

    async def unread(self, node: str, limit: int) -> list[Unread]:
        """Stretches of a node's log that could not be read; a batch that has read them ends these notes (`Batch.read`)."""

    # -- forgetting -----------------------------------------------------------------------------------------------------

    async def raise_round(self) -> int:
        """Begins a round (law 9); its number. A round is completed when every member's `scan_round` is its number or higher.

        Writer slots that stopped before a completed round are in no mark from then on, and pruned when one more round is
        completed, in which every member was told the mark, so that it refuses them, and was compared (law 10).
        """

    async def dead_total(self) -> int:
        """How many dead and aborted rows there are."""

    async def forget(self, limit: int) -> int:
        """Removes at most `limit` dead and aborted rows of rounds before every member's `scan_round`, without orders of
        members, while no member owes a walk or has unread notes (law 9); how many went.
        """

    async def forgotten(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that have no row: their tombstones may go when they are old enough (law 9)."""


# -- queue ------------------------------------------------------------------------------------------------------------


class QueueRow(Struct):
    """One recipient elsewhere. Times are UTC.

    `envelope` is the message's, with the reverse-path that this recipient's copy leaves with; its `body` may be empty, and
    stands in the commit record.
    """

    id: int
    key: bytes
    destination: str
    domain: str
    recipient: str
    notify: str
    orcpt: str
    octets: int
    created_at: float
    due_at: float
    attempts: int
    held: bool
    last_status: str
    envelope: Envelope
    delay_told: bool = False  # its sender knows that it waits (RFC 3461 §4.1)

    @staticmethod
    def of(number: int, key: bytes, commit: Commit, target: Target, held: bool = False, last_status: str = "") -> QueueRow:
        """The row of a message's target elsewhere, due at once."""
        to, at, e = target.destination, commit.received_at, commit.envelope
        return QueueRow(
            number, key, to, to.rpartition("@")[2], target.recipient or to, target.notify, target.orcpt, commit.octets, at, at,
            0, held, last_status, Envelope(target.reverse_path, e.body, e.smtputf8, e.ret, e.envid),
        )  # fmt: skip


class Attempt(NamedTuple):
    """One try to send a recipient's copy that did not end it. `host` and `tls` are empty if no hop was reached."""

    at: float  # UTC, when it ended
    host: str
    tls: str  # version and cipher; empty in clear
    seconds: float  # how long it took
    status: str


class Queue(Protocol):
    """Mail that waits to leave. Finishing a row is an expunge: the last reference may go with it (law 8).

    A row is its owner's from its lease until that is over, by the one clock of all who share the index: whatever clock a
    machine has, no two work on one row while both renew in time. `owner` is new for each start of a process. `finish`, `defer`
    and `give_back` may be repeated when their outcome is unknown; rows that are gone, or that somebody else has by now, are
    passed over.
    """

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str] = ()) -> list[QueueRow]:
        """Takes queue rows that are due at `now` for `owner`, none of domains that are held or in `but`; rows of one message
        come together, oldest first. A row that is due more than `QUEUE_AHEAD_MAX_S` from now is due, and a lease that ends
        later than twice its time is over: the clock ran ahead when they were dated.
        """

    async def renew_leases(self, owner: str, numbers: Sequence[int], lease_s: float) -> list[int]:
        """Of these rows an owner keeps what it has leased, for so long from now; those that somebody else has by now."""

    async def finish(self, rows: list[QueueRow], owner: str | None = None) -> None:
        """These recipients are done; without `owner`, by the operator's hand, whoever has them."""

    async def defer(self, rows: list[QueueRow], due_at: list[float], attempt: Attempt, owner: str) -> None:
        """Tries again later: counts one attempt more than the rows say, sets `delay_told` as they say, and remembers the last
        `QUEUE_ATTEMPTS_KEPT` attempts of each.
        """

    async def give_back(self, rows: list[QueueRow], due_at: float, owner: str) -> None:
        """Tries again later; this was no attempt."""

    async def release_leases(self, owner: str) -> None:
        """Gives back what an owner has leased."""

    async def queue_attempts(self, number: int) -> list[Attempt]:
        """The attempts of one row that are remembered, the oldest first."""

    async def hold_domain(self, domain: str, held: bool) -> None:
        """Nothing leaves for this domain, whatever comes for it, until it is released. In lower case."""

    async def held_domains(self) -> list[str]:
        """Domains that are held, in order."""

    async def find_return(self, address: str, now: float) -> str | None:
        """The sender that an address of ours stands for (`Target.original`), entered with the queue row; kept `RETURN_S`."""

    async def forget_returns(self, now: float) -> int:
        """Removes those whose time is over; how many."""

    async def queue_count(self, domain: str = "") -> int:
        """How many queue rows wait, all or for one domain."""

    async def queue_oldest(self) -> float | None:
        """When the oldest message in the queue came, of those that are not held, nor their domain; None if there is none."""

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        """Rows by id, for the operator."""

    async def queue_row(self, number: int) -> QueueRow | None:
        """One row."""

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        """Holds, releases or makes due; an empty list means all."""


# -- checkpoints --------------------------------------------------------------------------------------------------------


class CheckpointPlan(NamedTuple):
    """A checkpoint to be written. Whole: the merged view; else the tail behind it (law 13).

    `side` alternates among whole ones, and by itself among tails, so that the one before counts until this one is complete.
    `nodes` hold the whole that a delta stands on. `skipped`: keys that moved to a mailbox whose own checkpoint is not
    durable yet are not named as expunged; those mailboxes are `first`, and a whole one follows. `left`: those of `gone` that
    no mailbox of this account shows any more, so that a rebuild enters them in none of its mailboxes again; whoever cannot
    tell leaves it empty. `epoch`: the mailbox was last numbered in; 0 if unknown, which makes a rebuild jump furthest.
    `planned_in`: the index's epoch then; no node lets an older plan replace what a newer one wrote (law 11).
    """

    mailbox: MailboxFacts
    whole: bool
    base: int  # MODSEQ of the whole one (of itself when whole)
    side: int
    nodes: tuple[str, ...]
    gone: tuple[bytes, ...]  # keys expunged from this mailbox, until they are forgotten
    skipped: bool
    left: tuple[bytes, ...] = ()
    first: tuple[int, ...] = ()
    epoch: int = 0
    base_uid: int = 0  # UIDNEXT of the whole one: its tail is `tail(mailbox, base, base_uid)`
    planned_in: int = 0


class Head(NamedTuple):
    """What a record on the nodes says about the numbers of a mailbox (law 11). Numbers of different epochs are compared only
    after each has jumped from its own (`laws.brought`).
    """

    account: str
    name: str
    uidvalidity: int
    uid_next: int
    modseq: int
    epoch: int  # the mailbox was last numbered in; 0 if unknown, which makes it reach farthest


class QueuePlan(NamedTuple):
    """A checkpoint of the queue to be written. `watermarks`: how far each node's log is settled, by node as (incarnation,
    position); nothing before that waits to be read. `rows`: the first open ones, read behind them.

    No two have the same `rank`, and who has a higher one read later: no node lets an older one take its place, and a rebuild
    goes by the newest (laws 11, 13). `side` is not that of the last one that became durable.
    """

    rank: Rank
    side: int
    watermarks: dict[str, tuple[str, Position]]
    rows: list[tuple[int, bytes, str]]


class Checkpoints(Protocol):
    """What goes to the nodes, so that mailboxes can be made anew from them (P15)."""

    async def checkpoint_due(self, now: float, limit: int) -> list[int]:
        """Mailboxes whose checkpoint is due: those that lost the one they had, then the longest due first."""

    async def checkpoint_plan(self, mailbox: int, whole: bool = False) -> CheckpointPlan | None:
        """What must be written; a whole one is merged first. None if nothing changed or the mailbox is gone.

        With `whole`, a whole one whatever the tail is: a holder of the one before takes nothing, or its tail cannot be packed.
        """

    async def checkpoint_done(
        self, plan: CheckpointPlan, nodes: Sequence[str], now: float, incarnations: Mapping[str, str] | None = None
    ) -> None:
        """All its records are durable on these nodes. It counts only in the epoch in which it was planned (law 11), and only if
        all are members still, with the `incarnations` that were written to: else it is due at once (law 13).
        """

    async def checkpoints_lost(self, node: str) -> int:
        """A node is gone or was made anew: what had its checkpoint there gets a whole one before others; how many."""

    async def thin_checkpoints(self) -> int:
        """How many mailboxes lost the one they had, or have one that lies nobody knows where, and got none since: cheap."""

    async def queue_plan(self, limit: int) -> QueuePlan:
        """Begins a checkpoint of the queue, with the first `limit` open rows."""

    async def queue_open(self, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        """Open rows as (id, key, destination) behind `after`, by id."""

    async def queue_done(self, plan: QueuePlan) -> None:
        """It is durable on R groups: the next one goes to the other side."""


# -- epochs ---------------------------------------------------------------------------------------------------------------


class EpochFacts(NamedTuple):
    """How the index stands, read anew. `why`: what this process itself met that proves lost commits; "" if nothing.

    `newcomers`: incarnations that were admitted since the index was last known to be whole, by node: if a loss is noticed,
    their history does not go back far enough (law 11). `doubted`: all that `why` says is that the database has another history:
    what nodes of G-R+1 groups remember shows whether anything is lost (law 10).
    """

    epoch: int
    numbering: bool
    catching_up: bool
    why: str
    newcomers: Mapping[str, str]
    doubted: bool = False


class Epochs(Protocol):
    """Whether the index may have lost commits, and what follows (laws 10, 11).

    Any process may do each step, and several at once: a step that belongs to an epoch names it, and changes nothing when
    another has begun meanwhile. `catching_up`, `numbering`, `epoch` and `mark` are as this process saw them last.
    """

    @property
    def catching_up(self) -> bool:
        """Readers wait: not every log was walked since commits were lost."""

    @property
    def numbering(self) -> bool:
        """False while nothing may get a number: deliveries are IndexTrouble, as if the index were away."""

    @property
    def epoch(self) -> int:
        """The current epoch."""

    @property
    def unsettled(self) -> bool:
        """Readers wait: the process before did not say that it stopped, or, where others write too, this one has compared
        nothing yet or found the database to be another than it was. What was listed then may be missing here, without any sign,
        until the nodes' logs are entered to their ends (laws 6, 10).
        """

    def settled(self) -> None:
        """Nodes of G-R+1 groups were compared, and their logs entered, since `unsettled` began: readers wait no more for it."""

    @property
    def numbered(self) -> int:
        """How many numbers this process has given since it opened the index, or more: no mailbox got more than so many."""

    @property
    def connection(self) -> int:
        """Which connection to the database is used. A new one compares, looks at the process's old writer slot, and takes a new
        slot (law 10).
        """

    async def proof(self, connection: int) -> Mark:
        """The mark that goes to a node with what was read of the index before: it counts every transaction that was seen then,
        because it is made behind the reading, over the same connection, with the epoch read at once (law 10). Raises
        IndexTrouble when `connection`, as it was before the reading, is not in use any more, or another epoch began: read
        again.
        """

    def mark(self) -> Mark:
        """What this process knows to be committed: the slots and the epoch as it found them last. It proves all that this
        process has done, and nothing of what others did: what goes to a node is a `proof`, or it may name a slot that was
        pruned since. Never blocks.
        """

    async def epoch_facts(self) -> EpochFacts:
        """How the index stands now."""

    async def lost(self, mark: Mark, begun: bool = True) -> str:
        """Why a node's mark proves that commits were lost; "" if it does not (law 10). It is compared with the index as it is
        read now, behind the node's answer: others may have written since this process last looked. What this process knows to
        be committed is compared too. `begun` False: also whether a node knows this epoch, which nobody has begun, from
        another life of the index (law 11).
        """

    async def raise_epoch(self, marks: Sequence[Mark], why: str, found_in: int | None = None, asked: bool = False) -> int:
        """Commits were lost: a new epoch above all that is known, UIDVALIDITY's counter leaps, every node owes a walk, readers
        wait, and nothing is numbered until `begin_epoch` (law 11). The new epoch.

        `asked`: `marks` are of nodes of G-R+1 groups; if it was only `doubted`, and none remembers more than is there, no node
        owes a walk.

        `found_in`: the epoch in which the loss was found, or an earlier one. 0 if another process has raised it since, and
        nothing that is known proves a loss of the epoch there is now.
        """

    async def know_newcomers(self, nodes: Mapping[str, str]) -> None:
        """The index was found to be whole since these incarnations were admitted: they belong to its history (law 11)."""

    async def learn_heads(self, heads: Sequence[Head]) -> None:
        """Raises mailboxes to the numbers that checkpoints show, as `laws.learned` says; unknown ones teach only the counter of
        UIDVALIDITY (law 11).
        """

    async def far_heads(self, limit: int) -> list[Head]:
        """How far mailboxes may have got that used half of what they may get beyond their last durable checkpoint: that is to
        be on nodes of R groups before the epoch begins (law 11). Few, however many mailboxes there are.
        """

    async def heads_written(self, heads: Sequence[Head], epoch: int) -> bool:
        """These are durable on nodes of R groups: the mailboxes go on from there, or from where they are if that is farther.
        False if it is another epoch by now.
        """

    async def begin_epoch(self, epoch: int) -> bool:
        """The epoch is durable on R groups, heads of checkpoints were learned, far ones are durable: numbers may be given.
        False if it is another epoch by now.
        """

    async def walked(
        self, node: str, incarnation: str, watermark: Position, end: Position, round: int, epoch: int,
        unread: Sequence[Unread] = (),
    ) -> bool:  # fmt: skip
        """A node was walked whole in this epoch: its watermark is the end behind its fence, and what could not be read before
        that is noted in the same transaction (law 6). False if it is of another incarnation, or if it is another epoch by now
        (compare-and-set).
        """

    async def caught_up(self, epoch: int, connection: int | None = None) -> bool:
        """Groups enough were walked: listings are complete again. False if it is another epoch by now. Raises IndexTrouble when
        `connection`, over which the ends of the walks were looked at, is not in use any more.
        """

    async def rest(self) -> None:
        """The process stops in good order: its slot says so, and the next start needs no jump (law 10)."""


class Index(Mailboxes, Copies, Queue, Leases, Tallies, Membership, Identities, Checkpoints, Epochs, Protocol):
    """The index."""

    @property
    def cluster(self) -> str:
        """Name of the cluster it belongs to."""

    async def totals(self) -> dict[str, int]:
        """Sizes for status."""

    async def audit(self) -> list[str]:
        """Recounts what can be recounted; returns what does not agree."""
