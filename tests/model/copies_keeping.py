"""Owns the keepers of the copies model: reconcile, orders, forgetting, repair, compaction, and the walk after a loss."""

from __future__ import annotations

from tests.model.copies_state import (
    Bounds,
    Known,
    Laws,
    Node,
    R,
    Scan,
    State,
    Steps,
    boots_in,
    commit,
    decide,
    each,
    fits,
    groups_of,
    know,
    later_round,
    live,
    put,
    rolled_back,
    sign,
)
from tests.model.explorer import change


def keeper_steps(laws: Laws, bounds: Bounds, state: State) -> Steps:
    """What keepers may do next; each of them may sleep before any step."""
    for i, node in enumerate(state.nodes):
        known = node.known
        if known.member and sign(state, node):
            yield f"node {i} shows a mark the index lacks: commits were lost", lose(laws, state)
            continue
        if known.member and not node.met:
            caught = node.caught or (known.mark == len(node.log) and fits(laws, state, change(node, met=True)))
            yield f"marks of node {i} are compared", put(state, i, met=True, caught=caught)
        if node.kept:
            yield from _apply_kept(laws, bounds, state, i, node.kept)
        if fits(laws, state, node):
            if known.owes:
                yield from _walk(laws, state, i, node)
            else:
                yield from _reconcile(laws, bounds, state, i, node)
            yield from _orders(laws, state, i, node)
            yield from _lift(laws, state, i, node)
        elif known.member and node.met and (node.inc != known.inc or rolled_back(laws, node)):
            yield from _admission(laws, state, i, node)
        if known.member and state.epoch > node.epoch:
            after = put(state, i, epoch=state.epoch, ahead=node.ahead or bool(state.saved))
            yield f"node {i} gets the mark of epoch {state.epoch}", after
        yield from _repair(laws, bounds, state, i, node)
        yield from _compaction(laws, bounds, state, i, node)
    yield from _forget(laws, state)


# -- reconcile ------------------------------------------------------------------------------------------------------------


def _reconcile(laws: Laws, bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """Behind the watermark, to the end (law 6); for a round it names a fresh stamp first (law 9)."""
    decided = state.row in ("dead", "aborted")
    if node.ask == "passed" and laws.barrier:  # law 2
        return
    if node.known.mark < len(node.log):
        yield from _scanned(laws, bounds, state, i, False)
    if decided and not node.known.scanned:
        named = put(state, i, shut=True) if laws.names_stamp else state  # laws 2, 9
        yield from _scanned(laws, bounds, named, i, True)


def _scanned(laws: Laws, bounds: Bounds, state: State, i: int, late: bool) -> Steps:
    """A keeper has read a log; it applies that now, or keeps it for later."""
    node = state.nodes[i]
    log, start = node.log, node.known.mark
    found, at = "", 0
    if log.find("t") >= start:
        found, at = "t", log.find("t")
    elif live(log) >= start:
        found, at = log[live(log)], live(log)
    scan = Scan(node.inc, start, len(log), found, at, boots_in(log)[-1:], late)
    what = f"{'round scans' if late else 'reconcile reads'} node {i}"
    yield what, apply(laws, state, i, scan)
    if bounds.keeps_scans and not any(n.kept for n in state.nodes):
        yield what + ", the keeper sleeps", put(state, i, kept=scan)


def _apply_kept(laws: Laws, bounds: Bounds, state: State, i: int, scan: Scan) -> Steps:
    known = state.nodes[i].known
    after = put(state, i, kept=())
    yield f"the keeper of node {i} dies", after
    same = known.inc == scan.inc and known.mark == scan.start
    if known.member and (same or not laws.compare_and_set):  # law 6
        yield f"the keeper of node {i} applies what it read", apply(laws, after, i, scan)


def apply(laws: Laws, state: State, i: int, scan: Scan) -> State:
    """The table of law 6, and the watermark, in one transaction."""
    decided = state.row in ("dead", "aborted")
    known = state.nodes[i].known
    seen = max(scan.end, known.seen)
    after = know(
        state, i, mark=scan.end, seen=seen, boot=scan.boot or known.boot, scanned=known.scanned or (scan.late and decided)
    )
    after = commit(put(after, i, caught=True))
    if scan.found == "t":
        return lose(laws, state) if state.row == "live" else after  # law 6: proof of lost commits
    if not scan.found:
        return after
    if state.row == "live":
        return know(after, i, copy=True)
    if decided:
        return order(laws, after, i) if laws.dead_row else after  # law 6
    if (scan.found == "d" or not laws.origin) and (scan.at >= state.nodes[i].birth or not laws.birth_mark):
        return know(decide(after, "live"), i, copy=True)
    return drop(laws, after, i, scan.at)


def order(laws: Laws, state: State, i: int) -> State:
    """A tombstone is ordered, and the row's round raised in the same transaction (law 8)."""
    after = commit(know(state, i, order=True, copy=False))
    return later_round(after) if laws.order_raises_round else after


def drop(laws: Laws, state: State, i: int, at: int) -> State:
    """A drop of this one copy is ordered (law 6)."""
    return commit(know(state, i, drop=at + 1) if laws.orphans_dropped else know(state, i, order=True))


# -- orders ---------------------------------------------------------------------------------------------------------------


def _orders(laws: Laws, state: State, i: int, node: Node) -> Steps:
    """Tombstones and drops, with a mark that is durable before them (law 10); confirmed in a later transaction."""
    ahead = node.ahead or (state.dirty and laws.batch_marks)
    seen = max(len(node.log), node.known.seen) if laws.confirm_sees_end else node.known.seen
    if node.known.order:
        if "t" not in node.log:
            yield f"node {i} writes the tombstone", put(state, i, log=node.log + "t", ahead=ahead)
        else:
            yield f"the tombstone on node {i} is confirmed", commit(know(state, i, order=False, copy=False, seen=seen))
    if node.known.drop:
        log = dropped(node.log, node.known.drop - 1)
        if log != node.log:
            yield f"node {i} drops its copy", put(state, i, log=log, ahead=ahead)
        else:
            copy = node.known.copy and live(node.log) >= 0 and laws.drop_says_live
            yield f"the drop on node {i} is confirmed", commit(know(state, i, drop=0, copy=copy, seen=seen))


def dropped(log: str, at: int) -> str:
    """Without the copy that was first written at a position, wherever it moved (law 1)."""
    if "t" in log or at >= len(log):
        return log
    if log[at] == ",":
        at = log.rfind("m")
    if at < 0 or log[at] not in "drm":
        return log
    return log[:at] + "." + log[at + 1 :] + "x"


def _lift(laws: Laws, state: State, i: int, node: Node) -> Steps:
    """What lies before the birth mark was compared, and what was ordered there is done: the mark goes (law 12)."""
    owed = any(n.known.owes or n.known.strange for n in state.nodes)
    if laws.birth_lifted and node.birth and not (node.known.order or node.known.drop or owed):
        yield f"the birth mark of node {i} is lifted", put(state, i, birth=0)


def _forget(laws: Laws, state: State) -> Steps:
    """Rows of earlier rounds, when no member has an order or owes a walk (law 9)."""
    if state.row not in ("dead", "aborted"):
        return
    members = [node.known for node in state.nodes if node.known.member]
    # law 9: no orders, all scanned in a later round, and no walk owed
    if laws.forget_waits_orders and any(known.order for known in members):
        return
    if laws.forget_waits_scan and not all(known.scanned for known in members):
        return
    if not any(known.owes for known in members):
        yield "the row is forgotten", each(decide(state, ""), scanned=False)


# -- repair, compaction ---------------------------------------------------------------------------------------------------


def _repair(laws: Laws, bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """Three steps: a source is read, the copy written, the belief noted; the keeper may sleep between them (laws 6, 8)."""
    known = node.known
    if not node.repair:
        sources = [j for j, n in enumerate(state.nodes) if n.known.copy and not n.known.drop]
        wanted = state.row == "live" and not known.copy and not known.drop and state.repairs < bounds.repairs
        if wanted and fits(laws, state, node) and not known.owes and groups_of(bounds, sources) < R:
            if bounds.groups[i] not in {bounds.groups[j] for j in sources}:
                if any(live(state.nodes[j].log) >= 0 for j in sources):
                    yield f"repair for node {i} reads a copy", change(put(state, i, repair=(0,)), repairs=state.repairs + 1)
        return
    if len(node.repair) == 1:
        at = live(node.log)
        if "t" in node.log:
            yield f"node {i} refuses the repair", put(state, i, repair=())
        elif at >= 0:
            yield f"node {i} has the copy already", put(state, i, repair=(1, node.inc, len(node.log)))
        else:
            yield f"node {i} takes the repair", put(state, i, log=node.log + "r", repair=(1, node.inc, len(node.log) + 1))
        return
    after = put(state, i, repair=())
    yield f"the note of the repair on node {i} is lost", after
    late = node.repair[1] != known.inc and laws.note_names_incarnation
    late = late or (node.repair[1] == known.inc and node.repair[2] < known.seen and laws.note_names_end)
    if not known.member or late or (state.row != "live" and laws.belief_needs_live):
        yield f"the repair on node {i} is not noted", after
    else:
        yield f"the repair on node {i} is noted", commit(know(after, i, copy=True))


def _compaction(laws: Laws, bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """A record moves to the end: only from behind the watermark, and with a mark (law 10)."""
    at = live(node.log)
    if state.moves >= bounds.moves or at < 0 or not fits(laws, state, node) or node.known.owes:
        return
    if at < node.known.mark or not laws.behind_watermark:  # law 10
        log = node.log[:at] + "," + node.log[at + 1 :] + "m"
        ahead = node.ahead or (state.dirty and laws.compaction_marks)
        yield f"node {i} moves the record", change(put(state, i, log=log, ahead=ahead), moves=state.moves + 1)


# -- losses ---------------------------------------------------------------------------------------------------------------


def lose(laws: Laws, state: State) -> State:
    """Lost commits were noticed: a new epoch, and every node owes a walk (law 11)."""
    epoch = max(state.epoch, *(node.epoch for node in state.nodes)) + 1
    nodes = tuple(
        change(n, met=True, known=change(n.known, owes=laws.walk and n.known.member, scanned=False, strange=False))
        for n in state.nodes
    )
    return commit(change(state, nodes=nodes, epoch=epoch, stale=False))


def _walk(laws: Laws, state: State, i: int, node: Node) -> Steps:
    """The whole log of one node, naming a fresh stamp (laws 2, 11)."""
    if node.ask == "passed" and laws.barrier:
        return
    known: Known = node.known
    log, at = node.log, live(node.log)
    after = put(state, i, shut=True) if laws.walk_names_stamp else state  # laws 2, 11
    after = know(after, i, owes=False, mark=len(log), seen=len(log), boot=boots_in(log)[-1:] or known.boot)
    after = commit(put(after, i, caught=True))
    if "t" in log:
        after = know(after, i, copy=False)
        if state.row == "live":
            others = [j for j, n in enumerate(after.nodes) if n.known.copy]
            after = decide(after, "dead")
            for j in others:
                after = know(after, j, order=True, copy=False)
        elif state.row == "" and laws.walk_dead_row:  # law 11: also when there is no row yet
            after = decide(after, "dead")
    elif at < 0:
        after = know(after, i, copy=False)
    elif state.row == "live":
        after = know(after, i, copy=True)
    elif state.row in ("dead", "aborted"):
        after = order(laws, after, i)
    elif not known.drop or not laws.walk_heeds_drops:
        if (at < node.birth and laws.birth_mark) or (log[at] != "d" and not laws.walk_any_origin):
            after = drop(laws, after, i, at)
        else:
            after = know(decide(after, "live"), i, copy=True)
    if not any(n.known.owes for n in after.nodes):
        after = each(after, strange=False)
    yield f"node {i} is walked", after


def _admission(laws: Laws, state: State, i: int, node: Node) -> Steps:
    """A disk that the index does not know, or an older state of one it knows (law 12)."""
    known = node.known
    older = node.inc <= known.inc or (state.restores > 0 and not laws.newer_disk and node.birth < len(node.log))
    if older:
        boots = state.boots + 1
        birth = len(node.log) if laws.birth_mark else 0  # law 12
        yield (
            f"node {i} is told that it is older: new incarnation and birth mark",
            change(put(state, i, inc=boots, birth=birth), boots=boots),
        )
        return
    at = live(node.log)
    here = 0 <= at < node.birth
    after = know(state, i, inc=node.inc, mark=node.birth, seen=len(node.log), boot=boots_in(node.log)[-1:], copy=False)
    if laws.admission_anew:
        after = know(after, i, scanned=False)
    if known.owes:
        after = know(after, i, strange=True)
    elif here and state.row == "live":
        after = know(after, i, copy=True)
    elif here and state.row:
        after = order(laws, after, i)
    elif here:
        after = drop(laws, after, i, at)
    yield f"node {i} is admitted", commit(after)
