"""Owns the clients of a torture: senders over SMTP, readers over POP3 and an observer of the index, all told to the checker.

A sender sends each message once, whatever comes of it. Half of them prefer each front end, and take the other one while theirs
cannot be reached, as senders do with two addresses of a mail exchanger.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from powermail.torture.checker import Checker, Outcome
from powermail.torture.line import Line, Lost

_STORED = re.compile(rb"Stored as ([0-9a-f]{32})")
_AROUND_S = 5.0  # how long a sender leaves a front end alone that it could not reach
_FAILED_S = 0.2  # pause after a refusal, and when nobody can be reached
_SMALL = (300, 1500, 1500, 4000, 4000, 12_000)
_LARGE = 400_000  # octets, of one in `_LARGE_EVERY`: it is streamed
_LARGE_EVERY = 200
_PER_CONNECTION = 20
_KEPT_SHARE = 4  # from one mailbox in so many nobody deletes
_READ_AGAIN = 5.0  # about so many messages of a listing that were read before


class Door(NamedTuple):
    """Where a front end is."""

    name: str
    host: str
    smtp: int
    pop: int


class Gap:
    """The longest time without an acknowledged message."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.at = 0.0  # when it began
        self._since = -1.0

    def begin(self, at: float) -> None:
        """From now on it counts."""
        self._since = at

    def acked(self, at: float) -> None:
        """A message was acknowledged, or the time is over."""
        if self._since >= 0.0:
            if at - self._since > self.longest_s:
                self.longest_s, self.at = at - self._since, self._since
            self._since = at

    def end(self, at: float) -> None:
        """It does not count any more."""
        self.acked(at)
        self._since = -1.0


class Counts:
    """How much was done."""

    def __init__(self) -> None:
        self.acked = self.refused = self.unknown = self.unsent = 0
        self.listings = self.retrieved = self.deleted = self.looks = 0
        self.refusals: dict[str, Refusals] = {}


class Refusals:
    """How often a front end refused mail in the same words, and when."""

    def __init__(self, at: float) -> None:
        self.count = 0
        self.first_at = self.last_at = at

    def again(self, at: float) -> None:
        """Once more."""
        self.count += 1
        self.last_at = at


class Fleet:
    """All clients. `mark` names this run in its messages."""

    def __init__(
        self, doors: Sequence[Door], accounts: Sequence[str], password: str, checker: Checker, seed: int, rate: float
    ) -> None:
        """`rate`: messages a second, of all senders together, as far as they are taken."""
        self.counts = Counts()
        self.gap = Gap()
        self.gaps = {door.name: Gap() for door in doors}
        self.stopping = False
        self._doors = list(doors)
        self._accounts = list(accounts)
        self._password = password
        self._checker = checker
        self._chance = random.Random(f"fleet {seed}")
        self._mark = b"X-Torture: %d-%08x-" % (seed, self._chance.randrange(2**32))
        self._rate = rate
        self._around: dict[str, float] = {}
        self._last = 0

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- senders ------------------------------------------------------------------------------------------------------

    async def sender(self, place: int, of: int) -> None:
        """Sends until told to stop; the `place`-th of `of`."""
        while not self.stopping:
            door = self._door(place)
            try:
                await self._connection(door, of)
            except Lost:
                self._around[door.name] = self._now() + _AROUND_S
                await asyncio.sleep(_FAILED_S * self._chance.random())

    def _door(self, place: int) -> Door:
        mine = self._doors[place % len(self._doors)]
        others = [door for door in self._doors if self._around.get(door.name, 0.0) < self._now()]
        return mine if mine in others or not others else self._chance.choice(others)

    async def _connection(self, door: Door, of: int) -> None:
        """Some messages over one connection. Raises Lost."""
        line = await Line.open(door.host, door.smtp)
        try:
            await line.reply()
            await line.ask(b"EHLO torture.example")
            for _ in range(_PER_CONNECTION):
                if self._told():
                    break
                if not await self._send(line, door, self._accounts):
                    await asyncio.sleep(_FAILED_S)
                await asyncio.sleep(self._chance.expovariate(self._rate / of))
            line.send(b"QUIT\r\n")
        finally:
            await line.close()

    async def fill(self, place: int, count: int) -> None:
        """Sends so many before there are faults, as fast as they are taken, to mailboxes from which nobody deletes."""
        door = self._doors[place % len(self._doors)]
        line = await Line.open(door.host, door.smtp)
        try:
            await line.reply()
            await line.ask(b"EHLO torture.example")
            for _ in range(count):
                await self._send(line, door, [name for name in self._accounts if not self.deletes(name)])
        finally:
            await line.close()

    def _compose(self, accounts: Sequence[str]) -> tuple[int, list[str], bytes]:
        """The next message: its number, its mailboxes, its octets."""
        chance, number = self._chance, self._last + 1
        self._last = number
        size = _LARGE if number % _LARGE_EVERY == 0 else chance.choice(_SMALL)
        lines = [b"%016x" % chance.getrandbits(64) * 4 for _ in range(size // 66 + 1)]
        if number % 7 == 0:
            lines.append(b".a line that is stuffed")
        octets = b"%s%d\r\nSubject: torture\r\n\r\n%s\r\n" % (self._mark, number, b"\r\n".join(lines))
        return number, chance.sample(accounts, chance.choice((1, 1, 1, 1, 2, 3))), octets

    async def _send(self, line: Line, door: Door, accounts: Sequence[str]) -> bool:
        """One message to some of these; False if it was refused. Raises Lost when the connection is gone."""
        number, mailboxes, octets = self._compose(accounts)
        self._checker.sending(number, mailboxes, hashlib.sha256(octets).digest())
        whole = False
        try:
            for command in (b"MAIL FROM:<sender@elsewhere.example>", *(b"RCPT TO:<%s>" % name.encode() for name in mailboxes)):
                if not (reply := await line.ask(command)).startswith(b"250"):
                    return await self._refused(line, door, number, reply)
            if not (reply := await line.ask(b"DATA")).startswith(b"354"):
                return await self._refused(line, door, number, reply)
            whole = True  # some of it may be there from now on
            line.send(octets.replace(b"\r\n.", b"\r\n..") + b".\r\n")
            reply = await line.reply()
        except Lost:
            self.counts.unknown += whole
            self.counts.unsent += not whole
            self._checker.sent(number, Outcome.UNKNOWN if whole else Outcome.REFUSED, self._now())
            raise
        if not reply.startswith(b"250"):
            return await self._refused(line, door, number, reply)
        stored = _STORED.search(reply)
        now = self._now()
        if stored is None:
            self._checker.refused_for_good(number, f"a 250 without its key: {reply.decode('ascii', 'replace')}")
            self._checker.sent(number, Outcome.UNKNOWN, now)
            return True
        self.counts.acked += 1
        self._checker.sent(number, Outcome.ACKED, now, stored[1].decode())
        self.gap.acked(now)
        self.gaps[door.name].acked(now)
        return True

    async def _refused(self, line: Line, door: Door, number: int, reply: bytes) -> bool:
        self.counts.refused += 1
        words = f"{door.name}: {reply.decode('ascii', 'replace')}"
        self.counts.refusals.setdefault(words, Refusals(self._now())).again(self._now())
        self._checker.sent(number, Outcome.REFUSED, self._now())
        if reply.startswith(b"5"):
            self._checker.refused_for_good(number, reply.decode("ascii", "replace"))
        if reply.startswith(b"421"):
            raise Lost(reply.decode("ascii", "replace"))
        await line.ask(b"RSET")
        return False

    # -- readers ------------------------------------------------------------------------------------------------------

    def deletes(self, account: str) -> bool:
        """False for mailboxes that are only read."""
        return self._accounts.index(account) % _KEPT_SHARE != 0

    def _told(self) -> bool:
        """True once it was told to stop, which may be while it works."""
        return self.stopping

    async def reader(self, place: int, of: int) -> None:
        """Reads its share of the mailboxes in turn until told to stop, and deletes now and then."""
        mine = self._accounts[place::of]
        while not self.stopping:
            for account in mine:
                if self._told():
                    break
                try:
                    await self.read(self._chance.choice(self._doors), account, self.deletes(account))
                except Lost:
                    await asyncio.sleep(_FAILED_S)
                await asyncio.sleep(self._chance.expovariate(10.0))

    async def read(self, door: Door, account: str, delete: bool, all_of_it: bool = False) -> list[str] | None:
        """One session: the keys that it lists, or None if the mailbox could not be opened, or not all be read. Raises Lost."""
        began = self._now()
        line = await Line.open(door.host, door.pop, tls=True)
        try:
            await line.until(b"\r\n")
            await line.command(b"USER " + account.encode())
            if not (await line.command(b"PASS " + self._password.encode())).startswith(b"+OK"):
                return None
            listing = await line.listing(b"UIDL")
            if listing is None:
                return None
            keys = [row.split()[1].decode() for row in listing.splitlines()]
            self.counts.listings += 1
            self._checker.listed(account, began, self._now(), keys)
            whole = True
            for place, key in enumerate(keys, 1):
                if all_of_it or not self._checker.is_known(account, key) or self._chance.random() * len(keys) < _READ_AGAIN:
                    whole = await self._retrieve(line, account, place, key) and whole
            if delete and self._chance.random() < 0.5:
                await self._delete(line, account, keys)
            else:
                line.send(b"QUIT\r\n")
            return keys if whole or not all_of_it else None
        finally:
            await line.close()

    async def _retrieve(self, line: Line, account: str, place: int, key: str) -> bool:
        octets = await line.listing(b"RETR %d" % place)
        if octets is None:
            return False  # it cannot be read now: that is said, not hidden
        self.counts.retrieved += 1
        at = octets.find(self._mark)
        number = int(octets[at + len(self._mark) :].partition(b"\r\n")[0]) if at >= 0 else -1
        self._checker.read(account, key, number, hashlib.sha256(octets[at:]).digest())
        return True

    async def _delete(self, line: Line, account: str, keys: Sequence[str]) -> None:
        gone = [key for key in keys if self._checker.is_known(account, key) and self._chance.random() < 0.7]
        taken, places = [], {key: place for place, key in enumerate(keys, 1)}
        for key in gone:
            if (await line.command(b"DELE %d" % places[key])).startswith(b"+OK"):
                taken.append(key)
        self._checker.deleting(account, taken)
        if (await line.command(b"QUIT")).startswith(b"+OK"):
            self._checker.deleted(account, taken, self._now())
            self.counts.deleted += len(taken)

    # -- the observer -------------------------------------------------------------------------------------------------

    async def observer(self, look: Callable[[str], Awaitable[list[tuple[int, str]] | None]]) -> None:
        """Looks at each mailbox in turn as the index shows it."""
        while not self.stopping:
            for account in self._accounts:
                if self._told():
                    break
                pairs = await look(account)
                if pairs is not None:
                    self.counts.looks += 1
                    self._checker.numbered(account, pairs)
                await asyncio.sleep(_FAILED_S)
