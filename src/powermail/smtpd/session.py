"""Owns one SMTP, submission or LMTP session: commands in strict order, replies gathered while input is pipelined.

Standards: RFC 5321, 2033, 2920, 3030, 3207, 4954, 6409. Danger: octets sent before a TLS handshake are dropped, and the
state with them; a refused BDAT chunk is thrown away octet by octet and never read as commands.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from email.utils import getaddresses

from powermail.base import limits
from powermail.base.connection import Connection, Draining
from powermail.base.errors import DirectoryTrouble, NotRedundant, OutcomeUnknown, Trouble
from powermail.base.log import Event
from powermail.delivery.recipients import Recipients
from powermail.delivery.srs import SrsError
from powermail.delivery.transaction import Sender, Transaction
from powermail.directory.contract import Account
from powermail.mail import status as st
from powermail.mail.address import Address, AddressError, is_hello_name, parse
from powermail.mail.status import Status
from powermail.smtpd import auth
from powermail.smtpd.service import Kind, SmtpService
from powermail.wire import smtp
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotReader
from powermail.wire.proxy import ProxyError, parse_proxy
from powermail.wire.smtp import State


class SmtpSession:
    """One client."""

    def __init__(self, service: SmtpService, kind: Kind, connection: Connection) -> None:
        self._service = service
        self._world = service.world
        self._kind = kind
        self._connection = connection
        self._buffer = InputBuffer()
        self._replies: list[bytes] = []
        self._state = State.START
        self._hello = ""
        self._extended = False
        self._account: Account | None = None
        self._errors = 0
        self._transactions = 0
        self._mail: smtp.MailCommand | None = None
        self._recipients: Recipients | None = None
        self._bdat: Transaction | None = None
        self._bdat_refusal: Status | None = None

    # -- the loop -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the client until it leaves."""
        try:
            if await self._greet():
                while await self._command():
                    pass
        except Draining:
            self._reply(st.SHUTTING_DOWN)
        except TimeoutError:
            self._reply(st.TIMED_OUT)
        except OutcomeUnknown:
            pass  # closed without an answer: the client must find out by trying again (P4)
        finally:
            self._send()
            self._reset()

    async def _greet(self) -> bool:
        connection, service = self._connection, self._service
        if service.behind_proxy(connection.client) and not await self._read_proxy():
            return False
        if connection.has_input() and self._kind is not Kind.LMTP:
            self._count("early_talkers")
            self._reply(st.TALKED_EARLY)
            return False
        self._raw(f"220 {service.hostname} {'LMTP' if self._kind is Kind.LMTP else 'ESMTP'} {service.settings.greeting}\r\n")
        self._send()
        return True

    async def _read_proxy(self) -> bool:
        connection = self._connection
        while True:
            self._buffer.feed(await connection.receive(limits.TLS_HANDSHAKE_TIMEOUT_S))
            try:
                parsed = parse_proxy(self._buffer.peek(limits.PROXY_HEADER_OCTETS_MAX))
            except ProxyError:
                self._count("proxy_errors")
                return False
            if parsed is None:
                continue
            client, used = parsed
            self._buffer.take(used)
            if client is not None:
                connection.door.leave(connection)
                connection.client, connection.port = client
                if not connection.door.admit(connection):
                    self._reply(st.TOO_MANY_CONNECTIONS)
                    return False
            return True

    def _timeout_s(self) -> float:
        if self._kind is Kind.SUBMISSION and self._account is None:
            return limits.SUBMISSION_LOGIN_TIMEOUT_S
        return limits.SMTP_STRESS_TIMEOUT_S if self._connection.door.stressed else limits.SMTP_COMMAND_TIMEOUT_S

    async def _line(self, limit: int) -> bytes:
        """The next line; what was replied so far goes out before waiting. One deadline for the whole line (S28)."""
        deadline = self._connection.door.monotonic() + self._timeout_s()
        while True:
            line = self._buffer.line(limit)
            if line is not None:
                return line
            self._send()
            await self._connection.flush()
            left = deadline - self._connection.door.monotonic()
            self._buffer.feed(await self._connection.receive(max(0.001, left)))
            if self._state is State.START and self._buffer.peek(2) == b"\x16\x03":
                raise BareLineEnd(b"\x16\x03")  # a TLS handshake has no line end to wait for

    async def _command(self) -> bool:
        """One command. False ends the session."""
        try:
            line = await self._line(limits.SMTP_COMMAND_LINE_OCTETS_MAX)
        except LineTooLong:
            return self._error(st.LINE_TOO_LONG)
        except BareLineEnd as error:
            if smtp.is_foreign(smtp.split_command(error.args[0])[0]):
                return self._foreign()
            return self._error(st.UNRECOGNISED)
        verb, argument = smtp.split_command(line)
        if smtp.is_foreign(verb):
            return self._foreign()
        refusal = smtp.check_command(verb, argument, self._state)
        if refusal is not None:
            if verb == "BDAT":
                await self._skip_bdat(argument)
            return self._error(refusal)
        if verb == "MAIL":
            return await self._mail_from(argument)
        if verb == "RCPT":
            return await self._rcpt_to(argument)
        if verb == "DATA":
            return await self._data()
        if verb == "BDAT":
            return await self._bdat_chunk(argument)
        if verb in ("EHLO", "HELO", "LHLO"):
            return self._greeting(verb, argument)
        if verb == "STARTTLS":
            return await self._start_tls()
        if verb == "AUTH":
            return await self._authenticate(argument)
        return self._simple(verb)

    def _foreign(self) -> bool:
        """Another protocol's client: closed at its first line, nothing after it is looked at."""
        self._count("foreign_protocol")
        self._reply(st.SPEAKS_OTHER)
        return False

    def _simple(self, verb: str) -> bool:
        if verb == "QUIT":
            self._reply(st.BYE)
            return False
        if verb == "RSET":
            self._reset()
        self._reply({"RSET": st.OK, "NOOP": st.OK, "HELP": st.HELP, "VRFY": st.CANNOT_VERIFY}.get(verb, st.NOT_IMPLEMENTED))
        return True

    # -- replies --------------------------------------------------------------------------------------------------

    def _raw(self, text: str) -> None:
        self._replies.append(text.encode())

    def _reply(self, status: Status) -> None:
        if status.code >= 400 and status.cause:
            self._world.log.event(Event.MESSAGE_REFUSED, client=self._connection.client, code=status.code, cause=status.cause)
        self._replies.append(smtp.format_reply(status))

    def _send(self) -> None:
        if self._replies:
            self._connection.write(b"".join(self._replies))
            self._replies.clear()

    def _error(self, status: Status) -> bool:
        """A reply that counts against the client."""
        self._count("errors")
        self._errors += 1
        self._reply(status)
        if self._errors >= limits.SMTP_ERRORS_MAX:
            self._reply(st.TOO_MANY_ERRORS)
            return False
        return True

    def _count(self, name: str) -> None:
        self._world.counters.add(f"{self._kind.value}.{name}")

    def _reset(self) -> None:
        """Forgets the transaction (RFC 5321 §4.1.1.5); the greeting stays."""
        if self._bdat is not None:
            self._bdat.cancel()
            self._bdat = None
        self._bdat_refusal = None
        self._mail = None
        self._recipients = None
        if self._state is not State.START:
            self._state = State.READY

    # -- greeting, TLS, AUTH ----------------------------------------------------------------------------------------

    def _greeting(self, verb: str, argument: str) -> bool:
        if (verb == "LHLO") != (self._kind is Kind.LMTP):
            return self._error(st.UNRECOGNISED)
        name = argument.split(" ")[0]
        if not is_hello_name(name):
            return self._error(st.HELLO_SYNTAX)
        self._reset()
        self._hello = name
        self._state = State.READY
        self._extended = verb != "HELO"
        if not self._extended:
            self._raw(f"250 {self._service.hostname}\r\n")
            return True
        settings = self._service.settings
        extensions = [
            "PIPELINING",
            f"SIZE {settings.message_octets_max}",
            "8BITMIME",
            "SMTPUTF8",
            "ENHANCEDSTATUSCODES",
            "CHUNKING",
            "BINARYMIME",
            "DSN",
            f"LIMITS RCPTMAX={settings.recipients_max} MAILMAX={limits.SMTP_TRANSACTIONS_MAX}",
        ]
        if self._service.tls is not None and not self._connection.tls:
            extensions.append("STARTTLS")
        if self._may_authenticate():
            extensions.append(f"AUTH {' '.join(auth.MECHANISMS)}")
        self._replies.append(smtp.format_ehlo(self._service.hostname, extensions))
        return True

    def _may_authenticate(self) -> bool:
        return self._kind is Kind.SUBMISSION and self._connection.tls and self._account is None

    async def _start_tls(self) -> bool:
        if self._service.tls is None or self._connection.tls:
            return self._error(st.BAD_SEQUENCE if self._connection.tls else st.NOT_IMPLEMENTED)
        self._reply(st.START_TLS)
        self._send()
        # RFC 3207 §4.2: everything known from before the handshake is thrown away.
        self._buffer.clear()
        self._reset()
        self._state = State.START
        self._hello = ""
        self._account = None
        try:
            await self._connection.start_tls(self._service.tls)
        except (OSError, TimeoutError):
            self._count("tls_failed")
            return False
        return True

    async def _authenticate(self, argument: str) -> bool:
        if self._kind is not Kind.SUBMISSION:
            return self._error(st.NOT_IMPLEMENTED)
        if not self._connection.tls:
            return self._error(st.AUTH_NEEDS_TLS)
        if self._account is not None:
            return self._error(st.BAD_SEQUENCE)

        async def ask(challenge: str) -> str:
            self._raw(f"334 {challenge}\r\n")
            try:
                return (await self._line(limits.SMTP_AUTH_LINE_OCTETS_MAX)).decode("ascii", "replace")
            except (LineTooLong, BareLineEnd):
                return "!"  # not base64: refused before anything is hashed (U09)

        account, status = await auth.authenticate(
            self._service.authenticator, self._connection.client, self._kind.value, argument, ask
        )
        self._account = account
        if status.positive:
            self._reply(status)
            return True
        if status.code == 421:
            self._reply(status)
            return False
        return self._error(status)

    # -- the envelope ---------------------------------------------------------------------------------------------

    async def _mail_from(self, argument: str) -> bool:
        if self._kind is Kind.SUBMISSION and self._account is None:
            return self._error(st.NEEDS_AUTH)
        if self._transactions >= limits.SMTP_TRANSACTIONS_MAX:
            self._reply(st.TOO_MANY_TRANSACTIONS)
            return False
        if self._account is not None and not await self._service.authenticator.still_valid(self._account):
            self._reply(st.ACCOUNT_CHANGED)
            return False
        mail = smtp.parse_mail(argument)
        if isinstance(mail, Status):
            return self._error(mail)
        if mail.size > self._service.settings.message_octets_max:
            self._count("too_large")
            self._reply(st.TOO_LARGE)  # RFC 1870 §6.1
            return True
        if self._account is not None and mail.reverse_path is not None:
            refusal = await self._not_theirs(mail.reverse_path, self._account)
            if refusal is not None:
                self._reply(refusal)
                return True
        if not self._service.delivery.cluster.takes_mail():
            self._count("not_redundant")
            self._reply(st.NOT_REDUNDANT)  # P6: before DATA
            return True
        self._mail = mail
        self._recipients = self._service.delivery.recipients(mail.size)
        self._transactions += 1
        self._state = State.MAIL
        self._reply(st.SENDER_OK)
        return True

    async def _not_theirs(self, address: Address, account: Account) -> Status | None:
        """RFC 6409 §6.1: the sender must belong to the account (U03)."""
        if address.canonical == account.address.lower():
            return None
        try:
            owner = await self._service.resolver.account(address)
        except DirectoryTrouble as error:
            return st.DIRECTORY_TROUBLE.because(error)
        return None if owner is not None and owner.id == account.id else st.NOT_YOUR_ADDRESS

    async def _rcpt_to(self, argument: str) -> bool:
        assert self._mail is not None and self._recipients is not None
        rcpt = smtp.parse_rcpt(argument, self._mail.smtputf8)
        if isinstance(rcpt, Status):
            return self._error(rcpt)
        if len(self._recipients) >= self._service.settings.recipients_max:
            self._count("too_many_recipients")
            self._reply(st.TOO_MANY_RECIPIENTS)
            return True
        address = rcpt.address
        if not address.domain:
            address = Address(address.local, self._service.hostname)
        status = await self._take_recipient(address, rcpt)
        if status.positive:
            self._state = State.RCPT
            self._reply(status)
            return True
        self._count("recipients_refused")
        self._world.log.event(
            Event.RECIPIENT_REFUSED,
            client=self._connection.client,
            recipient=address.text,
            code=status.code,
            cause=status.cause or None,
        )
        if status.code == 550:
            return self._error(status)
        self._replies.append(smtp.format_reply(status))
        return True

    async def _take_recipient(self, address: Address, rcpt: smtp.RcptCommand) -> Status:
        assert self._mail is not None and self._recipients is not None
        rewriter = self._service.rewriter
        if rewriter.is_ours(address):
            try:
                origin = parse(rewriter.reverse(address, self._world.clock.now()))
            except (SrsError, AddressError) as error:
                return st.BAD_SRS.because(error)
            if self._mail.reverse_path is not None:
                return st.BAD_SRS  # only bounces go back this way: never a relay (F06)
            return await self._recipients.add_return(origin)
        if self._account is not None and not self._service.rate.allow(self._account):
            self._count("rate_limited")
            return st.RATE_LIMITED
        relay = self._account if self._service.remote_route else None
        status = await self._recipients.add(address, rcpt.notify, rcpt.orcpt, relay)
        if status is st.RELAY_DENIED and self._account is not None:
            return st.NO_REMOTE_ROUTE
        return status

    # -- the message ----------------------------------------------------------------------------------------------

    async def _begin(self) -> Transaction | Status:
        assert self._mail is not None and self._recipients is not None
        mail, recipients = self._mail, self._recipients
        try:
            for domain in dict.fromkeys(recipients.domains()):
                if await self._service.delivery.index.queue_count(domain) >= limits.QUEUE_PER_DESTINATION_MAX:
                    self._count("queue_full")
                    return st.QUEUE_FULL
            sender = Sender(
                client=f"[{self._connection.client}]",
                hello=self._hello,
                protocol=self._protocol(),
                cipher=self._connection.cipher() if self._connection.tls else "",
                reverse_path=mail.reverse_path.text if mail.reverse_path is not None else "",
                size=mail.size,
                body=mail.body,
                smtputf8=mail.smtputf8,
                ret=mail.ret,
                envid=mail.envid,
            )
            return self._service.delivery.begin(sender, recipients)
        except NotRedundant as error:
            return st.NOT_REDUNDANT.because(error)
        except Trouble as error:
            return st.STORAGE_TROUBLE.because(error)

    def _protocol(self) -> str:
        """RFC 3848, RFC 6531 §4.3."""
        if not self._extended:
            return "SMTP"
        assert self._mail is not None
        base = "LMTP" if self._kind is Kind.LMTP else "ESMTP"
        if self._mail.smtputf8:
            base = "UTF8" + base.removeprefix("E")
        return base + ("S" if self._connection.tls else "") + ("A" if self._account is not None else "")

    async def _data(self) -> bool:
        if self._state is State.MAIL or self._recipients is None:
            return self._error(st.NO_VALID_RECIPIENTS)
        if self._mail is not None and self._mail.body == "BINARYMIME":
            return self._error(st.BAD_SEQUENCE)  # RFC 3030 §3: only BDAT carries it
        transaction = await self._begin()
        if isinstance(transaction, Status):
            self._reply(transaction)
            self._reset()
            return True
        self._reply(st.START_INPUT)
        self._send()
        refusal: Status | None = None
        reader = DotReader()
        done = stored = False
        pace = _Pace(self._connection.door.monotonic())
        try:
            while not done:
                data = self._buffer.take_all() or await self._connection.receive(self._timeout_s())
                body, rest, done = reader.feed(data)
                if rest:
                    self._buffer.put_back(rest)
                if pace.too_slow(self._connection.door.monotonic(), len(data)):
                    self._count("too_slow")
                    self._reply(st.TOO_SLOW)
                    return False
                refusal = refusal or await self._store(transaction, body)
            stored = True
            transaction.plain = reader.plain
        finally:
            if not stored:
                transaction.cancel()
        await self._end_message(transaction, refusal)
        return True

    async def _store(self, transaction: Transaction, body: bytes) -> Status | None:
        if transaction.octets + len(body) > self._service.settings.message_octets_max:
            self._count("too_large")
            return st.TOO_LARGE
        try:
            await transaction.write(body)
        except NotRedundant as error:
            return st.NOT_REDUNDANT.because(error)
        except Trouble as error:
            return st.STORAGE_TROUBLE.because(error)
        return None

    async def _end_message(self, transaction: Transaction, refusal: Status | None) -> None:
        """The reply to the end of data: one, or for LMTP one for each recipient (RFC 2033 §4.2)."""
        assert self._recipients is not None
        accepted = len(self._recipients)
        if refusal is None:
            refusal = transaction.refusal()
        if refusal is None and self._account is not None:
            refusal = await self._forged_from(transaction.header, self._account)
        if refusal is not None:
            transaction.cancel()
            self._count("messages_refused")
            status = refusal
        else:
            status = await transaction.finish()
        for _ in range(accepted if self._kind is Kind.LMTP else 1):
            self._reply(status)
        self._reset()

    async def _forged_from(self, header: bytes, account: Account) -> Status | None:
        """A From field that names another account of ours (U03)."""
        fields = [
            line[5:].decode("utf-8", "replace")
            for line in header.replace(b"\r\n ", b" ").replace(b"\r\n\t", b" ").split(b"\r\n")
            if line[:5].lower() == b"from:"
        ]
        for _, text in getaddresses([field[: limits.SMTP_COMMAND_LINE_OCTETS_MAX] for field in fields]):
            try:
                address = parse(text)
                owner = await self._service.resolver.account(address)
            except AddressError:
                continue
            except DirectoryTrouble as error:
                return st.DIRECTORY_TROUBLE.because(error)
            if owner is not None and owner.id != account.id:
                return st.NOT_YOUR_ADDRESS
        return None

    # -- BDAT (RFC 3030) ------------------------------------------------------------------------------------------

    async def _skip_bdat(self, argument: str) -> None:
        """Throws away exactly the octets of a refused chunk (S33)."""
        parsed = smtp.parse_bdat(argument)
        if parsed is not None:
            async for _ in self._chunk(parsed[0]):
                pass

    async def _chunk(self, octets: int) -> AsyncIterator[bytes]:
        pace = _Pace(self._connection.door.monotonic())
        while octets:
            data = self._buffer.take(octets) or None
            if data is None:
                self._send()
                self._buffer.feed(await self._connection.receive(self._timeout_s()))
                continue
            octets -= len(data)
            if pace.too_slow(self._connection.door.monotonic(), len(data)):
                raise TimeoutError
            yield data

    async def _bdat_chunk(self, argument: str) -> bool:
        parsed = smtp.parse_bdat(argument)
        if parsed is None:
            self._reset()
            return self._error(st.SYNTAX)
        octets, last = parsed
        if self._state is State.MAIL:
            await self._skip_bdat(argument)
            return self._error(st.NO_VALID_RECIPIENTS)
        transaction, refusal = self._bdat, self._bdat_refusal
        if transaction is None and refusal is None:
            begun = await self._begin()
            if isinstance(begun, Status):
                refusal = begun
            else:
                transaction = self._bdat = begun
        self._state = State.BDAT
        async for data in self._chunk(octets):
            if transaction is not None and refusal is None:
                refusal = await self._store(transaction, data)
        self._bdat_refusal = refusal
        if not last:
            self._reply(refusal or st.CHUNK_OK)
            if refusal is not None:
                self._reset()
            return True
        self._bdat = None
        if transaction is None:
            assert refusal is not None and self._recipients is not None
            for _ in range(len(self._recipients) if self._kind is Kind.LMTP else 1):
                self._reply(refusal)
            self._reset()
        else:
            await self._end_message(transaction, refusal)
        return True


class _Pace:
    """The minimum data rate of a body (S28): after a grace, so many octets a second on average."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._octets = 0

    def too_slow(self, now: float, octets: int) -> bool:
        self._octets += octets
        over = now - self._began - limits.SMTP_DATA_RATE_GRACE_S
        return over > 0 and self._octets < over * limits.SMTP_DATA_RATE_OCTETS_PER_S_MIN


def refuse(connection: Connection, why: str) -> bytes:
    """What a client over the cap, or at the end, is told."""
    return smtp.format_reply(st.SHUTTING_DOWN if why == "shutting down" else st.TOO_MANY_CONNECTIONS)
