"""Errors of the disk at every n-th system call of the commit path of a whole PowerMail (F9, F10, P18), SQLite's included.

In each test run a few n are tried; `PM_TEST_SWEEP=1` tries every n until the program ends without reaching it.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from powermail.app.setup import initialise
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from tests.cluster.support import read_whole
from tests.system.conftest import Running, start

SWEEP = os.environ.get("PM_TEST_SWEEP") == "1"
MESSAGES = 12
_PROGRAM = (
    """
import asyncio, sys
from pathlib import Path
from tests.system.conftest import Running, start

async def main():
    data = Path(sys.argv[1])
    powermail = await start(data, "index.wait_s=1.0")
    running = Running(powermail, data)
    print("ready", flush=True)
    for number in range(%d):
        reply = await running.send(["postmaster@localhost"], b"S: %%d\\r\\n\\r\\nbody" %% number)
        print(number, reply, flush=True)
    await powermail.stop(0.5)
    print("ended", flush=True)

asyncio.run(main())
"""
    % MESSAGES
)


async def attempt(data: Path, call: str, error: str, number: int) -> tuple[set[int], bool]:
    """(messages that were acknowledged, True if the n-th call was reached) of a run with an error injected there."""
    trace = data.parent / "trace"
    process = await asyncio.create_subprocess_exec(
        *["strace", "-f", "-qq", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}", "-o", str(trace)],
        *[sys.executable, "-c", _PROGRAM, str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, _ = await process.communicate()
    acknowledged = {int(number) for number in re.findall(rb"^(\d+) 250 ", output, re.MULTILINE)}
    return acknowledged, "INJECTED" in trace.read_text()


async def check(data: Path, acknowledged: set[int]) -> None:
    """What a clean process finds: every acknowledged message once, no other that was not sent, nothing inconsistent."""
    powermail = await start(data)
    running = Running(powermail, data)
    try:
        account = await powermail.core.directory.find("postmaster@localhost")
        assert account is not None
        facts = await powermail.core.index.find_mailbox(account.id, "INBOX")
        entries = await powermail.core.index.entries(facts.id, 0, 1 << 32, 1000) if facts else []
        found = []
        for entry in entries:
            known = await powermail.core.index.message(entry.key)
            octets = await read_whole(powermail.core.fetcher, entry.key, known.nodes if known else ())
            match = re.search(rb"\r\nS: (\d+)\r\n\r\nbody\r\n$", octets)
            assert match, octets
            found.append(int(match.group(1)))
        assert acknowledged <= set(found)
        assert len(found) == len(set(found))
        for _ in range(50):
            await powermail.keeping.repairer.step()
            await running.each(powermail.keeping.collector.step)
        result = await running.operation("verify")
        assert isinstance(result, dict)
        assert result["problems"] == []
    finally:
        await powermail.stop(0.5)


@pytest.mark.timeout(1800 if SWEEP else 180)
@pytest.mark.parametrize(
    ("call", "error", "some"),
    [
        ("fdatasync", "EIO", (8, 15)),
        ("pwritev2", "EIO", (2, 9)),
        ("pwritev2", "ENOSPC", (9,)),
        ("pwrite64", "ENOSPC", (40, 75)),
    ],
)
async def test_an_error_at_any_call_loses_nothing_acknowledged(
    tmp_path: Path, call: str, error: str, some: tuple[int, ...]
) -> None:
    numbers = range(1, 2000) if SWEEP else some
    accepted = 0
    for number in numbers:
        data = tmp_path / f"{number}" / "data"
        data.parent.mkdir()
        await initialise(system_world(MemoryLog()), str(data), "localhost")
        acknowledged, reached = await attempt(data, call, error, number)
        await check(data, acknowledged)
        accepted += len(acknowledged)
        if SWEEP:
            print(f"{call} {error} at call {number}: {len(acknowledged)} of {MESSAGES} acknowledged", flush=True)
        if not reached:
            assert SWEEP, "the call was never reached: choose a lower number"
            assert len(acknowledged) == MESSAGES
            break
    assert accepted, "nothing was accepted at all"
