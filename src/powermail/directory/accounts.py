"""Owns the directory on PostgreSQL and on MySQL with our own table (`schema`). Implements `contract.Backend`, `Writable` and
`Ahead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from powermail.base import limits
from powermail.base.errors import DirectoryTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.directory import rows, schema
from powermail.directory.contract import Account, Doubt, RowTrouble
from powermail.directory.database import Address
from powermail.directory.pool import Refused, Row, Session
from powermail.directory.rows import ID_MAX, Value
from powermail.directory.server import Server, reached
from powermail.directory.statement import Statement
from powermail.mail.address import AddressError, has_control, parse

_COLUMNS = ", ".join(rows.COLUMNS)
_WIDTH = len(rows.COLUMNS)
_CHANGED = rows.COLUMNS[1:]
_PAGE = 2000
_CURE = "`powermail directory init` makes it"


@lru_cache(maxsize=limits.DIRECTORY_BATCH_ROWS + 1)
def _insert(count: int) -> Statement:
    """One INSERT of so many rows; the values of row 3 are :id_3, :address_3, ..."""
    parts = (", ".join(f":{name}_{number}" for name in rows.COLUMNS) for number in range(count))
    return Statement(f"INSERT INTO accounts ({_COLUMNS}) VALUES {', '.join(f'({part})' for part in parts)}")


@lru_cache(maxsize=2 * limits.DIRECTORY_BATCH_ROWS + 2)
def _select_in(what: str, expression: str, count: int) -> Statement:
    marks = ", ".join(f":v_{number}" for number in range(count))
    return Statement(f"SELECT {what} FROM accounts WHERE {expression} IN ({marks})")


_UPDATE = Statement(f"UPDATE accounts SET {', '.join(f'{name} = :{name}' for name in _CHANGED)} WHERE id = :id")
_DELETE = Statement("DELETE FROM accounts WHERE id = :id")
_SHAPE = Statement(f"SELECT {_COLUMNS} FROM accounts WHERE 1 = 0")
_READ_VERSION = Statement("SELECT max(version) FROM accounts_version")
_WRITE_VERSION = Statement("INSERT INTO accounts_version (version) VALUES (:version)")


def _values(account: Account, number: int) -> dict[str, Value]:
    return {
        "id": number,
        "address": account.address,
        "password": account.password,
        "quota_octets": account.quota_octets,
        "forward": " ".join(account.forward),
        "keep_copy": int(account.keep_copy),
        "enabled": int(account.enabled),
        "send_per_hour": account.send_per_hour,
        "send_as": " ".join(account.send_as),
    }


def _columns_of(alias: str) -> str:
    return ", ".join(f"{alias}.{name}" for name in rows.COLUMNS)


def _destination(account: Account, found: Sequence[Row]) -> dict[str, Account | None]:
    """What was found where it forwards to, by canonical address; nothing where a look-up would ask for something else, or
    would have trouble to tell of.
    """
    if len(account.forward) != 1 or len(found) != 1:
        return {}
    try:
        canonical = parse(account.forward[0]).canonical
        if not canonical.isascii() or canonical != account.forward[0].lower():
            return {}
        return {canonical: None if found[0][0] is None else rows.read(found[0])}
    except (AddressError, RowTrouble):
        return {}


class SqlDirectory:
    """The directory in a database of ours."""

    def __init__(self, world: World, kind: str, address: Address, size: int = limits.DIRECTORY_CONNECTIONS_DEFAULT) -> None:
        """`kind` is postgresql or mysql."""
        dialect = schema.DIALECTS[kind]
        self._world = world
        self._dialect = dialect
        self._server = Server(world, kind, address, size)
        self._find = Statement(f"SELECT {_COLUMNS} FROM accounts WHERE {dialect.key} = :address")
        self._find_ahead = Statement(
            f"SELECT {_columns_of('a')}, {_columns_of('b')}"
            f" FROM (SELECT {_COLUMNS} FROM accounts WHERE {dialect.key} = :address) a"
            f" LEFT JOIN accounts b ON a.forward <> '' AND {dialect.destination}"
        )
        self._serves = Statement(f"SELECT 1 FROM accounts WHERE {dialect.domain} = :domain LIMIT 1")
        self._page = Statement(
            f"SELECT {_COLUMNS} FROM accounts WHERE {dialect.key} > :after ORDER BY {dialect.key} LIMIT :limit"
        )
        self._ours = False  # the table was seen, and is of our making: its index answers a join as quickly as a look-up

    # -- opening, and the schema ------------------------------------------------------------------------------------------

    async def open(self, make: bool = True) -> None:
        """Looks whether the table is there. A server that is away is said and no reason not to start. Raises OperatorError."""
        if (trouble := await reached(self._look())) is not None:
            self._world.log.event(Event.TROUBLE, error=f"{trouble}; known recipients are taken until it is back")

    async def _look(self) -> None:
        await self._encoded()
        found = await self._version()
        if found is not None and found != schema.VERSION:
            self._refuse(found)
        try:
            await self._server.rows(_SHAPE)
        except DirectoryTrouble as error:
            if any(text in str(error) for text in self._dialect.missing):
                raise OperatorError(f"{error}: the directory has no table yet, or not of our shape; {_CURE}") from error
            raise
        self._ours = found is not None

    async def _encoded(self) -> None:
        """Raises OperatorError if not every address can be kept there."""
        found = str((await self._server.rows(Statement(self._dialect.encoding)))[0][0])
        if found.upper() not in ("UTF8", "UTF8MB4"):
            raise OperatorError(f"directory.database has the encoding {found}: make one with ENCODING 'UTF8'")

    @staticmethod
    def _refuse(found: int) -> None:
        if found < schema.VERSION:
            raise OperatorError(
                f"the table accounts is of version {found}, this release needs {schema.VERSION}: `powermail directory init` "
                "brings it on, while others use it"
            )

    async def _version(self) -> int | None:
        """What `directory init` made; None if it never was here: then the table or view is somebody's own."""
        try:
            found = await self._server.rows(_READ_VERSION)
        except DirectoryTrouble as error:
            if any(text in str(error) for text in self._dialect.missing):
                return None
            raise
        return int(str(found[0][0])) if found and found[0][0] is not None else 0

    async def initialise(self) -> list[int]:
        """Makes the table, or brings it on; the versions that were reached by it. Raises OperatorError, DirectoryTrouble."""
        await self._encoded()
        before = await self._version()
        if before is None:
            try:
                await self._server.rows(Statement("SELECT 1 FROM accounts WHERE 1 = 0"))
            except DirectoryTrouble as error:
                if not any(text in str(error) for text in self._dialect.missing):
                    raise
            else:
                raise OperatorError("there is a table or view accounts that is not of our making; nothing was changed")
        return await self._server.transaction(self._dialect.begin, lambda session: self._bring_on(session, before))

    async def _bring_on(self, session: Session, before: int | None) -> list[int]:
        if before is None:
            await session.change(Statement(schema.VERSIONS_TABLE), {}, limits.DIRECTORY_LONG_S)
        reached_now = []
        for version in range((before or 0) + 1, schema.VERSION + 1):
            for text in self._dialect.versions[version - 1]:
                await session.change(Statement(text), {}, limits.DIRECTORY_LONG_S)
            await session.change(_WRITE_VERSION, {"version": version}, limits.DIRECTORY_LONG_S)
            reached_now.append(version)
        return reached_now

    async def close(self) -> None:
        """Ends all connections."""
        await self._server.close()

    def abandon(self) -> None:
        """Lets go of all connections as they are."""
        self._server.abandon()

    # -- look-ups ---------------------------------------------------------------------------------------------------------

    async def find(self, address: str) -> Account | None:
        if has_control(address):
            return None  # no row has it, and a server might stumble over it
        found = await self._server.rows(self._find, {"address": address})
        return rows.read(found[0]) if found else None

    async def find_ahead(self, address: str) -> tuple[Account | None, dict[str, Account | None]]:
        if not self._ours or has_control(address):
            return await self.find(address), {}
        found = await self._server.rows(self._find_ahead, {"address": address})
        if not found:
            return None, {}
        account = rows.read(found[0][:_WIDTH])
        return account, _destination(account, [row[_WIDTH:] for row in found])

    async def serves(self, domain: str) -> bool:
        return not has_control(domain) and bool(await self._server.rows(self._serves, {"domain": domain}))

    # -- changes ----------------------------------------------------------------------------------------------------------

    def check(self, account: Account) -> Account:
        return rows.check(account)

    async def add(self, accounts: Sequence[Account]) -> int:
        await self.put(accounts, ())
        return len(accounts)

    async def put(self, new: Sequence[Account], known: Sequence[Account]) -> None:
        fresh = [_values(rows.check(account), int(account.id or self._fresh_id())) for account in new]
        changed = [_values(rows.check(account), int(account.id)) for account in known]

        async def enter(session: Session) -> None:
            for start in range(0, len(fresh), limits.DIRECTORY_BATCH_ROWS):
                part = fresh[start : start + limits.DIRECTORY_BATCH_ROWS]
                given = {f"{name}_{number}": value for number, row in enumerate(part) for name, value in row.items()}
                await session.change(_insert(len(part)), given, limits.DIRECTORY_LONG_S)
            for row in changed:
                await session.change(_UPDATE, row, limits.DIRECTORY_LONG_S)

        try:
            await self._server.transaction(self._dialect.begin, enter)
        except Refused as error:
            if error.twice:
                await self._name_the_one_there(fresh, error)
            raise

    async def _name_the_one_there(self, fresh: Sequence[dict[str, Value]], error: Refused) -> None:
        """Raises OperatorError that names the address which exists: in the table, or a second time among the new."""
        seen: set[str] = set()
        for row in fresh:
            folded = self._dialect.fold(str(row["address"]))
            if folded in seen or await self._server.listed(self._find, {"address": folded}):
                raise OperatorError(f"the directory refuses it: {rows.shown(row['address'])} exists") from error
            seen.add(folded)

    def _fresh_id(self) -> int:
        """63 random bits, from the world's source: that two are alike is for 10 million accounts one in 180,000."""
        return int.from_bytes(self._world.entropy.octets(8), "big") >> 1 or 1

    async def update(self, account: Account) -> bool:
        row = _values(rows.check(account), int(account.id))

        async def change(session: Session) -> bool:
            there = await session.rows(_select_in("id", "id", 1), {"v_0": row["id"]}, limits.DIRECTORY_LONG_S)
            await session.change(_UPDATE, row, limits.DIRECTORY_LONG_S)
            return bool(there)  # MySQL counts a row that was like this before as not changed

        try:
            return await self._server.transaction(self._dialect.begin, change)
        except Refused as error:
            if error.twice:
                raise OperatorError(f"the directory refuses it: {account.address} exists") from error
            raise

    async def remove(self, address: str) -> Account | None:
        async def take(session: Session) -> Row | None:
            found = await session.rows(self._find, {"address": self._dialect.fold(address)}, limits.DIRECTORY_LONG_S)
            if not found:
                return None
            await session.change(_DELETE, {"id": found[0][0]}, limits.DIRECTORY_LONG_S)
            return found[0]

        row = await self._server.transaction(self._dialect.begin, take)
        return None if row is None else rows.read(row)

    # -- lists ------------------------------------------------------------------------------------------------------------

    async def _listed(self, after: str, limit: int) -> Sequence[Row]:
        return await self._server.listed(self._page, {"after": self._dialect.fold(after), "limit": limit})

    async def all(self, after: str, limit: int) -> list[Account]:
        while found := await self._listed(after, limit):
            accounts = []
            for row in found:
                try:
                    accounts.append(rows.read(row))
                except RowTrouble:
                    continue  # `doubts` names it
            if accounts:
                return accounts
            after = str(found[-1][1])
        return []

    async def among(self, addresses: Sequence[str]) -> dict[str, Account]:
        found: dict[str, Account] = {}
        folded = [self._dialect.fold(address) for address in addresses]
        for start in range(0, len(folded), limits.DIRECTORY_BATCH_ROWS):
            part = folded[start : start + limits.DIRECTORY_BATCH_ROWS]
            asked = _select_in(_COLUMNS, self._dialect.key, len(part))
            for row in await self._server.listed(asked, {f"v_{number}": value for number, value in enumerate(part)}):
                account = rows.read(row)
                found[account.address.lower()] = account
        return found

    async def doubts(self) -> tuple[int, list[Doubt]]:
        doubts: list[Doubt] = []
        count, after = 0, ""
        while found := await self._listed(after, _PAGE):
            count += len(found)
            doubts += [Doubt(rows.shown(row[1]), problem) for row in found if (problem := rows.doubt(row))]
            after = str(found[-1][1])
        return count, doubts

    async def ids(self, ids: Sequence[str]) -> dict[str, str]:
        numbers = [int(text) for text in ids if text.isascii() and text.isdecimal() and int(text) <= ID_MAX]
        found: dict[str, str] = {}
        for start in range(0, len(numbers), limits.DIRECTORY_BATCH_ROWS):
            part = numbers[start : start + limits.DIRECTORY_BATCH_ROWS]
            asked = _select_in("id, address", "id", len(part))
            given: dict[str, Value] = {f"v_{number}": value for number, value in enumerate(part)}
            found |= {str(row[0]): rows.shown(row[1]) for row in await self._server.listed(asked, given)}
        return found
