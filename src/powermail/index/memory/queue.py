"""Owns the queue in memory: leases by owner and time, finishing, deferring, the operator's hand."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from powermail.base import limits
from powermail.index.contract import Attempt, QueueRow
from powermail.index.memory.state import Lease
from powermail.index.memory.transaction import Transactions, Undo


class QueuePart(Transactions):
    """`index.contract.Queue` in memory. Rows are handed out as copies."""

    async def lease_due(self, owner: str, now: float, lease_s: float, limit: int, but: Sequence[str] = ()) -> list[QueueRow]:
        def leasing() -> list[QueueRow]:
            s, over = self.state, self.now()
            due = [
                row
                for number, row in s.queue.items()
                if not row.held
                and (row.due_at <= now or row.due_at > now + limits.QUEUE_AHEAD_MAX_S)
                and (s.leases[number].until <= over or s.leases[number].until > over + 2 * lease_s)
                if row.domain not in s.held_domains and row.domain not in but
            ]
            due = sorted(due, key=lambda row: (row.due_at, row.id))[:limit]
            s.leases.update({row.id: Lease(owner, over + lease_s) for row in due})
            return [replace(row) for row in due]

        return self.transact(leasing)

    def _has(self, owner: str | None, number: int) -> bool:
        """True if a row is there, and leased by that owner, or nobody asks by whom."""
        return number in self.state.queue and owner in (None, self.state.leases[number].owner)

    async def finish(self, rows: list[QueueRow], owner: str | None = None) -> None:
        def finishing() -> None:
            for row in rows:
                if self._has(owner, row.id):
                    del self.state.queue[row.id]
                    del self.state.leases[row.id]
                    self.state.attempts.pop(row.id, None)
                    self.dereference(row.key)  # law 8: finishing a row is an expunge

        self.transact(finishing)

    async def renew_leases(self, owner: str, numbers: Sequence[int], lease_s: float) -> list[int]:
        def renewing() -> list[int]:
            s = self.state
            found = {number: s.leases[number].owner for number in sorted(numbers) if number in s.leases}
            others = [number for number, whose in found.items() if whose not in ("", owner)]
            mine = [number for number, whose in found.items() if whose == owner]
            if not mine:
                raise Undo(others)
            s.leases.update({number: Lease(owner, self.now() + lease_s) for number in mine})
            return others

        return self.transact(renewing)

    async def defer(self, rows: list[QueueRow], due_at: list[float], attempt: Attempt, owner: str) -> None:
        def deferring() -> None:
            s = self.state
            for row, due in zip(rows, due_at, strict=True):
                if not self._has(owner, row.id):
                    continue
                mine = s.queue[row.id]
                count, told, status = row.attempts + 1, row.delay_told, attempt.status
                s.queue[row.id] = replace(mine, attempts=count, due_at=due, last_status=status, delay_told=told)
                s.leases[row.id] = Lease()
                again = mine.attempts >= count  # this was written before, and nobody heard of it
                known = s.attempts.get(row.id, ())[: -1 if again else None]
                s.attempts[row.id] = (*known, attempt)[-limits.QUEUE_ATTEMPTS_KEPT :]

        self.transact(deferring)

    async def give_back(self, rows: list[QueueRow], due_at: float, owner: str) -> None:
        def giving_back() -> None:
            s = self.state
            for row in rows:
                if self._has(owner, row.id):
                    s.queue[row.id] = replace(s.queue[row.id], due_at=due_at)
                    s.leases[row.id] = Lease()

        self.transact(giving_back)

    async def queue_attempts(self, number: int) -> list[Attempt]:
        return list(self.state.attempts.get(number, ()))

    async def hold_domain(self, domain: str, held: bool) -> None:
        def holding() -> None:
            self.state.held_domains.pop(domain, None)
            if held:
                self.state.held_domains[domain] = None

        self.transact(holding)

    async def held_domains(self) -> list[str]:
        return sorted(self.state.held_domains)

    async def find_return(self, address: str, now: float) -> str | None:
        original, until = self.state.returns.get(address.lower(), ("", 0.0))
        return original if until > now else None

    async def forget_returns(self, now: float) -> int:
        def forgetting() -> int:
            s = self.state
            kept = {address: value for address, value in s.returns.items() if value[1] > now}
            gone, s.returns = len(s.returns) - len(kept), kept
            return gone

        return self.transact(forgetting)

    async def release_leases(self, owner: str) -> None:
        def releasing() -> None:
            s = self.state
            s.leases.update({number: Lease() for number, lease in s.leases.items() if lease.owner == owner})

        self.transact(releasing)

    async def queue_count(self, domain: str = "") -> int:
        return sum(domain in ("", row.domain) for row in self.state.queue.values())

    async def queue_oldest(self) -> float | None:
        free = [row for row in self.state.queue.values() if not row.held and row.domain not in self.state.held_domains]
        return min((row.created_at for row in free), default=None)

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
