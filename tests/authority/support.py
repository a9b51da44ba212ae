"""An authority on the loopback with an index in memory, and machines that want to join it."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from powermail.authority.asking import Joined, join
from powermail.authority.registrar import Registrar
from powermail.authority.service import AuthorityService
from powermail.base.certificates import Authority, as_pem, make_authority, make_key, make_request, pin_of
from powermail.base.clock import SystemClock
from powermail.base.log import MemoryLog
from powermail.base.tasks import Tasks
from powermail.base.tls import PeerCertificate
from powermail.base.world import World, system_world
from powermail.index.memory import MemoryIndex
from powermail.index.sharing import Invitation
from powermail.wire import enrolment as forms

CLUSTER = "ours"
SOON_S = 10.0
DAY_S = 86_400.0


class SetClock(SystemClock):
    """The machine's clock, ahead or behind."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now(self) -> float:
        return SystemClock.now() + self.ahead_s


class Machine:
    """A machine with a key; what it was given as files."""

    def __init__(self, world: World, directory: Path, key: bytes | None = None) -> None:
        self.world = world
        self.directory = directory
        self.key = key or make_key()
        self.request = make_request(self.key)

    def keep(self, joined: Joined) -> PeerCertificate:
        """Writes down what it got."""
        return self.write(joined.issued.certificate, joined.authority)

    def write(self, certificate: bytes, authority: bytes) -> PeerCertificate:
        """Writes a certificate of its key down."""
        self.directory.mkdir(exist_ok=True)
        paths = (f"{self.directory}/peer.pem", f"{self.directory}/peer.key", f"{self.directory}/authority.pem")
        for path, octets in zip(paths, (as_pem(certificate), self.key, as_pem(authority)), strict=True):
            self.world.disk.replace_file(path, octets)
        return PeerCertificate(paths, self.world.disk, self.world.log)


class Office:
    """The authority, its index and its listener."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = SetClock()
        self.log = MemoryLog()
        self.world = system_world(self.log)
        self.world.clock = self.clock
        self.index = MemoryIndex(self.world)
        now = self.clock.now()
        self.certificate, self.key = make_authority(CLUSTER, now - 400 * DAY_S)
        self.authority = Authority(self.certificate, self.key)
        self.pin = pin_of(self.certificate)
        self.registrar = Registrar(self.world, self.index, self.authority, {"cluster.copies_required": "3"}, {"srs.keys": b"k"})
        mine = self.machine("office")
        self.own = mine.write(self.issue("first", "authority", key=mine.key), self.certificate)
        self.greeting = forms.Greeting(forms.FIRST, forms.LAST, CLUSTER, self.authority.der)
        self.broken: list[BaseException] = []
        self.port = 0
        self._services: list[AuthorityService] = []
        self._tokens = 0

    def machine(self, name: str = "machine") -> Machine:
        """A machine with a directory of that name."""
        return Machine(self.world, self.directory / name)

    def issue(self, identity: str, *roles: str, key: bytes, begun_days_ago: float = 0.0, days: float = 90.0) -> bytes:
        """A certificate as this authority makes them, whenever that was."""
        uris = [f"powermail://{CLUSTER}/{role}/{identity}" for role in roles]
        return self.authority.issue(make_request(key), identity, uris, self.clock.now() - begun_days_ago * DAY_S, days)

    async def open(self, context: ssl.SSLContext | None = None, port: int = 0) -> AuthorityService:
        """Listens."""
        give = self.own.joining if context is None else lambda: context
        service = AuthorityService(self.world, self.registrar, self.greeting, give, Tasks(self.log, self.broken.append))
        self.port = await service.listen("127.0.0.1", port)
        self._services.append(service)
        return service

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def invite(self, identity: str = "front-1", *roles: str, seconds: float = 3600.0, **more: object) -> forms.Token:
        """A token for that machine."""
        self._tokens += 1
        token = forms.Token(self.pin, f"{self._tokens:016x}", self.world.entropy.octets(forms.SECRET_OCTETS))
        secret = hashlib.sha256(token.secret).digest()
        invitation = Invitation(token.id, secret, identity, roles or ("front", "keeper"), **more)  # type: ignore[arg-type]
        await self.index.invite(invitation, seconds)
        return token

    async def join(self, token: forms.Token, machine: Machine, address: str = "", site: str = "") -> Joined:
        """The machine joins."""
        return await join(machine.world, self.address, token, machine.key, machine.request, address, site)

    def refused(self, why: str) -> int:
        """How often that was refused."""
        return self.world.counters.get(f"authority.refused.{why}")

    async def close(self) -> None:
        """Clears away."""
        for service in self._services:
            await service.close()
        self._services.clear()
        assert not self.broken
        assert not [line for line in self.log.lines if line.startswith("ERROR   bug")]


@asynccontextmanager
async def office(directory: Path) -> AsyncIterator[Office]:
    """One that listens."""
    made = Office(directory)
    await made.index.open(CLUSTER)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


class Listening(asyncio.Protocol):
    """Somebody else who listens: greets as he likes, and remembers what is sent to him."""

    def __init__(self, greeting: bytes) -> None:
        self.heard = b""
        self.ended = asyncio.Event()
        self.connected = asyncio.Event()
        self._greeting = greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connected.set()
        transport.write(self._greeting)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
