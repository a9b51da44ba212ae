"""Owns what an operator asks of storage nodes and their disks; who is a member is `admin.members`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk, bounded
from powermail.admin.table import Operation, Progress, Request, unseen, word
from powermail.base.clock import utc
from powermail.base.errors import Trouble
from powermail.index.contract import Damage


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
                desk.cluster.shown_state(node),
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
    for row in desk.cluster.layout.members():
        if row.id not in desk.cluster.nodes:
            why = "it has no address: only the process that has its path in its settings reaches it"
            rows.append(
                NodeFacts(row.id, row.group, row.priority, "out of reach", False, 0, 0, 0, 0, 0, 0, 0, 0.0, None, 0, None, why)
            )
    return rows


def _with_cure(reason: str) -> str:
    """A file of somebody else is no lost disk: nothing is to be replaced."""
    if "Permission denied" not in reason and "Operation not permitted" not in reason:
        return reason
    return f"{reason}; give all of it back to the owner of the data directory: `chown -R OWNER` and `chmod -R u+rwX`"


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


class Confirmed(Struct):
    """How many copies are let go of by it; 0: nothing waited."""

    id: str
    confirmed: int


async def confirm(desk: Desk, request: OneNode, progress: Progress) -> Confirmed:
    """Confirms a held mass deletion on a node (P9)."""
    (target,) = desk.nodes([request.node])
    return Confirmed(target.id, desk.admission.confirm(target.id))


OPERATIONS = (
    Operation("node_list", "node list", Request, list[NodeFacts], listing, "all nodes"),
    Operation("node_scrub", "node scrub", OneNode, Scrubbed, scrub, "read and check every copy of a node", long=True),
    Operation("node_verify", "node verify", OneNode, Scrubbed, scrub, "the same as scrub", long=True),
    Operation("node_confirm", "node confirm", OneNode, Confirmed, confirm, "confirm a held mass deletion", changes=True),
)
