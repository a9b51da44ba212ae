"""Owns the contract of a directory backend and the account it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Account(NamedTuple):
    """One row: a mailbox, a forward, or both. `id` is never used again, so a new owner never sees old mail (X11)."""

    id: str
    address: str
    password: str = ""
    quota_octets: int = 0  # 0 is unlimited
    forward: tuple[str, ...] = ()
    keep_copy: bool = False
    enabled: bool = True
    send_per_hour: int = 0  # 0 is the configured default

    @property
    def hosted(self) -> bool:
        """True if mail is kept here."""
        return not self.forward or self.keep_copy


class Directory(Protocol):
    """A backend. `address` is canonical: lower case, or `*@domain`."""

    async def find(self, address: str) -> Account | None:
        """The row of exactly this address. Raises DirectoryTrouble when it cannot be asked."""

    async def serves(self, domain: str) -> bool:
        """True if some address of this domain exists: its unknown users get another answer than strangers' mail (P12)."""


class Writable(Directory, Protocol):
    """A backend that the command line may change."""

    async def add(self, accounts: Sequence[Account]) -> int:
        """Adds rows in one transaction. Raises OperatorError if an address exists or is malformed."""

    async def update(self, account: Account) -> bool:
        """Replaces all but the id of a row; False if it does not exist."""

    async def remove(self, address: str) -> Account | None:
        """Removes a row and returns it."""

    async def all(self, after: str, limit: int) -> list[Account]:
        """Rows in order of address."""

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        """id to address, of those that exist."""
