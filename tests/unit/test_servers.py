"""The servers that tests use: they survive what tests do to them, and nothing of them survives the tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import CALL_S, Database, Postgres, Server, standby_of, sweep


@pytest.fixture(params=["postgresql", "mysql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A fresh database of each kind."""
    found: Database = request.getfixturevalue(request.param)
    return found


async def test_a_killed_server_comes_back_with_its_data(database: Database) -> None:
    database.sql("CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (7)")
    server = database.server
    server.kill()
    assert server.processes() == []
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", server.port)
    server.start()
    await server.ready()
    assert database.sql("SELECT a FROM t").split() == ["7"]


async def test_a_paused_server_answers_nobody_until_it_goes_on(database: Database) -> None:
    server = database.server
    asked = asyncio.create_task(asyncio.to_thread(database.sql, "SELECT 1"))
    server.pause()
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in server.processes()]
    assert "T" in states and set(states) <= set("TtZ")
    server.resume()
    assert (await asyncio.wait_for(asked, CALL_S)).strip() == "1"


def test_no_server_runs_as_root(database: Database) -> None:
    assert database.server.processes()
    for pid in database.server.processes():
        assert os.stat(f"/proc/{pid}").st_uid != 0


def test_a_template_is_copied(postgresql: Database, postgresql_server: Postgres) -> None:
    postgresql.sql("CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (7)")
    copy = postgresql_server.create(template=postgresql.name)
    assert copy.sql("SELECT a FROM t").split() == ["7"]
    copy.drop()


async def test_a_standby_follows_and_can_be_promoted(postgresql: Database, postgresql_server: Postgres) -> None:
    standby = await asyncio.to_thread(standby_of, postgresql_server)
    try:
        postgresql.sql("CREATE TABLE t (a INTEGER)")
        async with asyncio.timeout(CALL_S):
            while not (await asyncio.to_thread(standby.sql, postgresql.name, "SELECT to_regclass('t')")).strip():
                await asyncio.sleep(0.02)
        with pytest.raises(AssertionError, match="read-only"):
            standby.sql(postgresql.name, "INSERT INTO t VALUES (1)")
        await asyncio.to_thread(standby.promote)
        standby.sql(postgresql.name, "INSERT INTO t VALUES (1)")
    finally:
        standby.remove()


def test_a_killed_test_process_leaves_nothing() -> None:
    script = (
        "from tests.servers import Postgres; server = Postgres(); server.start(); server.wait();"
        " print(server.directory, *server.processes(), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        directory, *pids = process.stdout.readline().decode().split()
        process.kill()
    assert pids and Path(directory).exists()
    ended = subprocess.run(["timeout", str(CALL_S), "tail", *(f"--pid={pid}" for pid in pids), "-f", "/dev/null"], check=False)
    assert ended.returncode == 0, "servers outlive the process that started them"
    sweep()
    assert not Path(directory).exists()


def test_what_the_client_says_is_not_lost(database: Database) -> None:
    with pytest.raises(AssertionError, match="nowhere"):
        database.sql("SELECT * FROM nowhere")
    assert isinstance(database.server, Server)
