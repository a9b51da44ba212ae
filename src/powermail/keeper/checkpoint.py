"""Owns checkpoints: what mailboxes show, written to the nodes, so that the index can be made anew from them (P15)."""

from __future__ import annotations

import hashlib

import msgspec
import zstandard
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import NodeTrouble
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import CheckpointData, Index
from powermail.keeper.reconcile import MARK_NAME


class CheckpointBody(Struct):
    """One checkpoint: a whole mailbox (`since` 0) or what changed after MODSEQ `since`."""

    account: str
    name: str
    uidvalidity: int
    uid_next: int
    modseq: int
    since: int
    at: float
    entries: list[tuple[int, str, int, int, int, float]]  # uid, key in hex, flags, modseq, octets, received_at
    expunged: list[int]


def checkpoint_name(account: str, name: str) -> bytes:
    """The 16 octets a mailbox's checkpoints are filed under."""
    return hashlib.sha256(f"{account}\0{name}".encode()).digest()[:16]


def encode(data: CheckpointData, at: float) -> bytes:
    """A checkpoint as stored."""
    box = data.mailbox
    entries = [(e.uid, e.key.hex(), e.flags, e.modseq, e.octets, e.received_at) for e in data.entries]
    body = CheckpointBody(
        box.account, box.name, box.uidvalidity, box.uid_next, box.modseq, data.since_modseq, at, entries, data.expunged
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
            data = await self._index.checkpoint_data(mailbox)
            if data is None:
                continue
            at = self._world.clock.now()
            name = checkpoint_name(data.mailbox.account, data.mailbox.name)
            body = encode(data, at)
            receipts = 0
            for node in self._cluster.place():
                try:
                    await node.put_checkpoint(name, data.number, body)
                except NodeTrouble:
                    continue
                receipts += 1
                if receipts == self._cluster.copies_required:
                    await self._index.checkpoint_done(data, at)
                    written += 1
                    break
        return written

    async def mark(self) -> None:
        """Writes the commit mark to every node that takes it."""
        mark = str(self._index.commits).encode()
        for node in self._cluster.place():
            try:
                await node.put_checkpoint(MARK_NAME, 0, mark)
            except NodeTrouble:
                continue
