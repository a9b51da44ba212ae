"""Owns the rebuild of an index from the nodes alone (P15).

What mailboxes show comes from their checkpoints; what came later comes from the commit records. A message that was received
well before its mailbox's checkpoint and is not in it was deleted, and stays deleted (P8). Recipients elsewhere are entered as
held queue rows: whether they were sent is not known, so the operator decides. Every mailbox jumps its numbers next time (P10).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
import zstandard

from powermail.base.errors import CopyDamaged, CopyMissing
from powermail.base.log import Event
from powermail.base.world import World
from powermail.index.contract import EntryFacts, Index, MailboxFacts, RestoredMessage
from powermail.keeper.checkpoint import CheckpointBody, decode
from powermail.keeper.reconcile import MARK_NAME
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import StorageNode

_decode_commit = msgspec.json.Decoder(Commit).decode
_PAGE = 500
_NAMES = 20  # mailboxes whose checkpoints are read at once
_DOUBT_S = 120.0  # a delivery this close to a checkpoint may not be in it yet


class Rebuilt(NamedTuple):
    """What a rebuild did."""

    mailboxes: int
    messages: int
    entries_lost: int
    held_rows: int
    unreadable: int


Box = tuple[str, str]  # account and name of a mailbox


def _complete(bodies: Sequence[CheckpointBody]) -> list[CheckpointBody]:
    """The checkpoints of which every part is there, each as one."""
    parts: dict[tuple[int, int, int], dict[int, CheckpointBody]] = {}
    for body in bodies:
        parts.setdefault((body.uidvalidity, body.since, body.modseq), {})[body.part] = body
    found = []
    for known in parts.values():
        ends = [number for number, body in known.items() if body.last]
        if not ends or any(number not in known for number in range(min(ends) + 1)):
            continue
        one = [known[number] for number in range(min(ends) + 1)]
        entries = [entry for body in one for entry in body.entries]
        expunged = [uid for body in one for uid in body.expunged]
        found.append(msgspec.structs.replace(one[0], entries=entries, expunged=expunged, last=True))
    return found


def merge(bodies: Sequence[CheckpointBody]) -> CheckpointBody | None:
    """The state that a whole checkpoint and the deltas behind it describe; None without a whole one."""
    complete = _complete(bodies)
    wholes = [body for body in complete if body.since == 0]
    if not wholes:
        return None
    state = max(wholes, key=lambda body: (body.modseq, body.at))
    entries = {entry[0]: entry for entry in state.entries}
    for delta in sorted((body for body in complete if body.since > 0), key=lambda body: body.modseq):
        if delta.since != state.modseq or delta.uidvalidity != state.uidvalidity:
            continue
        for uid in delta.expunged:
            entries.pop(uid, None)
        entries.update({entry[0]: entry for entry in delta.entries})
        state = delta
    return msgspec.structs.replace(state, since=0, entries=[entries[uid] for uid in sorted(entries)], expunged=[])


class Rebuilder:
    """Fills an empty index."""

    def __init__(
        self, world: World, nodes: Sequence[StorageNode], index: Index, progress: Callable[[int, int], Awaitable[None]]
    ) -> None:
        self._world = world
        self._nodes = nodes
        self._index = index
        self._progress = progress
        self._commits = 0  # transactions that the lost index had committed, as far as the nodes know

    async def run(self) -> Rebuilt:
        """Reads every node and fills the index. Raises Trouble."""
        await self._index.raise_epoch()
        states = await self._checkpoints()
        holders = await self._holders()
        shown = {box: {entry[1] for entry in state.entries} for box, state in states.items()}
        restored: dict[bytes, RestoredMessage] = {}
        unreadable = 0
        for number, (key, nodes) in enumerate(sorted(holders.items())):
            commit = await self._commit(key, nodes)
            if commit is None:
                unreadable += 1
                continue
            self._commits = max(self._commits, commit.mark)
            names = tuple(node.id for node in nodes)
            sha256 = bytes.fromhex(commit.sha256)
            targets = [target for target in commit.targets if self._counts(key, commit, target, states, shown)]
            restored[key] = RestoredMessage(key, commit, sha256, names, targets)
            if number % 100 == 0:
                await self._progress(number, len(holders))
        lost = 0
        for state in states.values():
            facts = MailboxFacts(
                0, state.account, state.name, state.uidvalidity, state.uid_next, state.modseq, len(state.entries), 0
            )
            entries = [EntryFacts(e[0], bytes.fromhex(e[1]), *e[2:]) for e in state.entries]
            held = {
                entry.key: (copy.commit.octets, copy.sha256, copy.nodes)
                for entry in entries
                if (copy := restored.get(entry.key)) is not None
            }
            lost += await self._index.restore_mailbox(facts, entries, held)
        rows = 0
        batch = list(restored.values())
        for start in range(0, len(batch), _PAGE):
            rows += await self._index.restore_messages(batch[start : start + _PAGE])
        for node in self._nodes:
            end = await node.end()
            await self._index.set_node(node.id, node.incarnation, end.segment, end.offset)
        await self._index.set_commits(self._commits)
        await self._index.caught_up()
        self._world.log.event(Event.RECONCILED, messages=len(restored), by="rebuild")
        return Rebuilt(len(states), len(restored), lost, rows, unreadable)

    async def _checkpoints(self) -> dict[Box, CheckpointBody]:
        found: dict[Box, list[CheckpointBody]] = {}
        for node in self._nodes:
            after = b""
            while page := await node.checkpoints(after, _NAMES):
                for name, _, octets in page:
                    if name == MARK_NAME:
                        self._commits = max(self._commits, int(octets))
                        continue
                    try:
                        body = decode(octets)
                        found.setdefault((body.account, body.name), []).append(body)
                    except (msgspec.DecodeError, zstandard.ZstdError) as error:
                        self._world.log.event(Event.NODE_DAMAGE, node=node.id, error=str(error))
                after = page[-1][0]
        return {box: state for box, bodies in found.items() if (state := merge(bodies)) is not None}

    async def _holders(self) -> dict[bytes, list[StorageNode]]:
        holders: dict[bytes, list[StorageNode]] = {}
        for node in self._nodes:
            after = b""
            while keys := await node.live_keys(after, _PAGE):
                for key in keys:
                    holders.setdefault(key, []).append(node)
                after = keys[-1]
        return holders

    async def _commit(self, key: bytes, nodes: Sequence[StorageNode]) -> Commit | None:
        for node in nodes:
            try:
                return _decode_commit(await node.read_commit(key))
            except (CopyMissing, CopyDamaged, msgspec.DecodeError) as error:
                self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
        return None

    @staticmethod
    def _counts(
        key: bytes, commit: Commit, target: Target, states: dict[Box, CheckpointBody], shown: dict[Box, set[str]]
    ) -> bool:
        """True if this target must be entered beside what the checkpoints say."""
        if target.destination:
            return True
        box = (target.account, target.mailbox)
        state = states.get(box)
        if state is None:
            return True
        if key.hex() in shown[box]:
            return False
        return commit.received_at > state.at - _DOUBT_S
