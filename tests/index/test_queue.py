"""The queue: leases, finishing, deferring, the operator's hand."""

from __future__ import annotations

from powermail.index.contract import Fate, Index
from tests.index.support import NOW, deliver, elsewhere, inbox, key

LATER = NOW + 1000.0


async def queued(index: Index) -> None:
    """Two messages with three recipients elsewhere."""
    await deliver(index, 2, to=[elsewhere("x@one.example"), elsewhere("y@two.example")])
    await deliver(index, 1, to=[elsewhere("z@one.example"), inbox()])


async def test_rows_say_what_the_commit_record_says(index: Index) -> None:
    await queued(index)
    row = (await index.queue_rows(0, 9))[0]
    assert (row.key, row.destination, row.domain, row.reverse_path, row.recipient) == (
        key(2),
        "x@one.example",
        "one.example",
        "from@example.org",
        "to@example.org",
    )
    assert (row.octets, row.created_at, row.due_at, row.attempts, row.held, row.last_status) == (
        102,
        NOW + 2,
        NOW + 2,
        0,
        False,
        "",
    )


async def test_what_is_due_is_leased_once_and_the_oldest_first(index: Index) -> None:
    await queued(index)
    assert await index.lease_due("me", NOW, 60.0, 9) == []
    assert [row.destination for row in await index.lease_due("me", LATER, 60.0, 2)] == ["z@one.example", "x@one.example"]
    assert [row.destination for row in await index.lease_due("other", LATER, 60.0, 9)] == ["y@two.example"]
    assert await index.lease_due("other", LATER + 59, 60.0, 9) == []
    assert len(await index.lease_due("other", LATER + 60, 60.0, 9)) == 3


async def test_leases_are_given_back(index: Index) -> None:
    await queued(index)
    await index.lease_due("me", LATER, 60.0, 2)
    await index.lease_due("other", LATER, 60.0, 1)
    await index.release_leases("me")
    assert len(await index.lease_due("third", LATER, 60.0, 9)) == 2


async def test_what_is_finished_is_gone_and_may_end_its_message(index: Index) -> None:
    await queued(index)
    rows = await index.lease_due("me", LATER, 60.0, 9)
    await index.finish([row for row in rows if row.key == key(1)])
    await index.finish([row for row in rows if row.destination == "x@one.example"])
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.LIVE, key(2): Fate.LIVE}
    await index.finish(rows)
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.LIVE, key(2): Fate.DEAD}
    assert await index.queue_count() == 0
    facts = await index.message(key(1))
    assert facts is not None
    assert facts.references == 1, "finishing twice takes one reference"


async def test_what_is_deferred_comes_again_when_it_is_due(index: Index) -> None:
    await queued(index)
    rows = await index.lease_due("me", LATER, 60.0, 9)
    await index.defer(rows, [LATER + 10, LATER + 20, LATER + 30], "451 later")
    due = await index.lease_due("me", LATER + 20, 60.0, 9)
    assert [(row.id, row.attempts, row.last_status) for row in due] == [(row.id, 1, "451 later") for row in rows[:2]]


async def test_rows_are_counted_and_listed(index: Index) -> None:
    await queued(index)
    assert (await index.queue_count(), await index.queue_count("one.example"), await index.queue_count("no.example")) == (
        3,
        2,
        0,
    )
    rows = await index.queue_rows(0, 9)
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert [row.id for row in await index.queue_rows(rows[0].id, 1)] == [rows[1].id]
    found = await index.queue_row(rows[1].id)
    assert found is not None
    assert found.destination == rows[1].destination
    assert await index.queue_row(rows[-1].id + 1) is None


async def test_the_operator_holds_releases_and_hurries_rows(index: Index) -> None:
    await queued(index)
    numbers = [row.id for row in await index.queue_rows(0, 9)]
    assert await index.queue_set(numbers[:1], True, None) == 1
    assert len(await index.lease_due("me", LATER, 0.0, 9)) == 2
    assert await index.queue_set([], None, LATER + 500) == 3
    assert await index.lease_due("me", LATER, 0.0, 9) == []
    assert await index.queue_set([*numbers, 999], False, LATER) == 3
    assert len(await index.lease_due("me", LATER, 0.0, 9)) == 3


async def test_the_state_of_the_queue_for_its_checkpoint_is_one_snapshot(index: Index) -> None:
    await queued(index)
    rows = await index.queue_rows(0, 9)
    watermarks, some = await index.queue_state(0, 2)
    assert watermarks == {row.id: (row.incarnation, row.watermark) for row in await index.node_rows()}
    assert some == [(row.id, row.key, row.destination) for row in rows[:2]]
    assert (await index.queue_state(some[-1][0], 9))[1] == [(row.id, row.key, row.destination) for row in rows[2:]]
