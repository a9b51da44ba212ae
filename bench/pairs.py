"""Owns the comparison of two source trees of this program: `python -m bench.pairs OTHER_TREE [PAIRS] [MESSAGES]`.

Both serve at once with R = 2, each from its own tree, and are loaded by turns with short runs. What counts is the CPU of each
server for 1,000 messages, pair by pair, because a shared machine drifts more in a minute than the trees differ. It fails when
the whole 95 % interval of the mean ratio (this tree / other tree) lies above 1.03.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import sys

from bench import machine
from bench.load import Plan, send
from bench.ours import MAILBOXES, PASSWORD, Server, mailbox
from bench.pop import one_by_one, pipelined

_WORST = 1.03
_CONNECTIONS = (32, 128)


async def start(tree: str) -> Server:
    """A server of a tree."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tree}/src"
    try:
        server = Server(2)
        await server.start()
        return server
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


async def cost(server: Server, messages: int, connections: int) -> tuple[float, float]:
    """(CPU seconds for 1,000 messages, messages per second) of one short run."""
    recipients = [mailbox(n).encode() for n in range(MAILBOXES)]
    before = machine.cpu_s(server.roots())
    plan = Plan(server.ports["smtp"], recipients, messages)
    seconds = await send(plan, connections)
    assert not plan.failures, plan.failures[:3]
    return 1000 * (machine.cpu_s(server.roots()) - before) / messages, messages / seconds


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios with its 95 % interval (two standard errors of the logarithms)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - 2 * error), math.exp(mean + 2 * error)


async def main() -> int:
    """Measures and prints; 1 if this tree is dearer."""
    other, pairs, messages = sys.argv[1], *(int(word) for word in [*sys.argv[2:4], "30", "1500"][:2])
    print(machine.interpreter(), flush=True)
    ours, theirs = await start(os.getcwd()), await start(os.path.abspath(other))
    dearer = False
    try:
        for connections in _CONNECTIONS:
            for server in (ours, theirs):
                await cost(server, messages, connections)  # warm
            rows = []
            for number in range(pairs):
                order = (ours, theirs) if number % 2 else (theirs, ours)
                found = {server: await cost(server, messages, connections) for server in order}
                rows.append((found[ours], found[theirs]))
            mean, low, high = interval([mine[0] / his[0] for mine, his in rows])
            speed, _, _ = interval([mine[1] / his[1] for mine, his in rows])
            mine, his = (statistics.median(row[side][0] for row in rows) for side in (0, 1))
            print(
                f"{connections:>4} connections, {pairs} pairs of {messages}: CPU {mine:.3f} / {his:.3f} s per 1,000, "
                f"ratio {mean:.3f} ({low:.3f} to {high:.3f}); delivered/s ratio {speed:.3f}",
                flush=True,
            )
            dearer = dearer or low > _WORST
        await _reading(ours, theirs, pairs // 3)
    finally:
        await ours.stop()
        await theirs.stop()
    return 1 if dearer else 0


async def _reading(ours: Server, theirs: Server, pairs: int) -> None:
    """POP3, by turns, one mailbox of a thousand messages."""
    for server in (ours, theirs):
        plan = Plan(server.ports["lmtp"], [mailbox(0).encode()], 1000, lmtp=True)
        await send(plan, 8)
    for name, read in (("one by one", one_by_one), ("pipelined", pipelined)):
        ratios = []
        for number in range(pairs):
            order = (ours, theirs) if number % 2 else (theirs, ours)
            found = {server: await read(server.ports["pop3"], mailbox(0), PASSWORD) for server in order}
            ratios.append(found[ours] / found[theirs])
        mean, low, high = interval(ratios)
        print(f"POP3 {name}: messages/s ratio {mean:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
