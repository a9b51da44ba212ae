"""From one machine to a cluster by the commands of docs/operations.md: no file is moved, and mail lies on the new node."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from powermail.app.authority import AuthorityProcess
from powermail.app.compose import PowerMail
from powermail.app.noding import NodeProcess
from powermail.app.roles import Duties, as_client
from powermail.base import limits
from powermail.base.certificates import facts_of
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from tests.cli.support import Done, powermail
from tests.cli.support import make as make_here
from tests.servers import Database
from tests.system.conftest import DOORS, Running
from tests.system.process import SMALL, START_S, Served, command, make
from tests.system.several import GROUPS, Several, free_port


def tree(data: Path) -> dict[str, tuple[int, int]]:
    """Which file lies where, but for what a server writes anew."""
    return {
        str(path.relative_to(data)): (path.stat().st_ino, path.stat().st_size)
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.name not in ("powermail.toml",)
    }


def said(*words: str) -> dict[str, object]:
    """What a command answers as JSON."""
    done = command(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout)
    assert isinstance(found, dict)
    return found


@asynccontextmanager
async def served_node(data: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`powermail serve --roles node`, with nothing but what `join` has written."""
    log = data.with_suffix(".log")
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "powermail", "serve", "--roles", "node", "--data", str(data), "--set", "log.json=true"],
            *SMALL,
            stdout=out,
            stderr=out,
        )
    try:
        ends_at = time.monotonic() + START_S
        while b'"event":"listening"' not in log.read_bytes():
            assert time.monotonic() < ends_at and process.returncode is None, log.read_text()
            await asyncio.sleep(0.02)
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(limits.DRAIN_TIMEOUT_S):
                await process.wait()


async def test_a_first_machine_becomes_a_cluster_and_a_second_joins_it_as_a_node(tmp_path: Path) -> None:
    data, second = tmp_path / "first", tmp_path / "second"
    await asyncio.to_thread(make, data)
    before, authority, at = tree(data), f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    founded = await asyncio.to_thread(said, "cluster", "init", "--listen", authority, "--data", str(data))
    assert {name: facts for name, facts in tree(data).items() if name in before} == before, "no file was moved or changed"
    cluster = msgspec.json.decode((data / "nodes/a/identity").read_bytes())["cluster"]
    assert founded["cluster"] == cluster
    uris = facts_of((data / "tls/peer.pem").read_bytes()).uris
    assert {uri.split("/", 3)[3] for uri in uris} == {
        "front/first", "keeper/first", "operator/first", "authority/first", "node/a", "node/b", "node/c",
    }  # fmt: skip
    again = await asyncio.to_thread(command, "cluster", "init", "--listen", authority, "--data", str(data))
    assert again.returncode == 2 and "of a cluster already" in again.stderr
    first = Served(data)
    try:
        await first.start()
        await first.mailbox("ann@localhost")
        invited = await first.operation("node_add", node="d", group="rack-d", priority=0, address=at)
        assert isinstance(invited, dict)
        token = str(invited["token"])
        words = ("join", token, "--authority", authority, "--data", str(second))
        joined = await asyncio.to_thread(said, *words)
        assert (joined["id"], joined["roles"], joined["cluster"]) == ("d", ["node"], cluster)
        for name in ("powermail.toml", "tls/peer.key", "tls/peer.pem", "tls/authority.pem", "nodes/d/identity"):
            assert stat.S_IMODE(os.stat(second / name).st_mode) == 0o600, name
        assert token.rpartition(".")[2].encode() not in b"".join(p.read_bytes() for p in second.rglob("*") if p.is_file())
        async with served_node(second):
            async with asyncio.timeout(START_S):
                while True:
                    nodes = await first.operation("node_list")
                    assert isinstance(nodes, list)
                    if {node["id"]: node["state"] for node in nodes}.get("d") == "read-write":
                        break
                    await asyncio.sleep(0.05)
            await first.operation("node_block", node=["a", "b"])  # so that two copies need the new one
            async with asyncio.timeout(START_S):
                while not (await first.send(["ann@localhost"], b"Subject: hello\r\n\r\ntext")).startswith("250"):
                    await asyncio.sleep(0.05)  # refused before DATA: it takes mail when it has been compared
            assert await first.read("ann@localhost") == [b"Subject: hello\r\n\r\ntext\r\n"]
            (listed,) = await first.listed("ann@localhost")
            where = await first.operation("where", key=listed.key.hex())
            assert isinstance(where, dict) and where["copies"].get("d") == "good", where
            members = await first.operation("cluster_members")
            assert isinstance(members, list)
            assert [(one["id"], one["state"], one["days_left"] > 89) for one in members] == [
                ("d", "member", True),
                ("first", "member", True),
            ]
            status = await first.operation("status")
            assert isinstance(status, dict) and status["certificate_days_left"] > 89
            used = await asyncio.to_thread(command, *words[:-1], str(tmp_path / "third"))
            assert used.returncode == 2 and "used already" in used.stderr
            shown = await asyncio.to_thread(said, "cluster", "show", "--data", str(second))
            assert shown["names"] == [f"powermail://{cluster}/node/d"] and shown["renewed_at"] == [authority]
        await first.stop()
    finally:
        await first.kill()


class First(Running):
    """All roles of the first machine in this process: a front end and keeper, its nodes, the authority."""

    def __init__(self, data: Path) -> None:
        words = [f'{name}=["127.0.0.1:0"]' for name in DOORS]
        settings = load_file(str(data / "powermail.toml"), [*words, "cluster.reserve_octets=0"])
        world, self.bugs = system_world(MemoryLog()), list[BaseException]()
        duties = Duties(shared=True, machine="first", version="0", pid=os.getpid())
        super().__init__(PowerMail(world, as_client(settings), str(data), self.bugs.append, duties=duties), data)
        self._beside = [kind(world, settings, str(data), self.bugs.append) for kind in (NodeProcess, AuthorityProcess)]

    async def begin(self) -> None:
        """Starts them; doors are open then."""
        for process in self._beside:
            await process.start()
        await self.powermail.start()

    async def end(self) -> None:
        """Stops them."""
        await self.powermail.stop(0.5)
        for process in reversed(self._beside):
            await process.stop()
        assert not self.bugs and not self.lines("bug")


async def asked(*words: str) -> Done:
    """A command in this process, beside what serves in it."""
    done = await asyncio.to_thread(powermail, *words)
    assert done.status == 0, done
    return done


async def test_a_second_front_end_joins_a_cluster_with_its_index_in_a_database(tmp_path: Path, postgresql: Database) -> None:
    """It gets the settings that all have in common, and reads on the other machine what was sent to the first, with the right
    of a front end and no other. Its processes are real; those of the first machine are all in this one.
    """
    data, second = tmp_path / "first", tmp_path / "second"
    await asyncio.to_thread(make_here, data)
    authority, nodes = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    await asked("cluster", "init", "--listen", authority, "--data", str(data))
    settings = data / "powermail.toml"
    text = settings.read_text().replace("[peers]\n", f'[peers]\nlisten = ["{nodes}"]\n')
    text += f'[index]\ndatabase = "{postgresql.url}"\n[directory]\nbackend = "postgresql"\ndatabase = "{postgresql.url}"\n'
    settings.write_text(text)
    for step in (("index", "migrate"), ("directory", "init")):
        await asked(*step, "--data", str(data))
    first, other = First(data), Several(second, "front")
    try:
        await first.begin()
        await first.mailbox("ann@localhost")
        for name in GROUPS:
            await first.operation("node_address", node=name, address=nodes)
        invited = msgspec.to_builtins(await first.operation("cluster_admit", id="front-2"))
        words = ("join", str(invited["token"]), "--authority", authority, "--hostname", "two.example", "--data", str(second))
        joined = (await asked(*words, "--json")).json()
        assert (joined["roles"], joined["node"]) == (["front"], None)
        assert joined["serve"] == f"powermail serve --roles front --data {second}"
        assert (second / "srs.keys").read_bytes() == (data / "srs.keys").read_bytes()
        async with asyncio.timeout(START_S):
            while not (await first.send(["ann@localhost"], b"Subject: hello\r\n\r\ntext")).startswith("250"):
                await asyncio.sleep(0.05)
            await other.start()
            while True:
                client = await other.log_in("ann@localhost")  # refused while a keeper has not entered all that nodes held
                if (await client.ask_pop("STAT")).startswith("+OK 1 "):
                    break
                client.close()
                await asyncio.sleep(0.05)
            await client.ask_pop("QUIT")
            assert await other.read("ann@localhost") == [b"Subject: hello\r\n\r\ntext\r\n"]
            while not (await other.send(["ann@localhost"], b"Subject: back\r\n\r\ntext")).startswith("250"):
                await asyncio.sleep(0.05)
        assert first.powermail.world.counters.get("noded.refused.role") == 0, "it asks nothing that is a keeper's"
        assert await other.end() == 0
    finally:
        await other.end(signal.SIGKILL)
        await first.end()
