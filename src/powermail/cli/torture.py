"""Owns `powermail torture`: builds a cluster on this machine, has it tortured, reports, and leaves nothing.

The cluster is that of `powermail cluster demo`, made by the same commands, in network namespaces where this process may have
them, else on addresses of the loopback. All of it is ended by process ids, also on SIGINT and SIGTERM; when this process is
killed itself, the kernel kills what it started, and the next run what those had started (Patroni its PostgreSQL), and takes the
directory away.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from powermail.admin.control import NotRunning, ask_any
from powermail.admin.table import unseen
from powermail.base import limits
from powermail.base.errors import OperatorError, Trouble
from powermail.cli import ground, show, tutorial
from powermail.cli.databases import Database, Pair, Single, postgres_programs
from powermail.cli.servers import run_ours
from powermail.torture import plan as planning
from powermail.torture.checker import Checker
from powermail.torture.conductor import Conductor
from powermail.torture.fleet import Door, Fleet
from powermail.torture.plan import DATABASE, FRONTS, NODES, SAID, Kind
from powermail.torture.report import Limits, Report, facts

if TYPE_CHECKING:
    from powermail.cli.commands import Torture

_PREFIX = "powermail-torture-"
_PASSWORD = "torture"
_ACCOUNTS = [f"user{number}@mail.example" for number in range(16)]
_READERS = 2
_DISK_OCTETS = 512 * limits.MIB  # of each node, in memory
_LOOK_S = 0.02
_TICK_S = 0.25
_GONE_S = 30.0
_SECONDS_MAX, _CLIENTS_MAX, _RATE_MAX, _PRELOAD_MAX = 86_400.0, 64, 2000.0, 50_000
_DATABASES = (31, 32)  # the last numbers of their addresses
_SETTINGS = {
    "POWERMAIL_CLUSTER__SEGMENT_OCTETS": str(4 * limits.MIB),
    "POWERMAIL_CLUSTER__RESERVE_OCTETS": str(16 * limits.MIB),
    "POWERMAIL_LOG__JSON": "true",
}
_NEEDS_GROUND = (Kind.CUT, Kind.ONE_WAY, Kind.CUT_DATABASE, Kind.FULL)


class Cluster:
    """The machines on this one (`torture.machines.Machines`)."""

    def __init__(self, root: Path, spaces: ground.Namespaces | None, kinds: Sequence[Kind], database: Database) -> None:
        self._root = root
        self._spaces = spaces
        self._story = (root / "story.log").open("a", encoding="utf-8")
        self._database = database
        self._led = database.machines[0]  # that of the database which was hit last
        self._tutorial = tutorial.Tutorial(str(root), run_ours, spaces, self.tell, "KILL", database)
        self._servers = self._tutorial.servers
        self.kinds = kinds
        net = self._servers.ground.net
        self.doors = [Door(name, f"{net}.{last}", tutorial.SMTP, tutorial.POPS) for name, last in tutorial.FRONTS.items()]

    def tell(self, text: str) -> None:
        """One more line of the story."""
        self._story.write(f"{text}\n")
        self._story.flush()

    async def build(self) -> None:
        """From nothing to a cluster with accounts. Raises OperatorError."""
        if self._spaces is not None:
            await self._spaces.build()
            for name in NODES:
                (self._root / name).mkdir()
                ground.mount(str(self._root / name), _DISK_OCTETS)
        await self._tutorial.build()
        rows = "".join(f'{{"address":"{name}","password":"{{plain}}{_PASSWORD}"}}\n' for name in _ACCOUNTS)
        (self._root / "accounts").write_text(rows)
        status, said = await run_ours(["account", "import", "accounts", "--data", "head"], str(self._root))
        if status:
            raise OperatorError(f"account import: {said}")

    # -- processes ----------------------------------------------------------------------------------------------------

    async def _struck(self, name: str) -> str:
        """Whom it hits: of the database the machine that is written to."""
        if name == DATABASE:
            self._led = await self._database.leader() or self._led
            self.tell(f"the database is {self._led}")
        return self._machine(name)

    def _machine(self, name: str) -> str:
        return self._led if name == DATABASE else name

    def _all(self, name: str) -> Callable[[], list[int]]:
        """What finds its processes: Patroni's PostgreSQL is nobody's child, and known by where it works."""
        parent, place = self._servers.served[name].process.pid, self._root / name
        return lambda: list(dict.fromkeys([*_tree(parent), *at_work_in(place)]))

    async def kill(self, name: str, whole: bool = True) -> None:
        struck = await self._struck(name)
        parent = self._servers.served[struck].process
        told = _signal(self._all(struck), signal.SIGSTOP)[0 if whole else 1 :]  # that none is made meanwhile
        for pid in told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not whole:
            parent.send_signal(signal.SIGCONT)
        async with asyncio.timeout(_GONE_S):
            if whole:
                await parent.wait()
            while any(_state(pid) not in "ZX" for pid in told):
                await asyncio.sleep(_LOOK_S)

    async def start(self, name: str) -> None:
        if name == DATABASE:  # Patroni gives who is back in time his place again
            await self._database.follow(self._led)
            self.tell(f"{self._led} has a successor")
        await self._servers.again(self._machine(name))

    async def pause(self, name: str) -> None:
        _signal(self._all(await self._struck(name)), signal.SIGSTOP)

    def resume(self, name: str) -> None:
        _signal(self._all(self._machine(name)), signal.SIGCONT)

    async def end(self) -> None:
        """Ends all of it."""
        for name, served in self._servers.served.items():
            if served.process.returncode is None:
                await self.kill(name)
        _end_all_in(self._root)  # PostgreSQLs that have lost their Patroni
        self._tutorial.close()
        if self._spaces is not None:
            self._spaces.close()
        self._story.close()

    # -- the network --------------------------------------------------------------------------------------------------

    async def cut(self, name: str, other: str, both: bool) -> None:
        assert self._spaces is not None, "nothing else can cut"
        for far in self._database.machines if other == DATABASE else (other,):
            await self._spaces.cut(name, far)
            if both:
                await self._spaces.cut(far, name)

    async def mend(self) -> None:
        if self._spaces is not None:
            await self._spaces.mend()

    async def database_is_whole(self) -> bool:
        return await self._database.is_whole()

    # -- what they say ------------------------------------------------------------------------------------------------

    async def ask(self, name: str, call: str, **arguments: object) -> Any:
        try:
            return msgspec.json.decode(await ask_any(str(self._root / name), call, arguments, unseen))
        except NotRunning as error:
            raise Trouble(f"{name} does not run") from error

    async def numbers(self, account: str) -> list[tuple[int, str]] | None:
        """UIDs and keys of an INBOX as the index shows them; None if it does not answer."""
        try:
            found = await self.ask("head", "list_messages", address=account)
        except (Trouble, OperatorError):
            return None
        return [(row["uid"], row["key"]) for row in found["messages"]]

    def store(self, name: str) -> Path:
        return self._root / name / "nodes" / name.removeprefix("node-")

    def late(self) -> Iterable[str]:
        for name in FRONTS:
            for line in (self._root / f"{name}.log").read_bytes().splitlines():
                if b'"event":"index-late"' in line:
                    with suppress(msgspec.DecodeError):  # a line of a process that was killed
                        yield msgspec.json.decode(line)["key"]

    def bugs(self) -> Iterator[str]:
        """What machines say of faults of the program itself."""
        for path in sorted(self._root.glob("*.log")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if '"event":"bug"' in line or line.startswith("Traceback"):
                    yield f"{path.name}: {line[:400]}"


# -- processes of this machine ----------------------------------------------------------------------------------------


def _state(pid: int) -> str:
    """The letter of a process's state (proc(5)); X, it is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += [int(word) for word in (task / "children").read_text(encoding="ascii").split()]
    return found


def _signal(processes: Callable[[], list[int]], number: signal.Signals) -> list[int]:
    """To all of these, again until none is new; whom it was sent to."""
    told: list[int] = []
    while fresh := [each for each in processes() if each not in told]:
        for each in fresh:
            with suppress(ProcessLookupError):
                os.kill(each, number)
        told += fresh
    return told


def sweep() -> list[str]:
    """Takes away what a torture left that was killed: processes that work in its directory, and that; which ones."""
    swept = []
    for root in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(root / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # it runs
        else:
            if not (root / "report.json").exists():  # one that was kept is for somebody to look at
                _end_all_in(root)
                shutil.rmtree(root, ignore_errors=True)
                swept.append(str(root))
        finally:
            os.close(lock)
    return swept


def at_work_in(root: Path) -> list[int]:
    """Processes whose working directory is there or below."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and Path(os.readlink(entry / "cwd")).is_relative_to(root):
                found.append(int(entry.name))
    return found


def _end_all_in(root: Path) -> None:
    """SIGKILL, until none is left: what a killed parent had stopped, or was just starting."""
    ends_at = time.monotonic() + _GONE_S
    while (pids := at_work_in(root)) and time.monotonic() < ends_at:
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _kinds(request: Torture) -> list[Kind]:
    names = [name.strip() for name in request.faults.split(",") if name.strip()]
    known = [kind.value for kind in Kind]
    if wrong := [name for name in names if name not in known]:
        raise OperatorError(f"--faults: {wrong[0]!r} is none of {', '.join(known)}")
    return [kind for kind in Kind if not names or kind.value in names]


def divide(kinds: Sequence[Kind], why: str) -> tuple[list[Kind], list[str]]:
    """What can be done, and what cannot because there are no namespaces: `why`."""
    possible = [kind for kind in kinds if not why or kind not in _NEEDS_GROUND]
    return possible, [
        f"{kind.value} ({SAID[kind]}): it needs namespaces of its own, and {why}" for kind in kinds if kind not in possible
    ]


def _check(request: Torture) -> None:
    for name, value, least, most in (
        ("seconds", request.seconds, 1.0, _SECONDS_MAX),
        ("clients", request.clients, 1, _CLIENTS_MAX),
        ("rate", request.rate, 0.1, _RATE_MAX),
        ("preload", request.preload, 0, _PRELOAD_MAX),
        ("gap", request.gap, 0.1, _SECONDS_MAX),
        ("healed", request.healed, 0.1, _SECONDS_MAX),
    ):
        if not least <= value <= most:
            raise OperatorError(f"--{name} {value:g}: from {least:g} to {most:g}")


# -- the whole --------------------------------------------------------------------------------------------------------


def found(pair: bool) -> tuple[ground.Namespaces | None, Database, str]:
    """The ground, the database on it, and why there are no namespaces. Raises OperatorError."""
    why = "" if ground.is_enclosed() else ground.why_not_enclosed()
    if why and pair:
        raise OperatorError(f"--pair: two databases need namespaces of their own, and {why}")
    if why:
        return None, Single(), why
    machines = {f"node-{name}": last for name, last in tutorial.NODES.items()} | tutorial.FRONTS
    machines |= dict(zip((Pair if pair else Single).machines, _DATABASES, strict=False))
    spaces = ground.Namespaces(machines)
    return spaces, Pair(spaces) if pair else Single(), ""


async def torture(request: Torture, json: bool) -> int:
    """Builds, tortures, reports; 0 if all held. Raises OperatorError."""
    _check(request)
    kinds = _kinds(request)
    postgres_programs()
    spaces, database, why = found(request.pair)
    if not ground.is_enclosed() and not why:
        ground.enclose()
    os.environ.update(_SETTINGS)
    for path in sweep():
        show.note(f"taken away what an earlier torture left: {path}")
    root = Path(tempfile.mkdtemp(prefix=_PREFIX))
    os.chmod(root, 0o711)  # noqa: S103  PostgreSQL passes through
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _interruptible()
    possible, not_tried = divide(kinds, why)
    cluster = Cluster(root, spaces, possible, database)
    report: Report | None = None
    keep = request.keep
    try:
        report = await _run(request, cluster, root, json)
        report.not_tried = not_tried
        report.ground = "on the loopback" if spaces is None else "in network namespaces"
        report.ground += ", on two databases under Patroni" if request.pair else ""
    except asyncio.CancelledError:
        show.note("interrupted")
        return 130
    except Exception:
        show.note(f"logs, stores and the story lie in {root}")
        keep = True
        raise
    finally:
        try:
            await cluster.end()
        finally:
            _leave(root, lock, report, keep)
    if json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        show.facts_of(list(facts(report)))
    return int(not report.held)


def _interruptible() -> None:
    """The first signal ends this task; more of them do not disturb what is cleared away then."""
    own, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert own is not None
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end() -> None:
        for number in numbers:
            loop.add_signal_handler(number, lambda: None)
        own.cancel()

    for number in numbers:
        loop.add_signal_handler(number, end)


def _leave(root: Path, lock: int, report: Report | None, keep: bool) -> None:
    """Takes the directory away, unless it is to be kept, or something did not hold: then stores, logs and the report stay."""
    keep = keep or (report is not None and not report.held)
    for name in NODES:
        if os.path.ismount(root / name):
            if keep:
                shutil.copytree(root / name, root / f"{name}.kept", symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
            subprocess.run(["umount", "--lazy", str(root / name)], check=False, capture_output=True)
    if keep:
        if report is not None:
            report.kept = str(root)
        (root / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    else:
        shutil.rmtree(root, ignore_errors=True)
    os.close(lock)


async def _run(request: Torture, cluster: Cluster, root: Path, json: bool) -> Report:
    began = time.monotonic()
    meter = show.Meter("torture", enabled=not json)
    plan = planning.draw(request.seed, request.seconds, cluster.kinds)
    checker = Checker(_ACCOUNTS)
    fleet = Fleet(cluster.doors, _ACCOUNTS, _PASSWORD, checker, request.seed, request.rate)
    conductor = Conductor(cluster, plan, fleet, checker, root / "aside", cluster.tell)
    try:
        await cluster.build()
        await _preload(fleet, request)
        built_s = time.monotonic() - began
        async with asyncio.TaskGroup() as group:
            for place in range(request.clients):
                group.create_task(fleet.sender(place, request.clients))
            for place in range(_READERS):
                group.create_task(fleet.reader(place, _READERS))
            group.create_task(fleet.observer(cluster.numbers))
            ticking = group.create_task(_tick(meter, request.seconds, stalls := Stalls()))
            for gap in (fleet.gap, *fleet.gaps.values()):
                gap.begin(asyncio.get_running_loop().time())
            await conductor.run()
            for gap in (fleet.gap, *fleet.gaps.values()):
                gap.end(asyncio.get_running_loop().time())
            fleet.stopping = True
            ticking.cancel()
        await conductor.calm()
        checker.finish(await conductor.last_look(_ACCOUNTS))
    finally:
        meter.close()
        for text, each in fleet.counts.refusals.items():
            cluster.tell(f"{each.first_at:.2f} to {each.last_at:.2f} {each.count} x {text}")
    for text in cluster.bugs():
        checker.violation("bug", text)
    report = _report(request, fleet, conductor, checker, built_s, time.monotonic() - began)
    report.stalled_s = round(stalls.longest_s, 2)
    return report


class Stalls:
    """The longest time for which this process got no turn."""

    def __init__(self) -> None:
        self.longest_s = 0.0


async def _tick(meter: show.Meter, seconds: float, stalls: Stalls) -> None:
    began = time.monotonic()
    while True:
        await meter.progress(min(int(seconds), int(time.monotonic() - began)), int(seconds))
        slept_at = time.monotonic()
        await asyncio.sleep(_TICK_S)
        stalls.longest_s = max(stalls.longest_s, time.monotonic() - slept_at - _TICK_S)


async def _preload(fleet: Fleet, request: Torture) -> None:
    """Mail that is there before the first fault, as fast as it is taken."""
    async with asyncio.TaskGroup() as group:
        for place in range(request.clients):
            group.create_task(fleet.fill(place, request.preload // request.clients))


def _report(request: Torture, fleet: Fleet, conductor: Conductor, checker: Checker, built_s: float, took_s: float) -> Report:
    bounds, course, counts = Limits(request.gap, request.healed), conductor.course, fleet.counts
    if fleet.gap.longest_s > bounds.gap_s:
        checker.violation("gap", f"nothing was received for {fleet.gap.longest_s:.1f} s, from {fleet.gap.at:.2f}")
    if course.empty_s > bounds.empty_s:
        checker.violation("healing", f"redundant only {course.empty_s:.1f} s after an empty disk was admitted")
    return Report(
        not checker.violations, request.seed, request.seconds, round(built_s, 1), round(took_s, 1), "",
        course.done, course.flips, [],
        counts.acked, counts.refused, counts.unknown, counts.unsent,
        counts.listings, counts.retrieved, counts.deleted, counts.looks,
        round(fleet.gap.longest_s, 2), round(fleet.gap.at, 2),
        {name: round(gap.longest_s, 2) for name, gap in fleet.gaps.items()}, 0.0,
        round(course.empty_s, 1), course.empty_messages, checker.counts, checker.violations,
    )  # fmt: skip
