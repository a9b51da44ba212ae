"""Owns the role of a front end: what takes mail in, sends it out and lets it be read, with its doors."""

from __future__ import annotations

import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from powermail.app.core import Core, srs_keys
from powermail.app.roles import listening
from powermail.app.tallies import Tallying
from powermail.base import limits
from powermail.base.command import output_of
from powermail.base.errors import OperatorError
from powermail.base.lane import Lane
from powermail.base.log import Event
from powermail.base.net import Listener, parse_host_port
from powermail.base.settings import Settings, inside
from powermail.base.sharing import SharedNetwork
from powermail.base.tasks import Tasks
from powermail.base.tls import Certificates, client_context
from powermail.base.world import World
from powermail.delivery.internal import Postmaster
from powermail.delivery.srs import Rewriter
from powermail.delivery.transaction import DeliveryService
from powermail.directory.authenticate import Authenticator
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.door.clients import Networks
from powermail.door.connection import Door
from powermail.keeper.leases import Leases
from powermail.mail.address import AddressError, load_idna, parse
from powermail.mailbox.exclusive import Exclusive
from powermail.mailbox.maildrop import Maildrops
from powermail.outbound.bounce import Bouncer
from powermail.outbound.routing import Login, Route, Smarthost
from powermail.outbound.schedule import Outbound
from powermail.popd.session import PopService, PopSession
from powermail.popd.session import refuse as refuse_pop
from powermail.smtpd.service import SmtpService
from powermail.smtpd.session import SmtpSession
from powermail.smtpd.session import refuse as refuse_smtp
from powermail.wire.smtp_table import Kind


@dataclass
class Front:
    """The parts of a front end."""

    resolver: Resolver
    authenticator: Authenticator
    delivery: DeliveryService
    rewriter: Rewriter
    outbound: Outbound
    sessions: Tasks
    doors: list[Door] = field(default_factory=list)
    watched_by: list[Door] = field(default_factory=list)  # doors of monitoring: open until the end
    listeners: list[Listener] = field(default_factory=list)
    listening: dict[str, int] = field(default_factory=dict)
    certificates: Certificates | None = None
    certificates_lane: Lane | None = None
    exclusive: Exclusive | None = None  # maildrops, where other processes serve them too
    process: str = ""  # among several: a word that no other has
    tallying: Tallying | None = None  # counts behind limits, shared with the others

    def close_listeners(self) -> None:
        """From now on nobody new comes in."""
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()

    def refuse(self) -> None:
        """From now on nobody new comes in, and sessions are told to go."""
        self.close_listeners()
        for door in self.doors:
            door.drain()

    async def sweep(self) -> float:
        """Deadlines of connections; certificates that changed on the disk."""
        for door in (*self.doors, *self.watched_by):
            door.sweep()
        if self.certificates is not None and self.certificates_lane is not None:
            await self.certificates_lane.run(self.certificates.reload)
        return 1.0

    def open_connections(self) -> int:
        """How many clients there are at all doors."""
        return sum(door.connections for door in self.doors)

    def certificate_ends(self) -> float | None:
        """When the certificate ends, in UTC; None without one."""
        return self.certificates.ends_at if self.certificates is not None else None

    def connections(self) -> dict[str, int]:
        """Open connections of each door."""
        return {door.name: door.connections for door in (*self.doors, *self.watched_by)}


def make_front(
    stack: AsyncExitStack, core: Core, tasks: Tasks, sessions: Tasks, outgoing: Tasks, leases: Leases | None = None
) -> Front:
    """Composes a front end without doors. `tasks` finish what was promised; clients have `sessions`, next hops `outgoing`.
    `leases` where other processes share the index.
    """
    world, settings = core.world, core.settings
    cache = DirectoryCache(core.owners, world.clock, world.counters, settings.directory.cache_ttl_s, settings.directory.stale_s)
    try:
        postmaster_at = parse(settings.directory.postmaster or f"postmaster@{settings.hostname}").canonical
    except AddressError as error:
        raise OperatorError(f"directory.postmaster: {settings.directory.postmaster!r} is not an address: {error}") from error
    resolver = Resolver(cache, settings.directory.recipient_delimiter, postmaster_at)
    trusted = Networks(settings.auth.trusted_networks)
    writable = None if settings.directory.find else core.directory
    authenticator = Authenticator(world, resolver, writable, settings.directory.upgrade_passwords, trusted.__contains__)
    stack.callback(authenticator.close)
    srs_domain = settings.outbound.srs_domain or settings.hostname
    rewriter = Rewriter(srs_domain, srs_keys(world, core.data).split(), core.index.find_return)
    delivery = DeliveryService(
        world,
        core.cluster,
        core.index,
        resolver,
        tasks,
        settings.hostname,
        settings.cluster.compression,
        settings.index.wait_s,
        settings.directory.quota_strict,
        rewriter.forward,
    )
    postmaster = Postmaster(delivery, rewriter)
    bouncer = Bouncer(world, core.opener, settings.hostname, postmaster.submit)
    delivery.announce = bouncer.tell
    router = Smarthost(_route(world, settings, core.data))
    outbound = Outbound(world, core.index, core.opener, bouncer, settings.outbound, settings.hostname, router, outgoing)
    stack.push_async_callback(outbound.stop)
    front = Front(resolver, authenticator, delivery, rewriter, outbound, sessions)
    if leases is not None:
        front.exclusive = Exclusive(core.index, world.clock, tasks, leases.process.owner)
        front.process = f"{leases.process.tag[:4]}."
        front.tallying = Tallying(core.index)
        front.tallying.share(*authenticator.tallies)
    return front


def _route(world: World, settings: Settings, data: str) -> Route | None:
    out = settings.outbound
    if not out.smarthost:
        return None
    host, port = parse_host_port(out.smarthost)
    context = None
    if out.smarthost_tls != "none":
        context = client_context(out.smarthost_tls != "opportunistic", out.smarthost_ca)
    return Route(host, port, out.smarthost_tls, context, _login(world, settings, data))


def _login(world: World, settings: Settings, data: str) -> Login | None:
    """Who we are to the smarthost. Its secret is read now, so that a mistake shows at the start, and for each connection."""
    out = settings.outbound
    if not out.smarthost_user:
        return None
    token = bool(out.smarthost_token_file or out.smarthost_token_command)
    if out.smarthost_token_command:
        return Login(out.smarthost_user, lambda: output_of(out.smarthost_token_command), token)
    name = "smarthost_token_file" if token else "smarthost_password_file"
    path = inside(data, out.smarthost_token_file or out.smarthost_password_file)

    def read() -> str:
        return world.disk.read_file(path).decode("utf-8", "replace").strip()

    try:
        read()
    except OSError as error:
        raise OperatorError(f"outbound.{name}: {error.strerror}") from error
    return Login(out.smarthost_user, read, token)


def _connections_max(world: World, settings: Settings) -> tuple[int, int]:
    """Caps of an SMTP door (there are three) and of POP3, as far as there are descriptors (X03)."""
    smtp, pop = settings.smtp.connections_max, settings.pop.connections_max
    wanted = 3 * smtp + pop
    room = world.descriptors - world.descriptors // limits.SEGMENTS_OPEN_SHARE
    room -= limits.DESCRIPTORS_RESERVED + settings.outbound.concurrency
    room -= limits.HTTP_CONNECTIONS_MAX if settings.metrics.listen else 0
    if room >= wanted:
        return smtp, pop
    world.log.event(Event.TROUBLE, error=f"only {world.descriptors} open files are allowed: fewer connections")
    return max(1, smtp * room // wanted), max(1, pop * room // wanted)


def _make_doors(core: Core, front: Front, tls: ssl.SSLContext | None) -> tuple[dict[Kind, Door], Door]:
    world, settings = core.world, core.settings
    trusted = Networks(settings.auth.trusted_networks)
    smtp = SmtpService(
        world,
        settings.smtp,
        settings.hostname,
        front.delivery,
        front.resolver,
        front.authenticator,
        front.rewriter,
        tls,
        bool(settings.outbound.smarthost),
        trusted,
    )
    if front.tallying is not None:
        front.tallying.share(smtp.rate.hour)
    maildrops = Maildrops(core.index, core.opener, front.sessions, front.exclusive)
    pop = PopService(
        world, settings.pop, settings.hostname, maildrops, front.authenticator, tls, settings.directory.apop, trusted
    )
    smtp_max, pop_max = _connections_max(world, settings)

    def smtp_door(kind: Kind) -> Door:
        return Door(
            world,
            kind.value,
            front.sessions,
            lambda connection: SmtpSession(smtp, kind, connection).run(),
            refuse_smtp,
            smtp_max,
            settings.smtp.connections_per_address_max,
            front.process,
        )

    pop_door = Door(
        world,
        "popd",
        front.sessions,
        lambda connection: PopSession(pop, connection).run(),
        refuse_pop,
        pop_max,
        settings.pop.connections_per_address_max,
        front.process,
    )
    return {kind: smtp_door(kind) for kind in (Kind.SMTP, Kind.SUBMISSION, Kind.LMTP)}, pop_door


async def open_doors(stack: AsyncExitStack, core: Core, front: Front, use_tls: bool) -> None:
    """Listens on all addresses of the settings. Raises OperatorError."""
    world, settings = core.world, core.settings
    tls: ssl.SSLContext | None = None
    if use_tls:
        front.certificates_lane = world.lane("certificates")
        stack.callback(front.certificates_lane.close)
        front.certificates = Certificates(
            inside(core.data, settings.tls.certificate), inside(core.data, settings.tls.key), world.disk, world.log
        )
        tls = front.certificates.front
    load_idna()
    doors, pop_door = _make_doors(core, front, tls)
    front.doors = [*doors.values(), pop_door]
    if isinstance(world.net, SharedNetwork):
        world.net.counts(front.open_connections)
    submission = doors[Kind.SUBMISSION]
    proxied = {submission: bool(settings.smtp.proxy_from), pop_door: bool(settings.pop.proxy_from)}
    plan: dict[str, tuple[Door, bool]] = {
        "smtp": (doors[Kind.SMTP], False),
        "submission": (submission, False),
        "submissions": (submission, True),
        "lmtp": (doors[Kind.LMTP], False),
        "pop3": (pop_door, False),
        "pop3s": (pop_door, True),
    }
    for name, address in listening(settings):
        door, implicit = plan[name]
        if implicit and tls is None:
            continue
        host, port = parse_host_port(address)
        if implicit and tls is not None and proxied[door]:  # a PROXY header may stand before the handshake
            listener = await world.net.listen(host, port, door.with_tls(tls))
        else:
            listener = await world.net.listen(host, port, door, tls if implicit else None)
        front.listeners.append(listener)
        front.listening.setdefault(name, listener.port)
        world.log.event(Event.LISTENING, door=name, address=f"{host}:{listener.port}")
