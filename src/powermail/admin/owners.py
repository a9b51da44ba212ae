"""Owns whose mail is whose: who has some, the mail of accounts that went, whom an id belonged to. Nothing goes without yes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Struct

from powermail.admin.desk import Desk
from powermail.admin.table import Names, Operation, Progress, Request, option, several, unseen, word, words, yes
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import NoSuch, OperatorError
from powermail.directory.contract import Doubt
from powermail.keeper.purges import Plan

_PAGE = 1000


class Owner(Struct):
    """An account that has mail; `address` is None when the directory knows it no more."""

    account: str
    address: str | None
    messages: int
    octets: int
    was: str | None = None  # the address it was last known by
    purge_at: datetime | None = None  # when its mail goes, if that was ordered


async def owners(desk: Desk, request: Request, progress: Progress = unseen) -> list[Owner]:
    """Every account that has mail."""
    rows = await desk.owners_of_mail()
    was: dict[str, str] = {}
    for start in range(0, len(rows), 500):
        was |= await desk.index.owners([row[0] for row in rows[start : start + 500]])
    due = {account: utc(plan.due_at) for account, plan in (await desk.purges.plans()).items()}
    return [Owner(a, name or None, m, o, was.get(a), due.get(a)) for a, m, o, name in rows if m]


async def orphans(desk: Desk, request: Request, progress: Progress) -> list[Owner]:
    """Mail of accounts that the directory no longer knows. Nothing is deleted because of that (P9)."""
    return [row for row in await owners(desk, request) if row.address is None]


class Purge(Request):
    """Whose mail, and whether really."""

    account: Annotated[Names, words("addresses, or ids of orphans")]
    confirm: Annotated[bool, yes("really delete; without, only say what would be")] = False
    dry_run: Annotated[bool, option("only say what would be, as without --yes")] = False
    now: Annotated[bool, option("with --yes: at once, and for good")] = False
    undo: Annotated[bool, option("keep the mail after all, as long as the purge is not due")] = False


class Purged(Struct):
    """What went, or will go at `due_at`, or would go."""

    accounts: list[str]
    messages: int
    octets: int
    purged: bool
    due_at: datetime | None = None
    undone: int = 0


async def purge(desk: Desk, request: Purge, progress: Progress) -> Purged:
    """Deletes all mail of addresses or of orphaned ids: all of them or none. Without `confirm` only says what it would do."""
    have = {row[0]: row for row in await desk.owners_of_mail()}
    names = []
    for name in several(request.account):
        if "@" in name:
            names.append((await desk.account(name)).id)
        elif name in have:
            names.append(name)
        else:
            raise NoSuch(f"no account {name!r} has mail; nothing was deleted")
    rows = [have[name] for name in names if name in have]
    messages, octets = sum(row[1] for row in rows), sum(row[2] for row in rows)
    if request.undo:
        undone = await desk.purges.undo(names)
        if not undone:
            raise NoSuch("no purge of these is waiting")
        return Purged(names, messages, octets, False, undone=undone)
    if not request.confirm or request.dry_run:
        return Purged(names, messages, octets, False)
    if why := await desk.purges.why_not(any(not row[3] for row in rows)):
        raise OperatorError(f"{why}. Nothing was changed")
    grace_s = desk.settings.directory.purge_grace_days * 86_400.0
    if not request.now and grace_s:
        due_at = await desk.purges.order([(row[0], not row[3]) for row in rows], grace_s)
        return Purged(names, messages, octets, False, utc(due_at))
    done, now = 0, desk.world.clock.now()
    for account, _, _, address in rows:
        done += await desk.purges.run(account, Plan(now, now, not address))
    await desk.purges.undo(names)
    return Purged(names, done, octets, True)


class Adopt(Request):
    """Whose, and which orphan's mail; an account's own id says that its new address is right."""

    address: Annotated[str, word("who gets the mail")]
    account: Annotated[str, word("id of the orphan, as `powermail orphans` lists it")]
    confirm: Annotated[bool, yes("really; without, only say what would be")] = False


class Adopted(Struct):
    """What was, or would be, given to whom."""

    address: str
    account: str
    was: str | None  # the address the id was last known by
    messages: int
    adopted: bool


async def adopt(desk: Desk, request: Adopt, progress: Progress) -> Adopted:
    """Gives the mail of an orphan to an account, or says that an id belongs to an address now."""
    to = await desk.account(request.address)
    have = {row[0]: row for row in await desk.owners_of_mail()}
    was = (await desk.index.owners([request.account])).get(request.account)
    if request.account == to.id:
        mine = have.get(to.id, (to.id, 0, 0, ""))
        if request.confirm:
            await desk.index.note_owners({to.id: to.address})
            desk.owners.forget(to.id)
            desk.resolver.directory.clear()
        return Adopted(to.address, to.id, was, mine[1], request.confirm)
    if request.account not in have:
        raise NoSuch(f"no account {request.account!r} has mail")
    if have[request.account][3]:
        raise OperatorError(f"{request.account} is no orphan: it is {have[request.account][3]}; nothing was changed")
    moved = 0
    if request.confirm:
        moved = await _move_all(desk, request.account, to.id, progress, have[request.account][1])
    return Adopted(to.address, request.account, was, moved or have[request.account][1], request.confirm)


async def _move_all(desk: Desk, orphan: str, to: str, progress: Progress, total: int) -> int:
    """Moves every message, mailbox by mailbox, in bounded transactions: repeating it goes on where it ended."""
    moved, after = 0, 0
    while page := await desk.index.mailboxes(after, _PAGE):
        after = page[-1].id
        for found in page:
            if found.account != orphan:
                continue
            target = await desk.index.make_mailbox(to, found.name)
            while entries := await desk.index.entries(found.id, 0, found.uid_next, limits.INDEX_PAGE_ROWS):
                moved += len(await desk.index.move(found.id, [entry.uid for entry in entries], target.id))
                await progress(moved, total)
    return moved


# -- whether the directory is right -------------------------------------------------------------------------------------


class DirectoryFindings(Struct):
    """Rows that cannot be used, each with what is wrong."""

    rows: int
    problems: list[Doubt]


async def check(desk: Desk, request: Request, progress: Progress) -> DirectoryFindings:
    """Reads every row as delivery and login would: bad ones harm only themselves, here they are named."""
    count, problems = await desk.directory.doubts()
    after = ""
    while page := await desk.directory.all(after, _PAGE):
        after = page[-1].address
        for account, was in await desk.owners.mismatches(page):
            problems.append(
                Doubt(account.address, f"its id {account.id} belonged to {was}: mail is refused until "
                      f"`powermail account adopt {account.address} {account.id} --yes` says that it is the same, "
                      f"or the row gets an id of its own")
            )  # fmt: skip
    return DirectoryFindings(count, problems)


OPERATIONS = (
    Operation(
        "account_adopt", "account adopt", Adopt, Adopted, adopt, "give it the mail of an orphan", changes=True, long=True
    ),
    Operation("dir", "dir", Request, list[Owner], owners, "accounts that have mail", long=True),
    Operation("orphans", "orphans", Request, list[Owner], orphans, "mail of accounts the directory no longer knows", long=True),
    Operation("purge", "purge", Purge, Purged, purge, "delete all mail of addresses or orphans", changes=True, long=True),
    Operation("directory_check", "directory check", Request, DirectoryFindings, check, "rows that cannot be used", long=True),
)
