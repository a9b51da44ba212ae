"""Owns the figures that only the index knows, looked up in the background: a scrape waits for no database."""

from __future__ import annotations

from dataclasses import dataclass, field

from powermail.admin.desk import Desk, bounded
from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.index.contract import Damage


@dataclass
class Figures:
    """As of the last look that had an answer; `looked_at` is monotonic, None before the first."""

    looked_at: float | None = None
    waiting: int = 0  # rows of the queue
    oldest_at: float | None = None  # when the first of them came that is not held; UTC
    thin_checkpoints: int = 0  # mailboxes
    owed: dict[str, int] = field(default_factory=dict)  # deletions that a node has not confirmed
    damages: dict[str, Damage] = field(default_factory=dict)


class Looker:
    """Keeps `figures` fresh. Each look leaves the index in peace for a hundred times as long as it took."""

    def __init__(self, desk: Desk) -> None:
        self.figures = Figures()
        self.answers = False  # the index did, when it was last asked
        self._desk = desk

    async def look(self) -> float:
        """Looks once; how long to rest. Raises IndexTrouble when the index does not answer: the old figures stay."""
        clock = self._desk.world.clock
        began = clock.monotonic()
        try:
            self.figures = await self._ask(began)
            self.answers = True
        except Trouble:
            self.answers = False
            raise
        return max(limits.METRICS_LOOK_S, limits.METRICS_LOOK_SHARE * (clock.monotonic() - began))

    async def _ask(self, now: float) -> Figures:
        index, what = self._desk.index, "the index"
        await self._desk.resolver.directory.ask_again(limits.OPERATOR_DIRECTORY_S)
        found = Figures(now)
        found.waiting = await bounded(index.queue_count(), what)
        found.oldest_at = await bounded(index.queue_oldest(), what)
        found.damages = await bounded(index.damages(), what)
        found.thin_checkpoints = await bounded(index.thin_checkpoints(), what)
        for name in self._desk.cluster.nodes:
            found.owed[name] = sum(await bounded(index.orders_total(name), what))
        return found
