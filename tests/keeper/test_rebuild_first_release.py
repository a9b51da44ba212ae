"""Rebuilding from nodes as the first release left them, read by the nodes of production (law 13, P19)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.sqlite_files import SUFFIXES
from powermail.base.world import World, system_world
from powermail.cluster.cluster import Cluster
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.checkpoint import Checkpointer
from powermail.keeper.rebuild import Rebuilder, Rebuilt
from powermail.storage.contract import Held, StorageNode
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode
from tests.fixtures import release_1
from tests.keeper.installation import entries


@asynccontextmanager
async def opened(data: Path) -> AsyncIterator[tuple[World, str, list[LocalNode]]]:
    """The nodes of a data directory, without its index."""
    for suffix in SUFFIXES:
        (data / f"index.db{suffix}").unlink(missing_ok=True)
    world = system_world(MemoryLog())
    cluster = json.loads((data / "nodes" / "a" / "identity").read_bytes())["cluster"]
    options = Options(segment_octets=64 * limits.KIB, reserve_octets=0)
    nodes = [
        LocalNode(world, cluster, name, str(data / "nodes" / name), f"group-{name}", 1, options, SqliteKeyIndex)
        for name in ("a", "b", "c")
    ]
    for node in nodes:
        await node.open()
    try:
        yield world, cluster, nodes
    finally:
        for node in nodes:
            await node.close()


async def rebuilt(world: World, cluster: str, nodes: list[LocalNode], data: Path) -> tuple[Rebuilt, SqliteIndex]:
    """The index made anew, and opened."""

    async def progress(done: int, total: int) -> None:
        assert 0 < done <= total

    path = str(data / "index.db")
    result = await Rebuilder(world, nodes, path, cluster, 2, progress).run()
    index = SqliteIndex(world, path)
    await index.open()
    return result, index


@pytest.mark.parametrize("variant", release_1.VARIANTS)
async def test_all_that_was_listed_or_durable_is_listed_and_nothing_deleted_is(tmp_path: Path, variant: str) -> None:
    facts = release_1.facts(variant)
    data = release_1.unpack(tmp_path, variant)
    async with opened(data) as (world, cluster, nodes):
        result, index = await rebuilt(world, cluster, nodes, data)
        assert await index.audit() == []
        for address, box in facts.mailboxes.items():
            found = await entries(index, box.account)
            uids: dict[str, list[int]] = {}
            for entry in found:
                message = await index.message(entry.key)
                assert message is not None
                uids.setdefault(message.sha256.hex(), []).append(entry.uid)
            wanted = [sha256 for _, _, sha256 in box.entries] + facts.adopted.get(address, [])
            assert sorted(sha256 for sha256, at in uids.items() for _ in at) == sorted(wanted)
            for uid, _, sha256 in box.entries:  # no UID means another message
                assert uids[sha256] == [uid] or min(uids[sha256]) > limits.EPOCH_JUMP
        rows = await index.queue_rows(0, 100)
        assert sorted((row.key.hex(), row.destination) for row in rows) == sorted(
            (row.key, row.destination) for row in facts.queue
        )
        assert all(row.held for row in rows)
        orphan = bytes.fromhex(facts.orphan.key)
        node = next(node for node in nodes if node.id == facts.orphan.node)
        await node.delete(await index.orders(node.id, 100), index.mark(), 0.0)
        assert await node.has([orphan]) == [Held.DEAD]
        assert (result.entries_lost, result.unreadable, result.records_bad) == (0, 0, 0)
        await index.close()


async def test_checkpoints_written_since_keep_every_uid(tmp_path: Path) -> None:
    facts = release_1.facts("killed")
    data = release_1.unpack(tmp_path, "killed")
    async with opened(data) as (world, cluster, nodes):
        _, index = await rebuilt(world, cluster, nodes, data)
        view = Cluster(world, nodes, 2, "random")
        await view.start(known)
        checkpointer = Checkpointer(world, view, index)
        assert await checkpointer.write_due(float("inf")) == len(facts.mailboxes)
        await checkpointer.write_queue()
        checkpointer.close()
        before = {box.account: await listed(index, box.account) for box in facts.mailboxes.values()}
        await index.close()
        for suffix in SUFFIXES:
            (data / f"index.db{suffix}").unlink(missing_ok=True)
        _, index = await rebuilt(world, cluster, nodes, data)
        assert {box.account: await listed(index, box.account) for box in facts.mailboxes.values()} == before
        assert await index.queue_count() == len(facts.queue)
        await index.close()


async def known(node: StorageNode) -> None:
    """The rebuilt index knows all nodes already."""


async def listed(index: SqliteIndex, account: str) -> list[tuple[int, bytes, int, int, int]]:
    """What INBOX shows; a view keeps whole seconds."""
    return [
        (entry.uid, entry.key, entry.flags, entry.octets, int(entry.received_at)) for entry in await entries(index, account)
    ]
