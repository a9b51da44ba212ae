"""Owns the recipients of one transaction: accepted paths, their targets, quota, one copy per mailbox.

Quota rule (the original's "message to everybody always arrives"): a message is accepted for all if it fits one of them, in
whatever order they were named; so that is decided when all are, and by what the message really has. `strict` refuses a full
mailbox by itself, and a message that does not fit all. Where each recipient has a reply of its own (LMTP, RFC 2033 §4.2) each
is judged by itself, by the same rule for the mailboxes that it leads to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

from powermail.base.errors import DirectoryTrouble, IndexTrouble
from powermail.delivery.srs import Rewritten
from powermail.directory.contract import Account
from powermail.directory.resolve import Resolver
from powermail.mail import status as st
from powermail.mail.address import Address, parse
from powermail.mail.dsn import Action, asks
from powermail.mail.envelope import Target
from powermail.mail.status import Status

Usage = Callable[[str], Awaitable[int]]


def _one_form(address: Address) -> str:
    """What tells destinations elsewhere apart: the local part's case is theirs to judge (RFC 5321 §2.4)."""
    return f"{address.local}@{address.canonical_domain}"


class Accepted(NamedTuple):
    """A recipient that was taken, and where it leads."""

    name: str
    hosted: tuple[Account, ...] = ()
    remote: tuple[tuple[str, Target, bool], ...] = ()  # where elsewhere, and whether it is forwarded: with another sender
    success: str | None = None  # its ORCPT, if the sender wants to hear of the delivery here

    @property
    def boundless(self) -> bool:
        """True if what it leads to is not all bound by quotas."""
        return bool(self.remote) or not all(account.quota_octets for account in self.hosted)


class Recipients:
    """Collects recipients; the order of acceptance is kept, for LMTP's replies."""

    def __init__(self, resolver: Resolver, usage: Usage, strict: bool, size: int) -> None:
        self.names: list[str] = []  # the recipients as they were named
        self._accepted: list[Accepted] = []
        self._boundless = False  # one of them leads to what is not all bound by quotas
        self._elsewhere: dict[str, tuple[Target, bool]] = {}  # destinations elsewhere, each once; whether it is forwarded there
        self._resolver = resolver
        self._usage = usage
        self._strict = strict
        self._size = size

    def __len__(self) -> int:
        return len(self._accepted)

    @property
    def success(self) -> list[tuple[str, str]]:
        """Recipients here, and their ORCPT, of whose delivery the sender wants to hear."""
        return [(each.name, each.success) for each in self._accepted if each.success is not None]

    async def add(self, address: Address, notify: str, orcpt: str, relay: Account | None) -> Status:
        """Resolves and takes one recipient; the reply to RCPT. `relay` is the account that may send anywhere."""
        try:
            found = await self._resolver.resolve(address)
            if found.loop:
                return st.ALIAS_LOOP
            if not found.known:
                if not address.domain or await self._resolver.directory.serves(address.canonical_domain):
                    return st.UNKNOWN_RECIPIENT  # never sent on: it would come back to us (P12)
                if relay is None:
                    return st.RELAY_DENIED
                self._take_remote(Target(destination=address.text, recipient=address.text, notify=notify, orcpt=orcpt), False)
                return st.RECIPIENT_OK
            limited = [account for account in found.hosted if account.quota_octets]
            strict = self._strict and not found.remote and len(limited) == len(found.hosted)
            if strict and all([await self._is_full(account, self._size) for account in limited]):
                return st.MAILBOX_FULL
        except DirectoryTrouble as error:
            return st.DIRECTORY_TROUBLE.because(error)
        remote = []
        for destination, _ in found.remote:
            target = Target(destination=destination, recipient=address.text, notify=notify, orcpt=orcpt)
            remote.append((_one_form(parse(destination)), target, True))
        success = orcpt if notify and found.hosted and asks(notify, Action.DELIVERED) else None
        self._take(Accepted(address.text, found.hosted, tuple(remote), success))
        return st.RECIPIENT_OK

    def _take(self, accepted: Accepted) -> None:
        self.names.append(accepted.name)
        self._accepted.append(accepted)
        self._boundless = self._boundless or accepted.boundless
        for where, target, forwarded in accepted.remote:
            self._elsewhere.setdefault(where, (target, forwarded))

    def _take_remote(self, target: Target, forwarded: bool) -> None:
        where = _one_form(parse(target.destination))
        self._take(Accepted(target.recipient, (), ((where, target, forwarded),)))

    async def _is_full(self, account: Account, octets: int) -> bool:
        try:
            return await self._usage(account.id) + max(1, octets) > account.quota_octets
        except IndexTrouble:
            return False  # the index is away: known recipients are still accepted (P14)

    async def _full(self, octets: int) -> set[str]:
        """The ids of accounts that a message of so many octets does not fit."""
        limited = {account.id: account for each in self._accepted for account in each.hosted if account.quota_octets}
        return {account.id for account in limited.values() if await self._is_full(account, octets)}

    def _fits(self, accepted: Collection[Accepted], full: set[str]) -> bool:
        fit = [account.id not in full for each in accepted for account in each.hosted]
        fit += [True for each in accepted if each.remote]
        return all(fit) if self._strict else any(fit)

    async def refusal(self, octets: int) -> Status | None:
        """Why a message of so many octets is not taken, if it is not."""
        if self._boundless and not self._strict:
            return None
        full = await self._full(octets)
        return None if self._fits(self._accepted, full) else st.MAILBOX_FULL

    async def refusals(self, octets: int) -> list[Status | None]:
        """The same for each recipient by itself, in the order of acceptance."""
        full = await self._full(octets)
        return [None if self._fits([each], full) else st.MAILBOX_FULL for each in self._accepted]

    def keep(self, which: Collection[bool]) -> None:
        """Gives up the others."""
        kept = [each for each, wanted in zip(self._accepted, which, strict=True) if wanted]
        self.names, self._accepted, self._boundless, self._elsewhere = [], [], False, {}
        for each in kept:
            self._take(each)

    async def add_return(self, address: Address, forwarded: bool = False) -> Status:
        """Takes the address a bounce goes to: a mailbox of ours, or wherever the message came from. `forwarded`: what comes
        back is no bounce and has a sender of its own, who is rewritten like that of any forward.
        """
        status = await self.add(address, "", "", None)
        if status is not st.RELAY_DENIED:
            return status
        self._take_remote(Target(destination=address.text, recipient=address.text), forwarded)
        return st.RECIPIENT_OK

    def domains(self) -> list[str]:
        """Domains of the destinations elsewhere."""
        return [target.destination.rpartition("@")[2] for target, _ in self._elsewhere.values()]

    def targets(self, reverse_path: str, rewrite: Callable[[str], Rewritten]) -> list[Target]:
        """The targets of the commit record; forwards get a rewritten reverse-path, submitted mail keeps its own."""
        mailboxes: dict[str, Target] = {}
        for each in self._accepted:
            for account in each.hosted:
                if account.id not in mailboxes:
                    mailboxes[account.id] = Target(account=account.id, recipient=each.name)
        found = list(mailboxes.values())
        for target, forwarded in self._elsewhere.values():
            sender, original = rewrite(reverse_path) if forwarded else (reverse_path, "")
            found.append(
                Target(
                    destination=target.destination,
                    reverse_path=sender,
                    recipient=target.recipient,
                    notify=target.notify,
                    orcpt=target.orcpt,
                    original=original,
                )
            )
        return found
