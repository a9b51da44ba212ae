"""Who was expelled is cut off by every node, at once or when the node is back, whatever his certificate says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.base.errors import NodeTrouble, Trouble
from powermail.cluster.cluster import Cluster
from powermail.cluster.remote import RemoteNode
from powermail.index.memory import MemoryIndex
from powermail.keeper.expelling import Expeller
from powermail.keeper.following import LayoutFollower
from powermail.storage.layout import LayoutChange
from tests.noded.installation import CLUSTER, SOON_S, Installation, installation, until


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Installation]:
    """A node that is served."""
    async with installation(tmp_path) as made:
        yield made


async def keeper(node: Installation, *roles: str) -> tuple[Expeller, MemoryIndex]:
    """A keeper's job, with an index."""
    index = MemoryIndex(node.world)
    await index.open(CLUSTER)
    remote = node.remote("keeper-1", *(roles or ("keeper",)))
    await remote.open()
    return Expeller(node.world, Cluster(node.world, [remote], 1, "random"), index), index


async def test_a_node_cuts_off_who_was_expelled_and_lets_him_in_no_more(node: Installation) -> None:
    expeller, index = await keeper(node)
    front, other = node.remote("front-1"), node.remote("front-2")
    await front.open()
    await other.open()
    await index.note_holder("front-1", ("front",), 5e9)
    assert await expeller.tell_all() == []
    await front.facts()
    await index.expel_identity("front-1")
    assert await expeller.tell_all() == []
    with pytest.raises(NodeTrouble):
        await front.facts()
    await until(lambda: node.refused("expelled"))
    await other.facts()
    raw = await node.raw(node.client("front-1"))
    assert (await raw.hello())[0] == "GOAWAY"


async def test_it_is_said_once_and_again_after_the_process_began_anew(node: Installation) -> None:
    expeller, index = await keeper(node)
    await index.expel_identity("front-1")
    told: list[tuple[str, ...]] = []
    (remote,) = expeller._cluster.nodes.values()
    whole = remote.expel  # type: ignore[attr-defined]

    async def expel(ids: tuple[str, ...]) -> None:
        told.append(ids)
        await whole(ids)

    remote.expel = expel  # type: ignore[attr-defined]
    for _ in range(3):
        await expeller.step()
    await index.expel_identity("front-2")
    await expeller.step()
    await Expeller(node.world, expeller._cluster, index).step()
    assert told == [("front-1",), ("front-1", "front-2"), ("front-1", "front-2")]


async def test_it_is_said_again_to_a_process_that_forgot_it(node: Installation) -> None:
    """Its file of what is obeyed was damaged, and removed, as it says: its disk is the same, and it is told anew."""
    expeller, index = await keeper(node)
    await index.expel_identity("front-1")
    assert await expeller.tell_all() == []
    await node.service.close(0.0)
    await node.serve(port=node.port)
    assert not node.service.obeyed.expelled
    async with asyncio.timeout(SOON_S):
        while "front-1" not in node.service.obeyed.expelled:
            await expeller.tell_all()
            await asyncio.sleep(0.02)
    raw = await node.raw(node.client("front-1"))
    assert (await raw.hello())[0] == "GOAWAY"


async def test_the_layout_is_said_again_to_a_process_that_forgot_it(node: Installation, tmp_path: Path) -> None:
    index = MemoryIndex(node.world)
    await index.open(CLUSTER)
    await index.change_layout([LayoutChange("a", "rack-a", f"127.0.0.1:{node.port}")])
    remote = node.remote("keeper-1", "keeper")
    cluster = Cluster(node.world, [], 1, "random", lambda row: remote)
    following = LayoutFollower(node.world, cluster, index, f"{tmp_path}/layout")
    await following.start([])
    await remote.open()
    await following.spread()
    assert node.service.obeyed.version == cluster.layout.version > 0
    await node.service.close(0.0)
    await node.serve(port=node.port)
    async with asyncio.timeout(SOON_S):
        while node.service.obeyed.version != cluster.layout.version:
            await following.spread()
            await asyncio.sleep(0.02)
    following.close()


async def test_an_index_that_was_put_back_hears_from_nodes_who_was_expelled(node: Installation) -> None:
    """Else a certificate that was stolen is renewed, and nodes that are new let it in."""
    expeller, index = await keeper(node)
    for name in ("front-1", "front-2"):
        await index.expel_identity(name)
    await expeller.step()
    older = MemoryIndex(node.world)
    await older.open(CLUSTER)
    await older.expel_identity("front-3")
    again = Expeller(node.world, expeller._cluster, older)
    await again.step()
    assert [holder.identity for holder in await older.holders() if holder.expelled_at] == ["front-1", "front-2", "front-3"]
    assert set(node.service.obeyed.expelled) == {"front-1", "front-2", "front-3"}, "the union, at the nodes too"
    assert await older.expelled_known()
    assert node.world.counters.get("keeper.expelled_heard") == 2
    assert not await older.note_holder("front-1", ("front",), 5e9), "it is given no certificate any more"


async def test_what_nodes_say_is_taken_again_after_commits_were_lost_and_at_no_other_time(node: Installation) -> None:
    """Who has stolen a keeper's key tells nodes what it likes."""
    expeller, index = await keeper(node)
    await expeller.step()
    await index.expel_identity("front-9")
    thief = node.remote("keeper-2", "keeper")
    await thief.open()
    await thief.expel(["front-1", "front-2"])
    with pytest.raises(Trouble, match="node a refuses front-1, front-2, whom nobody has expelled"):
        await expeller.step()
    assert node.world.counters.get("keeper.expelled_strange") == 2
    assert [holder.identity for holder in await index.holders()] == ["front-9"]
    await index.raise_epoch([], "a backup was put back")
    await expeller.step()
    assert {holder.identity for holder in await index.holders()} == {"front-9", "front-1", "front-2"}


async def test_while_a_node_is_away_the_others_are_asked_again(node: Installation) -> None:
    """It may be the only one that knows."""
    expeller, index = await keeper(node)
    (remote,) = expeller._cluster.nodes.values()
    assert isinstance(remote, RemoteNode)
    whole, away = remote.expelled, True

    async def expelled() -> dict[str, tuple[str, ...]]:
        if away:
            raise NodeTrouble("away")
        return await whole()

    remote.expelled = expelled  # type: ignore[method-assign]
    node.service.obeyed.expel(["front-1"])  # an older program was told so
    await expeller._hear_all()
    assert not await index.expelled_known() and await index.holders() == []
    away = False
    await expeller.step()
    assert await index.expelled_known() and [holder.identity for holder in await index.holders()] == ["front-1"]


async def test_who_is_expelled_has_expelled_nobody(node: Installation) -> None:
    """A stolen keeper's key names everybody, until the list is full; whoever expels it ends that."""
    expeller, index = await keeper(node)
    await index.expel_identity("front-8")
    await expeller.step()
    thief = node.remote("keeper-2", "keeper")
    await thief.open()
    honest = node.remote("front-1")
    await honest.open()
    await thief.expel(["front-1", "front-2", *[f"x-{number}" for number in range(1200)]])
    with pytest.raises(NodeTrouble):
        await honest.facts()
    await index.expel_identity("keeper-2")
    await expeller.step()
    assert set(node.service.obeyed.expelled) == {"front-8", "keeper-2"}
    assert node.world.counters.get("noded.expelled_void") == 1202
    back = node.remote("front-1")
    await back.open()
    await back.facts()
    with pytest.raises(NodeTrouble):
        await thief.facts()
    assert [holder.identity for holder in await index.holders()] == ["front-8", "keeper-2"]


async def test_what_an_index_that_was_put_back_hears_is_not_what_an_expelled_one_has_said(node: Installation) -> None:
    expeller, index = await keeper(node)
    await index.expel_identity("keeper-2")
    node.service.obeyed.expelled = {"front-1": ("keeper-2",), "front-2": ("keeper-2", "keeper-3"), "keeper-2": ("keeper-3",)}
    await expeller.step()
    assert [holder.identity for holder in await index.holders()] == ["front-2", "keeper-2"]


async def test_a_node_that_refuses_to_hear_it_is_trouble_and_asked_again(node: Installation) -> None:
    """A front end may not say so."""
    expeller, index = await keeper(node, "front")
    await index.expel_identity("front-2")
    with pytest.raises(Trouble, match="node a was not told"):
        await expeller.step()
    with pytest.raises(Trouble, match="node a was not told"):
        await expeller.step()
    assert not node.service.obeyed.expelled
