"""Owns fetching: one good copy of a message, checksums verified, another copy when one is bad, slow or away (P3).

Reads are hedged: when a node takes longer than is usual with it, a second copy is asked beside it, and the first good answer
counts (P20). At most two are asked at a time.

A copy that fails is reported to `bad_copy`, which notes it for repair; that it cannot be noted hides no good copy. What is
handed out has been checked against the record checksum chunk by chunk; a copy for repair by the SHA-256 of the whole, too.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, MessageUnreadable, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.pace import Beside, Pace
from powermail.cluster.packing import Small, joined
from powermail.mail.envelope import Commit
from powermail.storage.contract import NodeState, Origin, Receipt, StorageNode, Whole
from powermail.storage.frames import Inflater

T = TypeVar("T")
_SMALL: Final = "small"  # a kind of read
BadCopy = Callable[[bytes, str, str], Awaitable[None]]


class Fetcher:
    """Reads messages from whichever nodes have good copies."""

    def __init__(self, world: World, cluster: Cluster, bad_copy: BadCopy) -> None:
        self._world = world
        self._cluster = cluster
        self._bad_copy = bad_copy
        self._inflater = Inflater()
        self._monotonic = world.clock.monotonic
        self._pace = Pace(self._monotonic)

    def _order(self, nodes: Sequence[str], kind: str) -> list[StorageNode]:
        """The nodes believed to hold it, near ones before far ones: of our site, then by what reads take."""
        return self._sorted([node for name in nodes if (node := self._cluster.find_readable(name)) is not None], kind)

    def _others(self, nodes: Sequence[str]) -> list[StorageNode]:
        """All others, for belief may be old."""
        return [node for node in self._cluster.readable() if node.id not in nodes]

    def _sorted(self, nodes: list[StorageNode], kind: str) -> list[StorageNode]:
        self._world.entropy.shuffle(nodes)
        slow, ranks = self._cluster.is_slow, self._pace.ranks(kind, self._cluster.far)
        nodes.sort(key=lambda node: (slow(node.id), ranks.get(node.id, 0)))
        return nodes

    async def _try(self, key: bytes, nodes: Sequence[str], kind: str, read: Callable[[StorageNode], Awaitable[T]]) -> T:
        """What the first good copy says. Raises MessageUnreadable."""
        trouble: list[str] = []
        rest, others = deque(self._order(nodes, kind)), True
        while rest or others:
            if others and len(rest) < 2:  # one that is late is asked of another beside it
                rest.extend(self._others(nodes))
                others = False
                continue
            node = rest.popleft()
            beside = Beside(partial(self._second, node, rest, kind, read), self._pace.late_s(node.id, kind) if rest else None)
            try:
                return await self._read(node, kind, read, beside)
            except Exception as error:  # noqa: BLE001  what is no trouble of a node is raised below
                if beside.good is not None:
                    self._overtaken(node)
                    return beside.good.result()
                trouble.append(await self._without(key, nodes, node, error))
                if beside.task is None:
                    continue
                second = rest.popleft()
                try:
                    return await beside.task
                except Exception as error:  # noqa: BLE001  the same
                    trouble.append(await self._without(key, nodes, second, error))
            finally:
                beside.let_go()
        raise MessageUnreadable(f"no good copy of {key.hex()}: {'; '.join(trouble) or 'no node is there'}")

    async def _read(
        self, node: StorageNode, kind: str, read: Callable[[StorageNode], Awaitable[T]], beside: Beside[Any] | None = None
    ) -> T:
        began = self._monotonic()
        try:
            async with asyncio.timeout(limits.NODE_READ_TIMEOUT_S) as timer:
                if beside is not None:
                    beside.watch(timer)
                found = await read(node)
        finally:
            if beside is not None:
                beside.over()
        self._pace.took(node.id, kind, self._monotonic() - began)
        return found

    def _second(
        self, node: StorageNode, rest: Sequence[StorageNode], kind: str, read: Callable[[StorageNode], Awaitable[T]]
    ) -> Coroutine[Any, Any, T] | None:
        """The read of another copy, when that of `node` is late; None if it may not be asked twice now."""
        if not self._pace.may_ask_twice(node.id):
            return None
        self._world.counters.add("cluster.hedged")
        return self._read(rest[0], kind, read)

    def _overtaken(self, node: StorageNode) -> None:
        if not self._pace.is_overtaken(node.id):
            self._world.counters.add("cluster.overtaken")
        self._pace.overtaken(node.id)

    async def _without(self, key: bytes, nodes: Sequence[str], node: StorageNode, error: Exception) -> str:
        """A node gave no good copy; why. Raises what is no trouble of a node."""
        if isinstance(error, CopyMissing | CopyDamaged):
            if node.id in nodes:
                self._world.counters.add("cluster.bad_copies")
                self._world.log.event(Event.COPY_BAD, key=key, node=node.id, error=str(error))
                await self._note_bad(key, node.id, str(error))
            return f"{node.id}: {error}"
        if isinstance(error, TimeoutError):
            self._cluster.note_slow(node.id)
            return f"{node.id}: no answer in time"
        if isinstance(error, Trouble):
            return f"{node.id}: {error}"
        raise error

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

        return await self._try(key, nodes, "commit", read)

    async def chunk(self, key: bytes, nodes: Sequence[str], commit: Commit, number: int) -> bytes:
        """The octets of one chunk. Raises MessageUnreadable."""

        async def read(node: StorageNode) -> bytes:
            data = self._inflater.octets(await node.read_chunk(key, number))
            if len(data) != commit.sizes[number]:
                raise CopyDamaged(f"chunk {number} has {len(data)} octets, not {commit.sizes[number]}")
            return data

        return await self._try(key, nodes, "chunk", read)

    async def chunks(self, key: bytes, nodes: Sequence[str], commit: Commit) -> AsyncIterator[bytes]:
        """The octets, chunk by chunk. Raises MessageUnreadable, also in the middle."""
        for number in range(len(commit.sizes)):
            yield await self.chunk(key, nodes, commit, number)

    async def read_small(self, wanted: Mapping[bytes, tuple[str, ...]]) -> dict[bytes, Small]:
        """Whole small messages (key to the nodes believed to hold it), many at once. What is left out is not small, or in
        trouble: `commit` and `chunks` say which, and read from another copy.
        """
        names = dict.fromkeys(name for believed in dict.fromkeys(wanted.values()) for name in believed)
        there = [node for name in names if (node := self._cluster.find_readable(name)) is not None]
        nodes = self._sorted([node for node in there if node.state is not NodeState.FAILED], _SMALL)
        found: dict[bytes, Small] = {}
        plan = _plan(nodes, wanted)
        if len(plan) == 1:
            await self._read_small_hedged(*next(iter(plan.items())), nodes, wanted, found)
        elif plan:
            reads = [self._read_small_hedged(name, keys, nodes, wanted, found) for name, keys in plan.items()]
            await asyncio.gather(*reads)
        return found

    async def _read_small_hedged(
        self,
        name: str,
        keys: list[bytes],
        nodes: Sequence[StorageNode],
        wanted: Mapping[bytes, tuple[str, ...]],
        found: dict[bytes, Small],
    ) -> None:
        """Reads from one node; when that is late, from others beside it."""
        beside = Beside(partial(self._small_elsewhere, name, keys, nodes, wanted, found), self._pace.late_s(name, _SMALL))
        try:
            await self._read_small_of(name, keys, found, beside)
        except (Trouble, TimeoutError):
            if beside.good is not None:
                self._overtaken(self._cluster.node(name))
            elif beside.task is not None:  # what is still to come is better than nothing
                await asyncio.wait([beside.task])
        finally:
            beside.let_go()

    def _small_elsewhere(
        self,
        name: str,
        keys: list[bytes],
        nodes: Sequence[StorageNode],
        wanted: Mapping[bytes, tuple[str, ...]],
        found: dict[bytes, Small],
    ) -> Coroutine[Any, Any, None] | None:
        """The same of other nodes, when that of one is late; None if there is none, or it may not be asked twice now."""
        plan = _plan([node for node in nodes if node.id != name], {key: wanted[key] for key in keys})
        if not plan or not self._pace.may_ask_twice(name):
            return None
        self._world.counters.add("cluster.hedged")

        async def reading() -> None:
            await asyncio.gather(*(self._read_small_of(other, part, found) for other, part in plan.items()))

        return reading()

    async def _read_small_of(
        self, name: str, keys: list[bytes], found: dict[bytes, Small], beside: Beside[None] | None = None
    ) -> None:
        """Raises NodeTrouble, TimeoutError."""

        def read(node: StorageNode) -> Awaitable[list[Whole | None]]:
            return node.read_small(keys)

        answers = await self._read(self._cluster.node(name), _SMALL, read, beside)
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


def _plan(nodes: Sequence[StorageNode], wanted: Mapping[bytes, tuple[str, ...]]) -> dict[str, list[bytes]]:
    """Each key to the first of the nodes that is believed to hold it; what none of them holds is left out."""
    plan: dict[str, list[bytes]] = {}
    shares: dict[tuple[str, ...], list[bytes]] = {}  # many are believed to lie on the same nodes
    for key, believed in wanted.items():
        share = shares.get(believed)
        if share is None:
            name = next((node.id for node in nodes if node.id in believed), "")
            share = shares[believed] = plan.setdefault(name, []) if name else []
        share.append(key)
    return plan


def _commit(body: bytes) -> Commit:
    try:
        return Commit.parse(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CopyDamaged("commit record cannot be read") from error
