"""`powermail cluster demo`: what it prints makes a cluster, and what it says to try is true. All rooms work together here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from powermail.admin.control import ask_any
from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.cli import databases, servers, tutorial
from tests.cli.support import powermail
from tests.system.process import START_S
from tests.system.several import lives

SMALL = {"POWERMAIL_CLUSTER__SEGMENT_OCTETS": str(limits.MIB), "POWERMAIL_CLUSTER__RESERVE_OCTETS": "0"}

KEPT = {("head", "keeper"), ("front-1", "front1"), ("front-2", "front1")}  # who shares the index


async def here(words: Sequence[str], where: str) -> tuple[int, str]:
    """A command in this process, which has loaded the program already."""
    done = await asyncio.to_thread(powermail, *words)
    return done.status, done.out + done.err


async def shell(line: str, root: str) -> str:
    """What a newcomer pastes: what it printed. Tried again while the answer is that it cannot be done now."""
    async with asyncio.timeout(START_S):
        while True:
            status, said = await servers.run(["sh", "-c", line], root)
            if not status:
                return said
            await asyncio.sleep(0.1)


async def status_of(root: str) -> dict[str, Any]:
    """`powermail status --data head --json`."""

    async def unseen(done: int, total: int) -> None:
        pass

    found = msgspec.json.decode(await ask_any(f"{root}/head", "status", {}, unseen))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def root() -> Iterator[str]:
    """A directory through which PostgreSQL may pass, whoever runs it: not below one of pytest's."""
    with tempfile.TemporaryDirectory(prefix="powermail-tests-demo-") as path:
        os.chmod(path, 0o711)
        yield path


async def test_mail_goes_in_at_one_front_end_and_out_at_the_other_also_when_a_node_machine_is_killed(
    monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """The cluster of the demo in real processes; only short commands run in this one."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(root)
    cluster = tutorial.Tutorial(root, here)
    try:
        sending, _, killing, *_ = await cluster.build()
        send, read = sending.lines
        await shell(send, root)
        assert "\r\nIt works.\r\n" in await shell(read, root)
        assert {one["state"] for one in (await status_of(root))["nodes"]} == {"read-write"}
        await shell(killing.lines[0], root)
        await cluster.servers.served["node-b"].process.wait()
        await shell(send.replace("works", "goes on"), root)  # P4: receiving goes on
        assert "\r\nIt works.\r\n" in await shell(read, root)
        assert "\r\nIt goes on.\r\n" in await shell(read.removesuffix("/1") + "/2", root)
        async with asyncio.timeout(START_S):
            while not any(said.startswith("node b is missing") for said in (await status_of(root))["degraded"]):
                await asyncio.sleep(0.1)
        status = await status_of(root)
        assert {one["id"]: one["state"] for one in status["nodes"]} == {
            "a": "read-write",
            "b": "missing",
            "c": "read-write",
        }
        assert status["takes_mail"]
        async with asyncio.timeout(START_S):  # by their names in the cluster, not by that of the host
            while {(one["machine"], one["process"]) for one in (await status_of(root))["processes"]} != KEPT:
                await asyncio.sleep(0.1)
    finally:
        await cluster.end()
    assert not cluster.still_served()
    assert not [name for name, served in cluster.servers.served.items() if lives(served.process.pid)]
    said = {name: Path(f"{root}/{name}.log").read_text(encoding="utf-8") for name in cluster.servers.served}
    assert not [name for name, text in said.items() if " bug " in text or "Traceback" in text], said


def test_ctrl_c_ends_what_was_started_so_far_and_leaves_nothing(root: str) -> None:
    """While it still makes the cluster: PostgreSQL runs, and the directory is there."""
    command = [sys.executable, "-m", "powermail", "cluster", "demo"]
    environment = {**os.environ, "TMPDIR": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as demo:
        assert demo.stdout is not None
        line = next(line for line in demo.stdout if line.startswith("$ postgres "))
        server = int(line.rpartition("# process ")[2].partition(",")[0])
        (made,) = Path(root).iterdir()
        assert lives(server)
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
        assert demo.wait(START_S) == 1, rest
    assert "stopping" in rest and not lives(server) and not made.exists(), rest


def test_without_postgresql_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(databases, "_PLACES", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperatorError, match=r"no PostgreSQL is installed.*package `postgresql`"):
        databases.postgres_programs()
    (tmp_path / "13" / "bin").mkdir(parents=True)
    (tmp_path / "13" / "bin" / "initdb").touch()
    monkeypatch.setattr(databases, "_PLACES", (f"{tmp_path}/*/bin",))
    with pytest.raises(OperatorError, match="only PostgreSQL 13 is installed, and the cluster needs 15"):
        databases.postgres_programs()
