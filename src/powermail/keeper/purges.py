"""Owns purges that were ordered and are not due yet: until then each can be undone, and nothing of the mail is touched.

They stand in one small file of the data directory; if it is lost, nothing is purged (P9). An orphan whose account is known
again when the day comes is kept. An account that goes on loses what it had when the purge was ordered, not what came since.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.directory.contract import Writable
from powermail.index.contract import Index
from powermail.keeper.checkpoint import write_purged

_PAGE = 1000
_LOOK_S = 60.0


class Plan(Struct, frozen=True):
    """When it was ordered and when it is due, in UTC; `orphan`: nobody owned the mail then."""

    ordered_at: float
    due_at: float
    orphan: bool


class Purges:
    """Plans by account id."""

    def __init__(self, world: World, cluster: Cluster, index: Index, directory: Writable, path: str) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._directory = directory
        self._path = path
        self._lane = world.lane("purges")
        self._plans: dict[str, Plan] | None = None

    def close(self) -> None:
        """Ends the lane."""
        self._lane.close()

    def _read(self) -> dict[str, Plan]:
        if not self._world.disk.exists(self._path):
            return {}
        return msgspec.json.decode(self._world.disk.read_file(self._path), type=dict[str, Plan])

    async def plans(self) -> dict[str, Plan]:
        """All that is ordered. Raises Trouble when the file cannot be read: then nothing is purged."""
        if self._plans is None:
            try:
                self._plans = await self._lane.run(self._read)
            except (OSError, msgspec.DecodeError) as error:
                raise Trouble(
                    f"{self._path} cannot be read: {error}; move it away, and nothing is purged until it is ordered again"
                ) from error
        return self._plans

    async def _write(self, plans: dict[str, Plan]) -> None:
        try:
            await self._lane.run(self._world.disk.replace_file, self._path, msgspec.json.encode(plans))
        except OSError as error:
            raise Trouble(f"{self._path} cannot be written: {error}") from error
        self._plans = plans

    async def order(self, accounts: Sequence[tuple[str, bool]], grace_s: float) -> float:
        """Orders purges of (account, orphan); when they are due. Raises Trouble: then none is ordered."""
        now = self._world.clock.now()
        fresh = {account: Plan(now, now + grace_s, orphan) for account, orphan in accounts}
        await self._write({**await self.plans(), **fresh})
        return now + grace_s

    async def undo(self, accounts: Sequence[str]) -> int:
        """Forgets orders; how many there were. Raises Trouble."""
        plans = await self.plans()
        left = {account: plan for account, plan in plans.items() if account not in accounts}
        if len(left) < len(plans):
            await self._write(left)
        return len(plans) - len(left)

    async def step(self) -> float:
        """Does what is due. Raises Trouble."""
        now = self._world.clock.now()
        for account, plan in list((await self.plans()).items()):
            if plan.due_at > now:
                continue
            known = account in await self._directory.ids([account])
            if plan.orphan and known:
                self._world.log.event(Event.PURGED, account=account, messages=0, kept="its account is known again")
            else:
                messages = await self.run(account, plan)
                self._world.log.event(Event.PURGED, account=account, messages=messages)
            await self.undo([account])
        return _LOOK_S

    async def run(self, account: str, plan: Plan) -> int:
        """Purges now; how many messages left mailboxes. Repeating it goes on where it ended. Raises Trouble."""
        if not plan.orphan:
            return await self._expunge(account, plan.ordered_at)
        await write_purged(self._world, self._cluster, self._index, account)  # law 13: durable before a row goes
        await self._index.note_purged(account)
        return (await self._index.purge(account)).removed

    async def _expunge(self, account: str, until: float) -> int:
        """Expunges all that an account which goes on had received by then."""
        removed, after = 0, 0
        while page := await self._index.mailboxes(after, _PAGE):
            after = page[-1].id
            for found in page:
                uid = 0
                while found.account == account and (
                    entries := await self._index.entries(found.id, uid, found.uid_next, limits.INDEX_PAGE_ROWS)
                ):
                    uid = entries[-1].uid
                    old = [entry.uid for entry in entries if entry.received_at <= until]
                    removed += (await self._index.expunge(found.id, old)).removed if old else 0
        return removed
