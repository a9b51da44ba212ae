"""Owns who does what where several processes keep one index: each job is one process's at a time, and each process shows that
it lives.

A job belongs to whoever has its lease. It is renewed while its process lives, given back when that stops in good order or
cannot do it any more, and free by time when it dies; any keeper on any machine then takes it, so there is no leader to lose. A
lease saves work and no more: what two must never both do is decided by compare-and-set where it is done (laws 6, 9, 11).

A process is a lease that nobody else wants. Its owner's name says what it is, so that one listing tells who lives, since when,
and who does which job.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.index.contract import Index
from powermail.index.sharing import JobLease

Step = Callable[[], Awaitable[float]]
_PROCESS = "process "
_WAITING = "waiting "  # of a process whose readers wait for a keeper (`keeper.entering`)
_SEES = "sees "  # of a keeper, with how many nodes


class Process(NamedTuple):
    """One process of the cluster. `since` is when it started, UTC."""

    part: str  # as it is called on its machine: front1, keeper
    machine: str
    pid: int
    version: str
    since: float
    tag: str  # new for each start
    died: str = "-"  # how the one before it on its machine ended, and how many did: one word

    @property
    def owner(self) -> str:
        """Its name as an owner of leases."""
        return f"{self.part} {self.machine} {self.pid} {self.version} {self.since:.0f} {self.tag} {self.died}"

    @staticmethod
    def parse(owner: str) -> Process | None:
        """Whose name that is; None if it is none of ours."""
        words = owner.split(" ")
        if len(words) != 7 or not (words[2].isascii() and words[2].isdigit() and words[4].isascii() and words[4].isdigit()):
            return None
        return Process(words[0], words[1], int(words[2]), words[3], float(words[4]), *words[5:])


class Seen(NamedTuple):
    """A process as the index shows it: how many seconds ago it was last heard, and the jobs it does."""

    process: Process
    silent_s: float
    jobs: tuple[str, ...]


def _always() -> bool:
    """Of a job that any keeper can do."""
    return True


class Leases:
    """What this process has of the jobs of all."""

    def __init__(self, world: World, index: Index, process: Process) -> None:
        self.process = process
        self._world = world
        self._index = index
        self._held: dict[str, float] = {}  # until when by our monotonic clock, counted from before it was asked
        self._can: dict[str, Callable[[], bool]] = {}  # by job
        self._sees = ""  # what this process says of how many nodes it sees
        self._outseen_at: float | None = None  # since when another keeper sees more

    async def take(self, job: str) -> bool:
        """True if the job is ours now: it was, or nobody else has it. Raises IndexTrouble."""
        if self._world.clock.monotonic() < self._held.get(job, 0.0):
            return True
        return await self._ask(job)

    async def _ask(self, job: str) -> bool:
        asked_at = self._world.clock.monotonic()
        if await self._index.lease(job, self.process.owner, limits.JOB_LEASE_S):
            new = job not in self._held
            self._held[job] = asked_at + limits.JOB_LEASE_S
            if new:
                self._world.counters.add("keeper.jobs_taken")
                self._world.log.event(Event.JOB, job=job, state="taken")
            return True
        if self._held.pop(job, None) is not None:
            self._world.counters.add("keeper.jobs_lost")
            self._world.log.event(Event.JOB, job=job, state="lost")
        return False

    def leased(self, job: str, step: Step, let_go: Callable[[], None] | None = None, can: Callable[[], bool] = _always) -> Step:
        """The step of a worker that works only while the job is ours; else `let_go` takes back what it has said for status.

        While this process cannot do it (`can`) another may have it: who kept what he cannot do would keep it from all.
        """

        self._can[job] = can

        async def run() -> float:
            if not can():
                await self._leave(job)
            elif await self.take(job):
                return await step()
            if let_go is not None:
                let_go()
            return limits.JOB_LOOK_S

        return run

    async def _leave(self, job: str) -> None:
        if self._held.pop(job, None) is not None:
            self._world.log.event(Event.JOB, job=job, state="left")
            await self._index.release(job, self.process.owner)

    async def renew(self) -> float:
        """The step of a worker: what we have stays ours, but for what we cannot do, at work or at rest. Raises IndexTrouble."""
        for job in list(self._held):
            await (self._ask(job) if self._can.get(job, _always)() else self._leave(job))
        return limits.JOB_RENEW_S

    async def show(self) -> float:
        """The step of a worker: this process lives. Raises IndexTrouble."""
        await self._index.lease(f"{_PROCESS}{self.process.tag}", self.process.owner, limits.PROCESS_LEASE_S)
        return limits.PROCESS_NOTE_S

    async def compare(self, nodes: int) -> float:
        """The step of a keeper's worker: so many nodes take part in its view. Raises IndexTrouble."""
        sees = f"{_SEES}{nodes} {self.process.tag}"
        if self._sees not in ("", sees):
            await self._index.release(self._sees, self.process.owner)
        self._sees = sees
        await self._index.lease(sees, self.process.owner, limits.PROCESS_LEASE_S)
        found = [lease for lease in await self._index.leases() if lease.job.startswith(_SEES)]
        now = _now(max((lease.until for lease in found), default=0.0))
        if any(lease.until > now and _count(lease.job) > nodes for lease in found):
            self._outseen_at = self._outseen_at or self._world.clock.monotonic()
        else:
            self._outseen_at = None
        return limits.JOB_RENEW_S

    @property
    def outseen(self) -> bool:
        """True if another keeper sees more nodes, for longer than they take to come and go: it does what needs all of them."""
        return self._outseen_at is not None and self._world.clock.monotonic() - self._outseen_at >= limits.JOB_VIEW_S

    async def wait(self) -> None:
        """Says that this process waits until keepers have entered what logs hold, for a while. Raises IndexTrouble."""
        await self._index.lease(f"{_WAITING}{self.process.tag}", self.process.owner, limits.PROCESS_LEASE_S)

    async def wait_no_more(self) -> None:
        """Takes that back. Raises IndexTrouble."""
        await self._index.release(f"{_WAITING}{self.process.tag}", self.process.owner)

    async def is_waited_for(self) -> bool:
        """True while a process waits. Raises IndexTrouble."""
        found = await self._index.leases()
        newest = max((lease.until for lease in found if lease.job.startswith((_PROCESS, _WAITING))), default=0.0)
        return any(lease.job.startswith(_WAITING) and lease.until > _now(newest) for lease in found)

    async def clear(self) -> float:
        """The step of a worker: what is over for long goes, so that the table stays small. Raises IndexTrouble."""
        found = await self._index.leases()
        newest = max((lease.until for lease in found), default=0.0)
        for lease in found:
            if lease.until < newest - limits.JOB_FORGOTTEN_S:
                await self._index.release(lease.job, lease.owner)
        return limits.JOB_FORGOTTEN_S / 4

    async def stop(self) -> None:
        """Gives everything back; what cannot be given back is free by time."""
        jobs = [*self._held, f"{_PROCESS}{self.process.tag}", *([self._sees] if self._sees else [])]
        self._held.clear()
        try:
            for job in jobs:
                await self._index.release(job, self.process.owner)
        except Trouble as error:
            self._world.log.event(Event.TROUBLE, worker="leases", error=str(error))


def seen(leases: Sequence[JobLease]) -> list[Seen]:
    """The processes that live, or died and were not replaced, and their jobs; by machine and part.

    Times are compared with each other only: the youngest sign of life of any of them is now.
    """
    shown: dict[str, tuple[Process, float]] = {}
    for lease in leases:
        process = Process.parse(lease.owner)
        if lease.job.startswith(_PROCESS) and process is not None:
            shown[lease.owner] = process, lease.until
    newest = max((until for _, until in shown.values()), default=0.0)
    last: dict[tuple[str, str], float] = {}
    for process, until in shown.values():
        place = process.machine, process.part
        last[place] = max(until, last.get(place, 0.0))
    found = []
    for owner, (process, until) in shown.items():
        if until <= _now(newest) and until < last[process.machine, process.part]:
            continue  # it died, and another has its place, whatever its machine's clock said when that started
        jobs = tuple(lease.job for lease in leases if lease.owner == owner and is_job(lease) and lease.until > _now(newest))
        found.append(Seen(process, newest - until, jobs))
    return sorted(found, key=lambda one: (one.process.machine, one.process.part, one.process.since))


def _now(newest: float) -> float:
    return newest - limits.PROCESS_LEASE_S


def _count(job: str) -> int:
    """How many nodes a keeper says that it sees; 0 for what another release says."""
    count = job.split(" ")[1]
    return int(count) if count.isascii() and count.isdecimal() else 0


def is_job(lease: JobLease) -> bool:
    """True for a job of the keepers: processes, those that wait, what keepers see, and maildrops are leased too."""
    return not lease.job.startswith((_PROCESS, _WAITING, _SEES, "maildrop "))
