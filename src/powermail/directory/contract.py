"""Owns the contract of a directory backend and the account it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from powermail.base.errors import DirectoryTrouble


class RowTrouble(DirectoryTrouble):
    """This one row cannot be read as what it should be: a 451 for its address; every other row is served."""


class Doubt(Struct):
    """A row that cannot be used, or only in part: which, and what is wrong with it."""

    address: str
    problem: str


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
    send_as: tuple[str, ...] = ()  # other senders it may use: addresses, or *@domain

    @property
    def hosted(self) -> bool:
        """True if mail is kept here."""
        return not self.forward or self.keep_copy


class Directory(Protocol):
    """A backend. `address` is canonical: lower case, or `*@domain`."""

    async def find(self, address: str) -> Account | None:
        """The row of exactly this address.

        Raises DirectoryTrouble when it cannot be asked, RowTrouble when the row is not what a row must be.
        """

    async def serves(self, domain: str) -> bool:
        """True if some address of this domain exists: its unknown users get another answer than strangers' mail (P12)."""


@runtime_checkable
class Ahead(Protocol):
    """A directory whose one question answers for more than one address."""

    async def find_ahead(self, address: str) -> tuple[Account | None, dict[str, Account | None]]:
        """As `Directory.find`, and the rows of other canonical addresses, None where there is none, that a look-up of this one
        asks for next: where a forward leads to.
        """


class Writable(Directory, Protocol):
    """A backend that the command line may change."""

    async def add(self, accounts: Sequence[Account]) -> int:
        """Adds rows in one transaction. Raises OperatorError if an address exists or is malformed."""

    async def put(self, new: Sequence[Account], known: Sequence[Account]) -> None:
        """Adds the new and replaces all but the id of the known, in one transaction. Raises as `add`.

        What is new gets an id that nobody had; only who moves a directory gives one.
        """

    def check(self, account: Account) -> Account:
        """The row as it may be stored. Raises OperatorError for what is no address, or no number that may be."""

    async def update(self, account: Account) -> bool:
        """Replaces all but the id of a row; False if it does not exist."""

    async def remove(self, address: str) -> Account | None:
        """Removes a row and returns it."""

    async def all(self, after: str, limit: int) -> list[Account]:
        """Rows in order of address, without those that cannot be read. Empty only at the end."""

    async def among(self, addresses: Sequence[str]) -> dict[str, Account]:
        """The rows of these canonical addresses, by them; those without one are left out. Raises RowTrouble."""

    async def doubts(self) -> tuple[int, list[Doubt]]:
        """How many rows there are, and those that cannot be used, or only in part."""

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        """id to address, of those that exist."""


class Backend(Writable, Protocol):
    """What a process opens: a directory with its file or its connections.

    One that cannot be changed from here (`foreign`) raises OperatorError from everything that would.
    """

    async def open(self, make: bool = True) -> None:
        """Opens it and looks whether it can be used. A server that is away keeps nobody from starting.

        With `make`, a file of our own that is missing is made; nothing else is ever made here. Raises OperatorError.
        """

    async def close(self) -> None:
        """Closes it."""

    def abandon(self) -> None:
        """Lets go of it as it is: the process was killed (simulator)."""
