"""Owns the asking end of the node protocol as a machine: operations out, octets in, events out.

It never waits and reads no clock. It gives numbers, keeps the windows, and believes a node nothing that it did not ask for:

    event      means
    Answer     the REPLY to an operation, whole
    Acks       receipts of COMMITs
    Failed     the ERROR of an operation
    Stat       figures, pushed
    GoneAway   nothing new is to be asked here
    Lost       the connection ends; what is open has an unknown outcome

A node that breaks the protocol is as lost as one whose cable was pulled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_frames import (
    HEADER,
    MODULUS,
    MORE,
    NO_BODY,
    Frame,
    FrameReader,
    Piece,
    Pieces,
    add_frames,
    checksum_of,
)
from powermail.wire.node_server import ACK
from powermail.wire.node_verbs import META_DECODERS, REPLY_DECODERS, Failure, Verb

_COMMIT: Final = verbs.COMMIT.number
_ACKS, _REPLY, _ERROR = verbs.ACKS.number, verbs.REPLY.number, verbs.ERROR.number
_STAT, _GOAWAY = verbs.STAT.number, verbs.GOAWAY.number
_EMPTY: Final = forms.encode(forms.NOTHING)
_NOT_ASKED: Final = (0, 0, None)
_pack: Final = HEADER.pack


class Answer(Struct, frozen=True):
    """The REPLY to an operation; `meta` of the form that its verb names. `token` is what was given with the operation."""

    number: int
    meta: Any
    body: bytes
    token: Any = None


class Acks(Struct, frozen=True):
    """Receipts: (operation number, segment, offset) of each, and the tokens of the operations."""

    incarnation: str
    receipts: list[tuple[int, int, int]]
    tokens: list[Any]


class Failed(Struct, frozen=True):
    """An operation came to nothing, or to nothing that is known. With FENCED `body` is the layout of that version."""

    number: int
    failure: Failure
    text: str
    token: Any = None
    version: int = 0
    body: bytes = b""


class Stat(Struct, frozen=True):
    """A node's figures."""

    stat: forms.StatForm


class GoneAway(Struct, frozen=True):
    """The node asks for no more on this connection."""

    text: str


class Lost(Struct, frozen=True):
    """The node broke the protocol."""

    why: str


Event = Answer | Acks | Failed | Stat | GoneAway | Lost


class NodeClient:
    """One connection to a node."""

    def __init__(self) -> None:
        self.reader = FrameReader()
        self.over = False
        self.window_octets = limits.NODE_WINDOW_OCTETS
        self.window_operations = limits.NODE_WINDOW_OPERATIONS
        self.open_octets = 0
        self._asked: dict[int, tuple[int, int, Any]] = {}  # operation: its verb, its payload octets, its token
        self._parts: dict[int, tuple[int, bytes, list[bytes], int]] = {}  # answers that still come: verb, meta, bodies, octets
        self._number = 0
        self._sent = 0  # the highest number of which a frame went out
        self._out: list[bytes | memoryview] = []  # whole operations, and first pieces: in the order of their numbers
        self._rest: deque[tuple[int, bytes | memoryview, bytes | memoryview]] = deque()  # pieces behind the first

    # -- asking ----------------------------------------------------------------------------------------------------

    def may_ask(self, octets: int) -> bool:
        """True if the window has room. An operation that is larger than the window goes when it is alone."""
        asked = len(self._asked)
        if asked >= self.window_operations:
            return False
        return not asked or self.open_octets + octets <= self.window_octets

    def ask(self, verb: Verb, meta: bytes = _EMPTY, pieces: Pieces = NO_BODY, token: Any = None) -> int:
        """Puts an operation in the row; its number. Raises ValueError when it is larger than any may be."""
        number = self._number + 1
        if len(pieces) == 1:
            octets = add_frames(self._out, verb.number, number, meta, pieces)
        else:
            frames: list[bytes | memoryview] = []
            octets = add_frames(frames, verb.number, number, meta, pieces)
            self._out += frames[:3]
            self._rest.extend([(number, frames[at], frames[at + 1]) for at in range(3, len(frames), 2)])
        self._number = number
        self._asked[number] = (verb.number, octets, token)
        self.open_octets += octets
        return number

    def take(self, verb: int, meta: bytes, piece: Piece, token: Any) -> bool:
        """Puts an operation of one frame in the row if the window has room for it; False if not. It is `ask` for what nearly
        all are: the meta is no longer than a meta may be.
        """
        body, total = piece
        meta_octets = len(meta)
        octets = meta_octets + len(body)
        asked, open_octets = self._asked, self.open_octets + octets
        if len(asked) >= self.window_operations or (open_octets > self.window_octets and asked):
            return False
        self._number = number = self._number + 1
        self._out += (_pack(octets, verb, 0, meta_octets, number, (checksum_of(meta) + total) & MODULUS), meta, body)
        asked[number] = (verb, octets, token)
        self.open_octets = open_octets
        return True

    def to_send(self, octets: int | None = None) -> bytes:
        """All operations that were gathered, as one run of octets; of pieces behind the first about so many `octets`."""
        out, rest = self._out, self._rest
        while rest and (octets is None or octets > 0):
            _, header, body = rest.popleft()
            out += (header, body)
            if octets is not None:
                octets -= len(body)
        if not out:
            return b""
        run = b"".join(out)
        out.clear()
        self._sent = self._number
        return run

    @property
    def unfinished(self) -> bool:
        """True while pieces of an operation that has begun are still to be sent."""
        return bool(self._rest)

    def open(self) -> Iterator[tuple[int, Any]]:
        """Operations without an answer, the oldest first: number and token."""
        for number, asked in self._asked.items():
            yield number, asked[2]

    def unsent(self) -> dict[int, None]:
        """Those of which not every octet was given to be sent: a node that never hears the rest does nothing of them."""
        rest = dict.fromkeys([number for number, _, _ in self._rest])
        return {number: None for number in self._asked if number > self._sent or number in rest}

    # -- octets in -------------------------------------------------------------------------------------------------

    def receive(self, octets: bytes) -> list[Event]:
        """The events of these octets."""
        return self._events(self.reader.feed(octets))

    def received(self, count: int) -> list[Event]:
        """The events of so many octets that were put into `reader.room()`."""
        return self._events(self.reader.received(count))

    @property
    def unanswered(self) -> int:
        """Operations without an answer."""
        return len(self._asked)

    def _events(self, frames: list[Frame]) -> list[Event]:
        events: list[Event] = []
        for verb, flags, number, meta, body in frames:
            if self.over:
                return events
            try:
                event = self._frame(verb, flags, number, meta, body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                event = self._lost(f"a {verb} that cannot be read: {error}")
            if event is not None:
                events.append(event)
        if self.reader.fault[0] and not self.over:
            events.append(self._lost(self.reader.fault[1]))
        return events

    def _frame(self, verb: int, flags: int, number: int, meta: bytes, body: bytes) -> Event | None:
        if verb == _ACKS:
            return self._acks(meta, body)
        if verb == _REPLY:
            return self._reply(flags, number, meta, body)
        if verb == _ERROR:
            return self._error(flags, number, meta, body)
        if verb == _STAT:
            return Stat(META_DECODERS[_STAT](meta))
        if verb == _GOAWAY:
            return GoneAway(META_DECODERS[_GOAWAY](meta).text)
        return self._lost(f"verb {verb}, which no node says")

    def _acks(self, meta: bytes, body: bytes) -> Event:
        incarnation = META_DECODERS[_ACKS](meta).incarnation
        if len(body) % ACK.size:
            return self._lost("receipts that are cut short")
        receipts = list(ACK.iter_unpack(body))
        asked, octets, tokens = self._asked, 0, list[Any]()
        for number, _, _ in receipts:
            verb, size, token = entry = asked.pop(number, _NOT_ASKED)
            if verb != _COMMIT:
                if verb:
                    asked[number] = entry
                for (believed, _, _), waits in zip(receipts, tokens, strict=False):  # none of them is
                    asked[believed] = (_COMMIT, 0, waits)
                return self._lost(f"a receipt of operation {number}, which is no open COMMIT")
            octets += size
            tokens.append(token)
        self.open_octets -= octets
        return Acks(incarnation, receipts, tokens)

    def _reply(self, flags: int, number: int, meta: bytes, body: bytes) -> Event | None:
        asked = self._asked.get(number)
        if asked is None or asked[0] == _COMMIT or flags & ~MORE:
            return self._lost(f"a reply of operation {number}, which it does not answer")
        if flags or number in self._parts:
            joined = self._joined(_REPLY, flags, number, meta, body)
            if not isinstance(joined, tuple):
                return joined
            meta, body = joined
        form = REPLY_DECODERS[asked[0]](meta or _EMPTY)
        self._answered(number)
        return Answer(number, form, body, asked[2])

    def _error(self, flags: int, number: int, meta: bytes, body: bytes) -> Event | None:
        asked = self._asked.get(number)
        if asked is None or flags & ~MORE:
            return self._lost(f"an error of operation {number}, which was not asked")
        joined = self._joined(_ERROR, flags, number, meta, body)
        if not isinstance(joined, tuple):
            return joined
        error = META_DECODERS[_ERROR](joined[0])
        self._answered(number)
        return Failed(number, _failure(error.failure, asked[0]), error.text, asked[2], error.version, joined[1])

    def _joined(self, verb: int, flags: int, number: int, meta: bytes, body: bytes) -> tuple[bytes, bytes] | Lost | None:
        """Meta and body of an answer, when its last piece is here."""
        part = self._parts.get(number)
        if part is None or part[0] != verb:
            if not flags:
                return meta, body
            part = (verb, meta, [], 0)
        elif meta or not body:
            return self._lost(f"a piece that does not belong to operation {number}")
        octets = part[3] + len(body)
        if octets > limits.NODE_ANSWER_OCTETS_MAX or not body:
            return self._lost(f"an answer of {octets} octets and more")
        part[2].append(body)
        if flags:
            self._parts[number] = (verb, part[1], part[2], octets)
            return None
        return part[1], b"".join(part[2])

    def _answered(self, number: int) -> None:
        self.open_octets -= self._asked.pop(number)[1]
        self._parts.pop(number, None)

    def _lost(self, why: str) -> Lost:
        self.over = True
        self._parts.clear()
        return Lost(why)


def _failure(value: int, verb: int) -> Failure:
    """What a class means here. A definite refusal is one only of a COMMIT (law 5); what is not known is trouble."""
    try:
        failure = Failure(value)
    except ValueError:
        return Failure.TROUBLE
    return Failure.TROUBLE if failure is Failure.COMMIT_REFUSED and verb != _COMMIT else failure
