"""A PowerMail whose directory is in a database server that hangs, is gone, and comes back (P12, P14)."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.world import World, system_world
from powermail.directory.accounts import SqlDirectory
from powermail.directory.database import parse
from tests.servers import Database
from tests.system.conftest import PopClient, Running, start

_SLACK_S = 2.0


@pytest.fixture(params=["postgresql", "mysql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh database of each server."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def served(tmp_path: Path, database: Database) -> AsyncIterator[Running]:
    """A PowerMail with its directory there; answers are not believed for long."""
    world: World = system_world(MemoryLog())
    data = tmp_path / "data"
    await initialise(world, str(data), "localhost")
    kind = database.server.kind
    directory = SqlDirectory(world, kind, parse(kind, database.url), 1)
    await directory.initialise()
    await directory.close()
    chosen = (f"directory.backend={kind}", f"directory.database={database.url}", "directory.cache_ttl_s=0.05")
    made = Running(await start(data, *chosen), data)
    yield made
    for client in made.clients:
        client.close()
    await made.powermail.stop(0.5)


async def log_in(running: Running, name: str, password: str) -> str:
    """What POP3 says to it."""
    reader = await running.connect("pop3")
    assert isinstance(reader, PopClient)
    await reader.start_tls_pop()
    await reader.ask_pop(f"USER {name}")
    said = await reader.ask_pop(f"PASS {password}")
    await reader.ask_pop("QUIT")
    return said


async def auth(running: Running, name: str, password: str) -> str:
    """What submission says to it."""
    client = await running.connect("submission")
    await client.ask("EHLO x")
    await client.ask("STARTTLS")
    await client.start_tls()
    await client.ask("EHLO x")
    return await client.ask("AUTH PLAIN " + base64.b64encode(f"\0{name}\0{password}".encode()).decode())


async def test_directory_hangs_is_gone_and_comes_back(served: Running, database: Database) -> None:
    await served.mailbox("ann@local.example")
    await served.mailbox("list@local.example", forward=["ann@local.example"])
    for recipient in ("ann@local.example", "list@local.example"):
        assert (await served.send([recipient], b"S: 1\r\n\r\n1")).startswith("250")
    assert (await log_in(served, "ann@local.example", "secret")).startswith("+OK")
    database.server.pause()
    began = time.monotonic()
    assert (await served.send(["ann@local.example"], b"S: 2\r\n\r\n2")).startswith("250"), "known within the bound"
    assert time.monotonic() - began < limits.DIRECTORY_WAIT_S + _SLACK_S, "one wait, whatever hangs"
    replies = await asyncio.gather(
        served.send(["list@local.example"], b"S: 3\r\n\r\n3"),
        served.send(["unknown@local.example"], b"x"),
        served.send(["x@elsewhere.example"], b"x"),
        log_in(served, "ann@local.example", "secret"),
        log_in(served, "ann@local.example", "wrong"),
        auth(served, "nobody@local.example", "secret"),
    )
    assert [reply.split()[0] for reply in replies] == ["250", "451", "451", "+OK", "-ERR", "454"], replies
    assert replies[4].startswith("-ERR [SYS/TEMP]"), "never that it is wrong"
    status = await served.operation("status")
    assert isinstance(status, dict) and any("the directory is away" in line for line in status["degraded"])
    database.server.kill()
    assert (await served.send(["ann@local.example"], b"S: 4\r\n\r\n4")).startswith("250")
    database.server.start()
    await database.server.ready()
    async with asyncio.timeout(30.0):
        while not (await served.send(["unknown@local.example"], b"x")).startswith("550"):
            await asyncio.sleep(0.1)
    assert len(await served.read("ann@local.example")) == 5
    assert (await log_in(served, "ann@local.example", "wrong")).startswith("-ERR [AUTH]")


async def test_a_start_does_not_wait_for_its_directory(served: Running, database: Database) -> None:
    await served.mailbox("ann@local.example")
    await served.stop()
    database.server.kill()
    chosen = (f"directory.backend={database.server.kind}", f"directory.database={database.url}")
    await served.start(*chosen)
    assert (await served.send(["ann@local.example"], b"x")).startswith("451 4.3.0")
    database.server.start()
    await database.server.ready()
    async with asyncio.timeout(30.0):
        while not (await served.send(["ann@local.example"], b"S: 1\r\n\r\n1")).startswith("250"):
            await asyncio.sleep(0.1)
