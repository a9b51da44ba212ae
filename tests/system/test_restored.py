"""The index comes from a backup, or from the nodes; disks come back that are not what they were (laws 9 to 13)."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.app.compose import PowerMail
from powermail.base.errors import NodeTrouble, OperatorError
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.keeper import compact
from powermail.storage.contract import Held, NodeState, Origin
from tests.system.conftest import Running
from tests.system.process import Listed, Served, cold_copy, command, hot_copy, lose_index, make, restore

ANN = "ann@local.example"
SMALLEST = "cluster.segment_octets=65536"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A process with ann in it."""
    await asyncio.to_thread(make, tmp_path / "data")
    server = Served(tmp_path / "data")
    await server.start()
    await server.mailbox(ANN)
    yield server
    await server.stop()


def bulky(number: int) -> bytes:
    """A message that fills a good part of a small segment; its body does not compress."""
    chance = random.Random(number)
    lines = [chance.randbytes(36).hex().encode() for _ in range(150)]
    return b"S: %d\r\n\r\n%s" % (number, b"\r\n".join(lines))


async def fill_bulky(running: Running, numbers: range) -> list[bytes]:
    """Sends them to ann; their octets."""
    sent = []
    for number in numbers:
        assert (await running.send([ANN], bulky(number))).startswith("250")
        sent.append(bulky(number) + b"\r\n")
    return sent


async def compact_all(running: Running) -> None:
    """Every node gives back what it can."""
    compactor = running.powermail.keeping.compactor
    for node in running.nodes:
        for _ in range(500):
            if await compactor.step(node) == compact._IDLE_S:
                break
        else:
            raise AssertionError(f"compaction of node {node.id} does not end")


@pytest.mark.parametrize("running", [[SMALLEST]], indirect=True, ids=["small"])
async def test_an_index_restored_from_a_backup_after_compaction_lists_everything(running: Running, tmp_path: Path) -> None:
    """Law 11: records that were moved since are walked too; before the laws 2 of 8 were listed."""
    await running.mailbox(ANN)
    old = await fill_bulky(running, range(8))
    await running.stop()
    cold_copy(running.data, tmp_path / "backup")
    await running.start(SMALLEST)
    await running.powermail._jobs.cancel()  # compaction comes when all is deleted
    new = await fill_bulky(running, range(100, 160))
    await running.dele(ANN, 1, *[number for number in range(9, 69) if number % 10])
    left = old[1:] + new[1::10]
    assert await running.read(ANN) == left
    await running.powermail.core.reconciler.settle()
    await running.heal()
    before = [node.stat().log_octets for node in running.nodes]
    await compact_all(running)
    after = [node.stat().log_octets for node in running.nodes]
    assert all(now < then for now, then in zip(after, before, strict=True)), f"nothing was freed: {before} {after}"
    items = [item for node in running.nodes for item in await node.inventory(b"", 1000) if item.held is Held.LIVE]
    late = {entry.key for entry in (await running.entries())[7:]}
    assert any(item.origin is Origin.MOVED and item.key in late for item in items), "nothing that the backup lacks was moved"
    await running.stop()
    restore(running.data, tmp_path / "backup")
    await running.start(SMALLEST)
    await running.until("it has caught up", lambda status: not status["degraded"])
    assert running.index.epoch == 2
    assert sorted(await running.read(ANN)) == sorted(left)
    await running.heal()


@pytest.mark.parametrize("end", ["stopped", "killed"])
async def test_the_same_backup_restored_twice_gives_no_uid_twice(served: Served, tmp_path: Path, end: str) -> None:
    """Law 11, P10: the second life of the backup takes an epoch of its own, above that of the first."""
    given: dict[tuple[int, int], bytes] = {}

    async def look() -> list[Listed]:
        listed = await served.listed(ANN)
        for message in listed:
            key = given.setdefault((message.uidvalidity, message.uid), message.key)
            assert key == message.key, f"UID {message.uid} named two messages"
        return listed

    sent = await served.fill(2)
    await look()
    await served.stop()
    cold_copy(served.data, tmp_path / "backup")
    for life in range(3):
        await served.start()
        await served.until("it has caught up", lambda status: not status["degraded"])
        assert sorted(await served.read(ANN)) == sorted(sent)
        await look()
        sent += await served.fill(2, 100 * life)
        listed = await look()
        assert [message.uid for message in listed] == sorted({message.uid for message in listed})
        await (served.stop() if end == "stopped" else served.kill())
        restore(served.data, tmp_path / "backup")
    await served.start()
    await served.until("it has caught up", lambda status: not status["degraded"])
    await look()
    assert sorted(await served.read(ANN)) == sorted(sent)


async def test_a_hot_backup_whose_later_mail_was_all_read_and_deleted_is_noticed(served: Served, tmp_path: Path) -> None:
    """Laws 10, 11: no commit record is left that the index does not know, only marks and tombstones."""
    sent = await served.fill(2)
    hot_copy(served.data, tmp_path / "backup")
    await served.fill(3, 10)
    late = (await served.listed(ANN))[2:]
    await served.dele(ANN, 3, 4, 5)
    await served.until("nothing is owed", lambda status: not any(node["owed"] for node in status["nodes"]))
    await served.kill()
    restore(served.data, tmp_path / "backup")
    await served.start()
    status = await served.until("it has caught up", lambda status: not status["degraded"])
    assert status["epoch"] == 2, "nobody noticed"
    assert await served.read(ANN) == sent
    sent += await served.fill(1, 50)
    newest = (await served.listed(ANN))[-1]
    assert newest.uidvalidity != late[-1].uidvalidity or newest.uid > late[-1].uid
    assert await served.read(ANN) == sent


async def test_a_hot_backup_that_left_no_sign_at_all_gives_no_uid_twice(served: Served, tmp_path: Path) -> None:
    """Law 10: killed at once, before any mark or tombstone was written; each mailbox jumps at its first numbering."""
    sent = await served.fill(2)
    hot_copy(served.data, tmp_path / "backup")
    gone = await served.fill(1, 10)
    late = (await served.listed(ANN))[-1]
    await served.kill()
    restore(served.data, tmp_path / "backup")
    await served.start()
    await served.until("it has caught up", lambda status: not status["degraded"])
    sent += gone  # it is mail that the index does not know
    assert await served.read(ANN) == sent
    sent += await served.fill(1, 50)
    for message in (await served.listed(ANN))[2:]:
        assert (message.uidvalidity, message.uid) > (late.uidvalidity, late.uid)
    assert await served.read(ANN) == sent


async def test_a_backup_from_before_all_disks_were_replaced_lists_everything(running: Running, tmp_path: Path) -> None:
    """Laws 10, 11, 12: no disk is left that the index knows, and most of what they hold was written by repair."""
    await running.mailbox(ANN)
    sent = await running.fill(5)
    await running.stop()
    cold_copy(running.data, tmp_path / "backup")
    await running.start()
    sent += await running.fill(5, 100)
    for turn, node in enumerate("abc"):
        await running.stop()
        place = running.data / "nodes" / node
        await asyncio.to_thread(shutil.move, place, tmp_path / f"old-{node}")
        place.mkdir()
        await running.start()
        await running.operation("node_replace", node=node)
        await running.heal()
        sent += await running.fill(1, 200 + turn)
    await running.dele(ANN, 1, 7)
    left = [octets for number, octets in enumerate(sent, 1) if number not in (1, 7)]
    await running.heal()
    before = {node.id: node.incarnation for node in running.nodes}
    await running.stop()
    restore(running.data, tmp_path / "backup")
    await running.start()
    await running.until("it has caught up", lambda status: not status["degraded"])
    assert running.index.epoch == 2
    assert sorted(await running.read(ANN)) == sorted(left)
    await running.heal()
    assert {node.id: node.incarnation for node in running.nodes} == before, "none was taken for an older one"
    assert await running.operation("verify") == {"messages": len(left), "wrong": 0, "problems": []}


async def test_a_backup_from_before_two_disks_were_rolled_back_lists_everything(running: Running, tmp_path: Path) -> None:
    """Law 12: one after the other, each repaired; what lay before their birth marks was compared long ago, and is mail."""
    await running.mailbox(ANN)
    await running.stop()
    cold_copy(running.data, tmp_path / "backup")
    await running.start()
    sent = await running.fill(5)
    await running.heal()
    for turn, node in enumerate("abc"):
        before = running.nodes[turn].incarnation
        await running.stop()
        place, old = running.data / "nodes" / node, tmp_path / f"old-{node}"
        await asyncio.to_thread(shutil.copytree, place, old)
        await running.start()
        sent += await running.fill(6, 100 * (turn + 1))  # two of three nodes take each
        await running.stop()
        await asyncio.to_thread(shutil.rmtree, place)
        await asyncio.to_thread(shutil.move, old, place)
        await running.start()
        await running.heal()
        await running.each(running.powermail.core.admission.step)
        assert running.nodes[turn].incarnation != before, "an older state of this disk is back"
    assert sorted(await running.read(ANN)) == sorted(sent)
    await running.stop()
    restore(running.data, tmp_path / "backup")
    await running.start()
    await running.until("it has caught up", lambda status: not status["degraded"])
    assert sorted(await running.read(ANN)) == sorted(sent)
    await running.heal()
    assert await running.operation("verify") == {"messages": len(sent), "wrong": 0, "problems": []}


# -- disks ---------------------------------------------------------------------------------------------------------------------


async def test_a_disk_of_an_earlier_incarnation_put_back_brings_nothing_back(running: Running) -> None:
    """Laws 9, 12: it was replaced by an empty one since; also when the index that knew it is made anew."""
    await running.mailbox(ANN)
    sent = await running.fill(20)
    place, old = running.data / "nodes" / "a", running.data / "old"
    await running.stop()
    await asyncio.to_thread(shutil.move, place, old)
    place.mkdir()
    await running.start()
    await running.operation("node_replace", node="a")
    await running.heal()
    await running.dele(ANN, *range(1, 11))
    await running.heal()
    await running.stop()
    await asyncio.to_thread(shutil.move, place, running.data / "new")
    await asyncio.to_thread(shutil.move, old, place)
    await running.start()
    for _ in range(3):
        await running.each(running.powermail.core.cluster.watch)
        await running.powermail.core.reconciler.settle()
    assert await running.read(ANN) == sent[10:]
    cluster = running.powermail.core.cluster
    assert [node.id for node in cluster.admitted()] == ["b", "c"]
    assert "never comes back" in cluster.trouble("a")
    status = await running.status()
    assert any("node a" in line for line in status["degraded"]), status["degraded"]
    assert "never comes back" in status["nodes"][0]["reason"]
    sent = sent[10:] + await running.fill(2, 100)
    await running.stop()
    with pytest.raises(OperatorError, match="--without a"):
        await rebuilt(running)
    await asyncio.to_thread(shutil.rmtree, place)
    await asyncio.to_thread(shutil.move, running.data / "new", place)
    await running.start()
    await running.heal()
    assert sorted(await running.read(ANN)) == sorted(sent)


@pytest.mark.parametrize("running", [[SMALLEST]], indirect=True, ids=["small"])
async def test_copies_that_vanished_from_a_disk_are_found_and_made_again(running: Running) -> None:
    """Law 12, P13: a part of the log is gone, while the index believes in what was in it; before the laws nobody looked."""
    await running.mailbox(ANN)
    sent = await fill_bulky(running, range(60))
    await running.stop()
    first, *_ = sorted((running.data / "nodes" / "b" / "segments").glob("*.seg"))
    first.unlink()
    await running.start(SMALLEST)
    assert await running.read(ANN) == sent
    await running.heal()
    result = await running.operation("verify")
    assert isinstance(result, dict) and (result["messages"], result["problems"]) == (60, [])


async def rebuilt(running: Running, *without: str) -> dict[str, object]:
    """A new index in place of the one that is put aside, as the command makes it; what it said. Raises OperatorError."""
    kept = running.data.with_name("index.aside")
    cold_copy(running.data, kept)
    lose_index(running.data)
    powermail = PowerMail(
        system_world(MemoryLog()), load_file(str(running.data / "powermail.toml")), str(running.data), _broken
    )

    async def unseen(done: int, total: int) -> None:
        pass

    try:
        return (await powermail.rebuild(unseen, without))._asdict()
    except OperatorError:
        restore(running.data, kept)
        raise
    finally:
        await powermail.stop(0.1)


def _broken(error: BaseException) -> None:
    raise AssertionError("a storage invariant broke") from error


# -- rebuild -------------------------------------------------------------------------------------------------------------------


def sentence(words: list[str]) -> str:
    """What a command says that refuses."""
    done = command(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("powermail: ")]
    return line


@pytest.mark.parametrize(
    ("call", "name", "when"),
    [("pwrite64", "index.db.building", 1), ("pwrite64", "index.db.building", 30), ("rename", "index.db.building", 1)],
    ids=["begun", "midway", "unnamed"],
)
async def test_a_rebuild_that_was_killed_is_never_served_and_works_the_next_time(
    running: Running, tmp_path: Path, call: str, name: str, when: int
) -> None:
    """Law 13: kill -9 in the first write, in the middle, and at the last moment before it gets its name."""
    await running.mailbox(ANN)
    await running.mailbox("bob@local.example")
    sent = await running.fill(30)
    await running.dele(ANN, 1, 2)
    await running.heal()
    await running.powermail.keeping.checkpoint_all()
    sent = sent[2:] + await running.fill(5, 100)
    before = await running.entries()
    await running.stop()
    lose_index(running.data)
    data = ["--data", str(running.data)]
    trace = tmp_path / "trace"
    await asyncio.to_thread(killed_at, call, running.data / name, when, trace, ["rebuild", *data])
    assert not (running.data / "index.db").exists()
    assert "powermail rebuild" in await asyncio.to_thread(sentence, ["serve", *data])
    lose_index(running.data)  # the operator is told to move away what that left
    done = await asyncio.to_thread(command, "rebuild", *data, "--json")
    assert done.returncode == 0, done.stderr
    assert not [path.name for path in running.data.iterdir() if "building" in path.name]
    await running.start()
    assert await running.read(ANN) == sent
    after = await running.entries()
    assert [(entry.uid, entry.key) for entry in after[:28]] == [(entry.uid, entry.key) for entry in before[:28]]


def killed_at(call: str, path: Path, when: int, trace: Path, words: list[str]) -> None:
    """Runs a command that is killed with -9 at its n-th such call on that file."""
    done = subprocess.run(
        [
            *["strace", "-f", "-qq", "-P", str(path), "-e", f"trace={call}", "-o", str(trace)],
            *["-e", f"inject={call}:error=EIO:signal=KILL:when={when}", sys.executable, "-m", "powermail", *words],
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "killed by SIGKILL" in trace.read_text(), f"the call was never reached: {done.stderr}"
    assert done.returncode in (-9, 137), (done.returncode, done.stderr)


async def test_a_mailbox_without_a_checkpoint_is_rebuilt_under_a_fresh_uidvalidity(running: Running) -> None:
    """Laws 11, 13, P10: nothing is known of its numbers, so none may look as if it named what it named before."""
    await running.mailbox(ANN)
    sent = await running.fill(5)
    await running.dele(ANN, 1)
    await running.heal()
    before, named = await running.inbox(), {entry.uid: entry.key for entry in await running.entries()}
    await running.stop()
    assert (await rebuilt(running))["mailboxes"] == 0, "a checkpoint was written after all"
    await running.start()
    after = await running.inbox()
    assert after.uidvalidity > before.uidvalidity
    assert sorted(await running.read(ANN)) == sorted(sent[1:])
    assert {entry.key for entry in await running.entries()} == set(named.values())


async def test_a_deletion_that_no_node_has_confirmed_is_not_undone_by_a_rebuild(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 13: what ANN deleted is named by her checkpoint until it is forgotten; the tombstones may be long in coming."""

    async def refuse(*_: object) -> None:
        raise NodeTrouble("no tombstones today")

    await running.mailbox(ANN)
    sent = await running.fill(12)
    await running.heal()
    for node in running.powermail.core.cluster.nodes.values():
        monkeypatch.setattr(node, "delete", refuse)
    await running.dele(ANN, 1, 2)
    await running.powermail.keeping.checkpoint_all()
    await running.stop()
    await rebuilt(running)
    await running.start()
    assert await running.read(ANN) == sent[2:]


async def test_a_rebuild_without_a_node_says_what_it_may_cost_and_the_node_may_return(running: Running) -> None:
    """Law 13: `powermail rebuild --without NODE`."""
    await running.mailbox(ANN)
    sent = await running.fill(20)
    await running.dele(ANN, 1, 2, 3)
    sent = sent[3:]
    await running.heal()
    await running.powermail.keeping.checkpoint_all()
    sent += await running.fill(3, 100)
    await running.stop()
    lose_index(running.data)
    place, away = running.data / "nodes" / "c", running.data / "away"
    await asyncio.to_thread(place.rename, away)
    data = ["--data", str(running.data)]
    assert "--without c" in await asyncio.to_thread(sentence, ["rebuild", *data])
    assert "no node 'x'" in await asyncio.to_thread(sentence, ["rebuild", *data, "--without", "x"])
    assert not (running.data / "index.db").exists()
    done = await asyncio.to_thread(command, "rebuild", *data, "--without", "c", "--json")
    assert done.returncode == 1, (done.stdout, done.stderr)  # something may be missing
    (cost,) = json.loads(done.stdout)["left_out"]
    assert "without node c (group rack-c)" in cost and "only it has a copy" in cost
    await running.start()
    assert sorted(await running.read(ANN)) == sorted(sent), "two copies of each, one at least on the others"
    cluster = running.powermail.core.cluster
    assert cluster.node("c").state is NodeState.MISSING
    sent += await running.fill(2, 200)
    await asyncio.to_thread(away.rename, place)
    await running.heal()
    assert sorted(await running.read(ANN)) == sorted(sent)
