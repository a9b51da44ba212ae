"""Owns moving an index from one engine to another: the same rows, the same history (laws 10, 11).

Nobody serves meanwhile. Rows go table by table in the order of their keys, a page a transaction, so that what has arrived is
always the beginning of each table: who is killed goes on behind the last row that is there. When all is there both sides are
read again, row beside row. Then, in this order, each durable before the next: the old index says that it was moved, and from
there on nobody opens it; the new one gets its cluster's name, and from there on it can be served. So never both, and a kill
between the two leaves neither, until the move is run again.

Which tables there are is asked of the databases themselves: one that is added later moves too, or the move says that it cannot.
What changed the old index between two runs is seen in its writer slots, which every transaction counts (law 10): then the
move begins anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from powermail.base import limits
from powermail.base.errors import IndexTrouble, OperatorError

Progress = Callable[[int, int], Awaitable[None]]
Work = Sequence[tuple[str, Sequence[Sequence[Any]]]]  # statements, each with the rows it is run for
META = "meta"
# Rows of `meta` that belong to one database and not to the history in it.
MOVING = "moving"  # in the new one: which state of which index is on its way here
MOVED = "moved"  # in the old one: where to
MOVED_AS = "moved_as"  # in the old one: which state of it
MOVED_FROM = "moved_from"  # in the new one, when it is whole: which state it was
CLUSTER = "cluster"  # who has none is not served
OF_ONE_SIDE = frozenset({MOVING, MOVED, MOVED_AS, MOVED_FROM, CLUSTER, "version", "system", "timeline"})
# Columns that one engine has and the other has no use for, and what they begin with.
OF_ONE_ENGINE: Mapping[tuple[str, str], Any] = {("writers", "used_at"): 0.0}
PUT_NOTE = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_FIRST_PAGE_ROWS = 16


class Table(NamedTuple):
    """A table as a database has it: its columns, and those of its primary key, in order."""

    columns: tuple[str, ...]
    key: tuple[str, ...]


class MovedTable(NamedTuple):
    """A table that was moved: its rows, and the SHA-256 of them in the order of their keys, which both sides have."""

    name: str
    rows: int
    sha256: str


class Side(ABC):
    """One of the two databases; texts are those of `index.sql`. Every method raises IndexTrouble, OperatorError."""

    name: str  # as people are told
    alone: bool  # nothing but the index is in it: its tables are the index's

    @abstractmethod
    async def tables(self) -> dict[str, Table]:
        """The tables in it, by name."""

    @abstractmethod
    async def rows(self, text: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement."""

    @abstractmethod
    async def change(self, work: Work) -> None:
        """Runs all of it in one transaction, durable at return."""

    @abstractmethod
    async def history(self) -> dict[str, str]:
        """What an index in this database says of the database itself, in `meta`."""

    @abstractmethod
    async def users(self) -> int:
        """How many other processes of this program use it, as far as it can say."""

    async def notes(self) -> dict[str, str]:
        """The rows of `meta`; none if there is no such table."""
        if META not in await self.tables():
            return {}
        return {str(name): str(value) for name, value in await self.rows("SELECT name, value FROM meta")}


async def state_of(side: Side) -> str:
    """Which state of which index it is: every transaction raises a writer slot (law 10)."""
    facts = [
        await side.rows("SELECT value FROM meta WHERE name = 'cluster'"),
        await side.rows("SELECT name, value FROM counters ORDER BY name"),
        await side.rows("SELECT id, tag, count, stopped FROM writers ORDER BY id"),
    ]
    return sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]


class Plan(NamedTuple):
    """How one table is moved: the columns that both have, and what fills those that only the new one has."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    filled: tuple[tuple[str, Any], ...]

    def page(self, after: Sequence[Any] | None) -> str:
        """The statement of the next rows; its last value is how many."""
        where = f" WHERE ({', '.join(self.key)}) > ({', '.join('?' * len(self.key))})" if after is not None else ""
        return f"SELECT {', '.join(self.columns)} FROM {self.name}{where} ORDER BY {', '.join(self.key)} LIMIT ?"

    def key_of(self, row: Sequence[Any]) -> list[Any]:
        """The primary key of a row of `page`."""
        return [row[self.columns.index(name)] for name in self.key]

    @property
    def insert(self) -> str:
        """The statement for one row, which has the columns of `page`."""
        names = ", ".join([*self.columns, *(name for name, _ in self.filled)])
        values = ", ".join(["?"] * len(self.columns) + [repr(value) for _, value in self.filled])
        return f"INSERT INTO {self.name} ({names}) VALUES ({values})"


async def plans(source: Side, target: Side) -> list[Plan]:
    """How each table is moved, `meta` apart. Raises OperatorError if one cannot be, and IndexTrouble."""
    old, new = await source.tables(), await target.tables()
    names = sorted(set(old) if source.alone else set(new) if target.alone else set(old) & set(new))
    found = []
    for name in names:
        if name not in old or name not in new:
            raise OperatorError(f"table {name} is in one of the two databases only: they are not of one version")
        table = old[name]
        here, there = set(table.columns), set(new[name].columns)
        strange = sorted(column for column in here ^ there if (name, column) not in OF_ONE_ENGINE)
        if strange or not table.key:
            raise OperatorError(f"table {name} cannot be moved: {', '.join(strange) or 'it has no key'}")
        filled = tuple((column, OF_ONE_ENGINE[name, column]) for column in new[name].columns if column not in here)
        columns = tuple(column for column in table.columns if column in there)
        if name != META:
            found.append(Plan(name, table.key, columns, filled))
    return found


class _Pages:
    """How many rows are taken at a time: as many as memory is meant for."""

    def __init__(self) -> None:
        self.rows = _FIRST_PAGE_ROWS

    def learn(self, octets: int) -> None:
        """The last page was so large."""
        if octets > limits.MOVE_PAGE_OCTETS:
            self.rows = max(1, self.rows // 4)
        elif octets < limits.MOVE_PAGE_OCTETS // 4:
            self.rows = min(2 * self.rows, limits.MOVE_PAGE_ROWS)


class _Move:
    """One run."""

    def __init__(self, source: Side, target: Side, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._done = self._total = 0

    async def run(self, table_plans: Sequence[Plan]) -> list[MovedTable]:
        """Copies what is not there yet, then compares everything."""
        for plan in table_plans:
            self._total += 2 * await self._count(f"SELECT count(*) FROM {plan.name}")
        for plan in table_plans:
            await self._copy(plan)
        return [await self._compare(plan) for plan in table_plans]

    async def _count(self, text: str, args: Sequence[Any] = ()) -> int:
        return int((await self._source.rows(text, args))[0][0])

    async def _step(self, rows: int) -> None:
        self._done += rows
        await self._progress(self._done, self._total)

    async def _copy(self, plan: Plan) -> None:
        backwards = ", ".join(f"{name} DESC" for name in plan.key)
        last = await self._target.rows(f"SELECT {', '.join(plan.key)} FROM {plan.name} ORDER BY {backwards} LIMIT 1")
        after: Sequence[Any] | None = list(last[0]) if last else None
        if after is not None:
            upto = f"({', '.join(plan.key)}) <= ({', '.join('?' * len(after))})"
            await self._step(await self._count(f"SELECT count(*) FROM {plan.name} WHERE {upto}", after))
        pages = _Pages()
        while rows := await self._source.rows(plan.page(after), [*(after or ()), pages.rows]):
            try:
                await self._target.change([(plan.insert, rows)])
            except IndexTrouble as error:
                raise IndexTrouble(f"{plan.name}, behind {after}: {error}") from error
            after = plan.key_of(rows[-1])
            pages.learn(len(msgspec.msgpack.encode(rows)))
            await self._step(len(rows))

    async def _compare(self, plan: Plan) -> MovedTable:
        """Both sides, row beside row."""
        digest, count, pages = sha256(), 0, _Pages()
        after: Sequence[Any] | None = None
        while True:
            args = [*(after or ()), pages.rows]
            rows, there = await self._source.rows(plan.page(after), args), await self._target.rows(plan.page(after), args)
            if rows != there:
                await self._begin_anew(plan, rows, there)
            if not rows:
                return MovedTable(plan.name, count, digest.hexdigest())
            packed = msgspec.msgpack.encode(rows)
            for row in rows:
                digest.update(msgspec.msgpack.encode(row))
            count += len(rows)
            after = plan.key_of(rows[-1])
            pages.learn(len(packed))
            await self._step(len(rows))

    async def _begin_anew(self, plan: Plan, rows: Sequence[Any], there: Sequence[Any]) -> None:
        await self._target.change([(PUT_NOTE, [(MOVING, "")])])  # the next run trusts nothing of it
        pairs = zip([*rows, None], [*there, None], strict=False)
        odd = next(((here, far) for here, far in pairs if here != far), (None, None))
        key = plan.key_of(next(row for row in odd if row is not None))
        raise IndexTrouble(
            f"{plan.name}: the row {key} is not in {self._target.name} as it is in {self._source.name}; the index stays where"
            " it is, and the next run begins anew"
        )


async def move(source: Side, target: Side, progress: Progress) -> list[MovedTable]:
    """Moves an index that nobody serves into a database that has its tables and nothing in them; what was moved, nothing if a
    run before this one had only the last step left. Run again it goes on. Raises IndexTrouble, OperatorError.
    """
    here, there = await source.notes(), await target.notes()
    moved: list[MovedTable] = []
    if MOVED in here:
        if there.get(MOVED_FROM) == here[MOVED_AS]:
            return []
        if there.get(MOVING) != here[MOVED_AS]:
            raise OperatorError(f"{source.name} was moved to {here[MOVED]}, and {target.name} is not that")
    else:
        state = await state_of(source)
        await _refuse_used(source, target, there)
        how = await plans(source, target)
        if there.get(MOVING) != state:
            await _clear(target, how, state)
        moved = await _Move(source, target, progress).run(how)
        if await state_of(source) != state or await source.users():
            raise IndexTrouble(f"{source.name} was used meanwhile: stop every process that serves, and run it again")
        await source.change([(PUT_NOTE, [(MOVED, target.name), (MOVED_AS, state)])])
        here = await source.notes()
    await _publish(target, here)
    return moved


async def counted(source: Side, target: Side | None) -> list[MovedTable]:
    """What a move would take along; nothing is changed. Raises OperatorError where it would refuse, IndexTrouble."""
    here = await source.notes()
    if not here.get(CLUSTER):
        raise OperatorError(f"{source.name} has no index in it")
    if MOVED in here:
        raise OperatorError(f"{source.name} was moved to {here[MOVED]}")
    await _refuse_used(source, target, await target.notes() if target is not None else {})
    found = []
    for name in sorted(await source.tables()):
        rows = await source.rows(f"SELECT count(*) FROM {name}")
        found.append(MovedTable(name, int(rows[0][0]), ""))
    return found


async def _refuse_used(source: Side, target: Side | None, there: Mapping[str, str]) -> None:
    if target is not None and there.get(CLUSTER):
        raise OperatorError(
            f"{target.name} has an index of cluster {there[CLUSTER]} already: name one that is empty; nothing was changed"
        )
    if users := await source.users():
        raise OperatorError(
            f"{users} connections of PowerMail use {source.name}: stop every process that serves it first; nothing was changed"
        )


async def _clear(target: Side, how: Sequence[Plan], state: str) -> None:
    """The first rows of fresh tables, and what an earlier move left, go; from now on nobody makes an index of its own there."""
    await target.change([(PUT_NOTE, [(MOVING, state)]), *((f"DELETE FROM {plan.name}", [()]) for plan in how)])


async def _publish(target: Side, here: Mapping[str, str]) -> None:
    """The last step: the new index can be served. Its database is the one that the history goes on in (law 10)."""
    rows = [(name, value) for name, value in sorted(here.items()) if name not in OF_ONE_SIDE]
    rows += [*(await target.history()).items(), (MOVED_FROM, here[MOVED_AS]), (CLUSTER, here[CLUSTER])]
    await target.change([(PUT_NOTE, rows), ("DELETE FROM meta WHERE name = ?", [(MOVING,)])])
