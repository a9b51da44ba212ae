"""What the index promises is on the disk when it is told: counted in system calls of a real process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import asyncio, sys
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.index.contract import Delivery, Outcome
from powermail.index.sqlite import SqliteIndex
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import START, Position, Receipt

async def main():
    index = SqliteIndex(system_world(MemoryLog()), sys.argv[1])
    await index.open("cluster")
    for node in ("a", "b"):
        await index.admit_node(node, node, node * 16, "boot", START, START)
    receipts = tuple(Receipt(node, node * 16, Position(1, 4096)) for node in ("a", "b"))
    for number in range(20):
        commit = Commit(1, "00" * 32, [1], 1.0, Envelope(), [Target(account="1")])
        print("before", flush=True)
        assert await index.deliver(Delivery(bytes([number]) * 16, commit, receipts)) is Outcome.ENTERED
        print("after", flush=True)
    await index.close()

asyncio.run(main())
"""


@pytest.mark.timeout(120)
def test_every_transaction_of_the_index_is_synced_before_it_is_told(tmp_path: Path) -> None:
    """Decision 7: with synchronous=NORMAL a power cut would take back what was promised (P10)."""
    trace = tmp_path / "trace"
    done = subprocess.run(
        [
            "strace",
            "-f",
            "-e",
            "trace=fdatasync,fsync,write",
            "-o",
            trace,
            sys.executable,
            "-c",
            _PROGRAM,
            tmp_path / "index.db",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = trace.read_text()
    told = [text.index('"after', place.end()) for place in re.finditer(r'"before', text)]
    asked = [place.start() for place in re.finditer(r'"before', text)]
    assert len(told) == 20
    for begin, end in zip(asked, told, strict=True):
        assert re.search(r"f(data)?sync\(", text[begin:end]), "told before it was durable"
