"""Owns fetching: one good copy of a message, checksums verified, another copy when one is bad, slow or away (P3).

A copy that fails is reported to `bad_copy`, which notes it for repair; that it cannot be noted hides no good copy. What is
handed out has been checked against the record checksum chunk by chunk; a copy for repair by the SHA-256 of the whole, too.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, MessageUnreadable, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.packing import Small, joined
from powermail.mail.envelope import Commit
from powermail.storage.contract import NodeState, Origin, Receipt, StorageNode
from powermail.storage.frames import Inflater

T = TypeVar("T")
BadCopy = Callable[[bytes, str, str], Awaitable[None]]


class Fetcher:
    """Reads messages from whichever nodes have good copies."""

    def __init__(self, world: World, cluster: Cluster, bad_copy: BadCopy) -> None:
        self._world = world
        self._cluster = cluster
        self._bad_copy = bad_copy
        self._inflater = Inflater()

    def _order(self, nodes: Sequence[str]) -> list[StorageNode]:
        """The nodes believed to hold it first, the others behind: belief may be old."""
        readable = self._cluster.readable()
        believed = [node for node in readable if node.id in nodes]
        self._world.entropy.shuffle(believed)
        believed.sort(key=lambda node: self._cluster.is_slow(node.id))
        return believed + [node for node in readable if node.id not in nodes]

    async def _try(self, key: bytes, nodes: Sequence[str], read: Callable[[StorageNode], Awaitable[T]]) -> T:
        trouble: list[str] = []
        for node in self._order(nodes):
            try:
                async with asyncio.timeout(limits.NODE_READ_TIMEOUT_S):
                    return await read(node)
            except (CopyMissing, CopyDamaged) as error:
                trouble.append(f"{node.id}: {error}")
                if node.id in nodes:
                    self._world.counters.add("cluster.bad_copies")
                    self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
                    await self._note_bad(key, node.id, str(error))
            except TimeoutError:
                trouble.append(f"{node.id}: no answer in time")
                self._cluster.note_slow(node.id)
            except Trouble as error:
                trouble.append(f"{node.id}: {error}")
        raise MessageUnreadable(f"no good copy of {key.hex()}: {'; '.join(trouble) or 'no node is there'}")

    async def _note_bad(self, key: bytes, node: str, why: str) -> None:
        try:
            async with asyncio.timeout(limits.INDEX_WAIT_S_DEFAULT):
                await self._bad_copy(key, node, why)
        except (Trouble, TimeoutError) as error:  # scrub finds it again; the reader gets another copy
            self._world.log.event(Event.TROUBLE, key=key, node=node, error=f"a bad copy was not noted: {error or 'no answer'}")

    async def commit(self, key: bytes, nodes: Sequence[str]) -> Commit:
        """The commit record. Raises MessageUnreadable."""

        async def read(node: StorageNode) -> Commit:
            return _commit(await node.read_commit(key))

        return await self._try(key, nodes, read)

    async def chunk(self, key: bytes, nodes: Sequence[str], commit: Commit, number: int) -> bytes:
        """The octets of one chunk. Raises MessageUnreadable."""

        async def read(node: StorageNode) -> bytes:
            data = self._inflater.octets(await node.read_chunk(key, number))
            if len(data) != commit.sizes[number]:
                raise CopyDamaged(f"chunk {number} has {len(data)} octets, not {commit.sizes[number]}")
            return data

        return await self._try(key, nodes, read)

    async def chunks(self, key: bytes, nodes: Sequence[str], commit: Commit) -> AsyncIterator[bytes]:
        """The octets, chunk by chunk. Raises MessageUnreadable, also in the middle."""
        for number in range(len(commit.sizes)):
            yield await self.chunk(key, nodes, commit, number)

    async def read_small(self, wanted: Mapping[bytes, tuple[str, ...]]) -> dict[bytes, Small]:
        """Whole small messages (key to the nodes believed to hold it), many at once. What is left out is not small, or in
        trouble: `commit` and `chunks` say which, and read from another copy.
        """
        nodes = [node for node in self._cluster.readable() if node.state is not NodeState.FAILED]
        self._world.entropy.shuffle(nodes)
        nodes.sort(key=lambda node: self._cluster.is_slow(node.id))
        plan: dict[str, list[bytes]] = {}
        shares: dict[tuple[str, ...], list[bytes]] = {}  # many are believed to lie on the same nodes
        for key, believed in wanted.items():
            share = shares.get(believed)
            if share is None:
                name = next((node.id for node in nodes if node.id in believed), "")
                share = shares[believed] = plan.setdefault(name, []) if name else []
            share.append(key)
        found: dict[bytes, Small] = {}
        if len(plan) == 1:
            await self._read_small_of(*next(iter(plan.items())), found)
        elif plan:
            await asyncio.gather(*(self._read_small_of(name, keys, found) for name, keys in plan.items()))
        return found

    async def _read_small_of(self, name: str, keys: list[bytes], found: dict[bytes, Small]) -> None:
        try:
            async with asyncio.timeout(limits.NODE_READ_TIMEOUT_S):
                answers = await self._cluster.node(name).read_small(keys)
        except (Trouble, TimeoutError):
            return
        for key, whole in zip(keys, answers, strict=True):
            if whole is not None:
                with suppress(CopyDamaged):
                    found[key] = joined(whole)

    async def copy(self, key: bytes, source: StorageNode, target: StorageNode) -> Receipt:
        """Copies a message from node to node for repair, every octet verified before it is committed; the target's receipt.

        Its origin says that it is a repair: it is never entered as new mail (law 6). A copy that is live on the target stays.
        Raises CopyMissing and CopyDamaged of the source; NodeTrouble: from the target it may be there all the same.
        """
        body = await source.read_commit(key)
        commit = _commit(body)
        last = len(commit.sizes) - 1
        digest = hashlib.sha256()
        try:
            for number, octets in enumerate(commit.sizes):
                chunk = await source.read_chunk(key, number)
                data = self._inflater.octets(chunk)
                if len(data) != octets:
                    raise CopyDamaged(f"chunk {number} on {source.id} has {len(data)} octets, not {octets}")
                digest.update(data)
                if number < last:
                    await target.append(key, [chunk])
            if last < 0 or digest.hexdigest() != commit.sha256:
                raise CopyDamaged(f"the copy on {source.id} has another SHA-256 than was accepted")
        except (CopyMissing, CopyDamaged, Trouble):
            await self._let_go(key, target)
            raise
        return await target.commit(key, [chunk], body, len(commit.sizes), None, Origin.REPAIR)

    async def _let_go(self, key: bytes, target: StorageNode) -> None:
        try:
            await target.cancel(key)
        except Trouble as error:
            self._world.log.event(Event.TROUBLE, key=key, node=target.id, error=str(error))


def _commit(body: bytes) -> Commit:
    try:
        return Commit.parse(body)
    except msgspec.DecodeError as error:
        raise CopyDamaged("commit record cannot be read") from error
