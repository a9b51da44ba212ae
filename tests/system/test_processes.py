"""Many processes on one database: front ends share sockets, jobs go to who lives, and what dies comes back (P1, P4, P20)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.base import limits
from powermail.base.disk import SystemDisk
from tests.servers import Postgres
from tests.system.process import FREE, START_S, command, make
from tests.system.several import Several, lives, make_several

ANN = "ann@local.example"
REST_S = 0.1
LOOK_S = 0.3  # between looks at what takes long


# One installation for all of these: six processes take long to start.
together = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def several(
    tmp_path_factory: pytest.TempPathFactory, _postgresql_of_this_process: Postgres
) -> AsyncIterator[tuple[Several, Several]]:
    """A machine with two front ends, a keeper and nodes; and one that may have a keeper, not started."""
    _postgresql_of_this_process.heal()
    database = _postgresql_of_this_process.create()
    data, second = await make_several(tmp_path_factory.mktemp("several"), database.url)
    first, other = Several(data, "front,node,keeper", "--set", "workers=2"), Several(second, "keeper")
    await first.start()
    await first.mailbox(ANN)
    yield first, other
    assert await first.end() == 0, first.log.read_text()
    assert not first.events("bug")
    database.drop()


class Load:
    """Clients that send one message after the other, each on a connection of its own, until told to stop. They rest between,
    so that there is CPU for what is tried.
    """

    def __init__(self, place: Several, clients: int) -> None:
        self.acknowledged: list[bytes] = []
        self.refused: list[str] = []
        self.unknown: list[str] = []
        self._place = place
        self._running = True
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(clients)]

    async def _client(self, number: int) -> None:
        count = 0
        while self._running:
            count += 1
            body = b"S: %d of %d\r\n\r\nof load %d" % (count, number, id(self))
            try:
                reply = await self._place.send([ANN], body)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.unknown.append(repr(error))
                continue
            if reply.startswith("250"):
                self.acknowledged.append(body + b"\r\n")
            elif reply:
                self.refused.append(reply)
            else:
                self.unknown.append("closed")
            await asyncio.sleep(REST_S)

    async def more(self, count: int) -> None:
        """Waits until so many more were acknowledged."""
        wanted = len(self.acknowledged) + count
        async with asyncio.timeout(START_S):
            while len(self.acknowledged) < wanted:
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self._running = False
        await asyncio.gather(*self._tasks)


async def read_all(place: Several, wanted: list[bytes]) -> list[bytes]:
    """What ann has, once all that is wanted is there: a front end that died leaves entering to reconcile."""
    async with asyncio.timeout(START_S * 2):
        while True:
            try:
                client = await place.log_in(ANN)
                count = int((await client.ask_pop("STAT")).split()[1])
                await client.ask_pop("QUIT")
                client.close()
                found = await place.read(ANN) if count >= len(wanted) else []
            except (OSError, IndexError, ValueError, AssertionError, asyncio.IncompleteReadError):
                found = []  # another session has the maildrop, or readers wait
            if set(wanted) <= set(found):
                return found
            await asyncio.sleep(LOOK_S)


@together
async def test_front_ends_come_and_go_under_load_and_no_client_notices(several: tuple[Several, Several]) -> None:
    """P1, P4: a rolling restart without a reply but 250, then one that is killed: nothing acknowledged is lost, nothing is
    there twice, and the parent brings it back.
    """
    first, _ = several
    before = await first.processes()
    assert sorted(before) == ["front1", "front2", "keeper"]
    load = Load(first, 6)
    await load.more(12)
    os.kill(first.pid, signal.SIGHUP)
    async with asyncio.timeout(START_S):
        while not first.events("reloaded"):
            await load.more(1)
    await load.more(10)
    assert not load.refused + load.unknown, (load.refused, load.unknown)
    now = await first.processes()
    assert sorted(now) == sorted(before)
    assert all(now[part]["pid"] != before[part]["pid"] and now[part]["died"] == before[part]["died"] for part in before)
    assert not [one["pid"] for one in before.values() if lives(one["pid"])]

    killed = now["front1"]["pid"]
    os.kill(killed, signal.SIGKILL)
    await load.more(12)
    async with asyncio.timeout(START_S):
        while (now := await first.processes()).get("front1", {"pid": killed})["pid"] == killed:
            await asyncio.sleep(LOOK_S)
    assert now["front1"]["died"] == "signal-9,1"
    await load.more(10)
    await load.stop()
    assert not load.refused
    found = await read_all(first, load.acknowledged)
    assert len(found) == len(set(found)), "nothing is there twice"
    deaths = [event["died"] for event in first.events("part") if event["part"] == "front1" and event.get("died")]
    assert deaths == ["signal 9"]
    await maildrop_is_one_sessions(first)


async def maildrop_is_one_sessions(first: Several) -> None:
    """RFC 1939 §3, RFC 2449 §8.1.1: exclusive, whatever front end serves it, and free when the session has ended."""
    holder = await first.log_in(ANN)
    assert (await holder.ask_pop("STAT")).startswith("+OK ")
    for _ in range(6):  # sessions of both front ends
        client = await first.log_in(ANN)
        assert not (await client.ask_pop("STAT")).startswith("+OK")
        client.close()
    assert (await holder.ask_pop("QUIT")).startswith("+OK")
    for _ in range(4):
        client = await first.log_in(ANN)
        assert (await client.ask_pop("STAT")).startswith("+OK")
        assert (await client.ask_pop("QUIT")).startswith("+OK")


@together
async def test_jobs_of_a_keeper_that_dies_are_taken_by_another(several: tuple[Several, Several]) -> None:
    """No leader to lose: each job is one process's at a time, and another's within a bound when that dies. What a parent that
    is killed leaves drains, and has the directory until then.
    """
    first, other = several
    await other.start()
    try:
        async with asyncio.timeout(START_S):
            while "reconcile a" not in (jobs := await first.jobs()) or len((await other.status())["processes"]) < 4:
                await asyncio.sleep(LOOK_S)
        here = {"reconcile", "scrub", "compact", "collect", "admission"}
        assert {f"{name} {node}" for name in here for node in "abc"} | {"repair", "forget", "checkpoint", "epochs"} <= set(jobs)
        processes = (await other.status())["processes"]
        mine, another = (next(p for p in processes if p["process"] == "keeper" and p["here"] is here) for here in (False, True))
        os.kill(first.pid, signal.SIGSTOP)  # the parent starts no other meanwhile
        os.kill(mine["pid"], signal.SIGKILL)
        async with asyncio.timeout(limits.JOB_LEASE_S + limits.JOB_LOOK_S + 5):
            while set((found := await other.jobs()).values()) != {another["pid"]} or set(found) < set(jobs):
                await asyncio.sleep(LOOK_S)
        os.kill(first.pid, signal.SIGCONT)
        async with asyncio.timeout(START_S):
            while not any(p["died"] == "signal-9,1" for p in (await other.status())["processes"]):
                await asyncio.sleep(LOOK_S)
        os.kill(another["pid"], signal.SIGSTOP)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        assert await other.end(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(BlockingIOError):
        SystemDisk().lock(f"{other.data}/lock")
    os.kill(another["pid"], signal.SIGCONT)
    async with asyncio.timeout(limits.DRAIN_TIMEOUT_S + 5):
        while lives(another["pid"]):  # it hears that its parent is gone, and drains
            await asyncio.sleep(0.05)
    assert other.events("stopped")
    SystemDisk().lock(f"{other.data}/lock").release()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation with its index in a file, which none of these changes."""
    data = tmp_path_factory.mktemp("plain") / "data"
    make(data)
    return data


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--roles", "front"), "index.database"),
        (("--roles", "keeper,authority"), "index.database"),
        (("--roles", "front,nobody"), "'nobody' is none of"),
        (("--set", "workers=2"), "with SQLite one process does everything"),
        (("--roles", "front,keeper", "--set", "index.database=postgresql://nobody@127.0.0.1:1/x"), "has a path"),
    ],
)
def test_roles_that_cannot_be_are_refused_with_the_reason(plain: Path, words: tuple[str, ...], why: str) -> None:
    done = command("serve", "--data", str(plain), *words)
    assert done.returncode == 2 and why in done.stderr, done.stderr


@together
async def test_settings_that_no_process_can_start_with_end_the_whole(several: tuple[Several, Several]) -> None:
    """A mistake is said once, with the exit status of a mistake; nothing is tried again for ever."""
    _, other = several
    words = ("--set", "directory.postmaster=nobody at all", *FREE)
    done = await asyncio.to_thread(command, "serve", "--data", str(other.data), "--roles", "front,keeper", *words)
    assert done.returncode == 2 and "directory.postmaster" in done.stderr, done.stderr
