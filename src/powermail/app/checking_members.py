"""Owns what `powermail config check` finds of a machine as a member of a cluster: which processes it has, its certificate, the
authority's key, and the layout that it keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from powermail.app.core import SRS_KEYS
from powermail.app.roles import ALL, Role, listening, parts
from powermail.app.setup import cluster_of_nodes
from powermail.base import limits
from powermail.base.certificates import Authority, Facts, Untrusted, check_issued, facts_of, has_key
from powermail.base.errors import OperatorError
from powermail.base.findings import Finding
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings, inside
from powermail.base.world import World
from powermail.storage.layout import LAYOUT_NAME, Layout, parse_layout
from powermail.wire.node_identity import parse_names

_DAY_S = 86_400.0
_JOIN = "`powermail cluster admit NAME` (of a node: `node add NAME`) gives a token, and `powermail join` a new one"


class Duties(NamedTuple):
    """What the processes of this machine do: as settings and `--roles` say, or the certificate of one that has joined."""

    front: bool
    keeper: bool
    node: bool  # a process of its own serves nodes to others
    authority: bool
    processes: int  # front ends and keepers that have figures of their own; 1: one process does everything
    why_not: str = ""  # why `powermail serve` refuses that

    @property
    def uses_index(self) -> bool:
        """True if a process opens the index."""
        return self.front or self.keeper or self.authority

    @property
    def mail(self) -> bool:
        """True if a process knows accounts, and what leaves."""
        return self.front or self.keeper


def duties_of(world: World, settings: Settings, data: str, roles: str) -> Duties:
    """What this machine is for. `roles`: as `powermail serve --roles` is told; "" if nobody says."""
    peers = settings.peers
    if not roles:
        joined = bool(peers.authority_at and not peers.authority_listen)
        roles = ",".join(_roles_of(world, settings, data)) if joined else ALL
    if not roles:  # it has joined, and its certificate cannot be read, or is an operator's
        return Duties(False, False, False, False, 0)
    try:
        plan = parts(settings, roles, os.cpu_count() or 1)
    except OperatorError as error:
        return Duties(False, False, False, False, 0, str(error))
    if not plan:
        return Duties(True, True, False, bool(peers.authority_listen), 1)
    each = [role for _, role in plan]
    keeping = each.count(Role.FRONT) + each.count(Role.KEEPER)
    return Duties(Role.FRONT in each, Role.KEEPER in each, Role.NODE in each, Role.AUTHORITY in each, keeping)


def _roles_of(world: World, settings: Settings, data: str) -> list[str]:
    """The roles that a process may have by the certificate of this machine."""
    try:
        names = parse_names(
            ("URI", uri) for uri in facts_of(world.disk.read_file(inside(data, settings.peers.certificate))).uris
        )
    except (OSError, ValueError):
        return []
    return [role.value for role in Role if any(name.role.value == role.value for name in names)]


def sockets(settings: Settings, duties: Duties) -> Iterator[tuple[str, str, int]]:
    """(what for, address, how many ports behind it) that the processes of this machine listen at."""
    peers = settings.peers
    if duties.front:
        yield from ((name, address, 0) for name, address in listening(settings))
    for number in range(duties.processes):
        yield from (
            (f"metrics of process {number + 1}" if number else "metrics", one, number) for one in settings.metrics.listen
        )
    if duties.node:
        yield from (("peers.listen", address, 0) for address in peers.listen)
    if duties.authority:
        yield from (("peers.authority_listen", address, 0) for address in peers.authority_listen)


class Membership:
    """Looks at one machine. Blocks on the disk: call in a lane."""

    def __init__(self, world: World, settings: Settings, data: str, duties: Duties) -> None:
        self._world = world
        self._settings = settings
        self._data = data
        self._duties = duties

    def _path(self, name: str) -> str:
        return inside(self._data, name)

    @property
    def is_member(self) -> bool:
        """True if this machine shows a certificate to others, or should."""
        peers, nodes = self._settings.peers, self._settings.cluster.nodes
        wanted = self._duties.node or self._duties.authority or bool(peers.authority_at or peers.authority_listen)
        return wanted or any(node.address for node in nodes) or self._world.disk.exists(self._path(peers.certificate))

    @property
    def cluster(self) -> str:
        """Which cluster this is of; "" if nothing says it."""
        try:
            return cluster_of_nodes(self._world, self._settings, self._data)
        except (OperatorError, OSError):
            return ""

    def layout(self) -> Layout | None:
        """The layout that was kept here, if it can be read."""
        try:
            return parse_layout(self._world.disk.read_file(f"{self._data}/{LAYOUT_NAME}"), self.cluster)
        except (OSError, ValueError):
            return None

    def findings(self) -> Iterator[Finding]:
        """What is wrong."""
        if self._duties.why_not:
            yield Finding(
                "roles", self._duties.why_not, "say `powermail config check --roles ...` as `powermail serve` is told"
            )
        if self.is_member:
            yield from self._certificate()
        if self._duties.authority:
            yield from self._authority()
        if self._duties.mail:
            yield from self._kept()

    def _certificate(self) -> Iterator[Finding]:
        peers, disk = self._settings.peers, self._world.disk
        paths = [self._path(name) for name in (peers.certificate, peers.key, peers.authority)]
        try:
            certificate, key, authority = (disk.read_file(path) for path in paths)
            if not has_key(certificate, key):
                yield Finding("peers.key", f"{paths[1]} is not the key of {paths[0]}", "put the two that belong together there")
            facts = check_issued(certificate, authority, self._world.clock.now())
        except OSError as error:
            yield Finding(
                "peers", f"{error.filename} cannot be read: {error.strerror}", f"put it back from a backup; or {_JOIN}"
            )
        except Untrusted as error:
            yield Finding("peers.certificate", str(error), _JOIN)
        except ValueError as error:
            yield Finding("peers", f"{paths[0]} or {paths[1]} is damaged: {error}", f"put it back from a backup; or {_JOIN}")
        else:
            days = (facts.ends_at - self._world.clock.now()) / _DAY_S
            if days < limits.CERTIFICATE_WARN_DAYS:
                where = ", ".join(peers.authority_at) or "an authority"
                cure = f"`powermail status` says why it is not renewed at {where}; or {_JOIN}"
                yield Finding("peers.certificate", f"{paths[0]} ends in {days:.0f} days", cure)
            yield from self._names(paths[0], facts)

    def _names(self, path: str, facts: Facts) -> Iterator[Finding]:
        """Whether others let it do what it is for."""
        names, cluster = parse_names(("URI", uri) for uri in facts.uris), self.cluster
        if cluster and not any(name.cluster == cluster for name in names):
            cure = "put this machine's own certificate there, or its own nodes"
            yield Finding("peers.certificate", f"{path} has no name in cluster {cluster}, which the nodes belong to", cure)
            return
        roles = {name.role.value for name in names}
        wanted = (("front", self._duties.front), ("keeper", self._duties.keeper), ("authority", self._duties.authority))
        lacking = [role for role, is_wanted in wanted if is_wanted and role not in roles]
        if lacking and (self._duties.processes > 1 or not any(node.path for node in self._settings.cluster.nodes)):
            said = f"{path} does not name the role {' and '.join(lacking)}: nodes of other machines refuse it"
            yield Finding(
                "peers.certificate", said, f"`powermail cluster admit NAME --role {lacking[0]}`, and `powermail join`"
            )
        if self._duties.node and not self._settings.peers.authority_listen:  # else the authority here names them itself
            named = {name.id for name in names if name.role.value == Role.NODE.value}
            for node in self._settings.cluster.nodes:
                if node.path and node.id not in named:
                    cure = (
                        f"`powermail node add {node.id} --group {node.group}`, and `powermail join` in a directory of its own"
                    )
                    yield Finding(f"node {node.id}", f"{path} does not name it: nobody speaks to it", cure)

    def _authority(self) -> Iterator[Finding]:
        disk, peers = self._world.disk, self._settings.peers
        key, certificate = self._path(peers.authority_key), self._path(peers.authority)
        try:
            if disk.mode(key) & 0o077:
                yield Finding(key, "it makes members of the cluster, and others may read it", f"`chmod 0600 {key}`")
            ends_at = Authority(disk.read_file(certificate), disk.read_file(key)).ends_at
        except OSError as error:
            said = f"certificates are given here, and {error.filename} cannot be read: {error.strerror}"
            yield Finding("peers.authority_key", said, "put it back from a backup, or empty peers.authority_listen")
        except ValueError as error:
            yield Finding(
                "peers.authority_key", f"{key} and {certificate} are of no use: {error}", "put them back from a backup"
            )
        else:
            days = (ends_at - self._world.clock.now()) / _DAY_S
            if days < limits.CERTIFICATE_DAYS:
                yield Finding("peers.authority", f"{certificate} ends in {days:.0f} days, and every certificate with it",
                              "make a new cluster authority in time: every machine joins anew")  # fmt: skip

    def _kept(self) -> Iterator[Finding]:
        """What a front end or a keeper has in its data directory."""
        disk, peers = self._world.disk, self._settings.peers
        if peers.authority_at and not peers.authority_listen and not disk.exists(f"{self._data}/{SRS_KEYS}"):
            cure = "copy it from another front end, mode 0600, before the next start makes one of its own"
            yield Finding(
                SRS_KEYS, f"{self._data}/{SRS_KEYS} is missing: return addresses of other front ends are not known", cure
            )
        path = f"{self._data}/{LAYOUT_NAME}"
        if disk.exists(path) and self.cluster and self.layout() is None:
            cure = "nothing, while the index is there: the next start writes it anew; a rebuild needs it, or a copy of it"
            yield Finding(LAYOUT_NAME, f"{path} is damaged, or of another cluster", cure)

    def groups(self) -> Mapping[str, str]:
        """Node to group, of all members: as the layout says it, else as the settings do."""
        layout = self.layout()
        if layout is not None and layout.members():
            return {row.id: row.group for row in layout.members()}
        return {node.id: node.group for node in self._settings.cluster.nodes}

    def addresses(self) -> Mapping[str, str]:
        """Node to host:port, of those on other machines."""
        layout = self.layout()
        rows = layout.members() if layout is not None else ()
        found = {row.id: row.address for row in rows if row.address}
        found |= {node.id: node.address for node in self._settings.cluster.nodes if node.address}
        for node in self._settings.cluster.nodes:
            if node.path:
                found.pop(node.id, None)
        return found

    def resolvable(self) -> Iterator[tuple[str, str]]:
        """(what it is, host) of the other machines that this one must find."""
        if self._duties.mail:
            for node, address in self.addresses().items():
                yield f"node {node}", parse_host_port(address)[0]
        for address in self._settings.peers.authority_at:
            yield "peers.authority_at", parse_host_port(address)[0]
