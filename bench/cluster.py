"""Owns what a cluster costs on one machine: `python -m bench.cluster [SHARE] [TREE]`; SHARE scales the messages (1.0).

Three node processes, a front end without local nodes, a keeper, all by mutual TLS on the loopback, and a PostgreSQL of this
run (in memory, without fsync: it is not what is measured). Beside them, by turns in the same run, the embedded mode; with a
TREE all programs of the cluster are that tree's. What counts are ratios: a shared machine drifts.

    deliveries    4 KiB into 1,000 mailboxes over 1, 32 and 128 connections, R = 2: rate, p50, p99, CPU of each role per 1,000
    copies        R = 1, 2, 3 over 32 connections: the same, octets on wires and disks for each message
    reading       POP3 one by one and pipelined, and sessions of login, STAT, QUIT
    a sick group  latency while one group goes down, is down, and is slow (stopped three quarters of the time)
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvloop
from tests.noded.certificates import Authority, uris
from tests.servers import Postgres

from bench import machine, pop
from bench.load import MESSAGE_4K, Plan, send
from bench.ours import DOORS, MAILBOXES, PASSWORD, Server, mailbox
from powermail.admin.control import NotRunning, ask_any

_GROUPS = {"a": "rack-a", "b": "rack-b", "c": "rack-c"}
_RECIPIENTS = [mailbox(number).encode() for number in range(MAILBOXES)]
_ROUNDS = 3
_STOPPED_S, _RUNNING_S = 0.3, 0.1  # of a node that is slow
_START_S = 60.0


class Process:
    """One `powermail serve` of the cluster, with a data directory of its own."""

    def __init__(self, data: Path, roles: str) -> None:
        self.data = data
        self.roles = roles
        self.more: tuple[str, ...] = ()
        self.ports: dict[str, int] = {}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, environment: dict[str, str]) -> None:
        """Starts it; it is ready then."""
        log = self.data.with_name(f"{self.data.name}.log")
        words = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')] if self.roles == "front" else []
        for setting in ("log.json=true", "cluster.reserve_octets=0", *self.more):
            words += ["--set", setting]
        with log.open("wb") as file:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "powermail", "serve", "--roles", self.roles, "--data", str(self.data), *words],
                stdout=file,
                stderr=file,
                env=environment,
            )
        async with asyncio.timeout(_START_S):
            ready = b'"listening"' if self.roles == "node" else b"PowerMail is ready"
            while ready not in (said := log.read_bytes()):
                assert self._process.returncode is None, said.decode()
                await asyncio.sleep(0.05)
        for line in said.splitlines():
            if b'"listening"' in line:
                event = msgspec.json.decode(line)
                self.ports[event["door"]] = int(event["address"].rpartition(":")[2])

    @property
    def pid(self) -> int:
        """The parent of its processes, or the only one."""
        assert self._process is not None
        return self._process.pid

    def tell(self, number: signal.Signals) -> None:
        """To it and to all that descend from it."""
        for pid in machine.tree([self.pid]):
            os.kill(pid, number)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it."""
        if self._process is not None and self._process.returncode is None:
            if number is signal.SIGKILL:
                self.tell(number)
            else:
                self._process.send_signal(number)
            await self._process.wait()


class Cost(NamedTuple):
    """One run, for each 1,000 messages or for each message."""

    rate: float
    p50_ms: float
    p99_ms: float
    front_s: float
    node_s: float
    keeper_s: float
    database_s: float
    wire_octets: float  # that nodes took from their connections, TLS included
    disk_octets: float  # that node processes gave to the disk


class Cluster:
    """The processes, and what they took so far."""

    def __init__(self, root: Path, tree: str, database: Postgres) -> None:
        self.environment = {**os.environ, "PYTHONPATH": f"{tree}/src"}
        self.database = database
        self._root = root
        self.nodes: dict[str, Process] = {}

    async def make(self) -> None:
        """Settings, certificates, tables and mailboxes."""
        root, head = self._root, self._root / "keeper"
        await self._command("init", "--hostname", "bench.example", "--data", str(head))
        cluster = msgspec.json.decode((head / "nodes/a/identity").read_bytes())["cluster"]
        authority, ports = Authority(root), {name: _free_port() for name in _GROUPS}
        lines = ['hostname = "bench.example"', "[smtp]", "connections_per_address_max = 1000", "[pop]"]
        lines += ["connections_per_address_max = 1000", "plaintext_login = true", "[cluster]", "copies_required = 2"]
        for name, group in _GROUPS.items():
            lines += ["[[cluster.nodes]]", f'id = "{name}"', f'address = "127.0.0.1:{ports[name]}"', f'group = "{group}"']
        url = self.database.create().url
        lines += [*["[index]", f'database = "{url}"'], *["[directory]", f'path = "{head}/directory.db"']]
        lines += ["[tls]", f'certificate = "{head}/tls/certificate.pem"', f'key = "{head}/tls/key.pem"', "[peers]"]
        lines += [f'authority = "{authority.path}"']
        (root / "front").mkdir()
        for name, names in (("keeper", ("front", "keeper", "operator")), ("front", ("front",))):
            certificate, key = authority.issue(*uris(cluster, name, *names))
            own = [f'certificate = "{certificate}"', f'key = "{key}"']
            (root / name / "powermail.toml").write_text("\n".join([*lines, *own]) + "\n")
        for name, group in _GROUPS.items():
            data = root / f"node-{name}"
            data.mkdir()
            certificate, key = authority.issue(*uris(cluster, name, "node"))
            (data / "powermail.toml").write_text(
                f'hostname = "node-{name}.example"\n[cluster]\ncopies_required = 1\n'
                f'[[cluster.nodes]]\nid = "{name}"\npath = "{head}/nodes/{name}"\ngroup = "{group}"\n'
                f'[peers]\nlisten = ["127.0.0.1:{ports[name]}"]\ncertificate = "{certificate}"\nkey = "{key}"\n'
                f'authority = "{authority.path}"\n'
            )
            self.nodes[name] = Process(data, "node")
        self.keeper, self.front = Process(head, "keeper"), Process(root / "front", "front")
        await self._command("index", "migrate", "--data", str(head))
        rows = [f'{{"address": "{mailbox(n)}", "password": "{{plain}}{PASSWORD}"}}\n' for n in range(MAILBOXES)]
        (root / "accounts").write_text("".join(rows))
        await self._command("account", "import", str(root / "accounts"), "--data", str(head))

    async def _command(self, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "powermail", *words], stdout=asyncio.subprocess.DEVNULL, env=self.environment
        )
        assert await process.wait() == 0, words

    async def start(self) -> None:
        """Starts all."""
        for process in (*self.nodes.values(), self.keeper, self.front):
            await process.start(self.environment)
        await self.until_states({"read-write"})

    async def with_copies(self, copies: int) -> None:
        """Front end and keeper go on with so many copies of what is new, once what was there has as many: repair costs too."""
        for process in (self.front, self.keeper):
            await process.end()
            process.more = (f"cluster.copies_required={copies}",)
        await self.keeper.start(self.environment)
        await self.front.start(self.environment)
        await self.until_states({"read-write"}, whole=True)

    async def until_states(self, states: set[str], whole: bool = False) -> None:
        """Waits until the front end sees nodes in these states, and, if `whole`, every message with all its copies."""

        async def unseen(done: int, total: int) -> None:
            pass

        async with asyncio.timeout(_START_S):
            while True:
                try:
                    status = msgspec.json.decode(await ask_any(str(self.front.data), "status", {}, unseen))
                    thin = status["not_redundant"]["messages"] if whole else 0
                    if {node["state"] for node in status["nodes"]} == states and not thin:
                        return
                except NotRunning:
                    pass
                await asyncio.sleep(0.1)

    def used(self) -> dict[str, float]:
        """CPU seconds of each role, octets in and to the disk of the nodes, all so far."""
        pids = machine.tree([node.pid for node in self.nodes.values()])
        io = [machine.process_io(pid) for pid in pids]
        return {
            "front": machine.cpu_s([self.front.pid]),
            "node": machine.cpu_s(node.pid for node in self.nodes.values()),
            "keeper": machine.cpu_s([self.keeper.pid]),
            "database": machine.cpu_s(self.database.processes()[:1]),
            "wire": sum(each["rchar"] for each in io),
            "disk": sum(each["write_bytes"] for each in io),
        }

    async def end(self) -> None:
        """Ends all."""
        for process in (self.front, self.keeper, *self.nodes.values()):
            await process.end(signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


@asynccontextmanager
async def served(tree: str, database: Postgres) -> AsyncIterator[Cluster]:
    """A cluster that serves, cleared away at the end."""
    root = Path(tempfile.mkdtemp(prefix="powermail-bench-cluster-", dir=os.environ.get("POWERMAIL_BENCH_DIR")))
    cluster = Cluster(root, tree, database)
    try:
        await cluster.make()
        await cluster.start()
        yield cluster
    finally:
        await cluster.end()
        shutil.rmtree(root)


async def deliver(cluster: Cluster, connections: int, messages: int) -> Cost:
    """One run of deliveries."""
    before = cluster.used()
    plan = Plan(cluster.front.ports["smtp"], _RECIPIENTS, messages)
    took = await send(plan, connections)
    assert not plan.failures, plan.failures[:3]
    used = {name: value - before[name] for name, value in cluster.used().items()}
    cuts = statistics.quantiles(plan.latencies, n=100)
    front, node, keeper, database = (1000 * used[role] / messages for role in ("front", "node", "keeper", "database"))
    wire, disk = used["wire"] / messages, used["disk"] / messages
    return Cost(messages / took, 1e3 * cuts[49], 1e3 * cuts[98], front, node, keeper, database, wire, disk)


def middle(costs: list[Cost]) -> Cost:
    """The medians."""
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def show(what: str, cost: Cost) -> None:
    """One row."""
    ours = cost.front_s + cost.node_s + cost.keeper_s
    print(
        f"{what:<22} {cost.rate:6.0f}/s  p50 {cost.p50_ms:6.1f} ms  p99 {cost.p99_ms:6.1f} ms  CPU s per 1,000: front end"
        f" {cost.front_s:.2f}, nodes {cost.node_s:.2f}, keeper {cost.keeper_s:.2f}, all of these {ours:.2f}, PostgreSQL"
        f" {cost.database_s:.2f}",
        flush=True,
    )


async def embedded(server: Server, connections: int, messages: int) -> tuple[float, float, float]:
    """The same in one process: rate, p50 in ms, CPU s per 1,000."""
    before, plan = machine.cpu_s(server.roots()), Plan(server.ports["smtp"], _RECIPIENTS, messages)
    took = await send(plan, connections)
    assert not plan.failures, plan.failures[:3]
    cpu = 1000 * (machine.cpu_s(server.roots()) - before) / messages
    return messages / took, 1e3 * statistics.median(plan.latencies), cpu


async def deliveries(cluster: Cluster, server: Server, share: float) -> None:
    """The cluster and the embedded mode by turns."""
    for connections, messages in ((1, 150), (32, 1500), (128, 2500)):
        costs, beside = list[Cost](), list[tuple[float, float, float]]()
        for _ in range(_ROUNDS):
            costs.append(await deliver(cluster, connections, int(messages * share)))
            beside.append(await embedded(server, connections, int(messages * share)))
        show(f"{connections} connections", middle(costs))
        rate, p50_ms, cpu_s = (statistics.median(values) for values in zip(*beside, strict=True))
        ratio = statistics.median(cost.rate / other[0] for cost, other in zip(costs, beside, strict=True))
        print(
            f"  embedded             {rate:6.0f}/s  p50 {p50_ms:6.1f} ms  CPU s per 1,000 {cpu_s:.2f}; the cluster delivers"
            f" {ratio:.2f} times as many",
            flush=True,
        )


async def copies(cluster: Cluster, share: float) -> None:
    """R = 1, 2, 3."""
    for number in (1, 3, 2):
        await cluster.with_copies(number)
        await deliver(cluster, 32, 200)
        cost = middle([await deliver(cluster, 32, int(1200 * share)) for _ in range(_ROUNDS)])
        show(f"R = {number}, 32 connections", cost)
        sizes = f"{cost.wire_octets:.0f} to nodes by wires, {cost.disk_octets:.0f} to disks"
        print(f"  a message of {len(MESSAGE_4K)} octets: {sizes}", flush=True)


async def reading(cluster: Cluster, share: float) -> None:
    """POP3 through the front end."""
    port, user = cluster.front.ports["pop3"], mailbox(0)
    await send(Plan(cluster.front.ports["smtp"], [user.encode()], int(1000 * share)), 32)
    single = statistics.median([await pop.one_by_one(port, user, PASSWORD) for _ in range(_ROUNDS)])
    pipelined = statistics.median([await pop.pipelined(port, user, PASSWORD) for _ in range(_ROUNDS)])
    users = [mailbox(number) for number in range(1, MAILBOXES)]
    rate = statistics.median([await pop.sessions(port, users, PASSWORD, int(600 * share)) for _ in range(_ROUNDS)])
    print(f"POP3: {single:.0f} messages/s one by one, {pipelined:.0f} pipelined, {rate:.0f} sessions/s", flush=True)


async def sick(cluster: Cluster, share: float) -> None:
    """Latency with one group down, and with one slow."""
    messages, node = int(1500 * share), cluster.nodes["c"]
    well = middle([await deliver(cluster, 16, messages) for _ in range(_ROUNDS)])

    def row(what: str, plan: Plan) -> None:
        assert not plan.failures, plan.failures[:3]
        cuts = [1e3 * cut for cut in statistics.quantiles(plan.latencies, n=100)]
        print(
            f"{what:<28} p50 {cuts[49]:6.1f} ms ({cuts[49] / well.p50_ms:.2f} times), p99 {cuts[98]:6.1f} ms"
            f" ({cuts[98] / well.p99_ms:.2f} times), worst {1e3 * max(plan.latencies):6.0f} ms",
            flush=True,
        )

    async def run(while_it: asyncio.Task[None] | None = None) -> Plan:
        plan = Plan(cluster.front.ports["smtp"], _RECIPIENTS, messages)
        await send(plan, 16)
        if while_it is not None:
            while_it.cancel()
        return plan

    async def stop_and_go() -> None:
        try:
            while True:
                node.tell(signal.SIGSTOP)
                await asyncio.sleep(_STOPPED_S)
                node.tell(signal.SIGCONT)
                await asyncio.sleep(_RUNNING_S)
        finally:
            node.tell(signal.SIGCONT)

    print(f"16 connections, all is well   p50 {well.p50_ms:6.1f} ms, p99 {well.p99_ms:6.1f} ms", flush=True)
    await run(slowing := asyncio.create_task(stop_and_go()))
    await asyncio.wait([slowing])
    plan = await run(slowing := asyncio.create_task(stop_and_go()))
    await asyncio.wait([slowing])
    row("one group is slow", plan)
    running = asyncio.create_task(run())
    await asyncio.sleep(0.3)
    node.tell(signal.SIGKILL)
    row("one group goes down", await running)
    row("one group is down", await run())


async def main(share: float, tree: str) -> None:
    """All of it."""
    database, server = Postgres(), Server(2)
    database.start()
    try:
        await asyncio.to_thread(database.wait)
        await server.start()
        async with served(tree, database) as cluster:
            print(f"{machine.interpreter()}; {tree}; load {os.getloadavg()[0]:.1f}", flush=True)
            await send(Plan(server.ports["smtp"], _RECIPIENTS, 1500), 16)  # warm: every mailbox has its row
            await send(Plan(cluster.front.ports["smtp"], _RECIPIENTS, 1500), 16)
            began = time.monotonic()
            await deliveries(cluster, server, share)
            await reading(cluster, share)
            await copies(cluster, share)
            await sick(cluster, share)
            print(f"{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        await server.stop()
        database.remove()


if __name__ == "__main__":
    given = sys.argv[1:]
    uvloop.run(main(float(given[0]) if given else 1.0, given[1] if len(given) > 1 else str(Path(__file__).parents[1])))
