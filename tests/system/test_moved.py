"""An installation in use is moved into databases, serves, is rebuilt there and moved back: readers see what they saw."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import powermail
from tests.cli.test_moving import Killed, killed_at
from tests.servers import Database
from tests.system.conftest import PopClient
from tests.system.process import START_S, Served, command, make
from tests.system.test_nodes_over_network import cluster_of_processes

ANN = "ann@local.example"


async def run(*words: str) -> str:
    """A command that succeeds; what it printed."""
    done = await asyncio.to_thread(command, *words)
    assert done.returncode == 0, (words, done)
    return done.stdout


async def settled(server: Served) -> None:
    """Readers are let in when the logs were read to their ends; certificates of these tests are near theirs."""

    def holds(status: dict[str, Any]) -> bool:
        return not [said for said in status["degraded"] if "certificate" not in said]

    await server.until("nothing is degraded", holds, START_S)


async def seen(server: Served) -> dict[str, Any]:
    """What a reader and an operator see of ann's mailbox: UIDL, sizes and octets by POP3; keys and UIDs."""
    client: PopClient = await server.log_in(ANN)
    told = {}
    for word in ("UIDL", "LIST"):
        assert (await client.ask_pop(word)).startswith("+OK")
        told[word] = await client.multiline()
    await client.ask_pop("QUIT")
    client.close()
    listed = await server.operation("list_messages", address=ANN)
    waiting = await server.operation("queue_list")
    assert isinstance(listed, dict) and isinstance(waiting, list)
    return {
        **told,
        "octets": await server.retrieve(ANN),
        "uids": [(message["uid"], message["key"]) for message in listed["messages"]],
        "queue": [(row["id"], row["key"], row["to"]) for row in waiting],
    }


async def test_a_moved_installation_shows_what_it_showed(tmp_path: Path, postgresql: Database) -> None:
    data = tmp_path / "data"
    await asyncio.to_thread(make, data)
    server = Served(data)
    await server.start()
    try:
        await server.mailbox(ANN)
        await server.mailbox("away@local.example", forward=["somebody@elsewhere.example"])
        await server.fill(4)
        await server.dele(ANN, 2)
        assert (await server.send(["away@local.example"], b"S: out\r\n\r\nforwarded")).startswith("250")
        before = await seen(server)
        assert len(before["uids"]) == 3 and [row[2] for row in before["queue"]] == ["somebody@elsewhere.example"]
        refused = await asyncio.to_thread(command, "index", "move", "--to", postgresql.url, "--data", str(data))
        assert refused.returncode == 2 and "stop it first" in refused.stderr
        await server.stop()

        await run("index", "move", "--to", postgresql.url, "--data", str(data))
        await run("directory", "move", "--to", postgresql.url, "--data", str(data))
        await server.start()
        await settled(server)
        assert await seen(server) == before, "nothing is lost, and nothing is numbered anew"
        epoch = (await server.status())["epoch"]
        assert epoch == 1, "the same history: no node knows more than the database"
        await server.fill(1, start_at=4)
        after = await seen(server)
        assert after["uids"][:3] == before["uids"] and after["uids"][3][0] == before["uids"][-1][0] + 1
        await server.stop()

        await run("index", "move", "--to", "sqlite", "--data", str(data))
        await server.start()
        await settled(server)
        assert await seen(server) == after
    finally:
        await server.stop()


# Of a rebuild: before the file has its name, when it is whole, among the tables, when all is there, and when it is marked.
KILLS = ((0, False), (1, False), (5, False), (0, True), (1, True))


async def test_an_index_in_a_database_is_made_anew_from_the_nodes(
    tmp_path: Path, postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 13; the old tables stay, what is half made is never served, and whoever is killed goes on."""
    data = tmp_path / "data"
    await asyncio.to_thread(make, data)
    settings = data / "powermail.toml"
    settings.write_text(f'{settings.read_text()}\n[index]\ndatabase = "{postgresql.url}"\n')
    await run("index", "migrate", "--data", str(data))
    server = Served(data)
    await server.start()
    try:
        await settled(server)
        await server.mailbox(ANN)
        sent = await server.fill(3)
        await server.stop()
        refused = await asyncio.to_thread(command, "rebuild", "--data", str(data))
        assert refused.returncode == 2 and "can be used" in refused.stderr and "--yes" in refused.stderr, refused
        postgresql.sql("UPDATE mailboxes SET octets = 12345")  # what the old one is known by
        words = ("rebuild", "--yes", "--data", str(data), "--json")
        for step, from_mark in KILLS:
            with killed_at(step, monkeypatch, from_mark) as done, pytest.raises(Killed):
                await asyncio.to_thread(powermail, *words)
            assert len(done) == step
            assert postgresql.sql("SELECT octets FROM mailboxes").split() == ["12345"], "the old one is there, whole"
        assert '"messages": 3' in await run(*words)
        assert postgresql.sql("SELECT octets FROM mailboxes").split() != ["12345"]
        schemas = postgresql.sql("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'powermail%'").split()
        assert len(schemas) == 1 and schemas[0].startswith("powermail_before_")
        assert not list(data.glob("index.rebuilding.db*"))
        await server.start()
        await settled(server)
        assert sorted(await server.read(ANN)) == sorted(sent)
    finally:
        await server.stop()


async def test_an_index_is_made_anew_in_a_database_from_nodes_of_other_machines(tmp_path: Path, postgresql: Database) -> None:
    """A cluster of nodes alone is enough: this machine has none itself."""
    async with cluster_of_processes(tmp_path) as (front, _):
        ann = "ann@front.example"
        await front.mailbox(ann)
        bodies = [b"Subject: %d\r\n\r\ntext\r\n" % number for number in range(3)]
        for body in bodies:
            assert (await front.send([ann], body.removesuffix(b"\r\n"))).startswith("250")
        await front.stop()
        await run("index", "move", "--to", postgresql.url, "--data", str(front.data))
        postgresql.sql("DROP TABLE entries, messages")
        assert '"messages": 3' in await run("rebuild", "--yes", "--data", str(front.data), "--json")
        await front.start()
        await settled(front)
        assert sorted(await front.read(ann)) == bodies
