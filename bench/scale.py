"""Measures size: a directory of 1,000,000 mailboxes and 1,000,000 forwards, a node of 1,000,000 messages.

`python -m bench.scale` takes some minutes and some gigabytes below the temporary directory; `--rows N` takes another number,
`node` or `directory` does only that. `directory --postgresql` has its accounts in a PostgreSQL of this run, durable, below the
temporary directory too: there the first and the last of them are imported as an operator does it, and those between are
inserted by SQL, as he may.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence

import uvloop
from tests.servers import Database, Postgres

from bench import machine
from bench.ours import Server
from powermail.base.disk import SystemDisk
from powermail.base.entropy import KeySource, SystemEntropy
from powermail.storage.contract import Chunk, Position
from powermail.storage.identity import make_store
from powermail.storage.log import record as rec
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import Operation

_CLUSTER = "00" * 16
_FILE_ROWS = 20_000  # mailboxes of one file to be imported, with as many forwards: `account import` reads a file whole
_INSERT_ROWS = 50_000  # the same of one INSERT
_LOOKS = 10_000  # that are measured
_TRIES, _PAUSE_S = 20, 5.0  # of a command, where a busy machine leaves the server no time to answer
_WARMING = 5_000  # looks before them
# As an operator would set it on a machine of this size, and durable.
_POSTGRES = {
    "fsync": "on",
    "shared_buffers": "2GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "autovacuum": "on",
}


class _Large(Postgres):
    """A server that is given time: it is measured, not tried."""

    call_s = 3600.0


async def directory(count: int, postgresql: bool) -> None:
    """Imports `count` mailboxes and as many forwards into a running server, then asks for some by RCPT."""
    server = Server(2)
    await server.command("init", "--hostname", "scale.example")
    postgres, database = None, None
    try:
        if postgresql:
            postgres = _Large(options=_POSTGRES, place=tempfile.gettempdir())
            postgres.start()
            await postgres.ready()
            database = postgres.create()
            with open(f"{server.data}/powermail.toml", "a", encoding="utf-8") as settings:  # noqa: ASYNC230
                settings.write(f'\n[directory]\nbackend = "postgresql"\ndatabase = "{database.url}"\n')
            await server.command("directory", "init")
        await server.serve()
        try:
            await _measure_directory(server, postgres, database, count)
        finally:
            await server.halt()
        print(f"directory: {_size(server, database)}", flush=True)
    finally:
        if postgres is not None:
            postgres.remove()
        shutil.rmtree(server.root)


async def _measure_directory(server: Server, postgres: Postgres | None, database: Database | None, count: int) -> None:
    (pid,) = server.roots()
    serving = [pid, *(postgres.processes()[:1] if postgres is not None else [])]
    empty = machine.resident_octets(pid)
    if database is None or count <= 2 * _FILE_ROWS:
        await _import(server, serving, range(count))
    else:
        await _import(server, serving, range(_FILE_ROWS))
        await _insert(database, range(_FILE_ROWS, count - _FILE_ROWS))
        await _import(server, serving, range(count - _FILE_ROWS, count))
        await _settle(database)
    full, peak = machine.resident_octets(pid), machine.resident_octets(pid, peak=True)
    chance = random.Random(1)
    await look_up(server.ports["smtp"], [_address(chance, count) for _ in range(_WARMING)])
    asked = [_address(chance, count) for _ in range(_LOOKS)]
    for what in ("every one a first look", "asked again"):
        before = machine.cpu_s(serving)
        took_each = await look_up(server.ports["smtp"], asked)
        used = (machine.cpu_s(serving) - before) / _LOOKS * 1e6
        p50, p99 = (statistics.quantiles(took_each, n=100)[n] * 1000 for n in (49, 98))
        print(
            f"directory: RCPT answered in {p50:.2f} ms (median), {p99:.2f} ms (p99), {used:.0f} us of CPU of the server and its"
            f" database, {what}; load {os.getloadavg()[0]:.0f}",
            flush=True,
        )
    after = machine.resident_octets(pid)
    print(
        f"directory: memory of the process {empty / 1e6:.0f} MB empty, {full / 1e6:.0f} MB behind the import (at most"
        f" {peak / 1e6:.0f}), {after / 1e6:.0f} MB after the looks",
        flush=True,
    )


async def _import(server: Server, serving: Sequence[int], numbers: range) -> None:
    """By `account import`, a file after the other; `serving` are the processes whose CPU it takes."""
    took, before = 0.0, machine.cpu_s(serving)
    for start in range(numbers.start, numbers.stop, _FILE_ROWS):
        path = f"{server.root}/rows"
        with open(path, "w", encoding="ascii") as file:  # noqa: ASYNC230
            for number in range(start, min(numbers.stop, start + _FILE_ROWS)):
                file.write(f'{{"address":"u{number}@scale.example","password":"{{plain}}secret"}}\n')
                file.write(f'{{"address":"f{number}@scale.example","forward":["u{number}@scale.example"]}}\n')
        took += await _command(server, "account", "import", path)
    used = machine.cpu_s(serving) - before
    _said(f"imported with {used / (2 * len(numbers)) * 1e6:.0f} us of CPU each, of the server and its database,", numbers, took)


async def _command(server: Server, *words: str) -> float:
    """Seconds that a command took, of the try that succeeded."""
    for left in reversed(range(_TRIES)):
        began = time.perf_counter()
        try:
            await server.command(*words)
            break
        except AssertionError:
            if not left:
                raise
            await asyncio.sleep(_PAUSE_S)
    return time.perf_counter() - began


async def _insert(database: Database, numbers: range) -> None:
    """By the database's own client."""
    began = time.perf_counter()
    for start in range(numbers.start, numbers.stop, _INSERT_ROWS):
        series = f"generate_series({start}, {min(numbers.stop, start + _INSERT_ROWS) - 1}) AS n"
        mailboxes = f"SELECT 'u' || n || '@scale.example', '{{plain}}secret', '' FROM {series}"
        forwards = f"SELECT 'f' || n || '@scale.example', '', 'u' || n || '@scale.example' FROM {series}"
        statement = f"INSERT INTO accounts (address, password, forward) {mailboxes} UNION ALL {forwards}"
        await asyncio.to_thread(database.sql, statement)
    _said("inserted by SQL", numbers, time.perf_counter() - began)


async def _settle(database: Database) -> None:
    """What the database does by itself in the minutes behind an import: a warm server has done it."""
    began = time.perf_counter()
    for statement in ("VACUUM (ANALYZE) accounts", "CHECKPOINT"):
        await asyncio.to_thread(database.sql, statement)
    print(f"directory: vacuumed, analysed and written out in {time.perf_counter() - began:.1f} s", flush=True)


def _said(how: str, numbers: range, took: float) -> None:
    rows = 2 * len(numbers)
    there = f"{2 * numbers.stop} are there, load {os.getloadavg()[0]:.0f}"
    print(f"directory: {rows} rows {how} in {took:.1f} s, {rows / took:.0f} a second; {there}", flush=True)


def _size(server: Server, database: Database | None) -> str:
    """What lies on disk."""
    if database is None:
        return f"{os.path.getsize(f'{server.data}/directory.db') / 1e6:.0f} MB on disk"
    each = "SELECT indexrelname, pg_relation_size(indexrelid) FROM pg_stat_user_indexes WHERE relname = 'accounts' ORDER BY 1"
    sizes = [f"{name} {int(octets) / 1e6:.0f} MB" for name, octets in map(str.split, database.sql(each).splitlines())]
    rows = int(database.sql("SELECT pg_table_size('accounts')"))
    whole = int(database.sql("SELECT pg_total_relation_size('accounts')"))
    return f"{whole / 1e6:.0f} MB on disk: rows {rows / 1e6:.0f} MB, indexes {', '.join(sizes)}"


def _address(chance: random.Random, count: int) -> bytes:
    """Of a mailbox or of a forward."""
    return b"%c%d@scale.example" % (chance.choice(b"uf"), chance.randrange(count))


async def look_up(port: int, addresses: Sequence[bytes]) -> list[float]:
    """Seconds from RCPT to its reply for each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(line: bytes) -> bytes:
        writer.write(line + b"\r\n")
        while (reply := await reader.readline())[3:4] == b"-":
            pass
        return reply

    await reader.readline()
    await ask(b"EHLO bench.example")
    took = []
    for number, address in enumerate(addresses):
        if number % 500 == 0:
            await ask(b"RSET")
            assert (await ask(b"MAIL FROM:<a@b.example>")).startswith(b"250")
        began = time.perf_counter()
        reply = await ask(b"RCPT TO:<%s>" % address)
        took.append(time.perf_counter() - began)
        assert reply.startswith(b"250"), reply
    writer.close()
    return took


def node(count: int) -> None:
    """Fills a node and opens it, clean and behind a kill."""
    path = tempfile.mkdtemp(prefix="powermail-scale-")
    try:
        disk, keys = SystemDisk(), KeySource(time.time, SystemEntropy())
        shutil.rmtree(path)
        make_store(disk, path, _CLUSTER, "a", SystemEntropy())
        store = _open(disk, path)
        body = os.urandom(500)
        commit = (
            b'{"octets":500,"sha256":"%s","sizes":[500],"received_at":1.5,"reverse_path":"","targets":[{"account":"7"}]}'
            % (hashlib.sha256(body).hexdigest().encode())
        )
        began = time.perf_counter()
        for start in range(0, count, 200):
            batch = [
                Operation(rec.COMMIT, keys.next(), [Chunk(0, 0, body, 500)], commit, 1) for _ in range(min(200, count - start))
            ]
            assert all(isinstance(outcome, Position) for outcome in store.write(batch))
            while store.due() and store.settle():
                pass
        took = time.perf_counter() - began
        print(f"node: {count} messages of 500 octets written in {took:.1f} s, {count / took:.0f} a second", flush=True)
        shutil.copytree(path, f"{path}-killed")  # as a kill leaves it: the key index is behind
        store.close()
        for name, what in ((path, "clean"), (f"{path}-killed", "behind a kill")):
            began = time.perf_counter()
            used = time.process_time()
            store = _open(disk, name)
            took, used = time.perf_counter() - began, time.process_time() - used
            assert store.messages() == count
            print(
                f"node: opened {what} in {took:.2f} s, {used:.2f} s of CPU, {store.recovery.records} records read", flush=True
            )
            store.close()
    finally:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(f"{path}-killed", ignore_errors=True)


def _open(disk: SystemDisk, path: str) -> SegmentStore:
    return SegmentStore.open(disk, path, _CLUSTER, "a", SqliteKeyIndex, Options(), time.monotonic)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description="A large directory and a large node.")
    parser.add_argument("what", nargs="?", choices=("directory", "node"), help="only that")
    parser.add_argument("--rows", type=int, default=1_000_000, help="mailboxes, and as many forwards; messages of the node")
    parser.add_argument("--postgresql", action="store_true", help="accounts in a PostgreSQL of this run")
    chosen = parser.parse_args()
    if chosen.what != "node":
        uvloop.run(directory(chosen.rows, chosen.postgresql))
    if chosen.what != "directory":
        node(chosen.rows)
