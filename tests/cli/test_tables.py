"""How results look: on 80 columns, piped, and as JSON; the same facts each time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from msgspec import structs

from powermail.admin.messages import Listed, Listing
from powermail.admin.nodes import NodeFacts
from powermail.admin.queue import QueueFacts, QueueStory, Tried
from powermail.admin.system import Status
from powermail.cli import show
from powermail.cli.commands import COMMANDS, tell
from powermail.cli.words import Common
from tests.cli.support import powermail

AT = datetime(2026, 11, 25, 19, 30, 5, 250_000, UTC)
LONG = "a" * 64 + "@" + "long-label." * 12 + "example"
QUEUED = [
    QueueFacts(
        7, "00" * 16, LONG, "sender@example.org", 4096, AT, AT, 3, False, "451 4.4.1 no route to host, after a long story"
    ),
    QueueFacts(8, "01" * 16, "b@example.net", "", 1, AT, AT, 0, True, ""),
]
NODES = [
    NodeFacts(
        "a",
        "rack-a",
        "",
        1,
        "missing",
        False,
        False,
        7,
        1,
        1,
        1,
        2**33,
        2**40,
        0,
        0.0,
        3,
        0,
        None,
        "no identity in /srv/disk: " + "x" * 200,
    ),
    NodeFacts("b", "rack-b", "north", 1, "read-write", True, True, 7, 1, 1, 1, 2**33, 2**40, 0, 0.0, None, 2, AT, ""),
]


@pytest.fixture
def somewhere() -> Iterator[None]:
    """A machine in a time zone of its own."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Kolkata"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.parametrize("columns", ["80", "40", "300", ""])
def test_no_line_is_folded_or_cut_whatever_the_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    tell(Common("d"), QUEUED)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert LONG in lines[1] and lines[1].endswith("after a long story")
    tell(Common("d"), NODES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("x" * 200), "the reason comes last, whole"


def test_facts_come_before_reasons() -> None:
    names = list(NodeFacts.__struct_fields__)
    assert names[-1] == "reason" and names.index("messages") < names.index("reason")


def test_times_are_local_for_people_and_iso_8601_utc_for_programs(capsys: pytest.CaptureFixture[str], somewhere: None) -> None:
    tell(Common("d"), QUEUED)
    assert "2026-11-26 01:00:05" in capsys.readouterr().out
    tell(Common("d", json=True), QUEUED)
    found = json.loads(capsys.readouterr().out)
    assert found[0]["created_at"] == "2026-11-25T19:30:05.250000Z"
    assert found[0]["from"] == "sender@example.org"
    message = Listed(1, "00" * 16, 5, AT, ["a"], ["x"], False, True)
    tell(Common("d"), Listing("ann@example.org", [message], 1))
    assert "2026-11-26 01:00:05" in capsys.readouterr().out


def test_what_is_printed_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    """A reply of a hop is no way to a terminal."""
    tell(Common("d"), [QueueFacts(7, "", "x@y", "", 1, AT, AT, 0, False, "450 \x1b[2Jcleared\r\nX\u202e")])
    assert "450 ?[2Jcleared??X?" in capsys.readouterr().out


def test_records_within_a_record_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    tried = [Tried(AT, "mx.example.net", "TLSv1.3", 1.25, f"451 {n}") for n in range(2)]
    tell(Common("d"), QueueStory(**structs.asdict(QUEUED[1]), tried=tried))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-2] == ["tried:", "at                   host            tls      seconds  status"]
    assert lines[-1].endswith("mx.example.net  TLSv1.3  1.25     451 1")


def test_an_empty_table_says_so_and_as_json_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Common("d"), [])
    tell(Common("d", json=True), [])
    assert capsys.readouterr().out.splitlines() == ["none", "[]"]


def test_a_healthy_and_a_degraded_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(Common("d"), Status(True, [], nodes=NODES[1:])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "healthy"
    assert tell(Common("d"), Status(True, ["disk\x07 low"], nodes=NODES)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "DEGRADED         disk? low"


READING = [
    "status", "node list", "account list", "forward list", "queue list", "dir", "orphans", "directory check", "verify",
    "config", "trace x --log /dev/null", "queue held",
    "usage postmaster@localhost", "list postmaster@localhost", "account show postmaster@localhost", "whatif a",
    f"where {'00' * 16}", "purge postmaster@localhost", "node expel z", "queue show 9", "nonsense", "account", "node scrub a",
    "cluster members", "cluster show", "moves", "rebalance", "node drain a --dry-run", "node remove z",
    "password hash --password x", "queue retry --all", "queue hold --domain example.net",
]  # fmt: skip


@pytest.mark.parametrize("words", READING)
def test_json_is_one_complete_value_on_every_command_and_on_errors(looked_at: str, words: str) -> None:
    done = powermail(*words.split(), "--data", looked_at, "--json")
    found = done.json()
    assert ("error" in found) == bool(done.err)
    if done.status == 0:
        assert done.err == ""


def test_every_command_that_only_looks_is_tried_as_json() -> None:
    changing = {
        "init",
        "serve",
        "rebuild",
        "backup",
        "restore",
        "demo",
        "sim",
        "torture",
        "completion",
        "man",
        "reload",
        "index",
        "join",
    }
    tried = {words.split(" ")[0] for words in READING}
    assert {name.split(" ")[0] for name in COMMANDS} - changing <= tried


def test_sizes_are_for_people() -> None:
    assert [show.size(count) for count in (0, 1023, 1024, 2**30, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 GiB",
        "5.0 TiB",
    ]
