"""Measures what many nodes cost a process that only looks at them: `python -m bench.view`.

Nodes are in memory and answer at once, so what is measured is the front end's own view: the CPU of placing messages as fast as
they come (figures of all nodes are looked at anew every 50 ms, and placements drawn; less often where there are more than 100),
and of choosing the copy that is read. Half of the nodes stand in another site.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.world import World, system_world
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import StorageNode
from powermail.storage.layout import Layout, LayoutRow

_ROUNDS = 50
_READS = 2_000


async def _admit(node: StorageNode) -> None:
    """In order."""


async def _no_bad_copy(key: bytes, node: str, why: str) -> None:
    raise OperatorError(why)


async def _cluster(world: World, count: int) -> Cluster:
    made = {f"n{number}": MemoryNode(f"n{number}", f"rack {number // 2}") for number in range(count)}
    cluster = Cluster(world, [], 2, "spread-disk", lambda row: made[row.id], 0, "north")
    sites = ("north", "south")
    rows = tuple(LayoutRow(name, node.group, site=sites[number % 4 // 2]) for number, (name, node) in enumerate(made.items()))
    cluster.apply(Layout(1, rows))
    await cluster.start(_admit)
    return cluster


def _cpu_us(call: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times * 1e6


async def _measure(world: World, count: int) -> None:
    cluster = await _cluster(world, count)
    fetcher = Fetcher(world, cluster, _no_bad_copy)

    def window() -> None:
        """What a busy front end does until figures are old."""
        cluster._looked_at = float("-inf")
        for _ in range(limits.PLACEMENT_DRAWS):
            cluster.place()

    held_s = limits.PLACEMENT_LOOK_S * max(1.0, count / limits.PLACEMENT_NODES)
    share = _cpu_us(window, _ROUNDS) / 1e6 / held_s
    more = _cpu_us(cluster.place, _READS)
    read = _cpu_us(lambda: fetcher._order(("n1", "n3"), "commit"), _READS)
    print(f"| {count:,} | {100 * share:.1f} % | {more:.1f} | {read:.0f} |", flush=True)
    await cluster.close()


async def _all() -> None:
    print("| nodes | of a core, placing all the time | a further placement, us | choosing what to read, us |")
    print("|---|---|---|---|")
    for count in (10, 100, 1_000):
        await _measure(system_world(NullLog()), count)


if __name__ == "__main__":
    asyncio.run(_all())
