"""What every storage node promises: on a real disk, on the simulated one, and in memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard

from powermail.base.disk import SystemDisk
from powermail.base.errors import CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble
from powermail.base.lane import Lane
from powermail.base.log import MemoryLog
from powermail.base.world import World, system_world
from powermail.sim.disk import SimDisk
from powermail.sim.lane import SimLane
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import COMPRESSED, START, Chunk, NodeState, Position, StorageNode
from powermail.storage.keyindex import KeyIndex, MemoryKeyIndex, SqliteKeyIndex
from powermail.storage.node import LocalNode
from tests.storage.support import CLUSTER, SMALL, key


def simulated_world() -> World:
    """A disk in memory and lanes without threads."""
    world = system_world(MemoryLog())
    world.disk = SimDisk()

    def lane(name: str) -> Lane:
        return SimLane(lambda: 0.0001, lambda: True)

    world.lane = lane
    return world


def in_memory(path: str, store: bytes) -> KeyIndex:
    """A key index that is thrown away."""
    return MemoryKeyIndex()


@pytest.fixture(params=["real disk", "simulated disk", "memory"])
async def node(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageNode]:
    """An open, empty node of each kind."""
    made: StorageNode
    if request.param == "real disk":
        assert isinstance(system_world(MemoryLog()).disk, SystemDisk)
        made = LocalNode(system_world(MemoryLog()), CLUSTER, "a", str(tmp_path / "a"), "rack-a", 3, SMALL, SqliteKeyIndex)
    elif request.param == "simulated disk":
        made = LocalNode(simulated_world(), CLUSTER, "a", "a", "rack-a", 3, SMALL, in_memory)
    else:
        made = MemoryNode("a", "rack-a", 3)
    await made.initialise()
    await made.open()
    yield made
    await made.close()


def chunk(number: int, octets: bytes, compressed: bool = False) -> Chunk:
    """A chunk as the cluster makes it."""
    if compressed:
        return Chunk(number, COMPRESSED, zstandard.ZstdCompressor().compress(octets), len(octets))
    return Chunk(number, 0, octets, len(octets))


async def put(node: StorageNode, number: int, octets: bytes = b"octets") -> bytes:
    """A small committed message; its key."""
    await node.commit(key(number), [chunk(0, octets)], b'{"commit":%d}' % number, 1)
    return key(number)


async def test_it_says_who_it_is(node: StorageNode) -> None:
    assert (node.id, node.group, node.priority, node.state) == ("a", "rack-a", 3, NodeState.READ_WRITE)
    assert node.incarnation
    assert node.stat().state == "read-write"
    await node.open()  # fine if open
    await node.probe()


async def test_a_committed_message_is_read_octet_for_octet(node: StorageNode) -> None:
    octets = bytes(range(256)) * 20
    await node.commit(key(1), [chunk(0, octets, compressed=True)], b"the record", 1)
    assert await node.read_commit(key(1)) == b"the record"
    assert await node.read_chunk(key(1), 0) == chunk(0, octets, compressed=True)
    assert await node.has([key(1), key(2)]) == [True, False]
    await node.verify(key(1))
    assert node.stat().messages == 1


async def test_a_stream_counts_from_its_commit_on(node: StorageNode) -> None:
    await node.append(key(1), [chunk(0, b"first")])
    assert (await node.read_chunk(key(1), 0)).stored == b"first"
    assert await node.has([key(1)]) == [False]
    with pytest.raises(CopyMissing):
        await node.read_commit(key(1))
    await node.append(key(1), [chunk(1, b"second")])
    await node.commit(key(1), [chunk(2, b"third")], b"{}", 3)
    assert [(await node.read_chunk(key(1), n)).stored for n in range(3)] == [b"first", b"second", b"third"]


async def test_a_commit_without_all_chunks_is_refused(node: StorageNode) -> None:
    await node.append(key(1), [chunk(0, b"first")])
    with pytest.raises(NodeTrouble):
        await node.commit(key(1), [chunk(2, b"third")], b"{}", 3)
    assert await node.has([key(1)]) == [False]


async def test_a_commit_is_idempotent_by_key(node: StorageNode) -> None:
    """R08: other octets under a key that is there never take its place."""
    await put(node, 1, b"the first")
    await node.commit(key(1), [chunk(0, b"another")], b"another", 1)
    assert (await node.read_chunk(key(1), 0)).stored == b"the first"
    assert await node.read_commit(key(1)) == b'{"commit":1}'
    assert node.stat().messages == 1


@pytest.mark.parametrize("tombstone", [False, True])
async def test_abort_and_deletion_are_final(node: StorageNode, tombstone: bool) -> None:
    """R08, R10, P8: also when the message comes later."""
    for number in (1, 2):
        if number == 1:
            await put(node, 1)
        await (node.delete([key(number)]) if tombstone else node.abort(key(number)))
        with pytest.raises(NodeTrouble):
            await put(node, number)
        with pytest.raises(NodeTrouble):
            await node.append(key(number), [chunk(0, b"x")])
        with pytest.raises(CopyMissing):
            await node.read_commit(key(number))
    assert await node.has([key(1), key(2)]) == [False, False]
    assert await node.deleted([key(1), key(2), key(3)]) == [tombstone, tombstone, False]
    assert await node.live_keys(b"", 10) == []
    await node.delete([key(1)])
    assert await node.deleted([key(1)]) == [True]


async def test_small_messages_are_read_many_at_once(node: StorageNode) -> None:
    for number in (1, 2, 3):
        await put(node, number, b"octets %d" % number)
    await node.append(key(5), [chunk(0, b"open")])
    found = await node.read_small([key(3), key(9), key(1), key(5)])
    assert found[1] is None and found[3] is None
    assert found[0] is not None and found[0].commit == b'{"commit":3}'
    assert found[2] is not None and found[2].chunks == [chunk(0, b"octets 1")]


async def test_a_blocked_node_reads_and_deletes(node: StorageNode) -> None:
    await put(node, 1)
    await put(node, 2)
    node.block(True)
    assert node.state is NodeState.BLOCKED
    with pytest.raises(NodeReadOnly):
        await put(node, 3)
    with pytest.raises(NodeReadOnly):
        await node.put_checkpoint(b"x" * 16, 0, b"x")
    assert (await node.read_chunk(key(1), 0)).stored == b"octets"
    await node.delete([key(1)])
    assert await node.has([key(1), key(2)]) == [False, True]
    node.block(False)
    await put(node, 3)


async def test_scan_gives_each_message_once_in_the_order_of_the_log(node: StorageNode) -> None:
    order = list(range(1, 41))
    random.Random(1).shuffle(order)
    for number in order:
        await put(node, number)
    await node.delete([key(order[5])])
    wanted = [key(number) for number in order if number != order[5]]
    for limit in (1, 7, 1000):
        found: list[bytes] = []
        position = START
        while True:
            items, following = await node.scan(position, limit, 0.0, False)
            found += [item.key for item in items]
            if following == position:
                break
            position = following
        assert found == wanted
    assert position <= await node.end()
    await put(node, 100)
    items, _ = await node.scan(position, 10, 0.0, False)
    assert [item.key for item in items] == [key(100)]


async def test_live_keys_come_in_order_and_in_pages(node: StorageNode) -> None:
    for number in (5, 1, 4, 2, 3):
        await put(node, number)
    assert await node.live_keys(b"", 2) == [key(1), key(2)]
    assert await node.live_keys(key(2), 10) == [key(3), key(4), key(5)]


async def test_checkpoints_are_kept_by_name_and_number(node: StorageNode) -> None:
    first, second = b"a" * 16, b"b" * 16
    await node.put_checkpoint(second, 0, b"whole")
    await node.put_checkpoint(first, 0, b"whole one")
    await node.put_checkpoint(first, 1, b"delta")
    assert await node.checkpoints(b"", 10) == [(first, 0, b"whole one"), (first, 1, b"delta"), (second, 0, b"whole")]
    assert await node.checkpoints(first, 10) == [(second, 0, b"whole")]
    await node.put_checkpoint(first, 0, b"whole again")
    assert (await node.checkpoints(b"", 10))[0] == (first, 0, b"whole again")
    assert len(await node.checkpoints(b"", 10)) == 2


async def test_a_new_incarnation_is_another(node: StorageNode) -> None:
    before = node.incarnation
    assert await node.new_incarnation() == node.incarnation != before


async def test_a_good_copy_is_never_discarded(node: StorageNode) -> None:
    await put(node, 1)
    await node.discard(key(1))
    await node.discard(key(2))
    assert await node.has([key(1)]) == [True]


async def test_a_bad_copy_is_told_and_can_be_replaced(node: StorageNode, tmp_path: Path) -> None:
    await put(node, 1, b"the octets of this message")
    _damage(node, tmp_path)
    with pytest.raises(CopyDamaged):
        await node.verify(key(1))
    assert await node.read_small([key(1)]) == [None]
    await node.discard(key(1))
    assert await node.has([key(1)]) == [False]
    await put(node, 1, b"the octets of this message")
    await node.verify(key(1))


def _damage(node: StorageNode, tmp_path: Path) -> None:
    if isinstance(node, MemoryNode):
        node.damage(key(1))
        return
    assert isinstance(node, LocalNode)
    if isinstance(node._world.disk, SimDisk):
        (path,) = (name for name in node._world.disk.names if name.endswith(".seg"))
        content = node._world.disk.content[node._world.disk.names[path]]
        content[content.index(b"the octets")] ^= 1
        return
    (segment,) = (tmp_path / "a" / "segments").glob("*.seg")
    octets = bytearray(segment.read_bytes())
    octets[octets.index(b"the octets")] ^= 1
    with segment.open("r+b") as file:
        file.write(octets)


async def test_compaction_frees_what_is_dead_and_keeps_the_rest(node: StorageNode) -> None:
    for number in range(1, 400):
        await put(node, number, b"x" * 1000)
    await node.delete([key(number) for number in range(1, 400) if number % 10])
    await node.forget_tombstones([key(number) for number in range(1, 400) if number % 10])
    while await node.compact(Position(1 << 40, 0)):
        pass
    for number in range(10, 400, 10):
        assert (await node.read_chunk(key(number), 0)).stored == b"x" * 1000
    assert await node.has([key(1)]) == [False]


async def test_a_closed_node_says_so(node: StorageNode) -> None:
    await put(node, 1)
    await node.close()
    assert node.state is NodeState.CLOSED
    with pytest.raises(NodeTrouble):
        await node.read_commit(key(1))
