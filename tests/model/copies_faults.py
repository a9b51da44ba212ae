"""Owns what goes wrong in the copies model: restarts, bad copies, lost and older disks, expulsion, a restored index."""

from __future__ import annotations

from tests.model.copies_state import (
    Bounds,
    Known,
    Laws,
    Node,
    R,
    State,
    Steps,
    commit,
    groups_of,
    know,
    live,
    put,
)
from tests.model.explorer import change


def fault_steps(laws: Laws, bounds: Bounds, state: State) -> Steps:
    """What may go wrong next. Nothing needs these to come to rest, but an expelled node may be given back."""
    for i, node in enumerate(state.nodes):
        if state.crashes < bounds.crashes:
            yield f"!node {i} restarts", change(_restarted(laws, state, i), crashes=state.crashes + 1)
        if node.known.member:
            yield from _copies(bounds, state, i, node)
            yield from _disks(bounds, state, i, node)
        yield from _membership(laws, bounds, state, i, node)
        if node.hand:
            yield from _batch_in_hand(laws, state, i, node)
        if bounds.marks and state.dirty and not node.ahead:
            yield f"!node {i} gets a mark", put(state, i, ahead=True)
    if state.restores < bounds.restores:
        yield from _index(bounds, state)


def opened(state: State, i: int, log: str, shut: bool = True) -> State:
    """A node opens a log: it writes a boot, knows no stamp of before, and forgets appends under way (laws 2, 12)."""
    boots = state.boots + 1
    ask = "done" if state.nodes[i].ask == "passed" else state.nodes[i].ask
    return change(put(state, i, log=log + str(boots), shut=shut, ask=ask), boots=boots)


def _restarted(laws: Laws, state: State, i: int) -> State:
    node = state.nodes[i]
    log = node.log
    if not laws.durable and log.endswith("d"):  # law 1: what it answered was not on the disk
        log = log[:-1]
    return opened(state, i, log, laws.boot_in_stamp)


def _copies(bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """A reader or scrub finds a bad copy: a drop is ordered; another good copy is elsewhere (the budget of the promises)."""
    at = live(node.log)
    if state.harm >= bounds.harm or not bounds.bad or state.row != "live" or not node.known.copy or at < 0 or node.known.drop:
        return
    if any(live(n.log) >= 0 and n.known.copy for j, n in enumerate(state.nodes) if bounds.groups[j] != bounds.groups[i]):
        yield f"!the copy on node {i} is found bad", change(commit(know(state, i, drop=at + 1)), harm=state.harm + 1)


def _disks(bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """A disk is lost and an empty one comes in its place; or an older state of a disk is put back (law 12)."""
    if state.harm < bounds.harm and bounds.lost:
        empty = put(state, i, inc=state.boots + 1, birth=0, epoch=0, ahead=False)
        empty = change(opened(empty, i, ""), harm=state.harm + 1)
        yield f"!node {i} loses its disk", forgive(empty)
    if bounds.older and state.harm < bounds.harm:
        if not any(n.disk for n in state.nodes):
            yield (
                f"!the disk of node {i} is copied",
                put(state, i, disk=(node.log, node.inc, node.birth, node.epoch, node.ahead)),
            )
        elif node.disk and _noticeable(state, node, node.disk[0], node.disk[1]):
            log, inc, birth, epoch, ahead = node.disk
            old = put(state, i, inc=inc, birth=birth, epoch=epoch, ahead=ahead, disk=())
            old = change(opened(old, i, log), harm=state.harm + 1)
            yield f"!the older disk of node {i} is put back", forgive(old)


def _noticeable(state: State, node: Node, log: str, inc: int) -> bool:
    """The laws do not cover a disk rolled back within one boot to a place behind what the index was shown."""
    known = node.known
    if not state.restores and "t" in node.log and "t" not in log and not known.order:
        return True  # a confirmed tombstone was shown
    return inc != known.inc or known.boot not in log or len(log) < max(known.mark, known.seen)


def _membership(laws: Laws, bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """Expulsion takes what the index knows of a node; it returns only emptied (law 9)."""
    if node.known.member and bounds.expels and state.harm < bounds.harm:
        gone = put(state, i, known=Known(inc=node.known.inc, boot=node.known.boot, member=False), shut=True, repair=())
        if node.ask == "passed":
            gone = put(gone, i, ask="done")
        yield f"!node {i} is expelled", forgive(commit(change(gone, harm=state.harm + 1)))
    if not node.known.member:
        if laws.retired_for_ever:  # law 9
            boots = state.boots + 1
            back = put(state, i, log=str(boots), inc=boots, birth=0, epoch=0, ahead=False, ask=node.ask and "done")
            back = change(put(back, i, known=Known(inc=boots, mark=1, boot=str(boots))), boots=boots)
            yield f"!node {i} returns emptied", commit(back)
        else:
            yield f"!node {i} returns as it was", commit(put(state, i, known=Known(inc=node.inc)))


def _batch_in_hand(laws: Laws, state: State, i: int, node: Node) -> Steps:
    """A keeper that slept through the loss sends the batch it had read before."""
    after = put(state, i, hand=False)
    if "t" not in node.log:
        after = put(after, i, log=node.log + "t", ahead=node.ahead or laws.batch_marks)
    yield f"a keeper that slept sends node {i} an old tombstone", after


def _index(bounds: Bounds, state: State) -> Steps:
    """A backup of the index is made once, and restored later, perhaps twice (law 11)."""
    if not state.saved:
        yield "!the index is backed up", backed_up(state)
    elif state.dirty:
        yield "!the backup is restored", restored(bounds, state, False)
        if any(n.known.order and "t" not in n.log for n in state.nodes):
            yield "!the backup is restored, keepers hold batches of before", restored(bounds, state, True)


def backed_up(state: State) -> State:
    """What the index knows now is kept."""
    nodes = tuple(change(n, saved=n.known) for n in state.nodes)
    return change(state, nodes=nodes, saved=(state.row, state.epoch), dirty=False)


def restored(bounds: Bounds, state: State, hands: bool) -> State:
    """The index is what it was; transactions under way are gone, notes and scans in keepers' hands are not."""
    row, epoch = state.saved or ("", 0)
    last = state.restores + 1 >= bounds.restores
    nodes = tuple(
        change(
            n,
            known=n.saved or Known(),
            saved=() if last else n.saved,
            met=False,
            caught=False,
            hand=hands and n.known.order and "t" not in n.log,
        )
        for n in state.nodes
    )
    after = change(
        state,
        nodes=nodes,
        row=row,
        epoch=epoch,
        saved=() if last else state.saved,
        dirty=False,
        stale=True,
        deliver=False,
        abort=False,
        restores=state.restores + 1,
    )
    if groups_of(bounds, [i for i, n in enumerate(nodes) if live(n.log) >= 0]) < R:
        after = change(after, shown=False)  # P7 is kept only for what has all its copies when commits are lost
    return forgive(after)


def forgive(state: State) -> State:
    """A deletion that left no trace anywhere, because the index lost it, never was (law 11: `for ever`)."""
    if not state.restores or not state.deleted or state.row == "dead":
        return state
    members = [n for n in state.nodes if n.known.member]
    if any("t" in n.log or n.hand or n.known.order for n in members):
        return state
    return change(state, deleted=False)


def rolled_back_once(laws: Laws, state: State) -> State:
    """All disks were rolled back since the backup was made, one after the other: what the first holds was compared, and its
    birth mark lifted, before the next.
    """
    nodes = []
    for i, node in enumerate(state.nodes):
        log, boot = node.log + str(i + 1), str(i + 1)
        birth = 0 if laws.birth_lifted and not i else len(log)
        known = change(node.known, inc=i + 1, mark=len(log), seen=len(log), boot=boot)
        nodes.append(change(node, log=log, inc=i + 1, birth=birth, ahead=True, known=known, saved=Known()))
    return change(state, nodes=tuple(nodes), saved=("", 0), dirty=True, boots=len(nodes))


def replaced(state: State) -> State:
    """All disks were replaced since the backup was made, each repaired before the next."""
    nodes = []
    for i, node in enumerate(state.nodes):
        boot = str(i + 1)
        known = Known(inc=i + 1, mark=1, boot=boot)
        nodes.append(change(node, log=boot, inc=i + 1, ahead=True, known=known, saved=Known()))
    return change(state, nodes=tuple(nodes), saved=("", 0), dirty=True, boots=len(nodes))
