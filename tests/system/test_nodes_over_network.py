"""One front end and three node processes: `powermail serve` delivers to nodes of other processes and reads back from them."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.settings import load
from tests.noded.certificates import Authority, uris
from tests.system.process import START_S, Served, command, make

NODES = {"a": "rack-a", "b": "rack-b", "c": "rack-c"}


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


class NodeServed:
    """`powermail serve --roles node` for one node."""

    def __init__(self, name: str, data: Path, disk: Path, authority: Authority, cluster: str) -> None:
        self.port = free_port()
        self.data = data
        self.environment: dict[str, str] | None = None  # of another program than this tree's
        self._log = data / "log"
        self._process: asyncio.subprocess.Process | None = None
        certificate, key = authority.issue(*uris(cluster, name, "node"))
        data.mkdir()
        (data / "powermail.toml").write_text(
            f'hostname = "node-{name}.example"\n[cluster]\ncopies_required = 1\nsegment_octets = {limits.MIB}\n'
            f'[[cluster.nodes]]\nid = "{name}"\npath = "{disk}"\ngroup = "{NODES.get(name, f"rack-{name}")}"\n'
            f'[peers]\nlisten = ["127.0.0.1:{self.port}"]\ncertificate = "{certificate}"\nkey = "{key}"\n'
            f'authority = "{authority.path}"\n'
        )

    async def start(self) -> None:
        """Starts it; it listens then."""
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "powermail", "serve", "--roles", "node", "--data", str(self.data)],
                *["--set", "log.json=true", "--set", "cluster.reserve_octets=0"],
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        ends_at = time.monotonic() + START_S
        while b'"event":"listening"' not in self._log.read_bytes():
            assert time.monotonic() < ends_at and self._process.returncode is None, self._log.read_text()
            await asyncio.sleep(0.02)

    @property
    def begun(self) -> bool:
        """True once it was started."""
        return self._process is not None

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the end; the exit status."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(limits.DRAIN_TIMEOUT_S):
            return await self._process.wait()


@asynccontextmanager
async def cluster_of_processes(root: Path) -> AsyncIterator[tuple[Served, dict[str, NodeServed]]]:
    """A front end with its index, and three nodes served by processes of their own."""
    data = root / "front"
    await asyncio.to_thread(make, data)
    cluster = msgspec.json.decode((data / "nodes/a/identity").read_bytes())["cluster"]
    authority = Authority(root)
    nodes = {name: NodeServed(name, root / f"node-{name}", data / "nodes" / name, authority, cluster) for name in NODES}
    certificate, key = authority.issue(*uris(cluster, "front-1", "front", "keeper", "operator"))
    lines = ['hostname = "front.example"', "[cluster]", "copies_required = 2"]
    for name, node in nodes.items():
        lines += ["[[cluster.nodes]]", f'id = "{name}"', f'address = "127.0.0.1:{node.port}"', f'group = "{NODES[name]}"']
    lines += ["[peers]", f'certificate = "{certificate}"', f'key = "{key}"', f'authority = "{authority.path}"']
    (data / "powermail.toml").write_text("\n".join(lines) + "\n")
    front = Served(data)
    try:
        await asyncio.gather(*(node.start() for node in nodes.values()))
        await front.start()
        yield front, nodes
        await front.stop()
        assert {await node.end(signal.SIGTERM) for node in nodes.values()} <= {0, -signal.SIGKILL}
    finally:
        await front.kill()
        for node in nodes.values():
            await node.end(signal.SIGKILL)


BLIP_S = 5.0  # P20: how long a group that goes down may hold up receiving


async def states(front: Served) -> dict[str, str]:
    """Node to state, as the front end sees it."""
    found = await front.operation("node_list")
    assert isinstance(found, list)
    return {node["id"]: node["state"] for node in found}


async def until_state(front: Served, name: str, state: str) -> None:
    """Waits until the front end sees a node in that state."""
    async with asyncio.timeout(START_S):
        while (await states(front))[name] != state:
            await asyncio.sleep(0.05)


async def test_mail_goes_to_nodes_of_other_processes_and_comes_back_when_one_is_killed(tmp_path: Path) -> None:
    """P1, P3, P20: acknowledged on two of three groups, whichever is there, and read from whichever has it."""
    async with cluster_of_processes(tmp_path) as (front, nodes):
        assert await states(front) == dict.fromkeys(NODES, "read-write")
        await front.mailbox("ann@front.example")
        bodies = [b"Subject: %d\r\n\r\n" % number + b"text of %d\r\n" % number * 9000 * (number % 2) for number in range(12)]
        for body in bodies[:4]:
            assert (await front.send(["ann@front.example"], body.removesuffix(b"\r\n"))).startswith("250")
        await nodes["b"].end(signal.SIGKILL)
        for body in bodies[4:8]:
            began = time.monotonic()
            assert (await front.send(["ann@front.example"], body.removesuffix(b"\r\n"))).startswith("250")
            assert time.monotonic() - began < 30
        assert await front.read("ann@front.example") == bodies[:8]
        await until_state(front, "b", "missing")
        await nodes["b"].start()
        await until_state(front, "b", "read-write")
        await nodes["a"].end(signal.SIGKILL)
        for body in bodies[8:]:
            async with asyncio.timeout(BLIP_S):
                while not (await front.send(["ann@front.example"], body.removesuffix(b"\r\n"))).startswith("250"):
                    await asyncio.sleep(0.05)  # refused for now before DATA: one group is down, and one has just come back
        assert await front.read("ann@front.example") == bodies


def test_a_node_process_says_what_is_wrong(tmp_path: Path) -> None:
    """One line, and the exit status of a mistake."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "powermail.toml").write_text(
        '[[cluster.nodes]]\nid = "a"\npath = "a"\ngroup = "x"\n[cluster]\ncopies_required = 1\n'
    )
    done = command("serve", "--roles", "node", "--data", str(data))
    assert done.returncode == 2 and "are the disks mounted?" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ('path = "a"\naddress = "127.0.0.1:1"', "either a path or an address"),
        ("", "either a path or an address"),
        ('address = "nowhere"', "not host:port"),
    ],
)
def test_a_node_lies_here_or_elsewhere(node: str, why: str) -> None:
    with pytest.raises(OperatorError, match=why):
        load(f'[[cluster.nodes]]\nid = "a"\ngroup = "x"\n{node}\n[cluster]\ncopies_required = 1\n', {}, ())
