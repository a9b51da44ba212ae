"""Owns what an operator asks about stored mail: where each message lies, and whether its copies are good."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk
from powermail.admin.table import Operation, Progress, Request, word, words
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import IndexTrouble, MessageUnreadable, NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.index.contract import EntryFacts
from powermail.storage.contract import Held, NodeState, StorageNode

_PAGE = 1000


class Listed(Struct):
    """One message of a mailbox: the nodes believed to hold it, and whether that is enough."""

    uid: int
    key: str
    octets: int
    received_at: datetime
    nodes: list[str]
    groups: list[str]
    redundant: bool
    readable: bool


class Listing(Struct):
    """The INBOX of an address."""

    address: str
    messages: list[Listed]
    not_redundant: int


class OneAddress(Request):
    """Whose."""

    address: Annotated[str, word("whose mail")]


async def _entries(desk: Desk, account: str) -> list[EntryFacts]:
    found = await desk.index.find_mailbox(account, "INBOX")
    if found is None:
        return []
    entries: list[EntryFacts] = []
    after = 0
    while page := await desk.index.entries(found.id, after, found.uid_next, limits.INDEX_PAGE_ROWS):
        entries += page
        after = page[-1].uid
    return entries


async def listing(desk: Desk, request: OneAddress, progress: Progress) -> Listing:
    """Each message of an address with its nodes and groups, and whether it is redundant."""
    account = await desk.account(request.address)
    groups = desk.cluster.groups()
    readable = {node.id for node in desk.cluster.readable()}
    messages = []
    entries = await _entries(desk, account.id)
    for start in range(0, len(entries), 500):
        part = entries[start : start + 500]
        known = {m.key: m for m in await desk.index.messages([entry.key for entry in part])}
        for entry in part:
            nodes = known[entry.key].nodes if entry.key in known else ()
            distinct = {groups[name] for name in nodes if name in groups}
            messages.append(
                Listed(
                    entry.uid,
                    entry.key.hex(),
                    entry.octets,
                    utc(entry.received_at),
                    list(nodes),
                    sorted(distinct),
                    len(distinct) >= desk.cluster.copies_required,
                    any(name in readable for name in nodes),
                )
            )
    return Listing(account.address, messages, sum(not message.redundant for message in messages))


class OneKey(Request):
    """Which message."""

    key: Annotated[str, word("its key: 32 hex digits, as the log and `powermail list` show it")]


class Where(Struct):
    """Everything about one message. `known`: the index shows it; `copies` says of each node whether its copy is good;
    `recipients` is None if no commit record could be read in time.
    """

    key: str
    known: bool
    octets: int | None
    sha256: str | None
    references: int
    believed: list[str]
    copies: dict[str, str]
    recipients: list[str] | None


def parse_key(text: str) -> bytes:
    """A message key. Raises OperatorError."""
    try:
        octets = bytes.fromhex(text)
    except ValueError:
        octets = b""
    if len(octets) != 16:
        raise OperatorError(f"{text!r} is not a message key (32 hex digits)")
    return octets


async def where(desk: Desk, request: OneKey, progress: Progress) -> Where:
    """Everything about one message: copies, recipients, checks; all nodes are asked at once, none for long."""
    key = parse_key(request.key)
    known = await desk.index.message(key)

    async def verdict(node: StorageNode) -> str:
        try:
            async with asyncio.timeout(limits.OPERATOR_COPY_S):
                if (await node.has([key]))[0] is not Held.LIVE:
                    return ""
                await node.verify(key)
                return "good"
        except TimeoutError:
            return f"unknown: no answer within {limits.OPERATOR_COPY_S:g} s"
        except Exception as error:  # noqa: BLE001  each copy's trouble is the answer
            return f"bad: {error}"

    nodes = desk.cluster.readable()
    verdicts = await asyncio.gather(*(verdict(node) for node in nodes))
    copies = {node.id: text for node, text in zip(nodes, verdicts, strict=True) if text}
    recipients = None
    if "good" in copies.values():
        try:
            async with asyncio.timeout(1.0):
                message = await desk.opener.open(key)
                recipients = [target.recipient or target.account for target in message.commit.targets]
        except (MessageUnreadable, IndexTrouble, TimeoutError) as error:
            desk.world.log.event(Event.TROUBLE, worker="where", key=key, error=str(error) or "no answer in time")
    return Where(
        request.key,
        known is not None,
        known.octets if known else None,
        known.sha256.hex() if known else None,
        known.references if known else 0,
        list(known.nodes) if known else [],
        copies,
        recipients,
    )


class Amount(Struct):
    """How much mail."""

    messages: int
    octets: int


class Loss(Struct):
    """What the loss of nodes would mean."""

    nodes: list[str]
    already_away: list[str]
    unreadable: Amount
    not_redundant: Amount
    takes_mail: bool


class SomeNodes(Request):
    """Which nodes."""

    nodes: Annotated[list[str], words("nodes that might be lost")]


async def whatif(desk: Desk, request: SomeNodes, progress: Progress) -> Loss:
    """What is unreadable, or not redundant, if these nodes are lost now."""
    desk.nodes(request.nodes)
    left = {name: group for name, group in desk.cluster.groups().items() if name not in request.nodes}
    away = {node.id for node in desk.cluster.nodes.values()} - {node.id for node in desk.cluster.readable()}
    left = {name: group for name, group in left.items() if name not in away}
    lost = await desk.index.under_copied_total(left, 1)
    thin = await desk.index.under_copied_total(left, desk.cluster.copies_required)
    takes = len(set(left.values())) >= desk.cluster.copies_required
    return Loss(request.nodes, sorted(away), Amount(*lost), Amount(*thin), takes)


class Findings(Struct):
    """The consistency check: messages looked at, those with anything wrong (each once), and every finding."""

    messages: int
    wrong: int
    problems: list[str]


async def verify(desk: Desk, request: Request, progress: Progress) -> Findings:
    """The consistency check: recounts the index, reads and checks every copy, compares belief with the nodes."""
    problems = await desk.index.audit()
    totals = await desk.index.totals()
    groups = desk.cluster.groups()
    checked, wrong, after = 0, 0, b""
    silent: dict[str, None] = {}  # nodes that did not answer: their copies are not asked for one by one
    everything = {name: f"{group}/{name}" for name, group in groups.items()}
    while page := await desk.index.under_copied(everything, 1 << 20, after, _PAGE):
        after = page[-1].key
        for message in page:
            good = set()
            before = len(problems)
            for name in message.nodes:
                node = desk.cluster.nodes.get(name)
                if node is None or name in silent or node.state in (NodeState.MISSING, NodeState.OPENING):
                    continue
                try:
                    await node.verify(message.key)
                    good.add(groups[name])
                except NodeTrouble as error:
                    silent[name] = None
                    problems.append(f"node {name} does not answer, its copies were not checked: {error}")
                except Exception as error:  # noqa: BLE001  each is a finding
                    problems.append(f"message {message.key.hex()} on node {name}: {error}")
            if len(good) < desk.cluster.copies_required:
                problems.append(f"message {message.key.hex()}: {len(good)} good copies in different groups")
            wrong += len(problems) > before
        checked += len(page)
        await progress(checked, totals["messages"])
    return Findings(checked, wrong, problems)


OPERATIONS = (
    Operation("list_messages", "list", OneAddress, Listing, listing, "each message of an address and where its copies lie",
              long=True),
    Operation("where", "where", OneKey, Where, where, "everything about one message"),
    Operation("whatif", "whatif", SomeNodes, Loss, whatif, "what is lost if these nodes are lost now", long=True),
    Operation("verify", "verify", Request, Findings, verify, "check index and every copy", long=True),
)  # fmt: skip
