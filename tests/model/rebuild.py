"""Owns the model of law 13: one message, delivered to two accounts, checkpoints interrupted anywhere, and the index lost.

Account A has two mailboxes, of which `INBOX` (0) is the message's target; account B has one that is never checkpointed. The
message is moved and copied between A's mailboxes and expunged; B expunges it, or is purged. A checkpoint is planned (what it
will say is fixed then), reaches node after node, and is durable on R; it may be abandoned at any point, and those of the two
mailboxes go on at the same time. In every state, for every set of nodes that may be read, the rebuild is made and compared
with what was acknowledged.

Three nodes, three groups, R = 2; the message lies on nodes 0 and 1. A deletion is durable when tombstones lie on R groups, or
when each mailbox of the account where the message was has a durable checkpoint of a later time.

With the word whether a key left the account (`left_word`) the rule about moved keys is not needed any more; without it, as the
law is written, it is, and it is not enough (`law-13-as-written`). A checkpoint is one record here: that an unfinished one of
many records never counts is assumed. Not modelled: flags, the queue's checkpoint, nodes that lost their disks before the
rebuild, an index that was restored between two checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from tests.model.explorer import change

R = 2
NODES = 3
COPIES = (0, 1)
READABLE = (*combinations(range(NODES), NODES - R + 1), tuple(range(NODES)))

# What a checkpoint says of the message: the number of its entry when it is there, or
ABSENT = 0  # nothing
GONE = -1  # named as expunged from this mailbox
SAME = -2  # a delta: nothing new since its base


@dataclass(frozen=True)
class Laws:
    """The clauses. Each one that is False, or not the first of its words, removes or changes exactly that clause."""

    left_word: bool = True  # law 13 as mended: a key is named with a word whether it left the account, and only that deletes
    moved: bool = True  # law 13: a key that moved is named only once the destination's checkpoint lists that very entry
    moved_copy: bool = True  # law 13: also when it came there by COPY
    names_gone: bool = True  # law 13: a checkpoint names expunged keys
    whole_names_all: bool = True  # law 13: a whole one names all that live elsewhere, not only those since the last
    names_dead: bool = True  # law 13 as mended: and those that are dead, until the row is forgotten
    enters_again: bool = True  # law 13: what ends in no mailbox of an account with a target is entered there again
    delta_replaces: bool = True  # law 13: a delta rewritten for the same base replaces the older one
    newest_state: bool = True  # law 13 as understood: the chain with the newest record counts, not the newest whole
    purged_first: bool = True  # law 13: PURGED is durable on R groups before rows go
    tombstones: bool = True  # law 13: a tombstone on any node that is read deletes


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    changes: int = 2  # moves, copies, expunges
    checkpoints: int = 4
    deltas: bool = False
    copies: bool = True  # COPY besides MOVE
    other: bool = True  # account B does things


class Record(NamedTuple):
    """A checkpoint of one mailbox: its number, its base (itself when whole), what it says, whether the key left the account."""

    number: int
    base: int
    says: int
    left: bool
    side: int


Place = tuple[Record | tuple[()], Record | tuple[()]]  # the two sides
EMPTY: Place = ((), ())


class Box(NamedTuple):
    """A mailbox: what the index shows and knows, and the checkpoint under way."""

    entry: int = 0  # the message's entry here; 0 if it is not here
    was: bool = False  # it was here once
    to: int = 0  # the entry it was moved to from here; -1 if it was expunged
    changed: int = 0  # when that was, in numbers of checkpoints
    whole: Record | tuple[()] = ()  # the last durable one
    durable: Record | tuple[()] = ()  # the last durable one, whole or delta, with what the chain says
    plan: Record | tuple[()] = ()
    written: tuple[int, ...] = ()


class State(NamedTuple):
    """Everything. `wholes` and `deltas`: by node, by mailbox. `dead`: the last reference went."""

    boxes: tuple[Box, Box] = (Box(entry=1, was=True), Box())
    other: str = "has"  # B: has, expunged, purging, purged
    dead: bool = False
    wholes: tuple[tuple[Place, Place], ...] = ((EMPTY, EMPTY),) * NODES
    deltas: tuple[tuple[Place, Place], ...] = ((EMPTY, EMPTY),) * NODES
    tombstones: tuple[int, ...] = ()
    purged: tuple[int, ...] = ()
    entries: int = 1
    number: int = 0
    changes: int = 0


class Rebuild:
    """One message of two accounts."""

    def __init__(self, laws: Laws | None = None, bounds: Bounds | None = None) -> None:
        self.laws = laws or Laws()
        self.bounds = bounds or Bounds()

    def start(self) -> State:
        """It was delivered to both."""
        return State()

    def canonical(self, state: State) -> State:
        """The two nodes with the copies are interchangeable."""
        first, second = self._of_node(state, 0), self._of_node(state, 1)
        if first <= second:
            return state
        swap = (1, 0, 2)
        one, two = (change(box, written=tuple(sorted(swap[i] for i in box.written))) for box in state.boxes)
        wholes, deltas = state.wholes, state.deltas
        return change(
            state,
            boxes=(one, two),
            wholes=(wholes[1], wholes[0], wholes[2]),
            deltas=(deltas[1], deltas[0], deltas[2]),
            tombstones=tuple(sorted(swap[i] for i in state.tombstones)),
            purged=tuple(sorted(swap[i] for i in state.purged)),
        )

    @staticmethod
    def _of_node(state: State, i: int) -> tuple[object, ...]:
        one, two = state.boxes
        said = (i in one.written, i in two.written, i in state.tombstones, i in state.purged)
        return state.wholes[i], state.deltas[i], said

    def rests(self, state: State) -> bool:
        """Always: nothing here waits."""
        return True

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """All that may happen next."""
        if state.changes < self.bounds.changes:
            yield from self._changes(state)
        for m in (0, 1):
            yield from self._checkpoint(state, m)
        if state.dead:
            for i in COPIES:
                if i not in state.tombstones:
                    yield f"node {i} gets the tombstone", change(state, tombstones=tuple(sorted((*state.tombstones, i))))
        if state.other == "purging":
            yield from self._purge(state)

    # -- what readers do --------------------------------------------------------------------------------------------------

    def _changes(self, state: State) -> Iterator[tuple[str, State]]:
        state = change(state, changes=state.changes + 1)
        for m in (0, 1):
            here, there = state.boxes[m], state.boxes[1 - m]
            if not here.entry:
                continue
            new = change(there, entry=state.entries + 1, was=True, changed=state.number)
            left = change(here, entry=0, to=state.entries + 1, changed=state.number)
            if not there.entry:
                moved = change(self._boxes(state, m, left, new), entries=state.entries + 1)
                yield f"the message is moved from {m} to {1 - m}", moved
                if self.bounds.copies:
                    yield (
                        f"the message is copied from {m} to {1 - m}",
                        change(self._boxes(state, m, here, new), entries=state.entries + 1),
                    )
            gone = change(here, entry=0, to=-1, changed=state.number)
            yield f"the message is expunged from {m}", self._died(self._boxes(state, m, gone, there))
        if state.other == "has" and self.bounds.other:
            yield "account B expunges it", self._died(change(state, other="expunged"))
            yield "account B is to be purged", change(state, other="purging")

    @staticmethod
    def _boxes(state: State, m: int, here: Box, there: Box) -> State:
        return change(state, boxes=(here, there) if m == 0 else (there, here))

    @staticmethod
    def _died(state: State) -> State:
        """With the last reference the row is dead, and tombstones are ordered (law 8)."""
        alive = state.other in ("has", "purging") or any(box.entry for box in state.boxes)
        return state if alive else change(state, dead=True)

    def _purge(self, state: State) -> Iterator[tuple[str, State]]:
        for i in range(NODES):
            if i not in state.purged:
                yield f"node {i} gets PURGED", change(state, purged=tuple(sorted((*state.purged, i))))
        if len(state.purged) >= R or not self.laws.purged_first:
            yield "the rows of account B go", self._died(change(state, other="purged"))

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def _checkpoint(self, state: State, m: int) -> Iterator[tuple[str, State]]:
        box = state.boxes[m]
        plan = box.plan
        if state.number < self.bounds.checkpoints:  # one under way is abandoned
            yield f"a whole checkpoint of {m} is planned", self._planned(state, m, True)
            if box.whole and self.bounds.deltas:
                yield f"a delta of {m} is planned", self._planned(state, m, False)
        if not plan:
            return
        for i in range(NODES):
            if (
                i not in box.written
                and len(box.written) < R
                and (plan.base == plan.number or self._holds(state, i, m, plan.base))
            ):
                yield f"node {i} gets the checkpoint of {m}", self._written(state, i, m, plan)
        if len(box.written) >= R:
            yield f"the checkpoint of {m} is durable", self._done(state, m, plan)

    @staticmethod
    def _with(state: State, m: int, box: Box) -> State:
        return change(state, boxes=(box, state.boxes[1]) if m == 0 else (state.boxes[0], box))

    @staticmethod
    def _holds(state: State, i: int, m: int, base: int) -> bool:
        return any(record and record.number == base for record in state.wholes[i][m])

    def _planned(self, state: State, m: int, whole: bool) -> State:
        """What the checkpoint will say is fixed in one snapshot of the index."""
        box = state.boxes[m]
        number = state.number + 1
        left = not any(b.entry for b in state.boxes)
        base = box.whole.number if box.whole else 0
        says = box.entry or (GONE if box.was and self._names(state, m, whole, base) else ABSENT)
        before = box.whole if whole else box.durable
        side = 1 - before.side if before else 0
        if not whole and box.changed < base and says == (box.whole.says if box.whole else ABSENT):
            says = SAME
        record = Record(number, number if whole else base, says, left, side)
        return self._with(change(state, number=number), m, change(box, plan=record, written=()))

    def _names(self, state: State, m: int, whole: bool, base: int) -> bool:
        """Is a key that is not here any more named as expunged? (law 13)"""
        laws, box, there = self.laws, state.boxes[m], state.boxes[1 - m]
        if not laws.names_gone or (state.dead and not laws.names_dead):
            return False
        if whole and not laws.whole_names_all and box.changed < base:
            return False
        if not there.entry or not laws.moved or (box.to < 0 and not laws.moved_copy):
            return True
        return isinstance(there.durable, Record) and there.durable.says == there.entry

    def _written(self, state: State, i: int, m: int, plan: Record) -> State:
        whole = plan.base == plan.number
        nodes = state.wholes if whole else state.deltas
        places = nodes[i]
        place = self._placed(places[m], plan, whole)
        changed = (place, places[1]) if m == 0 else (places[0], place)
        nodes = (*nodes[:i], changed, *nodes[i + 1 :])
        after = change(state, wholes=nodes) if whole else change(state, deltas=nodes)
        box = state.boxes[m]
        return self._with(after, m, change(box, written=tuple(sorted((*box.written, i)))))

    def _placed(self, place: Place, plan: Record, whole: bool) -> Place:
        """On the side that the last durable one does not use."""
        if not whole and not self.laws.delta_replaces and any(record and record.base == plan.base for record in place):
            return place
        return (plan, place[1]) if plan.side == 0 else (place[0], plan)

    def _done(self, state: State, m: int, plan: Record) -> State:
        box = state.boxes[m]
        whole = plan if plan.base == plan.number else box.whole
        says = whole.says if plan.says == SAME and whole else plan.says
        return self._with(state, m, change(box, whole=whole, durable=change(plan, says=says), plan=(), written=()))

    # -- the rebuild ------------------------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str:
        """P15 and P8, for every set of nodes that may be read."""
        acknowledged = any(box.entry for box in state.boxes)
        deleted = not acknowledged and self._deletion_durable(state)
        for among in READABLE:
            mine, theirs = self.rebuilt(state, among)
            if acknowledged and not mine:
                return "a message is missing after rebuild"
            if state.other in ("has", "purging") and not theirs and not any(i in state.purged for i in among):
                return "a message of another account is missing after rebuild"
            if deleted and mine:
                return "a deleted message is back after rebuild"
            if state.other == "purged" and theirs:
                return "mail of a purged account is back after rebuild"
        return ""

    @staticmethod
    def _deletion_durable(state: State) -> bool:
        """Tombstones lie on R groups; or all mailboxes where it was have durable checkpoints of a later time."""
        if len(state.tombstones) >= R:
            return True
        return all(box.durable and box.durable.left for box in state.boxes if box.was)

    def rebuilt(self, state: State, among: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether accounts A and B show the message in an index that is built from these nodes. A copy is always among them."""
        if state.tombstones and self.laws.tombstones and any(i in state.tombstones for i in among):
            return False, False
        theirs = not any(i in state.purged for i in among)
        found = [self._chain(state, among, m) for m in (0, 1)]
        if any(says > 0 for says, _ in found):
            return True, theirs
        if self.laws.left_word:
            ended = any(says == GONE and left for says, left in found)
        else:
            ended = found[0][0] == GONE
        return self.laws.enters_again and not ended, theirs

    def _chain(self, state: State, among: tuple[int, ...], m: int) -> tuple[int, bool]:
        """What the newest chain of a mailbox's checkpoints says: (entry, ABSENT or GONE; whether the key left the account)."""
        last: Record | None = None
        wholes: dict[int, Record] = {}
        for i in among:
            for record in state.wholes[i][m]:
                if record:
                    wholes[record.number] = record
                    if last is None or record.number > last.number:
                        last = record
        if last is None:
            return ABSENT, False
        newest = last.number
        for i in among:
            for record in state.deltas[i][m]:
                if record and record.number > last.number and record.base in wholes:
                    if record.base == newest or self.laws.newest_state:
                        last = record
        says = wholes[last.base].says if last.says == SAME else last.says
        return says, last.left
