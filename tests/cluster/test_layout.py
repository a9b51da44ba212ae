"""Nodes come and go by the layout while mail flows; what counts is in the receipts, never in the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest

from powermail.app.core import kept_layout, make_nodes
from powermail.base import limits
from powermail.base.errors import NotRedundant
from powermail.base.log import MemoryLog
from powermail.base.settings import Settings
from powermail.base.world import system_world
from powermail.cluster.cluster import Cluster
from powermail.cluster.remote import RemoteNode
from powermail.cluster.replicate import NotStored
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import Chunk, NodeState, Origin, Receipt, Stamp, StorageNode
from powermail.storage.layout import LAYOUT_NAME, Layout, LayoutRow, Standing, format_layout
from powermail.storage.log.keys import SqliteKeyIndex
from tests.cluster.support import Recorder, admit_all, make_world, record, replication, virtual

ACTIVE, BLOCKED, DRAINING, LEAVING, EXPELLED = Standing


class Fleet:
    """Machines that a layout may name, and a cluster that begins with none."""

    def __init__(self, copies: int = 2, reserve_octets: int = 0) -> None:
        self.world = make_world()
        self.made: list[MemoryNode] = []
        self.version = 0
        self.cluster = Cluster(self.world, [], copies, "spread-disk", self.make, reserve_octets)

    def make(self, row: LayoutRow) -> StorageNode | None:
        if row.address == "nowhere":
            return None
        node = Recorder(row.id, row.group, row.priority)
        self.made.append(node)
        return node

    async def apply(self, *rows: LayoutRow) -> None:
        """The next version of the layout; what is new is opened."""
        self.version += 1
        self.cluster.apply(Layout(self.version, rows))
        await self.look()

    async def start(self, *rows: LayoutRow) -> None:
        await self.apply(*rows)
        await self.cluster.start(admit_all)

    async def look(self) -> None:
        for node in list(self.cluster.nodes.values()):
            await self.cluster.watch(node)

    def placed(self) -> set[str]:
        """Who may get a message now."""
        return {node.id for node in self.cluster.place()}


A, B, C = LayoutRow("a", "g1"), LayoutRow("b", "g2"), LayoutRow("c", "g3")


@virtual
async def test_nodes_come_and_go_without_a_restart() -> None:
    fleet = Fleet()
    told: list[set[str]] = []
    await fleet.start(A, B)
    fleet.cluster.when_changed.append(lambda: told.append(set(fleet.cluster.nodes)))
    assert fleet.placed() == {"a", "b"}
    first = fleet.cluster.node("a")
    await fleet.apply(A, B, C)
    assert fleet.placed() == {"a", "b", "c"} and fleet.cluster.node("a") is first
    before = fleet.cluster.nodes
    await fleet.apply(LayoutRow("a", "g1", state=EXPELLED), B, C)
    assert set(before) == {"a", "b", "c"}, "who goes through the nodes sees those there were"
    assert fleet.placed() == {"b", "c"} and told == [{"a", "b", "c"}, {"b", "c"}]
    await asyncio.sleep(1)
    assert first.state is NodeState.CLOSED
    await fleet.cluster.watch(first)
    assert first.state is NodeState.CLOSED, "its loop does not open it again"
    assert fleet.cluster.trouble("a") == ""


@virtual
async def test_an_older_layout_changes_nothing() -> None:
    fleet = Fleet()
    await fleet.start(A, B)
    await fleet.apply(A, B, C)
    fleet.cluster.apply(Layout(1, (A,)))
    assert fleet.placed() == {"a", "b", "c"} and fleet.cluster.layout.version == 2


@virtual
async def test_a_node_out_of_reach_is_passed_over_until_it_has_an_address() -> None:
    fleet = Fleet()
    await fleet.start(A, B, LayoutRow("c", "g3", "nowhere"))
    assert set(fleet.cluster.nodes) == {"a", "b"}
    await fleet.apply(A, B, LayoutRow("c", "g3", "c.example:1"))
    assert fleet.placed() == {"a", "b", "c"}


@pytest.mark.parametrize("state", [BLOCKED, DRAINING, LEAVING])
@virtual
async def test_only_active_nodes_take_mail_and_all_members_serve_reads(state: Standing) -> None:
    fleet = Fleet()
    await fleet.start(A, B, C)
    assert fleet.placed() == {"a", "b", "c"}
    await fleet.apply(A, B, LayoutRow("c", "g3", state=state))
    assert fleet.placed() == {"a", "b"}
    assert [node.id for node in fleet.cluster.readable()] == ["a", "b", "c"]
    assert ("c" in fleet.cluster.counted()) is (state is BLOCKED)
    assert not fleet.cluster.is_writable(fleet.cluster.node("c"))
    await fleet.apply(A, LayoutRow("b", "g2", state=state), LayoutRow("c", "g3", state=state))
    with pytest.raises(NotRedundant):
        fleet.cluster.place()


@virtual
async def test_health_never_changes_membership() -> None:
    fleet = Fleet()
    await fleet.start(A, B, C)
    fleet.made[0].miss()
    fleet.made[1].fail("its disk is dying")
    await fleet.look()
    assert set(fleet.cluster.nodes) == set(fleet.cluster.counted()) == {"a", "b", "c"}
    assert fleet.cluster.layout.version == 1


@virtual
async def test_a_spare_takes_mail_when_a_regular_group_is_away_and_no_longer() -> None:
    fleet = Fleet()
    await fleet.start(A, B, LayoutRow("c", "g3", priority=9))
    first_two = [{node.id for node in fleet.cluster.place()[:2]} for _ in range(limits.PLACEMENT_DRAWS)]
    assert all(pair == {"a", "b"} for pair in first_two)
    fleet.made[0].miss()
    assert {node.id for node in fleet.cluster.place()[:2]} == {"b", "c"}
    await fleet.look()
    await fleet.look()
    assert {node.id for node in fleet.cluster.place()[:2]} == {"a", "b"}


@virtual
async def test_a_priority_changes_while_it_runs() -> None:
    fleet = Fleet()
    await fleet.start(A, B, C)
    await fleet.apply(A, B, LayoutRow("c", "g3", priority=9))
    assert all({node.id for node in fleet.cluster.place()[:2]} == {"a", "b"} for _ in range(limits.PLACEMENT_DRAWS))


@virtual
async def test_a_node_under_its_reserve_takes_no_mail_whatever_it_says_of_itself() -> None:
    fleet = Fleet(reserve_octets=1 << 20)
    await fleet.start(A, B, C)
    fleet.made[2].free_octets = (1 << 20) - 1
    await asyncio.sleep(1)
    assert fleet.placed() == {"a", "b"}
    fleet.made[2].free_octets = 1 << 20
    await asyncio.sleep(1)
    assert fleet.placed() == {"a", "b", "c"}


@virtual
async def test_a_node_near_its_reserve_takes_little() -> None:
    """The weight is what is free above the reserve."""
    fleet = Fleet(copies=1, reserve_octets=1 << 40)
    await fleet.start(A, B)
    fleet.made[0].free_octets = (1 << 40) + (1 << 30)
    fleet.made[1].free_octets = (1 << 40) + (200 << 30)
    firsts: list[str] = []
    for _ in range(200):
        await asyncio.sleep(1)
        firsts.append(fleet.cluster.place()[0].id)
    assert 0 <= firsts.count("a") < 15


class Late(Recorder):
    """A node whose receipt comes when it is let."""

    def __init__(self, node: str, group: str) -> None:
        super().__init__(node, group)
        self.let = asyncio.Event()

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        done = super().commit(key, chunks, commit, count, stamp, origin)

        async def later() -> Receipt:
            await self.let.wait()
            return await done

        return later()


@virtual
async def test_a_change_of_the_layout_makes_no_receipt_more_redundant_than_it_was_asked_for() -> None:
    """R is counted by the (node, incarnation, group) of receipts: two copies in one group are one, whatever is said since."""
    world = make_world()
    a, b = Late("a", "g1"), MemoryNode("b", "g2")
    cluster = Cluster(world, [a, b], 2, "random")
    cluster.apply(Layout(1, (A, B)))
    await cluster.start(admit_all)
    message = replication(cluster)
    await message.write(b"octets")
    b.group = "g1"  # the group it is asked as
    committing = asyncio.ensure_future(message.commit(record))
    await asyncio.sleep(0.5)
    cluster.apply(Layout(2, (A, B)))
    a.let.set()
    with pytest.raises(NotStored):
        await committing
    assert len(message.receipts) == 2


@virtual
async def test_a_receipt_of_a_node_that_was_expelled_meanwhile_does_not_count() -> None:
    """P1: nothing of that node counts any more, and an index that is away would not say so before the 250."""
    world = make_world()
    a, b, c = Late("a", "g1"), MemoryNode("b", "g2"), MemoryNode("c", "g3")
    cluster = Cluster(world, [a, b, c], 2, "random")
    cluster.apply(Layout(1, (A, B, LayoutRow("c", "g3", state=BLOCKED))))
    await cluster.start(admit_all)
    message = replication(cluster)
    await message.write(b"octets")
    committing = asyncio.ensure_future(message.commit(record))
    await asyncio.sleep(0.5)
    cluster.apply(Layout(2, (A, LayoutRow("b", "g2", state=EXPELLED), LayoutRow("c", "g3", state=BLOCKED))))
    a.let.set()
    with pytest.raises(NotStored):
        await committing
    assert [receipt.node for receipt in message.receipts] == ["a"] and set(message.undecided) == {"a", "b"}


@pytest.mark.parametrize("state", [BLOCKED, DRAINING])
@virtual
async def test_a_message_placed_before_a_node_was_to_take_no_more_is_committed_elsewhere(state: Standing) -> None:
    """The end of the log of a node that is drained has been entered: nothing may come behind it."""
    fleet = Fleet()
    await fleet.start(A, B, C)
    message = replication(fleet.cluster)
    await message.write(b"octets")
    first = message._targets[0].id
    await fleet.apply(*(LayoutRow(row.id, row.group, state=state if row.id == first else ACTIVE) for row in (A, B, C)))
    _, receipts = await message.commit(record)
    assert {receipt.node for receipt in receipts} == {"a", "b", "c"} - {first}


@virtual
async def test_a_message_under_way_keeps_the_receipts_of_a_node_that_is_moved_or_goes() -> None:
    world = make_world()
    a, b = Late("a", "g1"), MemoryNode("b", "g2")
    cluster = Cluster(world, [a, b], 2, "random")
    cluster.apply(Layout(1, (A, B)))
    await cluster.start(admit_all)
    message = replication(cluster)
    await message.write(b"octets")
    committing = asyncio.ensure_future(message.commit(record))
    await asyncio.sleep(0.5)
    cluster.apply(Layout(2, (LayoutRow("a", "g2"), B)))
    a.let.set()
    _, receipts = await committing
    assert {receipt.node for receipt in receipts} == {"a", "b"}


def test_nodes_of_the_layout_that_was_kept_are_spoken_to_by_its_version(tmp_path: Path) -> None:
    """Else a machine that was told a newer fence refuses a rebuild, which has no index to read the layout from."""
    cluster = "11" * 16
    layout = Layout(7, (LayoutRow("far", "g", "192.0.2.1:2700"),))
    (tmp_path / LAYOUT_NAME).write_bytes(format_layout(layout, cluster))
    world, data = system_world(MemoryLog()), str(tmp_path)
    kept = kept_layout(world, Settings(), data, cluster)
    (node,) = make_nodes(world, Settings(), data, cluster, SqliteKeyIndex, kept)
    assert isinstance(node, RemoteNode) and node.where.fence == 7
