"""Backup and restore: one consistent set, checked; nothing is replaced unsaid."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import make, powermail
from tests.servers import Database


@pytest.fixture
def backed_up(data: str, tmp_path: Path) -> tuple[str, str]:
    """An installation with ann, and its backup."""
    assert powermail("account", "add", "ann@example.org", "--password", "x", "--data", data).status == 0
    to = str(tmp_path / "backup")
    done = powermail("backup", to, "--data", data, "--json")
    assert done.status == 0, done
    assert done.json()["files"] == 7
    return data, to


def addresses(data: str) -> list[str]:
    return [row["address"] for row in powermail("account", "list", "--data", data, "--json").json()]


def test_a_backup_holds_directory_index_keys_and_settings_for_its_owner_only(backed_up: tuple[str, str]) -> None:
    to = Path(backed_up[1])
    names = sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
    assert names == [
        "backup.json", "directory.db", "files/layout", "files/powermail.toml", "files/srs.keys", "files/tls/certificate.pem",
        "files/tls/key.pem", "index.db",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o077 for path in (to, *to.rglob("*"))} <= {0}


def test_restore_says_what_it_would_do_and_with_yes_does_it(backed_up: tuple[str, str]) -> None:
    data, to = backed_up
    powermail("account", "delete", "ann@example.org", "--data", data)
    powermail("account", "add", "bob@example.org", "--password", "x", "--data", data)
    done = powermail("restore", to, "--data", data)
    assert done.status == 1
    assert "nothing was changed; add --yes" in done.out
    assert addresses(data) == ["bob@example.org", "postmaster@localhost"]
    done = powermail("restore", to, "--yes", "--data", data, "--json")
    assert done.status == 0 and done.json()["restored"] is True
    assert addresses(data) == ["ann@example.org", "postmaster@localhost"]
    again = powermail("restore", to, "--yes", "--data", data, "--json")
    aside = [each.json()["set_aside"] for each in (done, again)]
    assert aside[0] != aside[1] and all("directory.db" in os.listdir(each) for each in aside)
    assert powermail("verify", "--data", data).status == 0


def test_restore_makes_a_lost_data_directory_anew(backed_up: tuple[str, str], tmp_path: Path) -> None:
    data, to = backed_up
    (tmp_path / "data" / "nodes").rename(tmp_path / "nodes")
    import shutil

    shutil.rmtree(data)
    assert powermail("restore", to, "--data", data).status == 0
    (tmp_path / "nodes").rename(tmp_path / "data" / "nodes")
    assert addresses(data) == ["ann@example.org", "postmaster@localhost"]


@pytest.mark.parametrize("name", ["directory.db", "index.db", "files/srs.keys"])
@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_damaged_backup_is_refused_before_anything_is_replaced(backed_up: tuple[str, str], name: str, harm: str) -> None:
    data, to = backed_up
    path = Path(to) / name
    if harm == "gone":
        path.unlink()
    else:
        octets = bytearray(path.read_bytes())
        octets[len(octets) // 2] ^= 1
        path.write_bytes(octets if harm == "changed" else octets[:-1])
    done = powermail("restore", to, "--yes", "--data", data)
    assert done.status == 2
    assert str(path) in done.sentence()
    assert not list(Path(data).glob("before-restore-*"))


def test_a_backup_of_another_cluster_is_refused(backed_up: tuple[str, str], tmp_path: Path) -> None:
    make(tmp_path / "other")
    done = powermail("restore", backed_up[1], "--yes", "--data", str(tmp_path / "other"))
    assert done.status == 2
    assert "belong to cluster" in done.sentence() and "nothing was changed" in done.sentence()


def test_a_restore_beside_a_server_is_refused(backed_up: tuple[str, str]) -> None:
    import fcntl

    data, to = backed_up
    with open(f"{data}/lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = powermail("restore", to, "--yes", "--data", data)
    assert done.status == 2
    assert f"a server runs on {data}: stop it first" in done.sentence()


def test_a_backup_never_mixes_with_what_is_there(data: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = powermail("backup", str(tmp_path / "full"), "--data", data)
    assert done.status == 2
    assert "is not empty; nothing was written" in done.sentence()
    assert "cannot write a backup to /proc/x" in powermail("backup", "/proc/x", "--data", data).sentence()
    assert os.listdir(tmp_path / "full") == ["file"]


def test_a_backup_says_what_is_in_databases_and_holds_the_rest(data: str, postgresql: Database, tmp_path: Path) -> None:
    """Settings and keys are ours to copy; a database is backed up by its own means, and what those must do is said."""
    assert powermail("index", "move", "--to", postgresql.url, "--data", data).status == 0
    to = str(tmp_path / "backup")
    done = powermail("backup", to, "--data", data, "--json")
    assert done.status == 0, done
    (said,) = done.json()["elsewhere"]
    assert postgresql.url in said and "tombstone_days" in said
    assert sorted(os.listdir(to)) == ["backup.json", "directory.db", "files"]
    back = powermail("restore", to, "--yes", "--data", data, "--json")
    assert back.status == 0 and back.json()["elsewhere"] == [said]
    assert addresses(data) == ["postmaster@localhost"]
    assert powermail("directory", "move", "--to", postgresql.url, "--data", data).status == 0
    done = powermail("backup", str(tmp_path / "second"), "--data", data, "--json")
    assert len(done.json()["elsewhere"]) == 2 and sorted(os.listdir(tmp_path / "second")) == ["backup.json", "files"]


def test_a_backup_from_before_the_index_was_moved_is_refused(backed_up: tuple[str, str], postgresql: Database) -> None:
    """It would be a second index of one history."""
    data, to = backed_up
    assert powermail("index", "move", "--to", postgresql.url, "--data", data).status == 0
    done = powermail("restore", to, "--yes", "--data", data)
    assert done.status == 2 and f"moved to {postgresql.url}" in done.sentence()
    assert not list(Path(data).glob("before-restore-*"))


# -- logs that are left behind -----------------------------------------------------------------------------------------------


def log_of_another(path: Path) -> bytes:
    """A write-ahead log that SQLite would play into a file of this name, as one whose file went before it is."""
    other = path.with_name("other.db")
    db = sqlite3.connect(other, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE foreign_table (a)")
    db.execute("INSERT INTO foreign_table VALUES (1)")
    octets = Path(f"{other}-wal").read_bytes()
    db.close()
    other.unlink()
    assert octets
    return octets


def tables(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT name FROM sqlite_master")}


@pytest.mark.parametrize("gone", [True, False])
def test_a_log_that_was_left_behind_is_not_played_into_what_is_restored(backed_up: tuple[str, str], gone: bool) -> None:
    """As after a restore that was killed when it had set the file aside and not yet its log."""
    data, to = backed_up
    names = [f"{name}{suffix}" for name in ("index.db", "directory.db") for suffix in ("-wal", "-journal", "-shm")]
    for name in names:
        path = Path(data, name.partition("-")[0])
        if gone:
            path.unlink(missing_ok=True)
        Path(data, name).write_bytes(log_of_another(path))
    done = powermail("restore", to, "--yes", "--data", data, "--json")
    assert done.status == 0, done
    assert all(Path(done.json()["set_aside"], name).exists() for name in names)
    assert not any("foreign_table" in tables(Path(data, name)) for name in ("index.db", "directory.db"))
    assert addresses(data) == ["ann@example.org", "postmaster@localhost"] and powermail("verify", "--data", data).status == 0


class Killed(BaseException):
    """The process is gone."""


def test_a_restore_that_is_killed_anywhere_is_said_and_goes_on(
    backed_up: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is half there under its name, and nobody serves files of two times."""
    data, to = backed_up
    powermail("account", "delete", "ann@example.org", "--data", data)
    names = [path.relative_to(data) for path in Path(data).glob("*") if path.is_file()]
    for step in (0, 5, 11, 14, 18, 23, 60):
        calls = 0

        def counted(real: Any, *args: Any, step: int = step, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return real(*args, **more)

        with monkeypatch.context() as patch:
            for module, call in ((shutil, "move"), (shutil, "copyfile"), (os, "rename"), (os, "unlink")):
                patch.setattr(module, call, functools.partial(counted, getattr(module, call)))
            try:
                done = powermail("restore", to, "--yes", "--data", data)
            except Killed:
                done = None
        if done is not None:
            assert done.status == 0 and step == 60, done
            break
        if Path(data, "restoring").exists():
            refused = powermail("account", "list", "--data", data)
            assert refused.status == 2 and "`powermail restore" in refused.sentence(), refused
        else:
            assert addresses(data)
    assert addresses(data) == ["ann@example.org", "postmaster@localhost"]
    assert not list(Path(data).rglob("*.restoring")) and not Path(data, "restoring").exists()
    assert {path.relative_to(data) for path in Path(data).glob("*") if path.is_file()} >= set(names)
