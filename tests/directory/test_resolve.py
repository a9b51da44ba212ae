"""Resolution has a limit of its own, however many look-ups an address takes."""

from __future__ import annotations

import pytest

from powermail.base import limits
from powermail.base.counters import Counters
from powermail.base.errors import DirectoryTrouble
from powermail.directory.contract import Account
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.mail.address import parse


class Slow:
    """A directory that takes its time, and a clock that shows it."""

    def __init__(self, each_s: float) -> None:
        self.each_s = each_s
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    async def find(self, address: str) -> Account | None:
        self.time += self.each_s
        if address == "list@example.org":
            return Account("1", address, forward=tuple(f"u{number}@example.org" for number in range(50)))
        return Account(address, address) if address.startswith("u") else None

    async def serves(self, domain: str) -> bool:
        self.time += self.each_s
        return True


@pytest.mark.parametrize("address", ["list@example.org", "x+y@example.org", "postmaster@example.org"])
async def test_an_address_is_answered_within_its_limit(address: str) -> None:
    slow = Slow(limits.DIRECTORY_WAIT_S - 0.1)
    resolver = Resolver(DirectoryCache(slow, slow, Counters(), 600.0, 600.0), "+", "u0@example.org")
    with pytest.raises(DirectoryTrouble):
        await resolver.resolve(parse(address))
    assert slow.time <= limits.DIRECTORY_RESOLVE_S
    slow.each_s = 0.01
    assert (await resolver.resolve(parse("list@example.org"))).known, "later all the same, with what is known by then"


async def test_a_mailbox_that_is_known_is_not_asked_for() -> None:
    slow = Slow(1.0)
    resolver = Resolver(DirectoryCache(slow, slow, Counters(), 600.0, 600.0), "+")
    first = await resolver.resolve(parse("u1@example.org"))
    assert first == await resolver.resolve(parse("u1@example.org")) and slow.time == 1.0
