"""Owns what several processes count together: a row for each name, with the number of the window that it was counted in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        if ended := await self._ask(self._ended, kind, window_s):
            await self._write(self._in_clear_ended, kind, ended, window_s)
        return await self._write(self._in_tally, kind, added, window_s)

    async def _in_tally(self, db: Transaction, kind: str, added: Mapping[str, int], window_s: float) -> dict[str, int]:
        period = int(await self._in_now(db) // window_s)
        # In order of name, so that two who add to the same wait for each other once.
        await db.many(_ADD, [(kind, name, period, count) for name, count in sorted(added.items())])
        return await self._tallies(db, kind, window_s)

    async def _ended(self, db: Reading, kind: str, window_s: float) -> list[str]:
        """Names that were counted in windows that are over."""
        period = int(await self._in_now(db) // window_s)
        return sorted(row[0] for row in await db.rows("SELECT name FROM tallies WHERE kind = ? AND period < ?", (kind, period)))

    async def _in_clear_ended(self, db: Transaction, kind: str, names: Sequence[str], window_s: float) -> None:
        """In a transaction of its own, in the same order: who counts takes only what he counts."""
        period = int(await self._in_now(db) // window_s)
        rows = [(kind, name, period) for name in names]
        await db.many("DELETE FROM tallies WHERE kind = ? AND name = ? AND period < ?", rows)

    async def _tallies(self, db: Reading, kind: str, window_s: float) -> dict[str, int]:
        period = int(await self._in_now(db) // window_s)
        text = "SELECT name, count FROM tallies WHERE kind = ? AND period = ? ORDER BY count DESC, name LIMIT ?"
        return {row[0]: int(row[1]) for row in await db.rows(text, (kind, period, limits.TALLIES_SHOWN_MAX))}
