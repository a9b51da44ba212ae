"""What only the index on PostgreSQL has: others write too, connections break, servers hang, and histories change."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble, OperatorError
from powermail.index.contract import Batch, Fate, Outcome, Reconciled
from powermail.index.postgres import PostgresIndex, addresses
from powermail.index.postgres.migrating import migrate
from powermail.index.sql.epochs import find
from powermail.storage.contract import START, Mark, Origin, Position
from tests.index.sharing import WAIT_S, Wire, another, blocked
from tests.index.support import (
    CLUSTER,
    PostgresRig,
    begin_again,
    commit,
    deliver,
    delivery,
    elsewhere,
    inbox,
    incarnation,
    key,
    mailbox,
    reconcile,
    scan_all,
    uids,
)
from tests.servers import Database, Postgres

JUMP = limits.EPOCH_JUMP


@pytest.fixture
def rig(shared_rig: PostgresRig) -> PostgresRig:
    return shared_rig


async def deadlocks(connection: Any) -> int:
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    return int(await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


# -- two who write ----------------------------------------------------------------------------------------------------------


async def test_deliver_and_abort_meet_on_one_row(rig: PostgresRig) -> None:
    """Law 3: whoever inserts first decides, in whatever process."""
    async with another(rig) as other:
        for start in range(1, 61, 20):
            numbers = range(start, start + 20)
            answers = await asyncio.gather(
                *[rig.index.deliver(delivery(number)) for number in numbers],
                *[other.abort(key(number), ["a", "b"]) for number in numbers],
            )
            for entered, fate in zip(answers[:20], answers[20:], strict=True):
                assert (entered, fate) in [(Outcome.ENTERED, Fate.LIVE), (Outcome.ABORTED, Fate.ABORTED)]


async def test_a_delivery_that_waited_while_reconcile_passed_its_place_is_settled(rig: PostgresRig) -> None:
    """Law 7: insert first, then look, in a later statement. Whoever looks first enters what was decided and forgotten."""
    async with rig.beside() as beside, another(rig) as keeper:
        first = beside.transaction()
        await first.start()
        await beside.execute("INSERT INTO messages VALUES ($1, 0, '', 0, 0, 1, 0)", key(1))
        late = asyncio.ensure_future(rig.index.deliver(delivery(1)))
        async with rig.beside() as watch:
            await blocked(watch)
        assert (await reconcile(keeper, "a", Position(9, 0))).moved
        await first.rollback()
        assert await late is Outcome.SETTLED
    assert await rig.index.fates([key(1)]) == {}
    assert await rig.index.find_mailbox("ann", "INBOX") is None


async def test_a_delivery_that_waited_for_one_that_aborted_is_refused(rig: PostgresRig) -> None:
    async with rig.beside() as beside:
        first = beside.transaction()
        await first.start()
        await beside.execute("INSERT INTO messages VALUES ($1, 0, '', 0, 0, 3, 0)", key(1))
        late = asyncio.ensure_future(rig.index.deliver(delivery(1)))
        async with rig.beside() as watch:
            await blocked(watch)
        await first.commit()
        assert await late is Outcome.ABORTED


async def test_of_two_keepers_one_moves_the_watermark(rig: PostgresRig) -> None:
    """Law 6: compare-and-set, and what was found is entered once."""
    async with another(rig) as other:
        for number in range(1, 11):
            start, to = Position(1, number) if number > 1 else START, Position(1, number + 1)
            batch = Batch(
                "a", incarnation("a"), start, to, to, [(key(number), start, Origin.DELIVERY)], [], {key(number): commit(number)}
            )
            answers = await asyncio.gather(rig.index.reconcile(batch), other.reconcile(batch))
            assert sorted(answer.moved for answer in answers) == [False, True]
            assert Reconciled(True, 1) in answers
    assert await uids(rig.index, await mailbox(rig.index)) == list(range(1, 11))


async def test_reconcile_and_delivery_of_one_message_enter_it_once(rig: PostgresRig) -> None:
    async with another(rig) as keeper:
        for number in range(1, 21):
            to = Position(1, number * 1000 - 999)  # the receipts of the delivery lie at or behind that
            found = [(number, to, Origin.DELIVERY)]
            outcome, moved = await asyncio.gather(
                rig.index.deliver(delivery(number)), reconcile(keeper, "c", to, found, commits=[(number, commit(number))])
            )
            assert moved.moved and (outcome, moved.entered) in [(Outcome.ENTERED, 0), (Outcome.KNOWN, 1)]
    assert await uids(rig.index, await mailbox(rig.index)) == list(range(1, 21))


async def test_copy_and_expunge_at_once_leave_every_reference_counted(rig: PostgresRig) -> None:
    """Law 8: keys are locked, and entries read again. The audit counts."""
    await deliver(rig.index, *range(1, 16))
    box = await mailbox(rig.index)
    there = (await rig.index.make_mailbox("ann", "Archive")).id
    async with another(rig) as other:
        for uid in range(1, 16):
            pairs, released = await asyncio.gather(rig.index.copy(box, [uid], there), other.expunge(box, [uid]))
            assert released.removed == 1 and released.dead == (0 if pairs else 1)
            fate = (await other.fates([key(uid)]))[key(uid)]
            assert fate is (Fate.LIVE if pairs else Fate.DEAD)


async def test_two_processes_make_one_mailbox(rig: PostgresRig) -> None:
    async with another(rig) as other:
        for number in range(1, 11):
            to = inbox(f"new{number}")
            await asyncio.gather(
                rig.index.deliver(delivery(number, to)), other.deliver(delivery(100 + number, to)),
                other.make_mailbox(f"new{number}", "INBOX"),
            )  # fmt: skip
            assert await uids(rig.index, await mailbox(rig.index, f"new{number}")) == [1, 2]
    boxes = await rig.index.mailboxes(0, 99)
    assert len({facts.uidvalidity for facts in boxes}) == len(boxes) == 10


async def test_mail_that_comes_while_its_account_is_purged_is_in_no_mailbox(rig: PostgresRig) -> None:
    """Law 13."""
    async with another(rig) as other:
        for number in range(1, 11):
            account = f"gone{number}"

            async def purge(account: str = account) -> None:
                await other.note_purged(account)
                await other.purge(account)

            await asyncio.gather(
                *[rig.index.deliver(delivery(10 * number + each, inbox(account))) for each in range(3)], purge()
            )
            assert await rig.index.find_mailbox(account, "INBOX") is None
    assert (await rig.index.totals())["messages"] == 0


async def test_four_connections_that_write_in_any_order_never_lock_in_a_ring(rig: PostgresRig) -> None:
    """The lock order of the laws: deliveries, copies, expunges and reconcile, on the same few mailboxes."""
    chance = random.Random(1)
    names = [f"box{number}" for number in range(6)]
    for name in names:
        await rig.index.make_mailbox("ann", name)
    boxes = [facts.id for facts in await rig.index.mailboxes(0, 99)]
    async with rig.beside() as beside, another(rig) as other:
        before = await deadlocks(beside)
        for round_ in range(6):
            work: list[Awaitable[Any]] = []
            for process in (rig.index, other):
                for each in range(40):
                    number = round_ * 1000 + each * 2 + (process is other)
                    to = [inbox("ann", name) for name in chance.sample(names, 3)]
                    work.append(process.deliver(delivery(number, *to, elsewhere())))
                for _ in range(4):
                    some = chance.sample(range(1, 60), 9)
                    work.append(process.copy(chance.choice(boxes), some, chance.choice(boxes)))
                    work.append(process.expunge(chance.choice(boxes), some))
                    work.append(process.move(chance.choice(boxes), some[:3], chance.choice(boxes)))
            await asyncio.gather(*work)
        assert await deadlocks(beside) == before


async def test_what_a_process_shows_counts_what_others_did(rig: PostgresRig) -> None:
    """Nothing that was read is kept: views, usage, nodes, epochs."""
    await deliver(rig.index, 1)
    box = await mailbox(rig.index)
    async with another(rig) as other:
        await other.view(box)
        await deliver(rig.index, 2)
        assert len(await other.view(box)) == 2 and await other.usage("ann") == 203
        await rig.index.expel("b")
        assert [row.id for row in await other.node_rows()] == ["a", "c"]
        assert await other.deliver(delivery(3)) is Outcome.SETTLED, "b is no member any more"
        await begin_again(rig.index)
        await deliver(other, 4, nodes=("a", "c"))
    assert (await uids(rig.index, box))[-1] == 3 + JUMP


async def test_a_set_of_nodes_keeps_its_meaning_when_one_of_them_is_expelled_and_comes_again(rig: PostgresRig) -> None:
    await deliver(rig.index, 1)
    await rig.index.expel("b")
    await rig.index.admit_node("b", "south", "b-2", "boot", START, START)
    second = delivery(2)
    again = second._replace(receipts=(second.receipts[0], second.receipts[1]._replace(incarnation="b-2")))
    assert await rig.index.deliver(again) is Outcome.ENTERED
    assert [facts.nodes for facts in await rig.index.messages([key(1), key(2)])] == [("a",), ("a", "b")]


# -- connections that break -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [True, False])
async def test_what_became_of_a_commit_whose_answer_was_lost_is_read_from_the_slot(
    rig: PostgresRig, wire: Wire, heard: bool
) -> None:
    """Law 10: higher by one is its own unknown commit; as it was, it did not happen, and runs again."""
    await deliver(rig.index, 1)
    box = await mailbox(rig.index)
    async with another(rig, wire.url(rig.url)) as index:
        calls: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
            (lambda: index.deliver(delivery(2)), Outcome.ENTERED),
            (lambda: index.expunge(box, [1]), (1, 1)),
            (lambda: index.abort(key(9), ["a"]), Fate.ABORTED),
        ]
        for call, wanted in calls:
            connection, slots = index.connection, len(index.mark().slots)
            wire.cut = lambda: heard
            assert await call() == wanted
            assert wire.cuts and index.connection > connection
            assert len(index.mark().slots) == slots + 1, "a new connection takes a new slot"
        assert wire.cuts == 3
        index.settled()
        assert await uids(index, box) == [2] and await index.lost(index.mark()) == ""


async def test_a_commit_whose_answer_never_comes_is_trouble_and_asked_again_it_is_known(
    rig: PostgresRig, wire: Wire, postgresql_server: Postgres
) -> None:
    """The server is killed in COMMIT; what became of it is found by the key."""
    async with another(rig, wire.url(rig.url)) as index:
        await deliver(index, 1)

        def kill() -> bool:
            postgresql_server.kill()
            return False

        wire.cut = kill
        with pytest.raises(IndexTrouble):
            await index.deliver(delivery(2))
        with pytest.raises(IndexTrouble):
            await index.find_mailbox("ann", "INBOX")
        postgresql_server.start()
        await postgresql_server.ready()
        assert await index.deliver(delivery(2)) in (Outcome.ENTERED, Outcome.KNOWN)
        assert await index.deliver(delivery(2)) is Outcome.KNOWN
        assert await index.lost(index.mark()) == "", "a server that starts again has lost nothing"
        assert await uids(rig.index, await mailbox(rig.index)) == [1, 2]


async def test_connections_that_broke_while_idle_are_made_again(rig: PostgresRig, wire: Wire) -> None:
    async with another(rig, wire.url(rig.url)) as index:
        await deliver(index, 1)
        box, connection = await mailbox(index), index.connection
        wire.break_all()
        assert await uids(index, box) == [1]
        await deliver(index, 2)
        assert await uids(index, box) == [1, 2]
        with pytest.raises(IndexTrouble):
            await index.proof(connection)
        assert await index.proof(index.connection) == index.mark()


async def test_a_server_that_hangs_is_trouble_in_time(
    rig: PostgresRig, postgresql_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for ever: not who has a connection, and not who makes one."""
    await rig.die()
    for name in ("INDEX_COMMAND_S", "INDEX_CONNECT_S", "INDEX_TURN_S"):
        monkeypatch.setattr(limits, name, 0.3)
    index = await rig.start()
    await deliver(index, 1)
    box = await mailbox(index)
    postgresql_server.pause()
    try:
        for _ in range(2):
            calls = index.deliver(delivery(2)), index.abort(key(3), []), index.entries(box, 0, 99, 9), index.usage("ann")
            async with asyncio.timeout(WAIT_S):
                answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(answer, IndexTrouble) for answer in answers), answers
    finally:
        postgresql_server.resume()
    for name in ("INDEX_COMMAND_S", "INDEX_CONNECT_S", "INDEX_TURN_S"):
        monkeypatch.setattr(limits, name, WAIT_S)
    assert await index.deliver(delivery(2)) in (Outcome.ENTERED, Outcome.KNOWN)
    assert await uids(index, box) == [1, 2]


# -- which server it is ----------------------------------------------------------------------------------------------------


async def test_a_silent_address_does_not_eat_the_time_of_the_next(rig: PostgresRig) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        parts = urlsplit(rig.url)
        url = f"postgresql://powermail@127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{parts.port}{parts.path}"
        async with another(rig, url) as index:
            await deliver(index, 1)


def test_each_address_of_several_is_one_url() -> None:
    url = "postgresql://u:p@h1:1,h2/db?sslmode=require&target_session_attrs=read-write"
    assert addresses.addresses(url) == [
        "postgresql://u:p@h1:1/db?sslmode=require",
        "postgresql://u:p@h2/db?sslmode=require",
    ]
    with pytest.raises(OperatorError):
        addresses.addresses("mysql://h/db")


async def test_a_server_that_answers_before_it_is_durable_is_refused(rig: PostgresRig) -> None:
    name = urlsplit(rig.url).path[1:]
    async with rig.beside() as beside:
        await beside.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        try:
            with pytest.raises(OperatorError, match="synchronous_commit"):
                await PostgresIndex(rig.world, rig.url).open(CLUSTER)
        finally:
            await beside.execute(f"ALTER DATABASE {name} RESET synchronous_commit")


async def test_a_server_that_takes_no_writes_is_passed_over(rig: PostgresRig) -> None:
    name = urlsplit(rig.url).path[1:]
    async with rig.beside() as beside:
        await beside.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    try:
        with pytest.raises(IndexTrouble, match="takes no writes"):
            await PostgresIndex(rig.world, rig.url).open(CLUSTER)
    finally:
        async with rig.beside() as beside:
            await beside.execute("SET default_transaction_read_only = off")
            await beside.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


async def test_transactions_that_see_one_snapshot_are_refused(rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7: they let a deleted message back in."""
    monkeypatch.setitem(addresses._SETTINGS, "default_transaction_isolation", "repeatable read")
    with pytest.raises(OperatorError, match="READ COMMITTED"):
        await PostgresIndex(rig.world, rig.url).open(CLUSTER)


async def test_a_database_without_tables_is_refused_with_the_command_to_run(rig: PostgresRig, postgresql: Database) -> None:
    with pytest.raises(OperatorError, match="powermail index migrate"):
        await PostgresIndex(rig.world, postgresql.url).open(CLUSTER)
    await migrate(postgresql.url)
    with pytest.raises(OperatorError, match="no cluster"):
        await PostgresIndex(rig.world, postgresql.url).open()
    await migrate(postgresql.url)  # nothing is left to do
    index = PostgresIndex(rig.world, postgresql.url)
    await index.open(CLUSTER)
    assert await index.audit() == []
    await index.close()
    postgresql.sql("UPDATE index_version SET version_num = '99'")
    with pytest.raises(OperatorError, match="version 99"):
        await PostgresIndex(rig.world, postgresql.url).open(CLUSTER)


async def test_a_user_who_may_make_no_tables_is_told_so_in_one_line(postgresql: Database) -> None:
    """As every user is since PostgreSQL 15 who does not own the database."""
    postgresql.sql("CREATE ROLE guest LOGIN")
    try:
        parsed = urlsplit(postgresql.url)
        guest = parsed._replace(netloc=f"guest@{parsed.netloc.rpartition('@')[2]}").geturl()
        with pytest.raises(OperatorError, match="permission denied for schema public") as found:
            await migrate(guest)
        assert "CREATE TABLE" not in str(found.value) and "\n" not in str(found.value)
    finally:
        postgresql.sql("DROP ROLE guest")


async def test_tables_are_made_at_any_address_that_serving_takes(postgresql: Database) -> None:
    """Several hosts, one of them away, with the parameters of an address."""
    parsed = urlsplit(postgresql.url)
    user, _, host = parsed.netloc.rpartition("@")
    several = parsed._replace(netloc=f"{user}@127.0.0.1:1,{host}", query="target_session_attrs=read-write&sslmode=prefer")
    await migrate(several.geturl())
    with pytest.raises(OperatorError, match="cannot be used"):
        await migrate(parsed._replace(netloc=f"{user}@127.0.0.1:1").geturl())


async def test_who_is_cancelled_while_a_connection_is_compared_leaves_none_uncompared(
    rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 10: each new connection compares, whoever uses it first."""
    index, compared = rig.running, []
    compare = index._compare

    async def cancelled_once(link: Any) -> None:
        compared.append(link)
        if len(compared) == 1:
            raise asyncio.CancelledError
        await compare(link)

    monkeypatch.setattr(index, "_compare", cancelled_once)
    for link in index._readers.all:
        link.drop()
    with pytest.raises(asyncio.CancelledError):
        await index.accounts("", 9)
    await index.accounts("", 9)
    assert len(compared) == 2


async def test_a_deadlock_while_a_slot_is_taken_leaves_the_connection_usable(
    rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, asked = rig.running, []

    async def in_the_way_once(db: Any) -> Any:
        asked.append(db)
        if len(asked) == 1:
            with suppress(asyncpg.DivisionByZeroError):
                await db.connection.execute("SELECT 1 / 0")  # the transaction has failed
            raise asyncpg.DeadlockDetectedError("deadlock detected")
        return await find(db)

    monkeypatch.setattr("powermail.index.postgres.connection.find", in_the_way_once)
    for link in index._writers.all:
        link.drop()
    for number in range(1, 9):
        await deliver(index, number)
    assert len(await index.fates([key(number) for number in range(1, 9)])) == 8
    assert len(asked) > 1


async def test_a_database_that_went_back_under_a_process_stops_it_until_a_new_epoch(rig: PostgresRig) -> None:
    """Law 10: a writer slot that is lower than this process left it."""
    index = rig.index
    await deliver(index, 1)
    box, stale = await mailbox(index), await rig.backup()
    await deliver(index, 2)
    await rig.put_back(stale)
    with pytest.raises(IndexLost):
        await index.deliver(delivery(3))
    with pytest.raises(IndexLost):
        await index.expunge(box, [1])
    with pytest.raises(IndexLost):
        await index.find_mailbox("ann", "INBOX")
    assert await index.lost(Mark()) != ""
    await begin_again(index)
    assert await index.lost(Mark()) == ""
    await deliver(index, 3)
    assert (await uids(index, box))[-1] == 2 + JUMP


async def test_a_process_that_only_reads_notices_over_a_new_connection_that_the_database_went_back(
    rig: PostgresRig, wire: Wire
) -> None:
    """Law 10: compared before the first listing."""
    async with another(rig, wire.url(rig.url)) as index:
        await deliver(index, 1)
        stale = await rig.backup()
        await deliver(index, 2)
        await rig.put_back(stale)
        wire.break_all()
        with pytest.raises(IndexLost):
            await index.find_mailbox("ann", "INBOX")
        assert await index.lost(Mark()) != "" and index.unsettled
    assert await rig.index.lost(Mark()) == "", "it wrote nothing that is missing"


async def test_another_process_goes_on_when_one_has_begun_the_new_epoch(rig: PostgresRig) -> None:
    await deliver(rig.index, 1)
    async with another(rig) as other:
        await deliver(other, 2)
        stale = await rig.backup()
        await deliver(other, 3)
        await rig.put_back(stale)
        with pytest.raises(IndexLost):
            await other.deliver(delivery(4))
        await begin_again(rig.index, other.mark())
        await deliver(other, 4)
        assert await other.lost(other.mark()) == ""
        with pytest.raises(IndexTrouble):
            await mailbox(other)
        other.settled()  # it has read what the nodes hold
        assert (await uids(other, await mailbox(other)))[-1] == 3 + JUMP


@pytest.mark.parametrize(("name", "walk"), [("timeline", False), ("system", True)])
async def test_another_history_of_the_database_raises_the_epoch(rig: PostgresRig, name: str, walk: bool) -> None:
    """Law 10: a standby was promoted, or a backup restored. A new timeline alone needs no walk, once nodes were asked; another
    server does.
    """
    index = rig.index
    await deliver(index, 1)
    box = await mailbox(index)
    async with rig.beside() as beside:
        await beside.execute("UPDATE meta SET value = '77' WHERE name = $1", name)
    await rig.die()
    index = await rig.start()
    with pytest.raises(IndexLost):
        await index.deliver(delivery(2))
    with pytest.raises(IndexLost):
        await index.view(box)
    why = await index.lost(index.mark())
    assert "77" in why
    await index.raise_epoch([index.mark()], why, asked=True)
    assert (index.catching_up, index.numbering) == (walk, False)
    assert any(row.owes_walk for row in await index.node_rows()) == walk
    await index.begin_epoch(index.epoch)
    await index.caught_up(index.epoch)
    await deliver(index, 2)
    assert await uids(index, box) == [1, 2 + JUMP]
    await rig.die()
    assert await (await rig.start()).lost(Mark()) == "", "that history is the known one now"


async def test_a_slot_that_was_pruned_under_a_process_is_replaced(rig: PostgresRig) -> None:
    """Law 10: missing, with a number at or below the sequence."""
    index, before = rig.index, rig.index.mark().sequence
    rig.clock.at += limits.SLOT_SILENT_S * 2
    async with another(rig) as other:
        other_rounds = PostgresRig(Path(), 98, rig.url, rig.ids)
        other_rounds.clock.at = rig.clock.at
        await other_rounds.start()
        for _ in range(4):
            await scan_all(other_rounds.index)
        await other_rounds.die()
        assert await other.lost(Mark()) == ""
    await deliver(index, 1)
    assert index.mark().sequence > before and await index.lost(index.mark()) == ""


async def test_random_ids_serve_as_well_as_counted_ones(rig: PostgresRig) -> None:
    index = PostgresIndex(rig.world, rig.url)
    await index.open(CLUSTER)
    index.settled()
    await deliver(index, 1, 2, to=[inbox(), inbox("bob"), elsewhere()])
    boxes = await index.mailboxes(0, 9)
    assert [facts.messages for facts in boxes] == [2, 2] and all(facts.id > 1 << 32 for facts in boxes)
    rows = await index.lease_due("me", rig.clock.at + 9, 60.0, 9)
    assert sorted(row.key for row in rows) == [key(1), key(2)]
    await index.finish(rows)
    assert await index.queue_count() == 0
    await index.close()


async def test_a_connection_that_the_server_ends_in_a_transaction_runs_it_again(rig: PostgresRig) -> None:
    await deliver(rig.index, 1)
    async with rig.beside() as beside:
        lock = beside.transaction()
        await lock.start()
        await beside.execute("SELECT 1 FROM mailboxes FOR UPDATE")
        late = asyncio.ensure_future(rig.index.deliver(delivery(2)))
        async with rig.beside() as watch:
            await blocked(watch)
            await watch.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        await lock.rollback()
        assert await late is Outcome.ENTERED
    with suppress(asyncpg.PostgresError):
        assert await uids(rig.index, await mailbox(rig.index)) == [1, 2]
