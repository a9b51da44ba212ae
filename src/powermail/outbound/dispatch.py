"""Owns one attempt to send one message: a session, the spelling of its envelope, its octets, and a verdict for each recipient.

A session that was kept and has gone stale meanwhile costs nothing: a fresh one is taken at once. Recipients that a hop has no
room for in one transaction (RFC 5321 §4.5.3.1.10) get another one at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.settings import OutboundSettings
from powermail.base.world import World
from powermail.index.contract import Attempt, QueueRow
from powermail.mail.dsn import printable
from powermail.message.opener import Opener
from powermail.outbound.client import Hop, HopTrouble, Lines
from powermail.outbound.forms import Spelt, spell
from powermail.outbound.pool import NoTurn, Pool, Turn
from powermail.outbound.routing import Route
from powermail.outbound.settle import Settler
from powermail.outbound.verdict import Ruling, Transcript, Verdict, all_later, judge, progress


class Body:
    """The octets that leave: without our Return-Path field, which is for final delivery (RFC 5321 §4.4)."""

    def __init__(self, opener: Opener, key: bytes, known: bytes | None) -> None:
        """`known` are all octets of a small message that was read with others."""
        self._opener = opener
        self._key = key
        self._known = _without_return_path(known) if known is not None else None

    @property
    def small(self) -> bool:
        """All of it is here."""
        return self._known is not None

    async def parts(self) -> AsyncIterator[bytes]:
        """In order. Raises Trouble, also in the middle."""
        if self._known is not None:
            yield self._known
            return
        first = True
        async for part in self._opener.read(self._key):
            yield _without_return_path(part) if first else part
            first = False

    async def eight_bit(self) -> bool:
        """True if some octet is beyond ASCII. Raises Trouble."""
        async for part in self.parts():
            if not part.isascii():
                return True
        return False

    async def ready(self) -> None:
        """Opens the message, so that trouble of ours comes before a hop hears of it. Raises Trouble."""
        if self._known is None:
            await self._opener.open(self._key)


def _without_return_path(octets: bytes) -> bytes:
    return octets[octets.index(b"\r\n") + 2 :] if octets.startswith(b"Return-Path:") else octets


class _Work:
    """A message for some recipients. `spelt` is what went ahead of its turn, if it did."""

    def __init__(self, rows: list[QueueRow], body: Body, strict: bool) -> None:
        """`strict`: a hop without 8BITMIME gets no body beyond ASCII."""
        self.rows = rows
        self.body = body
        self.spelt: Spelt | None = None
        self._strict = strict

    def ahead(self, hop: Hop) -> Lines | None:
        """What may be said to a hop before its turn: if all is known that the hop must be told."""
        extensions = hop.machine.extensions
        if not self.body.small or (self._strict and "8BITMIME" not in extensions):
            return None
        spelt = spell(self.rows, extensions)
        if spelt.refused:
            return None
        self.spelt = spelt
        return spelt.lines


class Dispatcher:
    """Makes attempts."""

    def __init__(self, world: World, opener: Opener, pool: Pool, settler: Settler, settings: OutboundSettings) -> None:
        self._world = world
        self._opener = opener
        self._pool = pool
        self._settler = settler
        self._settings = settings

    async def dispatch(self, rows: list[QueueRow], route: Route, known: bytes | None) -> None:
        """One message to some recipients by one route; every row is settled, however it goes."""
        work = _Work(rows, Body(self._opener, rows[0].key, known), self._settings.eight_bit == "bounce")
        try:
            turn = await self._pool.begin(route, rows[0].domain, work.ahead)
        except NoTurn:
            await self._settler.give_back(rows, limits.QUEUE_SLOT_WAIT_S)
            return
        try:
            outcome = await self._attempt(work, turn)
        except BaseException:
            self._settler.under_way.pop(asyncio.current_task(), None)
            raise
        finally:
            self._pool.end(turn)
        for some, verdicts, attempt, notices in outcome:
            await self._settler.settle(some, verdicts, attempt, notices)

    async def _attempt(self, work: _Work, turn: Turn) -> list[tuple[list[QueueRow], list[Verdict], Attempt, bool]]:
        """Transactions until everybody has a verdict: rows, their verdicts, who was spoken to, whether it sends notices."""
        outcome = []
        began = self._world.clock.monotonic()
        left, tls, notices = work.rows, "", False
        begun, turn.hop = turn.hop, None
        while left:
            try:
                if begun is None:
                    await work.body.ready()
                hop = begun or await self._pool.take(turn.route)
                begun = None
                verdicts, hop = await self._send(left, hop, work, turn)
                tls, notices = hop.tls, "DSN" in hop.machine.extensions
            except HopTrouble as error:
                verdicts = all_later(len(left), str(error))
            except Trouble as error:
                verdicts = all_later(len(left), f"storage: {error}")
            now = self._world.clock
            attempt = Attempt(now.now(), turn.route.name, tls, now.monotonic() - began, "")
            full = [verdict.full for verdict in verdicts]
            if not any(full) or not progress(verdicts):
                outcome.append((left, verdicts, attempt, notices))
                break
            done = [(row, verdict) for row, verdict in zip(left, verdicts, strict=True) if not verdict.full]
            outcome.append(([row for row, _ in done], [verdict for _, verdict in done], attempt, notices))
            left = [row for row, again in zip(left, full, strict=True) if again]
            self._settler.under_way[asyncio.current_task()] = None  # what became of the others is not lost by a stop
        return outcome

    async def _send(self, rows: list[QueueRow], hop: Hop, work: _Work, turn: Turn) -> tuple[list[Verdict], Hop]:
        """One transaction, and the session that it was. Raises HopTrouble, Trouble."""
        while True:
            reused = hop.used > 0
            begun = hop.begun is not None and work.spelt is not None and hop.begun is work.spelt.lines
            spelt = work.spelt if begun and work.spelt is not None else spell(rows, hop.machine.extensions)
            try:
                why = await self._eight_bit(hop, work.body)
                if why is not None or not spelt.places:
                    return [spelt.refused.get(place, why or _NOBODY) for place in range(len(rows))], hop
                said = await hop.send(spelt.lines, work.body.parts(), partial(self._pool.following, turn, hop))
            finally:
                self._pool.give(hop)
            if reused and said.stale:
                self._world.counters.add("outbound.stale_sessions")
                hop = await self._pool.take(hop.route, fresh=True)
                continue
            if hop.broke_pipelining and said.late and not said.negative:
                self._world.counters.add("outbound.broken_pipelining")
                hop = await self._pool.take(hop.route, fresh=True)  # which is spoken to line by line
                continue
            return self._judged(rows, spelt, said, hop), hop

    async def _eight_bit(self, hop: Hop, body: Body) -> Verdict | None:
        """RFC 6152 §3: what a hop without 8BITMIME does not get, if the operator wants it so."""
        if self._settings.eight_bit != "bounce" or "8BITMIME" in hop.machine.extensions or not await body.eight_bit():
            return None
        return Verdict(Ruling.REFUSED, "5.6.3", "the next hop does not take 8-bit bodies (8BITMIME)", reply=False)

    @staticmethod
    def _judged(rows: Sequence[QueueRow], spelt: Spelt, said: Transcript, hop: Hop) -> list[Verdict]:
        verdicts = dict(spelt.refused)
        for place, verdict in zip(spelt.places, judge(said), strict=True):
            if not verdict.reply:
                verdict = verdict._replace(text=printable(f"{hop.route.name}: {verdict.text}"))
            verdicts[place] = verdict
        return [verdicts[place] for place in range(len(rows))]


_NOBODY = Verdict(Ruling.LATER, "", "nobody to send to", reply=False)
