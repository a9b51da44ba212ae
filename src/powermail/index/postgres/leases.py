"""Owns taking a job and giving it back on PostgreSQL: one statement each, which is a transaction by itself.

A log-in of POP3 takes a maildrop and gives it back, and waits for both: every round trip counts. The statement asks the server
what time it is, so that all go by one clock, and looks at the writer slot and raises its count as any transaction does
(law 10): an index that was moved away, or lost commits, gives nothing. It may run again when nobody knows whether it was done:
who has a job takes it once more.

Danger: it locks its slot and then its job; nothing else may lock a job and then a slot.
"""

from __future__ import annotations

from functools import cache

from powermail.base import limits
from powermail.index.postgres.connection import PostgresCore
from powermail.index.postgres.statements import counted_text
from powermail.index.sql.leases import LeasePart


@cache
def _take(clock: str) -> str:
    return counted_text(
        f"INSERT INTO leases SELECT ?, ?, {clock} + ? FROM slot WHERE true"
        " ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until"
        f" WHERE leases.owner = excluded.owner OR leases.until <= {clock} OR leases.until > {clock} + ? RETURNING job"
    )


_RELEASE = counted_text("DELETE FROM leases WHERE job = ? AND owner = ? AND EXISTS (SELECT 1 FROM slot) RETURNING job")


class SharedLeasePart(LeasePart, PostgresCore):
    """`index.contract.Leases` on PostgreSQL."""

    async def _lease(self, job: str, owner: str, seconds: float) -> bool:
        return await self._write_counted(_take(self._clock()), (job, owner, seconds, limits.LEASE_S_MAX))

    async def release(self, job: str, owner: str) -> None:
        await self._write_counted(_RELEASE, (job, owner))
