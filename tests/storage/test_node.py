"""LocalNode on a real disk: closing under readers."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from powermail.base.errors import NodeTrouble
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.storage.contract import Chunk, NodeState
from powermail.storage.keyindex import SqliteKeyIndex
from powermail.storage.node import LocalNode
from tests.storage.support import CLUSTER, SMALL, key


async def open_node(path: Path) -> tuple[LocalNode, list[SqliteKeyIndex]]:
    """A node in an empty directory, and the key indexes it opens."""
    made: list[SqliteKeyIndex] = []

    def make_keys(name: str, store: bytes) -> SqliteKeyIndex:
        made.append(SqliteKeyIndex(name, store))
        return made[-1]

    path.mkdir()
    node = LocalNode(system_world(MemoryLog()), CLUSTER, "a", str(path), "a", 0, SMALL, make_keys)
    await node.initialise()
    await node.open()
    return node, made


def slow_reader(keys: SqliteKeyIndex) -> list[bytes]:
    """A read that is still running when the node is closed."""
    time.sleep(0.2)
    return keys.keys(1, b"", 10)


async def test_closing_waits_for_reads_that_have_begun(tmp_path: Path) -> None:
    """The database was closed under a reading thread: now and then the whole process died of it at shutdown."""
    node, made = await open_node(tmp_path / "a")
    await node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1)
    reading = node._read_lane.run(slow_reader, made[0])
    await node.close()
    assert reading.done() and reading.result() == [key(1)]


async def test_a_directory_that_goes_away_under_a_read_harms_only_that_read(tmp_path: Path) -> None:
    """F12: the same when the disk is pulled: the reader ends, then the store is closed, then it can be opened again."""
    node, made = await open_node(tmp_path / "a")
    await node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1)
    reading = node._read_lane.run(slow_reader, made[0])
    os.rename(tmp_path / "a", tmp_path / "away")
    with pytest.raises(NodeTrouble):
        await node.probe()
    assert node.state is NodeState.MISSING
    os.rename(tmp_path / "away", tmp_path / "a")
    await node.open()
    assert reading.done() and reading.result() == [key(1)]
    assert await node.has([key(1), key(2)]) == [True, False]
    await asyncio.gather(node.close())
