"""Several processes take from one listening socket: none loses a connection, none takes all, none waits for one that hangs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.clock import SystemClock
from powermail.base.errors import OperatorError
from powermail.base.net import Listener
from powermail.base.sharing import Board, Inherited, Share, SharedNetwork, bind, make_board


class Watch:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.at = 1000.0

    def monotonic(self) -> float:
        return self.at

    def now(self) -> float:
        return self.at


class Kept(asyncio.Protocol):
    """A connection that stays until its worker closes it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._worker.kept.append(transport)
        transport.write(b"%d" % self._worker.number)


@dataclass
class Worker:
    """What a front-end process does, all in this one."""

    number: int
    network: SharedNetwork
    share: Share
    kept: list[asyncio.Transport] = field(default_factory=list)
    listener: Listener | None = None

    async def serve(self, port: int) -> None:
        self.network.counts(lambda: len(self.kept))
        self.listener = await self.network.listen("127.0.0.1", port, lambda: Kept(self))

    async def stop(self) -> None:
        assert self.listener is not None
        self.listener.close()
        await self.network.taken()


@pytest.fixture
def board() -> Iterator[int]:
    made = make_board(4)
    yield made
    os.close(made)


async def workers_on_one_socket(board: int, count: int) -> tuple[list[Worker], int]:
    """So many workers, and the port."""
    (end,) = bind("127.0.0.1", 0)
    port = int(end.getsockname()[1])
    found = []
    for number in range(count):
        share = Share(Board(board), number, SystemClock())
        inherited = Inherited("127.0.0.1", 0, (os.dup(end.fileno()),), True)
        found.append(Worker(number, SharedNetwork([inherited], share), share))
    end.close()
    return found, port


async def who_answers(port: int) -> tuple[int, asyncio.StreamWriter]:
    """The number of the worker that took a new connection, and the connection, still open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(10):
        return int(await reader.readexactly(1)), writer


async def end(workers: list[Worker], writers: list[asyncio.StreamWriter]) -> None:
    for worker in workers:
        for transport in worker.kept:
            transport.abort()
        await worker.stop()
    for writer in writers:
        writer.close()


async def test_connections_are_shared_evenly_and_none_is_lost(board: int) -> None:
    workers, port = await workers_on_one_socket(board, 3)
    for worker in workers:
        await worker.serve(0)
    found = await asyncio.gather(*(who_answers(port) for _ in range(60)))
    counts = [len(worker.kept) for worker in workers]
    assert sum(counts) == 60
    assert max(counts) - min(counts) <= 2 * limits.WORKER_SLACK + 1, counts
    await end(workers, [writer for _, writer in found])


async def test_what_waits_while_a_worker_leaves_is_taken_by_the_others(board: int) -> None:
    """Also what came when nobody listened at all: it waits in the kernel's queue."""
    workers, port = await workers_on_one_socket(board, 2)
    await workers[0].serve(0)
    first, writer = await who_answers(port)
    assert first == 0
    await workers[0].stop()
    waiting = [asyncio.create_task(who_answers(port)) for _ in range(5)]
    await asyncio.sleep(0)
    await workers[1].serve(0)
    found = await asyncio.gather(*waiting)
    assert {number for number, _ in found} == {1}
    await end(workers, [writer, *(each for _, each in found)])


async def test_an_address_that_was_not_inherited_is_refused(board: int) -> None:
    workers, _ = await workers_on_one_socket(board, 1)
    with pytest.raises(OperatorError, match="restart of the whole"):
        await workers[0].network.listen("127.0.0.1", 25, lambda: Kept(workers[0]))
    await workers[0].serve(0)
    with pytest.raises(OperatorError, match="restart of the whole"):
        await workers[0].network.listen("127.0.0.1", 0, lambda: Kept(workers[0]))
    await workers[0].stop()


def shares(board: int, clock: Watch, counts: list[int]) -> list[Share]:
    """Shares of workers that have so many connections."""
    made = []
    for slot, count in enumerate(counts):
        share = Share(Board(board), slot, clock)
        share.open = lambda count=count: count  # type: ignore[misc]
        share.note()
        made.append(share)
    return made


def test_the_one_with_fewest_always_may_take(board: int) -> None:
    for counts in ([0, 0, 0], [5, 0, 0], [100, 100, 99], [1, 2, 3], [0, 9, 9]):
        made = shares(board, Watch(), counts)
        assert made[counts.index(min(counts))].may_take(0)


def test_one_with_more_than_its_share_leaves_the_next_to_the_others(board: int) -> None:
    busy, idle, _ = shares(board, Watch(), [10, 0, 2])
    assert not busy.may_take(0)
    assert idle.may_take(0)
    assert not idle.may_take(10), "what was taken and is not open yet counts too"


def test_nobody_leaves_anything_to_one_that_hangs_or_is_gone(board: int) -> None:
    clock = Watch()
    busy, hanging, leaving = shares(board, clock, [10, 0, 0])
    assert not busy.may_take(0)
    clock.at += limits.WORKER_SILENT_S + 0.1
    leaving.note()
    assert not busy.may_take(0), "one that is there has none"
    leaving.leave()
    leaving.note()
    assert busy.may_take(0), "the other was silent for too long, and this one has left"
    hanging.note()
    assert not busy.may_take(0)
    Board(board).clear(1)
    assert busy.may_take(0)


async def test_nobody_leaves_anything_to_one_that_does_not_take_yet(board: int) -> None:
    """A process that starts is there before its doors are: what waits would be taken by nobody."""
    workers, _ = await workers_on_one_socket(board, 2)
    busy, starting = workers
    await busy.serve(0)
    busy.share.open = lambda: 10
    await starting.network.step()
    assert busy.share.may_take(0)
    await starting.serve(0)
    await starting.network.step()
    assert not busy.share.may_take(0)
    await end(workers, [])


def test_an_address_that_is_taken_says_so() -> None:
    (one,) = bind("127.0.0.1", 0)
    with pytest.raises(OperatorError, match="choose another port or stop what uses it"):
        bind("127.0.0.1", int(one.getsockname()[1]))
    one.close()


def test_processes_that_replace_one_file_at_a_time_leave_one_of_their_versions(tmp_path: Path) -> None:
    """Several share a data directory: nobody renames what another has half written."""
    path = tmp_path / "shared"
    code = (
        "import sys; from powermail.base.disk import SystemDisk\n"
        "for _ in range(50): SystemDisk().replace_file(sys.argv[1], sys.argv[2].encode() * 5000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    left = path.read_bytes()
    assert len(left) == 5000 and len(set(left)) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["shared"]
