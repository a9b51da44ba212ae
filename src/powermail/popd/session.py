"""Owns one POP3 session: RFC 1939 with CAPA, STLS, AUTH, UTF8, response codes and pipelining.

Danger: octets sent before a TLS handshake are dropped; DELE takes effect at QUIT only, never when the client just leaves.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from powermail.base import limits
from powermail.base.connection import Connection, Draining
from powermail.base.errors import Trouble
from powermail.base.settings import PopSettings
from powermail.base.world import World
from powermail.directory.authenticate import Authenticator, AuthRefused
from powermail.directory.contract import Account
from powermail.mailbox.maildrop import InUse, Maildrop, Maildrops
from powermail.wire import pop3, sasl
from powermail.wire.buffer import BareLineEnd, InputBuffer, LineTooLong
from powermail.wire.dot import DotWriter, stuff
from powermail.wire.pop3 import State
from powermail.wire.proxy import ProxyError, is_listed, parse_proxy

_TROUBLE = pop3.err("try again later", "SYS/TEMP")
_WRONG = pop3.err("invalid user name or password", "AUTH")
_NO_MESSAGE = pop3.err("no such message")


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
    proxies: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = field(init=False)

    def __post_init__(self) -> None:
        self.proxies = [ipaddress.ip_network(text, strict=False) for text in self.settings.proxy_from]

    def behind_proxy(self, client: str) -> bool:
        """True if connections from there must begin with a PROXY header."""
        return is_listed(self.proxies, client)


class PopSession:
    """One client."""

    def __init__(self, service: PopService, connection: Connection) -> None:
        self._service = service
        self._connection = connection
        self._buffer = InputBuffer()
        self._state = State.AUTHORIZATION
        self._replies: list[bytes] = []
        self._replies_octets = 0
        self._user = ""
        self._errors = 0
        self._drop: Maildrop | None = None
        self._account: Account | None = None
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

    async def run(self) -> None:
        """Serves the client until it leaves."""
        try:
            if self._service.behind_proxy(self._connection.client) and not await self._read_proxy():
                return
            self._greet()
            while await self._command():
                pass
        except Draining:
            self._reply(pop3.err("shutting down", "SYS/TEMP"))
        except TimeoutError:
            pass  # RFC 1939 §3: closed without UPDATE
        finally:
            self._send()
            if self._drop is not None:
                self._drop.release()

    async def _read_proxy(self) -> bool:
        while True:
            self._buffer.feed(await self._connection.receive(limits.TLS_HANDSHAKE_TIMEOUT_S))
            try:
                parsed = parse_proxy(self._buffer.peek(limits.PROXY_HEADER_OCTETS_MAX))
            except ProxyError:
                return False
            if parsed is not None:
                self._buffer.take(parsed[1])
                if parsed[0] is not None:
                    self._connection.door.leave(self._connection)
                    self._connection.client, self._connection.port = parsed[0]
                    return self._connection.door.admit(self._connection)
                return True

    def _greet(self) -> None:
        if self._service.apop:
            unique = self._service.world.entropy.octets(8).hex()
            self._banner = f"<{unique}@{self._service.hostname}>"
        self._reply(pop3.ok(f"PowerMail POP3 ready {self._banner}".rstrip()))
        self._send()

    # -- the loop -------------------------------------------------------------------------------------------------

    def _reply(self, octets: bytes) -> None:
        self._replies.append(octets)
        self._replies_octets += len(octets)

    def _send(self) -> None:
        if self._replies:
            self._connection.write(b"".join(self._replies))
            self._replies.clear()
            self._replies_octets = 0

    async def _push(self, octets: bytes) -> None:
        """Adds output; sends and waits for the reader when much is queued."""
        self._reply(octets)
        if self._replies_octets >= limits.SMTP_OUT_BUFFER_OCTETS:
            self._send()
            await self._connection.flush()

    def _timeout_s(self) -> float:
        if self._state is State.AUTHORIZATION:
            return max(0.001, self._began + limits.POP3_LOGIN_TIMEOUT_S - self._connection.door.monotonic())
        return limits.POP3_IDLE_TIMEOUT_S

    async def _line(self, limit: int) -> bytes:
        while True:
            line = self._buffer.line(limit)
            if line is not None:
                return line
            self._send()
            await self._connection.flush()
            self._buffer.feed(await self._connection.receive(self._timeout_s()))

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
            self._reply(pop3.err("the account was changed, log in again", "AUTH"))
            return False  # without UPDATE: nothing is deleted
        problem = pop3.check_command(command, self._state)
        if problem is not None:
            return self._error(problem)
        try:
            return await self._commands[command.verb](command.arguments)
        except Trouble:
            self._service.world.counters.add("popd.trouble")
            self._reply(_TROUBLE)
            return True

    async def _still_valid(self, account: Account) -> bool:
        now = self._connection.door.monotonic()
        if now - self._checked_at < limits.SESSION_RECHECK_S:
            return True
        self._checked_at = now
        return await self._service.authenticator.still_valid(account)

    def _error(self, text: str) -> bool:
        self._errors += 1
        self._service.world.counters.add("popd.errors")
        self._reply(pop3.err(text))
        return self._errors < limits.POP3_ERRORS_MAX

    # -- before login ---------------------------------------------------------------------------------------------

    def _login_allowed(self) -> bool:
        return self._connection.tls or self._service.settings.plaintext_login

    async def _do_capa(self, arguments: list[str]) -> bool:
        lines = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "UTF8", "IMPLEMENTATION PowerMail"]
        if self._login_allowed():
            lines += ["USER", "SASL PLAIN SCRAM-SHA-256"]
        if self._service.tls is not None and not self._connection.tls and self._state is State.AUTHORIZATION:
            lines.append("STLS")
        self._reply(pop3.ok("capabilities follow") + "".join(f"{line}\r\n" for line in lines).encode() + b".\r\n")
        return True

    async def _do_stls(self, arguments: list[str]) -> bool:
        if self._service.tls is None or self._connection.tls:
            return self._error("not available")
        self._reply(pop3.ok("begin TLS"))
        self._send()
        self._buffer.clear()  # RFC 2595 §4: nothing said before counts after
        self._user = ""
        try:
            await self._connection.start_tls(self._service.tls)
        except (OSError, TimeoutError):
            return False
        return True

    async def _do_user(self, arguments: list[str]) -> bool:
        if not self._login_allowed():
            return self._error("TLS is required before login")
        self._user = arguments[0]
        self._reply(pop3.ok())  # the same for known and unknown names (P02)
        return True

    async def _do_pass(self, arguments: list[str]) -> bool:
        if not self._login_allowed() or not self._user:
            return self._error("TLS is required before login" if not self._login_allowed() else "USER first")
        user, self._user = self._user, ""
        password = arguments[0]
        if len(password.encode()) > limits.PASSWORD_OCTETS_MAX:
            return self._error("line too long")
        authenticator = self._service.authenticator
        return await self._log_in(lambda: authenticator.plain(self._connection.client, user, password, "popd"))

    async def _do_apop(self, arguments: list[str]) -> bool:
        if not self._service.apop or not self._login_allowed():
            return self._error("not available")
        name, digest = arguments
        authenticator = self._service.authenticator
        return await self._log_in(lambda: authenticator.apop(self._connection.client, name, self._banner, digest))

    async def _do_auth(self, arguments: list[str]) -> bool:
        if not self._login_allowed():
            return self._error("TLS is required before login")
        if not arguments:
            self._reply(pop3.ok() + b"PLAIN\r\nSCRAM-SHA-256\r\n.\r\n")
            return True
        mechanism = arguments[0].upper()
        if mechanism not in ("PLAIN", "SCRAM-SHA-256"):
            return self._error("unknown mechanism")
        try:
            first = sasl.decode(arguments[1]) if len(arguments) > 1 else await self._ask("")
            return await self._log_in(lambda: self._sasl(mechanism, first))
        except sasl.SaslError as error:
            return self._error(str(error))

    async def _ask(self, challenge: str) -> bytes:
        self._reply(f"+ {challenge}\r\n".encode())
        try:
            line = (await self._line(limits.POP3_AUTH_LINE_OCTETS_MAX)).decode("ascii", "replace")
        except (LineTooLong, BareLineEnd) as error:
            raise sasl.SaslError("line too long or malformed") from error
        if line == "*":
            raise sasl.SaslError("cancelled")
        return sasl.decode(line)

    async def _sasl(self, mechanism: str, first: bytes) -> Account | None:
        authenticator, client = self._service.authenticator, self._connection.client
        if mechanism == "PLAIN":
            authzid, name, password = sasl.parse_plain(first)
            if authzid and authzid.lower() != name.lower():
                password = "\0"  # acting for others: fails like a wrong password
            return await authenticator.plain(client, name, password, "popd")
        exchange = await authenticator.scram(client, sasl.credential(first))
        final = sasl.credential(await self._ask(sasl.encode(exchange.server_first.encode())))
        account, message = await exchange.finish(final, "popd")
        if account is not None:
            await self._ask(sasl.encode(message.encode()))
        return account

    async def _log_in(self, check: Callable[[], Awaitable[Account | None]]) -> bool:
        try:
            account = await check()
        except AuthRefused:
            self._reply(pop3.err("too many failures, try again later", "SYS/TEMP"))
            return False
        if account is None:
            self._errors += 4
            self._reply(_WRONG)
            return self._errors < limits.POP3_ERRORS_MAX
        try:
            self._drop = await self._service.maildrops.open(account.id)
        except InUse:
            self._reply(pop3.err("another session has this maildrop", "IN-USE"))
            return True
        self._state = State.TRANSACTION
        self._account, self._checked_at = account, self._connection.door.monotonic()
        self._service.world.counters.add("popd.logins")
        self._reply(pop3.ok("%d messages, %d octets" % self._drop.totals()))
        return True

    # -- after login ----------------------------------------------------------------------------------------------

    async def _maildrop(self) -> Maildrop:
        assert self._drop is not None
        await self._drop.load()
        return self._drop

    async def _do_noop(self, arguments: list[str]) -> bool:
        self._reply(pop3.ok())
        return True

    async def _do_stat(self, arguments: list[str]) -> bool:
        assert self._drop is not None
        self._reply(pop3.ok("%d %d" % self._drop.totals()))
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
            self._reply(pop3.ok(f"{listed.number} {show(listed)}"))
            return True
        more = await drop.load_page()
        self._reply(pop3.ok("%d messages, %d octets" % drop.totals()))
        number = 0
        while more or number < drop.listed:
            while number < drop.listed:
                number += 1
                listed = drop.get(number)
                if listed is not None:
                    await self._push(f"{number} {show(listed)}\r\n".encode())
            try:
                more = await drop.load_page()
            except Trouble:
                return False  # in the middle: only closing says that it is not all (P7)
        self._reply(b".\r\n")
        return True

    def _missing(self) -> bool:
        self._errors += 1
        self._reply(_NO_MESSAGE)
        return self._errors < limits.POP3_ERRORS_MAX

    async def _do_retr(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        listed = drop.get(number) if number is not None else None
        if listed is None:
            return self._missing()
        small = await drop.whole(listed.number)
        if small is not None:
            self._reply(b"+OK %d octets\r\n" % len(small.octets))
            if small.plain:
                self._reply(small.octets)
                await self._push(b".\r\n")
            else:
                await self._push(stuff(small.octets))
            return True
        writer = DotWriter()
        started = False
        try:
            async for part in drop.read(listed.key):
                if not started:
                    started = True
                    self._reply(pop3.ok(f"{listed.octets} octets"))
                await self._push(writer.feed(part))
        except Trouble:
            if not started:
                raise
            return False  # in the middle: only closing tells the client that it has not got all of it
        if not started:
            self._reply(pop3.ok("0 octets"))
        self._reply(writer.end())
        return True

    async def _do_top(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        lines = pop3.parse_number(arguments[1], 0)
        listed = drop.get(number) if number is not None else None
        if listed is None or lines is None:
            return self._missing()
        data = bytearray()
        wanted = b""
        async for part in drop.read(listed.key):
            data += part
            wanted = pop3.top(bytes(data), lines)
            if len(wanted) < len(data):
                break
        writer = DotWriter()
        self._reply(pop3.ok("top of message follows"))
        await self._push(writer.feed(wanted))
        self._reply(writer.end())
        return True

    async def _do_dele(self, arguments: list[str]) -> bool:
        drop = await self._maildrop()
        number = pop3.parse_number(arguments[0], 1)
        if number is None or drop.get(number) is None:
            return self._missing()
        drop.mark(number)
        self._reply(pop3.ok("marked"))
        return True

    async def _do_rset(self, arguments: list[str]) -> bool:
        assert self._drop is not None
        self._drop.unmark_all()
        self._reply(pop3.ok())
        return True

    async def _do_quit(self, arguments: list[str]) -> bool:
        if self._drop is not None:
            try:
                removed = await self._drop.update()
            except Trouble:
                self._reply(pop3.err("some deleted messages not removed", "SYS/TEMP"))
                return False
            self._service.world.counters.add("popd.deleted", removed)
        self._reply(pop3.ok("bye"))
        return False


def refuse(connection: Connection, why: str) -> bytes:
    """What a client over the cap, or at the end, is told."""
    return pop3.err(why, "SYS/TEMP")
