"""A node from far: what is known without waiting, what a lost connection leaves unknown, and how the link comes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import CommitRefused, NodeTrouble
from powermail.cluster.node_connection import Disconnected
from powermail.cluster.remote import Bodies, RemoteNode
from powermail.storage.contract import START, Chunk, Held, Mark, NodeState, Origin, Receipt
from powermail.wire.node_frames import HEADER
from powermail.wire.node_server import ACK
from tests.noded.installation import SOON_S, Installation, installation, liar, until
from tests.noded.speaking import frame
from tests.storage.support import key

NO_MARK = Mark()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Installation]:
    """A node that is served."""
    async with installation(tmp_path) as made:
        yield made


@pytest.fixture
async def node(there: Installation) -> RemoteNode:
    """The same from far, for one who may ask all."""
    made = there.remote("front-1", "front", "keeper", "operator")
    await made.open()
    return made


async def put(node: RemoteNode, number: int, octets: bytes = b"octets") -> Receipt:
    """Commits a message with the stamp that is known."""
    chunk = Chunk(0, 0, octets, len(octets))
    return await node.commit(key(number), [chunk], b"{}", 1, node.stamp(), Origin.DELIVERY)


# -- what is known without waiting ---------------------------------------------------------------------------------


async def test_before_it_was_ever_reached_nothing_is_claimed_of_it(there: Installation) -> None:
    node = there.remote()
    assert (node.state, node.incarnation, node.stamp()) == (NodeState.OPENING, "", None)
    assert node.stat().free_octets == 0
    for call in (node.has([key(1)]), node.facts(), node.probe(), put(node, 1)):
        with pytest.raises(Disconnected):
            await call


async def test_state_and_figures_are_pushed(there: Installation, node: RemoteNode) -> None:
    """Placement never waits: nobody asks, and it is known."""
    assert node.state.value == "read-write" and node.incarnation == there.node.incarnation
    there.node.block(True)
    await until(lambda: node.state.value == "blocked")
    there.node.block(False)
    await there.node.commit(key(1), [Chunk(0, 0, b"x", 1)], b"{}", 1, None, Origin.DELIVERY)
    await until(lambda: node.stat().messages == 1 and node.state.value == "read-write")
    await there.node.close()
    await until(lambda: node.state.value == "closed")
    assert node.incarnation == ""
    await there.node.open()
    await until(lambda: node.state.value == "read-write")


async def test_a_stamp_is_as_old_as_its_ping_and_ends_with_the_link(
    there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2."""
    stamp = node.stamp()
    assert stamp is not None and stamp.boot == (await there.node.facts()).boots[-1]
    link = node._link
    link.stamp_at -= limits.STAMP_AGE_MAX_S + 0.1
    assert node.stamp() is None, "too old to take mail with"
    await node.hear()
    later = node.stamp()
    assert later is not None and later.at >= stamp.at
    await node.hear()
    node.cut()
    assert node.stamp() is None and node.state is NodeState.MISSING


async def test_a_stamp_is_as_old_as_its_ping_however_long_the_answer_takes(there: Installation, node: RemoteNode) -> None:
    """Law 2: the node made it at some time between ask and answer."""
    now = node._monotonic()
    node._monotonic = node._link._monotonic = lambda: now
    (small,) = [connection for connection in there.service._connections if not connection.bulk]
    small._transport.pause_reading()  # type: ignore[union-attr]
    asked = asyncio.ensure_future(node.hear())
    await asyncio.sleep(0)
    now += limits.STAMP_AGE_MAX_S + 1.0
    small._transport.resume_reading()  # type: ignore[union-attr]
    await asked
    assert node.stamp() is None
    await node.hear()
    assert node.stamp() is not None


async def test_pings_keep_the_stamp_young(there: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_PING_INTERVAL_S", 0.01)
    node = there.remote()
    await node.open()
    first = node.stamp()
    await until(lambda: node.stamp() != first)


# -- loss ----------------------------------------------------------------------------------------------------------


async def test_what_was_asked_on_a_lost_connection_has_an_unknown_outcome(there: Installation, node: RemoteNode) -> None:
    """Law 5: never a refusal; the commit may be there, and is."""
    there.node.hold()
    asked: list[asyncio.Future[Any]] = [asyncio.ensure_future(put(node, number)) for number in (1, 2)]
    asked += [asyncio.ensure_future(call) for call in (node.delete([key(9)], NO_MARK, 0.0), node.append(key(3), []))]
    await until(lambda: there.node.calls.count("commit") == 2 and "delete" in there.node.calls)
    node.cut()
    for call in asked:
        with pytest.raises(NodeTrouble) as info:
            await call
        assert isinstance(info.value, Disconnected) and not isinstance(info.value, CommitRefused)
    there.node.release()
    await until(lambda: node.state is NodeState.READ_WRITE)
    assert await node.has([key(1), key(2), key(9)]) == [Held.LIVE, Held.LIVE, Held.DEAD]
    assert (await put(node, 1)).position > START


async def test_the_link_comes_back_by_itself_after_either_end_was_cut(there: Installation, node: RemoteNode) -> None:
    for cut in (node.cut, there.service.cut, node.cut):
        cut()
        await until(lambda: node.state is NodeState.MISSING)
        await until(lambda: node.state is NodeState.READ_WRITE)
        await put(node, 1)
    assert there.world.counters.get("cluster.links_lost") == 3 and there.world.counters.get("cluster.links_made") == 4


async def test_the_link_comes_back_after_the_service_was_away(there: Installation, node: RemoteNode) -> None:
    """And what is asked meanwhile is trouble at once, not when a deadline is over."""
    there.service.abort()
    await until(lambda: node.state is NodeState.MISSING)
    async with asyncio.timeout(1.0):
        with pytest.raises(Disconnected):
            await put(node, 1)
    with pytest.raises(Disconnected):
        await node.open()
    await there.serve(port=there.port)
    await until(lambda: node.state is NodeState.READ_WRITE)
    await put(node, 1)


async def test_a_node_that_drains_is_left_in_good_order(there: Installation, node: RemoteNode) -> None:
    there.node.hold()
    asked = asyncio.ensure_future(put(node, 1))
    await until(lambda: "commit" in there.node.calls)
    closing = asyncio.ensure_future(there.service.close())
    await until(lambda: not node._link.up)
    with pytest.raises(Disconnected):
        await put(node, 2)
    there.node.release()
    assert (await asked).node == "a", "what was asked before is answered"
    await closing
    await until(lambda: node.state is NodeState.MISSING)


async def test_a_hung_service_is_noticed_by_its_pings(
    there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P20: dead is not slow."""
    monkeypatch.setattr(limits, "NODE_PING_TIMEOUT_S", 0.05)
    monkeypatch.setattr(limits, "NODE_PING_INTERVAL_S", 0.01)
    node.cut()
    await until(lambda: node.state is NodeState.READ_WRITE)
    for connection in list(there.service._connections):
        connection._transport.pause_reading()  # type: ignore[union-attr]
    asked = asyncio.ensure_future(put(node, 1))
    with pytest.raises(Disconnected, match="no answer to a ping"):
        await asked
    there.service.cut()


async def test_a_call_that_takes_too_long_ends(there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 14: also when the far end never answers; the link stays."""
    monkeypatch.setattr(limits, "NODE_PROBE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(limits, "NODE_CALL_GRACE_S", 0.1)
    there.node.hang()
    with pytest.raises(NodeTrouble, match="PROBE takes too long"):
        await node.probe()
    there.node.release()
    await node.hear()
    assert node.state is NodeState.READ_WRITE


@pytest.mark.parametrize("seed", range(3))
async def test_receipts_are_true_however_often_the_cable_is_pulled(there: Installation, node: RemoteNode, seed: int) -> None:
    """Every receipt is of a copy that is live where it says; no failure is definite; asking again gives the same place."""
    chance = random.Random(seed)
    receipts: dict[int, Receipt] = {}
    failed: dict[int, None] = {}
    cutting = True

    async def cut() -> None:
        while cutting:
            busy = 1 if receipts else 1 + len(failed)  # a machine that has got nothing done yet gets more time
            await asyncio.sleep(chance.uniform(0.0, 0.02) * busy)
            made = there.world.counters.get("cluster.links_made")
            chance.choice([node.cut, there.service.cut])()
            await until(lambda made=made: there.world.counters.get("cluster.links_made") > made)

    async def deliver(first: int) -> None:
        for number in range(first, first + 40):
            octets = b"octets of %d" % number * chance.choice([1, 500, 9000])
            try:
                if chance.random() < 0.3:
                    await node.append(key(number), [Chunk(0, 0, octets, len(octets))])
                    last = Chunk(1, 0, b"end", 3)
                    receipts[number] = await node.commit(key(number), [last], b"{}", 2, node.stamp(), Origin.DELIVERY)
                else:
                    receipts[number] = await put(node, number, octets)
            except NodeTrouble as error:
                assert not isinstance(error, CommitRefused), error
                failed[number] = None
                await asyncio.sleep(0.002)

    cutter = asyncio.ensure_future(cut())
    async with asyncio.timeout(30):
        await asyncio.gather(*(deliver(100 * n) for n in range(1, 5)))
    cutting = False
    await cutter
    assert receipts and failed
    for number, receipt in receipts.items():
        assert await there.node.verify(key(number)) == receipt.position and receipt.incarnation == node.incarnation
        assert await put(node, number, b"other") == receipt
    await node.delete([key(number) for number in failed], NO_MARK, 0.0)
    assert {*await there.node.has([key(number) for number in failed])} == {Held.DEAD}


# -- what is large -------------------------------------------------------------------------------------------------


async def test_large_bodies_cross_in_pieces_both_ways(there: Installation, node: RemoteNode) -> None:
    """A record beyond 64 KiB (1,000 recipients), and one beyond the window."""
    for number, octets in ((1, 300_000), (2, 3), (3, 5 * limits.MIB)):
        record = random.Random(number).randbytes(octets)
        chunks = [Chunk(n, 0, random.Random(n).randbytes(200_000), 200_000) for n in range(2)]
        await node.commit(key(number), chunks, record, 2, node.stamp(), Origin.DELIVERY)
        assert await node.read_commit(key(number)) == record == await there.node.read_commit(key(number))
        assert [await node.read_chunk(key(number), n) for n in range(2)] == chunks
    with pytest.raises(NodeTrouble, match="too large"):
        await node.put_checkpoint(key(1), 0, bytes(limits.NODE_OPERATION_OCTETS_MAX + 1), NO_MARK)


async def test_more_than_the_window_waits_its_turn(there: Installation, node: RemoteNode) -> None:
    chunk = bytes(limits.MIB)
    appended = [node.append(key(number), [Chunk(0, 0, chunk, len(chunk))]) for number in range(1, 13)]
    small = [put(node, 1000 + number) for number in range(2000)]
    await asyncio.gather(*appended, *small)
    assert node.stat() is not None and there.refused("credits") == 0
    assert (await there.node.read_chunk(key(12), 0)).octets == len(chunk)


async def test_small_commits_do_not_stand_behind_bulk(there: Installation, node: RemoteNode) -> None:
    chunk = bytes(limits.MIB)
    bulk = [asyncio.ensure_future(node.append(key(n), [Chunk(0, 0, chunk, len(chunk))])) for n in range(1, 40)]
    await put(node, 1000)
    assert not all(call.done() for call in bulk)
    await asyncio.gather(*bulk)


async def test_checkpoints_come_in_pages(there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NODE_PAGE_OCTETS", 100)
    monkeypatch.setattr(limits, "NODE_PAGE_NAMES", 3)
    for name in range(1, 12):
        for number in range(name % 5 + 1):
            await node.put_checkpoint(key(name), number, b"%d %d" % (name, number) * (9 if name % 2 else 70), NO_MARK)
    for after, limit in ((b"", 100), (b"", 1), (b"", 3), (key(4), 5), (key(11), 2), (b"", 11)):
        assert await node.checkpoints(after, limit) == await there.node.checkpoints(after, limit), (after, limit)


async def test_what_is_more_than_a_page_of_small_messages_is_read_by_itself(
    there: Installation, node: RemoteNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "NODE_PAGE_OCTETS", 2000)
    for number in range(1, 6):
        await put(node, number, b"x" * 700)
    found = await node.read_small([key(number) for number in range(1, 6)])
    assert [whole is not None for whole in found] == [True, True, False, False, False]


def test_a_body_for_several_nodes_is_made_and_summed_up_once() -> None:
    bodies = Bodies()
    chunk = Chunk(0, 0, b"octets", 6)
    record = bytes(bytearray(b"record"))
    chunks = [chunk]
    made = bodies.of(chunks, record)
    assert b"".join(octets for octets, _ in made[1]) == b"recordoctets"
    assert bodies.of(chunks, record)[1] is made[1] and bodies.of([chunk], record)[1] is made[1]
    assert bodies.of(chunks, bytes(bytearray(b"record")))[1] is not made[1], "the same octets are not the same body"
    assert bodies.of([Chunk(0, 1, b"octets", 9)], record)[0] == [(0, 1, 6, 9)]


# -- nodes that lie ------------------------------------------------------------------------------------------------


_Call = Callable[[RemoteNode], Awaitable[Any]]
_HAS: _Call = lambda node: node.has([key(1), key(2)])  # noqa: E731
LIES: dict[str, tuple[_Call, Callable[[str, int], bytes], bool]] = {
    "fewer answers": (_HAS, lambda _, n: frame("REPLY", n, [], b"\0"), False),
    "an answer of another kind": (_HAS, lambda _, n: frame("REPLY", n, [], b"\0\7"), False),
    "a chunk of another size": (
        lambda node: node.read_chunk(key(1), 0), lambda _, n: frame("REPLY", n, [0, 0, 9, 9], b"short"), False),
    "flags of a later version": (
        lambda node: node.read_chunk(key(1), 0), lambda _, n: frame("REPLY", n, [0, 8, 5, 9], b"short"), False),
    "fewer messages": (lambda node: node.read_small([key(1)]), lambda _, n: frame("REPLY", n, [], b"\x90"), False),
    "no list": (lambda node: node.inventory(b"", 9), lambda _, n: frame("REPLY", n, [], b"\xc1"), False),
    "an origin nobody has": (
        lambda node: node.inventory(b"", 9),
        lambda _, n: frame("REPLY", n, [], b"\x91\x95\xc4\x10" + key(1) + b"\0\0\0c"), False),
    "keys cut short": (lambda node: node.compactable(START, 0.0), lambda _, n: frame("REPLY", n, [True], b"short"), False),
    "facts that are none": (lambda node: node.facts(), lambda _, n: frame("REPLY", n, [], b"\x90"), False),
    "a receipt of something else": (_HAS, lambda _, n: frame("ACKS", 0, ["i"], ACK.pack(n, 1, 1)), True),
    "an answer to what was not asked": (_HAS, lambda _, n: frame("REPLY", n + 7, []), True),
    "a length of 4 GB": (_HAS, lambda _, n: HEADER.pack(2**32 - 1, 129, 0, 0, n, 0), True),
    "an end": (_HAS, lambda _, n: frame("GOAWAY", 0, [1, "bye"]), True),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_a_node_that_lies_is_trouble_and_no_more(there: Installation, lie: str) -> None:
    ask, answer, lost = LIES[lie]
    server = await liar(there, lambda name, number, _: answer(name, number))
    node = there.remote()
    try:
        await node.open()
        if lie == "an end":
            asked = asyncio.ensure_future(ask(node))
            await until(lambda: not node._link.up)
            node.cut()
            with pytest.raises(Disconnected):
                await asked
            return
        async with asyncio.timeout(SOON_S):
            with pytest.raises(NodeTrouble) as info:
                await ask(node)
        assert isinstance(info.value, Disconnected) is lost
    finally:
        await node.close()
        server.close()
