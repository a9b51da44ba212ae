"""One sick part stops nobody (law 14): a node that is corrupt, full, hung or unreadable, and a worker with a bug."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from powermail.app.compose import PowerMail
from powermail.base import limits
from powermail.base.disk import SystemDisk
from powermail.cluster.packing import Packer
from powermail.cluster.replicate import Replication
from powermail.keeper.collect import Collector
from powermail.keeper.reconcile import Reconciler
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import Held, StorageNode
from tests.system.conftest import Running
from tests.system.sick import READS, WRITES, Fault, fill_up, frozen, mounted, need_mounts

ANN = "ann@local.example"
ANY = "cluster.policy=random"  # so that a small file system is given mail too
RESERVE = "cluster.reserve_octets=8388608"
EARLY_S = 0.5  # how long these tests let a call to a node last, so that they need not wait for the real limits


@pytest.fixture
async def filled(running: Running) -> tuple[Running, list[bytes]]:
    """Ann with some messages."""
    await running.mailbox(ANN)
    return running, await running.fill(12)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines and rests are short."""
    for name, seconds in {
        "NODE_OPEN_WAIT_S": EARLY_S,
        "NODE_CALL_TIMEOUT_S": EARLY_S,
        "NODE_PROBE_TIMEOUT_S": EARLY_S,
        "NODE_PROBE_INTERVAL_S": 0.1,
        "NODE_READ_TIMEOUT_S": EARLY_S,
        "NODE_CLOSE_WAIT_S": EARLY_S,
        "NODE_SLOW_REMEMBERED_S": EARLY_S,
        "RECONCILE_GRACE_S": 0.0,
        "RECONCILE_INTERVAL_S": 0.1,
        "WORKER_PAUSE_MAX_S": 1.0,
    }.items():
        monkeypatch.setattr(limits, name, seconds)


def state(status: dict[str, Any], node: str) -> str:
    """The word for a node's state."""
    (row,) = [row for row in status["nodes"] if row["id"] == node]
    return str(row["state"])


async def serves_without(running: Running, node: str, sent: list[bytes]) -> list[bytes]:
    """Mail comes in and is read while that node is sick; all that was sent."""
    sent = sent + await running.fill(4, 1000)
    assert sorted(await running.read(ANN)) == sorted(sent)
    for message in (await running.entries())[-4:]:
        known = await running.index.message(message.key)
        assert known is not None and node not in known.nodes
    return sent


async def returns_by_itself(running: Running, node: str, sent: list[bytes]) -> None:
    """The workers alone bring it back: it takes mail, nothing is degraded, everything is read."""
    await running.until(f"node {node} takes mail", lambda status: state(status, node) == "read-write", 40)
    status = await running.until("nothing is degraded", lambda status: not status["degraded"], 40)
    await running.until("it is quick", lambda status: not any(row["slow"] for row in status["nodes"]), 40)
    before = next(row["messages"] for row in status["nodes"] if row["id"] == node)
    sent = sent + await running.fill(12, 2000)
    after = next(row["messages"] for row in (await running.status())["nodes"] if row["id"] == node)
    assert after > before
    assert sorted(await running.read(ANN)) == sorted(sent)


# -- a key index that is corrupt ---------------------------------------------------------------------------------------------


def zero_page(file: Path, page: int) -> None:
    """One page of an SQLite file that nobody has open is zeros now."""
    assert file.stat().st_size >= 4096 * (page + 1)
    with file.open("r+b") as octets:
        octets.seek(4096 * page)
        octets.write(bytes(4096))


@pytest.mark.parametrize("page", [0, 1, 2])
async def test_a_zeroed_page_of_a_derived_key_index_does_not_keep_the_server_from_starting(
    filled: tuple[Running, list[bytes]], page: int
) -> None:
    """It is made again from the log: no copy is lost."""
    running, sent = filled
    await running.stop()
    zero_page(running.data / "nodes" / "a" / "keys.db", page)
    await running.start()
    await returns_by_itself(running, "a", sent)


async def test_a_key_index_that_is_no_database_at_all_is_made_again(filled: tuple[Running, list[bytes]]) -> None:
    running, sent = filled
    await running.stop()
    keys = running.data / "nodes" / "a" / "keys.db"
    keys.unlink()
    keys.mkdir()
    await running.start()
    await returns_by_itself(running, "a", sent)


async def test_a_node_that_comes_back_corrupt_while_the_server_runs_is_opened_again(
    filled: tuple[Running, list[bytes]],
) -> None:
    """Before the laws the health worker died of it, and no node was ever opened again."""
    running, sent = filled
    place, away = running.data / "nodes" / "a", running.data / "away"
    await asyncio.to_thread(place.rename, away)
    await running.until("it is noticed", lambda status: state(status, "a") == "missing")
    for suffix in ("-wal", "-shm"):
        (away / f"keys.db{suffix}").unlink(missing_ok=True)
    zero_page(away / "keys.db", 0)
    await asyncio.to_thread(away.rename, place)
    await returns_by_itself(running, "a", sent)
    for node in "bc":  # and the others too
        await asyncio.to_thread((running.data / "nodes" / node).rename, away)
        await running.until("it is noticed", lambda status, node=node: state(status, node) == "missing")  # type: ignore[misc]
        await asyncio.to_thread(away.rename, running.data / "nodes" / node)
        await running.until("it is back", lambda status, node=node: state(status, node) == "read-write")  # type: ignore[misc]


# -- a disk that is full -----------------------------------------------------------------------------------------------------


@contextmanager
def full_by_injection(running: Running) -> Any:
    fault: list[Fault] = []

    def fill() -> Callable[[], None]:
        fault.append(running.disk.fail(running.data / "nodes" / "a", errno.ENOSPC, WRITES))
        return lambda: running.disk.end(fault[0])

    yield fill


@contextmanager
def full_for_real(running: Running) -> Any:
    need_mounts()
    place = running.data / "nodes" / "a"
    with mounted(place, 24 * limits.MIB):

        def fill() -> Callable[[], None]:
            return fill_up(place).unlink

        yield fill


Full = Callable[[Running], AbstractContextManager[Callable[[], Callable[[], None]]]]


@pytest.mark.parametrize("full", [full_by_injection, full_for_real], ids=["injected", "mounted"])
async def test_a_full_disk_at_the_start_stops_nobody_and_it_returns_when_there_is_room(
    filled: tuple[Running, list[bytes]], full: Full
) -> None:
    """Full from the first moment; where it is injected, not even the record of this opening can be written."""
    running, sent = filled
    await running.stop()
    with full(running) as fill:
        make_room = fill()
        await running.start(ANY, RESERVE)
        status = await running.until("it is noticed", lambda status: state(status, "a") in ("full", "failed"))
        assert status["nodes"][0]["reason"]
        sent = await serves_without(running, "a", sent)
        make_room()
        await returns_by_itself(running, "a", sent)
        await running.stop()  # nothing is open there when it is unmounted
    if full is full_for_real:
        bring_home(running.data / "nodes" / "a")
    running.problems_expected = full is full_for_real  # what was written while it was mounted went with it
    await running.start()


def bring_home(place: Path) -> None:
    """The directory as it was before it was mounted over."""
    place.rmdir()
    place.with_name(f"{place.name}.aside").rename(place)


@pytest.mark.parametrize("full", [full_by_injection, full_for_real], ids=["injected", "mounted"])
async def test_deletions_go_on_while_a_disk_is_full(filled: tuple[Running, list[bytes]], full: Full) -> None:
    """Law 1 on the others; on the full one as soon as there is any room."""
    running, sent = filled
    await running.stop()
    with full(running) as fill:
        await running.start(ANY, RESERVE)
        make_room = fill()
        keys = [entry.key for entry in await running.entries()]
        await running.dele(ANN, *range(1, 7))
        await dead_on(running, ("b", "c"), keys[:6])
        assert sorted(await running.read(ANN)) == sorted(sent[6:])
        make_room()
        await returns_by_itself(running, "a", sent[6:])
        await running.until("nothing is owed", lambda status: not any(row["owed"] for row in status["nodes"]))
        await running.stop()
    if full is full_for_real:
        bring_home(running.data / "nodes" / "a")
    running.problems_expected = full is full_for_real
    await running.start()


async def dead_on(running: Running, nodes: tuple[str, ...], keys: list[bytes], within_s: float = 20.0) -> None:
    """Waits until no copy of these keys is left on these nodes."""
    ends_at = time.monotonic() + within_s
    for name in nodes:
        node = running.powermail.core.cluster.node(name)
        while Held.LIVE in (held := await node.has(keys)):
            assert time.monotonic() < ends_at, f"node {name} still has {held.count(Held.LIVE)}"
            await asyncio.sleep(0.05)


# -- a disk that hangs -------------------------------------------------------------------------------------------------------


async def test_a_directory_that_hangs_at_the_start_stops_nobody_and_it_returns(
    filled: tuple[Running, list[bytes]], hasty: None
) -> None:
    running, sent = filled
    await running.stop()
    fault = running.disk.hang(running.data / "nodes" / "a")
    began = time.monotonic()
    await running.start()
    assert time.monotonic() - began < 10 * EARLY_S
    sent = await serves_without(running, "a", sent)
    status = await running.status()
    assert state(status, "a") != "read-write" and any("node a" in line for line in status["degraded"])
    running.disk.end(fault)
    await returns_by_itself(running, "a", sent)


async def test_the_real_limits_let_a_server_start_in_time_beside_a_hung_directory(
    filled: tuple[Running, list[bytes]],
) -> None:
    running, sent = filled
    await running.stop()
    fault = running.disk.hang(running.data / "nodes" / "a")
    began = time.monotonic()
    await running.start()
    assert time.monotonic() - began < limits.NODE_OPEN_WAIT_S + 5.0
    sent = await serves_without(running, "a", sent)
    began = time.monotonic()
    await running.stop()
    assert time.monotonic() - began < limits.DRAIN_TIMEOUT_S
    running.disk.end(fault)
    await running.start()
    await returns_by_itself(running, "a", sent)


async def unlisted(running: Running, nodes: tuple[str, ...]) -> bytes:
    """A message that is durable on these nodes and that the index was not told of; its octets."""
    account = await running.powermail.core.directory.find(ANN)
    assert account is not None
    core = running.powermail.core
    replication = Replication(running.powermail.world, core.cluster, Packer(True), running.powermail.world.keys.next())
    assert {node.id for node in replication._targets} == set(nodes)
    await replication.write(b"Return-Path: <>\r\nReceived: x\r\nS: unlisted\r\n\r\nbody\r\n")

    def make(octets: int, sha256: str, sizes: list[int]) -> Commit:
        return Commit(octets, sha256, sizes, 1.0, Envelope(), [Target(account=account.id)])

    await replication.commit(make)
    return b"S: unlisted\r\n\r\nbody\r\n"


@pytest.mark.parametrize("calls", [(), WRITES, READS], ids=["all", "writes", "reads"])
async def test_a_disk_that_hangs_holds_up_nothing_on_the_others(
    filled: tuple[Running, list[bytes]], calls: tuple[str, ...], hasty: None
) -> None:
    """Deletions reach the healthy nodes, what only they hold is entered, mail is taken and read; it returns by itself."""
    running, sent = filled
    await running.stop()
    await running.start()  # so that the workers know the short limits
    keys = [entry.key for entry in await running.entries()]
    fault = running.disk.hang(running.data / "nodes" / "a", calls)
    await running.until("it is noticed", lambda status: state(status, "a") == "failed")
    sent.append(await unlisted(running, ("b", "c")))
    await running.dele(ANN, *range(1, 7))
    sent = sent[6:]
    await dead_on(running, ("b", "c"), keys[:6])
    ends_at = time.monotonic() + 20
    while sorted(await running.read(ANN)) != sorted(sent):
        assert time.monotonic() < ends_at, "what only the healthy nodes hold was not entered"
    sent = await serves_without(running, "a", sent)
    status = await running.status()
    assert any("node a" in line for line in status["degraded"])
    assert not any(f" {node}:" in line for node in "bc" for line in status["degraded"])
    running.disk.end(fault)
    await returns_by_itself(running, "a", sent)
    await dead_on(running, ("a",), keys[:6])


async def test_a_frozen_file_system_holds_up_nothing_on_the_others(filled: tuple[Running, list[bytes]], hasty: None) -> None:
    """The same on a real file system that hangs under the log and under the key index, stop included."""
    need_mounts()
    running, sent = filled
    await running.stop()
    place = running.data / "nodes" / "a"
    with ExitStack() as stack:
        stack.enter_context(mounted(place, 64 * limits.MIB))
        await running.start(ANY)
        keys = [entry.key for entry in await running.entries()]
        with frozen(place):
            await running.until("it is noticed", lambda status: state(status, "a") == "failed")
            await running.dele(ANN, *range(1, 7))
            await dead_on(running, ("b", "c"), keys[:6])
            sent = await serves_without(running, "a", sent[6:])
            began = time.monotonic()
            await running.stop()
            assert time.monotonic() - began < limits.DRAIN_TIMEOUT_S
        await running.start(ANY)
        await returns_by_itself(running, "a", sent)
        await dead_on(running, ("a",), keys[:6])
        await running.stop()
    bring_home(place)
    running.problems_expected = True  # what was written while it was mounted went with it
    await running.start()


@pytest.mark.parametrize("calls", [(), READS], ids=["all", "reads"])
async def test_a_stop_ends_in_its_time_with_a_hung_disk(filled: tuple[Running, list[bytes]], calls: tuple[str, ...]) -> None:
    """With the real limits, and nobody has noticed yet that the disk hangs."""
    running, sent = filled
    fault = running.disk.hang(running.data / "nodes" / "a", calls)
    began = time.monotonic()
    await running.stop()
    assert time.monotonic() - began < limits.DRAIN_TIMEOUT_S
    running.disk.end(fault)
    await running.start()
    await returns_by_itself(running, "a", sent)


# -- a disk that cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["nodes/a", "nodes/a/segments", "nodes/a/identity"])
async def test_what_cannot_be_read_at_the_start_stops_nobody_and_is_back_when_it_can(
    filled: tuple[Running, list[bytes]], where: str
) -> None:
    running, sent = filled
    await running.stop()
    fault = running.disk.fail(running.data / where, errno.EIO, (*READS, "read_file"))
    await running.start()
    sent = sent + await running.fill(4, 1000)
    assert sorted(await running.read(ANN)) == sorted(sent)
    assert (await running.status())["degraded"], "the operator is told"
    running.disk.end(fault)
    await returns_by_itself(running, "a", sent)


async def test_one_segment_that_cannot_be_read_costs_nothing_but_itself(filled: tuple[Running, list[bytes]]) -> None:
    """The other copy of each message is read, the rest of that node serves; it counts again when it can be read."""
    running, sent = filled
    (segment,) = (running.data / "nodes" / "a" / "segments").iterdir()
    await running.stop()
    fault = running.disk.fail(segment, errno.EIO, READS)
    await running.start()
    sent = sent + await running.fill(4, 1000)
    assert sorted(await running.read(ANN)) == sorted(sent)
    for _ in range(5):
        await running.each(running.powermail.core.reconciler.step)
    assert sorted(await running.read(ANN)) == sorted(sent)
    running.disk.end(fault)
    await returns_by_itself(running, "a", sent)


async def test_a_record_that_could_not_be_read_once_is_entered_later(filled: tuple[Running, list[bytes]], hasty: None) -> None:
    """Law 6: it gave EIO when reconcile came by; before the laws it was passed over for ever."""
    running, sent = filled
    await running.stop()
    await running.start()
    await running.operation("node_block", node="a", blocked=True)
    faults = [running.disk.fail(running.data / "nodes" / node / "segments", errno.EIO, READS) for node in "bc"]
    late = await unlisted(running, ("b", "c"))
    for _ in range(3):
        await running.each(lambda node: passing(running.powermail.core.reconciler, node))
    for fault in faults:
        running.disk.end(fault)
    await running.operation("node_block", node="a", blocked=False)
    ends_at = time.monotonic() + 20
    while sorted(await running.read(ANN)) != sorted([*sent, late]):
        assert time.monotonic() < ends_at, "it is passed over"
    await running.until("nothing is degraded", lambda status: not status["degraded"])


async def passing(reconciler: Reconciler, node: StorageNode) -> None:
    """A pass that may fail."""
    try:
        await reconciler.step(node)
    except Exception as error:
        assert "Input/output" in str(error) or "damage" in str(error), error


# -- a worker with a bug -----------------------------------------------------------------------------------------------------


async def test_a_worker_that_raised_goes_on_and_status_says_so(
    running: Running, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    """Before the laws it ended for good, and `status` said "idle … healthy"."""
    running.bugs_expected = True
    step, well = Collector.step, asyncio.Event()

    async def broken(collector: Collector, node: StorageNode) -> float:
        if node.id == "a" and not well.is_set():
            raise ZeroDivisionError("planted")
        return await step(collector, node)

    await running.mailbox(ANN)
    sent = await running.fill(12)
    await running.stop()
    monkeypatch.setattr(Collector, "step", broken)
    await running.start()
    status = await running.until("it is said", lambda status: any("collect a" in line for line in status["degraded"]))
    (worker,) = [worker for worker in status["workers"] if worker["name"] == "collect a"]
    assert "broken" in worker["status"] and "ZeroDivisionError" in worker["status"] and worker["errors"] >= 1
    assert [line for line in running.lines("bug") if "planted" in line]
    keys = [entry.key for entry in await running.entries()]
    await running.dele(ANN, *range(1, 13))
    await dead_on(running, ("b", "c"), keys)
    assert Held.LIVE in await running.nodes[0].has(keys), "its own work waits"
    well.set()
    await running.until("nothing is degraded", lambda status: not status["degraded"])
    await dead_on(running, ("a",), keys)
    assert sent and await running.read(ANN) == []


async def test_a_command_on_a_stopped_installation_does_not_wait_for_a_node_that_hangs(running: Running) -> None:
    """It says within five seconds what it has, and of the node that it does not answer."""
    await running.stop()
    fault = running.disk.hang(running.data / "nodes" / "b")
    world = running.powermail.world
    opened = PowerMail(world, running.powermail.settings, str(running.data), running.powermail._broken)
    try:
        began = time.monotonic()
        await opened.start(doors=False, workers=False)
        found = await opened.operations.call("node_list", {})
        assert time.monotonic() - began < 5
        assert isinstance(found, list)
        assert [row["state"] == "read-write" for row in found] == [True, False, True]
    finally:
        fault.over.set()
        await opened.stop(0.5)
        await running.start()


async def test_a_stop_leaves_behind_what_hangs(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of its limits is below what a service manager waits; the next start finds what is to be done."""
    await running.mailbox(ANN)
    await running.fill(1)
    let_go = asyncio.Event()

    async def hang() -> None:
        await let_go.wait()

    for name in ("STOP_REST_S", "STOP_CLOSE_S"):
        monkeypatch.setattr(limits, name, 0.2)
    monkeypatch.setattr(running.powermail.core.marker, "put_all", hang)
    running.powermail._stack.push_async_callback(hang)
    counters = running.powermail.world.counters
    try:
        async with asyncio.timeout(20):
            await running.stop()
    finally:
        let_go.set()
    assert counters.get("process.stops_cut_off") == 2
    assert len([line for line in running.lines("trouble") if "what hangs is left" in line]) == 2
    async with asyncio.timeout(20):  # what was left goes on here, where no process ends
        while _is_locked(running):
            await asyncio.sleep(0.05)
    await running.start()
    assert len(await running.entries()) == 1


def _is_locked(running: Running) -> bool:
    try:
        SystemDisk().lock(f"{running.data}/lock").release()
    except BlockingIOError:
        return True
    return False
