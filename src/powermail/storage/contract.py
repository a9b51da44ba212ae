"""Owns the contract of a storage node: what the cluster may ask, what each answer promises.

Implementations: `storage.node.LocalNode` on a real or simulated disk, `sim.memory.MemoryNode`; one test-suite for all.

Rules: `commit`, `abort`, `delete` and `put_checkpoint` return only when what they name is durable here. A write error or
fsync error makes the node read-only (P18). Absence is never inferred: `CopyMissing` says "not here", nothing more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from msgspec import Struct

COMPRESSED = 1  # chunk flag: the stored octets are one zstd frame


class Position(NamedTuple):
    """A place in a node's log; places are ordered."""

    segment: int
    offset: int


START = Position(0, 0)


class Chunk(NamedTuple):
    """Part of a message's octets as stored. `octets` is its length uncompressed."""

    number: int
    flags: int
    stored: bytes
    octets: int


class Whole(NamedTuple):
    """A small message as it lies on a node: its commit record's body and its chunks."""

    commit: bytes
    chunks: list[Chunk]


class NodeState(Enum):
    """What a node does now; the value is the word in `powermail status`."""

    OPENING = "opening"
    READ_WRITE = "read-write"
    BLOCKED = "blocked"  # by the operator: reads and deletes only
    FULL = "full"  # under its reserve: reads and deletes only
    FAILED = "failed"  # a write or fsync failed: reads only, until the process starts anew
    MISSING = "missing"  # its directory is away
    CLOSED = "closed"


class Scanned(NamedTuple):
    """A committed, not aborted, not deleted message found in the log."""

    key: bytes
    position: Position


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

    @property
    def group(self) -> str:
        """Failure domain."""

    @property
    def priority(self) -> int:
        """Lower is used first."""

    @property
    def state(self) -> NodeState:
        """As last known; never blocks."""

    @property
    def incarnation(self) -> str:
        """Changes when the directory is made anew or was rolled back."""

    def stat(self) -> NodeStat:
        """As last known; never blocks."""

    async def open(self) -> None:
        """Opens and recovers; fine if open. Raises OperatorError or NodeTrouble with the reason it is refused."""

    async def initialise(self) -> None:
        """Makes an empty directory this node's store, with a new incarnation. Raises OperatorError."""

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        """Takes chunks of a message that streams in. Not durable. Raises NodeTrouble."""

    def commit(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int) -> Awaitable[None]:
        """Takes the last chunks and the commit record of a message of `count` chunks; done when all is durable here.

        Idempotent by key. Raises NodeTrouble; the outcome is then unknown until `abort` or a later look.
        """

    async def abort(self, key: bytes) -> None:
        """Makes sure this key is not, and never becomes, a message here; durable when it returns. Raises NodeTrouble."""

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Writes tombstones, also for keys it never had; durable when it returns. Works on a full or blocked node.

        Raises NodeTrouble.
        """

    async def read_commit(self, key: bytes) -> bytes:
        """The commit record's body. Raises CopyMissing, CopyDamaged, NodeTrouble."""

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        """One chunk, checksum verified, also of a message not yet committed. Raises as read_commit."""

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        """Small messages at once, every record's checksum verified, in the order of `keys`.

        None where a message is not small, not here or not good: `read_commit` says which. Raises NodeTrouble.
        """

    async def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are committed messages here."""

    async def deleted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys have a tombstone here: the record of a deletion, not mere absence."""

    async def verify(self, key: bytes) -> None:
        """Reads and checks a whole copy. Raises CopyMissing, CopyDamaged, NodeTrouble."""

    async def discard(self, key: bytes) -> None:
        """Lets go of a copy that fails its check, so that a good one can be committed. A good copy stays."""

    async def scan(self, after: Position, limit: int, age_s: float, moved: bool) -> tuple[list[Scanned], Position]:
        """Messages committed behind `after`, at most `limit`, older than `age_s`, and where to go on.

        The same position back means the end. With `moved`, records that compaction moved are given too.
        """

    async def live_keys(self, after: bytes, limit: int) -> list[bytes]:
        """Keys of messages here behind `after`, in key order."""

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes) -> None:
        """Keeps a mailbox checkpoint; number 0 replaces all of that name. Durable when it returns."""

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        """Checkpoints as (name, number, octets) in order of name and number, names behind `after`."""

    async def end(self) -> Position:
        """Where the log ends now."""

    async def new_incarnation(self) -> str:
        """Marks the directory as rolled back or made anew. Raises NodeTrouble."""

    async def forget_tombstones(self, keys: Sequence[bytes]) -> None:
        """These tombstones are confirmed by every holder: compaction may drop them."""

    async def compact(self, below: Position) -> int:
        """Rewrites one mostly dead segment that lies whole before `below`; octets freed, 0 if none is worth it."""

    async def probe(self) -> None:
        """A real write and fsync. Raises NodeTrouble."""

    def block(self, blocked: bool) -> None:
        """The operator's switch: no new mail, reads and deletes go on."""

    async def close(self) -> None:
        """Finishes what was promised and gives the directory back."""
