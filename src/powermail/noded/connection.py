"""Owns one connection to a node: octets to the machine, operations to the node, one write for each turn of the event loop.

Rules: a COMMIT goes to the node in the turn it came in; a PING is answered in it, before all large answers that wait; these
are given to the transport only as fast as the peer reads, and more reads begin only while what waits and what they may bring
is bounded. An operation that nobody waits for any more is cancelled, which takes nothing back that the node was given.
Deadlines are by progress, looked at once a second: a peer that reads slowly is not one that does not read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from powermail.base import limits
from powermail.base.errors import NodeReadOnly
from powermail.cluster import node_values as values
from powermail.noded.answers import RECORDS, Answers, NotAllowed, answer_octets
from powermail.storage.contract import Receipt
from powermail.wire import node_forms as forms
from powermail.wire import node_verbs as verbs
from powermail.wire.node_identity import Peer
from powermail.wire.node_server import Ask, NodeServer, Stop
from powermail.wire.node_verbs import MEMBERSHIP, READS, Failure, Role

if TYPE_CHECKING:
    from powermail.noded.service import NodeService

_Commits = list[tuple[int, "asyncio.Future[Receipt]"]]  # operation numbers, and what they wait for
_COMMIT: Final = verbs.COMMIT.number
_PING: Final = verbs.PING.number
_HELLO: Final = verbs.HELLO.number
_BLOCK: Final = verbs.VERBS["BLOCK"].number


class Connection(asyncio.BufferedProtocol):
    """One connection, after its TLS handshake."""

    def __init__(self, service: NodeService) -> None:
        self.service = service
        self.client = ""
        self.peer: Peer | None = None
        self._delivers = False  # its certificate makes it a front end
        self._keeps = False  # it makes it a keeper, who needs stamps for what it does itself
        self.answers: Answers | None = None  # of the node that HELLO named
        self.instance: tuple[str, str, bytes] = ("", "", b"")  # certificate's id, node, instance
        self.session = 0
        self.fence = 0
        self.untold = False  # no keeper has said yet whether its layout is too old
        self.untold_until = 0.0
        self.bulk = False
        self.ends_at = float("inf")  # of the certificate
        self.closed = False
        self._machine: NodeServer | None = None
        self._early = NodeServer(frozenset()).reader  # takes what comes before it is known who speaks
        self._early_octets = 0
        self._reader = self._early
        self._transport: asyncio.Transport | None = None
        self._plain: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._flushing = False
        self._committing: _Commits = []  # of this turn
        self._tasks: dict[asyncio.Future[Any], None] = {}
        self._reads: deque[Ask] = deque()
        self._reading = 0
        self._reading_octets = 0  # that the reads under way may answer
        self._largest = limits.MIB  # record or chunk that was read of late
        self._held_octets = 0  # as the service was last told
        self._pushed: forms.StatForm | None = None
        self._going = False
        now = self._loop.time()  # what is waited for here is waited for by it
        self._began_at = now
        self._heard_at = now  # when any octet came
        self._full = False  # the transport takes no more
        self._written = 0  # octets given to it
        self._taken = (0, now)  # so many of them had left, when all or another piece of them last had
        self._seen = (0, 0.0)  # frame under way: octets in before it and since when
        self._seen_part: tuple[tuple[int, int], float] = ((0, 0), now)
        self._pings = 0
        self._paused = False  # reading: for all connections together
        self._flooded = False  # or because the peer asks on and does not read the answers

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.room()[self._early_octets :]

    def buffer_updated(self, nbytes: int) -> None:
        machine = self._machine
        if machine is None:
            self._early_octets += nbytes
            return
        if self.closed:
            return  # superseded, expelled or fenced: nothing that was still on its way is heard
        for event in machine.received(nbytes):
            if not isinstance(event, Ask):
                self._stopped(event)
            elif event.verb == _COMMIT:
                self._commit(event)
            else:
                self._asked(event)
        if self._committing:
            self._wait_for_receipts()
        self._heard_at = self._loop.time()
        if machine.held_octets + machine.large_octets != self._held_octets:
            self._account(machine.held_octets + machine.large_octets)
        if machine.refused:
            self._count(machine)
        if not self._flushing:
            self._flush_soon()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._flooded:
            self._flooded = False
            self._pause(self._paused)
        self._flush_soon()

    # -- beginning and end -----------------------------------------------------------------------------------------

    def begin(self, transport: asyncio.Transport, peer: Peer, plain: asyncio.Transport) -> None:
        """It is known who speaks: what came meanwhile is heard now. `plain` is what the transport's octets go out by."""
        self._attach(transport)
        self._plain = plain
        self.peer = peer
        self._delivers = Role.FRONT in peer.roles
        self._keeps = Role.KEEPER in peer.roles
        self._machine = NodeServer(peer.roles)
        self._machine.reader = self._early
        count, self._early_octets = self._early_octets, 0
        self._began_at = self._heard_at = self._loop.time()
        if count:
            self.buffer_updated(count)

    def _attach(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=limits.NODE_UNSENT_OCTETS)

    def turn_away(self, transport: asyncio.Transport, why: str, text: str) -> None:
        """A certificate of the right authority that admits nobody here: the peer is told, and that is all."""
        self._attach(transport)
        self._machine = NodeServer(frozenset())
        self._machine.stop(why, text)
        self._machine.refused.clear()
        self._flush()
        self.close()

    def close(self) -> None:
        """Ends it when what was written has gone out."""
        if self._transport is not None:
            # TLS says goodbye by reading
            self._transport.abort() if self._paused or self._flooded else self._transport.close()
        self._end()

    def supersede(self) -> None:
        """A later session of the same instance is there: no octet of this one is heard any more."""
        self.service.counters.add("noded.superseded")
        self.abort()

    def abort(self) -> None:
        """Ends it at once."""
        if self._transport is not None:
            self._transport.abort()
        self._end()

    def _end(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._reads.clear()
        for task in list(self._tasks):
            task.cancel()
        self._account(0)
        self.service.ended(self)

    def go_away(self, text: str) -> None:
        """Nothing new is to be asked; it closes when all is answered."""
        if self._machine is not None and not self._going:
            self._going = True
            self._machine.go_away(text)
            self._flush_soon()

    def _stopped(self, stop: Stop) -> None:
        self.service.log_refusal(self, stop.why)
        self._loop.call_soon(self._flush_and_close)

    def _flush_and_close(self) -> None:
        self._flush()
        self.close()

    def _count(self, machine: NodeServer) -> None:
        for why in machine.refused:
            self.service.counters.add(f"noded.refused.{why}")
        machine.refused.clear()

    def _account(self, octets: int) -> None:
        self.service.hold(self, octets - self._held_octets)
        self._held_octets = octets

    def pause(self, paused: bool) -> None:
        """While too much is held for all connections together, the bulk ones are not read."""
        if paused is not self._paused:
            self._paused = paused
            self._pause(paused or self._flooded)

    def _pause(self, paused: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if paused:
            self._transport.pause_reading()
        else:
            self._heard_at = self._loop.time()
            self._transport.resume_reading()

    # -- operations ------------------------------------------------------------------------------------------------

    def _asked(self, ask: Ask) -> None:
        verb = ask.verb
        if verb == _PING:
            self._ping(ask)
        elif verb == _HELLO:
            self._hello(ask)
        elif verb in READS:
            self._reads.append(ask)
            self._read_more()
        elif verb == _BLOCK:
            self._block(ask)
        else:
            self._start(ask)

    def _block(self, ask: Ask) -> None:
        """At once: what was asked behind it finds the switch as it was set."""
        assert self._machine is not None and self.answers is not None
        self.answers.node.block(ask.meta.blocked)
        self.push()
        self._machine.reply(ask.number)

    def _hello(self, ask: Ask) -> None:
        assert self._machine is not None
        answer = self.service.hello(self, ask.meta)
        if not isinstance(answer, forms.Welcome):
            self._machine.refuse(ask.number, *answer)
            self.service.log_refusal(self, answer.text)
            self._loop.call_soon(self._flush_and_close)
            return
        self._machine.welcome(ask.number, answer)
        self.push()

    def _ping(self, ask: Ask) -> None:
        assert self._machine is not None and self.answers is not None
        self._pings += 1
        if self._pings > limits.NODE_PINGS_PER_S_MAX:
            self._machine.stop("pings", f"more than {limits.NODE_PINGS_PER_S_MAX} pings a second")
            self._stopped(Stop("pings"))
            return
        self.push()
        withheld = self.untold and not self._keeps and self.service.is_untold(self)
        self._machine.reply(ask.number, _NO_STAMP if withheld else self.answers.stamp())

    def _commit(self, ask: Ask) -> None:
        assert self.answers is not None and self.peer is not None
        if self.untold and not ask.meta.origin and self.service.is_untold(self):
            self._failed(ask.number, NodeReadOnly("it waits for a keeper to say which layout is gone by"))
            return
        try:
            future = self.answers.commit(self.peer, self._delivers, ask.meta, ask.body)
        except Exception as error:  # noqa: BLE001  each has its class on the wire
            self._failed(ask.number, error)
            return
        if isinstance(future, asyncio.Future):
            self._committing.append((ask.number, future))
            return
        task = asyncio.ensure_future(future)  # it waits for room: whoever is cut off asks no more
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        task.add_done_callback(partial(self._committed, [(ask.number, task)]))

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.pop(task, None)

    def _wait_for_receipts(self) -> None:
        """What is asked in one turn is answered in one: the first that is done brings the others along."""
        asked, self._committing = self._committing, []
        asked[0][1].add_done_callback(partial(self._committed, asked))

    def _committed(self, asked: _Commits, first: asyncio.Future[Receipt]) -> None:
        """Gives all receipts that are there; the others follow one by one."""
        machine, closed = self._machine, self.closed
        assert machine is not None
        for commit in asked:
            number, future = commit
            try:
                _, incarnation, (segment, offset) = future.result()
            except asyncio.InvalidStateError:
                future.add_done_callback(partial(self._committed, [commit]))
            except asyncio.CancelledError:
                continue
            except Exception as error:  # noqa: BLE001  each has its class on the wire
                if not closed:
                    self._failed(number, error)
            else:
                if not closed:
                    machine.ack(number, incarnation, segment, offset)
        if not self._flushing:
            self._flush_soon()

    def _read_more(self) -> None:
        """Starts reads, as many at once as may be, while the peer reads their answers."""
        assert self._machine is not None
        while self._reads and self._reading < limits.NODE_READS_AT_ONCE:
            octets = answer_octets(self._reads[0], self._largest)
            beyond = self._reading and self._reading_octets + octets > limits.NODE_READING_OCTETS_MAX
            if beyond or self._machine.large_octets > limits.NODE_ANSWERS_OCTETS_MAX:
                return
            self._reading += 1
            self._reading_octets += octets
            self._start(self._reads.popleft(), partial(self._read, octets))

    def _read(self, octets: int) -> None:
        self._reading -= 1
        self._reading_octets -= octets
        self._read_more()

    def _start(self, ask: Ask, then: Callable[[], None] | None = None) -> None:
        task = self._loop.create_task(self._answer(ask))
        self._tasks[task] = None
        task.add_done_callback(partial(self._answered, then))

    def _answered(self, then: Callable[[], None] | None, task: asyncio.Future[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.service.broke(error)  # in answering
        if then is not None and not self.closed:
            then()

    async def _answer(self, ask: Ask) -> None:
        assert self.answers is not None and self.peer is not None and self._machine is not None
        try:
            if ask.verb in MEMBERSHIP:
                meta, body = await self.service.membership(self, ask)
            else:
                meta, body = await self.answers.answer(self.peer, ask)
            if len(body) > limits.NODE_ANSWER_OCTETS_MAX:
                raise values.Malformed("the answer is too large; ask for less")
            if ask.verb in RECORDS:  # the next ones may be as large
                self._largest = max(limits.MIB, len(body), self._largest - self._largest // 16)
        except Exception as error:  # noqa: BLE001  each has its class on the wire
            self._failed(ask.number, error)
        else:
            if ask.verb in _SHOWS_AT_ONCE:
                self.push()
            self._machine.reply(ask.number, meta, body)
        self._flush_soon()

    def _failed(self, number: int, error: BaseException) -> None:
        assert self._machine is not None
        why, failure, text = "", values.failure_of(error), str(error)
        if isinstance(error, NotAllowed):
            why, failure = error.why, Failure.ROLE
        elif isinstance(error, values.Malformed | msgspec.DecodeError | UnicodeDecodeError):
            why, failure = "malformed", Failure.MALFORMED
        elif isinstance(error, values.Unsupported):
            why, failure = "unsupported", Failure.UNSUPPORTED
        elif isinstance(error, TimeoutError):
            failure, text = Failure.TROUBLE, "no answer in time"
        elif failure is None:
            self.service.broke(error)
            failure, text = Failure.TROUBLE, "a fault of ours"
        if why:
            self.service.counters.add(f"noded.refused.{why}")
            self.service.log_refusal(self, f"{why}: {text}")
        self._machine.fail(number, failure, text)

    def push(self) -> None:
        """The node's figures, if they have changed since they were last told here."""
        if self.answers is None or self.bulk or self._machine is None:
            return
        figures = self.answers.figures()
        if figures != self._pushed:
            self._pushed = figures
            self._machine.push(figures)
            self._flush_soon()

    # -- writing ---------------------------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        if not self._flushing and not self.closed:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        machine, transport = self._machine, self._transport
        if machine is None or transport is None or self.closed:
            return
        octets = machine.to_send(0 if self._full else limits.NODE_UNSENT_OCTETS)
        if octets:
            self._written += len(octets)
            transport.write(octets)
            if machine.held_octets + machine.large_octets != self._held_octets:
                self._account(machine.held_octets + machine.large_octets)
            if self._full and not self._flooded and self._unsent() > limits.NODE_ANSWERS_OCTETS_MAX:
                self._flooded = True
                self.service.counters.add("noded.flooded")
                self._pause(True)
        if machine.large_octets and not self._full:
            self._flush_soon()
        if self._reads:
            self._read_more()
        if self._going and not (machine.unanswered or machine.large_octets):
            self.close()

    def _unsent(self) -> int:
        """Octets that were given to the transport and have not left this process, as they go out."""
        waiting = 0
        for transport in (self._transport, self._plain):
            if transport is not None and not transport.is_closing():
                waiting += transport.get_write_buffer_size()
        return waiting

    # -- deadlines -------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Once a second: who makes no progress is let go of."""
        self._pings = 0
        late = self._late(now)
        if not late:
            return
        why, text = late
        self.service.counters.add(f"noded.refused.{why}")
        self.service.log_refusal(self, text)
        if self._machine is not None:
            self._machine.stop(why, text)
            self._machine.refused.clear()
            self._flush()
        self.abort() if why == "not_reading" else self.close()

    def _late(self, now: float) -> tuple[str, str] | None:
        if self.service.now() > self.ends_at:
            return "expired", "the certificate has ended"
        if self._machine is None or self.answers is None:
            if now - self._began_at > limits.NODE_HELLO_TIMEOUT_S:
                return "no_hello", "no HELLO in time"
            return None
        if self._stuck(now) and (self.service.crowded or not self.bulk):
            return "not_reading", "the peer does not read"
        if self._paused or self._flooded:
            return None
        if now - self._heard_at > limits.NODE_SILENCE_S:
            return "silent", "nothing was heard for too long"
        reader, (frames, since) = self._reader, self._seen
        if not reader.begun or reader.frames != frames:
            self._seen = (reader.frames, now)
        elif now - since > limits.NODE_FRAME_TIMEOUT_S:
            return "slow_frame", "a frame takes too long"
        part = self._machine.unfinished
        if part != self._seen_part[0] or part == (0, 0):
            self._seen_part = (part, now)
        elif now - self._seen_part[1] > limits.NODE_OPERATION_TIMEOUT_S:
            return "slow_operation", "the rest of an operation takes too long"
        return None

    def _stuck(self, now: float) -> bool:
        """True if for too long the peer has read neither another piece of what was written nor all of it."""
        assert self._machine is not None
        unsent = self._unsent()
        left = self._written - unsent
        taken, since = self._taken
        if left - taken >= limits.NODE_PIECE_OCTETS or not (unsent or self._machine.large_octets):
            self._taken = (left, now)
            return False
        return now - since > limits.NODE_WRITE_TIMEOUT_S


_NO_STAMP: Final = forms.StampForm()
_SHOWS_AT_ONCE: Final = frozenset({verbs.VERBS[name].number for name in ("OPEN", "PROBE", "REBIRTH", "INITIALISE")})
