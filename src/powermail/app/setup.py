"""Owns making a new installation: data directory, settings, three nodes, certificate, first mailbox. All or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from powermail.base.certificates import facts_of
from powermail.base.clock import utc
from powermail.base.errors import OperatorError
from powermail.base.settings import SETTINGS_NAME, Settings, inside, load
from powermail.base.tls import make_self_signed
from powermail.base.world import World
from powermail.directory import password as pw
from powermail.directory.contract import Account
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.sqlite import SqliteIndex, cluster_of
from powermail.storage.identity import make_store
from powermail.wire.node_identity import parse_names


class NodePlace(NamedTuple):
    """A node of a new installation; a relative path is below the data directory."""

    id: str
    path: str
    group: str


_BUILDING = ".new"  # in a directory that is there already, while it is filled
_MADE = ("directory.db", "index.db", "nodes", "tls")  # what `init` makes before the settings
THREE = (NodePlace("a", "nodes/a", "rack-a"), NodePlace("b", "nodes/b", "rack-b"), NodePlace("c", "nodes/c", "rack-c"))


class FirstMailbox(NamedTuple):
    """What `init` prints once and keeps nowhere."""

    address: str
    password: str


def parse_place(text: str) -> NodePlace:
    """`a=/srv/disk1/mail:rack-a`. Raises OperatorError."""
    name, equals, rest = text.partition("=")
    path, colon, group = rest.rpartition(":")
    if not (name and equals and path and colon and group) or any(c in text for c in '"\\\n'):
        raise OperatorError(f"--node {text!r} is not NAME=PATH:GROUP, like a=/srv/disk1/mail:rack-a")
    return NodePlace(name, path.rstrip("/"), group)


def copies_of(places: Sequence[NodePlace]) -> int:
    """Two copies where there are two groups, or where nodes are still to come."""
    return min(2, len({place.group for place in places})) or 2


def settings_text(hostname: str, places: Sequence[NodePlace] = THREE) -> str:
    """The settings of a new installation: by default three nodes in three groups; two copies of each message."""
    copies = copies_of(places)
    lines = [
        "# PowerMail settings. Every key with its default and meaning: docs/settings.md",
        f'hostname = "{hostname}"',
        "",
        "[cluster]",
        f"copies_required = {copies}   # each message lies on so many nodes of different groups before it is acknowledged",
    ]
    for place in places:
        lines += ["", "[[cluster.nodes]]", f'id = "{place.id}"', f'path = "{place.path}"', f'group = "{place.group}"']
    return "\n".join(lines) + "\n"


async def initialise(world: World, data: str, hostname: str, places: Sequence[NodePlace] = THREE) -> FirstMailbox:
    """Makes the data directory beside its final name, then renames it; one that exists and is empty is filled.

    Without places it is the first machine of a cluster whose nodes are on others. Nothing stays of one that could not be made.
    Raises OperatorError.
    """
    data = data.rstrip("/")
    there = os.path.isdir(data)
    if there:
        _sweep(data)
    if there and [name for name in os.listdir(data) if name != "lost+found"]:
        raise OperatorError(f"{data} exists and is not empty; nothing was changed")
    load(settings_text(hostname, places), {}, (), "init")
    building = f"{data}/{_BUILDING}" if there else f"{data}.new"
    elsewhere: list[str] = []  # stores made outside, to be taken away again if something fails
    try:
        shutil.rmtree(building, ignore_errors=True)
        world.disk.make_directory(building)
        first = await _fill(world, building, hostname, places, elsewhere)
        if there:
            for name in sorted(os.listdir(building), key=lambda name: name == SETTINGS_NAME):  # the settings last
                world.disk.rename(f"{building}/{name}", f"{data}/{name}")
            os.rmdir(building)
        else:
            world.disk.rename(building, data)
        world.disk.sync_directory(data if there else os.path.dirname(os.path.abspath(data)))
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        for path in elsewhere:
            shutil.rmtree(f"{path}/segments", ignore_errors=True)
            if os.path.exists(f"{path}/identity"):
                os.unlink(f"{path}/identity")
        if isinstance(error, OSError):
            raise OperatorError(f"cannot make {data}: {error.strerror or error}") from error
        raise
    return first


def _sweep(data: str) -> None:
    """What an `init` of this directory has left that was killed: its settings come last, so nobody has ever used it."""
    names = [name for name in os.listdir(data) if name != "lost+found"]
    if _BUILDING not in names or SETTINGS_NAME in names or set(names) - {_BUILDING, *_MADE}:
        return
    for name in sorted(names, key=lambda name: name == _BUILDING):  # what says that it was broken off goes last
        path = f"{data}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def discard(data: str) -> None:
    """Takes away an installation that was just made and never served."""
    shutil.rmtree(data, ignore_errors=True)


async def _fill(world: World, path: str, hostname: str, places: Sequence[NodePlace], elsewhere: list[str]) -> FirstMailbox:
    disk = world.disk
    disk.replace_file(f"{path}/{SETTINGS_NAME}", settings_text(hostname, places).encode())
    cluster = world.entropy.octets(16).hex()
    await make_index(world, f"{path}/index.db", cluster)
    for place in places:
        outside = place.path.startswith("/")
        make_store(disk, place.path if outside else f"{path}/{place.path}", cluster, place.id, world.entropy)
        if outside:
            elsewhere.append(place.path)
    certificate, key = make_self_signed(hostname, utc(world.clock.now()))
    disk.make_directory(f"{path}/tls")
    disk.replace_file(f"{path}/tls/certificate.pem", certificate, 0o644)
    disk.replace_file(f"{path}/tls/key.pem", key)
    first = FirstMailbox(f"postmaster@{hostname}", world.entropy.octets(9).hex())
    directory = SqliteDirectory(world, f"{path}/directory.db")
    await directory.open()
    await directory.add([Account("", first.address, pw.hash_password(first.password), 2**30)])
    await directory.close()
    return first


async def make_index(world: World, path: str, cluster: str) -> None:
    """Makes an empty index of a cluster."""
    index = SqliteIndex(world, path)
    await index.open(cluster)
    await index.rest()
    await index.close()


def cluster_of_nodes(world: World, settings: Settings, data: str) -> str:
    """The cluster that the nodes of the settings belong to, as their identities say, or the certificate that is shown to other
    machines; before there is either, the index in a file. An identity that is damaged is its node's trouble: others are asked.
    Raises OperatorError.
    """
    damaged = ""
    for node in settings.cluster.nodes:
        if node.address:
            continue
        path = f"{inside(data, node.path)}/identity"
        if world.disk.exists(path):
            try:
                return cluster_in(world.disk.read_file(path))
            except (OSError, ValueError) as error:
                damaged = f"{path}: {getattr(error, 'strerror', None) or error}"
    certificate = inside(data, settings.peers.certificate)
    if world.disk.exists(certificate):  # also where the disks of all nodes are new
        try:
            uris = facts_of(world.disk.read_file(certificate)).uris
        except ValueError as error:
            raise OperatorError(f"{certificate} cannot be read: {error}") from error
        for name in parse_names(("URI", uri) for uri in uris):
            return name.cluster
    if damaged:
        raise OperatorError(f"no node has an identity that can be read: {damaged}; put it back from a copy of that disk")
    if settings.cluster.nodes:
        raise OperatorError("no node has an identity: are the disks mounted?")
    if not settings.index.database and (found := cluster_of(inside(data, settings.index.path))):
        return found
    raise OperatorError(
        "there are no nodes here, and nothing else that says of which cluster this is: `powermail cluster init` comes before "
        "`powermail index move`"
    )


def cluster_in(identity: bytes) -> str:
    """The cluster that an `identity` file names. Raises ValueError for one that is damaged."""
    found = msgspec.json.decode(identity, type=dict[str, Any]).get("cluster")
    if not isinstance(found, str) or not found:
        raise ValueError("it is damaged: it names no cluster")
    return found


def shared_disks(world: World, paths: dict[str, str]) -> list[list[str]]:
    """Nodes that lie on one file system: the loss of that disk takes them all."""
    devices: dict[int, list[str]] = {}
    for name, path in paths.items():
        if world.disk.exists(path):
            devices.setdefault(world.disk.mark(path)[0], []).append(name)
    return [names for names in devices.values() if len(names) > 1]
