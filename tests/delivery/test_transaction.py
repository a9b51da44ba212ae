"""What the sender is told, for every row of laws 4 and 5."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.log import MemoryLog
from powermail.index.contract import Fate
from powermail.mail.envelope import Envelope
from powermail.storage.contract import Held
from tests.cluster.support import unreachable, virtual
from tests.delivery.support import ACCOUNT, Office

LONG = b"Subject: long\r\n\r\n" + b"0123456789abcde\n" * (3 * limits.CHUNK_OCTETS // 16)


# -- R receipts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("octets", [b"Subject: it\r\n\r\ntext\r\n", LONG], ids=["short", "long"])
@virtual
async def test_a_message_is_stored_entered_and_confirmed(octets: bytes) -> None:
    office = await Office().open()
    message = await office.begin(octets)
    assert await office.outcome(message) == "250"
    assert office.copies(message.key) == ["a", "b"]
    assert await office.listed() == [message.key]
    (facts,) = await office.index.messages([message.key])
    assert facts.nodes == ("a", "b")
    assert office.told == ["deliver"]
    await office.settled()
    assert not [node.id for node in office.nodes if "cancel" in node.calls], "what goes well leaves nothing to do"


@pytest.mark.parametrize("fault", ["commit", "append", "silence", "full", "lost answer", "stamp"])
@virtual
async def test_a_250_always_has_R_copies(fault: str) -> None:
    """Law 4, whatever one node does."""
    office = await Office().open()
    _, b, _ = office.nodes
    message = await office.begin(LONG if fault == "append" else b"Subject: it\r\n\r\ntext\r\n")
    if fault == "append":
        b.fail_next("append", error=unreachable())
        await message.write(LONG)
    elif fault == "silence":
        b.hang()
    elif fault == "full":
        b.fill()
    elif fault == "stamp":
        await b.restart()  # its streams are gone, its stamp is another
    else:
        b.fail_next("commit", done=fault == "lost answer", error=unreachable())
    assert await office.outcome(message) == "250"
    (facts,) = await office.index.messages([message.key])
    live = office.copies(message.key)
    assert len(live) >= 2
    assert set(facts.nodes) <= set(live)
    assert len(facts.nodes) == 2
    assert not [told for told in office.told if told.startswith("delete")]
    await office.settled()


@pytest.mark.parametrize("how", ["silent", "trouble"])
@virtual
async def test_silence_of_the_index_after_R_receipts_is_250(how: str) -> None:
    """Law 4: the nodes' records are enough, reconcile enters it."""
    office = await Office().open()
    message = await office.begin()
    if how == "silent":
        office.index.silent = True
    else:
        office.index.fail_next(False)
    began = office.world.clock.monotonic()
    assert await office.outcome(message) == "250"
    assert office.world.clock.monotonic() - began < 5.0  # P20
    assert await office.listed() == []
    await office.reconcile("a")
    assert await office.listed() == [message.key]


@virtual
async def test_reconcile_that_was_quicker_is_250_once() -> None:
    """Law 4: live or dead, made by reconcile before."""
    office = await Office().open()
    read = await office.begin()
    office.index.fail_next(False)
    assert await office.outcome(read) == "250"
    message = await office.begin()
    commit, receipts = await message.replication.commit(message._record)
    assert commit.targets
    assert len(receipts) == 2
    await office.reconcile("a")
    assert await message._run() is not None
    assert await office.listed() == [read.key, message.key]


@pytest.mark.parametrize("fate", [Fate.ABORTED, Fate.DEAD])
@virtual
async def test_what_was_decided_before_the_index_was_asked_stands(fate: Fate) -> None:
    """Law 3: aborted closes; dead is 250, for it was read and deleted meanwhile."""
    office = await Office().open()
    message = await office.begin()
    if fate is Fate.ABORTED:
        await office.index.abort(message.key, ["a", "b"])
    else:
        await message.replication.commit(message._record)
        await office.reconcile("a")
        facts = await office.index.find_mailbox(ACCOUNT.id, "INBOX")
        assert facts is not None
        assert (await office.index.expunge(facts.id, [1])).dead == 1
    assert await office.outcome(message) == ("closed" if fate is Fate.ABORTED else "250")
    assert await office.listed() == []


@virtual
async def test_a_delivery_that_wakes_late_is_closed_not_listed_twice() -> None:
    """Law 7: it was entered, read, deleted and forgotten while its front end slept."""
    office = await Office().open()
    message = await office.begin()
    await message.replication.commit(message._record)
    for name in ("a", "b"):
        await office.reconcile(name)
    facts = await office.index.find_mailbox(ACCOUNT.id, "INBOX")
    assert facts is not None
    assert (await office.index.expunge(facts.id, [1])).dead == 1
    del office.index.state.keys[message.key]  # law 9 let it go
    await asyncio.sleep(3600)
    assert await office.outcome(message) == "closed"
    assert await office.listed() == []


# -- fewer than R -------------------------------------------------------------------------------------------------------


@virtual
async def test_a_definite_refusal_of_all_is_451() -> None:
    """Law 5: no node can hold a commit; the index need not be asked, and may be away."""
    office = await Office().open()
    message = await office.begin(LONG)
    for node in office.nodes:
        node.fill()
    office.index.silent = True
    assert await office.outcome(message) == "451"
    assert office.told == []
    await office.settled()
    for node in office.nodes[:2]:
        assert node.calls[-1] == "cancel"
        assert not node._open
    assert office.copies(message.key) == []


@virtual
async def test_no_node_asked_is_451() -> None:
    office = await Office(2).open()
    message = await office.begin()
    for node in office.nodes:
        node.miss()
    assert await office.outcome(message) == "451"
    assert office.told == []


@virtual
async def test_no_node_is_told_to_abort_before_the_index_decided() -> None:
    """Law 5; then each that was asked is told, and 451 needs that each has confirmed."""
    office = await Office().open()
    message = await office.begin()
    _, b, c = office.nodes
    b.fail_next("commit", done=True, error=unreachable())
    c.fail_next("commit", error=unreachable())
    assert await office.outcome(message) == "451"
    assert office.told[0] == "abort"
    assert sorted(office.told[1:]) == ["delete a", "delete b", "delete c"]
    assert office.copies(message.key) == []
    assert await office.index.fates([message.key]) == {message.key: Fate.ABORTED}
    for node in office.nodes:
        assert await node.has([message.key]) == [Held.DEAD]
        assert message.key in await office.index.orders(node.id, 10)


@virtual
async def test_a_node_that_refused_definitely_need_not_confirm() -> None:
    office = await Office().open()
    message = await office.begin()
    _, b, c = office.nodes
    b.fill()
    c.fill()
    assert await office.outcome(message) == "451"
    assert office.told == ["abort", "delete a"]


@pytest.mark.parametrize("since", ["round", "restart", "new disk"])
@virtual
async def test_a_tombstone_that_was_written_too_late_to_prove_anything_closes(since: str) -> None:
    """Law 5: what the node took was entered, listed, deleted and forgotten meanwhile; to the index the key is new."""
    office = await Office().open()
    message = await office.begin()
    a, b, c = office.nodes
    b.fill()
    c.fill()
    aborting = office.index.abort

    async def late(key: bytes, asked: list[str]) -> Fate:
        await office.reconcile("a")
        assert await office.listed() == [message.key]
        facts = await office.index.find_mailbox(ACCOUNT.id, "INBOX")
        assert facts is not None
        await office.index.expunge(facts.id, [1])
        if since == "round":
            stamp = a.stamp()
            assert stamp is not None
            await a.fence(stamp)
        elif since == "restart":
            await a.restart()
        else:
            await a.close()
            await a.initialise()
            await a.open()
        del office.index.state.keys[key]  # law 9 let it go
        return await aborting(key, asked)

    office.index.abort = late  # type: ignore[assignment, method-assign]
    assert await office.outcome(message) == "closed"
    assert office.told == ["abort", "delete a"]
    assert await a.has([message.key]) == [Held.DEAD], "written all the same"


@virtual
async def test_a_tombstone_that_is_not_confirmed_closes() -> None:
    """Law 5: it may be live there until the order is obeyed."""
    office = await Office().open()
    message = await office.begin()
    _, b, c = office.nodes
    c.fill()
    b.hold()
    assert await office.outcome(message) == "closed"
    assert await office.index.fates([message.key]) == {message.key: Fate.ABORTED}
    b.release()
    await asyncio.sleep(1.0)
    assert office.copies(message.key) == []
    assert await office.listed() == []


@virtual
async def test_silence_of_the_index_after_an_abort_closes() -> None:
    """Laws 4 and 5: neither 250, also when R receipts have come by then, nor is any node told."""
    office = await Office(2).open()
    message = await office.begin()
    b = office.nodes[1]
    b.hold()
    office.index.silent = True
    finishing = asyncio.ensure_future(office.outcome(message))
    await asyncio.sleep(limits.NODE_RECEIPT_TIMEOUT_S + 1.5)
    assert office.told == ["abort"]
    b.release()
    assert await finishing == "closed"
    assert office.copies(message.key) == ["a", "b"]
    assert office.told == ["abort"]


@pytest.mark.parametrize("read", [False, True], ids=["live", "dead"])
@virtual
async def test_a_message_that_reconcile_entered_is_not_answered_451(read: bool) -> None:
    """Laws 3 and 5: the reader has seen it; with fewer than R receipts it is not confirmed either."""
    office = await Office().open()
    message = await office.begin()
    _, b, c = office.nodes
    for node in (b, c):
        node.fill()
    aborting = office.index.abort

    async def entered_meanwhile(key: bytes, asked: list[str]) -> Fate:
        await office.reconcile("a")
        if read:
            facts = await office.index.find_mailbox(ACCOUNT.id, "INBOX")
            assert facts is not None
            await office.index.expunge(facts.id, [1])
        return await aborting(key, asked)

    office.index.abort = entered_meanwhile  # type: ignore[assignment, method-assign]
    assert await office.outcome(message) == "closed"
    assert await office.listed() == ([] if read else [message.key])
    assert office.told == ["abort"], "no node is told to delete what a reader sees"


@virtual
async def test_a_late_commit_behind_an_abort_is_buried_by_its_order() -> None:
    """Laws 3 and 6: the node did not answer in time, and commits when all is decided."""
    office = await Office(2).open()
    message = await office.begin()
    b = office.nodes[1]
    b.hold()
    b.deadline_s = 2.0
    assert await office.outcome(message) == "closed"
    assert message.key in await office.index.orders("b", 10)
    b.release()
    await office.reconcile("b")
    assert await office.listed() == []


# -- the promise rule ---------------------------------------------------------------------------------------------------


@virtual
async def test_what_was_asked_is_finished_though_nobody_waits() -> None:
    office = await Office().open()
    message = await office.begin()
    b = office.nodes[1]
    b.hold()
    session = asyncio.ensure_future(message.finish())
    await asyncio.sleep(0.5)
    session.cancel()
    await asyncio.gather(session, return_exceptions=True)
    b.release()
    await office.tasks.drain(limits.DRAIN_TIMEOUT_S)
    assert await office.listed() == [message.key]
    assert len(office.copies(message.key)) == 2


@virtual
async def test_the_longest_delivery_ends_within_the_drain() -> None:
    """Everything that can be slow is, one after the other: what was asked is still decided before the process stops."""
    office = await Office().open()
    message = await office.begin(LONG * 4)
    a, b, c = office.nodes
    office.index.silent = True
    b.fail_next("commit", error=unreachable())
    append = c.append

    async def slow(*args: object) -> None:
        await asyncio.sleep(3.5)
        await append(*args)  # type: ignore[arg-type]

    c.append = slow  # type: ignore[assignment, method-assign]
    finishing = asyncio.ensure_future(office.outcome(message))
    await asyncio.sleep(0)
    began = office.world.clock.monotonic()
    await office.tasks.drain(limits.DRAIN_TIMEOUT_S)
    assert await finishing == "closed"
    assert office.world.clock.monotonic() - began < limits.DRAIN_TIMEOUT_S
    assert office.told == ["abort"]
    assert office.copies(message.key) == ["a"]
    assert a.calls.count("commit") == 1


@virtual
async def test_a_message_that_is_given_up_before_the_end_leaves_nothing() -> None:
    office = await Office().open()
    message = await office.begin(LONG)
    message.cancel()
    await office.settled()
    assert office.told == []
    assert not [node.id for node in office.nodes if node._open]


@virtual
@pytest.mark.parametrize("fails", [False, True])
async def test_a_notice_of_success_that_cannot_be_stored_is_told(fails: bool) -> None:
    office = await Office().open()
    asked = []

    async def announce(key: bytes, *_: object) -> bool:
        asked.append(key)
        if fails:
            raise IndexTrouble("it is away")
        return False

    office.service.announce = announce
    office.service.tell_delivered(b"k" * 16, Envelope("ann@example.org"), 0.0, [("bob@example.org", "")])
    await asyncio.sleep(60)
    assert asked == [b"k" * 16] * 3
    assert office.world.counters.snapshot()["delivery.notices_dropped"] == 1
    assert isinstance(office.world.log, MemoryLog)
    (line,) = [line for line in office.world.log.lines if "notice-dropped" in line]
    assert "to=<ann@example.org>" in line and ("it is away" if fails else "three tries") in line
