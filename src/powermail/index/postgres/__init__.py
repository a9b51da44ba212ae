"""Owns the index on PostgreSQL 15 or later, and on what speaks like it: any number of processes share one.

What transactions do stands in `index.sql`; here is how a server is reached and kept an eye on, how deliveries are entered,
and how a job is leased. The tables are made by `powermail index migrate`, never by a start.
"""

from __future__ import annotations

from powermail.index.postgres.deliver import DeliverPart
from powermail.index.postgres.leases import SharedLeasePart
from powermail.index.sql.checkpoints import CheckpointPart
from powermail.index.sql.comparing import ComparingPart
from powermail.index.sql.copies import CopyPart
from powermail.index.sql.identities import IdentityPart
from powermail.index.sql.queue import QueuePart
from powermail.index.sql.tallies import TallyPart
from powermail.index.sql.totals import TotalsPart

__all__ = ["PostgresIndex"]


class PostgresIndex(
    DeliverPart, CheckpointPart, ComparingPart, CopyPart, QueuePart, SharedLeasePart, TallyPart, IdentityPart, TotalsPart
):
    """The whole index in one database."""
