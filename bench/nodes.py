"""Owns what a node over the network costs: `python -m bench.nodes [MESSAGES] [RUNS]`.

CPU of the asking and of the serving process for each message of 4 KiB, by operations in flight, over mutual TLS 1.3 on the
loopback; beside it the same node in the asking process, by turns in one run, because a shared machine drifts. `bare` is TLS on
this event loop and no more: as many octets there, 24 back, one write a turn. `protocol` is a node that answers at once, so that
only the way to it costs; `store` is a real one, with its disk. What this program adds is the difference of the first two.
"""

from __future__ import annotations

import asyncio
import datetime
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any

import uvloop

from powermail.base.log import NullLog
from powermail.base.tasks import Tasks
from powermail.base.tls import peer_context
from powermail.base.world import system_world
from powermail.cluster.node_link import Where
from powermail.cluster.remote import RemoteNode
from powermail.noded.service import NodeService
from powermail.storage.contract import Chunk, Origin, Position, Receipt, StorageNode
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode

CLUSTER = "00" * 16
IN_FLIGHT = (1, 8, 32, 256)
_OCTETS = 4096
_RECORD = b'{"octets":4096,"sha256":"%s","sizes":[4096],"targets":[{"account":"12345678901234567"}]}' % (b"0" * 64)


_RECEIPT = Receipt("a", "0", Position(1, 128))


class Instant(LocalNode):
    """A node that answers at once and stores nothing."""

    def commit(self, key: bytes, *rest: Any) -> Awaitable[Receipt]:
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        future.set_result(_RECEIPT)
        return future


class Bare(asyncio.BufferedProtocol):
    """Octets over TLS, and what 24 octets mean: at the far end one comes back for each message."""

    def __init__(self, message_octets: int = 0) -> None:
        self.transport: asyncio.Transport | None = None
        self._room = memoryview(bytearray(1 << 20))
        self._octets = 0
        self._each = message_octets or 24
        self._serving = bool(message_octets)
        self._out: list[bytes] = []
        self._waiting: deque[asyncio.Future[None]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        done, self._octets = divmod(self._octets + nbytes, self._each)
        if self._serving and done:
            self._send([bytes(24)] * done)
        elif not self._serving:
            for _ in range(done):
                self._waiting.popleft().set_result(None)

    def ask(self, message: bytes) -> asyncio.Future[None]:
        """Sends a message; done when its 24 octets have come."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._send([message])
        return future

    def _send(self, parts: list[bytes]) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out += parts

    def _flush(self) -> None:
        assert self.transport is not None
        self.transport.write(b"".join(self._out))
        self._out.clear()


_BARE_OCTETS = _OCTETS + len(_RECORD) + 90  # as many as a COMMIT has


async def ask_all(bare: Bare, count: int, in_flight: int) -> float:
    """The same over bare TLS."""
    message = os.urandom(_BARE_OCTETS)
    left = count

    async def one() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await bare.ask(message)

    began = time.process_time()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return time.process_time() - began


def make_node(kind: type[LocalNode], path: str) -> LocalNode:
    """An empty node."""
    world = system_world(NullLog())
    return kind(world, CLUSTER, "a", path, "rack-a", 1, Options(64 << 20, 0), SqliteKeyIndex)


async def put_all(node: StorageNode, count: int, in_flight: int, keys: Any) -> float:
    """Commits so many messages, so many at a time; the CPU seconds of this process."""
    octets = os.urandom(_OCTETS)  # what the caller makes costs the same on every node, and is made before
    messages = [(keys.next(), [Chunk(0, 0, octets, _OCTETS)], bytes(bytearray(_RECORD))) for _ in range(count)]

    async def one() -> None:
        while messages:
            key, chunks, record = messages.pop()
            await node.commit(key, chunks, record, 1, node.stamp(), Origin.DELIVERY)

    began = time.process_time()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return time.process_time() - began


async def serve(path: str) -> None:
    """The serving process: two nodes, and its CPU time for each line it reads."""
    world = system_world(NullLog())
    tasks = Tasks(world.log, _broken)
    made = [make_node(Instant, f"{path}/instant"), make_node(LocalNode, f"{path}/far")]
    ports = []
    context = peer_context(True, f"{path}/node.pem", f"{path}/node.key", f"{path}/authority.pem")
    for node in made:
        await node.initialise()
        await node.open()
        service = NodeService(world, CLUSTER, {"a": node}, tasks, lambda: context, _broken)
        ports.append(await service.listen("127.0.0.1", 0))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Bare(_BARE_OCTETS), "127.0.0.1", 0, ssl=context)
    ports.append(server.sockets[0].getsockname()[1])
    print(*ports, flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(time.process_time(), flush=True)


def _broken(error: BaseException) -> None:
    raise error


async def measure(count: int, runs: int) -> None:
    """All figures, by turns."""
    root = tempfile.mkdtemp(prefix="powermail-bench-nodes-", dir=os.environ.get("POWERMAIL_BENCH_DIR"))
    try:
        certificates(root)
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "bench.nodes", "serve", root], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        ports = [int(word) for word in (await process.stdout.readline()).split()]

        async def far_cpu() -> float:
            process.stdin.write(b"\n")  # type: ignore[union-attr]
            return float(await process.stdout.readline())  # type: ignore[union-attr]

        world = system_world(NullLog())
        context = peer_context(False, f"{root}/front.pem", f"{root}/front.key", f"{root}/authority.pem")
        here = make_node(LocalNode, f"{root}/here")
        await here.initialise()
        nodes: dict[str, StorageNode] = {"local": here}
        loop = asyncio.get_running_loop()
        _, bare = await loop.create_connection(Bare, "127.0.0.1", ports.pop(), ssl=context, server_hostname="")
        for name, port in zip(("protocol", "store"), ports, strict=True):
            nodes[name] = RemoteNode(world, "a", "rack-a", 1, Where(CLUSTER, "127.0.0.1", port, lambda: context))
        for node in nodes.values():
            await node.open()
        figures: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(runs):
            for in_flight in IN_FLIGHT:
                for name in ("bare", *nodes):
                    messages = count if in_flight > 1 else count // 5
                    before = await far_cpu()
                    if name == "bare":
                        cpu = await ask_all(bare, messages, in_flight)
                    else:
                        cpu = await put_all(nodes[name], messages, in_flight, world.keys)
                    far = await far_cpu() - before
                    figures.setdefault((name, in_flight), []).append((1e6 * cpu / messages, 1e6 * far / messages))
        print(f"µs of CPU a message of {_OCTETS} octets, asking + serving; median of {runs} runs of {count} messages")
        print(f"{'in flight':<12}" + "".join(f"{n:>14}" for n in IN_FLIGHT))
        for name in ("bare", "protocol", "store", "local"):
            cells = []
            for n in IN_FLIGHT:
                near, distant = (statistics.median(side) for side in zip(*figures[name, n], strict=True))
                cells.append(f"{near:.1f}" if name == "local" else f"{near:.1f}+{distant:.1f}")
            print(f"{name:<12}" + "".join(f"{cell:>14}" for cell in cells))
        assert bare.transport is not None
        bare.transport.close()
        for node in nodes.values():
            await node.close()
        process.stdin.close()
        await process.wait()
    finally:
        shutil.rmtree(root)


def certificates(root: str) -> None:
    """An authority, a node and a front end."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    signer = ec.generate_private_key(ec.SECP256R1())
    for name, uri in (("authority", ""), ("node", "node/a"), ("front", "front/f")):
        key = ec.generate_private_key(ec.SECP256R1()) if uri else signer
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) if uri else issuer)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
        )
        if uri:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"powermail://{CLUSTER}/{uri}")])
            builder = builder.add_extension(names, critical=False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made = builder.sign(signer, hashes.SHA256())
        with open(f"{root}/{name}.pem", "wb") as file:
            file.write(made.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        with open(f"{root}/{name}.key", "wb") as file:
            file.write(key.private_bytes(*form))


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)  # as the server has it
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(sys.argv[2]))
    else:
        words = [int(word) for word in sys.argv[1:]]
        uvloop.run(measure(*(words + [20_000, 5][len(words) :])))
