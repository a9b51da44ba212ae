"""Owns what several processes count together: a row for each name, with the number of the window that it was counted in."""

from __future__ import annotations

from collections.abc import Mapping

from powermail.base import limits
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Reading, Transaction

_ADD = (
    "INSERT INTO tallies VALUES (?, ?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET count = CASE"
    " WHEN tallies.period = excluded.period THEN tallies.count + excluded.count ELSE excluded.count END,"
    " period = excluded.period"
)


class TallyPart(Core):
    """`index.contract.Tallies`."""

    async def tally(self, kind: str, added: Mapping[str, int], window_s: float) -> dict[str, int]:
        if not added:
            return await self._ask(self._tallies, kind, window_s)
        return await self._write(self._in_tally, kind, added, window_s)

    async def _in_tally(self, db: Transaction, kind: str, added: Mapping[str, int], window_s: float) -> dict[str, int]:
        period = int(await self._in_now(db) // window_s)
        if await db.one("SELECT 1 FROM tallies WHERE kind = ? AND period < ? LIMIT 1", (kind, period)) is not None:
            await db.change("DELETE FROM tallies WHERE kind = ? AND period < ?", (kind, period))
        # In order of name, so that two who add to the same wait for each other once.
        await db.many(_ADD, [(kind, name, period, count) for name, count in sorted(added.items())])
        return await self._tallies(db, kind, window_s)

    async def _tallies(self, db: Reading, kind: str, window_s: float) -> dict[str, int]:
        period = int(await self._in_now(db) // window_s)
        text = "SELECT name, count FROM tallies WHERE kind = ? AND period = ? ORDER BY count DESC, name LIMIT ?"
        return {row[0]: int(row[1]) for row in await db.rows(text, (kind, period, limits.TALLIES_SHOWN_MAX))}
