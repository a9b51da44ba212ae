"""Owns the index in memory: the second implementation of `index.contract`, which keeps the contract honest.

It is plain Python over a few dicts, and meant to be read as the specification of the laws on the side of the index. A
`MemoryStore` is what a database file is: it outlives the `MemoryIndex` that opened it, and can be put back to an older state.
"""

from __future__ import annotations

from powermail.index.memory.checkpoints import CheckpointPart
from powermail.index.memory.copies import CopyPart
from powermail.index.memory.epochs import EpochPart
from powermail.index.memory.identities import IdentityPart
from powermail.index.memory.leases import LeasePart
from powermail.index.memory.membership import MembershipPart
from powermail.index.memory.queue import QueuePart
from powermail.index.memory.state import MemoryStore
from powermail.index.memory.tallies import TallyPart

__all__ = ["MemoryIndex", "MemoryStore"]


class MemoryIndex(CheckpointPart, CopyPart, QueuePart, LeasePart, TallyPart, MembershipPart, IdentityPart, EpochPart):
    """The whole index, in memory."""
