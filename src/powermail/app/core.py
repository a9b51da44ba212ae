"""Owns the core of a process: directory, index, nodes, and what compares them; what every role stands on."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from powermail.app.directories import make_directory
from powermail.app.indexes import make_index
from powermail.base import limits
from powermail.base.disk import Lock
from powermail.base.errors import OperatorError
from powermail.base.log import Event
from powermail.base.net import parse_host_port
from powermail.base.settings import RESTORING, NodeSettings, Settings, inside
from powermail.base.tls import PeerCertificate
from powermail.base.world import World
from powermail.cluster.cluster import Cluster, Make
from powermail.cluster.fetch import Fetcher
from powermail.cluster.node_link import Where
from powermail.cluster.remote import Bodies, RemoteNode
from powermail.directory.contract import Backend
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.admission import Admission
from powermail.keeper.checkpoint import heads
from powermail.keeper.epochs import EpochKeeper, Marker
from powermail.keeper.following import LayoutFollower, told
from powermail.keeper.owners import Owners
from powermail.keeper.reconcile import Reconciler
from powermail.message.opener import Opener
from powermail.storage.contract import StorageNode
from powermail.storage.layout import LAYOUT_NAME, Layout, LayoutChange, LayoutRow, parse_layout
from powermail.storage.log.keys import KeyIndex
from powermail.storage.log.segments import OPEN_MAX_DEFAULT
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode
from powermail.wire.node_identity import parse_names
from powermail.wire.node_verbs import Role

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
    following: LayoutFollower
    fetcher: Fetcher
    opener: Opener
    epochs: EpochKeeper
    marker: Marker
    admission: Admission
    reconciler: Reconciler
    certificate: PeerCertificate | None  # what is shown to other machines, if this is of a cluster

    @property
    def reads_logs(self) -> bool:
        """True if this process may read nodes' logs: they are here, or its certificate is a keeper's."""
        if self.certificate is None:
            return True
        names = parse_names([("URI", uri) for uri in self.certificate.facts.uris])
        return any(name.cluster == self.index.cluster and name.role is Role.KEEPER for name in names)

    def abandon(self) -> None:
        """Lets go of all files as they are: the process was killed (simulator)."""
        self.index.abandon()
        self.directory.abandon()
        for node in self.cluster.nodes.values():
            if isinstance(node, LocalNode):
                node.abandon()


def take_lock(world: World, data: str) -> Lock:
    """That no other installation serves this data directory. Raises OperatorError."""
    try:
        lock = world.disk.lock(f"{data}/lock")
    except BlockingIOError as error:
        raise OperatorError(f"another process serves {data}") from error
    except OSError as error:
        raise OperatorError(f"cannot write in {data}: {error.strerror}") from error
    try:
        refuse_restoring(world, data)
    except OperatorError:
        lock.release()
        raise
    return lock


def refuse_restoring(world: World, data: str) -> None:
    """Raises OperatorError where a restore was broken off."""
    if world.disk.exists(f"{data}/{RESTORING}"):
        command = world.disk.read_file(f"{data}/{RESTORING}").decode(errors="replace")
        raise OperatorError(
            f"a backup was being put back, and that was broken off, so that files of two times lie here: `{command}` again"
        )


def make_nodes(
    world: World,
    settings: Settings,
    data: str,
    cluster: str,
    make_keys: MakeKeys,
    kept: Layout | None,
    without: Collection[str] = (),
    outdated: Callable[[int, bytes], None] | None = None,
) -> list[StorageNode]:
    """The nodes of the settings and of a layout that was kept, not opened yet; those of `without` never are. `outdated` as of
    `node_maker`. Raises OperatorError for one that cannot be reached from here.
    """
    make = node_maker(world, settings, data, cluster, make_keys, None, outdated)
    rows = {
        node.id: LayoutRow(node.id, node.group, node.address, site_of(settings, node), node.priority)
        for node in settings.cluster.nodes
    }
    if kept is not None:
        rows = {row.id: row for row in kept.members()} | {  # not what was expelled, though the settings name it still
            name: row for name, row in rows.items() if all(name != known.id for known in kept.rows)
        }
    nodes = []
    for row in rows.values():
        if (node := make(row)) is None and row.id in without:
            node = make(msgspec.structs.replace(row, address="localhost:0"))  # which nobody asks
        if node is None:
            raise OperatorError(
                f"node {row.id} of group {row.group} is neither in the settings of this machine nor reached at an address: run "
                "this on the machine that has its path, put it into [[cluster.nodes]] with its address, or leave it out with "
                f"--without {row.id}. Nothing was changed"
            )
        nodes.append(node)
        if isinstance(node, RemoteNode):  # its machine refuses who goes by an older one than it was told
            node.where.fence = kept.version if kept is not None else 0
    return nodes


def kept_layout(world: World, settings: Settings, data: str, cluster: str, by_settings: bool = False) -> Layout | None:
    """The last layout that was kept here; None where the settings name all nodes, as an operator may say with `by_settings`.

    Raises OperatorError where it is damaged, or missing in a cluster: nodes that it names and the settings do not would be
    passed over without a word.
    """
    if by_settings:
        return None
    path = f"{data}/{LAYOUT_NAME}"
    cure = (
        "put it back from a backup (`files/layout`) or from the data directory of another front end or keeper; or say "
        "--by-settings, if [[cluster.nodes]] of the settings names every node: what only others hold would be missing"
    )
    if not world.disk.exists(path):
        if own_certificate(world, settings, data) is None:
            return None  # of one machine, and perhaps of a release that kept none
        raise OperatorError(f"{path}, which names the nodes of the cluster, is missing: {cure}. Nothing was changed")
    try:
        return parse_layout(world.disk.read_file(path), cluster)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise OperatorError(
            f"{path}, which names the nodes of the cluster, is damaged: {said}; {cure}. Nothing was changed"
        ) from error


def node_maker(
    world: World,
    settings: Settings,
    data: str,
    cluster: str,
    make_keys: MakeKeys,
    certificate: PeerCertificate | None,
    outdated: Callable[[int, bytes], None] | None = None,
) -> Make:
    """Makes the nodes that a layout names: here, if the settings have their path; else over the network, by their address.

    `outdated` hears of a newer layout from nodes that refuse this process for its old one.
    """
    bodies = Bodies()
    here = {node.id for node in settings.cluster.nodes if node.path}

    def make(row: LayoutRow) -> StorageNode | None:
        if row.id in here:
            local = make_local_nodes(world, settings, data, cluster, make_keys, row.id)[0]
            local.group, local.priority = row.group, row.priority
            return local
        if not row.address:
            return None
        try:
            where = Where(cluster, *parse_host_port(row.address), shown, told=outdated)
        except OperatorError as error:
            world.log.event(Event.TROUBLE, node=row.id, error=str(error))
            return None
        return RemoteNode(world, row.id, row.group, row.priority, where, bodies)

    def shown() -> ssl.SSLContext:
        nonlocal certificate
        certificate = certificate or peer_certificate(world, settings, data)
        return certificate.client()

    return make


def site_of(settings: Settings, node: NodeSettings) -> str:
    """Where a node of the settings stands: one that is served here stands where this machine does, if nobody says another."""
    return node.site or (settings.site if node.path else "")


def told_by(settings: Settings) -> list[LayoutChange]:
    """What the settings say of nodes, for the layout."""
    return [
        LayoutChange(
            node.id,
            node.group,
            node.address or None,
            site_of(settings, node) or None,
            node.priority,
            told=told(node.group, node.priority, node.address, site_of(settings, node)),
        )
        for node in settings.cluster.nodes
    ]


SRS_KEYS = "srs.keys"  # in the data directory; the same on all front ends


def srs_keys(world: World, data: str) -> bytes:
    """The keys of rewritten senders: the first line signs, all verify; made at the first start."""
    path = f"{data}/{SRS_KEYS}"
    if not world.disk.exists(path):
        world.disk.replace_file(path, world.entropy.octets(16).hex().encode() + b"\n")
    return world.disk.read_file(path)


def peer_certificate(world: World, settings: Settings, data: str) -> PeerCertificate:
    """How this process shows itself to others of the cluster. Raises OperatorError."""
    peers = settings.peers
    certificate, key, authority = (inside(data, name) for name in (peers.certificate, peers.key, peers.authority))
    if world.disk.exists(key) and world.disk.mode(key) & 0o007:  # X07
        raise OperatorError(f"{key} holds a secret and everybody may read it; run `chmod o-rwx {key}`")
    return PeerCertificate((certificate, key, authority), world.disk, world.log)


def own_certificate(world: World, settings: Settings, data: str) -> PeerCertificate | None:
    """The same if this installation is of a cluster: it speaks to nodes of other machines, or has a certificate to renew.

    Raises OperatorError.
    """
    wanted = any(node.address for node in settings.cluster.nodes) or bool(settings.peers.authority_listen)
    there = world.disk.exists(inside(data, settings.peers.certificate))
    return peer_certificate(world, settings, data) if wanted or there else None


def make_local_nodes(
    world: World, settings: Settings, data: str, cluster: str, make_keys: MakeKeys, only: str = ""
) -> list[LocalNode]:
    """Those that are served in this process, all or one."""
    configured = [node for node in settings.cluster.nodes if node.path]
    if not configured:
        return []
    files = world.descriptors // limits.SEGMENTS_OPEN_SHARE // len(configured)
    options = Options(settings.cluster.segment_octets, settings.cluster.reserve_octets, max(4, min(OPEN_MAX_DEFAULT, files)))
    return [
        LocalNode(world, cluster, node.id, inside(data, node.path).rstrip("/"), node.group, node.priority, options, make_keys)
        for node in configured
        if only in ("", node.id)
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
    certificate = own_certificate(world, settings, data)

    def outdated(version: int, octets: bytes) -> None:
        following.learn(version, octets)

    make = node_maker(world, settings, data, index.cluster, make_keys, certificate, outdated)
    wanted = settings.cluster
    apart = wanted.sites == "apart"
    cluster = Cluster(world, [], wanted.copies_required, wanted.policy, make, wanted.reserve_octets, settings.site, apart)
    stack.push_async_callback(cluster.close)
    following = LayoutFollower(world, cluster, index, f"{data}/{LAYOUT_NAME}")
    stack.callback(following.close)
    await following.start(told_by(settings))
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
        following=following,
        fetcher=fetcher,
        opener=Opener(index, fetcher),
        epochs=epochs,
        marker=Marker(world, cluster, index),
        admission=Admission(world, cluster, index, epochs),
        reconciler=Reconciler(world, cluster, index, epochs),
        certificate=certificate,
    )
