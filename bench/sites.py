"""Measures what a line between two sites costs: `python -m bench.sites [MS]`, MS of its round trip (50).

Two sites on this machine, each with two nodes, a front end and a keeper, and PostgreSQL in the north. What is said between them
is late by half of MS in each direction. One connection delivers, or reads, one message after the other; the medians with the
line and without are compared, so that it is seen how many times the line is waited for, whatever else the machine does.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from tests.servers import Postgres
from tests.system.several import Several
from tests.system.sites import SITES, TwoSites

_COUNT = 30  # of each median
_START_S = 600.0  # nothing here is tried for how soon it starts
_ANN = "ann@local.example"


async def _deliveries(front: Several) -> float:
    """Seconds from the end of a message to its reply."""
    client = await front.connect()
    await client.ask("EHLO bench.example")
    took: list[float] = []
    while len(took) < _COUNT:
        replies = [await client.ask(line) for line in ("RSET", "MAIL FROM:<a@b.example>", f"RCPT TO:<{_ANN}>", "DATA")]
        if not replies[-1].startswith("354"):  # not now: a node of a busy machine was silent for long
            await asyncio.sleep(0.5)
            continue
        began = time.perf_counter()
        reply = await client.ask(b"Subject: %d\r\n\r\n%s\r\n.\r\n" % (len(took), b"x" * 4000))
        if reply.startswith("250"):
            took.append(time.perf_counter() - began)
    client.close()
    return statistics.median(took)


async def _reads(front: Several) -> tuple[float, float]:
    """Seconds from PASS to the end of STAT; and from RETR to the end of a message, each without the next."""
    client = await front.connect("pop3")
    await client.start_tls_pop()  # type: ignore[attr-defined]
    await client.ask_pop(f"USER {_ANN}")  # type: ignore[attr-defined]
    began = time.perf_counter()
    await client.ask_pop("PASS secret")  # type: ignore[attr-defined]
    count = int((await client.ask_pop("STAT")).split()[1])  # type: ignore[attr-defined]
    login, took = time.perf_counter() - began, []
    for number in range(count, max(0, count - _COUNT), -1):  # backwards: nothing is read ahead
        began = time.perf_counter()
        await client.ask_pop(f"TOP {number} 1000")  # type: ignore[attr-defined]
        await client.multiline()  # type: ignore[attr-defined]
        took.append(time.perf_counter() - began)
    await client.ask_pop("QUIT")  # type: ignore[attr-defined]
    client.close()
    return login, statistics.median(took)


async def _measure(postgres: Postgres, round_trip_s: float) -> None:
    print(f"| a line of {round_trip_s * 1000:.0f} ms | from the site | without it, ms | with it, ms | times it is waited for |")
    print("|---|---|---|---|---|")
    for policy in ("apart", "near"):
        with tempfile.TemporaryDirectory() as root:
            sites = TwoSites(Path(root), postgres.create(), policy, _START_S)
            try:
                await sites.start()
                await sites.front["north"].mailbox(_ANN)
                for site in SITES:
                    await _compare(sites, policy, site, round_trip_s)
            finally:
                await sites.end()


async def _compare(sites: TwoSites, policy: str, site: str, round_trip_s: float) -> None:
    front, found = sites.front[site], []
    for late_s in (0.0, round_trip_s):
        sites.stretch(late_s)
        await _deliveries(front)  # what has a history by now is not measured
        found.append((await _deliveries(front), *await _reads(front)))
    sites.stretch(0.0)
    for what, without, late in zip(("a delivery", "a log-in of POP3", "a message read"), *found, strict=True):
        times = (late - without) / round_trip_s
        print(
            f"| {what}, {policy} | {site}{'' if site == 'south' else ' (database)'} | {without * 1000:.0f} | {late * 1000:.0f}"
            f" | {times:.1f} |",
            flush=True,
        )


def main() -> None:
    """Starts PostgreSQL, measures, ends it."""
    milliseconds = float(sys.argv[1]) if len(sys.argv) > 1 else 50.0
    postgres = Postgres()
    try:
        postgres.start()
        postgres.wait()
        uvloop.run(_measure(postgres, milliseconds / 1000))
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()
