"""Owns fetching: one good copy of a message, checksums verified, another copy when one is bad, slow or away (P3).

A copy that fails is reported to `bad_copy`, which notes it for repair. What is handed out has been checked against the
record checksum chunk by chunk; `read_all` checks the SHA-256 of the whole message too.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec
import zstandard

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, MessageUnreadable, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.mail.envelope import Commit, CommitForm
from powermail.storage.contract import COMPRESSED, Chunk, NodeState, StorageNode, Whole

T = TypeVar("T")
BadCopy = Callable[[bytes, str, str], Awaitable[None]]
_decode = msgspec.json.Decoder(Commit).decode
_decode_form = msgspec.json.Decoder(CommitForm).decode


class Small(NamedTuple):
    """A whole small message; `plain` as its commit record says."""

    octets: bytes
    plain: bool


class Unpacker:
    """Gives back what `replicate.Packer` packed."""

    def __init__(self) -> None:
        self._decompress = zstandard.ZstdDecompressor().decompress

    def octets(self, chunk: Chunk) -> bytes:
        """A chunk's octets. Raises CopyDamaged."""
        if not chunk.flags & COMPRESSED:
            return chunk.stored
        try:
            return self._decompress(chunk.stored, max_output_size=limits.RECORD_BODY_OCTETS_MAX)
        except zstandard.ZstdError as error:
            raise CopyDamaged(f"chunk {chunk.number} does not decompress") from error

    def whole(self, whole: Whole) -> Small:
        """A small message. Raises CopyDamaged when its chunks are not as its commit record says."""
        parts = [self.octets(chunk) for chunk in whole.chunks]
        form = _decode_form(whole.commit)
        if [len(part) for part in parts] != form.sizes:
            raise CopyDamaged("chunks of another size than the commit record says")
        return Small(parts[0] if len(parts) == 1 else b"".join(parts), form.plain)


class Fetcher:
    """Reads messages from whichever nodes have good copies."""

    def __init__(self, world: World, cluster: Cluster, bad_copy: BadCopy) -> None:
        self._world = world
        self._cluster = cluster
        self._bad_copy = bad_copy
        self._unpacker = Unpacker()

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
                    await self._bad_copy(key, node.id, str(error))
            except TimeoutError:
                trouble.append(f"{node.id}: no answer in time")
                self._cluster.note_slow(node.id)
            except Trouble as error:
                trouble.append(f"{node.id}: {error}")
        raise MessageUnreadable(f"no good copy of {key.hex()}: {'; '.join(trouble) or 'no node is there'}")

    async def commit(self, key: bytes, nodes: Sequence[str]) -> Commit:
        """The commit record. Raises MessageUnreadable."""

        async def read(node: StorageNode) -> Commit:
            try:
                return _decode(await node.read_commit(key))
            except msgspec.DecodeError as error:
                raise CopyDamaged("commit record cannot be read") from error

        return await self._try(key, nodes, read)

    async def chunks(self, key: bytes, nodes: Sequence[str], commit: Commit) -> AsyncIterator[bytes]:
        """The octets, chunk by chunk. Raises MessageUnreadable, also in the middle."""
        for number, octets in enumerate(commit.sizes):

            async def read(node: StorageNode, number: int = number, octets: int = octets) -> bytes:
                data = self._unpacker.octets(await node.read_chunk(key, number))
                if len(data) != octets:
                    raise CopyDamaged(f"chunk {number} has {len(data)} octets, not {octets}")
                return data

            yield await self._try(key, nodes, read)

    async def read_small(self, wanted: Mapping[bytes, Sequence[str]]) -> dict[bytes, Small]:
        """Whole small messages (key to the nodes believed to hold it), many at once. What is left out is not small, or in
        trouble: `commit` and `chunks` say which, and read from another copy.
        """
        nodes = [node for node in self._cluster.readable() if node.state is not NodeState.FAILED]
        self._world.entropy.shuffle(nodes)
        nodes.sort(key=lambda node: self._cluster.is_slow(node.id))
        plan: dict[str, list[bytes]] = {}
        for key, believed in wanted.items():
            for node in nodes:
                if node.id in believed:
                    plan.setdefault(node.id, []).append(key)
                    break
        found: dict[bytes, Small] = {}
        for name, keys in plan.items():
            try:
                async with asyncio.timeout(limits.NODE_READ_TIMEOUT_S):
                    answers = await self._cluster.node(name).read_small(keys)
                for key, whole in zip(keys, answers, strict=True):
                    if whole is not None:
                        found[key] = self._unpacker.whole(whole)
            except (Trouble, TimeoutError, CopyDamaged, msgspec.DecodeError):
                continue
        return found

    async def read_all(self, key: bytes, nodes: Sequence[str]) -> tuple[Commit, bytes]:
        """A whole message, its SHA-256 checked. Raises MessageUnreadable."""
        commit = await self.commit(key, nodes)
        parts = [part async for part in self.chunks(key, nodes, commit)]
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise MessageUnreadable(f"{key.hex()}: the octets do not have the checksum they were accepted with")
        return commit, data

    async def copy(self, key: bytes, source: StorageNode, target: StorageNode) -> None:
        """Copies a message from node to node, every octet verified on the way. Raises CopyMissing, CopyDamaged, Trouble."""
        body = await source.read_commit(key)
        commit = _decode(body)
        digest = hashlib.sha256()
        for number in range(len(commit.sizes)):
            chunk = await source.read_chunk(key, number)
            digest.update(self._unpacker.octets(chunk))
            if number == len(commit.sizes) - 1:
                if digest.hexdigest() != commit.sha256:
                    raise CopyDamaged(f"the copy on {source.id} has another SHA-256 than was accepted")
                await target.commit(key, [chunk], body, len(commit.sizes))
            else:
                await target.append(key, [chunk])
