"""Owns the processes of the roles `node` and `authority`, alone or among several: start, signals, stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from powermail.app.authority import AuthorityProcess
from powermail.app.noding import NodeProcess
from powermail.app.roles import Role
from powermail.base import garbage, limits
from powermail.base.log import Event, NullLog, StreamLog
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.reach import die, settings_of
from powermail.cli.serving import end_within, notify
from powermail.cli.words import Common


async def serve_role(
    common: Common, role: Role, stop: asyncio.Event | None = None, ready: Callable[[], None] | None = None
) -> int:
    """Serves the nodes of the settings, or gives certificates, until interrupted. Raises OperatorError.

    As one of several processes: until `stop`, and says when it is `ready`; its parent has the lock of the data directory.
    """
    garbage.settle()
    ownership.become_owner(common.data)
    settings = settings_of(common)
    world = system_world(NullLog())
    log = world.log = StreamLog(world.clock.now, settings.log.level, settings.log.json)
    process: NodeProcess | AuthorityProcess
    if role is Role.NODE:
        process = NodeProcess(world, settings, common.data, die, lock=stop is None)
    else:
        process = AuthorityProcess(world, settings, common.data, die)
    stopping = stop or asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        await process.start()
        world.log.event(Event.STARTED, role=role.value)
        notify("READY=1")
        if ready is not None:
            ready()
        await stopping.wait()
        end_within(limits.STOP_BACKGROUND_S, log)
        notify("STOPPING=1")
        world.log.event(Event.DRAINING)
    finally:
        await process.stop()
        world.log.event(Event.STOPPED)
        log.close()
    return 0
