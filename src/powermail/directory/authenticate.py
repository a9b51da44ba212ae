"""Owns logins for all doors: the same answer and the same work for unknown user and wrong password (U07).

Right passwords are remembered for a short time under a salted digest of everything that went into the decision, so that
polling clients do not cost a hash each (U14: an old password is dead everywhere within the bound).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import scramp

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.directory import password as pw
from powermail.directory.contract import Account, Writable
from powermail.directory.limiter import FailureLimiter
from powermail.directory.resolve import Resolver
from powermail.wire.sasl import SaslError, scram_user


class AuthTrouble(Trouble):
    """Cannot be decided now: 454, never 535 (U19)."""


class AuthRefused(Exception):
    """Too many failures from this address range: not even tried."""


class Authenticator:
    """Checks credentials."""

    def __init__(
        self,
        world: World,
        resolver: Resolver,
        writable: Writable | None,
        upgrade: bool,
        trusted: Callable[[str], bool] = lambda client: False,
    ) -> None:
        """`trusted` says whose address means nothing: webmail and proxies speak for many."""
        self._trusted = trusted
        self._world = world
        self._resolver = resolver
        self._writable = writable if upgrade else None
        self._limiter = FailureLimiter(world.clock)
        self._lanes = [world.lane(f"password-{number}") for number in range(2)]
        self._next = 0
        self._salt = world.entropy.octets(32)
        self._right: OrderedDict[bytes, float] = OrderedDict()

    def close(self) -> None:
        """Ends the lanes."""
        for lane in self._lanes:
            lane.close()

    def _source(self, client: str) -> str:
        """What failures are counted under; empty if the address means nothing."""
        return "" if self._trusted(client) else client

    async def _hold_back(self, client: str) -> None:
        """Who failed too often waits, and is then told the truth; who is far beyond it is not even heard."""
        source = self._source(client)
        if self._limiter.refused(source, limits.AUTH_FAR_OVER):
            self._world.counters.add("auth.refused")
            raise AuthRefused
        if self._limiter.refused(source):
            self._world.counters.add("auth.held_back")
            await asyncio.sleep(limits.AUTH_DELAY_MAX_S)

    async def _matches(self, stored: str, password: str) -> bool:
        lane = self._lanes[self._next % len(self._lanes)]
        self._next += 1
        if lane.waiting() >= limits.PASSWORD_CHECKS_WAITING_MAX:
            self._world.counters.add("auth.overload")
            raise AuthTrouble("too many password checks wait")
        return await lane.run(pw.check, stored, password)

    def _digest(self, account: Account, password: str) -> bytes:
        parts = "\0".join((account.id, account.address, account.password, password))
        return hashlib.blake2b(parts.encode(), key=self._salt, digest_size=32).digest()

    async def plain(self, client: str, name: str, password: str, door: str) -> Account | None:
        """The account if name and password fit, else None, after a delay. Raises AuthRefused, AuthTrouble, Trouble."""
        await self._hold_back(client)
        account = await self._resolver.login(name)
        usable = account is not None and account.enabled and account.hosted and bool(account.password)
        if account is not None and usable:
            digest = self._digest(account, password)
            now = self._world.clock.monotonic()
            until = self._right.get(digest)
            if until is not None and now < until:
                self._logged_in(client, account, door)
                return account
            if await self._matches(account.password, password):
                self._right[digest] = now + limits.AUTH_CACHE_TTL_S
                while len(self._right) > limits.AUTH_CACHE_MAX:
                    self._right.popitem(last=False)
                self._logged_in(client, account, door)
                return await self._upgrade(account, password)
        else:
            await self._matches(pw.DUMMY, password or "x")
        await self._fail(client, name, door)
        return None

    def _logged_in(self, client: str, account: Account, door: str) -> None:
        self._world.counters.add("auth.logins")
        self._world.log.event(Event.LOGIN, door=door, client=client, account=account.address)

    async def _fail(self, client: str, name: str, door: str) -> None:
        source = self._source(client)
        self._limiter.failed(source, name.lower())
        self._world.counters.add("auth.failures")
        self._world.log.event(Event.LOGIN_FAILED, door=door, client=client, name=name)
        await asyncio.sleep(self._limiter.delay_s(source, name.lower()))

    async def _upgrade(self, account: Account, password: str) -> Account:
        """The account as it is in the directory now."""
        if self._writable is None or not pw.is_old(account.password):
            return account
        fresh = account._replace(password=await self.hash(password))
        try:
            await self._writable.update(fresh)
            self._resolver.directory.forget(account.address)
        except Exception as error:  # noqa: BLE001  the login stands; the old hash stays for another day
            self._world.log.event(Event.TROUBLE, error=str(error))
            return account
        return fresh

    async def still_valid(self, account: Account) -> bool:
        """False once the account was deleted, disabled or given another password: its open sessions end (U14).

        As old as the directory's cache at most; an account that cannot be looked up now stays valid.
        """
        try:
            now = await self._resolver.directory.find(account.address)
        except Trouble:
            return True
        return now is not None and now.enabled and (now.id, now.password) == (account.id, account.password)

    async def hash(self, password: str) -> str:
        """A new stored form, made off the event loop."""
        return await self._lanes[0].run(pw.hash_password, password)

    async def apop(self, client: str, name: str, banner: str, digest: str) -> Account | None:
        """APOP (RFC 1939 §7): only for {plain} passwords. Raises as `plain`."""
        await self._hold_back(client)
        account = await self._resolver.login(name)
        secret = self._world.entropy.octets(8).hex()
        if account is not None and account.enabled and account.hosted and pw.split_scheme(account.password)[0] == "plain":
            secret = pw.split_scheme(account.password)[1] or secret
        expected = hashlib.md5((banner + secret).encode(), usedforsecurity=False).hexdigest()
        if pw.matches("{plain}" + expected, digest.lower()):
            assert account is not None
            self._logged_in(client, account, "popd")
            return account
        await self._fail(client, name, "popd")
        return None

    async def scram(self, client: str, first: str) -> ScramExchange:
        """Starts SCRAM-SHA-256 (RFC 5802, 7677). Raises SaslError, AuthRefused, Trouble."""
        await self._hold_back(client)
        name = scram_user(first)
        account = await self._resolver.login(name)
        information: tuple[bytes, bytes, bytes, int] | None = None
        if account is not None and account.enabled and account.hosted and account.password:
            scheme, rest = pw.split_scheme(account.password)
            if scheme == "scram-sha-256":
                information = pw.parse_scram(rest)
            elif scheme == "plain" and rest:
                salt = hashlib.blake2b(account.id.encode(), key=self._salt, digest_size=16).digest()
                stored = await self._lanes[0].run(pw.hash_scram, pw.forms(rest)[-1], salt)
                information = pw.parse_scram(pw.split_scheme(stored)[1])
        if information is None:  # a made-up user answers alike, and always fails (RFC 5802 §9)
            account = None
            salt = hashlib.blake2b(name.encode(), key=self._salt, digest_size=16).digest()
            information = (salt, self._world.entropy.octets(32), self._world.entropy.octets(32), 4096)
        return ScramExchange(self, client, name, account, information, first)

    async def scram_ended(self, exchange: ScramExchange, good: bool, door: str) -> Account | None:
        """Counts the outcome of an exchange."""
        if good and exchange.account is not None:
            self._logged_in(exchange.client, exchange.account, door)
            return exchange.account
        await self._fail(exchange.client, exchange.name, door)
        return None


class ScramExchange:
    """One SCRAM conversation."""

    def __init__(
        self,
        authenticator: Authenticator,
        client: str,
        name: str,
        account: Account | None,
        information: tuple[bytes, bytes, bytes, int],
        first: str,
    ) -> None:
        self.client = client
        self.name = name
        self.account = account
        self._authenticator = authenticator

        def look_up(_: str) -> tuple[bytes, bytes, bytes, int]:
            return information

        self._server: Any = scramp.ScramMechanism("SCRAM-SHA-256").make_server(look_up)
        try:
            self._server.set_client_first(first)
            self.server_first: str = self._server.get_server_first()
        except scramp.ScramException as error:
            raise SaslError(str(error)) from error

    async def finish(self, final: str, door: str) -> tuple[Account | None, str]:
        """(account or None, server-final message)."""
        good, message = False, ""
        try:
            self._server.set_client_final(final)
            message = self._server.get_server_final()
            good = True
        except scramp.ScramException:
            pass
        return await self._authenticator.scram_ended(self, good, door), message
