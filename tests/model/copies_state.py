"""Owns the state of the copies model: one key, its nodes, what the index and a front end know; and the clauses of the laws.

Time is not in it. Whatever is sent may arrive at any moment or never, so an absent node, a silent index and a front end that
sleeps for an hour need no state of their own: they are ways in which somebody does nothing for a while.

A log is a text, one letter a record, its place is its position:
`d` `r` `m` a commit by a delivery, by repair, moved by compaction; `.` one that was dropped; `,` one that moved away;
`t` a tombstone; `x` a drop; a digit the opening of the log (a boot). Openings and incarnations are counted in one number, so
a higher one is a later one: that stands for the retired incarnations which the real index and its marks remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.explorer import change

R = 2  # copies required, in as many groups


@dataclass(frozen=True)
class Laws:
    """The clauses. Each one that is False removes exactly that clause and nothing else."""

    durable: bool = True  # law 1: a receipt is given only for what is fsynced
    tombstone_refuses: bool = True  # law 1: a key with a tombstone is not committed again
    window: bool = True  # law 2: nodes look at stamps at all
    frozen: bool = True  # law 2: all stamps are frozen at the first ask
    boot_in_stamp: bool = True  # law 2: a stamp of another boot is refused
    barrier: bool = True  # law 2: a scan waits for appends that passed the check
    names_stamp: bool = True  # laws 2, 9: rounds name a fresh stamp
    walk_names_stamp: bool = True  # laws 2, 11: walks do
    after_abort: str = "own"  # law 4 as mended: after an abort was asked, only its own answer "live" gives 250; "deliver": as
    # written, so does the answer to a deliver that is sent then; "silence": the clause is not there
    index_first: bool = True  # law 5: nodes are told to abort only after the index took it
    confirmation: str = "stamped"  # law 5 as mended: a node that would refuse the delivery's stamp confirms nothing for
    # 451; "new": as written, the tombstone must be new there; "any": nothing of the kind
    refusal_behind_asks: bool = True  # law 5: a refusal counts only behind all earlier asks
    compare_and_set: bool = True  # law 6
    dead_row: bool = True  # law 6: a commit of a dead or aborted key has a tombstone ordered
    origin: bool = True  # law 6: what repair wrote is never entered as new mail
    orphans_dropped: bool = True  # law 6: a repair or moved copy without a row is dropped, not tombstoned
    insert_first: bool = True  # law 7: insert, then look
    late_deliver: bool = True  # law 7: look at all
    late_incarnation: bool = True  # law 7: a receipt of another incarnation counts as settled
    belief_needs_live: bool = True  # law 8: who adds belief requires a live row
    note_names_incarnation: bool = True  # law 8 as mended: the note of a repair names the incarnation it wrote to
    note_names_end: bool = True  # law 8 as mended: and the log's end then; void when the index has seen a later end
    drop_says_live: bool = True  # law 6 as mended: who confirms a drop says whether another copy is live there
    order_raises_round: bool = True  # law 8
    forget_waits_orders: bool = True  # law 9
    forget_waits_scan: bool = True  # law 9: rounds at all
    admission_anew: bool = True  # law 9: an older disk or a new one starts its round anew
    retired_for_ever: bool = True  # law 9: an expelled node returns only emptied
    batch_marks: bool = True  # law 10: tombstone and drop batches carry a mark
    compaction_marks: bool = True  # law 10: permission to compact carries one
    behind_watermark: bool = True  # law 10: compaction moves only what lies behind the watermark
    walk: bool = True  # law 11: a loss makes every node owe a walk
    walk_dead_row: bool = True  # law 11: on the walk a tombstone makes a row dead also where there is none
    walk_any_origin: bool = True  # law 11: on the walk a copy without a row is mail whatever its origin
    walk_heeds_drops: bool = True  # law 11: not where a drop is pending
    walk_quorum: bool = True  # law 11: readers wait until G-R+1 groups are walked
    restore_waits: bool = True  # law 10 as mended: readers wait for G-R+1 logs also when no mark shows a loss
    whole_groups: bool = True  # actors: a group counts when all its nodes do
    chain: bool = True  # law 12: the chain of boots is looked at
    chain_places: bool = True  # law 12 as mended: the chain says where each boot began
    birth_mark: bool = True  # law 12
    birth_lifted: bool = True  # law 12 as mended: the birth mark goes when all before it was compared, and its orders are done
    confirm_sees_end: bool = True  # law 12 as mended: a confirmed tombstone or drop raises end_seen
    newer_disk: bool = True  # law 12 as mended: an incarnation that an index which lost commits never knew is no older disk


@dataclass(frozen=True)
class Bounds:
    """How much may happen. Groups of the nodes, where the story begins, and how often each fault may strike."""

    groups: tuple[int, ...] = (0, 1)
    start: str = "asked"
    deletes: bool = True
    crashes: int = 0
    repairs: int = 0
    moves: int = 0  # by compaction
    bad: int = 0  # copies that rot
    lost: int = 0  # disks
    older: int = 0  # disks put back
    harm: int = 1  # of bad, lost, older and expelled together: the budget of the promises
    expels: int = 0
    restores: int = 0
    marks: bool = False  # MARKs between the batches
    keeps_scans: bool = False  # a keeper may hold a scan and apply it late
    clock: bool = False  # stamps grow old


class Scan(NamedTuple):
    """What a keeper read of one log. `found`: the letter of a commit or tombstone, or nothing. `late`: for a round."""

    inc: int
    start: int
    end: int
    found: str
    at: int
    boot: str
    late: bool


class Known(NamedTuple):
    """What the index knows of one node."""

    copy: bool = False  # believed to hold one
    order: bool = False  # a tombstone is ordered
    drop: int = 0  # a drop is ordered of the copy at this position, counted from 1
    mark: int = 0  # the watermark
    seen: int = 0  # the highest end of the log that an answer has shown (end_seen)
    inc: int = 0
    boot: str = ""
    scanned: bool = False  # in a round later than the row's
    owes: bool = False  # a walk
    strange: bool = False  # admitted since commits were lost: not intact
    member: bool = True


class Node(NamedTuple):
    """One node: its disk, its memory, messages under way, and what others keep about it."""

    log: str = ""
    inc: int = 0
    birth: int = 0
    epoch: int = 0
    ahead: bool = False  # it has a mark that the backup of the index lacks
    shut: bool = False  # it refuses the stamp that the delivery froze
    ask: str = ""  # "", sent, passed (the check; the append is under way), done
    reply: str = ""  # of the node: y yes, n a definite refusal; capital once heard; T a new tombstone confirmed
    receipt: tuple[int, int] = (0, 0)  # incarnation, position
    known: Known = Known()
    saved: Known | tuple[()] = ()  # in the backup
    kept: Scan | tuple[()] = ()  # by a keeper
    hand: bool = False  # a keeper of the time before the loss holds a batch with the tombstone
    repair: tuple[int, ...] = ()  # (0,) source read; (1, incarnation, end) written, not noted yet
    disk: tuple[str, int, int, int, bool] | tuple[()] = ()  # an older state: log, inc, birth, epoch, ahead
    met: bool = True  # its marks were compared since the index was restored
    caught: bool = True  # its log was read to the end since then


class State(NamedTuple):
    """Everything. `row` is the key's fate in the index; `saved` what the backup has of row and epoch."""

    nodes: tuple[Node, ...]
    row: str = ""  # "", live, dead, aborted
    front: str = "feeding"  # delivering, aborting, telling, done
    answer: str = ""
    asked_abort: bool = False
    deliver: bool = False  # the transaction is under way
    abort: bool = False
    looked: bool = False  # only without insert_first
    shown: bool = False
    deleted: bool = False
    epoch: int = 0
    saved: tuple[str, int] | tuple[()] = ()
    dirty: bool = False  # committed since the backup
    stale: bool = False  # restored, and no loss noticed yet
    boots: int = 0
    restores: int = 0
    crashes: int = 0
    repairs: int = 0
    moves: int = 0
    harm: int = 0


Steps = Iterator[tuple[str, State]]


def live(log: str) -> int:
    """The position of the copy that is live in a log; -1 if there is none."""
    if "t" in log:
        return -1
    return max(log.rfind("d"), log.rfind("r"), log.rfind("m"))


def put(state: State, i: int, **changes: Any) -> State:
    """With a node changed."""
    nodes = state.nodes
    return change(state, nodes=(*nodes[:i], change(nodes[i], **changes), *nodes[i + 1 :]))


def know(state: State, i: int, **changes: Any) -> State:
    """With what the index knows of a node changed."""
    return put(state, i, known=change(state.nodes[i].known, **changes))


def each(state: State, **changes: Any) -> State:
    """With what the index knows of every node changed."""
    return change(state, nodes=tuple(change(n, known=change(n.known, **changes)) for n in state.nodes))


def commit(state: State) -> State:
    """An index transaction: the backup lacks it."""
    return state if state.dirty or not state.saved else change(state, dirty=True)


def later_round(state: State) -> State:
    """The row's round is raised: scans made before, or still in a keeper's hands, say nothing about it (law 9)."""
    nodes = tuple(
        change(n, known=change(n.known, scanned=False), kept=change(n.kept, late=False) if n.kept else ()) for n in state.nodes
    )
    return change(state, nodes=nodes)


def decide(state: State, row: str) -> State:
    """A row is made or changes its fate (law 3)."""
    return commit(change(later_round(state), row=row))


def close(state: State, answer: str = "") -> State:
    """The front end is done. What it heard matters only to a transaction that is still under way."""
    return forget_replies(change(state, front="done", answer=answer))


def forget_replies(state: State) -> State:
    """Nobody listens any more, so what was said means nothing."""
    if state.front != "done" or state.deliver:
        return state
    return keep_replies(state, "")


def keep_replies(state: State, kept: str) -> State:
    """Only replies of these kinds matter from now on."""
    nodes = tuple(change(n, reply="", receipt=(0, 0)) if n.reply and n.reply not in kept else n for n in state.nodes)
    return change(state, nodes=nodes)


def groups_of(bounds: Bounds, having: list[int]) -> int:
    """How many groups have at least one of these nodes."""
    return len({bounds.groups[i] for i in having})


def groups_whole(laws: Laws, bounds: Bounds, state: State, having: list[bool]) -> int:
    """How many groups have all their member nodes among these."""
    whole: dict[int, bool] = {}
    for i, node in enumerate(state.nodes):
        group = bounds.groups[i]
        if not laws.whole_groups:
            whole[group] = whole.get(group, False) or having[i]
        else:
            whole[group] = whole.get(group, True) and (having[i] or not node.known.member)
    return sum(whole.values())


def sign(state: State, node: Node) -> bool:
    """The node's marks prove that the index lost commits (law 10)."""
    return state.stale and (node.ahead or node.epoch > state.epoch)


def enters(laws: Laws, bounds: Bounds, state: State) -> bool:
    """The index takes deliveries: marks were compared, and the epoch is durable on R groups (laws 10, 11)."""
    if not state.restores:
        return True
    need = len(set(bounds.groups)) - R + 1
    if groups_whole(laws, bounds, state, [n.met for n in state.nodes]) < need:
        return False
    return not state.epoch or groups_of(bounds, [i for i, n in enumerate(state.nodes) if n.epoch == state.epoch]) >= R


def served(laws: Laws, bounds: Bounds, state: State) -> bool:
    """Readers get listings, not temporary errors (law 11)."""
    if not state.restores:
        return True
    if not enters(laws, bounds, state):
        return False
    if state.stale:
        if not laws.restore_waits:
            return True
        known = [n.caught for n in state.nodes]
    elif not laws.walk_quorum or not any(n.known.owes for n in state.nodes if n.known.member):
        return True
    else:
        known = [not n.known.owes and not n.known.strange for n in state.nodes]
    return groups_whole(laws, bounds, state, known) >= len(set(bounds.groups)) - R + 1


def boots_in(log: str) -> str:
    """The chain of boots."""
    return "".join(letter for letter in log if letter.isdigit())


def rolled_back(laws: Laws, node: Node) -> bool:
    """The log is an older state of what the index knows (law 12)."""
    known = node.known
    end = len(node.log)
    if laws.chain:
        chain = boots_in(node.log)
        if known.boot and known.boot not in chain:
            return True
        if laws.chain_places:  # the boot after the one the index knows began where that one's log ended
            later = chain[chain.index(known.boot) + 1 :] if known.boot else chain
            if later:
                end = node.log.index(later[0])
    return end < max(known.mark, known.seen)


def fits(laws: Laws, state: State, node: Node) -> bool:
    """A keeper may work with this node: it is compared, of the incarnation the index knows, and no older state (laws 6, 12)."""
    if not node.known.member or not node.met or node.inc != node.known.inc:
        return False
    return not sign(state, node) and not rolled_back(laws, node)
