"""Owns sessions with next hops: so many at once for each, kept a while for the next message, never one that is not clean.

A message waits for its turn at its own hop only. At one hop no domain has all connections, so that mail which a hop
takes slowly holds up no other.
"""

from __future__ import annotations

import asyncio
from collections import deque

from powermail.base import limits
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.mail.dsn import printable
from powermail.outbound.client import Hop, HopTrouble, TlsTrouble
from powermail.outbound.routing import Route


class NoTurn(Exception):
    """All connections are in use, for longer than is waited: not the message's fault, and no attempt."""


class _Slots:
    """So many at once, in the order in which they came."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.users = 0  # who has one, or waits
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Takes one when there is one."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()  # it was given just when nobody wanted it any more
            raise

    def release(self) -> None:
        """Gives one to who waits longest."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self.free += 1


class _Desk:
    """What is kept of one route."""

    def __init__(self, connections: int) -> None:
        self.slots = _Slots(connections)
        self.idle: list[tuple[float, Hop]] = []  # since when
        self.plain_until = 0.0  # it broke its own PIPELINING
        self.trouble = ""  # why the last connection did not come about


class Pool:
    """Sessions of all routes."""

    def __init__(self, world: World, tasks: Tasks, hostname: str, connections: int) -> None:
        self._world = world
        self._tasks = tasks
        self._hostname = hostname
        self._connections = connections
        self._of_domain = max(1, connections - connections // 4)
        self._desks: dict[Route, _Desk] = {}
        self._domains: dict[tuple[Route, str], _Slots] = {}
        self._open: dict[Hop, None] = {}
        self._lane: Lane | None = None
        self._ticking = False

    def _desk(self, route: Route) -> _Desk:
        desk = self._desks.get(route)
        if desk is None:
            desk = self._desks[route] = _Desk(self._connections)
        return desk

    # -- turns ----------------------------------------------------------------------------------------------------

    async def begin(self, route: Route, domain: str) -> None:
        """Takes one of the connections to a route; `end` gives it back. Raises NoTurn after `QUEUE_SLOT_WAIT_S`."""
        mine = self._domains.get((route, domain))
        if mine is None:
            mine = self._domains[route, domain] = _Slots(self._of_domain)
        ours = self._desk(route).slots
        mine.users += 1
        held: list[_Slots] = []
        try:
            if mine.free and ours.free:
                mine.free, ours.free = mine.free - 1, ours.free - 1
                return
            async with asyncio.timeout(limits.QUEUE_SLOT_WAIT_S):
                for slots in (mine, ours):
                    if slots.free:
                        slots.free -= 1
                    else:
                        await slots.wait()
                    held.append(slots)
        except BaseException as error:
            for slots in held:
                slots.release()
            self._leave(route, domain, mine)
            if isinstance(error, TimeoutError):
                raise NoTurn from error
            raise

    def end(self, route: Route, domain: str) -> None:
        """Gives the connection to who waits longest."""
        mine = self._domains[route, domain]
        self._desk(route).slots.release()
        mine.release()
        self._leave(route, domain, mine)

    def _leave(self, route: Route, domain: str, mine: _Slots) -> None:
        mine.users -= 1
        if not mine.users:
            del self._domains[route, domain]

    # -- sessions -------------------------------------------------------------------------------------------------

    async def take(self, route: Route, fresh: bool = False) -> Hop:
        """A session that can begin a transaction; a fresh one if asked for. Raises HopTrouble."""
        desk = self._desk(route)
        while desk.idle and not fresh:
            _, hop = desk.idle.pop()  # the one that waited least
            if hop.machine.clean:
                hop.pipeline = self._pipelines(desk)
                return hop
            self._drop(hop)
        try:
            hop = await self._opened(route, desk)
        except HopTrouble as error:
            desk.trouble = printable(str(error))
            raise HopTrouble(f"{route.name}: {error}") from error
        desk.trouble = ""
        return hop

    async def _opened(self, route: Route, desk: _Desk) -> Hop:
        try:
            return await self._open_one(route, desk, in_clear=False)
        except TlsTrouble as error:
            if route.tls != "opportunistic":
                raise
            self._world.counters.add("outbound.in_clear")
            self._world.log.event(Event.IN_CLEAR, host=route.name, reason=printable(str(error)))
        return await self._open_one(route, desk, in_clear=True)

    async def _open_one(self, route: Route, desk: _Desk, in_clear: bool) -> Hop:
        if self._lane is None:
            self._lane = self._world.lane("outbound")
        hop = Hop(self._world, route, self._hostname, self._lane, self._pipelines(desk))
        self._open[hop] = None
        self._tick()
        try:
            await hop.open(in_clear)
        except BaseException:
            self._drop(hop)
            raise
        return hop

    def _pipelines(self, desk: _Desk) -> bool:
        return desk.plain_until <= self._world.clock.monotonic()

    def give(self, hop: Hop) -> None:
        """Back from a transaction."""
        desk = self._desk(hop.route)
        if hop.broke_pipelining:
            desk.plain_until = self._world.clock.monotonic() + limits.SMTP_CLIENT_PLAIN_S
        if hop.machine.clean:
            desk.idle.append((self._world.clock.monotonic(), hop))
        else:
            self._drop(hop)

    def _drop(self, hop: Hop) -> None:
        hop.abort()
        self._open.pop(hop, None)

    def committed(self) -> list[asyncio.Task[object]]:
        """Who waits for the outcome of a message that was sent whole."""
        return [hop.committed for hop in self._open if hop.committed is not None and not hop.machine.clean]

    def troubles(self) -> list[str]:
        """Why hops cannot be reached, for the status."""
        return [f"outbound: {route.name}: {desk.trouble}" for route, desk in self._desks.items() if desk.trouble]

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Looks once a second at all deadlines, as long as a session is open."""
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(1.0, self._look)

    def _look(self) -> None:
        now = self._world.clock.monotonic()
        for hop in list(self._open):
            if hop.deadline <= now:
                hop.expire()
        for desk in self._desks.values():
            kept = []
            for since, hop in desk.idle:
                if not hop.machine.clean:
                    self._drop(hop)
                elif now - since > limits.SMTP_CLIENT_IDLE_S:
                    self._tasks.start(self._goodbye(hop), "goodbye")
                else:
                    kept.append((since, hop))
            desk.idle = kept
        self._ticking = False
        if self._open:
            self._tick()

    async def _goodbye(self, hop: Hop) -> None:
        await hop.quit()
        self._drop(hop)

    async def close(self) -> None:
        """Says goodbye to idle sessions, closes all."""
        idle = [hop for desk in self._desks.values() for _, hop in desk.idle]
        for desk in self._desks.values():
            desk.idle.clear()
        try:
            async with asyncio.timeout(limits.SMTP_CLIENT_PROOF_S):
                await asyncio.gather(*(hop.quit() for hop in idle))
        except TimeoutError:
            pass  # who does not answer that is not waited for
        self.abandon()
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def abandon(self) -> None:
        """Closes all at once."""
        for hop in list(self._open):
            self._drop(hop)
