"""Owns an installation of several processes on a real PostgreSQL: front ends, a keeper and a node process under one parent."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

import msgspec

from powermail.admin.control import NotRunning, ask_any
from powermail.base import limits
from tests.noded.certificates import Authority, uris
from tests.system.conftest import Client, Place
from tests.system.process import FREE, START_S, command, make

GROUPS = {"a": "rack-a", "b": "rack-b", "c": "rack-c"}


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


class Several(Place):
    """`powermail serve` with a process for each role."""

    start_s = START_S

    def __init__(self, data: Path, roles: str, *more: str) -> None:
        self.data = data
        self.clients: list[Client] = []
        self._words = ["--roles", roles, *more]
        self._doors = "front" in roles
        self.environment: dict[str, str] | None = None  # of another program than this tree's
        self._log: IO[bytes] | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> Path:
        """What all its processes say."""
        return self.data.with_name(f"{self.data.name}.log")

    async def start(self) -> None:
        """Starts it; all parts are ready then."""
        self._log = self.log.open("wb")
        self._process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "powermail", "serve", "--data", str(self.data), "--set", "log.json=true"],
            *[*FREE, "--set", "cluster.reserve_octets=0", *self._words],
            stdout=self._log,
            stderr=self._log,
            env=self.environment,
        )
        ends_at = time.monotonic() + self.start_s
        while b"PowerMail is ready" not in self.log.read_bytes():
            assert time.monotonic() < ends_at and self._process.returncode is None, self.log.read_text()
            await asyncio.sleep(0.02)

    @property
    def begun(self) -> bool:
        """True once it was started."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The parent."""
        assert self._process is not None
        return self._process.pid

    def events(self, name: str) -> list[dict[str, Any]]:
        """What was logged of one kind, by all processes."""
        said = b'"event":"%b"' % name.encode()
        lines = [line for line in self.log.read_bytes().splitlines() if line.startswith(b"{") and said in line]
        return [event for line in lines if (event := msgspec.json.decode(line))["event"] == name]

    def port(self, door: str) -> int:
        return next(int(one["address"].rpartition(":")[2]) for one in self.events("listening") if one["door"] == door)

    async def operation(self, name: str, **arguments: object) -> object:
        async def unseen(done: int, total: int) -> None:
            pass

        async with asyncio.timeout(START_S):
            while True:
                try:
                    return msgspec.json.decode(await ask_any(str(self.data), name, dict(arguments), unseen))
                except NotRunning:
                    await asyncio.sleep(0.05)

    async def processes(self) -> dict[str, dict[str, Any]]:
        """The processes of the cluster by part, as the status shows them."""
        return {one["process"]: one for one in (await self.status())["processes"]}

    async def jobs(self) -> dict[str, int]:
        """Job to the process that does it."""
        return {one["job"]: one["pid"] for one in (await self.status())["jobs"]}

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends the parent; its exit status."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        assert self._process is not None and self._log is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(limits.DRAIN_TIMEOUT_S + 10):
            status = await self._process.wait()
        self._log.close()
        return status


def lives(pid: int) -> bool:
    """True until it has ended, whoever is to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def make_several(root: Path, database: str) -> tuple[Path, Path]:
    """Two data directories of one cluster: of a machine with nodes, and of one that may keep only."""
    data = root / "first"
    await asyncio.to_thread(make, data)
    cluster = msgspec.json.decode((data / "nodes/a/identity").read_bytes())["cluster"]
    authority = Authority(root)
    certificate, key = authority.issue(
        *uris(cluster, "first", "front", "keeper", "operator"), *(uri for name in GROUPS for uri in uris(cluster, name, "node"))
    )
    port = free_port()
    rest = [
        "[peers]",
        *[f'listen = ["127.0.0.1:{port}"]', f'certificate = "{certificate}"', f'key = "{key}"'],
        f'authority = "{authority.path}"',
        *["[index]", f'database = "{database}"'],
    ]

    def lines(where: str) -> str:
        head = ['hostname = "local.example"', "[cluster]", "copies_required = 2", f"segment_octets = {limits.MIB}"]
        for name, group in GROUPS.items():
            head += ["[[cluster.nodes]]", f'id = "{name}"', where.format(name=name), f'group = "{group}"']
        return "\n".join([*head, *rest]) + "\n"

    (data / "powermail.toml").write_text(lines('path = "nodes/{name}"'))
    done = await asyncio.to_thread(command, "index", "migrate", "--data", str(data))
    assert done.returncode == 0, done.stderr
    second = root / "second"
    second.mkdir()
    (second / "powermail.toml").write_text(
        lines(f'address = "127.0.0.1:{port}"') + f'[directory]\npath = "{data}/directory.db"\n'
    )
    return data, second
