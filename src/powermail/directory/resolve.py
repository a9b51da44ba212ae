"""Owns resolution: from a recipient address to mailboxes and destinations elsewhere.

Order: exact, subaddress (`user+tag`), catch-all (`*@domain`). A forward whose destination is ours is resolved inside;
loops are cut, depth is bounded (S27). A bounded cache with negative entries stands in front and serves stale answers
within the bound while the directory is away (P14); unknown then is trouble, never a wrong 5xx (P12).

A directory that hangs is waited for by one look-up at a time, `DIRECTORY_WAIT_S`; all others are answered at once, from what is
known or with trouble, until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Coroutine
from math import inf
from typing import Any, NamedTuple, TypeVar

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.counters import Counters
from powermail.base.errors import DirectoryTrouble
from powermail.directory.contract import Account, Ahead, Directory, RowTrouble
from powermail.mail.address import Address, AddressError, canonical_domain, parse, parse_canonical, spellings

T = TypeVar("T")
_NOBODY = "nobody@powermail.invalid"  # RFC 6761 §6.4: a look-up that finds nothing


class Resolution(NamedTuple):
    """Where mail for an address goes: `hosted` accounts here, `remote` destinations with the account that forwards."""

    hosted: tuple[Account, ...]
    remote: tuple[tuple[str, Account], ...]
    loop: bool = False

    @property
    def known(self) -> bool:
        """True if the address exists here."""
        return bool(self.hosted or self.remote)


class DirectoryCache:
    """A directory with memory: fresh for `ttl_s`, stale answers for `stale_s` when the backend is away."""

    def __init__(self, backend: Directory, clock: Clock, counters: Counters, ttl_s: float, stale_s: float) -> None:
        self._backend = backend
        self._ahead = backend if isinstance(backend, Ahead) else None
        self._clock = clock
        self._counters = counters
        self._ttl_s = ttl_s
        self._stale_s = stale_s
        self._known: OrderedDict[str, tuple[float, Account | None]] = OrderedDict()
        self._domains: OrderedDict[str, tuple[float, bool]] = OrderedDict()
        self._again_at = float("-inf")  # before that nobody asks
        self.trouble = ""  # why the directory did not answer when it was asked last; "" if it did

    def now(self) -> float:
        """The time of the clock that its answers grow old by."""
        return self._clock.monotonic()

    def fresh(self, address: str) -> Account | None:
        """What is known of an address and still believed without asking."""
        cached = self._known.get(address)
        return cached[1] if cached is not None and self._clock.monotonic() - cached[0] < self._ttl_s else None

    async def find(self, address: str) -> Account | None:
        """As the directory. That an address is unknown is said only by a directory that answers (P12)."""
        account, stale = await self.look(address)
        if account is None and stale:
            raise DirectoryTrouble(self.trouble)
        return account

    async def look(self, address: str, until: float = inf) -> tuple[Account | None, bool]:
        """The account, and whether that is a stale answer, which None may be too: it may have been added meanwhile.

        After `until` (of the clock) nothing is asked any more.

        Raises DirectoryTrouble where not even a stale one is known, RowTrouble.
        """
        now = self._clock.monotonic()
        cached = self._known.get(address)
        if cached is not None and now - cached[0] < self._ttl_s:
            return cached[1], False
        try:
            account = await self._asked(self._found(address), now, until)
        except RowTrouble:
            raise  # the directory is there: what this row said before may be wrong by now
        except DirectoryTrouble:
            if cached is not None and now - cached[0] < self._stale_s:
                self._counters.add("directory.stale")
                return cached[1], True
            raise
        self._note(address, now, account)
        return account, False

    def _note(self, address: str, now: float, account: Account | None) -> None:
        self._known[address] = (now, account)
        self._known.move_to_end(address)
        if len(self._known) > limits.DIRECTORY_CACHE_MAX:
            self._known.popitem(last=False)

    async def ask_again(self, wait_s: float) -> None:
        """Asks a directory that did not answer when it was asked last, for `trouble` to be what it is like now."""
        if self.trouble:
            with contextlib.suppress(DirectoryTrouble, TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._asked(self._backend.find(_NOBODY), self._clock.monotonic(), inf)

    async def _asked(self, question: Coroutine[Any, Any, T], now: float, until: float) -> T:
        """The answer of the backend, within the limit. While it is away one asks now and then, and nobody else waits (P14)."""
        if now < self._again_at or now > until:
            question.close()
            raise DirectoryTrouble(self.trouble or "the directory is slow")
        if self.trouble:
            self._again_at = now + limits.DIRECTORY_AWAY_S
        try:
            async with asyncio.timeout(limits.DIRECTORY_WAIT_S):
                answer = await question
        except RowTrouble:
            self.trouble = ""  # it is there
            raise
        except DirectoryTrouble as error:
            self._away(str(error))
            raise
        except TimeoutError as error:
            self._away(f"the directory did not answer within {limits.DIRECTORY_WAIT_S:g} s")
            raise DirectoryTrouble(self.trouble) from error
        self.trouble, self._again_at = "", now
        return answer

    def _away(self, trouble: str) -> None:
        self._counters.add("directory.trouble")
        self.trouble = trouble or "the directory does not answer"
        self._again_at = self._clock.monotonic() + limits.DIRECTORY_AWAY_S

    async def _found(self, address: str) -> Account | None:
        account = None
        for spelling in spellings(address):
            account = account or await self._row(spelling)
        return account

    async def _row(self, address: str) -> Account | None:
        """What the backend has; what it answers beside that is known from now on."""
        if self._ahead is None:
            return await self._backend.find(address)
        now = self._clock.monotonic()
        account, ahead = await self._ahead.find_ahead(address)
        for other, row in ahead.items():
            self._note(other, now, row)
        return account

    async def serves(self, domain: str, stale: bool = False, until: float = inf) -> bool:
        """True if the domain has addresses here; with `stale` an old answer will do; `until` as for `look`. Raises
        DirectoryTrouble.
        """
        now = self._clock.monotonic()
        cached = self._domains.get(domain)
        if cached is not None and now - cached[0] < self._ttl_s:
            return cached[1]
        try:
            served = await self._asked(self._served(domain), now, until)
        except DirectoryTrouble:
            if stale and cached is not None and now - cached[0] < self._stale_s:
                return cached[1]
            raise
        self._domains[domain] = (now, served)
        self._domains.move_to_end(domain)
        if len(self._domains) > limits.DIRECTORY_CACHE_MAX:
            self._domains.popitem(last=False)
        return served

    async def _served(self, domain: str) -> bool:
        served = False
        for spelling in spellings(domain):
            served = served or await self._backend.serves(spelling)
        return served

    def forget(self, address: str) -> None:
        """An address changed: the next look asks the backend."""
        self._known.pop(address, None)
        self._domains.pop(address.rpartition("@")[2], None)

    def clear(self) -> None:
        """Forgets all."""
        self._known.clear()
        self._domains.clear()


def _canonical(sender: str) -> str:
    """The one form of a sender that a row names; "", which nobody is, if it is no address."""
    try:
        return parse_canonical(sender)
    except AddressError:
        return ""


class Resolver:
    """Looks addresses up."""

    def __init__(self, directory: DirectoryCache, delimiter: str, postmaster: str = "") -> None:
        """`postmaster` is who gets the mail for postmaster at a served domain that has none (RFC 5321 §4.5.1)."""
        self.directory = directory
        self._delimiter = delimiter
        self.postmaster = postmaster

    async def account(self, address: Address, stale: bool = False, until: float = inf) -> Account | None:
        """The row that answers for an address. Raises DirectoryTrouble: also where only a stale answer says that there is none,
        unless that will do (`stale`). After `until` (of the clock) nothing is asked any more.
        """
        account, old = await self.directory.look(address.canonical, until)
        if account is None and self._delimiter and self._delimiter in address.local:
            base = address.local.split(self._delimiter, 1)[0]
            if base:
                account, older = await self.directory.look(Address(base, address.domain).canonical, until)
                old = old or older
        if account is None and address.domain:
            domain = address.canonical_domain
            account, older = await self.directory.look(f"*@{domain}", until)
            old = old or older
            if account is None and self.postmaster and address.local.lower() == "postmaster":
                if await self.directory.serves(domain, until=until):
                    account, older = await self.directory.look(self.postmaster, until)
                    old = old or older
        if account is None and old and not stale:
            raise DirectoryTrouble(self.directory.trouble or "the directory is away")
        return account

    async def may_send_as(self, account: Account, address: Address) -> bool:
        """True if the address leads to the account, or its row allows it. Raises DirectoryTrouble."""
        owner = await self.account(address)
        if owner is not None and owner.id == account.id:
            return True
        row = await self.directory.find(account.address)
        allowed = {address.canonical, f"*@{address.canonical_domain}"}
        return row is not None and any(_canonical(sender) in allowed for sender in row.send_as)

    async def login(self, name: str) -> Account | None:
        """The row a login name means: the address, `user%domain`, or a catch-all (as `*@domain`, `domain`, any address).

        Raises DirectoryTrouble.
        """
        text = name  # blanks are part of an identity (RFC 4616 §2)
        if "@" not in text and "%" in text:
            text = "@".join(text.rsplit("%", 1))
        if "@" not in text:
            text = f"*@{text}"
        if text.startswith("*@"):
            return await self.directory.find(f"*@{canonical_domain(text[2:])}")
        try:
            address = parse(text)
        except AddressError:
            return None
        exact = await self.directory.find(address.canonical)
        return exact if exact is not None else await self.directory.find(f"*@{address.canonical_domain}")

    async def resolve(self, address: Address) -> Resolution:
        """Everything an address leads to. Raises DirectoryTrouble, within `DIRECTORY_RESOLVE_S` at the latest."""
        known = self.directory.fresh(address.canonical)
        if known is not None and known.enabled and not known.forward:
            return Resolution((known,), ())
        # Each question ends within its own limit, so who asks none after this has an answer within that of all.
        until = self.directory.now() + limits.DIRECTORY_RESOLVE_S - limits.DIRECTORY_WAIT_S
        account = await self.account(address, until=until)
        if account is None or not account.enabled:
            return Resolution((), ())
        if not account.forward:
            return Resolution((account,), ())
        hosted: dict[str, Account] = {}
        remote: dict[str, Account] = {}
        seen = {account.id}
        looped = False
        front = [account]
        for _ in range(limits.ALIAS_DEPTH_MAX):
            following: list[Account] = []
            for current in front:
                if current.hosted:
                    hosted[current.id] = current
                for destination in current.forward:
                    looped = await self._follow(destination, current, seen, following, remote, until) or looped
            if not following:
                loop = looped and not hosted and not remote
                return Resolution(tuple(hosted.values()), tuple(remote.items()), loop)
            front = following
        return Resolution(tuple(hosted.values()), tuple(remote.items()), loop=True)

    async def _follow(
        self,
        destination: str,
        owner: Account,
        seen: set[str],
        following: list[Account],
        remote: dict[str, Account],
        until: float,
    ) -> bool:
        """Takes one destination; True if it was met before. One of ours that is gone is nobody: never sent on (P12)."""
        try:
            address = parse(destination)
        except AddressError:
            return False  # refused again at use: the row was written around our checks (F01)
        account = await self.account(address, True, until)  # what was elsewhere an hour ago: if not, it comes back by its MX
        if account is None:
            if not await self.directory.serves(address.canonical_domain, True, until):
                remote.setdefault(address.text, owner)
        elif account.id in seen:
            return True
        elif account.enabled:
            seen.add(account.id)
            following.append(account)
        return False
