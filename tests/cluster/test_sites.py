"""Sites: where copies go, which copy is read first, and what happens to both when a site is out of reach."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator

import pytest

from powermail.base import limits
from powermail.base.errors import NotRedundant
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.cluster.placement import Candidate, place, thinned
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import NodeState, Receipt
from powermail.storage.layout import Layout, LayoutRow, Standing
from tests.cluster.support import Recorder, admit_all, make_world, record, replication, store, virtual
from tests.storage.support import key

POLICIES = ["spread-disk", "spread-load", "random"]
NORTH, SOUTH, WEST = "north", "south", "west"


def sited(number: int, site: str, priority: int = 1, slow: bool = False, near: str = "") -> Candidate:
    """A node alone in its group."""
    return Candidate(f"{site}{number}", f"group of {site}{number}", priority, 2**30, 0, slow, site, bool(near) and site != near)


def layouts(count: int = 400) -> Iterator[tuple[list[Candidate], int, str, list[float]]]:
    """Nodes of any kind in three sites, how many copies, the policy, and the draws. A group lies in one site."""
    chance = random.Random(1)
    for _ in range(count):
        nodes = []
        for number in range(chance.randrange(13)):
            site, group = chance.choice([NORTH, SOUTH, WEST]), chance.choice("abc")
            figures = chance.randrange(1, 4), chance.randrange(2**40), chance.randrange(2**20)
            nodes.append(Candidate(f"n{number}", f"{site} {group}", *figures, chance.random() < 0.3, site, site != NORTH))
        yield nodes, chance.randrange(1, 5), chance.choice(POLICIES), [chance.random() for _ in nodes]


def test_copies_lie_in_as_many_sites_as_there_are_quick_nodes_in() -> None:
    """Groups first (P1), then that none is slow (P20), then sites, then priority."""
    several = 0
    for nodes, required, policy, draws in layouts():
        order = place(nodes, required, policy, draws)
        by_id = {node.id: node for node in nodes}
        if len({node.group for node in nodes}) < required:
            assert order == []
            continue
        assert sorted(order) == sorted(by_id)
        first = [by_id[name] for name in order[:required]]
        assert len({node.group for node in first}) == required
        quick = {node.site for node in nodes if not node.slow}
        taken = {node.site for node in first if not node.slow}
        assert len(taken) == min(len(quick), required)
        several += len(taken) > 1
        for site in taken:
            best = min(node.priority for node in nodes if node.site == site and not node.slow)
            assert min(node.priority for node in first if node.site == site and not node.slow) == best
    assert several > 100


def test_near_first_goes_elsewhere_only_for_groups_that_are_not_here() -> None:
    for nodes, required, policy, draws in layouts():
        by_id = {node.id: node for node in nodes}
        first = [by_id[name] for name in place(nodes, required, policy, draws, apart=False)[:required]]
        here = {node.group for node in nodes if not node.slow and not node.far}
        assert sum(not node.slow and not node.far for node in first) == (min(len(here), required) if first else 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_copy_is_near_and_the_other_elsewhere(policy: str) -> None:
    """Whoever takes a message reads it where it was taken; the way is paid for once."""
    nodes = [sited(number, site, near=SOUTH) for site in (NORTH, SOUTH, WEST) for number in range(3)]
    for _ in range(100):
        first = place(nodes, 2, policy, [random.random() for _ in nodes])[:2]
        assert first[0].startswith(SOUTH) and not first[1].startswith(SOUTH)


@pytest.mark.parametrize("policy", POLICIES)
def test_priority_is_within_a_site(policy: str) -> None:
    """A witness with a spare takes a copy only when one of the others cannot, and then before a second one beside the first."""
    nodes = [sited(n, site, near=NORTH) for site in (NORTH, SOUTH) for n in range(2)] + [sited(0, WEST, 9)]
    for _ in range(50):
        order = place(nodes, 2, policy, [random.random() for _ in nodes])
        assert {order[0][:-1], order[1][:-1]} == {NORTH, SOUTH} and order[2] == "west0"
        left = [node for node in nodes if node.site != SOUTH]
        assert place(left, 2, policy, [random.random() for _ in left])[1] == "west0"
    spare = [sited(0, NORTH, 9, near=NORTH), sited(1, NORTH, near=NORTH), sited(0, SOUTH, near=NORTH)]
    for _ in range(50):
        assert "north0" not in place(spare, 2, policy, [random.random() for _ in spare])[:2]


def test_a_slow_site_is_not_waited_for() -> None:
    """P20: while all of a site is slow, copies go beside each other; they are brought apart later."""
    nodes = [sited(0, NORTH), sited(1, NORTH), sited(0, SOUTH, slow=True), sited(1, SOUTH, slow=True)]
    for _ in range(50):
        assert set(place(nodes, 2, "random", [random.random() for _ in nodes])[:2]) == {"north0", "north1"}


def test_without_sites_nothing_changes() -> None:
    for nodes, required, policy, draws in layouts():
        plain = [node._replace(site="", far=False) for node in nodes]
        assert place(plain, required, policy, draws, apart=True) == place(plain, required, policy, draws, apart=False)


# -- a cluster by its layout ------------------------------------------------------------------------------------------


class Reader(Recorder):
    """A node that remembers how often it was read, and takes that long in virtual time."""

    def __init__(self, node: str, group: str, priority: int) -> None:
        super().__init__(node, group, priority)
        self.read_s = 0.001
        self.reads = 0

    async def read_commit(self, key: bytes) -> bytes:
        self.reads += 1
        await asyncio.sleep(self.read_s)
        return await super().read_commit(key)


class Sited:
    """Two nodes of each site, and a cluster that stands in one of them."""

    def __init__(self, here: str = NORTH, apart: bool = True, sites: Iterable[str] = (NORTH, SOUTH)) -> None:
        self.world = make_world()
        self.nodes: dict[str, Reader] = {}
        self.cluster = Cluster(self.world, [], 2, "random", self._make, 0, here, apart)
        self.rows = [LayoutRow(f"{site}{number}", f"{site} {number}", site=site) for site in sites for number in "12"]
        self.version = 0

    def _make(self, row: LayoutRow) -> MemoryNode:
        return self.nodes.setdefault(row.id, Reader(row.id, row.group, row.priority))

    async def start(self) -> None:
        self.apply(*self.rows)
        await self.cluster.start(admit_all)

    def apply(self, *rows: LayoutRow) -> None:
        """The next version of the layout."""
        self.version += 1
        self.rows = list(rows)
        self.cluster.apply(Layout(self.version, rows))

    def away(self, site: str) -> None:
        """The site is cut off."""
        for name, node in self.nodes.items():
            if name.startswith(site):
                node.miss()

    async def store(self, number: int) -> tuple[Receipt, ...]:
        """A message; its receipts."""
        return (await store(self.cluster, key(number), b"message"))[1]

    def sites(self, receipts: Iterable[Receipt]) -> list[str]:
        """Where these lie."""
        return sorted(receipt.node[:-1] for receipt in receipts)


@virtual
async def test_copies_go_into_both_sites_and_beside_each_other_while_one_is_cut_off() -> None:
    """P6: redundant or not at all; a site is a wish, R groups are a promise."""
    there = Sited()
    await there.start()
    for number in range(20):
        assert there.sites(await there.store(number)) == [NORTH, SOUTH]
    there.away(SOUTH)
    assert there.sites(await there.store(20)) == [NORTH, NORTH]
    there.nodes["north1"].miss()
    with pytest.raises(NotRedundant):
        await there.store(21)


@virtual
async def test_near_copies_lie_together_while_enough_groups_are_here() -> None:
    there = Sited(apart=False)
    await there.start()
    for number in range(20):
        assert there.sites(await there.store(number)) == [NORTH, NORTH]
    there.nodes["north1"].miss()
    assert there.sites(await there.store(20)) == [NORTH, SOUTH]


@virtual
async def test_who_steps_in_for_a_node_is_of_its_site_if_there_is_one() -> None:
    for number in range(20):
        there = Sited()
        await there.start()
        message = replication(there.cluster, key(number))
        await message.write(b"octets")
        (far,) = [node.id for node in message._targets if node.id.startswith(SOUTH)]
        there.nodes[far].miss()
        _, receipts = await message.commit(record)
        assert there.sites(receipts) == [NORTH, SOUTH] and far not in {receipt.node for receipt in receipts}


@virtual
async def test_a_site_counts_when_every_node_says_its_own() -> None:
    """Else the first one that says where it stands got a copy of everything."""
    there = Sited()
    await there.start()
    named = there.rows
    told: list[bool] = []
    there.cluster.when_changed.append(lambda: told.append(there.cluster.apart))
    there.apply(named[0], *(LayoutRow(row.id, row.group) for row in named[1:]))
    firsts = {node.id for _ in range(200) for node in there.cluster.place()[:1]}
    await asyncio.sleep(1)
    firsts |= {node.id for _ in range(200) for node in there.cluster.place()[:1]}
    assert len(firsts) > 1
    there.apply(*named)
    assert told == [False, True], "jobs that depend on it come and go"
    there.apply(*(LayoutRow(row.id, row.group, site=NORTH) for row in named))
    assert told[2:] == [False], "there is one"
    there.apply(*named[:2], *(LayoutRow(row.id, row.group, site=SOUTH, state=Standing.DRAINING) for row in named[2:]))
    assert told[2:] == [False] and not there.cluster.apart, "what is about to go is no site"


@virtual
async def test_the_own_site_is_read_first_whatever_the_clock_says_and_others_when_nothing_near_has_it() -> None:
    """Then by latency: of two far sites the quicker one."""
    there = Sited(SOUTH, sites=(NORTH, SOUTH, WEST))
    await there.start()
    holders = ("north1", "south1", "west1")
    for name in holders:
        await _put(there, name)
    there.nodes["west1"].read_s = 0.04
    there.nodes["south1"].read_s = 0.004  # near, and not the quickest
    fetcher = Fetcher(there.world, there.cluster, _noted)
    for _ in range(50):
        await fetcher.commit(key(1), holders)
    assert {name: there.nodes[name].reads for name in holders} == {"north1": 0, "south1": 50, "west1": 0}
    there.nodes["south1"].miss()
    for _ in range(50):
        await fetcher.commit(key(1), holders)
        await asyncio.sleep(limits.READ_RANKS_S)
    assert there.nodes["west1"].reads <= 5 < 45 <= there.nodes["north1"].reads


@virtual
async def test_a_near_node_that_hangs_is_overtaken_by_a_far_one() -> None:
    """P20: where it stands is no excuse."""
    there = Sited(SOUTH)
    await there.start()
    for name in ("north1", "south1"):
        await _put(there, name)
    fetcher = Fetcher(there.world, there.cluster, _noted)
    for _ in range(20):
        await fetcher.commit(key(1), ("north1", "south1"))
    there.nodes["south1"].read_s = 60.0
    began = there.world.clock.monotonic()
    for _ in range(20):
        await fetcher.commit(key(1), ("north1", "south1"))
    assert there.world.clock.monotonic() - began < 1.0 and there.nodes["north1"].reads >= 20


@virtual
async def test_without_a_site_of_its_own_a_process_reads_by_latency_alone() -> None:
    there = Sited("")
    await there.start()
    for name in ("north1", "south1"):
        await _put(there, name)
    fetcher = Fetcher(there.world, there.cluster, _noted)
    for _ in range(100):
        await fetcher.commit(key(1), ("north1", "south1"))
    assert min(there.nodes[name].reads for name in ("north1", "south1")) > 20


async def _put(there: Sited, name: str) -> None:
    """A copy on that node alone."""
    only = Cluster(there.world, [there.nodes[name]], 1, "random")
    await only.start(admit_all)
    await store(only, key(1), b"message")


async def _noted(key: bytes, node: str, why: str) -> None:
    raise AssertionError(f"a copy on {node} is bad: {why}")


# -- many nodes -------------------------------------------------------------------------------------------------------


def test_of_many_nodes_some_are_enough_and_no_law_is_lost() -> None:
    """Placing among those that are left is as good as among all: groups, sites, the best of a site, and that it is quick."""
    chance = random.Random(1)
    for _ in range(30):
        nodes = []
        for number in range(chance.randrange(33, 400)):
            site, group = chance.choice([NORTH, SOUTH]), f"{chance.randrange(1, 60)}"
            slow, priority = chance.random() < 0.3, chance.choice([1, 1, 1, 9])
            nodes.append(Candidate(f"n{number:03}", f"{site} {group}", priority, 2**30, 0, slow, site))
        left = thinned(nodes, [chance.random() for _ in nodes])
        assert {node.site for node in left} == {node.site for node in nodes}
        first = place(left, 2, "spread-disk", [chance.random() for _ in left])[:2]
        taken = [node for node in nodes if node.id in first]
        assert {node.site for node in taken} == {NORTH, SOUTH} and not any(node.slow for node in taken)
        assert all(node.priority == 1 for node in taken) and len({node.group for node in taken}) == 2
    same = [Candidate(f"n{number:03}", "one", 1, 2**30, 0) for number in range(300)]
    others = [Candidate(f"x{number:03}", f"rack {number}", 1, 2**30, 0) for number in range(3)]
    left = thinned([*same, *others], [0.9] * 300 + [0.95] * 3)
    assert {node.group for node in left} == {"one", "rack 0", "rack 1", "rack 2"}, "a large group hides no small one"


@virtual
async def test_what_a_message_costs_does_not_grow_with_the_nodes() -> None:
    """Neither to place nor to read: else some hundred machines take the whole of a core."""
    world = make_world()
    looked: list[str] = []

    class Watched(MemoryNode):
        @property
        def state(self) -> NodeState:
            looked.append(self.id)
            return super().state

    made = {f"n{number}": Watched(f"n{number}", f"rack {number}") for number in range(300)}
    cluster = Cluster(world, [], 2, "random", lambda row: made[row.id])
    cluster.apply(Layout(1, tuple(LayoutRow(name, node.group) for name, node in made.items())))
    await cluster.start(admit_all)
    for _ in range(limits.PLACEMENT_DRAWS):
        cluster.place()
    looked.clear()
    for _ in range(100):
        assert len(cluster.place()) <= 2 + limits.PLACEMENT_SPARES and cluster.takes_mail()
    assert len(looked) <= 100 * 8
    receipts = (await store(cluster, key(1), b"message"))[1]
    holders = tuple(receipt.node for receipt in receipts)
    fetcher = Fetcher(world, cluster, _noted)
    looked.clear()
    for _ in range(100):
        await fetcher.commit(key(1), holders)
        await fetcher.read_small({key(1): holders})
    assert len(looked) <= 100 * 20
    first = cluster.place()[0]
    made[first.id].miss()
    assert all(first not in cluster.place()[:2] for _ in range(100)), "one that stops is noticed at once"
    placed = set[str]()
    for _ in range(200):
        await asyncio.sleep(1)
        placed |= {node.id for node in cluster.place()[:2]}
    assert len(placed) > 150, "and all are used"


@virtual
async def test_a_copy_that_nobody_believes_in_is_read_when_the_believed_ones_fail() -> None:
    there = Sited()
    await there.start()
    await _put(there, "south2")
    await _put(there, "north1")
    there.nodes["north1"].miss()
    fetcher = Fetcher(there.world, there.cluster, _noted)
    assert (await fetcher.commit(key(1), ("north1",))).octets == 7
    assert (await fetcher.commit(key(1), ())).octets == 7
