"""Owns the judgement of a simulation: what the disks really hold, and in calm, whether all is as the clients were told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.index.view import View
from powermail.sim import fleet as fl
from powermail.sim.client import Lost, Peer
from powermail.sim.disk import SimDisk
from powermail.sim.faults import JUMP_S
from powermail.sim.users import FOLDERS
from powermail.sim.world import Machine
from powermail.storage.contract import Held
from powermail.storage.identity import Identity
from powermail.storage.log.keys import KeyIndex, MemoryKeyIndex
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.node import LocalNode

if TYPE_CHECKING:
    from powermail.sim.played import Played

_KEPT = (Held.LIVE, Held.DEAD)
_CALM_S = 900.0  # virtual time within which all must be well again


def live_groups(
    nodes: Iterable[LocalNode], machine: Machine, key: bytes, group: Callable[[str], str]
) -> tuple[set[str], set[str]]:
    """(groups that durably hold a live copy or a tombstone, groups whose disks cannot be looked at now)."""
    live: set[str] = set()
    unseen: set[str] = set()
    for node in nodes:
        held = node.look([key]) if machine.place(node.id) not in machine.disk.away else None
        if held is None:
            unseen.add(group(node.id))
        elif held[0] in _KEPT:  # read and deleted already
            live.add(group(node.id))
    return live, unseen


def taken_groups(groups: Mapping[str, str], machine: Machine, key: bytes) -> set[str]:
    """Groups of which a disk that is not in its place any more holds a live copy, or a tombstone: its receipt was true.

    `groups` has that of each node.
    """
    found: set[str] = set()
    for prefix, disk in machine.taken:
        node = prefix.rpartition("/")[2]
        if groups[node] not in found and (store := opened(disk, prefix, node, machine)) is not None:
            if store.reader.has([key])[0] in _KEPT:
                found.add(groups[node])
    return found


def opened(disk: SimDisk, prefix: str, node: str, machine: Machine) -> SegmentStore | None:
    """What lies on a disk that nobody serves; None if no node was ever there."""
    if not disk.exists(f"{prefix}/identity"):
        return None
    identity = msgspec.json.decode(disk.read_file(f"{prefix}/identity"), type=Identity)
    copy, now = disk.clone(), machine.clock.monotonic
    return SegmentStore.open(copy, prefix, identity.cluster, node, _in_memory, Options(limits.SEGMENT_OCTETS_MIN), now)


def _in_memory(path: str, store: bytes) -> KeyIndex:
    return MemoryKeyIndex()


def buried_keys(nodes: Iterable[LocalNode], without: str = "") -> dict[bytes, set[str]]:
    """The groups whose nodes hold a tombstone of a key, as far as they can be looked at; the node `without` is passed over."""
    found: dict[bytes, set[str]] = {}
    for node in nodes:
        if node.id != without:
            for key in node.tombstones():
                found.setdefault(key, set()).add(node.group)
    return found


class Judge:
    """The liveness phase, then the judgement of the whole history."""

    def __init__(self, simulation: Played, peer: type[Peer], accounts: dict[str, str]) -> None:
        self._simulation = simulation
        self._peer = peer
        self._accounts = accounts
        self._problems = simulation.outcome.problems

    async def judge(self) -> None:
        """Adds what is wrong to the outcome's problems."""
        simulation, problems = self._simulation, self._problems
        await asyncio.sleep(simulation.settled_s)
        await simulation.healed(_CALM_S)
        for name in simulation.node_names:  # what rotted while the operator's scrub could not run is found now
            await simulation.operation("node_scrub", node=name)
        if not await simulation.healed(_CALM_S):
            what = await simulation.troubles() or "no answer"
            problems.append(f"not well {_CALM_S:.0f} s after the last fault: {what}")
        back_s = JUMP_S * simulation.outcome.faults.get("clock-jump", 0)  # a row may be due that much later
        for _ in range(int(_CALM_S + back_s)):
            if await simulation.operation("queue_list", after=0, limit=100) == []:
                break
            await asyncio.sleep(1.0)
        else:
            problems.append("the queue is not empty")
        verified = await simulation.operation("verify")
        if not isinstance(verified, dict) or verified["problems"]:
            found = verified["problems"][:3] if isinstance(verified, dict) else "no answer"
            problems.append(f"verify: {found} (P3, P5)")
        for mailbox in fl.MAILBOXES:
            await self._mailbox(mailbox)
        await self._accounts_whole()
        for message in simulation.fleet.history.messages:
            for name in message.recipients:
                if name in fl.FORWARDS and message.acked and not self._peer.taken.get((message.number, fl.FORWARDS[name])):
                    problems.append(f"message {message.number} to {name} was acked and never sent on (P1)")

    async def _mailbox(self, mailbox: str) -> None:
        history = self._simulation.fleet.history
        counts: dict[int, int] | None = None
        for _ in range(100):
            try:
                counts = await self._simulation.fleet.read(mailbox, delete=False)
            except Lost:
                counts = None
            if counts is not None:
                break
            await asyncio.sleep(1.0)
        if counts is None:
            self._problems.append(f"{mailbox} cannot be read in calm")
            return
        for number, count in counts.items():
            message = history.messages[number]
            if count > message.acks + message.unknown:
                self._problems.append(f"{mailbox}: message {number} is there {count} times; {message.acks} acks (P4)")

    async def _accounts_whole(self) -> None:
        """What users of mailboxes were told holds: nothing acknowledged is gone, nothing expunged is back, views are whole."""
        index, ledger = self._simulation.index(), self._simulation.ledger
        if index is None:
            return
        try:
            for address, account in self._accounts.items():
                shown: set[bytes] = set()
                for name in FOLDERS:
                    facts = await index.find_mailbox(account, name)
                    if facts is None:
                        continue
                    entries = await index.entries(facts.id, 0, facts.uid_next, 1 << 20)
                    shown.update(entry.key for entry in entries)
                    view: View = await index.view(facts.id)
                    if list(view.uids) != [entry.uid for entry in entries]:
                        self._problems.append(f"{address}/{name}: view and entries differ")
                for message in self._simulation.fleet.history.messages:
                    if address not in message.recipients:
                        continue
                    for key in message.keys:
                        which = (account, key)
                        if key not in shown and which not in ledger.gone_asked:
                            self._problems.append(f"{address}: message {message.number}, {key.hex()}, is nowhere (P1)")
                        if key in shown and which in ledger.gone_told and which not in ledger.doubtful:
                            self._problems.append(f"{address}: message {message.number}, {key.hex()}, is back (P8)")
        except Trouble as error:
            self._problems.append(f"mailboxes cannot be looked at in calm: {error}")
