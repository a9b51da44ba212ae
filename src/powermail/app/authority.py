"""Owns the authority in a process: in the one process of an installation whose index is a file, or as a role of its own.

The key of the authority lies where `peers.authority_listen` says that certificates are given, and nowhere else: a front end of
another machine has only its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec

from powermail.app.core import SRS_KEYS, peer_certificate, srs_keys
from powermail.app.indexes import make_index
from powermail.authority.registrar import Registrar
from powermail.authority.renewing import NAME, Renewer, by_network, by_registrar
from powermail.authority.service import AuthorityService
from powermail.base.certificates import Authority, BadRequest, as_pem, make_request
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings, inside
from powermail.base.tasks import Tasks, Worker
from powermail.base.tls import PeerCertificate
from powermail.base.world import World
from powermail.index.contract import Index
from powermail.storage.layout import Standing
from powermail.wire import enrolment as forms
from powermail.wire.node_identity import Name, NotOurs, parse_names, peer_of
from powermail.wire.node_verbs import Role

# What a machine that asks the index has to know as the first one does; all but hosts, paths and doors, which are its own.
_SHARED = ("cluster.", "directory.", "index.database", "outbound.srs_domain")
_OWN = ("cluster.nodes", "directory.path", "directory.database_password_file", "directory.database_ca")


def is_shared(name: str) -> bool:
    """True if machines of a cluster have this setting in common."""
    return name.startswith(_SHARED) and name not in _OWN


def shared_settings(settings: Settings) -> dict[str, str]:
    """The settings that front ends and keepers of a cluster have in common and that are not the default, as TOML by name."""
    plain, other = msgspec.to_builtins(settings), msgspec.to_builtins(Settings())
    found = {}
    for section, values in plain.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            name = f"{section}.{key}"
            if is_shared(name) and value != other[section][key]:
                found[name] = msgspec.json.encode(value).decode()
    return found


def make_registrar(world: World, settings: Settings, data: str, index: Index) -> tuple[Registrar, forms.Greeting]:
    """Who gives certificates here, and how it greets. Raises OperatorError."""
    key, certificate = inside(data, settings.peers.authority_key), inside(data, settings.peers.authority)
    try:
        if world.disk.mode(key) & 0o077:  # X07: whoever reads it makes members
            raise OperatorError(f"{key} is the key of the whole cluster and others may read it; run `chmod 0600 {key}`")
        authority = Authority(world.disk.read_file(certificate), world.disk.read_file(key))
    except OSError as error:
        raise OperatorError(
            f"peers.authority_listen says that certificates are given here, and {error.filename or key} cannot be read: "
            f"{error.strerror}; `powermail cluster init` makes an authority"
        ) from error
    except ValueError as error:
        raise OperatorError(f"{key} and {certificate} are of no use: {error}") from error
    files = {SRS_KEYS: srs_keys(world, data)}
    greeting = forms.Greeting(forms.FIRST, forms.LAST, index.cluster, authority.der)
    return Registrar(world, index, authority, shared_settings(settings), files), greeting


async def open_authority(
    stack: AsyncExitStack,
    world: World,
    settings: Settings,
    data: str,
    index: Index,
    certificate: PeerCertificate,
    broken: Callable[[BaseException], None],
) -> tuple[Registrar, AuthorityService]:
    """Listens where the settings say. Raises OperatorError."""
    registrar, greeting = make_registrar(world, settings, data, index)
    own = _own_roles(index, certificate)
    service = AuthorityService(world, registrar, greeting, certificate.joining, Tasks(world.log, broken))
    stack.push_async_callback(service.close)
    for address in settings.peers.authority_listen:
        await service.listen(*parse_host_port(address))
    try:  # the index knows of every holder; the first one was given its certificate without it
        await index.note_holder(*own, certificate.facts.ends_at)
        await _name_nodes(world, settings, index, registrar, certificate, own[0])
    except Trouble as error:
        world.log.event(Event.TROUBLE, worker="start", error=str(error))
    return registrar, service


async def _name_nodes(
    world: World, settings: Settings, index: Index, registrar: Registrar, certificate: PeerCertificate, identity: str
) -> None:
    """Nodes that were added to the settings of this machine since its certificate was given are named by the next one: others
    speak to nobody as a node who is not named so. Raises Trouble.
    """
    names = [name for name in parse_names([("URI", uri) for uri in certificate.facts.uris]) if name.cluster == index.cluster]
    gone = {row.id for row in (await index.layout()).rows if row.state is Standing.EXPELLED}
    gone |= {holder.identity for holder in await index.holders() if holder.expelled_at}
    fresh = [node for node in unnamed_nodes(settings, certificate) if node not in gone]
    if not fresh:
        return
    names += [Name(index.cluster, Role.NODE, node) for node in fresh]
    try:
        issued = await registrar.name(make_request(world.disk.read_file(certificate.paths[1])), names, identity)
        world.disk.replace_file(certificate.paths[0], as_pem(issued), 0o600)
    except (OSError, ValueError, BadRequest, OperatorError) as error:
        raise Trouble(f"{certificate.paths[0]} does not name {', '.join(fresh)}, and cannot be made anew: {error}") from error
    certificate.reload()
    world.log.event(Event.CERTIFICATE, renewed=certificate.paths[0], named=" ".join(fresh))


def unnamed_nodes(settings: Settings, certificate: PeerCertificate) -> list[str]:
    """Nodes of the settings that are served here, and that the certificate of this machine does not name."""
    names = parse_names([("URI", uri) for uri in certificate.facts.uris])
    named = {name.id for name in names if name.role is Role.NODE}
    return [node.id for node in settings.cluster.nodes if node.path and node.id not in named]


def _own_roles(index: Index, certificate: PeerCertificate) -> tuple[str, list[str]]:
    """Who we are, and in which roles but those of our nodes. Raises OperatorError if nobody who joins would trust us."""
    names = parse_names([("URI", uri) for uri in certificate.facts.uris])
    try:
        peer = peer_of(names, index.cluster)
    except NotOurs as error:
        raise OperatorError(f"{certificate.paths[0]} cannot be shown where certificates are given: {error}") from error
    if Role.AUTHORITY not in peer.roles:
        raise OperatorError(
            f"certificates are given here, and {certificate.paths[0]} has not the role authority, so that nobody would "
            "take one: give this machine one that has it, or leave peers.authority_listen empty"
        )
    return peer.id, sorted({name.role.value for name in names if name.cluster == index.cluster and name.id == peer.id})


def make_renewer(
    stack: AsyncExitStack, world: World, settings: Settings, certificate: PeerCertificate, registrar: Registrar | None = None
) -> Renewer:
    """What renews the certificate of this process: at its own authority, or at that of another process."""
    lane = world.lane("peer-certificate")
    stack.callback(lane.close)
    ask = None
    if registrar is not None:
        ask = by_registrar(registrar, certificate)
    elif settings.peers.authority_at:
        ask = by_network(world, certificate, settings.peers.authority_at)
    return Renewer(world, certificate, lane, ask)


class AuthorityProcess:
    """`powermail serve --roles authority`: a process of its own, where the index is in a database."""

    def __init__(self, world: World, settings: Settings, data: str, broken: Callable[[BaseException], None]) -> None:
        """`broken` is called when an invariant broke: the process must stop."""
        self._world = world
        self._settings = settings
        self._data = data
        self._broken = broken
        self._stack = AsyncExitStack()
        self._tasks = Tasks(world.log, broken)

    async def start(self) -> None:
        """Opens the index and listens. Raises OperatorError; then `stop` clears away what was opened."""
        world, settings = self._world, self._settings
        if not settings.peers.authority_listen:
            raise OperatorError("peers.authority_listen is empty: `powermail cluster init` makes an authority and sets it")
        if not settings.index.database:
            raise OperatorError("the index is a file, which one process opens: `powermail serve` gives certificates there")
        index = make_index(world, settings, self._data)
        self._stack.push_async_callback(index.close)
        await index.open()
        self._stack.push_async_callback(self._rest, index)
        certificate = peer_certificate(world, settings, self._data)
        registrar, service = await open_authority(self._stack, world, settings, self._data, index, certificate, self._broken)
        renewer = make_renewer(self._stack, world, settings, certificate, registrar)
        workers = [
            Worker("authority", service.step, world.clock, world.log, self._broken),
            Worker(NAME, renewer.step, world.clock, world.log, self._broken),
        ]
        for worker in workers:
            self._tasks.start(worker.run(), worker.name)

    async def _rest(self, index: Index) -> None:
        """Its writer slot says that it stopped (law 10)."""
        try:
            await index.rest()
        except Trouble as error:
            self._world.log.event(Event.TROUBLE, worker="stop", error=str(error))

    async def stop(self) -> None:
        """Closes all. Idempotent."""
        await self._tasks.cancel()
        await self._stack.aclose()
