"""Measures size: a directory of 1,000,000 mailboxes and 1,000,000 forwards, a node of 1,000,000 messages.

`python -m bench.scale` takes some minutes and some gigabytes below the temporary directory; `--quick` does a tenth, `node` or
`directory` only that.
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

import uvloop

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


async def directory(count: int) -> None:
    """Imports `count` mailboxes and as many forwards into a running server, then asks for some by RCPT."""
    server = Server(2)
    await server.command("init", "--hostname", "scale.example")
    await server.serve()
    pid = server.roots()[0]
    try:
        path = f"{server.root}/rows"
        with open(path, "w", encoding="ascii") as file:  # noqa: ASYNC230
            for number in range(count):
                file.write(f'{{"address":"u{number}@scale.example","password":"{{plain}}secret"}}\n')
                file.write(f'{{"address":"f{number}@scale.example","forward":["u{number}@scale.example"]}}\n')
        empty = machine.resident_octets(pid)
        began = time.perf_counter()
        await server.command("account", "import", path)
        took = time.perf_counter() - began
        full = machine.resident_octets(pid)
        print(f"directory: {2 * count} rows imported in {took:.1f} s, {2 * count / took:.0f} a second", flush=True)
        took_each = await look_up(server.ports["smtp"], count, 20_000)
        p50, p99 = (statistics.quantiles(took_each, n=100)[n] * 1000 for n in (49, 98))
        after = machine.resident_octets(pid)
        print(
            f"directory: RCPT answered in {p50:.2f} ms (median), {p99:.2f} ms (p99), every one a first look; memory of the"
            f" process {empty / 1e6:.0f} MB empty, {full / 1e6:.0f} MB behind the import, {after / 1e6:.0f} MB after",
            flush=True,
        )
    finally:
        await server.stop()


async def look_up(port: int, count: int, looks: int) -> list[float]:
    """Seconds from RCPT to its reply, for addresses that nobody has asked for before."""
    chance = random.Random(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(line: bytes) -> bytes:
        writer.write(line + b"\r\n")
        while (reply := await reader.readline())[3:4] == b"-":
            pass
        return reply

    await reader.readline()
    await ask(b"EHLO bench.example")
    took = []
    for number in range(looks):
        if number % 500 == 0:
            await ask(b"RSET")
            assert (await ask(b"MAIL FROM:<a@b.example>")).startswith(b"250")
        kind = b"uf"[number % 2 : number % 2 + 1]
        began = time.perf_counter()
        reply = await ask(b"RCPT TO:<%s%d@scale.example>" % (kind, chance.randrange(count)))
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
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    chosen = parser.parse_args()
    size = 100_000 if chosen.quick else 1_000_000
    if chosen.what != "node":
        uvloop.run(directory(size))
    if chosen.what != "directory":
        node(size)
