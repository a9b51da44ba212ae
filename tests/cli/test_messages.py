"""What is said: the right words, the right exit status, nothing changed by half."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.support import make, powermail


def rows(data: str) -> dict[str, str]:
    """Kinds of rows by address."""
    done = powermail("account", "list", "--data", data, "--json")
    return {row["address"]: row["kind"] for row in done.json()}


def test_status_of_a_stopped_server_says_so_and_takes_no_lock(data: str) -> None:
    import fcntl

    with open(f"{data}/lock", "a") as lock:  # as a server holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = powermail("status", "--data", data)
    assert done.status == 1
    assert done.out == f"STOPPED          no server runs on {data}; `powermail serve --data {data}` starts it\n"
    found = powermail("status", "--data", data, "--json")
    assert found.status == 1
    assert found.json()["running"] is False and len(found.json()["degraded"]) == 1


def test_status_of_a_stopped_server_names_a_disk_that_is_away(data: str) -> None:
    shutil.rmtree(f"{data}/nodes/b")
    assert (
        f"STOPPED          node b: no identity in {data}/nodes/b: is its disk mounted?"
        in powermail("status", "--data", data).out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["account", "show", "x@example.org"], "no account x@example.org"),
        (["account", "set", "x@example.org", "--quota", "1M"], "no account x@example.org"),
        (["account", "delete", "postmaster@localhost", "x@example.org"], "no account x@example.org"),
        (["usage", "x@example.org"], "no account x@example.org"),
        (["list", "x@example.org"], "no account x@example.org"),
        (["node", "block", "a", "z"], "no node 'z'; there are a, b, c"),
        (["node", "scrub", "z"], "no node 'z'; there are a, b, c"),
        (["whatif", "a", "z"], "no node 'z'; there are a, b, c"),
        (["node", "expel", "z"], "no node 'z' is a member; there are a, b, c"),
        (["queue", "show", "7"], "no queue row 7"),
        (["queue", "delete", "7"], "no queue row 7; nothing was changed"),
        (["queue", "hold", "7"], "no queue row 7; nothing was changed"),
        (["purge", "77", "--yes"], "no account '77' has mail; nothing was deleted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_such_thing_is_status_1_and_changes_nothing(looked_at: str, words: list[str], said: str) -> None:
    done = powermail(*words, "--data", looked_at, "--json")
    assert done.status == 1
    assert done.sentence() == said
    assert done.json() == {"error": said, "kind": "no-such"}
    assert rows(looked_at) == {"postmaster@localhost": "mailbox"}
    assert all(row["state"] == "read-write" for row in powermail("node", "list", "--data", looked_at, "--json").json())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["account", "add", "no-address", "--password", "x"], "is not an address"),
        (["account", "set", "postmaster@localhost", "--quota", "50X"], "is not a size like"),
        (["account", "add", "a@example.org", "--password", "{rot13}x"], "password scheme {rot13} is none of"),
        (["account", "password", "postmaster@localhost"], "an empty password admits nobody"),
        (["where", "xyz"], "is not a message key (32 hex digits)"),
        (["queue", "retry"], "name rows, or --domain DOMAIN, or --all"),
        (["queue", "retry", "7", "--all"], "name rows, or --domain DOMAIN, or --all"),
        (["init"], "exists and is not empty"),
        (["rebuild"], "is there and can be used; `powermail rebuild --yes` sets it aside"),
        (["restore", "/nowhere"], "is no complete backup"),
        (["reload"], "the server is stopped; it reads its settings when it starts"),
        (["init", "--node", "a"], "is not NAME=PATH:GROUP"),
        (["password", "hash", "--scheme", "md5", "--password", "x"], "is neither argon2id nor scram-sha-256"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_status_2_and_json_says_so_too(looked_at: str, words: list[str], said: str) -> None:
    done = powermail(*words, "--data", looked_at, "--json")
    assert done.status == 2
    assert said in done.sentence()
    assert done.json()["kind"] == "misuse" and said in done.json()["error"]


def test_forward_delete_never_deletes_a_mailbox(data: str) -> None:
    assert powermail("forward", "add", "f@example.org", "x@example.net", "--data", data).status == 0
    assert powermail("forward", "add", "k@example.org", "x@example.net", "--keep-copy", "--data", data).status == 0
    done = powermail("forward", "delete", "f@example.org", "postmaster@localhost", "--data", data)
    assert done.status == 2
    assert "postmaster@localhost is a mailbox, not a forward" in done.sentence()
    assert set(rows(data)) == {"f@example.org", "k@example.org", "postmaster@localhost"}, "all or nothing"
    assert powermail("forward", "delete", "f@example.org", "k@example.org", "--data", data).status == 0
    assert rows(data) == {"k@example.org": "mailbox", "postmaster@localhost": "mailbox"}, "who keeps a copy keeps the mailbox"
    assert powermail("forward", "list", "--data", data).out == "none\n"


def test_forward_set_never_turns_a_mailbox_into_a_forward_unsaid(data: str) -> None:
    words = ("forward", "set", "postmaster@localhost", "x@example.net", "--data", data)
    done = powermail(*words)
    assert done.status == 2
    assert "is a mailbox with 0 octets of mail" in done.sentence() and "add --keep-copy, or --yes" in done.sentence()
    assert powermail("account", "show", "postmaster@localhost", "--data", data, "--json").json()["forward"] == []
    assert powermail(*words, "--keep-copy").status == 0
    assert rows(data) == {"postmaster@localhost": "mailbox"}
    assert powermail(*words).status == 2, "it is still a mailbox"
    assert powermail(*words, "--yes").status == 0
    assert rows(data) == {"postmaster@localhost": "forward"}


def test_a_lost_index_has_one_path_that_works(data: str) -> None:
    """Once: 'belongs to no cluster, run rebuild', and rebuild: 'index exists, move it away'."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{data}/index.db{suffix}").unlink(missing_ok=True)
    done = powermail("node", "list", "--data", data)
    assert "`powermail rebuild` makes it anew" in done.sentence()
    with closing(sqlite3.connect(f"{data}/index.db")):
        pass  # an empty file, as sqlite3 makes it for who looks
    Path(f"{data}/index.db").touch()
    assert "`powermail rebuild` sets it aside" in powermail("node", "list", "--data", data).sentence()
    assert powermail("rebuild", "--data", data).status == 0
    assert powermail("node", "list", "--data", data).status == 0
    Path(f"{data}/index.db").write_bytes(b"\0" * 8192)
    assert powermail("rebuild", "--data", data).status == 0
    assert powermail("rebuild", "--data", data, "--yes").status == 0
    assert len(list(Path(data).glob("index.db.before-rebuild-*"))) == 3, "nothing is thrown away, whatever the clock says"


def test_init_makes_nodes_where_disks_are(tmp_path: Path) -> None:
    disks = [tmp_path / name for name in ("one", "two")]
    disks[0].mkdir()
    (disks[0] / "lost+found").mkdir()
    data = str(tmp_path / "data")
    words = [word for disk, group in zip(disks, ("x", "y"), strict=True) for word in ("--node", f"{disk.name}={disk}:{group}")]
    make(tmp_path / "data", *words)
    found = powermail("node", "list", "--data", data, "--json").json()
    assert [(row["id"], row["group"], row["state"]) for row in found] == [
        ("one", "x", "read-write"),
        ("two", "y", "read-write"),
    ]
    assert (disks[1] / "identity").exists() and not (tmp_path / "data" / "nodes").exists()


def test_an_init_that_fails_leaves_nothing(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    done = powermail("init", "--data", str(tmp_path / "data"), "--node", f"a={tmp_path}/one:x", "--node", f"b={full}:y")
    assert done.status == 2
    assert f"{full} is not empty (file); it is left as it is" in done.sentence()
    assert not (tmp_path / "data").exists() and not (tmp_path / "data.new").exists()
    assert not (tmp_path / "one" / "identity").exists()


def test_init_fills_a_directory_that_is_there(tmp_path: Path) -> None:
    """A mount point, which cannot be renamed over."""
    (tmp_path / "data" / "lost+found").mkdir(parents=True)
    before = os.stat(tmp_path / "data").st_ino
    make(tmp_path / "data")
    assert os.stat(tmp_path / "data").st_ino == before
    assert powermail("node", "list", "--data", str(tmp_path / "data")).status == 0


def test_a_place_without_its_disk_is_not_made_a_node(data: str) -> None:
    """What is remembered of the place: it was on a disk of its own."""
    shutil.rmtree(f"{data}/nodes/b")
    os.mkdir(f"{data}/nodes/b")
    Path(f"{data}/places.json").write_text('{"a":false,"b":true,"c":false}')
    done = powermail("node", "replace", "b", "--data", data)
    assert done.status == 2
    assert f"{data}/nodes/b is not on a disk of its own now" in done.sentence() and "mount the new disk" in done.sentence()
    assert os.listdir(f"{data}/nodes/b") == []
    assert powermail("node", "replace", "b", "--yes", "--data", data).status == 0


def test_a_place_that_never_had_a_disk_of_its_own_is_replaced(data: str) -> None:
    assert powermail("node", "list", "--data", data).status == 0  # which notes where they lie
    shutil.rmtree(f"{data}/nodes/b")
    os.mkdir(f"{data}/nodes/b")
    assert powermail("node", "replace", "b", "--data", data).status == 0


def test_purge_of_several_is_all_or_nothing_and_one_json_value(data: str) -> None:
    done = powermail("purge", "postmaster@localhost", "x@example.org", "--yes", "--data", data)
    assert done.status == 1
    done = powermail("purge", "postmaster@localhost", "--json", "--data", data)
    assert done.json() == {"accounts": done.json()["accounts"], "messages": 0, "octets": 0, "purged": False, "due_at": None,
                           "undone": 0}  # fmt: skip


def test_renaming_keeps_the_id_and_the_mail(data: str) -> None:
    before = powermail("account", "show", "postmaster@localhost", "--data", data, "--json").json()
    done = powermail("account", "rename", "postmaster@localhost", "Ann@Example.ORG", "--data", data, "--json")
    assert done.json() == before | {"address": "ann@example.org"}
    assert powermail("account", "rename", "ann@example.org", "ann@example.org", "--data", data).status == 2
    assert powermail("directory", "check", "--data", data).status == 0


def test_directory_check_names_a_bad_row_and_others_go_on(data: str) -> None:
    with closing(sqlite3.connect(f"{data}/directory.db")) as db:
        db.executescript(
            "DROP TABLE accounts; CREATE TABLE accounts (id, address, password, quota_octets, forward, keep_copy, enabled,"
            " send_per_hour); INSERT INTO accounts (id, address, quota_octets) VALUES (1, 'bad@example.org', '50M'),"
            " (2, 'good@example.org', 0);"
        )
    done = powermail("directory", "check", "--data", data)
    assert done.status == 1
    assert "bad@example.org: " in done.out and "quota_octets is '50M', not a whole number from 0" in done.out
    assert "2 rows checked, 2 problems" in done.out
    assert list(rows(data)) == ["good@example.org"]
    assert "quota_octets is '50M'" in powermail("account", "show", "bad@example.org", "--data", data).sentence()
