"""Owns one simulation: the production composition root, its clients, faults, then calm, and the checkers' judgement.

Safety: whatever happens, no client ever sees what it must not (checked while it runs and at the end). Liveness: when the faults
are over, everything is redundant, read and sent within a bounded virtual time.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from powermail.app.compose import PowerMail
from powermail.app.setup import make_index
from powermail.base import limits
from powermail.base.errors import PowerMailError
from powermail.base.settings import (
    ClusterSettings,
    DirectorySettings,
    IndexSettings,
    NodeSettings,
    OutboundSettings,
    PopSettings,
    Settings,
    SmtpSettings,
)
from powermail.directory.contract import Account
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.contract import Index
from powermail.sim import fleet as fl
from powermail.sim import loop as sim_loop
from powermail.sim.checks import Judge, buried_keys, live_groups, taken_groups
from powermail.sim.client import Peer
from powermail.sim.faults import Faults
from powermail.sim.pace import hurried
from powermail.sim.users import IMAP_MAILBOXES, Ledger, MailboxUser, Observer
from powermail.sim.world import DATA, Machine
from powermail.storage.identity import make_store
from powermail.storage.log.keys import KeyIndex, SqliteKeyIndex

NODES = {"a": "rack-1", "b": "rack-2", "c": "rack-3", "d": "rack-3"}
COPIES = 2
_TOMBSTONE_S = (10.0, 43.0)  # how long tombstones stay at least; a short time lets older disks outlive them
_SEGMENTS = (1, 4)  # size of a segment in smallest ones; small ones are compacted soon
_CLOSING_S = 5.0
_FAULTS_S = 1800.0  # how long the last faults may take: each waits until all is well, and some wait for each other


@dataclass
class Outcome:
    """What one seed gave."""

    seed: int
    problems: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)  # of all its processes together
    sent: int = 0
    acked: int = 0
    refused: int = 0
    listings: int = 0
    retrieved: int = 0
    forwarded: int = 0
    looks: int = 0
    virtual_s: float = 0.0
    trace: list[str] = field(default_factory=list)

    @property
    def trace_hash(self) -> str:
        """The same for the same seed, in any process."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


class Simulation:
    """One seed."""

    def __init__(self, seed: int, seconds: float, real: str, only: Sequence[str] = ()) -> None:
        self._only = only
        self.machine = Machine(random.Random(seed), list(NODES), real)
        self.node_names = list(NODES)
        self.outcome = Outcome(seed)
        self.ledger = Ledger()
        self._chance = random.Random(seed + 1)
        self._seconds = seconds
        kind = random.Random(seed + 2)
        self._tombstone_days = kind.choice(_TOMBSTONE_S) / 86_400.0
        self._segment_octets = kind.choice(_SEGMENTS) * limits.SEGMENT_OCTETS_MIN
        self._saved: dict[str, float] = {}  # account: when all of it was seen to stand in durable checkpoints
        self._powermail: PowerMail | None = None
        self._ended = asyncio.Event()  # of the process that runs: who asks it something waits no longer
        # What deletions were lost: for each account since when, but for keys with tombstones.
        self._lost: tuple[Callable[[str], float], dict[bytes, set[str]], int] | None = None
        self.fleet = fl.Fleet(self.machine.net.named("fleet"), self._chance, self._acknowledged, self.machine.late.__contains__)
        self.observer = Observer(self.index, self.fleet.history.problem)

    def _settings(self) -> Settings:
        real = self.machine.real
        return Settings(
            hostname="mx.sim.example",
            cluster=ClusterSettings(
                copies_required=COPIES,
                segment_octets=self._segment_octets,
                reserve_octets=100_000,
                repair_after_s=5.0,
                tombstone_days=self._tombstone_days,
                nodes=[NodeSettings(id=name, path=f"nodes/{name}", group=group) for name, group in NODES.items()],
            ),
            index=IndexSettings(path=f"{real}/index.db"),
            directory=DirectorySettings(path=f"{real}/directory.db", upgrade_passwords=False),
            smtp=SmtpSettings(
                listen=[f"server:{fl.SMTP_PORT}"],
                submission=[],
                submissions=[],
                lmtp=[f"server:{fl.LMTP_PORT}"],
                connections_per_address_max=1000,
            ),
            pop=PopSettings(
                listen=[f"server:{fl.POP_PORT}"], listen_tls=[], plaintext_login=True, connections_per_address_max=1000
            ),
            outbound=OutboundSettings(smarthost=f"peer:{fl.PEER_PORT}", smarthost_tls="none", retry_first_s=1.0),
        )

    # -- the process --------------------------------------------------------------------------------------------------

    async def _initialise(self) -> None:
        world, real = self.machine.world(), self.machine.real
        cluster = world.entropy.octets(16).hex()
        await make_index(world, f"{real}/index.db", cluster)
        for name in NODES:
            make_store(world.disk, f"{DATA}/nodes/{name}", cluster, name, world.entropy)
        directory = SqliteDirectory(world, f"{real}/directory.db")
        await directory.open()
        password = f"{{plain}}{fl.PASSWORD}"
        for number, name in enumerate((*fl.MAILBOXES, *IMAP_MAILBOXES), 1):
            await directory.add([Account(str(number), name, password)])
        await directory.add([Account("", name, password, 0, (to,), name == fl.KEEPS) for name, to in fl.FORWARDS.items()])
        self._owners = {}
        for name in (*fl.MAILBOXES, *IMAP_MAILBOXES):
            account = await directory.find(name)
            assert account is not None
            self._owners[name] = account.id
        self._accounts = {name: self._owners[name] for name in IMAP_MAILBOXES}
        await directory.close()
        self.machine.settle()

    def _make_keys(self, path: str, store: bytes) -> KeyIndex:
        return SqliteKeyIndex(self.machine.disk.keys_path(path), store)

    def _process(self) -> PowerMail:
        return PowerMail(self.machine.world(), self._settings(), DATA, self._broken, self._make_keys, tls=False)

    async def _start(self) -> None:
        self._powermail = self._process()
        self._ended = asyncio.Event()
        await self._powermail.start()

    def _broken(self, error: BaseException) -> None:
        self.outcome.problems.append(f"an invariant broke: {error}")

    def index(self) -> Index | None:
        """The index of the process that runs now."""
        return self._powermail.core.index if self._powermail is not None and self._powermail.serving else None

    def _acknowledged(self, key: bytes) -> None:
        """Right after a 250: R groups hold it, as far as their disks can be looked at (P1).

        A 250 that waited for the index comes seconds behind the receipts: a disk that was taken away meanwhile had kept its
        word.
        """
        running = self._powermail
        if running is None or not running.serving:
            return
        cluster = running.core.cluster
        live, unseen = live_groups(cluster, self.machine, key)
        if len(live | unseen) < COPIES and len(live | unseen | taken_groups(cluster, self.machine, key)) < COPIES:
            self.fleet.history.problem(f"message {key.hex()} was acknowledged with copies in {sorted(live)} only (P1)")

    async def restart(self, pause_s: float) -> None:
        """Lets go of the process that was killed and starts a new one."""
        self.let_go()
        await asyncio.sleep(pause_s)
        self.machine.settle()
        for attempt in range(60):
            try:
                await self._start()
                self._forgive()
                self._lost = None
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
            self._count(dead)
            dead.abandon()

    def _count(self, process: PowerMail) -> None:
        for name, count in process.world.counters.snapshot().items():
            self.outcome.counters[name] = self.outcome.counters.get(name, 0) + count

    def forget_deletions(self, since: float) -> None:
        """Commits since then are lost; a deletion that a node holds a tombstone of stays deleted all the same (P8).

        It may show until that node is walked, unless one of any G-R+1 groups has a tombstone: these are walked before readers
        are let in (law 11).
        """
        self._lost = (lambda account: since), self._buried(""), COPIES
        self._forgive()

    def forget_unsaved(self, without: str) -> None:
        """The index is lost: only what stands in durable checkpoints, or in a tombstone on a node that is read, is known.

        Without a node, what only just became durable again after another disk was lost may have been there alone: then nothing
        older than this moment counts.
        """
        loop = asyncio.get_running_loop()
        now = {account: loop.time() for account, unsaved in self.machine.unsaved_accounts().items() if not unsaved}
        saved = now if without else {**self._saved, **now}
        self._lost = (lambda account: saved.get(account, 0.0)), self._buried(without), 1
        self._forgive()

    def _buried(self, without: str) -> dict[bytes, set[str]]:
        return buried_keys(self._powermail.core.cluster, without) if self._powermail is not None else {}

    async def _watch(self) -> None:
        """When accounts stand in checkpoints, and when deletions that wait for a walk count again."""
        gone = self.fleet.history.expunged_acked
        while not self.observer.stopping:
            await asyncio.sleep(1.1)
            index = self.index()
            if index is None:
                continue
            now = asyncio.get_running_loop().time()
            self._saved.update({name: now for name, unsaved in self.machine.unsaved_accounts().items() if not unsaved})
            waiting = [which for which, at in gone.items() if at == math.inf]
            if waiting and index.numbering and not index.catching_up and await self._walked(index):
                gone.update(dict.fromkeys(waiting, asyncio.get_running_loop().time()))

    async def _walked(self, index: Index) -> bool:
        try:
            return not any(row.owes_walk for row in await index.node_rows())
        except PowerMailError:
            return False

    def _forgive(self) -> None:
        """Also what is read as done while the process is down: the answer was on its way when it was killed."""
        if self._lost is None:
            return
        since, buried, groups = self._lost
        history = self.fleet.history
        keys = {(mailbox, number): bytes.fromhex(uidl.decode()) for (mailbox, uidl), number in history.uidls.items()}
        for which in [which for which, at in history.expunged_acked.items() if at >= since(self._owners[which[0]])]:
            found = len(buried.get(keys.get(which, b""), ()))
            if not found:
                del history.expunged_acked[which]
            elif found < groups:
                history.expunged_acked[which] = math.inf
        for name in [name for name, at in self.ledger.gone_told.items() if at >= since(name[0])]:
            if name[1] not in buried:
                del self.ledger.gone_told[name]
        self.observer.forget_counters()

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

    async def healed(self, within_s: float) -> bool:
        """Waits until nothing is degraded."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while loop.time() < deadline:
            status = await self.operation("status")
            if isinstance(status, dict) and not status["degraded"]:
                return True
            await asyncio.sleep(1.0)
        return False

    # -- the run --------------------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """Everything; the outcome."""
        outcome, history = self.outcome, self.fleet.history

        class ThisPeer(Peer):
            taken: dict[tuple[int, str], int] = {}  # noqa: RUF012  one for each simulation
            chance = self._chance
            trouble = True

        await self.machine.net.named("peer").listen("peer", fl.PEER_PORT, ThisPeer)
        await self._initialise()
        await self._start()
        users = [MailboxUser(account, self.index, self._chance, self.ledger) for account in self._accounts.values()]
        clients = [asyncio.create_task(self.fleet.sender()) for _ in range(6)]
        clients += [asyncio.create_task(self.fleet.reader()) for _ in range(2)]
        clients += [asyncio.create_task(user.run()) for user in users]
        watching = asyncio.gather(self.observer.run(), self._watch())
        loop = asyncio.get_running_loop()
        faults = Faults(self, self._chance, self._only)
        outcome.faults = faults.happened
        try:
            async with asyncio.timeout(self._seconds + _FAULTS_S):
                await faults.run(loop.time() + self._seconds)
        except TimeoutError:
            outcome.problems.append(f"faults go on {_FAULTS_S:.0f} s after the last one began")
        for name in self.node_names:  # a restored index may say that one is blocked which the operator has released since
            await faults.obey(name)
            await self.operation("node_block", node=name, blocked=False)
        await self.operation("queue_set", numbers=[], held=False, due=True)  # what a rebuild holds: sent or not is unknown
        self.fleet.stopping = True
        for user in users:
            user.stopping = True
        ThisPeer.trouble = False
        await asyncio.gather(*clients)
        self.observer.calm = True
        if self._powermail is not None:
            await Judge(self, ThisPeer, self._accounts).judge()
            self.observer.stopping = True
            await watching
            self._count(self._powermail)
            await self._powermail.stop(5.0)
        outcome.problems += history.problems + [f"a bug: {line}" for line in self.machine.bugs[:5]]
        outcome.sent, outcome.acked = len(history.messages), sum(message.acked for message in history.messages)
        outcome.refused, outcome.listings, outcome.retrieved = history.refused, history.listings, history.retrieved
        outcome.forwarded, outcome.looks = len(ThisPeer.taken), self.observer.looks
        outcome.virtual_s = loop.time() - 1000.0
        outcome.trace = [line.replace(self.machine.real, "real") for line in self.machine.trace]
        return outcome


def simulate(seed: int, seconds: float = 60.0, only: Sequence[str] = ()) -> Outcome:
    """Runs one seed for so many virtual seconds of faults, of all kinds or of those in `only`."""
    real = tempfile.mkdtemp(prefix="powermail-sim-", dir=_fast_directory())
    complaints: list[str] = []
    try:
        simulation = Simulation(seed, seconds, real, only)

        async def work() -> Outcome:
            return await simulation.run()

        try:
            with hurried(), _collected_at_the_end():
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
