"""Owns what an operator does with rows of the directory: one by one, and many at once."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from msgspec import UNSET, Struct, UnsetType, field

from powermail.admin.desk import Desk
from powermail.admin.table import Names, Operation, Progress, Request, option, secret, several, size, unseen, word, words
from powermail.base.errors import NoSuch, OperatorError
from powermail.directory import password as pw
from powermail.directory.contract import Account
from powermail.mail.address import AddressError, has_control, parse_canonical

_CLEAR = "{plain}"


class AccountFacts(Struct):
    """One row, without its password; `password` is its scheme."""

    id: str
    address: str
    kind: Literal["mailbox", "forward"]
    forward: list[str]
    keep_copy: bool
    quota_octets: int
    enabled: bool
    send_per_hour: int
    send_as: list[str]
    password: str


def facts(account: Account) -> AccountFacts:
    """A row as people and programs see it."""
    return AccountFacts(
        account.id,
        account.address,
        "mailbox" if account.hosted else "forward",
        list(account.forward),
        account.keep_copy,
        account.quota_octets,
        account.enabled,
        account.send_per_hour,
        list(account.send_as),
        pw.scheme_of(account.password) if account.password else "none",
    )


def _refuse_control(password: str) -> None:
    if has_control(password):
        raise OperatorError("a password has no control characters")  # RFC 4013 §2.3: no client sends one that has


async def stored(desk: Desk, password: str, plain: bool = True) -> str:
    """The form in which a password is kept: a known scheme as it is, clear text hashed. Raises OperatorError."""
    if not password:
        return ""
    if pw.has_scheme(password):
        scheme = pw.scheme_of(password)
        if scheme not in pw.SCHEMES:
            raise OperatorError(f"password scheme {{{scheme}}} is none of {', '.join(sorted(pw.SCHEMES))}")
        return password
    _refuse_control(password)
    if not plain:
        raise OperatorError("a password without {scheme}; if it is clear text say --plain, it is then hashed")
    return await desk.hash_password(password)


# -- rows ---------------------------------------------------------------------------------------------------------------


class AccountAdd(Request):
    """A new mailbox; with `forward` a forward, or both with `keep_copy`."""

    address: Annotated[str, word("its address, or *@DOMAIN for all that has no row")]
    quota_octets: Annotated[int, size("like 250k, 20M, 1G; 0 is unlimited")] = 0
    password: Annotated[str, secret("password")] = ""
    forward: list[str] = field(default_factory=list)
    keep_copy: bool = False
    enabled: bool = True
    send_per_hour: int = 0


async def add(desk: Desk, request: AccountAdd, progress: Progress = unseen) -> AccountFacts:
    """Makes a mailbox or a forward."""
    if request.quota_octets < 0 or request.send_per_hour < 0:
        raise OperatorError("a quota and a rate are 0 (no limit, the default) or more")
    password = await stored(desk, request.password)
    await desk.directory.add(
        [
            Account(
                "",
                request.address,
                password,
                request.quota_octets,
                tuple(request.forward),
                request.keep_copy,
                request.enabled,
                request.send_per_hour,
            )
        ]
    )
    desk.resolver.directory.clear()
    return facts(await desk.account(request.address))


class AccountSet(Request):
    """What changes; the rest stays."""

    address: Annotated[str, word("its address")]
    quota_octets: Annotated[int | None, size("like 250k, 20M, 1G; 0 is unlimited")] = None
    enabled: Annotated[bool | None, option("no: no login, no new mail")] = None
    send_per_hour: Annotated[int | None, option("recipients elsewhere per hour; 0 is the default of the settings")] = None
    send_as: Annotated[
        str | None, option("other senders it may use, addresses or *@DOMAIN, separated by commas; empty: none")
    ] = None
    password: str | None = None
    forward: list[str] | None = None
    keep_copy: bool | None = None


async def change(desk: Desk, request: AccountSet, progress: Progress = unseen) -> AccountFacts:
    """Changes some columns."""
    account = await desk.account(request.address)
    if (request.quota_octets or 0) < 0 or (request.send_per_hour or 0) < 0:
        raise OperatorError("a quota and a rate are 0 (no limit, the default) or more")
    if request.password is not None:
        account = account._replace(password=await stored(desk, request.password))
    if request.quota_octets is not None:
        account = account._replace(quota_octets=request.quota_octets)
    if request.enabled is not None:
        account = account._replace(enabled=request.enabled)
    if request.send_per_hour is not None:
        account = account._replace(send_per_hour=request.send_per_hour)
    if request.send_as is not None:
        account = account._replace(send_as=tuple(request.send_as.replace(",", " ").split()))
    if request.forward is not None:
        account = account._replace(forward=tuple(request.forward))
    if request.keep_copy is not None:
        account = account._replace(keep_copy=request.keep_copy)
    if not await desk.directory.update(account):
        raise NoSuch(f"{account.address} was deleted meanwhile")
    desk.resolver.directory.clear()
    return facts(await desk.account(account.address))


class AccountPassword(Request):
    """A new password."""

    address: Annotated[str, word("its address")]
    password: Annotated[str, secret("password")] = ""


async def set_password(desk: Desk, request: AccountPassword, progress: Progress) -> AccountFacts:
    """Sets a password."""
    if not request.password:
        raise OperatorError("an empty password admits nobody; give one")
    return await change(desk, AccountSet(request.address, password=request.password))


class AccountRename(Request):
    """Its new address; id, mail and everything else stay."""

    address: Annotated[str, word("its address")]
    to: Annotated[str, word("its new address")]


async def rename(desk: Desk, request: AccountRename, progress: Progress) -> AccountFacts:
    """Gives a row another address; its mail stays its own."""
    account = await desk.account(request.address)
    try:
        to = parse_canonical(request.to)
    except AddressError as error:
        raise OperatorError(f"{request.to!r} is not an address: {error}") from error
    if await desk.directory.find(to) is not None:
        raise OperatorError(f"{to} exists; nothing was changed")
    desk.directory.check(account._replace(address=to))  # before anything is noted
    await desk.index.note_owners({account.id: to})
    await desk.directory.update(account._replace(address=to))
    desk.owners.forget(account.id)
    desk.resolver.directory.clear()
    return facts(await desk.account(to))


class Addresses(Request):
    """Some rows."""

    address: Annotated[Names, words("addresses")]


class Deleted(Struct):
    """What went, and the mail that stays as an orphan."""

    address: str
    account: str
    octets_left: int


async def delete(desk: Desk, request: Addresses, progress: Progress = unseen) -> list[Deleted]:
    """Removes rows; their mail stays as orphans until it is purged. All of them or none."""
    accounts = [await desk.account(address) for address in several(request.address)]
    gone = []
    for account in accounts:
        octets = await desk.index.usage(account.id)
        await desk.directory.remove(account.address)
        gone.append(Deleted(account.address, account.id, octets))
    desk.resolver.directory.clear()
    return gone


class Page(Request):
    """A part of a long list: rows behind `after`."""

    after: str = ""
    limit: int = 1000


async def listing(desk: Desk, request: Page, progress: Progress) -> list[AccountFacts]:
    """Rows in order of address."""
    return [facts(account) for account in await desk.directory.all(request.after, min(request.limit, 10_000))]


class OneAddress(Request):
    """One row."""

    address: Annotated[str, word("its address")]


async def show(desk: Desk, request: OneAddress, progress: Progress) -> AccountFacts:
    """One row, without its password."""
    return facts(await desk.account(request.address))


class Usage(Struct):
    """Octets used and allowed; a quota of 0 is unlimited."""

    address: str
    octets: int
    quota_octets: int


async def usage(desk: Desk, request: OneAddress, progress: Progress) -> Usage:
    """Octets used and allowed."""
    account = await desk.account(request.address)
    return Usage(account.address, await desk.index.usage(account.id), account.quota_octets)


# -- many at once -------------------------------------------------------------------------------------------------------


class AccountRow(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of an import; what is left out stays as it is with `update`, else it is the default."""

    address: str
    password: str | UnsetType = UNSET
    quota_octets: int | UnsetType = UNSET
    forward: list[str] | UnsetType = UNSET
    keep_copy: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    send_per_hour: int | UnsetType = UNSET
    send_as: list[str] | UnsetType = UNSET


class AccountImport(Request):
    """Rows with the lines they stand on; a batch is entered whole or not at all."""

    rows: list[AccountRow]
    lines: list[int] = field(default_factory=list)
    update: bool = False
    dry_run: bool = False
    plain: bool = False


class Imported(Struct):
    """What became of them; with a dry run, what would."""

    added: int
    updated: int
    dry_run: bool = False


async def bring_in(desk: Desk, request: AccountImport, progress: Progress) -> Imported:
    """Adds many rows, or with `update` changes those that exist, in one transaction."""
    new: list[Account] = []
    known: list[Account] = []
    lines = request.lines if len(request.lines) == len(request.rows) else range(1, len(request.rows) + 1)
    places = [f"line {line}, {row.address}" for line, row in zip(lines, request.rows, strict=True)]
    addresses: list[str] = []
    for place, row in zip(places, request.rows, strict=True):
        await _breathe(len(addresses))
        try:
            addresses.append(parse_canonical(row.address))
        except AddressError as error:
            raise OperatorError(f"{place}: not an address: {error}; nothing was changed") from error
    there = await desk.directory.among(addresses)
    for place, address, row in zip(places, addresses, request.rows, strict=True):
        before = there.get(address.lower())
        await _breathe(len(new) + len(known))
        try:
            if before is not None and not request.update:
                raise OperatorError("exists already; --update changes rows that exist")
            account = await _merged(desk, before or Account("", address), row, request)
            (new if before is None else known).append(desk.directory.check(account))
        except OperatorError as error:
            raise OperatorError(f"{place}: {error}; nothing was changed") from error
    if not request.dry_run:
        await desk.directory.put(new, known)
        desk.resolver.directory.clear()
    return Imported(len(new), len(known), request.dry_run)


async def _breathe(number: int) -> None:
    """Many rows are no reason to keep mail waiting."""
    if number % 100 == 99:
        await asyncio.sleep(0)


async def _merged(desk: Desk, account: Account, row: AccountRow, request: AccountImport) -> Account:
    if row.password is not UNSET:
        if request.dry_run and row.password and request.plain and not pw.has_scheme(row.password):
            _refuse_control(row.password)
            account = account._replace(password=_CLEAR)
        else:
            account = account._replace(password=await stored(desk, row.password, request.plain))
    if row.quota_octets is not UNSET:
        account = account._replace(quota_octets=row.quota_octets)
    if row.forward is not UNSET:
        account = account._replace(forward=tuple(row.forward))
    if row.keep_copy is not UNSET:
        account = account._replace(keep_copy=row.keep_copy)
    if row.enabled is not UNSET:
        account = account._replace(enabled=row.enabled)
    if row.send_per_hour is not UNSET:
        account = account._replace(send_per_hour=row.send_per_hour)
    if row.send_as is not UNSET:
        account = account._replace(send_as=tuple(row.send_as))
    return account


listing_row = Operation("account_list", "account list", Page, list[AccountFacts], listing, "all mailboxes and forwards")
import_row = Operation("account_import", "", AccountImport, Imported, bring_in, "add many rows", changes=True, long=True)
OPERATIONS = (
    Operation("account_add", "account add", AccountAdd, AccountFacts, add, "make a mailbox", changes=True),
    import_row,
    Operation("account_set", "account set", AccountSet, AccountFacts, change, "change a mailbox", changes=True),
    Operation(
        "account_password", "account password", AccountPassword, AccountFacts, set_password, "set a password", changes=True
    ),
    Operation("account_rename", "account rename", AccountRename, AccountFacts, rename, "give it another address", changes=True),
    Operation(
        "account_delete", "account delete", Addresses, list[Deleted], delete, "remove mailboxes or forwards", changes=True
    ),
    listing_row,
    Operation("account_show", "account show", OneAddress, AccountFacts, show, "one mailbox or forward"),
    Operation("usage", "usage", OneAddress, Usage, usage, "octets used by an address"),
)
