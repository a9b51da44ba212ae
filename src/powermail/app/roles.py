"""Owns which processes an installation has on a machine, by its settings and `powermail serve --roles`.

With the index in a file everything is one process: several that open one file starve each other. With a database each role is a
process of its own, and front ends are `workers` of them. Nodes of the settings that have a path are served by the process of
the role `node`, and reached by the others of this machine at its first address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from msgspec.structs import replace

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings

ALL = "all"


class Role(Enum):
    """What a process is for."""

    FRONT = "front"
    KEEPER = "keeper"
    NODE = "node"
    AUTHORITY = "authority"


@dataclass(frozen=True)
class Duties:
    """What one process does of front end and keeper; `shared`: other processes keep the same index, on whatever machine."""

    front: bool = True
    keeper: bool = True
    shared: bool = False
    part: str = "all"  # as it is called on its machine
    machine: str = ""
    version: str = ""
    pid: int = 0
    died: str = "-"  # how the one before it ended, in one word
    parts: tuple[str, ...] = ()  # all of its machine that show themselves, this one too


ALONE = Duties()


def parse_roles(text: str) -> list[Role]:
    """`front,keeper`, in the order of `Role`. Raises OperatorError."""
    names = [word.strip() for word in text.split(",")]
    known = [role.value for role in Role]
    for name in names:
        if name not in known:
            raise OperatorError(f"--roles {text}: {name!r} is none of {ALL}, {', '.join(known)}")
    return [role for role in Role if role.value in names]


def parts(settings: Settings, text: str, cores: int) -> list[tuple[str, Role]]:
    """The processes of this machine by their names; none: it is one process that does everything. Raises OperatorError."""
    local = [node.id for node in settings.cluster.nodes if node.path]
    if text == ALL:
        peers, shared = settings.peers, bool(settings.index.database and settings.peers.authority_listen)
        if peers.authority_at and not peers.authority_listen:
            raise OperatorError(
                "this machine has joined a cluster, with the roles of its certificate alone: say --roles, as `powermail join` "
                "did (`powermail cluster show` prints names with them)"
            )
        if settings.workers <= 1 and not shared:  # one process shares its index with nobody
            return []
        roles = [Role.FRONT, Role.KEEPER, *([Role.NODE] if local else [])]
        roles += [Role.AUTHORITY] if settings.peers.authority_listen else []
    else:
        roles = parse_roles(text)
    keeps = Role.FRONT in roles or Role.KEEPER in roles
    if keeps and not settings.index.database:
        if Role.AUTHORITY not in roles and Role.FRONT in roles and Role.KEEPER in roles:
            return []
        raise OperatorError(
            f"--roles {text}: roles are processes of their own where the index is in a database (index.database); with one "
            "in a file a single process does everything: leave --roles out"
        )
    if keeps and local and Role.NODE not in roles:
        raise OperatorError(
            f"--roles {text}: node {', '.join(local)} has a path, so the role node of this machine serves it: add node to "
            "--roles, or say its address instead of the path"
        )
    found: list[tuple[str, Role]] = []
    for role in (Role.AUTHORITY, Role.NODE, Role.KEEPER):  # what others wait for begins first
        if role in roles:
            found.append((role.value, role))
    if Role.FRONT in roles:
        found += [(f"{Role.FRONT.value}{number}", Role.FRONT) for number in range(1, workers(settings, cores) + 1)]
    return found


def workers(settings: Settings, cores: int) -> int:
    """Front-end processes: by default one up to two cores, as one fills these with the nodes and the database; half of more."""
    return settings.workers or min(limits.WORKERS_MAX, max(1, cores // 2))


def as_client(settings: Settings) -> Settings:
    """The settings as a process sees them that serves no nodes: those of this machine have the address of the one that does."""
    nodes = settings.cluster.nodes
    if not any(node.path for node in nodes):
        return settings
    host, port = parse_host_port(settings.peers.listen[0])
    if host in ("", "0.0.0.0", "::"):  # noqa: S104  compared, not bound
        host = "127.0.0.1" if host != "::" else "::1"
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    here = settings.site
    seen = [replace(node, path="", address=address, site=node.site or here) if node.path else node for node in nodes]
    return replace(settings, cluster=replace(settings.cluster, nodes=seen))


def share_of(settings: Settings, count: int) -> Settings:
    """The settings of one of `count` front ends: connections are shared about evenly, and so are their numbers."""
    smtp, pop = settings.smtp, settings.pop
    return replace(
        settings,
        smtp=replace(smtp, connections_max=-(-smtp.connections_max // count)),
        pop=replace(pop, connections_max=-(-pop.connections_max // count)),
    )


def listening(settings: Settings) -> Sequence[tuple[str, str]]:
    """The doors and their addresses, in the order in which a front end opens them."""
    smtp, pop = settings.smtp, settings.pop
    doors = (
        ("smtp", smtp.listen),
        ("submission", smtp.submission),
        ("submissions", smtp.submissions),
        ("lmtp", smtp.lmtp),
        ("pop3", pop.listen),
        ("pop3s", pop.listen_tls),
    )
    return [(name, address) for name, addresses in doors for address in addresses]
