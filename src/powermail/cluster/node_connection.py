"""Owns the asking end of one connection to a node: operations in the order they were asked, windows, deadlines, one write for
each turn of the event loop.

An operation that was asked ends in one of three ways: its answer, the error that its answer is, or NodeTrouble, which says
that its outcome is unknown: the connection was lost, or the time is over. What was never sent whole is NeverAsked: a node does
nothing before it has all of an operation. Nothing is ever asked twice here.

A ping waits for no window and behind no body: bodies go out piece by piece while the transport takes them, one large one after
the other, and what is asked while it does not take them waits here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, NamedTuple, Protocol

from powermail.base import limits
from powermail.base.errors import NeverAsked, NodeTrouble
from powermail.cluster import node_values as values
from powermail.storage.contract import Position, Receipt
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_client import Acks, Answer, Failed, GoneAway, Lost, NodeClient, Stat
from powermail.wire.node_frames import NO_BODY, Pieces
from powermail.wire.node_verbs import Verb

NO_META: Final = forms.encode(forms.NOTHING)
_LOOK_EVERY_S: Final = 0.25
_PING_OCTETS: Final = len(NO_META)
_SHORT_OCTETS: Final = 1024  # what asks to read has no more
_new: Final = tuple.__new__  # of a named tuple, without the function in between: one for each message


class Disconnected(NodeTrouble):
    """The node was not connected, or the connection was lost meanwhile: what was asked has an unknown outcome."""


class NotConnected(Disconnected, NeverAsked):
    """The node was not connected, or was no more when it could have been asked: it never heard of it."""


class Owner(Protocol):
    """Who hears what nobody asked for."""

    def pushed(self, stat: forms.StatForm) -> None:
        """Figures of the node."""

    def leaving(self) -> None:
        """The node asks for no more."""

    def lost(self, connection: NodeConnection, why: str) -> None:
        """The connection is no more."""


# Who waits for an answer, until when, to what; a bare tuple, because one is made for each message.
_Asked = tuple[asyncio.Future[Any], float, Verb]


class _Waiting(NamedTuple):
    """An operation for which there is no room yet."""

    asked: _Asked
    gives_up_at: float
    meta: bytes
    pieces: Pieces
    octets: int


class NodeConnection(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, node: str, owner: Owner) -> None:
        self.made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.going = False  # nothing new is to be asked
        self._node = node
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._machine = NodeClient()
        self._window = limits.NODE_WINDOW_OCTETS, limits.NODE_WINDOW_OPERATIONS  # as the node keeps it
        self._waiting: deque[_Waiting] = deque()
        self._full = False  # the transport takes no more
        self._flushing = False
        self._looking = False
        self._looked_at = 0.0
        self._answers = 0  # to other operations than pings
        self._answered = (0, 0.0)  # how many there were, and since when
        self.slowest_s = 0.0  # COMMIT that was answered since somebody set this to 0, about
        self._octets_in = 0
        self._octets_out = 0
        self._seen = (0, 0, False)  # octets in, octets out, were any waiting: as progress was last looked for

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=limits.NODE_UNSENT_OCTETS)  # type: ignore[union-attr]
        if not self.made.done():
            self.made.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._machine.reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        self._octets_in += nbytes
        leaving, lost = False, ""
        for event in self._machine.received(nbytes):
            if isinstance(event, Acks):
                self._acknowledged(event)
            elif isinstance(event, Answer):
                future, _, verb = event.token
                self._answers += verb is not verbs.PING
                if not future.done():
                    future.set_result(event)
            elif isinstance(event, Failed):
                self._answers += 1
                future = event.token[0]
                if not future.done():
                    future.set_exception(values.error_of(event.failure, event.text, event.version, event.body))
            elif isinstance(event, Stat):
                self._owner.pushed(event.stat)
            elif isinstance(event, GoneAway):
                leaving = True  # when all that came with it is heard
            elif isinstance(event, Lost):
                lost = event.why
        if lost:
            self.abort(f"it breaks the protocol: {lost}")
            return
        if leaving and not self.going:
            self.leave()
            self._owner.leaving()
        if self._waiting:
            self._ask_more()
        if self.going and not self._machine.unanswered:
            self.close("it asked for no more")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost: {exc}" if exc is not None else "the connection was closed")

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._ask_more()
        if self._machine.unfinished:
            self._flush_soon()

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        verb: Verb,
        meta: bytes = NO_META,
        pieces: Pieces = NO_BODY,
        octets: int = 0,
        within_s: float = limits.NODE_CALL_TIMEOUT_S,
    ) -> asyncio.Future[Any]:
        """Asks, now or when there is room; the Answer, or for a COMMIT the Receipt. `octets` are the body's.

        The future raises what the node answers, NeverAsked, or NodeTrouble.
        """
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        if self.closed or self.going:
            future.set_exception(NotConnected(f"node {self._node} is not connected"))
            return future
        octets += len(meta)
        now = loop.time()
        asked = (future, now + within_s + limits.NODE_CALL_GRACE_S, verb)
        if octets > limits.NODE_OPERATION_OCTETS_MAX or len(meta) > limits.NODE_META_OCTETS_MAX:
            future.set_exception(NeverAsked(f"node {self._node}: {verb.name} of {octets} octets is too large to ask"))
        elif self._waiting or self._full or len(pieces) > 1 or not self._machine.take(verb.number, meta, pieces[0], asked):
            gives_up_at = now + limits.NODE_ROOM_WAIT_S if verb is verbs.COMMIT else asked[1]
            self._waiting.append(_Waiting(asked, gives_up_at, meta, pieces, octets))
            self._ask_more()
        elif not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        if not self._looking:
            self._look_again(now)
        return future

    def ping(self) -> asyncio.Future[Any]:
        """Asks for the stamp, before all that waits; the Answer, whenever it comes. Raises NotConnected in the future."""
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(_seen)
        if self.closed or self.going:
            future.set_exception(NotConnected(f"node {self._node} is not connected"))
            return future
        asked = (future, float("inf"), verbs.PING)
        if self._may_ping():
            self._machine.ask(verbs.PING, NO_META, NO_BODY, asked)
            self._flush_soon()
        else:
            self._waiting.appendleft(_Waiting(asked, float("inf"), NO_META, NO_BODY, _PING_OCTETS))
        return future

    def _may_ping(self) -> bool:
        """True but while one operation fills the whole window."""
        machine, (octets, operations) = self._machine, self._window
        return machine.unanswered < operations and (not machine.unanswered or machine.open_octets + _PING_OCTETS <= octets)

    def _ask_more(self) -> None:
        """Asks what waits, in order, as far as there is room now; what is short passes by what has many pieces."""
        waiting, machine = self._waiting, self._machine
        passed: list[_Waiting] = []
        short = False  # one that was passed by waits for the window: only what takes next to none of it passes by
        while waiting:
            first = waiting[0]
            large = len(first.pieces) > 1
            future, _, verb = first.asked
            if future.done():  # nobody waits any more: it is never asked
                waiting.popleft()
                continue
            if verb is verbs.PING:
                room = self._may_ping()
            elif large:
                room = not (self._full or short or machine.unfinished) and machine.may_ask(first.octets)
                short = short or not (room or machine.unfinished)
            else:
                room = not (self._full or (short and first.octets > _SHORT_OCTETS)) and machine.may_ask(first.octets)
            if room:
                machine.ask(verb, first.meta, first.pieces, first.asked)
                self._flush_soon()
            elif self._full or not (large or short) or first.octets > machine.window_octets:
                break
            else:
                passed.append(first)
            waiting.popleft()
        waiting.extendleft(reversed(passed))

    def welcomed(self, welcome: forms.Welcome) -> None:
        """The node answered HELLO: its windows are kept to, and a little of them is kept for pings."""
        octets = max(1, min(welcome.octets, limits.NODE_WINDOW_OCTETS))
        operations = max(1, min(welcome.operations, limits.NODE_WINDOW_OPERATIONS))
        self._window = octets, operations
        self._machine.window_octets = max(1, octets - limits.NODE_PINGS_RESERVED * _PING_OCTETS)
        self._machine.window_operations = max(1, operations - limits.NODE_PINGS_RESERVED)

    def _acknowledged(self, acks: Acks) -> None:
        node, incarnation = self._node, acks.incarnation
        self._answers += len(acks.tokens)
        if acks.tokens:  # the first was asked first, nearly always
            took_s = self._loop.time() - acks.tokens[0][1] + _COMMIT_S
            if took_s > self.slowest_s:
                self.slowest_s = took_s
        for (_, segment, offset), asked in zip(acks.receipts, acks.tokens, strict=True):
            future = asked[0]
            if not future.done():
                future.set_result(_new(Receipt, (node, incarnation, _new(Position, (segment, offset)))))

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        machine, transport = self._machine, self.transport
        if transport is None or self.closed:
            return
        octets = machine.to_send(0 if self._full else limits.NODE_UNSENT_OCTETS)
        if octets:
            self._octets_out += len(octets)
            transport.write(octets)
        if self._waiting:
            self._ask_more()
        if machine.unfinished and not self._full:
            self._flush_soon()

    # -- deadlines and progress ------------------------------------------------------------------------------------

    def moved(self) -> bool:
        """True if octets came, or left where some waited to go out, since this was last asked."""
        waiting = 0
        if self.transport is not None and not self.closed:
            waiting = self.transport.get_write_buffer_size()
        octets_in, octets_out, waited = self._seen
        self._seen = (self._octets_in, self._octets_out - waiting, waiting > 0 or self._full)
        return self._seen[0] > octets_in or (waited and self._seen[1] > octets_out)

    def owes_s(self) -> float:
        """For how long the node has owed us what it gives at once while it is well: the oldest of COMMIT and PROBE."""
        for _, (_, deadline, verb) in self._machine.open():
            if verb in _WRITES:
                within_s = _COMMIT_S if verb is verbs.COMMIT else limits.NODE_PROBE_TIMEOUT_S + limits.NODE_CALL_GRACE_S
                return max(0.0, self._loop.time() - float(deadline) + within_s)
        return 0.0

    def _look_again(self, now: float) -> None:
        self._looking = True
        self._looked_at = now
        self._loop.call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        """Ends what took too long; its number stays taken until the node answers."""
        self._looking = False
        if self.closed:
            return
        now = self._loop.time()
        if now - self._looked_at <= 4 * _LOOK_EVERY_S:  # else it was we who stood still: what came meanwhile is read first
            self._end_late(now)
        if not self.closed and (self._machine.unanswered or self._waiting):
            self._look_again(now)

    def _end_late(self, now: float) -> None:
        node, stuck = self._node, False
        if self._answers != self._answered[0]:
            self._answered = (self._answers, now)
        for _, (future, deadline, verb) in self._machine.open():
            if deadline <= now:
                if not future.done():
                    future.set_exception(NodeTrouble(f"node {node}: {verb.name} takes too long"))
                stuck = stuck or max(deadline, self._answered[1]) + limits.NODE_OVERDUE_S <= now
        for waiting in self._waiting:
            future, _, verb = waiting.asked
            if waiting.gives_up_at <= now and not future.done():
                future.set_exception(NeverAsked(f"node {node}: no room to ask {verb.name}"))
        if stuck:
            self.abort("it leaves operations unanswered")

    # -- the end ---------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Nothing new is asked; what is open is still answered, and then the connection closes."""
        self.going = True
        self._never_asked("it asks for no more")
        if not self._machine.unanswered:
            self.close("it asked for no more")

    def close(self, why: str) -> None:
        """Closes when what was written has gone out."""
        if self.transport is not None and not self.transport.is_closing():  # else 3.11.2 cannot abort it any more
            self.transport.close()
        self._end(why)

    def abort(self, why: str) -> None:
        """Closes at once."""
        if self.transport is not None:
            self.transport.abort()
        self._end(why)

    def _never_asked(self, why: str) -> None:
        """What still waits to be asked never is."""
        for waiting in self._waiting:
            if not waiting.asked[0].done():
                waiting.asked[0].set_exception(NotConnected(f"node {self._node}: {why}"))
        self._waiting.clear()

    def _end(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        if not self.made.done():
            self.made.set_exception(Disconnected(why))
            self.made.exception()
        unsent, kinds = self._machine.unsent(), (Disconnected, NotConnected)
        for number, (future, _, _) in self._machine.open():
            if not future.done():  # one each: tracebacks do not grow together
                future.set_exception(kinds[number in unsent](f"node {self._node}: {why}"))
        self._never_asked(why)
        self._owner.lost(self, why)


def _seen(ping: asyncio.Future[Any]) -> None:
    """Whoever waits for it hears of its end; nobody need."""
    if not ping.cancelled():
        ping.exception()


_WRITES: Final = (verbs.COMMIT, verbs.VERBS["PROBE"])
_COMMIT_S: Final = limits.NODE_CALL_TIMEOUT_S + limits.NODE_CALL_GRACE_S  # from when it is asked to its deadline
