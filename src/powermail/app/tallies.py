"""Owns how several processes share the counts behind limits: each tells the index what it counted, and learns the sum."""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.tally import Tally
from powermail.index.sharing import Tallies


class Tallying:
    """The counts that this process shares."""

    def __init__(self, index: Tallies) -> None:
        self._index = index
        self._tallies: list[Tally] = []

    def share(self, *tallies: Tally) -> None:
        """These too."""
        for tally in tallies:
            tally.share()
            self._tallies.append(tally)

    async def step(self) -> float:
        """A worker's. Raises IndexTrouble: until the index answers each process goes by what it knows."""
        for tally in self._tallies:
            taken = tally.take()
            try:
                counts = await self._index.tally(tally.kind, taken, tally.window_s)
            except Trouble:
                tally.put_back(taken)
                raise
            tally.learn(counts)
        return limits.TALLY_S
