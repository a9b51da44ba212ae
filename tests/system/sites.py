"""Owns two sites on the loopback, each with nodes, a front end and a keeper, and the lines between them, which a test may cut.

A line that is cut says nothing: what is sent waits, as it does in a network that drops packets, and goes on its way when the
line is whole again, whatever has happened meanwhile. In which site an end of a connection is, is told by the process that has
it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from powermail.base import limits
from tests.noded.certificates import Authority, uris
from tests.servers import Database
from tests.system.process import START_S, command
from tests.system.several import Several, free_port

SITES = {"north": ("a", "b"), "south": ("c", "d")}  # the database is in the north
SITE_OF = {node: site for site, nodes in SITES.items() for node in nodes}


class Lines:
    """All that leads to one port: who comes from another site comes over a line between the two."""

    def __init__(self, site: str, to: int, whole: asyncio.Event, fronts: dict[str, Several], whose: str = "") -> None:
        """`site` is where that port is, `fronts` who may come, `whose` the site of all of them, if they are of one."""
        self._whose = whose
        self.port = free_port()
        self.late_s = 0.0  # how long what comes from another site, or goes there, is under way
        self._site = site
        self._to = to
        self._whole = whole
        self._fronts = fronts
        self._tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        """Begins."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.append(writer)
        own = writer.get_extra_info("sockname")[1]
        port = writer.get_extra_info("peername")[1]
        site = self._whose or await asyncio.to_thread(site_of_client, self._fronts, port, own)
        between = site != self._site
        if between:
            await self._whole.wait()
        there = await asyncio.open_connection("127.0.0.1", self._to)
        self._ends.append(there[1])
        create = asyncio.get_running_loop().create_task
        self._tasks += [create(self._carry(reader, there[1], between)), create(self._carry(there[0], writer, between))]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, between: bool) -> None:
        later = asyncio.get_running_loop().call_later
        with suppress(ConnectionError):  # either end has gone
            while octets := await reader.read(1 << 16):
                if between:
                    await self._whole.wait()
                if between and self.late_s:
                    later(self.late_s, writer.write, octets)  # timers of one length keep their order
                    continue
                writer.write(octets)
                await writer.drain()
        if between:
            await self._whole.wait()
        writer.close()

    async def close(self) -> None:
        """Ends."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for end in self._ends:
            end.close()
        await asyncio.gather(*(end.wait_closed() for end in self._ends), return_exceptions=True)


def site_of_client(fronts: dict[str, Several], port: int, to: int) -> str:
    """The site of the process that has a connection from this port of the loopback; "" if it has gone (proc(5))."""
    ends = f"0100007F:{port:04X}", f"0100007F:{to:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    inode = next((row[9] for row in rows if (row[1], row[2]) == ends), "")
    for site, front in fronts.items():
        children = Path(f"/proc/{front.pid}/task/{front.pid}/children").read_text(encoding="ascii").split()
        for process in children:
            with suppress(OSError):  # it has ended meanwhile
                place = f"/proc/{process}/fd"
                if any(os.readlink(f"{place}/{end}") == f"socket:[{inode}]" for end in os.listdir(place)):
                    return site
    return ""


class Nodes:
    """`powermail serve --roles node` for the nodes of one site."""

    start_s = START_S

    def __init__(self, site: str, data: Path, disks: Path, authority: Authority, cluster: str) -> None:
        self.port = free_port()
        self._data = data
        self._log = data / "log"
        self._process: asyncio.subprocess.Process | None = None
        certificate, key = authority.issue(*(uri for name in SITES[site] for uri in uris(cluster, name, "node")))
        lines = ["[cluster]", "copies_required = 1", f"segment_octets = {limits.MIB}"]
        lines += ["[peers]", f'listen = ["127.0.0.1:{self.port}"]', f'certificate = "{certificate}"', f'key = "{key}"']
        lines += [f'authority = "{authority.path}"']
        for name in SITES[site]:
            lines += ["[[cluster.nodes]]", f'id = "{name}"', f'path = "{disks}/{name}"', f'group = "rack-{name}"']
        data.mkdir()
        (data / "powermail.toml").write_text("\n".join(lines) + "\n")

    async def start(self) -> None:
        """Starts it; it listens then."""
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "powermail", "serve", "--roles", "node", "--data", str(self._data)],
                *["--set", "log.json=true", "--set", "cluster.reserve_octets=0"],
                stdout=log,
                stderr=log,
            )
        ends_at = time.monotonic() + self.start_s
        while b'"event":"listening"' not in self._log.read_bytes():
            assert time.monotonic() < ends_at and self._process.returncode is None, self._log.read_text()
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        """Ends it."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(limits.DRAIN_TIMEOUT_S):
                await self._process.wait()


class TwoSites:
    """The whole."""

    def __init__(self, root: Path, database: Database, policy: str = "apart", start_s: float = START_S) -> None:
        """`policy` is `cluster.sites` of all settings; `start_s` how long a process may take to start."""
        self._policy = policy
        self._start_s = start_s
        self.data = {site: root / site for site in SITES}
        self.front = {site: Several(self.data[site], "front,keeper", "--set", "workers=1") for site in SITES}
        self._root = root
        self._database = database
        self._whole = asyncio.Event()
        self._whole.set()
        self._nodes: dict[str, Nodes] = {}
        self._lines: list[Lines] = []

    async def start(self) -> None:
        """Makes all of it and starts it; mail is taken in both sites then."""
        disks = self._root / "disks"
        words = [word for name in SITE_OF for word in ("--node", f"{name}={disks}/{name}:rack-{name}")]
        await self._command("init", "--data", str(self.data["north"]), *words)
        cluster = msgspec.json.decode((disks / "a/identity").read_bytes())["cluster"]
        authority = Authority(self._root)
        self.data["south"].mkdir()
        shutil.copytree(self.data["north"] / "tls", self.data["south"] / "tls")
        for site in SITES:
            self._nodes[site] = Nodes(site, self._root / f"nodes-{site}", disks, authority, cluster)
        ways = {site: self._line(site, self._nodes[site].port) for site in SITES}
        database = self._line("north", self._database.server.port, "south")
        for line in self._lines:
            await line.open()
        for site in SITES:
            self._settings(site, authority, cluster, {name: way.port for name, way in ways.items()}, database.port)
        for words in (["index", "migrate"], ["directory", "init"]):
            await self._command(*words, "--data", str(self.data["north"]))
        for site, front in self.front.items():
            front.start_s = self._nodes[site].start_s = self._start_s
        await asyncio.gather(*(nodes.start() for nodes in self._nodes.values()))
        await asyncio.gather(*(front.start() for front in self.front.values()))

    async def _command(self, *words: str) -> None:
        done = await asyncio.to_thread(command, *words)
        assert done.returncode == 0, done.stderr

    def _line(self, site: str, to: int, whose: str = "") -> Lines:
        line = Lines(site, to, self._whole, self.front, whose)
        self._lines.append(line)
        return line

    def _settings(self, site: str, authority: Authority, cluster: str, ports: dict[str, int], database: int) -> None:
        certificate, key = authority.issue(*uris(cluster, site, "front", "keeper", "operator"))
        url = self._database.url
        if site == "south":
            url = url.replace(f":{self._database.server.port}/", f":{database}/")
        lines = ['hostname = "local.example"', f'site = "{site}"', "[cluster]", "copies_required = 2"]
        lines += [
            f'sites = "{self._policy}"',
            f"segment_octets = {limits.MIB}",
            "[peers]",
            f'certificate = "{certificate}"',
            f'key = "{key}"',
        ]
        lines += [f'authority = "{authority.path}"', "[index]", f'database = "{url}"']
        lines += ["[directory]", 'backend = "postgresql"', f'database = "{url}"']
        for name, where in SITE_OF.items():
            lines += ["[[cluster.nodes]]", f'id = "{name}"', f'address = "127.0.0.1:{ports[where]}"', f'group = "rack-{name}"']
            lines += [f'site = "{where}"']
        (self.data[site] / "powermail.toml").write_text("\n".join(lines) + "\n")

    def stretch(self, round_trip_s: float) -> None:
        """From now on the other site is so far away."""
        for line in self._lines:
            line.late_s = round_trip_s / 2

    def cut(self) -> None:
        """From now on nothing comes from one site into the other."""
        self._whole.clear()

    def heal(self) -> None:
        """The lines are whole again."""
        self._whole.set()

    async def end(self) -> None:
        """Ends all; whatever was logged as a bug fails."""
        self.heal()
        ended = await asyncio.gather(*(front.end() for front in self.front.values()), return_exceptions=True)
        await asyncio.gather(*(nodes.end() for nodes in self._nodes.values()))
        for line in self._lines:
            await line.close()
        bugs = [event for front in self.front.values() if front.log.exists() for event in front.events("bug")]
        assert ended == [0, 0] and not bugs, (ended, bugs)
