"""Owns the queue's statements: leasing by owner and expiry columns, finishing, deferring, the operator's hand."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any

from powermail.index.contract import QueueRow
from powermail.index.rows import Placements, release

_COLUMNS = (
    "id, key, destination, domain, reverse_path, recipient, notify, orcpt, envid, ret, smtputf8, octets, created_at,"
    " due_at, attempts, held, last_status"
)


def _row(values: tuple[Any, ...]) -> QueueRow:
    row = QueueRow(*values)
    row.smtputf8, row.held = bool(row.smtputf8), bool(row.held)
    return row


class QueueStatements:
    """The queue part of the SQLite index."""

    _db: sqlite3.Connection
    _reader: sqlite3.Connection
    _placements: Placements
    _write: Callable[..., Coroutine[Any, Any, Any]]
    _read: Callable[..., Coroutine[Any, Any, Any]]

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow]:
        """Takes due rows for `owner` until now + lease_s; rows of one message come together, oldest first."""
        rows: list[QueueRow] = await self._write(self._lease_due, owner, now, lease_s, limit)
        return rows

    def _lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow]:
        ids = self._db.execute(
            "SELECT id FROM queue WHERE held = 0 AND due_at <= ? AND lease_until <= ? ORDER BY due_at, id LIMIT ?",
            (now, now, limit),
        ).fetchall()
        rows = []
        for (number,) in ids:
            row = self._db.execute(
                f"UPDATE queue SET lease_owner = ?, lease_until = ? WHERE id = ? RETURNING {_COLUMNS}",
                (owner, now + lease_s, number),
            ).fetchone()
            rows.append(_row(row))
        return rows

    async def finish(self, rows: list[QueueRow]) -> None:
        """These recipients are done, for good or bad; their message goes when nobody refers to it."""
        await self._write(self._finish, rows)

    def _finish(self, rows: list[QueueRow]) -> None:
        gone = []
        for row in rows:
            if self._db.execute("DELETE FROM queue WHERE id = ? RETURNING id", (row.id,)).fetchone():
                gone.append(row.key)
        release(self._db, self._placements, gone)

    async def defer(self, rows: list[QueueRow], due_at: list[float], status: str) -> None:
        """Tries again later."""
        await self._write(self._defer, rows, due_at, status)

    def _defer(self, rows: list[QueueRow], due_at: list[float], status: str) -> None:
        self._db.executemany(
            "UPDATE queue SET attempts = attempts + 1, due_at = ?, last_status = ?, lease_owner = '', lease_until = 0"
            " WHERE id = ?",
            [(due, status, row.id) for row, due in zip(rows, due_at, strict=True)],
        )

    async def release_leases(self, owner: str) -> None:
        """Gives back what an owner that stops has leased."""
        await self._write(
            lambda: self._db.execute("UPDATE queue SET lease_owner = '', lease_until = 0 WHERE lease_owner = ?", (owner,))
        )

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        """Rows by id, for the operator."""
        rows: list[QueueRow] = await self._read(self._queue_rows, after, limit)
        return rows

    def _queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        found = self._reader.execute(f"SELECT {_COLUMNS} FROM queue WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [_row(values) for values in found]

    async def queue_row(self, number: int) -> QueueRow | None:
        """One row."""
        rows = await self.queue_rows(number - 1, 1)
        return rows[0] if rows and rows[0].id == number else None

    async def queue_count(self, domain: str = "") -> int:
        """How many rows wait, all or for one domain."""
        count: int = await self._read(self._queue_count, domain)
        return count

    def _queue_count(self, domain: str) -> int:
        if domain:
            row = self._reader.execute("SELECT count(*) FROM queue WHERE domain = ?", (domain,)).fetchone()
        else:
            row = self._reader.execute("SELECT count(*) FROM queue").fetchone()
        return int(row[0])

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        """Holds, releases or makes due; returns how many rows there were. An empty list means all."""
        count: int = await self._write(self._queue_set, numbers, held, due_at)
        return count

    def _queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        changes, values = [], []
        if held is not None:
            changes.append("held = ?")
            values.append(float(held))
        if due_at is not None:
            changes.append("due_at = ?")
            values.append(due_at)
        statement = f"UPDATE queue SET {', '.join(changes)}"
        if not numbers:
            return self._db.execute(statement, values).rowcount
        return sum(self._db.execute(f"{statement} WHERE id = ?", (*values, number)).rowcount for number in numbers)
