"""Owns sessions with next hops: so many at once for each, kept a while for the next message, never one that is not clean.

A message waits for its turn at its own hop only. At one hop no domain has all connections, so that mail which a hop
takes slowly holds up no other. Where all connections are in use, the transaction of a message that waits goes behind the octets
of the one before it, and the session is its own when that has its outcome; if that takes long, another session is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from powermail.base import limits
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.mail.dsn import printable
from powermail.outbound.client import Hop, HopTrouble, Lines, TlsTrouble
from powermail.outbound.routing import Route
from powermail.wire.smtp_client import Fault


class NoTurn(Exception):
    """All connections are in use, for longer than is waited: not the message's fault, and no attempt."""


class Turn:
    """A message's turn at a hop: it waits for one, has one, and gives it on.

    `lines` are asked for when it could begin behind another message: they are what it says to that hop, or None if it needs
    more than to say that. `hop` is the session on which it has begun.
    """

    def __init__(self, route: Route, domain: str, since: float, lines: Callable[[Hop], Lines | None]) -> None:
        self.route = route
        self.domain = domain
        self.since = since
        self.lines = lines
        self.hop: Hop | None = None
        self.next: Turn | None = None  # has begun behind this one, on the same session
        self.of_share = False  # it waited for its domain, not for the hop, when it began
        self.given_up = False
        self.granted: asyncio.Future[None] | None = None


def _first(queue: deque[Turn]) -> Turn | None:
    """Who waits longest; who has just gone is still there."""
    return next((turn for turn in queue if turn.granted is not None and not turn.granted.done()), None)


class _Share:
    """What one domain has of a hop's connections."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.users = 0  # who has one, or waits
        self.waiting: deque[Turn] = deque()


class _Desk:
    """What is kept of one route."""

    def __init__(self, connections: int) -> None:
        self.free = connections
        self.waiting: deque[Turn] = deque()  # each has a part of its domain's share
        self.shares: dict[str, _Share] = {}
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
        self._open: dict[Hop, None] = {}
        self._ahead: dict[Hop, tuple[float, Turn]] = {}  # sessions on which another has begun: since when, behind whom
        self._lane: Lane | None = None
        self._ticking = False

    def _desk(self, route: Route) -> _Desk:
        desk = self._desks.get(route)
        if desk is None:
            desk = self._desks[route] = _Desk(self._connections)
        return desk

    # -- turns ----------------------------------------------------------------------------------------------------

    async def begin(self, route: Route, domain: str, lines: Callable[[Hop], Lines | None]) -> Turn:
        """Takes one of the connections to a route; `end` gives it back. Raises NoTurn after `QUEUE_SLOT_WAIT_S`."""
        desk = self._desk(route)
        share = desk.shares.get(domain)
        if share is None:
            share = desk.shares[domain] = _Share(self._of_domain)
        share.users += 1
        turn = Turn(route, domain, self._world.clock.monotonic(), lines)
        if share.free and desk.free:
            share.free, desk.free = share.free - 1, desk.free - 1
            return turn
        turn.granted = asyncio.get_running_loop().create_future()
        if share.free:
            share.free -= 1
            desk.waiting.append(turn)
        else:
            share.waiting.append(turn)
        self._tick()
        try:
            await turn.granted
        except BaseException:
            self._withdraw(desk, share, turn)
            raise
        return turn

    def _withdraw(self, desk: _Desk, share: _Share, turn: Turn) -> None:
        """It waits no more, wherever it did."""
        turn.given_up = True
        if turn in share.waiting:
            share.waiting.remove(turn)
            self._leave(desk, turn, share)
        elif turn in desk.waiting:
            desk.waiting.remove(turn)
            self._free_share(desk, turn)
        elif turn.granted is not None and turn.granted.done() and not turn.granted.cancelled():
            if turn.hop is not None:
                self._drop(turn.hop)
            self.end(turn)  # it was given just when nobody wanted it any more
        # else it has begun behind another, which gives on what is left

    def end(self, turn: Turn) -> None:
        """Gives the connection to who waits longest."""
        desk = self._desk(turn.route)
        if turn.next is None:
            self._free_connection(desk)
            self._free_share(desk, turn)
        elif turn.next.of_share:
            self._leave(desk, turn, desk.shares[turn.domain])
        else:
            self._free_share(desk, turn)

    def _free_connection(self, desk: _Desk) -> None:
        following = _first(desk.waiting)
        if following is not None:
            desk.waiting.remove(following)
            self._grant(following)
        else:
            desk.free += 1

    def _free_share(self, desk: _Desk, turn: Turn) -> None:
        share = desk.shares[turn.domain]
        self._leave(desk, turn, share)
        following = _first(share.waiting)
        if following is None:
            share.free += 1
            return
        share.waiting.remove(following)
        if desk.free:
            desk.free -= 1
            self._grant(following)
        else:
            desk.waiting.append(following)

    @staticmethod
    def _grant(turn: Turn) -> None:
        assert turn.granted is not None
        turn.granted.set_result(None)

    @staticmethod
    def _leave(desk: _Desk, turn: Turn, share: _Share) -> None:
        share.users -= 1
        if not share.users:
            del desk.shares[turn.domain]

    # -- one behind the other -------------------------------------------------------------------------------------

    def following(self, turn: Turn, hop: Hop) -> Lines | None:
        """What is to be said behind a message that is on its way: another one has begun with it. None: nobody can."""
        desk = self._desk(turn.route)
        found = _first(desk.waiting)
        of_share = found is None
        if found is None:
            found = _first(desk.shares[turn.domain].waiting)
        lines = found.lines(hop) if found is not None else None
        if found is not None and lines is not None:
            (desk.shares[turn.domain].waiting if of_share else desk.waiting).remove(found)
            found.of_share = of_share
            turn.next = found
            self._ahead[hop] = self._world.clock.monotonic(), turn
        return lines

    def _pass_on(self, desk: _Desk, hop: Hop) -> bool:
        """The message before has its outcome: whose transaction has begun goes on with it. False: nobody's has."""
        _, turn = self._ahead.pop(hop, (0.0, None))
        if turn is None:
            return False
        following = turn.next
        assert following is not None
        if following.given_up:
            self._forgo(desk, turn, following)
            hop.begun = None
            return False
        # Also if the session has ended: a reply that was read counts, and without one it was stale.
        ours = hop.machine.end is not None and hop.machine.end.fault is Fault.GIVEN_UP
        following.hop = hop if hop.begun is not None and not ours else None
        self._grant(following)
        return following.hop is not None

    def _call_back(self, desk: _Desk, hop: Hop) -> None:
        """The message before takes its time: who has begun behind it is the first to get another session."""
        _, turn = self._ahead.pop(hop)
        following = turn.next
        assert following is not None
        hop.begun = None  # the session ends with what it does now
        if following.given_up:
            self._forgo(desk, turn, following)
            return
        turn.next = None
        share = desk.shares[following.domain]
        if following.of_share and not share.free:
            share.waiting.appendleft(following)
            return
        share.free -= following.of_share
        if desk.free:
            desk.free -= 1
            self._grant(following)
        else:
            desk.waiting.appendleft(following)

    def _forgo(self, desk: _Desk, turn: Turn, following: Turn) -> None:
        """Who had begun behind another has gone."""
        turn.next = None
        if following.of_share:
            self._leave(desk, following, desk.shares[following.domain])
        else:
            self._free_share(desk, following)

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
        if self._pass_on(desk, hop):
            return
        if hop.machine.clean:
            desk.idle.append((self._world.clock.monotonic(), hop))
        else:
            self._drop(hop)

    def _drop(self, hop: Hop) -> None:
        hop.abort()
        self._open.pop(hop, None)

    def committed(self) -> list[asyncio.Task[object]]:
        """Who waits for the outcome of a message that was sent whole, or has just been given it and does not run yet."""
        return [hop.committed for hop in self._open if hop.committed is not None]

    def troubles(self) -> list[str]:
        """Why hops cannot be reached, for the status."""
        return [f"outbound: {route.name}: {desk.trouble}" for route, desk in self._desks.items() if desk.trouble]

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Looks once a second at all deadlines, as long as a session is open or somebody waits for one."""
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(1.0, self._look)

    def _look(self) -> None:
        now = self._world.clock.monotonic()
        for hop in list(self._open):
            if hop.deadline <= now:
                hop.expire()
        for hop in [hop for hop, (since, _) in self._ahead.items() if now - since >= limits.SMTP_CLIENT_AHEAD_S]:
            self._call_back(self._desk(hop.route), hop)
        waiting = False
        for desk in self._desks.values():
            waiting = self._send_away(desk, now - limits.QUEUE_SLOT_WAIT_S) or waiting
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
        if self._open or waiting:
            self._tick()

    @staticmethod
    def _send_away(desk: _Desk, since: float) -> bool:
        """Who has waited too long gets no turn now. True if others wait."""
        waiting = [*desk.waiting, *(turn for share in desk.shares.values() for turn in share.waiting)]
        for turn in waiting:
            if turn.since <= since and turn.granted is not None and not turn.granted.done():
                turn.granted.set_exception(NoTurn())
        return bool(waiting)

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
