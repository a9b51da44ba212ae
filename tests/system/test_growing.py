"""One machine grows into a cluster while mail flows: a node of another process comes, an old one goes, no message is lost."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import msgspec
import pytest

from powermail.app.core import told_by
from powermail.base.disk import SystemDisk
from powermail.base.entropy import SystemEntropy
from powermail.base.errors import OperatorError
from powermail.storage.identity import make_store
from tests.noded.certificates import Authority, uris
from tests.system.conftest import Running
from tests.system.process import START_S, Served, command, make
from tests.system.test_nodes_over_network import NodeServed, states, until_state

ADDRESS = "ann@local.example"


class Flow:
    """Mail that comes one message after the other; what was acknowledged must stay readable."""

    def __init__(self, front: Served) -> None:
        self._front = front
        self.acknowledged: list[bytes] = []
        self._stop = False

    async def run(self) -> None:
        number = 0
        while not self._stop:
            number += 1
            body = b"Subject: %d\r\n\r\n" % number + b"text of %d\r\n" % number * 40
            if (await self._front.send([ADDRESS], body.removesuffix(b"\r\n"))).startswith("250"):
                self.acknowledged.append(body)

    async def go_on(self, count: int) -> None:
        """Waits until so many more were acknowledged."""
        wanted = len(self.acknowledged) + count
        async with asyncio.timeout(START_S):
            while len(self.acknowledged) < wanted:
                await asyncio.sleep(0.02)

    async def end(self, task: asyncio.Task[None]) -> None:
        self._stop = True
        await task


async def test_a_remote_node_comes_and_an_old_one_leaves_while_mail_flows(tmp_path: Path) -> None:
    """P1, P3: no restart, and every acknowledged message stays readable on two groups."""
    data, disk = tmp_path / "first", tmp_path / "disk-d"
    await asyncio.to_thread(make, data)
    cluster = msgspec.json.decode((data / "nodes/a/identity").read_bytes())["cluster"]
    authority = Authority(tmp_path)
    certificate, key = authority.issue(*uris(cluster, "first", "front", "keeper", "operator"))
    with (data / "powermail.toml").open("a") as settings:
        settings.write(f'[peers]\ncertificate = "{certificate}"\nkey = "{key}"\nauthority = "{authority.path}"\n')
    make_store(SystemDisk(), str(disk), cluster, "d", SystemEntropy())
    node, front = NodeServed("d", tmp_path / "node-d", disk, authority, cluster), Served(data)
    try:
        await asyncio.gather(node.start(), front.start())
        await front.mailbox(ADDRESS)
        flow = Flow(front)
        flowing = asyncio.create_task(flow.run())
        await flow.go_on(3)
        await front.operation("node_address", node="d", address=f"127.0.0.1:{node.port}", group="rack-d")
        await until_state(front, "d", "read-write")
        await flow.go_on(5)
        looked = await front.operation("node_remove", node="a")
        assert isinstance(looked, dict) and not looked["done"] and (await states(front))["a"] == "read-write"
        begun = await front.operation("node_remove", node="a", confirm=True)
        assert isinstance(begun, dict) and begun["done"]
        async with asyncio.timeout(START_S):
            while "a" in await states(front):
                await asyncio.sleep(0.1)
        await flow.go_on(3)
        await flow.end(flowing)
        assert sorted(await front.read(ADDRESS)) == sorted(flow.acknowledged)
        await front.stop()
        await front.start()
        await until_state(front, "d", "read-write")
        assert set(await states(front)) == {"b", "c", "d"}, "its settings name a still, and it stays out"
        listing = await front.operation("list_messages", address=ADDRESS)
        assert isinstance(listing, dict) and listing["not_redundant"] == 0
        assert sorted(await front.read(ADDRESS)) == sorted(flow.acknowledged)
        await front.stop()
    finally:
        await front.kill()
        await node.end(signal.SIGKILL)


async def test_what_may_cost_redundancy_is_said_and_refused_with_the_number(running: Running) -> None:
    running.problems_expected = True  # what lies on both nodes of one group waits for repair
    await running.mailbox(ADDRESS)
    for number in range(4):
        assert (await running.send([ADDRESS], b"Subject: %d\r\n\r\nx" % number)).startswith("250")
    planned = await running.operation("node_drain", node="a", dry_run=True)
    assert isinstance(planned, dict) and not planned["done"]
    assert running.powermail.core.cluster.standing("a").value == "active"
    moved = await running.operation("node_move", node="a", group="rack-b")
    assert isinstance(moved, dict) and not moved["done"] and "--yes" in moved["said"]
    await running.operation("node_move", node="a", group="rack-b", confirm=True)
    with pytest.raises(OperatorError, match="there would be 1 groups"):
        await running.operation("node_move", node="c", group="rack-b", confirm=True)
    with pytest.raises(OperatorError, match="without node c there are 1 groups"):
        await running.operation("node_drain", node="c")
    with pytest.raises(OperatorError, match="no node 'z'"):
        await running.operation("node_priority", node="z", priority=2)
    assert await running.operation("node_priority", node="b", priority=5) == {"id": "b", "priority": 5}
    assert running.powermail.core.cluster.node("b").priority == 5
    with pytest.raises(OperatorError, match="is here"):
        await running.operation("node_expel", node="a", confirm=True)
    assert await running.operation("moves") == []


async def test_nodes_say_where_they_stand_and_copies_go_apart(running: Running) -> None:
    """While mail flows, without a restart; what lay together is brought apart."""
    await running.mailbox(ADDRESS)
    cluster, jobs = running.powermail.core.cluster, running.powermail.keeping
    for number in range(6):
        assert (await running.send([ADDRESS], b"Subject: %d\r\n\r\nx" % number)).startswith("250")
    assert await running.operation("node_site", node="a", site="north", dry_run=True) == {"id": "a", "site": "north"}
    assert cluster.site_of("a") == "" and "disperse" not in {worker.name for worker in jobs.workers}
    for node, site in {"a": "north", "b": "north", "c": "south"}.items():
        await running.operation("node_site", node=node, site=site)

    def is_apart() -> bool:
        return cluster.apart

    assert is_apart() and "disperse" in {worker.name for worker in jobs.workers}
    await running.until("all lie in both", lambda status: not status["in_too_few_sites"]["messages"])
    assert (await running.send([ADDRESS], b"Subject: x\r\n\r\nx")).startswith("250")
    listing = await running.operation("list_messages", address=ADDRESS)
    assert isinstance(listing, dict) and len(listing["messages"]) == 7
    assert all("c" in message["nodes"] and len(message["nodes"]) >= 2 for message in listing["messages"])
    listed = await running.operation("node_list")
    assert isinstance(listed, list) and [node["site"] for node in listed] == ["north", "north", "south"]
    with pytest.raises(OperatorError, match="not a word"):
        await running.operation("node_site", node="a", site="two words")
    await running.operation("node_site", node="c", site="north")
    assert not is_apart() and "disperse" not in {worker.name for worker in jobs.workers}


async def test_a_node_that_never_came_is_taken_out_again(running: Running) -> None:
    """A word mistyped must not count as a group for ever: it is in the layout, and no member yet."""
    await running.operation("node_address", node="z", address="127.0.0.1:1", group="rack-z")
    layout = running.powermail.core.cluster.layout
    assert layout.row("z") is not None
    found = await running.operation("node_expel", node="z", confirm=True)
    assert isinstance(found, dict) and found["expelled"] and found["missing_since"] == 0.0
    layout = running.powermail.core.cluster.layout
    assert layout.row("z") is None and "z" not in running.powermail.core.cluster.nodes
    with pytest.raises(OperatorError, match="no node 'z'"):
        await running.operation("node_expel", node="z", confirm=True)


async def test_a_node_that_comes_again_is_as_the_operator_left_it(running: Running) -> None:
    """What the settings said before does not count anew at the next start."""
    running.problems_expected = True  # the disk was expelled, and is there still
    index, following = running.powermail.core.index, running.powermail.core.following
    await running.operation("node_move", node="a", group="rack-z", confirm=True)
    assert await index.expel("a")
    layout = await following.refresh()
    before = next(row for row in layout.rows if row.id == "a")
    assert before.told and before.group == "rack-z"
    with pytest.raises(OperatorError, match="only a node whose disk is gone"):
        await running.operation("node_replace", node="a")
    await following.start(told_by(running.powermail.settings))
    row = (await index.layout()).row("a")
    assert row is not None and row.group == "rack-z"


async def test_a_blocked_node_stays_blocked_over_a_change_of_its_health(running: Running) -> None:
    """The word of the operator stands in the layout, whatever a node or an admission says."""
    assert await running.operation("node_block", node=["a"], dry_run=True) == [{"id": "a", "state": "read-write"}]
    assert await running.operation("node_block", node=["a"]) == [{"id": "a", "state": "blocked"}]
    cluster = running.powermail.core.cluster
    node = cluster.node("a")
    await running.powermail.core.admission.admit(node)
    await cluster.watch(node)
    assert cluster.shown_state(node) == "blocked" and "a" not in {each.id for each in cluster.place()}
    assert await running.operation("node_unblock", node=["a"]) == [{"id": "a", "state": "read-write"}]
    assert "a" in {each.id for each in cluster.place()}


async def test_a_drain_is_shown_with_how_far_it_is_and_taken_back(running: Running) -> None:
    await running.mailbox(ADDRESS)
    for number in range(4):
        assert (await running.send([ADDRESS], b"Subject: %d\r\n\r\nx" % number)).startswith("250")
    begun = await running.operation("node_drain", node="a")
    assert isinstance(begun, dict) and begun["done"]
    async with asyncio.timeout(START_S):
        while True:
            status = await running.operation("status")
            assert isinstance(status, dict)
            (move,) = status["moves"]
            if move["phase"] == "drained":
                break
            await asyncio.sleep(0.1)
    assert move["name"] == "drain a" and move["percent"] == 100.0 and "node a is draining" in status["degraded"]
    await running.operation("node_unblock", node="a")
    async with asyncio.timeout(START_S):
        while await running.operation("moves"):
            await asyncio.sleep(0.1)
    assert "a" in {node.id for node in running.powermail.core.cluster.place()}


async def test_a_keeper_killed_while_a_node_is_taken_out_goes_on_when_it_starts(tmp_path: Path) -> None:
    """`keeper/test_killed` tries every transaction of it in memory; this one is a process, its disks, and kill -9."""
    data = tmp_path / "data"
    nodes = [word for name in "abcd" for word in ("--node", f"{name}=nodes/{name}:rack-{name}")]
    done = await asyncio.to_thread(command, "init", "--data", str(data), *nodes)
    assert done.returncode == 0, done.stderr
    front = Served(data)
    try:
        await front.start()
        await front.mailbox(ADDRESS)
        bodies = [b"Subject: %d\r\n\r\ntext of %d\r\n" % (number, number) for number in range(6)]
        for body in bodies:
            assert (await front.send([ADDRESS], body.removesuffix(b"\r\n"))).startswith("250")
        begun = await front.operation("node_remove", node="a", confirm=True)
        assert isinstance(begun, dict) and begun["done"]
        for _ in range(2):
            await front.kill()
            await front.start()
        async with asyncio.timeout(START_S):
            while "a" in await states(front):
                await asyncio.sleep(0.1)
        assert await front.operation("moves") == []
        listing = await front.operation("list_messages", address=ADDRESS)
        assert isinstance(listing, dict) and listing["not_redundant"] == 0
        assert sorted(await front.read(ADDRESS)) == sorted(bodies)
        await front.stop()
    finally:
        await front.kill()
