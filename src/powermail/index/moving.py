"""Owns moving an index from one engine to another: the same rows, the same history (laws 10, 11).

Nobody serves meanwhile. An index that several processes may open is first ordered to leave, and from there on nobody opens it;
who has it open is waited for. Rows go table by table in the order of their keys, a page a transaction, so that what has arrived
is always the beginning of each table: who is killed goes on behind the last row that is there. When all is there both sides are
read again, row beside row. Then, in this order, each durable before the next: the old index says that it was moved, in the
transaction that finds it as it was and takes their slots from all who ever wrote to it; the new one gets its cluster's name, in
the transaction that finds that it was kept for this move, and from there on it can be served. So never both, and a kill between
the two leaves neither, until the move is run again.

Danger: a list of connections is a courtesy (an engine may have none, a process may sleep between two statements). What keeps an
old process from writing are the slots, which each transaction raises last (law 10), and the counter that a new slot takes.

Which tables there are is asked of the databases themselves: one that is added later moves too, or the move says that it cannot.
What changed the old index between two runs is seen in its writer slots, which every transaction counts (law 10): then the
move begins anew.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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
LEAVING = "leaving"  # in the old one, if others may open it: where to; it is copied, and nobody opens it
MOVED = "moved"  # in the old one: where to
MOVED_AS = "moved_as"  # in the old one: which state of it
MOVED_FROM = "moved_from"  # in the new one, when it is whole: which state it was
CLUSTER = "cluster"  # who has none is not served
OF_ONE_SIDE = frozenset({MOVING, LEAVING, MOVED, MOVED_AS, MOVED_FROM, CLUSTER, "version", "system", "timeline"})
# Columns that one engine has and the other has no use for, and what they begin with.
OF_ONE_ENGINE: Mapping[tuple[str, str], Any] = {("writers", "used_at"): 0.0}
PUT_NOTE = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_FIRST_PAGE_ROWS = 16
_NOTE = "SELECT value FROM meta WHERE name = ? FOR UPDATE"
_NOBODYS = "SELECT value FROM meta WHERE name = 'cluster' AND value <> '' FOR UPDATE"
_NO_NOTE = "DELETE FROM meta WHERE name = ?"
# What every transaction changes something of (law 10). In this order they are locked: who takes a slot locks the counter first.
_FACTS = (
    "SELECT value FROM meta WHERE name = 'cluster'",
    "SELECT name, value FROM counters ORDER BY name FOR UPDATE",
    "SELECT id, tag, count, stopped FROM writers ORDER BY id FOR UPDATE",
)
_NO_SLOTS = "UPDATE writers SET tag = 'moved', stopped = 1"


class Answer(NamedTuple):
    """What a statement must answer, or nothing is changed."""

    text: str
    args: Sequence[Any]
    rows: Sequence[tuple[Any, ...]]


class Changed(IndexTrouble):
    """What was to be changed is not as it was: nothing was."""


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
    shared: bool  # processes that this one knows nothing of may open it

    @abstractmethod
    async def tables(self) -> dict[str, Table]:
        """The tables in it, by name."""

    @abstractmethod
    async def rows(self, text: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement."""

    @abstractmethod
    async def change(self, work: Work, provided: Sequence[Answer] = ()) -> None:
        """Runs all of it in one transaction, durable at return, behind questions that must have these answers. Raises Changed
        if one has another.
        """

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


class State(NamedTuple):
    """Which state of which index it is, and the questions that answer so."""

    id: str
    facts: tuple[Answer, ...]


async def state_of(side: Side) -> State:
    """The state that an index is in: every transaction raises a writer slot (law 10)."""
    facts = tuple([Answer(text, (), await side.rows(text)) for text in _FACTS])
    return State(sha256(msgspec.msgpack.encode([fact.rows for fact in facts])).hexdigest()[:32], facts)


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
    """Moves an index into a database that has its tables and nothing in them; what was moved, nothing if a run before this one
    had only the last step left. Run again it goes on. Raises IndexTrouble, OperatorError: then the index is served where it
    was, unless it says that it was moved.
    """
    here, there = await source.notes(), await target.notes()
    if MOVED in here and there.get(MOVED_FROM) == here[MOVED_AS]:
        return []
    if not here.get(CLUSTER):
        raise OperatorError(f"{source.name} has no index in it; nothing was changed")
    _refuse_taken(target, there)
    if MOVED in here:
        if there.get(MOVING) != here[MOVED_AS] and target.name != here[MOVED]:
            raise OperatorError(f"{source.name} was moved to {here[MOVED]}, and {target.name} is not that")
        moved: list[MovedTable] = []
        if there.get(MOVING) != here[MOVED_AS]:  # somebody else has written there: from the one that nobody changes any more
            moved = await _copied(source, target, progress, here[MOVED_AS], there)
    else:
        await _refuse_users(target)
        async with _leaving(source, target.name, here):
            moved = await _leave(source, target, progress, there)
        here = await source.notes()
    await _publish(target, here)
    return moved


async def _leave(source: Side, target: Side, progress: Progress, there: Mapping[str, str]) -> list[MovedTable]:
    """Copies the index of a source that nobody uses, and marks it as moved."""
    state = await state_of(source)
    moved = await _copied(source, target, progress, state.id, there)
    await _refuse_users(target)
    await _refuse_users(source)
    if (await target.notes()).get(MOVING) != state.id:
        raise IndexTrouble(f"{target.name} was written to by somebody else meanwhile; the next run begins anew")
    work: list[tuple[str, Sequence[Sequence[Any]]]] = [(PUT_NOTE, [(MOVED, target.name), (MOVED_AS, state.id)])]
    if source.shared:
        work += [(_NO_SLOTS, [()]), (_NO_NOTE, [(LEAVING,)])]
    try:
        await source.change(work, state.facts)
    except Changed as error:
        raise IndexTrouble(
            f"{source.name} was used meanwhile: stop every process that serves, and run it again; nothing was moved"
        ) from error
    return moved


async def _copied(source: Side, target: Side, progress: Progress, state: str, there: Mapping[str, str]) -> list[MovedTable]:
    how = await plans(source, target)
    if there.get(MOVING) != state:
        await _clear(target, how, state)
    return await _Move(source, target, progress).run(how)


@asynccontextmanager
async def _leaving(source: Side, name: str, here: Mapping[str, str]) -> AsyncIterator[None]:
    """Nobody opens the index meanwhile, and nobody has it open. Who fails lets it be opened again; who is killed does not."""
    if not source.shared:
        yield
        return
    where = f"to {name}"
    if here.get(LEAVING) != where:
        await source.change([(PUT_NOTE, [(LEAVING, where)])], [Answer(_NOTE, (MOVED,), []), _note(CLUSTER, here)])
    try:
        await _refuse_users(source)
        yield
    except BaseException:
        with contextlib.suppress(IndexTrouble):
            await source.change([(_NO_NOTE, [(LEAVING,)])])
        raise


async def let_stay(source: Side) -> bool:
    """Takes back a move that did not come to its end: the index is opened again where it is; False if none was ordered.

    Raises OperatorError if it was moved, IndexTrouble.
    """
    here = await source.notes()
    if MOVED in here:
        raise OperatorError(
            f"{source.name} was moved to {here[MOVED]}: `powermail index move` moves it back. Nothing was changed"
        )
    if LEAVING in here:
        await source.change([(_NO_NOTE, [(LEAVING,)])])
    return LEAVING in here


async def counted(source: Side, target: Side | None) -> list[MovedTable]:
    """What a move would take along; nothing is changed. Raises OperatorError where it would refuse, IndexTrouble."""
    here = await source.notes()
    if not here.get(CLUSTER):
        raise OperatorError(f"{source.name} has no index in it")
    if MOVED in here:
        raise OperatorError(f"{source.name} was moved to {here[MOVED]}")
    if target is not None:
        _refuse_taken(target, await target.notes())
        await _refuse_users(target)
    await _refuse_users(source)
    found = []
    for name in sorted(await source.tables()):
        rows = await source.rows(f"SELECT count(*) FROM {name}")
        found.append(MovedTable(name, int(rows[0][0]), ""))
    return found


def _refuse_taken(target: Side, there: Mapping[str, str]) -> None:
    if there.get(CLUSTER):
        raise OperatorError(
            f"{target.name} has an index of cluster {there[CLUSTER]} already: name one that is empty; nothing was changed"
        )


async def _refuse_users(side: Side) -> None:
    if users := await side.users():
        raise OperatorError(
            f"{users} connections of PowerMail use {side.name}: stop every process that serves it, or another command that "
            "moves it; then run this again"
        )


def _note(name: str, notes: Mapping[str, str]) -> Answer:
    """That a note says what it said."""
    return Answer(_NOTE, (name,), [(notes[name],)])


async def _clear(target: Side, how: Sequence[Plan], state: str) -> None:
    """The first rows of fresh tables, and what an earlier move left, go; from now on nobody makes an index of its own there."""
    nobodys = [Answer(_NOBODYS, (), [])]
    await target.change([(PUT_NOTE, [(MOVING, state)]), *((f"DELETE FROM {plan.name}", [()]) for plan in how)], nobodys)


async def _publish(target: Side, here: Mapping[str, str]) -> None:
    """The last step: the new index can be served. Its database is the one that the history goes on in (law 10)."""
    rows = [(name, value) for name, value in sorted(here.items()) if name not in OF_ONE_SIDE]
    rows += [*(await target.history()).items(), (MOVED_FROM, here[MOVED_AS]), (CLUSTER, here[CLUSTER])]
    kept = [Answer(_NOTE, (MOVING,), [(here[MOVED_AS],)]), Answer(_NOBODYS, (), [])]
    try:
        await target.change([(PUT_NOTE, rows), (_NO_NOTE, [(MOVING,)])], kept)
    except Changed as error:
        raise IndexTrouble(
            f"{target.name} was written to by somebody else meanwhile: see who does, and run this again, which copies it anew"
        ) from error
