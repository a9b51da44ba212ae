"""Mail of our own: one message for one work, however often it is tried (law 5)."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.delivery.internal import Postmaster
from powermail.delivery.srs import Rewriter
from powermail.index.contract import Fate
from tests.cluster.support import unreachable, virtual
from tests.delivery.support import ACCOUNT, Office

DSN = b"Subject: Undelivered\r\n\r\ntext\r\n"


def postmaster(office: Office) -> Postmaster:
    """One that signs with a key."""
    return Postmaster(office.service, Rewriter("here.example", [b"k" * 16]))


@virtual
async def test_our_own_mail_is_delivered() -> None:
    office = await Office().open()
    assert await postmaster(office).submit(ACCOUNT.address, DSN, "bounce 1")
    assert len(await office.listed()) == 1


@virtual
async def test_who_cannot_be_told_is_not_tried_again() -> None:
    office = await Office().open()
    assert await postmaster(office).submit("no address", DSN, "bounce 1")
    assert await postmaster(office).submit("SRS0=AAAA=AA=x.example=y@here.example", DSN, "bounce 2")
    assert await office.listed() == []


@virtual
async def test_too_few_nodes_are_tried_again() -> None:
    office = await Office(2).open()
    office.nodes[0].miss()
    await asyncio.sleep(1.0)
    assert not await postmaster(office).submit(ACCOUNT.address, DSN, "bounce 1")
    assert not office.tasks.count()


@virtual
async def test_an_unknown_outcome_is_decided_before_a_new_key_is_tried() -> None:
    """Law 5: while the index cannot say, nothing is sent; then the old key is dead for ever, and a new one goes."""
    office = await Office().open()
    own = postmaster(office)
    _, b, c = office.nodes
    for node in (b, c):
        node.fail_next("commit", done=True, error=unreachable())
    office.index.silent = True
    assert not await own.submit(ACCOUNT.address, DSN, "bounce 1")
    (old,) = office.nodes[0]._disk.live
    assert not await own.submit(ACCOUNT.address, DSN, "bounce 1")
    assert list(office.nodes[0]._disk.live) == [old], "no second key while the first is undecided"
    assert await own.submit(ACCOUNT.address, DSN, "bounce 2"), "other work goes on"
    office.index.silent = False
    assert await own.submit(ACCOUNT.address, DSN, "bounce 1")
    assert await office.index.fates([old]) == {old: Fate.ABORTED}
    for name in "abc":
        await office.reconcile(name)
    assert old not in await office.listed()


@virtual
async def test_a_message_that_got_through_after_all_is_not_sent_again() -> None:
    office = await Office().open()
    own = postmaster(office)
    _, b, c = office.nodes
    for node in (b, c):
        node.fail_next("commit", done=True, error=unreachable())
    office.index.silent = True
    assert not await own.submit(ACCOUNT.address, DSN, "bounce 1")
    office.index.silent = False
    await office.reconcile("b")
    assert len(await office.listed()) == 1
    assert await own.submit(ACCOUNT.address, DSN, "bounce 1")
    for name in "ac":
        await office.reconcile(name)
    assert len(await office.listed()) == 1


@virtual
async def test_what_is_undecided_is_bounded() -> None:
    """Beyond the bound nothing is sent; the oldest is decided first."""
    office = await Office().open()
    own = postmaster(office)
    for node in office.nodes[1:]:
        node.fail_next("commit", done=True, error=unreachable())
    office.index.silent = True
    assert not await own.submit(ACCOUNT.address, DSN, "bounce 1")
    office.index.silent = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "INTERNAL_UNDECIDED_MAX", 1)
        assert not await own.submit(ACCOUNT.address, DSN, "bounce 2")
        assert list(await office.index.fates(list(office.nodes[0]._disk.live))) == list(office.nodes[0]._disk.live)
        assert await own.submit(ACCOUNT.address, DSN, "bounce 2")


@virtual
async def test_an_abort_that_some_node_has_not_confirmed_is_decided_all_the_same() -> None:
    office = await Office().open()
    own = postmaster(office)
    _, b, c = office.nodes
    c.fail_next("commit", error=unreachable())
    b.fail_next("commit", done=True, error=unreachable())
    b.fail_next("delete", error=unreachable())
    assert not await own.submit(ACCOUNT.address, DSN, "bounce 1")
    assert await own.submit(ACCOUNT.address, DSN, "bounce 1")
    for name in "ac":
        await office.reconcile(name)
    await office.reconcile("b")
    assert len(await office.listed()) == 1
