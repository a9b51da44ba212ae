"""Owns making a new installation: data directory, settings, three nodes, certificate, first mailbox. All or nothing."""

from __future__ import annotations

import os
import shutil
from typing import Any, NamedTuple

import msgspec

from powermail.base.clock import utc
from powermail.base.errors import OperatorError
from powermail.base.settings import Settings
from powermail.base.tls import make_self_signed
from powermail.base.world import World
from powermail.directory import password as pw
from powermail.directory.contract import Account
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.sqlite import SqliteIndex
from powermail.storage.identity import make_store

SETTINGS_NAME = "powermail.toml"
_NODES = (("a", "rack-a"), ("b", "rack-b"), ("c", "rack-c"))


class FirstMailbox(NamedTuple):
    """What `init` prints once and keeps nowhere."""

    address: str
    password: str


def settings_text(hostname: str) -> str:
    """The settings of a new installation: three nodes in three groups, two copies of each message."""
    lines = [
        "# PowerMail settings. Every key with its default and meaning: docs/settings.md",
        f'hostname = "{hostname}"',
        "",
        "[cluster]",
        "copies_required = 2   # each message lies on 2 nodes of different groups before it is acknowledged",
    ]
    for name, group in _NODES:
        lines += ["", "[[cluster.nodes]]", f'id = "{name}"', f'path = "nodes/{name}"', f'group = "{group}"']
    return "\n".join(lines) + "\n"


async def initialise(world: World, data: str, hostname: str) -> FirstMailbox:
    """Makes the data directory beside its final name, then renames it. Raises OperatorError."""
    data = data.rstrip("/")
    if os.path.isdir(data) and os.listdir(data):
        raise OperatorError(f"{data} exists and is not empty; nothing was changed")
    building = f"{data}.new"
    try:
        shutil.rmtree(building, ignore_errors=True)
        world.disk.make_directory(building)
        first = await _fill(world, building, hostname)
        if os.path.isdir(data):
            os.rmdir(data)
        world.disk.rename(building, data)
        world.disk.sync_directory(os.path.dirname(os.path.abspath(data)))
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise OperatorError(f"cannot make {data}: {error.strerror or error}") from error
    return first


def discard(data: str) -> None:
    """Takes away an installation that was just made and never served."""
    shutil.rmtree(data, ignore_errors=True)


async def _fill(world: World, path: str, hostname: str) -> FirstMailbox:
    disk = world.disk
    disk.replace_file(f"{path}/{SETTINGS_NAME}", settings_text(hostname).encode())
    cluster = world.entropy.octets(16).hex()
    await make_index(world, f"{path}/index.db", cluster)
    for name, _ in _NODES:
        make_store(disk, f"{path}/nodes/{name}", cluster, name, world.entropy)
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
    """The cluster that the nodes of the settings belong to, as their identities say. Raises OperatorError."""
    for node in settings.cluster.nodes:
        path = node.path if node.path.startswith("/") else f"{data}/{node.path}"
        if world.disk.exists(f"{path}/identity"):
            return str(msgspec.json.decode(world.disk.read_file(f"{path}/identity"), type=dict[str, Any])["cluster"])
    raise OperatorError("no node has an identity: are the disks mounted?")


def shared_disks(world: World, paths: dict[str, str]) -> list[list[str]]:
    """Nodes that lie on one file system: the loss of that disk takes them all."""
    devices: dict[int, list[str]] = {}
    for name, path in paths.items():
        if world.disk.exists(path):
            devices.setdefault(world.disk.mark(path)[0], []).append(name)
    return [names for names in devices.values() if len(names) > 1]
