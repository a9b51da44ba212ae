"""Owns a PowerMail as a process of its own: started by the command line, killed with -9, asked through its control socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from powermail.admin.control import ask_raw
from powermail.base import limits
from tests.system.conftest import DOORS, Client, Place

FREE = [word for name in DOORS for word in ("--set", f'{name}=["127.0.0.1:0"]')]
SMALL = ["--set", f"cluster.segment_octets={limits.MIB}", "--set", "cluster.reserve_octets=0"]
START_S = 60.0
_LISTENING = re.compile(rb'"event":"listening","door":"([^"]+)","address":"[^"]*:(\d+)"')


class Listed(NamedTuple):
    """A message as the index shows it."""

    uidvalidity: int
    uid: int
    key: bytes


class Served(Place):
    """`powermail serve` on a data directory."""

    def __init__(self, data: Path, *more: str) -> None:
        self.data = data
        self.clients: list[Client] = []
        self._more = more
        self._ports: dict[str, int] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None

    async def start(self) -> None:
        """Starts it; all doors are open then."""
        self._ports = {}
        (self.data / "control.sock").unlink(missing_ok=True)
        log = self.data.with_name(f"{self.data.name}.log")
        self._log = log.open("wb")
        self._process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "powermail", "serve", "--data", str(self.data), "--set", "log.json=true"],
            *[*FREE, *SMALL, *self._more],
            stdout=self._log,
            stderr=self._log,
        )
        ends_at = time.monotonic() + START_S
        while len(self._ports) < len(DOORS) or not (self.data / "control.sock").exists():
            assert time.monotonic() < ends_at and self._process.returncode is None, log.read_text()
            await asyncio.sleep(0.02)
            for line in log.read_bytes().splitlines():
                if (found := _LISTENING.search(line)) is not None:  # notes of a start may stand in the same line
                    self._ports[found[1].decode()] = int(found[2])

    def port(self, door: str) -> int:
        return self._ports[door]

    async def operation(self, name: str, **arguments: object) -> object:
        async def unseen(done: int, total: int) -> None:
            pass

        return msgspec.json.decode(await ask_raw(str(self.data / "control.sock"), name, dict(arguments), unseen))

    async def kill(self) -> None:
        """kill -9."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """As an operator stops it."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
            async with asyncio.timeout(limits.DRAIN_TIMEOUT_S + 10):
                await self._process.wait()
        if self._log is not None:
            self._log.close()

    async def listed(self, address: str) -> list[Listed]:
        """What the INBOX of an address shows, in order."""
        account = await self.operation("account_show", address=address)
        found = await self.operation("list_messages", address=address)
        assert isinstance(account, dict) and isinstance(found, dict)
        with sqlite3.connect(f"file:{self.data}/index.db?mode=ro", uri=True) as index:
            row = index.execute("SELECT uidvalidity FROM mailboxes WHERE account = ?", (account["id"],)).fetchone()
        index.close()
        return [Listed(row[0], message["uid"], bytes.fromhex(message["key"])) for message in found["messages"]]


def command(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line; by its environment that of another program than this tree's."""
    run = [sys.executable, "-m", "powermail", *words]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, env=environment)


def make(data: Path, environment: dict[str, str] | None = None) -> None:
    """A new installation; its segments are small, so that no command looks through much unused room."""
    assert command("init", "--data", str(data), environment=environment).returncode == 0
    settings = data / "powermail.toml"
    settings.write_text(settings.read_text().replace("[cluster]\n", f"[cluster]\nsegment_octets = {limits.MIB}\n"))


def lose_index(data: Path) -> None:
    """The index is gone."""
    for suffix in ("", "-wal", "-shm"):
        (data / f"index.db{suffix}").unlink(missing_ok=True)


def cold_copy(data: Path, to: Path) -> None:
    """Copies the index of an installation that is stopped."""
    to.write_bytes((data / "index.db").read_bytes())


def hot_copy(data: Path, to: Path) -> None:
    """Copies the index while it is written to."""
    with sqlite3.connect(f"file:{data}/index.db?mode=ro", uri=True) as index, sqlite3.connect(to) as copy:
        index.backup(copy)
    index.close()
    copy.close()


def restore(data: Path, backup: Path) -> None:
    """Puts a copy back, as people do it."""
    lose_index(data)
    (data / "index.db").write_bytes(backup.read_bytes())
    os.chmod(data / "index.db", 0o600)
