"""Owns the laws of the index that are arithmetic: numbers that jump, marks that prove a loss, the plan of a checkpoint, what
reconcile does with what it finds. No SQL, no I/O: every implementation of the index calls these (docs/laws.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from powermail.base import limits
from powermail.index.contract import Fate, Head
from powermail.storage.contract import Mark, Origin

# When the checkpoint of a mailbox is due whose last one lay on a disk that went, or lies nobody knows where: before all others
# (law 13). Only in this state does a mailbox have so early a time.
LOST_DUE: Final = 1.0


class Numbers(NamedTuple):
    """What a mailbox row knows of its numbers. `base_uid` and `base_modseq` are what nodes of R groups are known to show: those
    of its last durable checkpoint, or where it began. They jump as the numbers do; it never gets more than JUMP beyond them
    (law 11).
    """

    uid_next: int
    modseq: int
    uidvalidity: int
    epoch: int  # it was last numbered in
    start: int  # the count of unclean starts when it was last numbered
    base_uid: int
    base_modseq: int


class NumbersSpent(Exception):
    """The mailbox must be checkpointed before it gets more numbers."""


def brought(row: Numbers, epoch: int) -> Numbers:
    """The row as it is in a later epoch: a jump by JUMP for each that it missed, and its bound with it (law 11).

    What is known of one mailbox from several sources can be compared only in one epoch.
    """
    jump = limits.EPOCH_JUMP * max(0, epoch - row.epoch)
    end = limits.UID_MAX + 1
    return row._replace(
        uid_next=min(row.uid_next + jump, end),
        modseq=row.modseq + jump,
        epoch=max(epoch, row.epoch),
        base_uid=min(row.base_uid + jump, end),
        base_modseq=row.base_modseq + jump,
    )


def renumbered(row: Numbers, epoch: int, start: int, fresh_uidvalidity: int, count: int = 1) -> Numbers:
    """The row as it must be before it gets `count` UIDs in this epoch, after this many unclean starts (laws 10, 11).

    In an older epoch it jumps by JUMP for each epoch missed; after an unclean start on SQLite by UNCLEAN_JUMP for each.
    When UIDs run short it begins anew under `fresh_uidvalidity`, its MODSEQs going on: the caller then gives what lies in it
    the first UIDs, sets `uid_next` and `base_uid` behind them, and trims all changes, so that nobody goes on from an old view.
    `count` 0 is for a change, which needs a MODSEQ only: UIDs stay as they are. Raises NumbersSpent.
    """
    row = brought(row, epoch)
    jump = limits.UNCLEAN_JUMP * max(0, start - row.start)
    uid_next, modseq, uidvalidity = min(row.uid_next + jump, limits.UID_MAX + 1), row.modseq + jump, row.uidvalidity
    base_uid, base_modseq = row.base_uid, row.base_modseq
    if count and uid_next > limits.UID_MAX - limits.EPOCH_JUMP:
        uid_next, base_uid, uidvalidity = 1, 1, fresh_uidvalidity
    if uid_next + count - base_uid > limits.EPOCH_JUMP or modseq + max(1, count) - base_modseq > limits.EPOCH_JUMP:
        raise NumbersSpent(f"{limits.EPOCH_JUMP} numbers since the last durable checkpoint")
    return Numbers(uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq)


def check_at_once(count: int) -> None:
    """Raises ValueError if one transaction would give a mailbox more UIDs than the leap after an unclean start makes up for:
    marks are put between transactions (law 10).
    """
    if count > limits.NUMBERS_AT_ONCE_MAX:
        raise ValueError(f"{count} messages at once; at most {limits.NUMBERS_AT_ONCE_MAX} are copied or moved in one step")


def reached(head: Head, epoch: int) -> tuple[int, int]:
    """UIDNEXT and MODSEQ to which numbers may have got by a later epoch, as a record shows (law 11)."""
    jump = limits.EPOCH_JUMP * max(0, epoch - head.epoch)
    return min(head.uid_next + jump, limits.UID_MAX + 1), head.modseq + jump


def learned(row: Numbers, head: Head) -> Numbers:
    """The row after a record on some node showed these numbers (law 11): each jumps from its own epoch, and the farther counts.

    The bound stays where it was, because the record may lie on fewer than R groups; it follows only so far that the row may
    stand. A later UIDVALIDITY means that nothing is known of how far the row's own one got: its UIDs are spent, it begins anew.
    """
    mine = brought(row, head.epoch)
    known, modseq = reached(head, mine.epoch)
    modseq, uid_next, base_uid = max(mine.modseq, modseq), mine.uid_next, mine.base_uid
    if head.uidvalidity > row.uidvalidity:
        uid_next = base_uid = max(uid_next, limits.UID_MAX)
    elif head.uidvalidity == row.uidvalidity:
        uid_next = max(uid_next, known)
    if (uid_next, modseq) == (mine.uid_next, mine.modseq):
        return row
    return mine._replace(
        uid_next=uid_next,
        modseq=modseq,
        base_uid=max(base_uid, uid_next - limits.EPOCH_JUMP),
        base_modseq=max(mine.base_modseq, modseq - limits.EPOCH_JUMP),
    )


def written(row: Numbers, head: Head, start: int) -> Numbers:
    """The row once nodes of R groups show these numbers: the bound goes on from there. Nothing goes back: others may have
    learned more, or numbered in this epoch, since the record was made (law 11).
    """
    mine = brought(row, head.epoch)
    jump = limits.UNCLEAN_JUMP * max(0, start - row.start)
    uid_next, modseq = reached(head, mine.epoch)
    return mine._replace(
        uid_next=max(min(mine.uid_next + jump, limits.UID_MAX + 1), uid_next),
        modseq=max(mine.modseq + jump, modseq),
        start=max(start, row.start),
        base_uid=max(mine.base_uid, uid_next),
        base_modseq=max(mine.base_modseq, modseq),
    )


def reaches(row: Numbers, epoch: int, start: int) -> Numbers | None:
    """How far a mailbox may have got, if half of what it may get before a durable checkpoint is used: that must stand on nodes
    of R groups before the epoch begins, because no checkpoint can be written before the walks end (law 11). Else None.
    """
    row = brought(row, epoch)
    jump = limits.UNCLEAN_JUMP * max(0, start - row.start)
    row = row._replace(
        uid_next=min(row.uid_next + jump, limits.UID_MAX + 1), modseq=row.modseq + jump, start=max(start, row.start)
    )
    return row if needs_checkpoint(row) else None


def fresh_uidvalidity(last: int, now: float) -> int:
    """The one behind the last that was given. No clock moves it but where none is known yet: an index that is made anew takes
    the time as its `last` at once, so that what leaps (laws 10, 11) leaps from where numbers were given before.
    """
    return last + 1 if last else max(1, min(int(now), limits.UIDVALIDITY_CLOCK_MAX))


def keyword_flag(number: int) -> int:
    """The flag bit of the keyword that was the `number`th to be used in a mailbox, from 0; system flags lie below.

    Raises ValueError when all are used: bits of a signed number of 64.
    """
    if number >= limits.KEYWORDS_MAX:
        raise ValueError(f"a mailbox has at most {limits.KEYWORDS_MAX} keywords")
    return 1 << (63 - limits.KEYWORDS_MAX + number)


def needs_checkpoint(row: Numbers) -> bool:
    """True when half of what it may get before the next durable checkpoint is used."""
    half = limits.EPOCH_JUMP // 2
    return row.uid_next - row.base_uid >= half or row.modseq - row.base_modseq >= half


def later(known: Mark, seen: Mark) -> Mark:
    """What a process knows that knew one mark and has read another. Transactions end in any order, so that neither need be the
    newer one: of one epoch each count is the higher, and a slot is gone if the mark that could name it does not (law 10).
    """
    if known.epoch != seen.epoch:
        return max(known, seen, key=lambda mark: mark.epoch)
    slots = {number: slot for number, slot in known.slots.items() if number in seen.slots or number > seen.sequence}
    for number, (tag, count) in seen.slots.items():
        mine = slots.get(number)
        if (mine is None and number > known.sequence) or (mine is not None and mine[0] == tag and mine[1] < count):
            slots[number] = tag, count
    retired = tuple(sorted({*known.retired, *seen.retired}))
    return Mark(max(known.sequence, seen.sequence), slots, known.epoch, max(known.uidvalidity, seen.uidvalidity), retired)


def rival(mark: Mark, epoch: int, slots: Mapping[int, tuple[str, int]]) -> str:
    """Why a node knows an epoch that has not begun yet from another life of the index; "" if it does not: a backup was restored
    twice (law 11). `slots` are all there are: none is pruned before an epoch has begun.
    """
    if mark.epoch < epoch:
        return ""
    number = max(mark.slots, default=0)
    mine = slots.get(number)
    if mine is not None and mine[0] == mark.slots[number][0]:
        return ""
    return f"a node knows epoch {mark.epoch} from another life of the index"


def loss(mark: Mark, epoch: int, sequence: int, slots: Mapping[int, tuple[str, int]], who: str = "a node") -> str:
    """Why what a node remembers proves that this index lost commits; "" if it does not (law 10). `who` remembers it.

    A slot that is missing here with a number at or below the sequence was pruned: that proves nothing. Nor does what is of an
    older epoch: whatever was lost then was settled when the epoch was raised.
    """
    if mark.epoch > epoch:
        return f"{who} knows epoch {mark.epoch}, the index {epoch}"
    if mark.epoch < epoch:
        return ""
    if mark.sequence > sequence:
        return f"{who} knows writer slot {mark.sequence}, the index gave only {sequence}"
    for number, (tag, count) in sorted(mark.slots.items()):
        if number > sequence:
            return f"{who} knows writer slot {number}, the index gave only {sequence}"
        mine = slots.get(number)
        if mine is None:
            continue
        if mine[0] != tag:
            return f"writer slot {number} was given twice"
        if count > mine[1]:
            return f"{who} has seen transaction {count} of writer slot {number}, the index has {mine[1]}"
    return ""


class Deed(Enum):
    """What reconcile does with a commit record behind the watermark (law 6)."""

    ENTER = "enter"
    BELIEVE = "believe"
    BURY = "bury"  # a tombstone is ordered there
    DROP = "drop"  # a drop of this copy is ordered there


def deed(fate: Fate | None, origin: Origin, before_birth: bool) -> Deed:
    """The table of law 6."""
    if fate is Fate.LIVE:
        return Deed.BELIEVE
    if fate is not None:
        return Deed.BURY
    return Deed.ENTER if origin is Origin.DELIVERY and not before_birth else Deed.DROP


def wants_whole(base: int, messages: int, tail_rows: int, holders_gone: bool, skipped: bool) -> bool:
    """True if the next checkpoint is a whole one: there is none, its holders are not what they were, the last one left
    something out, or its tail outweighs a quarter of the mailbox (law 13).
    """
    return base == 0 or holders_gone or skipped or tail_rows > max(limits.VIEW_TAIL_ROWS, messages // 4)
