"""Owns what an operator asks about the whole: how it is, what may change while it serves, a copy of everything that is kept."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, TypeVar

from msgspec import Struct, field

from powermail.admin import enrolment, nodes
from powermail.admin.desk import Desk, bounded
from powermail.admin.members import MoveFacts, moves
from powermail.admin.nodes import NodeFacts
from powermail.admin.table import Operation, Progress, Request, place
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import OperatorError, Trouble
from powermail.index.sharing import HAND_ON
from powermail.keeper.disperse import sites_of_copies, wanted_sites
from powermail.keeper.leases import seen
from powermail.storage.layout import Standing

T = TypeVar("T")
_DAY_S = 86_400.0
_REASONS_SHOWN = 3  # why messages cannot be repaired


class Thin(Struct):
    """Mail with fewer copies than required; `seconds_left` to full redundancy, None while that cannot be told."""

    messages: int = 0
    octets: int = 0
    seconds_left: float | None = None


class WorkerFacts(Struct):
    """One background job."""

    name: str
    status: str
    units: int
    errors: int


class ProcessFacts(Struct):
    """One process of the cluster, on whatever machine. `since` is UTC; `silent_s` says when it was last heard."""

    process: str
    machine: str
    pid: int
    version: str
    since: datetime
    silent_s: float
    here: bool  # it is the one that answers
    died: str  # how the one before it ended, and how many did; "-": none


class JobFacts(Struct):
    """A background job that one process of all does at a time, and which; of a maildrop nothing is said here."""

    job: str
    process: str
    machine: str
    pid: int


class MemberFacts(Struct):
    """A node as the keepers of all machines have noted it. `missing_since` is UTC, None while it is there."""

    id: str
    compared: bool  # its present disk was compared with the index
    owes_walk: bool
    blocked: bool
    missing_since: datetime | None


class Status(Struct):
    """How it is. `degraded` names everything that wants an operator; empty: healthy. Of a stopped server little is known."""

    running: bool
    degraded: list[str]
    copies_required: int = 0
    takes_mail: bool = False
    not_redundant: Thin = field(default_factory=Thin)
    nodes: list[NodeFacts] = []
    totals: dict[str, int] = {}
    epoch: int = 0
    connections: dict[str, int] = {}
    workers: list[WorkerFacts] = []
    counters: dict[str, int] = {}
    certificate_days_left: float | None = None  # of this machine in its cluster
    processes: list[ProcessFacts] = []
    jobs: list[JobFacts] = []
    members: list[MemberFacts] = []
    moves: list[MoveFacts] = []
    note: str = ""  # what there is to say of a machine whose processes answer no operator
    site: str = ""  # where this machine stands, empty if nobody said
    in_too_few_sites: Thin = field(default_factory=Thin)  # redundant, and brought into another site by and by


async def status(desk: Desk, request: Request, progress: Progress) -> Status:
    """Nodes, redundancy, queue, workers, counters; an index that does not answer is said, not waited for."""
    degraded: list[str] = []
    if not desk.cluster.takes_mail():
        degraded.append("mail is not accepted: too few groups are writable")
    found = await nodes.listing(desk, request)
    degraded += [_node_said(node) for node in found if node.state != "read-write" or node.reason]
    reserve = desk.settings.cluster.reserve_octets
    degraded += [
        f"node {node.id}: {node.free_octets >> 20} MiB are free; it takes no mail below {reserve >> 20} MiB"
        for node in found
        if node.state == "read-write" and node.free_octets < limits.NODE_LOW_FACTOR * reserve
    ]

    async def look(call: Awaitable[T], otherwise: T) -> T:
        try:
            return await bounded(call, "the index")
        except Trouble as error:
            if (text := f"index: {error}") not in degraded:
                degraded.append(text)
            return otherwise

    thin = await look(desk.index.under_copied_total(desk.repairer.counted_groups(), desk.cluster.copies_required), (0, 0))
    few = (0, 0)
    if desk.cluster.apart:
        few = await look(desk.index.under_copied_total(sites_of_copies(desk.cluster), wanted_sites(desk.cluster)), (0, 0))
    silent = any(text.startswith("index: ") for text in degraded)
    totals: dict[str, int] = {} if silent else await look(desk.index.totals(), {})
    if thin[0]:
        degraded.append(f"{thin[0]} messages are not redundant")
        degraded += _beyond_repair(desk.repairer.unrepairable)
    moving = [] if silent else await look(moves(desk, request), [])
    degraded += _handed_on(0 if silent else await look(desk.index.thin_checkpoints(), 0), moving)
    if desk.index.catching_up:
        degraded.append("the index is catching up with the nodes")
    degraded += [f"node {n}: {c} copies wait to be dropped: `node confirm {n}`" for n, c in desk.admission.held.items()]
    degraded += desk.forgetter.alarms
    degraded += desk.owners.alarms()
    await desk.resolver.directory.ask_again(limits.OPERATOR_DIRECTORY_S)
    if desk.resolver.directory.trouble:
        degraded.append(f"the directory is away, known recipients are taken: {desk.resolver.directory.trouble}")
    degraded += [f"worker {worker.name}: {worker.trouble}" for worker in desk.workers if worker.trouble]
    degraded += _without_route(desk, totals) + _certificate(desk) + desk.outbound_troubles()
    degraded += await look(enrolment.troubles(desk), [])
    described = [worker.describe() for worker in desk.workers]
    processes, jobs, members = await look(_of_all(desk), ([], [], []))
    degraded += _keepers(desk, processes, jobs)
    return Status(
        running=desk.serving,
        degraded=degraded,
        copies_required=desk.cluster.copies_required,
        takes_mail=desk.cluster.takes_mail(),
        not_redundant=Thin(thin[0], thin[1], desk.repairer.seconds_left()),
        nodes=found,
        totals=totals,
        epoch=desk.index.epoch,
        connections=desk.connections(),
        workers=[WorkerFacts(str(d["name"]), str(d["status"]), int(d["units"]), int(d["errors"])) for d in described],
        counters=desk.world.counters.snapshot(),
        certificate_days_left=enrolment.days_left(desk),
        processes=processes,
        jobs=jobs,
        members=members,
        moves=moving,
        site=desk.cluster.site,
        in_too_few_sites=Thin(few[0], few[1]),
    )


async def _of_all(desk: Desk) -> tuple[list[ProcessFacts], list[JobFacts], list[MemberFacts]]:
    """What the processes of all machines show of themselves; nothing where one process does everything. Raises IndexTrouble."""
    if desk.leases is None:
        return [], [], []
    own = desk.leases.process.tag
    found = seen(await desk.index.leases())
    processes = [
        ProcessFacts(p.part, p.machine, p.pid, p.version, utc(p.since), round(silent_s, 1), p.tag == own, p.died)
        for p, silent_s, _ in found
    ]
    jobs = [JobFacts(job, p.part, p.machine, p.pid) for p, _, jobs in found for job in jobs]
    standing = desk.cluster.standing
    members = [
        MemberFacts(
            row.id,
            bool(row.boot),
            row.owes_walk,
            standing(row.id) is Standing.BLOCKED,
            utc(row.missing_since) if row.missing_since else None,
        )
        for row in await desk.index.node_rows()
    ]
    return processes, sorted(jobs, key=lambda one: one.job), members


def _keepers(desk: Desk, processes: Sequence[ProcessFacts], jobs: Sequence[JobFacts]) -> list[str]:
    """Processes that fell silent, and that nobody keeps."""
    if desk.leases is None or not processes:
        return []
    silent = [
        f"process {one.process} on {one.machine} (pid {one.pid}) has shown nothing for {one.silent_s:.0f} s"
        for one in processes
        if one.silent_s >= limits.PROCESS_LEASE_S
    ]
    here = {one.process for one in processes if one.machine == desk.leases.process.machine}
    silent += [f"process {part} of this machine is not there: the log says why" for part in desk.parts if part not in here]
    return (
        silent if jobs else [*silent, "no keeper runs: nothing is repaired, deleted or checked; see `powermail serve --roles`"]
    )


def _node_said(node: NodeFacts) -> str:
    if node.state != "read-write":
        return f"node {node.id} is {node.state}" + (f": {node.reason}" if node.reason else "")
    return f"node {node.id}: {node.reason}"


def _beyond_repair(unrepairable: Mapping[bytes, str]) -> list[str]:
    """One line for each reason, with a message to look at."""
    by_reason: dict[str, list[bytes]] = {}
    for key, why in unrepairable.items():
        by_reason.setdefault(why, []).append(key)
    return [
        f"{len(keys)} of them cannot be repaired: {why}; for one, `powermail where {keys[0].hex()}`"
        for why, keys in list(by_reason.items())[:_REASONS_SHOWN]
    ]


def _handed_on(thin: int, moving: Sequence[MoveFacts]) -> list[str]:
    """What of the index's own state lies on too few nodes: an index that is made anew without one of these lacks it (P15)."""
    said = [
        f"{move.name}: {move.note or 'what lay there is written to others'}"
        for move in moving
        if move.name.startswith(f"{HAND_ON} ")
    ]
    if thin:
        said.append(f"the checkpoints of {thin} mailboxes are written anew: too few nodes are known to hold the last ones")
    return said


def _without_route(desk: Desk, totals: dict[str, int]) -> list[str]:
    waiting = totals.get("queue", 0)
    if not waiting or desk.settings.outbound.smarthost:
        return []
    return [f"{waiting} messages wait to leave and there is no route: set outbound.smarthost, or they bounce in the end"]


def _certificate(desk: Desk) -> list[str]:
    ends = desk.certificate_ends()
    if ends is None:
        return []
    days = (ends - desk.world.clock.now()) / _DAY_S
    if days >= limits.CERTIFICATE_WARN_DAYS:
        return []
    when = utc(ends).strftime("%Y-%m-%d")
    if days < 0:
        return [f"the certificate ended on {when}: clients refuse it"]
    return [f"the certificate ends in {int(days)} days, on {when}"]


class Reloaded(Struct):
    """Settings that were taken over, and those that differ and need a restart."""

    changed: list[str]
    restart: list[str]


async def reload(desk: Desk, request: Request, progress: Progress) -> Reloaded:
    """Reads settings and certificates again."""
    if desk.reload is None:
        raise OperatorError("the server is stopped; it reads its settings when it starts")
    changed, restart = await desk.reload()
    return Reloaded(changed, restart)


class CopyTo(Request):
    """Where to."""

    path: Annotated[str, place("an empty or new directory")]


class Copied(Struct):
    """Where the databases were copied to."""

    path: str


async def copy_databases(desk: Desk, request: CopyTo, progress: Progress) -> Copied:
    """Copies directory and index while they are used, as they were at one moment each, the index first."""
    assert desk.copy_databases is not None
    await desk.copy_databases(request.path)
    return Copied(request.path)


copy_databases_row = Operation(
    "copy_databases", "", CopyTo, Copied, copy_databases, "copy directory and index", changes=True, long=True
)
status_row = Operation("status", "status", Request, Status, status, "nodes, redundancy, queue, workers")
OPERATIONS = (
    copy_databases_row,
    status_row,
    Operation("reload", "reload", Request, Reloaded, reload, "read settings and certificates again", changes=True),
)
