"""Owns what several processes count together, in memory."""

from __future__ import annotations

from collections.abc import Mapping

from powermail.base import limits
from powermail.index.memory.transaction import Transactions


class TallyPart(Transactions):
    """`index.contract.Tallies` in memory."""

    async def tally(self, kind: str, added: Mapping[str, int], window_s: float) -> dict[str, int]:
        period = int(self.now() // window_s)

        def adding() -> None:
            counts = self.state.tallies
            for of, name in [key for key, (when, _) in counts.items() if key[0] == kind and when < period]:
                del counts[of, name]
            for name, count in added.items():
                when, before = counts.get((kind, name), (period, 0))
                counts[kind, name] = period, count + (before if when == period else 0)

        if added:
            self.transact(adding)
        found = {name: count for (of, name), (when, count) in self.state.tallies.items() if of == kind and when == period}
        return dict(sorted(found.items(), key=lambda one: (-one[1], one[0]))[: limits.TALLIES_SHOWN_MAX])
