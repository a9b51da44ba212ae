"""Commands said on a machine that has no index, and installations whose making was broken off: nothing is made in the wrong
place, and each sentence says where to go.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from powermail.base.disk import SystemDisk
from tests.cli.support import powermail
from tests.cli.test_config_check_members import Joined


class Killed(BaseException):
    """The process is gone."""


def test_nothing_is_opened_or_made_on_a_machine_that_serves_nodes_alone(tmp_path: Path) -> None:
    """An index that was made anew there would be taken for one that lost commits by the cluster's (law 11)."""
    node = Joined(tmp_path, "d", "node")
    before = sorted(path.name for path in node.data.rglob("*"))
    for words in (
        ("account", "list"), ("verify",), ("node", "list"), ("queue", "list"), ("whatif", "d"), ("node", "expel", "d", "--yes"),
        ("rebuild",), ("rebuild", "--yes", "--by-settings"), ("backup", str(tmp_path / "backup")), ("moves",),
    ):  # fmt: skip
        done = powermail(*words, "--data", str(node.data))
        assert done.status == 2 and "this machine has joined a cluster and has no index" in done.sentence(), (words, done)
    assert sorted(path.name for path in node.data.rglob("*") if path.name != "lock") == before


def test_the_status_of_a_machine_of_a_node(tmp_path: Path) -> None:
    node = Joined(tmp_path, "d", "node")
    stopped = powermail("status", "--data", str(node.data))
    assert stopped.status == 1 and f"`powermail serve --roles node --data {node.data}`" in stopped.out
    with open(node.data / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        serving = powermail("status", "--data", str(node.data))
        assert serving.status == 0 and "a front end or a keeper knows" in serving.out, serving
        assert powermail("status", "--data", str(node.data), "--json").json()["running"] is True
    keeper = Joined(tmp_path, "k", "keeper", "front", index="postgresql://u@db.powermail.invalid/mail")
    assert "serve --roles front,keeper --data" in powermail("status", "--data", str(keeper.data)).out


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_an_init_that_was_killed_in_a_directory_that_is_there_is_said_again(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings come last: until then nobody has used it."""
    data, calls, real = tmp_path / "data", 0, SystemDisk.rename
    data.mkdir()

    def rename(disk: SystemDisk, old: str, new: str) -> None:
        nonlocal calls
        calls += "/.new/" in old
        if calls > step:
            raise Killed
        real(disk, old, new)

    def kept(*args: Any, **more: Any) -> None:
        """The process is gone: it tidies nothing up."""

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SystemDisk, "rename", rename)
        patch.setattr("powermail.app.setup.shutil.rmtree", kept)
        powermail("init", "--data", str(data))
    assert os.listdir(data) and not (data / "powermail.toml").exists()
    assert powermail("init", "--data", str(data)).status == 0
    assert powermail("account", "list", "--data", str(data)).status == 0 and ".new" not in os.listdir(data)


def test_a_directory_with_something_of_others_is_never_swept(tmp_path: Path) -> None:
    for name in (".new", "index.db", "letters"):
        (tmp_path / name).mkdir()
    refused = powermail("init", "--data", str(tmp_path))
    assert refused.status == 2 and "is not empty" in refused.sentence()
    assert sorted(os.listdir(tmp_path)) == [".new", "index.db", "letters"]
