"""What the tests of the directory share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.base.log import MemoryLog
from powermail.base.world import World, system_world
from tests.directory.backends import KINDS, Made, made
from tests.servers import Database


@pytest.fixture
async def world() -> World:
    return system_world(MemoryLog())


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest) -> Database | None:
    """A fresh database of a server; None for SQLite, whose databases are files. A server starts outside of the event loop."""
    return None if request.param == "sqlite" else request.getfixturevalue(request.param)


@pytest.fixture
async def backend(database: Database | None, world: World, tmp_path: Path) -> AsyncIterator[Made]:
    """A directory with our table, on each engine."""
    found = await made(database.server.kind if database else "sqlite", world, tmp_path, database)
    yield found
    await found.directory.close()
