"""Owns the model of law 10: writer slots with (number, tag, count), marks on a node, and an index that is restored.

Every commit has a name of its own here, so the truth is known: the index has some commits, and the node has seen effects of
some. The property: no comparison passes while the node has seen effects of a commit that the index lost. Besides: where
nothing was lost, nothing is ever taken for a loss; and after a loss was dealt with there is a way to numbers and listings
again.

A restored backup ends all connections; each process compares before its next number or listing (law 10). What it had read of
the index before may reach the node afterwards: a batch in a keeper's hand.

One node stands for a quorum: what is durable on R groups is met by whoever reads G-R+1. Not covered: a commit that no node has
seen and whose process is gone, or found its slot pruned; system identifier and timeline, which catch most of these; what a
process does between the restore and its next connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import change


@dataclass(frozen=True)
class Laws:
    """The clauses. Each one that is False, or not the first of its words, removes exactly that clause."""

    batch: str = "raised"  # law 10 as mended: what a batch carries is the sender's count, raised after it read the orders;
    # "all": the counts of all slots, read with the orders; "own": as written, the sender's count as it remembers it;
    # "nothing"
    settled: str = "epoch"  # law 10 as mended: marks carry the epoch, and those of an older one are settled; "never"
    prune_fences: bool = True  # law 10 as mended: the round that prunes tells the node all slots that stay, and the node
    # refuses what comes of or tells of another slot whose number is not above them
    new_slot: bool = True  # law 10 as mended: each new connection takes a new slot, once it has looked at its old one
    node_refuses: bool = True  # law 10 as mended: a node refuses what is of an older epoch than it knows
    epoch_cached: bool = False  # marks carry the epoch that a process once read
    compares: bool = True  # law 10: before the first number or listing
    tags: bool = True  # law 10: another tag
    counts: bool = True  # law 10: a higher count on a node
    sequence: bool = True  # law 10: a number above the sequence
    own_row: bool = True  # law 10: a slot finds its row lower
    unknown_commit: bool = True  # law 10: higher by one is the slot's own unknown commit
    pruned_missing: bool = True  # law 10: missing at or below the sequence is pruned
    prune_round: bool = True  # law 10: pruned only by a round, which compares the node


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    processes: int = 2  # at a time
    slots: int = 3  # in all
    commits: int = 3
    sends: int = 2  # batches and marks
    marks: bool = True  # whole marks besides the batches
    restores: int = 1
    backups: int = 1
    prunes: int = 1


class Row(NamedTuple):
    """A slot's row in the index; also what a process and a mark know of a slot."""

    number: int
    tag: int
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here


class Mark(NamedTuple):
    """What is on its way to the node: counts of slots, the highest number, the epoch; and which commits it tells of."""

    epoch: int
    sequence: int
    rows: tuple[Row, ...]
    commits: int  # one bit each
    sender: Row  # its slot


class Process(NamedTuple):
    """A process: its slot as it remembers it, whether it compared since its connection began, what it holds in its hand."""

    slot: Row | tuple[()] = ()
    compared: bool = False
    epoch: int = 0
    hand: Mark | tuple[()] = ()
    old: bool = False  # the slot is of a connection that is gone
    told: int = 0  # its own commits that it knows of: readers were shown their numbers


class Index(NamedTuple):
    """The database."""

    sequence: int = 0
    rows: tuple[Row, ...] = ()
    epoch: int = 0
    commits: int = 0  # one bit each


class State(NamedTuple):
    """Everything. `marks`, `sequence` and `epoch` lie on the node; `seen` are the commits whose effects it has seen."""

    index: Index = Index()  # type: ignore[assignment]  # as above
    processes: tuple[Process | tuple[()], ...] = ()
    marks: tuple[tuple[int, Row], ...] = ()  # (epoch, slot)
    sequence: tuple[int, int] = (0, 0)  # (epoch, the highest number)
    epoch: int = 0
    seen: int = 0
    fence: tuple[int, int, tuple[int, ...]] = (0, 0, ())  # epoch, sequence, tags: who else sends is refused
    saved: Index | tuple[()] = ()
    lost: bool = False  # the index lost something, and nobody has dealt with that
    wrong: str = ""
    slots: int = 0
    commits: int = 0
    sends: int = 0
    backups: int = 0
    restores: int = 0
    prunes: int = 0


class Marks:
    """One index, one node, a few processes."""

    def __init__(self, laws: Laws | None = None, bounds: Bounds | None = None) -> None:
        self.laws = laws or Laws()
        self.bounds = bounds or Bounds()

    def start(self) -> State:
        """Nobody runs."""
        return State(processes=((),) * self.bounds.processes)

    def canonical(self, state: State) -> State:
        """Processes are interchangeable."""
        processes = tuple(sorted(state.processes))
        return state if processes == state.processes else change(state, processes=processes)

    def wrong(self, state: State) -> str:
        """What a comparison did."""
        return state.wrong

    def rests(self, state: State) -> bool:
        """Somebody may number and list; or the bound of slots is reached."""
        return state.slots >= self.bounds.slots or any(p and p.compared for p in state.processes)

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """All that may happen next."""
        for i, process in enumerate(state.processes):
            if not process:
                if state.slots < self.bounds.slots:
                    yield f"process {i} starts", self._slot(state, i, Process())
                continue
            if process.hand:
                yield f"what process {i} sent reaches the node", self._reaches(state, i, process, process.hand)
            yield from self._process(state, i, process)
        if state.backups < self.bounds.backups and state.index != state.saved and state.restores < self.bounds.restores:
            yield "!the index is backed up", change(state, saved=state.index, backups=state.backups + 1)
        if state.saved and state.index != state.saved and state.restores < self.bounds.restores:
            ended = tuple(p and self._ended(p) for p in state.processes)
            last = state.restores + 1 == self.bounds.restores
            yield (
                "!the backup is restored",
                change(
                    state,
                    index=state.saved,
                    processes=ended,
                    saved=() if last else state.saved,
                    lost=True,
                    restores=state.restores + 1,
                ),
            )

    def _ended(self, process: Process) -> Process:
        """Its connection is gone; the next one compares before anything else (law 10)."""
        if not self.laws.compares:
            return process
        return change(process, compared=False, old=self.laws.new_slot)

    @staticmethod
    def _with(state: State, i: int, process: Process | tuple[()]) -> State:
        return change(state, processes=(*state.processes[:i], process, *state.processes[i + 1 :]))

    # -- a process --------------------------------------------------------------------------------------------------------

    def _process(self, state: State, i: int, process: Process) -> Iterator[tuple[str, State]]:
        if not process.slot:
            if state.slots < self.bounds.slots:
                yield f"process {i} takes a slot", self._slot(state, i, process)
            return
        if not process.compared:
            yield f"process {i} compares", self._compare(state, i, process)
            return
        if state.commits < self.bounds.commits:
            yield from self._commits(state, i, process)
        if not process.hand and state.sends < self.bounds.sends:
            yield from self._reads(state, i, process)
        yield from self._prune(state, i, process)
        if state.seen & ~state.index.commits:  # keepers compare again and again
            yield f"process {i} compares again", self._compare(state, i, process)

    def _slot(self, state: State, i: int, process: Process) -> State:
        """A new slot: the next number, and a tag that nobody else has."""
        row = Row(state.index.sequence + 1, state.slots + 1, 0)
        index = change(state.index, sequence=row.number, rows=(*state.index.rows, row))
        taken = change(process, slot=row, epoch=index.epoch)
        return self._with(change(state, index=index, slots=state.slots + 1), i, taken)

    def _raised(self, state: State, process: Process, commit: bool = True) -> tuple[State, Process] | None:
        """A transaction raises the slot's count last; None if it changed 0 rows."""
        mine = process.slot
        if not mine or mine not in state.index.rows:
            return None
        row = change(mine, count=mine.count + 1)
        index = change(state.index, rows=tuple(row if r == mine else r for r in state.index.rows))
        if commit:
            index = change(index, commits=index.commits | 1 << state.commits)
        told = process.told | commit << state.commits
        epoch = process.epoch if self.laws.epoch_cached else index.epoch
        knowing = change(process, slot=row, told=told, epoch=epoch)
        return change(state, index=index, commits=state.commits + commit), knowing

    def _commits(self, state: State, i: int, process: Process) -> Iterator[tuple[str, State]]:
        done = self._raised(state, process)
        if done is None:
            yield f"process {i} changes 0 rows", self._zero_rows(state, i, process)
            return
        after, knowing = done
        yield f"process {i} commits", self._with(after, i, knowing)
        yield f"process {i} commits, the answer is lost", after

    def _zero_rows(self, state: State, i: int, process: Process) -> State:
        """What became of the slot's row (law 10)."""
        kind = self._own_row(state.index, process.slot)
        if kind == "unknown":
            assert process.slot
            return self._with(state, i, change(process, slot=change(process.slot, count=process.slot.count + 1)))
        if kind != "lost":
            told = process.told if kind == "lower" else 0  # not covered: see `_compare`
            return self._with(state, i, change(process, slot=(), compared=False, old=False, told=told))
        return self._lost(state, i, process)

    def _own_row(self, index: Index, slot: Row | tuple[()]) -> str:
        """same, unknown (a commit of its own), pruned, or lost; lower if nobody cares."""
        assert slot
        for row in index.rows:
            if row.number == slot.number:
                if row.tag == slot.tag and row.count == slot.count:
                    return "same"
                if row.tag == slot.tag and row.count == slot.count + 1:
                    return "unknown" if self.laws.unknown_commit else "lost"
                return "lost" if self.laws.own_row else "lower"
        return "pruned" if slot.number <= index.sequence and self.laws.pruned_missing else "lost"

    # -- comparing --------------------------------------------------------------------------------------------------------

    def _shows_loss(self, state: State) -> bool:
        """The node remembers what this index does not have (law 10)."""
        laws, index = self.laws, state.index
        if state.epoch > index.epoch:
            return True
        epoch, highest = state.sequence
        if laws.sequence and highest > index.sequence and (epoch == index.epoch or laws.settled == "never"):
            return True
        rows = {row.number: row for row in index.rows}
        for epoch, seen in state.marks:
            if epoch != index.epoch and laws.settled == "epoch":
                continue
            row = rows.get(seen.number)
            if row is None:
                if not laws.pruned_missing:
                    return True
            elif row.tag != seen.tag:
                if laws.tags:
                    return True
            elif row.count < seen.count and laws.counts:
                return True
        return False

    def _compare(self, state: State, i: int, process: Process) -> State:
        """Own row and the node's marks, before numbers and listings."""
        kind = self._own_row(state.index, process.slot)
        if process.epoch < state.index.epoch and self.laws.settled == "epoch":
            kind = "settled"  # whatever became of it: that was dealt with when the epoch was raised
        if kind == "lost" or self._shows_loss(state):
            return self._lost(state, i, process)
        if state.seen & ~state.index.commits:
            return change(state, wrong="lost commits pass unnoticed")
        if kind == "pruned":  # nothing proves what became of its own commits in so long a silence: not covered
            process = change(process, told=0)
        if process.told & ~state.index.commits:
            return change(state, wrong="a process goes on behind its own lost commit")
        if kind in ("pruned", "lower", "settled") or process.old:
            return self._with(state, i, change(process, slot=(), old=False))
        if kind == "unknown":
            assert process.slot
            process = change(process, slot=change(process.slot, count=process.slot.count + 1))
        return self._with(state, i, change(process, compared=True, epoch=state.index.epoch))

    def _lost(self, state: State, i: int, process: Process) -> State:
        """A new epoch, durable on the node, which is walked (law 11); the process takes a new slot."""
        if not state.lost:
            dealt = "that was dealt with is noticed again" if state.restores else "is noticed where none was"
            return change(state, wrong=f"a loss {dealt}")
        epoch = max(state.index.epoch, state.epoch) + 1
        processes = tuple(p and change(p, told=0) for p in state.processes)
        index = change(state.index, epoch=epoch)
        after = change(state, index=index, processes=processes, epoch=epoch, seen=0, lost=False)
        return self._with(after, i, change(process, slot=(), compared=False, old=False, told=0))

    # -- what reaches the node --------------------------------------------------------------------------------------------

    def _reads(self, state: State, i: int, process: Process) -> Iterator[tuple[str, State]]:
        """A keeper reads orders, or what a mark tells, and will send it."""
        sent = change(state, sends=state.sends + 1)
        if self.bounds.marks:
            yield (
                f"process {i} reads a mark",
                self._with(sent, i, change(process, hand=self._mark(state, process, state.index.rows))),
            )
        kind = self.laws.batch
        rows: tuple[Row, ...] = ()
        if kind == "raised":
            done = self._raised(sent, process) if state.commits < self.bounds.commits else None
            if done is None:
                return
            sent, process = done
            assert process.slot
            rows = (process.slot,)
        elif kind == "all":
            rows = state.index.rows
        elif kind == "own":
            assert process.slot
            rows = (process.slot,)
        yield f"process {i} reads orders", self._with(sent, i, change(process, hand=self._mark(sent, process, rows)))

    def _mark(self, state: State, process: Process, rows: tuple[Row, ...]) -> Mark:
        epoch = process.epoch if self.laws.epoch_cached else state.index.epoch
        assert process.slot
        return Mark(epoch, max((row.number for row in rows), default=0), rows, state.index.commits, process.slot)

    def _reaches(self, state: State, i: int, process: Process, mark: Mark) -> State:
        """The mark is durable, and then the deed is done: the node has seen effects of these commits."""
        epoch, sequence, tags = state.fence
        named = (*mark.rows, mark.sender)
        fenced = mark.epoch == epoch and any(row.number <= sequence and row.tag not in tags for row in named)
        if fenced or (mark.epoch < state.epoch and self.laws.node_refuses):
            return self._with(state, i, change(process, hand=()))
        best = {(epoch, row.number, row.tag): row.count for epoch, row in state.marks}
        for row in mark.rows:
            place = (mark.epoch, row.number, row.tag)
            best[place] = max(best.get(place, 0), row.count)
        marks = tuple((epoch, Row(number, tag, count)) for (epoch, number, tag), count in sorted(best.items()))
        highest = max(state.sequence, (mark.epoch, mark.sequence))
        after = change(state, marks=marks, sequence=highest, seen=state.seen | mark.commits)
        return self._with(after, i, change(process, hand=()))

    # -- pruning ----------------------------------------------------------------------------------------------------------

    def _prune(self, state: State, i: int, process: Process) -> Iterator[tuple[str, State]]:
        """Slots of processes that stopped or fell silent; by a round, which compares the node."""
        if state.prunes >= self.bounds.prunes or (self.laws.prune_round and self._shows_loss(state)):
            return
        done = self._raised(state, process, commit=False)
        for row in state.index.rows:
            if done is not None and row != process.slot:
                after, knowing = done
                index = change(after.index, rows=tuple(r for r in after.index.rows if r != row))
                after = self._with(change(after, index=index, prunes=state.prunes + 1), i, knowing)
                if self.laws.prune_fences:
                    after = change(after, fence=(index.epoch, index.sequence, tuple(r.tag for r in index.rows)))
                yield f"process {i} prunes slot {row.number}", after
