"""Owns the model of numbers (laws 10 and 11): one mailbox name, an index that loses commits, groups that remember.

Every number goes to another message, so giving a pair (UIDVALIDITY, UID) twice is the violation. A backup of the index is made
and restored, the same one perhaps several times; a loss is noticed, and then every step of law 11 may be interrupted by the
next loss; or nobody notices, because no mark was written since, and the process only knows that the one before it did not stop
in good order (law 10, SQLite). The whole index may be lost and rebuilt from what the groups hold (law 13). A mailbox may be
removed and made again under its name, with a fresh UIDVALIDITY. One group may lose its disk. A keeper may sleep over a
checkpoint and write it when a later one is there.

A head counts as durable only when R groups are known to have it; where a mailbox could get no number below its bound, what it
reaches is written to them before the epoch begins, and a rebuild writes what it goes on from.

JUMP is 3 here and the small jump 2. One group stands for its nodes. That a loss is noticed is the business of `marks`; here it
is, or it leaves no mark. MODSEQs are numbers like UIDs and need no model of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from tests.model.explorer import change

R = 2
JUMP = 3  # stands for 1,000,000
SMALL = 2  # stands for 10,000: numbers between two marks, and the jump after an unclean start


@dataclass(frozen=True)
class Laws:
    """The clauses. Each one that is False removes exactly that clause."""

    difference: bool = True  # law 11: a mailbox jumps for every epoch that it missed
    heads: bool = True  # law 11: checkpoint heads are read before it gets a number in the new epoch
    head_epoch: bool = True  # laws 11, 13 as mended: a head says in which epoch it was written
    per_source: bool = True  # law 11 as mended: a head and the row each jump from their own epoch, and the farther one counts
    base_jumps: bool = True  # law 11 as mended: the bound jumps along; a new epoch gives no mailbox JUMP numbers more
    write_back: bool = True  # law 11 as mended: a head moves the bound only once it is durable on R groups; where no number is
    # left below the bound, what the mailbox reaches is written there before a number is given
    heads_rise: bool = True  # law 11 as mended: a node refuses a checkpoint that is older than the one it has
    other_head: bool = True  # law 11 as mended: a head of a later UIDVALIDITY means that nothing is known of this one
    durable_epoch: bool = True  # law 11: the epoch is durable on R groups before a number is given in it
    read_quorum: bool = True  # law 11: it is read from G-R+1 groups
    intact: bool = True  # law 11: with intact history
    limit: bool = True  # law 11: at most JUMP numbers beyond the last durable checkpoint
    validity_jumps: bool = True  # law 11: UIDVALIDITY's counter jumps too
    small_jump: bool = True  # law 10: after an unclean start
    small_difference: bool = True  # law 10 as mended: for every unclean start that the mailbox missed
    jumps_add: bool = True  # laws 10, 11 as mended: a mailbox that missed epochs and unclean starts jumps for both
    small_validity: bool = True  # law 10 as mended: UIDVALIDITY's counter jumps then, too
    mark_numbers: bool = True  # law 10: a mark after so many numbers
    mark_start: bool = True  # law 10: a mark at the start


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    groups: int = 3
    numbers: int = 4
    losses: int = 2  # noticed
    puts_back: int = 0  # unnoticed
    rebuilds: int = 0
    renewals: int = 0  # the mailbox is made again
    backups: int = 1
    disks: int = 0
    backed_up: bool = False  # the backup was made at the beginning
    sleeps: bool = False  # a keeper may sleep between the plan of a checkpoint and its writing


NONE = (0, 0, 0)


def _reach(head: tuple[int, int, int]) -> tuple[int, int]:
    """How far a head says that numbers may have got, whatever the epoch is now."""
    return head[0], head[1] - JUMP * head[2]


class Group(NamedTuple):
    """What one group's nodes remember."""

    epoch: int = 0
    head: tuple[int, int, int] = NONE  # UIDVALIDITY, next UID, epoch of the mailbox: the checkpoint's head
    validity: int = 1  # the highest UIDVALIDITY that a mark told
    inc: int = 0
    known_inc: int = 0  # the incarnation that the index knows
    saved_inc: int = 0  # and its backup
    told: bool = False  # it has the epoch that is being begun


class Index(NamedTuple):
    """What the database holds. `base`: no number JUMP or more beyond it is given."""

    validity: int = 1
    next: int = 1
    epoch: int = 0  # the mailbox was last numbered in
    start: int = 0  # the unclean starts when it was last numbered
    base: int = 1
    index_epoch: int = 0
    starts: int = 0
    counter: int = 1  # the highest UIDVALIDITY given


class State(NamedTuple):
    """Everything. `phase`: open (numbers are given), lost (epoch and heads are to be read), telling (they are to be made
    durable), started (an unclean start; the mark is to be written).
    """

    index: Index  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here
    groups: tuple[Group, ...]
    saved: Index | tuple[()] = ()
    given: frozenset[tuple[int, int]] = frozenset()
    phase: str = "open"
    learned: tuple[int, int, int] = NONE
    planned: tuple[int, int, int] = NONE  # by a keeper that sleeps
    unmarked: int = 0  # numbers, and UIDVALIDITYs, given since the last mark
    marked: bool = False  # a mark was written since the backup
    twice: bool = False
    losses: int = 0
    puts_back: int = 0
    rebuilds: int = 0
    renewals: int = 0
    backups: int = 0
    disks: int = 0


class Numbers:
    """One mailbox name."""

    def __init__(self, laws: Laws | None = None, bounds: Bounds | None = None) -> None:
        self.laws = laws or Laws()
        self.bounds = bounds or Bounds()
        self.read = self.bounds.groups - R + 1 if self.laws.read_quorum else self.bounds.groups - R

    def start(self) -> State:
        """Nothing was numbered yet."""
        state = State(Index(), tuple(Group() for _ in range(self.bounds.groups)))
        return change(state, saved=Index(), backups=1) if self.bounds.backed_up else state

    def canonical(self, state: State) -> State:
        """Groups are interchangeable."""
        groups = tuple(sorted(state.groups))
        return state if groups == state.groups else change(state, groups=groups)

    def rests(self, state: State) -> bool:
        """Numbers may be given."""
        return state.phase == "open"

    def wrong(self, state: State) -> str:
        """P10."""
        return "a UID is given twice" if state.twice else ""

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """All that may happen next."""
        if state.phase == "open":
            yield from self._number(state)
            yield from self._checkpoint(state)
        elif state.phase == "lost":
            yield from self._read_epoch(state)
        elif state.phase == "telling":
            yield from self._tell(state)
        else:
            yield "the start's mark is written", change(self._marked(state), phase="open")
        for i, g in enumerate(state.groups):
            if state.planned != NONE:
                head = max(g.head, state.planned) if self.laws.heads_rise else state.planned
                groups = (*state.groups[:i], change(g, head=head), *state.groups[i + 1 :])
                yield f"!the keeper that slept writes its checkpoint on {i}", change(state, groups=groups, planned=NONE)
        yield from self._faults(state)

    # -- numbers ----------------------------------------------------------------------------------------------------------

    def renumbered(self, index: Index) -> Index:
        """The row as it must be before it gets a number: both jumps add up (laws 10, 11)."""
        laws = self.laws
        epochs = index.index_epoch - index.epoch
        starts = index.starts - index.start if laws.small_jump and (laws.jumps_add or not epochs) else 0
        place = index.next
        place += JUMP * (epochs if laws.difference else min(epochs, 1))
        place += SMALL * (starts if laws.small_difference else min(starts, 1))
        if not epochs and not starts:
            return index
        base = index.base + JUMP * epochs if laws.base_jumps else place if epochs else index.base
        return change(index, next=place, base=base, epoch=index.index_epoch, start=index.starts)

    def _number(self, state: State) -> Iterator[tuple[str, State]]:
        index = self.renumbered(state.index)
        room = state.unmarked < SMALL or not self.laws.mark_numbers
        after = change(state, unmarked=state.unmarked + 1) if self.bounds.puts_back else state
        if len(state.given) < self.bounds.numbers and room and (index.next < index.base + JUMP or not self.laws.limit):
            pair = (index.validity, index.next)
            index = change(index, next=index.next + 1)
            after = change(after, index=index, given=state.given | {pair}, twice=pair in state.given)
            yield f"UID {pair[1]} of UIDVALIDITY {pair[0]} is given", after
        if state.renewals < self.bounds.renewals and room:
            after = change(after, index=self._fresh(state.index), given=state.given, twice=False, renewals=state.renewals + 1)
            yield "!the mailbox is made again", after
        if state.unmarked or (self.bounds.puts_back and not state.marked):
            yield "every group gets a mark", self._marked(state)

    @staticmethod
    def _fresh(index: Index) -> Index:
        """A fresh UIDVALIDITY, numbers from 1."""
        counter = index.counter + 1
        return change(index, validity=counter, counter=counter, next=1, base=1, epoch=index.index_epoch, start=index.starts)

    def _marked(self, state: State) -> State:
        """A mark on all groups that are there; a later put back of the backup is noticed (law 10)."""
        groups = tuple(change(g, validity=max(g.validity, state.index.counter)) for g in state.groups)
        return self._noticeable(change(state, groups=groups, unmarked=0))

    def _noticeable(self, state: State) -> State:
        """A mark lies on the nodes that the backup lacks."""
        return change(state, marked=True) if state.saved and self.bounds.puts_back else state

    def _checkpoint(self, state: State) -> Iterator[tuple[str, State]]:
        """On R groups, and then the index knows that it is durable; or interrupted on one."""
        index = state.index
        head = (index.validity, index.next, index.epoch)
        if self.bounds.sleeps and state.planned == NONE:
            yield f"!a checkpoint at {index.next} is planned, its keeper sleeps", change(state, planned=head)
        for held in (*combinations(range(len(state.groups)), R), *combinations(range(len(state.groups)), 1)):
            groups = tuple(change(g, head=head) if i in held else g for i, g in enumerate(state.groups))
            if groups == state.groups:
                continue
            after = self._noticeable(change(state, groups=groups))  # law 10: a checkpoint carries a mark
            if len(held) == R:
                after = change(after, index=change(index, base=index.next))
                yield f"a checkpoint at {index.next} is durable on {held}", after
            else:
                yield f"!a checkpoint at {index.next} reaches only {held}", after

    # -- law 11 -----------------------------------------------------------------------------------------------------------

    def _readable(self, state: State) -> Iterator[tuple[int, ...]]:
        """Sets of groups that are enough to be read."""
        intact = [i for i, g in enumerate(state.groups) if g.inc == g.known_inc or not self.laws.intact]
        yield from combinations(intact, self.read)

    def _read_epoch(self, state: State) -> Iterator[tuple[str, State]]:
        """Epoch and heads are read; the epoch becomes the highest known plus one, and heads teach the mailbox."""
        for among in self._readable(state):
            heads = [state.groups[i].head for i in among]
            epoch = max([state.index.index_epoch, *(state.groups[i].epoch for i in among)]) + 1
            counter = max([state.index.counter, *(max(state.groups[i].validity, state.groups[i].head[0]) for i in among)])
            if self.laws.validity_jumps:
                counter += JUMP * (epoch - state.index.index_epoch)
            head = max(heads, key=_reach)
            index, owed = self._far(self._learned(change(state.index, index_epoch=epoch, counter=counter), head))
            if not state.index.validity and self.laws.write_back:
                owed = head  # law 13: a rebuild goes on from it
            groups = tuple(change(g, told=False) for g in state.groups)
            after = change(state, index=index, groups=groups, phase="telling", learned=owed)
            yield f"{among} are read, the epoch becomes {epoch}", after

    def _tell(self, state: State) -> Iterator[tuple[str, State]]:
        """Epoch and heads go to group after group; when they are durable, numbers are given again."""
        epoch, counter = state.index.index_epoch, state.index.counter
        for i, g in enumerate(state.groups):
            if not g.told:
                head = max(g.head, state.learned, key=_reach)
                told = change(g, epoch=max(g.epoch, epoch), validity=max(g.validity, counter), head=head, told=True)
                groups = (*state.groups[:i], told, *state.groups[i + 1 :])
                yield f"group {i} gets epoch {epoch}", self._noticeable(change(state, groups=groups))
        if sum(g.told for g in state.groups) >= (R if self.laws.durable_epoch else 1):
            groups = tuple(change(g, told=False) for g in state.groups)
            yield "numbers are given again", change(state, groups=groups, phase="open", learned=NONE, unmarked=0)

    def _learned(self, index: Index, head: tuple[int, int, int]) -> Index:
        """What the highest head of a checkpoint teaches (law 11)."""
        validity, place, epoch = head
        if not self.laws.heads:
            return index
        if index.validity == 0 and validity:  # a rebuild: the head is all that is known (law 13)
            epoch = epoch if self.laws.head_epoch else index.index_epoch - 1
            return change(index, validity=validity, next=place, base=place, epoch=epoch)
        if index.validity == 0 or (validity > index.validity and self.laws.other_head):
            return self._fresh(index)
        if validity != index.validity:
            return index
        if not self.laws.per_source:
            return change(index, next=max(index.next, place))
        row = change(index, next=index.next + JUMP * max(0, epoch - index.epoch), epoch=max(epoch, index.epoch))
        row = change(row, base=index.base + JUMP * (row.epoch - index.epoch))
        place += JUMP * (row.epoch - epoch)
        if place <= row.next:
            return index
        return change(row, next=place, base=row.base if self.laws.write_back else place)

    def _far(self, index: Index) -> tuple[Index, tuple[int, int, int]]:
        """What the mailbox reaches, to be written, if it could get no number below its bound; the bound is there then."""
        row = self.renumbered(index)
        if not self.laws.write_back or not row.validity or row.next < row.base + JUMP:
            return index, NONE
        return change(row, base=row.next), (row.validity, row.next, row.epoch)

    # -- faults -----------------------------------------------------------------------------------------------------------

    def _faults(self, state: State) -> Iterator[tuple[str, State]]:
        bounds = self.bounds
        if state.backups < bounds.backups and state.phase == "open" and state.index != state.saved:
            groups = tuple(change(g, saved_inc=g.known_inc) for g in state.groups)
            saved = change(state, groups=groups, saved=state.index, backups=state.backups + 1, marked=False)
            yield "!the index is backed up", saved
        if state.saved and state.losses < bounds.losses and state.index != state.saved:
            lost = change(self._restored(state), phase="lost", learned=NONE, losses=state.losses + 1)
            yield "!the backup is restored, and that is noticed", lost
        if state.saved and state.puts_back < bounds.puts_back and not state.marked and state.phase == "open":
            yield "!the backup is put back, and no mark shows it", self._unclean(self._restored(state))
        if state.rebuilds < bounds.rebuilds:
            lost = change(state, index=Index(validity=0, counter=0), phase="lost", learned=NONE, rebuilds=state.rebuilds + 1)
            yield "!the index is lost, all of it", lost
        for i, g in enumerate(state.groups):
            if state.disks < bounds.disks:
                empty = Group(validity=0, inc=g.inc + 1, known_inc=g.known_inc, saved_inc=g.saved_inc)
                groups = (*state.groups[:i], empty, *state.groups[i + 1 :])
                yield f"!group {i} loses its disks", change(state, groups=groups, disks=state.disks + 1)
            if state.phase == "open" and g.known_inc != g.inc:
                groups = (*state.groups[:i], change(g, known_inc=g.inc), *state.groups[i + 1 :])
                yield f"group {i} is admitted anew", change(state, groups=groups)

    @staticmethod
    def _restored(state: State) -> State:
        groups = tuple(change(g, known_inc=g.saved_inc, told=False) for g in state.groups)
        return change(state, index=state.saved or state.index, groups=groups)

    def _unclean(self, state: State) -> State:
        """A process starts on what was put back, and sees that the one before did not stop (law 10)."""
        counter = state.index.counter + (SMALL if self.laws.small_validity else 0)
        index = change(state.index, starts=state.index.starts + 1, counter=counter)
        phase = "started" if self.laws.mark_start else "open"
        return change(state, index=index, puts_back=state.puts_back + 1, unmarked=0, phase=phase)
