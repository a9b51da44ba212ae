"""Owns what an operator asks of storage nodes and their disks; who is a member is `admin.members`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk, bounded
from powermail.admin.table import Operation, Progress, Request, option, unseen, word, yes
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import OperatorError, Trouble
from powermail.index.contract import Damage


class NodeFacts(Struct):
    """One node with its figures. `site` is where it stands, empty if nobody said; `takes_mail`: the process that answers
    would place a copy there now; `owed` are deletions that it has not confirmed, None while the index does not answer.

    `bad_copies` failed a check since its disk was new, the last at `bad_copy_at`; they stay counted when they were repaired.
    """

    id: str
    group: str
    site: str
    priority: int
    state: str
    slow: bool
    takes_mail: bool
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
                desk.cluster.site_of(node.id),
                node.priority,
                desk.cluster.shown_state(node),
                desk.cluster.is_slow(node.id),
                desk.cluster.takes(node),
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
            gone = (False, False, 0, 0, 0, 0, 0, 0, 0, 0.0, None, 0, None, why)
            rows.append(NodeFacts(row.id, row.group, row.site, row.priority, "out of reach", *gone))
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


class Salvage(Request):
    """Which disk, and what is to become of mail that is not known."""

    directory: Annotated[str, word("directory of a node that is no member, on this machine and not in use")]
    into: Annotated[str, option("mailbox for mail that the index does not know; without, that is only counted")] = ""
    confirm: Annotated[bool, yes("really do it; without, only say what would be")] = False
    dry_run: Annotated[bool, option("only say what would be, also with --yes")] = False


class Salvaged(Struct):
    """What lies on a disk, and what became of it: of `live` messages `thin` ones have too few copies elsewhere, and `copied`
    ones have enough now; `deleted` ones stay deleted; `unknown` ones the index does not know, and `entered` ones were put into
    the mailbox that was named; `left` ones could not be brought back, with the first reasons. Nothing was done without `done`.
    """

    live: int
    thin: int
    copied: int
    deleted: int
    unknown: int
    entered: int
    left: int
    why: list[str]
    done: bool


async def salvage(desk: Desk, request: Salvage, progress: Progress) -> Salvaged:
    """Brings back mail from the disk of a node that was expelled or replaced; the disk itself never rejoins (law 9)."""
    if desk.salvager is None or desk.open_disk is None:
        raise OperatorError("a disk is salvaged on a machine with the role keeper")
    if len(request.into) > limits.MAILBOX_NAME_CHARS_MAX or not request.into.isprintable():
        raise OperatorError(f"--into {request.into[:80]!r} is no name of a mailbox")
    really = request.confirm and not request.dry_run
    disk = await desk.open_disk(request.directory)
    try:
        f = await desk.salvager.run(disk, request.into, really, progress)
        return Salvaged(f.live, f.thin, f.copied, f.deleted, f.unknown, f.entered, f.left, f.why, f.done)
    finally:
        await disk.close()


OPERATIONS = (
    Operation("node_list", "node list", Request, list[NodeFacts], listing, "all nodes"),
    Operation("node_scrub", "node scrub", OneNode, Scrubbed, scrub, "read and check every copy of a node", long=True),
    Operation("node_verify", "node verify", OneNode, Scrubbed, scrub, "the same as scrub", long=True),
    Operation("node_confirm", "node confirm", OneNode, Confirmed, confirm, "confirm a held mass deletion", changes=True),
    Operation(
        "node_salvage", "node salvage", Salvage, Salvaged, salvage, "mail from an expelled disk", changes=True, long=True
    ),
)
