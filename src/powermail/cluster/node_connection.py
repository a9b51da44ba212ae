"""Owns the asking end of one connection to a node: operations in the order they were asked, windows, deadlines, one write for
each turn of the event loop.

An operation that was asked ends in one of three ways: its answer, the error that its answer is, or NodeTrouble, which says
that its outcome is unknown: the connection was lost, or the time is over. Nothing is ever asked twice here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, NamedTuple, Protocol

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.cluster import node_values as values
from powermail.storage.contract import Position, Receipt
from powermail.wire import node_forms as forms
from powermail.wire.node_client import Acks, Answer, Failed, GoneAway, Lost, NodeClient, Stat
from powermail.wire.node_frames import NO_BODY, Pieces
from powermail.wire.node_verbs import Verb

NO_META: Final = forms.encode(forms.NOTHING)
_LOOK_EVERY_S: Final = 0.25
_new: Final = tuple.__new__  # of a named tuple, without the function in between: one for each message


class Disconnected(NodeTrouble):
    """The node was not connected, or the connection was lost meanwhile: what was asked has an unknown outcome."""


class Owner(Protocol):
    """Who hears what nobody asked for."""

    def pushed(self, stat: forms.StatForm) -> None:
        """Figures of the node."""

    def leaving(self, connection: NodeConnection) -> None:
        """The node asks for no more on this connection."""

    def lost(self, connection: NodeConnection, why: str) -> None:
        """The connection is no more."""


class _Waiting(NamedTuple):
    """An operation for which the window has no room yet."""

    future: asyncio.Future[Any]
    deadline: float
    verb: Verb
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
        self._pending: dict[int, tuple[asyncio.Future[Any], float, Verb]] = {}
        self._waiting: deque[_Waiting] = deque()
        self._flushing = False
        self._looking = False

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if not self.made.done():
            self.made.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._machine.reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        for event in self._machine.received(nbytes):
            if isinstance(event, Acks):
                self._acknowledged(event)
            elif isinstance(event, Answer):
                future = self._take(event.number)
                if not future.done():
                    future.set_result(event)
            elif isinstance(event, Failed):
                future = self._take(event.number)
                if not future.done():
                    future.set_exception(values.error_of(event.failure, event.text))
            elif isinstance(event, Stat):
                self._owner.pushed(event.stat)
            elif isinstance(event, GoneAway):
                self.going = True
                self._owner.leaving(self)
            elif isinstance(event, Lost):
                self.abort(f"it breaks the protocol: {event.why}")
                return
        if self._waiting:
            self._ask_more()
        if self.going and not self._pending:
            self.close("it asked for no more")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost: {exc}" if exc is not None else "the connection was closed")

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        verb: Verb,
        meta: bytes = NO_META,
        pieces: Pieces = NO_BODY,
        octets: int = 0,
        within_s: float = limits.NODE_CALL_TIMEOUT_S,
    ) -> asyncio.Future[Any]:
        """Asks, now or when the window has room; the Answer, or for a COMMIT the Receipt. `octets` are the body's.

        The future raises what the node answers, or NodeTrouble.
        """
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        if self.closed or self.going:
            future.set_exception(Disconnected(f"node {self._node} is not connected"))
            return future
        octets += len(meta)
        deadline = loop.time() + within_s + limits.NODE_CALL_GRACE_S
        machine = self._machine
        if octets > limits.NODE_OPERATION_OCTETS_MAX or len(meta) > limits.NODE_META_OCTETS_MAX:
            future.set_exception(NodeTrouble(f"node {self._node}: {verb.name} of {octets} octets is too large to ask"))
        elif self._waiting or not machine.may_ask(octets):
            self._waiting.append(_Waiting(future, deadline, verb, meta, pieces, octets))
        else:
            self._pending[machine.ask(verb, meta, pieces)] = (future, deadline, verb)
            if not self._flushing:
                self._flushing = True
                loop.call_soon(self._flush)
        if not self._looking:
            self._looking = True
            loop.call_later(_LOOK_EVERY_S, self._look)
        return future

    def _ask_more(self) -> None:
        waiting, machine = self._waiting, self._machine
        while waiting and not self.closed:
            first = waiting[0]
            if first.future.done():  # nobody waits any more: it is never asked
                waiting.popleft()
            elif machine.may_ask(first.octets):
                waiting.popleft()
                self._pending[machine.ask(first.verb, first.meta, first.pieces)] = (first.future, first.deadline, first.verb)
                self._flush_soon()
            else:
                return

    def welcomed(self, welcome: forms.Welcome) -> None:
        """The node answered HELLO: its windows are kept to."""
        self._machine.window_octets = max(1, min(welcome.octets, limits.NODE_WINDOW_OCTETS))
        self._machine.window_operations = max(1, min(welcome.operations, limits.NODE_WINDOW_OPERATIONS))

    @property
    def open_operations(self) -> int:
        """Operations without an answer."""
        return self._machine.unanswered

    def _acknowledged(self, acks: Acks) -> None:
        node, incarnation, pending = self._node, acks.incarnation, self._pending
        for number, segment, offset in acks.receipts:
            future = pending.pop(number)[0]
            if not future.done():
                future.set_result(_new(Receipt, (node, incarnation, _new(Position, (segment, offset)))))

    def _take(self, number: int) -> asyncio.Future[Any]:
        return self._pending.pop(number)[0]

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self.transport is not None and not self.closed:
            octets = self._machine.to_send()
            if octets:
                self.transport.write(octets)

    def _look(self) -> None:
        """Ends what took too long; its number stays taken until the node answers."""
        now = self._loop.time()
        for future, deadline, verb in [*self._pending.values(), *[(each[0], each[1], each[2]) for each in self._waiting]]:
            if deadline <= now and not future.done():
                future.set_exception(NodeTrouble(f"node {self._node}: {verb.name} takes too long"))
        self._looking = bool(self._pending or self._waiting) and not self.closed
        if self._looking:
            self._loop.call_later(_LOOK_EVERY_S, self._look)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, why: str) -> None:
        """Closes when what was written has gone out."""
        if self.transport is not None:
            self.transport.close()
        self._end(why)

    def abort(self, why: str) -> None:
        """Closes at once."""
        if self.transport is not None:
            self.transport.abort()
        self._end(why)

    def _end(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        if not self.made.done():
            self.made.set_exception(Disconnected(why))
            self.made.exception()
        ended = [future for future, _, _ in self._pending.values()] + [waiting.future for waiting in self._waiting]
        self._pending.clear()
        self._waiting.clear()
        for future in ended:
            if not future.done():
                future.set_exception(Disconnected(f"node {self._node}: {why}"))  # one each: tracebacks do not grow together
        self._owner.lost(self, why)
