"""Data directories that the first release left behind open and go on (P19)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.storage.contract import Held
from tests.fixtures.release_1 import VARIANTS, OldFacts, facts, unpack
from tests.system.conftest import Running, start
from tests.system.process import Served, cold_copy, command, lose_index, restore
from tests.system.sick import SickDisk

SMALLEST = "cluster.segment_octets=65536"  # as it was left
FORWARD = "fred@local.example"


@pytest.fixture(params=VARIANTS)
async def old(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Running, OldFacts]]:
    """One of them, served by this release; checked for consistency at the end."""
    data = unpack(tmp_path, request.param)
    disk = SickDisk()
    running = Running(await start(data, SMALLEST, disk=disk), data, disk)
    yield running, facts(request.param)
    for client in running.clients:
        client.close()
    await running.heal()
    result = await running.operation("verify")
    await running.stop()
    assert isinstance(result, dict) and result["problems"] == []
    assert running.lines("bug") == []


def digests(messages: list[bytes]) -> list[str]:
    """SHA-256 of each."""
    return [hashlib.sha256(octets).hexdigest() for octets in messages]


def shown(was: OldFacts, address: str) -> list[str]:
    """SHA-256 of all that an INBOX must show, in order."""
    listed = [sha256 for _, _, sha256 in was.mailboxes[address].entries]
    assert sorted(listed) == sorted(was.mailboxes[address].sha256)
    return listed + was.adopted.get(address, [])


async def compared(running: Running) -> None:
    """Until every node's copies were compared with the index, and what follows from it was done."""
    for _ in range(20):
        await running.heal()
        rows = await running.index.node_rows()
        if not any(row.owes_compare or not row.boot for row in rows):
            return
    raise AssertionError(f"not compared: {rows}")


async def holds(running: Running, was: OldFacts) -> Held:
    """What the node says of the copy that must not come back."""
    (held,) = await running.powermail.core.cluster.node(was.orphan.node).has([bytes.fromhex(was.orphan.key)])
    return held


async def test_every_message_is_read_and_numbers_go_on(old: tuple[Running, OldFacts]) -> None:
    """The same octets, UIDs and UIDVALIDITY; what is new gets a UID that was never given; so it is after another start."""
    running, was = old
    for address, mailbox in was.mailboxes.items():
        assert digests(await running.retrieve(address)) == shown(was, address)
        facts_now, entries = await running.inbox(address), await running.entries(address)
        assert facts_now.uidvalidity == mailbox.uidvalidity
        before = [(entry.uid, entry.key.hex()) for entry in entries[: len(mailbox.entries)]]
        assert before == [(uid, key) for uid, key, _ in mailbox.entries]
        assert all(entry.uid >= mailbox.uid_next for entry in entries[len(mailbox.entries) :])
        assert (await running.send([address], b"S: new\r\n\r\n" + address.encode())).startswith("250")
        newest = (await running.entries(address))[-1]
        assert newest.uid >= mailbox.uid_next and newest.uid not in {uid for uid, _, _ in mailbox.entries}
    await running.stop()
    await running.start(SMALLEST)
    for address in was.mailboxes:
        found = await running.retrieve(address)
        assert digests(found[:-1]) == shown(was, address)
        assert found[-1].endswith(b"S: new\r\n\r\n" + address.encode() + b"\r\n")


async def test_the_queue_is_as_it_was(old: tuple[Running, OldFacts]) -> None:
    running, was = old
    rows = await running.operation("queue_list", after=0, limit=100)
    assert isinstance(rows, list)
    assert [(row["id"], row["key"], row["to"], row["held"]) for row in rows] == [
        (row.id, row.key, row.destination, row.held) for row in was.queue
    ]
    for row in was.queue:
        octets = b"".join([part async for part in running.powermail.core.opener.read(bytes.fromhex(row.key))])
        assert hashlib.sha256(octets).hexdigest() == row.sha256
    assert (await running.send([FORWARD], b"S: out\r\n\r\nx")).startswith("250")
    assert len(await running.operation("queue_list", after=0, limit=100)) == len(was.queue) + 1  # type: ignore[arg-type]


async def test_orphans_of_repairs_do_not_revive(old: tuple[Running, OldFacts], tmp_path: Path) -> None:
    """Repair copies of that release say no origin: each node is compared with the index once, and then no walk finds any.

    Also not when the index is restored from the copy that was made just behind its migration, or is lost.
    """
    running, was = old
    address = "ann@local.example"
    await compared(running)
    assert await holds(running, was) is not Held.LIVE
    assert digests(await running.retrieve(address)) == shown(was, address)
    await running.powermail.keeping.checkpoint_all()
    await running.stop()
    cold_copy(running.data, tmp_path / "backup")
    await running.start(SMALLEST)
    await running.fill(2)
    late = digests(await running.retrieve(address))
    await running.stop()
    restore(running.data, tmp_path / "backup")
    await running.start(SMALLEST)
    await running.until("it has caught up", lambda status: not status["degraded"])
    assert running.index.epoch > 1, "the walk of all that the nodes hold was made"
    assert sorted(digests(await running.retrieve(address))) == sorted(late)
    await running.powermail.keeping.checkpoint_all()
    await running.stop()
    lose_index(running.data)
    done = await asyncio.to_thread(command, "rebuild", "--data", str(running.data))
    assert done.returncode == 0, (done.stdout, done.stderr)
    await running.start(SMALLEST)
    assert sorted(digests(await running.retrieve(address))) == sorted(late)
    assert await holds(running, was) is not Held.LIVE


async def test_what_was_deleted_stays_deleted(old: tuple[Running, OldFacts]) -> None:
    running, was = old
    await compared(running)
    for node in running.nodes:
        held = await node.has([bytes.fromhex(key) for key in was.deleted])
        assert Held.LIVE not in held, node.id
    listed = {entry.key.hex() for address in was.mailboxes for entry in await running.entries(address)}
    assert listed.isdisjoint(was.deleted)


@pytest.mark.parametrize("variant", VARIANTS)
async def test_an_index_that_was_lost_is_rebuilt_from_its_nodes(variant: str, tmp_path: Path) -> None:
    """Its checkpoints have another form; every message is there, with the UIDs of the checkpoint or fresh ones."""
    data, was = unpack(tmp_path, variant), facts(variant)
    lose_index(data)
    done = await asyncio.to_thread(command, "rebuild", "--data", str(data))
    assert done.returncode == 0, (done.stdout, done.stderr)
    disk = SickDisk()
    running = Running(await start(data, SMALLEST, disk=disk), data, disk)
    try:
        for address in was.mailboxes:
            found = digests(await running.retrieve(address))
            assert len(found) == len(set(found)) and set(shown(was, address)) <= set(found)
            keys = {entry.key.hex() for entry in await running.entries(address)}
            assert keys.isdisjoint(was.deleted), "what has a tombstone on any node stays deleted"
            for client in running.clients:
                client.close()
    finally:
        await running.stop()


@pytest.mark.parametrize("variant", VARIANTS)
async def test_the_program_itself_serves_it(variant: str, tmp_path: Path) -> None:
    """In a process of its own, by the settings that lie there."""
    data, was = unpack(tmp_path, variant), facts(variant)
    server = Served(data)
    await server.start()
    try:
        for address in was.mailboxes:
            assert digests(await server.retrieve(address)) == shown(was, address)
    finally:
        await server.stop()
