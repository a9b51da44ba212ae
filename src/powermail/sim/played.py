"""Owns what every simulation has in common, whatever is deployed in it: its clients, what they may expect, faults, then calm.

What deletions are forgiven when commits are lost is decided here: only those since the state that came back, and never of a
message that has a tombstone on a node which is read before readers are let in (P8, law 11).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from powermail.base.errors import PowerMailError
from powermail.base.world import World
from powermail.directory.contract import Account
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.contract import Index
from powermail.sim import fleet as fl
from powermail.sim.checks import Judge
from powermail.sim.client import Peer
from powermail.sim.faults import DiskFaults
from powermail.sim.settings import COPIES, DIRECTORY
from powermail.sim.users import IMAP_MAILBOXES, Ledger, MailboxUser, Observer
from powermail.sim.world import Machine

_LOOK_S = 10.0
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


@dataclass
class _Loss:
    """Commits were lost: deletions told `since` then (by account) and asked for `until` then are undone, but for keys that have
    tombstones; in `groups` groups at least, or until nodes were walked.
    """

    since: Callable[[str], float]
    buried: dict[bytes, set[str]]
    groups: int
    until: float = math.inf


class Played(ABC):
    """One seed of some deployment."""

    def __init__(self, seed: int, seconds: float, machine: Machine, only: Sequence[str], doors: int = 1) -> None:
        """`doors` front ends take clients."""
        self.machine = machine
        self.node_names: list[str] = []
        self.outcome = Outcome(seed)
        self.ledger = Ledger()
        self._only = only
        self._chance = random.Random(seed + 1)
        self._seconds = seconds
        self._owners: dict[str, str] = {}  # ids of accounts by address
        self._accounts: dict[str, str] = {}  # those that users work on
        self._losses: list[_Loss] = []
        late = machine.late.__contains__
        self.fleet = fl.Fleet(machine.net.named("fleet"), self._chance, self._acknowledged, late, doors)
        self.fleet.told = self._told
        self.observer = Observer(self.index, self.fleet.history.problem)

    # -- what is deployed ----------------------------------------------------------------------------------------------

    @abstractmethod
    async def begin(self) -> None:
        """Makes the installation and starts it."""

    @abstractmethod
    async def end(self) -> None:
        """Stops it in good order."""

    @abstractmethod
    def faults(self) -> DiskFaults[Any]:
        """What may happen to it."""

    @abstractmethod
    async def heal(self, faults: DiskFaults[Any]) -> None:
        """The operator does what is left for him to do when all faults are over."""

    @abstractmethod
    def index(self) -> Index | None:
        """The index of a process that runs now."""

    @abstractmethod
    async def operation(self, name: str, **arguments: object) -> Any:
        """An operator's command; None while it cannot be done."""

    @abstractmethod
    def running(self) -> bool:
        """True if it is there to be judged."""

    @abstractmethod
    async def troubles(self) -> list[str] | None:
        """Everything that is not well; None while nobody says."""

    @abstractmethod
    def live(self, key: bytes) -> tuple[set[str], set[str]]:
        """(groups that durably hold a live copy or a tombstone, groups that cannot be looked at now)."""

    @abstractmethod
    def taken(self, key: bytes) -> set[str]:
        """Groups of which a disk that is not in its place any more held one: its receipt was true."""

    @abstractmethod
    def buried(self, without: str) -> dict[bytes, set[str]]:
        """Groups with a tombstone of each key, as far as they can be looked at; but for that node."""

    @abstractmethod
    def watched(self) -> None:
        """Called every second or so."""

    async def make_directory(self, world: World) -> None:
        """The mailboxes and forwards that clients use."""
        directory = SqliteDirectory(world, f"{self.machine.real}/{DIRECTORY}")
        await directory.open()
        password = f"{{plain}}{fl.PASSWORD}"
        mailboxes = (*fl.MAILBOXES, *IMAP_MAILBOXES)
        for number, name in enumerate(mailboxes, 1):
            await directory.add([Account(str(number), name, password)])
        await directory.add([Account("", name, password, 0, (to,), name == fl.KEEPS) for name, to in fl.FORWARDS.items()])
        for name in mailboxes:
            account = await directory.find(name)
            assert account is not None
            self._owners[name] = account.id
        await directory.close()

    # -- what clients may expect ---------------------------------------------------------------------------------------

    def count(self, world: World) -> None:
        """A process ends: what it counted is kept."""
        for name, count in world.counters.snapshot().items():
            self.outcome.counters[name] = self.outcome.counters.get(name, 0) + count

    def broken(self, error: BaseException) -> None:
        """A storage invariant broke."""
        self.outcome.problems.append(f"an invariant broke: {error}")

    def _acknowledged(self, key: bytes) -> None:
        """Right after a 250: R groups hold it, as far as their disks can be looked at (P1).

        A 250 that waited for the index comes seconds behind the receipts: a disk that was taken away meanwhile had kept its
        word.
        """
        live, unseen = self.live(key)
        if len(live | unseen) < COPIES and len(live | unseen | self.taken(key)) < COPIES:
            self.fleet.history.problem(f"message {key.hex()} was acknowledged with copies in {sorted(live)} only (P1)")

    senders, readers = 6, 2  # of the fleet
    settled_s = 60.0  # what a killed front end left on one node is entered by then

    def _told(self) -> None:
        """A client heard that what it deleted is gone."""
        if self._losses:
            self.forgive()

    def forget_deletions(self, since: float) -> None:
        """Commits since then are lost; a deletion that a node holds a tombstone of stays deleted all the same (P8).

        It may show until that node is walked, unless one of any G-R+1 groups has a tombstone: these are walked before readers
        are let in (law 11).
        """
        self._forget((lambda account: since), self.buried(""), COPIES)

    def _forget(self, since: Callable[[str], float], buried: dict[bytes, set[str]], groups: int) -> None:
        self._losses.append(_Loss(since, buried, groups))
        self.forgive()

    def forgive(self) -> None:
        """Also what is read as done while a process is down: the answer was on its way when it was killed."""
        for loss in self._losses:
            self._forgive(loss)

    def _forgive(self, loss: _Loss) -> None:
        history = self.fleet.history
        keys = {(mailbox, number): bytes.fromhex(uidl.decode()) for (mailbox, uidl), number in history.uidls.items()}
        for which, at in list(history.expunged_acked.items()):
            if at < loss.since(self._owners[which[0]]) or history.expunged[which] > loss.until:
                continue
            found = len(loss.buried.get(keys.get(which, b""), ()))
            if not found:
                del history.expunged_acked[which]
            elif found < loss.groups:
                history.expunged_acked[which] = math.inf
        for name, at in list(self.ledger.gone_told.items()):
            asked = self.ledger.gone_asked.get(name, at)
            if at >= loss.since(name[0]) and asked <= loss.until and name[1] not in loss.buried:
                del self.ledger.gone_told[name]
        self.observer.forget_counters()

    def forgiven(self) -> None:
        """What comes from now on is forgiven no more."""
        self.forgive()
        self._losses.clear()

    def forgiven_until_now(self) -> None:
        """What is asked for from now on is forgiven no more; answers to what was asked before may still be on their way."""
        self.forgive()
        for loss in self._losses:
            loss.until = min(loss.until, asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        """When deletions that wait for a walk count again."""
        gone = self.fleet.history.expunged_acked
        while not self.observer.stopping:
            await asyncio.sleep(1.1)
            index = self.index()
            if index is None:
                continue
            self.watched()
            waiting = [which for which, at in gone.items() if at == math.inf]
            if waiting and index.numbering and not index.catching_up and await self._walked(index):
                gone.update(dict.fromkeys(waiting, asyncio.get_running_loop().time()))

    async def _walked(self, index: Index) -> bool:
        try:
            async with asyncio.timeout(_LOOK_S):
                return not any(row.owes_walk for row in await index.node_rows())
        except (PowerMailError, TimeoutError):
            return False

    async def healed(self, within_s: float) -> bool:
        """Waits until nothing is degraded."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while loop.time() < deadline:
            if await self.troubles() == []:
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
        await self.begin()
        self._accounts = {name: self._owners[name] for name in IMAP_MAILBOXES}
        users = [MailboxUser(account, self.index, self._chance, self.ledger) for account in self._accounts.values()]
        clients = [asyncio.create_task(self.fleet.sender()) for _ in range(self.senders)]
        clients += [asyncio.create_task(self.fleet.reader()) for _ in range(self.readers)]
        clients += [asyncio.create_task(user.run()) for user in users]
        watching = asyncio.gather(self.observer.run(), self._watch())
        loop = asyncio.get_running_loop()
        faults = self.faults()
        outcome.faults = faults.happened
        try:
            async with asyncio.timeout(self._seconds + _FAULTS_S):
                await faults.run(loop.time() + self._seconds)
        except TimeoutError:
            outcome.problems.append(f"faults go on {_FAULTS_S:.0f} s after the last one began")
        await self.heal(faults)
        await self.operation("queue_set", numbers=[], held=False, due=True)  # what a rebuild holds: sent or not is unknown
        self.fleet.stopping = True
        for user in users:
            user.stopping = True
        ThisPeer.trouble = False
        await asyncio.gather(*clients)
        self.observer.calm = True
        if self.running():
            await Judge(self, ThisPeer, self._accounts).judge()
            self.observer.stopping = True
            await watching
            await self.end()
        outcome.problems += history.problems + [f"a bug: {line}" for line in self.machine.bugs[:5]]
        outcome.sent, outcome.acked = len(history.messages), sum(message.acked for message in history.messages)
        outcome.refused, outcome.listings, outcome.retrieved = history.refused, history.listings, history.retrieved
        outcome.forwarded, outcome.looks = len(ThisPeer.taken), self.observer.looks
        outcome.virtual_s = loop.time() - 1000.0
        outcome.trace = [line.replace(self.machine.real, "real") for line in self.machine.trace]
        return outcome
