"""Owns the simulation of a whole cluster: machines, a database server, clients at every front end, an operator."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from powermail.base.errors import PowerMailError
from powermail.index.contract import Index
from powermail.index.postgres import PostgresIndex
from powermail.sim import server as database
from powermail.sim.checks import buried_keys, live_groups, opened, taken_groups
from powermail.sim.cluster_faults import ClusterFaults
from powermail.sim.deployment import NodeServed, Plan, RoleServed, Served, simulated
from powermail.sim.faults import DiskFaults
from powermail.sim.machines import Machines, Through
from powermail.sim.played import Played
from powermail.storage.contract import Held
from powermail.storage.node import LocalNode

__all__ = ["ClusterSimulation", "simulated"]
# After these an epoch is raised for good reason: commits are gone, may be, or a disk remembers a history that is over.
_LOSSES = frozenset({"database-stale", "database-put-back", "database-failover", "all-killed", "disk-returned"})


class ClusterSimulation(Played):
    """Several front ends and keepers on one database, and nodes of other machines."""

    machine: Machines
    settled_s = 20.0
    senders, readers = 3, 1  # a message costs several times what it does on one machine

    def __init__(self, seed: int, seconds: float, real: str, only: Sequence[str] = ()) -> None:
        self.plan = plan = Plan.of(seed)
        machines = Machines(random.Random(seed), list(plan.nodes), real)
        machines.net.whole[database.HOST] = None
        super().__init__(seed, seconds, machines, only, len(plan.fronts))
        self.machine = machines
        self.node_names = plan.first
        clock = machines.clock_of(database.HOST)
        self.database = database.DatabaseServer(machines.net, f"{real}/central.db", self._chance, clock.now, self._strange)
        self.nodes = {node: NodeServed(machines, plan, node, self.broken) for node in plan.nodes}
        self.roles = {host: RoleServed(machines, plan, host, self.broken) for host in (*plan.keepers, *plan.fronts)}
        for served in self.all():
            served.counted = self.count
        self.moving: dict[str, None] = {}  # nodes that were ever moved to another group: a receipt may be of the one before
        self.cluster = ""

    def _strange(self, text: str) -> None:
        self.fleet.history.problem(f"the simulated database does not understand: {text}")

    def all(self) -> Iterator[Served]:
        """Every machine with a process."""
        yield from self.nodes.values()
        yield from self.roles.values()

    # -- making it -----------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        world = self.machine.start("install")
        cluster = self.cluster = world.entropy.octets(16).hex()
        for served in self.nodes.values():
            served.install(cluster, world)
        for role in self.roles.values():
            role.install(cluster, world)
        await self.make_directory(self.machine.start("install"))
        self.machine.settle()
        await self.database.start()
        for node in self.node_names:
            await self.nodes[node].start()
        await self._make_index(cluster)
        await asyncio.gather(*(role.start() for role in self.roles.values()))

    async def _make_index(self, cluster: str) -> None:
        """As `powermail index migrate` leaves it."""
        index = PostgresIndex(self.machine.start("install"), f"postgresql://install@{database.HOST}/index")
        await index.open(cluster)
        await index.rest()
        await index.close()

    # -- what runs -----------------------------------------------------------------------------------------------------

    def faults(self) -> ClusterFaults:
        return ClusterFaults(self, self._chance, self._only)

    async def heal(self, faults: DiskFaults[Any]) -> None:
        for node in self.node_names:
            await faults.obey(node)
            await self.operation("node_block", node=node, blocked=False)

    def watched(self) -> None:
        """Nothing is kept here."""

    def running(self) -> bool:
        return any(role.serving for role in self.roles.values())

    async def end(self) -> None:
        for role in self.roles.values():
            await role.stop()
        for node in self.nodes.values():
            if node.lives:
                await node.stop()
        self.database.die()
        self.database.store.close()
        for what, count in self.database.counts.items():
            self.outcome.counters[f"database.{what}"] = count
        epochs = self.outcome.counters.get("law.11.epochs", 0)
        if epochs and not _LOSSES.intersection(self.outcome.faults):
            self.outcome.problems.append(f"{epochs} epochs were raised, and no commit was lost (law 10)")

    def _serving(self, hosts: Sequence[str]) -> list[RoleServed]:
        return [self.roles[host] for host in hosts if self.roles[host].serving is not None]

    def index(self) -> Index | None:
        fronts = self._serving(self.plan.fronts)
        if not fronts:
            return None
        chosen = self._chance.choice(fronts)
        process = chosen.serving
        return cast(Index, Through(self.machine, chosen.host, process.core.index)) if process is not None else None

    async def operation(self, name: str, **arguments: object) -> Any:
        keepers = self._serving(self.plan.keepers)
        return await self.ask(self._chance.choice(keepers), name, **arguments) if keepers else None

    async def ask(self, role: RoleServed, name: str, **arguments: object) -> Any:
        """An operator's command at one machine; None while it cannot be done there."""

        async def progress(done: int, total: int) -> None:
            """Nobody looks."""

        process, ended = role.serving, role.ended
        if process is None:
            return None
        call = process.operations.call
        asked = asyncio.ensure_future(self.machine.run_on(role.host, lambda: call(name, dict(arguments), progress)))
        over = asyncio.ensure_future(ended.wait())
        await asyncio.wait((asked, over), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if not asked.done():  # as a connection to the control socket breaks
            asked.cancel()
            self.machine.note(f"{name} at {role.host}: the process ended")
            return None
        try:
            result: Any = asked.result()
            return result
        except PowerMailError as error:
            self.machine.note(f"{name} at {role.host}: {error}")
            return None

    async def troubles(self) -> list[str] | None:
        """Those that the first front end or keeper sees that sees any."""
        for role in self.roles.values():
            status = await self.ask(role, "status")
            said = status["degraded"] if isinstance(status, dict) else ["it is down"]
            if said:
                return [f"{role.host}: {text}" for text in said]
        return []

    # -- what lies on disks --------------------------------------------------------------------------------------------

    def _locals(self) -> list[LocalNode]:
        return [node.local for node in self.nodes.values() if node.local is not None]

    def live(self, key: bytes) -> tuple[set[str], set[str]]:
        served = self._locals()
        live, unseen = live_groups(served, self.machine, key, self._group)
        known = {node.id for node in served}
        for node, machine in self.nodes.items():
            place, group = self.machine.place(node), self._group(node)
            if node in known or group in live or not machine.starts:
                continue
            if place in self.machine.disk.away:
                unseen.add(group)
            elif (store := opened(self.machine.disk.parts[place], place, node, self.machine)) is not None:
                if store.reader.has([key])[0] in (Held.LIVE, Held.DEAD):
                    live.add(group)
        return live, unseen - live

    def _group(self, node: str) -> str:
        """What a node counts as."""
        return self.plan.nodes[node] if node not in self.moving else f"of {node} alone"

    def taken(self, key: bytes) -> set[str]:
        return taken_groups(self.plan.nodes, self.machine, key)

    def buried(self, without: str) -> dict[bytes, set[str]]:
        return buried_keys(self._locals(), without)
