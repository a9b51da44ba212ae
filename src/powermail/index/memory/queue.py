"""Owns the queue in memory: leases by owner and time, finishing, deferring, the operator's hand."""

from __future__ import annotations

from msgspec.structs import replace

from powermail.index.contract import QueueRow
from powermail.index.memory.state import Lease
from powermail.index.memory.transaction import Transactions


class QueuePart(Transactions):
    """`index.contract.Queue` in memory. Rows are handed out as copies."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int) -> list[QueueRow]:
        def leasing() -> list[QueueRow]:
            s = self.state
            due = [
                row for number, row in s.queue.items() if not row.held and row.due_at <= now and s.leases[number].until <= now
            ]
            due = sorted(due, key=lambda row: (row.due_at, row.id))[:limit]
            s.leases.update({row.id: Lease(owner, now + lease_s) for row in due})
            return [replace(row) for row in due]

        return self.transact(leasing)

    async def finish(self, rows: list[QueueRow]) -> None:
        def finishing() -> None:
            for row in rows:
                if self.state.queue.pop(row.id, None) is not None:
                    del self.state.leases[row.id]
                    self.release(row.key)  # law 8: finishing a row is an expunge

        self.transact(finishing)

    async def defer(self, rows: list[QueueRow], due_at: list[float], status: str) -> None:
        def deferring() -> None:
            s = self.state
            for row, due in zip(rows, due_at, strict=True):
                if (mine := s.queue.get(row.id)) is not None:
                    s.queue[row.id] = replace(mine, attempts=mine.attempts + 1, due_at=due, last_status=status)
                    s.leases[row.id] = Lease()

        self.transact(deferring)

    async def release_leases(self, owner: str) -> None:
        def releasing() -> None:
            s = self.state
            s.leases.update({number: Lease() for number, lease in s.leases.items() if lease.owner == owner})

        self.transact(releasing)

    async def queue_count(self, domain: str = "") -> int:
        return sum(domain in ("", row.domain) for row in self.state.queue.values())

    async def queue_rows(self, after: int, limit: int) -> list[QueueRow]:
        return [replace(row) for number, row in sorted(self.state.queue.items()) if number > after][:limit]

    async def queue_row(self, number: int) -> QueueRow | None:
        row = self.state.queue.get(number)
        return None if row is None else replace(row)

    async def queue_set(self, numbers: list[int], held: bool | None, due_at: float | None) -> int:
        def setting() -> int:
            s = self.state
            meant = [number for number in (numbers or list(s.queue)) if number in s.queue]
            for number in meant:
                row = s.queue[number]
                s.queue[number] = replace(
                    row, held=row.held if held is None else held, due_at=row.due_at if due_at is None else due_at
                )
            return len(meant)

        return self.transact(setting)
