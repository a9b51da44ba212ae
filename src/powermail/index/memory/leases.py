"""Owns who does which background job, in memory."""

from __future__ import annotations

from powermail.base import limits
from powermail.index.memory.state import Lease
from powermail.index.memory.transaction import Transactions, Undo
from powermail.index.sharing import JobLease


class LeasePart(Transactions):
    """`index.contract.Leases` in memory."""

    async def lease(self, job: str, owner: str, seconds: float) -> bool:
        if not 0 < seconds <= limits.LEASE_S_MAX:
            raise ValueError(f"a job is leased for at most {limits.LEASE_S_MAX:.0f} s")

        def leasing() -> bool:
            now, held = self.now(), self.state.jobs.get(job, Lease())
            if held.owner != owner and now < held.until <= now + limits.LEASE_S_MAX:
                raise Undo(False)
            self.state.jobs[job] = Lease(owner, now + seconds)
            return True

        return self.transact(leasing)

    async def release(self, job: str, owner: str) -> None:
        def releasing() -> None:
            if self.state.jobs.get(job, Lease()).owner != owner:
                raise Undo(None)
            del self.state.jobs[job]

        self.transact(releasing)

    async def leases(self) -> list[JobLease]:
        latest = self.now() + limits.LEASE_S_MAX
        found = sorted(self.state.jobs.items())
        return [JobLease(job, held.owner, held.until if held.until <= latest else 0.0) for job, held in found]
