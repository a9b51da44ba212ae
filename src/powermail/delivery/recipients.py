"""Owns the recipients of one transaction: accepted paths, their targets, quota, one copy per mailbox.

Quota rule (the original's "message to everybody always arrives"): a message to several is accepted for all if it fits one
of them; `strict` refuses each full mailbox by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powermail.base.errors import DirectoryTrouble, IndexTrouble
from powermail.directory.contract import Account
from powermail.directory.resolve import Resolver
from powermail.mail import status as st
from powermail.mail.address import Address
from powermail.mail.envelope import Target
from powermail.mail.status import Status

Usage = Callable[[str], Awaitable[int]]


class Recipients:
    """Collects recipients; the order of acceptance is kept, for LMTP's replies."""

    def __init__(self, resolver: Resolver, usage: Usage, strict: bool, size: int) -> None:
        self.accepted: list[str] = []
        self._resolver = resolver
        self._usage = usage
        self._strict = strict
        self._size = size
        self._mailboxes: dict[str, Target] = {}
        self._remote: dict[str, tuple[Target, Account | None]] = {}
        self._room = False
        self._full: list[Account] = []

    def __len__(self) -> int:
        return len(self.accepted)

    async def add(self, address: Address, notify: str, orcpt: str, relay: Account | None) -> Status:
        """Resolves and takes one recipient; the reply to RCPT. `relay` is the account that may send anywhere."""
        try:
            found = await self._resolver.resolve(address)
            if found.loop:
                return st.ALIAS_LOOP
            if not found.known:
                if not address.domain or await self._resolver.directory.serves(address.domain):
                    return st.UNKNOWN_RECIPIENT  # never sent on: it would come back to us (P12)
                if relay is None:
                    return st.RELAY_DENIED
                target = Target(destination=address.text, recipient=address.text, notify=notify, orcpt=orcpt)
                self._remote.setdefault(address.canonical, (target, None))
                self.accepted.append(address.text)
                return st.RECIPIENT_OK
            full = await self._full_of(found.hosted)
        except DirectoryTrouble as error:
            return st.DIRECTORY_TROUBLE.because(error)
        except IndexTrouble:
            full = []  # the index is away: known recipients are still accepted (P14)
        if full and not found.remote and len(full) == len(found.hosted) and self._strict:
            return st.MAILBOX_FULL
        self._room = self._room or len(full) < len(found.hosted) or bool(found.remote)
        if full and not self._room and not self.accepted:
            self._full += full
            return st.MAILBOX_FULL
        for account in found.hosted:
            self._mailboxes.setdefault(account.id, Target(account=account.id, recipient=address.text))
        for destination, owner in found.remote:
            target = Target(destination=destination, recipient=address.text, notify=notify, orcpt=orcpt)
            self._remote.setdefault(destination.lower(), (target, owner))
        self.accepted.append(address.text)
        return st.RECIPIENT_OK

    async def _full_of(self, accounts: tuple[Account, ...]) -> list[Account]:
        full = []
        for account in accounts:
            if account.quota_octets and await self._usage(account.id) + max(1, self._size) > account.quota_octets:
                full.append(account)
        return full

    async def add_return(self, address: Address) -> Status:
        """Takes the address a bounce goes to: a mailbox of ours, or wherever the message came from."""
        status = await self.add(address, "", "", None)
        if status is not st.RELAY_DENIED:
            return status
        self._remote.setdefault(address.canonical, (Target(destination=address.text, recipient=address.text), None))
        self.accepted.append(address.text)
        return st.RECIPIENT_OK

    @property
    def remote_count(self) -> int:
        """How many destinations elsewhere."""
        return len(self._remote)

    def domains(self) -> list[str]:
        """Domains of the destinations elsewhere."""
        return [target.destination.rpartition("@")[2] for target, _ in self._remote.values()]

    def targets(self, reverse_path: str, rewrite: Callable[[str], str]) -> list[Target]:
        """The targets of the commit record; forwards get a rewritten reverse-path, submitted mail keeps its own."""
        found = list(self._mailboxes.values())
        for target, owner in self._remote.values():
            sender = reverse_path if owner is None else rewrite(reverse_path)
            found.append(
                Target(
                    destination=target.destination,
                    reverse_path=sender,
                    recipient=target.recipient,
                    notify=target.notify,
                    orcpt=target.orcpt,
                )
            )
        return found
