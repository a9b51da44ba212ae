"""Another process commits between two statements of a transaction: it is right in spite of it, or runs again."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index.contract import Fate, Outcome
from powermail.index.postgres.statements import SharedPlacements, Writer
from powermail.index.sql import nodes
from powermail.storage.contract import START, Held, Origin, Position, Unread
from tests.index.sharing import WAIT_S, another, between, blocked
from tests.index.support import (
    PostgresRig,
    commit,
    deliver,
    delivery,
    end_of,
    inbox,
    key,
    mailbox,
    place,
    reconcile,
    scan_all,
    uids,
    watermark,
)


async def forgotten(rig: PostgresRig, number: int) -> None:
    """A keeper has forgotten a key that was dead."""
    async with rig.beside() as beside:
        assert await beside.execute("DELETE FROM messages WHERE key = $1 AND fate > 1", key(number)) == "DELETE 1"


async def dead(rig: PostgresRig, number: int) -> None:
    """A key whose row says that it died."""
    async with rig.beside() as beside:
        await beside.execute("INSERT INTO messages VALUES ($1, 0, '', 0, 0, 2, 1)", key(number))


# -- a row that is forgotten meanwhile ---------------------------------------------------------------------------------------


async def test_an_abort_whose_row_is_forgotten_meanwhile_decides_anew(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 3: who finds no row has decided nothing yet."""
    await dead(shared_rig, 1)
    acted = between(monkeypatch, shared_rig.running, "_in_fates", lambda: forgotten(shared_rig, 1))
    assert await shared_rig.index.abort(key(1), ["a"]) is Fate.ABORTED
    assert acted and await shared_rig.index.fates([key(1)]) == {key(1): Fate.ABORTED}
    assert await shared_rig.index.orders("a", 9) == [key(1)]


async def test_reconcile_of_a_key_that_is_forgotten_meanwhile_leaves_no_entry_without_a_row(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 6. The audit counts."""
    await dead(shared_rig, 1)
    acted = between(monkeypatch, shared_rig.running, "_in_fates", lambda: forgotten(shared_rig, 1))
    moved = await reconcile(shared_rig.index, "a", Position(9, 0), [(1, place(1), Origin.DELIVERY)], commits=[(1, commit(1))])
    assert acted and moved.moved and moved.entered == 1
    assert await shared_rig.index.fates([key(1)]) == {key(1): Fate.LIVE}
    assert await uids(shared_rig.index, await mailbox(shared_rig.index)) == [1]


async def test_a_walk_over_a_key_that_is_forgotten_meanwhile_leaves_no_entry_without_a_row(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11."""
    await dead(shared_rig, 1)
    acted = between(monkeypatch, shared_rig.running, "_in_fates", lambda: forgotten(shared_rig, 1))
    found = [(key(1), Held.LIVE, place(1))]
    walked = await shared_rig.index.settle_inventory("a", end_of("a"), found, START, {key(1): commit(1)}, True)
    assert acted and walked.moved and walked.entered == 1
    assert await shared_rig.index.fates([key(1)]) == {key(1): Fate.LIVE}


async def test_a_delivery_beside_a_row_that_is_forgotten_meanwhile_was_settled(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 7: a conflicting row that has gone."""
    await dead(shared_rig, 1)
    acted = between(monkeypatch, shared_rig.running, "_in_decided", lambda: forgotten(shared_rig, 1))
    assert await shared_rig.index.deliver(delivery(1)) is Outcome.SETTLED and acted


# -- forgetting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    ["UPDATE nodes SET owes_walk = 1 WHERE id = 'a'", "INSERT INTO unread VALUES ('a', 1, 5, 9)",
     "INSERT INTO orders SELECT 'b', key FROM messages", "UPDATE nodes SET scan_round = 0 WHERE id = 'c'"],
)  # fmt: skip
async def test_what_holds_forgetting_back_does_so_whenever_it_comes(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """Law 9: the conditions stand in the statement that forgets."""
    assert await shared_rig.index.abort(key(1), []) is Fate.ABORTED
    await scan_all(shared_rig.index)

    async def held_back() -> None:
        async with shared_rig.beside() as beside:
            await beside.execute(statement)

    acted = between(monkeypatch, Writer, "lock_keys", held_back)
    assert await shared_rig.index.forget(9) == 0 and acted
    assert await shared_rig.index.fates([key(1)]) == {key(1): Fate.ABORTED}


async def test_nothing_is_forgotten_while_something_is_unread(shared_rig: PostgresRig) -> None:
    await shared_rig.index.abort(key(1), [])
    await scan_all(shared_rig.index)
    stretch = Unread(Position(1, 5), 9)
    await reconcile(shared_rig.index, "a", await _further(shared_rig), unread=[stretch])
    assert await shared_rig.index.forget(9) == 0
    await reconcile(shared_rig.index, "a", await watermark(shared_rig.index, "a"), read=[stretch])
    assert await shared_rig.index.forget(9) == 1


async def _further(rig: PostgresRig) -> Position:
    rows = {row.id: row for row in await rig.index.node_rows()}
    return Position(rows["a"].watermark.segment + 1, 0)


# -- nodes that come and go --------------------------------------------------------------------------------------------------


async def test_a_set_that_is_made_while_one_of_its_nodes_is_expelled_loses_it_too(shared_rig: PostgresRig) -> None:
    """Law 9: nobody is believed to hold what an expelled node held."""
    await shared_rig.index.make_mailbox("ann", "INBOX")
    async with shared_rig.beside() as beside, shared_rig.beside() as watch, another(shared_rig) as other:
        lock = beside.transaction()
        await lock.start()
        await beside.execute("SELECT 1 FROM mailboxes FOR UPDATE")
        entering = asyncio.ensure_future(shared_rig.index.deliver(delivery(1)))  # the first with a copy on these two
        await blocked(watch)
        expelling = asyncio.ensure_future(other.expel("b"))
        await _waits_or_done(watch, expelling)
        await lock.rollback()
        assert await entering is Outcome.ENTERED
        await expelling
    assert [facts.nodes for facts in await shared_rig.index.messages([key(1)])] == [("a",)]


async def _waits_or_done(watch: Any, task: asyncio.Future[Any]) -> None:
    waiting = asyncio.ensure_future(blocked(watch, 2))
    await asyncio.wait([waiting, task], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def test_a_repair_beside_an_expulsion_does_not_bring_the_node_back_in(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deliver(shared_rig.index, 1)
    async with another(shared_rig) as other:
        acted = between(monkeypatch, SharedPlacements, "need", lambda: other.expel("b"))
        assert await shared_rig.index.believe([key(1)], "c", end_of("c"))
    assert acted
    assert [facts.nodes for facts in await shared_rig.index.messages([key(1)])] == [("a", "c")]


async def test_a_known_set_whose_node_was_expelled_is_looked_at_again(shared_rig: PostgresRig) -> None:
    """What a process remembers of sets of nodes is a hint."""
    await deliver(shared_rig.index, 1, 2)
    async with another(shared_rig) as other:
        await other.expel("b")
        await other.admit_node("b", "south", "b-2", "boot", START, START)
    second = delivery(3)
    again = second._replace(receipts=(second.receipts[0], second.receipts[1]._replace(incarnation="b-2")))
    assert await shared_rig.index.deliver(again) is Outcome.ENTERED
    found = await shared_rig.index.messages([key(1), key(3)])
    assert [facts.nodes for facts in found] == [("a",), ("a", "b")]


async def test_a_node_that_is_admitted_while_the_epoch_rises_owes_its_walk(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 11: each member owes one, whoever of both commits first."""
    at_the_end, go_on = asyncio.Event(), asyncio.Event()
    async with another(shared_rig) as other, shared_rig.beside() as watch:

        async def wait() -> None:
            at_the_end.set()
            await go_on.wait()

        between(monkeypatch, other, "_in_epoch_raised", wait)
        raising = asyncio.ensure_future(other.raise_epoch([], "a test says so"))
        await at_the_end.wait()
        admitting = asyncio.ensure_future(shared_rig.index.admit_node("d", "east", "d-1", "boot", START, START))
        await _waits_or_one(watch, admitting)
        go_on.set()
        await asyncio.gather(raising, admitting)
    assert {row.id: row.owes_walk for row in await shared_rig.index.node_rows()} == dict.fromkeys("abcd", True)


async def test_what_an_expelled_node_leaves_goes_part_by_part(shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was away for months has more orders than a statement is given time for; it must be possible to let it go."""
    monkeypatch.setattr(nodes, "_LEFT_ROWS", 3)
    index = shared_rig.running
    async with shared_rig.beside() as beside:
        for number in range(1, 11):
            for table, more in (("orders", ""), ("drops", ", 1, 2"), ("suspects", ", 'bad'")):
                await beside.execute(f"INSERT INTO {table} VALUES ('b', $1{more}), ('c', $1{more})", key(number))
    parts: list[Any] = []
    clear = index._in_clear_left

    async def counted(*args: Any) -> Any:
        parts.append(args)
        return await clear(*args)

    monkeypatch.setattr(index, "_in_clear_left", counted)
    assert await index.expel("b") and len(parts) == 3 * 4 + 1
    assert await index.orders_total("b") == (0, 0) and await index.orders_total("c") == (10, 10)
    async with shared_rig.beside() as beside:
        await beside.execute("INSERT INTO orders VALUES ('b', $1)", key(1))  # of one who came to no end with it
        await index.admit_node("b", "south", "b-2", "", START, START)
        assert await index.orders_total("b") == (0, 0)
        await beside.execute("DELETE FROM suspects")
        await beside.execute("INSERT INTO orders VALUES ('b', $1)", key(1))
    await index.clear_left("b")
    assert await index.orders_total("b") == (1, 0), "it is a member again"


async def _waits_or_one(watch: Any, task: asyncio.Future[Any]) -> None:
    waiting = asyncio.ensure_future(blocked(watch))
    await asyncio.wait([waiting, task], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


# -- rows that somebody holds ------------------------------------------------------------------------------------------------


async def test_a_row_that_is_held_too_long_delays_only_what_goes_there(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it longer than `INDEX_LOCK_S`: the batch is halved until what waits for it stands alone."""
    for account in ("ann", "bob", "cid", "dan"):
        await shared_rig.index.make_mailbox(account, "INBOX")
    monkeypatch.setattr(limits, "INDEX_LOCK_S", 0.1)
    async with another(shared_rig) as index, shared_rig.beside() as beside:
        async with beside.transaction():
            await beside.execute("SELECT 1 FROM mailboxes WHERE account = 'cid' FOR UPDATE")
            to = ["ann", "bob", "cid", "dan"] * 2
            index.expect(len(to))
            outcomes = await asyncio.gather(
                *[index.deliver(delivery(number, inbox(account))) for number, account in enumerate(to, 1)],
                return_exceptions=True,
            )
            index.expect(-len(to))
        for account, outcome in zip(to, outcomes, strict=True):
            assert isinstance(outcome, IndexTrouble) if account == "cid" else outcome is Outcome.ENTERED
        assert await index.deliver(delivery(3, inbox("cid"))) is Outcome.ENTERED


async def test_who_waits_alone_for_a_row_that_is_held_waits_again(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shared_rig.index.make_mailbox("ann", "INBOX")
    monkeypatch.setattr(limits, "INDEX_LOCK_S", 0.1)
    async with another(shared_rig) as index, shared_rig.beside() as beside:
        lock, deliver_once, tries = beside.transaction(), index._in_deliver, []
        await lock.start()
        await beside.execute("SELECT 1 FROM mailboxes FOR UPDATE")

        async def again(*args: Any) -> Any:
            tries.append(args)
            if len(tries) == 2:
                await lock.rollback()
            return await deliver_once(*args)

        monkeypatch.setattr(index, "_in_deliver", again)
        assert await index.deliver(delivery(1)) is Outcome.ENTERED and len(tries) == 2


async def test_a_process_that_stops_in_a_transaction_does_not_hold_up_the_others(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its session; when it goes on, it runs the whole again, and nothing is there twice."""
    await deliver(shared_rig.index, 1)
    box = await mailbox(shared_rig.index)
    monkeypatch.setattr(limits, "INDEX_IDLE_S", 0.2)
    stopped, goes_on = asyncio.Event(), asyncio.Event()
    async with another(shared_rig) as index:

        async def stops() -> None:
            stopped.set()
            await goes_on.wait()

        between(monkeypatch, Writer, "raise_count", stops)
        late = asyncio.ensure_future(index.deliver(delivery(2)))
        await stopped.wait()
        await deliver(shared_rig.index, 3)  # waits for the mailbox until then
        goes_on.set()
        assert await late is Outcome.ENTERED
        assert index.numbering and await uids(shared_rig.index, box) == [1, 2, 3]
        assert await index.deliver(delivery(2)) is Outcome.KNOWN


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone, or has given up, leaves nothing running there."""
    await deliver(shared_rig.index, 1)
    monkeypatch.setattr(limits, "INDEX_COMMAND_S", 0.3)
    async with another(shared_rig) as index, shared_rig.beside() as beside:
        async with beside.transaction():
            await beside.execute("SELECT 1 FROM mailboxes FOR UPDATE")
            with pytest.raises(IndexTrouble):
                await index.deliver(delivery(2))
            async with asyncio.timeout(WAIT_S):
                question = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                while await beside.fetchval(question):
                    await asyncio.sleep(0.01)
        assert await index.deliver(delivery(2)) is Outcome.ENTERED


async def test_a_session_has_bounds_at_both_ends(shared_rig: PostgresRig) -> None:
    index = shared_rig.running
    await index.usage("ann")
    connection = next(link.connection for link in index._readers.all if link.connection is not None)
    wanted = {
        "statement_timeout": limits.INDEX_COMMAND_S, "lock_timeout": limits.INDEX_LOCK_S,
        "idle_in_transaction_session_timeout": limits.INDEX_IDLE_S,
    }  # fmt: skip
    for name, seconds in wanted.items():
        found = await connection.fetchval("SELECT setting::bigint FROM pg_settings WHERE name = $1", name)
        assert found == seconds * 1000, name
    keepalive = "SELECT current_setting('tcp_keepalives_idle')::int, current_setting('tcp_keepalives_count')::int"
    assert tuple(await connection.fetchrow(keepalive)) == (limits.INDEX_KEEPALIVE_S, limits.INDEX_KEEPALIVES)
    own = connection._transport.get_extra_info("socket")
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == limits.INDEX_KEEPALIVE_S
