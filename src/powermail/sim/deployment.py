"""Owns what a cluster of the simulator consists of: how many machines of which kind, their settings, and the process on each.

The processes are the product's own, composed as `powermail serve --roles` composes them. They share one database server, speak
to each other by the node protocol, and each dies and starts anew by itself.
"""

from __future__ import annotations

import asyncio
import gc
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from powermail.app import core as app_core
from powermail.app import setup as app_setup
from powermail.app.compose import PowerMail
from powermail.app.noding import NodeProcess
from powermail.app.roles import Duties
from powermail.base.errors import PowerMailError
from powermail.base.settings import IndexSettings, NodeSettings, PeersSettings, Settings
from powermail.base.world import World
from powermail.index.postgres import connection as postgres_connection
from powermail.sim import fleet as fl
from powermail.sim import server as database
from powermail.sim import settings as st
from powermail.sim.machines import Machines, SimPeerCertificate, data_of, facts_of, host_of, names_of
from powermail.sim.pace import CLUSTER_PACE, put
from powermail.storage.identity import make_store
from powermail.storage.log.keys import KeyIndex, SqliteKeyIndex
from powermail.storage.node import LocalNode

NODE_PORT = 7000
_START_S = 120.0  # how long a start may take; then it is given up and tried again
_STARTS_MAX = 300  # 2 s between them: longer than several faults, one behind the other, keep the database away


@dataclass
class Plan:
    """What a seed deploys. `spare` is a node that joins later."""

    nodes: dict[str, str]  # group by node
    spare: str
    fronts: list[str]
    keepers: list[str]
    kept: st.Kept
    ports: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int) -> Plan:
        """The one of a seed."""
        kind = random.Random(seed + 3)
        count = kind.choice((3, 3, 4, 4, 5, 6))
        names = "abcdefg"[: count + 1]
        groups = kind.choice((3, 3, 4))
        nodes = {name: f"rack-{min(number, groups - 1) + 1}" for number, name in enumerate(names)}
        fronts = [f"front{number}" for number in range(1, kind.choice((2, 2, 3)) + 1)]
        return cls(
            nodes,
            names[-1],
            fronts,
            ["keeper1", "keeper2"],
            st.Kept.drawn(kind),
            {name: NODE_PORT + number for number, name in enumerate(names)},
        )

    @property
    def first(self) -> list[str]:
        """The nodes that are there from the beginning."""
        return [name for name in self.nodes if name != self.spare]

    def address(self, node: str) -> str:
        """Where a node is reached."""
        return f"{host_of(node)}:{self.ports[node]}"

    def node_settings(self, node: str) -> Settings:
        """The settings of the machine that serves a node."""
        return Settings(
            hostname=f"{host_of(node)}.sim.example",
            cluster=st.of_node(self.kept, NodeSettings(id=node, path=f"nodes/{node}", group=self.nodes[node])),
            peers=PeersSettings(listen=[self.address(node)]),
        )

    def settings(self, host: str, real: str) -> Settings:
        """The settings of a front end or keeper."""
        door = self.fronts.index(host) * fl.BETWEEN_DOORS if host in self.fronts else 0
        nodes = [NodeSettings(id=name, address=self.address(name), group=self.nodes[name]) for name in self.first]
        index = IndexSettings(database=f"postgresql://{host}@{database.HOST}/index")
        return st.of_server(real, self.kept, nodes, index, host, door)


class Served(ABC):
    """A machine and the process on it."""

    def __init__(self, machines: Machines, host: str, broken: Callable[[BaseException], None]) -> None:
        self.host = host
        self.lives = False  # it has started, and was not killed since
        self.turn = asyncio.Lock()  # one death at a time
        self.world: World | None = None
        self.counted: Callable[[World], None] = lambda world: None
        self._machines = machines
        self._broken = broken
        self.starts = 0  # so many processes were started there
        self.ended = asyncio.Event()  # of the process that runs: who asks it something waits no longer

    @abstractmethod
    def make(self, world: World) -> Any:
        """The process, not started yet."""

    @property
    def process(self) -> Any:
        """What runs there; only while it lives."""
        return self._process

    async def start(self) -> None:
        """Starts a new process, until it has started."""
        for attempt in range(_STARTS_MAX):
            world = self.world = self._machines.start(self.host)
            self.ended = asyncio.Event()
            self.starts += 1
            try:
                async with asyncio.timeout(_START_S):
                    await self._machines.run_on(self.host, self._begin)
            except (PowerMailError, TimeoutError) as error:
                self._machines.note(f"{self.host}: start failed: {error or type(error).__name__}")
                self.kill()
                if attempt == _STARTS_MAX - 1:
                    self._broken(RuntimeError(f"{self.host} does not start: {error}"))
                await asyncio.sleep(2.0)
                continue
            if self.world is world:
                self.lives = True
            return

    async def _begin(self) -> None:
        assert self.world is not None
        self._process = self.make(self.world)
        await self._process.start()

    def kill(self) -> None:
        """Its process ends at this instant."""
        self.lives = False
        self.ended.set()
        self._machines.kill_on(self.host)
        if self.world is not None:
            self.counted(self.world)
            self.world = None
            self._machines.let_go_on(self.host, self._process.abandon)
            # what was half open: a file that a dead process has open must not be seen by the next one
            self._machines.let_go_on(self.host, gc.collect)

    async def restart(self, pause_s: float, cut_power: bool = False) -> None:
        """It is killed, and starts anew after a while."""
        async with self.turn:
            self.kill()
            if cut_power:
                self.without_power()
            await asyncio.sleep(pause_s)
            await self.start()

    @abstractmethod
    def without_power(self) -> None:
        """What the loss of power does to its disk."""

    async def stop(self) -> None:
        """It stops in good order."""
        if self.world is not None:
            self.counted(self.world)
            await self._machines.run_on(self.host, self._process.stop)


class NodeServed(Served):
    """A machine that serves a node."""

    def __init__(self, machines: Machines, plan: Plan, node: str, broken: Callable[[BaseException], None]) -> None:
        super().__init__(machines, host_of(node), broken)
        self.node = node
        self._plan = plan

    def install(self, cluster: str, world: World) -> None:
        """Makes its store and its certificate."""
        make_store(world.disk, self._machines.place(self.node), cluster, self.node, world.entropy)
        world.disk.replace_file(f"{data_of(self.host)}/tls/peer.pem", names_of(cluster, self.node, "node"))

    def make(self, world: World) -> NodeProcess:
        def make_keys(path: str, store: bytes) -> KeyIndex:
            return SqliteKeyIndex(self._machines.disk.keys_path(path), store)

        return NodeProcess(world, self._plan.node_settings(self.node), data_of(self.host), self._broken, make_keys)

    def without_power(self) -> None:
        self._machines.cut_power_of(self.node)

    @property
    def local(self) -> LocalNode | None:
        """The node, while its process lives."""
        return self._process.nodes[0] if self.lives else None


class RoleServed(Served):
    """A machine with a front end or a keeper."""

    def __init__(self, machines: Machines, plan: Plan, host: str, broken: Callable[[BaseException], None]) -> None:
        super().__init__(machines, host, broken)
        self._plan = plan
        self.front = host in plan.fronts

    def install(self, cluster: str, world: World) -> None:
        """Makes its certificate."""
        roles = ("front",) if self.front else ("keeper", "operator")
        world.disk.replace_file(f"{data_of(self.host)}/tls/peer.pem", names_of(cluster, self.host, *roles))
        world.disk.replace_file(f"{data_of(self.host)}/{app_core.SRS_KEYS}", b"the same on all front ends\n")

    def make(self, world: World) -> PowerMail:
        settings = self._plan.settings(self.host, self._machines.real)
        duties = Duties(self.front, not self.front, True, self.host, self.host, "sim", self.starts)
        return PowerMail(world, settings, data_of(self.host), self._broken, tls=False, duties=duties)

    def without_power(self) -> None:
        """Its disk holds nothing that is written while it runs."""

    @property
    def serving(self) -> PowerMail | None:
        """Its process, if it serves."""
        process: PowerMail | None = self._process if self.lives else None
        return process if process is not None and process.serving and self._machines.is_there(self.host) else None


def simulated(machines: Machines) -> AbstractContextManager[None]:
    """Within it, processes are given simulated certificates and the simulated database, and the pace of a cluster."""
    connect = database.connector(machines.net)
    instead = [
        (app_core, "PeerCertificate", SimPeerCertificate),
        (app_setup, "facts_of", facts_of),  # by which a machine whose disks are all new knows its cluster
        (postgres_connection, "connect", connect),
    ]
    return put([*CLUSTER_PACE, *instead])
