"""Owns one simulation: the production composition root, a fleet, faults, then calm, and the checkers' judgement.

Safety: whatever happens, no client ever sees what it must not (checked while it runs and at the end). Liveness: when the faults
are over, everything is redundant, read and sent within a bounded virtual time.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import tempfile
import traceback
from dataclasses import dataclass, field

from powermail.app.compose import PowerMail
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
from powermail.index.sqlite import SqliteIndex
from powermail.sim import fleet as fl
from powermail.sim import loop as sim_loop
from powermail.sim.client import Lost, Peer
from powermail.sim.faults import Faults
from powermail.sim.world import DATA, Machine
from powermail.storage.identity import make_store
from powermail.storage.keyindex import MemoryKeyIndex

_NODES = {"a": "rack-1", "b": "rack-2", "c": "rack-3", "d": "rack-3"}
_CALM_S = 900.0  # virtual time within which all must be well again
_SETTLED_S = 120.0  # what a killed front end left on one node is entered by then


@dataclass
class Outcome:
    """What one seed gave."""

    seed: int
    problems: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    acked: int = 0
    refused: int = 0
    listings: int = 0
    retrieved: int = 0
    forwarded: int = 0
    virtual_s: float = 0.0
    trace: list[str] = field(default_factory=list)

    @property
    def trace_hash(self) -> str:
        """The same for the same seed, in any process."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


class Simulation:
    """One seed."""

    def __init__(self, seed: int, seconds: float, real: str) -> None:
        self.machine = Machine(random.Random(seed), list(_NODES), real)
        self.node_names = list(_NODES)
        self._chance = random.Random(seed + 1)
        self._seconds = seconds
        self._outcome = Outcome(seed)
        self._powermail: PowerMail | None = None
        self._fleet = fl.Fleet(self.machine.net.named("fleet"), self._chance)

    def _settings(self) -> Settings:
        real = self.machine.real
        return Settings(
            hostname="mx.sim.example",
            cluster=ClusterSettings(
                segment_octets=16 * limits.SEGMENT_OCTETS_MIN,
                reserve_octets=100_000,
                repair_after_s=5.0,
                nodes=[NodeSettings(name, f"nodes/{name}", group) for name, group in _NODES.items()],
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
        index = SqliteIndex(world, f"{real}/index.db")
        await index.open(cluster)
        await index.close()
        for name in _NODES:
            make_store(world.disk, f"{DATA}/nodes/{name}", cluster, name, world.entropy)
        directory = SqliteDirectory(world, f"{real}/directory.db")
        await directory.open()
        password = f"{{plain}}{fl.PASSWORD}"
        await directory.add([Account("", name, password) for name in fl.MAILBOXES])
        await directory.add([Account("", name, password, 0, (to,), name == fl.KEEPS) for name, to in fl.FORWARDS.items()])
        await directory.close()
        self.machine.settle()

    async def _start(self) -> None:
        self._powermail = PowerMail(
            self.machine.world(), self._settings(), DATA, self._broken, lambda path, store: MemoryKeyIndex(), tls=False
        )
        await self._powermail.start()

    def _broken(self, error: BaseException) -> None:
        self._outcome.problems.append(f"an invariant broke: {error}")

    async def restart(self, pause_s: float) -> None:
        """Lets go of the process that was killed and starts a new one."""
        self.let_go()
        await asyncio.sleep(pause_s)
        self.machine.settle()
        for attempt in range(30):
            try:
                await self._start()
                return
            except PowerMailError as error:
                self.machine.note(f"start failed: {error}")
                if attempt == 29:
                    self._outcome.problems.append(f"does not start: {error}")
                self.machine.kill()
                self.let_go()
                await asyncio.sleep(2.0)

    def let_go(self) -> None:
        """The dead process holds no files any more."""
        dead, self._powermail = self._powermail, None
        if dead is not None:
            dead.abandon()

    def forget_deletions(self, since: float) -> None:
        """A backup of the index does not have them."""
        acked = self._fleet.history.expunged_acked
        for which in [which for which, at in acked.items() if at >= since]:
            del acked[which]

    async def operation(self, name: str, **arguments: object) -> object:
        """An operator's command; None while it cannot be done."""

        async def progress(done: int, total: int) -> None:
            """Nobody looks."""

        if self._powermail is None or not hasattr(self._powermail, "operations"):
            return None
        try:
            return await self._powermail.operations.call(name, dict(arguments), progress)
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
        outcome, history = self._outcome, self._fleet.history

        class ThisPeer(Peer):
            taken: dict[tuple[int, str], int] = {}  # noqa: RUF012  one for each simulation
            chance = self._chance
            trouble = True

        await self.machine.net.named("peer").listen("peer", fl.PEER_PORT, ThisPeer)
        await self._initialise()
        await self._start()
        clients = [asyncio.create_task(self._fleet.sender()) for _ in range(6)]
        clients += [asyncio.create_task(self._fleet.reader()) for _ in range(2)]
        loop = asyncio.get_running_loop()
        faults = Faults(self, self._chance)
        await faults.run(loop.time() + self._seconds)
        self._fleet.stopping = True
        ThisPeer.trouble = False
        await asyncio.gather(*clients)
        if self._powermail is not None:
            await self._check(ThisPeer)
            await self._powermail.stop(5.0)
        outcome.problems += history.problems + [f"a bug: {line}" for line in self.machine.bugs[:5]]
        outcome.faults = faults.happened
        outcome.sent, outcome.acked = len(history.messages), sum(message.acked for message in history.messages)
        outcome.refused, outcome.listings, outcome.retrieved = history.refused, history.listings, history.retrieved
        outcome.forwarded = len(ThisPeer.taken)
        outcome.virtual_s = loop.time() - 1000.0
        outcome.trace = self.machine.trace
        return outcome

    async def _check(self, peer: type[Peer]) -> None:
        """The liveness phase, then the judgement of the whole history."""
        problems, history = self._outcome.problems, self._fleet.history
        await asyncio.sleep(_SETTLED_S)
        if not await self.healed(_CALM_S):
            status = await self.operation("status")
            what = status["degraded"] if isinstance(status, dict) else "no answer"
            problems.append(f"not well {_CALM_S:.0f} s after the last fault: {what}")
        for _ in range(int(_CALM_S)):
            rows = await self.operation("queue_list", after=0, limit=100)
            if rows == []:
                break
            await asyncio.sleep(1.0)
        else:
            problems.append("the queue is not empty")
        verified = await self.operation("verify")
        if not isinstance(verified, dict) or verified["problems"]:
            found = verified["problems"][:3] if isinstance(verified, dict) else "no answer"
            problems.append(f"verify: {found} (P3, P5)")
        for mailbox in fl.MAILBOXES:
            await self._check_mailbox(mailbox)
        for message in history.messages:
            for name in message.recipients:
                if name in fl.FORWARDS and message.acked and not peer.taken.get((message.number, fl.FORWARDS[name])):
                    problems.append(f"message {message.number} to {name} was acked and never sent on (P1)")

    async def _check_mailbox(self, mailbox: str) -> None:
        problems, history = self._outcome.problems, self._fleet.history
        counts: dict[int, int] | None = None
        for _ in range(100):
            try:
                counts = await self._fleet.read(mailbox, delete=False)
            except Lost:
                counts = None
            if counts is not None:
                break
            await asyncio.sleep(1.0)
        if counts is None:
            problems.append(f"{mailbox} cannot be read in calm")
            return
        for number, count in counts.items():
            message = history.messages[number]
            if count > message.acks + message.unknown:
                problems.append(f"{mailbox}: message {number} is there {count} times; {message.acks} acks (P4)")


def simulate(seed: int, seconds: float = 60.0) -> Outcome:
    """Runs one seed for so many virtual seconds of faults."""
    real = tempfile.mkdtemp(prefix="powermail-sim-", dir=_fast_directory())
    try:

        async def work() -> Outcome:
            return await Simulation(seed, seconds, real).run()

        try:
            outcome, _ = sim_loop.run(work(), seed)
        except Exception as error:  # noqa: BLE001  whatever breaks a simulation is a finding, with its place
            trace = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome(seed, [f"{type(error).__name__} at {trace.filename}:{trace.lineno}: {error}"])
        assert isinstance(outcome, Outcome)
        return outcome
    finally:
        shutil.rmtree(real, ignore_errors=True)


def _fast_directory() -> str | None:
    """Memory where there is some: what SQLite writes need not survive us."""
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm"):
            return "/dev/shm"  # noqa: S108
    except OSError:
        return None
