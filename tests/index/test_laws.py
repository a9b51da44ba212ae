"""The laws that are arithmetic: jumps, marks that prove a loss, what reconcile does with what it finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from powermail.base import limits
from powermail.index import laws
from powermail.index.contract import Fate, Head
from powermail.index.laws import Deed, Numbers, NumbersSpent
from powermail.storage.contract import Mark, Origin

JUMP, UNCLEAN = limits.EPOCH_JUMP, limits.UNCLEAN_JUMP
ROW = Numbers(uid_next=11, modseq=21, uidvalidity=5, epoch=1, start=0, base_uid=1, base_modseq=1)


def test_a_mailbox_numbered_in_this_epoch_goes_on() -> None:
    assert laws.renumbered(ROW, 1, 0, 99) == ROW


@pytest.mark.parametrize("missed", [1, 2, 7])
def test_a_mailbox_jumps_for_each_epoch_it_missed(missed: int) -> None:
    """Law 11: two restores of one backup are two epochs, so the second must jump further than the first."""
    row = laws.renumbered(ROW, 1 + missed, 0, 99)
    assert (row.uid_next, row.modseq, row.uidvalidity) == (11 + missed * JUMP, 21 + missed * JUMP, 5)
    assert (row.epoch, row.base_uid, row.base_modseq) == (1 + missed, 1 + missed * JUMP, 1 + missed * JUMP), "its bound with it"
    assert laws.renumbered(row, 1 + missed, 0, 99) == row


def test_a_mailbox_jumps_a_little_after_each_unclean_start() -> None:
    row = laws.renumbered(ROW, 1, 3, 99)
    assert (row.uid_next, row.modseq, row.start) == (11 + 3 * UNCLEAN, 21 + 3 * UNCLEAN, 3)
    assert (row.base_uid, row.base_modseq) == (1, 1), "no checkpoint was written"


@pytest.mark.parametrize(("uids", "modseqs"), [(JUMP, 0), (0, JUMP)])
def test_no_mailbox_gets_more_numbers_than_a_jump_beyond_its_checkpoint(uids: int, modseqs: int) -> None:
    full = ROW._replace(uid_next=1 + uids, modseq=1 + modseqs)
    with pytest.raises(NumbersSpent):
        laws.renumbered(full, 1, 0, 99)
    last = full._replace(uid_next=full.uid_next - bool(uids), modseq=full.modseq - bool(modseqs))
    assert laws.renumbered(last, 1, 0, 99) == last


def test_many_numbers_at_once_are_counted_before_they_are_given() -> None:
    with pytest.raises(NumbersSpent):
        laws.renumbered(ROW, 1, 0, 99, count=JUMP)
    assert laws.renumbered(ROW, 1, 0, 99, count=JUMP - 20) == ROW


def test_when_uids_run_short_a_mailbox_begins_anew_and_its_modseqs_go_on() -> None:
    short = ROW._replace(uid_next=limits.UID_MAX - JUMP + 1, base_uid=limits.UID_MAX - JUMP)
    row = laws.renumbered(short, 1, 0, 99)
    assert (row.uid_next, row.base_uid, row.uidvalidity, row.modseq) == (1, 1, 99, 21)
    jumped = laws.renumbered(ROW._replace(uid_next=limits.UID_MAX - JUMP), 2, 0, 99)
    assert (jumped.uid_next, jumped.uidvalidity, jumped.modseq) == (1, 99, 21 + JUMP)


def test_a_change_needs_no_uid_and_renames_none() -> None:
    short = ROW._replace(uid_next=limits.UID_MAX - 5, base_uid=limits.UID_MAX - 5)
    row = laws.renumbered(short, 2, 0, 99, count=0)
    assert (row.uidvalidity, row.uid_next, row.modseq) == (5, limits.UID_MAX + 1, 21 + JUMP)
    assert laws.renumbered(row, 2, 0, 99).uidvalidity == 99, "the next message finds that they ran short"


@given(some.lists(some.tuples(some.sampled_from(["give", "epoch", "start", "change"]), some.integers(1, 5)), max_size=40))
def test_numbers_only_rise_and_no_uid_is_given_twice(steps: list[tuple[str, int]]) -> None:
    row, epoch, start, fresh = ROW, 1, 0, 100
    given_: set[tuple[int, int]] = set()
    for what, count in steps:
        epoch, start = epoch + (what == "epoch"), start + (what == "start")
        if what not in ("give", "change"):
            continue
        fresh += 1
        before = row
        row = laws.renumbered(row, epoch, start, fresh, count if what == "give" else 0)
        assert row.modseq >= before.modseq
        assert row.uid_next >= before.uid_next or row.uidvalidity > before.uidvalidity
        if what == "give":
            numbers = {(row.uidvalidity, row.uid_next + n) for n in range(count)}
            assert not numbers & given_
            given_ |= numbers
            row = row._replace(uid_next=row.uid_next + count, modseq=row.modseq + count)
        else:
            row = row._replace(modseq=row.modseq + 1)


def head(uidvalidity: int, uid_next: int, modseq: int, epoch: int = 1) -> Head:
    return Head("ann", "INBOX", uidvalidity, uid_next, modseq, epoch)


def test_what_a_checkpoint_shows_is_learned() -> None:
    assert laws.learned(ROW, head(5, 40, 50))[:3] == (40, 50, 5)
    assert laws.learned(ROW, head(5, 3, 4)) == ROW
    assert laws.learned(ROW, head(5, 40, 50))[5:] == (1, 1), "it may lie on one node only"
    assert laws.learned(ROW, head(5, 2**40, 50)).uid_next == limits.UID_MAX + 1, "spent is spent"


def test_each_source_jumps_from_its_own_epoch_and_the_farther_counts() -> None:
    """Law 11: what was numbered in an older epoch may have got further since than what is shown of a later one."""
    later = ROW._replace(epoch=3)
    learned = laws.learned(later, head(5, 40, 50, 1))
    assert learned[:4] == (40 + 2 * JUMP, 50 + 2 * JUMP, 5, 3)
    assert laws.learned(ROW, head(5, 40, 50, 3)) == ROW, "the row's own reaches farther"
    assert laws.learned(ROW, head(5, 2 * JUMP + 11, 5 * JUMP, 3))[:4] == (2 * JUMP + 11, 5 * JUMP, 5, 3)
    assert laws.learned(ROW, head(5, 1, 1, 0)).uid_next == 1 + JUMP, "of an epoch that is not known it may be any"


def test_a_row_that_a_head_moves_far_beyond_its_bound_can_stand_and_gives_no_number() -> None:
    row = laws.learned(ROW, head(5, 5 * JUMP, 7 * JUMP))
    assert (row.uid_next - row.base_uid, row.modseq - row.base_modseq) == (JUMP, JUMP)
    assert laws.reaches(row, 4, 2) == row._replace(
        uid_next=8 * JUMP + 2 * UNCLEAN,
        modseq=10 * JUMP + 2 * UNCLEAN,
        epoch=4,
        start=2,
        base_uid=7 * JUMP,
        base_modseq=9 * JUMP,
    )
    assert laws.reaches(ROW, 4, 2) is None
    with pytest.raises(NumbersSpent):
        laws.renumbered(row, 4, 0, 99)


def test_a_later_uidvalidity_in_a_checkpoint_spends_the_uids_of_the_one_that_is_known() -> None:
    """How far the earlier one got is not known any more: the checkpoint that said so was replaced."""
    row = laws.learned(ROW, head(6, 3, 50))
    assert row.modseq == 50
    assert laws.renumbered(row, 2, 0, 99).uidvalidity == 99


def test_an_earlier_uidvalidity_in_a_checkpoint_teaches_modseqs_only() -> None:
    assert laws.learned(ROW, head(4, 1000, 50))[:3] == (11, 50, 5)


def test_uidvalidity_rises_whatever_the_clock_says() -> None:
    assert laws.fresh_uidvalidity(0, 1_800_000_000.9) == 1_800_000_000
    assert laws.fresh_uidvalidity(1_700_000_000, 1_800_000_000.0) == 1_700_000_001
    assert laws.fresh_uidvalidity(5, -1e12) == 6
    assert laws.fresh_uidvalidity(0, -1e12) == 1
    assert laws.fresh_uidvalidity(0, 1e18) + 1000 * JUMP <= limits.UID_MAX, "a thousand epochs still leap"


def test_keyword_flags_are_single_bits_that_fit_a_signed_number() -> None:
    bits = [laws.keyword_flag(number) for number in range(limits.KEYWORDS_MAX)]
    assert len(set(bits)) == limits.KEYWORDS_MAX
    assert all(bit & (bit - 1) == 0 and 1 << 8 < bit < 1 << 63 for bit in bits)
    with pytest.raises(ValueError, match="keywords"):
        laws.keyword_flag(limits.KEYWORDS_MAX)


@pytest.mark.parametrize(("used", "due"), [(JUMP // 2 - 1, False), (JUMP // 2, True)])
def test_a_checkpoint_is_due_when_half_of_the_numbers_are_used(used: int, due: bool) -> None:
    assert laws.needs_checkpoint(ROW._replace(uid_next=1 + used, modseq=1)) is due
    assert laws.needs_checkpoint(ROW._replace(uid_next=1, modseq=1 + used)) is due


# -- marks (law 10) ---------------------------------------------------------------------------------------------------

SLOTS = {3: ("tag", 10), 4: ("gat", 7)}


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        (Mark(), ""),
        (Mark(4, SLOTS, 2), ""),
        (Mark(4, {3: ("tag", 9)}, 2), ""),
        (Mark(9, {3: ("other", 99), 9: ("new", 1)}, 1), ""),  # of an older epoch: settled when it was raised
        (Mark(4, {2: ("old", 900)}, 2), ""),  # missing at or below the sequence: pruned
        (Mark(4, SLOTS, 3), "epoch"),
        (Mark(5, SLOTS, 2), "gave only"),
        (Mark(4, {5: ("new", 0)}, 2), "gave only"),
        (Mark(4, {3: ("tag", 11)}, 2), "transaction 11"),
        (Mark(4, {3: ("other", 1)}, 2), "twice"),
    ],
)
def test_what_a_node_remembers_proves_a_loss_or_nothing(mark: Mark, why: str) -> None:
    found = laws.loss(mark, 2, 4, SLOTS)
    assert bool(found) is bool(why)
    assert why in found


# -- reconcile (law 6) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fate", "origin", "before_birth", "expected"),
    [
        (None, Origin.DELIVERY, False, Deed.ENTER),
        (None, Origin.DELIVERY, True, Deed.DROP),
        (None, Origin.REPAIR, False, Deed.DROP),
        (None, Origin.MOVED, False, Deed.DROP),
        *((Fate.LIVE, origin, born, Deed.BELIEVE) for origin in Origin for born in (False, True)),
        *((Fate.DEAD, origin, born, Deed.BURY) for origin in Origin for born in (False, True)),
        *((Fate.ABORTED, origin, born, Deed.BURY) for origin in Origin for born in (False, True)),
    ],
)
def test_the_table_of_law_6(fate: Fate | None, origin: Origin, before_birth: bool, expected: Deed) -> None:
    assert laws.deed(fate, origin, before_birth) is expected


@pytest.mark.parametrize(
    ("base", "messages", "tail_rows", "holders_gone", "skipped", "whole"),
    [
        (0, 10, 0, False, False, True),
        (5, 10, 1, False, False, False),
        (5, 10, 1, True, False, True),
        (5, 10, 1, False, True, True),
        (5, 10, limits.VIEW_TAIL_ROWS, False, False, False),
        (5, 10, limits.VIEW_TAIL_ROWS + 1, False, False, True),
        (5, 100_000, 25_000, False, False, False),
        (5, 100_000, 25_001, False, False, True),
    ],
)
def test_when_a_checkpoint_is_a_whole_one(
    base: int, messages: int, tail_rows: int, holders_gone: bool, skipped: bool, whole: bool
) -> None:
    assert laws.wants_whole(base, messages, tail_rows, holders_gone, skipped) is whole
