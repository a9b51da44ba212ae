"""Every test of the contract runs on every implementation of it, and ends with the audit."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.base import limits
from powermail.index.contract import Index
from powermail.index.postgres.migrating import migrate
from tests.index.sharing import SHARED_TIMES, Wire
from tests.index.support import ALONE, RIGS, PostgresRig, Rig, admit
from tests.servers import Database, Postgres


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: what is asked here is not whether a disk keeps its word."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="powermail-test-", dir=memory))
    yield made
    shutil.rmtree(made)


class Databases:
    """Databases of a server with the tables of an index, made by its own migration; they are used again and again."""

    def __init__(self, server: Postgres) -> None:
        self.server = server
        self.template = server.create()
        asyncio.run(migrate(self.template.url))
        self.made: list[Database] = []

    def take(self, number: int) -> Database:
        """The one with that number."""
        while len(self.made) <= number:
            self.made.append(self.server.create(self.template.name))
        return self.made[number]


_databases: dict[Postgres, Databases] = {}


def databases_of(server: Postgres) -> Databases:
    """The databases that tests of the index have made on a server."""
    if server not in _databases:
        _databases[server] = Databases(server)
    return _databases[server]


@pytest.fixture(autouse=True)
def postgres_databases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rig of a test that asks for one gets a database of its own; a server is started when the first asks."""
    if "room" in request.fixturenames and not any(kind in request.node.name for kind in ALONE):
        databases_of(request.getfixturevalue("postgresql_server")).take(1)
    for name in SHARED_TIMES:
        monkeypatch.setattr(limits, name, 60.0)  # a busy machine is no server that hangs
    used = itertools.count()

    def reach() -> str:
        return databases_of(request.getfixturevalue("postgresql_server")).take(next(used)).url

    monkeypatch.setattr(PostgresRig, "reach", staticmethod(reach), raising=False)


@pytest_asyncio.fixture(params=sorted(ALONE))
async def lone_rig(request: pytest.FixtureRequest, room: Path) -> AsyncIterator[Rig]:
    """An installation whose index runs, where one process alone writes."""
    installation = RIGS[request.param](room, 1)
    await installation.start()
    yield installation
    await installation.die()


@pytest_asyncio.fixture(params=sorted(RIGS))
async def rig(request: pytest.FixtureRequest, room: Path) -> AsyncIterator[Rig]:
    """An installation whose index runs."""
    installation = RIGS[request.param](room, 1)
    await installation.start()
    yield installation
    await installation.die()


@pytest_asyncio.fixture
async def index(rig: Rig) -> AsyncIterator[Index]:
    """A running index that knows three nodes in three groups; what it says of itself agrees at the end."""
    await admit(rig.index)
    yield rig.index
    assert await rig.index.audit() == []


@pytest_asyncio.fixture
async def shared_rig(room: Path) -> AsyncIterator[PostgresRig]:
    """An installation on PostgreSQL with three nodes, which others may join; its audit is clean at the end."""
    installation = PostgresRig(room)
    await installation.start()
    await admit(installation.index)
    yield installation
    assert await installation.index.audit() == []
    await installation.die()


@pytest_asyncio.fixture
async def wire(shared_rig: PostgresRig, postgresql_server: Postgres) -> AsyncIterator[Wire]:
    """Stands between a process and the server of the test."""
    between = Wire(postgresql_server)
    await between.start()
    yield between
    await between.stop()
