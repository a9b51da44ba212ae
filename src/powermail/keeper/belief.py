"""Owns comparing belief: what the index thinks a node holds against what the node says, and commit records read for the index.

Danger: a copy that is believed and is not there counts as redundancy that does not exist (P1, P13).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.index.contract import Fate, Index, NodeRow
from powermail.mail.envelope import Commit
from powermail.storage.contract import End, Held, StorageNode


async def known_row(index: Index, node: StorageNode) -> NodeRow | None:
    """What the index remembers of a node, if it is of the incarnation that the node has now. Raises IndexTrouble."""
    for row in await index.node_rows():
        if row.id == node.id:
            return row if row.incarnation == node.incarnation else None
    return None


async def end_of(node: StorageNode) -> End:
    """Where a node's log ends now: asked before a copy is looked at, so that a note says how old it is at most (law 8).

    Raises NodeTrouble.
    """
    facts = await node.facts()
    return End(facts.incarnation, facts.end)


class Looked(NamedTuple):
    """What a node said of some keys: where its log ended before (law 8), and what it holds."""

    end: End
    held: dict[bytes, Held]


class Looks:
    """What nodes say of a batch of keys before anything of it is done: one end for all its notes, so that none is late."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys
        self._known: dict[str, Looked] = {}
        self._asking = asyncio.Lock()

    async def at(self, node: StorageNode) -> Looked:
        """Asked once, by the first who wants to know. Raises NodeTrouble."""
        async with self._asking:
            if node.id not in self._known:
                end = await end_of(node)
                self._known[node.id] = Looked(end, dict(zip(self._keys, await node.has(self._keys), strict=True)))
        return self._known[node.id]


class Records(NamedTuple):
    """Commit records of a node: those that could be read, and why others could not. What went meanwhile is in neither."""

    good: dict[bytes, Commit]
    bad: dict[bytes, str]


async def read_commits(node: StorageNode, keys: Sequence[bytes]) -> Records:
    """Reads commit records. Raises NodeTrouble: then nothing is known about the rest."""
    good: dict[bytes, Commit] = {}
    bad: dict[bytes, str] = {}
    for key in keys:
        try:
            good[key] = Commit.parse(await node.read_commit(key))
        except CopyMissing:
            continue  # deleted, aborted or dropped since it was shown
        except (CopyDamaged, msgspec.DecodeError, UnicodeDecodeError) as error:
            bad[key] = str(error)
    return Records(good, bad)


_TRIES = 3  # when the index has seen a later end of the log meanwhile


class Doubts(NamedTuple):
    """Outcome of a comparison: how many beliefs ended, and whether a live message has a tombstone there (law 6)."""

    missing: int
    lost: bool


async def compare_belief(index: Index, node: StorageNode, keys: Sequence[bytes]) -> Doubts:
    """Asks a node for keys that are believed to lie there; only what it holds keeps the belief (law 12).

    What it cannot tell is suspected: a tombstone goes there too when the message dies. Raises NodeTrouble, IndexTrouble.
    """
    for _ in range(_TRIES):
        end = await end_of(node)
        held = dict(zip(keys, await node.has(keys), strict=True))
        gone = [key for key, state in held.items() if state in (Held.ABSENT, Held.DEAD)]
        if await is_proof(index, [key for key, state in held.items() if state is Held.DEAD]):
            return Doubts(0, True)
        if not gone or await index.disbelieve(node.id, gone, end):
            break
    else:  # law 8: a copy may have been made there since
        raise NodeTrouble(f"node {node.id} goes on while what it holds is compared; again soon")
    unknown = [key for key, state in held.items() if state is Held.UNKNOWN]
    for key in unknown:
        await index.note_bad(key, node.id, "the log was found damaged where it may have been")
    return Doubts(len(gone) + len(unknown), False)


async def is_good(world: World, index: Index, node: StorageNode, key: bytes) -> bool:
    """Reads and checks a whole copy; a bad one is noted. False also if it went meanwhile. Raises NodeTrouble, IndexTrouble."""
    try:
        await node.verify(key)
    except CopyMissing:
        return False
    except CopyDamaged as error:
        world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
        await index.note_bad(key, node.id, str(error))
        return False
    return True


async def is_proof(index: Index, tombstones: Sequence[bytes]) -> bool:
    """True if a tombstone among these belongs to a live message: the index lost commits (law 6). Raises IndexTrouble."""
    return bool(tombstones) and Fate.LIVE in (await index.fates(tombstones)).values()
