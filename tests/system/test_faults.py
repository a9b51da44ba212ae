"""Nodes that vanish, return old or empty, rot; a front end that dies; and kill -9 of the whole process."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.app.compose import PowerMail
from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.cluster.replicate import Packer, Replication
from powermail.keeper.checkpoint import CheckpointBody, decode
from powermail.keeper.rebuild import merge
from powermail.keeper.reconcile import MARK_NAME
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import START, NodeState
from powermail.storage.store import SegmentStore
from tests.system.conftest import DOORS, Running, start, without_trace


async def fill(running: Running, count: int, start_at: int = 0) -> list[bytes]:
    """Sends numbered messages to ann; their octets."""
    sent = []
    for number in range(start_at, start_at + count):
        octets = b"S: %d\r\n\r\n%s" % (number, hashlib.sha256(b"%d" % number).hexdigest().encode() * 20)
        assert (await running.send(["ann@local.example"], octets)).startswith("250")
        sent.append(octets + b"\r\n")
    return sent


async def heal(running: Running) -> None:
    """Lets keeper work until every message has its copies."""
    powermail = running.powermail
    status: object = None
    for _ in range(100):
        await powermail.cluster.check_health()
        await powermail.collector.step()
        await powermail.repairer.step()
        status = await running.operation("status")
        assert isinstance(status, dict)
        if not status["degraded"] and not status["totals"]["deletions"]:
            return
    raise AssertionError(f"not healed: {status}")


async def test_delivered_but_not_indexed_is_entered_once(running: Running) -> None:
    """F42: the front end dies between the receipts and the index commit."""
    await running.mailbox("ann@local.example")
    powermail = running.powermail
    account = await powermail.directory.find("ann@local.example")
    assert account is not None
    replication = Replication(powermail.world, powermail.cluster, Packer(True), powermail.world.keys.next())
    await replication.write(b"Return-Path: <>\r\nReceived: x\r\nS: x\r\n\r\nbody\r\n")

    def make(octets: int, sha256: str, sizes: list[int]) -> Commit:
        return Commit(octets, sha256, sizes, 1.0, "", [Target(account=account.id)])

    await replication.commit(make)
    assert await running.read("ann@local.example") == []
    powermail.index.catching_up = True  # no grace: as after an epoch rise
    for _ in range(2):
        await powermail.reconciler.step()
    assert await running.read("ann@local.example") == [b"S: x\r\n\r\nbody\r\n"]


async def test_original_defect_2_a_failed_commit_leaves_no_second_copy(running: Running) -> None:
    """One node fails at commit: the next in placement order steps in, and the message is there once."""
    await running.mailbox("ann@local.example")
    nodes = list(running.powermail.cluster.nodes.values())
    store = nodes[0]._store  # type: ignore[attr-defined]
    store.failed = "failed: planted"
    sent = await fill(running, 12)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    assert nodes[0].state is NodeState.FAILED
    running.problems_expected = True


async def test_what_was_answered_451_is_never_seen(running: Running) -> None:
    """P4, R10: one node had committed when the others failed; it is told to abort, and reconcile finds no mail there."""
    await running.mailbox("ann@local.example")
    healthy, *others = running.powermail.cluster.nodes.values()
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.cc>")
    await client.ask("RCPT TO:<ann@local.example>")
    assert (await client.ask("DATA")).startswith("354")
    for node in others:
        node._store._flush = _broken_disk  # type: ignore[attr-defined]
    assert (await client.ask(b"S: ghost\r\n\r\nx\r\n.\r\n")).startswith("451")
    assert healthy.stat().messages == 0
    await running.powermail.reconciler.settle()
    assert await running.read("ann@local.example") == []
    await running.powermail.stop(0.5)
    running.powermail = await start(running.data)
    assert await running.read("ann@local.example") == []
    sent = await fill(running, 3)
    assert await running.read("ann@local.example") == sent


def _broken_disk(*arguments: object, **more: object) -> None:
    raise OSError(errno.EIO, "injected")


async def test_original_defect_7_nothing_vanishes_from_a_listing_and_too_few_groups_refuse(running: Running) -> None:
    """P6 and the original's defect 7: nothing is missing from a listing because nodes are away."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 3)
    for node in ("a", "b"):
        await running.operation("node_block", node=node, blocked=True)
    client = await running.connect()
    await client.ask("EHLO x")
    assert (await client.ask("MAIL FROM:<a@b.c>")).startswith("451")
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    for node in ("a", "b"):
        await running.operation("node_block", node=node, blocked=False)
    await fill(running, 1, 10)


@pytest.mark.parametrize("mass", [False, True])
async def test_original_defect_3_deleted_stays_deleted_when_an_old_disk_returns(
    running: Running, mass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16, P8: a node's directory of yesterday is put back after mail was deleted and more was received."""
    await running.mailbox("ann@local.example")
    old = await fill(running, 20)
    node = running.data / "nodes" / "a"
    await running.powermail.stop(0.5)
    await asyncio.to_thread(shutil.copytree, node, running.data / "yesterday")
    running.powermail = await start(running.data)
    powermail = running.powermail
    while (await powermail.reconciler.step()) and (await powermail.index.node_rows())[0].segment == 0:
        powermail.index.catching_up = True  # no grace
    account = await powermail.directory.find("ann@local.example")
    assert account is not None
    facts = await powermail.index.find_mailbox(account.id, "INBOX")
    assert facts is not None
    entries = await powermail.index.entries(facts.id, 0, 1 << 32, 1000)
    await powermail.index.expunge(facts.id, [entry.uid for entry in entries[:10]])
    await powermail.collector.step()
    new = await fill(running, 5, 100)
    powermail.index.catching_up = True
    await powermail.reconciler.step()
    await powermail.stop(0.5)
    await asyncio.to_thread(shutil.rmtree, node)
    os.rename(running.data / "yesterday", node)
    if mass:
        monkeypatch.setattr(limits, "COLLECT_MASS_MAX", 1)
    running.powermail = await start(running.data)
    if mass:  # P9: nothing is deleted and the node takes no mail until the operator has said so
        assert [one.id for one in running.powermail.cluster.admitted()] == ["b", "c"]
        assert await running.powermail.index.deletions_total("a") == 0
        await running.operation("node_confirm", node="a")
    await heal(running)
    running.powermail.index.catching_up = True
    await running.powermail.reconciler.step()
    assert sorted(await running.read("ann@local.example")) == sorted(old[10:] + new)


async def test_an_empty_disk_is_filled_again(running: Running) -> None:
    """F15, P13."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 20)
    shutil.rmtree(running.data / "nodes" / "b")
    await running.powermail.cluster.check_health()
    assert running.powermail.cluster.node("b").state is NodeState.MISSING
    (running.data / "nodes" / "b").mkdir()
    await running.powermail.cluster.check_health()
    assert running.powermail.cluster.node("b").state is NodeState.MISSING, "never initialised silently (F12)"
    await running.operation("node_replace", node="b")
    await heal(running)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)


async def test_original_defect_6_rot_is_never_served_and_is_repaired(running: Running) -> None:
    """F7, P3: octets of one node change on the disk; another holder is read."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 10)
    (segment,) = (running.data / "nodes" / "c" / "segments").glob("*.seg")
    with segment.open("r+b") as file:
        octets = bytearray(file.read(20_000))
        for place in range(300, 20_000, 97):
            octets[place] ^= 0xFF
        file.seek(0)
        file.write(octets)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    await running.operation("node_block", node="a", blocked=True)  # so that only the rotten node can take the copies
    scrubbed = await running.operation("node_scrub", node="c")
    assert isinstance(scrubbed, dict)
    for _ in range(20):
        await running.powermail.repairer.step()
    await running.operation("node_block", node="a", blocked=False)
    await heal(running)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    result = await running.operation("verify")
    assert isinstance(result, dict)
    assert result["problems"] == []


async def test_lost_commits_of_the_index_raise_the_epoch_and_lose_nothing(running: Running) -> None:
    """F28, P10: the index is restored from an older backup."""
    await running.mailbox("ann@local.example")
    await fill(running, 3)
    await running.powermail.stop(0.5)
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    running.powermail = await start(running.data)
    sent_after = await fill(running, 3, 50)
    account = await running.powermail.directory.find("ann@local.example")
    assert account is not None
    facts = await running.powermail.index.find_mailbox(account.id, "INBOX")
    assert facts is not None
    used = facts.uid_next
    await running.powermail.stop(0.5)
    restore_index(running.data)
    running.powermail = await start(running.data)
    assert running.powermail.index.epoch == 2
    found = await running.read("ann@local.example")
    assert len(found) == 6
    assert set(sent_after) <= set(found)
    entries = await running.powermail.index.entries(facts.id, 0, 1 << 32, 100)
    assert min(entry.uid for entry in entries[3:]) > used


def restore_index(data: Path) -> None:
    for suffix in ("-wal", "-shm"):
        (data / f"index.db{suffix}").unlink(missing_ok=True)
    os.replace(data / "backup.db", data / "index.db")


async def test_what_was_deleted_after_a_backup_of_the_index_stays_deleted(running: Running) -> None:
    """P8, F28: the nodes' tombstones are the record of it."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 3)
    await running.powermail.stop(0.5)
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    running.powermail = await start(running.data)
    client = await running.log_in("ann@local.example")
    assert (await client.ask_pop("DELE 1")).startswith("+OK")
    assert (await client.ask_pop("QUIT")).startswith("+OK")
    await running.powermail.collector.step()
    sent += await fill(running, 1, 50)
    await running.powermail.stop(0.5)
    restore_index(running.data)
    running.powermail = await start(running.data)
    assert await running.read("ann@local.example") == sent[1:]
    assert not running.powermail.index.catching_up


async def test_a_message_that_only_the_nodes_know_is_there_at_once_after_a_start(running: Running) -> None:
    """F42: the front end died before the index commit; a number that may have been told is not given again (P10)."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 2)
    await running.powermail.stop(0.5)
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    running.powermail = await start(running.data)
    sent += await fill(running, 1, 50)
    account = await running.powermail.directory.find("ann@local.example")
    assert account is not None
    facts = await running.powermail.index.find_mailbox(account.id, "INBOX")
    assert facts is not None
    await running.powermail.stop(0.5)
    restore_index(running.data)
    running.powermail = await start(running.data)
    assert await running.read("ann@local.example") == sent
    (entry,) = (await running.powermail.index.entries(facts.id, 0, 1 << 32, 100))[2:]
    assert entry.uid >= facts.uid_next


async def test_copies_are_spread_over_all_nodes(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await fill(running, 40)
    held = [node.stat().messages for node in running.powermail.cluster.nodes.values()]
    assert sum(held) == 80
    assert min(held) > 15, held


async def test_checkpoints_name_what_a_mailbox_shows(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await fill(running, 4)
    # The worker may have written the mailbox while it was being filled: then this adds what came later.
    await running.powermail._worker_tasks.cancel()
    await running.powermail.checkpointer.write_due(running.powermail.world.clock.now())
    assert await running.powermail.checkpointer.write_due(running.powermail.world.clock.now()) == 0, "all is written"
    held: dict[tuple[bytes, int], CheckpointBody] = {}
    for node in running.powermail.cluster.nodes.values():
        for name, number, octets in await node.checkpoints(b"", 100):
            if name != MARK_NAME:
                held[name, number] = decode(octets)
    assert len({name for name, _ in held}) == 1
    state = merge(list(held.values()))
    assert state is not None
    assert [entry[0] for entry in state.entries] == [1, 2, 3, 4]
    assert (await running.powermail.cluster.node("a").scan(START, 1, 1e9, False))[0] == []


@pytest.mark.timeout(180)
async def test_kill_9_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """F1, F42: the whole process dies again and again under load; every acknowledged message is there, once."""
    data = tmp_path / "data"
    await initialise(system_world(MemoryLog()), str(data), "localhost")
    chance = random.Random(7)
    acknowledged: set[bytes] = set()
    attempted: set[bytes] = set()
    counter = 0

    async def client(port: int) -> None:
        nonlocal counter
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.readline()
            writer.write(b"HELO x\r\n")
            await reader.readline()
            while True:
                counter += 1
                mine = b"S: %d\r\n\r\nbody %d\r\n" % (counter, counter)
                attempted.add(mine)
                writer.write(b"MAIL FROM:<a@b.c>\r\nRCPT TO:<postmaster>\r\nDATA\r\n" + mine + b".\r\n")
                replies = [await reader.readline() for _ in range(4)]
                if replies[-1].startswith(b"250"):
                    acknowledged.add(mine)
                if not replies[-1]:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    words = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')]
    for _ in range(8):
        log = tmp_path / "log"
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "powermail", "serve", "--data", str(data), "--set", "log.json=true", *words,
                stdout=out, stderr=out,
            )  # fmt: skip
            port = 0
            for _ in range(300):
                await asyncio.sleep(0.05)
                lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines() if b'"smtp"' in line]
                if lines and (data / "control.sock").exists():
                    port = int(lines[0]["address"].rpartition(":")[2])
                    break
            assert port, log.read_text()
            clients = [asyncio.create_task(client(port)) for _ in range(4)]
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
            await process.wait()
            (data / "control.sock").unlink()
            await asyncio.gather(*clients)
    powermail = await start(data)
    try:
        powermail.index.catching_up = True  # no grace
        await powermail.reconciler.step()
        running = Running(powermail, data)
        result = await running.operation("verify")
        facts = await powermail.index.find_mailbox("1", "INBOX")
        assert facts is not None
        entries = await powermail.index.entries(facts.id, 0, 1 << 32, 1 << 20)
        found = []
        for entry in entries:
            known = await powermail.index.message(entry.key)
            assert known is not None
            found.append(without_trace((await powermail.fetcher.read_all(entry.key, known.nodes))[1]))
    finally:
        await powermail.stop(0.5)
    assert isinstance(result, dict)
    assert len(acknowledged) > 20
    assert len(found) == len(set(found))
    assert acknowledged <= set(found) <= attempted
    single = [problem for problem in result["problems"] if "good copies" not in problem]
    assert single == []


@pytest.mark.parametrize("page", [1, 2, 2000])
async def test_the_index_is_rebuilt_from_the_nodes_alone(running: Running, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P15, P8, P16: every acknowledged message, UIDs as of the checkpoint, however many records that takes."""
    monkeypatch.setattr(limits, "CHECKPOINT_PAGE_ROWS", page)
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    await running.mailbox("fwd@local.example", password="", forward=["away@elsewhere.example"])
    powermail = running.powermail
    sent = await fill(running, 6)
    assert (await running.send(["ann@local.example", "bob@local.example"], b"S: both\r\n\r\nx")).startswith("250")
    assert (await running.send(["fwd@local.example"], b"S: out\r\n\r\nx")).startswith("250")
    account = await powermail.directory.find("ann@local.example")
    assert account is not None
    facts = await powermail.index.find_mailbox(account.id, "INBOX")
    assert facts is not None
    now = powermail.world.clock.now()
    assert await powermail.checkpointer.write_due(now) == 2
    await powermail.index.expunge(facts.id, [2, 3])
    # The delta is written long after the deliveries, so what it does not show was deleted.
    plan = await powermail.index.checkpoint_plan(facts.id)
    assert plan is not None
    assert await powermail.index.checkpoint_expunged(plan, 0, 10) == [2, 3]
    assert await powermail.checkpointer.write(plan, now + 3600)
    before = await powermail.index.entries(facts.id, 0, 1 << 32, 100)
    await powermail.stop(0.5)
    for suffix in ("", "-wal", "-shm"):
        (running.data / f"index.db{suffix}").unlink(missing_ok=True)
    settings = load_file(str(running.data / "powermail.toml"))

    async def quiet(done: int, total: int) -> None:
        pass

    def broken(error: BaseException) -> None:
        raise AssertionError from error

    fresh = PowerMail(system_world(MemoryLog()), settings, str(running.data), broken)
    done = await fresh.rebuild(quiet)
    await fresh.stop(0.5)
    assert (done.mailboxes, done.entries_lost, done.held_rows, done.unreadable) == (2, 0, 1, 0)
    running.powermail = await start(running.data)
    facts = await running.powermail.index.find_mailbox(account.id, "INBOX")
    assert facts is not None
    after = await running.powermail.index.entries(facts.id, 0, 1 << 32, 100)
    assert [(entry.uid, entry.key) for entry in after] == [(entry.uid, entry.key) for entry in before]
    assert sorted(await running.read("ann@local.example")) == sorted([sent[0], *sent[3:], b"S: both\r\n\r\nx\r\n"])
    assert len(await running.read("bob@local.example")) == 1
    await fill(running, 1, 90)
    newest = (await running.powermail.index.entries(facts.id, 0, 1 << 32, 100))[-1]
    assert newest.uid > 1_000_000, "numbers jump after a rebuild (P10)"


async def test_a_node_that_cannot_be_read_at_the_start_holds_nobody_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: its log cannot be walked; the others serve, and it is looked at again later."""
    await running.mailbox("ann@local.example")
    sent = await fill(running, 4)
    await running.powermail.stop(0.5)
    scan = SegmentStore.scan

    def broken(store: SegmentStore, *arguments: Any) -> Any:
        if store.identity.node == "a":
            raise OSError(errno.EIO, "injected")
        return scan(store, *arguments)

    monkeypatch.setattr(SegmentStore, "scan", broken)
    running.powermail = await start(running.data)
    sent += await fill(running, 2, 50)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    await running.powermail.cluster.check_health()
    await running.powermail.reconciler.step()
    monkeypatch.setattr(SegmentStore, "scan", scan)
    await running.powermail.cluster.check_health()
    assert [node.id for node in running.powermail.cluster.admitted()] == ["a", "b", "c"]
