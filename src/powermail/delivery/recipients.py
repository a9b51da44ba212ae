"""Owns the recipients of one transaction: accepted paths, their targets, quota, one copy per mailbox.

Quota rule (the original's "message to everybody always arrives"): a message is accepted for all if it fits one of them, in
whatever order they were named; so that is decided when all are, and by what the message really has. `strict` refuses a full
mailbox by itself, and a message that does not fit all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

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


class Recipients:
    """Collects recipients; the order of acceptance is kept, for LMTP's replies."""

    def __init__(self, resolver: Resolver, usage: Usage, strict: bool, size: int) -> None:
        self.accepted: list[str] = []
        self._resolver = resolver
        self._usage = usage
        self._strict = strict
        self._size = size
        self._mailboxes: dict[str, Target] = {}
        self._remote: dict[str, tuple[Target, bool]] = {}  # and whether it is forwarded: it leaves with another sender
        self.success: list[tuple[str, str]] = []  # recipients here, and their ORCPT, of whose delivery the sender wants to hear
        self._limited: dict[str, Account] = {}  # those with a quota
        self._boundless = False  # somebody has none

    def __len__(self) -> int:
        return len(self.accepted)

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
                target = Target(destination=address.text, recipient=address.text, notify=notify, orcpt=orcpt)
                self._remote.setdefault(_one_form(address), (target, False))
                self.accepted.append(address.text)
                self._boundless = True
                return st.RECIPIENT_OK
            limited = [account for account in found.hosted if account.quota_octets]
            strict = self._strict and not found.remote and len(limited) == len(found.hosted)
            if strict and all([await self._is_full(account, self._size) for account in limited]):
                return st.MAILBOX_FULL
        except DirectoryTrouble as error:
            return st.DIRECTORY_TROUBLE.because(error)
        self._limited.update((account.id, account) for account in limited)
        self._boundless = self._boundless or len(limited) < len(found.hosted) or bool(found.remote)
        for account in found.hosted:
            self._mailboxes.setdefault(account.id, Target(account=account.id, recipient=address.text))
        if notify and found.hosted and asks(notify, Action.DELIVERED):
            self.success.append((address.text, orcpt))
        for destination, _ in found.remote:
            target = Target(destination=destination, recipient=address.text, notify=notify, orcpt=orcpt)
            self._remote.setdefault(_one_form(parse(destination)), (target, True))
        self.accepted.append(address.text)
        return st.RECIPIENT_OK

    async def _is_full(self, account: Account, octets: int) -> bool:
        try:
            return await self._usage(account.id) + max(1, octets) > account.quota_octets
        except IndexTrouble:
            return False  # the index is away: known recipients are still accepted (P14)

    async def refusal(self, octets: int) -> Status | None:
        """Why a message of so many octets is not taken, if it is not."""
        if not self._limited or (self._boundless and not self._strict):
            return None
        full = [await self._is_full(account, octets) for account in self._limited.values()]
        return st.MAILBOX_FULL if (any(full) if self._strict else all(full)) else None

    async def add_return(self, address: Address, forwarded: bool = False) -> Status:
        """Takes the address a bounce goes to: a mailbox of ours, or wherever the message came from. `forwarded`: what comes
        back is no bounce and has a sender of its own, who is rewritten like that of any forward.
        """
        status = await self.add(address, "", "", None)
        if status is not st.RELAY_DENIED:
            return status
        self._remote.setdefault(_one_form(address), (Target(destination=address.text, recipient=address.text), forwarded))
        self.accepted.append(address.text)
        self._boundless = True
        return st.RECIPIENT_OK

    def domains(self) -> list[str]:
        """Domains of the destinations elsewhere."""
        return [target.destination.rpartition("@")[2] for target, _ in self._remote.values()]

    def targets(self, reverse_path: str, rewrite: Callable[[str], Rewritten]) -> list[Target]:
        """The targets of the commit record; forwards get a rewritten reverse-path, submitted mail keeps its own."""
        found = list(self._mailboxes.values())
        for target, forwarded in self._remote.values():
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
