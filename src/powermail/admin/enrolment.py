"""Owns what an operator does with the members of a cluster: inviting a machine, looking who there is, expelling one.

A token's secret is shown once, to who made it, and is kept nowhere: the index has its SHA-256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from msgspec import Struct, field

from powermail.admin.desk import Desk, bounded
from powermail.admin.table import Operation, Progress, Request, option, word, yes
from powermail.base import limits
from powermail.base.certificates import pin_of
from powermail.base.clock import utc
from powermail.base.errors import NoSuch, OperatorError
from powermail.base.net import parse_host_port
from powermail.base.settings import inside
from powermail.base.tls import PeerCertificate
from powermail.index.sharing import Holder, Invitation
from powermail.wire.enrolment import ID_OCTETS, SECRET_OCTETS, Token, format_token
from powermail.wire.node_identity import NotOurs, parse_names, peer_of
from powermail.wire.node_verbs import Role

_DAY_S = 86_400.0
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Invited(Struct):
    """A token, shown once. `join` is the command for the new machine, `HOST:PORT` where the authority listens."""

    id: str
    roles: list[str]
    ends_at: datetime
    token: str
    join: str


class NodeAdd(Request):
    """The node that is to be."""

    node: Annotated[str, word("its name, unique for ever in this cluster")]
    group: Annotated[str, option("failure domain; nodes of one group are never redundant for each other")] = ""
    priority: Annotated[int, option("lower is used first; a higher number is a hot spare")] = 1
    address: Annotated[str, option("host:port where others reach it; without, `powermail join` says it")] = ""


class Admit(Request):
    """The machine that is to be a front end, a keeper or whatever."""

    id: Annotated[str, word("its name, unique for ever in this cluster")]
    role: Annotated[
        list[str], option("front, keeper, operator or authority; may be repeated. Default: as before, or front")
    ] = field(default_factory=list)


async def node_add(desk: Desk, request: NodeAdd, progress: Progress) -> Invited:
    """Makes a token with which a machine joins as this node."""
    if not request.group:
        raise OperatorError("node add needs --group: the failure domain of the new node, like rack-d")
    if any(c.isspace() or not c.isprintable() for c in request.group) or len(request.group) > limits.GROUP_CHARS_MAX:
        raise OperatorError(f"{request.group[:64]!r} is not a name of a group")
    if request.address and not parse_host_port(request.address)[0]:
        raise OperatorError(f"{request.address!r} has no host: other machines are to reach it there")
    known = (await desk.index.layout()).row(request.node) is not None
    if known or request.node in {row.id for row in await desk.index.node_rows()} or request.node in desk.cluster.nodes:
        raise OperatorError(
            f"node {request.node} is a member already: a new disk of it is `powermail node replace`, a new certificate "
            f"`powermail cluster admit {request.node} --role node`"
        )
    for holder in await desk.index.holders():
        if holder.identity == request.node and not holder.expelled_at:
            raise OperatorError(f"{request.node} is a member already, as {' and '.join(holder.roles)}: names are given once")
    invited = (request.group, request.priority, request.address)
    return await _invite(desk, request.node, (Role.NODE.value,), *invited)


async def admit(desk: Desk, request: Admit, progress: Progress) -> Invited:
    """Makes a token with which a machine joins in these roles; of a node that is a member, for its next certificate."""
    roles = wanted_roles(await desk.index.holders(), request.id, request.role)
    known = [role.value for role in Role]
    for role in roles:
        if role not in known:
            raise OperatorError(f"--role {role}: none of {', '.join(known)}")
    if Role.NODE.value in roles:
        row = (await desk.index.layout()).row(request.id)
        if roles != [Role.NODE.value] or row is None:
            raise OperatorError("a new node is invited by `powermail node add`, and has no other role")
        return await _invite(desk, request.id, (Role.NODE.value,), row.group, row.priority, row.address)
    if not desk.settings.index.database:
        raise OperatorError(
            "the index is a file, which only this machine opens: other machines can be nodes (`powermail node add`). For front "
            "ends and keepers elsewhere move it into a database: `powermail index move`"
        )
    if desk.settings.directory.in_file and {Role.FRONT.value, Role.KEEPER.value} & {*roles}:
        raise OperatorError(
            "the directory is a file of this machine, and front ends and keepers elsewhere look up there who exists: move it "
            "into a database: `powermail directory move`"
        )
    return await _invite(desk, request.id, tuple(roles))


def wanted_roles(holders: Sequence[Holder], identity: str, said: Sequence[str]) -> list[str]:
    """The roles of an invitation: those that were said, else what a member has, else a front end's."""
    held = [role for holder in holders if holder.identity == identity and not holder.expelled_at for role in holder.roles]
    return list(dict.fromkeys(said)) or held or [Role.FRONT.value]


async def _invite(
    desk: Desk, identity: str, roles: tuple[str, ...], group: str = "", priority: int = 1, address: str = ""
) -> Invited:
    if not _ID.fullmatch(identity):
        raise OperatorError(f"{identity[:80]!r} is not a name of 1 to 64 letters, digits, - and _")
    entropy, peers = desk.world.entropy, desk.settings.peers
    secret = entropy.octets(SECRET_OCTETS)
    token = Token(_pin(desk), entropy.octets(ID_OCTETS).hex(), secret)
    invitation = Invitation(token.id, hashlib.sha256(secret).digest(), identity, roles, group, priority, address)
    ends_at = await desk.index.invite(invitation, limits.TOKEN_LIVES_S)
    text = format_token(token)
    at = peers.authority_at[0] if peers.authority_at else "HOST:PORT"
    return Invited(identity, list(roles), utc(ends_at), text, f"powermail join {text} --authority {at}")


def _pin(desk: Desk) -> str:
    """What names the authority. Raises OperatorError where there is none."""
    path = inside(desk.data, desk.settings.peers.authority)
    try:
        return pin_of(desk.world.disk.read_file(path))
    except FileNotFoundError as error:
        raise OperatorError("this installation is no cluster yet: `powermail cluster init` makes it one") from error
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path} cannot be used: {error}") from error


class Member(Struct):
    """Who has a certificate, was invited or was expelled. `days_left` of the certificate, None without one."""

    id: str
    roles: list[str]
    state: str
    days_left: float | None


async def members(desk: Desk, request: Request, progress: Progress) -> list[Member]:
    """All machines of the cluster by name, and what is the matter with their certificates."""
    now = desk.world.clock.now()
    found = {}
    for token in await desk.index.tokens():
        if token.used_at is None and token.expires_at > now:
            guessed = token.failures >= limits.TOKEN_GUESSES_MAX
            state = "token was guessed at" if guessed else "invited"
            found[token.invitation.identity] = Member(token.invitation.identity, list(token.invitation.roles), state, None)
    for holder in await desk.index.holders():
        days = round((holder.ends_at - now) / _DAY_S, 1)
        state = "expelled" if holder.expelled_at else "member" if days > 0 else "certificate has ended"
        found[holder.identity] = Member(holder.identity, list(holder.roles), state, days if holder.ends_at else None)
    return [found[name] for name in sorted(found)]


class Expel(Request):
    """Which machine, and whether really."""

    id: Annotated[str, word("its name, as `powermail cluster members` says it")]
    dry_run: Annotated[bool, option("only say what would be, also with --yes")] = False
    yes: Annotated[bool, yes("really expel it; without, only say what would be")] = False


class Refused(Struct):
    """What a machine was, and whether it is expelled now. `missed`: nodes that could not be told yet, which a keeper goes on to
    tell; nodes that are away hear it when they are back.
    """

    id: str
    roles: list[str]
    expelled: bool
    missed: list[str]


async def expel(desk: Desk, request: Expel, progress: Progress) -> Refused:
    """Ends the membership of a machine: nodes refuse it from now on, and it gets no certificate any more, for ever."""
    holders = {holder.identity: holder for holder in await desk.index.holders()}
    waiting = {token.invitation.identity: token.invitation.roles for token in await desk.index.tokens()}
    if request.id not in holders and request.id not in waiting:
        raise NoSuch(f"nobody is called {request.id!r}; there are {', '.join(sorted({*holders, *waiting})) or 'none'}")
    if desk.peer_certificate is not None and request.id == own_id(desk.peer_certificate):
        raise OperatorError(f"{request.id} is this machine itself, and it would be for ever: expel it from another one")
    if (await desk.index.layout()).row(request.id) is not None:
        raise OperatorError(
            f"{request.id} is a node that mail is stored on: `powermail node expel {request.id}` or `powermail node drain` "
            "ends that, and its certificate with it"
        )
    roles = holders[request.id].roles if request.id in holders else waiting[request.id]
    done = request.yes and not request.dry_run
    missed: list[str] = []
    if done:
        await desk.index.expel_identity(request.id)
        missed = await desk.expeller.tell_all() if desk.expeller is not None else []
    return Refused(request.id, list(roles), done, missed)


def own_id(certificate: PeerCertificate) -> str:
    """Who shows this certificate; "" if that is nobody."""
    names = parse_names([("URI", uri) for uri in certificate.facts.uris])
    try:
        return peer_of(names, names[0].cluster if names else "").id
    except NotOurs:
        return ""


def days_left(desk: Desk) -> float | None:
    """Until the certificate of this machine ends; None if it has none."""
    return round(desk.peer_certificate.days_left(desk.world.clock.now()), 1) if desk.peer_certificate is not None else None


async def troubles(desk: Desk) -> list[str]:
    """Certificates that are near their end, ours and those of others; for `status`. Raises Trouble."""
    certificate, now = desk.peer_certificate, desk.world.clock.now()
    if certificate is None:
        return []
    said = []
    if (days := certificate.days_left(now)) < limits.CERTIFICATE_WARN_DAYS:
        said.append(f"the certificate of this machine in the cluster {_ends(days)}")
    own = {uri.rpartition("/")[2] for uri in certificate.facts.uris}
    for holder in await bounded(desk.index.holders(), "the index"):
        days = (holder.ends_at - now) / _DAY_S
        if not holder.expelled_at and holder.identity not in own and days < limits.CERTIFICATE_WARN_DAYS:
            said.append(f"the certificate of {holder.identity} {_ends(days)}: it does not reach the authority, or is gone")
    return said


def _ends(days: float) -> str:
    return f"ends in {days:.1f} days" if days > 0 else "has ended"


OPERATIONS = (
    Operation("node_add", "node add", NodeAdd, Invited, node_add, "invite a machine as a new node", changes=True),
    Operation("cluster_admit", "cluster admit", Admit, Invited, admit, "invite a machine as front end, keeper or operator",
              changes=True),
    Operation("cluster_members", "cluster members", Request, list[Member], members, "all machines and their certificates"),
    Operation("cluster_expel", "cluster expel", Expel, Refused, expel, "give a machine no certificate any more",
              changes=True),
)  # fmt: skip
