"""One good copy is found whatever the others do (P3), and repair copies only what it has verified (law 6)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import pytest

from powermail.base import limits
from powermail.base.errors import CopyDamaged, IndexTrouble, MessageUnreadable, NodeTrouble
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.mail.envelope import Commit, Envelope
from powermail.storage.contract import Chunk, Held, Origin, Whole
from tests.cluster.support import Recorder, make_cluster, make_world, read_whole, store, three, virtual

KEY = b"k" * 16
BODY = b"Subject: it\r\n\r\n" + b"x" * (2 * limits.CHUNK_OCTETS)


class Notes:
    """Where bad copies are noted, or not."""

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.error: Exception | None = None
        self.hangs = False

    async def note(self, key: bytes, node: str, why: str) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.bad.append(node)


async def stored(notes: Notes) -> tuple[Fetcher, Cluster, Recorder, Recorder, Recorder]:
    """A message on a and b."""
    world = make_world()
    a, b, c = three()
    cluster = await make_cluster(world, a, b, c)
    await store(cluster, KEY, BODY)
    return Fetcher(world, cluster, notes.note), cluster, a, b, c


@pytest.mark.parametrize("how", ["noted", "trouble", "hang"])
@virtual
async def test_an_unnoted_bad_copy_does_not_hide_the_good_one(how: str) -> None:
    notes = Notes()
    notes.error = IndexTrouble("locked") if how == "trouble" else None
    notes.hangs = how == "hang"
    fetcher, _, a, _, _ = await stored(notes)
    a.damage(KEY)
    for _ in range(8):  # whichever copy is tried first
        assert await read_whole(fetcher, KEY, ("a", "b")) == BODY
    assert set(notes.bad) == ({"a"} if how == "noted" else set())


@virtual
async def test_a_node_that_hangs_is_passed_by_and_read_last_for_a_while() -> None:
    fetcher, cluster, a, b, _ = await stored(Notes())
    a.hang()
    assert await read_whole(fetcher, KEY, ("a", "b")) == BODY
    assert not cluster.is_slow("b")
    b.damage(KEY)
    a.release()
    assert await read_whole(fetcher, KEY, ("a", "b")) == BODY


@virtual
async def test_without_any_good_copy_it_is_an_error_never_less_octets() -> None:
    fetcher, _, a, b, _ = await stored(Notes())
    a.damage(KEY)
    b.lose(KEY)
    with pytest.raises(MessageUnreadable):
        await read_whole(fetcher, KEY, ("a", "b"))


@virtual
async def test_repair_copies_say_that_they_are_and_bring_no_stamp() -> None:
    """Law 6: an orphan repair copy is never entered as new mail."""
    fetcher, _, a, b, c = await stored(Notes())
    receipt = await fetcher.copy(KEY, a, c)
    assert receipt.node == "c"
    assert receipt.position == await c.verify(KEY)
    assert [(stamp, origin) for _, stamp, origin in c.asked] == [(None, Origin.REPAIR)]
    b.damage(KEY)
    a.miss()
    assert await read_whole(fetcher, KEY, ("a", "b")) == BODY
    assert await fetcher.copy(KEY, c, c) == receipt, "a copy that is live there stays where it is"


async def forged(commit: Commit, body: list[bytes]) -> Recorder:
    """A node whose copy is good by its checksums, and is not what was accepted."""
    node = Recorder("f", "g4")
    await node.open()
    chunks = [Chunk(number, 0, octets, len(octets)) for number, octets in enumerate(body)]
    await node.commit(KEY, chunks, commit.format(), len(chunks), None, Origin.DELIVERY)
    return node


@pytest.mark.parametrize("body", [[b"one", b"TWO"], [b"on", b"etwo"], [b"one", b"two!"]], ids=["octets", "sizes", "longer"])
@virtual
async def test_repair_verifies_every_octet_before_it_commits(body: list[bytes]) -> None:
    fetcher, _, _, _, c = await stored(Notes())
    sha256 = hashlib.sha256(b"onetwo").hexdigest()
    source = await forged(Commit(6, sha256, [3, 3], 1.5, Envelope(), []), body)
    with pytest.raises(CopyDamaged):
        await fetcher.copy(KEY, source, c)
    assert not c.asked
    assert c.calls[-1] == "cancel"
    assert await c.has([KEY]) == [Held.ABSENT]


@virtual
async def test_a_record_that_cannot_be_decoded_is_a_bad_copy() -> None:
    fetcher, cluster, a, _, c = await stored(Notes())
    source = Recorder("f", "g4")
    await source.open()
    await source.commit(KEY, [Chunk(0, 0, b"x", 1)], b"{", 1, None, Origin.DELIVERY)
    with pytest.raises(CopyDamaged):
        await fetcher.copy(KEY, source, c)
    c.fail_next("append")
    with pytest.raises(NodeTrouble):
        await fetcher.copy(KEY, a, c)
    assert c.calls[-1] == "cancel"
    assert not c.asked
    assert cluster.node("c") is c


def test_commit_records_of_the_first_release_are_read() -> None:
    """They carry `mark`, which means nothing any more."""
    old = b'{"octets":3,"sha256":"00","sizes":[3],"received_at":1.5,"reverse_path":"","targets":[{"account":"7"}],"mark":9}'
    commit = Commit.parse(old)
    assert commit.targets[0].account == "7"
    assert b"mark" not in commit.format()


class Delayed(Recorder):
    """A node whose reads take as long as they are told to, in virtual time; it remembers how many were asked and given up."""

    def __init__(self, node: str, group: str) -> None:
        super().__init__(node, group)
        self.read_s = 0.001
        self.reads = 0
        self.given_up = 0

    async def _slowly(self) -> None:
        self.reads += 1
        try:
            await asyncio.sleep(self.read_s)
        except asyncio.CancelledError:
            self.given_up += 1
            raise

    async def read_commit(self, key: bytes) -> bytes:
        await self._slowly()
        return await super().read_commit(key)

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        await self._slowly()
        return await super().read_chunk(key, number)

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        await self._slowly()
        return await super().read_small(keys)


async def delayed() -> tuple[Fetcher, Cluster, Delayed, Delayed]:
    """A small message on two nodes that have been read for a while."""
    world = make_world()
    a, b = Delayed("a", "g1"), Delayed("b", "g2")
    cluster = await make_cluster(world, a, b)
    await store(cluster, KEY, b"small")
    fetcher = Fetcher(world, cluster, Notes().note)
    await timed(fetcher, 40)
    assert a.reads and b.reads and not a.given_up and not b.given_up
    return fetcher, cluster, a, b


async def timed(fetcher: Fetcher, count: int) -> list[float]:
    """How long so many reads took, each in its turn: of the record, and of many at once."""
    time, took = asyncio.get_running_loop().time, []
    for _ in range(count):
        began = time()
        assert (await fetcher.commit(KEY, ("a", "b"))).octets == 5
        took.append(time() - began)
        began = time()
        assert (await fetcher.read_small({KEY: ("a", "b")}))[KEY].octets == b"small"
        took.append(time() - began)
    return sorted(took)


@pytest.mark.parametrize("read_s", [0.05, 0.3, 60.0])
@virtual
async def test_a_late_read_is_asked_of_another_and_the_late_node_is_read_last(read_s: float) -> None:
    """P20: late is what is late by the node's own history, whatever others take. p99 at most twice the healthy one."""
    fetcher, cluster, a, _ = await delayed()
    healthy = await timed(fetcher, 200)
    a.read_s, a.reads = read_s, 0
    took = await timed(fetcher, 400)
    assert took[int(len(took) * 0.99)] <= 2 * healthy[int(len(healthy) * 0.99)]
    assert took[-1] < limits.READ_LATE_MIN_S + 0.01
    assert 0 < a.reads < 12 and a.reads == a.given_up, "an answer that nobody waits for is let go of"
    assert not cluster.is_slow("a"), "one late read says nothing about writing"
    a.read_s, a.reads = 0.001, 0
    await asyncio.sleep(limits.NODE_SLOW_REMEMBERED_S)
    await timed(fetcher, 40)
    assert a.reads > 10, "it is read again when it is well again"


@virtual
async def test_load_that_makes_every_node_slow_is_not_doubled() -> None:
    fetcher, _, a, b = await delayed()
    reads, a.read_s, b.read_s = a.reads + b.reads, 0.02, 0.02
    await asyncio.gather(*(fetcher.commit(KEY, ("a", "b")) for _ in range(200)))
    assert a.reads + b.reads - reads <= 200 * (1 + 2 * limits.READ_LATE_SHARE) + limits.READ_LATE_BURST


@virtual
async def test_what_is_far_is_read_when_nothing_near_has_it() -> None:
    fetcher, _, a, b = await delayed()
    await asyncio.sleep(limits.READ_HISTORY_S)
    a.read_s = 0.03
    c = Delayed("c", "g3")
    await c.open()
    await timed(fetcher, 20)
    await asyncio.sleep(limits.NODE_SLOW_REMEMBERED_S)
    a.reads = 0
    await timed(fetcher, 50)
    assert a.reads <= 1, "it is no longer overtaken, and as far as before"
    b.miss()
    await timed(fetcher, 2)
    assert a.reads >= 4


@virtual
async def test_a_copy_that_fails_while_another_is_asked_hides_nothing() -> None:
    fetcher, _, a, b = await delayed()
    a.read_s = 0.05
    b.damage(KEY)
    for _ in range(4):
        assert (await fetcher.commit(KEY, ("a", "b"))).octets == 5
        assert (await fetcher.commit(KEY, ("a", "b"))).octets == 5
    b.miss()
    assert (await fetcher.commit(KEY, ("a", "b"))).octets == 5
    a.miss()
    with pytest.raises(MessageUnreadable):
        await fetcher.commit(KEY, ("a", "b"))
    assert await fetcher.read_small({KEY: ("a", "b")}) == {}
