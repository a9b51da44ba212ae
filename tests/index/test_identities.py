"""Tokens are used once, in time, unguessed; who was expelled gets nothing: on every implementation of the index."""

from __future__ import annotations

import asyncio

import pytest

from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.index.contract import Index
from powermail.index.sharing import Holder, Invitation, Token

INVITED = Invitation("t1", b"s" * 32, "d", ("node",), "rack-d", 2, "192.0.2.1:2700")
SOON = 3600.0


async def test_a_token_is_kept_as_it_was_given(index: Index) -> None:
    ends_at = await index.invite(INVITED, SOON)
    assert await index.find_token("t1") == Token(INVITED, ends_at)
    assert await index.tokens() == [Token(INVITED, ends_at)]
    assert await index.find_token("t2") is None
    front = Invitation("t2", b"x", "front-1", ("front", "keeper"))
    await index.invite(front, SOON)
    found = await index.find_token("t2")
    assert found is not None and found.invitation == front


async def test_a_token_is_used_once_and_says_with_what(index: Index) -> None:
    await index.invite(INVITED, SOON)
    assert await index.holders() == []
    used = await index.use_token("t1", b"request", b"answer", 5e9)
    assert used is not None and (used.request, used.answer, used.used_at is None) == (b"request", b"answer", False)
    again = await index.use_token("t1", b"another", b"other answer", 6e9)
    assert again == used == await index.find_token("t1")
    assert await index.holders() == [Holder("d", ("node",), 5e9)]
    assert await index.use_token("t2", b"", b"", 0.0) is None


async def test_of_two_at_once_one_uses_it(index: Index) -> None:
    await index.invite(INVITED, SOON)
    requests = [b"%d" % number for number in range(4)]
    found = await asyncio.gather(*(index.use_token("t1", request, b"for " + request, 5e9) for request in requests))
    winners = {token.request for token in found if token is not None}
    assert len(winners) == 1 and {token.answer for token in found if token is not None} == {b"for " + winners.pop()}


async def test_a_token_that_has_ended_is_not_used(index: Index) -> None:
    await index.invite(INVITED, 0.0)
    found = await index.use_token("t1", b"request", b"answer", 5e9)
    assert found is not None and found.used_at is None
    assert await index.holders() == []


async def test_a_token_that_was_guessed_at_is_worth_nothing(index: Index) -> None:
    await index.invite(INVITED, SOON)
    await index.count_guess("t2")
    for count in range(limits.TOKEN_GUESSES_MAX):
        await index.count_guess("t1")
        found = await index.find_token("t1")
        assert found is not None and found.failures == count + 1
    found = await index.use_token("t1", b"request", b"answer", 5e9)
    assert found is not None and found.used_at is None and await index.holders() == []


async def test_a_newer_token_of_an_identity_ends_the_unused_one_and_keeps_the_used(index: Index) -> None:
    await index.invite(INVITED, SOON)
    await index.invite(INVITED._replace(id="t2"), SOON)
    assert [token.invitation.id for token in await index.tokens()] == ["t2"]
    await index.use_token("t2", b"request", b"answer", 5e9)
    await index.invite(INVITED._replace(id="t3"), SOON)
    assert [token.invitation.id for token in await index.tokens()] == ["t2", "t3"], "its answer may be asked for again"
    await index.invite(INVITED._replace(id="t4", identity="e"), -limits.TOKEN_KEPT_S - 1.0)
    await index.invite(INVITED._replace(id="t5", identity="f"), SOON)
    assert [token.invitation.id for token in await index.tokens()] == ["t2", "t3", "t5"]


async def test_who_was_expelled_gets_nothing_for_ever(index: Index) -> None:
    await index.invite(INVITED, SOON)
    await index.use_token("t1", b"request", b"answer", 5e9)
    await index.invite(INVITED._replace(id="t2"), SOON)
    await index.expel_identity("d")
    assert await index.tokens() == []
    (holder,) = await index.holders()
    assert holder.expelled_at > 0 and (holder.roles, holder.ends_at) == (("node",), 5e9)
    assert not await index.note_holder("d", ("node",), 6e9)
    with pytest.raises(OperatorError, match="was expelled"):
        await index.invite(INVITED._replace(id="t3"), SOON)
    await index.expel_identity("d")
    assert await index.holders() == [holder], "once"
    await index.expel_identity("never-seen")
    assert [one.identity for one in await index.holders()] == ["d", "never-seen"]


async def test_a_renewal_is_noted(index: Index) -> None:
    assert await index.note_holder("front-1", ("front", "keeper"), 5e9)
    assert await index.note_holder("front-1", ("front",), 6e9)
    assert await index.holders() == [Holder("front-1", ("front",), 6e9)]


async def test_expulsions_that_nodes_remember_are_heard_once_in_each_epoch(index: Index) -> None:
    """An index that was put back, or made anew, has forgotten some; a loss of commits is a new epoch (law 11)."""
    assert not await index.expelled_known()
    await index.note_holder("front-1", ("front",), 5e9)
    await index.invite(INVITED, SOON)
    await index.expel_identity("front-2")
    assert await index.take_expelled(["front-1", "front-2", "d"]) == 2
    assert not await index.expelled_known(), "not every node was asked"
    assert await index.tokens() == [] and not await index.note_holder("front-1", ("front",), 6e9)
    before = {holder.identity: holder.expelled_at for holder in await index.holders()}
    epoch = (await index.epoch_facts()).epoch
    assert await index.take_expelled(["front-1"], epoch) == 0 and await index.expelled_known()
    assert {holder.identity: holder.expelled_at for holder in await index.holders()} == before
    assert await index.raise_epoch([], "a backup was put back") == epoch + 1
    assert not await index.expelled_known()
    await index.take_expelled([], epoch)
    assert not await index.expelled_known(), "it was heard before commits were lost"
    await index.take_expelled([], epoch + 1)
    assert await index.expelled_known()
