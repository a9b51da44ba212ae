"""Owns one POP3 session: RFC 1939 with CAPA, STLS, AUTH, UTF8, response codes and pipelining.

Danger: octets sent before a TLS handshake are dropped; DELE takes effect at QUIT only, never when the client just leaves, and
never when what it asked for before cannot reach it any more.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.settings import PopSettings
from powermail.base.world import World
from powermail.cluster.packing import Small
from powermail.directory.authenticate import Authenticator, AuthRefused
from powermail.directory.contract import Account
from powermail.directory.reasons import Reason
from powermail.door.clients import Networks
from powermail.door.connection import Connection
from powermail.door.lines import LineSession
from powermail.door.login import decided, log_in
from powermail.mailbox.maildrop import InUse, Maildrop, Maildrops
from powermail.popd.traces import Traces
from powermail.wire import pop3, sasl
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotWriter, stuff
from powermail.wire.pop3 import State

_TROUBLE = pop3.err("try again later", "SYS/TEMP")
_WRONG = pop3.err("invalid user name or password", "AUTH")
_NO_MESSAGE = pop3.err("no such message")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256")
_RETR = re.compile(rb"RETR ([0-9]{1,9})\r\n", re.IGNORECASE)  # RFC 1939 §5, as nearly all of them are


@dataclass
class PopService:
    """Everything a session needs."""

    world: World
    settings: PopSettings
    hostname: str
    maildrops: Maildrops
    authenticator: Authenticator
    tls: ssl.SSLContext | None
    apop: bool
    trusted: Networks  # who may log in without TLS
    proxies: Networks = field(init=False)

    def __post_init__(self) -> None:
        self.proxies = Networks(self.settings.proxy_from)


class PopSession(LineSession):
    """One client."""

    def __init__(self, service: PopService, connection: Connection) -> None:
        super().__init__(connection, service.proxies)
        self._service = service
        self._buffer = InputBuffer()
        self._state = State.AUTHORIZATION
        self._user = ""
        self._errors = 0
        self._drop: Maildrop | None = None
        self._account: Account | None = None
        self._traces: Traces | None = None  # from the login on
        self._deleted = 0
        self._checked_at = 0.0
        self._banner = ""
        self._began = connection.door.monotonic()
        self._commands: dict[str, Callable[[list[str]], Awaitable[bool]]] = {
            "USER": self._do_user,
            "PASS": self._do_pass,
            "APOP": self._do_apop,
            "AUTH": self._do_auth,
            "STLS": self._do_stls,
            "UTF8": self._do_noop,
            "CAPA": self._do_capa,
            "QUIT": self._do_quit,
            "NOOP": self._do_noop,
            "STAT": self._do_stat,
            "LIST": self._do_list,
            "UIDL": self._do_uidl,
            "RETR": self._do_retr,
            "TOP": self._do_top,
            "DELE": self._do_dele,
            "RSET": self._do_rset,
        }

    async def serve(self) -> None:
        if self._service.apop:
            unique = self._service.world.entropy.octets(8).hex()
            self._banner = f"<{unique}@{self._service.hostname}>"
        self.say(pop3.ok(f"PowerMail POP3 ready {self._banner}".rstrip()))
        while await self._command():
            if self._drop is not None:
                self._retrieve_ready()

    def last_words(self, why: str) -> None:
        if why != "timeout":  # RFC 1939 §3: closed without a word, and without UPDATE
            self.say(pop3.err(why, "SYS/TEMP"))

    def ended(self) -> None:
        if self._drop is not None:
            self._drop.release()
        if self._account is not None and self._traces is not None:
            self._traces.close()
            self._service.world.log.event(
                Event.LOGOUT,
                door="popd",
                client=self.connection.client,
                account=self._account.address,
                retrieved=self._traces.retrieved,
                deleted=self._deleted,
                seconds=self.connection.door.monotonic() - self._began,
            )

    # -- the loop -------------------------------------------------------------------------------------------------

    def _timeout_s(self) -> float:
        if self._state is State.AUTHORIZATION:
            return max(0.001, self._began + limits.POP3_LOGIN_TIMEOUT_S - self.connection.door.monotonic())
        return limits.POP3_IDLE_TIMEOUT_S

    async def _line(self, limit: int) -> bytes:
        while True:
            line = self._buffer.line(limit)
            if line is not None:
                return line
            self._buffer.feed(await self.receive(self._timeout_s()))

    async def _command(self) -> bool:
        try:
            # RFC 5034 §4: AUTH may carry a long initial response.
            line = await self._line(limits.POP3_AUTH_LINE_OCTETS_MAX)
        except (LineTooLong, BareLineEnd):
            return self._error("line too long or malformed")
        if len(line) + 2 > limits.POP3_COMMAND_LINE_OCTETS_MAX and line[:5].upper() not in (b"AUTH ", b"PASS "):
            return self._error("line too long")
        command = pop3.parse_command(line)
        if self._account is not None and not await self._still_valid(self._account):
            self.say(pop3.err("the account was changed, log in again", "AUTH"))
            return False  # without UPDATE: nothing is deleted
        problem = pop3.check_command(command, self._state)
        if problem is not None:
            return self._error(problem)
        try:
            return await self._commands[command.verb](command.arguments)
        except Trouble:
            self._service.world.counters.add("popd.trouble")
            self.say(_TROUBLE)
            return True

    def _retrieve_ready(self) -> None:
        """Answers the RETRs that wait and whose messages were read ahead: most of what a reader asks, in a plain loop."""
        assert self._drop is not None
        if self.connection.door.monotonic() - self._checked_at >= limits.SESSION_RECHECK_S:
            return
        buffer, drop = self._buffer, self._drop
        if not buffer.begins(b""):
            return
        used = 0
        while self._replies_octets < limits.SMTP_OUT_BUFFER_OCTETS:
            asked = _RETR.match(buffer.data, used)
            number = int(asked[1]) if asked is not None else 0
            small = drop.ready(number)
            if asked is None or small is None:
                break
            used = asked.end()
            self._say_message(drop, number, small)
        if used:
            buffer.take(used)

    def _say_message(self, drop: Maildrop, number: int, small: Small) -> None:
        assert self._traces is not None
        self._traces.retrieve(drop.key(number))
        octets = drop.octets_of(number)
        if small.plain:
            self.say(b"+OK %d octets\r\n%b.\r\n" % (octets, small.octets))
        else:
            self.say(b"+OK %d octets\r\n%b" % (octets, stuff(small.octets)))

    def _at_once(self, data: bytes) -> bytes:
        """Answers what can be answered while the octets come in; the rest is for `_command`, which waits for it."""
        if self._buffer.data:
            return data
        self._buffer.feed(data)
        self._retrieve_ready()
        if self._replies:
            self.send()
            self.connection.deadline = self.connection.door.monotonic() + limits.POP3_IDLE_TIMEOUT_S
        return self._buffer.take_all()

    async def _still_valid(self, account: Account) -> bool:
        now = self.connection.door.monotonic()
        if now - self._checked_at < limits.SESSION_RECHECK_S:
            return True
        self._checked_at = now
        return await self._service.authenticator.still_valid(account)

    def _error(self, text: str) -> bool:
        self._errors += 1
        self._service.world.counters.add("popd.errors")
        self.say(pop3.err(text))
        return self._errors < limits.POP3_ERRORS_MAX

    # -- before login ---------------------------------------------------------------------------------------------

    def _login_allowed(self) -> bool:
        service, connection = self._service, self.connection
        return connection.tls or service.settings.plaintext_login or connection.client in service.trusted

    async def _do_capa(self, arguments: list[str]) -> bool:
        lines = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "UTF8", "IMPLEMENTATION PowerMail"]
        if self._login_allowed():
            lines += ["USER", f"SASL {' '.join(_MECHANISMS)}"]
        if self._service.tls is not None and not self.connection.tls and self._state is State.AUTHORIZATION:
            lines.append("STLS")
        self.say(pop3.ok("capabilities follow") + "".join(f"{line}\r\n" for line in lines).encode() + b".\r\n")
        return True

    async def _do_stls(self, arguments: list[str]) -> bool:
        if self._service.tls is None or self.connection.tls:
            return self._error("not available")
        self.say(pop3.ok("begin TLS"))
        self._buffer.clear()  # RFC 2595 §4: nothing said before counts after
        self._user = ""
        return await self.start_tls(self._service.tls)

    def _needs_tls(self) -> bool:
        self._service.authenticator.note(self.connection.client, "popd", Reason.NEEDS_TLS)
        return self._error("TLS is required before login")

    async def _do_user(self, arguments: list[str]) -> bool:
        if not self._login_allowed():
            return self._needs_tls()
        self._user = arguments[0]
        self.say(pop3.ok())  # the same for known and unknown names (P02)
        return True

    async def _do_pass(self, arguments: list[str]) -> bool:
        if not self._login_allowed():
            return self._needs_tls()
        if not self._user:
            return self._error("USER first")
        user, self._user = self._user, ""
        password = arguments[0]
        if len(password.encode()) > limits.PASSWORD_OCTETS_MAX:
            return self._error("line too long")
        authenticator = self._service.authenticator
        client = self.connection.client
        check = authenticator.plain(client, user, password, "popd")
        return await self._log_in(decided(authenticator, client, "popd", check, user))

    async def _do_apop(self, arguments: list[str]) -> bool:
        if not self._service.apop:
            return self._error("not available")
        if not self._login_allowed():
            return self._needs_tls()
        name, digest = arguments
        authenticator, client = self._service.authenticator, self.connection.client
        check = authenticator.apop(client, name, self._banner, digest, "popd")
        return await self._log_in(decided(authenticator, client, "popd", check, name))

    async def _do_auth(self, arguments: list[str]) -> bool:
        if not self._login_allowed():
            return self._needs_tls()
        if not arguments:
            self.say(pop3.ok() + "".join(f"{name}\r\n" for name in _MECHANISMS).encode() + b".\r\n")
            return True
        mechanism = arguments[0].upper()
        if mechanism not in _MECHANISMS:
            return self._error("unknown mechanism")
        initial = arguments[1] if len(arguments) > 1 else None
        authenticator, client = self._service.authenticator, self.connection.client
        try:
            return await self._log_in(log_in(authenticator, client, "popd", mechanism, initial, self._ask))
        except sasl.SaslError as error:
            return self._error(str(error))

    async def _ask(self, challenge: str) -> str:
        self.say(f"+ {challenge}\r\n".encode())
        try:
            return (await self._line(limits.POP3_AUTH_LINE_OCTETS_MAX)).decode("ascii", "replace")
        except (LineTooLong, BareLineEnd) as error:
            raise sasl.SaslError("line too long or malformed") from error

    async def _log_in(self, check: Awaitable[Account | None]) -> bool:
        try:
            account = await check
        except AuthRefused:
            self.say(pop3.err("too many failures, try again later", "SYS/TEMP"))
            return False
        if account is None:
            self._errors += 4
            self.say(_WRONG)
            return self._errors < limits.POP3_ERRORS_MAX
        try:
            self._drop = await self._service.maildrops.open(account.id)
        except InUse:
            self.say(pop3.err("another session has this maildrop", "IN-USE"))
            return True
        self._state = State.TRANSACTION
        self.connection.at_once = self._at_once
        self._account, self._checked_at = account, self.connection.door.monotonic()
        self._traces = Traces(self._service.world.log, account.address)
        self._service.world.counters.add("popd.logins")
        self.say(pop3.ok("%d messages, %d octets" % self._drop.totals()))
        return True

    # -- after login ----------------------------------------------------------------------------------------------

    async def _maildrop(self) -> Maildrop:
        assert self._drop is not None
        await self._drop.load()
        return self._drop

    async def _do_noop(self, arguments: list[str]) -> bool:
        self.say(pop3.ok())
        return True

    async def _do_stat(self, arguments: list[str]) -> bool:
        assert self._drop is not None
        self.say(pop3.ok("%d %d" % self._drop.totals()))
        return True

    async def _do_list(self, arguments: list[str]) -> bool:
        return await self._listing(arguments, lambda listed: str(listed.octets))

    async def _do_uidl(self, arguments: list[str]) -> bool:
        return await self._listing(arguments, lambda listed: listed.unique_id)

    async def _listing(self, arguments: list[str], show: Callable[..., str]) -> bool:
        assert self._drop is not None
        drop = self._drop
        if arguments:
            await drop.load()
            number = pop3.parse_number(arguments[0], 1)
            listed = drop.get(number) if number is not None else None
            if listed is None:
                return self._missing()
            self.say(pop3.ok(f"{listed.number} {show(listed)}"))
            return True
        more = await drop.load_page()
        self.say(pop3.ok("%d messages, %d octets" % drop.totals()))
        number = 0
        while more or number < drop.listed:
            while number < drop.listed:
                number += 1
                listed = drop.get(number)
                if listed is not None:
                    await self.push(f"{number} {show(listed)}\r\n".encode())
            try:
                more = await drop.load_page()
            except Trouble:
                return False  # in the middle: only closing says that it is not all (P7)
        self.say(b".\r\n")
        return True

    def _missing(self) -> bool:
        self._errors += 1
        self.say(_NO_MESSAGE)
        return self._errors < limits.POP3_ERRORS_MAX

    async def _do_retr(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        listed = drop.get(number) if number is not None else None
        if listed is None:
            return self._missing()
        small = await drop.whole(listed.number)
        if small is not None:
            self._say_message(drop, listed.number, small)
            await self.push(b"")
            return True
        if not await self._send(drop.read(listed.key), pop3.ok(f"{listed.octets} octets")):
            return False
        assert self._traces is not None
        self._traces.retrieve(listed.key)
        return True

    async def _do_top(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        lines = pop3.parse_number(arguments[1], 0)
        listed = drop.get(number) if number is not None else None
        if listed is None or lines is None:
            return self._missing()
        return await self._send(drop.read(listed.key), pop3.ok("top of message follows"), pop3.TopReader(lines))

    async def _send(self, parts: AsyncIterator[bytes], opening: bytes, top: pop3.TopReader | None = None) -> bool:
        """A message part by part, as far as `top` goes. False if it broke in the middle: the connection is closed then, which
        alone tells the client that it has not got all of it (P7). Raises Trouble before anything was said.
        """
        writer, started = DotWriter(), False
        try:
            async for part in parts:
                if not started:
                    started = True
                    self.say(opening)
                await self.push(writer.feed(part if top is None else top.feed(part)))
                if top is not None and top.done:
                    break
        except Trouble:
            if not started:
                raise
            return False
        if not started:
            self.say(opening)
        self.say(writer.end())
        return True

    async def _do_dele(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        if number is None or drop.get(number) is None:
            return self._missing()
        drop.mark(number)
        self.say(pop3.ok("marked"))
        return True

    async def _do_rset(self, arguments: list[str]) -> bool:
        assert self._drop is not None
        self._drop.unmark_all()
        self.say(pop3.ok())
        return True

    async def _do_quit(self, arguments: list[str]) -> bool:
        if self._drop is not None:
            self.send()
            await self.connection.flush()
            if self.connection.closed:
                return False  # its answers are lost, and with them perhaps the only copy of what it marked
            try:
                removed = await self._drop.update()
            except Trouble:
                self.say(pop3.err("some deleted messages not removed", "SYS/TEMP"))
                return False
            self._deleted = len(removed)
            self._service.world.counters.add("popd.deleted", len(removed))
            if self._traces is not None:
                self._traces.delete(removed)
            await self._drop.close()  # RFC 1939 §6: the lock is released before the client hears of it, and comes back
        self.say(pop3.ok("bye"))
        return False


def refuse(connection: Connection, why: str) -> bytes:
    """What a client over the cap, or at the end, is told."""
    return pop3.err(why, "SYS/TEMP")
