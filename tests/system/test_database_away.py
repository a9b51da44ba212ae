"""The central database, which says who exists and what mailboxes show, is gone, and then a standby takes its place (P14)."""

from __future__ import annotations

import asyncio
import base64
import itertools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.directory.accounts import SqlDirectory
from powermail.directory.database import parse
from tests.index.sharing import standby_has_all
from tests.servers import Database, Postgres, standby_of
from tests.system.conftest import PopClient, without_trace
from tests.system.process import START_S
from tests.system.several import GROUPS, Several, make_several

ANN, BOB, LIST = "ann@local.example", "bob@local.example", "list@local.example"
AWAY_S = 10.0  # from the death of the primary to the promotion of the standby
GAP_S = 8.0  # P20: at most 5 s between two that are accepted, and what a busy machine adds; less than the database is away


class Receiving:
    """Clients that send one message after the other to ann, and when each was accepted."""

    def __init__(self, place: Several, clients: int) -> None:
        self.accepted: list[tuple[float, bytes]] = []
        self.refused: list[str] = []
        self._place = place
        self._goes_on = True
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(clients)]

    async def _client(self, number: int) -> None:
        count = 0
        while self._goes_on:
            count += 1
            octets = b"S: %d of %d\r\n\r\nwhile it is away\r\n" % (count, number)
            try:
                reply = await self._place.send([ANN], octets[:-2])
            except (OSError, asyncio.IncompleteReadError) as error:
                reply = repr(error)
            if reply.startswith("250"):
                self.accepted.append((time.monotonic(), octets))
            else:
                self.refused.append(reply)
            await asyncio.sleep(0.1)

    async def more(self, count: int) -> None:
        """Waits until so many more were accepted."""
        wanted = len(self.accepted) + count
        async with asyncio.timeout(START_S):
            while len(self.accepted) < wanted:
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._goes_on = False
        await asyncio.gather(*self._tasks)

    def longest_gap(self) -> float:
        """Seconds in which nothing was accepted."""
        times = sorted(at for at, _ in self.accepted)
        return max(after - before for before, after in itertools.pairwise(times))


async def auth(place: Several, name: str, password: str) -> str:
    """What submission says to it."""
    client = await place.connect("submission")
    for words in ("EHLO x", "STARTTLS"):
        await client.ask(words)
    await client.start_tls()
    await client.ask("EHLO x")
    said = await client.ask("AUTH PLAIN " + base64.b64encode(f"\0{name}\0{password}".encode()).decode())
    client.close()
    return said


async def log_in(place: Several, name: str, password: str) -> str:
    """What POP3 says to it."""
    client = await place.connect("pop3")
    assert isinstance(client, PopClient)
    await client.start_tls_pop()
    await client.ask_pop(f"USER {name}")
    said = await client.ask_pop(f"PASS {password}")
    client.close()
    return said


async def all_of(place: Several, address: str, count: int) -> list[bytes]:
    """What an address has, as soon as readers are let in and it is so much."""
    async with asyncio.timeout(3 * START_S):
        while True:
            try:
                found = [without_trace(octets) for octets in await place.retrieve(address)]
            except (OSError, ValueError, IndexError, AssertionError, asyncio.IncompleteReadError):
                found = []  # a temporary error
            if len(found) >= count:
                return found
            await asyncio.sleep(0.3)


def on_disk(node: Path, to: Path) -> set[bytes]:
    """The messages that one node has, read without the program."""
    subprocess.run([sys.executable, "docs/rescue.py", str(to), str(node)], check=True, capture_output=True)
    return {without_trace(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
            for path in to.rglob("*") if path.is_file()}  # fmt: skip


async def installed(root: Path, first: Postgres, database: Database) -> tuple[Several, Postgres]:
    """A front end, a keeper and nodes, each a process, on a primary with a standby; the directory is there too."""
    data, _ = await make_several(root, database.url)
    directory = SqlDirectory(system_world(MemoryLog()), "postgresql", parse("postgresql", database.url), 1)
    await directory.initialise()
    await directory.close()
    standby = await asyncio.to_thread(standby_of, first)
    there = urlsplit(database.url)
    both = there._replace(netloc=f"{there.netloc},127.0.0.1:{standby.port}").geturl()
    settings = data / "powermail.toml"
    more = f'[directory]\nbackend = "postgresql"\ndatabase = "{both}"\ncache_ttl_s = 0.05\n'
    settings.write_text(settings.read_text().replace(database.url, both) + more)
    return Several(data, "front,node,keeper"), standby


@pytest.mark.timeout(300)
async def test_mail_is_received_while_the_database_is_gone_and_when_a_standby_has_taken_its_place(
    tmp_path: Path, postgresql_server: Postgres, postgresql: Database
) -> None:
    """P14, P20: known recipients are accepted and stored on R nodes, cached log-ins work, all else is a temporary error; the
    mail appears afterwards, each once (P5), and nothing that was shown is missing (P7).
    """
    server, standby = await installed(tmp_path, postgresql_server, postgresql)
    try:
        await server.start()
        for address in (ANN, BOB):
            await server.mailbox(address)
        await server.mailbox(LIST, forward=[BOB])
        before = await server.fill(3)
        assert (await server.send([LIST], b"S: 1\r\n\r\nlist")).startswith("250")
        assert await all_of(server, ANN, 3) == before
        assert (await auth(server, ANN, "secret")).startswith("235")
        await standby_has_all(postgresql_server, standby)

        receiving = Receiving(server, 3)
        await receiving.more(6)
        await asyncio.to_thread(standby.pause)  # it would tell who exists
        await asyncio.to_thread(postgresql_server.kill)
        gone_at = time.monotonic()
        await asyncio.sleep(0.2)  # what was under way then has ended
        since = len(receiving.accepted)
        await receiving.more(12)
        await check_what_is_said(server)
        stored = [octets for _, octets in receiving.accepted[since:]]
        have = [await asyncio.to_thread(on_disk, server.data / "nodes" / name, tmp_path / f"rescued-{name}") for name in GROUPS]
        assert stored and all(sum(octets in one for one in have) == 2 for octets in stored), "on R nodes, of R groups"
        await asyncio.sleep(max(0.0, gone_at + AWAY_S - time.monotonic()))
        await asyncio.to_thread(standby.resume)
        await asyncio.to_thread(standby.promote)
        await receiving.more(12)
        await receiving.stop()
        assert not receiving.refused and receiving.longest_gap() < GAP_S, receiving.refused

        wanted = [*before, *(octets for _, octets in receiving.accepted)]
        found = await all_of(server, ANN, len(wanted))
        assert Counter(found) == Counter(wanted)
        assert (await server.send(["nobody@local.example"], b"x")).startswith("550")
        assert (await log_in(server, ANN, "wrong")).startswith("-ERR [AUTH]")
        assert await server.end() == 0
        assert not server.events("bug")
    finally:
        if server.begun:
            await server.end()
        await asyncio.to_thread(standby.remove)
        postgresql_server.heal()


async def check_what_is_said(server: Several) -> None:
    """To those who come while the database is away."""
    replies = await asyncio.gather(
        server.send([BOB], b"S: 2\r\n\r\nknown as the target of a list"),
        server.send([LIST], b"S: 2\r\n\r\nlist"),
        server.send(["nobody@local.example"], b"x"),
        server.send(["x@elsewhere.example"], b"x"),
        auth(server, ANN, "secret"),
        auth(server, ANN, "wrong"),
        auth(server, "nobody@local.example", "secret"),
        log_in(server, ANN, "secret"),
        log_in(server, "nobody@local.example", "secret"),
    )
    assert [reply.split()[0] for reply in replies] == ["250", "250", "451", "451", "235", "454", "454", "-ERR", "-ERR"], replies
    assert all(reply.startswith("-ERR [SYS/TEMP]") for reply in replies[-2:]), replies
