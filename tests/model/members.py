"""Owns the model of membership: a node is emptied and taken out while front ends, keepers and an operator go by layouts of
different age, and while the index may be put back.

Three nodes, each alone in its group, R = 2; node 0 is the one that leaves. Each front end takes one message, and may sleep
between any two steps with the layout it knows; keepers do so with what they have found out. A node may be gone for ever at any
moment. The property: an acknowledged message lies on R of the nodes that are members, less those that are gone.

Placement is recorded and never computed, so a layout matters where it is gone by: to whom a front end turns, which copies
count, and what a keeper takes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import change

ACTIVE, DRAINING, LEAVING, EXPELLED = range(4)  # what the layout says of node 0
NODES = (0, 1, 2)
REQUIRED = 2
_OUT = 1  # the bit of node 0
_AHEAD, _EPOCH = 100, 1000  # how far ahead a layout is put back, and the layouts of the next epoch begin

Steps = Iterator[tuple[str, "State"]]


@dataclass(frozen=True)
class Laws:
    """The clauses. Each one that is False removes exactly that clause."""

    fences: bool = True  # the machine of the leaver refuses whoever goes by an older layout than it was told
    fence_lasts: bool = True  # what it was told survives a restart of the machine
    retires: bool = True  # who was expelled takes no commit any more, whatever an index that was put back says
    to_the_end: bool = True  # its log is entered, not only what the index knew
    fence_first: bool = True  # ... up to the end that it had behind the fence
    counts_no_more: bool = True  # its copies do not count while it is emptied
    counts_there: bool = True  # only nodes that are there count beside it, before it is leaving
    compare_and_set: bool = True  # leaving and expelled only if the layout is the one that was looked at
    once_more: bool = True  # the same once more between leaving and expelled
    puts_back: bool = True  # who knows a newer layout than the index puts it back
    puts_ahead: bool = True  # ... far ahead of all numbers that others may know
    apart: bool = True  # layouts that were made in different epochs never have one number


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    fronts: int = 1
    taken: int = 1  # messages that were acknowledged before, with a copy on node 0
    keepers: int = 2
    standing: int = ACTIVE  # of node 0, as all know it at first
    changes: int = 1  # of the operator's mind: to empty the node, or to let it take mail again
    gone: int = 0  # nodes that never come back
    restarts: int = 0  # of the leaver's machine
    restores: int = 0


class Front(NamedTuple):
    """A front end with one message: the layout it goes by, whom it heard, and whether it answered 250.

    It asks nodes 1 and 2 whenever they take the message: they refuse nobody.
    """

    version: int = 0
    standing: int = ACTIVE
    asked: bool = False  # it asked node 0
    said: int = 0  # the version it said then
    heard: int = 0  # one bit a node
    live: int = 0  # nodes that took the message
    row: int = -1  # nodes of which the index believes that they have it; -1: it does not know the message
    acked: bool = False


class Keeper(NamedTuple):
    """A keeper: the layout it goes by, how far it is, and what it read of the log of node 0."""

    version: int = 0
    standing: int = ACTIVE
    at: str = ""  # fence, end, enter, count, go; hasty: the same, by what it found wrongly
    read: tuple[int, ...] = ()


class State(NamedTuple):
    """Everything. `version` and `standing` are the layout of the index; `fence` and `out` are what node 0 knows."""

    version: int = 0
    standing: int = ACTIVE
    catching_up: bool = False
    saved: tuple[int, int, tuple[int, ...]] | tuple[()] = ()
    fence: int = 0
    out: bool = False  # it was expelled once: what lies there is lost, whatever an older index says
    hasty: bool = False  # it is leaving by a keeper who found that nothing depends on it, and was wrong
    gone: int = 0
    fronts: tuple[Front, ...] = ()
    keepers: tuple[Keeper, ...] = ()
    changes: int = 0
    restarts: int = 0
    restores: int = 0


class Members:
    """One cluster from which a node is taken."""

    def __init__(self, laws: Laws | None = None, bounds: Bounds | None = None) -> None:
        self.laws = laws or Laws()
        self.bounds = bounds or Bounds()

    def start(self) -> State:
        """All go by the first layout."""
        taken = Front(asked=True, live=0b011, row=0b011, acked=True)
        front, keeper = Front(standing=self.bounds.standing), Keeper(standing=self.bounds.standing)
        fronts = (*((taken,) * self.bounds.taken), *((front,) * self.bounds.fronts))
        return State(standing=self.bounds.standing, fronts=fronts, keepers=(keeper,) * self.bounds.keepers)

    def canonical(self, state: State) -> State:
        """Keepers are interchangeable, so are nodes that stay, and front ends with what others know of their messages."""
        rested = tuple([_rested(front) for front in state.fronts])
        state = _in_order(change(state, keepers=tuple(sorted(state.keepers)), fronts=rested))
        return min(state, _in_order(_swapped(state)))

    def wrong(self, state: State) -> str:
        """An acknowledged message is less redundant than the nodes that are there allow, or would be so without node 0."""
        members = ~state.gone & ~(_OUT if state.out else 0)
        least = REQUIRED - state.gone.bit_count()
        for front in state.fronts:
            if front.acked and (front.live & members).bit_count() < least:
                return "an acknowledged message lies on too few members"
        return "a node leaves on which copies depend" if state.hasty else ""

    def rests(self, state: State) -> bool:
        """The node is out or takes mail; or too few others are there."""
        return not state.catching_up and (state.standing in (ACTIVE, EXPELLED) or bool(state.gone))

    def steps(self, state: State) -> Steps:
        """All that may happen next."""
        for i, front in enumerate(state.fronts):
            yield from self._front(state, i, front)
            yield from self._copies(state, i, front)
        for i, keeper in enumerate(state.keepers):
            yield from self._keeper(state, i, keeper)
        yield from self._operator(state)
        yield from self._faults(state)

    # -- front ends and nodes ---------------------------------------------------------------------------------------------

    def _front(self, state: State, i: int, front: Front) -> Steps:
        if front.acked:
            return
        yield from self._reads(state, f"front end {i}", front.version, front.standing, i, -1)
        for node in NODES:
            bit = 1 << node
            if not node and not front.asked and front.standing == ACTIVE:
                yield f"front end {i} asks node 0", _front(state, i, asked=True, said=front.version)
            if front.live & bit & ~front.heard and not state.gone & bit:
                yield f"front end {i} hears node {node}", _front(state, i, heard=front.heard | bit)
        heard = front.heard & ~(_OUT if front.standing == EXPELLED else 0)
        if heard.bit_count() >= REQUIRED:
            yield f"front end {i} answers 250 without the index", _front(state, i, acked=True)
            if not state.catching_up:
                believed = front.heard & ~(_OUT if state.standing == EXPELLED else 0)
                yield f"front end {i} delivers", _front(state, i, acked=True, row=max(front.row, 0) | believed)

    def _copies(self, state: State, i: int, front: Front) -> Steps:
        """What nodes take, what scans find there, and what is copied."""
        for node in NODES:
            bit = 1 << node
            if state.gone & bit:
                continue
            takes = self._takes(state, front) if not node else not front.acked
            if not front.live & bit and takes:
                yield f"node {node} takes message {i}", _front(state, i, live=front.live | bit)
            if state.catching_up or (not node and state.standing == EXPELLED):
                continue
            if front.live & bit and (front.row < 0 or not front.row & bit):
                yield f"message {i} is found on node {node}", _front(state, i, row=max(front.row, 0) | bit)
            if front.row >= 0 and not front.row & bit and self._wants_copy(state, front) and front.live & ~state.gone:
                if node or (state.standing == ACTIVE and not (self.laws.retires and state.out)):
                    yield f"message {i} is copied to node {node}", _front(state, i, live=front.live | bit, row=front.row | bit)
        if front.row > 0 and front.row & state.gone:
            yield f"what is gone of message {i} is believed no more", _front(state, i, row=front.row & ~state.gone)

    def _takes(self, state: State, front: Front) -> bool:
        """True if node 0 takes a message."""
        if not front.asked or (self.laws.retires and state.out):
            return False
        return not self.laws.fences or front.said >= state.fence

    def _wants_copy(self, state: State, front: Front) -> bool:
        empties = state.standing != ACTIVE and self.laws.counts_no_more
        return (front.row & ~(_OUT if empties else 0)).bit_count() < REQUIRED

    # -- the layout -------------------------------------------------------------------------------------------------------

    def _reads(self, state: State, who: str, version: int, standing: int, front: int, keeper: int) -> Steps:
        """Somebody asks the index for the layout; an older one than is known was put back, and is mended."""
        label = f"{who} reads the layout"
        if version > state.version and self.laws.puts_back:
            label = f"{who} puts the layout back"
            version = max(version + (_AHEAD if self.laws.puts_ahead else 0), self._version(state) + 1)
            state = change(state, version=version, standing=standing)
            if standing == EXPELLED:
                state = _believed_no_more(state)
        elif version >= self._version(state):
            return
        version = self._version(state)
        if keeper < 0:
            yield label, _front(state, front, version=version, standing=state.standing)
        else:
            yield label, _keeper(state, keeper, version=version, standing=state.standing, at="", read=())

    def _version(self, state: State) -> int:
        """What the index says of its layout's version: in a later epoch it is above all that were given before."""
        return max(state.version, state.restores * _EPOCH if self.laws.apart else 0)

    # -- keepers ----------------------------------------------------------------------------------------------------------

    def _keeper(self, state: State, i: int, keeper: Keeper) -> Steps:
        yield from self._reads(state, f"keeper {i}", keeper.version, keeper.standing, -1, i)
        if keeper.at:
            yield f"keeper {i} begins again", _keeper(state, i, at="", read=())
        if state.gone & _OUT:
            return
        behind = keeper.standing == LEAVING and not self.laws.once_more
        if not keeper.at and keeper.standing in (DRAINING, LEAVING) and not state.catching_up:
            first = "fence" if self.laws.fence_first else "end"
            yield f"keeper {i} looks", _keeper(state, i, at="go" if behind else first)
        elif keeper.at == "fence":
            after = "end" if self.laws.fence_first else "enter"
            fenced = change(state, fence=max(state.fence, keeper.version))
            yield f"keeper {i} fences node 0", _keeper(fenced, i, at=after)
        elif keeper.at == "end":
            read = tuple(front.live & _OUT for front in state.fronts) if self.laws.to_the_end else ()
            after = "enter" if self.laws.fence_first else "fence"
            yield f"keeper {i} reads the log of node 0 to its end", _keeper(state, i, at=after, read=read)
        elif keeper.at == "enter" and not state.catching_up:
            entered = state
            for number, found in enumerate(keeper.read):
                if found:
                    entered = _front(entered, number, row=max(entered.fronts[number].row, 0) | _OUT)
            yield f"keeper {i} enters it", _keeper(entered, i, at="count", read=())
        elif keeper.at == "count":
            if self._depends_on_none(state, keeper):
                hasty = keeper.standing == DRAINING and any(_hangs_on_it(state, front) for front in state.fronts)
                at = "hasty" if hasty else "go"
                yield f"keeper {i} finds that nothing depends on node 0", _keeper(state, i, at=at)
        elif keeper.at in ("go", "hasty"):
            yield from self._goes(state, i, keeper)

    def _depends_on_none(self, state: State, keeper: Keeper) -> bool:
        """True if each message that the index knows has its copies beside node 0."""
        counted = ~_OUT if self.laws.counts_no_more else -1
        if self.laws.counts_there and keeper.standing == DRAINING:
            counted &= ~state.gone
            if (0b110 & counted).bit_count() < REQUIRED:
                return False
        return all(
            (front.row & counted).bit_count() >= min(REQUIRED, (front.row & (counted | _OUT)).bit_count())
            for front in state.fronts
            if front.row >= 0
        )

    def _goes(self, state: State, i: int, keeper: Keeper) -> Steps:
        if self.laws.compare_and_set and keeper.version != self._version(state):
            return
        version = self._version(state) + 1
        if keeper.standing == DRAINING:
            after = change(state, version=version, standing=LEAVING, hasty=keeper.at == "hasty")
            yield f"keeper {i} has it leaving", _keeper(after, i, version=version, standing=LEAVING, at="")
        else:
            after = _believed_no_more(change(state, version=version, standing=EXPELLED, out=True))
            yield f"keeper {i} expels it", _keeper(after, i, version=version, standing=EXPELLED, at="")

    # -- the operator, and faults -----------------------------------------------------------------------------------------

    def _operator(self, state: State) -> Steps:
        if state.changes >= self.bounds.changes:
            return
        after = change(state, changes=state.changes + 1, version=self._version(state) + 1)
        if state.standing == ACTIVE:
            yield "!the operator wants node 0 emptied", change(after, standing=DRAINING)
        elif state.standing in (DRAINING, LEAVING):
            yield "!the operator lets node 0 take mail again", change(after, standing=ACTIVE)

    def _faults(self, state: State) -> Steps:
        if state.gone.bit_count() < self.bounds.gone:
            for node in NODES:
                if node or not state.out:
                    yield f"!node {node} is gone for ever", change(state, gone=state.gone | 1 << node)
        if state.restarts < self.bounds.restarts:
            fence = state.fence if self.laws.fence_lasts else 0
            yield "!the machine of node 0 starts anew", change(state, restarts=state.restarts + 1, fence=fence)
        if state.restores < self.bounds.restores:
            if not state.saved:
                rows = tuple(front.row for front in state.fronts)
                yield "!a backup is taken", change(state, saved=(state.version, state.standing, rows))
            else:
                yield "!the backup is put back", self._restored(state)
        if state.catching_up:
            entered = state
            for i, front in enumerate(state.fronts):
                found = front.live & ~state.gone & ~(_OUT if state.standing == EXPELLED else 0)
                if found:
                    entered = _front(entered, i, row=max(front.row, 0) | found)
            yield "the index has caught up", change(entered, catching_up=False)

    def _restored(self, state: State) -> State:
        assert state.saved
        version, standing, rows = state.saved
        fronts = tuple([change(front, row=row) for front, row in zip(state.fronts, rows, strict=True)])
        restored = change(state, version=version, standing=standing, fronts=fronts, saved=())
        return change(restored, catching_up=True, restores=state.restores + 1)


def _hangs_on_it(state: State, front: Front) -> bool:
    """True if an acknowledged message has a copy on node 0, and too few on others that are there."""
    others = front.live & ~state.gone & ~_OUT
    return front.acked and bool(front.live & _OUT) and others.bit_count() < REQUIRED


def _rested(front: Front) -> Front:
    """What a front end has in its hand matters no more when it has answered."""
    said = front.said if front.asked and not front.live & _OUT else 0
    if not front.acked and said == front.said:
        return front
    return change(front, said=said, version=0, standing=ACTIVE, heard=0) if front.acked else change(front, said=said)


def _in_order(state: State) -> State:
    """Front ends in order, each with what the backup and keepers know of its message."""
    if len(state.fronts) == 1:
        return state
    knowing = [
        (front, state.saved[2][i] if state.saved else 0, tuple([keeper.read[i : i + 1] for keeper in state.keepers]))
        for i, front in enumerate(state.fronts)
    ]
    order = sorted(range(len(knowing)), key=knowing.__getitem__)
    saved = (*state.saved[:2], tuple([state.saved[2][i] for i in order])) if state.saved else ()
    keepers = tuple([change(k, read=tuple([k.read[i] for i in order])) if k.read else k for k in state.keepers])
    return change(state, fronts=tuple([state.fronts[i] for i in order]), saved=saved, keepers=keepers)


def _swap(nodes: int) -> int:
    return nodes if nodes < 0 else (nodes & _OUT) | (nodes & 2) << 1 | (nodes & 4) >> 1


def _swapped(state: State) -> State:
    """Nodes 1 and 2 have each other's names."""
    fronts = [change(f, heard=_swap(f.heard), live=_swap(f.live), row=_swap(f.row)) for f in state.fronts]
    saved = (*state.saved[:2], tuple([_swap(row) for row in state.saved[2]])) if state.saved else ()
    return change(state, fronts=tuple(fronts), gone=_swap(state.gone), saved=saved)


def _front(state: State, i: int, **changes: object) -> State:
    fronts = state.fronts
    return change(state, fronts=(*fronts[:i], change(fronts[i], **changes), *fronts[i + 1 :]))


def _keeper(state: State, i: int, **changes: object) -> State:
    keepers = state.keepers
    return change(state, keepers=(*keepers[:i], change(keepers[i], **changes), *keepers[i + 1 :]))


def _believed_no_more(state: State) -> State:
    """What the index believes of node 0 goes with it."""
    return change(state, fronts=tuple([change(f, row=f.row & ~_OUT) if f.row > 0 else f for f in state.fronts]))
