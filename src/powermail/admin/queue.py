"""Owns what an operator does with the queue: mail that waits to leave."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from msgspec import Struct, field, structs

from powermail.admin.desk import Desk
from powermail.admin.table import Operation, Progress, Request, duration, maybe, option, unseen, word, words
from powermail.base.clock import utc
from powermail.base.errors import NoSuch, OperatorError
from powermail.index.contract import QueueRow
from powermail.mail.address import AddressError, canonical_domain, one_form, parse, spellings


class QueueFacts(Struct, rename={"from_": "from"}):
    """One recipient elsewhere."""

    id: int
    key: str
    to: str
    from_: str
    octets: int
    created_at: datetime
    due_at: datetime
    attempts: int
    held: bool
    last_status: str


def _facts(row: QueueRow, held_domains: Sequence[str]) -> QueueFacts:
    return QueueFacts(
        row.id,
        row.key.hex(),
        row.destination,
        row.envelope.reverse_path,
        row.octets,
        utc(row.created_at),
        utc(row.due_at),
        row.attempts,
        row.held or row.domain.lower() in held_domains,
        row.last_status,
    )


class QueuePage(Request):
    """Rows behind `after`; the filters are looked at in this page."""

    after: int = 0
    limit: int = 1000
    to: Annotated[str, option("only rows for this domain or address")] = ""
    sender: Annotated[str, option("only rows from this reverse-path or domain")] = ""
    older_s: Annotated[int, duration("only rows that wait longer, like 30m, 2h, 3d")] = 0


def _domain(text: str) -> str:
    """The one form of a domain. Raises OperatorError: a typing error would hold nothing, and nobody would notice."""
    try:
        return parse(f"x@{text}").canonical.removeprefix("x@")
    except AddressError as error:
        raise OperatorError(f"{text!r} is not a domain: {error}") from error


def _wanted(row: QueueRow, request: QueuePage, now: float) -> bool:
    def fits(address: str, wanted: str) -> bool:
        one = one_form(address)
        return one_form(wanted) == one if "@" in wanted else canonical_domain(wanted) == one.rpartition("@")[2]

    sender = row.envelope.reverse_path
    old = not request.older_s or now - row.created_at >= request.older_s  # a clock that ran ahead may have dated it
    to = not request.to or fits(row.destination, request.to)
    return to and (not request.sender or fits(sender or "<>", request.sender)) and old


async def listing(desk: Desk, request: QueuePage, progress: Progress) -> list[QueueFacts]:
    """Rows of the queue, in order."""
    found: list[QueueFacts] = []
    after, now, held = request.after, desk.world.clock.now(), await desk.index.held_domains()
    while len(found) < request.limit and (page := await desk.index.queue_rows(after, 1000)):
        after = page[-1].id
        found += [_facts(row, held) for row in page if _wanted(row, request, now)]
    return found[: request.limit]


class Tried(Struct):
    """One attempt that did not end it; `host` and `tls` are empty if no hop was reached, `tls` also in clear."""

    at: datetime
    host: str
    tls: str
    seconds: float
    status: str


class QueueStory(QueueFacts):
    """One recipient elsewhere, with what was tried: the oldest attempt that is remembered first."""

    tried: list[Tried] = field(default_factory=list)


class QueueNumber(Request):
    """One row."""

    number: Annotated[int, word("its number, as `powermail queue list` shows it")]


async def show(desk: Desk, request: QueueNumber, progress: Progress) -> QueueStory:
    """One row, and what each attempt met: host, TLS, how long it took, what was answered."""
    row = await desk.index.queue_row(request.number)
    if row is None:
        raise NoSuch(f"no queue row {request.number}")
    facts = structs.asdict(_facts(row, await desk.index.held_domains()))
    tried = [Tried(utc(a.at), a.host, a.tls, round(a.seconds, 3), a.status) for a in await desk.index.queue_attempts(row.id)]
    return QueueStory(**facts, tried=tried)


class QueueSet(Request):
    """What is to change of which rows; for programs, no number means all."""

    numbers: list[int]
    held: bool | None = None
    due: bool = False


class Changed(Struct):
    """How many rows."""

    rows: int


async def _all_there(desk: Desk, numbers: list[int]) -> list[QueueRow]:
    """The rows of these numbers. Raises NoSuch: then nothing is done."""
    rows = []
    for number in dict.fromkeys(numbers):
        row = await desk.index.queue_row(number)
        if row is None:
            raise NoSuch(f"no queue row {number}; nothing was changed")
        rows.append(row)
    return rows


async def change(desk: Desk, request: QueueSet, progress: Progress) -> Changed:
    """Holds, releases or retries rows; an empty list means all."""
    due_at = desk.world.clock.now() if request.due else None
    if request.held is None and due_at is None:
        raise OperatorError("nothing to change")
    await _all_there(desk, request.numbers)
    return Changed(await desk.index.queue_set(request.numbers, request.held, due_at))


class Some(Request):
    """Rows by their numbers, by the domain they go to, or all."""

    number: Annotated[list[int], maybe("numbers, as `powermail queue list` shows them")] = field(default_factory=list)
    domain: Annotated[str, option("all rows for this domain; held, it stays so for what comes later")] = ""
    all: Annotated[bool, option("all rows")] = False


async def _set(desk: Desk, request: Some, held: bool | None, due: bool) -> Changed:
    if bool(request.number) + bool(request.domain) + request.all != 1:
        raise OperatorError("name rows, or --domain DOMAIN, or --all")
    numbers = request.number
    if request.domain:
        rows = await listing(desk, QueuePage(limit=1 << 30, to=_domain(request.domain)), unseen)
        numbers = [row.id for row in rows]
        if not numbers:
            return Changed(0)
    return await change(desk, QueueSet(numbers, held, due), unseen)


class Domain(Struct):
    """A domain for which nothing leaves."""

    domain: str
    waiting: int


async def held_domains(desk: Desk, request: Request, progress: Progress) -> list[Domain]:
    """Domains that are held, with how much waits for each."""
    waiting: dict[str, int] = {}
    for name in await desk.index.held_domains():
        one = canonical_domain(name)
        waiting[one] = waiting.get(one, 0) + await desk.index.queue_count(name)
    return [Domain(name, count) for name, count in sorted(waiting.items())]


async def retry(desk: Desk, request: Some, progress: Progress) -> Changed:
    """Makes rows due now."""
    return await _set(desk, request, None, True)


async def hold(desk: Desk, request: Some, progress: Progress) -> Changed:
    """Rows are not tried until they are released; a domain is held with all that comes for it later."""
    if request.domain and not request.number and not request.all:
        names = spellings(_domain(request.domain))
        for name in names:
            await desk.index.hold_domain(name, True)
        return Changed(sum([await desk.index.queue_count(name) for name in names]))
    return await _set(desk, request, True, False)


async def release(desk: Desk, request: Some, progress: Progress) -> Changed:
    """Rows are tried again; a domain that was held is held no more."""
    if request.domain and not request.number and not request.all:
        for name in spellings(_domain(request.domain)):
            await desk.index.hold_domain(name, False)
    return await _set(desk, request, False, True)


class Numbers(Request):
    """Rows by their numbers."""

    numbers: Annotated[list[int], words("numbers, as `powermail queue list` shows them")]


async def delete(desk: Desk, request: Numbers, progress: Progress) -> Changed:
    """Deletes rows without a bounce: all of them or none."""
    rows = await _all_there(desk, request.numbers)
    await desk.index.finish(rows)
    return Changed(len(rows))


listing_row = Operation("queue_list", "queue list", QueuePage, list[QueueFacts], listing, "all rows, or some")
OPERATIONS = (
    listing_row,
    Operation("queue_show", "queue show", QueueNumber, QueueStory, show, "one row, and what each attempt met"),
    Operation("queue_held", "queue held", Request, list[Domain], held_domains, "domains for which nothing leaves"),
    Operation("queue_set", "", QueueSet, Changed, change, "hold, release or retry rows", changes=True),
    Operation("queue_retry", "queue retry", Some, Changed, retry, "try now", changes=True),
    Operation("queue_hold", "queue hold", Some, Changed, hold, "do not try until released", changes=True),
    Operation("queue_release", "queue release", Some, Changed, release, "try again", changes=True),
    Operation("queue_delete", "queue delete", Numbers, Changed, delete, "forget without a bounce", changes=True),
)
