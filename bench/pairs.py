"""Owns the comparison of two source trees of this program: `python -m bench.pairs OTHER_TREE [PAIRS] [MESSAGES]`.

Both serve at once with R = 2, each from its own tree, and are loaded by turns with short runs. What counts is the CPU of each
server for 1,000 messages, pair by pair, because a shared machine drifts more in a minute than the trees differ. It fails when
the whole 95 % interval of the mean ratio (this tree / other tree) lies above 1.03, for deliveries over 32 and over 128
connections, for a message to 1,000 recipients, or for POP3. A tree needs no environment of its own: what this one runs with
serves both.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import uvloop

from bench import machine
from bench.load import Plan, send
from bench.ours import MAILBOXES, PASSWORD, Server, mailbox
from bench.pop import one_by_one, pipelined

_WORST = 1.03
_CONNECTIONS = (32, 128)
_TO_ALL = 10  # messages to 1,000 recipients in one run: the CPU clock ticks in 10 ms
_READ = 1000  # messages in the mailbox that is read, which gets no others
_READS = 3  # times it is read in one run
_STARTS = 5
_DEFAULTS = (30, 3000)
_RECIPIENTS = [mailbox(number).encode() for number in range(MAILBOXES)]


class Cost(NamedTuple):
    """One run: CPU seconds of the server, and seconds, each for what the run is about."""

    cpu_s: float
    took_s: float


Run = Callable[[Server], Awaitable[Cost]]


async def start(tree: str) -> Server:
    """A server of a tree."""
    server = Server(2)
    await within(tree, server.start())
    return server


async def within(tree: str, work: Awaitable[None]) -> None:
    """Does what starts processes so that they run from a tree."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tree}/src"
    try:
        await work
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


async def deliver(server: Server, messages: int, connections: int) -> Cost:
    """A short run of deliveries, for 1,000 messages."""
    cost = await _sent(server, Plan(server.ports["smtp"], _RECIPIENTS[:-1], messages), connections)
    return Cost(*(1000 * each / messages for each in cost))


async def to_all(server: Server) -> Cost:
    """For one message to 1,000 recipients."""
    cost = await _sent(server, Plan(server.ports["smtp"], _RECIPIENTS, _TO_ALL, per_message=MAILBOXES), 1)
    return Cost(*(each / _TO_ALL for each in cost))


async def _sent(server: Server, plan: Plan, connections: int) -> Cost:
    before = machine.cpu_s(server.roots())
    took = await send(plan, connections)
    assert not plan.failures, plan.failures[:3]
    return Cost(machine.cpu_s(server.roots()) - before, took)


async def read(server: Server, how: Callable[[int, str, str], Awaitable[float]]) -> Cost:
    """A short run of POP3, for 1,000 messages."""
    before = machine.cpu_s(server.roots())
    rates = [await how(server.ports["pop3"], mailbox(MAILBOXES - 1), PASSWORD) for _ in range(_READS)]
    used = machine.cpu_s(server.roots()) - before
    return Cost(1000 * used / (_READ * _READS), 1000 / statistics.fmean(rates))


async def restart(server: Server, tree: str) -> Cost:
    """A stop, and a start until the doors are open."""
    await server.halt()
    began = time.perf_counter()
    await within(tree, server.serve())
    return Cost(machine.cpu_s(server.roots()), time.perf_counter() - began)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios with its 95 % interval, by Student's t of the logarithms (approximated within 3 %)."""
    logs, degrees = [math.log(ratio) for ratio in ratios], len(ratios) - 1
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = (1.96 + 2.4 / degrees + 3 / degrees**2) * error
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


class Comparison:
    """This tree's server and the other's, by turns."""

    def __init__(self, ours: Server, theirs: Server) -> None:
        self.servers = ours, theirs
        self.dearer: list[str] = []

    async def run(self, what: str, pairs: int, run: Run, judged: bool = True) -> None:
        """Runs, prints, and remembers if this tree is dearer. The first run of each server does not count."""
        ours, theirs = self.servers
        for server in self.servers:
            await run(server)
        rows = []
        for number in range(pairs):
            order = (ours, theirs) if number % 2 else (theirs, ours)
            found = {server: await run(server) for server in order}
            rows.append((found[ours], found[theirs]))
        mean, low, high = interval([mine.cpu_s / max(his.cpu_s, 1e-9) for mine, his in rows])
        time_, early, late = interval([mine.took_s / his.took_s for mine, his in rows])
        mine, his = (statistics.median(row[side].cpu_s for row in rows) for side in (0, 1))
        took, his_took = (1000 * statistics.median(row[side].took_s for row in rows) for side in (0, 1))
        print(
            f"{what}, {pairs} pairs: CPU {mine:.3f} / {his:.3f} s, ratio {mean:.3f} ({low:.3f} to {high:.3f});"
            f" took {took:.0f} / {his_took:.0f} ms, ratio {time_:.3f} ({early:.3f} to {late:.3f})",
            flush=True,
        )
        if judged and low > _WORST:
            self.dearer.append(what)


async def compare(ours: Server, theirs: Server, trees: dict[Server, str], pairs: int, messages: int) -> list[str]:
    """What this tree is dearer at."""
    comparison = Comparison(ours, theirs)
    for connections in _CONNECTIONS:
        await comparison.run(
            f"1,000 messages over {connections} connections (runs of {messages})",
            pairs,
            lambda server, connections=connections: deliver(server, messages, connections),  # type: ignore[misc]
        )
    for server in comparison.servers:
        plan = Plan(server.ports["lmtp"], [mailbox(MAILBOXES - 1).encode()], _READ, lmtp=True)
        await send(plan, 8)
        assert not plan.failures, plan.failures[:3]
    await comparison.run("1,000 messages by POP3, one by one", pairs, lambda server: read(server, one_by_one))
    await comparison.run("1,000 messages by POP3, pipelined", pairs, lambda server: read(server, pipelined))
    await comparison.run(f"a message to {MAILBOXES} recipients", pairs, to_all)
    await comparison.run(
        "a start with what these runs left", min(pairs, _STARTS), lambda server: restart(server, trees[server]), judged=False
    )
    return comparison.dearer


async def main() -> int:
    """Measures and prints; 1 if this tree is dearer."""
    other, *words = sys.argv[1:]
    pairs, messages = (*map(int, words), *_DEFAULTS[len(words) :])
    print(machine.interpreter(), flush=True)
    mine, his = os.getcwd(), os.path.abspath(other)
    ours = await start(mine)
    try:
        theirs = await start(his)
        try:
            dearer = await compare(ours, theirs, {ours: mine, theirs: his}, pairs, messages)
        finally:
            await theirs.stop()
    finally:
        await ours.stop()
    for what in dearer:
        print(f"DEARER than {_WORST}: {what}", flush=True)
    return 1 if dearer else 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
