"""Nodes that vanish, return old or empty, rot; a front end that dies; and kill -9 of the whole process."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from powermail.app.compose import PowerMail
from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.cluster.packing import Packer
from powermail.cluster.replicate import Replication
from powermail.keeper import checkpoint_form, forget
from powermail.keeper.checkpoint import pages_of
from powermail.keeper.checkpoint_form import Kind, decode_head, decode_tail, decode_whole
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import START, Held, NodeState
from tests.cluster.support import read_whole
from tests.system.conftest import DOORS, Client, Running, start, without_trace
from tests.system.sick import READS, WRITES


async def test_delivered_but_not_indexed_is_entered_once(running: Running) -> None:
    """F42: the front end dies between the receipts and the index commit."""
    await running.mailbox("ann@local.example")
    powermail = running.powermail
    account = await powermail.core.directory.find("ann@local.example")
    assert account is not None
    replication = Replication(powermail.world, powermail.core.cluster, Packer(True), powermail.world.keys.next())
    await replication.write(b"Return-Path: <>\r\nReceived: x\r\nS: x\r\n\r\nbody\r\n")

    def make(octets: int, sha256: str, sizes: list[int]) -> Commit:
        return Commit(octets, sha256, sizes, 1.0, Envelope(), [Target(account=account.id)])

    await replication.commit(make)
    assert await running.read("ann@local.example") == []
    for _ in range(2):
        await powermail.core.reconciler.settle()
    assert await running.read("ann@local.example") == [b"S: x\r\n\r\nbody\r\n"]


async def test_original_defect_2_a_failed_commit_leaves_no_second_copy(running: Running) -> None:
    """One node fails at commit: the next in placement order steps in, and the message is there once."""
    await running.mailbox("ann@local.example")
    node = running.powermail.core.cluster.node("a")
    running.disk.fail(running.data / "nodes" / "a", errno.EIO, WRITES)
    sent = await running.fill(12)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    assert node.state is NodeState.FAILED
    running.problems_expected = True


async def _to_the_end_of_data(running: Running) -> Client:
    client = await running.connect()
    await client.ask("EHLO x")
    await client.ask("MAIL FROM:<a@b.cc>")
    await client.ask("RCPT TO:<ann@local.example>")
    assert (await client.ask("DATA")).startswith("354")
    return client


async def _expect_no_ghost(running: Running) -> None:
    """Nothing of it is seen, after reconcile, after a restart, and behind later mail."""
    await running.powermail.core.reconciler.settle()
    assert await running.read("ann@local.example") == []
    await running.stop()
    await running.start()
    assert await running.read("ann@local.example") == []
    sent = await running.fill(3)
    assert await running.read("ann@local.example") == sent


async def test_what_was_answered_451_is_never_seen(running: Running) -> None:
    """P4, R10, law 5: one node had committed when the others refused; the index decides, then it confirms a tombstone."""
    await running.mailbox("ann@local.example")
    healthy, *others = running.nodes
    ghosts = [await _to_the_end_of_data(running) for _ in range(6)]  # some are placed on the healthy node
    for node in others:
        node.block(True)
    for client in ghosts:
        assert (await client.ask(b"S: ghost\r\n\r\nx\r\n.\r\n")).startswith("451")
    assert healthy.stat().messages == 0
    assert {item.held for item in await healthy.inventory(b"", 100)} == {Held.DEAD}, "it had committed some, and was told"
    for node in others:
        node.block(False)
    await _expect_no_ghost(running)


async def test_what_cannot_be_refused_for_good_gets_no_answer_and_is_never_seen(running: Running) -> None:
    """P4, law 5: a write failed, so it is not known whether those nodes hold it; they cannot confirm a tombstone either.

    Before the laws the sender was told 451 here.
    """
    await running.mailbox("ann@local.example")
    healthy, *others = running.nodes
    client = await _to_the_end_of_data(running)
    for node in others:
        running.disk.fail(running.data / "nodes" / node.id, errno.EIO, WRITES)
    client.send(b"S: ghost\r\n\r\nx\r\n.\r\n")
    assert await client.closed()
    assert healthy.stat().messages == 0
    running.disk.end_all()
    await _expect_no_ghost(running)


async def test_original_defect_7_nothing_vanishes_from_a_listing_and_too_few_groups_refuse(running: Running) -> None:
    """P6 and the original's defect 7: nothing is missing from a listing because nodes are away."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(3)
    for node in ("a", "b"):
        await running.operation("node_block", node=node, blocked=True)
    client = await running.connect()
    await client.ask("EHLO x")
    assert (await client.ask("MAIL FROM:<a@b.c>")).startswith("451")
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    for node in ("a", "b"):
        await running.operation("node_block", node=node, blocked=False)
    await running.fill(1, 10)


async def _forget_all(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds until the index knows of no deletion any more (law 9)."""
    monkeypatch.setattr(forget, "_COMFORT_S", 0.0)
    monkeypatch.setattr(limits, "ROUND_INTERVAL_S", 0.0)
    forgetter = running.powermail.keeping.forgetter
    for _ in range(10):
        await running.each(running.powermail.keeping.collector.step)
        await forgetter.step()
        await running.each(forgetter.scan)
        if not await running.index.dead_total():
            return
    raise AssertionError("not forgotten")


@pytest.mark.parametrize("how", ["remembered", "forgotten", "mass"])
async def test_original_defect_3_deleted_stays_deleted_when_an_old_disk_returns(
    running: Running, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16, P8, law 12: a node's directory of yesterday is put back after mail was deleted and more was received.

    The index still has the deletions, or has forgotten them since; or what it has forgotten is a mass.
    """
    await running.mailbox("ann@local.example")
    old = await running.fill(20)
    node = running.data / "nodes" / "a"
    await running.stop()
    await asyncio.to_thread(shutil.copytree, node, running.data / "yesterday")
    await running.start()
    powermail = running.powermail
    facts, entries = await running.inbox(), await running.entries()
    await running.index.expunge(facts.id, [entry.uid for entry in entries[:10]])
    await running.each(powermail.keeping.collector.step)
    new = await running.fill(5, 100)
    await powermail.core.reconciler.settle()
    if how != "remembered":
        await _forget_all(running, monkeypatch)
    await running.stop()
    await asyncio.to_thread(shutil.rmtree, node)
    os.rename(running.data / "yesterday", node)
    if how == "mass":
        monkeypatch.setattr(limits, "COLLECT_MASS_MAX", 1)
    await running.start()
    if how == "mass":  # P9: nothing is deleted and the node takes no mail until the operator has said so
        assert [one.id for one in running.powermail.core.cluster.admitted()] == ["b", "c"]
        assert await running.index.orders_total("a") == (0, 0)
        await running.operation("node_confirm", node="a")
    await running.heal()
    await running.powermail.core.reconciler.settle()
    assert sorted(await running.read("ann@local.example")) == sorted(old[10:] + new)
    live = [item for item in await running.nodes[0].inventory(b"", 1000) if item.held is Held.LIVE]
    assert {item.key for item in live}.isdisjoint(entry.key for entry in entries[:10]), "and its octets go from that disk"


async def test_an_empty_disk_is_filled_again(running: Running) -> None:
    """F15, P13."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(20)
    shutil.rmtree(running.data / "nodes" / "b")
    await running.each(running.powermail.core.cluster.watch)
    assert running.powermail.core.cluster.node("b").state is NodeState.MISSING
    (running.data / "nodes" / "b").mkdir()
    await running.each(running.powermail.core.cluster.watch)
    assert running.powermail.core.cluster.node("b").state is NodeState.MISSING, "never initialised silently (F12)"
    await running.operation("node_replace", node="b")
    await running.heal()
    assert sorted(await running.read("ann@local.example")) == sorted(sent)


async def test_original_defect_6_rot_is_never_served_and_is_repaired(running: Running) -> None:
    """F7, P3: octets of one node change on the disk; another holder is read."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(10)
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
        await running.powermail.keeping.repairer.step()
    await running.operation("node_block", node="a", blocked=False)
    await running.heal()
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    result = await running.operation("verify")
    assert isinstance(result, dict)
    assert result["problems"] == []


async def test_lost_commits_of_the_index_raise_the_epoch_and_lose_nothing(running: Running) -> None:
    """F28, P10: the index is restored from an older backup."""
    await running.mailbox("ann@local.example")
    await running.fill(3)
    await running.stop()
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    await running.start()
    sent_after = await running.fill(3, 50)
    facts = await running.inbox()
    used = facts.uid_next
    await running.stop()
    restore_index(running.data)
    await running.start()
    assert running.index.epoch == 2
    found = await running.read("ann@local.example")
    assert len(found) == 6
    assert set(sent_after) <= set(found)
    entries = await running.entries()
    assert min(entry.uid for entry in entries[3:]) > used


def restore_index(data: Path) -> None:
    for suffix in ("-wal", "-shm"):
        (data / f"index.db{suffix}").unlink(missing_ok=True)
    os.replace(data / "backup.db", data / "index.db")


async def test_what_was_deleted_after_a_backup_of_the_index_stays_deleted(running: Running) -> None:
    """P8, F28: the nodes' tombstones are the record of it."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(3)
    await running.stop()
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    await running.start()
    client = await running.log_in("ann@local.example")
    assert (await client.ask_pop("DELE 1")).startswith("+OK")
    assert (await client.ask_pop("QUIT")).startswith("+OK")
    await running.each(running.powermail.keeping.collector.step)
    sent += await running.fill(1, 50)
    await running.stop()
    restore_index(running.data)
    await running.start()
    assert await running.read("ann@local.example") == sent[1:]
    assert not running.index.catching_up


async def test_a_message_that_only_the_nodes_know_is_there_at_once_after_a_start(running: Running) -> None:
    """F42: the front end died before the index commit; a number that may have been told is not given again (P10)."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(2)
    await running.stop()
    shutil.copy(running.data / "index.db", running.data / "backup.db")
    await running.start()
    sent += await running.fill(1, 50)
    facts = await running.inbox()
    await running.stop()
    restore_index(running.data)
    await running.start()
    assert await running.read("ann@local.example") == sent
    (entry,) = (await running.entries())[2:]
    assert entry.uid >= facts.uid_next


async def test_copies_are_spread_over_all_nodes(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.fill(40)
    held = [node.stat().messages for node in running.powermail.core.cluster.nodes.values()]
    assert sum(held) == 80
    assert min(held) > 15, held


async def checkpoint_records(running: Running, kind: Kind) -> dict[bytes, list[bytes]]:
    """Records of that kind that nodes hold, those of one name in order, by name."""
    held: dict[bytes, dict[int, bytes]] = {}
    for node in running.nodes:
        async for page in pages_of(node):
            for name, number, octets in page:
                if decode_head(octets).kind is kind:
                    held.setdefault(name, {})[number] = octets
    return {name: [octets for _, octets in sorted(parts.items())] for name, parts in held.items()}


async def test_checkpoints_name_what_a_mailbox_shows(running: Running) -> None:
    await running.mailbox("ann@local.example")
    await running.powermail._jobs.cancel()  # so that the worker does not write it in between
    await running.fill(4)
    keeping, tomorrow = running.powermail.keeping, running.powermail.world.clock.now() + 86_400
    assert await keeping.checkpointer.write_due(tomorrow) == 1
    assert await keeping.checkpointer.write_due(tomorrow) == 0, "all is written"
    (whole,) = (await checkpoint_records(running, Kind.WHOLE)).values()
    assert await checkpoint_records(running, Kind.TAIL) == {}
    assert list(decode_whole(whole).view.uids) == [1, 2, 3, 4]
    assert (await running.nodes[0].scan(START, 1, 1e9)).items == []


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
    words += ["--set", f"cluster.segment_octets={limits.MIB}"]
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
        await powermail.core.reconciler.settle()
        running = Running(powermail, data)
        result = await running.operation("verify")
        found = []
        for entry in await running.entries("postmaster@localhost"):
            known = await powermail.core.index.message(entry.key)
            assert known is not None
            found.append(without_trace(await read_whole(powermail.core.fetcher, entry.key, known.nodes)))
    finally:
        await powermail.stop(0.5)
    assert isinstance(result, dict)
    assert len(acknowledged) > 20
    assert len(found) == len(set(found))
    assert acknowledged <= set(found) <= attempted
    single = [problem for problem in result["problems"] if "good copies" not in problem]
    assert single == []


async def quiet(done: int, total: int) -> None:
    """A meter that nobody sees."""


def lose_index(data: Path) -> None:
    """The index is gone."""
    for suffix in ("", "-wal", "-shm"):
        (data / f"index.db{suffix}").unlink(missing_ok=True)


@pytest.mark.parametrize("page", [1, 2, 2000])
async def test_the_index_is_rebuilt_from_the_nodes_alone(running: Running, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P15, P8, P16: every acknowledged message, UIDs as of the checkpoint, however many records that takes."""
    monkeypatch.setattr(limits, "VIEW_PART_ROWS", page)
    monkeypatch.setattr(checkpoint_form, "_PART_ROWS", page)
    await running.mailbox("ann@local.example")
    await running.mailbox("bob@local.example")
    await running.mailbox("fwd@local.example", password="", forward=["away@elsewhere.example"])
    powermail = running.powermail
    await powermail._jobs.cancel()  # deletions are known from checkpoints alone
    sent = await running.fill(6)
    assert (await running.send(["ann@local.example", "bob@local.example"], b"S: both\r\n\r\nx")).startswith("250")
    assert (await running.send(["fwd@local.example"], b"S: out\r\n\r\nx")).startswith("250")
    facts = await running.inbox()
    tomorrow = powermail.world.clock.now() + 86_400
    assert await powermail.keeping.checkpointer.write_due(tomorrow) == 2
    await running.index.expunge(facts.id, [2, 3])
    plan = await running.index.checkpoint_plan(facts.id)
    assert plan is not None and not plan.whole
    assert await powermail.keeping.checkpointer.write(plan)
    (tail,) = (await checkpoint_records(running, Kind.TAIL)).values()
    assert [uid for change in decode_tail(tail).changes for uid in change.uids] == [2, 3]
    before = await running.entries()
    await running.stop()
    lose_index(running.data)
    settings = load_file(str(running.data / "powermail.toml"))

    def broken(error: BaseException) -> None:
        raise AssertionError from error

    fresh = PowerMail(system_world(MemoryLog()), settings, str(running.data), broken)
    done = await fresh.rebuild(quiet)
    await fresh.stop(0.5)
    assert (done.mailboxes, done.entries_lost, done.held_rows, done.unreadable) == (2, 0, 1, 0)
    await running.start()
    after = await running.entries()
    assert [(entry.uid, entry.key) for entry in after] == [(entry.uid, entry.key) for entry in before]
    assert sorted(await running.read("ann@local.example")) == sorted([sent[0], *sent[3:], b"S: both\r\n\r\nx\r\n"])
    assert len(await running.read("bob@local.example")) == 1
    await running.fill(1, 90)
    newest = (await running.entries())[-1]
    assert newest.uid > 1_000_000, "numbers jump after a rebuild (P10)"


async def test_a_node_that_cannot_be_read_at_the_start_holds_nobody_up(running: Running) -> None:
    """F11, law 14: its log cannot be walked; the others serve, and it is looked at again later."""
    await running.mailbox("ann@local.example")
    sent = await running.fill(4)
    await running.stop()
    fault = running.disk.fail(running.data / "nodes" / "a" / "segments", errno.EIO, READS)
    await running.start()
    sent += await running.fill(2, 50)
    assert sorted(await running.read("ann@local.example")) == sorted(sent)
    await running.each(running.powermail.core.cluster.watch)
    await running.powermail.core.reconciler.settle()
    running.disk.end(fault)
    await running.each(running.powermail.core.cluster.watch)
    assert [node.id for node in running.powermail.core.cluster.admitted()] == ["a", "b", "c"]
    await running.heal()
