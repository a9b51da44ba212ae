"""A fence reaches whoever goes by an older layout, also through a node that was away, and cuts nobody off who follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from powermail.base import limits
from powermail.base.errors import NodeReadOnly, NodeTrouble
from powermail.cluster.cluster import Cluster
from powermail.index.memory import MemoryIndex
from powermail.keeper.following import LayoutFollower
from powermail.noded.obeyed import Obeyed
from powermail.storage.contract import Chunk, NodeState, Origin, Stamp
from powermail.storage.layout import LayoutChange
from powermail.wire.node_verbs import Failure
from tests.noded.installation import CLUSTER, SOON_S, Installation, installation, until
from tests.noded.speaking import frame
from tests.storage.support import key

COMMIT = [key(1), 1, "boot", 1.0, 0, 2, [[0, 0, 1, 1]]]


@pytest.fixture
async def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Installation]:
    """A node whose machine remembers what it was told; who does not say soon that he follows never will."""
    monkeypatch.setattr(limits, "NODE_FOLLOW_WAIT_S", 0.2)
    async with installation(tmp_path) as made:
        made.service.obeyed = Obeyed(made.world, str(tmp_path / "obeyed"))
        yield made


async def again(there: Installation, tmp_path: Path) -> None:
    """Its process ends, and another one serves the node at the same place."""
    await there.service.close(0.0)
    await there.serve(port=there.port)
    there.service.obeyed = Obeyed(there.world, str(tmp_path / "obeyed"))


async def until_up(node: object) -> None:
    """Waits for a link that makes itself again."""
    await until(lambda: node.state is NodeState.READ_WRITE)  # type: ignore[attr-defined]


async def test_who_says_in_time_that_he_goes_by_the_layout_is_not_cut_off(there: Installation) -> None:
    """What is under way there comes to its end: a change of the layout is no blip for every front end."""
    front, late = there.remote("front-1"), await there.welcomed("front-2", fence=3)
    front.where.fence = 3
    await front.open()
    session, calls = front.session, [call for call in there.node.calls if call == "commit"]
    assert not calls
    there.node.hold()
    committing = asyncio.ensure_future(front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, front.stamp(), Origin.DELIVERY))
    await until(lambda: "commit" in there.node.calls)
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    telling = asyncio.ensure_future(keeper.set_layout(4, 4, b"layout 4"))
    await until(lambda: there.service.obeyed.fence == 4)
    front.follow(4)
    assert await late.end() == [], "who says nothing is cut off"
    there.node.release()
    assert (await telling)[:2] == (4, 4) and (await committing).node == "a"
    assert front.session == session and there.world.counters.get("noded.fenced") == 1


async def test_nobody_waits_for_the_end_of_the_time_when_all_follow(
    there: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NODE_FOLLOW_WAIT_S", 3600.0)
    front, going = there.remote("front-1"), await there.welcomed("front-2", fence=3)
    await front.open()
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    telling = asyncio.ensure_future(keeper.set_layout(4, 4, b"layout 4"))
    await until(lambda: there.service.obeyed.fence == 4)
    front.follow(4)
    going.close()
    async with asyncio.timeout(SOON_S):
        assert (await telling)[:2] == (4, 4)
    refused = await there.raw(there.client("front-3"))
    assert (await refused.hello(fence=3))[2][0] == Failure.FENCED


async def test_a_layout_that_comes_while_the_link_is_made_is_said_behind_it(there: Installation) -> None:
    """HELLO said the older one."""
    front = there.remote("front-1")
    whole = front._link.connect

    async def connect() -> None:
        await whole()
        front.where.fence = 9

    front._link.connect = connect  # type: ignore[method-assign]
    await front.open()
    await until(lambda: all(each.fence == 9 for each in there.service._connections))


async def test_a_node_that_came_back_gives_no_stamp_before_a_keeper_has_told_it_of_the_layout(
    there: Installation, tmp_path: Path
) -> None:
    """Whoever is cut off from the database with an older layout may be there first."""
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    await keeper.set_layout(4, 4, b"layout 4")
    await keeper.close()
    await again(there, tmp_path)
    front = there.remote("front-1")
    front.where.fence = 4
    await front.open()
    await front.hear()
    assert front.stamp() is None and front.state is NodeState.READ_WRITE, "it is read"
    with pytest.raises(NodeReadOnly):
        await front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, Stamp("boot", 1.0), Origin.DELIVERY)
    keeper.where.fence = 4
    await keeper.open()
    assert keeper.stamp() is not None, "a keeper needs it for what it does itself"
    assert await keeper.set_layout(5, 5, b"layout 5") == (5, 5, b"")
    await until(lambda: front.state is not NodeState.READ_WRITE)  # it went by layout 4
    front.where.fence = 5
    await until_up(front)
    await front.hear()
    await front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, front.stamp(), Origin.DELIVERY)
    assert [call for call in there.node.calls if call == "commit"] == ["commit"]


async def test_a_node_that_no_keeper_speaks_to_takes_mail_after_a_while(
    there: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P14: all keepers may be away."""
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    await keeper.set_layout(4, 4, b"layout 4")
    await keeper.close()
    await again(there, tmp_path)
    monkeypatch.setattr(limits, "NODE_UNTOLD_S", 0.3)
    front = there.remote("front-1")
    front.where.fence = 4
    await front.open()
    async with asyncio.timeout(SOON_S):
        while front.stamp() is None:
            await asyncio.sleep(0.05)
            await front.hear()
    await front.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, front.stamp(), Origin.DELIVERY)
    assert there.world.counters.get("noded.untold") >= 1


async def test_a_keeper_that_is_a_front_end_too_commits_nothing_either_before_that(there: Installation, tmp_path: Path) -> None:
    keeper = there.remote("keeper-1", "keeper")
    await keeper.open()
    await keeper.set_layout(4, 4, b"layout 4")
    await keeper.close()
    await again(there, tmp_path)
    both = await there.welcomed("first", "front", "keeper", fence=4)
    both.say(frame("COMMIT", 2, COMMIT, b"{}x"))
    assert (await both.hear())[2][0] == Failure.READ_ONLY
    both.say(frame("COMMIT", 3, [key(1), 1, "", 0.0, 1, 2, COMMIT[-1]], b"{}x"))
    assert (await both.hear())[0] == "ACKS", "a repair is a keeper's, who goes by the index"


class Keeper:
    """A keeper with an index, and the node it tells."""

    def __init__(self, there: Installation, tmp_path: Path) -> None:
        self.index = MemoryIndex(there.world)
        self.remote = there.remote("keeper-1", "keeper")
        self.cluster = Cluster(there.world, [], 1, "random", lambda row: self.remote if row.id == "a" else None)
        self.following = LayoutFollower(there.world, self.cluster, self.index, f"{tmp_path}/layout")
        self.address = f"127.0.0.1:{there.port}"

    async def begin(self) -> None:
        await self.index.open(CLUSTER)
        await self.index.change_layout([LayoutChange("a", "rack-a", self.address), LayoutChange("b", "rack-b")])
        await self.following.start([])
        await self.remote.open()
        await self.following.spread()

    async def expel_b(self) -> int:
        """Another process expels a node; the version of the layout then."""
        assert await self.index.expel("b", await self.index.layout_version())
        return await self.index.layout_version()

    async def work(self) -> None:
        """Both of its workers, once."""
        await self.following.step()
        await self.following.spread()


async def test_a_node_that_was_away_while_another_was_expelled_is_fenced_when_it_is_back(
    there: Installation, tmp_path: Path
) -> None:
    """P1: a receipt of who was expelled must not count beside one of this node, at whoever has not heard of it."""
    keeper = Keeper(there, tmp_path)
    await keeper.begin()
    old = await there.welcomed("front-1", fence=keeper.cluster.layout.version)
    version = await keeper.expel_b()
    await there.service.close(0.0)
    assert await keeper.following.fence_all() == [] or keeper.remote.state is not NodeState.READ_WRITE
    await there.serve(port=there.port)
    there.service.obeyed = Obeyed(there.world, str(tmp_path / "obeyed"))
    old = await there.welcomed("front-1", session=2, fence=version - 1)
    old.say(frame("COMMIT", 2, COMMIT, b"{}x"))
    assert (await old.hear())[2][0] == Failure.READ_ONLY, "it does not know yet whether it missed a fence"
    await until_up(keeper.remote)
    async with asyncio.timeout(SOON_S):
        while there.service.obeyed.fence < version:
            await keeper.work()
            await asyncio.sleep(0.02)
    assert await old.end() == []
    again = await there.raw(there.client("front-1"))
    assert (await again.hello(session=3, fence=version - 1))[2][0] == Failure.FENCED
    assert "commit" not in there.node.calls
    keeper.following.close()


async def test_a_new_node_is_told_of_a_fence_too_and_additions_fence_nobody(there: Installation, tmp_path: Path) -> None:
    keeper = Keeper(there, tmp_path)
    await keeper.begin()
    assert there.service.obeyed.fence == 0, "what is new may be seen late"
    version = await keeper.expel_b()
    await keeper.index.change_layout([LayoutChange("c", "rack-c")])
    await keeper.work()
    assert (there.service.obeyed.version, there.service.obeyed.fence) == (version + 1, version)
    keeper.following.close()


async def test_a_keeper_whose_database_is_away_tells_what_it_knows(there: Installation, tmp_path: Path) -> None:
    """P14: else nodes that come back would take no mail while the database is away."""
    keeper = Keeper(there, tmp_path)
    await keeper.begin()
    version = await keeper.expel_b()
    await keeper.work()
    await again(there, tmp_path)
    await until_up(keeper.remote)

    async def away() -> int:
        keeper.index.fail_next(kept=False)
        return keeper.index.transact(lambda: 0)

    keeper.index.layout_fence = away  # type: ignore[method-assign]
    async with asyncio.timeout(SOON_S):
        while not there.service._tellers:
            await keeper.work()
            await asyncio.sleep(0.02)
    assert there.service.obeyed.fence == version
    front = there.remote("front-1")
    front.where.fence = version
    await front.open()
    assert front.stamp() is not None
    keeper.following.close()


async def test_what_front_ends_may_not_ask_of_membership_stays_so(there: Installation) -> None:
    front = there.remote("front-1")
    await front.open()
    with pytest.raises(NodeTrouble):
        await front.expelled()
