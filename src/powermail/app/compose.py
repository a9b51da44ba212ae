"""Owns how the rooms are put together into one running PowerMail, the same for real machines and the simulator.

A process is a core and roles on top of it: a front end, a keeper, the operator's desk. It has both where it is alone, one of
them where several processes share an index (`app.roles`). What is opened is closed in the opposite order by one exit stack,
however far the start came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from powermail.admin.desk import Desk
from powermail.admin.enrolment import own_id
from powermail.admin.operations import Operations
from powermail.admin.table import Progress
from powermail.app.authority import make_renewer, open_authority
from powermail.app.core import Core, MakeKeys, open_core, take_lock
from powermail.app.front import Front, make_front, open_doors
from powermail.app.keeping import Keeping, make_keeping
from powermail.app.places import Places, secret_files
from powermail.app.roles import ALONE, Duties
from powermail.base import limits
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.settings import Settings, inside
from powermail.base.sharing import SharedNetwork
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.directory.sqlite import SqliteDirectory
from powermail.door.life import Life
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.entering import Awaiting
from powermail.keeper.leases import Leases, Process, Step
from powermail.keeper.rebuild import Rebuilt
from powermail.keeper.salvage import Salvager
from powermail.storage.contract import StorageNode
from powermail.storage.identity import find_identity
from powermail.storage.layout import Standing
from powermail.storage.log.keys import SqliteKeyIndex
from powermail.storage.log.store import Options
from powermail.storage.node import LocalNode

Reload = Callable[[], Awaitable[tuple[list[str], list[str]]]]
_LOOK_S = 0.1


class PowerMail:
    """One process. `core`, `keeping`, `front` and `operations` are there once it has started."""

    core: Core
    keeping: Keeping
    front: Front
    operations: Operations

    def __init__(
        self,
        world: World,
        settings: Settings,
        data: str,
        broken: Callable[[BaseException], None],
        make_keys: MakeKeys = SqliteKeyIndex,
        tls: bool = True,
        duties: Duties = ALONE,
    ) -> None:
        """`broken` is called when a storage invariant broke: the process must stop."""
        self.duties = duties
        self.leases: Leases | None = None  # where others keep the same index
        self._awaiting: Awaiting | None = None  # where a keeper must enter what logs hold
        self.world = world
        self.settings = settings
        self.data = data
        self.serving = False  # started, and not stopping yet
        self.life = Life()
        self._when_broken = broken
        self.reload: Reload | None = None  # set by who has a settings file to read again
        self._make_keys = make_keys
        self._use_tls = tls
        self._stack = AsyncExitStack()
        self._promises, self._sessions, self._jobs, self._outgoing, self._watching = (
            Tasks(world.log, self._broken) for _ in range(5)
        )
        self._opened: Core | None = None

    def _broken(self, error: BaseException) -> None:
        self.life.broken = str(error) or type(error).__name__
        self._when_broken(error)

    # -- starting -------------------------------------------------------------------------------------------------

    async def start(self, doors: bool = True, workers: bool = True) -> None:
        """Opens everything. Raises OperatorError; then `stop` clears away what was opened."""
        if not self.duties.shared:  # else the parent of all has it
            self._take_lock()
        self._check_secrets()
        core = self.core = self._opened = await open_core(self._stack, self.world, self.settings, self.data, self._make_keys)
        if not core.cluster.nodes and core.certificate is None:  # else they join, and no mail is taken before
            raise OperatorError("no [[cluster.nodes]] are configured, and the layout has none; `powermail init` makes three")
        # A command that opens an installation for one call says soon what it has; a server waits for what it will serve with.
        wait_s = limits.NODE_OPEN_WAIT_S if doors or workers else limits.OPERATOR_NODE_S
        if self.duties.shared:
            self.leases = Leases(self.world, core.index, self._process())
            if not core.reads_logs:
                self._awaiting = Awaiting(self.world, core.cluster, core.index, core.epochs, self.leases)
        await core.cluster.start(self._admit, wait_s, lambda: core.index.epoch)
        self.keeping = make_keeping(self._stack, core)
        self.front = make_front(self._stack, core, self._promises, self._sessions, self._outgoing, self.leases)
        self.operations = await self._operations(doors)
        await self._catch_up()
        if doors:
            await self._refuse_dropped()
        steps = self._steps() | await self._certificate_steps(doors)
        if doors and self.settings.metrics.listen:
            steps["metrics"] = await self._watch()
        self.serving = True
        if workers:
            kept = {name: step for name, step in steps.items() if name not in self._steps()}
            self.keeping.start(self._jobs, self._broken, steps)
            core.cluster.when_changed.append(lambda: self._follow(kept))
            self._follow(kept)  # what came since the jobs were listed
        if doors:
            if self.duties.front:
                if self.leases is not None:
                    await self._able()
                await open_doors(self._stack, core, self.front, self._use_tls)
            self.life.open = True

    async def _able(self) -> None:
        """Waits until mail is taken and read here: another front end may end as soon as this one is ready. Not for long, as
        nobody waits for the sick (law 14).
        """
        core, now = self.core, self.world.clock.monotonic
        ends_at = now() + limits.NODE_OPEN_WAIT_S
        while now() < ends_at and not (core.cluster.takes_mail() and (core.index.catching_up or not core.index.unsettled)):
            await asyncio.sleep(_LOOK_S)

    def _follow(self, kept: dict[str, Step]) -> None:
        """Nodes came or went: their jobs come and go with them."""
        if self.serving:
            self.keeping.start(self._jobs, self._broken, self._steps() | kept)

    def _process(self) -> Process:
        duties, world, certificate = self.duties, self.world, self.core.certificate
        tag = world.entropy.octets(8).hex()
        machine = (
            own_id(certificate) if certificate is not None else ""
        ) or duties.machine  # its name in the cluster, if it has one
        return Process(duties.part, machine, duties.pid, duties.version, world.clock.now(), tag, duties.died)

    async def _admit(self, node: StorageNode) -> None:
        leases = self.leases
        if leases is None:
            return await self.core.admission.admit(node)

        async def may_take_in() -> bool:
            return self.duties.keeper and await leases.take(f"admission {node.id}")

        return await self.core.admission.admit_known(node, may_take_in)

    def _steps(self) -> dict[str, Step]:
        """What works in the background of this process."""
        front: dict[str, Step] = {"outbound": self.front.outbound.step, "deadlines": self.front.sweep}
        if self.leases is None:
            return {**self.keeping.jobs(), **front}
        steps = self.keeping.own_jobs(self.leases, self._awaiting)
        if self.duties.keeper:
            steps |= self.keeping.leased_jobs(self.leases)
        if self.duties.front:
            steps |= front
            if self.front.exclusive is not None:
                steps["maildrops"] = self.front.exclusive.step
            if self.front.tallying is not None:
                steps["tallies"] = self.front.tallying.step
            if isinstance(self.world.net, SharedNetwork):
                steps["share"] = self.world.net.step
        return steps

    async def _certificate_steps(self, doors: bool) -> dict[str, Step]:
        """What keeps this process's certificate, and gives others theirs where one process does everything."""
        core, registrar = self.core, None
        steps: dict[str, Step] = {}
        if core.certificate is None:
            return steps
        if doors and self.settings.peers.authority_listen and not self.duties.shared:
            registrar, service = await open_authority(
                self._stack, self.world, self.settings, self.data, core.index, core.certificate, self._broken
            )
            steps["authority"] = service.step
        steps["certificate"] = make_renewer(self._stack, self.world, self.settings, core.certificate, registrar).step
        return steps

    async def _watch(self) -> Callable[[], Awaitable[float]]:
        """Opens the listener of monitoring, which says from now on that mail is not taken yet; its worker."""
        from powermail.httpd.service import Monitor  # with its libraries, only where it is wanted

        monitor = Monitor(self.operations.desk, self.life, self._watching)
        self._stack.push_async_callback(monitor.close)
        self.front.watched_by.append(monitor.door)
        await monitor.open()
        return monitor.step

    async def _operations(self, doors: bool) -> Operations:
        core, keeping, front = self.core, self.keeping, self.front
        lane = self.world.lane("places")
        self._stack.callback(lane.close)
        paths = {node.id: inside(self.data, node.path).rstrip("/") for node in self.settings.cluster.nodes if node.path}
        places = Places(self.world, self.data, paths)
        noting = lane.run(places.note, [node.id for node in core.cluster.readable() if node.id in paths])
        noting.add_done_callback(self._noted)
        await asyncio.wait([noting], timeout=limits.OPERATOR_LOOK_S)  # law 14: nobody waits for a disk that hangs

        async def unmounted(node: str) -> str:
            try:
                async with asyncio.timeout(limits.OPERATOR_COPY_S):
                    return await lane.run(places.unmounted, node)
            except TimeoutError:
                return f"the place of node {node} does not answer"

        salvager = None
        if core.reads_logs:
            salvager = Salvager(self.world, core.cluster, core.index, core.directory, keeping.repairer)
        return Operations(
            Desk(
                world=self.world,
                settings=self.settings,
                data=self.data,
                cluster=core.cluster,
                following=core.following,
                index=core.index,
                directory=core.directory,
                owners=core.owners,
                purges=keeping.purges,
                resolver=front.resolver,
                opener=core.opener,
                repairer=keeping.repairer,
                scrubber=keeping.scrubber,
                forgetter=keeping.forgetter,
                admission=core.admission,
                workers=keeping.workers,
                connections=front.connections,
                hash_password=front.authenticator.hash,
                certificate_ends=front.certificate_ends,
                serving=doors,
                unmounted=unmounted,
                reload=self.reload,
                copy_databases=self._copy_databases,
                outbound_troubles=front.outbound.troubles,
                peer_certificate=core.certificate,
                expeller=keeping.expeller,
                salvager=salvager,
                open_disk=self._open_disk,
                leases=self.leases,
                parts=self.duties.parts,
            )
        )

    async def _open_disk(self, path: str) -> StorageNode:
        """The directory of a node that is no member. Raises OperatorError, NodeTrouble."""
        core, path = self.core, inside(self.data, path).rstrip("/")
        lane = self.world.lane("salvage")
        try:
            identity = await lane.run(find_identity, self.world.disk, path)
        finally:
            lane.close()
        for row in await core.index.node_rows():
            if row.incarnation == identity.incarnation:
                raise OperatorError(f"{path} is the disk of node {row.id}, which is a member: nothing there is lost")
        options = Options(self.settings.cluster.segment_octets, 0)
        disk = LocalNode(self.world, core.index.cluster, identity.node, path, "", 0, options, self._make_keys)
        try:
            await disk.open()
        except BaseException:
            await disk.close()
            raise
        disk.id = f"the disk in {path}"  # no node has such a name: nothing is believed or noted of it
        return disk

    def _noted(self, noting: asyncio.Future[None]) -> None:
        if not noting.cancelled() and (error := noting.exception()) is not None:
            self.world.log.event(Event.TROUBLE, worker="start", error=str(error))

    async def _copy_databases(self, path: str) -> None:
        """The index first: what the directory knows more than it is an account without mail, never mail without its account.
        What is in a database of its own has backups of its own.
        """
        if isinstance(self.core.index, SqliteIndex):
            await self.core.index.copy_to(f"{path}/index.db")
        if isinstance(self.core.directory, SqliteDirectory):
            await self.core.directory.copy_to(f"{path}/directory.db")

    async def _refuse_dropped(self) -> None:
        """A member that left the settings may hold the only copies. Raises OperatorError with their number."""
        index, cluster = self.core.index, self.core.cluster
        members = {row.id: row.group or row.id for row in await index.node_rows()}
        expelled = {row.id for row in cluster.layout.rows if row.state is Standing.EXPELLED}  # known again to an older index
        dropped = [name for name in members if name not in cluster.nodes and name not in expelled]
        if not dropped:
            return
        members = {name: group for name, group in members.items() if name not in expelled}
        here = {name: group for name, group in members.items() if name not in dropped}
        lost = (await index.under_copied_total(here, 1))[0] - (await index.under_copied_total(members, 1))[0]
        if lost > 0:
            raise OperatorError(
                f"the settings no longer name node {', '.join(dropped)}, which holds the only copy of {lost} messages: put its "
                f"[[cluster.nodes]] back, or give them up with `powermail node expel {dropped[0]} --yes`"
            )

    def _take_lock(self) -> None:
        self._stack.callback(take_lock(self.world, self.data).release)

    def _check_secrets(self) -> None:
        """Files that only we may read (X07)."""
        peers = any(node.address for node in self.settings.cluster.nodes)
        for name in secret_files(self.settings, self.data, peers, self._use_tls):
            if self.world.disk.exists(name) and self.world.disk.mode(name) & 0o007:
                raise OperatorError(f"{name} holds a secret and everybody may read it; run `chmod o-rwx {name}`")

    async def _catch_up(self) -> None:
        """At the start, so that all that is durable is listed, before anybody is let in; nobody waits for the sick (law 14)."""
        core = self.core
        settle = core.reconciler.settle
        steps: tuple[Callable[[], Awaitable[object]], ...] = (core.epochs.step, settle, core.epochs.step)
        if self._awaiting is not None:
            steps = (self._awaiting.start,)
        elif self.leases is not None:  # an epoch is a keeper's job
            steps = (settle, core.epochs.step_here)
        for step in steps:
            try:
                await step()
            except Trouble as error:
                self.world.log.event(Event.TROUBLE, worker="start", error=str(error))
        await core.marker.put_all()  # law 10

    # -- rebuilding -----------------------------------------------------------------------------------------------

    async def rebuild(
        self, progress: Progress, without: Sequence[str] = (), replace: bool = False, by_settings: bool = False
    ) -> Rebuilt:
        """Makes a new index from the nodes alone (`app.rebuilding`). Raises OperatorError, Trouble.

        One that is there and cannot be used is set aside; a good one only with `replace`.
        """
        from powermail.app.rebuilding import Rebuild, Wanted

        self._take_lock()
        wanted = Wanted(tuple(without), replace, by_settings)
        return await Rebuild(self.world, self.settings, self.data, self._make_keys, progress, wanted).run(self._stack)

    # -- stopping -------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        """From now on nobody new comes in, and who asks hears that this process stops. Idempotent."""
        if self.serving and not self.life.draining:
            self.life.draining = True
            self.front.refuse()

    async def leave(self) -> None:
        """Takes no new connection, as others of this machine do; its clients may end what they are at. `stop` follows."""
        self.front.close_listeners()
        if isinstance(self.world.net, SharedNetwork):
            await self.world.net.taken()
        await self._sessions.wait(limits.WORKER_LEAVE_S)

    async def stop(self, drain_s: float = limits.DRAIN_TIMEOUT_S) -> None:
        """Drains: refuses the new, finishes what was promised, closes. Idempotent."""
        self.refuse()
        was_serving, self.serving = self.serving, False
        await self._sessions.drain(drain_s)
        await self._promises.drain(drain_s)
        await self._jobs.cancel()
        if was_serving:
            await self._within(limits.STOP_REST_S, self._wind_up())
        await self._within(limits.STOP_CLOSE_S, self._stack.aclose())

    async def _within(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        """What hangs does not hold up a stop: it is left, and the next start does what is to be done, as after a crash."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=seconds)
        if done:
            task.result()
            return
        task.cancel()
        self.world.counters.add("process.stops_cut_off")
        self.world.log.event(Event.TROUBLE, worker="stop", error=f"it takes longer than {seconds:g} s; what hangs is left")

    async def _wind_up(self) -> None:
        await self.front.outbound.stop()  # before the index rests: what became of mail is still to be written down
        await self._rest()

    async def _rest(self) -> None:
        """So that the next start finds nothing to do: all entered, marks on the nodes, the slot stopped (law 10)."""
        core = self.core
        try:
            if self.leases is None:
                await core.reconciler.settle()
                await self.keeping.collect_all()
            else:
                await self.leases.stop()  # the others go on
            await core.index.rest()
            await core.marker.put_all()
        except Trouble as error:
            self.world.log.event(Event.TROUBLE, worker="stop", error=str(error))

    def abandon(self) -> None:
        """What the death of the process leaves: no task goes on, the databases are let go of as they are (simulator)."""
        self.serving = False
        for tasks in (self._sessions, self._promises, self._jobs, self._outgoing, self._watching):
            tasks.abandon()
        if self._opened is not None:
            self._opened.abandon()
