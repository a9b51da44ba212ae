"""What mailboxes show: views and their tails, STORE, COPY, MOVE, EXPUNGE, merges, purging; and that all agree (P5, P7, P10)."""

from __future__ import annotations

import asyncio
import random

import pytest

from powermail.base import limits
from powermail.index import laws
from powermail.index.contract import Fate, FlagChange, Index, Release, Stored
from powermail.index.view import Op, View
from tests.index.support import (
    MemoryRig,
    PostgresRig,
    Rig,
    SqliteRig,
    admit,
    deliver,
    elsewhere,
    inbox,
    key,
    mailbox,
    numbers_of,
    uids,
)

SEEN, FLAGGED, DRAFT = 1, 2, 4


async def flags(index: Index, box: int) -> dict[int, int]:
    view = await index.view(box)
    return dict(zip(view.uids, view.flags, strict=True))


# -- finding and listing ------------------------------------------------------------------------------------------------


async def test_a_mailbox_is_there_once_something_was_delivered_to_it(index: Index) -> None:
    assert await index.find_mailbox("ann", "INBOX") is None
    await deliver(index, 1, 2)
    facts = await index.find_mailbox("ann", "INBOX")
    assert facts is not None
    assert (facts.account, facts.name, facts.uid_next, facts.messages, facts.octets) == ("ann", "INBOX", 3, 2, 203)
    assert facts.uidvalidity > 0


async def test_a_mailbox_is_made_once(index: Index) -> None:
    made = await index.make_mailbox("ann", "Sent")
    assert (made.name, made.uid_next, made.messages) == ("Sent", 1, 0)
    assert await index.make_mailbox("ann", "Sent") == made
    assert await index.find_mailbox("ann", "Sent") == made
    other = await index.make_mailbox("ann", "Trash")
    assert other.uidvalidity != made.uidvalidity


async def test_mailboxes_and_accounts_are_listed_in_order(index: Index) -> None:
    await deliver(index, 1, to=[inbox("bob"), inbox("ann"), inbox("ann", "Work")])
    facts = await index.mailboxes(0, 9)
    assert [each.id for each in facts] == sorted(each.id for each in facts)
    assert [each.id for each in await index.mailboxes(facts[0].id, 1)] == [facts[1].id]
    assert await index.accounts("", 9) == [("ann", 2, 202), ("bob", 1, 101)]
    assert await index.accounts("ann", 9) == [("bob", 1, 101)]
    assert await index.accounts("", 1) == [("ann", 2, 202)]
    assert (await index.usage("ann"), await index.usage("nobody")) == (202, 0)


async def test_usage_follows_what_comes_and_goes(index: Index) -> None:
    await deliver(index, 1)
    assert await index.usage("ann") == 101
    await deliver(index, 2)
    assert await index.usage("ann") == 203
    await index.expunge(await mailbox(index), [1])
    assert await index.usage("ann") == 102


async def test_entries_are_listed_between_bounds_as_they_were_delivered(index: Index) -> None:
    await deliver(index, 1, 2, 3, 4, to=[inbox(flags=FLAGGED)])
    box = await mailbox(index)
    await index.store(box, [2], FlagChange.REPLACE, SEEN, None)
    found = await index.entries(box, 1, 4, 9)
    assert [entry.uid for entry in found] == [2, 3]
    assert [entry.flags for entry in found] == [FLAGGED, FLAGGED], "later changes are in the view"
    assert [entry.uid for entry in await index.entries(box, 0, 99, 2)] == [1, 2]


# -- STORE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"), [(FlagChange.REPLACE, DRAFT), (FlagChange.ADD, SEEN | DRAFT), (FlagChange.REMOVE, SEEN)]
)
async def test_store_changes_flags_as_it_says(index: Index, how: FlagChange, expected: int) -> None:
    await deliver(index, 1, 2, to=[inbox(flags=SEEN)])
    box = await mailbox(index)
    stored = await index.store(box, [1], how, DRAFT, None)
    assert await flags(index, box) == {1: expected, 2: SEEN}
    assert stored.changed == ((1,) if expected != SEEN else ())


async def test_store_is_one_change_whatever_its_size_and_only_of_what_really_changes(index: Index) -> None:
    await deliver(index, *range(1, 51))
    box = await mailbox(index)
    first = await index.store(box, [3, 7], FlagChange.ADD, SEEN, None)
    before = await index.view(box)
    stored = await index.store(box, [7, 50, 1, 1, 3, 99], FlagChange.ADD, SEEN, None)
    assert stored == Stored(first.modseq + 1, (1, 50), ())
    tail = await index.tail(box, before.modseq, before.uid_next)
    assert tail is not None
    assert [(change.modseq, change.op, change.flags, change.uids) for change in tail.changes] == [
        (stored.modseq, Op.ADD_FLAGS, SEEN, (1, 50))
    ]
    view = await index.view(box)
    modseqs = dict(zip(view.uids, view.modseqs, strict=True))
    assert modseqs[1] == modseqs[50] == stored.modseq
    assert modseqs[3] == modseqs[7] == first.modseq


async def test_a_store_that_changes_nothing_uses_no_number(index: Index) -> None:
    await deliver(index, 1, to=[inbox(flags=SEEN)])
    box = await mailbox(index)
    before = await index.view(box)
    assert await index.store(box, [1, 2], FlagChange.ADD, SEEN, None) == Stored(0, (), ())
    assert (await index.view(box)).modseq == before.modseq


async def test_unchangedsince_leaves_alone_what_changed_since(index: Index) -> None:
    """RFC 7162 §3.1.3."""
    await deliver(index, 1, 2, 3)
    box = await mailbox(index)
    known = (await index.view(box)).modseq
    first = await index.store(box, [2], FlagChange.ADD, SEEN, known)
    stored = await index.store(box, [1, 2, 3], FlagChange.ADD, FLAGGED, known)
    assert (stored.changed, stored.conflicts) == ((1, 3), (2,))
    assert await flags(index, box) == {1: FLAGGED, 2: SEEN, 3: FLAGGED}
    again = await index.store(box, [2], FlagChange.ADD, SEEN, known)
    assert again == Stored(0, (), (2,)), "also when nothing would change"
    assert (await index.store(box, [2], FlagChange.ADD, FLAGGED, first.modseq)).changed == (2,)


async def test_a_mailbox_that_is_gone_is_a_key_error(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    with pytest.raises(KeyError):
        await index.view(box + 7)
    with pytest.raises(KeyError):
        await index.store(box + 7, [1], FlagChange.ADD, SEEN, None)
    with pytest.raises(KeyError):
        await index.copy(box, [1], box + 7)
    with pytest.raises(KeyError):
        await index.move(box, [1], box + 7)
    assert await numbers_of(index, box) == [1]


async def test_keywords_have_bits_of_their_own_until_all_are_used(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    bits = {f"word{number}": await index.keyword(box, f"word{number}") for number in range(limits.KEYWORDS_MAX)}
    assert sorted(bits.values()) == [laws.keyword_flag(number) for number in range(limits.KEYWORDS_MAX)]
    assert await index.keyword(box, "word3") == bits["word3"]
    assert await index.keywords(box) == bits
    with pytest.raises(ValueError, match="keyword"):
        await index.keyword(box, "one-more")
    await index.store(box, [1], FlagChange.ADD, bits["word47"] | SEEN, None)
    await index.merge(box)
    assert await flags(index, box) == {1: bits["word47"] | SEEN}


async def test_a_copy_keeps_its_keywords_by_name(index: Index) -> None:
    await deliver(index, 1)
    box, to = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await index.keyword(to, "first")
    bit = await index.keyword(box, "junk")
    await index.store(box, [1], FlagChange.ADD, bit | FLAGGED, None)
    await index.copy(box, [1], to)
    there = (await index.keywords(to))["junk"]
    assert there != bit
    assert await flags(index, to) == {1: there | FLAGGED}


# -- COPY, MOVE, EXPUNGE ------------------------------------------------------------------------------------------------


async def test_copies_come_in_order_with_their_flags_and_one_more_reference(index: Index) -> None:
    await deliver(index, 1, 2, 3)
    box, to = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await index.store(box, [3], FlagChange.ADD, SEEN, None)
    assert await index.copy(box, [3, 1, 9], to) == [(1, 1), (3, 2)]
    assert await index.copy(box, [9], to) == []
    assert await numbers_of(index, to) == [1, 3]
    assert await flags(index, to) == {1: 0, 2: SEEN}
    facts = await index.messages([key(1), key(2), key(3)])
    assert [each.references for each in facts] == [2, 1, 2]
    assert await index.expunge(box, [1, 2, 3]) == Release(3, 1)
    assert await index.fates([key(1), key(2)]) == {key(1): Fate.LIVE, key(2): Fate.DEAD}


async def test_a_copy_within_a_mailbox_is_a_second_entry(index: Index) -> None:
    await deliver(index, 1)
    box = await mailbox(index)
    assert await index.copy(box, [1], box) == [(1, 2)]
    assert await numbers_of(index, box) == [1, 1]
    assert await index.expunge(box, [1]) == Release(1, 0)
    assert await index.expunge(box, [2]) == Release(1, 1)


async def test_a_move_leaves_and_arrives_in_one(index: Index) -> None:
    """RFC 6851 §3.3: never both, never neither."""
    await deliver(index, 1, 2)
    box, to = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    before = await index.view(box)
    assert await index.move(box, [2, 7], to) == [(2, 1)]
    assert (await numbers_of(index, box), await numbers_of(index, to)) == ([1], [2])
    tail = await index.tail(box, before.modseq, before.uid_next)
    assert tail is not None
    assert [(change.op, change.uids) for change in tail.changes] == [(Op.EXPUNGE, (2,))]
    facts = await index.message(key(2))
    assert facts is not None
    assert facts.references == 1
    assert await index.orders_total("a") == (0, 0)
    assert await index.move(box, [7], to) == []


async def test_what_was_expunged_stays_away(index: Index) -> None:
    await deliver(index, 1, 2, 3)
    box = await mailbox(index)
    assert await index.expunge(box, [2, 3, 9, 2]) == Release(2, 2)
    assert await index.expunge(box, [2, 3]) == Release(0, 0)
    assert await uids(index, box) == [1]
    await deliver(index, 4)
    assert await uids(index, box) == [1, 4], "the highest UID is not given again when its message is gone (P10)"
    facts = await index.find_mailbox("ann", "INBOX")
    assert facts is not None
    assert (facts.messages, facts.octets) == (2, 101 + 104)


async def test_nothing_is_copied_of_what_is_gone(index: Index) -> None:
    await deliver(index, 1)
    box, to = await mailbox(index), (await index.make_mailbox("ann", "Work")).id
    await index.expunge(box, [1])
    assert await index.copy(box, [1], to) == []
    assert await numbers_of(index, to) == []
    assert await index.fates([key(1)]) == {key(1): Fate.DEAD}


async def test_many_are_expunged_at_once(index: Index) -> None:
    await deliver(index, *range(1, 601))
    box = await mailbox(index)
    assert await index.expunge(box, range(1, 601)) == Release(600, 600)
    assert await index.orders_total("a") == (600, 0)


# -- views, tails, merges, notices ------------------------------------------------------------------------------------------


async def test_a_tail_brings_a_view_to_where_the_mailbox_is(index: Index) -> None:
    await deliver(index, 1, 2, 3)
    box = await mailbox(index)
    view = await index.view(box)
    await deliver(index, 4, 5)
    await index.store(box, [2, 5], FlagChange.ADD, SEEN, None)
    await index.expunge(box, [1, 4])
    tail = await index.tail(box, view.modseq, view.uid_next)
    assert tail is not None
    assert [entry.uid for entry in tail.entries] == [5]
    view.follow(tail.facts.uid_next, tail.facts.modseq, tail.entries, tail.changes)
    now = await index.view(box)
    assert list(view.rows()) == list(now.rows())
    assert (view.uid_next, view.modseq) == (now.uid_next, now.modseq)
    nothing = await index.tail(box, view.modseq, view.uid_next)
    assert nothing is not None
    assert (nothing.entries, nothing.changes) == ([], [])


async def test_a_tail_whose_changes_were_trimmed_is_none(index: Index) -> None:
    """Without this look a session goes on from changes it never saw."""
    await deliver(index, 1, 2)
    box = await mailbox(index)
    old = await index.view(box)
    await index.store(box, [1], FlagChange.ADD, SEEN, None)
    now = await index.view(box)
    assert await index.merge(box)
    assert await index.tail(box, old.modseq, old.uid_next) is None
    tail = await index.tail(box, now.modseq, now.uid_next)
    assert tail is not None
    assert tail.changes == []
    assert list((await index.view(box)).rows()) == list(now.rows())
    assert not await index.merge(box), "there is nothing left to fold"


async def test_a_merged_view_goes_on(index: Index) -> None:
    await deliver(index, *range(1, 30))
    box = await mailbox(index)
    await index.store(box, [1, 2], FlagChange.ADD, SEEN, None)
    await index.merge(box)
    await index.expunge(box, [1])
    await deliver(index, 30)
    await index.store(box, [2, 30], FlagChange.ADD, FLAGGED, None)
    view = await index.view(box)
    assert list(view.uids) == list(range(2, 31))
    assert (view.flags[0], view.flags[-1]) == (SEEN | FLAGGED, FLAGGED)


async def test_the_change_notice_names_what_has_more_and_what_is_gone(index: Index) -> None:
    await deliver(index, 1, to=[inbox(), inbox("bob"), inbox("cat")])
    boxes = [await mailbox(index, account) for account in ("ann", "bob", "cat")]
    known = {box: (await index.view(box)).modseq for box in boxes}
    assert await index.changed(known) == []
    await index.store(boxes[1], [1], FlagChange.ADD, SEEN, None)
    await index.purge("cat")
    assert sorted(await index.changed(known)) == boxes[1:]
    assert await index.changed({}) == []


# -- purging ------------------------------------------------------------------------------------------------------------


async def test_a_purge_takes_an_account_and_nothing_else(index: Index) -> None:
    await deliver(index, 1, to=[inbox(), inbox("bob"), inbox("ann", "Work")])
    await deliver(index, 2, 3)
    await deliver(index, 4, to=[inbox(), elsewhere()])
    assert await index.purge("ann") == Release(5, 2)
    assert await index.find_mailbox("ann", "INBOX") is None
    assert await numbers_of(index, await mailbox(index, "bob")) == [1]
    assert await index.fates([key(n) for n in (1, 2, 4)]) == {key(1): Fate.LIVE, key(2): Fate.DEAD, key(4): Fate.LIVE}
    assert await index.purge("ann") == Release(0, 0)
    assert await index.accounts("", 9) == [("bob", 1, 101)]


async def test_a_name_that_comes_again_has_another_uidvalidity(index: Index) -> None:
    """P10."""
    await deliver(index, 1)
    before = await index.find_mailbox("ann", "INBOX")
    await index.purge("ann")
    await deliver(index, 2)
    after = await index.find_mailbox("ann", "INBOX")
    assert before is not None
    assert after is not None
    assert after.uidvalidity > before.uidvalidity
    assert after.id != before.id


async def test_the_address_of_an_account_is_remembered_until_it_gets_another(index: Index) -> None:
    assert await index.owners(["7"]) == {}
    await index.note_owners({"7": "ann@example.org", "8": "bob@example.org"})
    await index.note_owners({"8": "bert@example.org"})
    assert await index.owners(["8", "9", "7"]) == {"7": "ann@example.org", "8": "bert@example.org"}


async def test_purged_accounts_are_remembered(index: Index) -> None:
    for account in ("cat", "ann", "bob", "ann"):
        await index.note_purged(account)
    assert await index.purged("", 9) == ["ann", "bob", "cat"]
    assert await index.purged("ann", 1) == ["bob"]


# -- all together -------------------------------------------------------------------------------------------------------


class Replay:
    """What a mailbox must show, from the answers to what was asked of it, one after the other."""

    def __init__(self) -> None:
        self.boxes: dict[int, dict[int, tuple[bytes, int, int]]] = {}  # UID to key, flags, MODSEQ

    def stored(self, box: int, how: FlagChange, bits: int, answer: Stored) -> None:
        for uid in answer.changed:
            name, old, _ = self.boxes[box][uid]
            new = {FlagChange.REPLACE: bits, FlagChange.ADD: old | bits, FlagChange.REMOVE: old & ~bits}[how]
            assert new != old
            self.boxes[box][uid] = name, new, answer.modseq

    def seen(self, box: int) -> list[tuple[int, bytes, int]]:
        return [(uid, name, bits) for uid, (name, bits, _) in sorted(self.boxes[box].items())]


async def step(index: Index, chance: random.Random, replay: Replay, number: int) -> None:
    """One operation on one of two mailboxes, asked of the index and told to the replay."""
    box, other = chance.sample(sorted(replay.boxes), 2)
    here = replay.boxes[box]
    picked = sorted(chance.sample(range(1, 40), chance.randint(1, 8)))
    what = chance.choice(["deliver", "deliver", "store", "store", "copy", "move", "expunge", "merge"])
    if what == "deliver":
        bits = chance.randrange(8)
        to = inbox("ann", "INBOX" if box == min(replay.boxes) else "Work", bits)
        uid = (await index.view(box)).uid_next
        await deliver(index, number, to=[to])
        here[uid] = key(number), bits, (await index.view(box)).modseq
    elif what == "store":
        how, bits = chance.choice(list(FlagChange)), chance.randrange(8)
        since = chance.choice([None, (await index.view(box)).modseq - chance.randrange(6)])
        answer = await index.store(box, picked, how, bits, since)
        late = [uid for uid in picked if uid in here and since is not None and here[uid][2] > since]
        assert answer.conflicts == tuple(late)
        replay.stored(box, how, bits, answer)
    elif what in ("copy", "move"):
        call = index.copy if what == "copy" else index.move
        for uid, there in await call(box, picked, other):
            name, bits, _ = here[uid] if what == "copy" else here.pop(uid)
            assert there not in replay.boxes[other]
            replay.boxes[other][there] = name, bits, (await index.view(other)).modseq
    elif what == "expunge":
        assert (await index.expunge(box, picked)).removed == len([here.pop(uid) for uid in picked if uid in here])
    else:
        await index.merge(box)


async def caught_up(index: Index, views: dict[int, View], box: int) -> View:
    """A session's view, brought to where its mailbox is."""
    view = views[box]
    tail = await index.tail(box, view.modseq, view.uid_next)
    if tail is None:
        view = views[box] = await index.view(box)
    else:
        view.follow(tail.facts.uid_next, tail.facts.modseq, tail.entries, tail.changes)
    return view


SEEDS: dict[type[Rig], int] = {MemoryRig: 250, SqliteRig: 80, PostgresRig: 6}


@pytest.mark.timeout(300)
async def test_views_equal_a_serial_replay_after_any_operations(rig: Rig) -> None:
    """Two sessions that catch up at different times, the stored view, and the entries show the same (P5, P7)."""
    index = rig.index
    await admit(index)
    for seed in range(SEEDS[type(rig)]):
        chance = random.Random(seed)
        replay, first = Replay(), seed * 100
        await index.make_mailbox("ann", "INBOX")
        boxes = [(await index.make_mailbox("ann", name)).id for name in ("INBOX", "Work")]
        replay.boxes = {box: {} for box in boxes}
        often, seldom = [{box: await index.view(box) for box in boxes} for _ in range(2)]
        for number in range(1, 31):
            await asyncio.sleep(0)  # each step of the loop stays short
            await step(index, chance, replay, first + number)
            for box in boxes:
                views = [await index.view(box), await caught_up(index, often, box)]
                if chance.random() < 0.2:
                    views.append(await caught_up(index, seldom, box))
                for view in views:
                    assert [(uid, name, bits) for uid, name, bits, *_ in view.rows()] == replay.seen(box), f"seed {seed}"
        for box in boxes:
            view = await index.view(box)
            assert [(e.uid, e.key) for e in await index.entries(box, 0, 2**32, 999)] == [row[:2] for row in view.rows()]
            assert list(View.unpack(view.pack(5)).rows()) == list(view.rows())
        if seed % 25 == 0:
            assert await index.audit() == []
        await index.purge("ann")
    assert await index.audit() == []
