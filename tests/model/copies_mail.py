"""Owns who takes mail in the copies model: one delivery's front end, the nodes it asks, its transactions, and one reader."""

from __future__ import annotations

from tests.model.copies_state import (
    Bounds,
    Laws,
    Node,
    R,
    State,
    Steps,
    close,
    commit,
    decide,
    each,
    enters,
    forget_replies,
    groups_of,
    keep_replies,
    know,
    live,
    put,
    served,
)
from tests.model.explorer import change


def mail_steps(laws: Laws, bounds: Bounds, state: State) -> Steps:
    """What the delivery, its nodes and the reader may do next."""
    yield from _front_end(laws, bounds, state)
    for i, node in enumerate(state.nodes):
        yield from _node(laws, bounds, state, i, node)
    if enters(laws, bounds, state):
        if state.deliver:
            yield from _deliver(laws, state)
        if state.abort:
            yield from _abort(laws, bounds, state)
    if state.deliver or state.abort:
        yield "!transactions under way are lost", forget_replies(change(state, deliver=False, abort=False, looked=False))
    if state.row == "live" and served(laws, bounds, state):
        if not state.shown:
            yield "!a reader lists the message", change(state, shown=True)
        elif bounds.deletes:
            yield "!the reader deletes it", delete(state)


# -- front end ------------------------------------------------------------------------------------------------------------


def _receipts(state: State) -> list[int]:
    return [i for i, node in enumerate(state.nodes) if node.reply == "Y"]


def _front_end(laws: Laws, bounds: Bounds, state: State) -> Steps:
    """The front end may stop for any time between any two of these."""
    front = state.front
    if front == "done":
        return
    yield "front end closes without an answer", close(state)
    enough = groups_of(bounds, _receipts(state)) >= R
    if front in ("feeding", "aborting"):
        for i, node in enumerate(state.nodes):
            if node.reply in ("y", "n"):
                yield f"front end hears node {i}", put(state, i, reply=node.reply.upper())
        yield from _refusals(laws, state)
        if enough and (front == "feeding" or laws.after_abort != "own"):  # law 4
            yield "front end sends deliver", keep_replies(change(state, front="delivering", deliver=True), "Y")
    if front == "feeding":
        for i, node in enumerate(state.nodes):
            if not node.ask and not enough:
                shut = node.shut and laws.frozen  # law 2: a stamp taken now would be good
                yield f"front end asks node {i}", put(state, i, ask="sent", shut=shut)
        if not enough:
            yield "front end sends abort", gives_up(state)
    elif front == "delivering":
        if not state.asked_abort or laws.after_abort == "silence":  # law 4
            yield "index is silent, front end answers 250", close(state, "250")
        if not state.deliver:
            yield "front end sends deliver again", change(state, deliver=True)
    elif front == "aborting":
        if not laws.index_first:  # law 5
            yield "index is silent, front end tells the nodes to abort", keep_replies(change(state, front="telling"), "N")
    else:
        yield from _tell(laws, state)


def _refusals(laws: Laws, state: State) -> Steps:
    """451 when every node that was asked refused for good (law 5)."""
    asked = [node for node in state.nodes if node.ask]
    if all(node.reply == "N" for node in asked):
        yield "all refused, front end answers 451", close(state, "451")
    if not laws.refusal_behind_asks:
        for i, node in enumerate(state.nodes):
            if node.ask in ("sent", "passed") and not node.reply and live(node.log) < 0 and "t" not in node.log:
                yield f"node {i} says on another connection that it has no such key", put(state, i, reply="N")


def _tell(laws: Laws, state: State) -> Steps:
    """The index took the abort: the nodes that were asked are told, and 451 needs a word of each (law 5)."""
    for i, node in enumerate(state.nodes):
        if not node.ask or node.reply in ("N", "T"):
            continue
        new = "t" not in node.log
        good = {"stamped": not node.shut, "new": new, "any": True}[laws.confirmation]
        if new:
            ahead = node.ahead or (state.dirty and laws.batch_marks)
            yield f"node {i} aborts", put(state, i, log=node.log + "t", reply="T" if good else "", ahead=ahead)
        elif good:
            yield f"node {i} says it has a tombstone", put(state, i, reply="T")
    if all(node.reply in ("N", "T") for node in state.nodes if node.ask):
        yield "all confirmed, front end answers 451", close(state, "451")


# -- nodes ----------------------------------------------------------------------------------------------------------------


def _node(laws: Laws, bounds: Bounds, state: State, i: int, node: Node) -> Steps:
    """A node takes a commit in two steps: it checks the stamp, then it appends (law 2)."""
    if node.ask == "sent":
        if node.shut and laws.window:  # law 2
            gone = live(node.log) < 0 and "t" not in node.log
            refused = put(state, i, ask="done")
            yield f"node {i} refuses the stamp", _said(refused, i, "n") if gone else refused
        else:
            yield f"node {i} passes the stamp", put(state, i, ask="passed")
    elif node.ask == "passed":
        at = live(node.log)
        if "t" in node.log and laws.tombstone_refuses:  # law 1
            yield f"node {i} refuses: a tombstone", put(state, i, ask="done")
        elif at >= 0:
            yield f"node {i} has it already", _receipt(put(state, i, ask="done"), i, at)  # law 1
        elif "t" in node.log:
            log = node.log.replace("t", ".") + "d"
            yield f"node {i} commits behind a tombstone", _receipt(put(state, i, ask="done", log=log), i, len(log) - 1)
        else:
            yield f"node {i} commits", _receipt(put(state, i, ask="done", log=node.log + "d"), i, len(node.log))
    if bounds.clock and not node.shut:
        yield f"!stamp of node {i} grows old", put(state, i, shut=True)


def _receipt(state: State, i: int, at: int) -> State:
    return _said(state, i, "y", (state.nodes[i].inc, at))


def _said(state: State, i: int, reply: str, receipt: tuple[int, int] = (0, 0)) -> State:
    """A reply is under way, unless nobody waits for it any more."""
    if state.front in ("feeding", "aborting") and not state.nodes[i].reply:
        return put(state, i, reply=reply, receipt=receipt)
    return state


# -- transactions ---------------------------------------------------------------------------------------------------------


def _answers(label: str, waits: bool, silent: State, heard: State) -> Steps:
    """A transaction has run; its answer arrives, or not."""
    yield label, heard if waits else forget_replies(silent)
    if waits:
        yield label + ", the answer is lost", silent


def _settled(laws: Laws, state: State) -> bool:
    """A receipt was decided before: it lies behind the watermark, or belongs to a disk that is gone (law 7)."""
    for i in _receipts(state):
        inc, at = state.nodes[i].receipt
        known = state.nodes[i].known
        if inc != known.inc or not known.member:
            if laws.late_incarnation:
                return True
        elif at < known.mark:
            return True
    return False


def _deliver(laws: Laws, state: State) -> Steps:
    """The transaction that enters the message (laws 3, 4, 7)."""
    waits = state.front == "delivering"
    after = change(state, deliver=False, looked=False)
    if state.row == "":
        settled = laws.late_deliver and _settled(laws, state)  # law 7
        if not laws.insert_first:  # law 7: it looks in one transaction and inserts in the next
            if not state.looked:
                if not settled:
                    yield "deliver looks: not settled", change(state, looked=True)
                    return
            else:
                settled = False
        if settled:  # law 4: then it closes
            yield from _answers("deliver undoes its insert: settled before", waits, after, close(after))
            return
        entered = decide(after, "live")  # law 3
        for i in _receipts(state):
            known = state.nodes[i].known
            if known.member and (state.nodes[i].receipt[0] == known.inc or not laws.late_incarnation):
                entered = know(entered, i, copy=True)
        yield from _answers("deliver enters the message", waits, entered, close(entered, "250"))
    elif state.row == "aborted":
        yield from _answers("deliver finds it aborted", waits, after, close(after))
    else:
        good = state.row == "live" or not state.asked_abort  # law 4
        yield from _answers(f"deliver finds it {state.row}", waits, after, close(after, "250" if good else ""))


def _abort(laws: Laws, bounds: Bounds, state: State) -> Steps:
    """The transaction that decides against the message (laws 3, 5)."""
    waits = state.front == "aborting"
    after = change(state, abort=False)
    if state.row in ("live", "dead"):
        enough = state.row == "live" and groups_of(bounds, _receipts(state)) >= R
        yield from _answers(f"abort finds it {state.row}", waits, after, close(after, "250" if enough else ""))
        return
    if state.row == "":
        after = decide(after, "aborted")  # law 3
        for i, node in enumerate(state.nodes):
            if node.ask and node.known.member:
                after = know(after, i, order=True)
    yield from _answers("abort is taken", waits, after, keep_replies(change(after, front="telling"), "N"))


def delete(state: State) -> State:
    """The last reference goes (law 8): tombstones are ordered wherever a copy is believed to lie."""
    dead = change(decide(state, "dead"), shown=True, deleted=True)
    for i, node in enumerate(state.nodes):
        if node.known.copy:
            dead = know(dead, i, order=True)
    return each(dead, copy=False)


def adopted(state: State) -> State:
    """What node 0 took was entered and listed, although the front end has not heard of it."""
    log = state.nodes[0].log + "d"
    state = put(state, 0, log=log, ask="done")
    return change(know(state, 0, copy=True, mark=len(log), seen=len(log)), row="live", shown=True)


def asked(state: State, *nodes: int) -> State:
    """With nodes asked to commit."""
    for i in nodes:
        state = put(state, i, ask="sent")
    return state


def aborting(state: State, *nodes: int) -> State:
    """A front end that asked for an abort, and then heard that these nodes hold copies."""
    for i in nodes:
        node = state.nodes[i]
        state = put(state, i, log=node.log + "d", ask="done", reply="Y", receipt=(node.inc, len(node.log)))
    return gives_up(state)


def gives_up(state: State) -> State:
    """The front end asks for an abort."""
    return change(state, front="aborting", abort=True, asked_abort=True)


def refused(state: State, *nodes: int) -> State:
    """The abort was taken, these nodes wrote tombstones, and the front end answered 451."""
    state = decide(state, "aborted")
    for i in nodes:
        state = know(put(state, i, log=state.nodes[i].log + "t", ahead=state.dirty), i, order=True)
    return change(state, front="done", answer="451", asked_abort=True)


def acknowledged(state: State, *nodes: int, entered: bool) -> State:
    """A message that these nodes took and that was answered 250, while the index was there (`entered`) or away."""
    state = change(state, front="done", answer="250", deliver=not entered, row="live" if entered else "")
    for i in nodes:
        node = state.nodes[i]
        log = node.log + "d"
        state = put(state, i, log=log, ask="done")
        if entered:
            state = know(state, i, copy=True, mark=len(log), seen=len(log))
        else:
            state = put(state, i, reply="Y", receipt=(node.inc, len(log) - 1))
    return commit(state)
