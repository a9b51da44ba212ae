"""Owns what an operator does with storage nodes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk, bounded
from powermail.admin.table import Names, Operation, Progress, Request, several, unseen, word, words, yes
from powermail.base.clock import utc
from powermail.base.errors import NoSuch, OperatorError, Trouble
from powermail.index.contract import Damage
from powermail.storage.contract import NodeState


class NodeFacts(Struct):
    """One node with its figures; `owed` are deletions that it has not confirmed, None while the index does not answer.

    `bad_copies` failed a check since its disk was new, the last at `bad_copy_at`; they stay counted when they were repaired.
    """

    id: str
    group: str
    priority: int
    state: str
    slow: bool
    messages: int
    log_octets: int
    live_octets: int
    segments: int
    free_octets: int
    total_octets: int
    damaged: int
    probe_ms: float
    owed: int | None
    bad_copies: int
    bad_copy_at: datetime | None
    reason: str


async def listing(desk: Desk, request: Request, progress: Progress = unseen) -> list[NodeFacts]:
    """Every node with its figures."""
    rows = []
    silent = False
    damages: dict[str, Damage] = {}
    try:
        damages = await bounded(desk.index.damages(), "the index")
    except Trouble:
        silent = True
    for node in desk.cluster.nodes.values():
        stat = node.stat()
        owed: int | None = None
        bad = damages.get(node.id, Damage(0, 0.0))
        if not silent:
            try:
                owed = sum(await bounded(desk.index.orders_total(node.id), "the index"))
            except Trouble:
                silent = True
        rows.append(
            NodeFacts(
                node.id,
                node.group,
                node.priority,
                stat.state,
                desk.cluster.is_slow(node.id),
                stat.messages,
                stat.log_octets,
                stat.live_octets,
                stat.segments,
                stat.free_octets,
                stat.total_octets,
                stat.damaged,
                round(stat.probe_s * 1000, 2),
                owed,
                bad.copies,
                utc(bad.last_at) if bad.copies else None,
                _with_cure(stat.reason or desk.cluster.trouble(node.id)),
            )
        )
    return rows


def _with_cure(reason: str) -> str:
    """A file of somebody else is no lost disk: nothing is to be replaced."""
    if "Permission denied" not in reason and "Operation not permitted" not in reason:
        return reason
    return f"{reason}; give all of it back to the owner of the data directory: `chown -R OWNER` and `chmod -R u+rwX`"


class NodeBlock(Request):
    """Which nodes."""

    node: Annotated[Names, words("nodes, as `powermail node list` names them")]
    blocked: bool = True


class NodeNow(Struct):
    """A node as it is now."""

    id: str
    state: str


async def block(desk: Desk, request: NodeBlock, progress: Progress) -> list[NodeNow]:
    """Stops or allows new mail on nodes, on all of them or none; it is remembered over restarts."""
    targets = desk.nodes(several(request.node))
    for target in targets:
        await desk.index.set_node_flags(target.id, request.blocked, None)
        target.block(request.blocked)
    return [NodeNow(target.id, target.state.value) for target in targets]


class SomeNodes(Request):
    """Which nodes."""

    node: Annotated[Names, words("nodes, as `powermail node list` names them")]


async def unblock(desk: Desk, request: SomeNodes, progress: Progress) -> list[NodeNow]:
    """Allows new mail on nodes again."""
    return await block(desk, NodeBlock(request.node, False), progress)


class OneNode(Request):
    """Which node."""

    node: Annotated[str, word("the node, as `powermail node list` names it")]


class Scrubbed(Struct):
    """What was read, and how many copies failed."""

    id: str
    checked: int
    bad: int


async def scrub(desk: Desk, request: OneNode, progress: Progress) -> Scrubbed:
    """Reads and checks every copy of a node now."""
    (target,) = desk.nodes([request.node])
    total = target.stat().messages
    after, checked, bad = b"", 0, 0
    while True:
        before = desk.scrubber.checked
        after, found = await desk.scrubber.check(target, after, 200)
        bad += found
        checked += desk.scrubber.checked - before
        await progress(checked, total)
        if not after:
            return Scrubbed(target.id, checked, bad)


class NodeReplace(Request):
    """Which node, and whether the place was looked at."""

    node: Annotated[str, word("the node, as `powermail node list` names it")]
    yes: Annotated[bool, yes("also if its place is not on a disk of its own any more")] = False


async def replace(desk: Desk, request: NodeReplace, progress: Progress) -> NodeNow:
    """Makes an empty directory (a new disk) this node's store; repair fills it."""
    (target,) = desk.nodes([request.node])
    if target.state not in (NodeState.MISSING, NodeState.OPENING):
        raise OperatorError(f"node {target.id} is {target.state.value}: only a node whose disk is gone can be replaced")
    why = await desk.unmounted(target.id)
    if why and not request.yes:
        raise OperatorError(
            f"{why}: mount the new disk there first, then say this again; or --yes if it is to live there. Nothing was changed"
        )
    await target.initialise()
    await desk.index.forget_damages(target.id)
    await desk.cluster.watch(target)
    return NodeNow(target.id, target.state.value)


class Confirmed(Struct):
    """How many copies are let go of by it; 0: nothing waited."""

    id: str
    confirmed: int


async def confirm(desk: Desk, request: OneNode, progress: Progress) -> Confirmed:
    """Confirms a held mass deletion on a node (P9)."""
    (target,) = desk.nodes([request.node])
    return Confirmed(target.id, desk.admission.confirm(target.id))


class NodeExpel(Request):
    """Which node, and whether really."""

    node: Annotated[str, word("a node whose disk is gone, or that left the settings")]
    confirm: Annotated[bool, yes("really expel it; without, only say what is at risk")] = False


class Expelled(Struct):
    """What is at risk without the node, and whether it was expelled. `missing_since` is UTC seconds, 0 while it is there."""

    id: str
    unreadable: int
    not_redundant: int
    missing_since: float
    expelled: bool


async def expel(desk: Desk, request: NodeExpel, progress: Progress) -> Expelled:
    """Ends the membership of a node that will not come back: what it owes is forgotten, its disk never rejoins (law 9)."""
    name = request.node
    rows = {row.id: row for row in await desk.index.node_rows()}
    if name not in rows:
        raise NoSuch(f"no node {name!r} is a member; there are {', '.join(rows)}")
    nodes = desk.cluster.nodes
    if name in nodes and nodes[name].state not in (NodeState.MISSING, NodeState.OPENING):
        raise OperatorError(f"node {name} is here; only a node whose disk is gone, or that left the settings, is expelled")
    left = {other: group for other, group in desk.cluster.groups().items() if other != name}
    lost = await desk.index.under_copied_total(left, 1)
    thin = await desk.index.under_copied_total(left, desk.cluster.copies_required)
    if request.confirm:
        await desk.index.expel(name)
    return Expelled(name, lost[0], thin[0], rows[name].missing_since, request.confirm)


OPERATIONS = (
    Operation("node_list", "node list", Request, list[NodeFacts], listing, "all nodes"),
    Operation("node_block", "node block", NodeBlock, list[NodeNow], block, "no new mail on a node", changes=True),
    Operation("node_unblock", "node unblock", SomeNodes, list[NodeNow], unblock, "new mail again", changes=True),
    Operation("node_scrub", "node scrub", OneNode, Scrubbed, scrub, "read and check every copy of a node", long=True),
    Operation("node_verify", "node verify", OneNode, Scrubbed, scrub, "the same as scrub", long=True),
    Operation("node_replace", "node replace", NodeReplace, NodeNow, replace, "make an empty disk this node's store",
              changes=True, long=True),
    Operation("node_confirm", "node confirm", OneNode, Confirmed, confirm, "confirm a held mass deletion", changes=True),
    Operation("node_expel", "node expel", NodeExpel, Expelled, expel, "end the membership of a node that will not come back",
              changes=True, long=True),
)  # fmt: skip
