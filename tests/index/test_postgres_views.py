"""What a process has read of a mailbox is where it goes on from, whoever else writes; nothing long runs on the event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import FlagChange, Index, Outcome
from powermail.index.view import View
from tests.index.sharing import another, between, counted_statements
from tests.index.support import InlineLane, PostgresRig, begin_again, deliver, delivery, inbox, key, mailbox


@contextmanager
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many messages the views had that were unpacked in this block."""
    sizes: list[int] = []
    unpack = View.unpack

    def noted(parts: Any) -> View:
        view = unpack(parts)
        sizes.append(len(view))
        return view

    with monkeypatch.context() as patched:
        patched.setattr(View, "unpack", noted)
        yield sizes


def shown(view: View) -> tuple[Any, ...]:
    return view.uidvalidity, view.uid_next, view.modseq, list(view.rows())


async def anew(index: Any, box: int) -> View:
    """As a process shows a mailbox that has read nothing yet."""
    index._views.forget()
    view: View = await index.view(box)
    return view


async def some(rig: PostgresRig, count: int = 20) -> int:
    """A mailbox with a stored view of so many messages, and nothing behind it."""
    await deliver(rig.index, *range(1, count + 1))
    box = await mailbox(rig.index)
    assert await rig.index.merge(box)
    return box


async def test_a_mailbox_that_nobody_changed_is_read_by_one_statement_and_unpacked_once(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, index = await some(shared_rig), shared_rig.running
    first = await index.view(box)
    with unpacked(monkeypatch) as sizes:
        async with counted_statements(index) as statements:
            again = await index.view(box)
    assert sizes == [] and len(statements) == 1 and shown(again) == shown(first)
    first.arrive([(99, key(99), 0, 999, 1, 1.0)])  # it is the caller's
    assert shown(await index.view(box)) == shown(again)


async def test_what_others_did_is_followed_from_where_a_process_was(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, index = await some(shared_rig), shared_rig.running
    await index.view(box)
    async with another(shared_rig) as other:
        await deliver(other, 30)
        await other.store(box, [1, 2], FlagChange.ADD, 1, None)
        await other.expunge(box, [3])
        with unpacked(monkeypatch) as sizes:
            view = await index.view(box)
        assert sizes == [] and shown(view) == shown(await anew(other, box))
        await index.store(box, [5], FlagChange.ADD, 2, None)
        assert await other.merge(box)  # the changes behind are gone
        await deliver(other, 31)
        assert shown(await index.view(box)) == shown(await anew(other, box))


async def test_a_change_of_flags_goes_on_from_what_was_read(shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the lock of a mailbox while it is unpacked for each change."""
    box, index = await some(shared_rig), shared_rig.running
    await index.view(box)
    async with another(shared_rig) as other:
        with unpacked(monkeypatch) as sizes:
            for uid in range(1, 6):
                assert (await index.store(box, [uid], FlagChange.ADD, 1, None)).changed == (uid,)
            assert await index.copy(box, [7], box) == [(7, 21)]
        assert sizes == []
        assert shown(await index.view(box)) == shown(await anew(other, box))


async def test_views_that_were_kept_are_those_that_are_read_anew(shared_rig: PostgresRig) -> None:
    """Two processes do what clients do, in any order; each shows what is there."""
    chance, first = random.Random(7), await some(shared_rig)
    second = (await shared_rig.index.make_mailbox("ann", "Archive")).id
    async with another(shared_rig) as other, another(shared_rig) as fresh:
        for number in range(100, 160):
            work = _one_of(chance, chance.choice((shared_rig.running, other)), chance.sample((first, second), 2), number)
            await asyncio.gather(work, *[each.view(first) for each in (shared_rig.running, other)])
            for box in (first, second):
                wanted = shown(await anew(fresh, box))
                assert shown(await shared_rig.index.view(box)) == shown(await other.view(box)) == wanted


def _one_of(chance: random.Random, index: Index, boxes: Sequence[int], number: int) -> Awaitable[Any]:
    """Something that a client, a delivery or a keeper does."""
    box, to = boxes
    uids = chance.sample(range(1, 40), 6)
    how, flags = chance.choice(list(FlagChange)), chance.randrange(4)
    work: list[Callable[[], Awaitable[Any]]] = [
        lambda: deliver(index, number),
        lambda: index.store(box, uids, how, flags, None),
        lambda: index.expunge(box, uids[:2]),
        lambda: index.copy(box, uids[:3], to),
        lambda: index.copy(box, uids[:3], box),
        lambda: index.move(box, uids[:3], to),
        lambda: index.merge(box),
    ]
    return chance.choice(work)()


async def test_a_view_of_what_was_lost_is_no_place_to_go_on_from(shared_rig: PostgresRig) -> None:
    """Laws 10, 11: an older backup was put back, and another process began the new epoch."""
    box = await some(shared_rig)
    async with another(shared_rig) as other:
        stale = await shared_rig.backup()
        await deliver(shared_rig.index, 21, 22)
        await other.store(box, [1], FlagChange.ADD, 1, None)
        assert len(await other.view(box)) == 22
        await shared_rig.put_back(stale)
        await begin_again(shared_rig.index, other.mark())
        await deliver(shared_rig.index, 23)
        view = await other.view(box)
        assert list(view.uids[:20]) == list(range(1, 21)) and view.uids[20] > limits.EPOCH_JUMP and len(view) == 21
        assert not any(view.flags)


async def test_views_that_were_kept_are_bounded(shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    box, index = await some(shared_rig), shared_rig.running
    other = (await index.make_mailbox("ann", "Archive")).id
    await index.copy(box, list(range(1, 16)), other)
    monkeypatch.setattr(limits, "INDEX_VIEWS_MESSAGES_MAX", 30)
    for each in (box, other, box, other):
        assert len(await index.view(each)) == (20 if each == box else 15)
        assert index._views._messages <= 30 and len(index._views._views) == 1
    monkeypatch.setattr(limits, "INDEX_VIEWS_MESSAGES_MAX", 10)
    assert len(await index.view(box)) == 20 and index._views._messages == 0


@pytest.mark.parametrize("how", ["view", "store", "merge", "tail"])
async def test_a_large_mailbox_is_unpacked_and_brought_forward_off_the_event_loop(
    shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """100,000 messages would stall every session of the process."""
    box, index = await some(shared_rig), shared_rig.running
    stored = (await index.view(box)).modseq
    await deliver(index, *range(21, 41))
    await index.store(box, [1, 2], FlagChange.ADD, 1, None)
    index._views.forget()
    monkeypatch.setattr(limits, "VIEW_AT_ONCE_ROWS", 10)
    in_lane, run = [], InlineLane.run

    def noted(lane: InlineLane, call: Callable[..., Any], *args: Any) -> Any:
        in_lane.append(call.__name__)
        return run(lane, call, *args)

    monkeypatch.setattr(InlineLane, "run", noted)
    calls: dict[str, tuple[Callable[[], Any], set[str]]] = {
        "view": (lambda: index.view(box), {"unpack", "follow"}),
        "store": (lambda: index.store(box, [5], FlagChange.ADD, 1, None), {"unpack", "follow"}),
        "merge": (lambda: index.merge(box), {"unpack", "follow", "pack"}),
        "tail": (lambda: index.tail(box, stored, 21), {"_entries", "_changes"}),
    }
    call, wanted = calls[how]
    await call()
    assert wanted <= {*in_lane}


async def test_a_view_that_is_unpacked_holds_up_nobody(shared_rig: PostgresRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane works while others read."""
    box, index = await some(shared_rig), shared_rig.running
    index._views.forget()
    monkeypatch.setattr(limits, "VIEW_AT_ONCE_ROWS", 10)
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def long() -> None:
        begun.set()
        await goes_on.wait()

    between(monkeypatch, index, "_aside", long)
    reading = asyncio.ensure_future(index.view(box))
    await begun.wait()
    assert await index.usage("ann") > 0
    await deliver(index, 21)
    goes_on.set()
    assert len(await reading) == 20, "as of its snapshot"
    assert len(await index.view(box)) == 21


# -- what a look costs -------------------------------------------------------------------------------------------------------


async def test_what_readers_ask_most_often_is_one_statement(shared_rig: PostgresRig) -> None:
    box, index = await some(shared_rig), shared_rig.running
    await index.view(box)
    known = {box: (await index.view(box)).modseq}
    calls: dict[str, Callable[[], Any]] = {
        "find_mailbox": lambda: index.find_mailbox("ann", "INBOX"),
        "entries": lambda: index.entries(box, 0, 99, 99),
        "view": lambda: index.view(box),
        "usage": lambda: index.usage("ann"),
        "changed": lambda: index.changed(known),
    }
    for name, call in calls.items():
        async with counted_statements(index) as statements:
            await call()
        assert len(statements) == 1, name


async def test_a_batch_into_mailboxes_that_are_there_is_six_round_trips(shared_rig: PostgresRig) -> None:
    """Begin; insert; look and lock, in a later statement (law 7); enter; the slot, last (law 10); commit."""
    index, to = shared_rig.running, [inbox(f"u{number}") for number in range(9)]
    await deliver(index, *range(1, 20), to=to)  # whichever connection it was that prepared them
    await index.deliver(delivery(20, *to))
    async with counted_statements(index) as statements:
        assert await index.deliver(delivery(21, *to)) is Outcome.ENTERED
    assert len(statements) == 6, statements
    assert statements[0] == "BEGIN" and statements[-1] == "COMMIT" and statements[-2].startswith("UPDATE writers")


async def test_a_batch_into_new_mailboxes_is_twelve_round_trips_however_many_they_are(shared_rig: PostgresRig) -> None:
    """Six more: which are there; make; lock; the counter, once for all (law 13); their numbers; who was purged meanwhile."""
    index = shared_rig.running
    await deliver(index, 1, 2, to=[inbox("ann")])
    for first, count in ((10, 2), (30, 19)):
        given = {facts.uidvalidity for facts in await index.mailboxes(0, 99)}
        async with counted_statements(index) as statements:
            await asyncio.gather(*[index.deliver(delivery(first + each, inbox(f"new{first + each}"))) for each in range(count)])
        assert len(statements) == 12, statements
        fresh = sorted({facts.uidvalidity for facts in await index.mailboxes(0, 99)} - given)
        assert fresh == list(range(max(given) + 1, max(given) + 1 + count)), "each one of its own, behind all before"
        assert index.mark().uidvalidity == fresh[-1]


async def test_the_first_uidvalidity_of_all_comes_from_the_clock(shared_rig: PostgresRig) -> None:
    async with shared_rig.beside() as beside:
        await beside.execute("UPDATE counters SET value = 0 WHERE name = 'uidvalidity'")
    await shared_rig.index.deliver(delivery(1, *[inbox(f"u{number}") for number in range(3)]))
    boxes = await shared_rig.index.mailboxes(0, 99)
    first = laws.fresh_uidvalidity(0, shared_rig.clock.now())
    assert sorted(facts.uidvalidity for facts in boxes) == [first, first + 1, first + 2]


async def test_a_batch_gets_the_last_uidvalidities_and_none_behind_them(shared_rig: PostgresRig) -> None:
    index = shared_rig.index
    async with shared_rig.beside() as beside:
        await beside.execute("UPDATE counters SET value = $1 WHERE name = 'uidvalidity'", limits.UID_MAX - 2)
        with pytest.raises(IndexTrouble, match="no UIDVALIDITY left"):
            await index.deliver(delivery(1, *[inbox(f"u{number}") for number in range(3)]))
        assert await index.mailboxes(0, 99) == []
        await index.deliver(delivery(2, inbox("u1"), inbox("u2")))
        given = await beside.fetchval("SELECT value FROM counters WHERE name = 'uidvalidity'")
    assert sorted(facts.uidvalidity for facts in await index.mailboxes(0, 99)) == [limits.UID_MAX - 1, limits.UID_MAX]
    assert given == limits.UID_MAX


async def test_the_change_notice_names_what_changed_or_went(shared_rig: PostgresRig) -> None:
    box, index = await some(shared_rig), shared_rig.running
    other = (await index.make_mailbox("ann", "Archive")).id
    known = {each: (await index.view(each)).modseq for each in (box, other)}
    assert await index.changed({}) == [] == await index.changed(known)
    await deliver(index, 21)
    assert await index.changed({**known, 77: 1}) == [box, 77]


async def test_entries_are_trouble_in_the_statement_that_might_be_short(shared_rig: PostgresRig) -> None:
    """P7: by what that statement sees, and by no earlier look."""
    box = await some(shared_rig)
    async with another(shared_rig) as other:
        assert len(await other.entries(box, 0, 99, 99)) == 20
        await shared_rig.index.raise_epoch([], "a test says so")
        for call in (other.entries(box, 0, 99, 99), other.find_mailbox("ann", "INBOX"), other.view(box),
                     other.entries(box, 50, 99, 99), other.find_mailbox("nobody", "INBOX")):  # fmt: skip
            with pytest.raises(IndexTrouble):
                await call
