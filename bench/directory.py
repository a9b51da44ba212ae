"""Measures look-ups of the directory on each engine: CPU of this process for one `find`, and cold recipients a second.

`python -m bench.directory [ROWS]` fills a table of ROWS mailboxes (100,000) in a fresh SQLite file, PostgreSQL and MariaDB,
each a server of this run, and takes medians of rounds by turns. Cold: each recipient is asked for the first time, through cache
and resolver, one after the other (as one SMTP session does) and 64 at once.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import uvloop
from tests.servers import Mysql, Postgres, Server

from powermail.base.counters import Counters
from powermail.base.log import NullLog
from powermail.base.world import World, system_world
from powermail.directory.accounts import SqlDirectory
from powermail.directory.contract import Account, Backend
from powermail.directory.database import parse
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.directory.sqlite import SqliteDirectory
from powermail.mail.address import Address

_ROUNDS = 3
_FINDS = 1000
_AT_ONCE = 64


def _address(number: int) -> str:
    return f"user{number:08}@example.org"


async def _fill(directory: Backend, count: int) -> float:
    """Rows a second."""
    began = time.perf_counter()
    for start in range(0, count, 10_000):
        await directory.add([Account("", _address(n), "{plain}x", 2**30) for n in range(start, min(count, start + 10_000))])
    return count / (time.perf_counter() - began)


async def _finds(directory: Backend, count: int) -> tuple[float, float]:
    """(CPU in us, time in us) of one `find`, one after the other."""
    asked = [_address(random.randrange(count)) for _ in range(_FINDS)]
    cpu, began = time.process_time(), time.perf_counter()
    for address in asked:
        assert await directory.find(address) is not None
    return (time.process_time() - cpu) / _FINDS * 1e6, (time.perf_counter() - began) / _FINDS * 1e6


async def _cold(world: World, directory: Backend, count: int, at_once: int) -> tuple[float, float]:
    """(recipients a second, CPU in us of each) that are looked up for the first time."""
    resolver = Resolver(DirectoryCache(directory, world.clock, Counters(), 30.0, 3600.0), "+")
    asked = [Address(_address(number).partition("@")[0], "example.org") for number in random.sample(range(count), _FINDS)]
    left = iter(asked)

    async def session() -> None:
        for address in left:
            assert (await resolver.resolve(address)).known

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(session() for _ in range(at_once)))
    return _FINDS / (time.perf_counter() - began), (time.process_time() - cpu) / _FINDS * 1e6


async def _measure(servers: list[Server], path: Path, count: int) -> None:
    world = system_world(NullLog())
    directories: dict[str, Backend] = {"sqlite": SqliteDirectory(world, str(path / "directory.db"))}
    for server in servers:
        made = SqlDirectory(world, server.kind, parse(server.kind, server.create().url))
        await made.initialise()
        directories[server.kind] = made
    rates = {}
    for name, directory in directories.items():
        await directory.open()
        rates[name] = await _fill(directory, count)
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for _ in range(_ROUNDS):
        for name, directory in directories.items():
            row = (*await _finds(directory, count), *await _cold(world, directory, count, 1))
            found[name].append((*row, *await _cold(world, directory, count, _AT_ONCE)))
    print(
        f"| {count:,} rows | import, rows/s | find, CPU us | find, us | cold/s, CPU us | cold/s, {_AT_ONCE} at once, CPU us |"
    )
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        cpu, took, one, one_cpu, many, many_cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        cold = f"{one:,.0f}, {one_cpu:.0f} | {many:,.0f}, {many_cpu:.0f}"
        print(f"| {name} | {rates[name]:,.0f} | {cpu:.0f} | {took:.0f} | {cold} |")
    for directory in directories.values():
        await directory.close()


def main() -> None:
    """Starts the servers, measures, ends them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    servers: list[Server] = [Postgres(), Mysql()]
    try:
        for server in servers:
            server.start()
            server.wait()
        with tempfile.TemporaryDirectory() as path:
            uvloop.run(_measure(servers, Path(path), count))
    finally:
        for server in servers:
            server.remove()


if __name__ == "__main__":
    main()
