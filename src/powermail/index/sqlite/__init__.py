"""Owns the index on SQLite: WAL with `synchronous=FULL`, one writing lane with group commit, one reading lane.

UIDs and MODSEQs come from the mailbox row in the transaction that enters the message (P10). Every call that changes something
is one transaction, or says that it is several bounded ones; the last statement of each raises the writer slot (law 10).
"""

from __future__ import annotations

from powermail.index.sqlite.checkpoints import CheckpointPart
from powermail.index.sqlite.comparing import ComparingPart
from powermail.index.sqlite.connection import cluster_of
from powermail.index.sqlite.copies import CopyPart
from powermail.index.sqlite.epochs import EpochPart
from powermail.index.sqlite.queue import QueuePart
from powermail.index.sqlite.totals import TotalsPart

__all__ = ["SqliteIndex", "cluster_of"]


class SqliteIndex(CheckpointPart, ComparingPart, CopyPart, QueuePart, EpochPart, TotalsPart):
    """The whole index in one SQLite file."""
