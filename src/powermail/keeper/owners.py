"""Owns whose an account id is: the index remembers the address each belonged to, and what the directory says now is compared.

A directory restored from a backup, or written by hand, may give an id, and with it the mail, to somebody else. Who asks the
directory through `Owners` gets trouble for such a row: mail for it is a 451 and nobody logs in, until the operator says whose
it is. An id that was never seen is believed and noted, at rest and in bounded transactions, so that no delivery waits for it;
an index that does not answer keeps nobody from receiving (P14).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.directory.contract import Account, Ahead, Directory, RowTrouble
from powermail.index.contract import Index
from powermail.mail.address import one_form

_NOTED_AT_ONCE = 1000
_SHOWN_MAX = 3


class Owners:
    """A directory whose rows own what they say they own. Implements `directory.contract.Directory` and `Ahead`."""

    def __init__(self, world: World, directory: Directory, index: Index) -> None:
        self._world = world
        self._directory = directory
        self._ahead = directory if isinstance(directory, Ahead) else None
        self._index = index
        self._known: dict[str, str] = {}  # compared in this process
        self._fresh: dict[str, str] = {}  # never seen before; to be noted
        self._wrong: dict[str, tuple[str, str]] = {}  # id: (whose it was, who has it now)

    async def find(self, address: str) -> Account | None:
        """As the directory. Raises RowTrouble for a row whose id belonged to another address."""
        account, _ = await self._owning(await self._directory.find(address), {})
        return account

    async def find_ahead(self, address: str) -> tuple[Account | None, dict[str, Account | None]]:
        """As the directory, if that looks ahead. Raises as `find`; what else it found is left out where that would."""
        if self._ahead is None:
            return await self.find(address), {}
        return await self._owning(*await self._ahead.find_ahead(address))

    async def _owning(
        self, account: Account | None, ahead: dict[str, Account | None]
    ) -> tuple[Account | None, dict[str, Account | None]]:
        """These, if they own what they say they own: all that are not known yet by one question to the index."""
        rows = [row for row in (account, *ahead.values()) if row is not None and not self._knows(row)]
        if not rows:
            return account, ahead
        try:
            async with asyncio.timeout(limits.DIRECTORY_OWNERS_S):
                wrong = dict(await self.mismatches(rows))
        except (IndexTrouble, TimeoutError):
            return account, ahead
        if account is not None and account in wrong:
            raise RowTrouble(f"directory, row {account.address}: id {account.id} belonged to {wrong[account]}")
        return account, {address: row for address, row in ahead.items() if row is None or row not in wrong}

    def _knows(self, account: Account) -> bool:
        return self._known.get(account.id) == one_form(account.address)

    async def serves(self, domain: str) -> bool:
        """As the directory."""
        return await self._directory.serves(domain)

    async def mismatches(self, accounts: Sequence[Account]) -> list[tuple[Account, str]]:
        """Those whose id belonged to another address, with that; the others are known from now on. Raises IndexTrouble."""
        owners = await self._index.owners([account.id for account in accounts])
        wrong = []
        for account in accounts:
            address = one_form(account.address)
            was = owners.get(account.id, self._fresh.get(account.id, ""))
            if was and one_form(was) != address:
                wrong.append((account, was))
                if self._wrong.get(account.id) != (was, address):
                    self._wrong[account.id] = (was, address)
                    self._world.log.event(Event.TROUBLE, account=account.id, address=address, belonged_to=was)
                continue
            self._wrong.pop(account.id, None)
            if not was:
                self._fresh[account.id] = address
            if len(self._known) >= limits.OWNERS_KNOWN_MAX:
                self._known.clear()
            self._known[account.id] = address
        return wrong

    def forget(self, account: str) -> None:
        """The operator said whose it is: it is compared anew."""
        self._known.pop(account, None)
        self._fresh.pop(account, None)
        self._wrong.pop(account, None)

    def alarms(self) -> list[str]:
        """What makes the installation degraded."""
        if not self._wrong:
            return []
        shown = [f"{address} has the id {account} of {was}" for account, (was, address) in self._wrong.items()]
        more = f" and {len(shown) - _SHOWN_MAX} more" if len(shown) > _SHOWN_MAX else ""
        return [f"mail is refused: {'; '.join(shown[:_SHOWN_MAX])}{more}: see `powermail directory check`"]

    async def step(self) -> float:
        """Notes what was seen for the first time. Raises IndexTrouble."""
        while self._fresh:
            part = dict(list(self._fresh.items())[:_NOTED_AT_ONCE])
            await self._index.note_owners(part)
            for account, address in part.items():
                if self._fresh.get(account) == address:
                    del self._fresh[account]
        return 1.0
