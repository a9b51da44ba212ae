"""Owns the forms of the node protocol: the metas of all verbs, and the lists that travel in bodies.

All are msgpack arrays. Rule (P19): fields are only ever appended, each with a default; a reader passes over fields behind
those it knows, and takes the default for those that an older writer does not send. Keys are sixteen octets and nothing else;
numbers have bounds; moments are finite, so that none compares to nothing.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from powermail.base import limits

PROTOCOL_FIRST: Final = 1  # the oldest version that this program speaks
PROTOCOL_LAST: Final = 1  # and the newest

Key = Annotated[bytes, Meta(min_length=16, max_length=16)]
After = Annotated[bytes, Meta(max_length=16)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Moment = Annotated[float, Meta(ge=-1e300, le=1e300)]
Number = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Word = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
Limit = Annotated[int, Meta(ge=1, le=limits.NODE_PAGE_ITEMS_MAX)]
ChunkNumber = Annotated[int, Meta(ge=0, le=limits.CHUNKS_MAX - 1)]
MarkOctets = Annotated[int, Meta(ge=0, le=limits.NODE_MARK_OCTETS_MAX)]
Id = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]  # of a certificate
RecordOctets = Annotated[int, Meta(ge=0, le=limits.RECORD_BODY_OCTETS_MAX)]


class Nothing(Struct, array_like=True, frozen=True):
    """A meta that says nothing yet. An empty meta is one too."""


class Hello(Struct, array_like=True, frozen=True):
    """The first frame of a connection: who speaks is in the certificate, what is spoken and to whom is here."""

    first: Number  # protocol versions that the client speaks
    last: Number
    cluster: Word
    node: Word  # that it wants to speak to
    incarnation: Word  # of it as last known, "" if it is not
    instance: Key  # of the client's process and link, at random
    session: Count  # rises with each connecting of that instance
    lane: Annotated[int, Meta(ge=0, le=1)]  # 0 small, 1 bulk
    fence: Count = 0  # version of the layout that the client goes by
    octets: Count = limits.NODE_WINDOW_OCTETS  # what it wants its windows to be at most
    operations: Count = limits.NODE_WINDOW_OPERATIONS
    features: tuple[Word, ...] = ()


class Welcome(Struct, array_like=True, frozen=True):
    """The answer: what both speak from now on."""

    version: Number
    cluster: Word
    node: Word
    incarnation: Word
    fence: Count
    octets: Count
    operations: Count
    features: tuple[Word, ...] = ()


class ChunkForm(Struct, array_like=True, frozen=True):
    """A chunk whose stored octets lie in the body."""

    number: ChunkNumber
    flags: Annotated[int, Meta(ge=0, le=255)]
    stored: RecordOctets
    octets: Count  # uncompressed


class StampForm(Struct, array_like=True, frozen=True):
    """A stamp (law 2); boot "" is none."""

    boot: Word = ""
    at: Moment = 0.0


class MarkForm(Struct, array_like=True, frozen=True):
    """A mark of the index (law 10). It travels in bodies: that of an index with many writers is larger than a meta may be."""

    sequence: Count = 0
    slots: dict[Count, tuple[Word, Count]] = {}
    epoch: Count = 0
    uidvalidity: Count = 0
    retired: tuple[Word, ...] = ()


class Append(Struct, array_like=True, frozen=True):
    """Chunks of a message that streams in; the body has their stored octets, one behind the other."""

    key: Key
    chunks: list[ChunkForm]


class Commit(Struct, array_like=True, frozen=True):
    """The last chunks and the commit record. The body is the record, then the stored octets of the chunks."""

    key: Key
    count: Annotated[int, Meta(ge=0, le=limits.CHUNKS_MAX)]
    boot: Word  # of the frozen stamp; "" for none
    at: Moment
    origin: Annotated[int, Meta(ge=0, le=255)]
    record: RecordOctets
    chunks: list[ChunkForm]


class Acks(Struct, array_like=True, frozen=True):
    """Receipts of one incarnation; the body is packed (operation, segment, offset), 24 octets each."""

    incarnation: Word


class KeyForm(Struct, array_like=True, frozen=True):
    """One key."""

    key: Key


class Abort(Struct, array_like=True, frozen=True):
    """A tombstone of a front end's own delivery, with the stamp it froze for this node (law 5). The body is a mark and keys."""

    at: Moment
    mark: MarkOctets
    stamp: StampForm


class Delete(Struct, array_like=True, frozen=True):
    """Tombstones stated at a date. The body is a mark and keys."""

    at: Moment
    mark: MarkOctets


class Marked(Struct, array_like=True, frozen=True):
    """How many octets in front of the body are a mark; 0: it is one that says nothing."""

    mark: MarkOctets


class EndForm(Struct, array_like=True, frozen=True):
    """The durable end of the log, and of which incarnation."""

    incarnation: Word
    segment: Count
    offset: Count


class PositionForm(Struct, array_like=True, frozen=True):
    """A place in the log."""

    segment: Count
    offset: Count


class Discard(Struct, array_like=True, frozen=True):
    """A copy to be verified, and dropped if it is bad. The body is a mark."""

    key: Key
    mark: MarkOctets


class HeldForm(Struct, array_like=True, frozen=True):
    """What a node says of a key: 0 live, 1 dead, 2 absent, 3 unknown."""

    held: Annotated[int, Meta(ge=0, le=3)]


class ReadChunk(Struct, array_like=True, frozen=True):
    """One chunk of a message."""

    key: Key
    number: Number


class WholeForm(Struct, array_like=True, frozen=True):
    """A small message: the commit record, and the octets of its chunks, uncompressed."""

    commit: bytes
    parts: list[bytes]


class ScanAsk(Struct, array_like=True, frozen=True):
    """Where a scan goes on, how much it shows, and how old that is."""

    segment: Count
    offset: Count
    limit: Limit
    age_s: Moment


class UnreadForm(Struct, array_like=True, frozen=True):
    """A stretch that could not be read."""

    segment: Count
    offset: Count
    octets: Count


class ScanHead(Struct, array_like=True, frozen=True):
    """A part of a log; the body is a ScanBody. `gone`: the segment of a stretch that was to be read again is."""

    incarnation: Word
    following: PositionForm
    end: PositionForm
    gone: bool = False


class ScannedForm(Struct, array_like=True, frozen=True):
    """A record that was found; origin -1 is a tombstone."""

    key: Key
    segment: Count
    offset: Count
    origin: Annotated[int, Meta(ge=-1, le=255)]


class ScanBody(Struct, array_like=True, frozen=True):
    """What a scan found."""

    items: list[ScannedForm]
    unread: list[UnreadForm]


class Page(Struct, array_like=True, frozen=True):
    """Behind which key, and how many."""

    after: After
    limit: Limit


class ItemForm(Struct, array_like=True, frozen=True):
    """A key of an inventory."""

    key: Key
    held: Annotated[int, Meta(ge=0, le=3)]
    segment: Count
    offset: Count
    origin: Annotated[int, Meta(ge=0, le=255)]


class PutCheckpoint(Struct, array_like=True, frozen=True):
    """A record under a name; the body is a mark and the record."""

    name: Key
    number: Number
    mark: MarkOctets
    epoch: Count = 0
    uidvalidity: Count = 0
    modseq: Count = 0


class CheckpointsAsk(Struct, array_like=True, frozen=True):
    """Behind which name, of how many, and how many records of these were given before."""

    after: After
    limit: Limit
    skip: Count = 0


class CheckpointsHead(Struct, array_like=True, frozen=True):
    """A part of a page; `following`: what to skip when it is asked again for the same names, 0 if that was all."""

    following: Count


class CheckpointForm(Struct, array_like=True, frozen=True):
    """One record of a checkpoint."""

    name: Key
    number: Number
    octets: bytes


class Compactable(Struct, array_like=True, frozen=True):
    """Below which place, and before which date tombstones may go."""

    segment: Count
    offset: Count
    at: Moment


class CompactableHead(Struct, array_like=True, frozen=True):
    """Whether a segment is worth it; the body is the keys of its old tombstones."""

    worth: bool


class Compact(Struct, array_like=True, frozen=True):
    """One step; the body is a mark and the keys that are forgotten."""

    segment: Count
    offset: Count
    mark: MarkOctets


class Freed(Struct, array_like=True, frozen=True):
    """Octets that a step freed."""

    octets: Count


class Block(Struct, array_like=True, frozen=True):
    """The operator's switch."""

    blocked: bool


class LayoutForm(Struct, array_like=True, frozen=True):
    """The newest layout that is known, its octets in the body, and the fence: who goes by an older one than that is refused."""

    version: Count
    fence: Count


class Follow(Struct, array_like=True, frozen=True):
    """The version of the layout that the asker goes by from now on."""

    version: Count


class Expel(Struct, array_like=True, frozen=True):
    """Ids whose certificates admit nobody from now on. With `more` there are others behind them: only then it is all."""

    ids: Annotated[tuple[Id, ...], Meta(max_length=limits.NODE_EXPEL_IDS_MAX)]
    more: bool = False


class ExpelledForm(Struct, array_like=True, frozen=True):
    """Who was expelled, and ids of some who said so; none if that was told to an older program."""

    id: Id
    by: tuple[Id, ...]


class Error(Struct, array_like=True, frozen=True):
    """What went wrong: a class (`node_verbs.Failure`) and a text for people. With FENCED `version` is that of the layout in the
    body.
    """

    failure: int
    text: Text
    version: Count = 0


class StatForm(Struct, array_like=True, frozen=True):
    """A node's figures, pushed."""

    state: Word
    reason: Text
    incarnation: Word
    free_octets: int
    total_octets: int
    log_octets: int
    live_octets: int
    segments: int
    messages: int
    damaged: int
    waiting_octets: int
    probe_s: Moment
    write_s: Moment


class FactsForm(Struct, array_like=True, frozen=True):
    """What a node knows of itself (laws 10, 12); the body of the answer to END."""

    incarnation: Word
    end: PositionForm
    boots: tuple[Word, ...]
    began: tuple[PositionForm, ...]
    birth: PositionForm
    damaged: bool
    mark: MarkForm


encode: Final = msgspec.msgpack.Encoder().encode
decode_wholes: Final = msgspec.msgpack.Decoder(list[WholeForm | None]).decode
decode_scan: Final = msgspec.msgpack.Decoder(ScanBody).decode
decode_items: Final = msgspec.msgpack.Decoder(list[ItemForm]).decode
decode_checkpoints: Final = msgspec.msgpack.Decoder(list[CheckpointForm]).decode
decode_mark: Final = msgspec.msgpack.Decoder(MarkForm).decode
decode_facts: Final = msgspec.msgpack.Decoder(FactsForm).decode
decode_expelled: Final = msgspec.msgpack.Decoder(list[ExpelledForm]).decode
NOTHING: Final = Nothing()
