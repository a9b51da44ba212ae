"""Owns the simulation of one process that does everything: the production composition root, its disks, its death and rebirth.

Safety: whatever happens, no client ever sees what it must not (checked while it runs and at the end). Liveness: when the faults
are over, everything is redundant, read and sent within a bounded virtual time.
"""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from powermail.app.compose import PowerMail
from powermail.app.setup import make_index
from powermail.base.errors import PowerMailError
from powermail.base.settings import IndexSettings, NodeSettings, Settings
from powermail.index.contract import Index
from powermail.sim import loop as sim_loop
from powermail.sim import settings as st
from powermail.sim.checks import buried_keys, live_groups, taken_groups
from powermail.sim.faults import DiskFaults, Faults
from powermail.sim.pace import PACE, put
from powermail.sim.played import Outcome, Played
from powermail.sim.world import DATA, Machine
from powermail.storage.identity import make_store
from powermail.storage.log.keys import KeyIndex, SqliteKeyIndex
from powermail.storage.node import LocalNode

NODES = {"a": "rack-1", "b": "rack-2", "c": "rack-3", "d": "rack-3"}
_CLOSING_S = 5.0


class Simulation(Played):
    """One process that does everything, with its index in a file."""

    def __init__(self, seed: int, seconds: float, real: str, only: Sequence[str] = ()) -> None:
        super().__init__(seed, seconds, Machine(random.Random(seed), list(NODES), real), only)
        self.node_names = list(NODES)
        self._kept = st.Kept.drawn(random.Random(seed + 2))
        self._saved: dict[str, float] = {}  # account: when all of it was seen to stand in durable checkpoints
        self._powermail: PowerMail | None = None
        self._ended = asyncio.Event()  # of the process that runs: who asks it something waits no longer

    def _settings(self) -> Settings:
        real = self.machine.real
        nodes = [NodeSettings(id=name, path=f"nodes/{name}", group=group) for name, group in NODES.items()]
        return st.of_server(real, self._kept, nodes, IndexSettings(path=f"{real}/index.db"), "server")

    # -- the process --------------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        await self._initialise()
        await self._start()

    def faults(self) -> Faults:
        return Faults(self, self._chance, self._only)

    async def heal(self, faults: DiskFaults[Any]) -> None:
        for name in self.node_names:  # a restored index may say that one is blocked which the operator has released since
            await faults.obey(name)
            await self.operation("node_block", node=name, blocked=False)

    def running(self) -> bool:
        return self._powermail is not None

    async def end(self) -> None:
        assert self._powermail is not None
        self.count(self._powermail.world)
        await self._powermail.stop(5.0)

    async def _initialise(self) -> None:
        world, real = self.machine.world(), self.machine.real
        cluster = world.entropy.octets(16).hex()
        await make_index(world, f"{real}/index.db", cluster)
        for name in NODES:
            make_store(world.disk, f"{DATA}/nodes/{name}", cluster, name, world.entropy)
        await self.make_directory(world)
        self.machine.settle()

    def _make_keys(self, path: str, store: bytes) -> KeyIndex:
        return SqliteKeyIndex(self.machine.disk.keys_path(path), store)

    def _process(self) -> PowerMail:
        return PowerMail(self.machine.world(), self._settings(), DATA, self.broken, self._make_keys, tls=False)

    async def _start(self) -> None:
        self._powermail = self._process()
        self._ended = asyncio.Event()
        await self._powermail.start()

    def index(self) -> Index | None:
        """The index of the process that runs now."""
        return self._powermail.core.index if self._powermail is not None and self._powermail.serving else None

    def live(self, key: bytes) -> tuple[set[str], set[str]]:
        running = self._powermail
        if running is None or not running.serving:
            return set(), set(NODES.values())
        return live_groups(_local(running), self.machine, key, NODES.__getitem__)

    def taken(self, key: bytes) -> set[str]:
        return taken_groups(NODES, self.machine, key)

    async def restart(self, pause_s: float) -> None:
        """Lets go of the process that was killed and starts a new one."""
        self.let_go()
        await asyncio.sleep(pause_s)
        self.machine.settle()
        for attempt in range(60):
            try:
                await self._start()
                self.forgiven()
                return
            except PowerMailError as error:
                self.machine.note(f"start failed: {error}")
                if attempt == 59:
                    self.outcome.problems.append(f"does not start: {error}")
                await self._give_up()
                await asyncio.sleep(2.0)

    async def _give_up(self) -> None:
        """A process that could not start closes what it had opened, as far as it can, and ends."""
        assert self._powermail is not None
        closing = asyncio.ensure_future(self._powermail.stop(1.0))
        await asyncio.wait([closing], timeout=_CLOSING_S)
        if not closing.done():
            closing.cancel()
        elif closing.exception() is not None:
            self.machine.note(f"stop failed: {closing.exception()}")
        self.machine.kill()
        self.let_go()
        gc.collect()  # what was half open: a database that a dead process has open must not be seen by the next one

    def let_go(self) -> None:
        """The dead process holds no files any more."""
        dead, self._powermail = self._powermail, None
        self._ended.set()
        if dead is not None:
            self.count(dead.world)
            dead.abandon()

    @property
    def tombstone_s(self) -> float:
        return self._kept.tombstone_days * 86_400.0

    def forget_unsaved(self, without: str) -> None:
        """The index is lost: only what stands in durable checkpoints, or in a tombstone on a node that is read, is known.

        Without a node, what only just became durable again after another disk was lost may have been there alone: then nothing
        older than this moment counts.
        """
        loop = asyncio.get_running_loop()
        now = {account: loop.time() for account, unsaved in self.machine.unsaved_accounts().items() if not unsaved}
        saved = now if without else {**self._saved, **now}
        self._forget((lambda account: saved.get(account, 0.0)), self.buried(without), 1)

    def buried(self, without: str) -> dict[bytes, set[str]]:
        return buried_keys(_local(self._powermail), without) if self._powermail is not None else {}

    def watched(self) -> None:
        """When accounts stand in checkpoints."""
        now = asyncio.get_running_loop().time()
        self._saved.update({name: now for name, unsaved in self.machine.unsaved_accounts().items() if not unsaved})

    async def checkpointed(self) -> None:
        """Writes every checkpoint that is due, if that can be done."""
        running = self._powermail
        if running is None or not running.serving:
            return
        try:
            await running.keeping.checkpoint_all()
        except PowerMailError as error:
            self.machine.note(f"checkpoints: {error}")

    async def rebuild(self, without: str) -> None:
        """The operator's command, until it works; now and then it is killed in the middle. `without`: a node, or ""."""
        for attempt in range(60):
            process = self._process()

            async def progress(done: int, total: int) -> None:
                """Nobody looks."""

            work = asyncio.ensure_future(process.rebuild(progress, [without] if without else []))
            await asyncio.wait([work], timeout=self._chance.uniform(0.0, 0.2) if attempt == 0 else 600.0)
            if work.done() and work.exception() is None:
                await process.stop(1.0)
                return
            self.machine.note(f"rebuild: {work.exception() if work.done() else 'killed'}")
            work.cancel()
            self.machine.kill()
            process.abandon()
            gc.collect()
            await asyncio.sleep(2.0)
        self.outcome.problems.append("the index cannot be rebuilt")

    async def operation(self, name: str, **arguments: object) -> Any:
        """An operator's command; None while it cannot be done."""

        async def progress(done: int, total: int) -> None:
            """Nobody looks."""

        if self._powermail is None or not self._powermail.serving:
            return None
        asked = asyncio.ensure_future(self._powermail.operations.call(name, dict(arguments), progress))
        ended = asyncio.ensure_future(self._ended.wait())
        await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not asked.done():  # as a connection to the control socket breaks
            asked.cancel()
            self.machine.note(f"{name}: the process ended")
            return None
        try:
            return asked.result()
        except PowerMailError as error:
            self.machine.note(f"{name}: {error}")
            return None

    async def troubles(self) -> list[str] | None:
        status = await self.operation("status")
        return list(status["degraded"]) if isinstance(status, dict) else None


def _local(process: PowerMail) -> list[LocalNode]:
    return [node for node in process.core.cluster.nodes.values() if isinstance(node, LocalNode)]


def simulate(seed: int, seconds: float = 60.0, only: Sequence[str] = (), cluster: bool = False) -> Outcome:
    """Runs one seed for so many virtual seconds of faults, of all kinds or of those in `only`; of one process that does
    everything, or of a `cluster`.
    """
    gc.collect()  # nothing that an earlier one left must end within this one
    real = tempfile.mkdtemp(prefix="powermail-sim-", dir=_fast_directory())
    complaints: list[str] = []
    try:
        simulation: Played = Simulation(seed, seconds, real, only)
        within: AbstractContextManager[None] = nullcontext()
        if cluster:
            from powermail.sim.cluster import ClusterSimulation, simulated

            several = ClusterSimulation(seed, seconds, real, only)
            simulation, within = several, simulated(several.machine)

        async def work() -> Outcome:
            return await simulation.run()

        try:
            with put(PACE), within, _collected_at_the_end():
                outcome, _ = sim_loop.run(work(), seed, complaints.append)
        except Exception as error:  # noqa: BLE001  whatever breaks a simulation is a finding, with its place
            trace = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {trace.filename.rsplit('/', 2)[-1]}:{trace.lineno}: {error}"
            return Outcome(seed, [text], trace=simulation.machine.trace)
        assert isinstance(outcome, Outcome)
        outcome.problems += complaints[:5]
        return outcome
    finally:
        shutil.rmtree(real, ignore_errors=True)


@contextmanager
def _collected_at_the_end() -> Iterator[None]:
    """Cycles are looked for once, so that errors nobody awaited are told at the same place each time; and it costs less."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def _fast_directory() -> str | None:
    """Memory where there is some: what SQLite writes need not survive us."""
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm"):
            return "/dev/shm"  # noqa: S108
    except OSError:
        return None
