"""Serves a node to tests: an authority, a service on the loopback, our client, and a raw peer that says what it likes."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from powermail.base.log import MemoryLog
from powermail.base.tasks import Tasks
from powermail.base.world import World, system_world
from powermail.cluster.node_link import Where
from powermail.cluster.remote import RemoteNode
from powermail.noded.service import NodeService
from powermail.sim.memory import MemoryNode
from powermail.wire.node_frames import FrameReader
from powermail.wire.node_server import ACK
from powermail.wire.node_verbs import BY_NUMBER
from tests.noded.certificates import Authority, uris
from tests.noded.speaking import frame, hello

CLUSTER = "ours"
SOON_S = 10.0
Said = tuple[str, int, Any, Any]


class Raw:
    """A peer that speaks frames as they are given to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self._frames = FrameReader()
        self._said: list[Said] = []

    def say(self, *frames: bytes) -> None:
        """Sends octets."""
        self.writer.write(b"".join(frames))

    async def hear(self, *verbs: str) -> Said:
        """The next frame of one of these verbs; others are passed over. Raises EOFError when the node has closed."""
        async with asyncio.timeout(SOON_S):
            while True:
                while self._said:
                    said = self._said.pop(0)
                    if said[0] in (verbs or ("REPLY", "ERROR", "ACKS", "GOAWAY")):
                        return said
                octets = await self._reader.read(1 << 16)
                if not octets:
                    raise EOFError
                for verb, _, number, meta, body in self._frames.feed(octets):
                    name = BY_NUMBER[verb].name
                    rest: Any = [*ACK.iter_unpack(body)] if name == "ACKS" else body
                    self._said.append((name, number, msgspec.msgpack.decode(meta) if meta else None, rest))

    async def end(self) -> list[Said]:
        """All that is still said until the node closes."""
        said = []
        while True:
            try:
                said.append(await self.hear())
            except (EOFError, ConnectionError, ssl.SSLError):
                return said

    async def hello(self, session: int = 1, lane: int = 0, **other: Any) -> Said:
        """Says HELLO; the answer."""
        self.say(frame("HELLO", 1, hello(session, lane, cluster=other.pop("cluster", CLUSTER), **other)))
        return await self.hear()

    def close(self) -> None:
        """Closes."""
        self.writer.close()


class Installation:
    """One node `a` in memory, its service, and who may come."""

    def __init__(self, directory: Path) -> None:
        self.world: World = system_world(MemoryLog())
        self.authority = Authority(directory)
        self.foreign = Authority(directory, "foreign")
        self.node = MemoryNode("a", "rack-a", 1, self.world.clock.monotonic)
        self.broken: list[BaseException] = []
        self.tasks = Tasks(self.world.log, self.broken.append)
        self.port = 0
        self._raws: list[Raw] = []
        self._remotes: list[RemoteNode] = []

    async def serve(self, context: ssl.SSLContext | None = None, port: int = 0) -> NodeService:
        """Begins to serve."""
        context = context or self.authority.server(*uris(CLUSTER, "a", "node"))
        self.service = NodeService(self.world, CLUSTER, {"a": self.node}, self.tasks, lambda: context, self.broken.append)
        self.port = await self.service.listen("127.0.0.1", port)
        return self.service

    def client(self, peer: str = "front-1", *roles: str, **other: datetime.timedelta) -> ssl.SSLContext:
        """The context of a peer."""
        return self.authority.client(*uris(CLUSTER, peer, *(roles or ("front",))), **other)

    async def raw(self, context: ssl.SSLContext | None = None) -> Raw:
        """A raw peer, connected."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context or self.client(), server_hostname="")
        made = Raw(reader, writer)
        self._raws.append(made)
        return made

    async def welcomed(self, peer: str = "front-1", *roles: str, session: int = 1, lane: int = 0, **other: Any) -> Raw:
        """A raw peer whose HELLO was answered."""
        raw = await self.raw(self.client(peer, *roles))
        answer = await raw.hello(session, lane, **other)
        assert answer[0] == "REPLY", answer
        return raw

    def remote(self, peer: str = "front-1", *roles: str, context: ssl.SSLContext | None = None) -> RemoteNode:
        """Our client of the node."""
        made = context or self.client(peer, *roles)
        node = RemoteNode(self.world, "a", "rack-a", 1, Where(CLUSTER, "127.0.0.1", self.port, lambda: made))
        self._remotes.append(node)
        return node

    def asked(self) -> list[str]:
        """What the node was asked, but for what its service asks by itself."""
        return [call for call in self.node.calls if call != "facts"]

    def refused(self, why: str) -> int:
        """How often that was refused."""
        return self.world.counters.get(f"noded.refused.{why}")

    async def end(self) -> None:
        """Clears away."""
        for remote in self._remotes:
            await remote.close()
        for raw in self._raws:
            raw.close()
        self.node.release()
        await self.service.close(0.5)
        await self.tasks.drain(5.0)
        assert not self.broken
        assert not [line for line in self.world.log.lines if line.startswith("bug")]  # type: ignore[attr-defined]
        await self.node.close()


@asynccontextmanager
async def installation(directory: Path) -> AsyncIterator[Installation]:
    """An installation with an open node."""
    made = Installation(directory)
    await made.node.open()
    await made.serve()
    try:
        yield made
    finally:
        await made.end()


async def until(true: Any) -> None:
    """Waits until it is so."""
    async with asyncio.timeout(SOON_S):
        while not true():
            await asyncio.sleep(0.005)


async def liar(
    there: Installation, answer: Callable[[str, int, asyncio.StreamWriter], bytes], pings: bool = False
) -> asyncio.Server:
    """A node with a good certificate that answers HELLO well, PING too but with `pings`, and everything else as it is told."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()
        try:
            while octets := await reader.read(1 << 16):
                for verb, _, number, _, _ in frames.feed(octets):
                    name = BY_NUMBER[verb].name
                    if name == "HELLO":
                        stat = ["read-write", "", "inc", 1, 1, 1, 1, 1, 1, 0, 0, 0.0, 0.0]
                        writer.write(
                            frame("REPLY", number, [1, CLUSTER, "a", "inc", 0, 4 << 20, 1024]) + frame("STAT", 0, stat)
                        )
                    elif name == "PING" and not pings:
                        writer.write(frame("REPLY", number, ["boot", 1.0]))
                    else:
                        writer.write(answer(name, number, writer))
        except ConnectionError:
            pass  # it was cut
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0, ssl=there.authority.server(*uris(CLUSTER, "a", "node")))
    there.port = server.sockets[0].getsockname()[1]
    return server
