"""Owns lost commits: marks on the nodes by which they are noticed, and what follows when they are (laws 10, 11).

Order of an epoch: raised above what nodes of G-R+1 groups know; durable on R groups; heads of checkpoints learned from G-R+1
groups; numbers are given again; every node is walked; when G-R+1 groups are, readers are let in. Each step may be interrupted,
and goes on in whatever process comes to it next: all that an epoch owes is done again there, and may be done twice. Each change
names the epoch that it belongs to, so that who was held up changes nothing of a later one.
Danger: a number given before the epoch is durable, or the heads are known, may be given twice (P10).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexTrouble, NodeTrouble, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import EpochFacts, Head, Index, NodeRow
from powermail.keeper.checkpoint import heads_record, write_heads
from powermail.keeper.checkpoint_form import HEADS_MAX
from powermail.storage.contract import Mark, NodeFacts, StorageNode

T = TypeVar("T")
Heads = Callable[[StorageNode], AsyncIterator[list[Head]]]
_LOOK_S = 1.0


class _Put(NamedTuple):
    """The mark that a node has: which, on what incarnation, when, and how many numbers had been given."""

    incarnation: str = ""
    mark: Mark = Mark()
    at: float = 0.0
    numbered: int = 0


class Marker:
    """Puts the index's mark on every node: after 10 s of activity, after 4,000 numbers, at start and at stop (law 10)."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._put: dict[str, _Put] = {}  # by node

    async def step(self, node: StorageNode) -> float:
        """Puts the mark on one node if it is due. Raises NodeTrouble, IndexTrouble."""
        if node in self._cluster.admitted() and self._index.numbering and self._is_due(node):
            await self.put(node)
        return _LOOK_S

    def _is_due(self, node: StorageNode) -> bool:
        """What others have done is only seen by a look at the index: often enough, and not each time."""
        put = self._put.get(node.id, _Put())
        if put.incarnation != node.incarnation or self._index.numbered - put.numbered >= limits.MARK_NUMBERS_MAX:
            return True
        return self._world.clock.monotonic() - put.at >= limits.MARK_INTERVAL_S

    async def put(self, node: StorageNode) -> None:
        """Puts the mark on one node, as it is now, unless it has that one. Raises NodeTrouble, IndexTrouble."""
        numbered, incarnation, at = self._index.numbered, node.incarnation, self._world.clock.monotonic()
        connection = self._index.connection
        try:
            mark = await self._index.proof(connection)
        except IndexTrouble:
            if connection == self._index.connection:
                raise
            mark = await self._index.proof(self._index.connection)  # nothing was read before that it would have to prove
        if self._put.get(node.id, _Put())[:2] != (incarnation, mark):
            await node.put_mark(mark)
            self._world.counters.add("law.10.marks")
        self._put[node.id] = _Put(incarnation, mark, at, numbered)

    async def put_all(self, deadline_s: float = limits.NODE_CALL_TIMEOUT_S) -> None:
        """At start and at stop: every node that answers in time gets the mark; nobody waits for a sick one (law 14)."""
        await asyncio.gather(*(self._put_within(node, deadline_s) for node in self._cluster.admitted()))

    async def _put_within(self, node: StorageNode, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                await self.put(node)
        except (Trouble, TimeoutError) as error:
            self._world.log.event(Event.TROUBLE, worker="marks", node=node.id, error=str(error) or "no answer in time")


class EpochKeeper:
    """Notices that the index lost commits, and brings it back step by step. One of it does so at a time.

    A node is *intact* while its history goes back to before the commits were lost: its row in the index names a boot. One that
    was admitted with a new incarnation later has an empty boot there until the index has caught up.
    """

    def __init__(self, world: World, cluster: Cluster, index: Index, heads: Heads) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._heads = heads
        self._lock = asyncio.Lock()
        self._newcomers: Mapping[str, str] = {}  # incarnations admitted since the index was known to be whole, by node
        self._compared: dict[str, None] = {}  # nodes whose marks proved nothing since then
        self._settled: dict[str, tuple[str, int]] = {}  # incarnation, and connection to the index, by node
        self._epoch = 0  # the epoch of which the following is known
        self._marks_read = False
        self._durable = False
        self._heads_read: dict[str, str] = {}  # incarnations whose heads were learned, by node
        self.why = ""  # the last loss, for status

    # -- noticing ---------------------------------------------------------------------------------------------------

    async def compare(self, node: StorageNode, facts: NodeFacts) -> bool:
        """True if a node's mark proves that commits were lost: then the epoch was raised. Or if they may be, and others are to
        be asked first, which is not done here: this node may not be let in yet (law 10). Raises IndexTrouble.
        """
        found_in = self._index.epoch
        if not await self._index.lost(facts.mark):
            self._compared[node.id] = None
            return False
        async with self._lock:
            why = await self._index.lost(facts.mark)  # not dealt with while this waited
            if why and not (await self._index.epoch_facts()).doubted:
                await self._raise([facts.mark], why, found_in)
        return True

    async def raise_epoch(self, why: str) -> None:
        """Commits were lost, as something other than a mark shows: each node owes a walk. Raises IndexTrouble."""
        found_in = self._index.epoch
        async with self._lock:
            await self._raise([], why, found_in)

    def note_settled(self, node: str, incarnation: str, connection: int) -> None:
        """This incarnation was compared, and then its log entered to its end, all over one connection to the index."""
        self._settled[node] = incarnation, connection

    async def _raise_found(self, facts: EpochFacts) -> bool:
        """The epoch is raised because of what this process itself has met. Where that is only another history of the database,
        nodes are asked first: one may remember more than is there, and they owe walks then (law 10). As `_raise`; raises
        NodeTrouble when too few answer.
        """
        marks: list[Mark] = []
        if facts.doubted:
            new = facts.newcomers  # their history does not go back far enough
            rows = [
                row._replace(boot="") if new.get(row.id) == row.incarnation else row for row in await self._index.node_rows()
            ]
            marks = list((await self._marks_of_enough(rows)).values())
        return await self._raise(marks, facts.why, facts.epoch, facts.doubted)

    async def _raise(self, marks: list[Mark], why: str, found_in: int, asked: bool = False) -> bool:
        """From here on nothing is numbered. What other nodes know is read in `step`, which raises it again if need be. False if
        another process was quicker. `asked`: the marks are of nodes of G-R+1 groups.
        """
        epoch = await self._index.raise_epoch(marks, why, found_in, asked)  # law 11
        if not epoch:
            await self._index.epoch_facts()  # known from now on
            return False
        self._world.counters.add("law.11.epochs")
        self._take_up(epoch)
        self.why = why
        self._compared.clear()
        self._world.log.event(Event.EPOCH_RAISED, epoch=epoch, error=why)
        return True

    def _take_up(self, epoch: int) -> None:
        """Nothing of what this epoch owes is known to be done, whoever raised it."""
        self._epoch = epoch
        self._marks_read = self._durable = False
        self._heads_read.clear()

    # -- coming back ------------------------------------------------------------------------------------------------

    async def step(self) -> float:
        """Goes on with an epoch that was raised as far as the nodes allow. Raises Trouble that says what lacks."""
        facts = await self._index.epoch_facts()
        if facts.why or not facts.numbering:
            async with self._lock:
                await self._begin()
            facts = await self._index.epoch_facts()
        if facts.catching_up and facts.numbering:
            await self._catch_up(facts.epoch)
            return _LOOK_S
        if not facts.catching_up:
            await self._know_newcomers(facts.newcomers)
        return await self.step_here()

    async def step_here(self) -> float:
        """What every process does for itself, whoever brings the index back: ends the wait of its own readers. Raises Trouble
        that says what lacks.
        """
        await self.tell()
        if self._index.numbering and not self._index.catching_up and self._index.unsettled:
            await self._end_unsettled()
        return _LOOK_S

    async def tell(self) -> None:
        """Raises the epoch if this process has met the proof itself that commits were lost, and nobody else knows. And looks
        whether a wait of all is over: who does none of the leased jobs need not hear of it in another way. Raises Trouble.
        """
        if self._index.unsettled or self._index.catching_up or not self._index.numbering:
            async with self._lock:
                facts = await self._index.epoch_facts()
                if facts.why:
                    await self._raise_found(facts)

    async def _know_newcomers(self, newcomers: Mapping[str, str]) -> None:
        """Incarnations that were admitted belong to the index's history once nodes of enough groups, compared since then, show
        that it has lost nothing so far. Whoever admitted them may be another process.
        """
        if newcomers != self._newcomers:
            self._newcomers = newcomers
            self._compared.clear()
        elif newcomers:
            old = [node for node in self._compared if node not in newcomers]
            if not self._lacks(await self._index.node_rows(), old, self._compared):
                await self._index.know_newcomers(newcomers)

    async def _begin(self) -> None:
        facts = await self._index.epoch_facts()
        if facts.why:
            await self._raise_found(facts)
            facts = await self._index.epoch_facts()
        if facts.why or facts.numbering:
            return  # another process has begun it; or the look at what is there is to be had once more
        if facts.epoch != self._epoch:  # raised by another process, or before this one started
            self._take_up(facts.epoch)
        rows = await self._index.node_rows()
        if not self._marks_read and not await self._read_marks(rows):
            return
        epoch = self._epoch
        if not self._durable and not await self._make_durable(epoch):
            return
        await self._read_heads(rows)
        if await self._write_far_heads(epoch) and await self._index.begin_epoch(epoch):
            self._world.log.event(Event.EPOCH_RAISED, epoch=epoch, begun=True)

    async def _read_marks(self, rows: Sequence[NodeRow]) -> bool:
        """Law 11: no node of G-R+1 groups with intact history knows a higher epoch. False if another process was quicker."""
        marks = await self._marks_of_enough(rows)
        for mark in marks.values():
            if why := await self._index.lost(mark, begun=False):
                if not await self._raise(list(marks.values()), self.why or why, self._epoch):
                    return False
                break
        self._marks_read = True
        return True

    async def _marks_of_enough(self, rows: Sequence[NodeRow]) -> dict[str, Mark]:
        """What nodes remember, those of G-R+1 groups with intact history among them. Raises NodeTrouble."""
        answers = await self._ask_all(self._cluster.readable(), lambda node: node.facts())
        whole = [node for node, facts in answers.items() if is_intact(rows, node, facts.incarnation)]
        self._ask_groups(rows, whole, list(answers), "marks of")
        return {node: facts.mark for node, facts in answers.items()}

    async def _make_durable(self, epoch: int) -> bool:
        """Law 11: the epoch stands on nodes of R groups before a number is given out in it. False if it is another by now."""
        mark = await self._index.proof(self._index.connection)
        if mark.epoch != epoch:
            return False
        done = await self._ask_all(self._cluster.admitted(), lambda node: node.put_mark(mark))
        counted = self._cluster.counted()  # not who is about to go: fewer groups are asked then
        groups = {counted[node] for node in done if node in counted}
        if len(groups) < self._cluster.copies_required:
            raise NodeTrouble(f"epoch {epoch} is durable on {len(groups)} of {self._cluster.copies_required} groups")
        self._durable = True
        return True

    async def _read_heads(self, rows: Sequence[NodeRow]) -> None:
        """Law 11: no mailbox gets a number before the heads of its checkpoints were read."""
        asked = [node for node in self._cluster.readable() if self._heads_read.get(node.id) != node.incarnation]
        self._heads_read.update(await self._ask_all(asked, self._learn_heads))
        whole = [node for node, incarnation in self._heads_read.items() if is_intact(rows, node, incarnation)]
        self._ask_groups(rows, whole, list(self._heads_read), "checkpoints of")

    async def _write_far_heads(self, epoch: int) -> bool:
        """Law 11: who has few numbers left below its bound goes on from what R groups know: no checkpoint is written before the
        walks end. False if it is another epoch by now. Raises NotRedundant.
        """
        connection = self._index.connection
        while heads := await self._index.far_heads(HEADS_MAX):
            record, mark = heads_record(self._world, heads), await self._index.proof(connection)  # law 10
            counted = self._cluster.counted()
            nodes = [node for node in self._cluster.admitted() if node.id in counted]
            await write_heads(nodes, self._cluster.copies_required, record, mark)
            if not await self._index.heads_written(heads, epoch):
                return False
            self._world.counters.add("law.11.far_heads", len(heads))
        return True

    async def _learn_heads(self, node: StorageNode) -> str:
        incarnation = node.incarnation
        async for page in self._heads(node):
            await self._index.learn_heads(page)
        return incarnation

    async def _ask_all(self, nodes: Sequence[StorageNode], ask: Callable[[StorageNode], Awaitable[T]]) -> dict[str, T]:
        """What these nodes answer, all asked at once; who is in trouble is left out (law 14). Raises IndexTrouble."""
        answers = await asyncio.gather(*(ask(node) for node in nodes), return_exceptions=True)
        found: dict[str, T] = {}
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, NodeTrouble):
                self._world.log.event(Event.TROUBLE, worker="epochs", node=node.id, error=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[node.id] = answer
        return found

    async def _catch_up(self, epoch: int) -> None:
        connection = self._index.connection
        rows = await self._index.node_rows()
        walked = [row.id for row in rows if not row.owes_walk]
        whole = [row.id for row in rows if not row.owes_walk and row.boot]
        self._ask_groups(rows, whole, walked, "walks of")
        if await self._index.caught_up(
            epoch, connection
        ):  # every message has a copy, or a tombstone, on a node that was walked
            self._world.counters.add("law.11.caught_up")
            self._world.log.event(Event.EPOCH_RAISED, epoch=epoch, caught_up=True)

    async def _end_unsettled(self) -> None:
        """Readers wait no more once what nodes of G-R+1 groups hold is entered: a backup that was put back so soon that no
        mark tells of it is older than something that was listed (laws 6, 10).
        """
        now = self._index.connection
        rows = await self._index.node_rows()
        if now != self._index.connection:
            return  # what they say is of before
        done = {node: inc for node, (inc, connection) in self._settled.items() if connection == now}
        done = {row.id: row.incarnation for row in rows if done.get(row.id) == row.incarnation}
        whole = [node for node, incarnation in done.items() if is_intact(rows, node, incarnation)]
        if lacks := self._lacks(rows, whole, done):
            raise NodeTrouble(f"the process before did not stop in good order: the logs of {lacks}")
        self._index.settled()
        self._world.counters.add("law.10.settled")

    def _ask_groups(self, rows: Sequence[NodeRow], whole: Collection[str], answered: Collection[str], what: str) -> None:
        """Raises NodeTrouble unless nodes of G-R+1 groups are whole, or every node there is has answered."""
        if lacks := self._lacks(rows, whole, answered):
            raise NodeTrouble(f"lost commits: {what} {lacks}")

    def _lacks(self, rows: Sequence[NodeRow], whole: Collection[str], answered: Collection[str]) -> str:
        """What is missing to know what G-R+1 groups know; "" if nothing is. A group counts with all its members (law 11)."""
        members = {row.id: row.group for row in rows} | self._cluster.groups()
        groups = set(members.values())
        done = {group for group in groups if all(node in whole for node, of in members.items() if of == group)}
        needed = len(groups) - self._cluster.copies_required + 1
        if len(done) >= needed or all(node in answered for node in members):
            return ""
        away = sorted(node for node in members if node not in answered)
        return f"{needed} groups are needed, {len(done)} are there; not yet: {', '.join(away)}"


def is_intact(rows: Sequence[NodeRow], node: str, incarnation: str) -> bool:
    """True if the history of this incarnation goes back to before the commits were lost (law 11)."""
    return any(row.id == node and row.incarnation == incarnation and row.boot for row in rows)
