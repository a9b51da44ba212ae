"""Repair believes nothing it has not verified, and a failed node costs no try of another."""

from __future__ import annotations

import errno
import hashlib

from powermail.index.contract import Delivery, Outcome
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.storage.contract import Chunk, Origin
from tests.system.conftest import Running


async def test_a_copy_with_other_octets_than_were_accepted_is_never_multiplied(running: Running) -> None:
    """Every record of it is good, yet it is not the message: only the SHA-256 of the whole tells."""
    await running.mailbox("ann@local.example")
    powermail = running.powermail
    account = await powermail.core.directory.find("ann@local.example")
    assert account is not None
    octets, wrong = b"Return-Path: <>\r\nReceived: x\r\nS: right\r\n", b"Return-Path: <>\r\nReceived: x\r\nS: wrong\r\n"
    sha256 = hashlib.sha256(octets).hexdigest()
    commit = Commit(len(octets), sha256, [len(octets)], 1.0, Envelope(), [Target(account=account.id)])
    record = powermail.front.delivery.world.keys.next()
    receipts = []
    for name, body in (("a", wrong), ("b", octets)):
        node, chunks = powermail.core.cluster.node(name), [Chunk(0, 0, body, len(body))]
        receipts.append(await node.commit(record, chunks, commit.format(), 1, node.stamp(), Origin.DELIVERY))
    assert await running.index.deliver(Delivery(record, commit, tuple(receipts))) is Outcome.ENTERED
    powermail.core.cluster.copies_required = 3
    for _ in range(5):
        await powermail.keeping.repairer.step()
    powermail.core.cluster.copies_required = 2
    copy = await powermail.core.cluster.node("c").read_chunk(record, 0)
    assert copy.stored == octets
    running.problems_expected = True  # the wrong copy is still on node a, and verify says so
    result = await running.operation("verify")
    assert isinstance(result, dict)
    assert all("node a" in problem or "good copies" in problem for problem in result["problems"]), result["problems"]


async def test_original_defect_4_a_failing_node_costs_no_try_while_a_spare_is_up(running: Running) -> None:
    """Whichever node fails at the commit, the next in placement order is given the message and the answer is 250."""
    await running.mailbox("ann@local.example")
    node = running.powermail.core.cluster.node("b")
    running.disk.fail(running.data / "nodes" / "b", errno.EIO, ("write", "sync"))
    sent = []
    for number in range(8):
        octets = b"S: %d\r\n\r\n" % number
        assert (await running.send(["ann@local.example"], octets)).startswith("250")
        sent.append(octets + b"\r\n")
    assert node.state.value == "failed"
    assert await running.read("ann@local.example") == sent
    listed = await running.operation("list_messages", address="ann@local.example")
    assert isinstance(listed, dict)
    assert all(message["nodes"] == ["a", "c"] for message in listed["messages"])


async def test_original_defect_11_no_sender_is_special(running: Running) -> None:
    """The original's `advertisement` fired for one sender only: debugging left in."""
    await running.mailbox("ann@local.example")
    for sender in ("ahu@ds9a.example", "other@ds9a.example"):
        assert (await running.send(["ann@local.example"], b"S: x\r\n\r\nbody", sender)).startswith("250")
    assert await running.read("ann@local.example") == [b"S: x\r\n\r\nbody\r\n"] * 2
