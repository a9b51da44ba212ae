"""An open, empty node of each kind for the suite of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.storage.contract import StorageNode
from tests.storage.rigs import KINDS, Rig, make_rig


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """An open, empty node of each kind."""
    made = await make_rig(request.param, tmp_path)
    yield made
    await made.end()


@pytest.fixture
def node(rig: Rig) -> StorageNode:
    """The node alone, for tests that need no hook."""
    return rig.node


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for by the clock of the event loop, which no test moves, is waited for a moment only."""
    for name, seconds in (("NODE_PROBE_TIMEOUT_S", 0.3), ("NODE_CLOSE_WAIT_S", 0.3), ("LANE_CLOSE_WAIT_S", 0.05)):
        monkeypatch.setattr(limits, name, seconds)
