"""Owns the queue, on SQLite: leases by owner and time, finishing, deferring, the operator's hand.

Finishing a row is an expunge: the last reference may go with it (law 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.base import limits
from powermail.index.contract import Attempt, QueueRow
from powermail.index.sqlite import queue_form
from powermail.index.sqlite.connection import Untouched
from powermail.index.sqlite.references import References
from powermail.index.sqlite.rows import change_in, in_list, parts

_FREE = "held = 0 AND domain NOT IN (SELECT domain FROM held_domains)"
_DUE, _AHEAD = (f"due_at {is_due} ? AND (lease_until <= ? OR lease_until > ?) AND {_FREE}" for is_due in ("<=", ">"))


class QueuePart(References):
    """`index.contract.Queue` on SQLite."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str] = ()) -> list[QueueRow]:
        if not await self._ask(self._is_due, now, lease_s):
            return []  # a look costs no transaction
        return await self._write(self._in_lease_due, owner, now, lease_s, limit, but)

    def _is_due(self, now: float, lease_s: float) -> bool:
        return any(
            self._reader.execute(f"SELECT 1 FROM queue WHERE {where} LIMIT 1", (at, now, now + 2 * lease_s)).fetchone()
            for where, at in ((_DUE, now), (_AHEAD, now + limits.QUEUE_AHEAD_MAX_S))
        )

    def _in_lease_due(
        self, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str]
    ) -> list[QueueRow] | Untouched[list[QueueRow]]:
        db = self._db
        others = f" AND domain NOT IN ({in_list(but)})" if but else ""
        found: list[tuple[Any, ...]] = []
        for where, at in ((_DUE, now), (_AHEAD, now + limits.QUEUE_AHEAD_MAX_S)):
            text = f"{queue_form.SELECT} WHERE {where}{others} ORDER BY due_at, id LIMIT ?"
            found += db.execute(text, (at, now, now + 2 * lease_s, *but, limit - len(found))).fetchall()
        if not found:
            return Untouched([])
        head = "UPDATE queue SET lease_owner = ?, lease_until = ? WHERE id IN"
        change_in(db, head, [row[0] for row in found], (owner, now + lease_s))
        return [queue_form.read(values) for values in found]

    async def finish(self, rows: list[QueueRow]) -> None:
        await self._write(self._in_finish, [row.id for row in rows])

    def _in_finish(self, numbers: Sequence[int]) -> None:
        gone: list[bytes] = []
        for part in parts(list(numbers)):
            marks = ", ".join("?" * len(part))
            found = self._db.execute(f"DELETE FROM queue WHERE id IN ({marks}) RETURNING key", part).fetchall()
            gone += [row[0] for row in found]
        self._in_release(gone)

    async def renew_leases(self, owner: str, until: float) -> None:
        await self._write(self._in_renew_leases, owner, until)

    def _in_renew_leases(self, owner: str, until: float) -> Untouched[None] | None:
        renewed = self._db.execute("UPDATE queue SET lease_until = ? WHERE lease_owner = ?", (until, owner))
        return None if renewed.rowcount else Untouched(None)

    async def defer(self, rows: list[QueueRow], due_at: list[float], attempt: Attempt) -> None:
        await self._write(self._in_defer, list(rows), due_at, attempt)

    def _in_defer(self, rows: Sequence[QueueRow], due_at: Sequence[float], attempt: Attempt) -> None:
        db = self._db
        for row, due in zip(rows, due_at, strict=True):
            number = row.attempts + 1
            changed = db.execute(
                "UPDATE queue SET attempts = ?, due_at = ?, last_status = ?, delay_told = ?, lease_owner = '', lease_until = 0"
                " WHERE id = ?",
                (number, due, attempt.status, int(row.delay_told), row.id),
            )
            if changed.rowcount:
                db.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?)", (row.id, number, *attempt))
                kept = number - limits.QUEUE_ATTEMPTS_KEPT
                db.execute("DELETE FROM attempts WHERE queue = ? AND number <= ?", (row.id, kept))

    async def give_back(self, rows: list[QueueRow], due_at: float) -> None:
        await self._write(self._in_give_back, [(due_at, row.id) for row in rows])

    def _in_give_back(self, values: Sequence[tuple[float, int]]) -> None:
        self._db.executemany("UPDATE queue SET due_at = ?, lease_owner = '', lease_until = 0 WHERE id = ?", values)

    async def queue_attempts(self, number: int) -> list[Attempt]:
        return await self._ask(self._queue_attempts, number)

    def _queue_attempts(self, number: int) -> list[Attempt]:
        found = self._reader.execute(
            "SELECT at, host, tls, seconds, status FROM attempts WHERE queue = ? ORDER BY number", (number,)
        )
        return [Attempt(*values) for values in found]

    async def hold_domain(self, domain: str, held: bool) -> None:
        await self._write(self._in_hold_domain, domain, held)

    def _in_hold_domain(self, domain: str, held: bool) -> None:
        if held:
            self._db.execute("INSERT OR IGNORE INTO held_domains VALUES (?)", (domain,))
        else:
            self._db.execute("DELETE FROM held_domains WHERE domain = ?", (domain,))

    async def held_domains(self) -> list[str]:
        return await self._ask(self._held_domains)

    def _held_domains(self) -> list[str]:
        return [row[0] for row in self._reader.execute("SELECT domain FROM held_domains ORDER BY domain")]

    async def find_return(self, address: str, now: float) -> str | None:
        return await self._ask(self._find_return, address, now)

    def _find_return(self, address: str, now: float) -> str | None:
        statement = "SELECT original FROM returns WHERE address = ? AND until > ?"
        row = self._reader.execute(statement, (address.lower(), now)).fetchone()
        return None if row is None else str(row[0])

    async def forget_returns(self, now: float) -> int:
        return await self._write(self._in_forget_returns, now)

    def _in_forget_returns(self, now: float) -> int | Untouched[int]:
        return self._db.execute("DELETE FROM returns WHERE until <= ?", (now,)).rowcount or Untouched(0)

    async def release_leases(self, owner: str) -> None:
        await self._write(self._in_release_leases, owner)

    def _in_release_leases(self, owner: str) -> Untouched[None] | None:
        given = self._db.execute("UPDATE queue SET lease_owner = '', lease_until = 0 WHERE lease_owner = ?", (owner,))
        return None if given.rowcount else Untouched(None)

    async def queue_count(self, domain: str = "") -> int:
        return await self._ask(self._queue_count, domain)

    def _queue_count(self, domain: str) -> int:
        if domain:
            row = self._reader.execute("SELECT count(*) FROM queue WHERE domain = ?", (domain,)).fetchone()
        else:
            row = self._reader.execute("SELECT count(*) FROM queue").fetchone()
        return int(row[0])

    async def queue_oldest(self) -> float | None:
        return await self._ask(self._queue_oldest)

    def _queue_oldest(self) -> float | None:
        row = self._reader.execute(f"SELECT created_at FROM queue WHERE {_FREE} ORDER BY id LIMIT 1").fetchone()
        return None if row is None else float(row[0])

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        return await self._ask(self._queue_rows, after, limit)

    def _queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        found = self._reader.execute(f"{queue_form.SELECT} WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [queue_form.read(values) for values in found]

    async def queue_row(self, number: int) -> QueueRow | None:
        rows = await self.queue_rows(number - 1, 1)
        return rows[0] if rows and rows[0].id == number else None

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        return await self._write(self._in_queue_set, numbers, held, due_at)

    def _in_queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        held_value = None if held is None else int(held)
        statement = "UPDATE queue SET held = coalesce(?, held), due_at = coalesce(?, due_at)"
        if not numbers:
            return self._db.execute(statement, (held_value, due_at)).rowcount
        return sum(self._db.execute(f"{statement} WHERE id = ?", (held_value, due_at, each)).rowcount for each in numbers)
