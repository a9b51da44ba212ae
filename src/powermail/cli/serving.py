"""Owns `powermail serve`: start, signals, reading the settings again, and the welcome.

SIGTERM and SIGINT drain, SIGHUP reads settings and certificates again, every other signal that would end a process is ignored.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from powermail import __version__
from powermail.admin.control import NAME as CONTROL_NAME
from powermail.admin.control import ControlServer, check_place
from powermail.app.compose import PowerMail
from powermail.app.setup import FirstMailbox, discard, initialise, shared_disks
from powermail.base import garbage, limits
from powermail.base.errors import OperatorError
from powermail.base.log import Event, Log, NullLog, StreamLog
from powermail.base.net import parse_host_port
from powermail.base.settings import SETTINGS_NAME, Settings, inside, known_keys
from powermail.base.world import World, system_world
from powermail.cli import ownership, show
from powermail.cli.reach import die, prepare, settings_of
from powermail.cli.words import Common

_IGNORED = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")
_SAID_S = 0.5  # before the end of a stop that takes too long it is said so
LIVE = ("log.level",)  # settings that change while it serves; certificates are reread whenever their files change


def values_of(settings: Settings) -> dict[str, object]:
    """Every setting by its dotted name, and the nodes."""
    tree = msgspec.to_builtins(settings)
    values: dict[str, object] = {}
    for name in known_keys():
        section, _, key = name.rpartition(".")
        values[name] = tree[section][key] if section else tree[key]
    return values


def differing(before: Settings, after: Settings) -> tuple[list[str], list[str]]:
    """(settings that may change now, settings that need a restart), of those that differ."""
    old, new = values_of(before), values_of(after)
    names = [name for name in old if old[name] != new[name]]
    return [name for name in names if name in LIVE], [name for name in names if name not in LIVE]


class Server:
    """One `powermail serve`."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._stop = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], None] = {}

    async def run(self, first: FirstMailbox | None, settings: Settings) -> None:
        """Serves until told to stop. Raises OperatorError."""
        data = self._common.data
        world = system_world(NullLog())
        self._log = StreamLog(world.clock.now, settings.log.level, settings.log.json)
        world.log = self._log
        self._settings = settings
        self._powermail = PowerMail(world, settings, data, die)
        self._powermail.reload = self.reload
        self._listen_to_signals()
        world.log.event(Event.STARTED, version=__version__, data=os.path.abspath(data), pid=os.getpid())
        try:
            await self._powermail.start()
            control = ControlServer(f"{data}/{CONTROL_NAME}", self._powermail.operations)
            await control.start()
            self._welcome(world, first)
            notify("READY=1")
            await self._stop.wait()
            end_within(limits.STOP_S, self._log)
            self._powermail.refuse()
            notify("STOPPING=1")
            world.log.event(Event.DRAINING)
            await control.stop()
        except BaseException:
            await self._powermail.stop()
            self._log.close()
            raise
        await self._powermail.stop()
        world.log.event(Event.STOPPED)
        self._log.close()

    def _listen_to_signals(self) -> None:
        listen_to_signals(self._stop.set, self._hang_up)

    def _hang_up(self) -> None:
        async def again() -> None:
            try:
                await self.reload()
            except OperatorError as error:
                self._log.event(Event.TROUBLE, worker="reload", error=str(error), kept="the settings as they were")

        task = asyncio.get_running_loop().create_task(again())
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def reload(self) -> tuple[list[str], list[str]]:
        """Reads settings and certificates again; (what changed, what needs a restart). Raises OperatorError."""
        fresh = settings_of(self._common)
        changed, restart = differing(self._settings, fresh)
        if "log.level" in changed:
            self._log.set_level(fresh.log.level)
            log = msgspec.structs.replace(self._settings.log, level=fresh.log.level)
            self._settings = msgspec.structs.replace(self._settings, log=log)
        front = self._powermail.front
        if front.certificates is not None and front.certificates_lane is not None:
            if await front.certificates_lane.run(front.certificates.reload):
                changed.append("certificates")
        said = " ".join(changed) or "nothing"
        self._log.event(Event.RELOADED, changed=said, needs_restart=" ".join(restart) or None)
        return changed, restart

    def _welcome(self, world: World, first: FirstMailbox | None) -> None:
        settings = self._settings
        paths = {node.id: inside(self._common.data, node.path) for node in settings.cluster.nodes if node.path}
        show.try_it(
            self._powermail.front.listening,
            {"smtp": reachable(settings.smtp.listen), "pop3s": reachable(settings.pop.listen_tls)},
            shared_disks(world, paths),
            settings.cluster.copies_required,
            first,
            settings.hostname,
            os.path.abspath(self._common.data),
            own_command(),
        )


def end_within(seconds: float, log: Log) -> None:
    """From now on this process lives so long at most, whatever hangs, its event loop too: then the kernel ends it, and what is
    left is found by the next start, as after a crash. A service manager waits a little longer.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    why = f"it did not stop within {seconds:g} s, and ends as if it were killed"
    asyncio.get_running_loop().call_later(seconds - _SAID_S, lambda: log.event(Event.TROUBLE, worker="stop", error=why))


def listen_to_signals(stop: Callable[[], None], hang_up: Callable[[], None]) -> None:
    """SIGTERM and SIGINT stop, SIGHUP is heard, and what else would end a process is ignored."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for number in signal.Signals:
        if number.name in _IGNORED:
            signal.signal(number, signal.SIG_IGN)


def reachable(addresses: Sequence[str]) -> str:
    """The host by which the first of these addresses is reached from here, as it stands in a URL."""
    host = parse_host_port(addresses[0])[0] if addresses else ""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104  compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def own_command() -> str:
    """How this program is called from another terminal."""
    if shutil.which("powermail"):
        return "powermail"
    beside = os.path.join(os.path.dirname(sys.executable), "powermail")
    return beside if os.path.exists(beside) else f"{sys.executable} -m powermail"


def notify(state: str) -> None:
    """Tells the service manager, if there is one (sd_notify(3)): a datagram to the socket that it names."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
        try:
            end.connect(address)
            end.send(state.encode())
        except OSError as error:
            sys.stderr.write(f"powermail: the service manager cannot be told {state}: {error}\n")


async def serve(common: Common, init: bool) -> int:
    """Serves until interrupted."""
    garbage.settle()
    first: FirstMailbox | None = None
    check_place(common.data)
    if init and not os.path.exists(f"{common.data}/{SETTINGS_NAME}"):
        first = await initialise(system_world(NullLog()), common.data, "localhost")
    else:
        ownership.become_owner(common.data)
    try:
        await Server(common).run(first, prepare(common))
    except BaseException:
        if first is not None:
            discard(common.data)  # nothing half-made: its password was never shown
        raise
    return 0
