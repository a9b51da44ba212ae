"""Owns logins for all doors: the same answer and the same work for unknown user and wrong password (U07).

Why one failed is a `Reason` in the log and the counters; the client gets the same words, after the same time. While the
directory is away a login is right by what is known within its bound, or it is trouble: what does not fit may be a password
that was changed meanwhile, so nobody hears that his is wrong (P14).

Right passwords are remembered for a short time under a salted digest of everything that went into the decision, so that
polling clients do not cost a hash each (U14: an old password is dead everywhere within the bound).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
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
from powermail.directory.password import ScramKeys
from powermail.directory.reasons import Reason, Unusable
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
        self.tallies = (self._limiter.minute, self._limiter.day)
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

    async def _hold_back(self, client: str, name: str, door: str) -> None:
        """Who failed too often waits, and is then told the truth; who is far beyond it is not even heard."""
        source = self._source(client)
        if self._limiter.refused(source, limits.AUTH_FAR_OVER):
            self._world.counters.add("auth.refused")
            self.note(client, door, Reason.ADDRESS_BLOCKED, name)
            raise AuthRefused
        if self._limiter.refused(source):
            self._world.counters.add("auth.held_back")
            await asyncio.sleep(limits.AUTH_DELAY_MAX_S)

    def note(self, client: str, door: str, reason: Reason, name: str | None = None, error: object = None) -> None:
        """Logs and counts a login that failed; what the client is told is the caller's."""
        self._world.counters.add(f"auth.failed_{reason.name.lower()}")
        self._world.log.event(Event.LOGIN_FAILED, door=door, client=client, name=name, reason=reason.value, error=error)

    async def _check(self, stored: str, password: str) -> Reason | None:
        lane = self._lanes[self._next % len(self._lanes)]
        self._next += 1
        if lane.waiting() >= limits.PASSWORD_CHECKS_WAITING_MAX:
            self._world.counters.add("auth.overload")
            raise AuthTrouble("too many password checks wait")
        return await lane.run(pw.check, stored, password)

    def _digest(self, account: Account, password: str) -> bytes:
        parts = "\0".join((account.id, account.address, account.password, password))
        return hashlib.blake2b(parts.encode(), key=self._salt, digest_size=32).digest()

    async def plain(self, client: str, name: str, password: str, door: str, acts_for: str = "") -> Account | None:
        """The account if name and password fit, else None, after a delay. Raises AuthRefused, AuthTrouble, Trouble.

        Who `acts_for` somebody else needs a right that nobody has (RFC 4616 §2): it fails like a wrong password (U11).
        """
        await self._hold_back(client, name, door)
        account = await self._resolver.login(name)
        reason = unfit(account)
        if reason is None and acts_for and acts_for.lower() != name.lower():
            reason = Reason.ACTS_FOR_ANOTHER
        if account is None or reason is not None:
            await self._check(pw.DUMMY, password or "x")
            await self._fail(client, name, door, reason or Reason.NO_ACCOUNT)
            return None
        digest = self._digest(account, password)
        now = self._world.clock.monotonic()
        until = self._right.get(digest)
        if until is not None and now < until:
            self._logged_in(client, account, door)
            return account
        reason = await self._check(account.password, password)
        if reason is not None:
            await self._fail(client, name, door, reason)
            return None
        self._right[digest] = now + limits.AUTH_CACHE_TTL_S
        while len(self._right) > limits.AUTH_CACHE_MAX:
            self._right.popitem(last=False)
        self._logged_in(client, account, door)
        return await self._upgrade(account, password)

    def _logged_in(self, client: str, account: Account, door: str) -> None:
        self._world.counters.add("auth.logins")
        self._world.log.event(Event.LOGIN, door=door, client=client, account=account.address)

    async def _fail(self, client: str, name: str, door: str, reason: Reason) -> None:
        source = self._source(client)
        self._limiter.failed(source, name.lower())
        self._world.counters.add("auth.failures")
        self.note(client, door, reason, name)
        await asyncio.sleep(self._limiter.delay_s(source, name.lower()))
        if self._resolver.directory.trouble:
            raise AuthTrouble(self._resolver.directory.trouble)

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

    async def apop(self, client: str, name: str, banner: str, digest: str, door: str) -> Account | None:
        """APOP (RFC 1939 §7): only for {plain} passwords. Raises as `plain`."""
        await self._hold_back(client, name, door)
        account = await self._resolver.login(name)
        reason = unfit(account)
        secret = pw.clear_text(account.password) if account is not None and reason is None else ""
        text = banner + (secret or self._world.entropy.octets(8).hex())
        expected = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        if hmac.compare_digest(expected.encode(), digest.lower().encode()) and account is not None and secret:
            self._logged_in(client, account, door)
            return account
        await self._fail(client, name, door, reason or (Reason.WRONG_PASSWORD if secret else Reason.NO_APOP))
        return None

    async def scram(self, client: str, first: str, door: str) -> ScramExchange:
        """Starts SCRAM-SHA-256 (RFC 5802, 7677). Raises SaslError, AuthRefused, Trouble."""
        name = scram_user(first)
        await self._hold_back(client, name, door)
        account = await self._resolver.login(name)
        reason, keys = unfit(account), None
        if account is not None and reason is None:
            try:
                keys = await self._keys(account)
            except Unusable as error:
                reason = error.reason
        if keys is None:  # a made-up user answers alike, and always fails (RFC 5802 §9)
            salt = hashlib.blake2b(name.encode(), key=self._salt, digest_size=16).digest()
            keys = ScramKeys(salt, self._world.entropy.octets(32), self._world.entropy.octets(32), 4096)
        return ScramExchange(self, client, name, account if reason is None else None, reason, keys, first, door)

    async def _keys(self, account: Account) -> ScramKeys:
        """What this account's stored password gives for SCRAM. Raises Unusable."""
        scheme = pw.scheme_of(account.password)
        if scheme == "scram-sha-256":
            return pw.stored_scram_keys(account.password)
        clear = pw.clear_text(account.password)
        if not clear:
            raise Unusable(Reason.NO_SCRAM)
        salt = hashlib.blake2b(account.id.encode(), key=self._salt, digest_size=16).digest()
        return pw.stored_scram_keys(await self._lanes[0].run(pw.hash_scram, pw.forms(clear)[-1], salt))

    async def scram_ended(self, exchange: ScramExchange, good: bool) -> Account | None:
        """Counts the outcome of an exchange."""
        if good and exchange.account is not None:
            self._logged_in(exchange.client, exchange.account, exchange.door)
            return exchange.account
        await self._fail(exchange.client, exchange.name, exchange.door, exchange.reason or Reason.WRONG_PASSWORD)
        return None


def unfit(account: Account | None) -> Reason | None:
    """Why nobody can log in to this account, whatever his password; None if somebody may."""
    if account is None:
        return Reason.NO_ACCOUNT
    if not account.enabled:
        return Reason.DISABLED
    if not account.hosted:
        return Reason.FORWARDS_ONLY
    return None if account.password else Reason.NO_PASSWORD


class ScramExchange:
    """One SCRAM conversation. `account` is None for one that fails whatever comes, and `reason` says why."""

    def __init__(
        self,
        authenticator: Authenticator,
        client: str,
        name: str,
        account: Account | None,
        reason: Reason | None,
        keys: ScramKeys,
        first: str,
        door: str,
    ) -> None:
        self.client = client
        self.name = name
        self.account = account
        self.reason = reason
        self.door = door
        self._authenticator = authenticator

        def look_up(_: str) -> ScramKeys:
            return keys

        self._server: Any = scramp.ScramMechanism("SCRAM-SHA-256").make_server(look_up)
        try:
            self._server.set_client_first(first)
            self.server_first: str = self._server.get_server_first()
        except scramp.ScramException as error:
            raise SaslError(str(error)) from error

    async def finish(self, final: str) -> tuple[Account | None, str]:
        """(account or None, server-final message)."""
        good, message = False, ""
        try:
            self._server.set_client_final(final)
            message = self._server.get_server_final()
            good = True
        except scramp.ScramException:
            pass
        return await self._authenticator.scram_ended(self, good), message
