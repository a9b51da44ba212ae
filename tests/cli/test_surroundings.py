"""What stands around a command: streams that are closed or full, an environment without a language, words that are no text,
numbers beyond all bounds, paths to be pasted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.support import make, powermail

PROGRAM = f"{shlex.quote(sys.executable)} -m powermail"
LATIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # a process whose language has no letters but ASCII


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of a shell with next to no environment: no HOME, no TERM, no LANG."""
    path = str(Path("src").resolve())
    return subprocess.run(["/bin/sh", "-c", line], capture_output=True, env={"PYTHONPATH": path, **environment}, check=False)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_its_work(looked_at: str, closed: str) -> None:
    done = shell(f"{PROGRAM} config --data {looked_at} {closed}")
    assert done.returncode == 0
    assert done.stderr == b""


def test_a_full_disk_behind_standard_output_is_said() -> None:
    for words in ("--version", "man"):
        done = shell(f"{PROGRAM} {words} > /dev/full")
        assert done.returncode == 1
        assert done.stderr == b"powermail: [Errno 28] No space left on device\n"


def test_who_reads_one_line_only_hears_no_complaint() -> None:
    done = shell(f"{PROGRAM} man | head -1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b".TH POWERMAIL")


def test_an_environment_without_a_language_shows_and_takes_every_letter(tmp_path: Path) -> None:
    make(tmp_path / "data")
    add = shell(f"{PROGRAM} account add jörg@bücher.test --json --data {tmp_path}/data", **LATIN)
    assert add.returncode == 0, add.stderr
    assert '"address": "jörg@bücher.test"'.encode() in add.stdout


@pytest.mark.parametrize(
    "words", [["account", "show", "\udcff@mail.test"], ["where", "\udcff"], ["list", "a@b", "--data", "\udcff"]]
)
def test_words_that_are_no_text_are_refused(words: list[str]) -> None:
    done = powermail(*words)
    assert done.status == 2
    assert done.sentence().endswith("is not UTF-8")
    assert powermail(*words, "--json").json()["kind"] == "misuse"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "no password came on standard input"),
        ("\n", "no password came on standard input"),
        ("\udcff\n", "the password on standard input is not UTF-8"),
        ("a\0b\n", "a password has no control characters"),
        ("typed in a terminal\x7f\n", "a password has no control characters"),
    ],
)
@pytest.mark.parametrize("words", [["account", "add", "x@mail.test"], ["account", "password", "postmaster@localhost"]])
def test_a_password_that_nobody_could_type_is_refused(looked_at: str, words: list[str], given: str, said: str) -> None:
    before = powermail("account", "list", "--data", looked_at, "--json").json()
    done = powermail(*words, "--password-stdin", "--data", looked_at, given=given)
    assert (done.status, done.sentence()) == (2, said)
    assert powermail("account", "list", "--data", looked_at, "--json").json() == before


def test_a_password_of_a_file_with_carriage_returns_is_what_stands_in_the_line(data: str) -> None:
    from powermail.directory import password as pw

    assert powermail("account", "add", "x@mail.test", "--password-stdin", "--data", data, given="secret\r\n").status == 0
    import sqlite3

    with sqlite3.connect(f"{data}/directory.db") as db:
        ((stored,),) = db.execute("SELECT password FROM accounts WHERE address = 'x@mail.test'")
    db.close()
    assert pw.scheme_of(stored) == "argon2id"
    from argon2 import PasswordHasher

    assert PasswordHasher().verify(stored.removeprefix("{argon2id}"), "secret")


@pytest.mark.parametrize(
    "words",
    [
        ["queue", "show", "9" * 25],
        ["queue", "retry", "9" * 25],
        ["queue", "delete", "1", "-" + "9" * 25],
        ["queue", "list", "--older", "9" * 25],
        ["queue", "list", "--older", "9" * 5000 + "d"],
        ["account", "set", "postmaster@localhost", "--quota", "9" * 5000],
        ["account", "set", "postmaster@localhost", "--quota", "9" * 25],
        ["account", "set", "postmaster@localhost", "--send-per-hour", "9" * 25],
        ["sim", "--seeds", "9" * 5000],
        ["--set", "smtp.message_octets_max=99999999999999999999", "config"],
    ],
    ids=lambda words: " ".join(word[:12] for word in words),
)
def test_numbers_beyond_all_bounds_are_refused_with_their_name(looked_at: str, words: list[str]) -> None:
    done = powermail(*words, "--data", looked_at)
    assert done.status == 2, done
    assert len(done.sentence()) < 300


def test_paths_are_printed_as_a_shell_reads_them(tmp_path: Path) -> None:
    place = str(tmp_path / "mail of ours; ä")
    made = powermail("init", "--data", place)
    said = made.out.splitlines()[-1].removeprefix("start it with  ")
    assert shlex.split(said) == ["powermail", "serve", "--data", place]
    status = powermail("status", "--data", place)
    assert shlex.split(status.out.split("`")[1]) == ["powermail", "serve", "--data", place]
    absent = powermail("account", "list", "--data", place + "/x y")
    assert shlex.split(absent.sentence().split("`")[1]) == ["powermail", "init", "--data", place + "/x y"]


def test_a_path_too_long_for_a_socket_is_said_before_anything_starts(tmp_path: Path) -> None:
    place = str(tmp_path / ("x" * 120))
    made = powermail("init", "--data", place)
    assert made.status == 2
    assert "is longer than the path of a socket may be" in made.sentence()
    assert not os.path.exists(place)
    assert "is longer than the path of a socket may be" in powermail("serve", "--init", "--data", place).sentence()


@pytest.mark.parametrize("domain", ["foo bar", "a@b", "-", "x..y", "[300.1.1.1]"])
def test_only_a_domain_is_held(looked_at: str, domain: str) -> None:
    for action in ("hold", "release", "retry"):
        done = powermail("queue", action, f"--domain={domain}", "--data", looked_at)
        assert done.status == 2
        assert "is not a domain" in done.sentence()
    assert powermail("queue", "held", "--json", "--data", looked_at).json() == []


def test_a_domain_is_held_in_all_its_spellings(data: str) -> None:
    assert powermail("queue", "hold", "--domain", "xn--bcher-kva.TEST", "--data", data).status == 0
    assert powermail("queue", "held", "--json", "--data", data).json() == [{"domain": "bücher.test", "waiting": 0}]
    assert powermail("queue", "release", "--domain", "BÜCHER.test", "--data", data).status == 0
    assert powermail("queue", "held", "--json", "--data", data).json() == []


def test_a_message_that_nobody_knows_is_no_such(looked_at: str) -> None:
    done = powermail("where", "0" * 32, "--data", looked_at)
    assert done.status == 1
    assert "known       no" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["forward", "add", "f@mail.test", "good@mail.test", "bad"], "destination 'bad' is not an address: "),
        (["account", "add", "foo bar@mail.test"], "'foo bar@mail.test' is not an address: "),
        (["account", "set", "postmaster@localhost", "--send-as", "bad"], "sender 'bad' is not an address: "),
    ],
)
def test_what_is_no_address_is_named(looked_at: str, words: list[str], said: str) -> None:
    done = powermail(*words, "--data", looked_at)
    assert done.status == 2
    assert done.sentence().startswith(said)


def test_an_option_behind_two_dashes_is_called_a_word() -> None:
    done = powermail("account", "add", "--", "a@b.test", "--data", "x")
    assert done.status == 2
    assert "'--data' is too much" in done.sentence() and "did you mean" not in done.sentence()
    assert "behind `--`" in powermail("account", "show", "-x@mail.test").sentence()


def test_a_directory_that_is_gone_is_said_and_never_made_empty(data: str) -> None:
    """With an empty one, every recipient would be refused for good: innocent mail would bounce."""
    os.rename(f"{data}/directory.db", f"{data}/kept")
    for words in (["account", "list"], ["directory", "check"], ["serve"], ["account", "add", "a@b.test"]):
        done = powermail(*words, "--data", data)
        assert done.status == 2
        assert done.sentence().startswith(f"the directory {data}/directory.db is missing: is its disk mounted?")
    assert not os.path.exists(f"{data}/directory.db")
    Path(f"{data}/directory.db").touch()  # what the sentence says of beginning anew
    assert powermail("account", "list", "--data", data, "--json").json() == []


def test_a_full_disk_is_no_reason_to_rebuild(data: str) -> None:
    """No file may grow by an octet: the databases are as they were, and say so when there is room again."""
    done = shell(f"ulimit -f 0; {PROGRAM} account list --data {data}")
    assert done.returncode == 2
    assert b"is its disk full, failing or read-only? Nothing was changed" in done.stderr
    assert b"rebuild" not in done.stderr
    assert powermail("account", "list", "--data", data).status == 0


@pytest.mark.parametrize("junk", [b"no database at all, but as long as one" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_an_index_that_is_none_is_rebuilt(data: str, junk: bytes) -> None:
    for name in ("index.db", "index.db-wal", "index.db-shm"):
        Path(f"{data}/{name}").unlink(missing_ok=True)
    Path(f"{data}/index.db").write_bytes(junk)
    assert "`powermail rebuild`" in powermail("verify", "--data", data).sentence()
    assert powermail("rebuild", "--data", data).status == 0
    assert powermail("verify", "--data", data).status == 0


def test_nothing_is_not_traced(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("2026-11-25T23:01:34.614Z INFO    delivered key=07 sender=<> to=ann@example.org\n")
    assert powermail("trace", "ann@example.org", "--log", str(tmp_path / "log")).status == 0
    assert powermail("trace", "", "--log", str(tmp_path / "log")).status == 2


def test_a_list_of_purges_that_cannot_be_read_has_a_cure(data: str) -> None:
    Path(f"{data}/purges.json").write_text("{")
    done = powermail("dir", "--data", data)
    assert done.status == 1
    assert done.sentence().endswith("move it away, and nothing is purged until it is ordered again")
    os.unlink(f"{data}/purges.json")
    assert powermail("dir", "--data", data).status == 0
