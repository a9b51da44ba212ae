"""Owns what tests of the command line stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import make


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A stopped installation."""
    make(tmp_path / "data")
    return str(tmp_path / "data")


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stopped installation that is not changed by the tests of a file."""
    path = tmp_path_factory.mktemp("looked-at") / "data"
    make(path)
    return str(path)
