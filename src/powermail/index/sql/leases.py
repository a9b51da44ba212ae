"""Owns which process does which background job: a row for each that was taken, by compare-and-set, dated by one clock.

Here a lease is a transaction; where several processes ask a server, it is one statement (`index.postgres.leases`).

Danger: the times are the index's own (`_in_now`), never those of the machine that asks, whose clock may be any.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.index.sharing import JobLease
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Reading, Transaction, Untouched

_TAKE = (
    "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until"
    " WHERE leases.owner = excluded.owner OR leases.until <= ? OR leases.until > ?"
)


class LeasePart(Core):
    """`index.contract.Leases`."""

    async def lease(self, job: str, owner: str, seconds: float) -> bool:
        if not 0 < seconds <= limits.LEASE_S_MAX:
            raise ValueError(f"a job is leased for at most {limits.LEASE_S_MAX:.0f} s")
        return await self._lease(job, owner, seconds)

    async def _lease(self, job: str, owner: str, seconds: float) -> bool:
        return await self._write(self._in_lease_job, job, owner, seconds)

    async def _in_lease_job(self, db: Transaction, job: str, owner: str, seconds: float) -> bool | Untouched[bool]:
        now = await self._in_now(db)
        taken = await db.change(_TAKE, (job, owner, now + seconds, now, now + limits.LEASE_S_MAX))
        return True if taken else Untouched(False)

    async def release(self, job: str, owner: str) -> None:
        await self._write(self._in_release_job, job, owner)

    async def _in_release_job(self, db: Transaction, job: str, owner: str) -> Untouched[None] | None:
        released = await db.change("DELETE FROM leases WHERE job = ? AND owner = ?", (job, owner))
        return None if released else Untouched(None)

    async def leases(self) -> list[JobLease]:
        return await self._ask(self._all_leases)

    async def _all_leases(self, db: Reading) -> list[JobLease]:
        rows = await db.rows("SELECT job, owner, until FROM leases ORDER BY job")
        latest = await self._in_now(db) + limits.LEASE_S_MAX
        return [JobLease(job, owner, until if until <= latest else 0.0) for job, owner, until in rows]
