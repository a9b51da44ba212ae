"""Owns replication: one message to R nodes in R groups, streaming, with bounded memory.

Contract: `Replication.commit` returns when R receipts of R different groups are in, and raises when they cannot be had;
then every node that may hold the message has been told to abort, or `undecided` names those that could not be told.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgspec
import zstandard

from powermail.base import limits
from powermail.base.digest import hash_octets
from powermail.base.errors import NodeTrouble, NotRedundant, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.mail.envelope import Commit
from powermail.storage.contract import COMPRESSED, Chunk, NodeState, StorageNode

_COMPRESS_MIN_OCTETS = 256
_encode = msgspec.json.Encoder().encode


class Packer:
    """Cuts octets into chunks and compresses each where it helps."""

    def __init__(self, compress: bool) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1, write_content_size=True) if compress else None

    def chunk(self, number: int, octets: bytes) -> Chunk:
        """One chunk as stored."""
        if self._compressor is not None and len(octets) >= _COMPRESS_MIN_OCTETS:
            packed = self._compressor.compress(octets)
            if len(packed) < len(octets) - len(octets) // 8:
                return Chunk(number, COMPRESSED, packed, len(octets))
        return Chunk(number, 0, octets, len(octets))


class Replication:
    """One message on its way to the nodes.

    Octets come by `write`, whole chunks go out while it streams; what is not yet a chunk waits here. Chunks sent are held
    up to a bound, so that a node that steps in can be given them; beyond it they are read back from a node that has them.
    """

    def __init__(self, world: World, cluster: Cluster, packer: Packer, key: bytes) -> None:
        """Raises NotRedundant when too few groups take mail."""
        self.key = key
        self.octets = 0
        self.undecided: list[str] = []
        self.given_up: list[str] = []  # nodes that were asked to commit and did not answer: they may hold it all the same
        self._world = world
        self._cluster = cluster
        self._patience = cluster.receipts
        self._packer = packer
        order = cluster.place()
        self._targets = order[: cluster.copies_required]
        self._spares = order[cluster.copies_required :]
        self._touched: dict[str, StorageNode] = {}
        self._digest = hashlib.sha256()
        self._open: list[bytes] = []
        self._open_octets = 0
        self._sizes: list[int] = []
        self._held: dict[int, Chunk] = {}
        self._held_octets = 0

    async def write(self, octets: bytes) -> None:
        """Adds octets; waits while the nodes are behind. Raises NotRedundant, NodeTrouble."""
        self.octets += len(octets)
        hash_octets(self._digest, octets)
        self._open.append(octets)
        self._open_octets += len(octets)
        if self._open_octets < limits.CHUNK_OCTETS:
            return
        data = b"".join(self._open)
        position = 0
        while len(data) - position >= limits.CHUNK_OCTETS:
            chunk = self._packer.chunk(len(self._sizes), data[position : position + limits.CHUNK_OCTETS])
            position += limits.CHUNK_OCTETS
            self._sizes.append(chunk.octets)
            self._hold(chunk)
            await self._send(chunk)
        self._open = [data[position:]] if position < len(data) else []
        self._open_octets = len(data) - position

    def _hold(self, chunk: Chunk) -> None:
        self._held[chunk.number] = chunk
        self._held_octets += len(chunk.stored)
        while self._held_octets > limits.REPLICATE_HELD_OCTETS_MAX:
            oldest = next(iter(self._held))
            self._held_octets -= len(self._held.pop(oldest).stored)

    async def _send(self, chunk: Chunk) -> None:
        for node in self._targets:
            self._touched[node.id] = node
        outcomes = await asyncio.gather(
            *(self._patience.wait(node.append(self.key, [chunk])) for node in self._targets), return_exceptions=True
        )
        for node, outcome in zip(list(self._targets), outcomes, strict=True):
            if isinstance(outcome, Trouble | TimeoutError):
                await self._replace(node, outcome, chunk.number + 1)
            elif isinstance(outcome, BaseException):
                raise outcome

    async def _replace(self, failed: StorageNode, why: BaseException, count: int) -> StorageNode:
        """Gives the chunks so far to the next node in placement order. Raises NotRedundant when none is left."""
        self._world.counters.add("cluster.replaced")
        taken = {node.group for node in self._targets if node is not failed}
        while self._spares:
            spare = self._spares.pop(0)
            if spare.group in taken or spare.state is not NodeState.READ_WRITE:
                continue
            try:
                self._touched[spare.id] = spare
                for number in range(count):
                    await self._patience.wait(spare.append(self.key, [await self._chunk(number, failed)]))
            except (Trouble, TimeoutError):
                continue
            self._targets[self._targets.index(failed)] = spare
            return spare
        raise NotRedundant(f"node {failed.id} failed and no other group takes mail") from why

    async def _chunk(self, number: int, failed: StorageNode) -> Chunk:
        held = self._held.get(number)
        if held is not None:
            return held
        for node in self._targets:
            if node is not failed:
                return await self._patience.wait(node.read_chunk(self.key, number))
        raise NodeTrouble("no node has the earlier chunks")

    async def commit(self, make: Callable[[int, str, list[int]], Commit]) -> tuple[Commit, tuple[str, ...]]:
        """Makes the message durable on R nodes and returns its commit record and the nodes that hold it.

        `make` builds the record from (octets, sha256 in hex, sizes). Raises NotRedundant or NodeTrouble after aborting.
        Cancellation: must not be cancelled; the caller runs it in a task that outlives the session.
        """
        last: list[Chunk] = []
        if self._open_octets or not self._sizes:
            chunk = self._packer.chunk(len(self._sizes), b"".join(self._open))
            self._open = []
            self._sizes.append(chunk.octets)
            last.append(chunk)
            self._hold(chunk)
        record = make(self.octets, self._digest.hexdigest(), self._sizes)
        body = _encode(record)
        count = len(self._sizes)
        for node in self._targets:
            self._touched[node.id] = node
        try:
            waiting = [(node, self._start(node, last, body, count)) for node in self._targets]
            failures: list[tuple[StorageNode, BaseException]] = []
            for node, receipt in waiting:
                error = receipt if isinstance(receipt, Trouble) else await self._receipt(receipt)
                if error is not None:
                    failures.append((node, error))
            for failed, error in failures:
                await self._commit_elsewhere(failed, error, last, body, count)
        except BaseException:
            await self.abort()
            raise
        return record, tuple(node.id for node in self._targets)

    def _start(self, node: StorageNode, last: list[Chunk], body: bytes, count: int) -> asyncio.Future[None] | Trouble:
        try:
            return asyncio.ensure_future(node.commit(self.key, last, body, count))
        except Trouble as error:
            return error

    async def _receipt(self, future: asyncio.Future[None]) -> BaseException | None:
        try:
            await self._patience.wait(future)
        except (Trouble, TimeoutError) as error:
            return error
        return None

    async def _commit_elsewhere(
        self, failed: StorageNode, error: BaseException, last: list[Chunk], body: bytes, count: int
    ) -> None:
        self._world.log.event(Event.TROUBLE, key=self.key, node=failed.id, error=str(error) or type(error).__name__)
        while True:
            self.given_up.append(failed.id)
            spare = await self._replace(failed, error, count - len(last))
            receipt = self._start(spare, last, body, count)
            again = receipt if isinstance(receipt, Trouble) else await self._receipt(receipt)
            if again is None:
                return
            failed, error = spare, again

    async def abort(self) -> None:
        """Tells every node that may hold something; fills `undecided` with those that could not be told."""
        touched, self._touched = self._touched, {}
        self.undecided = []
        for name, node in touched.items():
            try:
                await self._patience.wait(node.abort(self.key))
            except (Trouble, TimeoutError):
                self.undecided.append(name)
