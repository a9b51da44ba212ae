"""Owns the core of a process: directory, index, nodes, and what compares them; what every role stands on."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powermail.app.directories import make_directory
from powermail.app.indexes import make_index
from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings, inside
from powermail.base.tls import peer_context
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.cluster.node_link import Where
from powermail.cluster.remote import Bodies, RemoteNode
from powermail.directory.contract import Backend
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.admission import Admission
from powermail.keeper.checkpoint import heads
from powermail.keeper.epochs import EpochKeeper, Marker
from powermail.keeper.owners import Owners
from powermail.keeper.reconcile import Reconciler
from powermail.message.opener import Opener
from powermail.storage.contract import StorageNode
from powermail.storage.log.keys import KeyIndex
from powermail.storage.log.segments import OPEN_MAX_DEFAULT
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode

MakeKeys = Callable[[str, bytes], KeyIndex]


if TYPE_CHECKING:
    from powermail.index.postgres import PostgresIndex


@dataclass(frozen=True)
class Core:
    """The parts that every role stands on."""

    world: World
    settings: Settings
    data: str
    index: SqliteIndex | PostgresIndex
    directory: Backend
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
            if isinstance(node, LocalNode):
                node.abandon()


def make_nodes(world: World, settings: Settings, data: str, cluster: str, make_keys: MakeKeys) -> list[StorageNode]:
    """The nodes of the settings, not opened yet. Raises OperatorError."""
    bodies = Bodies()
    nodes: list[StorageNode] = list(make_local_nodes(world, settings, data, cluster, make_keys))
    for node in settings.cluster.nodes:
        if node.address:
            context = peers_context(settings, data, server_side=False)
            where = Where(cluster, *parse_host_port(node.address), lambda context=context: context)  # type: ignore[misc]
            nodes.append(RemoteNode(world, node.id, node.group, node.priority, where, bodies))
    return sorted(nodes, key=lambda node: [each.id for each in settings.cluster.nodes].index(node.id))


def peers_context(settings: Settings, data: str, server_side: bool) -> ssl.SSLContext:
    """How this process shows itself to others of the cluster. Raises OperatorError."""
    peers = settings.peers
    paths = [inside(data, name) for name in (peers.certificate, peers.key, peers.authority)]
    try:
        return peer_context(server_side, *paths)
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(f"cannot use {', '.join(paths)} between machines: {error}") from error


def make_local_nodes(world: World, settings: Settings, data: str, cluster: str, make_keys: MakeKeys) -> list[LocalNode]:
    """Those that are served in this process."""
    configured = [node for node in settings.cluster.nodes if node.path]
    if not configured:
        return []
    files = world.descriptors // limits.SEGMENTS_OPEN_SHARE // len(configured)
    options = Options(settings.cluster.segment_octets, settings.cluster.reserve_octets, max(4, min(OPEN_MAX_DEFAULT, files)))
    return [
        LocalNode(world, cluster, node.id, inside(data, node.path).rstrip("/"), node.group, node.priority, options, make_keys)
        for node in configured
    ]


async def open_core(stack: AsyncExitStack, world: World, settings: Settings, data: str, make_keys: MakeKeys) -> Core:
    """Opens directory and index and makes the nodes; `stack` closes them. Raises OperatorError."""
    index = make_index(world, settings, data)
    stack.push_async_callback(index.close)
    await index.open()
    if not index.cluster:
        path = inside(data, settings.index.path)
        raise OperatorError(f"{path} belongs to no cluster: `powermail rebuild` sets it aside and makes it anew")
    directory = make_directory(world, settings, data, index.owners)
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
