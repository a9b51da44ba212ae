"""`powermail torture` in its short form: a real cluster is taken apart and holds; whoever ends it, nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.base.errors import OperatorError
from powermail.cli import ground, torture
from powermail.cli.databases import Single
from powermail.torture.checker import KINDS
from powermail.torture.plan import BEATS, SCENES, Kind
from tests.system.process import START_S

WITHIN_S = 600.0  # on an idle machine it takes 90 s


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where it makes its directory; PostgreSQL may pass, whoever runs it."""
    with tempfile.TemporaryDirectory(prefix="powermail-tests-torture-") as path:
        os.chmod(path, 0o711)
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


async def run(*words: str) -> tuple[int, Any]:
    """Exit status and report."""
    command = [sys.executable, "-m", "powermail", "torture", "--json", *words]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(WITHIN_S):
        out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, msgspec.json.decode(out)


@pytest.mark.timeout(WITHIN_S + 60.0)
async def test_nothing_acknowledged_is_lost_doubled_back_or_hidden_while_machines_are_killed_cut_off_and_lose_disks(
    place: Path,
) -> None:
    """P1, P2, P4, P5, P7, P8, P10, P12, P13. How long it takes is a matter of the machine, and not judged here."""
    bounds = ["--gap", f"{WITHIN_S:.0f}", "--healed", f"{WITHIN_S:.0f}"]
    status, report = await run("--seconds", "25", "--seed", "7", "--preload", "200", *bounds)
    assert not report["violations"], report
    assert status == 0 and report["held"]
    assert report["counts"] == dict.fromkeys(KINDS, 0)
    assert report["acked"] > 200 and report["listings"] and report["retrieved"] and report["looks"]
    done = {Kind(name): count for name, count in report["faults"].items()}
    assert all(done[kind] for kind in BEATS) and any(done[kind] for kind in SCENES), done
    if os.geteuid() == 0:
        assert report["ground"] == "in network namespaces" and not report["not_tried"], report
    assert not list(place.iterdir()) and not torture.at_work_in(place)


@pytest.mark.timeout(WITHIN_S + 60.0)
async def test_while_one_of_two_databases_takes_the_place_of_the_other_mail_is_received(place: Path) -> None:
    """P14, P20: Patroni gives a dead leader 20 s; a gap of half of that shows that nobody waited for it."""
    bounds = ["--gap", "10", "--healed", f"{WITHIN_S:.0f}"]
    status, report = await run("--pair", "--seconds", "35", "--faults", "kill-database", "--preload", "60", *bounds)
    assert not report["violations"], report
    assert status == 0 and report["held"] and report["faults"][Kind.KILL_DATABASE.value] == 1
    assert report["ground"] == "in network namespaces, on two databases under Patroni"
    assert report["acked"] > 200 and report["retrieved"] and report["looks"]
    assert not list(place.iterdir()) and not torture.at_work_in(place)


def test_two_databases_need_namespaces_and_their_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ground, "is_enclosed", lambda: False)
    monkeypatch.setattr(ground, "why_not_enclosed", lambda: "they are forbidden here")
    with pytest.raises(OperatorError, match="--pair: two databases need namespaces of their own, and they are forbidden here"):
        torture.found(pair=True)
    assert isinstance(torture.found(pair=False)[1], Single)
    monkeypatch.setattr(ground, "why_not_enclosed", lambda: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperatorError, match="no patroni is installed; Debian's packages: patroni, "):
        torture.found(pair=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_whoever_ends_it_nothing_is_left_or_the_next_run_takes_it_away(place: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "powermail", "torture", "--faults", "kill"]
    ends_at = time.monotonic() + START_S
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not any(path.stat().st_size for path in place.glob("*/postgresql.log")):  # a server of its own runs
            assert running.poll() is None and time.monotonic() < ends_at
            time.sleep(0.05)
        assert torture.at_work_in(place)
        running.send_signal(number)
        status = running.wait(START_S)
    if number is signal.SIGTERM:
        assert status == 130
    else:
        (left,) = place.iterdir()
        assert torture.sweep() == [str(left)]
    assert not list(place.iterdir()) and not torture.at_work_in(place)


def test_what_cannot_be_done_without_namespaces_is_said() -> None:
    possible, not_tried = torture.divide(list(Kind), "they are forbidden here")
    assert Kind.CUT not in possible and Kind.KILL in possible and Kind.ROT in possible
    assert len(possible) + len(not_tried) == len(Kind) and all("forbidden here" in text for text in not_tried)
    assert torture.divide(list(Kind), "") == (list(Kind), [])
