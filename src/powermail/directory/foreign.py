"""Owns the directory in tables of somebody else, read by the operator's own statements. Implements `contract.Backend`.

`find` has the parameters :address, :local and :domain of a canonical address (a catch-all is asked for as `*@domain`, its
:local is `*`), and answers with columns by name: `id`, and any of the others of `rows.COLUMNS`. No row: nobody. `serves` has
:domain; any row says yes. `identify` (optional) has :id; `listing` (optional) has :after and :limit.

Several rows are one account: of the one that keeps mail (no `forward`, or `keep_copy`) everything is taken, of the others their
destinations; so a mailbox and its aliases, or a forward with a row for each destination, are what a UNION ALL makes of them.
Rows that are not `enabled` count only where there is no other. Two rows that keep mail and differ in id are two mailboxes of
one address: trouble. `forward` may hold several, separated by commas or blanks. Who is among his own destinations keeps a copy.

Nothing is ever changed here: rows are kept where they come from.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn, Protocol

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.directory import rows
from powermail.directory.contract import Account, Doubt, RowTrouble
from powermail.directory.pool import Column, Row
from powermail.directory.rows import Value
from powermail.directory.server import reached
from powermail.directory.statement import Statement
from powermail.mail.address import has_control, one_form

_FITS = {
    "id": ("number", "text"),
    "address": ("text",),
    "password": ("text",),
    "quota_octets": ("number",),
    "forward": ("text",),
    "keep_copy": ("number", "flag"),
    "enabled": ("number", "flag"),
    "send_per_hour": ("number",),
    "send_as": ("text",),
}
_PROBE = "nobody@powermail.invalid"
_PAGE = 1000
_KEPT_ELSEWHERE = (
    "the directory is read by statements of your own (directory.find): its rows are kept elsewhere, change them there; "
    "nothing was changed"
)
assert set(_FITS) == set(rows.COLUMNS)


class Asked(Protocol):
    """A database that answers questions. All raise DirectoryTrouble, RowTrouble, OperatorError."""

    async def rows(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        """A look-up."""

    async def listed(self, statement: Statement, values: Mapping[str, Value]) -> Sequence[Row]:
        """What may take long."""

    async def columns(self, statement: Statement, values: Mapping[str, Value]) -> list[Column]:
        """The columns of an answer."""

    async def close(self) -> None:
        """Ends all connections."""

    def abandon(self) -> None:
        """Lets go of all connections as they are."""


class Texts(NamedTuple):
    """The operator's statements; empty ones are not there."""

    find: str
    serves: str
    identify: str = ""
    listing: str = ""


class ForeignDirectory:
    """Somebody else's tables."""

    def __init__(
        self, world: World, asked: Asked, texts: Texts, last_known: Callable[[Sequence[str]], Awaitable[dict[str, str]]]
    ) -> None:
        """`last_known` are the addresses that ids were last seen with. Raises OperatorError for what is no such statement."""
        self._world = world
        self._asked = asked
        self._last_known = last_known
        self._find = _reading("find", texts.find, ("address", "local", "domain"), ("address", "local"))
        self._serves = _reading("serves", texts.serves, ("domain",), ("domain",))
        self._identify = _reading("identify", texts.identify, ("id",), ("id",)) if texts.identify else None
        self._listing = _reading("listing", texts.listing, ("after", "limit"), ("after",)) if texts.listing else None
        self._names: dict[str, list[str]] = {}  # columns of `find` and `listing`, once they were seen

    async def open(self, make: bool = True) -> None:
        """Looks whether the statements can be used. A server that is away is no reason not to start. Raises OperatorError."""
        if (trouble := await reached(self._look())) is not None:
            self._world.log.event(Event.TROUBLE, error=f"{trouble}; known recipients are taken until it is back")

    async def _look(self) -> None:
        await self._columns("find", self._find, _parts(_PROBE))
        await self._seen("serves", self._serves, {"domain": "powermail.invalid"})
        if self._listing is not None:
            await self._columns("listing", self._listing, {"after": "", "limit": 1})
        if self._identify is not None:
            await self._seen("identify", self._identify, {"id": "0"})

    async def _seen(self, name: str, statement: Statement, values: Mapping[str, Value]) -> list[Column]:
        try:
            return await self._asked.columns(statement, values)
        except RowTrouble as error:
            raise OperatorError(f"directory.{name}: {error}") from error
        except DirectoryTrouble as error:
            if getattr(error, "away", False):
                raise
            raise OperatorError(f"directory.{name}: {error}") from error

    async def _columns(self, name: str, statement: Statement, values: Mapping[str, Value]) -> list[str]:
        """The names of the columns in order. Raises OperatorError that names the statement and the column."""
        if name in self._names:
            return self._names[name]
        found = await self._seen(name, statement, values)
        names = [column.name.lower() for column in found]
        for column, lower in zip(found, names, strict=True):
            if lower not in _FITS:
                raise OperatorError(f"directory.{name}: column {column.name} is none of {', '.join(rows.COLUMNS)}")
            if names.count(lower) > 1:
                raise OperatorError(f"directory.{name}: column {column.name} is there twice")
            if column.kind != "unknown" and column.kind not in _FITS[lower]:
                raise OperatorError(f"directory.{name}: column {column.name} is {column.kind}, not {_wanted(lower)}")
        if "id" not in names:
            raise OperatorError(f"directory.{name}: there is no column id, by which an account's mail is known")
        if name == "listing" and "address" not in names:
            raise OperatorError("directory.listing: there is no column address")
        self._names[name] = names
        return names

    async def close(self) -> None:
        """Ends all connections."""
        await self._asked.close()

    def abandon(self) -> None:
        """Lets go of all connections as they are."""
        self._asked.abandon()

    # -- look-ups ---------------------------------------------------------------------------------------------------------

    async def find(self, address: str) -> Account | None:
        if has_control(address):
            return None
        names = self._names.get("find") or await self._columns("find", self._find, _parts(_PROBE))
        found = await self._asked.rows(self._find, _parts(address))
        if len(found) > limits.DIRECTORY_ROWS_MAX:
            raise RowTrouble(f"directory, row {rows.shown(address)}: more than {limits.DIRECTORY_ROWS_MAX} rows")
        return _account(address, [dict(zip(names, row, strict=True)) for row in found]) if found else None

    async def serves(self, domain: str) -> bool:
        return not has_control(domain) and bool(await self._asked.rows(self._serves, {"domain": domain}))

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        """Those whose last known address has them still; for the others `identify` is asked, if there is one."""
        known = await self._last_known(ids)
        found: dict[str, str] = {}
        for number in ids:
            account = await self.find(known[number]) if number in known else None
            if account is not None and account.id == number:
                found[number] = account.address
            elif address := await self._identified(number):
                found[number] = address
        return found

    async def _identified(self, number: str) -> str:
        """The address that has an id now, "" if none has. A server that wants a number is given one."""
        if self._identify is None:
            return ""
        try:
            found = await self._asked.listed(self._identify, {"id": number})
        except RowTrouble:
            if not number.isascii() or not number.isdecimal():
                return ""
            found = await self._asked.listed(self._identify, {"id": int(number)})
        return str(_plain(found[0][0])) if found else ""

    # -- lists ------------------------------------------------------------------------------------------------------------

    async def _listed(self, after: str, limit: int) -> list[dict[str, Value]]:
        if self._listing is None:
            raise OperatorError("directory.listing is not set: without that statement accounts cannot be listed")
        names = await self._columns("listing", self._listing, {"after": "", "limit": 1})
        return [
            dict(zip(names, row, strict=True))
            for row in await self._asked.listed(self._listing, {"after": after, "limit": limit})
        ]

    async def all(self, after: str, limit: int) -> list[Account]:
        while found := await self._listed(after, limit):
            accounts = []
            for row in found:
                try:
                    accounts.append(_account(str(_plain(row["address"])), [row]))
                except RowTrouble:
                    continue  # `doubts` names it
            if accounts:
                return accounts
            after = str(_plain(found[-1]["address"]))
        return []

    async def doubts(self) -> tuple[int, list[Doubt]]:
        doubts: list[Doubt] = []
        count, after = 0, ""
        while found := await self._listed(after, _PAGE):
            count += len(found)
            for row in found:
                address = str(_plain(row["address"]))
                if problem := rows.doubt(_in_order(address, row)):
                    doubts.append(Doubt(rows.shown(address), problem))
            after = str(_plain(found[-1]["address"]))
        return count, doubts

    # -- what others change -----------------------------------------------------------------------------------------------

    def check(self, account: Account) -> Account:
        self._refuse()

    async def add(self, accounts: Sequence[Account]) -> int:
        self._refuse()

    async def put(self, new: Sequence[Account], known: Sequence[Account]) -> None:
        self._refuse()

    async def update(self, account: Account) -> bool:
        self._refuse()

    async def remove(self, address: str) -> Account | None:
        self._refuse()

    async def among(self, addresses: Sequence[str]) -> dict[str, Account]:
        """Only an import asks for many."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise OperatorError(_KEPT_ELSEWHERE)


def _reading(name: str, text: str, parameters: tuple[str, ...], one_of: tuple[str, ...]) -> Statement:
    """A statement of the settings, that asks for one of these parameters. Raises OperatorError."""
    what = f"directory.{name}"
    statement = Statement(text, parameters, what)
    if (statement.text.split(None, 1) or [""])[0].upper() not in ("SELECT", "WITH"):
        raise OperatorError(f"{what}: it begins with neither SELECT nor WITH")
    if not set(one_of) & set(statement.names):
        raise OperatorError(f"{what}: it does not ask for :{one_of[0]}, so it would answer the same for everybody")
    return statement


def _parts(address: str) -> dict[str, Value]:
    local, _, domain = address.rpartition("@")
    return {"address": address, "local": local, "domain": domain}


def _wanted(column: str) -> str:
    return {"number": "a number", "text": "text"}.get(_FITS[column][-1], "a number (0 or 1) or a boolean")


def _plain(value: Any) -> Value:
    """What drivers make of numbers, octets and UUIDs, as the directory has it."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "surrogateescape")
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def _in_order(address: str, row: Mapping[str, Value]) -> list[Value]:
    """A row in the order of our own table; destinations and senders separated by blanks."""
    values = {name: _plain(value) for name, value in row.items()}
    for name in ("forward", "send_as"):
        if isinstance(text := values.get(name), str):
            values[name] = text.replace(",", " ")
    if values.get("address") is None:
        values["address"] = address
    return [values.get(name) for name in rows.COLUMNS]


def _account(address: str, found: Sequence[Mapping[str, Value]]) -> Account:
    """The one account that the rows of an address are. Raises RowTrouble."""
    read = [rows.read(_in_order(address, row)) for row in found]
    enabled = [account for account in read if account.enabled]
    accounts = sorted(enabled or read, key=lambda one: (not one.hosted, one.id))
    first = accounts[0]
    if any(other.hosted and other.id != first.id for other in accounts[1:]):
        raise RowTrouble(f"directory, row {rows.shown(address)}: two mailboxes have this address, ids {first.id} and another")
    forward = dict.fromkeys(to for account in accounts for to in account.forward)
    mine = {one_form(first.address), one_form(address)}
    elsewhere = tuple(to for to in forward if one_form(to) not in mine)
    keep_copy = len(elsewhere) < len(forward) or any(account.keep_copy for account in accounts)
    return first._replace(forward=elsewhere, keep_copy=keep_copy and bool(elsewhere))
