"""What only the index on SQLite has: a file of the first release, its fast path, a locked file, a slot that is not its own."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble, OperatorError
from powermail.base.lane import Lane
from powermail.base.log import MemoryLog
from powermail.base.world import system_world
from powermail.index.contract import Fate, FlagChange, Outcome
from powermail.index.sqlite import SqliteIndex
from powermail.storage.contract import START, Held, Position
from tests.fixtures import release_1
from tests.index.support import (
    CLUSTER,
    NOW,
    SqliteRig,
    admit,
    commit,
    deliver,
    delivery,
    elsewhere,
    end_of,
    inbox,
    key,
    mailbox,
    place,
    reconcile,
    scan_all,
    uids,
    walk_all,
)


@pytest_asyncio.fixture
async def rig(room: Path) -> AsyncIterator[SqliteRig]:
    """An installation on SQLite with three nodes; its audit is clean at the end."""
    installation = SqliteRig(room)
    await installation.start()
    await admit(installation.index)
    yield installation
    assert await installation.index.audit() == []
    await installation.die()


@contextmanager
def file_of(rig: SqliteRig) -> Iterator[sqlite3.Connection]:
    """The file, as somebody else opens it."""
    with closing(sqlite3.connect(rig.path, isolation_level=None)) as database:
        yield database


@contextmanager
def statements(index: SqliteIndex) -> Iterator[list[str]]:
    """What the writing lane runs meanwhile; statements of triggers are left out."""
    seen: list[str] = []
    index._db.set_trace_callback(lambda text: None if text.startswith("--") else seen.append(text))
    yield seen
    index._db.set_trace_callback(None)


# -- the first release ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", release_1.VARIANTS)
async def test_an_index_of_the_first_release_opens_with_all_it_showed(room: Path, variant: str) -> None:
    rig, facts = SqliteRig(room), release_1.facts(variant)
    rig.path = release_1.unpack(room, variant) / "index.db"
    index = await rig.start()
    for box in facts.mailboxes.values():
        found = await index.find_mailbox(box.account, "INBOX")
        assert found is not None and (found.uidvalidity, found.uid_next) == (box.uidvalidity, box.uid_next)
        shown = await index.entries(found.id, 0, 2**32, 100)
        assert [(entry.uid, entry.key.hex()) for entry in shown] == [(uid, name) for uid, name, _ in box.entries]
        assert found.id in await index.checkpoint_due(NOW + 1e9, 100), "none that was written is one of this version"
    assert [(row.id, row.key.hex(), row.held) for row in await index.queue_rows(0, 100)] == [
        (row.id, row.key, row.held) for row in facts.queue
    ]
    believed = {row.key.hex(): list(row.nodes) for row in await index.messages([bytes.fromhex(name) for name in facts.copies])}
    assert believed == facts.copies
    for row in await index.node_rows():
        assert row.owes_compare and row.incarnation == facts.nodes[row.id].incarnation
        assert START < row.watermark == row.end_seen
    assert await index.audit() == []
    await rig.die()


async def test_numbers_leap_once_behind_the_first_release(room: Path) -> None:
    rig, facts = SqliteRig(room), release_1.facts("killed")
    rig.path = release_1.unpack(room, "killed") / "index.db"
    index = await rig.start()
    old = next(iter(facts.mailboxes.values()))
    await admit(index)
    await deliver(index, 1, to=[inbox(old.account)])
    box = await mailbox(index, old.account)
    assert (await uids(index, box))[-1] == old.uid_next + limits.UNCLEAN_JUMP, "it said nowhere that it stopped"
    await rig.die()


async def test_what_the_first_release_had_decided_stays_decided(room: Path) -> None:
    rig, facts = SqliteRig(room), release_1.facts("stopped")
    rig.path = release_1.unpack(room, "stopped") / "index.db"
    live = bytes.fromhex(next(iter(facts.copies)))
    with file_of(rig) as database:
        database.execute("INSERT INTO aborted VALUES (?, 1.0)", (key(1),))
        database.executemany("INSERT INTO deletions VALUES (?, ?)", [("a", key(2)), ("b", key(2)), ("a", live)])
        database.execute("INSERT INTO suspects VALUES (?, 'c', 'bad')", (live,))
    index = await rig.start()
    assert await index.fates([key(1), key(2), live]) == {key(1): Fate.ABORTED, key(2): Fate.DEAD, live: Fate.LIVE}
    assert await index.orders("c", 9) == [key(1)], "any node may have been asked"
    assert [await index.orders("a", 9), await index.orders("b", 9)] == [[key(1), key(2)]] * 2
    assert await index.suspects("c", b"", 9) == [live]
    with file_of(rig) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert not tables & {"expunged", "deletions", "aborted"} and not any(name.startswith("first_") for name in tables)
    await rig.stop()
    index = await rig.start()  # what was brought on is opened like any other
    assert (await index.node_rows())[0].owes_compare
    await rig.die()


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(rig: SqliteRig) -> None:
    await rig.die()
    with file_of(rig) as database:
        database.execute("UPDATE meta SET value = '3' WHERE name = 'version'")
    newer = SqliteIndex(rig.world, str(rig.path))
    with pytest.raises(OperatorError, match="newer"):
        await newer.open(CLUSTER)
    await newer.close()
    with file_of(rig) as database:
        database.execute("UPDATE meta SET value = '2' WHERE name = 'version'")
    await rig.start()


async def test_a_file_that_is_no_database_is_refused_with_what_to_do(room: Path) -> None:
    rig = SqliteRig(room)
    rig.path.write_bytes(b"no database" * 1000)
    broken = SqliteIndex(rig.world, str(rig.path))
    with pytest.raises(OperatorError, match="powermail rebuild"):
        await broken.open(CLUSTER)
    await broken.close()


# -- delivering -------------------------------------------------------------------------------------------------------------


async def test_a_batch_in_which_nothing_is_new_is_one_statement_and_counts_as_one_transaction(rig: SqliteRig) -> None:
    index = rig.running
    await deliver(index, 1, 2)
    before = index.mark().slots
    with statements(index) as seen:
        await deliver(index, 3, 4, 5)
    assert [text.split()[0] for text in dict.fromkeys(seen)] == ["SELECT", "INSERT"], "each is named again for its triggers"
    [(number, (tag, count))] = before.items()
    assert index.mark().slots == {number: (tag, count + 1)}, "law 10"
    assert await uids(index, await mailbox(index)) == [1, 2, 3, 4, 5]


async def test_the_first_arrival_behind_a_checkpoint_makes_the_next_one_due_in_the_fast_path_too(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, 2)
    box = await mailbox(index)
    plan = await index.checkpoint_plan(box)
    assert plan is not None
    await index.checkpoint_done(plan, ["a", "b"], NOW)
    assert await index.checkpoint_due(NOW + 1e6, 9) == []
    await deliver(index, 3)
    await deliver(index, 4)
    assert await index.checkpoint_due(NOW + limits.CHECKPOINT_INTERVAL_S, 9) == [box]


async def test_one_bad_delivery_harms_no_other_in_its_transaction(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1)
    bad = delivery(2)
    bad = bad._replace(commit=commit(2, inbox(flags=1 << 64)))
    outcomes = await asyncio.gather(
        index.deliver(delivery(3)), index.deliver(bad), index.deliver(delivery(4)), return_exceptions=True
    )
    assert outcomes[0] is outcomes[2] is Outcome.ENTERED
    assert isinstance(outcomes[1], IndexTrouble)
    assert await index.fates([key(2)]) == {}
    assert await uids(index, await mailbox(index)) == [1, 2, 3]


async def test_deliveries_beyond_the_bound_are_refused_at_once(rig: SqliteRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INDEX_WAITING_MAX", 3)
    index = rig.index
    waiting = [index.deliver(delivery(number)) for number in (1, 2, 3)]
    with pytest.raises(IndexTrouble):
        index.deliver(delivery(4))
    assert await asyncio.gather(*waiting) == [Outcome.ENTERED] * 3
    assert await index.deliver(delivery(4)) is Outcome.ENTERED


async def test_deliveries_to_a_locked_file_fail_together_and_enter_later(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.stop()
    monkeypatch.setattr(limits, "INDEX_BUSY_TIMEOUT_S", 0.0)
    index = await rig.start()
    await deliver(index, 1)
    with file_of(rig) as other:
        other.execute("BEGIN IMMEDIATE")
        for some in ([2], [3, 4, 5]):  # by the fast path and not
            outcomes = await asyncio.gather(
                *[index.deliver(delivery(each, inbox(), inbox(f"{each}"))) for each in some], return_exceptions=True
            )
            assert all(isinstance(outcome, IndexTrouble) for outcome in outcomes)
        other.execute("ROLLBACK")
    await deliver(index, 2, 3, 4, 5)
    assert await uids(index, await mailbox(index)) == [1, 2, 3, 4, 5]


async def test_closing_finishes_what_waits(rig: SqliteRig) -> None:
    index = rig.index
    waiting = [index.deliver(delivery(number)) for number in (1, 2)]
    await rig.die()
    assert [future.result() for future in waiting] == [Outcome.ENTERED] * 2
    await rig.start()


async def test_usage_is_exact_while_deliveries_come(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1)
    assert await index.usage("ann") == 101
    await deliver(index, 2, 3)
    assert await index.usage("ann") == 101 + 102 + 103
    await index.expunge(await mailbox(index), [1])
    assert await index.usage("ann") == 102 + 103


# -- what only this process writes ------------------------------------------------------------------------------------------


async def test_a_file_that_is_replaced_under_the_process_stops_it_until_a_new_epoch(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1)
    box = await mailbox(index)
    with file_of(rig) as database:
        database.execute("UPDATE writers SET count = count - 1 WHERE stopped = 0")
    with pytest.raises(IndexTrouble):
        await index.deliver(delivery(2))
    with pytest.raises(IndexLost):
        await index.expunge(box, [1])
    with pytest.raises(IndexLost):
        await index.view(box)
    assert await index.lost(index.mark()) != ""
    await index.raise_epoch([], await index.lost(index.mark()))
    await index.begin_epoch(index.epoch)
    await walk_all(index)
    assert await index.lost(index.mark()) == ""
    await deliver(index, 2)
    assert (await uids(index, box))[-1] == 2 + limits.EPOCH_JUMP


async def test_an_epoch_that_could_not_be_raised_leaves_the_writer_slot_as_it_was(rig: SqliteRig) -> None:
    index = rig.index
    before = index.mark()
    with file_of(rig) as database:
        database.execute("CREATE TRIGGER broken BEFORE DELETE ON writers BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(IndexTrouble):
        await index.raise_epoch([], "a test says so")
    assert index.mark() == before and index.numbering and not index.catching_up
    with file_of(rig) as database:
        database.execute("DROP TRIGGER broken")
    await deliver(index, 1)


async def test_a_look_at_a_queue_with_nothing_due_is_no_transaction(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, to=[elsewhere()])
    before = index.mark()
    assert await index.lease_due("me", NOW, 60, 9) == []
    assert index.mark() == before
    assert len(await index.lease_due("me", NOW + 1, 60, 9)) == 1


async def test_a_store_that_fails_leaves_no_trace_in_memory(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, 2)
    box = await mailbox(index)
    await index.store(box, [1], FlagChange.ADD, 1, None)
    with file_of(rig) as database:
        database.execute("CREATE TRIGGER broken BEFORE INSERT ON changes BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(IndexTrouble):
        await index.store(box, [1, 2], FlagChange.ADD, 2, None)
    with file_of(rig) as database:
        database.execute("DROP TRIGGER broken")
    assert (await index.store(box, [1, 2], FlagChange.ADD, 2, None)).changed == (1, 2)
    assert list((await index.view(box)).flags) == [3, 2]


# -- what is found by an index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "by"),
    [
        ("SELECT id FROM mailboxes WHERE due_at > 0 AND due_at <= 9 ORDER BY due_at, id LIMIT 50", "mailboxes_due"),
        ("SELECT id FROM mailboxes WHERE holders = 3 AND holders > 0 ORDER BY id LIMIT 50", "mailboxes_held"),
        ("SELECT key FROM messages WHERE fate = 1 AND placement = 3 AND key > x'00' ORDER BY key LIMIT 9", "messages_live"),
        ("SELECT round, key FROM messages WHERE fate > 1 AND (round, key) > (1, x'00') ORDER BY round, key", "messages_dead"),
        ("SELECT count(*) FROM messages WHERE fate > 1", "messages_dead"),
        ("DELETE FROM gone WHERE key = x'00'", "gone_key"),
    ],
)
async def test_nothing_is_looked_for_in_all_rows(rig: SqliteRig, statement: str, by: str) -> None:
    with file_of(rig) as database:
        plan = " ".join(row[-1] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}"))
    assert by in plan and "TEMP B-TREE" not in plan, plan


async def test_a_node_is_expelled_without_a_look_at_messages(rig: SqliteRig) -> None:
    index = rig.running
    await deliver(index, *range(1, 20))
    with statements(index) as seen:
        await index.expel("b")
    assert not any(text.startswith("UPDATE messages") for text in seen)
    assert {facts.nodes for facts in await index.under_copied({"a": "north", "c": "west"}, 2, b"", 99)} == {("a",)}
    await deliver(index, 20, nodes=("a",))
    assert await index.copies_on("b", b"", 99) == []


async def test_forgetting_goes_on_behind_what_waits_for_a_node(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, *range(1, 31))
    await index.expunge(await mailbox(index), list(range(1, 31)))
    await index.confirm_orders("a", [key(number) for number in range(1, 31)], end_of("a"))
    await index.confirm_orders("b", [key(number) for number in range(11, 31)], end_of("b"))
    await scan_all(index)
    assert [await index.forget(7) for _ in range(4)] == [7, 7, 6, 0]
    await index.confirm_orders("b", [key(number) for number in range(1, 11)], end_of("b"))
    assert [await index.forget(7) for _ in range(3)] == [7, 3, 0]


# -- walks and comparisons --------------------------------------------------------------------------------------------------


async def test_the_way_from_a_key_to_its_entries_is_there_while_a_walk_is_owed_only(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, 2)
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    await index.settle_inventory("a", end_of("a"), [(key(1), Held.DEAD, START)], START, {}, True)
    question = "SELECT count(*) FROM sqlite_master WHERE name = 'entries_by_key'"
    with file_of(rig) as database:
        assert database.execute(question).fetchone() == (1,)
    await walk_all(index)
    with file_of(rig) as database:
        assert database.execute(question).fetchone() == (0,)
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.DEAD, key(2): Fate.LIVE}
    assert await index.orders("a", 9) == await index.orders("b", 9) == [key(1)]


async def test_a_tombstone_met_by_reconcile_before_the_walk_kills_and_proves_nothing_new(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, 2)
    await index.raise_epoch([], "a test says so")
    await index.begin_epoch(index.epoch)
    found = await reconcile(index, "a", Position(2, 0), tombstones=[1])
    assert found.moved and not found.lost
    assert await index.fates([key(1)]) == {key(1): Fate.DEAD}
    await walk_all(index)


async def test_a_comparison_that_the_first_release_owes_drops_orphans_and_deletes_nothing(rig: SqliteRig) -> None:
    index = rig.index
    await deliver(index, 1, 2)
    await reconcile(index, "a", Position(2, 0))
    await rig.stop()
    with file_of(rig) as database:
        database.execute("UPDATE nodes SET owes_compare = 1 WHERE id = 'a'")
    index = await rig.start()
    items = [
        (key(1), Held.DEAD, START),  # aborted there before the index was asked, and stored elsewhere
        (key(2), Held.LIVE, place(2)),
        (key(3), Held.LIVE, place(3)),  # a repaired copy that nobody knows
        (key(4), Held.LIVE, Position(2, 1)),  # reconcile's
    ]
    assert (await index.settle_inventory("a", end_of("a"), items, START, {}, False)).moved
    assert [(drop.key, drop.position) for drop in await index.drops("a", 9)] == [(key(3), place(3))]
    assert [facts.nodes for facts in await index.messages([key(1), key(2)])] == [("b",), ("a", "b")]
    await index.note_compared("a")
    assert not any(row.owes_compare for row in await index.node_rows())
    assert (await index.settle_inventory("a", end_of("a"), items[:1], START, {}, False)).lost


async def test_a_proof_counts_what_was_committed_behind_the_back_of_the_copy_in_memory(room: Path) -> None:
    """Law 10: a reading lane may see a transaction before the process knows that it is committed; the mark must count it."""
    rig = SqliteRig(room)
    index = await rig.start()
    await admit(index)
    mark = index.mark()
    with closing(sqlite3.connect(rig.path)) as other:
        other.execute("UPDATE writers SET count = count + 1 WHERE id = ?", (mark.sequence,))
        other.execute("INSERT INTO orders VALUES ('a', ?)", (key(1),))
        other.commit()
        assert await index.orders("a", 9) == [key(1)] and index.mark() == mark
        proof = await index.proof(index.connection)
        tag, count = mark.slots[mark.sequence]
        assert proof.slots == {**mark.slots, mark.sequence: (tag, count + 1)}
        assert (proof.epoch, proof.sequence, proof.uidvalidity) == (mark.epoch, mark.sequence, mark.uidvalidity)
        other.execute("UPDATE writers SET count = 0")
        other.commit()
    with pytest.raises(IndexLost):
        await index.proof(index.connection)
    await rig.die()


async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort that was given up on while the file was locked: what becomes of it is asked again, not left to the collector."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    index, gate = SqliteIndex(system_world(MemoryLog()), str(room / "own.db")), threading.Event()
    await index.open(CLUSTER)

    def fail(*_: Any) -> None:
        gate.wait(10)
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(index, "_in_transaction", fail)
        asked = asyncio.ensure_future(index.abort(key(1), ["a"]))
        while not index._under_way:
            await asyncio.sleep(0)
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
        gate.set()
        while index._under_way:
            await asyncio.sleep(0)
    gc.collect()
    assert complaints == []
    await index.close()


class Failing:
    """A lane whose call number `at` fails as on a file that is away, wherever that is."""

    def __init__(self, lane: Lane) -> None:
        self.at = self.calls = 0
        self._lane = lane

    def run(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self.calls += 1
        return self._lane.run(self._fail) if self.calls == self.at else self._lane.run(call, *args)

    def _fail(self) -> None:
        raise sqlite3.OperationalError("database is locked")

    def waiting(self) -> int:
        return self._lane.waiting()

    def close(self) -> None:
        self._lane.close()


@pytest.mark.parametrize("which", ["_read_lane", "_write_lane"])
async def test_whichever_call_of_a_lane_fails_it_is_trouble_of_the_index(rig: SqliteRig, which: str) -> None:
    """What only computes runs there too."""
    index = rig.index
    assert isinstance(index, SqliteIndex)
    await deliver(index, *range(1, 9))
    box = await mailbox(index)
    lane = Failing(getattr(index, which))
    setattr(index, which, lane)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "merge": lambda: index.merge(box),
        "view": lambda: index.view(box),
        "entries": lambda: index.entries(box, 0, 99, 99),
        "plan": lambda: index.checkpoint_due(NOW + 1e6, 9),
        "deliver": lambda: index.deliver(delivery(20)),
        "expunge": lambda: index.expunge(box, [1]),
        "copy": lambda: index.copy(box, [2], box),
        "lease": lambda: index.lease("scrub a", "one", 9.0),
    }
    failed = 0
    for name, call in calls.items():
        for at in range(1, 9):
            lane.at, lane.calls = at, 0
            try:
                await call()
            except IndexTrouble as error:
                assert "locked" in str(error), name
                failed += 1
            if lane.calls < at:
                break
    assert failed >= 5
    lane.at = 0
