"""Commands as root leave files of the data directory's owner; what is somebody else's is named with its cure."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from powermail.cli import ownership
from tests.cli.support import make, powermail

OWNER = 12_345
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of another user are made")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may pass."""
    path = Path(tempfile.mkdtemp(prefix="powermail-owned-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def as_user(number: int) -> Iterator[None]:
    """With the rights of another user, in this process: the interpreter's files may be root's alone."""
    import powermail.app.compose  # noqa: F401  what is imported later cannot be read any more

    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def owned(place: Path) -> Path:
    """An installation of another user."""
    data = place / "data"
    make(data)
    ownership.give(str(data), OWNER, OWNER)
    return data


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose rights change."""
    return subprocess.run([sys.executable, "-m", "powermail", *words], capture_output=True, text=True, check=False, timeout=60)


def of_root(data: Path) -> list[Path]:
    return [path for path in (data, *data.rglob("*")) if path.lstat().st_uid != OWNER]


@pytest.mark.parametrize(
    "words",
    [
        ["account", "add", "ann@example.org", "--password", "x"],
        ["node", "list"],
        ["verify"],
        ["config"],
        ["rebuild", "--yes"],
    ],
    ids=" ".join,
)
def test_a_command_as_root_leaves_files_of_the_owner(owned: Path, words: list[str]) -> None:
    done = run(*words, "--data", str(owned))
    assert done.returncode == 0, done.stderr
    assert of_root(owned) == []


def test_init_as_root_in_a_directory_of_the_owner(place: Path) -> None:
    data = place / "data"
    data.mkdir()
    os.chown(data, OWNER, OWNER)
    disk = place / "disk"
    words = [f"--node={name}={disk}/{name}:{name}" for name in "ab"]
    assert run("init", "--data", str(data), *words).returncode == 0
    assert of_root(data) == [] and of_root(disk / "a") == []


def test_a_backup_as_root_is_the_owners_and_restores(owned: Path, place: Path) -> None:
    to = place / "backup"
    assert run("backup", str(to), "--data", str(owned)).returncode == 0
    assert of_root(to) == []
    done = run("restore", str(to), "--yes", "--data", str(owned))
    assert done.returncode == 0, done.stderr
    assert of_root(owned) == []


@pytest.mark.parametrize("name", ["index.db", "directory.db", "srs.keys", "tls/key.pem", "lock"])
def test_a_file_of_root_is_named_with_the_right_cure(owned: Path, name: str) -> None:
    """Never 'rebuild' or 'replace' for a permission."""
    assert run("node", "list", "--data", str(owned)).returncode == 0
    os.chown(owned / name, 0, 0)
    done = run("node", "list", "--data", str(owned))
    assert done.returncode == 2
    assert f"{owned / name} belongs to root" in done.stderr and f"run `chown -R {OWNER} {owned / name}`" in done.stderr
    assert "rebuild" not in done.stderr and "Traceback" not in done.stderr


def test_a_mode_that_keeps_the_owner_out_is_named_with_the_right_cure(owned: Path) -> None:
    (owned / "index.db").chmod(0o400)
    with as_user(OWNER):
        done = powermail("node", "list", "--data", str(owned))
    assert f"run `chmod u+rw {owned / 'index.db'}`" in done.err
    assert "rebuild" not in done.err


def test_settings_that_may_not_be_read_are_named_with_the_right_cure(owned: Path) -> None:
    (owned / "powermail.toml").chmod(0o000)
    with as_user(OWNER):
        said = powermail("status", "--data", str(owned)).sentence()
    assert said == f"cannot read {owned}/powermail.toml: Permission denied: run `chmod u+rw {owned}/powermail.toml`"


def test_a_backup_that_may_not_be_read_is_not_called_incomplete(owned: Path, place: Path) -> None:
    backup = place / "backup"
    backup.mkdir()
    (backup / "backup.json").touch(mode=0o600)
    with as_user(OWNER):
        done = powermail("restore", str(backup), "--data", str(owned))
    assert done.sentence().startswith(f"{backup}/backup.json may not be read by uid {OWNER}: run this as its owner, or as root")


def test_a_node_that_may_not_be_written_is_not_replaced(owned: Path) -> None:
    node = owned / "nodes" / "b"
    for path in (node, *node.rglob("*")):
        os.chown(path, 0, 0)
    with as_user(OWNER):
        done = powermail("node", "replace", "b", "--yes", "--data", str(owned))
    assert done.status == 2
    assert "`chown -R OWNER`" in done.sentence() and "Errno" not in done.sentence()
    assert (node / "identity").exists()


def test_another_user_is_told_who_may(owned: Path) -> None:
    with as_user(OWNER + 1):
        done = powermail("status", "--data", str(owned))
    assert done.status == 2
    assert "run this as the owner of the data directory, or as root" in done.err
    assert "init" not in done.err


def test_a_node_of_root_says_so_and_the_others_serve(owned: Path) -> None:
    for path in ((owned / "nodes" / "b"), *(owned / "nodes" / "b").rglob("*")):
        os.chown(path, 0, 0)
    done = run("node", "list", "--data", str(owned))
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("b ")]
    assert "may not be read: Permission denied" in line and "`chown -R OWNER`" in line
    assert "replace" not in line


def test_rights_of_root_are_given_up_for_good(owned: Path) -> None:
    """Whoever takes over the process later cannot take them back."""
    program = (
        "import os, sys; from powermail.cli import ownership; ownership.become_owner(sys.argv[1]);"
        " print(os.getresuid(), os.getresgid(), os.getgroups()); os.seteuid(0)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(owned)], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == f"({OWNER}, {OWNER}, {OWNER}) ({OWNER}, {OWNER}, {OWNER}) []"
    assert "PermissionError" in done.stderr
