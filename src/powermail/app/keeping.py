"""Owns the role of a keeper: which background jobs there are. One that may hang with a node has a loop for each (law 14)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from powermail.app.core import Core
from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.tasks import Tasks, Worker
from powermail.keeper.checkpoint import Checkpointer
from powermail.keeper.collect import Collector
from powermail.keeper.compact import Compactor
from powermail.keeper.disperse import DISPERSE, Disperser
from powermail.keeper.drain import Drainer
from powermail.keeper.entering import Awaiting, Entering
from powermail.keeper.epochs import Marker
from powermail.keeper.expelling import Expeller
from powermail.keeper.forget import Forgetter
from powermail.keeper.leases import Leases, Step
from powermail.keeper.purges import Purges
from powermail.keeper.rebalance import Rebalancer
from powermail.keeper.repair import Repairer
from powermail.keeper.scrub import Scrubber
from powermail.storage.contract import StorageNode

_DAY_S = 86_400.0
# What every process does for itself: its own view of nodes, its own marks, its own memory. All else is leased.
_OWN = ("health", "marks", "owners", "purges", "layout")


@dataclass
class Keeping:
    """The keepers of a process."""

    core: Core
    marker: Marker
    collector: Collector
    compactor: Compactor
    forgetter: Forgetter
    repairer: Repairer
    scrubber: Scrubber
    checkpointer: Checkpointer
    purges: Purges
    drainer: Drainer
    rebalancer: Rebalancer
    disperser: Disperser
    expeller: Expeller
    workers: list[Worker] = field(default_factory=list)
    _running: dict[str, tuple[Worker, asyncio.Task[None]]] = field(default_factory=dict)

    def jobs(self) -> dict[str, Step]:
        """Every job by its name: those of one node carry its name."""
        core = self.core
        steps: dict[str, Step] = {
            "epochs": core.epochs.step,
            "repair": self.repairer.step,
            "checkpoint": self.checkpointer.step,
            "forget": self.forgetter.step,
            "owners": core.owners.step,
            "purges": self.purges.step,
            "layout": core.following.step,
            "expelled": self.expeller.step,
            "spread": core.following.spread,
            "drain": self.drainer.step,
            "rebalance": self.rebalancer.step,
        }
        if core.cluster.apart:
            steps[DISPERSE] = self.disperser.step
        of_nodes: dict[str, Callable[[StorageNode], Awaitable[float]]] = {
            "health": core.cluster.watch,
            "marks": self.marker.step,
            "reconcile": core.reconciler.step,
            "collect": self.collector.step,
            "compact": self.compactor.step,
            "scrub": self.scrubber.step,
            "admission": core.admission.step,
            "scan": self.forgetter.scan,
        }
        for name, step in of_nodes.items():
            for node in core.cluster.nodes.values():
                steps[f"{name} {node.id}"] = self._bound(step, node)
        return steps

    def _bound(self, step: Callable[[StorageNode], Awaitable[float]], node: StorageNode) -> Step:
        """A step on whatever serves a node by then: one that has another address was made anew."""
        return lambda: step(self.core.cluster.nodes.get(node.id, node))

    def own_jobs(self, leases: Leases, awaiting: Awaiting | None) -> dict[str, Step]:
        """What each of several processes does for itself, a front end too; `awaiting` where it may not read logs."""
        core = self.core
        steps = {name: step for name, step in self.jobs().items() if name.split(" ")[0] in _OWN}
        steps["settle"] = awaiting.step if awaiting is not None else core.epochs.step_here
        for node in core.cluster.nodes.values():
            steps[f"settle {node.id}"] = self._bound(awaiting.look if awaiting is not None else self._settle, node)
        steps["leases"], steps["process"] = leases.renew, leases.show
        return steps

    def leased_jobs(self, leases: Leases) -> dict[str, Step]:
        """What one keeper of all does at a time. The scans of a round go with its rows. But every keeper tells nodes of the
        layout: one that came back takes no mail before the first has spoken.
        """
        jobs = {name: step for name, step in self.jobs().items() if name.split(" ")[0] not in (*_OWN, "spread")}
        jobs["enter"] = Entering(self.core.cluster, self.core.index, self.core.reconciler, leases).step
        says = {"forget": self.forgetter.let_go, "repair": self.repairer.let_go}  # for status
        steps = {
            name: leases.leased("forget" if name.startswith("scan ") else name, step, says.get(name), self._can(name, leases))
            for name, step in jobs.items()
        }
        steps["spread"] = self.core.following.spread
        steps["clear"] = leases.leased("clear", leases.clear)
        steps["view"] = lambda: leases.compare(len(self.core.cluster.admitted()))
        return steps

    def _can(self, job: str, leases: Leases) -> Callable[[], bool]:
        """Whether this process can do it now. A job on a node needs one that takes part here, and to compare one that does not
        yet needs one that answers; all others are for who sees the most nodes. What one keeper cannot reach, another can.
        """
        kind, _, node = job.partition(" ")
        if not node or kind == "scan":
            return lambda: not leases.outseen
        cluster = self.core.cluster
        there = cluster.readable if kind == "admission" else cluster.admitted
        return lambda: any(each.id == node for each in there())

    async def _settle(self, node: StorageNode) -> float:
        """Readers of this process wait until it has seen the logs entered to their ends: it does not wait for a keeper's turn.
        Two that enter the same batch do not both: compare-and-set (law 6).
        """
        index = self.core.index
        if not index.unsettled or index.catching_up or not index.numbering:
            return 1.0
        return await self.core.reconciler.step(node)

    def start(self, tasks: Tasks, broken: Callable[[BaseException], None], steps: dict[str, Step]) -> None:
        """Starts each of these as a worker owned by `tasks`, if it does not work yet; ends those that are not among them."""
        world = self.core.world
        for name in [name for name in self._running if name not in steps]:
            worker, task = self._running.pop(name)
            task.cancel()
            self.workers.remove(worker)
        for name, step in steps.items():
            if name not in self._running:
                worker = Worker(name, step, world.clock, world.log, broken)
                self.workers.append(worker)
                self._running[name] = worker, tasks.start(worker.run(), f"worker {name}")

    async def collect_all(self) -> None:
        """A bounded part of what waits to be deleted, on every node at once; nobody waits for a sick one (law 14)."""

        async def collect(node: StorageNode) -> None:
            try:
                async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                    await self.collector.step(node)
            except (Trouble, TimeoutError) as error:
                self.core.world.log.event(Event.TROUBLE, worker="collect", node=node.id, error=str(error) or "no answer")

        await asyncio.gather(*(collect(node) for node in self.core.cluster.admitted()))

    async def checkpoint_all(self) -> None:
        """Writes every checkpoint of what has changed so far. Raises Trouble."""
        now = self.core.world.clock.now() + 2 * _DAY_S
        while await self.checkpointer.write_due(now):
            pass
        await self.checkpointer.write_queue()


def make_keeping(stack: AsyncExitStack, core: Core) -> Keeping:
    """Composes the keepers."""
    world, cluster, index = core.world, core.cluster, core.index
    settings = core.settings.cluster
    scrubber = Scrubber(world, cluster, index, core.epochs, f"{core.data}/scrub.state")
    checkpointer = Checkpointer(world, cluster, index)
    stack.callback(scrubber.close)
    stack.callback(checkpointer.close)
    purges = Purges(world, cluster, index, core.directory, f"{core.data}/purges.json", core.reads_logs)
    stack.callback(purges.close)
    repairer = Repairer(world, cluster, index, core.fetcher, settings.repair_after_s)
    return Keeping(
        core,
        core.marker,
        Collector(world, cluster, index),
        Compactor(world, cluster, index, settings.tombstone_days),
        Forgetter(world, cluster, index, core.reconciler),
        repairer,
        scrubber,
        checkpointer,
        purges,
        Drainer(world, cluster, index, core.reconciler, core.following),
        Rebalancer(world, cluster, index, core.fetcher),
        Disperser(world, cluster, index, repairer),
        Expeller(world, cluster, index),
    )
