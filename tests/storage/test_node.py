"""LocalNode on a real disk: closing under readers, disks that go away, hang or lie, derived files that rot (law 14)."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import NodeReadOnly, NodeTrouble, OperatorError
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.storage.contract import START, Chunk, Held, Mark, NodeState, Origin, StorageNode
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.node import LocalNode
from tests.storage.asks import put, text
from tests.storage.rigs import LocalRig, overdue, walk
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


async def open_rig(tmp_path: Path, messages: int = 0) -> LocalRig:
    """A node on a real disk with that many messages."""
    rig = LocalRig(tmp_path)
    await rig.node.initialise()
    await rig.node.open()
    for number in range(1, messages + 1):
        await put(rig.node, number)
    return rig


async def all_there(node: StorageNode, messages: int) -> None:
    """Every message, whole, and shown once."""
    for number in range(1, messages + 1):
        await node.verify(key(number))
        assert (await node.read_chunk(key(number), 0)).stored == text(number)
    found = [name for name, origin in await walk(node) if origin is not None]
    assert sorted(found) == [key(number) for number in range(1, messages + 1)]


def slow_reader(keys: SqliteKeyIndex) -> object:
    """A read that is still running when the node is closed."""
    time.sleep(0.2)
    return keys.find(key(1))


async def test_closing_waits_for_reads_that_have_begun(tmp_path: Path) -> None:
    """The database was closed under a reading thread: now and then the whole process died of it at shutdown."""
    node, made = await open_node(tmp_path / "a")
    await put(node, 1)
    reading = node._reads.run(slow_reader, made[0])
    await node.close()
    assert reading.done() and reading.result() is not None


async def test_a_directory_that_goes_away_under_a_read_harms_only_that_read(tmp_path: Path) -> None:
    """F12: the same when the disk is pulled: the reader ends, then the store is closed, then it can be opened again."""
    node, made = await open_node(tmp_path / "a")
    await put(node, 1)
    reading = node._reads.run(slow_reader, made[0])
    os.rename(tmp_path / "a", tmp_path / "away")
    with pytest.raises(NodeTrouble):
        await node.probe()
    assert node.state is NodeState.MISSING and node.stamp() is None and node.incarnation == ""
    os.rename(tmp_path / "away", tmp_path / "a")
    await node.open()
    assert reading.done() and reading.result() is not None
    assert await node.has([key(1), key(2)]) == [Held.LIVE, Held.ABSENT]
    await node.close()


async def test_initialise_leaves_alone_what_is_there(tmp_path: Path) -> None:
    rig = await open_rig(tmp_path, 3)
    await rig.node.close()
    rig.node = rig.make()
    with pytest.raises(OperatorError, match="not empty"):
        await rig.node.initialise()
    await rig.node.open()
    await all_there(rig.node, 3)
    await rig.end()


# -- the key index can always be made anew ------------------------------------------------------------------------


def page_octets(path: Path) -> int:
    """Octets of a page of that database."""
    with sqlite3.connect(path) as database:
        size: int = database.execute("PRAGMA page_size").fetchone()[0]
    database.close()
    return size


async def settled(tmp_path: Path, messages: int) -> tuple[LocalRig, Path]:
    """A closed node whose key index is in its file, without a journal beside it."""
    rig = await open_rig(tmp_path, messages)
    await rig.node.delete([key(9000)], Mark(epoch=4), 1.0)
    await rig.node.close()
    path = tmp_path / "node" / "keys.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return rig, path


async def test_a_zeroed_page_of_keys_db_is_rebuilt(tmp_path: Path) -> None:
    """Each page in turn: the node opens, or finds it while it runs, fails with its reason, and is whole when reopened."""
    messages = 120
    rig, path = await settled(tmp_path, messages)
    clean = path.read_bytes()
    size = page_octets(path)
    assert len(clean) // size >= 3
    for page in range(len(clean) // size):
        for rest in ("-wal", "-shm"):
            Path(f"{path}{rest}").unlink(missing_ok=True)
        path.write_bytes(clean[: page * size] + bytes(size) + clean[(page + 1) * size :])
        node = await rig.reopen()
        try:
            await all_there(node, messages)
        except NodeTrouble:
            assert node.state is NodeState.MISSING and node.stat().reason
            await node.open()  # as the one who looks after its health does
            await all_there(node, messages)
        assert await node.has([key(9000)]) == [Held.DEAD], f"page {page}"
        assert (await node.facts()).mark.epoch == 4
        await node.close()
    await rig.end()


@pytest.mark.parametrize("octets", [b"", b"no database at all" * 1000])
async def test_a_foreign_keys_db_is_rebuilt(octets: bytes, tmp_path: Path) -> None:
    rig, path = await settled(tmp_path, 10)
    path.write_bytes(octets)
    await all_there(await rig.reopen(), 10)
    await rig.end()


async def test_a_locked_keys_db_is_rebuilt(tmp_path: Path) -> None:
    """Somebody looks into it with a tool and holds it: that is no reason for a server not to start."""
    rig, path = await settled(tmp_path, 10)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        async with asyncio.timeout(30):
            await all_there(await rig.reopen(), 10)
    finally:
        other.close()
    await rig.end()


async def test_a_keys_db_of_a_younger_log_is_not_believed(tmp_path: Path) -> None:
    """The disk was put back without it, or the other way round: what the log does not hold is not here."""
    rig = await open_rig(tmp_path, 5)
    await rig.node.close()
    folder = tmp_path / "node" / "segments"
    old = {segment.name: segment.read_bytes() for segment in folder.iterdir()}
    node = await rig.reopen()
    for number in range(6, 60):
        await put(node, number)
    await node.close()
    for segment in folder.iterdir():
        if segment.name in old:
            segment.write_bytes(old[segment.name])
        else:
            segment.unlink()
    node = await rig.reopen()
    await all_there(node, 5)
    for number in range(6, 60):
        with pytest.raises(Exception, match=r"."):
            await node.verify(key(number))
        assert await node.has([key(number)]) != [Held.LIVE], f"{number} is not in the log"
    await rig.end()


# -- disks that fail or hang --------------------------------------------------------------------------------------


class FailingFile:
    """An open file whose writes fail."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, *args: Any, **named: Any) -> None:
        raise OSError(errno.EIO, "injected")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


async def test_a_failed_write_is_the_nodes_trouble_and_a_reopening_ends_it(tmp_path: Path) -> None:
    """P18: read-only until it is opened anew; the probe does not lift it."""
    rig = await open_rig(tmp_path, 5)
    node = rig.node
    real = rig.disk.open

    def failing(path: str, *args: Any, **named: Any) -> Any:
        file = real(path, *args, **named)
        return FailingFile(file) if "/segments/" in path else file

    rig.disk.open = failing  # type: ignore[method-assign]
    assert isinstance(node, LocalNode)
    store = node._store
    assert store is not None
    outcomes = await asyncio.gather(*[put(node, n, text(n, 1500)) for n in range(6, 12)], return_exceptions=True)
    assert any(isinstance(outcome, NodeTrouble) for outcome in outcomes)
    assert node.state is NodeState.FAILED and node.stat().reason
    with pytest.raises(NodeReadOnly):
        await put(node, 50)
    with pytest.raises(NodeTrouble):
        await node.delete([key(1)], Mark(), 0.0)
    await node.probe()
    assert node.state is NodeState.FAILED
    assert (await node.read_chunk(key(1), 0)).stored == text(1)
    taken = [n for n, outcome in zip(range(6, 12), outcomes, strict=True) if not isinstance(outcome, BaseException)]
    rig.disk.open = real  # type: ignore[method-assign]
    again = await rig.reopen()
    assert again.state is NodeState.READ_WRITE
    for number in [*range(1, 6), *taken]:
        await again.verify(key(number))
    await put(again, 50)
    await rig.end()


@pytest.mark.usefixtures("impatient")
async def test_a_hung_disk_ends_every_call_and_close(tmp_path: Path) -> None:
    """Law 14: no deletion reached the healthy nodes, no reconcile, no start and no stop while one disk hung."""
    rig = await open_rig(tmp_path, 3)
    node = rig.node
    rig.hang()
    for call in (
        node.probe,
        lambda: put(node, 4),
        lambda: node.delete([key(1)], Mark(), 0.0),
        lambda: node.scan(START, 10, 0.0),
        lambda: node.has([key(1)]),
        lambda: node.verify(key(1)),
    ):
        (end,) = await overdue(rig, call())
        assert isinstance(end, NodeTrouble)
    assert node.state is NodeState.FAILED and node.stat().reason
    assert await overdue(rig, node.close()) == [None]
    assert node.state.value == "closed"
    rig.release()


async def _open_patiently(rig: LocalRig) -> StorageNode:
    """The thread that hung holds the lock until it has come back."""
    for _ in range(500):
        try:
            return await rig.reopen()
        except (OperatorError, NodeTrouble):
            await asyncio.sleep(0.02)
    raise AssertionError("it never opens again")


@pytest.mark.usefixtures("impatient")
async def test_a_node_that_hung_is_well_when_it_answers_again(tmp_path: Path) -> None:
    """The probe that hung is the one that lifts it; reads hang no longer either."""
    rig = await open_rig(tmp_path, 2)
    node = rig.node
    rig.hang()
    assert isinstance((await overdue(rig, node.probe()))[0], NodeTrouble)
    assert node.state.value == "failed"
    rig.release()
    await node.probe()
    assert node.state.value == "read-write"
    await put(node, 3)
    await all_there(node, 3)
    await rig.end()


@pytest.mark.usefixtures("impatient")
async def test_a_disk_whose_reads_hang_fails_the_node(tmp_path: Path) -> None:
    """F14: a read-hung node stayed "read-write"."""
    rig = await open_rig(tmp_path, 2)
    rig.gate.shut("-read")
    (end,) = await overdue(rig, rig.node.probe())
    assert isinstance(end, NodeTrouble) and rig.node.state is NodeState.FAILED
    rig.release()
    await rig.end()


async def test_an_opening_that_hangs_ends_and_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 14: the server starts without it."""
    rig = await open_rig(tmp_path, 3)
    await rig.node.close()
    monkeypatch.setattr(limits, "NODE_OPEN_TIMEOUT_S", 0.2)
    rig.node = rig.make()
    rig.hang()
    with pytest.raises(NodeTrouble):
        await rig.node.open()
    assert rig.node.state is not NodeState.READ_WRITE
    rig.release()
    monkeypatch.undo()
    await rig.node.open()
    await all_there(rig.node, 3)
    await rig.end()


@pytest.mark.usefixtures("impatient")
async def test_what_was_asked_before_a_hang_may_be_done_behind_it(tmp_path: Path) -> None:
    """The node says so when it is asked, and a tombstone that is there has its mark (law 10)."""
    rig = await open_rig(tmp_path, 1)
    rig.hold()
    (end,) = await overdue(rig, rig.node.delete([key(1)], Mark(epoch=2), 0.0))
    assert isinstance(end, NodeTrouble)
    rig.release()
    again = await _open_patiently(rig)
    (answer,) = await again.has([key(1)])
    assert answer in (Held.LIVE, Held.DEAD)
    if answer is Held.DEAD:
        assert (await again.facts()).mark.epoch == 2
    await rig.end()


async def test_many_writers_share_their_writes_and_each_has_its_own_answer(tmp_path: Path) -> None:
    """Group commit: one that is refused in a batch harms no other."""
    rig = await open_rig(tmp_path)
    node = rig.node
    good = [put(node, number) for number in range(1, 101)]
    bad = node.commit(key(500), [Chunk(1, 0, b"x", 1)], b"{}", 2, None, Origin.DELIVERY)
    outcomes = await asyncio.gather(*good, bad, return_exceptions=True)
    assert isinstance(outcomes[-1], NodeReadOnly)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes[:-1])
    await all_there(node, 100)
    await rig.end()
