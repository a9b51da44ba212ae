"""Owns checkpoints: what mailboxes show, and what waits to leave, written to the nodes, so that the index can be made anew
from them (P15, law 13).

A mailbox that changed is written within 15 minutes: whole, or the tail behind its last whole one when that is small. A whole
one goes to R nodes of R groups; a tail to the nodes that hold its whole. Every record brings the mark of the index (law 10).
Danger: a key is named as expunged only as the plan says it; a checkpoint that counts as done, but is not durable on R groups,
would let the next one name keys whose new place nobody knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import NodeTrouble, NotRedundant, OlderCheckpoint, Trouble
from powermail.base.lane import Lane
from powermail.base.log import Event, Log
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import CheckpointPlan, Head, Index, Tail
from powermail.index.view import View
from powermail.keeper.checkpoint_form import (
    FIRST_RELEASE_MARK,
    BadRecord,
    Kind,
    decode_head,
    decode_heads,
    encode_heads,
    encode_purged,
    encode_queue,
    encode_tail,
    encode_whole,
    record_name,
)
from powermail.storage.contract import Mark, Rank, StorageNode

T = TypeVar("T")
_IDLE_S = 10.0  # between looks for mailboxes that are due
_DUE_AT_ONCE = 50  # mailboxes in one step of the worker
_PAST_MAX = 1000  # mailboxes that are passed over for a while because they could not be written
_FIRST_MAX = 16  # destinations of moved keys that are written before their source
_AWAY_S = 60.0  # a node that took nothing is asked last, or not at all, for so long
_QUEUE_PAGE = 4096
_PAGE_OCTETS = limits.MIB  # records of nodes are read in pages of about this much
_PAGE_NAMES_MAX = 512


class Checkpointer:
    """Writes checkpoints that are due, the longest due first, and the queue's state."""

    def __init__(self, world: World, cluster: Cluster, index: Index) -> None:
        self._world = world
        self._cluster = cluster
        self._index = index
        self._queue_at = float("-inf")
        self._queue_holders: dict[str, str] = {}  # nodes of its last state, with their incarnations
        self._past: dict[int, float] = {}  # mailboxes that could not be written, until when they are passed over
        self._away: dict[str, float] = {}  # nodes that did not take a record, until when others are asked first
        self._written = 0
        self._lane: Lane | None = None

    async def step(self) -> float:
        """Some mailboxes; the queue's state every interval. Raises Trouble."""
        now = self._world.clock.monotonic()
        if now - self._queue_at >= limits.CHECKPOINT_INTERVAL_S or self._queue_lost():
            await self.write_queue()
            self._queue_at = now
        return 0.0 if await self.write_due(self._world.clock.now()) else _IDLE_S

    def _queue_lost(self) -> bool:
        """True if a node that holds the queue's state went, or its disk did (law 13)."""
        counted, nodes = self._cluster.counted(), self._cluster.nodes
        return any(
            node not in counted or nodes[node].incarnation not in ("", incarnation)
            for node, incarnation in self._queue_holders.items()
        )

    async def write_due(self, now: float) -> int:
        """Checkpoints mailboxes that are due at `now` (UTC); how many checkpoints became durable. Raises Trouble."""
        moment = self._world.clock.monotonic()
        self._past = {mailbox: until for mailbox, until in self._past.items() if until > moment}
        before = self._written
        for mailbox in await self._index.checkpoint_due(now, _DUE_AT_ONCE + len(self._past)):
            if mailbox in self._past or await self.write_mailbox(mailbox):
                continue
            if len(self._past) < _PAST_MAX:  # others behind it are due too
                self._past[mailbox] = moment + limits.CHECKPOINT_INTERVAL_S / _DUE_AT_ONCE
        return self._written - before

    async def write_mailbox(self, mailbox: int) -> bool:
        """Checkpoints one mailbox, those that its messages moved to first; False if nothing became durable on R groups.

        A mailbox where nothing is to be written counts as written.
        """
        connection = self._index.connection
        plan = await self._index.checkpoint_plan(mailbox)
        if plan is not None and plan.skipped and plan.first:  # law 13: the destination first, then the source names what moved
            for destination in plan.first[:_FIRST_MAX]:
                if destination != mailbox:
                    await self.write(await self._index.checkpoint_plan(destination), connection)
            plan = await self._index.checkpoint_plan(mailbox)
        return await self.write(plan, connection)

    async def write(self, plan: CheckpointPlan | None, connection: int | None = None) -> bool:
        """Writes what a plan says and tells the index; False if it is not durable on R groups. Raises Trouble.

        `connection` to the index as it was before the plan was made, if it may be another by now (law 10).
        """
        connection = self._index.connection if connection is None else connection
        if plan is not None and not plan.whole:
            if await self._write_tail(plan, connection):
                return True
            # A holder of the whole one takes nothing, or the tail is too large: a whole one goes elsewhere.
            plan = await self._index.checkpoint_plan(plan.mailbox.id, whole=True)
        return plan is None or await self._write_whole(plan, connection)

    async def _write_tail(self, plan: CheckpointPlan, connection: int) -> bool:
        now = self._world.clock.monotonic()
        nodes = [self._cluster.nodes[node] for node in plan.nodes if node in self._cluster.nodes]
        if len(nodes) < max(len(plan.nodes), self._cluster.copies_required):
            return False
        if any(self._away.get(node.id, now) > now for node in nodes):
            return False
        tail = await self._index.tail(plan.mailbox.id, plan.base, plan.base_uid)
        if tail is None:  # trimmed since
            return False
        size = len(tail.entries) + len(tail.changes)
        keywords = await self._index.keywords(plan.mailbox.id)
        try:
            records = await self._packed(size, encode_tail, plan, tail, keywords, self._tag(), self._world.clock.now())
        except ValueError:
            return False
        name = record_name(Kind.TAIL, plan.mailbox.account, plan.mailbox.name, plan.side)
        holders = await self._give(name, records, nodes, len(nodes), connection, _rank(plan))
        return await self._tell(plan, holders)

    async def _write_whole(self, plan: CheckpointPlan, connection: int) -> bool:
        box = plan.mailbox
        try:
            view = await self._index.view(box.id)
            keywords = await self._index.keywords(box.id)
        except KeyError:
            return True  # it went meanwhile: nothing is to be written
        try:
            records = await self._packed(len(view), encode_whole, plan, view, keywords, self._tag(), self._world.clock.now())
        except ValueError as error:
            self._world.log.event(Event.TROUBLE, worker="checkpoint", account=box.account, mailbox=box.name, error=str(error))
            return False
        name = record_name(Kind.WHOLE, box.account, box.name, plan.side)
        order, required = self._cluster.place(), self._cluster.copies_required
        holders = await self._give(name, records, order, required, connection, _rank(plan))
        return await self._tell(plan, holders)

    async def _tell(self, plan: CheckpointPlan, holders: Mapping[str, str] | None) -> bool:
        if holders:
            await self._index.checkpoint_done(plan, list(holders), self._world.clock.now(), holders)
            self._written += 1
            self._world.counters.add("law.13.wholes" if plan.whole else "law.13.tails")
        return bool(holders)

    async def _packed(self, size: int, call: Callable[..., T], plan: CheckpointPlan, state: View | Tail, *rest: Any) -> T:
        """Packs here what is small, in a lane what would hold up the event loop."""
        if size <= limits.VIEW_PART_ROWS:
            return call(plan, state, *rest)
        if self._lane is None:
            self._lane = self._world.lane("checkpoint")
        # A view may be shared with sessions, which bring it forward meanwhile.
        return await self._lane.run(call, plan, state.copy() if isinstance(state, View) else state, *rest)

    def _tag(self) -> bytes:
        return self._world.entropy.octets(8)

    async def _give(
        self,
        name: bytes,
        records: Sequence[bytes],
        order: Sequence[StorageNode],
        required: int,
        connection: int,
        rank: Rank,
    ) -> dict[str, str] | None:
        """Writes records under a name to `required` nodes of as many groups, tried in order: who holds all, with the
        incarnation that was written to; none if too few. None if a node has a newer one: another keeper was quicker.
        """
        mark = await self._index.proof(connection)  # law 10
        now = self._world.clock.monotonic()
        holders: dict[str, tuple[str, str]] = {}
        for node in sorted(order, key=lambda node: self._away.get(node.id, now) > now):
            if len(holders) == required:
                break
            if node.group in holders:
                continue
            incarnation = node.incarnation
            try:
                for number, octets in enumerate(records):
                    await node.put_checkpoint(name, number, octets, mark, rank)
            except OlderCheckpoint as error:  # the node is well
                self._world.counters.add("law.11.older_checkpoints")
                self._world.log.event(Event.TROUBLE, worker="checkpoint", node=node.id, error=str(error))
                return None
            except NodeTrouble as error:
                self._away[node.id] = self._world.clock.monotonic() + _AWAY_S
                self._world.log.event(Event.TROUBLE, worker="checkpoint", node=node.id, error=str(error))
                continue
            holders[node.group] = node.id, incarnation
        return dict(holders.values()) if len(holders) == required else {}

    async def write_queue(self) -> None:
        """Writes what waits to leave, and how far each node's log is settled, to R groups. Raises Trouble.

        The watermarks are those of the plan: what is behind them and not in a later page was sent by then. A keeper that slept
        changes nothing: a node that has a newer state keeps it (law 11).
        """
        now = self._world.clock.now()
        tag, connection = self._tag(), self._index.connection
        plan = await self._index.queue_plan(_QUEUE_PAGE)
        pages: list[bytes] = []
        rows, more = plan.rows, True
        while more:
            more = len(rows) == _QUEUE_PAGE
            open_rows = [(key, destination) for _, key, destination in rows]
            parts = 0 if more else len(pages) + 1
            pages.append(encode_queue(plan, open_rows, len(pages), parts, tag, now))
            rows = await self._index.queue_open(rows[-1][0], _QUEUE_PAGE) if more else []
        name = record_name(Kind.QUEUE, "", "", plan.side)
        order, required = self._cluster.place(), self._cluster.copies_required
        holders = await self._give(name, pages, order, required, connection, plan.rank)
        if holders is None:
            return  # what another keeper has written since says more
        if not holders:
            raise NotRedundant("the queue's state could not be written to enough groups")
        await self._index.queue_done(plan)
        self._queue_holders = holders

    def close(self) -> None:
        """Ends the lane, if there is one."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None


def _rank(plan: CheckpointPlan) -> Rank:
    """How new a checkpoint is: no node lets an older one take its place (law 11)."""
    return Rank(plan.planned_in, plan.mailbox.uidvalidity, plan.mailbox.modseq)


async def write_purged(world: World, cluster: Cluster, index: Index, account: str) -> None:
    """PURGED(account), durable on nodes of R groups before any row of the account goes (law 13). Raises NotRedundant."""
    name = record_name(Kind.PURGED, account, "", 0)
    octets = encode_purged(account, world.entropy.octets(8), world.clock.now())
    mark = await index.proof(index.connection)
    counted = cluster.counted()
    nodes = [node for node in cluster.readable() if node.id in counted]  # what lies on a leaver is gone soon
    await _write_note(nodes, cluster.copies_required, name, octets, mark, f"that {account} is purged")


async def hand_on(cluster: Cluster, leaver: StorageNode, others: Container[str], mark: Mark) -> None:
    """What is told by marks and notes alone (the epoch; how far mailboxes may have got; who is purged) is durable on nodes of R
    groups without a node that leaves: fewer groups are asked for it then (laws 11, 13). Raises NotRedundant, NodeTrouble.
    """
    nodes, required = [node for node in cluster.admitted() if node.id in others], cluster.copies_required
    await _put_mark(nodes, required, mark)
    async with contextlib.aclosing(_notes(leaver)) as notes:
        async for name, octets in notes:
            await _write_note(nodes, required, name, octets, mark, f"that node {leaver.id} had")


async def hand_on_of(cluster: Cluster, nodes: Sequence[StorageNode], mark: Mark) -> None:
    """The same when a disk went without a word (its node was expelled, or has another one): what lies on fewer than R groups
    of those that stay is written to all of them (laws 11, 13). Raises NotRedundant, NodeTrouble.
    """
    required = cluster.copies_required
    await _put_mark(nodes, required, mark)
    groups: dict[bytes, dict[str, None]] = {}
    thin: dict[bytes, bytes] = {}
    for node in nodes:
        async with contextlib.aclosing(_notes(node)) as notes:
            async for name, octets in notes:
                there = groups.setdefault(name, {})
                there[node.group] = None
                thin[name] = octets
                if len(there) >= required:
                    del thin[name]
    for name, octets in thin.items():
        await _write_note(nodes, required, name, octets, mark, "that lay on a disk that went")


async def _put_mark(nodes: Sequence[StorageNode], required: int, mark: Mark) -> None:
    groups: dict[str, None] = {}
    for node in nodes:
        with contextlib.suppress(NodeTrouble):
            await node.put_mark(mark)
            groups[node.group] = None
    if len(groups) < required:
        raise NotRedundant(f"only {len(groups)} groups took the mark")


async def _notes(node: StorageNode) -> AsyncGenerator[tuple[bytes, bytes], None]:
    """What a node holds of notes, by name. Raises NodeTrouble."""
    async with contextlib.aclosing(pages_of(node)) as pages:
        async for page in pages:
            for name, number, octets in page:
                if number == 0 and name != FIRST_RELEASE_MARK and _is_note(octets):
                    yield name, octets


def _is_note(octets: bytes) -> bool:
    try:
        return decode_head(octets).kind in (Kind.PURGED, Kind.HEADS)
    except BadRecord:
        return False  # the other holders have it too


def heads_record(world: World, heads: Sequence[Head]) -> tuple[bytes, bytes]:
    """Far heads under a name of their own: no later record replaces what they alone say (law 11)."""
    tag = world.entropy.octets(8)
    return record_name(Kind.HEADS, "", tag.hex(), 0), encode_heads(heads, tag, world.clock.now())


async def write_heads(nodes: Sequence[StorageNode], required: int, record: tuple[bytes, bytes], mark: Mark) -> None:
    """Makes far heads durable on nodes of `required` groups (law 11). Raises NotRedundant."""
    await _write_note(nodes, required, *record, mark, "how far mailboxes may have got")


async def _write_note(nodes: Sequence[StorageNode], required: int, name: bytes, octets: bytes, mark: Mark, what: str) -> None:
    """A small record, on all nodes that take it: some may be lost later."""
    groups: dict[str, None] = {}
    cause: Trouble | None = None
    for node in nodes:
        try:
            await node.put_checkpoint(name, 0, octets, mark)
            groups[node.group] = None
        except NodeTrouble as error:
            cause = error
    if len(groups) < required:
        raise NotRedundant(f"only {len(groups)} groups took the note {what}") from cause


async def pages_of(node: StorageNode) -> AsyncGenerator[list[tuple[bytes, int, bytes]], None]:
    """All records of a node, whole names at a time, in pages of about a MiB (or one name). Raises NodeTrouble."""
    after, names = b"", 4
    while page := await node.checkpoints(after, names):
        yield page
        after = page[-1][0]
        octets = sum(len(record) for _, _, record in page)
        if octets > _PAGE_OCTETS:
            names = max(1, names // 2)
        elif octets < _PAGE_OCTETS // 2:
            names = min(_PAGE_NAMES_MAX, names * 2)


async def heads(node: StorageNode, log: Log | None = None) -> AsyncIterator[list[Head]]:
    """What a node's checkpoints say about numbers, also those that are not complete: they were given (law 11).

    Raises NodeTrouble. A record that cannot be read is told to `log`; the other holders have it too.
    """
    async with contextlib.aclosing(pages_of(node)) as pages:
        async for page in pages:
            found: dict[Head, None] = {}
            for name, _, octets in page:
                if name == FIRST_RELEASE_MARK:
                    continue
                try:
                    head = decode_head(octets)
                    if head.kind in (Kind.WHOLE, Kind.TAIL):
                        found[head.numbers()] = None
                    elif head.kind is Kind.HEADS:
                        found |= dict.fromkeys(decode_heads(octets))
                except BadRecord as error:
                    if log is not None:
                        log.event(Event.NODE_DAMAGE, node=node.id, error=str(error))
            yield list(found)
