"""The queue: leases, finishing, deferring, the operator's hand."""

from __future__ import annotations

from powermail.base import limits
from powermail.index.contract import Attempt, Fate, Index
from powermail.mail.envelope import Target
from tests.index.support import NOW, Rig, deliver, elsewhere, inbox, key

LATER = NOW + 1000.0
TRIED = Attempt(LATER, "hop.example:25", "TLSv1.3 X", 0.5, "451 later")


async def queued(index: Index) -> None:
    """Two messages with three recipients elsewhere."""
    await deliver(index, 2, to=[elsewhere("x@one.example"), elsewhere("y@two.example")])
    await deliver(index, 1, to=[elsewhere("z@one.example"), inbox()])


async def test_rows_say_what_the_commit_record_says(index: Index) -> None:
    await queued(index)
    row = (await index.queue_rows(0, 9))[0]
    assert (row.key, row.destination, row.domain, row.envelope.reverse_path, row.recipient) == (
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


async def test_what_is_due_is_leased_once_and_the_oldest_first(index: Index, rig: Rig) -> None:
    await queued(index)
    assert await index.lease_due("me", NOW, 60.0, 9) == []
    assert [row.destination for row in await index.lease_due("me", LATER, 60.0, 2)] == ["z@one.example", "x@one.example"]
    assert [row.destination for row in await index.lease_due("other", LATER, 60.0, 9)] == ["y@two.example"]
    rig.clock.at += 59
    assert await index.lease_due("other", LATER, 60.0, 9) == []
    rig.clock.at += 1
    assert len(await index.lease_due("other", LATER, 60.0, 9)) == 3


async def test_whatever_a_machine_takes_for_the_time_it_gets_nothing_that_another_has(index: Index) -> None:
    """Leases are dated by the index's own clock; only what is due is asked for by the machine's."""
    await queued(index)
    assert len(await index.lease_due("me", LATER, 60.0, 9)) == 3
    for now in (LATER + 61, LATER + 10 * 365 * 86400.0, NOW + 3):
        assert await index.lease_due("other", now, 60.0, 9) == []


async def test_a_clock_that_ran_ahead_keeps_no_mail_back(index: Index, rig: Rig) -> None:
    """What it dated: when a row is due, and until when somebody has it."""
    year = NOW + 365 * 86400.0
    await queued(index)
    rig.clock.at = year
    assert len(await index.lease_due("dead", year, 60.0, 9)) == 3
    await index.defer((await index.queue_rows(0, 9))[:2], [year + 60.0, NOW + limits.QUEUE_RETRY_MAX_S], TRIED, "dead")
    rig.clock.at = NOW + 9.0
    assert [row.id for row in await index.lease_due("me", NOW + 9.0, 60.0, 9)] == [3, 1], "what is due first, and none twice"
    assert await index.lease_due("me", NOW + 9.0, 60.0, 9) == []


async def test_what_another_has_by_now_is_neither_finished_nor_deferred_nor_given_back(index: Index, rig: Rig) -> None:
    """Who was held up until its lease was over, and somebody else took the rows, changes nothing of them."""
    await queued(index)
    mine = await index.lease_due("me", LATER, 60.0, 9)
    rig.clock.at += 60
    assert [row.id for row in await index.lease_due("other", LATER, 60.0, 9)] == [row.id for row in mine]
    await index.finish(mine, "me")
    await index.defer(mine, [LATER + 9] * 3, TRIED, "me")
    await index.give_back(mine, LATER + 9, "me")
    await index.release_leases("me")
    assert await index.renew_leases("me", [row.id for row in mine], 600.0) == sorted(row.id for row in mine)
    assert await index.lease_due("third", LATER + 10, 60.0, 9) == [], "the other has them still"
    assert [(row.attempts, row.last_status) for row in await index.queue_rows(0, 9)] == [(0, "")] * 3
    assert await index.queue_attempts(mine[0].id) == []
    await index.finish(mine[:1], "other")
    assert await index.queue_count() == 2
    await index.finish(mine)
    assert await index.queue_count() == 0, "the operator's hand asks nobody"


async def test_a_lease_that_is_over_is_still_its_owners_while_nobody_else_took_it(index: Index, rig: Rig) -> None:
    await queued(index)
    mine = await index.lease_due("me", LATER, 60.0, 9)
    rig.clock.at += 500
    assert await index.renew_leases("me", [row.id for row in mine[:1]], 60.0) == []
    await index.defer(mine[1:2], [LATER + 900], TRIED, "me")
    await index.finish(mine[2:], "me")
    rig.clock.at += 59
    assert await index.lease_due("other", LATER, 60.0, 9) == []


async def test_the_oldest_is_that_of_what_is_not_held(index: Index) -> None:
    assert await index.queue_oldest() is None
    await queued(index)
    assert await index.queue_oldest() == NOW + 1
    await index.queue_set([row.id for row in await index.queue_rows(0, 9) if row.key == key(1)], True, None)
    assert await index.queue_oldest() == NOW + 2
    await index.queue_set([row.id for row in await index.queue_rows(0, 9) if row.key == key(2)], True, None)
    assert await index.queue_oldest() is None
    await index.queue_set([row.id for row in await index.queue_rows(0, 9) if row.key == key(2)], False, None)
    for domain in ("one.example", "two.example"):
        await index.hold_domain(domain, True)
    assert await index.queue_oldest() is None, "all is held"
    await index.hold_domain("one.example", False)
    await index.queue_set([], False, None)
    assert await index.queue_oldest() == NOW + 1
    await index.finish(await index.queue_rows(0, 9))
    assert await index.queue_oldest() is None


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
    await index.defer(rows, [LATER + 10, LATER + 20, LATER + 30], TRIED, "me")
    due = await index.lease_due("me", LATER + 20, 60.0, 9)
    assert [(row.id, row.attempts, row.last_status) for row in due] == [(row.id, 1, "451 later") for row in rows[:2]]


async def test_deferring_twice_because_the_answer_was_lost_counts_one_attempt(index: Index) -> None:
    await queued(index)
    rows = await index.lease_due("me", LATER, 60.0, 9)
    rows[0].delay_told = True
    for _ in range(2):
        await index.defer(rows, [LATER + 10] * 3, TRIED, "me")
    found = {row.id: (row.attempts, row.delay_told) for row in await index.queue_rows(0, 9)}
    assert found == {row.id: (1, row is rows[0]) for row in rows}
    assert await index.queue_attempts(rows[0].id) == [TRIED]


async def test_the_last_attempts_are_remembered_and_go_with_their_row(index: Index) -> None:
    await queued(index)
    for number in range(limits.QUEUE_ATTEMPTS_KEPT + 3):
        (row,) = await index.lease_due("me", LATER + number, 0.0, 1)
        await index.defer([row], [0.0], TRIED._replace(at=float(number)), "me")
    attempts = await index.queue_attempts(row.id)
    assert [attempt.at for attempt in attempts] == [float(number) for number in range(3, limits.QUEUE_ATTEMPTS_KEPT + 3)]
    await index.finish([row])
    assert await index.queue_attempts(row.id) == []


async def test_what_was_not_tried_comes_again_without_an_attempt(index: Index) -> None:
    await queued(index)
    rows = await index.lease_due("me", LATER, 60.0, 9)
    await index.give_back(rows, LATER + 10, "me")
    assert await index.lease_due("me", LATER + 9, 60.0, 9) == []
    assert [row.attempts for row in await index.lease_due("me", LATER + 10, 60.0, 9)] == [0, 0, 0]


async def test_leases_are_renewed_row_by_row(index: Index, rig: Rig) -> None:
    """What was leased in an answer that got lost is in nobody's hand, and comes again."""
    await queued(index)
    first, second = await index.lease_due("me", LATER, 60.0, 2)
    rig.clock.at += 50
    assert await index.renew_leases("me", [first.id, 999], 60.0) == []
    rig.clock.at += 10
    assert {row.id for row in await index.lease_due("other", LATER, 60.0, 9)} == {second.id, 6 - first.id - second.id}
    assert await index.renew_leases("me", [first.id, second.id], 60.0) == [second.id]


async def test_nothing_leaves_for_a_held_domain_whatever_comes_for_it(index: Index) -> None:
    await index.hold_domain("one.example", True)
    await index.hold_domain("one.example", True)
    await queued(index)
    assert await index.held_domains() == ["one.example"]
    assert [row.domain for row in await index.lease_due("me", LATER, 0.0, 9)] == ["two.example"]
    assert await index.lease_due("me", LATER, 0.0, 9, ["two.example"]) == []
    await index.hold_domain("one.example", False)
    assert len(await index.lease_due("me", LATER, 0.0, 9)) == 3
    assert {row.domain for row in await index.lease_due("me", LATER, 0.0, 9, ["two.example"])} == {"one.example"}


async def test_a_sender_behind_a_token_is_found_until_its_time_is_over(index: Index) -> None:
    token = Target(destination="x@one.example", reverse_path="SRST=abc@ours.example", original="long@sender.example")
    await deliver(index, 1, to=[token])
    over = NOW + 1 + limits.RETURN_S
    assert await index.find_return("srst=ABC@ours.example", over - 1) == "long@sender.example"
    assert await index.find_return("srst=abc@ours.example", over) is None
    assert await index.find_return("srst=abd@ours.example", NOW) is None
    await deliver(index, 3, to=[token])
    assert await index.forget_returns(over) == 0, "it was used again meanwhile"
    assert await index.forget_returns(over + 2) == 1
    assert await index.find_return("srst=abc@ours.example", NOW) is None


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
    plan = await index.queue_plan(2)
    assert plan.watermarks == {row.id: (row.incarnation, row.watermark) for row in await index.node_rows()}
    assert plan.rows == [(row.id, row.key, row.destination) for row in rows[:2]]
    assert await index.queue_open(plan.rows[-1][0], 9) == [(row.id, row.key, row.destination) for row in rows[2:]]
