"""Owns purges that were ordered and are not due yet: until then each can be undone, and nothing of the mail is touched.

They stand in one small file of the data directory; if it is lost, nothing is purged (P9). An orphan whose account is known
again when the day comes is kept. An account that goes on loses what it had when the purge was ordered, not what came since.
Danger: processes of one machine share the file. One that remembered what it read would purge what was undone elsewhere, so
nobody does, and it is changed under a lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

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
from powermail.keeper.leases import seen

_PAGE = 1000
_LOOK_S = 60.0
_TRIES = 100  # while another process changes the file, which takes it milliseconds
_TURN_S = 0.02


class Plan(Struct, frozen=True):
    """When it was ordered and when it is due, in UTC; `orphan`: nobody owned the mail then."""

    ordered_at: float
    due_at: float
    orphan: bool


class Purges:
    """Plans by account id."""

    def __init__(
        self, world: World, cluster: Cluster, index: Index, directory: Writable, path: str, keeps: bool = True
    ) -> None:
        """`keeps`: nodes take notes of this process; of a front end of other machines they do not."""
        self._keeps = keeps
        self._world = world
        self._cluster = cluster
        self._index = index
        self._directory = directory
        self._path = path
        self._lane = world.lane("purges")

    def close(self) -> None:
        """Ends the lane."""
        self._lane.close()

    def _read(self) -> dict[str, Plan]:
        if not self._world.disk.exists(self._path):
            return {}
        return msgspec.json.decode(self._world.disk.read_file(self._path), type=dict[str, Plan])

    def _replace(self, fresh: Mapping[str, Plan], goes: Callable[[str, Plan], bool]) -> int:
        lock = self._world.disk.lock(f"{self._path}.lock")
        try:
            plans = self._read()
            left = {account: plan for account, plan in plans.items() if not goes(account, plan)}
            if fresh or len(left) < len(plans):
                self._world.disk.replace_file(self._path, msgspec.json.encode({**left, **fresh}))
            return len(plans) - len(left)
        finally:
            lock.release()

    async def plans(self) -> dict[str, Plan]:
        """All that is ordered, in whatever process. Raises Trouble when the file cannot be read: then nothing is purged."""
        try:
            return await self._lane.run(self._read)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> Trouble:
        return Trouble(f"{self._path} cannot be read: {error}; move it away, and nothing is purged until it is ordered again")

    async def _change(self, fresh: Mapping[str, Plan], goes: Callable[[str, Plan], bool]) -> int:
        """Adds to the file as it is now, and takes out of it; how many went. Raises Trouble."""
        for _ in range(_TRIES):
            try:
                return await self._lane.run(self._replace, fresh, goes)
            except BlockingIOError:
                await asyncio.sleep(_TURN_S)  # another process writes it
            except ValueError as error:
                raise self._unreadable(error) from error
            except OSError as error:
                raise Trouble(f"{self._path} cannot be written: {error}") from error
        raise Trouble(f"{self._path} cannot be written: another process holds its lock")

    async def why_not(self, orphan: bool) -> str:
        """Why a purge cannot be done from here, and where it can; "" if it can. Raises Trouble."""
        if self._keeps or not orphan:
            return ""
        keepers = sorted({one.process.machine for one in seen(await self._index.leases()) if one.jobs})
        where = f"{', '.join(keepers)}, which has" if keepers else "a machine that has"
        return (
            "what is left of an account that went is purged by a keeper, because nodes must know of it first, and this machine "
            f"is a front end alone: say it on {where} the role keeper"
        )

    async def order(self, accounts: Sequence[tuple[str, bool]], grace_s: float) -> float:
        """Orders purges of (account, orphan); when they are due. Raises Trouble: then none is ordered."""
        now = self._world.clock.now()
        fresh = {account: Plan(now, now + grace_s, orphan) for account, orphan in accounts}
        await self._change(fresh, lambda account, plan: False)
        return now + grace_s

    async def undo(self, accounts: Collection[str]) -> int:
        """Forgets orders; how many there were. Raises Trouble."""
        return await self._change({}, lambda account, plan: account in accounts)

    async def step(self) -> float:
        """Does what is due. Raises Trouble."""
        now = self._world.clock.now()
        stuck = ""
        for account, plan in (await self.plans()).items():
            if plan.due_at > now:
                continue
            if why := await self.why_not(plan.orphan):  # this machine was a keeper when it was ordered
                stuck = f"the purge of {account} was ordered here: {why}, and here `powermail purge {account} --undo`"
            elif (await self.plans()).get(account) == plan:  # not undone while others were purged
                await self._do(account, plan)
        if stuck:
            raise Trouble(stuck)
        return _LOOK_S

    async def _do(self, account: str, done: Plan) -> None:
        known = account in await self._directory.ids([account])
        if done.orphan and known:
            self._world.log.event(Event.PURGED, account=account, messages=0, kept="its account is known again")
        else:
            messages = await self.run(account, done)
            self._world.log.event(Event.PURGED, account=account, messages=messages)
        await self._change({}, lambda name, plan: name == account and plan == done)  # one that was ordered since stays

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
