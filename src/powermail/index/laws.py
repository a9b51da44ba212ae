"""Owns the laws of the index that are arithmetic: numbers that jump, marks that prove a loss, the plan of a checkpoint, what
reconcile does with what it finds. No SQL, no I/O: every implementation of the index calls these (docs/laws.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from powermail.base import limits
from powermail.index.contract import Fate
from powermail.storage.contract import Mark, Origin


class Numbers(NamedTuple):
    """What a mailbox row knows of its numbers. `base_uid` and `base_modseq` are those of its last durable checkpoint, or where
    it began in this epoch: it never gets more than JUMP numbers beyond them (law 11).
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


def renumbered(row: Numbers, epoch: int, start: int, fresh_uidvalidity: int, count: int = 1) -> Numbers:
    """The row as it must be before it gets `count` UIDs in this epoch, after this many unclean starts (laws 10, 11).

    In an older epoch it jumps by JUMP for each epoch missed; after an unclean start on SQLite by UNCLEAN_JUMP for each.
    When UIDs run short it begins anew under `fresh_uidvalidity`, its MODSEQs going on: the caller then gives what lies in it
    the first UIDs, sets `uid_next` and `base_uid` behind them, and trims all changes, so that nobody goes on from an old view.
    `count` 0 is for a change, which needs a MODSEQ only: UIDs stay as they are. Raises NumbersSpent.
    """
    jump = limits.EPOCH_JUMP * (epoch - row.epoch) + limits.UNCLEAN_JUMP * max(0, start - row.start)
    uid_next, modseq, uidvalidity = min(row.uid_next + jump, limits.UID_MAX + 1), row.modseq + jump, row.uidvalidity
    base_uid, base_modseq = row.base_uid, row.base_modseq
    if epoch > row.epoch:
        base_uid, base_modseq = uid_next, modseq
    if count and uid_next > limits.UID_MAX - limits.EPOCH_JUMP:
        uid_next, base_uid, uidvalidity = 1, 1, fresh_uidvalidity
    if uid_next + count - base_uid > limits.EPOCH_JUMP or modseq + max(1, count) - base_modseq > limits.EPOCH_JUMP:
        raise NumbersSpent(f"{limits.EPOCH_JUMP} numbers since the last durable checkpoint")
    return Numbers(uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq)


def learned(row: Numbers, uidvalidity: int, uid_next: int, modseq: int) -> Numbers:
    """The row after a checkpoint showed these numbers (law 11): the higher ones count.

    A later UIDVALIDITY means that nothing is known of how far the row's own one got: its UIDs are spent, and it begins anew.
    """
    row = row._replace(modseq=max(row.modseq, modseq), base_modseq=max(row.base_modseq, modseq))
    if uidvalidity < row.uidvalidity:
        return row
    known = limits.UID_MAX if uidvalidity > row.uidvalidity else min(uid_next, limits.UID_MAX + 1)
    return row._replace(uid_next=max(row.uid_next, known), base_uid=max(row.base_uid, known))


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


def loss(mark: Mark, epoch: int, sequence: int, slots: Mapping[int, tuple[str, int]]) -> str:
    """Why what a node remembers proves that this index lost commits; "" if it does not (law 10).

    A slot that is missing here with a number at or below the sequence was pruned: that proves nothing.
    """
    if mark.epoch > epoch:
        return f"a node knows epoch {mark.epoch}, the index {epoch}"
    if mark.sequence > sequence:
        return f"a node knows writer slot {mark.sequence}, the index gave only {sequence}"
    for number, (tag, count) in sorted(mark.slots.items()):
        if number > sequence:
            return f"a node knows writer slot {number}, the index gave only {sequence}"
        mine = slots.get(number)
        if mine is None:
            continue
        if mine[0] != tag:
            return f"writer slot {number} was given twice"
        if count > mine[1]:
            return f"a node has seen transaction {count} of writer slot {number}, the index has {mine[1]}"
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
