"""Owns the core of a process: directory, index, nodes, and what compares them; what every role stands on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.settings import Settings, inside
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.admission import Admission
from powermail.keeper.checkpoint import heads
from powermail.keeper.epochs import EpochKeeper, Marker
from powermail.keeper.owners import Owners
from powermail.keeper.reconcile import Reconciler
from powermail.message.opener import Opener
from powermail.storage.log.keys import KeyIndex
from powermail.storage.log.segments import OPEN_MAX_DEFAULT
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode

MakeKeys = Callable[[str, bytes], KeyIndex]


@dataclass(frozen=True)
class Core:
    """The parts that every role stands on."""

    world: World
    settings: Settings
    data: str
    index: SqliteIndex
    directory: SqliteDirectory
    owners: Owners
    cluster: Cluster
    fetcher: Fetcher
    opener: Opener
    epochs: EpochKeeper
    marker: Marker
    admission: Admission
    reconciler: Reconciler

    def abandon(self) -> None:
        """Lets go of all files as they are: the process was killed (simulator)."""
        self.index.abandon()
        self.directory.abandon()
        for node in self.cluster.nodes.values():
            assert isinstance(node, LocalNode)
            node.abandon()


def make_nodes(world: World, settings: Settings, data: str, cluster: str, make_keys: MakeKeys) -> list[LocalNode]:
    """The nodes of the settings, not opened yet."""
    configured = settings.cluster.nodes
    files = world.descriptors // limits.SEGMENTS_OPEN_SHARE // len(configured)
    options = Options(settings.cluster.segment_octets, settings.cluster.reserve_octets, max(4, min(OPEN_MAX_DEFAULT, files)))
    return [
        LocalNode(world, cluster, node.id, inside(data, node.path).rstrip("/"), node.group, node.priority, options, make_keys)
        for node in configured
    ]


async def open_core(stack: AsyncExitStack, world: World, settings: Settings, data: str, make_keys: MakeKeys) -> Core:
    """Opens directory and index and makes the nodes; `stack` closes them. Raises OperatorError."""
    path = inside(data, settings.index.path)
    index = SqliteIndex(world, path)
    stack.push_async_callback(index.close)
    await index.open()
    if not index.cluster:
        raise OperatorError(f"{path} belongs to no cluster: `powermail rebuild` sets it aside and makes it anew")
    directory = SqliteDirectory(world, inside(data, settings.directory.path))
    stack.push_async_callback(directory.close)
    await directory.open(make=False)
    nodes = make_nodes(world, settings, data, index.cluster, make_keys)
    cluster = Cluster(world, nodes, settings.cluster.copies_required, settings.cluster.policy)
    stack.push_async_callback(cluster.close)
    fetcher = Fetcher(world, cluster, index.note_bad)
    epochs = EpochKeeper(world, cluster, index, heads)
    return Core(
        world=world,
        settings=settings,
        data=data,
        index=index,
        directory=directory,
        owners=Owners(world, directory, index),
        cluster=cluster,
        fetcher=fetcher,
        opener=Opener(index, fetcher),
        epochs=epochs,
        marker=Marker(world, cluster, index),
        admission=Admission(world, cluster, index, epochs),
        reconciler=Reconciler(world, cluster, index, epochs),
    )
