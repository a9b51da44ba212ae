"""The central database away: the directory gone, the index locked by somebody else, a storage node slow."""

from __future__ import annotations

import asyncio
import base64
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.directory.sqlite import SqliteDirectory
from tests.system.conftest import PopClient, Running, start
from tests.system.sick import WRITES


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Running]:
    """A PowerMail that waits half a second for its index and does not believe the directory's answers for long."""
    data = tmp_path / "data"
    await initialise(system_world(MemoryLog()), str(data), "localhost")
    powermail = await start(data, "index.wait_s=0.5", "directory.cache_ttl_s=0.05")
    made = Running(powermail, data)
    yield made
    for client in made.clients:
        client.close()
    await made.powermail.stop(0.5)


async def test_directory_away_known_recipients_are_accepted_and_nobody_is_called_unknown(impatient: Running) -> None:
    """P12, P14, U19, F27."""
    await impatient.mailbox("ann@local.example")
    assert (await impatient.send(["ann@local.example"], b"S: 1\r\n\r\n1")).startswith("250")
    directory = impatient.powermail.core.directory
    assert isinstance(directory, SqliteDirectory) and directory._db is not None
    directory._db.close()
    await asyncio.sleep(0.1)
    assert (await impatient.send(["ann@local.example"], b"S: 2\r\n\r\n2")).startswith("250"), "known within the bound"
    assert (await impatient.send(["unknown@local.example"], b"x")).startswith("451 4.3.0"), "never a wrong 5xx"
    assert (await impatient.send(["x@elsewhere.example"], b"x")).startswith("451 4.3.0")
    client = await impatient.connect("submission")
    await client.ask("EHLO x")
    await client.ask("STARTTLS")
    await client.start_tls()
    await client.ask("EHLO x")
    nobody = base64.b64encode(b"\0nobody@local.example\0secret").decode()
    assert (await client.ask(f"AUTH PLAIN {nobody}")).startswith("454 4.7.0"), "never 535"
    reader = await impatient.connect("pop3")
    assert isinstance(reader, PopClient)
    await reader.start_tls_pop()
    await reader.ask_pop("USER nobody@local.example")
    assert (await reader.ask_pop("PASS secret")).startswith("-ERR [SYS/TEMP]")
    assert impatient.powermail.world.counters.get("directory.stale") >= 1


async def test_stale_answers_have_a_bound(impatient: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await impatient.mailbox("ann@local.example")
    await impatient.send(["ann@local.example"], b"x")
    cache = impatient.powermail.front.resolver.directory
    monkeypatch.setattr(cache, "_stale_s", 0.2)
    directory = impatient.powermail.core.directory
    assert isinstance(directory, SqliteDirectory) and directory._db is not None
    directory._db.close()
    await asyncio.sleep(0.3)
    assert (await impatient.send(["ann@local.example"], b"x")).startswith("451 4.3.0")


async def test_index_locked_mail_is_accepted_and_appears_when_it_is_free(impatient: Running) -> None:
    """P14, F27: the nodes are enough for the 250; reconcile enters it. Whatever was listed stays listed (P7)."""
    await impatient.mailbox("ann@local.example")
    first = [b"S: %d\r\n\r\n%d\r\n" % (n, n) for n in range(3)]
    for octets in first:
        assert (await impatient.send(["ann@local.example"], octets[:-2])).startswith("250")
    other = sqlite3.connect(impatient.data / "index.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    late = b"S: late\r\n\r\nlate\r\n"
    assert (await impatient.send(["ann@local.example"], late[:-2])).startswith("250")
    assert time.monotonic() - began < 2.0
    assert await impatient.read("ann@local.example") == first
    await asyncio.sleep(limits.INDEX_BUSY_TIMEOUT_S + 0.5)  # its transaction gives up meanwhile
    other.execute("ROLLBACK")
    other.close()
    await impatient.powermail.core.reconciler.settle()
    assert await impatient.read("ann@local.example") == [*first, late]
    await impatient.powermail.core.reconciler.settle()
    assert await impatient.read("ann@local.example") == [*first, late], "once (P5)"


async def test_a_bad_copy_that_cannot_be_noted_hides_no_good_one(impatient: Running) -> None:
    """P3: one copy rots while the index is locked by somebody else; the other is read all the same."""
    await impatient.mailbox("ann@local.example")
    await impatient.operation("node_block", node="a", blocked=True)  # so that the copies lie on the others
    sent = [b"S: %d\r\n\r\n%s\r\n" % (n, b"x" * 200) for n in range(2)]
    for octets in sent:
        assert (await impatient.send(["ann@local.example"], octets[:-2])).startswith("250")
    (segment,) = (impatient.data / "nodes" / "b" / "segments").glob("*.seg")
    with segment.open("r+b") as file:
        rotten = bytearray(file.read())
        for place in range(300, len(rotten), 61):
            rotten[place] ^= 0xFF
        file.seek(0)
        file.write(rotten)
    impatient.powermail.core.cluster.note_slow("c")  # so that the bad ones are tried first
    other = sqlite3.connect(impatient.data / "index.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        assert await impatient.read("ann@local.example") == sent
        assert impatient.powermail.world.counters.get("cluster.bad_copies") >= 1
        assert [line for line in impatient.lines("trouble") if "was not noted" in line]
    finally:
        other.execute("ROLLBACK")
        other.close()


async def test_a_slow_node_is_given_nothing_while_others_are_quick(running: Running) -> None:
    """P20, F13: one slow group costs its first message, not every one."""
    await running.mailbox("ann@local.example")
    node = running.powermail.core.cluster.node("a")
    slow = running.disk.slow(running.data / "nodes" / "a", 1.0, WRITES)
    took = []
    for number in range(30):
        began = time.monotonic()
        assert (await running.send(["ann@local.example"], b"S: %d\r\n\r\n" % number)).startswith("250")
        took.append(time.monotonic() - began)
    assert sum(one > 0.5 for one in took) <= 2, took
    status = await running.operation("status")
    assert isinstance(status, dict) and [row["id"] for row in status["nodes"] if row["slow"]] == ["a"]
    running.disk.end(slow)
    await asyncio.sleep(limits.NODE_SLOW_REMEMBERED_S + 2.0)
    before = node.stat().messages
    for number in range(12):
        await running.send(["ann@local.example"], b"S: again %d\r\n\r\n" % number)
    assert node.stat().messages > before, "it is used again when it is quick again"
