"""The words of the command line: where options stand, what was meant, and what is made from the table of commands."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from powermail.base.errors import OperatorError
from powermail.cli import pages
from powermail.cli.commands import COMMANDS, entries
from powermail.cli.words import octets, parser, seconds, take_common
from tests.cli.support import powermail


def test_common_options_work_before_and_behind_the_command() -> None:
    for words in (
        ["--data", "d/", "--json", "--set", "a=1", "node", "list", "--set=b=2"],
        ["node", "list", "--set", "a=1", "--data=d", "--set", "b=2", "--json"],
        ["node", "--set", "a=1", "--json", "list", "--set", "b=2", "--data", "d"],
    ):
        common, rest = take_common(words)
        assert (common.data, common.overrides, common.json) == ("d", ["a=1", "b=2"], True)
        assert vars(parser(entries()).parse_args(rest))["full"] == "node list"


def test_what_stands_behind_two_dashes_is_no_option() -> None:
    common, rest = take_common(["forward", "add", "a@b", "--", "--json"])
    assert not common.json
    assert rest == ["forward", "add", "a@b", "--", "--json"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["stauts"], "did you mean 'status'"),
        (["acount", "list"], "did you mean 'account'"),
        (["node", "blok", "a"], "did you mean 'block'"),
        (["queue", "retry", "--al"], "did you mean '--all'"),
        (["purge", "7", "--yess"], "did you mean '--yes'"),
    ],
)
def test_a_typing_error_is_said_with_what_was_meant(words: list[str], meant: str) -> None:
    done = powermail(*words)
    assert done.status == 2
    assert meant in done.sentence()
    assert "usage: powermail" in done.err and done.out == ""
    assert meant in powermail(*words, "--json").json()["error"]


def test_no_command_prints_the_help_and_is_a_misuse() -> None:
    done = powermail()
    assert done.status == 2
    assert "COMMAND" in done.out


def test_sizes_and_times_are_never_guessed() -> None:
    assert (octets("20M"), octets("1g"), octets("7")) == (20 * 2**20, 2**30, 7)
    assert (seconds("90s"), seconds("2h"), seconds("3d"), seconds("5")) == (90, 7200, 259_200, 5)
    for bad in ("", "M", "20X", "-1", "1.5G", "٣"):
        with pytest.raises(OperatorError, match="is not a size"):
            octets(bad)
        with pytest.raises(OperatorError, match="is not a time"):
            seconds(bad)


def test_the_version_costs_the_start_of_the_interpreter() -> None:
    """At most 0.12 s; measured as CPU, so that it means the same on a busy machine. The best of three is what it takes."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "powermail", "--version"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.startswith("powermail 0.")
    assert min(times) <= 0.12, times
    assert powermail("--json", "--version").out == done.stdout


def test_every_command_explains_itself_and_every_field() -> None:
    for name in COMMANDS:
        assert COMMANDS[name].entry().text, name
        for one in COMMANDS[name].entry().fields:
            assert one.text, f"{name} {one.name}"


def completed(tmp_path: Path, words: list[str]) -> list[str]:
    """What bash offers for the last word."""
    script = tmp_path / "completion"
    script.write_text(powermail("completion", "bash").out)
    line = f"source {script}; COMP_WORDS=(powermail {' '.join(words)}); COMP_CWORD={len(words)}; _powermail"
    line += "; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_actions_and_options(tmp_path: Path) -> None:
    assert completed(tmp_path, ["sta"]) == ["status"]
    assert completed(tmp_path, ["--data", "x", "node", "un"]) == ["unblock"]
    assert completed(tmp_path, ["queue", "list", "--o"]) == ["--older"]
    assert set(completed(tmp_path, ["account", "add", "a@b", "--pass"])) == {"--password", "--password-stdin"}


def test_other_shells_have_their_scripts_and_unknown_ones_are_refused() -> None:
    assert "bashcompinit" in powermail("completion", "zsh").out
    assert "-n __fish_use_subcommand -a status" in powermail("completion", "fish").out
    done = powermail("completion", "tcsh")
    assert done.status == 2
    assert "none of bash, zsh, fish" in done.sentence()


def test_the_manual_page_names_every_command_and_formats() -> None:
    page = powermail("man").out
    for name in COMMANDS:
        assert f".B powermail {name}".replace("-", "\\-") in page
    if os.path.exists("/usr/bin/groff"):
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_the_page_of_commands_is_true() -> None:
    assert Path("docs/commands.md").read_text() == pages.reference(entries()), "powermail man --markdown > docs/commands.md"
