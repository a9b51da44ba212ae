"""Owns the queue, on SQLite: leases by owner and time, finishing, deferring, the operator's hand.

Finishing a row is an expunge: the last reference may go with it (law 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.index.contract import QueueRow
from powermail.index.sqlite.connection import Untouched
from powermail.index.sqlite.references import References
from powermail.index.sqlite.rows import parts

_COLUMNS = (
    "id, key, destination, domain, reverse_path, recipient, notify, orcpt, envid, ret, smtputf8, octets, created_at,"
    " due_at, attempts, held, last_status"
)
_DUE = "held = 0 AND due_at <= ? AND lease_until <= ?"


def _row(values: tuple[Any, ...]) -> QueueRow:
    row = QueueRow(*values)
    row.smtputf8, row.held = bool(row.smtputf8), bool(row.held)
    return row


class QueuePart(References):
    """`index.contract.Queue` on SQLite."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow]:
        if not await self._ask(self._is_due, now):
            return []  # a look costs no transaction
        return await self._write(self._in_lease_due, owner, now, lease_s, limit)

    def _is_due(self, now: float) -> bool:
        return self._reader.execute(f"SELECT 1 FROM queue WHERE {_DUE} LIMIT 1", (now, now)).fetchone() is not None

    def _in_lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow] | Untouched[list[QueueRow]]:
        db = self._db
        found = db.execute(
            f"SELECT {_COLUMNS} FROM queue WHERE {_DUE} ORDER BY due_at, id LIMIT ?", (now, now, limit)
        ).fetchall()
        if not found:
            return Untouched([])
        db.executemany(
            "UPDATE queue SET lease_owner = ?, lease_until = ? WHERE id = ?", [(owner, now + lease_s, row[0]) for row in found]
        )
        return [_row(values) for values in found]

    async def finish(self, rows: list[QueueRow]) -> None:
        await self._write(self._in_finish, [row.id for row in rows])

    def _in_finish(self, numbers: Sequence[int]) -> None:
        gone: list[bytes] = []
        for part in parts(list(numbers)):
            marks = ", ".join("?" * len(part))
            found = self._db.execute(f"DELETE FROM queue WHERE id IN ({marks}) RETURNING key", part).fetchall()
            gone += [row[0] for row in found]
        self._in_release(gone)

    async def defer(self, rows: list[QueueRow], due_at: list[float], status: str) -> None:
        values = [(due, status, row.id) for row, due in zip(rows, due_at, strict=True)]
        await self._write(self._in_defer, values)

    def _in_defer(self, values: Sequence[tuple[float, str, int]]) -> None:
        self._db.executemany(
            "UPDATE queue SET attempts = attempts + 1, due_at = ?, last_status = ?, lease_owner = '', lease_until = 0"
            " WHERE id = ?",
            values,
        )

    async def release_leases(self, owner: str) -> None:
        await self._write(self._in_release_leases, owner)

    def _in_release_leases(self, owner: str) -> None:
        self._db.execute("UPDATE queue SET lease_owner = '', lease_until = 0 WHERE lease_owner = ?", (owner,))

    async def queue_count(self, domain: str = "") -> int:
        return await self._ask(self._queue_count, domain)

    def _queue_count(self, domain: str) -> int:
        if domain:
            row = self._reader.execute("SELECT count(*) FROM queue WHERE domain = ?", (domain,)).fetchone()
        else:
            row = self._reader.execute("SELECT count(*) FROM queue").fetchone()
        return int(row[0])

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        return await self._ask(self._queue_rows, after, limit)

    def _queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        found = self._reader.execute(f"SELECT {_COLUMNS} FROM queue WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [_row(values) for values in found]

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
