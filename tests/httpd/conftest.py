"""Owns a server that is watched: one real process for a whole file, or one in this process that can be made ill."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from powermail.app.compose import PowerMail
from powermail.app.setup import initialise
from powermail.base import limits
from powermail.base.log import MemoryLog
from powermail.base.settings import load_file
from powermail.base.world import system_world
from powermail.httpd.service import Monitor  # noqa: F401  its libraries take a while to load, in no step of a test
from tests.system.conftest import DOORS, Client, Place
from tests.system.process import FREE, SMALL, START_S, make

LISTEN = ["--set", 'metrics.listen=["127.0.0.1:0"]']


class Answer(NamedTuple):
    """What a client read."""

    status: int
    headers: dict[str, str]
    body: str


class Watched:
    """`powermail serve` with its listener."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data.with_name("log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "powermail",
                    "serve",
                    "--data",
                    str(data),
                    "--set",
                    "log.json=true",
                    *FREE,
                    *SMALL,
                    *LISTEN,
                ],
                stdout=log,
                stderr=log,
            )
        ends_at = time.monotonic() + START_S
        self.ports: dict[str, int] = {}
        while len(self.ports) < len(DOORS) + 1 or not (data / "control.sock").exists():
            assert time.monotonic() < ends_at and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
            self.ports = {event["door"]: int(event["address"].rpartition(":")[2]) for event in self.events("listening")}

    def events(self, name: str) -> list[dict[str, str]]:
        """Lines of its log."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """One request by a real client."""
        client = http.client.HTTPConnection("127.0.0.1", self.ports["httpd"], timeout=20)
        try:
            client.request(method, path, headers=headers)
            response = client.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            client.close()

    def say(self, octets: bytes, shut: bool = False) -> bytes:
        """What comes back for octets, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.ports["httpd"]), timeout=20) as client:
            client.sendall(octets)
            if shut:
                client.shutdown(socket.SHUT_WR)
            found = b""
            while some := client.recv(65536):
                found += some
            return found

    def figure(self, figure: str, **labels: str) -> float:
        """One value of a scrape."""
        return value(self.ask("/metrics").body, figure, **labels)

    def becomes(self, wanted: float, figure: str, **labels: str) -> bool:
        """True once a scrape shows that value; it may be asked again within METRICS_FRESH_S."""
        ends_at = time.monotonic() + 20.0
        while (found := self.figure(figure, **labels)) != wanted:
            assert time.monotonic() < ends_at and found < wanted, found
            time.sleep(0.02)
        return True

    def stop(self) -> int:
        """As an operator stops it; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limits.DRAIN_TIMEOUT_S + 10)


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All of a scrape: by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, figure: str, **labels: str) -> float:
    """One value of a scrape."""
    return values(text)[figure, tuple(sorted(labels.items()))]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One process for all that only ask. It stops although a client of the listener is idle."""
    data = tmp_path_factory.mktemp("watched") / "data"
    make(data)
    made = Watched(data)
    yield made
    with socket.create_connection(("127.0.0.1", made.ports["httpd"])) as idle:
        idle.sendall(b"GET /live HT")
        assert made.stop() == 0
        assert idle.recv(10) == b"", "closed"
    assert made.events("bug") == [] and len(made.events("draining")) == len(made.events("stopped")) == 1


class Near(Place):
    """A PowerMail in this process."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.clients: list[Client] = []
        self.log = MemoryLog()
        self.broken: list[BaseException] = []
        self.powermail: PowerMail

    async def start(self, *overrides: str) -> None:
        """Starts on free ports."""
        words = [f'{name}=["127.0.0.1:0"]' for name in (*DOORS, "metrics.listen")]
        words += ["cluster.reserve_octets=0", f"cluster.segment_octets={limits.MIB}", *overrides]
        settings = load_file(str(self.data / "powermail.toml"), words)
        self.powermail = PowerMail(system_world(self.log), settings, str(self.data), self.broken.append)
        await self.powermail.start()

    def port(self, door: str) -> int:
        return self.powermail.front.listening[door]

    async def operation(self, name: str, **arguments: object) -> object:
        return await self.powermail.operations.call(name, dict(arguments))

    @property
    def watch_port(self) -> int:
        """Where the listener is, the last that came about."""
        found = [re.search(r"listening door=httpd address=\S+:(\d+)", line) for line in self.log.lines]
        return int(next(match[1] for match in reversed(found) if match is not None))


@pytest.fixture
async def near(tmp_path: Path) -> AsyncIterator[Near]:
    """Made, not started."""
    made = Near(tmp_path / "data")
    await initialise(system_world(MemoryLog()), str(made.data), "localhost")
    yield made
    for client in made.clients:
        client.close()
    await made.powermail.stop(0.5)
