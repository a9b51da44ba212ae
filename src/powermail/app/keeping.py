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
from powermail.keeper.epochs import Marker
from powermail.keeper.forget import Forgetter
from powermail.keeper.purges import Purges
from powermail.keeper.repair import Repairer
from powermail.keeper.scrub import Scrubber
from powermail.storage.contract import StorageNode

_DAY_S = 86_400.0


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
    workers: list[Worker] = field(default_factory=list)

    def jobs(self) -> dict[str, Callable[[], Awaitable[float]]]:
        """Every job by its name: those of one node carry its name."""
        core = self.core
        steps: dict[str, Callable[[], Awaitable[float]]] = {
            "epochs": core.epochs.step,
            "repair": self.repairer.step,
            "checkpoint": self.checkpointer.step,
            "forget": self.forgetter.step,
            "owners": core.owners.step,
            "purges": self.purges.step,
        }
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
                steps[f"{name} {node.id}"] = _bound(step, node)
        return steps

    def start(
        self, tasks: Tasks, broken: Callable[[BaseException], None], more: dict[str, Callable[[], Awaitable[float]]]
    ) -> None:
        """Starts every job, and `more`, as workers owned by `tasks`."""
        world = self.core.world
        for name, step in {**self.jobs(), **more}.items():
            worker = Worker(name, step, world.clock, world.log, broken)
            self.workers.append(worker)
            tasks.start(worker.run(), f"worker {name}")

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


def _bound(step: Callable[[StorageNode], Awaitable[float]], node: StorageNode) -> Callable[[], Awaitable[float]]:
    return lambda: step(node)


def make_keeping(stack: AsyncExitStack, core: Core) -> Keeping:
    """Composes the keepers."""
    world, cluster, index = core.world, core.cluster, core.index
    settings = core.settings.cluster
    scrubber = Scrubber(world, cluster, index, core.epochs, f"{core.data}/scrub.state")
    checkpointer = Checkpointer(world, cluster, index)
    stack.callback(scrubber.close)
    stack.callback(checkpointer.close)
    purges = Purges(world, cluster, index, core.directory, f"{core.data}/purges.json")
    stack.callback(purges.close)
    return Keeping(
        core,
        core.marker,
        Collector(world, cluster, index),
        Compactor(world, cluster, index, settings.tombstone_days),
        Forgetter(world, cluster, index, core.reconciler),
        Repairer(world, cluster, index, core.fetcher, settings.repair_after_s),
        scrubber,
        checkpointer,
        purges,
    )
