"""Owns a node's identity: which cluster, which node, which incarnation, and the salt of its checksums.

Danger: a store without its identity file may be an unmounted disk; it is refused, never initialised silently (F12).
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from powermail.base.disk import Disk
from powermail.base.entropy import Entropy
from powermail.base.errors import OperatorError
from powermail.storage.contract import START, Position

FORMAT = 2


class Identity(Struct, frozen=True):
    """What `identity` holds. `cluster`, `store`, `incarnation` and `salt` are hex.

    `since` is the first segment of format 2: those below were written by the first release. `birth` is the birth mark until
    it is lifted (law 12); it and the incarnation it came with change in one step, because they stand in one file.
    """

    format: int
    cluster: str
    node: str
    store: str
    incarnation: str
    salt: str
    since: int = 0
    birth: Position = START


def read_identity(disk: Disk, path: str, cluster: str, node: str) -> Identity:
    """Reads and checks `PATH/identity`. Raises OperatorError with the reason it is refused."""
    try:
        octets = disk.read_file(f"{path}/identity")
    except PermissionError as error:
        raise OperatorError(f"node {node}: {path}/identity may not be read: {error.strerror}") from error
    except OSError as error:
        raise OperatorError(
            f"node {node}: no identity in {path}: is its disk mounted? For a new, empty disk run "
            f"`powermail node replace {node}`"
        ) from error
    try:
        identity = msgspec.json.decode(octets, type=Identity)
    except ValueError as error:  # octets that are no UTF-8 too
        raise OperatorError(f"node {node}: {path}/identity is damaged: {error}") from error
    if identity.format > FORMAT:
        raise OperatorError(f"node {node}: format {identity.format} of {path} is newer than this program")
    if identity.cluster != cluster:
        raise OperatorError(f"node {node}: the disk in {path} belongs to another cluster ({identity.cluster})")
    if identity.node != node:
        raise OperatorError(f"node {node}: the disk in {path} is that of node {identity.node}: swapped or cloned")
    return identity


def find_identity(disk: Disk, path: str) -> Identity:
    """Whose disk that is, whatever it is. Raises OperatorError if it is none of ours."""
    try:
        return msgspec.json.decode(disk.read_file(f"{path}/identity"), type=Identity)
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path} is no directory of a node: {error}") from error


def make_store(disk: Disk, path: str, cluster: str, node: str, entropy: Entropy) -> Identity:
    """Makes an empty directory a node's store. Raises OperatorError if something is there already."""
    disk.make_directory(path)
    present = [name for name in disk.list(path) if name != "lost+found"]
    if present:
        raise OperatorError(f"node {node}: {path} is not empty ({', '.join(present[:3])}); it is left as it is")
    disk.make_directory(f"{path}/segments")
    disk.sync_directory(path)
    identity = Identity(FORMAT, cluster, node, entropy.octets(16).hex(), entropy.octets(8).hex(), entropy.octets(32).hex())
    write_identity(disk, path, identity)
    return identity


def write_identity(disk: Disk, path: str, identity: Identity) -> None:
    """Replaces `PATH/identity` atomically. Raises OSError."""
    disk.replace_file(f"{path}/identity", msgspec.json.encode(identity))
