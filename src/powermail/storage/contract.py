"""Owns the contract of a storage node: what the cluster may ask, what each answer promises.

Implementations: `storage.node.LocalNode` on a real or simulated disk, `sim.memory.MemoryNode`; one test-suite for all.

Rules
- What changes something returns only when it is durable here; what a node answers or shows is durable (law 1).
- A write error or fsync error makes the node read-only (P18).
- Absence is never inferred: `Held.ABSENT` and `CopyMissing` say "not here", `Held.UNKNOWN` "I cannot tell"; nothing more.
- Every call ends within its deadline: `NodeTrouble` then says that the outcome is unknown (law 14).
- Tombstones, drops, checkpoints and compaction carry a `Mark` of the index, durable before or with the act (law 10). With a
  mark that `Mark.refusal` objects to nothing is done and nothing remembered: `MarkRefused`, also for a mark alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

from msgspec import Struct

COMPRESSED = 1  # chunk flag: the stored octets are one zstd frame


class Position(NamedTuple):
    """A place in a node's log; places are ordered."""

    segment: int
    offset: int


START = Position(0, 0)


class Origin(IntEnum):
    """Who wrote a commit record. Only what a delivery wrote may be entered as new mail (law 6)."""

    DELIVERY = 0
    REPAIR = 1
    MOVED = 2  # by compaction, whoever wrote it first


class Stamp(NamedTuple):
    """A moment of a node: which opening of its log, and its own monotonic clock then (law 2). Only that node compares it."""

    boot: str
    at: float


class Receipt(NamedTuple):
    """A node's word that a copy is durable there (law 1). `position` is that of the commit record."""

    node: str
    incarnation: str
    position: Position


class End(NamedTuple):
    """The durable end of a node's log when it answered, and of which incarnation. What a keeper notes in the index names it:
    a note about a disk that was swapped, or that comes after later news of the node, is void (laws 6, 8, 12).
    """

    incarnation: str
    position: Position


class Dropped(NamedTuple):
    """A node's word that copies are gone there. `live`: those of the keys of which another copy is live there (law 6)."""

    live: tuple[bytes, ...]
    end: End


class Rank(NamedTuple):
    """How new what is kept under a name is: the index's epoch when it was planned, UIDVALIDITY, MODSEQ (of the queue's state 0,
    and its number). All 0: it has none.
    """

    epoch: int = 0
    uidvalidity: int = 0
    modseq: int = 0


NO_RANK = Rank()


class Mark(Struct, frozen=True, omit_defaults=True):
    """What an index had committed when it was made; nodes remember the highest they have seen (law 10).

    `slots` maps the sequence number of every writer slot to (tag, count of its transactions); `sequence` is the highest
    number given to a slot, so that a slot that is missing below it was pruned. All is read in one transaction, the epoch too.
    What an older epoch had was settled when the epoch was raised. `retired` are incarnations that never come back.
    """

    sequence: int = 0
    slots: dict[int, tuple[str, int]] = {}
    epoch: int = 0
    uidvalidity: int = 0
    retired: tuple[str, ...] = ()

    def with_seen(self, seen: Mark) -> Mark:
        """What a node that remembers this one remembers after it was shown `seen`: the highest of each, without the slots
        that `seen` says were pruned; of a later epoch its slots alone.
        """
        sequence, slots = max((mark.epoch, mark.sequence) for mark in (self, seen))[1], self.slots
        if seen.epoch > self.epoch:
            slots = seen.slots
        elif seen.epoch == self.epoch:
            slots = {n: slot for n, slot in self.slots.items() if n in seen.slots or n > seen.sequence}
            for number, (tag, count) in seen.slots.items():
                before = slots.get(number)
                if before is None or before[0] != tag or before[1] < count:
                    slots[number] = (tag, count)
        return Mark(
            sequence,
            slots,
            max(self.epoch, seen.epoch),
            max(self.uidvalidity, seen.uidvalidity),
            tuple(sorted({*self.retired, *seen.retired})),
        )

    def refusal(self, seen: Mark) -> str:
        """Why a node that remembers this one refuses what comes with `seen`; "" if it does not (law 10).

        What an older epoch sends may come of commits that are lost; so may what a slot sends that was pruned, or that was
        given twice: the node forgets nothing for it, so that a loss stays in sight.
        """
        if seen.epoch < self.epoch:
            return f"it comes of epoch {seen.epoch} of the index, and epoch {self.epoch} is known here"
        if seen.epoch == self.epoch:
            for number, (tag, _) in seen.slots.items():
                if number <= self.sequence and self.slots.get(number, ("", 0))[0] != tag:
                    return f"it comes of writer slot {number} of the index, which is not the one that is known here"
        return ""


class Held(Enum):
    """What a node says of one key."""

    LIVE = "live"
    DEAD = "dead"  # a tombstone stands here
    ABSENT = "absent"  # neither a copy nor a tombstone
    UNKNOWN = "unknown"  # the log was found damaged where it may have been


class Chunk(NamedTuple):
    """Part of a message's octets as stored. `octets` is its length uncompressed."""

    number: int
    flags: int
    stored: bytes
    octets: int


class Whole(NamedTuple):
    """A small message as a node has it: its commit record's body, and the octets of its chunks, uncompressed."""

    commit: bytes
    parts: list[bytes]


class NodeState(Enum):
    """What a node does now; the value is the word in `powermail status`."""

    OPENING = "opening"
    READ_WRITE = "read-write"
    BLOCKED = "blocked"  # by the operator: reads and deletes only
    FULL = "full"  # under its reserve: reads and deletes only
    FAILED = "failed"  # a write or fsync failed, or it does not answer: reads only, if at all
    MISSING = "missing"  # its directory is away or refused
    CLOSED = "closed"


class Scanned(NamedTuple):
    """A record found in the log: a live copy (`origin` set) or a tombstone (`origin` None)."""

    key: bytes
    position: Position
    origin: Origin | None


class Unread(NamedTuple):
    """A stretch of the log that could not be read; it may hide records, so it is noted and tried again (law 6).

    With `octets` 0 it is the one record that begins there, whatever its length: the keeper notes so a commit record that a
    scan showed and that was bad when it was read.
    """

    position: Position
    octets: int


class Scan(NamedTuple):
    """A part of a log. `end` is its durable end now: what lies before it is shown or named in `unread`."""

    incarnation: str
    items: list[Scanned]
    following: Position  # where to go on; `after` again when there is nothing more
    end: Position
    unread: list[Unread]


class Item(NamedTuple):
    """One key of a node's inventory: a live copy with its position and origin, or a tombstone (`held` DEAD)."""

    key: bytes
    held: Held
    position: Position
    origin: Origin


class NodeFacts(NamedTuple):
    """What a node knows of itself since it was opened (laws 10, 12)."""

    incarnation: str
    end: Position  # durable
    boots: tuple[str, ...]  # openings whose record is durable, oldest first; long chains forget their beginning
    began: tuple[Position, ...]  # where the log ended when each of these began: an older disk forks off before that
    birth: Position  # nothing before it is ever entered as mail, until it is lifted; START when there is none
    damaged: bool  # this opening found damage, or lost its key index: belief must be checked
    mark: Mark


class NodeStat(Struct, frozen=True):
    """Figures of a node for placement and status."""

    state: str
    reason: str
    free_octets: int
    total_octets: int
    log_octets: int
    live_octets: int
    segments: int
    messages: int
    damaged: int
    waiting_octets: int
    probe_s: float
    write_s: float  # how long the write under way has taken so far, or the longest since the last probe took


class StorageNode(Protocol):
    """One node, served in process or over a network."""

    @property
    def id(self) -> str:
        """Name of the node, unique in the cluster for ever."""

    group: str  # failure domain; like the priority, the layout may change it
    priority: int  # lower is used first

    @property
    def state(self) -> NodeState:
        """As last known; never blocks."""

    @property
    def incarnation(self) -> str:
        """Changes when the directory is made anew or was rolled back; "" while it is not open."""

    def stat(self) -> NodeStat:
        """As last known; never blocks."""

    def stamp(self) -> Stamp | None:
        """The node's stamp as last heard, at most a moment old; None if there is none young enough (law 2). Never blocks."""

    def stamp_age_s(self) -> float:
        """How old what `stamp` gives may be by now, in seconds of this process (law 2). Never blocks."""

    async def fresh_stamp(self) -> Stamp | None:
        """A stamp that the node made after it was asked for here: what rounds and walks name (laws 9, 11). None if it has none,
        and takes no commit. Raises NodeTrouble.
        """

    # -- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens and recovers; fine if open. Raises OperatorError or NodeTrouble with the reason it is refused."""

    async def initialise(self) -> None:
        """Makes an empty directory this node's store, with a new incarnation. Raises OperatorError."""

    async def facts(self) -> NodeFacts:
        """What it knows of itself. Raises NodeTrouble."""

    async def probe(self) -> None:
        """A real write and fsync, and a turn of the reading lane. Raises NodeTrouble."""

    def block(self, blocked: bool) -> None:
        """The operator's switch: no new mail, reads and deletes go on."""

    async def close(self) -> None:
        """Finishes what was promised and gives the directory back; waits for a hung disk only so long."""

    # -- copies -------------------------------------------------------------------------------------------------

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        """Takes chunks of a message that streams in, as `storage.frames` has them. Not durable. Raises NodeTrouble."""

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        """Takes the last chunks and the commit record of a message of `count` chunks; done when all is durable here.

        A delivery brings the stamp it froze when it first asked any node to commit (law 2); a repair may bring None.
        Idempotent: a copy that is live here answers the position it has. Raises `CommitRefused` when the key is not here,
        has no tombstone, and was not written: a definite refusal (law 5), also for a chunk that is none (`storage.frames`). Any
        other NodeTrouble leaves the outcome unknown: also "refused, but here", and a tombstone.
        """

    async def cancel(self, key: bytes) -> None:
        """Lets go of the chunks of a stream that was never asked to commit; writes nothing (law 5). Raises NodeTrouble."""

    async def delete(self, keys: Sequence[bytes], mark: Mark, at: float, stamp: Stamp | None = None) -> End:
        """Writes tombstones, also for keys it never had; durable when it returns. An abort is one too (law 1).

        `at` is the keeper's stated date (UTC); works on a full or blocked node. A delivery that aborts brings the stamp that it
        froze for this node: if a commit with it would be refused, the tombstone is written and not confirmed, because the key
        may have been listed, deleted and forgotten meanwhile (law 5). Raises NodeTrouble.
        """

    async def drop(self, copies: Sequence[tuple[bytes, Position]], mark: Mark) -> Dropped:
        """Removes these copies, each named by the position it was first written at, also after it moved (law 1).

        Says nothing about the key: another copy of it may be committed here. Works on a full or blocked node. A copy that is
        not there is fine. Raises NodeTrouble.
        """

    async def discard(self, key: bytes, mark: Mark) -> Held:
        """Verifies a copy and drops it if it is bad: LIVE (good, it stays), ABSENT (dropped, or not here) or DEAD.

        Raises NodeTrouble.
        """

    # -- reading ------------------------------------------------------------------------------------------------

    async def read_commit(self, key: bytes) -> bytes:
        """The commit record's body. Raises CopyMissing, CopyDamaged, NodeTrouble."""

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        """One chunk, checksum verified, also of a message not yet committed. Raises as read_commit."""

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        """Small messages at once, every record's checksum verified, in the order of `keys`.

        None where a message is not small, not here or not good: `read_commit` says which; and where they would hold more than
        `READ_SMALL_ALL_OCTETS_MAX` together, uncompressed: it is read by itself. Raises NodeTrouble.
        """

    async def has(self, keys: Sequence[bytes]) -> list[Held]:
        """What it says of each key. Raises NodeTrouble."""

    async def verify(self, key: bytes) -> Position:
        """Reads and checks a whole copy; where it was first written. Raises CopyMissing, CopyDamaged, NodeTrouble."""

    # -- keeping ------------------------------------------------------------------------------------------------

    async def fence(self, stamp: Stamp) -> Position:
        """From now on commits with this stamp or an older one are refused; waits for every append that passed the check before,
        and answers the durable end of the log behind them (laws 2, 9, 11). Raises NodeTrouble.
        """

    async def scan(self, after: Position, limit: int, age_s: float) -> Scan:
        """Live copies and tombstones behind `after` in the order of the log, at most `limit`, older than `age_s`.

        Records that compaction moved are shown too. Raises NodeTrouble.
        """

    async def reread(self, unread: Unread) -> Scan | None:
        """Tries a stretch again: what it holds, or None when its segment is gone. `unread` of the answer names what cannot be
        read yet, and what was not looked at: one call goes no further than REREAD_RECORDS_MAX and REREAD_OCTETS_MAX.
        Raises NodeTrouble.
        """

    async def inventory(self, after: bytes, limit: int) -> list[Item]:
        """Every key with a live copy or a tombstone behind `after`, in key order. Raises NodeTrouble."""

    async def put_mark(self, mark: Mark) -> None:
        """Remembers a mark. Raises MarkRefused, NodeTrouble."""

    async def rebirth(self) -> Position:
        """A new incarnation and a birth mark at the end of the log, both durable (law 12); the mark. Raises NodeTrouble."""

    async def lift_birth(self) -> None:
        """There is no birth mark any more, durably: all that lies before it was compared with the index, and what the index
        ordered there is done (law 12). Fine if there is none. Raises NodeTrouble.
        """

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes, mark: Mark, rank: Rank = NO_RANK) -> None:
        """Keeps a record under a name of 16 octets; number 0 replaces all of that name. Durable when it returns.

        Raises OlderCheckpoint, and keeps what there is, if number 0 of that name has a higher rank: a keeper that slept would
        take back what a later one showed (law 11). Raises MarkRefused, NodeTrouble.
        """

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        """Records of at most `limit` names behind `after`, as (name, number, octets) in order. Raises NodeTrouble."""

    async def checkpoints_page(self, after: bytes, limit: int, skip: int) -> tuple[list[tuple[bytes, int, bytes]], int]:
        """A part of the same: behind the first `skip` records as many as hold `NODE_PAGE_OCTETS` together, or one; and what to
        skip for the next part, 0 if there is none. No other record is read. Raises NodeTrouble.
        """

    async def compactable(self, below: Position, at: float) -> list[bytes] | None:
        """What the next `compact` would like to let go: keys of tombstones stated before `at` in the segment that is most
        worth rewriting, whole behind `below`; None when none is worth it. Raises NodeTrouble.
        """

    async def compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        """One paced step: moves a bounded part of that segment, or removes it when all that counts was moved.

        Tombstones of `forgotten` keys may go, once no dead record of theirs is left. Octets freed by this step; call
        `compactable` again when it was 0 or the segment went. Raises NodeTrouble.
        """
