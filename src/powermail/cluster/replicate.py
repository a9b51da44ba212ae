"""Owns replication: one message to R nodes in R groups, streaming, with bounded memory.

Contract: `Replication.commit` returns when R receipts of R different groups are in. When they cannot be had it raises
`NotStored`, which names the nodes that may hold a commit all the same: what becomes of the message is the index's decision,
and no node is told anything before it (law 5). Streams that were never asked to commit are let go with `cancel`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from powermail.base import limits
from powermail.base.digest import hash_octets
from powermail.base.errors import CommitRefused, CopyDamaged, CopyMissing, NeverAsked, NodeTrouble, NotRedundant, Trouble
from powermail.base.log import Event
from powermail.base.tasks import report_bug
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.packing import Packer
from powermail.mail.envelope import Commit
from powermail.storage.contract import Chunk, Mark, Origin, Receipt, Stamp, StorageNode
from powermail.storage.layout import Standing

_DELIVERY, _ACTIVE = Origin.DELIVERY, Standing.ACTIVE
_NO_COPY = (Trouble, TimeoutError, CopyMissing, CopyDamaged)


class NotStored(NotRedundant):
    """Fewer than R receipts came. `undecided` were asked to commit and may hold it; `refused` definitely do not (law 5)."""

    def __init__(self, why: str, undecided: tuple[str, ...], refused: tuple[str, ...]) -> None:
        super().__init__(why)
        self.undecided = undecided
        self.refused = refused


class Replication:
    """One message on its way to the nodes.

    Octets come by `write`, whole chunks go out while it streams; what is not yet a chunk waits here. Chunks sent are held
    up to a bound, so that a node that steps in can be given them; beyond it they are read back from a node that has them.
    """

    def __init__(self, world: World, cluster: Cluster, packer: Packer, key: bytes) -> None:
        """Raises NotRedundant when too few groups take mail."""
        self.key = key
        self.octets = 0
        self._world = world
        self._cluster = cluster
        self._patience = cluster.receipts
        self._packer = packer
        order = cluster.place()
        self._targets = order[: cluster.copies_required]
        self._spares = order[cluster.copies_required :]
        self._streamed: dict[str, StorageNode] = {}  # nodes that were given chunks before any commit
        self._asked: dict[str, StorageNode] = {}  # to commit
        self._receipts: dict[str, Receipt] = {}
        # (node, incarnation, group) of the receipts, the group as it was when the node was asked: what a layout says since then
        # makes no copy more or less redundant than it was written.
        self._counted: dict[tuple[str, str, str], None] = {}
        self._refused: dict[str, None] = {}  # definitely
        self._why = ""  # what failed first
        self._stamps: dict[str, Stamp] | None = None  # once they are frozen
        self._closes_at: dict[str, float] = {}  # when feeding each spare ends, then: by the age of its stamp (law 2)
        self._digest = hashlib.sha256()
        self._open: list[bytes] = []
        self._open_octets = 0
        self._sizes: list[int] = []
        self._held: dict[int, Chunk] = {}
        self._held_octets = 0

    # -- streaming ----------------------------------------------------------------------------------------------------

    async def write(self, octets: bytes) -> None:
        """Adds octets; waits while the nodes are behind. Raises NotRedundant: no node was asked to commit."""
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
        targets = list(self._targets)
        for node in targets:
            self._streamed[node.id] = node
        outcomes = await self._all(targets, [node.append(self.key, [chunk]) for node in targets])
        failed = [node for node, outcome in zip(targets, outcomes, strict=True) if outcome is not None]
        for node in failed:
            self._targets.remove(node)
        for node, outcome in zip(targets, outcomes, strict=True):
            if outcome is None:
                continue
            self._note_failed(node, outcome)
            spare = await self._feed_spare({target.group for target in self._targets}, chunk.number + 1)
            if spare is None:
                raise NotRedundant(f"node {node.id} failed and no other group takes mail") from outcome
            self._targets.append(spare)

    async def _all(
        self, nodes: Sequence[StorageNode], work: Sequence[Coroutine[Any, Any, None]]
    ) -> list[Trouble | TimeoutError | None]:
        """What each call came to, all waited for; a bug of ours is raised."""
        outcomes: list[Trouble | TimeoutError | None] = []
        for outcome in await asyncio.gather(*(self._patience.wait(call) for call in work), return_exceptions=True):
            if outcome is not None and not isinstance(outcome, Trouble | TimeoutError):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    def _note_failed(self, node: StorageNode, error: Exception) -> None:
        """A node did not do what was asked, or not in time."""
        text = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
        if isinstance(error, TimeoutError):
            self._cluster.note_slow(node.id)
        elif not isinstance(error, _NO_COPY):
            report_bug(self._world.log, error, f"node {node.id}")
        self._world.log.event(Event.TROUBLE, key=self.key, node=node.id, error=text)
        self._why = self._why or f"node {node.id}: {text}"

    async def _feed_spare(self, groups: set[str], count: int) -> StorageNode | None:
        """Gives the first `count` chunks to the next node in placement order that is in none of `groups`. None if there is
        none, or if its stamp would be too old (law 2).
        """
        self._world.counters.add("cluster.replaced")
        while True:
            spare = self._next_spare(groups)
            if spare is None:
                return None
            self._spares.remove(spare)
            try:
                async with asyncio.timeout(self._window_s(spare)):
                    for number in range(count):
                        chunk = self._held.get(number) or await self._read_back(number, spare)
                        self._streamed[spare.id] = spare
                        await self._patience.wait(spare.append(self.key, [chunk]))
            except _NO_COPY as error:
                self._note_failed(spare, error)
                continue
            return spare

    def _next_spare(self, groups: set[str]) -> StorageNode | None:
        """The next node in placement order that is in none of `groups`; where copies go apart, of a site that has none yet if
        there is one.
        """
        left = [node for node in self._spares if node.group not in groups and self._may_be_asked(node)]
        if not left or not self._cluster.apart:
            return left[0] if left else None
        site = self._cluster.site_of
        used = {site(node.id) for node in (*self._targets, *self._asked.values()) if node.group in groups}
        return next((node for node in left if site(node.id) not in used), left[0])

    def _may_be_asked(self, node: StorageNode) -> bool:
        if self._stamps is not None and (node.id not in self._stamps or self._window_s(node) == 0.0):
            return False
        return self._cluster.is_writable(node)

    def _window_s(self, spare: StorageNode) -> float | None:
        """How long it may still be fed: not for ever once stamps are frozen, or its own would be too old (law 2)."""
        return None if self._stamps is None else max(0.0, self._closes_at[spare.id] - self._world.clock.monotonic())

    async def _read_back(self, number: int, but: StorageNode) -> Chunk:
        """An earlier chunk, from a node that has it; those that kept us waiting are asked last."""
        holders = [node for node in self._streamed.values() if node is not but]
        for node in sorted(holders, key=lambda node: (node.id not in self._receipts, self._cluster.is_slow(node.id))):
            try:
                return await self._patience.wait(node.read_chunk(self.key, number))
            except _NO_COPY:
                continue
        raise NodeTrouble("no node has the earlier chunks")

    # -- committing ---------------------------------------------------------------------------------------------------

    async def commit(self, make: Callable[[int, str, list[int]], Commit]) -> tuple[Commit, tuple[Receipt, ...]]:
        """Makes the message durable on R nodes; its commit record, and the receipts.

        `make` builds the record from (octets, sha256 in hex, sizes). Raises NotStored.
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
        body = record.format()
        # law 2: all stamps are frozen when the first node is asked to commit, not while it streamed
        self._stamps = self._cluster.stamps([*self._targets, *self._spares])
        closes_at = self._world.clock.monotonic() + limits.COMMIT_WINDOW_S - limits.SPARE_MARGIN_S
        self._closes_at = {spare.id: closes_at - spare.stamp_age_s() for spare in self._spares}
        layout = self._cluster.layout.version
        await self._ask(self._targets, last, body)
        while True:
            if self._cluster.layout.version != layout:
                layout = self._cluster.layout.version
                self._forget_expelled()
            groups = {group for _, _, group in self._counted}
            if len(groups) >= self._cluster.copies_required:
                break
            spare = await self._feed_spare(groups, len(self._sizes) - len(last))
            if spare is None:
                raise NotStored(self._why or "too few nodes have a stamp", self.undecided, tuple(self._refused))
            await self._ask([spare], last, body)
        return record, tuple(self._receipts.values())

    async def _ask(self, nodes: Sequence[StorageNode], last: list[Chunk], body: bytes) -> None:
        """Asks nodes to commit, each with its frozen stamp, and waits for their answers."""
        assert self._stamps is not None
        count = len(self._sizes)
        waiting: list[tuple[StorageNode, str, asyncio.Future[Receipt]]] = []
        for node in nodes:
            stamp = self._stamps.get(node.id)
            if stamp is None or self._cluster.standing(node.id) is not _ACTIVE:
                continue  # placed by an older layout: what the node took is not to grow any more
            self._asked[node.id] = node
            try:
                answer = node.commit(self.key, last, body, count, stamp, _DELIVERY)
                coming = answer if isinstance(answer, asyncio.Future) else asyncio.ensure_future(answer)
            except Exception as error:  # noqa: BLE001  whatever it is, this node gave no receipt
                self._without_receipt(node, error)
            else:
                waiting.append((node, node.group, coming))
        try:
            await self._hear(waiting)
        except BaseException:  # the process ends: nobody hears what the others say
            for _, _, coming in waiting:
                if coming.done() and not coming.cancelled():
                    coming.exception()
            raise

    async def _hear(self, waiting: Sequence[tuple[StorageNode, str, asyncio.Future[Receipt]]]) -> None:
        late = False
        for node, group, coming in waiting:
            try:
                if late and not coming.done():
                    coming.cancel()  # all have had as long as the one that took too long
                    raise TimeoutError
                receipt = self._receipts[node.id] = await self._patience.wait(coming)
            except Exception as error:  # noqa: BLE001  the same
                late = late or isinstance(error, TimeoutError)
                self._without_receipt(node, error)
            else:
                self._counted[receipt.node, receipt.incarnation, group] = None

    def _forget_expelled(self) -> None:
        """What a node took that was expelled meanwhile never counts again: no index takes its receipt, and it is no copy."""
        gone = [name for name in self._receipts if self._cluster.standing(name) is Standing.EXPELLED]
        for name in gone:
            del self._receipts[name]
        self._counted = {one: None for one in self._counted if one[0] not in gone}

    def _without_receipt(self, node: StorageNode, error: Exception) -> None:
        """Only a definite refusal, or that it was never asked, says that it holds no commit; else that is unknown (law 5)."""
        if isinstance(error, CommitRefused):
            self._refused[node.id] = None
        elif isinstance(error, NeverAsked):
            del self._asked[node.id]
        self._note_failed(node, error)

    def _undecided(self) -> list[StorageNode]:
        return [node for name, node in self._asked.items() if name not in self._refused]

    @property
    def undecided(self) -> tuple[str, ...]:
        """Nodes that were asked to commit and did not refuse definitely: they may hold it (law 5)."""
        return tuple([node.id for node in self._undecided()])

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Receipts so far."""
        return tuple(self._receipts.values())

    # -- letting go ---------------------------------------------------------------------------------------------------

    @property
    def abandoned(self) -> list[StorageNode]:
        """Nodes that were given chunks, and were never asked to commit or refused definitely: they are told `cancel`."""
        return [node for name, node in self._streamed.items() if name not in self._asked or name in self._refused]

    async def cancel(self) -> None:
        """Lets streams go that were never asked to commit; what cannot be told lets go by itself (law 5)."""
        nodes = self.abandoned
        self._streamed.clear()
        await self._all(nodes, [node.cancel(self.key) for node in nodes])

    async def bury(self, mark: Mark, at: float) -> bool:
        """Writes a tombstone on every node that may hold a commit; True if each confirmed. Only after the index has taken
        `aborted`; a node that would refuse a commit of this delivery by now confirms nothing (law 5).
        """
        nodes, stamps = self._undecided(), self._stamps or {}
        told = await self._all(nodes, [self._bury_on(node, mark, at, stamps[node.id]) for node in nodes])
        return all(error is None for error in told)

    async def _bury_on(self, node: StorageNode, mark: Mark, at: float, stamp: Stamp) -> None:
        await node.delete([self.key], mark, at, stamp)
