"""Asks a node what the suite of the contract asks it again and again."""

from __future__ import annotations

import pytest
import zstandard

from powermail.base.errors import CommitRefused, NodeTrouble
from powermail.storage.contract import COMPRESSED, Chunk, Mark, Origin, Position, Receipt, Stamp, StorageNode
from tests.storage.support import key

FAR = Position(1 << 40, 0)
NO_MARK = Mark()
NAME = b"n" * 16


def text(number: int, octets: int = 0) -> bytes:
    """The octets of one message."""
    return b"octets of %d." % number + b"x" * octets


def chunk(number: int, octets: bytes, compressed: bool = False) -> Chunk:
    """A chunk as the cluster makes it."""
    if compressed:
        return Chunk(number, COMPRESSED, zstandard.ZstdCompressor().compress(octets), len(octets))
    return Chunk(number, 0, octets, len(octets))


async def put(
    node: StorageNode,
    number: int,
    octets: bytes = b"",
    stamp: Stamp | None = None,
    origin: Origin = Origin.DELIVERY,
) -> Receipt:
    """Commits a small message."""
    record = b'{"commit":%d}' % number
    return await node.commit(key(number), [chunk(0, octets or text(number))], record, 1, stamp, origin)


async def held(node: StorageNode, *numbers: int) -> list[str]:
    """What it says of each key, in words."""
    return [answer.value for answer in await node.has([key(number) for number in numbers])]


async def refused(node: StorageNode, number: int, stamp: Stamp | None = None) -> None:
    """This commit is refused for good, and nothing of it is here (law 5)."""
    with pytest.raises(CommitRefused):
        await put(node, number, stamp=stamp)
    assert await held(node, number) == ["absent"]


async def unknown(node: StorageNode, number: int, stamp: Stamp | None = None) -> None:
    """This commit fails, but not as a definite refusal (law 5)."""
    with pytest.raises(NodeTrouble) as info:
        await put(node, number, stamp=stamp)
    assert not isinstance(info.value, CommitRefused)


async def heard(node: StorageNode) -> StorageNode:
    """The node, with what it shows without waiting as it is now: from far it is as it was last heard."""
    hear = getattr(node, "hear", None)
    if hear is not None:
        await hear()
    return node


async def fresh(node: StorageNode) -> Stamp:
    """The node's stamp now."""
    stamp = (await heard(node)).stamp()
    assert stamp is not None
    return stamp


async def compact_all(node: StorageNode, forgotten: frozenset[bytes] = frozenset(), at: float = 0.0) -> int:
    """Steps until nothing is worth it; how many there were."""
    for steps in range(1000):
        wanted = await node.compactable(FAR, at)
        if wanted is None:
            return steps
        await node.compact(FAR, [name for name in wanted if name in forgotten], NO_MARK)
    raise AssertionError("compaction never ends")
