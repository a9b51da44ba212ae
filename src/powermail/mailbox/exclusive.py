"""Owns that a maildrop is one session's at a time, whatever process serves it (RFC 1939 §3: an exclusive-access lock).

Within a process memory decides. Across processes the index does: a maildrop is a lease, renewed while its session goes on, and
free MAILDROP_LEASE_S after its process died. Whoever was held up for longer finds at UPDATE that the maildrop is another's,
and deletes nothing.
"""

from __future__ import annotations

import asyncio

from powermail.base import limits
from powermail.base.clock import Clock
from powermail.base.errors import IndexTrouble, Trouble
from powermail.base.tasks import Tasks
from powermail.index.contract import Index


def _job(account: str) -> str:
    return f"maildrop {account}"


class Exclusive:
    """The maildrops that this process has among several."""

    def __init__(self, index: Index, clock: Clock, tasks: Tasks, owner: str) -> None:
        """`tasks` own what gives maildrops back."""
        self._index = index
        self._clock = clock
        self._tasks = tasks
        self._owner = owner
        self._held: dict[str, float] = {}  # account: when it was leased last, by our monotonic clock
        self._giving: dict[str, asyncio.Task[None]] = {}

    async def take(self, account: str) -> bool:
        """False if a session of another process has it. Raises IndexTrouble."""
        await self.given(account)  # that what gives it back does not give this session's back
        now = self._clock.monotonic()
        if not await self._index.lease(_job(account), self._owner, limits.MAILDROP_LEASE_S):
            return False
        self._held[account] = now
        return True

    async def keep(self, account: str) -> None:
        """Before something is deleted. Raises IndexTrouble, also if the maildrop is another's by now."""
        if not await self.take(account):
            self._held.pop(account, None)
            raise IndexTrouble("the maildrop was taken by another session meanwhile")

    def give(self, account: str) -> None:
        """The session is over."""
        if self._held.pop(account, None) is not None:
            self._giving[account] = self._tasks.start(self._release(account), "maildrop-release")

    async def given(self, account: str) -> None:
        """Waits until a maildrop that was given back can be had by others, or is free by time."""
        if account in self._giving:
            await asyncio.wait([self._giving[account]])

    async def _release(self, account: str) -> None:
        try:
            await self._index.release(_job(account), self._owner)
        except Trouble:
            return  # free by time
        finally:
            del self._giving[account]

    async def step(self) -> float:
        """A worker's: renews what long sessions have. Raises IndexTrouble."""
        third = limits.MAILDROP_LEASE_S / 3
        for account, since in list(self._held.items()):
            if self._clock.monotonic() - since >= third and account in self._held:
                try:
                    await self.keep(account)
                except IndexTrouble:
                    if account in self._held:
                        raise
        return third / 4
