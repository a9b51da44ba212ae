"""As a service: the unit, and the notice of readiness."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.settings import load
from powermail.cli.serving import differing, notify, reachable

UNIT = Path("packaging/powermail.service")


def test_the_unit_fits_the_program() -> None:
    settings = dict(re.findall(r"^([A-Za-z]+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert settings["Type"] == "notify"
    assert int(settings["TimeoutStartSec"]) > limits.NODE_OPEN_TIMEOUT_S
    assert int(settings["TimeoutStopSec"]) > limits.STOP_ALL_S, "whatever hangs, the program ends before it is killed"
    assert f"after {limits.STOP_ALL_S:g} s" in UNIT.read_text()
    assert settings["UMask"] == "0077"


def test_a_stop_ends_although_the_event_loop_hangs() -> None:
    """A service manager that has to kill it waits minutes; so does whoever stops many machines one after the other."""
    code = (
        "import asyncio, time\n"
        "from powermail.base.log import StreamLog\n"
        "from powermail.cli.serving import end_within\n"
        "async def main():\n"
        "    end_within(0.6, StreamLog(time.time, 'info', False))\n"
        "    await asyncio.sleep(0.3)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGALRM and "ends as if it were killed" in done.stdout + done.stderr


def test_the_unit_is_right_in_the_eyes_of_systemd(tmp_path: Path) -> None:
    program = tmp_path / "powermail"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "powermail.service"
    text = UNIT.read_text().replace("/usr/local/bin/powermail", str(program))
    unit.write_text(text.replace("Documentation=man:powermail(1)\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "powermail" in line]
    assert ours == [], done.stderr


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    name = f"@powermail-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_without_a_service_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    notify("READY=1")
    assert "cannot be told READY=1" in capsys.readouterr().err


def test_the_welcome_names_the_address_that_is_listened_on() -> None:
    assert [reachable([text]) for text in ("127.0.0.1:25", "0.0.0.0:25", "[::]:25", "[2001:db8::1]:25", "mail.example:25")] == [
        "127.0.0.1", "127.0.0.1", "127.0.0.1", "[2001:db8::1]", "mail.example",
    ]  # fmt: skip
    assert reachable([]) == "127.0.0.1"


def test_settings_say_what_changes_now_and_what_needs_a_restart() -> None:
    before = load("", {})
    after = load(
        'hostname = "other"\n[log]\nlevel = "debug"\njson = true\n[cluster]\ncopies_required = 1\n'
        '[[cluster.nodes]]\nid = "a"\npath = "a"\ngroup = "x"\n',
        {},
    )
    assert differing(before, before) == ([], [])
    changed, restart = differing(before, after)
    assert changed == ["log.level"]
    assert restart == ["hostname", "cluster.copies_required", "cluster.nodes", "log.json"]
