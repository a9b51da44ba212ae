"""Owns reconciliation: what nodes' logs hold behind their watermarks against the index (law 6).

Everything a node holds is in the index within two minutes of both being reachable, whatever crashed in between. Nothing behind
a watermark is looked at twice, except stretches that could not be read: these are noted, and tried again first.
Danger: a record that is passed over and not noted is lost for ever; one that is entered twice is a ghost (P4, P5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import NodeTrouble, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Batch, Index, NodeRow, Reconciled
from powermail.keeper.belief import known_row, read_commits
from powermail.keeper.epochs import EpochKeeper
from powermail.keeper.walk import Walker
from powermail.mail.envelope import Commit
from powermail.storage.contract import NodeFacts, Origin, Position, Scanned, StorageNode, Unread

_TRIES = 3  # when another keeper, or a change of a row, was quicker
_MAIL = Origin.DELIVERY


class Reconciler:
    """Goes through the log of one node after the other, each in its own time."""

    def __init__(self, world: World, cluster: Cluster, index: Index, epochs: EpochKeeper) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._epochs = epochs
        self._walker = Walker(world, index)
        self._busy: dict[str, asyncio.Lock] = {}  # forgetting goes through the same logs
        self._turn = 0

    async def step(self, node: StorageNode) -> float:
        """One pass over one node. Raises NodeTrouble, IndexTrouble."""
        waited_for = self._index.catching_up or self._index.unsettled
        await self._pass(node, 0.0 if waited_for else limits.RECONCILE_GRACE_S)
        return 1.0 if waited_for else limits.RECONCILE_INTERVAL_S

    async def settle(self, deadline_s: float = limits.NODE_OPEN_WAIT_S) -> None:
        """At start and at stop, while no delivery is under way: everything durable is entered, however young.

        All nodes at once, each for so long at most: what is left is done in the background, or at the next start (law 14).
        """
        await asyncio.gather(*(self._settle(node, deadline_s) for node in self._cluster.admitted()))

    async def _settle(self, node: StorageNode, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await self._pass(node, 0.0)
        except (Trouble, TimeoutError) as error:
            text = str(error) or "not done in time"
            self._world.log.event(Event.TROUBLE, worker="reconcile", node=node.id, error=text)

    async def _pass(self, node: StorageNode, age_s: float) -> None:
        async with self._lock(node):
            row, facts = await self._compared(node)
            if row is None or facts is None or not self._index.numbering:
                return
            if row.owes_walk:
                if not await self._walker.walk(node, row, facts):
                    return
                row = await known_row(self._index, node)
            if row is not None:
                await self._retry_unread(node, row, facts)
        connection = self._index.connection
        if await self.advance(node, age_s) and not age_s and row is not None:
            self._epochs.note_settled(node.id, row.incarnation, connection)

    def _lock(self, node: StorageNode) -> asyncio.Lock:
        return self._busy.setdefault(node.id, asyncio.Lock())

    async def _compared(self, node: StorageNode) -> tuple[NodeRow | None, NodeFacts | None]:
        """The row of a node whose present opening was compared with the index, marks first (laws 6, 10); else None."""
        if node not in self._cluster.admitted():
            return None, None
        facts = await node.facts()
        if await self._epochs.compare(node, facts):
            return None, None
        row = await known_row(self._index, node)
        if row is None or row.incarnation != facts.incarnation:
            return None, None
        return row, facts

    # -- behind the watermark -----------------------------------------------------------------------------------------

    async def advance(self, node: StorageNode, age_s: float, end: Position | None = None, round_: int | None = None) -> bool:
        """Goes on behind the watermark until there is nothing more, or until `end`; True if it came that far.

        With a round, the batch that reaches `end` says that the node was scanned for it (law 9).
        """
        async with self._lock(node):
            for _ in range(_TRIES):
                row, facts = await self._compared(node)
                if row is None or facts is None or row.owes_walk or not self._index.numbering:
                    return False
                outcome = await self._advance(node, row, facts, age_s, end, round_)
                if outcome is not None:
                    return outcome
        return False

    async def _advance(
        self, node: StorageNode, row: NodeRow, facts: NodeFacts, age_s: float, end: Position | None, round_: int | None
    ) -> bool | None:
        """As `advance`; None when another keeper was quicker, or the node has gone on, and it must begin again from the row."""
        position = committed = row.watermark
        entered = 0
        while True:
            scan = await node.scan(position, limits.RECONCILE_BATCH, age_s)
            if scan.incarnation != row.incarnation:
                return False
            following = scan.following
            reached = end is not None and following >= end
            # Marks and checkpoints alone move the watermark only with the segment: each batch is a commit, and asks for a mark.
            if scan.items or scan.unread or reached or following.segment > committed.segment:
                batch = Batch(node.id, row.incarnation, committed, following, scan.end, (), (), {}, facts.birth, scan.unread)
                result = await self._enter(node, batch._replace(round=round_ if reached else None), scan.items)
                entered += result.entered
                if result.lost:
                    return False
                if not result.moved:
                    return None
                committed = following
            if reached or following == position:
                self._report(node, entered)
                return reached or end is None
            position = following

    def _report(self, node: StorageNode, entered: int) -> None:
        if entered:
            self._world.counters.add("keeper.reconciled", entered)
            self._world.log.event(Event.RECONCILED, node=node.id, messages=entered)

    async def _enter(self, node: StorageNode, batch: Batch, items: Sequence[Scanned]) -> Reconciled:
        """One batch of law 6's table, with the commit records that the index needs."""
        places = {item.key: item.position for item in items if item.origin is not None}
        origins = {item.key: item.origin for item in items if item.origin is not None}
        fates = await self._index.fates(list(places))
        wanted = [
            key
            for key, position in places.items()
            if key not in fates and origins[key] is Origin.DELIVERY and position >= batch.birth
        ]
        commits: dict[bytes, Commit] = {}
        unread = list(batch.unread)
        for _ in range(_TRIES):
            records = await read_commits(node, wanted)
            commits.update(records.good)
            for key, why in records.bad.items():  # it may be mail: noted, and tried again
                self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=why)
                unread.append(Unread(places[key], 0))
            for key in wanted:
                if key not in records.good:
                    del places[key]
            result = await self._index.reconcile(
                batch._replace(
                    copies=[(key, position, origins[key]) for key, position in places.items()],
                    tombstones=[item.key for item in items if item.origin is None],
                    commits=commits,
                    unread=unread,
                )
            )
            if result.lost:
                await self._epochs.raise_epoch(f"node {node.id} has a tombstone of a message that is listed")  # law 6
            if not result.missing:
                return result
            wanted = [key for key in result.missing if key in places]
        raise NodeTrouble(f"keys of node {node.id} change while they are compared; again soon")

    # -- what could not be read ---------------------------------------------------------------------------------------

    async def _retry_unread(self, node: StorageNode, row: NodeRow, facts: NodeFacts) -> None:
        """Law 6: stretches that could not be read are tried again; trouble with one does not keep the log waiting."""
        notes = await self._index.unread(node.id, limits.RECONCILE_BATCH)
        if not notes:
            return
        self._turn += 1
        first = self._turn % len(notes)
        for note in notes[first:] + notes[:first]:
            try:
                scan = await node.reread(note)
            except NodeTrouble as error:
                self._world.log.event(Event.TROUBLE, worker="reconcile", node=node.id, error=str(error))
                return
            here = row.watermark
            batch = Batch(node.id, row.incarnation, here, here, here, (), (), {}, facts.birth, read=(note,))
            items: list[Scanned] = []
            if scan is not None:  # else its segment is gone
                if scan.incarnation != row.incarnation:
                    return
                if scan.unread == [note] and not scan.items:
                    continue
                batch = batch._replace(end=scan.end, unread=scan.unread)
                # A single record is noted only if it is to be entered: by a walk whatever its origin (law 11).
                items = [item if note.octets or item.origin is None else item._replace(origin=_MAIL) for item in scan.items]
            result = await self._enter(node, batch, items)
            if not result.moved or result.lost:
                return
            self._report(node, result.entered)
