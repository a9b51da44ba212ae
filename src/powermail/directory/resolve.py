"""Owns resolution: from a recipient address to mailboxes and destinations elsewhere.

Order: exact, subaddress (`user+tag`), catch-all (`*@domain`). A forward whose destination is ours is resolved inside;
loops are cut, depth is bounded (S27). A bounded cache with negative entries stands in front and serves stale answers
within the bound while the directory is away (P14); unknown then is trouble, never a wrong 5xx (P12).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.counters import Counters
from powermail.base.errors import DirectoryTrouble
from powermail.directory.contract import Account, Directory, RowTrouble
from powermail.mail.address import Address, AddressError, canonical_domain, parse, parse_canonical, spellings


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
        self._clock = clock
        self._counters = counters
        self._ttl_s = ttl_s
        self._stale_s = stale_s
        self._known: OrderedDict[str, tuple[float, Account | None]] = OrderedDict()
        self._domains: OrderedDict[str, tuple[float, bool]] = OrderedDict()
        self.away = False

    async def find(self, address: str) -> Account | None:
        now = self._clock.monotonic()
        cached = self._known.get(address)
        if cached is not None and now - cached[0] < self._ttl_s:
            return cached[1]
        try:
            account = await self._ask(address)
        except RowTrouble:
            raise  # the directory is there: what this row said before may be wrong by now
        except DirectoryTrouble:
            self.away = True
            # Only what is known to exist is served stale: an unknown address may have been added meanwhile.
            if cached is not None and cached[1] is not None and now - cached[0] < self._stale_s:
                self._counters.add("directory.stale")
                return cached[1]
            raise
        self.away = False
        self._known[address] = (now, account)
        self._known.move_to_end(address)
        if len(self._known) > limits.DIRECTORY_CACHE_MAX:
            self._known.popitem(last=False)
        return account

    async def _ask(self, address: str) -> Account | None:
        account = None
        for spelling in spellings(address):
            account = account or await self._backend.find(spelling)
        return account

    async def serves(self, domain: str) -> bool:
        """True if the domain has addresses here. Raises DirectoryTrouble."""
        now = self._clock.monotonic()
        cached = self._domains.get(domain)
        if cached is not None and now - cached[0] < self._ttl_s:
            return cached[1]
        served = False
        for spelling in spellings(domain):
            served = served or await self._backend.serves(spelling)
        self._domains[domain] = (now, served)
        self._domains.move_to_end(domain)
        if len(self._domains) > limits.DIRECTORY_CACHE_MAX:
            self._domains.popitem(last=False)
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

    async def account(self, address: Address) -> Account | None:
        """The row that answers for an address. Raises DirectoryTrouble."""
        account = await self.directory.find(address.canonical)
        if account is None and self._delimiter and self._delimiter in address.local:
            base = address.local.split(self._delimiter, 1)[0]
            if base:
                account = await self.directory.find(Address(base, address.domain).canonical)
        if account is None and address.domain:
            domain = address.canonical_domain
            account = await self.directory.find(f"*@{domain}")
            if account is None and self.postmaster and address.local.lower() == "postmaster":
                account = await self.directory.find(self.postmaster) if await self.directory.serves(domain) else None
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
        """Everything an address leads to. Raises DirectoryTrouble."""
        account = await self.account(address)
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
                    looped = await self._follow(destination, current, seen, following, remote) or looped
            if not following:
                loop = looped and not hosted and not remote
                return Resolution(tuple(hosted.values()), tuple(remote.items()), loop)
            front = following
        return Resolution(tuple(hosted.values()), tuple(remote.items()), loop=True)

    async def _follow(
        self, destination: str, owner: Account, seen: set[str], following: list[Account], remote: dict[str, Account]
    ) -> bool:
        """Takes one destination; True if it was met before. One of ours that is gone is nobody: never sent on (P12)."""
        try:
            address = parse(destination)
        except AddressError:
            return False  # refused again at use: the row was written around our checks (F01)
        account = await self.account(address)
        if account is None:
            if not await self.directory.serves(address.canonical_domain):
                remote.setdefault(address.text, owner)
        elif account.id in seen:
            return True
        elif account.enabled:
            seen.add(account.id)
            following.append(account)
        return False
