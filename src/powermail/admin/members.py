"""Owns what an operator does with the membership of nodes: block, drain, remove, replace, expel, move, priority, rebalance.

Everything goes by the layout of the index, so it holds for all front ends and over restarts. What may cost redundancy says
first what that is, refuses what would lose a last good copy, with the number, and is decided by compare-and-set.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk
from powermail.admin.table import Names, Operation, Progress, Request, option, several, unseen, word, words, yes
from powermail.base import limits
from powermail.base.errors import NoSuch, OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.net import parse_host_port
from powermail.base.settings import is_site
from powermail.index.sharing import MoveRow
from powermail.keeper.drain import DRAIN, REMOVE, Dependence, dependence, seconds_left
from powermail.keeper.rebalance import REBALANCE, excess
from powermail.storage.contract import NodeState
from powermail.storage.layout import Layout, LayoutChange, LayoutRow, Standing

_NAMES = "nodes, as `powermail node list` names them"
_NAME = "the node, as `powermail node list` names it"
_DRY = "only say what it would do"


async def _rows(desk: Desk, names: list[str]) -> list[LayoutRow]:
    """The rows of these members, as the layout is now. Raises NoSuch that names those there are."""
    layout = await desk.following.refresh()
    rows = {row.id: row for row in layout.members()}
    for name in names:
        if name not in rows:
            raise NoSuch(f"no node {name!r}; there are {', '.join(rows)}")
    return [rows[name] for name in names]


async def _change(desk: Desk, changes: list[LayoutChange], version: int | None = None) -> Layout:
    """Changes the layout, and goes by it at once. Raises Trouble if it has changed since it was looked at."""
    if await desk.index.change_layout(changes, version) is None:
        raise Trouble("the layout has changed meanwhile; nothing was changed: say it again")
    return await desk.following.refresh()


class NodeNow(Struct):
    """A node as it is now."""

    id: str
    state: str


def _now(desk: Desk, names: list[str]) -> list[NodeNow]:
    nodes, cluster = desk.cluster.nodes, desk.cluster
    return [NodeNow(name, cluster.shown_state(nodes[name]) if name in nodes else "out of reach") for name in names]


class NodeBlock(Request):
    """Which nodes."""

    node: Annotated[Names, words(_NAMES)]
    blocked: bool = True
    dry_run: Annotated[bool, option(_DRY)] = False


async def block(desk: Desk, request: NodeBlock, progress: Progress) -> list[NodeNow]:
    """Stops or allows new mail on nodes, on all of them or none; it is remembered over restarts. Allowing ends a drain."""
    names = several(request.node)
    state = Standing.BLOCKED if request.blocked else Standing.ACTIVE
    for row in await _rows(desk, names):
        if row.state is Standing.LEAVING:
            raise OperatorError(f"node {row.id} is leaving the cluster; nothing was changed")
        if request.blocked and row.state is Standing.DRAINING:
            raise OperatorError(f"node {row.id} is drained and takes no mail; `powermail node unblock {row.id}` ends that")
    if not request.dry_run:
        await _change(desk, [LayoutChange(name, state=state) for name in names])
    return _now(desk, names)


class SomeNodes(Request):
    """Which nodes."""

    node: Annotated[Names, words(_NAMES)]
    dry_run: Annotated[bool, option(_DRY)] = False


async def unblock(desk: Desk, request: SomeNodes, progress: Progress) -> list[NodeNow]:
    """Allows new mail on nodes again, also on one that is drained."""
    return await block(desk, NodeBlock(request.node, False, request.dry_run), progress)


class Planned(Struct):
    """What a change of membership comes to. `copies` (of `octets`) must be made elsewhere, `only_here` messages are nowhere
    else; `estimate_s` is a guess. `done`: it was begun, or is done; else it was only looked at.
    """

    id: str
    copies: int
    octets: int
    only_here: int
    estimate_s: float
    done: bool
    said: str


async def _leaver(desk: Desk, name: str) -> tuple[LayoutRow, Dependence]:
    """A node that is to be emptied, and what depends on it. Raises OperatorError if the others cannot hold that."""
    (row,) = await _rows(desk, [name])
    if row.state is Standing.LEAVING:
        raise OperatorError(f"node {name} is leaving already")
    cluster = desk.cluster
    others = {node: group for node, group in cluster.counted().items() if node != name}
    groups, required = len(set(others.values())), cluster.copies_required
    if groups < required:
        raise OperatorError(
            f"without node {name} there are {groups} groups, for {required} copies of each message: add a node first. Nothing "
            "was changed"
        )
    found = await dependence(desk.index, others, name, row.group, required)
    reserve = desk.settings.cluster.reserve_octets
    room = sum(max(0, cluster.nodes[node].stat().free_octets - reserve) for node in others if node in cluster.nodes)
    if found.octets > room:
        raise OperatorError(
            f"{found.copies} copies of {found.octets} octets must be made elsewhere, and the other nodes have room for {room}: "
            "add a node first. Nothing was changed"
        )
    return row, found


def _planned(row: LayoutRow, found: Dependence, done: bool, said: str) -> Planned:
    return Planned(row.id, found.copies, found.octets, found.only_here, round(found.estimate_s(), 1), done, said)


class NodeDrain(Request):
    """Which node."""

    node: Annotated[str, word(_NAME)]
    dry_run: Annotated[bool, option(_DRY)] = False


async def drain(desk: Desk, request: NodeDrain, progress: Progress) -> Planned:
    """Empties a node: no new mail, and keepers copy what lies there to others; `status` shows how far it is."""
    row, found = await _leaver(desk, request.node)
    if request.dry_run:
        return _planned(row, found, False, "nothing was changed")
    await _change(desk, [LayoutChange(row.id, state=Standing.DRAINING)])  # before its move: a keeper ends one without it
    await desk.index.note_move(MoveRow(f"{DRAIN} {row.id}", "stopping", found.copies, 0, desk.world.clock.now()))
    return _planned(row, found, True, f"keepers go on with it; `powermail node unblock {row.id}` ends it")


class NodeRemove(Request):
    """Which node, and whether really."""

    node: Annotated[str, word(_NAME)]
    confirm: Annotated[bool, yes("really remove it; without, only say what depends on it")] = False
    dry_run: Annotated[bool, option(_DRY)] = False


async def remove(desk: Desk, request: NodeRemove, progress: Progress) -> Planned:
    """Drains a node and takes it out of the cluster when no message depends on it any more; its disk never rejoins."""
    row, found = await _leaver(desk, request.node)
    if row.id not in {node.id for node in desk.cluster.admitted()}:
        raise OperatorError(
            f"node {row.id} is away: what it took after it was last heard is not known. Bring it back, or force it out with "
            f"`powermail node expel {row.id}`, which says what is at risk"
        )
    if request.dry_run or not request.confirm:
        return _planned(row, found, False, "nothing was changed; --yes does it")
    await _change(desk, [LayoutChange(row.id, state=Standing.DRAINING)])
    began_at = desk.world.clock.now()
    await desk.index.note_move(MoveRow(f"{REMOVE} {row.id}", "stopping", found.copies, 0, began_at))
    await desk.index.end_move(f"{DRAIN} {row.id}")
    return _planned(row, found, True, "keepers go on with it; it is out when `node list` has it no more")


class NodeReplace(Request):
    """Which node, and whether the place was looked at."""

    node: Annotated[str, word(_NAME)]
    yes: Annotated[bool, yes("also if its place is not on a disk of its own any more")] = False
    dry_run: Annotated[bool, option(_DRY)] = False


async def replace(desk: Desk, request: NodeReplace, progress: Progress) -> NodeNow:
    """Makes an empty directory (a new disk) this node's store; repair fills it. One that was expelled is a member again."""
    name = request.node
    expelled = next((row for row in (await desk.following.refresh()).rows if row.id == name), None)
    if expelled is not None and expelled.state is Standing.EXPELLED and not request.dry_run:
        again = LayoutChange(name, expelled.group, expelled.address, expelled.site, expelled.priority, told=expelled.told)
        await _change(desk, [again])  # as it was: what the settings said before does not count anew
        node = desk.cluster.nodes.get(name)
        if node is not None:
            await desk.cluster.watch(node)
    (target,) = desk.nodes([name])
    if target.state not in (NodeState.MISSING, NodeState.OPENING):
        raise OperatorError(f"node {target.id} is {target.state.value}: only a node whose disk is gone can be replaced")
    why = await desk.unmounted(target.id)
    if why and not request.yes:
        raise OperatorError(
            f"{why}: mount the new disk there first, then say this again; or --yes if it is to live there. Nothing was changed"
        )
    if not request.dry_run:
        await target.initialise()
        await desk.index.forget_damages(target.id)
        await desk.cluster.watch(target)
    return _now(desk, [name])[0]


class NodeExpel(Request):
    """Which node, and whether really."""

    node: Annotated[str, word("a node whose disk is gone, or that left the settings")]
    confirm: Annotated[bool, yes("really expel it; without, only say what is at risk")] = False
    dry_run: Annotated[bool, option(_DRY)] = False


class Expelled(Struct):
    """What is at risk without the node, and whether it was expelled. `missing_since` is UTC seconds, 0 while it is there."""

    id: str
    unreadable: int
    not_redundant: int
    missing_since: float
    expelled: bool
    unknown: str


async def expel(desk: Desk, request: NodeExpel, progress: Progress) -> Expelled:
    """Ends the membership of a node that will not come back: what it owes is forgotten, its disk never rejoins (law 9)."""
    name = request.node
    layout = await desk.following.refresh()
    rows = {row.id: row for row in await desk.index.node_rows()}
    if name not in rows and layout.row(name) is None:  # one that never came is in the layout alone
        there = sorted({*rows, *[row.id for row in layout.members()]})
        raise NoSuch(f"no node {name!r} is a member; there are {', '.join(there)}")
    nodes = desk.cluster.nodes
    if name in nodes and nodes[name].state not in (NodeState.MISSING, NodeState.OPENING):
        raise OperatorError(
            f"node {name} is here; only a node whose disk is gone, or that left the settings, is expelled: "
            f"`powermail node remove {name}` takes it out without a loss"
        )
    left = {other: group for other, group in desk.cluster.counted().items() if other != name}
    lost = await desk.index.under_copied_total(left, 1)
    thin = await desk.index.under_copied_total(left, desk.cluster.copies_required)
    confirmed = request.confirm and not request.dry_run
    if confirmed:
        if not await desk.index.expel(name, layout.version):
            raise Trouble("the layout has changed meanwhile; nothing was changed: say it again")
        if desk.peer_certificate is not None:  # of a cluster: it gets no certificate any more
            await desk.index.expel_identity(name)  # nodes hear of it from a keeper
        await desk.following.refresh()
        for why in await desk.following.fence_all():  # who does not know yet counts receipts of it no more
            desk.world.log.event(Event.TROUBLE, node=name, error=why)
    unknown = "what it took after it was last heard, and no other node has: unknown since last contact"
    missing_since = rows[name].missing_since if name in rows else 0.0
    return Expelled(name, lost[0], thin[0], missing_since, confirmed, unknown)


class NodeMove(Request):
    """Which node, and where to."""

    node: Annotated[str, word(_NAME)]
    group: Annotated[str, option("the failure domain it is of from now on")]
    confirm: Annotated[bool, yes("really do it; without, only say how many messages are thin then")] = False
    dry_run: Annotated[bool, option(_DRY)] = False


async def move(desk: Desk, request: NodeMove, progress: Progress) -> Planned:
    """Says that a node is of another group now; repair makes redundant what is not any more."""
    (row,) = await _rows(desk, [request.node])
    layout, required = desk.cluster.layout, desk.cluster.copies_required
    if not request.group or any(character.isspace() for character in request.group):
        raise OperatorError("a group is a word; nothing was changed")
    before = desk.cluster.counted()
    after = before | ({row.id: request.group} if row.id in before else {})
    if (groups := len(set(after.values()))) < required:
        raise OperatorError(f"there would be {groups} groups, for {required} copies of each message. Nothing was changed")
    copies = octets = 0
    for number in range(2, required + 1):
        then = await desk.index.under_copied_total(after, number)
        now = await desk.index.under_copied_total(before, number)
        copies, octets = copies + max(0, then[0] - now[0]), octets + max(0, then[1] - now[1])
    found = Dependence(copies, octets, 0)
    if request.dry_run or not request.confirm:
        return _planned(row, found, False, "nothing was changed; --yes does it")
    await _change(desk, [LayoutChange(row.id, group=request.group)], layout.version)
    untold = await desk.following.fence_all()
    return _planned(row, found, True, "; ".join(untold) or "repair makes what is thin whole again")


class NodePriority(Request):
    """Which node, and its priority."""

    node: Annotated[str, word(_NAME)]
    priority: Annotated[int, word("lower is used first; a higher number is a hot spare")]
    dry_run: Annotated[bool, option(_DRY)] = False


class Ranked(Struct):
    """A node and how early it is used."""

    id: str
    priority: int


async def priority(desk: Desk, request: NodePriority, progress: Progress) -> Ranked:
    """Says how early a node is used for new mail."""
    (row,) = await _rows(desk, [request.node])
    if request.dry_run:
        return Ranked(row.id, row.priority)
    await _change(desk, [LayoutChange(row.id, priority=request.priority)])
    return Ranked(row.id, request.priority)


class NodeAddress(Request):
    """Which node, and where it is reached."""

    node: Annotated[str, word("the node; a new one needs its group too")]
    address: Annotated[str, word("host:port of the process that serves it")]
    group: Annotated[str, option("failure domain of a new node")] = ""
    dry_run: Annotated[bool, option(_DRY)] = False


class Reached(Struct):
    """A node and where it is reached."""

    id: str
    address: str


async def address(desk: Desk, request: NodeAddress, progress: Progress) -> Reached:
    """Says where a node is reached from now on; one that is not in the layout yet enters it."""
    layout = await desk.following.refresh()
    row = layout.row(request.node)
    if not parse_host_port(request.address)[0]:
        raise OperatorError(f"{request.address!r} has no host: other machines are to reach it there")
    if row is None and not request.group:
        raise NoSuch(f"no node {request.node!r}; a new one needs --group")
    if row is not None and request.group and request.group != row.group:
        raise OperatorError(f"node {row.id} is of group {row.group}; `powermail node move` changes that")
    if not request.dry_run:
        await _change(desk, [LayoutChange(request.node, request.group or None, request.address)])
    return Reached(request.node, request.address)


class NodeSite(Request):
    """Which node, and where it stands."""

    node: Annotated[str, word(_NAME)]
    site: Annotated[str, word('a word, the same for all that stands together; "" takes it back')]
    dry_run: Annotated[bool, option(_DRY)] = False


class Placed(Struct):
    """A node and where it stands."""

    id: str
    site: str


async def site(desk: Desk, request: NodeSite, progress: Progress) -> Placed:
    """Says where a node stands: who stands there reads it first, and copies go into different sites."""
    (row,) = await _rows(desk, [request.node])
    if not is_site(request.site):
        raise OperatorError(f"{request.site[: limits.SITE_CHARS_MAX]!r} is not a word; nothing was changed")
    if not request.dry_run:
        await _change(desk, [LayoutChange(row.id, site=request.site)])
    return Placed(row.id, request.site)


class Rebalance(Request):
    """Whether really, and whether to end it."""

    confirm: Annotated[bool, yes("really do it; without, only say how much is to move")] = False
    stop: Annotated[bool, option("end it where it is")] = False
    dry_run: Annotated[bool, option(_DRY)] = False


class Uneven(Struct):
    """Octets that are to leave each node whose disk is filled more than the others', and whether that was begun."""

    octets: dict[str, int]
    copies: int
    estimate_s: float
    done: bool


async def rebalance(desk: Desk, request: Rebalance, progress: Progress) -> Uneven:
    """Moves copies from full disks to empty ones, until they are filled alike; a redundant message stays redundant."""
    if request.stop and not request.dry_run:
        await desk.index.end_move(REBALANCE)
        return Uneven({}, 0, 0.0, True)
    octets = excess(desk.cluster)
    copies = 0
    for name, more in octets.items():
        stat = desk.cluster.nodes[name].stat()
        copies += round(stat.messages * more / max(1, stat.live_octets))
    found = Dependence(copies, sum(octets.values()), 0)
    begun = request.confirm and not request.dry_run and bool(octets)
    if begun:
        await desk.index.note_move(MoveRow(REBALANCE, "moving", copies, 0, desk.world.clock.now()))
    return Uneven(octets, copies, round(found.estimate_s(), 1), begun)


class MoveFacts(Struct):
    """A move of copies under way: how far it is, and what keeps it waiting."""

    name: str
    phase: str
    percent: float
    done: int
    total: int
    seconds_left: float | None
    note: str


async def moves(desk: Desk, request: Request, progress: Progress = unseen) -> list[MoveFacts]:
    """Drains and rebalancing under way."""
    now = desk.world.clock.now()
    return [
        MoveFacts(
            move.name,
            move.phase,
            round(100.0 * move.done / move.total, 1) if move.total else 100.0,
            move.done,
            move.total,
            seconds_left(move, now),
            move.note,
        )
        for move in await desk.index.moves()
    ]


OPERATIONS = (
    Operation("node_block", "node block", NodeBlock, list[NodeNow], block, "no new mail on a node", changes=True),
    Operation("node_unblock", "node unblock", SomeNodes, list[NodeNow], unblock, "new mail again", changes=True),
    Operation("node_drain", "node drain", NodeDrain, Planned, drain, "empty a node; `status` shows how far it is",
              changes=True, long=True),
    Operation("node_remove", "node remove", NodeRemove, Planned, remove, "empty a node and take it out of the cluster",
              changes=True, long=True),
    Operation("node_replace", "node replace", NodeReplace, NodeNow, replace, "make an empty disk this node's store",
              changes=True, long=True),
    Operation("node_expel", "node expel", NodeExpel, Expelled, expel, "end the membership of a node that will not come back",
              changes=True, long=True),
    Operation("node_move", "node move", NodeMove, Planned, move, "say that a node is of another group", changes=True,
              long=True),
    Operation("node_priority", "node priority", NodePriority, Ranked, priority, "how early a node is used", changes=True),
    Operation("node_address", "node address", NodeAddress, Reached, address, "where a node is reached", changes=True),
    Operation("node_site", "node site", NodeSite, Placed, site, "where a node stands", changes=True),
    Operation("rebalance", "rebalance", Rebalance, Uneven, rebalance, "move copies from full disks to empty ones",
              changes=True, long=True),
    Operation("moves", "moves", Request, list[MoveFacts], moves, "drains and rebalancing under way"),
)  # fmt: skip
