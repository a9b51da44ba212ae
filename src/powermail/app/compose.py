"""Owns how the rooms are put together into one running PowerMail, the same for real machines and the simulator."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import msgspec

from powermail.admin.operations import Operations, Progress
from powermail.base import limits
from powermail.base.connection import Door
from powermail.base.disk import Lock
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.net import Listener, parse_host_port
from powermail.base.settings import Settings
from powermail.base.tasks import Tasks, Worker
from powermail.base.tls import Certificates, client_context
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.delivery.internal import Postmaster
from powermail.delivery.srs import Rewriter
from powermail.delivery.transaction import DeliveryService
from powermail.directory.authenticate import Authenticator
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.checkpoint import Checkpointer
from powermail.keeper.collect import Collector
from powermail.keeper.rebuild import Rebuilder, Rebuilt
from powermail.keeper.reconcile import Reconciler
from powermail.keeper.repair import Repairer, Scrubber
from powermail.mailbox.maildrop import Maildrops
from powermail.outbound.bounce import Bouncer
from powermail.outbound.client import Route
from powermail.outbound.sender import Outbound
from powermail.popd.session import PopService, PopSession
from powermail.popd.session import refuse as refuse_pop
from powermail.smtpd.service import Kind, SmtpService
from powermail.smtpd.session import SmtpSession
from powermail.smtpd.session import refuse as refuse_smtp
from powermail.storage.keyindex import KeyIndex, SqliteKeyIndex
from powermail.storage.node import LocalNode
from powermail.storage.segments import OPEN_MAX_DEFAULT
from powermail.storage.store import Options


def inside(data: str, path: str) -> str:
    """A path of the settings: relative ones are below the data directory."""
    return path if path.startswith("/") else f"{data}/{path}"


class PowerMail:
    """One process: nodes, index, directory, doors, keeper, outbound."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        data: str,
        broken: Callable[[BaseException], None],
        make_keys: Callable[[str, bytes], KeyIndex] = SqliteKeyIndex,
        tls: bool = True,
    ) -> None:
        self.world = world
        self.settings = settings
        self.data = data
        self.tasks = Tasks(world.log, broken)
        self.listening: dict[str, int] = {}
        self.workers: list[Worker] = []
        self._make_keys = make_keys
        self._use_tls = tls
        self._listeners: list[Listener] = []
        self._doors: list[Door] = []
        self._worker_tasks = Tasks(world.log, broken)
        self._sessions = Tasks(world.log, broken)
        self._certificates: Certificates | None = None
        self._authenticator: Authenticator | None = None
        self._lock: Lock | None = None
        self._settled = False  # true while everything durable is, or will be, in the index

    # -- starting -------------------------------------------------------------------------------------------------

    async def start(self, doors: bool = True, workers: bool = True) -> None:
        """Opens everything. Raises OperatorError; then `stop` clears away what was opened."""
        world, settings = self.world, self.settings
        if not settings.cluster.nodes:
            raise OperatorError("no [[cluster.nodes]] are configured; `powermail init` makes three")
        self._take_lock()
        self._check_secrets()
        self.index = SqliteIndex(world, inside(self.data, settings.index.path))
        await self.index.open()
        if not self.index.cluster:
            raise OperatorError(f"{settings.index.path} belongs to no cluster; `powermail rebuild` makes it anew")
        self.directory = SqliteDirectory(world, inside(self.data, settings.directory.path))
        await self.directory.open()
        self.cluster = Cluster(world, self._nodes(), settings.cluster.copies_required, settings.cluster.policy)
        self.fetcher = Fetcher(world, self.cluster, self.index.note_repair)
        self.reconciler = Reconciler(world, self.cluster, self.index)
        await self.cluster.start(self.reconciler.admit)
        await self._settle()
        self._settled = True
        self._compose_services()
        if workers:
            self._start_workers()
        if doors:
            await self._open_doors()

    def _check_secrets(self) -> None:
        """Files that only we may read (X07)."""
        names = [f"{self.data}/srs.keys", inside(self.data, self.settings.outbound.smarthost_password_file)]
        if self._use_tls:
            names.append(inside(self.data, self.settings.tls.key))
        for name in names:
            if not name.endswith("/") and self.world.disk.exists(name) and self.world.disk.mode(name) & 0o007:
                raise OperatorError(f"{name} holds a secret and everybody may read it; run `chmod o-rwx {name}`")

    def _take_lock(self) -> None:
        try:
            self._lock = self.world.disk.lock(f"{self.data}/lock")
        except BlockingIOError as error:
            raise OperatorError(f"another process serves {self.data}") from error
        except OSError as error:
            raise OperatorError(f"cannot write in {self.data}: {error.strerror}") from error

    def _nodes(self) -> list[LocalNode]:
        cluster = self.settings.cluster
        files = self.world.descriptors // limits.SEGMENTS_OPEN_SHARE // len(cluster.nodes)
        options = Options(cluster.segment_octets, cluster.reserve_octets, max(4, min(OPEN_MAX_DEFAULT, files)))
        return [
            LocalNode(
                self.world,
                self.index.cluster,
                node.id,
                inside(self.data, node.path).rstrip("/"),
                node.group,
                node.priority,
                options,
                self._make_keys,
            )
            for node in cluster.nodes
        ]

    def _compose_services(self) -> None:
        world, settings = self.world, self.settings
        cache = DirectoryCache(
            self.directory, world.clock, world.counters, settings.directory.cache_ttl_s, settings.directory.stale_s
        )
        self.resolver = Resolver(cache, settings.directory.recipient_delimiter)
        self._authenticator = Authenticator(world, self.resolver, self.directory, settings.directory.upgrade_passwords)
        self.rewriter = Rewriter(settings.outbound.srs_domain or settings.hostname, self._srs_keys())
        self.delivery = DeliveryService(
            world,
            self.cluster,
            self.index,
            self.resolver,
            self.tasks,
            settings.hostname,
            settings.cluster.compression,
            settings.index.wait_s,
            settings.directory.quota_strict,
            self.rewriter.forward,
        )
        postmaster = Postmaster(self.delivery, self.rewriter)
        bouncer = Bouncer(world, self.index, self.fetcher, settings.hostname, postmaster.submit)
        self.outbound = Outbound(world, self.index, self.fetcher, bouncer, settings.outbound, settings.hostname, self._route())
        self.repairer = Repairer(world, self.cluster, self.index, self.fetcher, settings.cluster.repair_after_s)
        self.scrubber = Scrubber(world, self.cluster, self.index)
        self.collector = Collector(world, self.cluster, self.index)
        self.checkpointer = Checkpointer(world, self.cluster, self.index)
        self.operations = Operations(
            world,
            self.cluster,
            self.index,
            self.directory,
            self.resolver,
            self.fetcher,
            self.repairer,
            self.scrubber,
            self.reconciler,
            self.workers,
            lambda: {door.name: door.connections for door in self._doors},
            self._authenticator.hash,
        )

    def _srs_keys(self) -> list[bytes]:
        """The first line of `srs.keys` signs, all verify; made at the first start."""
        path = f"{self.data}/srs.keys"
        if not self.world.disk.exists(path):
            self.world.disk.replace_file(path, self.world.entropy.octets(16).hex().encode() + b"\n")
        return [line for line in self.world.disk.read_file(path).split() if line]

    def _route(self) -> Route | None:
        out = self.settings.outbound
        if not out.smarthost:
            return None
        host, port = parse_host_port(out.smarthost)
        password = ""
        if out.smarthost_password_file:
            try:
                octets = self.world.disk.read_file(inside(self.data, out.smarthost_password_file))
            except OSError as error:
                raise OperatorError(f"outbound.smarthost_password_file: {error.strerror}") from error
            password = octets.decode().strip()
        context = None
        if out.smarthost_tls != "none":
            context = client_context(out.smarthost_tls != "opportunistic", out.smarthost_ca)
        return Route(host, port, out.smarthost_tls, context, out.smarthost_user, password)

    def _start_workers(self) -> None:
        world = self.world
        steps = {
            "health": self.cluster.check_health,
            "reconcile": self.reconciler.step,
            "repair": self.repairer.step,
            "collect": self.collector.step,
            "compact": self.collector.compact,
            "checkpoint": self.checkpointer.step,
            "scrub": self.scrubber.step,
            "outbound": self.outbound.step,
            "deadlines": self._sweep,
        }
        for name, step in steps.items():
            worker = Worker(name, step, world.clock, world.log)
            self.workers.append(worker)
            self._worker_tasks.start(worker.run(), f"worker-{name}")

    async def _sweep(self) -> float:
        for door in self._doors:
            door.sweep()
        if self._certificates is not None:
            await self.certificates_lane.run(self._certificates.reload)
        return 1.0

    def _connections_max(self) -> tuple[int, int]:
        """Caps of an SMTP door (there are three) and of POP3, as far as there are descriptors (X03)."""
        smtp, pop = self.settings.smtp.connections_max, self.settings.pop.connections_max
        wanted = 3 * smtp + pop
        room = self.world.descriptors - self.world.descriptors // limits.SEGMENTS_OPEN_SHARE
        room -= limits.DESCRIPTORS_RESERVED + self.settings.outbound.concurrency
        if room >= wanted:
            return smtp, pop
        self.world.log.event(Event.TROUBLE, error=f"only {self.world.descriptors} open files are allowed: fewer connections")
        return max(1, smtp * room // wanted), max(1, pop * room // wanted)

    async def _open_doors(self) -> None:
        settings, world = self.settings, self.world
        tls: ssl.SSLContext | None = None
        if self._use_tls:
            self.certificates_lane = world.lane("certificates")
            self._certificates = Certificates(
                inside(self.data, settings.tls.certificate), inside(self.data, settings.tls.key), world.disk, world.log
            )
            tls = self._certificates.front
        assert self._authenticator is not None
        smtp = SmtpService(
            world,
            settings.smtp,
            settings.hostname,
            self.delivery,
            self.resolver,
            self._authenticator,
            self.rewriter,
            tls,
            bool(settings.outbound.smarthost),
        )
        maildrops = Maildrops(self.index, self.fetcher, self._sessions)
        pop = PopService(world, settings.pop, settings.hostname, maildrops, self._authenticator, tls, settings.directory.apop)

        smtp_max, pop_max = self._connections_max()

        def smtp_door(kind: Kind) -> Door:
            return Door(
                world,
                kind.value,
                self._sessions,
                lambda connection: SmtpSession(smtp, kind, connection).run(),
                refuse_smtp,
                smtp_max,
                settings.smtp.connections_per_address_max,
            )

        pop_door = Door(
            world,
            "popd",
            self._sessions,
            lambda connection: PopSession(pop, connection).run(),
            refuse_pop,
            pop_max,
            settings.pop.connections_per_address_max,
        )
        mail, submission, local = smtp_door(Kind.SMTP), smtp_door(Kind.SUBMISSION), smtp_door(Kind.LMTP)
        self._doors = [mail, submission, local, pop_door]
        plan: list[tuple[str, list[str], Door, bool]] = [
            ("smtp", settings.smtp.listen, mail, False),
            ("submission", settings.smtp.submission, submission, False),
            ("submissions", settings.smtp.submissions, submission, True),
            ("lmtp", settings.smtp.lmtp, local, False),
            ("pop3", settings.pop.listen, pop_door, False),
            ("pop3s", settings.pop.listen_tls, pop_door, True),
        ]
        for name, addresses, door, implicit in plan:
            if implicit and tls is None:
                continue
            for address in addresses:
                host, port = parse_host_port(address)
                listener = await world.net.listen(host, port, door, tls if implicit else None)
                self._listeners.append(listener)
                self.listening.setdefault(name, listener.port)
                world.log.event(Event.LISTENING, door=name, address=f"{host}:{listener.port}")

    # -- rebuilding -----------------------------------------------------------------------------------------------

    async def rebuild(self, progress: Progress) -> Rebuilt:
        """Makes a new index from the nodes alone. Raises OperatorError, Trouble."""
        path = inside(self.data, self.settings.index.path)
        if self.world.disk.exists(path):
            raise OperatorError(f"{path} exists; move it away first (with its -wal and -shm), nothing was changed")
        self._take_lock()
        cluster = ""
        for node in self.settings.cluster.nodes:
            name = f"{inside(self.data, node.path)}/identity"
            if self.world.disk.exists(name):
                cluster = msgspec.json.decode(self.world.disk.read_file(name), type=dict[str, Any])["cluster"]
        if not cluster:
            raise OperatorError("no node has an identity: are the disks mounted?")
        self.index = SqliteIndex(self.world, path)
        await self.index.open(cluster)
        nodes = self._nodes()
        self.cluster = Cluster(self.world, nodes, self.settings.cluster.copies_required, self.settings.cluster.policy)
        for opened in nodes:
            await opened.open()
        return await Rebuilder(self.world, nodes, self.index, progress).run()

    # -- stopping -------------------------------------------------------------------------------------------------

    async def stop(self, drain_s: float = limits.DRAIN_TIMEOUT_S) -> None:
        """Drains: refuses the new, finishes what was promised, closes. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for door in self._doors:
            door.drain()
        await self._sessions.drain(drain_s)
        await self.tasks.drain(drain_s)
        await self._worker_tasks.cancel()
        if self._settled:
            self._settled = False
            await self._settle()
        if hasattr(self, "outbound"):
            await self.outbound.stop()
        if self._authenticator is not None:
            self._authenticator.close()
        if self._certificates is not None:
            self.certificates_lane.close()
        if hasattr(self, "cluster"):
            await self.cluster.close()
        for part in ("index", "directory"):
            if hasattr(self, part):
                await getattr(self, part).close()
        if self._lock is not None:
            self._lock.release()

    async def _settle(self) -> None:
        """At the start, so that all that is durable is listed; at the end, so that the next start finds nothing to do."""
        try:
            await self.reconciler.settle()
        except Trouble as error:
            self.world.log.event(Event.TROUBLE, worker="reconcile", error=str(error))

    def abandon(self) -> None:
        """What the death of the process leaves: no task goes on, the databases are let go of as they are (simulator)."""
        for tasks in (self._sessions, self.tasks, self._worker_tasks):
            tasks.abandon()
        for part in ("index", "directory"):
            if hasattr(self, part):
                getattr(self, part).abandon()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serves until told to stop."""
        await stop.wait()
        self.world.log.event(Event.DRAINING, connections=sum(door.connections for door in self._doors))
        await self.stop()
        self.world.log.event(Event.STOPPED)
