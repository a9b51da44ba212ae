"""Rebuilding an index from the nodes alone: nothing that was acknowledged is lost, nothing deleted comes back (law 13, P15)."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import zstandard

from powermail.base import limits
from powermail.base.errors import NotRedundant
from powermail.index.contract import CheckpointPlan, Fate, FlagChange, Outcome, QueuePlan
from powermail.index.rebuilding import Found
from powermail.index.sqlite import SqliteIndex
from powermail.index.view import View
from powermail.keeper.checkpoint import heads, pages_of, write_purged
from powermail.keeper.checkpoint_form import Kind, RecordHead, decode_head, encode_queue, encode_whole, record_name
from powermail.keeper.rebuild import decide
from powermail.mail.envelope import Target
from powermail.storage.contract import NO_RANK, Held, Mark, Origin, Rank
from tests.index.support import commit, elsewhere, inbox, key
from tests.keeper.installation import Installation, entries, held, numbers, shown


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Installation]:
    """An installation that runs, on either index."""
    installation = Installation(tmp_path, sqlite=request.param == "sqlite")
    await installation.start()
    yield installation
    await installation.stop()


async def archive(place: Installation, account: str = "ann") -> int:
    """A second mailbox, so far empty."""
    return (await place.index.make_mailbox(account, "Archive")).id


# -- what mailboxes show ----------------------------------------------------------------------------------------------------


async def test_mailboxes_come_back_with_uids_flags_keywords_and_order(place: Installation) -> None:
    for number in range(1, 21):
        await place.deliver(number, inbox(flags=number % 2), inbox("bob", "Lists"))
    mailbox = await place.mailbox()
    bit = await place.index.keyword(mailbox, "$Label")
    await place.checkpoint()
    await place.index.store(mailbox, await place.uids(3, 5), FlagChange.ADD, bit, None)
    await place.expunge(7, account="bob", name="Lists")
    await place.deliver(21)
    await place.checkpoint()  # a tail
    before = [await place.index.view(await place.mailbox(*box)) for box in (("ann", "INBOX"), ("bob", "Lists"))]
    done = await place.rebuild()
    after = [await place.index.view(await place.mailbox(*box)) for box in (("ann", "INBOX"), ("bob", "Lists"))]
    for old, new in zip(before, after, strict=True):
        assert list(new.rows()) == list(old.rows())
        assert new.uidvalidity == old.uidvalidity
    assert await place.index.keywords(await place.mailbox()) == {"$Label": bit}
    assert (done.mailboxes, done.messages, done.entries_lost, done.unreadable) == (2, 21, 0, 0)


async def test_what_came_behind_the_checkpoint_is_entered_once(place: Installation) -> None:
    await place.deliver(1)
    await place.checkpoint()
    await place.deliver(2)
    await place.store(3)  # acknowledged while the index did not answer
    await place.rebuild()
    assert await shown(place.index) == [1, 2, 3]
    await place.settle_logs()
    assert await shown(place.index) == [1, 2, 3]


async def test_a_data_that_lasted_minutes_is_not_deleted_by_rebuild(place: Installation) -> None:
    """Its key and its date are from long before the checkpoint, in which it is not."""
    await place.deliver(5)
    began = place.clock.wall - 3600.0
    await place.checkpoint()
    late = await place.store(1, at=began)
    assert await place.index.deliver(late) is Outcome.ENTERED
    await place.rebuild()
    assert await shown(place.index) == [5, 1]
    assert await held(place, 1) == [Held.LIVE, Held.LIVE]


async def test_a_clock_that_ran_ahead_deletes_nothing(place: Installation) -> None:
    await place.deliver(1)
    place.clock.wall += 10 * 365 * 86400.0
    await place.checkpoint()
    place.clock.wall -= 10 * 365 * 86400.0
    await place.deliver(2)
    await place.store(3)
    done = await place.rebuild()
    assert await shown(place.index) == [1, 2, 3]
    assert done.deleted == 0
    assert await held(place, 2) == [Held.LIVE, Held.LIVE]


async def test_an_index_that_was_locked_while_a_checkpoint_was_written_loses_nothing(place: Installation) -> None:
    """Messages that only nodes have heard of, before and behind the checkpoint."""
    await place.store(1)
    await place.deliver(2)
    await place.store(3)
    await place.checkpoint()
    await place.store(4)
    await place.rebuild()
    assert sorted(await shown(place.index)) == [1, 2, 3, 4]


async def test_rebuilding_twice_gives_the_same(place: Installation) -> None:
    for number in range(1, 6):
        await place.deliver(number)
    await place.checkpoint()
    await place.expunge(2)
    await place.tell_nodes()
    await place.rebuild()
    first = await numbers(place)
    await place.lose_index()
    await place.rebuild()
    assert list(await numbers(place)) == list(first) == [1, 3, 4, 5]


# -- numbers -------------------------------------------------------------------------------------------------------------


async def test_a_mailbox_without_checkpoint_gets_a_fresh_uidvalidity(place: Installation) -> None:
    await place.deliver(1, inbox("bob"))
    await place.deliver(2)
    known = {facts.uidvalidity for facts in await place.index.mailboxes(0, 10)}
    await place.checkpointer.write_mailbox(await place.mailbox("bob"))
    await place.rebuild()
    facts = await place.index.find_mailbox("ann", "INBOX")
    other = await place.index.find_mailbox("bob", "INBOX")
    assert facts is not None and other is not None
    assert facts.uidvalidity > max(known)
    assert other.uidvalidity in known


async def test_no_number_is_given_twice_after_a_rebuild(place: Installation) -> None:
    await place.deliver(1)
    await place.checkpoint()
    await place.deliver(2)  # numbered, and never checkpointed
    used = await numbers(place)
    modseq = (await place.index.mailboxes(0, 1))[0].modseq
    await place.rebuild()
    again = await numbers(place)
    assert again[1] == used[1]
    assert again[2] > used[2] + limits.EPOCH_JUMP - 10
    facts = (await place.index.mailboxes(0, 1))[0]
    assert facts.modseq > modseq + limits.EPOCH_JUMP - 10
    mailbox = await place.mailbox()
    changed = await place.index.store(mailbox, [again[1]], FlagChange.ADD, 1, None)
    assert changed.modseq > facts.modseq


async def test_a_mailbox_that_missed_epochs_jumps_for_each_of_them(place: Installation) -> None:
    """Since its checkpoint it may have got JUMP numbers in each epoch (law 11)."""
    await place.deliver(1)
    await place.checkpoint()
    await place.nodes["c"].put_mark(Mark(epoch=5))
    await place.deliver(2)
    await place.rebuild()
    assert (await numbers(place))[2] >= 5 * limits.EPOCH_JUMP
    assert place.index.epoch == 6


async def test_the_new_epoch_is_durable_on_nodes_before_the_index_is_served(place: Installation) -> None:
    await place.deliver(1)
    await place.nodes["c"].put_mark(Mark(sequence=7, slots={6: ("tag", 3), 7: ("gat", 2)}, epoch=1))
    for name in ("a", "b"):
        place.nodes[name].fail_next("put_mark")
    with pytest.raises(NotRedundant):
        await place.rebuilder().run()
    assert not place.path.exists()
    await place.rebuild()
    marks = [(await node.facts()).mark for node in place.nodes.values()]
    assert {mark.epoch for mark in marks} == {place.index.epoch}
    assert [await place.index.lost(mark) for mark in marks] == [""] * len(marks)  # nothing proves a loss of the new index
    assert place.index.epoch > 1


async def test_numbers_of_an_incomplete_checkpoint_count(place: Installation) -> None:
    """Its parts prove that these numbers were given, although what it shows is not known."""
    await place.deliver(1)
    await place.checkpoint()
    for number in range(2, 40):
        await place.deliver(number)
    mailbox = await place.mailbox()
    plan = await place.index.checkpoint_plan(mailbox)
    assert plan is not None
    for node in place.nodes.values():  # one part of two
        record = await part_of_two(place, mailbox)
        await node.put_checkpoint(b"z" * 16, 0, record, place.index.mark())
    top = max((await numbers(place)).values())
    await place.rebuild()
    facts = (await place.index.mailboxes(0, 1))[0]
    assert min(uid for number, uid in (await numbers(place)).items() if number > 1) >= top + limits.EPOCH_JUMP
    assert facts.uid_next > top + limits.EPOCH_JUMP


async def test_each_record_jumps_from_its_own_epoch_and_the_farthest_counts(place: Installation) -> None:
    """Law 11: what an earlier epoch shows may reach farther than the later record of an index that knew less."""
    await place.deliver(1)
    await place.checkpoint()
    mailbox = await place.mailbox()
    for name, epoch, more in ((b"y" * 16, 2, 1000), (b"z" * 16, 3, 10)):
        await place.nodes["c"].put_checkpoint(name, 0, await part_of_two(place, mailbox, 0, epoch, more), place.index.mark())
    uid_next = (await place.index.mailboxes(0, 1))[0].uid_next
    await place.store(2)
    await place.rebuild()
    assert place.index.epoch == 4
    assert (await numbers(place))[2] == max(uid_next + 1000 + 2 * limits.EPOCH_JUMP, uid_next + 3 * limits.EPOCH_JUMP)
    assert (await numbers(place))[1] == 1


async def test_what_too_few_groups_show_of_numbers_is_durable_before_a_rebuilt_index_goes_on_from_it(
    place: Installation,
) -> None:
    """Law 11: else the next rebuild, which may have to do without that node, would give the same numbers again."""
    await place.deliver(1)
    await place.checkpoint()
    far = await part_of_two(place, await place.mailbox(), more=limits.EPOCH_JUMP)
    await place.nodes["c"].put_checkpoint(b"z" * 16, 0, far, place.index.mark())
    await place.rebuild()
    await place.deliver(2)
    used = (await numbers(place))[2]
    assert used > 2 * limits.EPOCH_JUMP
    await place.lose_index()
    await place.rebuild(without=["c"])
    await place.deliver(3)
    assert (await numbers(place))[3] > used


async def part_of_two(place: Installation, mailbox: int, uidvalidity: int = 0, epoch: int = 0, more: int = 0) -> bytes:
    """The first record of a whole checkpoint, of which the second was never written, `more` numbers later than now."""
    facts = next(facts for facts in await place.index.mailboxes(0, 10) if facts.id == mailbox)
    facts = facts._replace(uid_next=facts.uid_next + more, modseq=facts.modseq + more)
    view = View(uidvalidity or facts.uidvalidity, facts.uid_next, facts.modseq)
    view.arrive((uid, key(uid), 0, 1, 1, 0.0) for uid in range(1, 2 + limits.VIEW_PART_ROWS))
    view.uid_next = facts.uid_next
    plan = CheckpointPlan(facts, True, facts.modseq, 0, (), (), False, epoch=epoch or place.index.epoch)
    records = encode_whole(plan, view, {}, b"half", 0.0)
    assert len(records) == 2
    return records[0]


async def test_a_later_uidvalidity_without_a_complete_checkpoint_means_a_fresh_one(place: Installation) -> None:
    await place.deliver(1)
    await place.checkpoint()
    facts = (await place.index.mailboxes(0, 1))[0]
    octets = await part_of_two(place, facts.id, facts.uidvalidity + 7)
    await place.nodes["a"].put_checkpoint(b"z" * 16, 0, octets, place.index.mark())
    await place.rebuild()
    again = (await place.index.mailboxes(0, 1))[0]
    assert again.uidvalidity > facts.uidvalidity + 7
    assert await shown(place.index) == [1]


# -- which checkpoint counts ------------------------------------------------------------------------------------------------


async def test_a_delta_rewritten_for_the_same_base_replaces_the_older(place: Installation) -> None:
    for number in range(1, 31):
        await place.deliver(number)
    await place.checkpoint()
    for number in (31, 32, 33):  # three tails of one whole
        await place.deliver(number)
        await place.expunge(number - 30)
        await place.checkpoint()
        used = await numbers(place)
    await place.rebuild()
    assert await numbers(place) == used
    assert list(used) == list(range(4, 34))


async def test_a_tail_that_was_not_finished_leaves_the_one_before(place: Installation) -> None:
    for number in range(1, 31):
        await place.deliver(number)
    await place.checkpoint()
    await place.deliver(31)
    await place.checkpoint()
    used = await numbers(place)
    await place.deliver(32)
    for node in place.nodes.values():
        node.fail_next("put_checkpoint", times=20)
    with pytest.raises(NotRedundant):
        await place.checkpoint()
    await place.rebuild()
    again = await numbers(place)
    assert {number: uid for number, uid in again.items() if number < 32} == used
    assert 32 in again


async def test_a_bad_record_makes_way_for_the_copy_on_another_node(place: Installation) -> None:
    for number in range(1, 4):
        await place.deliver(number)
    await place.expunge(2)
    await place.tell_nodes()
    await place.checkpoint()
    used = await numbers(place)
    holding = [node for node in place.nodes.values() if [page async for page in heads(node) if page]]
    assert len(holding) == 2
    async for page in pages_of(holding[0]):
        for name, number, octets in page:
            await holding[0].put_checkpoint(name, number, octets[:-3] + b"bad", place.index.mark(), Rank(9))
    done = await place.rebuild()
    assert await numbers(place) == used
    assert done.records_bad


# -- what is deleted ----------------------------------------------------------------------------------------------------------


async def test_a_tombstone_on_one_node_deletes_everywhere(place: Installation) -> None:
    await place.deliver(1)
    await place.deliver(2)
    await place.checkpoint()
    await place.expunge(1)
    mark = place.index.mark()
    await place.nodes["a"].delete(await place.index.orders("a", 10), mark, place.clock.wall)
    done = await place.rebuild()
    assert await shown(place.index) == [2]
    assert await held(place, 1) == [Held.DEAD, Held.DEAD]
    assert (done.deleted, done.entries_lost) == (1, 0)


async def test_a_message_expunged_from_all_its_mailboxes_stays_deleted_without_tombstones(place: Installation) -> None:
    for number in range(1, 31):
        await place.deliver(number, inbox("ann"), inbox("bob"))
    await place.checkpoint()
    await place.expunge(7, account="ann")
    await place.checkpoint()
    await place.expunge(7, account="bob")  # the last reference: nodes are to be told, and never are
    await place.checkpoint()
    await place.rebuild()
    for account in ("ann", "bob"):
        assert 7 not in await shown(place.index, account)
    assert await place.index.fates([key(7)]) == {key(7): Fate.DEAD}
    assert await held(place, 7) == [Held.DEAD, Held.DEAD]


async def test_what_one_account_deleted_stays_deleted_while_another_keeps_it(place: Installation) -> None:
    for number in range(1, 4):
        await place.deliver(number, inbox("ann"), inbox("bob"))
    await place.expunge(2, account="ann")
    await place.checkpoint()  # a whole one
    await place.rebuild()
    assert await shown(place.index, "ann") == [1, 3]
    assert await shown(place.index, "bob") == [1, 2, 3]
    await place.checkpoint()  # of the rebuilt index: it knows what to name
    await place.lose_index()
    await place.rebuild()
    assert await shown(place.index, "ann") == [1, 3]


async def test_what_is_dead_stays_deleted_though_no_node_knows_and_another_mailbox_has_no_checkpoint(
    place: Installation,
) -> None:
    """Law 13: its last reference went in an account that was never written; the tombstones are ordered, and nobody has one."""
    await place.deliver(1, inbox("ann"), inbox("bob"))
    await place.deliver(2)
    await place.expunge(1, account="ann")
    await place.expunge(1, account="bob")
    mailbox = await place.mailbox()
    await place.checkpointer.write(await place.index.checkpoint_plan(mailbox, whole=True))
    await place.rebuild()
    assert await shown(place.index) == [2]
    assert await shown(place.index, "bob") == [1], "it may show again where no checkpoint tells of it"


@pytest.mark.parametrize("tail", [False, True])
async def test_a_deletion_that_no_node_confirmed_is_not_undone_by_a_rebuild(place: Installation, tail: bool) -> None:
    """Also not by the one after it: the new index names what is dead as long as tombstones are ordered (law 13)."""
    for number in range(1, 31):
        await place.deliver(number)
    if tail:
        await place.checkpoint()
    await place.deliver(31)
    await place.expunge(7, 31)
    await place.checkpoint()
    left = [number for number in range(1, 31) if number != 7]
    await place.rebuild()
    assert await shown(place.index) == left
    assert await place.checkpoint() == 1  # nothing shows them, and no node knows that they are dead
    assert [(await place.nodes["a"].has([key(7)]))[0]] == [Held.LIVE]
    await place.lose_index()
    await place.rebuild()
    assert await shown(place.index) == left
    assert await held(place, 7) == await held(place, 31) == [Held.DEAD, Held.DEAD]


async def test_only_what_is_named_is_deleted(place: Installation) -> None:
    """Deleted behind the last checkpoint, and no node was told: nobody can know, so it is there again."""
    await place.deliver(1)
    await place.deliver(2)
    await place.checkpoint()
    await place.expunge(1)
    await place.rebuild()
    assert await shown(place.index) == [1, 2]


async def test_a_moved_message_is_never_lost_between_two_checkpoints(place: Installation) -> None:
    """It moves twice; whichever mailbox is written at whichever moment, it is in one of them."""
    names = ("INBOX", "Archive", "Trash")
    orders = [order for writes in (1, 2, 3) for order in itertools.product(names, repeat=writes)]
    for number, order in enumerate(orders):
        again = Installation(place.path.parent, 100 + number, isinstance(place.index, SqliteIndex))
        again.path = place.path.with_name("-".join(order) + ".db")
        await again.start()
        await again.deliver(1, inbox("ann"), inbox("bob"))
        for name in names[1:]:
            await again.index.make_mailbox("ann", name)
        await again.checkpoint()
        for step, name in enumerate(order):
            if step == 0:
                await again.index.move(await again.mailbox(), await again.uids(1), await again.mailbox(name="Archive"))
            if step == 1:
                archived = await again.uids(1, name="Archive")
                await again.index.move(await again.mailbox(name="Archive"), archived, await again.mailbox(name="Trash"))
            plan = await again.index.checkpoint_plan(await again.mailbox(name=name))
            await again.checkpointer.write(plan)
        await again.rebuild()
        places = [name for name in names if 1 in await shown(again.index, "ann", name)]
        assert places, order
        assert await shown(again.index, "bob") == [1]
        await again.stop()


@pytest.mark.parametrize("order", list(itertools.permutations(("INBOX", "Archive", "Trash"), 2)))
async def test_a_message_that_moved_on_is_in_exactly_one_mailbox_before_the_last_one_is_written(
    place: Installation, order: tuple[str, str]
) -> None:
    """INBOX to Archive, which is written, to Trash; then two of the three are written, whose checkpoints wait for each other:
    in each of Archive and Trash lies a message that came from the other one.
    """
    await place.deliver(1)
    await place.deliver(2, inbox(mailbox="Trash"))
    boxes = {name: (await place.index.make_mailbox("ann", name)).id for name in ("INBOX", "Archive", "Trash")}
    await place.index.move(boxes["INBOX"], await place.uids(1), boxes["Archive"])
    await place.checkpoint()
    await place.index.move(boxes["Archive"], await place.uids(1, name="Archive"), boxes["Trash"])
    await place.index.move(boxes["Trash"], await place.uids(2, name="Trash"), boxes["Archive"])
    for name in order:
        await place.checkpointer.write(await place.index.checkpoint_plan(boxes[name]))
    await place.rebuild()
    found = {number: [name for name in boxes if number in await shown(place.index, "ann", name)] for number in (1, 2)}
    assert len(found[1]) >= 1 and len(found[2]) >= 1, "never nowhere"
    if "Archive" in order:
        assert len(found[1]) == 1, f"{found}: what Archive showed before was replaced"


async def test_checkpoints_that_wait_for_each_other_name_all_in_the_end(place: Installation) -> None:
    """Law 13: three mailboxes that move messages in a circle; a few rounds of the keeper, and none is owed any more."""
    names = ("INBOX", "Archive", "Trash")
    boxes = {name: (await place.index.make_mailbox("ann", name)).id for name in names}
    for number in range(1, 7):
        await place.deliver(number, inbox(mailbox=names[number % 3]))
    await place.checkpoint()
    for _ in range(2):
        for source, there in zip(names, (*names[1:], names[0]), strict=True):
            first = (await place.uids(*range(1, 7), name=source))[:1]
            await place.index.move(boxes[source], first, boxes[there])
    before = {name: sorted(await shown(place.index, "ann", name)) for name in names}
    for _ in range(4):
        await place.checkpoint()
    assert [await place.index.checkpoint_plan(box) for box in boxes.values()] == [None, None, None]
    await place.rebuild()
    assert {name: sorted(await shown(place.index, "ann", name)) for name in names} == before


async def test_a_copy_whose_mailbox_has_no_checkpoint_yet_is_not_lost(place: Installation) -> None:
    """COPY and EXPUNGE, as clients without MOVE do; the mailbox it went to was never written."""
    await place.deliver(1, inbox("ann"), inbox("bob"))
    await place.checkpoint()
    await place.index.copy(await place.mailbox(), await place.uids(1), await archive(place))
    await place.expunge(1)
    await place.checkpointer.write(await place.index.checkpoint_plan(await place.mailbox()))
    await place.rebuild()
    assert await shown(place.index, "ann") + await shown(place.index, "ann", "Archive") == [1]


async def test_a_moved_message_is_where_it_was_moved_to(place: Installation) -> None:
    await place.deliver(1)
    await place.deliver(2)
    await archive(place)
    await place.checkpoint()
    await place.index.move(await place.mailbox(), await place.uids(1), await archive(place))
    await place.checkpoint()
    await place.rebuild()
    assert await shown(place.index) == [2]
    assert await shown(place.index, "ann", "Archive") == [1]


async def test_the_rebuilt_index_knows_what_its_checkpoints_must_name(place: Installation) -> None:
    """Once what is gone and lives on, never what is there again."""
    for number in range(1, 31):
        await place.deliver(number, inbox("ann"), inbox("bob"))
    there = await archive(place)
    await place.expunge(3)
    await place.index.move(await place.mailbox(), await place.uids(1, 2), there)
    await place.checkpoint()
    await place.checkpoint()  # INBOX names what moved, now that Archive is written
    await place.index.move(there, await place.uids(1, name="Archive"), await place.mailbox())
    await place.index.copy(there, await place.uids(2, name="Archive"), await place.mailbox())
    await place.checkpointer.write(await place.index.checkpoint_plan(await place.mailbox()))
    await place.rebuild()
    assert [number for number in (1, 2, 3) if number in await shown(place.index)] == [1, 2]
    plan = await place.index.checkpoint_plan(await place.mailbox())
    assert plan is not None
    assert (plan.gone, plan.left) == ((key(3),), (key(3),))


async def test_a_rebuilt_index_does_not_know_who_holds_the_checkpoints_it_was_made_from(place: Installation) -> None:
    """They may lie on one node alone, and it may be the next that goes (P15): all are written anew, before any other."""
    await place.deliver(1, inbox("ann"), inbox("bob"))
    await place.checkpoint()
    assert await place.index.thin_checkpoints() == 0
    await place.rebuild()
    assert await place.index.thin_checkpoints() == 2
    await place.checkpoint()
    assert await place.index.thin_checkpoints() == 0


async def test_what_is_entered_again_is_not_named_as_gone(place: Installation) -> None:
    await place.deliver(1, inbox("ann"), inbox("bob"))
    await place.checkpoint()
    await place.index.copy(await place.mailbox(), await place.uids(1), await archive(place))
    await place.expunge(1)
    await place.checkpointer.write(await place.index.checkpoint_plan(await place.mailbox()))
    await place.rebuild()
    assert await shown(place.index) == [1]
    plan = await place.index.checkpoint_plan(await place.mailbox())
    assert plan is not None and plan.gone == ()


async def test_a_purged_account_stays_purged(place: Installation) -> None:
    await place.deliver(1, inbox("ann"), inbox("bob"))
    await place.deliver(2, inbox("ann"))
    await place.checkpoint()
    await write_purged(place.world, place.cluster, place.index, "ann")
    done = await place.rebuild()
    assert await place.index.find_mailbox("ann", "INBOX") is None
    assert await shown(place.index, "bob") == [1]
    assert await place.index.purged("", 10) == ["ann"]
    assert await held(place, 2) == [Held.DEAD, Held.DEAD]
    assert done.deleted == 1


# -- the queue --------------------------------------------------------------------------------------------------------------


async def waiting(place: Installation) -> list[tuple[int, str, bool]]:
    """(message, destination, held) of the queue."""
    rows = await place.index.queue_rows(0, 100)
    return [(int.from_bytes(row.key, "big"), row.destination, row.held) for row in rows]


async def test_a_forward_that_the_queue_state_knows_as_done_is_not_sent_again(place: Installation) -> None:
    await place.deliver(1, elsewhere("sent@example.net"), elsewhere("waits@example.net"))
    await place.deliver(2, elsewhere("sent@example.net"))
    rows = await place.index.queue_rows(0, 100)
    await place.index.finish([row for row in rows if row.destination == "sent@example.net"])
    await place.settle_logs()
    await place.checkpoint()
    node = place.nodes["a"]
    record, chunk = await node.read_commit(key(2)), await node.read_chunk(key(2), 0)
    await place.nodes["c"].commit(key(2), [chunk], record, 1, None, Origin.REPAIR)  # behind no watermark yet: the others tell
    done = await place.rebuild()
    assert await waiting(place) == [(1, "waits@example.net", True)]
    assert done.held_rows == 1
    assert await held(place, 2) == [Held.DEAD, Held.DEAD]


@pytest.mark.parametrize("rank", [NO_RANK, Rank(1, 0, 1)], ids=["of the release before", "of a keeper that slept"])
async def test_the_newest_state_of_the_queue_says_what_waits(place: Installation, rank: Rank) -> None:
    """Law 13: an older one knows nothing of it, on whatever node and in whatever order they are found."""
    await place.deliver(1, elsewhere())
    await place.settle_logs()
    marks = (await place.index.queue_plan(9)).watermarks
    await place.checkpoint()
    older = encode_queue(QueuePlan(rank, 0, marks, []), [], 0, 1, b"8 octets", 5.0)
    for node in place.nodes.values():
        name = record_name(Kind.QUEUE, "", "", 0)
        await node.put_checkpoint(name, 0, older, place.index.mark(), rank)
    assert {head.modseq for head in await queue_heads(place)} == {rank.modseq, 2}
    await place.rebuild()
    assert await waiting(place) == [(1, "far@example.net", True)]


async def queue_heads(place: Installation) -> list[RecordHead]:
    """Of all states of the queue that nodes have."""
    found = []
    for node in place.nodes.values():
        async for page in pages_of(node):
            found += [head for _, _, octets in page if (head := decode_head(octets)).kind is Kind.QUEUE]
    return found


async def test_a_forward_that_nobody_knows_is_held_for_the_operator(place: Installation) -> None:
    await place.settle_logs()
    await place.checkpoint()
    await place.deliver(1, inbox(), elsewhere())  # behind the watermarks of the queue's state
    await place.rebuild()
    assert await waiting(place) == [(1, "far@example.net", True)]
    assert await shown(place.index) == [1]


async def test_a_watermark_of_another_incarnation_says_nothing(place: Installation) -> None:
    """An older disk came back and took mail at places that the queue's state knows as settled, of another log."""
    node = place.nodes["a"]
    older = node.snapshot()
    for number in range(1, 10):
        await place.store(number, inbox("bob"), nodes=("a",))
    await place.settle_logs()
    watermark = next(row.watermark for row in await place.index.node_rows() if row.id == "a")
    await place.checkpoint()
    await node.close()
    node.put_back(older)
    await node.open()
    await node.rebirth()
    receipt = (await place.store(20, elsewhere(), nodes=("a",))).receipts[0]
    assert receipt.position < watermark
    await place.rebuild()
    assert await waiting(place) == [(20, "far@example.net", True)]


async def test_forwards_that_only_an_older_disk_holds_are_not_sent_again(place: Installation) -> None:
    await place.deliver(1, elsewhere())
    await place.index.finish(await place.index.queue_rows(0, 10))
    for name in ("a", "b"):
        await place.nodes[name].rebirth()
    await place.rebuild()
    assert await waiting(place) == []  # law 12: nothing before the birth mark is entered


# -- the first release --------------------------------------------------------------------------------------------------------


def first(
    since: int, modseq: int, uids: Sequence[int], expunged: Sequence[int] = (), part: int = 0, last: bool = True
) -> bytes:
    """A record as the first release wrote it."""
    body = {
        "account": "ann", "name": "INBOX", "uidvalidity": 77, "uid_next": 50, "modseq": modseq, "since": since,
        "at": float(modseq), "part": part, "last": last, "entries": [[uid, key(uid).hex(), 0, 2, 10, 0.0] for uid in uids],
        "expunged": list(expunged),
    }  # fmt: skip
    return zstandard.ZstdCompressor().compress(msgspec.json.encode(body))


async def test_checkpoints_of_the_first_release_are_read(place: Installation) -> None:
    for number in range(1, 10):
        await place.store(number)
    mark = Mark()
    whole, other = b"w" * 16, b"o" * 16
    for name in ("a", "b"):
        await place.nodes[name].put_checkpoint(whole, 0, first(0, 10, [1, 2], last=False), mark)
        await place.nodes[name].put_checkpoint(whole, 1, first(0, 10, [3, 4], part=1), mark)
        await place.nodes[name].put_checkpoint(bytes(16), 0, b"123", mark)
    await place.nodes["c"].put_checkpoint(other, 2, first(10, 12, [5], [1]), mark)
    await place.nodes["c"].put_checkpoint(other, 3, first(10, 13, [5, 6], [1, 2]), mark)  # written again for the same base
    await place.nodes["c"].put_checkpoint(other, 4, first(13, 15, [7]), mark)
    done = await place.rebuild()
    again = await numbers(place)
    assert [number for number, uid in again.items() if number == uid] == [3, 4, 5, 6, 7]
    assert sorted(again) == [3, 4, 5, 6, 7, 8, 9]
    assert min(again[8], again[9]) > limits.EPOCH_JUMP
    assert done.records_bad == 0
    assert await place.index.fates([key(1)]) == {key(1): Fate.DEAD}


# -- chance -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
async def test_whatever_was_done_nothing_acknowledged_is_lost_and_nothing_confirmed_comes_back(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    place = Installation(tmp_path, seed, sqlite=seed % 2 == 0)
    await place.start()
    accounts, names = ("ann", "bob"), ("INBOX", "Archive", "Trash")
    for account in accounts:
        for name in names:
            await place.index.make_mailbox(account, name)
    number = 0
    for _ in range(120):
        deed = chance.random()
        account, name = chance.choice(accounts), chance.choice(names)
        here = await place.mailbox(account, name)
        uids = [entry.uid for entry in await entries(place.index, account, name)]
        some = chance.sample(uids, min(len(uids), chance.randint(1, 3)))
        if deed < 0.4:
            number += 1
            to = [inbox(each) for each in accounts if chance.random() < 0.7] or [inbox()]
            await place.deliver(number, *to, nodes=chance.sample(sorted(place.nodes), 2))
        elif deed < 0.55 and some:
            await place.index.expunge(here, some)
        elif deed < 0.7 and some:
            there = await place.mailbox(account, chance.choice([each for each in names if each != name]))
            await (place.index.move if chance.random() < 0.6 else place.index.copy)(here, some, there)
        elif deed < 0.8 and some:
            await place.index.store(here, some, FlagChange.ADD, 1 << chance.randint(0, 4), None)
        elif deed < 0.9:
            await place.checkpointer.write(await place.index.checkpoint_plan(here))
        elif deed < 0.95:
            await place.tell_nodes()
        else:
            await place.checkpoint()
    final = chance.random() < 0.5
    if final:
        await place.tell_nodes()
        for _ in range(4):  # what moved in a circle takes more than one
            await place.checkpoint()
        assert await place.checkpoint() == 0
    before = {(account, name): await numbers(place, account, name) for account in accounts for name in names}
    await place.rebuild()
    after = {(account, name): await numbers(place, account, name) for account in accounts for name in names}
    for account in accounts:
        had = {each for name in names for each in before[account, name]}
        has = {each for name in names for each in after[account, name]}
        assert had <= has, f"lost by {account}: {had - has}"
        if final:
            assert has == had, f"back at {account}: {has - had}"
    if final:
        assert {box: sorted(found) for box, found in after.items()} == {box: sorted(found) for box, found in before.items()}
    await place.stop()


def test_of_what_only_an_older_disk_has_one_target_says_nothing_of_the_others() -> None:
    """Law 12: its commit is no new mail, and no reason for a tombstone: a node that was left out may have the message."""
    ann, bob, away = inbox("ann"), inbox("bob"), elsewhere()

    def fate(*targets: Target, old: bool, settled: int = 0, purged: Sequence[str] = (), gone: str = "INBOX") -> Fate | None:
        found = Found(key(1), ("c",), False, old, settled, (), (("ann", gone, True),), frozenset())
        return decide(found, commit(1, *targets), purged).fate

    assert fate(ann, bob, old=True) is None and fate(ann, bob, old=False) is Fate.LIVE
    assert fate(bob, away, old=True, settled=1) is None, "it was sent, and bob may have it"
    assert fate(ann, away, old=True) is None, "it may wait to be sent"
    assert fate(ann, old=True) is Fate.DEAD and fate(ann, away, old=True, settled=1) is Fate.DEAD, "nothing of it is left"
    assert fate(ann, bob, old=True, purged=["bob"]) is Fate.DEAD
    assert fate(ann, old=True, gone="Archive") is Fate.DEAD, "it was moved there, and then the account had it nowhere any more"
