"""Owns `powermail cluster init`, `join` and `cluster show`: commands that work on files, and need no server."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from msgspec import Struct

from powermail.admin.table import Request, option, word
from powermail.base.certificates import facts_of
from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.settings import inside
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.reach import settings_of
from powermail.cli.words import Common


class ClusterInit(Request):
    """An installation that becomes a cluster."""

    listen: Annotated[str, option("host:port where other machines get their certificates; they must reach it")] = (
        "127.0.0.1:2701"
    )
    id: Annotated[str, option("name of this machine")] = "first"


class Founded(Struct):
    """What there is now. `key` is the file with the authority's key: whoever has it makes members."""

    cluster: str
    id: str
    authority: str
    key: str


def cluster_init(common: Common, request: ClusterInit) -> Founded:
    """Makes the authority and this machine's certificate. Raises OperatorError."""
    from powermail.app.joining import make_cluster

    ownership.become_owner(common.data)
    done = make_cluster(system_world(NullLog()), settings_of(common), common.data, request.id, request.listen)
    return Founded(done.cluster, done.identity, done.pin, done.key)


class Join(Request):
    """A machine that joins."""

    token: Annotated[str, word("what `powermail node add` or `powermail cluster admit` printed; - reads it from stdin")]
    authority: Annotated[str, option("host:port where certificates are given")] = ""
    node: Annotated[str, option("directory of the node, on a disk of its own. Default: below the data directory")] = ""
    address: Annotated[str, option("host:port where others reach the node, if its token does not say")] = ""
    listen: Annotated[str, option("host:port where the node listens, if not at that address")] = ""
    hostname: Annotated[str, option("of a front end: its name in banners and trace fields")] = ""
    site: Annotated[str, option("where this machine stands, a word: nodes of the same site are read first")] = ""


class Joined(Struct):
    """What this machine is now. `renewed`: it was before, and only its certificate is new. `serve` starts it."""

    id: str
    roles: list[str]
    cluster: str
    days_left: float
    node: str | None
    renewed: bool
    serve: str


async def join(common: Common, request: Join) -> Joined:
    """Gets the certificate, and writes key, certificate, authority and settings; in a directory of somebody else they are his.

    Raises OperatorError, Trouble.
    """
    from powermail.app.joining import Place, join_cluster

    if not request.authority:
        raise OperatorError("join needs --authority HOST:PORT: where the first machine gives certificates")
    token = sys.stdin.readline() if request.token == "-" else request.token  # a list of processes shows words to everybody
    owner = os.stat(common.data) if os.path.isdir(common.data) else None
    place = Place(os.path.abspath(common.data), request.node, request.address, request.listen, request.hostname, request.site)
    try:
        done = await join_cluster(system_world(NullLog()), token, request.authority, place)
    finally:
        if owner is not None and os.geteuid() == 0 and owner.st_uid != 0:
            for path in (common.data, *([request.node] if request.node.startswith("/") else [])):
                if os.path.isdir(path):
                    ownership.give(path, owner.st_uid, owner.st_gid)
    roles = "node" if done.node else ",".join(role for role in done.roles if role != "operator")
    serve = f"powermail serve --roles {roles} --data {common.data}" if roles else ""
    return Joined(done.identity, list(done.roles), done.cluster, round(done.days, 1), done.node or None, done.renewed, serve)


class Shown(Struct):
    """The certificate of this machine. `renewed_at`: the addresses that are asked for the next one."""

    names: list[str]
    days_left: float
    renewed_at: list[str]


def cluster_show(common: Common) -> Shown:
    """Reads the certificate, whether a server runs or not. Raises OperatorError."""
    settings = settings_of(common)
    path = inside(common.data, settings.peers.certificate)
    world = system_world(NullLog())
    try:
        facts = facts_of(world.disk.read_file(path))
    except FileNotFoundError as error:
        raise OperatorError(f"{path} is not there: this machine is of no cluster") from error
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path} cannot be used: {error}") from error
    return Shown(list(facts.uris), round((facts.ends_at - world.clock.now()) / 86_400.0, 1), settings.peers.authority_at)
