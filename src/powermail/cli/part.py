"""Owns one process of an installation that has several: `python -m powermail.cli.part`, started by `cli.supervising` alone.

Over the channel that it inherits it says `ready`, and `again` when an operator wants the settings read anew; it hears `leave`:
another takes its place. When the channel ends, the parent is gone, and so it stops, as after SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Struct

from powermail import __version__
from powermail.admin.control import ControlServer
from powermail.app.compose import PowerMail
from powermail.app.roles import Duties, Role, as_client, listening, share_of
from powermail.base import garbage, limits
from powermail.base.errors import OperatorError, PowerMailError
from powermail.base.log import Event, NullLog, StreamLog
from powermail.base.net import parse_host_port
from powermail.base.settings import Settings
from powermail.base.sharing import Board, Inherited, Share, SharedNetwork
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.main import run
from powermail.cli.reach import die, prepare
from powermail.cli.serving import differing, end_within, listen_to_signals
from powermail.cli.serving_nodes import serve_role
from powermail.cli.words import Common

MISUSE = 2  # exit status of one that cannot start with these settings


class Assignment(Struct):
    """What a child is told."""

    data: str
    overrides: list[str]
    part: str
    role: str
    channel: int
    sockets: list[Inherited]
    board: int = -1  # of front ends: the page that they share, and which slot is this one's
    slot: int = 0
    fronts: int = 1  # how many share the connections
    died: str = "-"  # how the one before it ended, and how many did, in one word
    parts: list[str] = []  # the front ends and keepers of this machine, this one too


class Channel(asyncio.Protocol):
    """The parent's ear and word. `on_line` hears each line, `on_end` that the parent is gone."""

    def __init__(self, on_line: Callable[[str], None], on_end: Callable[[], None]) -> None:
        self._on_line = on_line
        self._on_end = on_end
        self._rest = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode("ascii", "replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()

    def close(self) -> None:
        """Nobody is at the other end any more."""
        if self._transport is not None:
            self._transport.close()

    def say(self, word: str) -> None:
        """Says a word, if anybody hears it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(f"{word}\n".encode())


class Part:
    """A front end or a keeper among several processes."""

    def __init__(self, assignment: Assignment) -> None:
        self._told = assignment
        self._common = Common(assignment.data, assignment.overrides, False)
        self._stop = asyncio.Event()
        self._leaving = False
        self._channel = Channel(self._hear, self._stop.set)

    def _hear(self, line: str) -> None:
        if line == "leave":
            self._leaving = True
            self._stop.set()

    async def run(self) -> None:
        """Serves until told to stop. Raises OperatorError, Trouble."""
        told = self._told
        settings = self._settings = prepare(self._common)
        world = system_world(NullLog())
        log = world.log = StreamLog(world.clock.now, settings.log.level, settings.log.json)
        front = told.role == Role.FRONT.value
        share = Share(Board(told.board), told.slot, world.clock) if front else None
        check_addresses(settings, told.sockets, front)
        world.net = SharedNetwork(told.sockets, share)
        machine = platform.node() or "localhost"
        duties = Duties(
            front, not front, True, told.part, machine, __version__, os.getpid(), told.died, tuple(told.parts)
        )  # fmt: skip
        seen = as_client(share_of(settings, told.fronts) if front else settings)
        powermail = PowerMail(world, seen, told.data, die, duties=duties)
        powermail.reload = self._reload
        await join(self._channel, told.channel)
        listen_to_signals(self._stop.set, lambda: None)
        world.log.event(Event.STARTED, part=told.part, version=__version__, data=os.path.abspath(told.data), pid=os.getpid())
        control: ControlServer | None = None
        try:
            starting = asyncio.ensure_future(self._start(powermail))
            stopped = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                control = starting.result()
                self._channel.say("ready")
                await stopped
            end_within((limits.STOP_S if front else limits.STOP_BACKGROUND_S) + limits.WORKER_LEAVE_S * self._leaving, log)
            if control is not None:
                world.log.event(Event.DRAINING, part=told.part)
                await control.stop()
                if self._leaving:
                    await powermail.leave()
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
        finally:
            await powermail.stop()
            world.log.event(Event.STOPPED, part=told.part)
            log.close()

    async def _start(self, powermail: PowerMail) -> ControlServer:
        await powermail.start()
        control = ControlServer(f"{self._told.data}/{self._told.part}.sock", powermail.operations)
        await control.start()
        return control

    async def _reload(self) -> tuple[list[str], list[str]]:
        """Settings are read by processes that take the places of these, one after the other. Raises OperatorError."""
        fresh = prepare(self._common)
        changed, more = differing(self._settings, fresh)
        whole = [name for name in more if _is_of_the_whole(name)]
        self._channel.say("again")
        return [*changed, *(name for name in more if name not in whole), "certificates"], whole


def check_addresses(settings: Settings, inherited: Sequence[Inherited], front: bool) -> None:
    """Raises OperatorError if the settings listen elsewhere than the parent does: what only that has nobody would answer."""
    wanted = [*settings.metrics.listen, *([address for _, address in listening(settings)] if front else [])]
    new, old = Counter(map(parse_host_port, wanted)), Counter((one.host, one.port) for one in inherited)
    if new != old:
        changed = ", ".join(f"{host}:{port}" for host, port in sorted({**(new - old), **(old - new)}))
        raise OperatorError(f"{changed}: addresses to listen at change with a restart of the whole")


def _is_of_the_whole(name: str) -> bool:
    """True for what the parent did: how many there are, and where they listen."""
    return name in ("workers", "smtp.submission", "smtp.submissions", "smtp.lmtp") or "listen" in name


async def join(channel: Channel, descriptor: int) -> None:
    """Connects the channel with the socket that was inherited."""
    end = socket.socket(fileno=descriptor)
    end.setblocking(False)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: channel, end)


async def _other(told: Assignment) -> int:
    """A role that shares no index with front ends and keepers: it knows its own settings alone."""
    stop = asyncio.Event()
    channel = Channel(lambda line: None, stop.set)
    await join(channel, told.channel)
    common = Common(told.data, told.overrides, False)
    return await serve_role(common, Role(told.role), stop, lambda: channel.say("ready"))


async def _serve(told: Assignment) -> int:
    ownership.become_owner(told.data)
    if Role(told.role) in (Role.NODE, Role.AUTHORITY):
        return await _other(told)
    garbage.settle()
    await Part(told).run()
    return 0


def main() -> int:
    """The entry; the exit status."""
    told = msgspec.json.decode(sys.argv[1], type=Assignment)
    try:
        return run(_serve(told))
    except PowerMailError as error:
        sys.stderr.write(f"powermail: {told.part}: {error}\n")
        return MISUSE if isinstance(error, OperatorError) else 1


if __name__ == "__main__":
    sys.exit(main())
