"""Measures background work in a large index: `python -m bench.due`.

It has 1,000,000 mailboxes with a message each; `--quick` does a tenth. How long it takes to find the checkpoints that are due
and the messages that have too few copies, when few are and when nearly all are; and that the longest due comes first, whatever
its number. It fails when a look takes longer than 20 ms (median).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from powermail.base import limits
from powermail.base.log import NullLog
from powermail.base.world import World, system_world
from powermail.index.contract import Delivery, Outcome
from powermail.index.sqlite import SqliteIndex
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import START, End, Position, Receipt

T = TypeVar("T")
_GROUPS = {"a": "north", "b": "south", "c": "west"}
_PAIRS = (("a", "b"), ("b", "c"), ("a", "c"))
_WORST_S = 0.020
_LOOKS = 50
_AT_ONCE = 500


class Shifted:
    """The machine's clock, which the bench sets forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> float:
        return time.time() + self.ahead


async def deliver(world: World, index: SqliteIndex, accounts: list[int]) -> None:
    """A message for each account."""
    chance = random.Random(len(accounts))
    for start in range(0, len(accounts), _AT_ONCE):
        waiting = []
        for account in accounts[start : start + _AT_ONCE]:
            commit = Commit(4096, "00" * 32, [4096], world.clock.now(), Envelope("a@b.example"), [Target(account=str(account))])
            receipts = tuple(Receipt(node, f"{node}-1", Position(1, 128)) for node in chance.choice(_PAIRS))
            waiting.append(index.deliver(Delivery(world.keys.next(), commit, receipts)))
        assert {*await asyncio.gather(*waiting)} == {Outcome.ENTERED}


async def looks(what: str, ask: Callable[[], Awaitable[list[T]]]) -> bool:
    """Asks some times and prints how long it took; True if that was too long."""
    took, found = [], 0
    for _ in range(_LOOKS):
        began = time.perf_counter()
        found = len(await ask())
        took.append(time.perf_counter() - began)
    middle = statistics.median(took)
    print(
        f"{what}: {found} found in {middle * 1000:.2f} ms (median), {max(took) * 1000:.2f} ms (longest of {_LOOKS})", flush=True
    )
    return middle > _WORST_S


async def checkpoints(world: World, clock: Shifted, index: SqliteIndex, count: int) -> bool:
    """Checkpoints of all mailboxes are due; then those with the lowest numbers are written, and are due once more."""
    slow = await looks("checkpoints, none due", lambda: index.checkpoint_due(world.clock.now(), limits.REPAIR_BATCH))
    clock.ahead += limits.CHECKPOINT_INTERVAL_S + 1.0
    slow |= await looks(f"checkpoints, {count} due", lambda: index.checkpoint_due(world.clock.now(), limits.REPAIR_BATCH))
    written = await index.checkpoint_due(world.clock.now(), 200)
    began = time.perf_counter()
    for mailbox in written:
        plan = await index.checkpoint_plan(mailbox)
        assert plan is not None
        await index.checkpoint_done(plan, ("a", "b"), world.clock.now())
    took = (time.perf_counter() - began) * 1000 / len(written)
    await deliver(world, index, list(range(len(written))))
    clock.ahead += limits.CHECKPOINT_INTERVAL_S + 1.0
    due = await index.checkpoint_due(world.clock.now(), count)
    again = {*written}
    assert len(due) == count and not again.intersection(due[: -len(written)]), "the longest due do not come first"
    print(
        f"checkpoints: {took:.2f} ms each to plan and to note, without the copies; {len(written)} of the lowest numbers, due"
        " again later, come last",
        flush=True,
    )
    return slow


async def repairs(index: SqliteIndex, count: int) -> bool:
    """Few messages have one copy; then the disk of a node is gone, and two thirds have."""
    part = await index.copies_on("a", b"", count)
    thin = part[:: max(1, len(part) // 1000)]
    row = next(row for row in await index.node_rows() if row.id == "a")
    await index.disbelieve("a", thin, End(row.incarnation, row.end_seen))
    after = b""

    async def on() -> list[bytes]:
        nonlocal after
        found = await index.under_copied(groups, 2, after, limits.REPAIR_BATCH)
        after = found[-1].key if found else b""
        return [one.key for one in found]

    groups = dict(_GROUPS)
    slow = await looks(f"repairs, {len(thin)} of {count} due, going on by key", on)
    turn, after = 0, b""
    while found := await on():
        turn += len(found)
    assert turn == len(thin), "a turn does not find each"
    del groups["a"]
    after = b""
    slow |= await looks("repairs, a node of three is gone, going on by key", on)
    began = time.perf_counter()
    total, _ = await index.under_copied_total(groups, 2)
    print(f"repairs: {total} counted in {(time.perf_counter() - began) * 1000:.0f} ms, once in 30 s for `status`", flush=True)
    return slow


async def main(count: int) -> int:
    """Fills an index and looks; 1 if a look is slow."""
    path = tempfile.mkdtemp(prefix="powermail-due-")
    world, clock = system_world(NullLog()), Shifted()
    world.clock = clock
    index = SqliteIndex(world, f"{path}/index.db")
    try:
        await index.open("00" * 16)
        for node, group in _GROUPS.items():
            await index.admit_node(node, group, f"{node}-1", "boot", START, START)
        began = time.perf_counter()
        await deliver(world, index, list(range(count)))
        took = time.perf_counter() - began
        octets = sum(os.path.getsize(f"{path}/{name}") for name in os.listdir(path))
        print(f"{count} mailboxes with a message each entered in {took:.1f} s, {octets / 1e6:.0f} MB", flush=True)
        slow = await checkpoints(world, clock, index, count)
        slow |= await repairs(index, count)
        await index.close()
    finally:
        shutil.rmtree(path)
    return 1 if slow else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.due", description="Due checkpoints and repairs of a large index.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the mailboxes")
    sys.exit(uvloop.run(main(100_000 if parser.parse_args().quick else 1_000_000)))
