"""Owns scrubbing: each copy gets a verdict within 14 days, and belief is compared with each node both ways (law 12).

Copies that fail their check are noted for repair; what is believed and is not there is believed no more; what is there and is
not believed is believed once verified, or ordered away, or dropped, if it lies behind the watermark. Where a node's round has
come to is kept in a file, so that it goes on after a restart. The pace leaves the disks to mail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Fate, Index, NodeRow
from powermail.keeper.belief import compare_belief, end_of, is_proof, known_row
from powermail.keeper.epochs import EpochKeeper
from powermail.storage.contract import End, Held, Item, Position, StorageNode

_AT_ONCE = 20  # copies read in one step
_BELIEFS_AT_ONCE = 200
_CYCLE_S = limits.SCRUB_DAYS_MAX * 86_400.0 / 2  # half of what is promised, because a disk may be away for days
_REST_MAX_S = 60.0
_REST_S = 10.0
_AGAIN_S = 1.0
_KEEP_INTERVAL_S = 60.0


class Place(Struct):
    """How far the round over one node has come. Times are UTC; 0 means never."""

    incarnation: str = ""
    after: str = ""  # key in hex
    belief_after: str = ""
    whole_at: float = 0.0  # when the last whole round ended
    checked: int = 0  # in this round
    bad: int = 0  # in this round
    missing: int = 0  # beliefs that ended in this round


class Scrubber:
    """Reads every copy of every node in turn. `checked` and `bad` are totals since start."""

    def __init__(self, world: World, cluster: Cluster, index: Index, epochs: EpochKeeper, path: str = "") -> None:
        """`path` is the file that remembers the places; with "" they are forgotten at the end."""
        self._world = world
        self._cluster = cluster
        self._index = index
        self._epochs = epochs
        self._path = path
        self._lane: Lane | None = None
        self._places: dict[str, Place] = {}
        self._loaded = not path
        self._kept_at = float("-inf")
        self.checked = 0
        self.bad = 0

    def progress(self, node: StorageNode) -> dict[str, Any]:
        """One node's round for status: how much of it is done, when the last whole one ended, what was found."""
        place = self._places.get(node.id, Place())
        total = max(1, node.stat().messages)
        return {
            "done": round(min(1.0, place.checked / total), 3),
            "checked": place.checked,
            "bad": place.bad,
            "missing": place.missing,
            "whole_at": place.whole_at,
        }

    def close(self) -> None:
        """Ends the lane that writes the file."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    # -- by the operator ----------------------------------------------------------------------------------------------

    async def check(self, node: StorageNode, after: bytes, limit: int) -> tuple[bytes, int]:
        """Verifies some copies behind `after`; (last key, or b"" at the end; how many were bad). Raises Trouble."""
        items = await node.inventory(after, limit)
        good = await self._verify(node, items)
        bad = sum(1 for state in good.values() if state is False)
        return (items[-1].key if items else b""), bad

    # -- by itself ------------------------------------------------------------------------------------------------------

    async def step(self, node: StorageNode) -> float:
        """A few copies of one node. Raises NodeTrouble, IndexTrouble."""
        await self._load()
        if node not in self._cluster.admitted() or self._index.catching_up:
            return _REST_S
        row = await known_row(self._index, node)
        if row is None or row.owes_walk or row.owes_compare or not row.boot:
            return _REST_S
        began = self._world.clock.monotonic()
        place = self._places.get(node.id)
        if place is None or place.incarnation != row.incarnation:
            place = self._places[node.id] = Place(row.incarnation)
        facts = await node.facts()
        await self._compare_belief(node, place)
        end = await end_of(node)
        items = await node.inventory(bytes.fromhex(place.after), _AT_ONCE)
        if not await self._compare_copies(node, row, facts.birth, end, place, items):
            return _AGAIN_S
        if len(items) == _AT_ONCE:
            place.after = items[-1].key.hex()
        else:
            now = self._world.clock.now()
            self._places[node.id] = Place(row.incarnation, belief_after=place.belief_after, whole_at=now)
        await self._keep()
        took = self._world.clock.monotonic() - began
        return max(0.01, self._pace(node) - took)

    def _pace(self, node: StorageNode) -> float:
        """Seconds for one step, so that a round takes _CYCLE_S."""
        return min(_REST_MAX_S, _CYCLE_S * _AT_ONCE / max(1, node.stat().messages))

    async def _verify(self, node: StorageNode, items: Sequence[Item]) -> dict[bytes, bool]:
        """Whether live copies are good; those that went meanwhile are left out. Bad ones are noted."""
        verdicts: dict[bytes, bool] = {}
        for item in items:
            if item.held is not Held.LIVE:
                continue
            try:
                await node.verify(item.key)
                verdicts[item.key] = True
            except CopyMissing:
                continue
            except CopyDamaged as error:
                verdicts[item.key] = False
                self.bad += 1
                self._world.log.event(Event.COPY_BAD, key=item.key, node=node.id, error=str(error))
                await self._index.note_bad(item.key, node.id, str(error))
            self.checked += 1
        return verdicts

    async def _compare_belief(self, node: StorageNode, place: Place) -> None:
        """What is believed and is not there (P13)."""
        keys = await self._index.copies_on(node.id, bytes.fromhex(place.belief_after), _BELIEFS_AT_ONCE)
        place.belief_after = keys[-1].hex() if len(keys) == _BELIEFS_AT_ONCE else ""
        if not keys:
            return
        doubts = await compare_belief(self._index, node, keys)
        if doubts.lost:
            await self._epochs.raise_epoch(f"node {node.id} has a tombstone of a message that is listed")
        if doubts.missing:
            place.missing += doubts.missing
            self._world.counters.add("keeper.missing_copies", doubts.missing)
            self._world.log.event(Event.NODE_DAMAGE, node=node.id, missing_copies=doubts.missing)

    async def _compare_copies(
        self, node: StorageNode, row: NodeRow, birth: Position, end: End, place: Place, items: Sequence[Item]
    ) -> bool:
        """What is there: is it good, is it believed, may it be there? False if it is to be looked at again: the node has gone
        on since, and what was found may have gone (law 8).
        """
        verdicts = await self._verify(node, items)
        if await is_proof(self._index, [item.key for item in items if item.held is Held.DEAD]):
            await self._epochs.raise_epoch(f"node {node.id} has a tombstone of a message that is listed")
            return True
        good = [item for item in items if verdicts.get(item.key) and item.position < row.watermark]
        fates = await self._index.fates([item.key for item in good])
        live = [key for key, fate in fates.items() if fate is Fate.LIVE]
        believed = {message.key for message in await self._index.messages(live) if node.id in message.nodes}
        strange = [item for item in good if item.key not in believed]
        if strange and any(item.key not in fates for item in strange) and await self._index.unread(node.id, 1):
            strange = [item for item in strange if item.key in fates]  # what could not be read may not be entered yet
        if strange and not self._index.catching_up:
            settled: list[tuple[bytes, Held, Position]] = [(item.key, item.held, item.position) for item in strange]
            if not (await self._index.settle_inventory(node.id, end, settled, birth, {}, False)).moved:
                return False
            self._world.log.event(Event.NODE_DAMAGE, node=node.id, strange_copies=len(strange))
        place.checked += len(verdicts)
        place.bad += sum(1 for good in verdicts.values() if not good)
        return True

    # -- the file -------------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            octets = await self._run(self._read)
            self._places = msgspec.json.decode(octets, type=dict[str, Place])
        except (OSError, ValueError) as error:  # it only says where to go on
            self._world.log.event(Event.TROUBLE, worker="scrub", error=f"{self._path}: {error}; every node from the beginning")

    def _read(self) -> bytes:
        return self._world.disk.read_file(self._path) if self._world.disk.exists(self._path) else b"{}"

    async def _keep(self) -> None:
        now = self._world.clock.monotonic()
        if not self._path or now - self._kept_at < _KEEP_INTERVAL_S:
            return
        self._kept_at = now
        octets = msgspec.json.encode(self._places)
        try:
            await self._run(lambda: self._world.disk.replace_file(self._path, octets))
        except OSError as error:
            self._world.log.event(Event.TROUBLE, worker="scrub", error=f"{self._path}: {error}")

    async def _run(self, call: Any) -> Any:
        if self._lane is None:
            self._lane = self._world.lane("scrub")
        return await self._lane.run(call)
