"""Owns the queue: leases by owner and time, finishing, deferring, the operator's hand.

Finishing a row is an expunge: the last reference may go with it (law 8). Leases are dated by the index's own clock (`_in_now`),
and whoever ends one says whose it is, in the statement that ends it: else two front ends send one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.base import limits
from powermail.index.contract import Attempt, QueueRow
from powermail.index.sql import queue_form
from powermail.index.sql.engine import Reading, Transaction, Untouched, parts
from powermail.index.sql.references import References

_REMEMBER = (
    "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (queue, number) DO UPDATE SET at = excluded.at,"
    " host = excluded.host, tls = excluded.tls, seconds = excluded.seconds, status = excluded.status"
)
_ROWS = 5000  # changed in one transaction, where all may be meant
_FREE = "held = 0 AND domain NOT IN (SELECT domain FROM held_domains)"
_DUE, _AHEAD = (f"due_at {is_due} ? AND (lease_until <= ? OR lease_until > ?) AND {_FREE}" for is_due in ("<=", ">"))

_STILL = f"AND (lease_until <= ? OR lease_until > ?) AND (due_at <= ? OR due_at > ?) AND {_FREE} ORDER BY id FOR UPDATE"


def _by_id(pair: tuple[QueueRow, float]) -> int:
    return pair[0].id


class QueuePart(References):
    """`index.contract.Queue`."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str] = ()) -> list[QueueRow]:
        if not await self._ask(self._is_due, now, lease_s):
            return []  # a look costs no transaction
        return await self._write(self._in_lease_due, owner, now, lease_s, limit, but)

    async def _is_due(self, db: Reading, now: float, lease_s: float) -> bool:
        over = await self._in_now(db)
        for where, at in ((_DUE, now), (_AHEAD, now + limits.QUEUE_AHEAD_MAX_S)):
            if await db.one(f"SELECT 1 FROM queue WHERE {where} LIMIT 1", (at, over, over + 2 * lease_s)) is not None:
                return True
        return False

    async def _in_lease_due(
        self, db: Transaction, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str]
    ) -> list[QueueRow] | Untouched[list[QueueRow]]:
        others = f" AND domain NOT IN ({', '.join('?' * len(but))})" if but else ""
        over = await self._in_now(db)
        found: list[Any] = []
        for where, at in ((_DUE, now), (_AHEAD, now + limits.QUEUE_AHEAD_MAX_S)):
            text = f"{queue_form.SELECT} WHERE {where}{others} ORDER BY due_at, id LIMIT ?"
            found += await db.rows(text, (at, over, over + 2 * lease_s, *but, limit - len(found)))
        if not db.alone:  # in the order in which all lock; what somebody else took meanwhile is his
            ids = [row[0] for row in found]
            after = (over, over + 2 * lease_s, now, now + limits.QUEUE_AHEAD_MAX_S)
            found = await db.rows_in(f"{queue_form.SELECT} WHERE id IN", ids, _STILL, after=after)
            found = sorted(found, key=lambda row: (row[queue_form.DUE_AT], row[0]))
        if not found:
            return Untouched([])
        head = "UPDATE queue SET lease_owner = ?, lease_until = ? WHERE id IN"
        await db.change_in(head, [row[0] for row in found], (owner, over + lease_s))
        return [queue_form.read(values) for values in found]

    async def finish(self, rows: list[QueueRow], owner: str | None = None) -> None:
        await self._write(self._in_finish, [row.id for row in rows], owner)

    async def _in_finish(self, db: Transaction, numbers: Sequence[int], owner: str | None) -> None:
        if not db.alone:
            keys = await db.rows_in("SELECT key FROM queue WHERE id IN", list(numbers))
            await db.lock_keys(row[0] for row in keys)
            await db.rows_in("SELECT id FROM queue WHERE id IN", list(numbers), "ORDER BY id FOR UPDATE")
        whose = "" if owner is None else " AND lease_owner = ?"
        mine = () if owner is None else (owner,)
        gone: list[Any] = []
        for part in parts(list(numbers)):
            marks = ", ".join("?" * len(part))
            gone += await db.rows(f"DELETE FROM queue WHERE id IN ({marks}){whose} RETURNING key, id, attempts", (*part, *mine))
        await self._in_finished(db, gone)

    async def renew_leases(self, owner: str, numbers: Sequence[int], lease_s: float) -> list[int]:
        return await self._write(self._in_renew_leases, owner, sorted(numbers), lease_s)

    async def _in_renew_leases(
        self, db: Transaction, owner: str, numbers: Sequence[int], lease_s: float
    ) -> list[int] | Untouched[list[int]]:
        found = await db.rows_in("SELECT id, lease_owner FROM queue WHERE id IN", numbers, "ORDER BY id FOR UPDATE")
        mine = [number for number, whose in found if whose == owner]
        others = [number for number, whose in found if whose not in ("", owner)]
        if not mine:
            return Untouched(others)
        until = await self._in_now(db) + lease_s
        await db.change_in("UPDATE queue SET lease_until = ? WHERE id IN", mine, (until,))
        return others

    async def defer(self, rows: list[QueueRow], due_at: list[float], attempt: Attempt, owner: str) -> None:
        await self._write(self._in_defer, list(rows), due_at, attempt, owner)

    async def _in_defer(
        self, db: Transaction, rows: Sequence[QueueRow], due_at: Sequence[float], attempt: Attempt, owner: str
    ) -> None:
        for row, due in sorted(zip(rows, due_at, strict=True), key=_by_id):
            number = row.attempts + 1
            changed = await db.change(
                "UPDATE queue SET attempts = ?, due_at = ?, last_status = ?, delay_told = ?, lease_owner = '', lease_until = 0"
                " WHERE id = ? AND lease_owner = ?",
                (number, due, attempt.status, int(row.delay_told), row.id, owner),
            )
            if changed:
                await db.change(_REMEMBER, (row.id, number, *attempt))
                kept = number - limits.QUEUE_ATTEMPTS_KEPT
                await db.change("DELETE FROM attempts WHERE queue = ? AND number <= ?", (row.id, kept))

    async def give_back(self, rows: list[QueueRow], due_at: float, owner: str) -> None:
        await self._write(self._in_give_back, sorted((due_at, row.id, owner) for row in rows))

    async def _in_give_back(self, db: Transaction, values: Sequence[tuple[float, int, str]]) -> None:
        await db.many("UPDATE queue SET due_at = ?, lease_owner = '', lease_until = 0 WHERE id = ? AND lease_owner = ?", values)

    async def queue_attempts(self, number: int) -> list[Attempt]:
        return await self._ask(self._queue_attempts, number)

    async def _queue_attempts(self, db: Reading, number: int) -> list[Attempt]:
        found = await db.rows("SELECT at, host, tls, seconds, status FROM attempts WHERE queue = ? ORDER BY number", (number,))
        return [Attempt(*values) for values in found]

    async def hold_domain(self, domain: str, held: bool) -> None:
        await self._write(self._in_hold_domain, domain, held)

    async def _in_hold_domain(self, db: Transaction, domain: str, held: bool) -> None:
        if held:
            await db.change("INSERT INTO held_domains VALUES (?) ON CONFLICT DO NOTHING", (domain,))
        else:
            await db.change("DELETE FROM held_domains WHERE domain = ?", (domain,))

    async def held_domains(self) -> list[str]:
        return await self._ask(self._held_domains)

    async def _held_domains(self, db: Reading) -> list[str]:
        return [row[0] for row in await db.rows("SELECT domain FROM held_domains ORDER BY domain")]

    async def find_return(self, address: str, now: float) -> str | None:
        return await self._ask(self._find_return, address, now)

    async def _find_return(self, db: Reading, address: str, now: float) -> str | None:
        statement = "SELECT original FROM returns WHERE address = ? AND until > ?"
        row = await db.one(statement, (address.lower(), now))
        return None if row is None else str(row[0])

    async def forget_returns(self, now: float) -> int:
        forgotten = 0
        while part := await self._write(self._in_forget_returns, now):
            forgotten += part
        return forgotten

    async def _in_forget_returns(self, db: Transaction, now: float) -> int | Untouched[int]:
        """A bounded part, in the order in which deliveries touch them."""
        over = await db.rows("SELECT address FROM returns WHERE until <= ? LIMIT ?", (now, _ROWS))
        addresses = sorted(row[0] for row in over)
        await db.many("DELETE FROM returns WHERE address = ? AND until <= ?", [(address, now) for address in addresses])
        return len(addresses) or Untouched(0)

    async def release_leases(self, owner: str) -> None:
        await self._write(self._in_release_leases, owner)

    async def _in_release_leases(self, db: Transaction, owner: str) -> Untouched[None] | None:
        mine = await db.rows("SELECT id FROM queue WHERE lease_owner = ? ORDER BY id FOR UPDATE", (owner,))
        await db.change_in("UPDATE queue SET lease_owner = '', lease_until = 0 WHERE id IN", [row[0] for row in mine])
        return None if mine else Untouched(None)

    async def queue_count(self, domain: str = "") -> int:
        return await self._ask(self._queue_count, domain)

    async def _queue_count(self, db: Reading, domain: str) -> int:
        if domain:
            row = await db.one("SELECT count(*) FROM queue WHERE domain = ?", (domain,))
        else:
            row = await db.one("SELECT count(*) FROM queue")
        return int(row[0])

    async def queue_oldest(self) -> float | None:
        return await self._ask(self._queue_oldest)

    async def _queue_oldest(self, db: Reading) -> float | None:
        oldest = (await db.one(f"SELECT min(created_at) FROM queue WHERE {_FREE}"))[0]
        return None if oldest is None else float(oldest)

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        return await self._ask(self._queue_rows, after, limit)

    async def _queue_rows(self, db: Reading, after: int, limit: int) -> list[QueueRow]:
        found = await db.rows(f"{queue_form.SELECT} WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [queue_form.read(values) for values in found]

    async def queue_row(self, number: int) -> QueueRow | None:
        rows = await self.queue_rows(number - 1, 1)
        return rows[0] if rows and rows[0].id == number else None

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        """All of them: part by part, so that nobody waits for the whole queue; what came to its end so far stays."""
        if numbers:
            return await self._write(self._in_queue_set, sorted(set(numbers)), held, due_at)
        changed = after = 0
        while part := await self._ask(self._queue_numbers, after):
            changed += await self._write(self._in_queue_set, part, held, due_at)
            after = part[-1]
        return changed

    async def _queue_numbers(self, db: Reading, after: int) -> list[int]:
        return [row[0] for row in await db.rows("SELECT id FROM queue WHERE id > ? ORDER BY id LIMIT ?", (after, _ROWS))]

    async def _in_queue_set(
        self, db: Transaction, numbers: Sequence[int], held: bool | None, due_at: float | None
    ) -> int | Untouched[int]:
        there = [row[0] for row in await db.rows_in("SELECT id FROM queue WHERE id IN", numbers, "ORDER BY id FOR UPDATE")]
        values = None if held is None else int(held), due_at
        await db.change_in("UPDATE queue SET held = coalesce(?, held), due_at = coalesce(?, due_at) WHERE id IN", there, values)
        return len(there) or Untouched(0)
