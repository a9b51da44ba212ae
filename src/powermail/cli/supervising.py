"""Owns an installation of several processes on one machine: it starts them, and starts again what died.

It opens the sockets of the doors and locks the data directory. Its children inherit both, so that nobody else takes the
directory of a parent that was killed while a child still drains. Then it does nothing that can fail: no file, no database, no
network. What it does not understand it writes down and tries again later, with growing pauses.

SIGTERM and SIGINT drain all, front ends first, nodes last. SIGHUP replaces front ends and keepers one after the other: the new
one, with settings and certificates read anew, is ready before the old one takes no more, so no connection is refused. Nodes and
the authority go on; to replace one, end it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from powermail import __version__
from powermail.app.core import srs_keys, take_lock
from powermail.app.roles import Role, listening
from powermail.base import limits
from powermail.base.disk import SystemLock
from powermail.base.log import Event, NullLog, StreamLog
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings
from powermail.base.sharing import Board, Inherited, bind, make_board
from powermail.base.tasks import report_bug
from powermail.base.world import system_world
from powermail.cli import show
from powermail.cli.part import MISUSE, Assignment, Channel, join
from powermail.cli.serving import end_within, listen_to_signals, notify
from powermail.cli.words import Common

_GRACE_S = limits.STOP_GRACE_S / 2  # a child that goes by the same limits has ended by then, unless it cannot
_REPLACED = (Role.FRONT, Role.KEEPER)  # by SIGHUP
_ORDER = ((Role.FRONT,), (Role.KEEPER,), (Role.NODE, Role.AUTHORITY))  # of stopping: who needs others goes before them


class Child:
    """One process that runs, or has ended: then `gone` is set and `why` says how."""

    def __init__(self, process: asyncio.subprocess.Process, slot: int) -> None:
        self.process = process
        self.slot = slot
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.began = time.monotonic()
        self.status = 0
        self.channel: Channel | None = None

    @property
    def why(self) -> str:
        """How it ended."""
        return f"signal {-self.status}" if self.status < 0 else f"exit status {self.status}"

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it lives."""
        if not self.gone.is_set():
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                return


class Place:
    """One process by its name, whichever it is at the time."""

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role = role
        self.child: Child | None = None
        self.changing = asyncio.Lock()  # who starts a child in this place
        self.pause_s = limits.PART_PAUSE_FIRST_S
        self.deaths = 0
        self.died = "-"


class Supervisor:
    """The parent of all processes of this machine."""

    def __init__(self, common: Common, settings: Settings, plan: Sequence[tuple[str, Role]]) -> None:
        self._common = common
        self._settings = settings
        self._places = [Place(name, role) for name, role in plan]
        self._fronts = sum(role is Role.FRONT for _, role in plan)
        self._world = system_world(NullLog())
        self._log = self._world.log = StreamLog(self._world.clock.now, settings.log.level, settings.log.json)
        self._stopping = asyncio.Event()
        self._rolling = asyncio.Lock()
        self._asked = False  # to replace them all
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._doors: list[Inherited] = []
        self._figures: dict[str, list[Inherited]] = {}  # of monitoring, by place
        self._ends: list[socket.socket] = []
        self._board_end = make_board(2 * max(1, self._fronts))  # one that is replaced and its successor have a slot each
        self._board = Board(self._board_end)
        self._slots = list(range(self._board.slots))
        self._lock = -1  # the descriptor of the data directory's
        self._refused = ""  # why the first start came to nothing

    async def run(self) -> int:
        """Serves until told to stop; the exit status. Raises OperatorError."""
        lock = take_lock(self._world, self._common.data)
        assert isinstance(lock, SystemLock)
        self._lock = lock.fileno()
        try:
            srs_keys(self._world, self._common.data)  # made, before the children could make one each
            self._bind()
            listen_to_signals(self._stopping.set, self._hang_up)
            self._log.event(Event.STARTED, part="parent", version=__version__, pid=os.getpid())
            for place in self._places:
                self._start(self._keep(place))
            self._start(self._welcome())
            await self._stopping.wait()
            end_within(limits.STOP_ALL_S, self._log)
            notify("STOPPING=1")
            self._log.event(Event.DRAINING, part="parent")
            for roles in _ORDER:
                await asyncio.gather(*(self._end(place) for place in self._places if place.role in roles))
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._log.event(Event.STOPPED, part="parent")
        finally:
            for end in self._ends:
                end.close()
            lock.release()
            self._log.close()
        return MISUSE if self._refused else 0

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            report_bug(self._log, error, "parent")

    # -- sockets --------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """All sockets, before there is any child. Raises OperatorError."""
        if self._fronts:
            self._doors = [self._inherit(address, 0, True) for _, address in listening(self._settings)]
        keeping = [place for place in self._places if place.role in _REPLACED]
        for number, place in enumerate(sorted(keeping, key=lambda one: (one.role is not Role.FRONT, self._places.index(one)))):
            self._figures[place.name] = [self._inherit(text, number, False) for text in self._settings.metrics.listen]

    def _inherit(self, address: str, further: int, shared: bool) -> Inherited:
        host, port = parse_host_port(address)
        ends = bind(host, port + further if port else 0)
        self._ends += ends
        return Inherited(host, port, tuple(end.fileno() for end in ends), shared)

    # -- children -------------------------------------------------------------------------------------------------

    async def _spawn(self, place: Place) -> Child:
        """Starts a child. Raises OSError."""
        ours, its = socket.socketpair()
        front = place.role is Role.FRONT
        slot = self._slots.pop(0) if front else -1
        sockets = [*self._figures.get(place.name, []), *(self._doors if front else [])]  # as they are opened
        told = Assignment(
            self._common.data, self._common.overrides, place.name, place.role.value, its.fileno(), sockets,
            self._board_end if front else -1, slot, self._fronts, place.died,
            [one.name for one in self._places if one.role in _REPLACED],
        )  # fmt: skip
        descriptors = [its.fileno(), self._lock, *(one for socket in sockets for one in socket.descriptors)]
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "powermail.cli.part", msgspec.json.encode(told).decode()],
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[*descriptors, *([self._board_end] if front else [])],
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent, which stops all in their order
            )
        except BaseException:
            ours.close()
            if front:
                self._slots.append(slot)
            raise
        finally:
            its.close()
        child = Child(process, slot)
        child.channel = Channel(lambda line: self._hear(child, line), lambda: None)
        self._start(self._watch(child))
        await join(child.channel, ours.detach())
        return child

    def _hear(self, child: Child, line: str) -> None:
        if line == "ready":
            child.ready.set()
        elif line == "again":
            self._hang_up()

    async def _watch(self, child: Child) -> None:
        """To its end, whoever wanted it."""
        child.status = await child.process.wait()
        if child.slot >= 0:
            self._board.clear(child.slot)
            self._slots.append(child.slot)
        if child.channel is not None:
            child.channel.close()
        child.gone.set()

    async def _keep(self, place: Place) -> None:
        """One process after the other in a place, until all stop."""
        while not self._stopping.is_set():
            try:
                async with place.changing:
                    if place.child is None or place.child.gone.is_set():
                        place.child = await self._spawn(place)
                child = place.child
                await child.gone.wait()
                if self._stopping.is_set() or place.child is not child:
                    continue
                why = child.why
                if child.status == MISUSE and not child.ready.is_set() and not place.deaths:
                    self._refused = why  # its settings are wrong: it has said how
                    self._stopping.set()
                    return
                if time.monotonic() - child.began >= limits.PART_STEADY_S:
                    place.pause_s = limits.PART_PAUSE_FIRST_S
            except OSError as error:
                why = f"it cannot be started: {error}"
            except Exception as error:  # noqa: BLE001  a place that nobody keeps would stay empty
                report_bug(self._log, error, f"parent of {place.name}")
                why = "a fault of the parent"
            await self._pause(place, why)

    async def _pause(self, place: Place, why: str) -> None:
        place.deaths += 1
        place.died = f"{why.replace(' ', '-')},{place.deaths}" if why.isascii() and len(why) < 40 else f"unknown,{place.deaths}"
        self._log.event(Event.PART, part=place.name, died=why, deaths=place.deaths, again_in_s=place.pause_s)
        try:
            async with asyncio.timeout(place.pause_s):
                await self._stopping.wait()
        except TimeoutError:
            place.pause_s = min(limits.PART_PAUSE_MAX_S, place.pause_s * 2)

    async def _end(self, place: Place) -> None:
        """SIGTERM, and SIGKILL to what does not end."""
        async with place.changing:
            child = place.child
        if child is not None:
            await self._end_child(place, child)

    async def _end_child(self, place: Place, child: Child) -> None:
        child.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout((limits.STOP_S if place.role is Role.FRONT else limits.STOP_BACKGROUND_S) + _GRACE_S):
                await child.gone.wait()
        except TimeoutError:
            self._log.event(Event.PART, part=place.name, died="it did not stop in time", pid=child.process.pid)
            child.signal(signal.SIGKILL)
            await child.gone.wait()

    # -- one after the other --------------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        if not self._asked:  # one that waits for its turn will read what is there then
            self._asked = True
            self._start(self._roll())

    async def _roll(self) -> None:
        """Replaces front ends and keepers. It ends at the first that does not get ready: the old ones go on."""
        async with self._rolling:
            self._asked = False
            for place in self._places:
                if place.role in _REPLACED and not self._stopping.is_set():
                    async with place.changing:
                        replaced = await self._replace(place)
                    if not replaced:
                        self._log.event(Event.PART, part=place.name, kept="the processes that are there; the log says why")
                        return
            self._log.event(Event.RELOADED, changed="all front ends and keepers")

    async def _replace(self, place: Place) -> bool:
        """False if the new one does not get ready: the old one goes on."""
        try:
            fresh = await self._spawn(place)
        except OSError as error:
            self._log.event(Event.PART, part=place.name, died=f"it cannot be started: {error}")
            return False
        waits = [asyncio.ensure_future(event.wait()) for event in (fresh.ready, fresh.gone, self._stopping)]
        await asyncio.wait(waits, timeout=limits.PART_READY_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not fresh.ready.is_set() or fresh.gone.is_set():
            await self._end_child(place, fresh)  # its doors may be open by now
            return False
        old, place.child = place.child, fresh
        if old is not None and not old.gone.is_set():
            if old.channel is not None:
                old.channel.say("leave")
            try:
                async with asyncio.timeout(limits.WORKER_LEAVE_S + limits.STOP_S):
                    await old.gone.wait()
            except TimeoutError:
                await self._end_child(place, old)
        self._log.event(Event.PART, part=place.name, pid=fresh.process.pid, state="replaced")
        return True

    async def _welcome(self) -> None:
        """Says that all are there, when they are."""
        while any(place.child is None for place in self._places):
            await asyncio.sleep(limits.PART_PAUSE_FIRST_S)
        for place in self._places:
            while place.child is None or not place.child.ready.is_set():
                await asyncio.sleep(limits.PART_PAUSE_FIRST_S)
        notify("READY=1")
        ports = {
            name: self._port(one) for (name, _), one in zip(listening(self._settings), self._doors, strict=bool(self._fronts))
        }
        show.parts([place.name for place in self._places], ports)

    def _port(self, one: Inherited) -> int:
        return next(int(end.getsockname()[1]) for end in self._ends if end.fileno() in one.descriptors)


async def supervise(common: Common, settings: Settings, plan: Sequence[tuple[str, Role]]) -> int:
    """Serves with several processes until interrupted; the exit status. Raises OperatorError."""
    return await Supervisor(common, settings, plan).run()
