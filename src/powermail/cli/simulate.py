"""Owns `powermail sim`: many seeds on all cores, what each gave, and for one that fails the shortest run that still fails.

The same seed gives the same trace in any process, as long as strings hash alike: the command starts itself anew with a fixed
hash seed when it has none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import msgspec

from powermail.cli import show

if TYPE_CHECKING:
    from powermail.cli.commands import Sim
from powermail.sim.played import Outcome
from powermail.sim.run import simulate

# Counters that say which branches of the laws were taken, and what the simulated database did.
_LAWS = ("law.", "keeper.", "delivery.index_late", "cluster.", "noded.fenced", "noded.superseded", "database.")
_TWICE_EVERY = 100  # every so many seeds one is run a second time: its trace must be the same


def fix_hashes() -> None:
    """Starts this process anew with a fixed hash seed, once."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "powermail", *sys.argv[1:]])  # noqa: S606  our own program


def one(seed: int, seconds: float, twice: bool, only: Sequence[str] = (), cluster: bool = False) -> Outcome:
    """One seed; with `twice`, another trace the second time is a problem too."""
    outcome = simulate(seed, seconds, only, cluster)
    if twice and (again := simulate(seed, seconds, only, cluster)).trace_hash != outcome.trace_hash:
        outcome.problems.append(f"not repeatable: trace {outcome.trace_hash}, then {again.trace_hash}")
    return outcome


def shortest(seed: int, seconds: float, only: Sequence[str] = (), cluster: bool = False) -> float:
    """The fewest whole seconds of faults after which this seed still fails. A shorter run is the beginning of a longer one."""
    good, bad = 0, int(seconds)
    while bad - good > 1:
        middle = (good + bad) // 2
        if simulate(seed, middle, only, cluster).problems:
            bad = middle
        else:
            good = middle
    return float(bad)


def facts(outcome: Outcome) -> dict[str, Any]:
    """What is printed of a seed."""
    return {
        "seed": outcome.seed,
        "trace": outcome.trace_hash,
        "problems": outcome.problems,
        "faults": outcome.faults,
        "sent": outcome.sent,
        "acked": outcome.acked,
        "refused": outcome.refused,
        "listings": outcome.listings,
        "retrieved": outcome.retrieved,
        "forwarded": outcome.forwarded,
        "looks": outcome.looks,
        "virtual_s": round(outcome.virtual_s),
        "laws": {name: count for name, count in outcome.counters.items() if name.startswith(_LAWS)},
    }


def _all(pool: ProcessPoolExecutor, seeds: range, arguments: Sim) -> Iterator[Outcome]:
    kind = arguments.only, arguments.cluster
    twice = {seed: (seed - seeds[0]) % _TWICE_EVERY == 0 for seed in seeds}
    waiting = [pool.submit(one, seed, arguments.seconds, twice[seed], *kind) for seed in seeds]
    for done in as_completed(waiting):
        yield done.result()


async def simulation(arguments: Sim, json: bool) -> int:
    """Runs the seeds that were asked for; 1 if one failed."""
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    meter = show.Meter("seeds", enabled=not json)
    results: list[dict[str, Any]] = []
    failed = 0
    with ProcessPoolExecutor(arguments.jobs) as pool:  # a simulation is an event loop of its own: never within this one
        for number, outcome in enumerate(_all(pool, seeds, arguments), 1):
            results.append(facts(outcome))
            await meter.progress(number, len(seeds))
            if arguments.trace:
                with open(arguments.trace, "w", encoding="utf-8") as file:
                    file.write("\n".join(outcome.trace) + "\n")
            if outcome.problems:
                failed += 1
                least = arguments.seconds
                if arguments.shrink:
                    least = pool.submit(shortest, outcome.seed, least, arguments.only, arguments.cluster).result()
                sys.stderr.write(_failure(outcome, least, arguments.cluster))
    meter.close()
    results.sort(key=lambda result: int(result["seed"]))
    if json:
        print(msgspec.json.format(msgspec.json.encode(results), indent=2).decode())
    else:
        _summary(results, failed)
    return 1 if failed else 0


def _failure(outcome: Outcome, seconds: float, cluster: bool) -> str:
    lines = [f"seed {outcome.seed} FAILED (trace {outcome.trace_hash}); faults: {outcome.faults}"]
    lines += [f"  {problem}" for problem in outcome.problems]
    lines.append(
        f"  again: powermail sim{' --cluster' * cluster} --first {outcome.seed} --seeds 1 --seconds {seconds:g} --trace FILE"
    )
    return "\n".join(lines) + "\n"


def _summed(results: list[dict[str, Any]], name: str) -> dict[str, int]:
    totals: dict[str, int] = {}
    for result in results:
        for kind, count in result[name].items():
            totals[kind] = totals.get(kind, 0) + count
    return dict(sorted(totals.items()))


def _summary(results: list[dict[str, Any]], failed: int) -> None:
    kinds, laws = (_summed(results, name) for name in ("faults", "laws"))
    show.facts_of(
        list(
            {
                "seeds": len(results),
                "failed": failed,
                **{
                    name: sum(result[name] for result in results)
                    for name in ("sent", "acked", "refused", "listings", "retrieved")
                },
                "virtual_hours": round(sum(result["virtual_s"] for result in results) / 3600, 1),
                "faults": kinds,
                "laws": laws,
                "first_trace": results[0]["trace"],
            }.items()
        )
    )
