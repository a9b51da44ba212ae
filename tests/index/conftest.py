"""Every test of the contract runs on every implementation of it, and ends with the audit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.index.contract import Index
from tests.index.support import RIGS, Rig, admit


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


@pytest_asyncio.fixture(params=sorted(RIGS))
async def rig(request: pytest.FixtureRequest, room: Path) -> AsyncIterator[Rig]:
    """An installation whose index runs."""
    installation = RIGS[request.param](room)
    await installation.start()
    yield installation
    await installation.die()


@pytest_asyncio.fixture
async def index(rig: Rig) -> AsyncIterator[Index]:
    """A running index that knows three nodes in three groups; what it says of itself agrees at the end."""
    await admit(rig.index)
    yield rig.index
    assert await rig.index.audit() == []
