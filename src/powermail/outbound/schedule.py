"""Owns the queue's way out: what is due is leased all the time, and each message is on its own from then.

Nothing here waits for a hop. A row is in hand from its lease until the index knows what became of it, and is never taken up
twice meanwhile. A lease that somebody else has, or that may be over because it could not be renewed, ends the work on its rows,
unless the message was sent whole: then only the hop knows whether it took it. So two processes that live send no message
twice, but for one that was stopped between its last look and the end of a message. A message whose work fails in a way nobody
thought of is written down, tried again later, and ends no worker.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial

from powermail.base import limits
from powermail.base.errors import InvariantBroken, Trouble
from powermail.base.log import Event
from powermail.base.settings import OutboundSettings
from powermail.base.tasks import Tasks, report_bug
from powermail.base.world import World
from powermail.index.contract import Attempt, Index, QueueRow
from powermail.message.opener import Opener
from powermail.outbound.bounce import Bouncer
from powermail.outbound.dispatch import Dispatcher
from powermail.outbound.pool import Pool
from powermail.outbound.routing import Route, Router
from powermail.outbound.settle import Settler
from powermail.outbound.verdict import all_later

NO_ROUTE = "no route to other hosts is configured (outbound.smarthost)"
_FORGET_EVERY_S = 3600.0


class Outbound:
    """Sends what is due. `step` is a worker's."""

    def __init__(
        self,
        world: World,
        index: Index,
        opener: Opener,
        bouncer: Bouncer,
        settings: OutboundSettings,
        hostname: str,
        router: Router,
        tasks: Tasks,
    ) -> None:
        """`tasks` owns what is on its way; nobody else's tasks may be in it."""
        self.router = router
        self._world = world
        self._index = index
        self._opener = opener
        self._settings = settings
        self._tasks = tasks
        self._owner = world.entropy.octets(8).hex()
        self._pool = Pool(world, tasks, hostname, settings.concurrency)
        self._settler = Settler(world, index, self._owner, bouncer, settings, tasks)
        self._dispatcher = Dispatcher(world, opener, self._pool, self._settler, settings)
        self._most = settings.concurrency * limits.QUEUE_IN_HAND_FACTOR
        self._at_once = max(1, self._most // 4)  # not all, so that no domain fills all hands
        self._in_hand: dict[int, str] = {}  # row: its domain
        self._held: dict[int, float] = {}  # row: until when it is leased, by our monotonic clock and at the least
        self._works: dict[asyncio.Task[object], list[QueueRow]] = {}
        self._freed = asyncio.Event()
        self._stopping = False
        self._next_renewal = self._next_forgetting = 0.0

    # -- the worker -----------------------------------------------------------------------------------------------

    async def step(self) -> float:
        """Leases what is due and starts it. Raises IndexTrouble."""
        if self._stopping:
            return 1.0
        self._let_go_of_overdue()
        await self._housekeeping()
        if self._most - len(self._in_hand) < self._at_once:  # a lease is a transaction: not one for each row
            self._freed.clear()
            try:
                async with asyncio.timeout(limits.QUEUE_GATHER_S):
                    await self._freed.wait()
            except TimeoutError:
                pass
        room = self._most - len(self._in_hand)
        if room <= 0:
            return 0.0
        now, asked_at = self._world.clock.now(), self._world.clock.monotonic()
        wanted = min(room, self._at_once)
        rows = await self._index.lease_due(self._owner, now, limits.QUEUE_LEASE_S, wanted, self._crowded())
        fresh = [row for row in rows if row.id not in self._in_hand]
        if not fresh:
            return 1.0
        self._held.update((row.id, asked_at + limits.QUEUE_LEASE_S) for row in fresh)
        await self._start(fresh)
        return 0.0

    def _crowded(self) -> list[str]:
        """Domains that have their share of what is in hand."""
        share = max(1, self._most // 2)
        return sorted(domain for domain, count in Counter(self._in_hand.values()).items() if count >= share)

    async def _start(self, rows: list[QueueRow]) -> None:
        groups: dict[tuple[bytes, str, Route | None], list[QueueRow]] = {}
        routes: dict[str, Route | None] = {}
        for row in rows:
            if row.domain not in routes:
                routes[row.domain] = await self.router.route(row.domain)
            groups.setdefault((row.key, row.envelope.reverse_path, routes[row.domain]), []).append(row)
        # By what they are, not by what lies on the disk: compressed, much is small.
        small = {row.key: None for row in rows if row.octets <= limits.READ_SMALL_OCTETS_MAX}
        known = await self._opener.read_small(list(small))
        most = limits.SMTP_CLIENT_RECIPIENTS_MAX
        for (key, _, route), group in groups.items():
            read = known.get(key)
            for start in range(0, len(group), most):
                part = group[start : start + most]
                self._in_hand.update((row.id, row.domain) for row in part)
                task = self._tasks.start(self._one(part, route, read.octets if read is not None else None), "outbound")
                self._works[task] = part
                task.add_done_callback(partial(self._done, part))

    async def _one(self, rows: list[QueueRow], route: Route | None, known: bytes | None) -> None:
        """One message to some recipients by one route, to its end."""
        try:
            if route is None:
                await self._without_route(rows)
            else:
                await self._dispatcher.dispatch(rows, route, known)
        except InvariantBroken:
            raise
        except Exception as error:  # noqa: BLE001  one message's trouble is no other's
            report_bug(self._world.log, error, f"outbound of {rows[0].key.hex()}")
            self._world.counters.add("outbound.bugs")
            await self._settler.give_back(rows, limits.QUEUE_RETRY_FIRST_S)

    def _done(self, rows: list[QueueRow], task: asyncio.Task[object]) -> None:
        self._works.pop(task, None)
        for row in rows:
            self._in_hand.pop(row.id, None)
            self._held.pop(row.id, None)
        if not self._in_hand or self._most - len(self._in_hand) >= self._at_once:
            self._freed.set()

    async def _without_route(self, rows: list[QueueRow]) -> None:
        """Waits, and expires like any (RFC 5321 §4.5.4.1). It is looked at often, so that a route that comes is used soon."""
        attempt = Attempt(self._world.clock.now(), "", "", 0.0, NO_ROUTE)
        verdicts = all_later(len(rows), NO_ROUTE)
        await self._settler.settle(rows, verdicts, attempt, True, wait_s=limits.QUEUE_NO_ROUTE_RETRY_S)

    async def _housekeeping(self) -> None:
        now = self._world.clock.monotonic()
        if now >= self._next_renewal:
            await self._renew(now)
            self._next_renewal = now + limits.QUEUE_LEASE_S / 3
        if now >= self._next_forgetting:
            self._next_forgetting = now + _FORGET_EVERY_S
            await self._index.forget_returns(self._world.clock.now())

    async def _renew(self, asked_at: float) -> None:
        """Of what is in hand every lease is renewed; rows that somebody else has by now are let go of."""
        numbers = list(self._in_hand)
        if not numbers:
            return
        taken = await self._index.renew_leases(self._owner, numbers, limits.QUEUE_LEASE_S)
        until = asked_at + limits.QUEUE_LEASE_S
        self._held.update((number, until) for number in numbers if number in self._held)
        self._let_go(taken)

    def _let_go_of_overdue(self) -> None:
        """What could not be renewed for so long that somebody else may soon have it."""
        soon = self._world.clock.monotonic() + limits.QUEUE_LEASE_MARGIN_S
        self._let_go([number for number, until in self._held.items() if until <= soon])

    def _let_go(self, numbers: Sequence[int]) -> None:
        """Ends the work on these rows, unless its outcome is known here only, or to the hop only."""
        if not numbers:
            return
        lost, known = set(numbers), self._known()
        for task, rows in list(self._works.items()):
            if task not in known and lost.intersection(row.id for row in rows):
                self._world.counters.add("outbound.leases_lost", len(rows))
                task.cancel()

    def _known(self) -> set[asyncio.Task[object] | None]:
        """Tasks whose rows' outcome is known here only, or to the hop only."""
        return {*self._pool.committed(), *self._settler.under_way}

    # -- how it stands --------------------------------------------------------------------------------------------

    def troubles(self) -> list[str]:
        """What makes the status degraded: hops that cannot be reached, an index that does not take what was done."""
        found = self._pool.troubles()
        if self._settler.trouble:
            found.append(f"outbound: what was sent cannot be written down: {self._settler.trouble}")
        return found

    async def idle(self) -> None:
        """Waits until nothing is in hand."""
        while self._in_hand:
            self._freed.clear()
            await self._freed.wait()

    # -- stopping -------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Waits a while for the outcome of what was sent whole, and until that is written down; the rest is given back. Closes
        connections. Idempotent.
        """
        if self._stopping:
            return
        self._stopping = True
        known = self._known()
        for task in list(self._works):
            if task not in known:  # nothing is lost with it
                task.cancel()
        try:
            async with asyncio.timeout(limits.QUEUE_SETTLE_WAIT_S):
                await self.idle()
        except TimeoutError:
            self._world.log.event(Event.TROUBLE, worker="outbound", error=f"{len(self._in_hand)} recipients are cut off")
        await self._tasks.cancel()
        await self._pool.close()
        try:
            await self._index.release_leases(self._owner)
        except Trouble as error:
            self._world.log.event(Event.TROUBLE, error=str(error))
