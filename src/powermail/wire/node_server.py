"""Owns the serving end of the node protocol as a machine: octets in, events out, answers gathered.

It never waits and reads no clock. Order, roles, forms, sizes, windows and operation numbers are its; what a verb does is the
session's, which is asked by an event and answers each Ask once, in any order:

    event     the session then calls
    Ask       reply, ack or fail, with the operation's number; HELLO: reply, or refuse
    Stop      nothing: what is to be sent is sent, and the connection closes

A PING takes nothing of the windows, and its answer, as all that is short, goes out before the large answers that wait: of
those `to_send` gives only as much as it is asked for.

What is the peer's mistake in one operation is answered with an ERROR and the connection goes on: its frames are whole. What
breaks the framing, the order or the windows ends it with a GOAWAY. `refused` names each refusal, to be counted.

Danger: an operation number is taken once; a frame that comes again ends the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import Enum
from struct import Struct as Packed
from typing import Any, Final

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_frames import MORE, NO_BODY, Frame, FrameReader, Pieces, add_frames, pieces_of
from powermail.wire.node_verbs import BY_NUMBER, META_DECODERS, Failure, Role, Verb, Way

ACK: Final = Packed("<QQQ")  # operation number, segment, offset
_HELLO, _PING = verbs.HELLO.number, verbs.PING.number
_SHORT_OCTETS: Final = 4096  # an answer up to this does not wait behind large ones
_ACKS, _REPLY, _ERROR = verbs.ACKS.number, verbs.REPLY.number, verbs.ERROR.number
_ACKS_AT_ONCE: Final = limits.NODE_PIECE_OCTETS // ACK.size


class State(Enum):
    """Where a connection is."""

    GREETING = "greeting"  # only HELLO is heard
    ASKED = "asked"  # HELLO waits for its answer; nothing else is heard
    OPEN = "open"
    OVER = "over"


_OPEN, _OVER = State.OPEN, State.OVER  # looked at for each frame


class Ask(Struct, frozen=True):
    """An operation is complete."""

    verb: int
    number: int
    meta: Any  # of the verb's form
    body: bytes


class Stop(Struct, frozen=True):
    """The connection ends: for the peer's fault, which `why` names."""

    why: str


class _Part:
    """An operation whose body is still coming."""

    __slots__ = ("bodies", "meta", "octets", "verb")

    def __init__(self, verb: int, meta: Any, octets: int) -> None:
        self.verb = verb
        self.meta = meta  # None: it was refused, and the rest is thrown away
        self.bodies: list[bytes] = []
        self.octets = octets


class NodeServer:
    """One connection, of a peer whose certificate has `roles`."""

    def __init__(self, roles: frozenset[Role]) -> None:
        self.state = State.GREETING
        self.refused: list[str] = []
        self.held_octets = 0  # payload of operations that are not answered
        self.reader = FrameReader()
        self._allowed = frozenset(verb.number for verb in verbs.TABLE if verb.roles & roles)
        self._window_octets = limits.NODE_WINDOW_OCTETS
        self._window_operations = limits.NODE_WINDOW_OPERATIONS
        self._open: dict[int, int] = {}  # operations that are not answered: their payload octets so far
        self._parts: dict[int, _Part] = {}
        self._last = 0
        self._out: list[bytes | memoryview] = []
        self._large: deque[bytes | memoryview] = deque()  # frames of large answers, each a header and what follows it
        self.large_octets = 0  # in them
        self._acks: list[bytes] = []
        self._acks_of = ""  # incarnation

    # -- octets in -------------------------------------------------------------------------------------------------

    def receive(self, octets: bytes) -> Iterator[Ask | Stop]:
        """The events of these octets. All are to be taken, one by one: what HELLO is answered counts for what comes behind."""
        return self._events(self.reader.feed(octets))

    def received(self, count: int) -> Iterator[Ask | Stop]:
        """The events of so many octets that were put into `reader.room()`, to be taken like those of `receive`."""
        return self._events(self.reader.received(count))

    @property
    def unfinished(self) -> tuple[int, int]:
        """The oldest operation whose body is still coming, and the octets of it so far; (0, 0) if there is none."""
        for number, part in self._parts.items():
            return number, part.octets
        return 0, 0

    @property
    def unanswered(self) -> int:
        """Operations that are not answered."""
        return len(self._open)

    def _events(self, frames: list[Frame]) -> Iterator[Ask | Stop]:
        for verb, flags, number, meta, body in frames:
            if number > self._last and not flags and self.state is _OPEN and verb in self._allowed:
                event: Ask | Stop | None = self._whole(verb, number, meta, body)  # what nearly all are
            elif self.state is _OVER:
                return
            else:
                event = self._frame(verb, flags, number, meta, body)
            if event is not None:
                yield event
        why, text = self.reader.fault
        if why and self.state is not State.OVER:
            yield self._stop(why, text)

    def _whole(self, verb: int, number: int, meta: bytes, body: bytes) -> Ask | Stop | None:
        """An operation in one frame that may be asked."""
        self._last = number
        if verb == _PING:
            self._open[number] = 0
        elif verb == _HELLO:
            return self._stop("order", "HELLO comes once")
        else:
            asked = self._open
            asked[number] = octets = len(meta) + len(body)
            self.held_octets = held_octets = self.held_octets + octets
            if held_octets > self._window_octets or len(asked) > self._window_operations:
                if stop := self._beyond():
                    return stop
        try:
            return Ask(verb, number, META_DECODERS[verb](meta or _EMPTY), body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fail(number, "malformed", Failure.MALFORMED, str(error))
            return None

    def _beyond(self) -> Stop | None:
        """More than the window holds. One operation alone may be larger."""
        if len(self._open) > self._window_operations:
            return self._stop("credits", f"more than {self._window_operations} operations are open")
        if len(self._open) > 1:
            return self._stop("credits", f"more than {self._window_octets} octets are open")
        if self.held_octets > limits.NODE_OPERATION_OCTETS_MAX:
            return self._stop("oversized", f"an operation of more than {limits.NODE_OPERATION_OCTETS_MAX} octets")
        return None

    def _frame(self, verb: int, flags: int, number: int, meta: bytes, body: bytes) -> Ask | Stop | None:
        """Any frame: the first or a further piece, or one that is refused."""
        part = self._parts.get(number)
        if part is not None:
            return self._further(part, verb, flags, number, meta, body)
        if number <= self._last:
            return self._stop("replayed", f"operation {number} was there before")
        self._last = number
        known = BY_NUMBER.get(verb)
        if self.state is not State.OPEN and (known is not verbs.HELLO or self.state is State.ASKED):
            return self._stop("order", "HELLO comes first, and its answer before anything else")
        if known is verbs.HELLO and self.state is State.OPEN:
            return self._stop("order", "HELLO comes once")
        self._open[number] = len(meta) + len(body)
        self.held_octets += len(meta) + len(body)
        if len(self._open) > self._window_operations or self.held_octets > self._window_octets:
            if stop := self._beyond():
                return stop
        form = self._accepted(known, verb, flags, number, meta)
        if flags & MORE:
            if not body:
                return self._stop("malformed", "a piece without octets")
            if len(self._parts) >= self._window_operations:
                return self._stop("credits", f"more than {self._window_operations} operations have begun")
            part = self._parts[number] = _Part(verb, form, len(meta) + len(body))
            if form is not None:  # of what is refused nothing is kept
                part.bodies.append(body)
            return None
        if form is None:
            return None
        if known is verbs.HELLO:
            self.state = State.ASKED
        return Ask(verb, number, form, body)

    def _accepted(self, known: Verb | None, verb: int, flags: int, number: int, meta: bytes) -> Any:
        """The meta of an operation that may be asked; None when it is refused."""
        if known is None or known.way is not Way.ASK or flags & ~MORE:
            text = f"verb {verb} with flags {flags} is not known here"
            return self._fail(number, "unsupported", Failure.UNSUPPORTED, text)
        if verb not in self._allowed:
            return self._fail(number, "role", Failure.ROLE, f"this certificate may not ask {known.name}")
        try:
            return META_DECODERS[verb](meta or _EMPTY)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._fail(number, "malformed", Failure.MALFORMED, str(error))

    def _further(self, part: _Part, verb: int, flags: int, number: int, meta: bytes, body: bytes) -> Ask | Stop | None:
        if verb != part.verb or meta or flags & ~MORE or not body:
            return self._stop("malformed", f"a piece of operation {number} that does not belong to it")
        part.octets += len(body)
        if part.meta is not None:
            part.bodies.append(body)
            self._open[number] += len(body)
            self.held_octets += len(body)
            if self.held_octets > self._window_octets and (stop := self._beyond()):
                return stop
        elif part.octets > limits.NODE_OPERATION_OCTETS_MAX:
            return self._stop("oversized", f"an operation of more than {limits.NODE_OPERATION_OCTETS_MAX} octets")
        if flags & MORE:
            return None
        del self._parts[number]
        if part.meta is None:
            return None
        if verb == _HELLO:
            self.state = State.ASKED
        return Ask(verb, number, part.meta, b"".join(part.bodies))

    # -- what the session says -------------------------------------------------------------------------------------

    def welcome(self, number: int, welcome: forms.Welcome) -> None:
        """The answer to HELLO: from now on all is heard."""
        assert self.state is State.ASKED
        self._window_octets, self._window_operations = welcome.octets, welcome.operations
        self.state = State.OPEN
        self.reply(number, welcome)

    def refuse(self, number: int, text: str, version: int = 0, layout: bytes = b"") -> None:
        """HELLO is refused; the connection ends. With a layout: because the peer goes by an older one."""
        self._answered(number)
        failure = Failure.FENCED if version else Failure.REFUSED
        self._say(_ERROR, number, _error(failure, text, version), pieces_of(layout) if layout else NO_BODY)
        self.state = State.OVER

    def ack(self, number: int, incarnation: str, segment: int, offset: int) -> None:
        """A receipt. They are gathered, and go out in one frame."""
        if self.state is _OVER:
            return
        self.held_octets -= self._open.pop(number)
        if incarnation != self._acks_of or len(self._acks) >= _ACKS_AT_ONCE:
            self._flush_acks()
            self._acks_of = incarnation
        self._acks.append(ACK.pack(number, segment, offset))

    def reply(self, number: int, meta: Any = forms.NOTHING, body: bytes = b"") -> None:
        """The answer to an operation, in pieces if it is large."""
        if self.state is State.OVER:
            return
        self._answered(number)
        if len(body) > _SHORT_OCTETS:
            self._say_large(_REPLY, number, meta, body)
        else:
            self._say(_REPLY, number, meta, pieces_of(body) if body else NO_BODY)

    def fail(self, number: int, failure: Failure, text: str) -> None:
        """The operation came to nothing, or nobody knows what it came to."""
        if self.state is State.OVER:
            return
        self._answered(number)
        self._say(_ERROR, number, _error(failure, text))

    def push(self, stat: forms.StatForm) -> None:
        """Figures, unasked."""
        if self.state is State.OPEN:
            self._say(verbs.STAT.number, 0, stat)

    def go_away(self, text: str) -> None:
        """Nothing new is to be asked; what is open is still answered."""
        if self.state is not State.OVER:
            self._say(verbs.GOAWAY.number, 0, _error(Failure.TROUBLE, text))

    def stop(self, why: str, text: str) -> None:
        """Ends the connection for a fault that only the session can see."""
        if self.state is not State.OVER:
            self._stop(why, text)

    def to_send(self, octets: int = limits.NODE_UNSENT_OCTETS) -> bytes:
        """The answers that were gathered, as one run of octets: of large ones about so many `octets`, all when it is over."""
        if self._acks:
            self._flush_acks()
        out, large = self._out, self._large
        over = self.state is State.OVER
        while large and (octets > 0 or over):
            header, body = large.popleft(), large.popleft()
            out += (header, body)
            sent = len(header) + len(body)
            octets -= sent
            self.large_octets -= sent
        if not out:
            return b""
        run = b"".join(out)
        out.clear()
        return run

    def _flush_acks(self) -> None:
        if self._acks:
            self._say(_ACKS, 0, forms.Acks(self._acks_of), pieces_of(b"".join(self._acks)))
            self._acks.clear()

    def _say(self, verb: int, number: int, meta: Any, pieces: Pieces = NO_BODY) -> None:
        add_frames(self._out, verb, number, forms.encode(meta), pieces)

    def _say_large(self, verb: int, number: int, meta: Any, body: bytes) -> None:
        frames: list[bytes | memoryview] = []
        add_frames(frames, verb, number, forms.encode(meta), pieces_of(body))
        header, first = b"".join(frames[:2]), frames[2]
        self._large += (header, first, *frames[3:])
        self.large_octets += sum(map(len, frames))

    def _answered(self, number: int) -> None:
        self.held_octets -= self._open.pop(number)

    def _fail(self, number: int, why: str, failure: Failure, text: str) -> None:
        """The peer's mistake in one operation."""
        self.refused.append(why)
        self.fail(number, failure, text)

    def _stop(self, why: str, text: str) -> Stop:
        self.refused.append(why)
        self._flush_acks()  # nothing is said behind the end
        failure = Failure.UNSUPPORTED if why == "unsupported" else Failure.MALFORMED
        self._large.clear()  # who broke the protocol is not sent all that waits for it
        self.large_octets = 0
        self._say(verbs.GOAWAY.number, 0, _error(failure, text))
        self.state = State.OVER
        self._parts.clear()
        return Stop(why)


def _error(failure: Failure, text: str, version: int = 0) -> tuple[int | str, ...]:
    """The fields of a `forms.Error`, the last only where it says something."""
    text = text[: limits.NODE_TEXT_CHARS_MAX]
    return (failure, text, version) if version else (failure, text)


_EMPTY: Final = forms.encode(forms.NOTHING)
