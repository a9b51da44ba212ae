"""One good copy is found whatever the others do (P3), and repair copies only what it has verified (law 6)."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from powermail.base import limits
from powermail.base.errors import CopyDamaged, IndexTrouble, MessageUnreadable, NodeTrouble
from powermail.cluster.cluster import Cluster
from powermail.cluster.fetch import Fetcher
from powermail.mail.envelope import Commit, Envelope
from powermail.storage.contract import Chunk, Held, Origin
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
