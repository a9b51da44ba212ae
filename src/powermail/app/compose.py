"""Owns how the rooms are put together into one running PowerMail, the same for real machines and the simulator.

A process is a core and roles on top of it: a front end, a keeper, the operator's desk. What is opened is closed in the opposite
order by one exit stack, however far the start came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from powermail.admin.operations import Operations, Progress
from powermail.app.core import Core, MakeKeys, inside, make_nodes, open_core
from powermail.app.front import Front, make_front, open_doors
from powermail.app.keeping import Keeping, make_keeping
from powermail.app.setup import cluster_of_nodes
from powermail.base import limits
from powermail.base.errors import OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.settings import Settings
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.keeper.rebuild import Rebuilder, Rebuilt
from powermail.storage.log.keys import SqliteKeyIndex


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
    ) -> None:
        """`broken` is called when a storage invariant broke: the process must stop."""
        self.world = world
        self.settings = settings
        self.data = data
        self.serving = False  # started, and not stopping yet
        self._broken = broken
        self._make_keys = make_keys
        self._use_tls = tls
        self._stack = AsyncExitStack()
        self._promises = Tasks(world.log, broken)
        self._sessions = Tasks(world.log, broken)
        self._jobs = Tasks(world.log, broken)
        self._opened: Core | None = None

    # -- starting -------------------------------------------------------------------------------------------------

    async def start(self, doors: bool = True, workers: bool = True) -> None:
        """Opens everything. Raises OperatorError; then `stop` clears away what was opened."""
        if not self.settings.cluster.nodes:
            raise OperatorError("no [[cluster.nodes]] are configured; `powermail init` makes three")
        self._take_lock()
        self._check_secrets()
        core = self.core = self._opened = await open_core(self._stack, self.world, self.settings, self.data, self._make_keys)
        await core.cluster.start(core.admission.admit)
        self.keeping = make_keeping(self._stack, core)
        self.front = make_front(self._stack, core, self._promises, self._sessions)
        self.operations = self._operations()
        await self._catch_up()
        self.serving = True
        if workers:
            self.keeping.start(self._jobs, self._broken, {"outbound": self.front.outbound.step, "deadlines": self.front.sweep})
        if doors:
            await open_doors(self._stack, core, self.front, self._use_tls)

    def _operations(self) -> Operations:
        core, keeping, front = self.core, self.keeping, self.front
        return Operations(
            self.world,
            core.cluster,
            core.index,
            core.directory,
            front.resolver,
            core.opener,
            keeping.repairer,
            keeping.scrubber,
            keeping.forgetter,
            core.admission,
            keeping.workers,
            front.connections,
            front.authenticator.hash,
        )

    def _take_lock(self) -> None:
        try:
            lock = self.world.disk.lock(f"{self.data}/lock")
        except BlockingIOError as error:
            raise OperatorError(f"another process serves {self.data}") from error
        except OSError as error:
            raise OperatorError(f"cannot write in {self.data}: {error.strerror}") from error
        self._stack.callback(lock.release)

    def _check_secrets(self) -> None:
        """Files that only we may read (X07)."""
        names = [f"{self.data}/srs.keys", inside(self.data, self.settings.outbound.smarthost_password_file)]
        if self._use_tls:
            names.append(inside(self.data, self.settings.tls.key))
        for name in names:
            if not name.endswith("/") and self.world.disk.exists(name) and self.world.disk.mode(name) & 0o007:
                raise OperatorError(f"{name} holds a secret and everybody may read it; run `chmod o-rwx {name}`")

    async def _catch_up(self) -> None:
        """At the start, so that all that is durable is listed, before anybody is let in; nobody waits for the sick (law 14)."""
        core = self.core
        for step in (core.epochs.step, core.reconciler.settle, core.epochs.step):
            try:
                await step()
            except Trouble as error:
                self.world.log.event(Event.TROUBLE, worker="start", error=str(error))
        await core.marker.put_all()  # law 10

    # -- rebuilding -----------------------------------------------------------------------------------------------

    async def rebuild(self, progress: Progress, without: Sequence[str] = ()) -> Rebuilt:
        """Makes a new index from the nodes alone. Raises OperatorError, Trouble."""
        path = inside(self.data, self.settings.index.path)
        if self.world.disk.exists(path):
            raise OperatorError(f"{path} exists; move it away first (with its -wal and -shm), nothing was changed")
        self._take_lock()
        cluster = cluster_of_nodes(self.world, self.settings, self.data)
        nodes = make_nodes(self.world, self.settings, self.data, cluster, self._make_keys)
        for node in nodes:
            self._stack.push_async_callback(node.close)
            try:
                await node.open()
            except (OperatorError, Trouble) as error:
                self.world.log.event(Event.TROUBLE, node=node.id, error=str(error))  # the rebuild says what that costs
        required = self.settings.cluster.copies_required
        return await Rebuilder(self.world, nodes, path, cluster, required, progress, without).run()

    # -- stopping -------------------------------------------------------------------------------------------------

    async def stop(self, drain_s: float = limits.DRAIN_TIMEOUT_S) -> None:
        """Drains: refuses the new, finishes what was promised, closes. Idempotent."""
        was_serving, self.serving = self.serving, False
        if was_serving:
            self.front.refuse()
        await self._sessions.drain(drain_s)
        await self._promises.drain(drain_s)
        await self._jobs.cancel()
        if was_serving:
            await self._rest()
        await self._stack.aclose()

    async def _rest(self) -> None:
        """So that the next start finds nothing to do: all entered, marks on the nodes, the slot stopped (law 10)."""
        core = self.core
        try:
            await core.reconciler.settle()
            await self.keeping.collect_all()
            await core.index.rest()
            await core.marker.put_all()
        except Trouble as error:
            self.world.log.event(Event.TROUBLE, worker="stop", error=str(error))

    def abandon(self) -> None:
        """What the death of the process leaves: no task goes on, the databases are let go of as they are (simulator)."""
        self.serving = False
        for tasks in (self._sessions, self._promises, self._jobs):
            tasks.abandon()
        if self._opened is not None:
            self._opened.abandon()
