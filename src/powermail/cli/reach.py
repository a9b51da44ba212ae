"""Owns how a command reaches an installation: a running server by its socket, or a stopped one opened for this one command."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from powermail.admin.control import NotRunning, ask_any
from powermail.admin.table import Operation, Q, R
from powermail.base.log import NullLog
from powermail.base.settings import SETTINGS_NAME, Settings, inside, load_file
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.show import Meter
from powermail.cli.words import Common

if TYPE_CHECKING:
    from powermail.app.compose import PowerMail


def die(error: BaseException) -> None:
    """A storage invariant broke: the process must not go on."""
    sys.stderr.write(f"powermail: a storage invariant broke, stopping: {error}\n")
    os._exit(70)


def settings_of(common: Common) -> Settings:
    """The settings in force. Raises OperatorError."""
    return load_file(f"{common.data}/{SETTINGS_NAME}", common.overrides)


def prepare(common: Common) -> Settings:
    """Before files are opened: as their owner, and with those that are somebody else's named. Raises OperatorError."""
    ownership.become_owner(common.data)
    settings = settings_of(common)
    files = [settings.index.path, *([settings.directory.path] if settings.directory.in_file else [])]
    ownership.check(common.data, [inside(common.data, path) for path in files])
    return settings


class Reach:
    """Calls operations, all on the same server or the same opened installation."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._opened: PowerMail | None = None

    async def call(self, operation: Operation[Q, R], request: Q) -> R:
        """Calls one. Raises OperatorError, Trouble."""
        values = msgspec.to_builtins(request)
        assert isinstance(values, dict)
        return msgspec.json.decode(await self.raw(operation.name, values), type=operation.result)

    async def raw(self, name: str, arguments: Mapping[str, object]) -> bytes:
        """The same by name; JSON."""
        meter = Meter(name.replace("_", " "), enabled=not self._common.json)
        try:
            if self._opened is None:
                try:
                    return await ask_any(self._common.data, name, arguments, meter.progress)
                except NotRunning:
                    from powermail.app.compose import PowerMail

                    self._opened = PowerMail(system_world(NullLog()), prepare(self._common), self._common.data, die)
                    await self._opened.start(doors=False, workers=False)
            return msgspec.json.encode(await self._opened.operations.call(name, arguments, meter.progress))
        finally:
            meter.close()

    async def close(self) -> None:
        """Closes what was opened."""
        if self._opened is not None:
            await self._opened.stop()


@asynccontextmanager
async def reach(common: Common) -> AsyncIterator[Reach]:
    """A reach that is closed at the end."""
    made = Reach(common)
    try:
        yield made
    finally:
        await made.close()
