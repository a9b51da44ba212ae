"""The program with its index on PostgreSQL: made by a command, served, away for a moment, and back (P1, P7, P14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.servers import Database, Postgres
from tests.system.process import START_S, Served, command, make

ANN = "ann@local.example"


async def settled(server: Served) -> None:
    """Readers are let in when the logs were read to their ends: until then the index is catching up."""
    async with asyncio.timeout(START_S):
        while (await asyncio.to_thread(command, "status", "--data", str(server.data))).returncode:
            pass


@pytest_asyncio.fixture
async def served(tmp_path: Path, postgresql: Database) -> AsyncIterator[Served]:
    """A process with ann in it, whose index is a database."""
    data = tmp_path / "data"
    await asyncio.to_thread(make, data)
    settings = data / "powermail.toml"
    text = settings.read_text()
    assert "[index]" not in text
    settings.write_text(f'{text}\n[index]\ndatabase = "{postgresql.url}"\n')
    server = Served(data)
    refused = await asyncio.to_thread(command, "serve", "--data", str(data))
    assert refused.returncode == 2 and "powermail index migrate" in refused.stderr, refused
    done = await asyncio.to_thread(command, "index", "migrate", "--data", str(data))
    assert done.returncode == 0, done.stderr
    await server.start()
    await settled(server)
    await server.mailbox(ANN)
    yield server
    await server.stop()


async def test_mail_comes_and_is_read_while_the_database_goes_and_comes(
    served: Served, postgresql: Database, postgresql_server: Postgres
) -> None:
    sent = await served.fill(3)
    assert await served.read(ANN) == sent
    assert int(postgresql.sql("SELECT count(*) FROM entries")) == 3
    postgresql_server.kill()
    assert (await served.send([ANN], b"S: away\r\n\r\nstored on the nodes")).startswith("250")
    postgresql_server.start()
    await postgresql_server.ready()
    assert len(await served.read(ANN)) in (3, 4), "nothing that was shown is missing; reconcile leaves a delivery a minute"
    await served.kill()
    await served.start()
    await settled(served)
    assert len(await served.read(ANN)) == 4, "a start enters what the nodes hold before readers are let in"
    assert int(postgresql.sql("SELECT count(*) FROM entries")) == 4


async def test_an_installation_in_use_is_not_moved(tmp_path: Path, postgresql: Database) -> None:
    data = tmp_path / "data"
    await asyncio.to_thread(make, data)
    server = Served(data)
    await server.start()
    await server.mailbox(ANN)
    await server.fill(1)
    await server.stop()
    words = ("index", "migrate", "--data", str(data), "--set", f"index.database={postgresql.url}")
    done = await asyncio.to_thread(command, *words)
    assert done.returncode == 2 and "shows mail already" in done.stderr
