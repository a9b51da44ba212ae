"""Owns one connection to a next hop: greeting, TLS, login, transactions, bounded waits. What is said is `wire.smtp_client`'s.

A hop is a stranger. Its connection is used again only if it is clean, and a refusal is handed on only after the hop has said
goodbye (`_prove`): a row of replies that had slipped owes one more there, and shows itself.

With PIPELINING a message costs one write and one wait (RFC 2920 §3.1): MAIL, RCPT and DATA go together, behind the octets of
the message before. What went ahead belongs to that next message only: `begun`. 354 in the place of the reply to DATA proves a
row of replies as well as a goodbye does, because nothing else is answered so; without one, nothing of a message is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.world import World
from powermail.outbound.routing import Route
from powermail.outbound.verdict import Transcript
from powermail.wire import sasl
from powermail.wire.dot import DotWriter
from powermail.wire.sasl_client import Mechanism, mechanisms
from powermail.wire.smtp_client import Answer, Fault, Reply, SmtpClient, State, Verb

_NOT_FOR_THIS = (500, 501, 502, 504, 534)  # RFC 4954 §4, §6: another mechanism may do


class HopTrouble(Exception):
    """No session came of it; what was to be sent is tried again later. Always temporary."""


class TlsTrouble(HopTrouble):
    """TLS was offered and did not come about: where the route allows it, the next connection goes in clear."""


class Lines(NamedTuple):
    """The arguments of MAIL and of each RCPT."""

    mail: str
    recipients: Sequence[str]


Following = Callable[[], Lines | None]  # the transaction that is to begin behind a message, if there is one


class Hop(asyncio.Protocol):
    """A connection to a next hop."""

    def __init__(self, world: World, route: Route, hostname: str, lane: Lane, pipeline: bool = True) -> None:
        self.route = route
        self.tls = ""  # version and cipher
        self.used = 0  # transactions
        self.broke_pipelining = False
        self.begun: Lines | None = None  # the commands of this transaction were sent ahead
        self.committed: asyncio.Task[object] | None = None  # who waits for the outcome of a message that was sent whole
        self.deadline = float("inf")
        self.machine = SmtpClient()
        self._world = world
        self._hostname = hostname
        self._lane = lane
        self.pipeline = pipeline
        self._transport: asyncio.Transport | None = None
        self._answers: list[Answer] = []
        self._wanted = 1
        self._timeout_s = limits.SMTP_CLIENT_REPLY_TIMEOUT_S
        self._between_s = float("inf")
        self._waiter: asyncio.Future[None] | None = None
        self._full = False  # the hop is behind in reading
        self._switching = False
        self._patient = False  # what is waited for may come later

    # -- asyncio's side -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        found = self.machine.receive(data)
        if found:
            self._answers += found
            if self._waiter is not None:
                self._timeout_s = min(self._timeout_s, self._between_s)
                self.deadline = self._world.clock.monotonic() + self._timeout_s
        if len(self._answers) >= self._wanted or self.machine.end is not None:
            self._wake()
        if self.machine.end is not None and self.machine.end.fault is not Fault.LEFT:
            self._close()

    def eof_received(self) -> bool:
        self._lost()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._switching:
            self._lost()

    def _lost(self) -> None:
        self.machine.closed()
        self._wake()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def expire(self) -> None:
        """The deadline has passed."""
        self.deadline = float("inf")
        if self._patient:
            self._patient = False
            self._wake()
            return
        what = "answered" if self._wanted else "read"
        self.machine.give_up(Fault.LATE, f"it has not {what} within {self._timeout_s:.0f} s")
        self._close()
        self._wake()

    async def _wait(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.deadline = self._world.clock.monotonic() + timeout_s
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self.deadline = float("inf")

    async def _read(
        self, count: int, timeout_s: float = limits.SMTP_CLIENT_REPLY_TIMEOUT_S, between_s: float = float("inf")
    ) -> list[Answer]:
        """The next `count` answers, fewer if the session ends before; each within the time, those behind the first within
        `between_s`.
        """
        await self._arrived(count, timeout_s, between_s)
        found, self._answers = self._answers[:count], self._answers[count:]
        return found

    async def _arrived(self, count: int, timeout_s: float, between_s: float = float("inf")) -> None:
        """Waits for them."""
        self._wanted, self._between_s = count, between_s
        while len(self._answers) < count and self.machine.end is None:
            await self._wait(timeout_s)

    async def _room(self) -> None:
        """Waits while the hop is behind in reading, unless it says something meanwhile."""
        while self._full and self.machine.end is None and not self._answers:
            self._wanted = 0
            await self._wait(limits.SMTP_CLIENT_BLOCK_TIMEOUT_S)

    def _write(self, octets: bytes) -> None:
        if octets and self._transport is not None and not self._transport.is_closing():
            self._transport.write(octets)

    async def _ask(self, verb: Verb, argument: str = "") -> Reply:
        """One command. Raises HopTrouble if no reply came."""
        self._write(self.machine.ask(verb, argument))
        answers = await self._read(1)
        if not answers:
            raise HopTrouble(self.why)
        return answers[0].reply

    @property
    def why(self) -> str:
        """Why the session is over."""
        return self.machine.end.text if self.machine.end is not None else "no answer"

    def _ended(self, fault: Fault) -> bool:
        return self.machine.end is not None and self.machine.end.fault is fault

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- opening --------------------------------------------------------------------------------------------------

    async def open(self, in_clear: bool = False) -> None:
        """Connects, upgrades, logs in. Raises HopTrouble; TlsTrouble if only TLS stood in the way."""
        route = self.route
        implicit = route.context if route.tls == "implicit" else None
        try:
            await self._world.net.connect(route.host, route.port, lambda: self, implicit, route.host)
            self._note_tls()
            greeting = await self._read(1)
            if not greeting:
                raise HopTrouble(self.why)
            self._expect(greeting[0].reply, "the connection")
            await self._hello()
            if route.tls in ("opportunistic", "required") and not in_clear:
                await self._start_tls()
            if route.login is not None:
                await self._log_in()
        except (OSError, TimeoutError) as error:
            self.abort()
            raise HopTrouble(str(error) or type(error).__name__) from error
        except BaseException:
            self.abort()
            raise
        if not self.machine.clean:
            self.abort()
            raise HopTrouble(self.why if self.machine.end is not None else "it said more than it was asked for")

    @staticmethod
    def _expect(reply: Reply, what: str) -> Reply:
        if reply.kind != 2:
            raise HopTrouble(f"{what} was answered with {reply.code} {reply.text}")
        return reply

    async def _hello(self) -> None:
        reply = await self._ask(Verb.EHLO, self._hostname)
        if reply.kind == 5 and self.machine.end is None:  # RFC 5321 §3.2: who does not know EHLO
            reply = await self._ask(Verb.HELO, self._hostname)
        self._expect(reply, "EHLO")

    async def _start_tls(self) -> None:
        route, machine = self.route, self.machine
        required = route.tls == "required"
        if "STARTTLS" not in machine.extensions:
            if required:
                raise HopTrouble("it does not offer STARTTLS, which outbound.smarthost_tls requires")
            return
        self._write(machine.ask(Verb.STARTTLS))
        answers = await self._read(1)
        if self._ended(Fault.CLOSED) or self._ended(Fault.LEFT):
            raise TlsTrouble(f"at STARTTLS {self.why}")
        if machine.end is not None or not answers:
            raise HopTrouble(self.why)  # octets behind "220 go" are an attack: nothing is sent, not in clear either
        reply = answers[0].reply
        if reply.kind in (4, 5):
            if required:
                raise HopTrouble(f"STARTTLS was answered with {reply.code} {reply.text}")
            self._say_clear(f"STARTTLS was answered with {reply.code}")
            return
        assert self._transport is not None and route.context is not None
        self._switching = True
        try:
            upgraded = await self._world.net.start_tls(self._transport, self, route.context, server_side=False, name=route.host)
        except (OSError, TimeoutError) as error:
            raise TlsTrouble(f"no TLS: {error or type(error).__name__}") from error
        finally:
            self._switching = False
        if machine.end is not None:
            raise HopTrouble(self.why)
        self._transport = upgraded
        machine.secured()
        self._note_tls()
        try:
            await self._hello()
        except HopTrouble as error:
            if self._ended(Fault.CLOSED):
                raise TlsTrouble(f"under TLS {error}") from error
            raise

    def _say_clear(self, why: str) -> None:
        self._world.counters.add("outbound.in_clear")
        self._world.log.event(Event.IN_CLEAR, host=self.route.name, reason=why)

    def _note_tls(self) -> None:
        ssl_object = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        if ssl_object is not None:
            cipher = ssl_object.cipher()
            self.tls = f"{ssl_object.version()} {cipher[0]}" if cipher else str(ssl_object.version())

    async def _log_in(self) -> None:
        login = self.route.login
        assert login is not None
        if not self.tls:
            raise HopTrouble("no login without TLS")
        offered = self.machine.mechanisms()
        nonce = self._world.entropy.octets(18).hex()
        usable = mechanisms(offered, login.user, await self._lane.run(login.secret), login.token, nonce)
        if not usable:
            raise HopTrouble(f"it offers no login that serves; it offers {' '.join(offered) or 'none'}")
        for mechanism in usable:
            reply = await self._exchange(mechanism)
            if reply.code == 235:
                if not mechanism.proven:
                    raise HopTrouble(f"{mechanism.name}: it did not show that it knows the password")
                return
            if reply.code not in _NOT_FOR_THIS or self.machine.end is not None:
                break
        raise HopTrouble(f"AUTH {mechanism.name} was answered with {reply.code} {reply.text}")

    async def _exchange(self, mechanism: Mechanism) -> Reply:
        """One run of a mechanism; its last reply."""
        first = mechanism.first()
        argument = mechanism.name if first is None else f"{mechanism.name} {sasl.encode(first) or '='}"
        reply = await self._ask(Verb.AUTH, argument)
        while reply.code == 334:
            try:
                challenge = sasl.decode(reply.text.strip() or "=") if mechanism.listens else b""
                if mechanism.slow:
                    response = await self._lane.run(mechanism.answer, challenge)
                else:
                    response = mechanism.answer(challenge)
            except sasl.SaslError as error:
                await self._ask(Verb.RESPONSE, "*")  # RFC 4954 §4: given up
                raise HopTrouble(f"{mechanism.name}: {error}") from error
            reply = await self._ask(Verb.RESPONSE, sasl.encode(response))
        return reply

    # -- sending --------------------------------------------------------------------------------------------------

    async def send(self, lines: Lines, body: AsyncIterator[bytes], following: Following | None = None) -> Transcript:
        """One transaction; `following` is asked when all of the message is on its way. Raises what `body` raises; then the
        connection is closed, which says that it is not whole.
        """
        self.used += 1
        self.committed = None
        said = Transcript(recipients=[None] * len(lines.recipients))
        try:
            if self.pipelining:
                await self._envelope(said, lines)
            else:
                await self._line_by_line(said, lines)
            if self.machine.end is None and said.begins:
                await self._message(said, body, following)
            await self._leave(said)
        except BaseException:
            self.abort()
            raise
        return said

    @property
    def pipelining(self) -> bool:
        """True if it is spoken to in rows."""
        return self.pipeline and "PIPELINING" in self.machine.extensions

    @property
    def usable(self) -> bool:
        """True if a transaction may begin, or has begun and goes on."""
        return self.machine.clean or (self.begun is not None and self.machine.end is None)

    def _opening(self, lines: Lines) -> bytes:
        ask = self.machine.ask
        octets = [ask(Verb.MAIL, lines.mail), *[ask(Verb.RCPT, line) for line in lines.recipients], ask(Verb.DATA)]
        return b"".join(octets)

    async def _envelope(self, said: Transcript, lines: Lines) -> None:
        machine, count = self.machine, 2 + len(lines.recipients)
        ahead, self.begun = self.begun is lines, None
        if not ahead:
            self._write(self._opening(lines))
        # Who is slow with the rest is asked again line by line, with all patience.
        rest_s = limits.SMTP_CLIENT_PIPELINE_S
        answers = await self._read(count, rest_s if ahead else limits.SMTP_CLIENT_REPLY_TIMEOUT_S, rest_s)
        replies = [answer.reply for answer in answers]
        if replies:
            said.mail = replies[0]
            said.recipients[: len(replies) - 1] = replies[1 : count - 1]
            said.data = replies[-1] if len(replies) == count else None
        # It took the first line of several and lost the rest: others get them one by one.
        lost = machine.end is not None and machine.end.fault in (Fault.LATE, Fault.CLOSED, Fault.OUT_OF_STEP)
        began = bool(replies) or (ahead and said.mail is None and self._ended(Fault.LATE))
        self.broke_pipelining = (lost and len(replies) < count and began) or said.disordered

    async def _line_by_line(self, said: Transcript, lines: Lines) -> None:
        said.mail = await self._answer(Verb.MAIL, lines.mail)
        if said.mail is None or said.mail.kind != 2:
            return
        for number, line in enumerate(lines.recipients):
            said.recipients[number] = await self._answer(Verb.RCPT, line)
            if self.machine.end is not None:
                return
        if said.taken:
            said.data = await self._answer(Verb.DATA)

    async def _answer(self, verb: Verb, argument: str = "") -> Reply | None:
        self._write(self.machine.ask(verb, argument))
        answers = await self._read(1)
        return answers[0].reply if answers else None

    async def _message(self, said: Transcript, body: AsyncIterator[bytes], following: Following | None) -> None:
        machine = self.machine
        writer, held = DotWriter(clean_cr=True), b""  # the last part goes with the end, in one write
        async for part in body:
            if self._answers or machine.end is not None:
                break  # it has said no already
            self._write(held)
            held = writer.feed(part)
            if self._full:
                await self._room()
        if not self._answers and machine.end is None:
            octets = [held, writer.end()]
            machine.ended_body()
            said.complete = True
            self.committed = asyncio.current_task()
            if following is not None and said.all_taken and self.pipelining and (lines := following()) is not None:
                octets.append(self._opening(lines))
                self.begun = lines
            self._write(b"".join(octets))
        answers = await self._read(1, limits.SMTP_CLIENT_DATA_TIMEOUT_S)
        if answers:
            said.final = answers[0].reply
            self.broke_pipelining = self.begun is not None and said.final.code == 503

    async def _leave(self, said: Transcript) -> None:
        """After each transaction: nothing open, nothing owed, and no refusal that may be somebody else's."""
        machine = self.machine
        if self.begun is not None and not said.negative:
            await self._look_behind(said)
        elif said.negative:
            await self._prove()
        elif machine.end is None and machine.state is State.OPEN and machine.waiting == 0:
            self._write(machine.ask(Verb.RSET))
            await self._read(1, limits.SMTP_CLIENT_QUIT_TIMEOUT_S)
        said.end = machine.end
        if not self.usable:
            self.abort()

    async def _look_behind(self, said: Transcript) -> None:
        """2yz to a message is somebody else's if a reply was missing: then 354 comes too early. What a hop does not say soon is
        not waited for.
        """
        assert self.begun is not None
        self._wanted, self._patient = 2 + len(self.begun.recipients), True
        if len(self._answers) < self._wanted and self.machine.end is None:
            await self._wait(limits.SMTP_CLIENT_AHEAD_S)
        self._patient = False
        last = self._answers[-1] if self._answers else None
        said.missing = last is not None and last.reply.code == 354 and last.verb is not Verb.DATA

    async def _prove(self) -> None:
        """Says goodbye. 221 is the reply to that and to nothing else; behind another one, and behind a refusal in the middle of
        the body, what may still come is waited for: a row of replies that had slipped owes one more. No goodbye is needed
        where 354 has come in its place.
        """
        machine = self.machine
        if self.begun is not None:
            await self._arrived(2 + len(self.begun.recipients), limits.SMTP_CLIENT_QUIT_TIMEOUT_S)
            if machine.end is None and machine.state is State.BODY:
                return
            self.begun, self._answers = None, []
        bye = None
        if machine.end is None and machine.state in (State.READY, State.OPEN) and machine.waiting == 0:
            self._write(machine.ask(Verb.QUIT))
            answers = await self._read(1, limits.SMTP_CLIENT_QUIT_TIMEOUT_S)
            bye = answers[0].reply if answers else None
        if (bye is None or bye.code != 221) and await self._read(1, limits.SMTP_CLIENT_PROOF_S):
            machine.give_up(Fault.OUT_OF_STEP, "it said more than it was asked for")

    async def quit(self) -> None:
        """Says goodbye, and waits for the answer no longer than is polite."""
        if self.machine.clean:
            self._write(self.machine.ask(Verb.QUIT))
            await self._read(1, limits.SMTP_CLIENT_QUIT_TIMEOUT_S)
        self.abort()

    def abort(self) -> None:
        """Closes at once."""
        self.machine.give_up(Fault.GIVEN_UP, "closed")
        self._close()
        self._wake()
