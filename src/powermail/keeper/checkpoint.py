"""Owns checkpoints: what mailboxes show, written to the nodes, so that the index can be made anew from them (P15)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import zstandard
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import CheckpointPlan, EntryFacts, Index
from powermail.keeper.reconcile import MARK_NAME


class CheckpointBody(Struct):
    """One record of a checkpoint: part of a whole mailbox (`since` 0) or of what changed after MODSEQ `since`.

    The parts of one checkpoint have `since` and `modseq` in common; it counts when part 0 to the `last` one are there.
    """

    account: str
    name: str
    uidvalidity: int
    uid_next: int
    modseq: int
    since: int
    at: float
    part: int
    last: bool
    entries: list[tuple[int, str, int, int, int, float]]  # uid, key in hex, flags, modseq, octets, received_at
    expunged: list[int]


def checkpoint_name(account: str, name: str, side: int) -> bytes:
    """The 16 octets a mailbox's checkpoints are filed under; whole ones take the two sides in turn."""
    return hashlib.sha256(f"{account}\0{name}\0{side}".encode()).digest()[:16]


def encode(
    plan: CheckpointPlan, part: int, last: bool, entries: Sequence[EntryFacts], expunged: Sequence[int], at: float
) -> bytes:
    """One record as stored."""
    box = plan.mailbox
    body = CheckpointBody(
        account=box.account,
        name=box.name,
        uidvalidity=box.uidvalidity,
        uid_next=box.uid_next,
        modseq=box.modseq,
        since=plan.since_modseq,
        at=at,
        part=part,
        last=last,
        entries=[(e.uid, e.key.hex(), e.flags, e.modseq, e.octets, e.received_at) for e in entries],
        expunged=list(expunged),
    )
    return zstandard.ZstdCompressor(level=3).compress(msgspec.json.encode(body))


def decode(octets: bytes) -> CheckpointBody:
    """Raises msgspec.DecodeError or zstandard.ZstdError."""
    return msgspec.json.decode(zstandard.ZstdDecompressor().decompress(octets), type=CheckpointBody)


class Checkpointer:
    """Writes checkpoints of mailboxes that changed, each at most every 15 minutes."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._marked_at = float("-inf")

    async def step(self) -> float:
        """Some mailboxes; now and then the commit mark."""
        now = self._world.clock.monotonic()
        if now - self._marked_at >= limits.CHECKPOINT_INTERVAL_S:
            await self.mark()
            self._marked_at = now
        written = await self.write_due(self._world.clock.now() - limits.CHECKPOINT_INTERVAL_S)
        return 0.0 if written else 10.0

    async def write_due(self, before: float) -> int:
        """Checkpoints mailboxes whose last one was before that time; how many were written."""
        written = 0
        for mailbox in await self._index.checkpoint_due(before, 50):
            plan = await self._index.checkpoint_plan(mailbox)
            if plan is not None and await self.write(plan, self._world.clock.now()):
                written += 1
        return written

    async def write(self, plan: CheckpointPlan, at: float) -> bool:
        """Writes one checkpoint, record by record, to R nodes. False if they cannot be had."""
        nodes = self._cluster.place()[: self._cluster.copies_required]
        name = checkpoint_name(plan.mailbox.account, plan.mailbox.name, plan.side)
        limit = limits.CHECKPOINT_PAGE_ROWS
        part = rows = after_entry = after_expunged = 0
        more = True
        while more:
            entries = await self._index.checkpoint_entries(plan, after_entry, limit)
            expunged = await self._index.checkpoint_expunged(plan, after_expunged, limit)
            more = len(entries) == limit or len(expunged) == limit
            after_entry = entries[-1].uid if entries else limits.UID_MAX
            after_expunged = expunged[-1] if expunged else limits.UID_MAX
            body = encode(plan, part, not more, entries, expunged, at)
            try:
                for node in nodes:
                    await node.put_checkpoint(name, plan.number + part, body)
            except NodeTrouble as error:
                self._world.log.event(Event.TROUBLE, worker="checkpoint", error=str(error))
                return False
            part += 1
            rows += len(entries) + len(expunged)
        await self._index.checkpoint_done(plan, part, rows, at)
        return True

    async def mark(self) -> None:
        """Writes the commit mark to every node that takes it."""
        mark = str(self._index.commits).encode()
        for node in self._cluster.place():
            try:
                await node.put_checkpoint(MARK_NAME, 0, mark)
            except NodeTrouble:
                continue
