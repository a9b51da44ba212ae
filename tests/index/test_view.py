"""Views: changes bring them forward, packing keeps them whole, and what is damaged is refused."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as some

from powermail.base import limits
from powermail.index.view import Change, Entry, Op, View, changed_flags, pack_uids, unpack_uids

flags = some.integers(0, 2**63 - 1)
modseqs = some.integers(1, 2**40)
entry = some.tuples(some.integers(1, 50), some.binary(min_size=16, max_size=16), flags, modseqs, flags, some.floats(0, 2**40))
uid_sets = some.sets(some.integers(1, limits.UID_MAX), max_size=200)


def rising(rows: list[Entry]) -> list[Entry]:
    """The rows with their first number as the step from the UID before."""
    uid, risen = 0, []
    for step, *rest in rows:
        uid += step
        risen.append((uid, *rest))
    return risen  # type: ignore[return-value]


views = some.lists(entry, max_size=60).map(rising)
change = some.builds(
    Change,
    some.integers(2**41, 2**42),
    some.sampled_from(Op),
    some.integers(0, 7) | flags,
    some.sets(some.integers(1, 300), max_size=40).map(lambda uids: tuple(sorted(uids))),
)


def made(rows: list[Entry]) -> View:
    view = View(7, 1, 1)
    view.arrive(rows)
    return view


def seen(view: View) -> tuple[int, int, int, list[Entry]]:
    return view.uidvalidity, view.uid_next, view.modseq, list(view.rows())


@given(views, some.integers(1, 20))
def test_what_is_packed_comes_out_the_same(rows: list[Entry], part_rows: int) -> None:
    view = made(rows)
    parts = view.pack(part_rows)
    assert len(parts) == max(1, -(-len(rows) // part_rows))
    assert seen(View.unpack(parts)) == seen(view)


@given(views, some.lists(change, max_size=8))
def test_changes_do_what_a_plain_dict_says(rows: list[Entry], changes: list[Change]) -> None:
    view, plain = made(rows), {row[0]: (row[2], row[3]) for row in rows}
    for each in changes:
        expected = []
        for uid in each.uids:
            if uid not in plain:
                continue
            if each.op is Op.EXPUNGE:
                del plain[uid]
                expected.append(uid)
            elif (after := changed_flags(plain[uid][0], each.op, each.flags)) != plain[uid][0]:
                plain[uid] = after, each.modseq
                expected.append(uid)
        assert view.apply(each) == tuple(expected)
        assert view.modseq >= each.modseq
        assert {uid: (flag, modseq) for uid, _, flag, modseq, _, _ in view.rows()} == plain
    keys = {row[0]: row[1] for row in rows}
    assert all(view.key(view.place(uid)) == keys[uid] for uid in plain)
    assert seen(View.unpack(view.pack(7))) == seen(view)


def octets_each(view: View) -> float:
    columns = (view.uids, view.flags, view.modseqs, view.octets, view.dates)
    return sum(column.itemsize * len(column) for column in columns) / len(view) + len(view.keys) / len(view)


def test_a_view_takes_36_octets_a_message_and_more_only_where_a_number_needs_it() -> None:
    view = made([(uid, bytes(16), 31, uid, 5000, 1_800_000_000.0 + uid) for uid in range(1, 10_001)])
    assert octets_each(view) == 33, "system flags only"
    view.apply(Change(20_000, Op.ADD_FLAGS, 1 << 31, (7,)))
    assert octets_each(view) == 36, "17 keywords"
    view.apply(Change(1 << 40, Op.ADD_FLAGS, 1 << 62, (8,)))
    assert octets_each(view) == 44, "48 keywords, and a MODSEQ behind 4,294 losses of the index"
    view.arrive([(10_001, b"k" * 16, 0, 20_001, 1 << 33, -1.0)])
    assert octets_each(view) == 52, "a message of 8 GiB, dated 1969"
    rows = list(view.rows())
    assert rows[6] == (7, bytes(16), 31 | 1 << 31, 20_000, 5000, 1_800_000_007.0)
    assert rows[7] == (8, bytes(16), 31 | 1 << 62, 1 << 40, 5000, 1_800_000_008.0)
    assert rows[-1] == (10_001, b"k" * 16, 0, 20_001, 1 << 33, -1.0)
    assert list(View.unpack(view.pack()).rows()) == rows


@given(views, some.integers(0, 60), some.lists(change, max_size=8))
def test_a_view_that_follows_a_tail_is_the_view_that_saw_it_all(rows: list[Entry], behind: int, changes: list[Change]) -> None:
    changes = [each._replace(modseq=2**42 + number) for number, each in enumerate(changes)]
    whole = made(rows)
    for each in changes:
        whole.apply(each)
    followed = made(rows[:behind])
    followed.follow(whole.uid_next, whole.modseq, rows[behind:], changes)
    assert seen(followed) == seen(whole)


def test_a_copy_goes_its_own_way() -> None:
    view = made([(1, bytes(16), 0, 5, 10, 1.0)])
    other = view.copy()
    other.apply(Change(9, Op.EXPUNGE, 0, (1,)))
    assert (len(view), len(other), view.modseq, other.modseq) == (1, 0, 5, 9)


def test_numbers_of_what_left_before_it_was_seen_are_kept() -> None:
    view = made([(1, bytes(16), 0, 5, 10, 1.0)])
    view.follow(9, 12, [], [Change(12, Op.EXPUNGE, 0, (8,))])
    assert (view.uid_next, view.modseq, len(view)) == (9, 12, 1)


@pytest.mark.parametrize("uid", [0, 1, limits.UID_MAX + 1])
def test_uids_that_do_not_rise_do_not_arrive(uid: int) -> None:
    view = made([(1, bytes(16), 0, 5, 10, 1.0)])
    with pytest.raises(ValueError, match="follow"):
        view.arrive([(uid, bytes(16), 0, 6, 10, 1.0)])


def test_a_mailbox_takes_about_nine_octets_a_message_beside_its_keys() -> None:
    rows = [
        (n, bytes([n * 7 % 256]) * 16, n % 3 // 2, n, 3000 + n * 7919 % 40_000, 1.8e9 + n * 977.0) for n in range(1, 10_001)
    ]
    without_keys = made([(row[0], bytes(16), *row[2:]) for row in rows])
    parts = without_keys.pack()
    assert sum(map(len, parts)) < 9 * len(rows)
    assert len(parts) == 3, "a large mailbox is never one record"


@given(views.filter(bool), some.integers(0, 2**16), some.integers(1, 255))
@settings(max_examples=200)
def test_a_flipped_octet_is_refused_or_harmless(rows: list[Entry], where: int, by: int) -> None:
    """A frame has a checksum, so nothing but its own settings can differ unseen."""
    view = made(rows)
    packed = bytearray(view.pack()[0])
    packed[where % len(packed)] ^= by
    try:
        found = View.unpack([bytes(packed)])
    except ValueError:
        return
    assert seen(found) == seen(view)


@given(some.lists(some.binary(max_size=200), max_size=3))
def test_no_octets_break_unpacking(parts: list[bytes]) -> None:
    with pytest.raises(ValueError):
        View.unpack(parts)


@given(some.binary(max_size=400))
def test_no_octets_in_a_good_frame_break_unpacking(inner: bytes) -> None:
    with pytest.raises(ValueError):
        View.unpack([zstandard.ZstdCompressor().compress(b"PMv1" + inner[:30] + inner[33:])])


@pytest.mark.parametrize("change", ["short", "long", "swapped", "other"])
def test_parts_that_do_not_belong_together_are_refused(change: str) -> None:
    rows = [(n, bytes(16), 0, n, 10, 1.0) for n in range(1, 10)]
    parts, later = made(rows).pack(4), made([*rows, (10, bytes(16), 0, 10, 10, 1.0)]).pack(4)
    wrong = {
        "short": parts[:2],
        "long": [*parts, parts[2]],
        "swapped": [parts[1], parts[0], parts[2]],
        "other": [parts[0], parts[1], later[2]],
    }
    with pytest.raises(ValueError, match="belong"):
        View.unpack(wrong[change])


def test_a_frame_that_would_fill_the_memory_is_refused_unread() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * limits.MIB))
    with pytest.raises(ValueError, match="too large"):
        View.unpack([bomb])
    rows = struct.pack("<4sIQQIII", b"PMv1", 1, 1, 1, 0, 1, 2**32 - 1) + bytes(5 * 17)
    with pytest.raises(ValueError, match="too large"):
        View.unpack([zstandard.ZstdCompressor().compress(rows)])


@given(uid_sets)
def test_uids_of_a_change_come_out_the_same(uids: set[int]) -> None:
    given_ = tuple(sorted(uids))
    assert unpack_uids(pack_uids(given_)) == given_


def test_a_run_of_a_million_uids_takes_a_few_octets() -> None:
    packed = pack_uids(range(5, 1_000_005))
    assert len(packed) < 8
    assert unpack_uids(packed) == tuple(range(5, 1_000_005))
    with pytest.raises(ValueError, match="damaged"):
        unpack_uids(packed, 999_999)


@given(some.binary(max_size=60))
def test_damaged_uids_are_refused_and_never_fill_the_memory(packed: bytes) -> None:
    try:
        uids = unpack_uids(packed, 1000)
    except ValueError:
        return
    assert len(uids) <= 1000
    assert list(uids) == sorted(set(uids))
    assert all(1 <= uid <= limits.UID_MAX for uid in uids)


@pytest.mark.parametrize("uids", [(0,), (-1,), (2, 2), (3, 2), (limits.UID_MAX + 1,), (5, limits.UID_MAX, limits.UID_MAX + 1)])
def test_uids_that_do_not_rise_are_not_packed(uids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="UID"):
        pack_uids(uids)
