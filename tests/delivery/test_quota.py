"""Quotas: exact, whatever the order of recipients, and by what a message really has."""

from __future__ import annotations

from itertools import permutations

import pytest

from powermail.base.clock import Clock
from powermail.base.counters import Counters
from powermail.base.errors import IndexTrouble
from powermail.delivery.recipients import Recipients
from powermail.delivery.srs import Rewritten
from powermail.directory.contract import Account
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.mail import status as st
from powermail.mail.address import parse

ACCOUNTS = {
    account.address: account
    for account in (
        Account("1", "full@here.example", quota_octets=100),
        Account("2", "small@here.example", quota_octets=1000),
        Account("3", "free@here.example"),
        Account("4", "on@here.example", forward=("x@there.example",)),
        Account("5", "both@here.example", quota_octets=100, forward=("x@there.example",), keep_copy=True),
        Account("6", "group@here.example", forward=("full@here.example", "small@here.example")),
        Account("7", "sender@here.example"),
    )
}


class Still(Clock):
    """Time stands."""

    def monotonic(self) -> float:
        return 0.0

    def now(self) -> float:
        return 0.0


class Table:
    """A directory of those above."""

    async def find(self, address: str) -> Account | None:
        return ACCOUNTS.get(address)

    async def serves(self, domain: str) -> bool:
        return domain == "here.example"


async def used(account: str) -> int:
    """Each mailbox holds 90 octets."""
    return 90


async def silent(account: str) -> int:
    """The index does not answer."""
    raise IndexTrouble("away")


async def recipients_of(names: tuple[str, ...], strict: bool = False) -> Recipients:
    """Those, taken."""
    resolver = Resolver(DirectoryCache(Table(), Still(), Counters(), 30.0, 30.0), "+")
    recipients = Recipients(resolver, used, strict, 0)
    for name in names:
        address = parse(name if "@" in name else f"{name}@here.example")
        assert (await recipients.add(address, "", "", ACCOUNTS["sender@here.example"])).positive
    return recipients


@pytest.mark.parametrize(
    ("names", "octets", "kept", "kept_strictly"),
    [
        (("full", "small", "free"), 10, "111", "111"),
        (("full", "small", "free"), 11, "011", "011"),
        (("full", "small", "free"), 911, "001", "001"),
        (("full", "full+x", "small"), 11, "001", "001"),
        (("full", "on", "far@there.example"), 10**9, "011", "011"),
        (("both", "full"), 10**9, "10", "00"),
        (("group", "full"), 11, "10", "00"),
        (("group", "free"), 911, "01", "01"),
    ],
)
async def test_with_replies_of_their_own_each_recipient_is_judged_by_itself(
    names: tuple[str, ...], octets: int, kept: str, kept_strictly: str
) -> None:
    """RFC 2033 §4.2, whatever the order; who is given up gets nothing, unless another one leads there."""
    wanted = dict(zip(names, zip(kept, kept_strictly, strict=True), strict=True))
    for order in permutations(names):
        for strict in (False, True):
            recipients = await recipients_of(order, strict)
            refusals = await recipients.refusals(octets)
            assert [refusal is None for refusal in refusals] == [wanted[name][strict] == "1" for name in order], (order, strict)
            recipients.keep([refusal is None for refusal in refusals])
            alone = await recipients_of(tuple(name for name in order if wanted[name][strict] == "1"), strict)
            assert recipients.names == alone.names
            assert recipients.targets("a@b.cc", lambda path: Rewritten(path, "")) == alone.targets(
                "a@b.cc", lambda path: Rewritten(path, "")
            )


async def taken(names: tuple[str, ...], octets: int, strict: bool = False, usage: object = used) -> bool:
    """Whether a message of so many octets to those is stored."""
    resolver = Resolver(DirectoryCache(Table(), Still(), Counters(), 30.0, 30.0), "+")
    recipients = Recipients(resolver, usage, strict, 0)  # type: ignore[arg-type]
    for name in names:
        address = parse(name if "@" in name else f"{name}@here.example")
        status = await recipients.add(address, "", "", ACCOUNTS["sender@here.example"])
        if not status.positive:
            assert status is st.MAILBOX_FULL
            return False
    return await recipients.refusal(octets) is None


@pytest.mark.parametrize(
    ("names", "octets", "kept", "kept_strictly"),
    [
        (("full",), 10, True, True),
        (("full",), 11, False, False),
        (("full", "small"), 910, True, False),
        (("full", "small"), 911, False, False),
        (("full", "small"), 10, True, True),
        (("full", "free"), 10**9, True, False),
        (("full", "on"), 10**9, True, False),
        (("full", "far@there.example"), 10**9, True, False),
        (("both",), 10**9, True, False),
        (("group",), 910, True, False),
        (("group",), 911, False, False),
        (("free", "on"), 10**9, True, True),
    ],
)
async def test_a_message_is_kept_if_it_fits_one_and_strictly_if_it_fits_all(
    names: tuple[str, ...], octets: int, kept: bool, kept_strictly: bool
) -> None:
    for order in permutations(names):
        assert await taken(order, octets) is kept, order
        assert await taken(order, octets, strict=True) is kept_strictly, order


async def test_who_cannot_be_counted_now_is_not_refused() -> None:
    assert await taken(("full",), 10**9, usage=silent)
    assert await taken(("full",), 10**9, strict=True, usage=silent)
