"""Owns the index on SQLite: WAL with `synchronous=FULL`, one writing lane with group commit, one reading lane.

UIDs and MODSEQs come from the mailbox row in the transaction that enters the message (P10). Every call that changes something
is one transaction, or says that it is several bounded ones; the last statement of each raises the writer slot (law 10). What
transactions do stands in `index.sql`; here is how a file is opened and kept, and how deliveries are entered at once.
"""

from __future__ import annotations

from powermail.index.sql.checkpoints import CheckpointPart
from powermail.index.sql.comparing import ComparingPart
from powermail.index.sql.copies import CopyPart
from powermail.index.sql.epochs import EpochPart
from powermail.index.sql.identities import IdentityPart
from powermail.index.sql.leases import LeasePart
from powermail.index.sql.queue import QueuePart
from powermail.index.sql.tallies import TallyPart
from powermail.index.sql.totals import TotalsPart
from powermail.index.sqlite.connection import cluster_of
from powermail.index.sqlite.deliver import DeliverPart

__all__ = ["SqliteIndex", "cluster_of"]


class SqliteIndex(
    DeliverPart, CheckpointPart, ComparingPart, CopyPart, QueuePart, LeasePart, TallyPart, IdentityPart, EpochPart, TotalsPart
):
    """The whole index in one SQLite file."""
