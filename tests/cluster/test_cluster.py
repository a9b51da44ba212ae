"""A node's trouble is that node's state, the others serve (law 14); who takes mail (laws 2, 12; P14)."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble, InvariantBroken, NodeTrouble, NotRedundant, OperatorError
from powermail.base.log import MemoryLog
from powermail.cluster.cluster import Cluster
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import NodeState, StorageNode
from tests.cluster.support import admit_all, make_cluster, make_world, three, virtual


class Slow(MemoryNode):
    """A node whose opening or closing takes until it is let."""

    def __init__(self, node: str, group: str) -> None:
        super().__init__(node, group)
        self.let = asyncio.Event()
        self.opening = True

    async def open(self) -> None:
        if self.opening:
            await self.let.wait()
        await super().open()

    async def close(self) -> None:
        await self.let.wait()


def placed(cluster: Cluster) -> set[str]:
    """Who may get a message now."""
    return {node.id for node in cluster.place()}


@virtual
async def test_a_hung_node_does_not_delay_the_start() -> None:
    """Law 14: it is opened while the others serve, and takes part when it is there."""
    world = make_world()
    hung = Slow("h", "g3")
    cluster = Cluster(world, [hung, MemoryNode("a", "g1"), MemoryNode("b", "g2")], 2, "random")
    began = world.clock.monotonic()
    await cluster.start(admit_all)
    assert world.clock.monotonic() - began <= limits.NODE_OPEN_WAIT_S
    assert cluster.takes_mail()
    assert placed(cluster) == {"a", "b"}
    looking = asyncio.ensure_future(cluster.watch(hung))  # its own loop; those of the others go on
    await cluster.watch(cluster.node("a"))
    assert not looking.done()
    hung.let.set()
    await looking
    assert placed(cluster) == {"a", "b", "h"}
    assert [node.id for node in cluster.admitted()] == ["h", "a", "b"]


@virtual
async def test_a_hung_node_does_not_delay_the_stop() -> None:
    world = make_world()
    hung = Slow("h", "g3")
    hung.opening = False
    other = MemoryNode("a", "g1")
    cluster = await make_cluster(world, hung, other, copies=1)
    began = world.clock.monotonic()
    await cluster.close()
    assert world.clock.monotonic() - began <= 2 * limits.NODE_CALL_TIMEOUT_S
    assert other.state is NodeState.CLOSED
    rest_s = await cluster.watch(other)
    assert rest_s > 0
    assert other.state is NodeState.CLOSED, "nothing is opened again behind the stop"


@pytest.mark.parametrize(
    "error",
    [
        OperatorError("this directory belongs to another cluster"),
        NodeTrouble("away"),
        OSError(5, "EIO"),
        sqlite3.DatabaseError("malformed"),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", ["open", "probe"])
@virtual
async def test_any_exception_of_a_node_is_its_own_trouble(error: Exception, call: str) -> None:
    """Law 14: it takes no mail, says why, and returns by itself when it can."""
    world = make_world()
    a, b, c = three()
    if call == "open":
        c.fail_next("open", error=error)
    cluster = await make_cluster(world, a, b, c)
    if call == "probe":
        c.fail_next("probe", error=error)
        await cluster.watch(c)
    assert placed(cluster) == {"a", "b"}
    assert str(error) in cluster.trouble("c")
    assert not cluster.trouble("a")
    await cluster.watch(c)
    assert not cluster.trouble("c")
    assert placed(cluster) == {"a", "b", "c"}


@virtual
async def test_a_trouble_that_lasts_is_told_once() -> None:
    world = make_world()
    a, b, c = three()
    cluster = await make_cluster(world, a, b, c)
    c.fail_next("probe", error=ZeroDivisionError("a bug"), times=3)
    assert isinstance(world.log, MemoryLog)
    before = len(world.log.lines)
    for _ in range(3):
        await cluster.watch(c)
    assert [line.split()[1] for line in world.log.lines[before:]] == ["bug", "trouble"]


@virtual
async def test_a_broken_invariant_is_not_taken_for_trouble() -> None:
    world = make_world()
    a, b, c = three()
    cluster = await make_cluster(world, a, b, c)
    c.fail_next("probe", error=InvariantBroken("a record was lost"))
    with pytest.raises(InvariantBroken):
        await cluster.watch(c)


@virtual
async def test_a_node_that_is_refused_takes_no_mail_and_says_why() -> None:
    world = make_world()
    a, b, c = three()
    verdict: list[Exception] = [OperatorError("its incarnation was retired")]

    async def admit(node: StorageNode) -> None:
        if node is c and verdict:
            raise verdict[0]

    cluster = Cluster(world, [a, b, c], 2, "random")
    await cluster.start(admit)
    assert placed(cluster) == {"a", "b"}
    assert "retired" in cluster.trouble("c")
    assert c not in cluster.admitted()
    verdict[:] = [IndexTrouble("away")]
    await cluster.watch(c)
    assert placed(cluster) == {"a", "b"}, "that the index is away now does not make it fit"
    verdict.clear()
    await cluster.watch(c)
    assert placed(cluster) == {"a", "b", "c"}
    assert not cluster.trouble("c")


@virtual
async def test_mail_is_taken_by_nodes_that_the_index_cannot_be_asked_about() -> None:
    """P14; they are compared when it answers, and until then no keeper works on them."""
    world = make_world()
    a, b, _ = three()
    away = [True]

    async def admit(node: StorageNode) -> None:
        if away:
            raise IndexTrouble("the index is locked")

    cluster = Cluster(world, [a, b], 2, "random")
    await cluster.start(admit)
    assert cluster.takes_mail()
    assert placed(cluster) == {"a", "b"}
    assert cluster.admitted() == []
    await cluster.watch(a)
    assert placed(cluster) == {"a", "b"}
    away.clear()
    await cluster.watch(a)
    assert cluster.admitted() == [a]


@virtual
async def test_a_node_that_was_opened_again_is_compared_again() -> None:
    """Law 12: what it was before says nothing about the disk that is there now."""
    world = make_world()
    a, b, c = three()
    admitted: list[str] = []

    async def admit(node: StorageNode) -> None:
        admitted.append(node.id)

    cluster = Cluster(world, [a, b, c], 2, "random")
    await cluster.start(admit)
    await cluster.watch(c)
    assert sorted(admitted) == ["a", "b", "c"]
    await c.restart()  # quicker than any look at it
    await cluster.watch(c)
    c.miss()
    assert placed(cluster) == {"a", "b"}
    await cluster.watch(c)
    assert sorted(admitted) == ["a", "b", "c", "c", "c"]
    await c.rebirth()
    await cluster.watch(c)
    assert admitted.count("c") == 4


@virtual
async def test_every_node_is_compared_anew_in_each_epoch_of_the_index_and_takes_mail_meanwhile() -> None:
    """Law 12: an index that lost commits may know another disk there. Nothing says so before it was asked."""
    world = make_world()
    a, b, c = three()
    epoch, admitted, seen = 1, dict[str, list[int]](), list[set[str]]()
    verdicts: dict[str, Exception] = {}

    async def admit(node: StorageNode) -> None:
        admitted.setdefault(node.id, []).append(epoch)
        if epoch > 1:
            seen.append(placed(cluster))
        if node.id in verdicts:
            raise verdicts[node.id]

    cluster = Cluster(world, [a, b, c], 2, "random")
    await cluster.start(admit, epoch=lambda: epoch)
    await cluster.watch(a)
    assert admitted == {"a": [1], "b": [1], "c": [1]}
    epoch, everybody = 2, {"a", "b", "c"}
    verdicts.update(b=IndexTrouble("no numbers before the new epoch has begun"), c=NodeTrouble("a keeper takes it in first"))
    for node in (a, b, c):
        await cluster.watch(node)
    assert seen == [everybody] * 3, "mail is taken while they are compared"
    assert placed(cluster) == {"a", "b"} and cluster.admitted() == [a, b]
    epoch = 3
    verdicts["c"] = IndexTrouble("it is away")
    await cluster.watch(c)
    assert placed(cluster) == {"a", "b"}, "who was refused in the epoch before is not fit because nobody can be asked"
    verdicts.clear()
    for node in (a, b, c, a, b, c):
        await cluster.watch(node)
    assert admitted == {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3, 3]} and placed(cluster) == everybody


@virtual
async def test_an_epoch_that_is_raised_while_a_node_is_compared_asks_for_another_look() -> None:
    world = make_world()
    a, _, _ = three()
    epoch, admitted = 1, 0

    async def admit(node: StorageNode) -> None:
        nonlocal epoch, admitted
        admitted += 1
        epoch = 2

    cluster = Cluster(world, [a], 1, "random")
    await cluster.start(admit, epoch=lambda: epoch)
    for _ in range(3):
        await cluster.watch(a)
    assert admitted == 2


@virtual
async def test_a_node_without_a_young_stamp_takes_no_mail() -> None:
    """Law 2: it does not count as writable (P6)."""
    world = make_world()
    a, b, _ = three()
    cluster = await make_cluster(world, a, b)
    assert set(cluster.stamps([a, b])) == {"a", "b"}
    b.hang()
    assert b.state is NodeState.READ_WRITE
    await asyncio.sleep(2 * limits.PLACEMENT_LOOK_S)
    assert set(cluster.stamps([a, b])) == {"a"}
    assert not cluster.takes_mail()
    with pytest.raises(NotRedundant):
        cluster.place()


@virtual
async def test_only_configured_nodes_count() -> None:
    world = make_world()
    a, b, _ = three()
    cluster = await make_cluster(world, a, b)
    assert cluster.groups() == {"a": "g1", "b": "g2"}
    with pytest.raises(NodeTrouble):
        cluster.node("expelled")
