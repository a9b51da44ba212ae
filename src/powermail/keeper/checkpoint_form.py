"""Owns the octets of what keepers write to the nodes: mailboxes' checkpoints, PURGED, the queue's state, far heads (11, 13).

A record is `PMc2`, the length of its head (u32, little endian), the head, and one zstd frame with the body; head and body are
msgpack arrays to which fields are only ever appended. The parts of one checkpoint have their head in common but for its place;
`tag` is drawn for each writing, so parts of two writers are never taken for one. A whole checkpoint is the view in the parts
in which `View.pack` gives it; a tail holds the entries and changes behind the whole one. Both name, a part each, keys that
were expunged from the mailbox and are not forgotten. What the first release wrote (zstd and JSON, no head) is read too.

Danger: a record is read back years later from a disk that may be damaged. Everything that does not decode, whole and within
its bounds, is `BadRecord`; nothing is ever half believed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
import zstandard
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import PowerMailError
from powermail.index.contract import CheckpointPlan, Head, QueuePlan, Tail
from powermail.index.view import KEY_OCTETS, Change, Entry, Op, View, pack_uids, unpack_uids
from powermail.storage.contract import Position

NAME_OCTETS = 16
FIRST_RELEASE_MARK = bytes(NAME_OCTETS)  # the first release kept a count of transactions under this name
_MAGIC = b"PMc2"
_LENGTH = struct.Struct("<I")
_HEAD_OCTETS_MAX = 16 * limits.KIB
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PART_ROWS = limits.VIEW_PART_ROWS
_KEYS_IN_PART = 4 * limits.VIEW_PART_ROWS
_PARTS_MAX = 1 << 20
HEADS_MAX = limits.VIEW_PART_ROWS  # in one record
_NUMBERS_END = 1 << 63  # what a database takes


class BadRecord(PowerMailError):
    """A record on a node that cannot be what a keeper wrote."""


class Kind(IntEnum):
    """What a record is part of."""

    WHOLE = 1
    TAIL = 2
    PURGED = 3
    QUEUE = 4
    HEADS = 5


class RecordHead(Struct, frozen=True, array_like=True):
    """What is known of a record without its body. Numbers are those of the mailbox; 0 where there is none."""

    kind: Kind
    tag: bytes
    part: int
    parts: int
    at: float  # UTC by the writer's clock; for people
    account: str = ""
    name: str = ""
    uidvalidity: int = 0
    uid_next: int = 0
    modseq: int = 0
    base: int = 0  # the whole checkpoint that a tail stands on, of itself for a whole one
    epoch: int = 0  # the mailbox was last numbered in; 0 if unknown
    skipped: bool = False  # some expunged keys are not named

    def rank(self) -> tuple[int, int]:
        """How new a state of the queue is; what had no rank yet is the oldest (law 11)."""
        return self.epoch, self.modseq

    def numbers(self) -> Head:
        """What it says about the numbers of a mailbox (law 11)."""
        return Head(self.account, self.name, self.uidvalidity, self.uid_next, self.modseq, self.epoch)


class WholeBody(Struct, frozen=True, array_like=True):
    """`view` is a part of View.pack, empty behind the last; `gone` and `left` are keys, one behind the other.

    `keywords` are the flag bits by name, all in the first part.
    """

    view: bytes
    gone: bytes = b""
    left: bytes = b""
    keywords: dict[str, int] = {}


class TailBody(Struct, frozen=True, array_like=True):
    """Entries, and changes with their UIDs packed, of which each is in order over all parts; the rest as in a whole one."""

    entries: list[tuple[int, bytes, int, int, int, float]]
    changes: list[tuple[int, int, int, bytes]]
    gone: bytes = b""
    left: bytes = b""
    keywords: dict[str, int] = {}


class QueueBody(Struct, frozen=True, array_like=True):
    """`watermarks`: (node, incarnation, segment, offset); `rows`: (key, destination) of what waits to leave."""

    watermarks: list[tuple[str, str, int, int]]
    rows: list[tuple[bytes, str]]


class HeadsBody(Struct, frozen=True, array_like=True):
    """How far mailboxes may have got, of which no checkpoint on enough nodes shows it (law 11)."""

    heads: list[Head]


class FirstBody(Struct):
    """A record of the first release: part of a whole mailbox (`since` 0) or of what changed after MODSEQ `since`."""

    account: str
    name: str
    uidvalidity: int
    uid_next: int
    modseq: int
    since: int
    at: float
    part: int
    last: bool
    entries: list[tuple[int, str, int, int, int, float]]  # UID, key in hex, flags, MODSEQ, octets, received_at
    expunged: list[int]


class NoBody(Struct, frozen=True, array_like=True):
    """Of a record whose head says all."""


class Expunged(NamedTuple):
    """A key that a checkpoint names as expunged; `left`: no mailbox of that account shows it any more."""

    key: bytes
    left: bool


class Whole(NamedTuple):
    """What a whole checkpoint says."""

    head: RecordHead
    view: View
    gone: list[Expunged]
    keywords: dict[str, int]


class Delta(NamedTuple):
    """What a tail says."""

    head: RecordHead
    entries: list[Entry]
    changes: list[Change]
    gone: list[Expunged]
    keywords: dict[str, int]


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(RecordHead).decode
_decode_whole = msgspec.msgpack.Decoder(WholeBody).decode
_decode_tail = msgspec.msgpack.Decoder(TailBody).decode
_decode_queue = msgspec.msgpack.Decoder(QueueBody).decode
_decode_heads = msgspec.msgpack.Decoder(HeadsBody).decode
_decode_first = msgspec.json.Decoder(FirstBody).decode


def record_name(kind: Kind, account: str, mailbox: str, side: int) -> bytes:
    """The 16 octets a record is filed under on a node: what has the same name replaces the older."""
    return hashlib.sha256(f"{account}\0{mailbox}\0{kind.name.lower()}\0{side}".encode()).digest()[:NAME_OCTETS]


# -- writing ---------------------------------------------------------------------------------------------------------------


def _record(head: RecordHead, body: Struct) -> bytes:
    packed = _encode(head)
    octets = _MAGIC + _LENGTH.pack(len(packed)) + packed + _compress(_encode(body))
    if len(packed) > _HEAD_OCTETS_MAX or len(octets) > limits.RECORD_BODY_OCTETS_MAX:
        raise ValueError(f"a checkpoint record of {len(octets)} octets")
    return octets


def _compress(octets: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(octets)


def _slices(keys: Sequence[bytes]) -> list[bytes]:
    return [b"".join(keys[start : start + _KEYS_IN_PART]) for start in range(0, len(keys), _KEYS_IN_PART)]


def _at(parts: Sequence[bytes], number: int) -> bytes:
    return parts[number] if number < len(parts) else b""


def _heads(plan: CheckpointPlan, kind: Kind, tag: bytes, at: float, numbers: Head, parts: int) -> Iterator[RecordHead]:
    for part in range(parts):
        yield RecordHead(
            kind=kind, tag=tag, part=part, parts=parts, at=at, account=numbers.account, name=numbers.name,
            uidvalidity=numbers.uidvalidity, uid_next=numbers.uid_next, modseq=numbers.modseq, base=plan.base,
            epoch=numbers.epoch, skipped=plan.skipped,
        )  # fmt: skip


def encode_whole(plan: CheckpointPlan, view: View, keywords: dict[str, int], tag: bytes, at: float) -> list[bytes]:
    """Records of a whole checkpoint. `view` may be a little later than the plan. Raises ValueError if it cannot be written."""
    views, gone, left = view.pack(), _slices(plan.gone), _slices(plan.left)
    parts = max(len(views), len(gone), len(left))
    box = plan.mailbox
    uid_next, modseq = max(view.uid_next, box.uid_next), max(view.modseq, box.modseq)
    numbers = Head(box.account, box.name, view.uidvalidity, uid_next, modseq, plan.epoch)
    heads = _heads(plan, Kind.WHOLE, tag, at, numbers, parts)
    return [
        _record(head, WholeBody(_at(views, n), _at(gone, n), _at(left, n), {} if n else keywords))
        for n, head in enumerate(heads)
    ]


def encode_tail(plan: CheckpointPlan, tail: Tail, keywords: dict[str, int], tag: bytes, at: float) -> list[bytes]:
    """Records of a tail, as of the plan: what came later is left out, because the plan's keys say nothing about it.

    Raises ValueError if it cannot be written: then a whole one must be.
    """
    box = plan.mailbox
    entries = [
        (e.uid, e.key, e.flags, e.modseq, e.octets, e.received_at) for e in tail.entries if plan.base < e.modseq <= box.modseq
    ]
    changes = [(c.modseq, int(c.op), c.flags, pack_uids(c.uids)) for c in tail.changes if plan.base < c.modseq <= box.modseq]
    gone, left = _slices(plan.gone), _slices(plan.left)
    rows = max(len(entries), len(changes))
    parts = max(1, -(-rows // _PART_ROWS), len(gone), len(left))
    numbers = Head(box.account, box.name, box.uidvalidity, box.uid_next, box.modseq, plan.epoch)
    records = []
    for number, head in enumerate(_heads(plan, Kind.TAIL, tag, at, numbers, parts)):
        some = slice(number * _PART_ROWS, (number + 1) * _PART_ROWS)
        records.append(
            _record(
                head, TailBody(entries[some], changes[some], _at(gone, number), _at(left, number), {} if number else keywords)
            )
        )
    return records


def encode_purged(account: str, tag: bytes, at: float) -> bytes:
    """The record that says: nothing is ever entered for this account again."""
    return _record(RecordHead(Kind.PURGED, tag, 0, 1, at, account), NoBody())


def encode_queue(plan: QueuePlan, rows: Sequence[tuple[bytes, str]], part: int, parts: int, tag: bytes, at: float) -> bytes:
    """A part of the queue's state; `parts` is 0 but in the last, because nobody knows before how many there will be."""
    marks = [(node, incarnation, *position) for node, (incarnation, position) in sorted(plan.watermarks.items())]
    head = RecordHead(Kind.QUEUE, tag, part, parts, at, modseq=plan.rank.modseq, epoch=plan.rank.epoch)
    return _record(head, QueueBody(marks, list(rows)))


def encode_heads(heads: Sequence[Head], tag: bytes, at: float) -> bytes:
    """The record of at most `HEADS_MAX` far heads."""
    return _record(RecordHead(Kind.HEADS, tag, 0, 1, at), HeadsBody(list(heads)))


# -- reading ---------------------------------------------------------------------------------------------------------------


def decode_head(octets: bytes) -> RecordHead:
    """The head of a record, also of the first release's (their `tag` is what their parts have in common). Raises BadRecord."""
    if octets.startswith(_ZSTD_MAGIC):
        return _first_head(decode_first(octets))
    head: RecordHead = _guarded(_decode_head, _split(octets)[0])
    _check_numbers(head.uidvalidity, head.uid_next, head.modseq, head.base, head.epoch)
    if not 0 <= head.part < _PARTS_MAX or not 0 <= head.parts <= _PARTS_MAX:
        raise BadRecord("a head whose numbers cannot be")
    return head


def _check_numbers(uidvalidity: int, uid_next: int, *others: int) -> None:
    """Raises BadRecord if no keeper can have written them."""
    if not 0 <= uidvalidity <= limits.UID_MAX or not 0 <= uid_next <= limits.UID_MAX + 1:
        raise BadRecord("a head whose numbers cannot be")
    if not all(0 <= number < _NUMBERS_END for number in others):
        raise BadRecord("a head whose numbers cannot be")


def is_first_release(octets: bytes) -> bool:
    """True if it has the form of the first release."""
    return octets.startswith(_ZSTD_MAGIC)


def decode_whole(records: Sequence[bytes]) -> Whole:
    """The parts of one whole checkpoint, in order. Raises BadRecord."""
    head = _complete(records, Kind.WHOLE)
    bodies = [_guarded(_decode_whole, _body(octets)) for octets in records]
    try:
        view = View.unpack([body.view for body in bodies if body.view])
    except ValueError as error:
        raise BadRecord(str(error)) from error
    if view.uidvalidity != head.uidvalidity or view.uid_next > head.uid_next or view.modseq > head.modseq:
        raise BadRecord("a view of other numbers than its head")
    return Whole(head, view, _expunged(bodies), bodies[0].keywords)


def decode_tail(records: Sequence[bytes]) -> Delta:
    """The parts of one tail, in order. Raises BadRecord."""
    head = _complete(records, Kind.TAIL)
    bodies = [_guarded(_decode_tail, _body(octets)) for octets in records]
    entries = _checked(entry for body in bodies for entry in body.entries)
    try:
        changes = [
            Change(modseq, Op(op), flags, unpack_uids(uids)) for body in bodies for modseq, op, flags, uids in body.changes
        ]
    except ValueError as error:
        raise BadRecord(str(error)) from error
    return Delta(head, entries, changes, _expunged(bodies), bodies[0].keywords)


def decode_queue(octets: bytes) -> tuple[RecordHead, dict[str, tuple[str, Position]], list[tuple[bytes, str]]]:
    """A part of the queue's state. Raises BadRecord."""
    head = decode_head(octets)
    if head.kind is not Kind.QUEUE:
        raise BadRecord("not the queue's state")
    body = _guarded(_decode_queue, _body(octets))
    marks = {node: (incarnation, Position(segment, offset)) for node, incarnation, segment, offset in body.watermarks}
    return head, marks, body.rows


def decode_heads(octets: bytes) -> list[Head]:
    """Far heads. Raises BadRecord."""
    if decode_head(octets).kind is not Kind.HEADS:
        raise BadRecord("not a record of heads")
    body: HeadsBody = _guarded(_decode_heads, _body(octets))
    for head in body.heads:
        _check_numbers(head.uidvalidity, head.uid_next, head.modseq, head.epoch)
    return body.heads


def decode_first(octets: bytes) -> FirstBody:
    """A record of the first release. Raises BadRecord."""
    body: FirstBody = _guarded(_decode_first, _decompress(octets))
    numbers = (body.uidvalidity, body.uid_next, body.modseq, body.since, body.part)
    if not all(0 <= number < _NUMBERS_END for number in numbers) or body.uidvalidity > limits.UID_MAX:
        raise BadRecord("a record whose numbers cannot be")
    return body


def first_entries(bodies: Iterable[FirstBody]) -> list[Entry]:
    """The entries of the first release's records. Raises BadRecord."""
    try:
        return _checked(
            (uid, bytes.fromhex(key), flags, modseq, octets, received_at)
            for body in bodies
            for uid, key, flags, modseq, octets, received_at in body.entries
        )
    except ValueError as error:
        raise BadRecord("a key that is none") from error


def _first_head(body: FirstBody) -> RecordHead:
    kind = Kind.TAIL if body.since else Kind.WHOLE
    tag = f"{body.uidvalidity} {body.since} {body.modseq} {body.at}".encode()
    return RecordHead(
        kind, tag, body.part, body.part + 1 if body.last else 0, body.at, body.account, body.name,
        body.uidvalidity, body.uid_next, body.modseq, body.since or body.modseq,
    )  # fmt: skip


def _guarded(decode: Any, octets: bytes) -> Any:
    try:
        return decode(octets)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRecord(f"a record that does not decode: {error}") from error


def _split(octets: bytes) -> tuple[bytes, bytes]:
    start = len(_MAGIC) + _LENGTH.size
    if not octets.startswith(_MAGIC) or len(octets) < start:
        raise BadRecord("not a record of a keeper")
    (length,) = _LENGTH.unpack_from(octets, len(_MAGIC))
    if length > _HEAD_OCTETS_MAX or start + length > len(octets):
        raise BadRecord("a head that is too long")
    return octets[start : start + length], octets[start + length :]


def _body(octets: bytes) -> bytes:
    return _decompress(_split(octets)[1])


def _decompress(octets: bytes) -> bytes:
    """One frame that says how long it is, bounded before anything of it is read. Raises BadRecord."""
    try:
        if not 0 <= zstandard.get_frame_parameters(octets).content_size <= 4 * limits.RECORD_BODY_OCTETS_MAX:
            raise BadRecord("a record that is too large")
        return zstandard.ZstdDecompressor().decompress(octets, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadRecord(f"a record that does not decompress: {error}") from error


def _complete(records: Sequence[bytes], kind: Kind) -> RecordHead:
    """The head of parts that are all there, in order, and belong together. Raises BadRecord."""
    heads = [decode_head(octets) for octets in records]
    if not heads or heads[0].kind is not kind or len(heads) != heads[0].parts:
        raise BadRecord("parts are missing")
    for number, head in enumerate(heads):
        if msgspec.structs.replace(head, part=0) != msgspec.structs.replace(heads[0], part=0) or head.part != number:
            raise BadRecord("parts that do not belong together")
    return heads[0]


def _checked(entries: Iterable[Entry]) -> list[Entry]:
    found = list(entries)
    for uid, key, flags, modseq, octets, received_at in found:
        if not 0 < uid <= limits.UID_MAX or len(key) != KEY_OCTETS or not received_at == received_at:
            raise BadRecord(f"an entry that cannot be: UID {uid}")
        if not all(0 <= number < _NUMBERS_END for number in (flags, modseq, octets)):
            raise BadRecord(f"an entry whose numbers cannot be: UID {uid}")
    return found


def _keys(octets: bytes) -> Iterator[bytes]:
    if len(octets) % KEY_OCTETS:
        raise BadRecord("keys of another length")
    return (octets[start : start + KEY_OCTETS] for start in range(0, len(octets), KEY_OCTETS))


def _expunged(bodies: Iterable[WholeBody | TailBody]) -> list[Expunged]:
    bodies = list(bodies)
    left = {key for body in bodies for key in _keys(body.left)}
    return [Expunged(key, key in left) for body in bodies for key in _keys(body.gone)]
