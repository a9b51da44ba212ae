"""Owns the policy of one SMTP, submission or LMTP session: what `wire.smtp_server` asks is answered here.

Standards: RFC 5321, 6409. Who exists, who may send as whom, what is taken and what came of it; the protocol is the machine's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble, IndexTrouble, NotRedundant, OutcomeUnknown, Trouble
from powermail.base.log import Event
from powermail.delivery.recipients import Recipients
from powermail.delivery.srs import SrsError
from powermail.delivery.submission import Submission
from powermail.delivery.transaction import Transaction
from powermail.directory.authenticate import AuthRefused
from powermail.directory.contract import Account
from powermail.directory.reasons import Reason
from powermail.door.connection import Connection
from powermail.door.lines import LineSession
from powermail.door.login import Cancelled, log_in
from powermail.door.pace import Pace
from powermail.mail import header
from powermail.mail import status as st
from powermail.mail.address import Address, parse
from powermail.mail.envelope import Peer
from powermail.mail.status import Status
from powermail.smtpd.service import SmtpService
from powermail.wire import smtp
from powermail.wire.proxy import literal
from powermail.wire.sasl import SaslError
from powermail.wire.smtp import MailCommand, RcptCommand
from powermail.wire.smtp_events import Aborted, Begin, Body, Close, End, Login, Response, StartTls
from powermail.wire.smtp_server import SmtpServer
from powermail.wire.smtp_table import Kind

_LMTP, _SUBMISSION = Kind.LMTP, Kind.SUBMISSION
_LAST_WORDS = {
    "shutting down": st.SHUTTING_DOWN,
    "timeout": st.TIMED_OUT,
    "too many connections": st.TOO_MANY_CONNECTIONS,
}


class SmtpSession(LineSession):
    """One client."""

    def __init__(self, service: SmtpService, kind: Kind, connection: Connection) -> None:
        super().__init__(connection, service.proxies)
        self._service = service
        self._world = service.world
        self._kind = kind
        self._machine = SmtpServer(kind, service.offer(kind))
        self._account: Account | None = None
        self._mail: MailCommand | None = None
        self._recipients: Recipients | None = None
        self._transaction: Transaction | None = None
        self._submission: Submission | None = None
        self._deadline: float | None = None  # of the line that is awaited
        self._pace: Pace | None = None  # of the body that is coming
        self._handlers: dict[type, Callable[[Any], Awaitable[None]]] = {
            MailCommand: self._mail_from,
            RcptCommand: self._rcpt_to,
            Begin: self._begin,
            Body: self._body,
            End: self._end,
            Aborted: self._aborted,
            StartTls: self._start_tls,
            Login: self._log_in,
        }

    # -- the loop -------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        machine, client = self._machine, self.connection.client
        machine.trusted = client in self._service.trusted
        if self.connection.tls:
            machine.secured()
        if self.has_input():
            machine.receive(await self.receive(0.0))
        machine.greet(self._service.settings.greeting)
        next_event, handlers = machine.next_event, self._handlers
        try:
            while True:
                event = next_event()
                if event is None:
                    await self._more()
                    continue
                self._deadline = None
                if type(event) is Close:
                    if event.why != "quit":
                        self._count(event.why)
                    return
                await handlers[type(event)](event)
        except OutcomeUnknown:
            pass  # closed without an answer: the client must find out by trying again (P4)

    async def _more(self) -> None:
        """Waits for octets: one deadline for a whole line (S28), for a body one for each piece, and a pace."""
        machine, connection = self._machine, self.connection
        self.send()
        if connection.behind:
            await connection.flush()
        now = connection.door.monotonic()
        if machine.in_body:
            if self._pace is None:
                self._pace = Pace(now)
            octets = await connection.receive(limits.SMTP_COMMAND_TIMEOUT_S)
            if self._pace.too_slow(connection.door.monotonic(), len(octets)):
                machine.close(st.TOO_SLOW, "too_slow")
            machine.receive(octets)
            return
        self._pace = None
        if self._deadline is None:
            self._deadline = now + self._timeout_s()
        machine.receive(await connection.receive(max(0.001, self._deadline - now)))

    def _timeout_s(self) -> float:
        if self._kind is _SUBMISSION and self._account is None:
            return limits.SUBMISSION_LOGIN_TIMEOUT_S
        return limits.SMTP_STRESS_TIMEOUT_S if self.connection.door.stressed else limits.SMTP_COMMAND_TIMEOUT_S

    def send(self) -> None:
        machine = self._machine
        if machine.refused:
            for status in machine.refused:
                if status is st.AUTH_NEEDS_TLS:
                    self._service.authenticator.note(self.connection.client, self._kind.value, Reason.NEEDS_TLS)
                self._log(status)
            machine.refused.clear()
        octets = machine.to_send()
        if octets:
            self.connection.write(octets)

    def last_words(self, why: str) -> None:
        self._machine.close(_LAST_WORDS[why], why.replace(" ", "_"))

    def ended(self) -> None:
        self._cancel()
        if self._account is not None:
            client, account = self.connection.client, self._account.address
            self._world.log.event(Event.LOGOUT, door=self._kind.value, client=client, account=account)
        if self._machine.errors:
            self._world.counters.add(f"{self._kind.value}.errors", self._machine.errors)

    # -- answers --------------------------------------------------------------------------------------------------

    def _answer(self, status: Status, count: str = "") -> None:
        if status.code >= 400:
            self._log(status)
            if count:
                self._count(count)
        self._machine.answer(status)

    def _log(self, status: Status) -> None:
        if status.cause:
            sender = f"<{self._mail.envelope.reverse_path}>" if self._mail is not None else None
            client = self.connection.client
            self._world.log.event(Event.MESSAGE_REFUSED, client=client, sender=sender, code=status.code, cause=status.cause)

    def _count(self, name: str) -> None:
        self._world.counters.add(f"{self._kind.value}.{name}")

    def _cancel(self) -> None:
        """Drops the message that was begun."""
        if self._transaction is not None:
            self._transaction.cancel()
            self._transaction = None

    async def _aborted(self, event: Aborted) -> None:
        self._cancel()

    # -- TLS, AUTH ------------------------------------------------------------------------------------------------

    async def _start_tls(self, event: StartTls) -> None:
        assert self._service.tls is not None
        self._machine.answer(st.START_TLS)
        self._account = None
        if await self.start_tls(self._service.tls):
            self._machine.secured()
        else:
            self.connection.close()

    async def _log_in(self, event: Login) -> None:
        machine = self._machine

        async def ask(challenge: str) -> str:
            machine.challenge(challenge)
            while True:
                response = machine.next_event()
                if isinstance(response, Response):
                    return response.text
                await self._more()

        try:
            account = await log_in(
                self._service.authenticator, self.connection.client, self._kind.value, event.mechanism, event.initial, ask
            )
        except Cancelled:
            return self._answer(st.AUTH_CANCELLED)
        except SaslError:
            return self._answer(st.AUTH_SYNTAX)
        except AuthRefused:
            return self._answer(st.AUTH_LIMITED)
        except Trouble as error:
            return self._answer(st.AUTH_TROUBLE.because(error))
        self._account = account
        return self._answer(st.LOGGED_IN if account is not None else st.AUTH_FAILED)

    # -- the envelope ---------------------------------------------------------------------------------------------

    async def _mail_from(self, mail: MailCommand) -> None:
        account, service = self._account, self._service
        if account is not None and not await service.authenticator.still_valid(account):
            return self._answer(st.ACCOUNT_CHANGED)
        if mail.size > service.settings.message_octets_max:
            return self._answer(st.TOO_LARGE, "too_large")  # RFC 1870 §6.1
        if account is not None and mail.sender is not None:
            refusal = await self._not_theirs(mail.sender, account)
            if refusal is not None:
                return self._answer(refusal)
        if not service.delivery.cluster.takes_mail():
            return self._answer(st.NOT_REDUNDANT, "not_redundant")  # P6: before DATA
        self._mail = mail
        self._recipients = service.delivery.recipients(mail.size)
        return self._machine.answer(st.SENDER_OK)

    async def _not_theirs(self, address: Address, account: Account) -> Status | None:
        """RFC 6409 §6.1: the sender must be the account, or one that its row allows (U03)."""
        try:
            return None if await self._service.resolver.may_send_as(account, address) else st.NOT_YOUR_ADDRESS
        except DirectoryTrouble as error:
            return st.DIRECTORY_TROUBLE.because(error)

    async def _rcpt_to(self, rcpt: RcptCommand) -> None:
        assert self._recipients is not None
        if len(self._recipients) >= self._service.settings.recipients_max:
            return self._answer(st.TOO_MANY_RECIPIENTS, "too_many_recipients")
        address = rcpt.address if rcpt.address.domain else parse(self._service.resolver.postmaster)  # RFC 5321 §4.5.1
        status = await self._take_recipient(address, rcpt)
        if not status.positive:
            self._refuse_recipient(address.text, status)
        return self._machine.answer(status)

    def _refuse_recipient(self, name: str, status: Status) -> None:
        assert self._mail is not None
        self._count("recipients_refused")
        self._world.log.event(
            Event.RECIPIENT_REFUSED,
            client=self.connection.client,
            sender=f"<{self._mail.envelope.reverse_path}>",
            recipient=name,
            code=status.code,
            cause=status.cause or status.text,
        )

    async def _take_recipient(self, address: Address, rcpt: RcptCommand) -> Status:
        assert self._mail is not None and self._recipients is not None
        rewriter = self._service.rewriter
        if rewriter.is_ours(address):
            try:
                origin = await rewriter.origin(address, self._world.clock.now())
            except SrsError as error:
                return st.BAD_SRS.because(error)  # never a relay (F06)
            except IndexTrouble as error:
                return st.STORAGE_TROUBLE.because(error)
            # Bounces, and auto-replies with a sender of their own: the hash shows that we have forwarded its mail.
            return await self._recipients.add_return(origin, forwarded=self._mail.sender is not None)
        if self._account is not None and not self._service.rate.allow(self._account):
            self._count("rate_limited")
            return st.RATE_LIMITED
        relay = self._account if self._service.remote_route else None
        status = await self._recipients.add(address, rcpt.notify, rcpt.orcpt, relay)
        if status is st.RELAY_DENIED and self._account is not None:
            return st.NO_REMOTE_ROUTE
        return status

    # -- the message ----------------------------------------------------------------------------------------------

    async def _begin(self, event: Begin) -> None:
        assert self._mail is not None and self._recipients is not None
        delivery = self._service.delivery
        if self._mail.size and all(await self._refusals(self._mail.size)):
            return self._answer(st.MAILBOX_FULL)
        try:
            for domain in dict.fromkeys(self._recipients.domains()):
                if await delivery.index.queue_count(domain) >= limits.QUEUE_PER_DESTINATION_MAX:
                    return self._answer(st.QUEUE_FULL, "queue_full")
            connection = self.connection
            cipher = connection.cipher() if connection.tls else ""
            peer = Peer(literal(connection.client), self._machine.hello, self._machine.protocol, cipher)
            transaction = self._transaction = delivery.begin(peer, self._mail.envelope, self._recipients)
        except NotRedundant as error:
            return self._answer(st.NOT_REDUNDANT.because(error))
        except Trouble as error:
            return self._answer(st.STORAGE_TROUBLE.because(error))
        if self._account is not None:
            author = self._mail.envelope.reverse_path or self._account.address
            date = header.format_second(int(self._world.clock.now()))
            self._submission = Submission(author, date, f"{transaction.key.hex()}@{self._service.hostname}")
        return self._machine.answer(st.START_INPUT)

    async def _body(self, event: Body) -> None:
        octets = event.octets
        if self._submission is not None:
            octets = self._submission.feed(octets)
        refusal = await self._store(octets)
        if refusal is not None:
            self._refuse(refusal)
            self._machine.refuse(refusal)

    async def _store(self, octets: bytes) -> Status | None:
        transaction = self._transaction
        assert transaction is not None
        if self._submission is not None and self._submission.refusal is not None:
            return self._submission.refusal
        if transaction.octets + len(octets) > self._service.settings.message_octets_max:
            self._count("too_large")
            return st.TOO_LARGE
        try:
            await transaction.write(octets)
        except NotRedundant as error:
            return st.NOT_REDUNDANT.because(error)
        except Trouble as error:
            return st.STORAGE_TROUBLE.because(error)
        return None

    def _refuse(self, status: Status) -> None:
        self._cancel()
        self._submission = None
        self._count("messages_refused")
        self._log(status)

    async def _end(self, event: End) -> None:
        transaction = self._transaction
        assert transaction is not None
        transaction.plain, transaction.added = event.plain, event.added
        refusal = None
        if self._submission is not None:
            refusal = await self._store(self._submission.end()) or await self._forged()
        refusal = refusal or transaction.refusal()
        assert self._recipients is not None
        refusals = [refusal] if refusal is not None else await self._refusals(transaction.shown_octets)
        if refusals[0] is not None and all(refusals):
            self._refuse(refusals[0])
            self._machine.answer(refusals[0])
            return
        if any(refusals):
            for name, each in zip(self._recipients.names, refusals, strict=True):
                if each is not None:
                    self._refuse_recipient(name, each)
            self._recipients.keep([each is None for each in refusals])
        self._transaction = self._submission = None
        outcome = await transaction.finish()
        self._machine.answer_each([each or outcome for each in refusals])

    async def _refusals(self, octets: int) -> Sequence[Status | None]:
        """For each recipient why it does not get a message of so many octets: by itself where it has a reply of its own."""
        recipients = self._recipients
        assert recipients is not None
        if self._kind is _LMTP:
            return await recipients.refusals(octets)
        return [await recipients.refusal(octets)] * len(recipients)

    async def _forged(self) -> Status | None:
        """Who readers will see as the author must be the account (U03)."""
        assert self._submission is not None and self._account is not None
        for author in self._submission.authors:
            refusal = await self._not_theirs(author, self._account)
            if refusal is not None:
                return refusal
        return None


def refuse(connection: Connection, why: str) -> bytes:
    """What a client over the cap, or at the end, is told."""
    return smtp.format_reply(_LAST_WORDS[why])
