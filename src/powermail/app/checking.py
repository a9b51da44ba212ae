"""Owns `powermail config check`: what is wrong with settings, files, certificates, ports, disks, names and databases.

It changes nothing and takes no lock, so that it may be run beside a server. Each finding has its cure. What is wrong with rows
of the directory says `powermail directory check`, what is wrong with copies `powermail verify`.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Iterator

import msgspec
from cryptography import x509

from powermail.app.checking_members import Membership, duties_of, sockets
from powermail.app.directories import address_of
from powermail.app.indexes import refuse_moved
from powermail.app.places import Places, secret_files
from powermail.app.roles import listening
from powermail.app.setup import cluster_in, shared_disks
from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.findings import Finding
from powermail.base.net import parse_host_port
from powermail.base.settings import RESTORING, Settings, inside
from powermail.base.sqlite_files import present
from powermail.base.tls import server_context
from powermail.base.world import World
from powermail.index.sqlite import cluster_of
from powermail.storage.identity import Identity

_DAY_S = 86_400.0


class Checker:
    """Looks at one installation, as far as its processes use it. `serving`: a server of it runs, so that its ports are taken by
    right. `roles`: of `powermail serve --roles`; "" if nobody says.
    """

    def __init__(self, world: World, settings: Settings, data: str, serving: bool, roles: str = "") -> None:
        self._world = world
        self._settings = settings
        self._data = data
        self._serving = serving
        self._duties = duties_of(world, settings, data, roles)
        self._membership = Membership(world, settings, data, self._duties)

    async def findings(self) -> list[Finding]:
        """Everything that is wrong, in the order in which it is looked at."""
        found: list[Finding] = []
        lane = self._world.lane("config-check")
        try:
            members = self._membership.findings
            for look in (self._files, self._certificate, members, self._ports, self._nodes, self._groups, self._index_file):
                found += await self._within(lane.run(_listed, look), look.__name__.strip("_").replace("_", " "))
            found += await self._within(lane.run(_listed, self._names), "names")
        finally:
            lane.close()
        return found + await self._index_database() + await self._directory_database()

    async def _within(self, looking: asyncio.Future[list[Finding]], what: str) -> list[Finding]:
        """Law 14: nobody waits for a disk, or a name server, that hangs."""
        done, _ = await asyncio.wait([looking], timeout=limits.CONFIG_LOOK_S)
        if done:
            return looking.result()
        return [Finding(what, f"nothing answered within {limits.CONFIG_LOOK_S:g} s", "look at the disks and the name server")]

    def _path(self, name: str) -> str:
        return inside(self._data, name)

    # -- files ------------------------------------------------------------------------------------------------------------

    def _files(self) -> Iterator[Finding]:
        disk, out, directory = self._world.disk, self._settings.outbound, self._settings.directory
        if disk.mode(self._data) & 0o077:
            yield Finding(self._data, "others may look into the data directory", f"`chmod 700 {self._data}`")
        if disk.exists(f"{self._data}/{RESTORING}"):
            said = "a backup was being put back, and that was broken off: files of two times lie here"
            yield Finding(self._data, said, f"`{disk.read_file(f'{self._data}/{RESTORING}').decode(errors='replace')}`")
        for path in secret_files(self._settings, self._data, peers=True):
            if disk.exists(path) and disk.mode(path) & 0o007:
                yield Finding(path, "it holds a secret and everybody may read it", f"`chmod o-rwx {path}`")
        if not self._duties.mail:
            return
        named = {
            "outbound.smarthost_password_file": out.smarthost_password_file,
            "outbound.smarthost_token_file": out.smarthost_token_file,
            "outbound.smarthost_ca": out.smarthost_ca,
            "directory.database_password_file": directory.database_password_file,
            "directory.database_ca": directory.database_ca,
        }
        for setting, name in named.items():
            if name and not os.access(self._path(name), os.R_OK):
                yield Finding(setting, f"{self._path(name)} cannot be read", "put the file there, readable for who serves")
        if directory.backend == "sqlite":
            path = self._path(directory.path)
            if not disk.exists(path):
                cure = "`powermail restore` puts one back from a backup; is its disk mounted?"
                yield Finding("directory.path", f"{path} is missing", cure)
                for beside in present(disk, path):
                    yield Finding("directory.path", f"{beside} was left behind by a file that went", "move it away")

    # -- certificates -----------------------------------------------------------------------------------------------------

    def _certificate(self) -> Iterator[Finding]:
        settings, disk = self._settings, self._world.disk
        if not self._duties.front:
            return
        path, key = self._path(settings.tls.certificate), self._path(settings.tls.key)
        try:
            server_context(path, key)
            certificate = x509.load_pem_x509_certificate(disk.read_file(path))
        except (OSError, ssl.SSLError, ValueError) as error:
            said = getattr(error, "strerror", None) or str(error)
            yield Finding("tls", f"{path} and {key} cannot be used: {said}", "point [tls] at a certificate and its own key")
        else:
            yield from self._dates("tls.certificate", path, certificate.not_valid_after_utc.timestamp())
            yield from self._named(path, certificate)

    def _dates(self, about: str, path: str, ends_at: float) -> Iterator[Finding]:
        days = (ends_at - self._world.clock.now()) / _DAY_S
        if days < 0:
            yield Finding(about, f"{path} ended {-days:.0f} days ago: it is refused", "renew it")
        elif days < limits.CERTIFICATE_WARN_DAYS:
            yield Finding(about, f"{path} ends in {days:.0f} days", "renew it")

    def _named(self, path: str, certificate: x509.Certificate) -> Iterator[Finding]:
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            known = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
        except x509.ExtensionNotFound:
            known = []
        host = self._settings.hostname.lower()
        if host not in known and f"*.{host.partition('.')[2]}" not in known:
            said = f"{path} is for {', '.join(known) or 'no name'}, and this host is {host}: clients refuse it"
            yield Finding("tls.certificate", said, "set hostname to a name of the certificate, or get one for it")

    # -- ports ------------------------------------------------------------------------------------------------------------

    def _ports(self) -> Iterator[Finding]:
        taken: dict[tuple[str, int], str] = {}
        for name, text, further in sockets(self._settings, self._duties):
            host, first = parse_host_port(text)
            port = first + further if first else 0
            shown = text if not further else f"port {port}"
            if port and (host, port) in taken:
                yield Finding(name, f"{shown} is the address of {taken[host, port]} too", "give each its own port")
            elif not self._serving and (why := _cannot_bind(host, port)) is not None:
                yield Finding(name, f"{shown} cannot be listened on: {why[0]}", why[1])
            taken[host, port] = name
        if self._duties.node and not self._settings.peers.listen:
            yield Finding("peers.listen", "it is empty, and the role node serves its nodes there", "name an address")

    # -- nodes ------------------------------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[Finding]:
        disk, cluster = self._world.disk, self._settings.cluster
        paths = {node.id: self._path(node.path).rstrip("/") for node in cluster.nodes if node.path}
        places, clusters = Places(self._world, self._data, paths), set()
        for node, path in paths.items():
            about = f"node {node}"
            try:
                if why := places.unmounted(node):
                    yield Finding(about, why, "mount its disk")
                if not disk.exists(f"{path}/identity"):
                    cure = f"mount its disk; an empty one is made a store by `powermail node replace {node}`"
                    yield Finding(about, f"there is no identity in {path}", cure)
                    continue
                octets = disk.read_file(f"{path}/identity")
                clusters.add(cluster_in(octets))
                if (owner := msgspec.json.decode(octets, type=Identity).node) != node:
                    yield Finding(about, f"{path} is the store of node {owner}", "put each path to its node")
                if not os.access(path, os.W_OK | os.X_OK):
                    yield Finding(about, f"{path} may not be written", f"`chown -R` it to who serves, or `chmod u+rwx {path}`")
                free = disk.free_octets(path)
                if free < limits.NODE_LOW_FACTOR * cluster.reserve_octets:
                    said = f"{free >> 20} MiB are free; it takes no mail below {cluster.reserve_octets >> 20} MiB"
                    yield Finding(about, said, "make room, or add a disk")
            except ValueError as error:
                cure = "put it back from a copy of that disk; without one, `powermail node expel` says what giving it up costs"
                yield Finding(about, f"{path}/identity is damaged: {error}", cure)
            except OSError as error:
                yield Finding(about, f"{path}: {error.strerror or error}", "is its disk sound?")
        if len(clusters) > 1:
            yield Finding("cluster.nodes", f"the nodes belong to {len(clusters)} clusters", "put each disk back where it was")

    def _groups(self) -> Iterator[Finding]:
        """Of the whole cluster, where a process puts mail on nodes; how many copies there are is no matter of a node."""
        required, groups = self._settings.cluster.copies_required, self._membership.groups()
        if self._duties.mail and not groups:
            if not self._membership.is_member:
                yield Finding("cluster.nodes", "there are no nodes", "`powermail init` makes three")
            elif self._membership.layout() is not None:
                yield Finding("cluster.nodes", "the layout names no node: no mail is taken", "`powermail node add` invites one")
        if self._duties.mail and groups and required > len(set(groups.values())):
            said = f"{required} copies are wanted, in {len(set(groups.values()))} groups: no mail is taken"
            yield Finding("cluster.nodes", said, "add nodes in other groups")
        elif self._duties.mail and 1 < required == len(set(groups.values())):
            said = f"{required} copies in {required} groups: no mail is taken while one is away"
            yield Finding("cluster.nodes", said, "add a node in another group")
        paths = {node.id: self._path(node.path).rstrip("/") for node in self._settings.cluster.nodes if node.path}
        for names in shared_disks(self._world, paths):
            if len({groups.get(name, name) for name in names}) > 1:
                said = f"nodes {', '.join(names)} are of several groups and lie on one disk: its loss takes them all"
                yield Finding("cluster.nodes", said, "put each on a disk of its own, or in one group")

    # -- names ------------------------------------------------------------------------------------------------------------

    def _names(self) -> Iterator[Finding]:
        host, smarthost = self._settings.hostname, self._settings.outbound.smarthost
        doors = listening(self._settings) if self._duties.front else ()
        public = [text for _, text in doors if not _is_loopback(parse_host_port(text)[0])]
        if public and "." not in host:
            said = f"hostname is {host!r}: other servers refuse a greeting without a full name (RFC 5321, 4.1.1.1)"
            yield Finding("hostname", said, 'set hostname = "mail.example.org", as the name servers know this machine')
        elif public and not _resolves(host):
            yield Finding(
                "hostname", f"the name servers do not know {host}", "give it an address record, and the address its PTR"
            )
        if smarthost and self._duties.mail and not _resolves(parse_host_port(smarthost)[0]):
            yield Finding("outbound.smarthost", f"the name servers do not know {smarthost}", "is it written right?")
        for about, name in self._membership.resolvable():
            if not _resolves(name):
                yield Finding(about, f"the name servers do not know {name}", "is it written right?")

    # -- databases --------------------------------------------------------------------------------------------------------

    def _index_file(self) -> Iterator[Finding]:
        if self._settings.index.database or not self._duties.uses_index:
            return
        path, here = self._path(self._settings.index.path), self._membership.cluster
        try:
            refuse_moved(self._world, path)
        except OperatorError as error:
            yield Finding("index.path", str(error), "set index.database")
            return
        cure = "`powermail rebuild` makes it anew from the nodes"
        if not self._world.disk.exists(path):
            yield Finding("index.path", f"{path} is missing", f"is its disk mounted? {cure}")
            for beside in present(self._world.disk, path):
                yield Finding("index.path", f"{beside} was left behind by a file that went", f"{cure}, and sets that aside")
        elif not (cluster := cluster_of(path)):
            yield Finding("index.path", f"{path} is damaged, or no index", cure)
        elif here and cluster != here:
            yield Finding("index.path", f"{path} belongs to cluster {cluster}, the nodes to {here}", "put its own back")

    async def _index_database(self) -> list[Finding]:
        if not self._settings.index.database or not self._duties.uses_index:
            return []
        from powermail.index.postgres.checking import findings

        return await findings(self._settings.index.database, self._membership.cluster)

    async def _directory_database(self) -> list[Finding]:
        chosen = self._settings.directory
        if chosen.backend == "sqlite" or not self._duties.mail:
            return []
        from powermail.directory.checking import findings

        try:
            address = address_of(self._world, self._settings, self._data)
        except OperatorError as error:
            return [Finding("directory.database", str(error), "write it as docs/directory.md shows")]
        return await findings(chosen.backend, address, not chosen.find)


def _listed(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    return list(look())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def _cannot_bind(host: str, port: int) -> tuple[str, str] | None:
    """Why an address cannot be listened on, and the cure; None if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
            tried.listen()
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
                return "it is not allowed below 1024", "allow it with `setcap cap_net_bind_service=+ep`, or the service manager"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                return "something else has it", "stop that, or choose another port"
            return str(getattr(error, "strerror", None) or error), "use an address that this machine has"
    return None
