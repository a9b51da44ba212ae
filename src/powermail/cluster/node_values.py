"""Owns the way between values of the storage contract and their forms on the wire; both ends of the node protocol go it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final

from powermail.base import errors
from powermail.storage.contract import (
    COMPRESSED,
    Chunk,
    Held,
    Item,
    Mark,
    NodeFacts,
    NodeStat,
    Origin,
    Position,
    Scan,
    Scanned,
    Stamp,
    Unread,
    Whole,
)
from powermail.wire import node_forms as forms
from powermail.wire.node_verbs import Failure

KEY_OCTETS: Final = 16
_new: Final = tuple.__new__  # of a named tuple, without the function in between: one for each message
_COPY: Final = Struct("<16sQQ")  # a key and a position
COPY_OCTETS: Final = _COPY.size
HELD: Final = (Held.LIVE, Held.DEAD, Held.ABSENT, Held.UNKNOWN)
_HELD_NUMBER: Final = {held: number for number, held in enumerate(HELD)}
_DELIVERY_OR_REPAIR: Final = (Origin.DELIVERY, Origin.REPAIR)

# The class that an error has on the wire; of several that fit, the first.
_CLASSES: Final[tuple[tuple[type[errors.PowerMailError], Failure], ...]] = (
    (errors.CommitRefused, Failure.COMMIT_REFUSED),
    (errors.NodeReadOnly, Failure.READ_ONLY),
    (errors.MarkRefused, Failure.MARK_REFUSED),
    (errors.OlderCheckpoint, Failure.OLDER_CHECKPOINT),
    (errors.CopyMissing, Failure.COPY_MISSING),
    (errors.CopyDamaged, Failure.COPY_DAMAGED),
    (errors.OperatorError, Failure.OPERATOR),
    (errors.LayoutOutdated, Failure.FENCED),
    (errors.Trouble, Failure.TROUBLE),
)
_ERRORS: Final[dict[Failure, type[errors.PowerMailError]]] = {
    failure: error for error, failure in _CLASSES if failure is not Failure.TROUBLE
}


class Malformed(Exception):
    """What a peer sent has the form of its verb and makes no sense: sizes that lie, a key cut short."""


class Unsupported(Exception):
    """What a peer sent may make sense to a newer version: never taken for what is known (R14)."""


def failure_of(error: BaseException) -> Failure | None:
    """The class of an error; None for one that is a bug of ours."""
    for known, failure in _CLASSES:
        if isinstance(error, known):
            return failure
    return None


def error_of(failure: Failure, text: str, version: int = 0, layout: bytes = b"") -> errors.PowerMailError:
    """The error that a class stands for at the asking end; whatever is not known leaves the outcome unknown."""
    error = _ERRORS.get(failure, errors.NodeTrouble)(text)
    if isinstance(error, errors.LayoutOutdated):
        error.version, error.layout = version, layout
    return error


# -- keys, copies --------------------------------------------------------------------------------------------------


def join_keys(keys: Iterable[bytes]) -> bytes:
    """Keys as a body."""
    return b"".join(keys)


def split_keys(body: bytes) -> list[bytes]:
    """A body of keys. Raises Malformed."""
    if len(body) % KEY_OCTETS:
        raise Malformed("a key that is cut short")
    return [body[start : start + KEY_OCTETS] for start in range(0, len(body), KEY_OCTETS)]


def join_copies(copies: Sequence[tuple[bytes, Position]]) -> bytes:
    """Copies, named by key and position, as a body."""
    return b"".join([_COPY.pack(key, *position) for key, position in copies])


def split_copies(body: bytes) -> list[tuple[bytes, Position]]:
    """A body of copies. Raises Malformed."""
    if len(body) % _COPY.size:
        raise Malformed("a copy that is cut short")
    return [(key, Position(segment, offset)) for key, segment, offset in _COPY.iter_unpack(body)]


def join_held(held: Sequence[Held]) -> bytes:
    """What is said of each key, an octet each."""
    return bytes([_HELD_NUMBER[each] for each in held])


def split_held(body: bytes, count: int) -> list[Held]:
    """The same, read. Raises Malformed."""
    if len(body) != count or (body and max(body) >= len(HELD)):
        raise Malformed("an answer for other keys than were asked for")
    return [HELD[number] for number in body]


def held_form(held: Held) -> forms.HeldForm:
    """What is said of one key."""
    return forms.HeldForm(_HELD_NUMBER[held])


# -- chunks --------------------------------------------------------------------------------------------------------


def chunk_form(chunk: Chunk) -> forms.ChunkForm:
    """A chunk without its octets."""
    return forms.ChunkForm(chunk.number, chunk.flags, len(chunk.stored), chunk.octets)


def chunks_of(found: Sequence[forms.ChunkForm], body: bytes, start: int) -> list[Chunk]:
    """Chunks whose octets lie in a body from `start` to its end. Raises Malformed, Unsupported."""
    if len(found) == 1:  # what nearly all are
        form = found[0]
        flags, octets = form.flags, form.octets
        if start + form.stored == len(body) and (flags == COMPRESSED or (not flags and octets == form.stored)):
            return [_new(Chunk, (form.number, flags, body[start:], octets))]
    chunks = []
    for form in found:
        number, flags, stored, octets = form.number, form.flags, form.stored, form.octets
        if flags & ~COMPRESSED:
            raise Unsupported(f"chunk flags {flags}")
        if flags == 0 and octets != stored:
            raise Malformed(f"a chunk of {octets} octets that are {stored}")
        end = start + stored
        chunks.append(_new(Chunk, (number, flags, body[start:end], octets)))
        start = end
    if start != len(body):
        raise Malformed(f"a body of {len(body)} octets that should have {start}")
    return chunks


def whole_form(whole: Whole | None) -> forms.WholeForm | None:
    """A small message."""
    return None if whole is None else forms.WholeForm(whole.commit, whole.parts)


def whole_of(form: forms.WholeForm | None) -> Whole | None:
    """The same, read."""
    return None if form is None else Whole(form.commit, form.parts)


def origin_of(number: int) -> Origin:
    """Who writes a commit record over the wire: compaction never does. Raises Unsupported."""
    if number >= len(_DELIVERY_OR_REPAIR):
        raise Unsupported(f"origin {number}")
    return _DELIVERY_OR_REPAIR[number]


# -- stamps, marks, figures ----------------------------------------------------------------------------------------


def stamp_form(stamp: Stamp | None) -> forms.StampForm:
    """A stamp, or none."""
    return forms.StampForm() if stamp is None else forms.StampForm(stamp.boot, stamp.at)


def stamp_of(form: forms.StampForm) -> Stamp | None:
    """The same, read."""
    return Stamp(form.boot, form.at) if form.boot else None


def mark_form(mark: Mark) -> forms.MarkForm:
    """A mark of the index."""
    return forms.MarkForm(mark.sequence, mark.slots, mark.epoch, mark.uidvalidity, mark.retired)


def mark_of(form: forms.MarkForm) -> Mark:
    """The same, read."""
    return Mark(form.sequence, form.slots, form.epoch, form.uidvalidity, form.retired)


def join_mark(mark: Mark, rest: bytes = b"") -> tuple[int, bytes]:
    """A body with a mark in front: how many octets the mark has, and all of it."""
    octets = forms.encode(mark_form(mark))
    return len(octets), octets + rest


def split_mark(octets: int, body: bytes) -> tuple[forms.MarkForm, bytes]:
    """The mark in front of a body, and the rest. Raises Malformed, msgspec.DecodeError."""
    if octets > len(body):
        raise Malformed(f"a mark of {octets} octets in a body of {len(body)}")
    return (forms.decode_mark(body[:octets]) if octets else forms.MarkForm()), body[octets:]


def stat_form(stat: NodeStat, incarnation: str) -> forms.StatForm:
    """A node's figures, with its incarnation."""
    return forms.StatForm(
        stat.state, stat.reason[:1024], incarnation, stat.free_octets, stat.total_octets, stat.log_octets, stat.live_octets,
        stat.segments, stat.messages, stat.damaged, stat.waiting_octets, stat.probe_s, stat.write_s,
    )  # fmt: skip


def stat_of(form: forms.StatForm) -> NodeStat:
    """The same, read."""
    return NodeStat(
        form.state, form.reason, form.free_octets, form.total_octets, form.log_octets, form.live_octets, form.segments,
        form.messages, form.damaged, form.waiting_octets, form.probe_s, form.write_s,
    )  # fmt: skip


def facts_form(facts: NodeFacts) -> forms.FactsForm:
    """What a node knows of itself."""
    began = tuple([forms.PositionForm(*place) for place in facts.began])
    end, birth = forms.PositionForm(*facts.end), forms.PositionForm(*facts.birth)
    return forms.FactsForm(facts.incarnation, end, facts.boots, began, birth, facts.damaged, mark_form(facts.mark))


def facts_of(form: forms.FactsForm) -> NodeFacts:
    """The same, read."""
    began = tuple([position_of(place) for place in form.began])
    end, birth = position_of(form.end), position_of(form.birth)
    return NodeFacts(form.incarnation, end, form.boots, began, birth, form.damaged, mark_of(form.mark))


def position_of(form: forms.PositionForm | forms.EndForm) -> Position:
    """A place in the log."""
    return Position(form.segment, form.offset)


# -- scans ---------------------------------------------------------------------------------------------------------


def scan_forms(scan: Scan) -> tuple[forms.ScanHead, bytes]:
    """A part of a log: the meta and the body of the answer."""
    items = [
        forms.ScannedForm(item.key, item.position.segment, item.position.offset, -1 if item.origin is None else item.origin)
        for item in scan.items
    ]
    unread = [forms.UnreadForm(one.position.segment, one.position.offset, one.octets) for one in scan.unread]
    head = forms.ScanHead(scan.incarnation, forms.PositionForm(*scan.following), forms.PositionForm(*scan.end))
    return head, forms.encode(forms.ScanBody(items, unread))


def scan_of(head: forms.ScanHead, body: bytes) -> Scan:
    """The same, read. Raises msgspec.DecodeError, ValueError."""
    found = forms.decode_scan(body)
    items = [
        Scanned(item.key, Position(item.segment, item.offset), None if item.origin < 0 else Origin(item.origin))
        for item in found.items
    ]
    unread = [Unread(Position(one.segment, one.offset), one.octets) for one in found.unread]
    return Scan(head.incarnation, items, position_of(head.following), position_of(head.end), unread)


def items_form(items: Sequence[Item]) -> bytes:
    """An inventory as a body."""
    return forms.encode([forms.ItemForm(item.key, _HELD_NUMBER[item.held], *item.position, int(item.origin)) for item in items])


def items_of(body: bytes) -> list[Item]:
    """The same, read. Raises msgspec.DecodeError, ValueError."""
    return [
        Item(item.key, HELD[item.held], Position(item.segment, item.offset), Origin(item.origin))
        for item in forms.decode_items(body)
    ]
