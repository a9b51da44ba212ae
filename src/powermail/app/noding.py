"""Owns the process of the role `node`: the nodes of its settings, their health, and the service for other machines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from powermail.app.authority import make_renewer, unnamed_nodes
from powermail.app.core import MakeKeys, make_local_nodes, peer_certificate, take_lock
from powermail.app.setup import cluster_of_nodes
from powermail.authority.renewing import NAME
from powermail.base import limits
from powermail.base.log import Event
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings
from powermail.base.tasks import Tasks, Worker
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.noded.obeyed import Obeyed
from powermail.noded.service import NodeService
from powermail.storage.contract import StorageNode
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.node import LocalNode


class NodeProcess:
    """One process that serves nodes. It knows no directory and no index."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        data: str,
        broken: Callable[[BaseException], None],
        make_keys: MakeKeys = SqliteKeyIndex,
        lock: bool = True,
    ) -> None:
        """`broken` is called when a storage invariant broke: the process must stop. `lock`: no parent has the directory's."""
        self._lock = lock
        self._world = world
        self._settings = settings
        self._data = data
        self._broken = broken
        self._make_keys = make_keys
        self._stack = AsyncExitStack()
        self._tasks = Tasks(world.log, broken)
        self._service: NodeService | None = None
        self.nodes: list[LocalNode] = []

    async def start(self) -> None:
        """Opens the nodes and listens. Raises OperatorError; then `stop` clears away what was opened."""
        world, settings, data = self._world, self._settings, self._data
        if self._lock:
            self._stack.callback(take_lock(world, data).release)
        cluster_id = cluster_of_nodes(world, settings, data)
        nodes = self.nodes = make_local_nodes(world, settings, data, cluster_id, self._make_keys)
        cluster = Cluster(world, nodes, 1, settings.cluster.policy)
        self._stack.push_async_callback(cluster.close)
        certificate = peer_certificate(world, settings, data)
        if not settings.peers.authority_listen and (unnamed := unnamed_nodes(settings, certificate)):
            why = (
                "the settings name it, and this machine's certificate does not, so that nobody speaks to it: `powermail node "
                f"add {unnamed[0]} --group GROUP`, then `powermail join TOKEN --data DIR` here, in a data directory of its own"
            )
            world.log.event(Event.TROUBLE, worker="start", node=" ".join(unnamed), error=why)
        await cluster.start(_admitted)
        for node in nodes:
            worker = Worker(f"health {node.id}", _bound(cluster.watch, node), world.clock, world.log, self._broken)
            self._tasks.start(worker.run(), worker.name)
        obeyed = Obeyed(world, f"{data}/obeyed")
        served: dict[str, StorageNode] = {node.id: node for node in nodes}
        self._service = NodeService(world, cluster_id, served, self._tasks, certificate.server, self._broken, obeyed)
        renewer = make_renewer(self._stack, world, settings, certificate)
        renewing = Worker(NAME, renewer.step, world.clock, world.log, self._broken)
        self._tasks.start(renewing.run(), renewing.name)
        for address in settings.peers.listen:
            await self._service.listen(*parse_host_port(address))

    async def stop(self) -> None:
        """Answers what was asked, and closes the nodes. Idempotent."""
        if self._service is not None:
            await self._service.close(limits.NODE_CLOSE_WAIT_S)
            self._service = None
        await self._tasks.cancel()
        await self._stack.aclose()

    def abandon(self) -> None:
        """What the death of the process leaves: no task goes on, the files are let go of as they are (simulator)."""
        self._tasks.abandon()
        for node in self.nodes:
            node.abandon()


async def _admitted(node: StorageNode) -> None:
    """Who compares it with the index is on another machine."""


def _bound(step: Callable[[StorageNode], Awaitable[float]], node: StorageNode) -> Callable[[], Awaitable[float]]:
    return lambda: step(node)
