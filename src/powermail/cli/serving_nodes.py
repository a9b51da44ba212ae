"""Owns `powermail serve --roles node`: start, signals, stop."""

from __future__ import annotations

import asyncio
import gc
import signal

from powermail.app.noding import NodeProcess
from powermail.base.log import Event, NullLog, StreamLog
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.reach import die, settings_of
from powermail.cli.serving import notify
from powermail.cli.words import Common


async def serve_nodes(common: Common) -> int:
    """Serves the nodes of the settings until interrupted. Raises OperatorError."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    ownership.become_owner(common.data)
    settings = settings_of(common)
    world = system_world(NullLog())
    log = world.log = StreamLog(world.clock.now, settings.log.level, settings.log.json)
    process = NodeProcess(world, settings, common.data, die)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        await process.start()
        world.log.event(Event.STARTED, role="node")
        notify("READY=1")
        await stopping.wait()
        notify("STOPPING=1")
        world.log.event(Event.DRAINING)
    finally:
        await process.stop()
        world.log.event(Event.STOPPED)
        log.close()
    return 0
