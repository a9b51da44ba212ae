"""Who was expelled is cut off by every node, at once or when the node is back, whatever his certificate says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from powermail.base.errors import NodeTrouble, Trouble
from powermail.cluster.cluster import Cluster
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
    return Expeller(Cluster(node.world, [remote], 1, "random"), index), index


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
    await Expeller(expeller._cluster, index).step()
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


async def test_a_node_that_refuses_to_hear_it_is_trouble_and_asked_again(node: Installation) -> None:
    """A front end may not say so."""
    expeller, index = await keeper(node, "front")
    await index.expel_identity("front-2")
    with pytest.raises(Trouble, match="node a was not told"):
        await expeller.step()
    with pytest.raises(Trouble, match="node a was not told"):
        await expeller.step()
    assert not node.service.obeyed.expelled
