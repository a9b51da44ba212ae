"""Owns how PostgreSQL runs the shared text, and what one transaction there knows: only what it has read itself.

Each text is translated once (`?` becomes `$1` …) and prepared once a connection. A list is one array.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import asyncpg

from powermail.base import limits
from powermail.base.entropy import Entropy
from powermail.index.contract import NodeRow
from powermail.index.postgres.views import Views
from powermail.index.sql.core import LEFT_OUT
from powermail.index.sql.engine import NODE_COLUMNS, Again, Placements, Reading, Slot, Transaction, node_row, read_nodes, split
from powermail.index.sql.epochs import Found
from powermail.index.view import View

T = TypeVar("T")
Connection: TypeAlias = asyncpg.Connection
_OURS = "id = ? AND tag = ? AND count = ? AND stopped < ?"  # a slot as its connection left it, which is in marks still
_RAISE = (
    "UPDATE writers SET count = count + 1, stopped = ?, used_at = ?,"
    f" round = (SELECT value FROM counters WHERE name = 'round') WHERE {_OURS}"
)
_texts: dict[str, str] = {}
_lists: dict[tuple[str, str], str] = {}


def text_of(shared: str) -> str:
    """A shared text as PostgreSQL reads it."""
    text = _texts.get(shared)
    if text is None:
        pieces = shared.split("?")
        text = pieces[0] + "".join(f"${number}{piece}" for number, piece in enumerate(pieces[1:], 1))
        _texts[shared] = text
    return text


def _list_text(head: str, tail: str) -> str:
    text = _lists.get((head, tail))
    if text is None:
        assert head.endswith(" IN"), head
        text = _lists[head, tail] = text_of(f"{head[:-3]} = ANY(?) {tail}")
    return text


def _affected(status: str) -> int:
    """Rows that a statement changed, from what the server says of it: `UPDATE 3`, `INSERT 0 1`."""
    last = status.rpartition(" ")[2]
    return int(last) if last.isdecimal() else 0


def counted_text(change: str) -> str:
    """A shared text that is a transaction by itself, for `Writer.run_counted`: if the writer slot is where it was left, it
    changes something, and raises the count of the slot last (law 10). `change` does nothing unless `slot` has a row, and
    returns a row for what it did.

    The slot is locked first: whoever looks at it when the connection broke waits until the server is done with the statement,
    so that it never does later what was asked again, or taken back, meanwhile.
    """
    return (
        f"WITH slot AS (SELECT id FROM writers WHERE {_OURS} FOR NO KEY UPDATE), changed AS ({change}),"
        f" counted AS ({_RAISE} AND EXISTS (SELECT 1 FROM changed) RETURNING id)"
        " SELECT (SELECT count(*) FROM slot), (SELECT count(*) FROM changed)"
    )


Aside: TypeAlias = Callable[..., Awaitable[Any]]  # runs a call with its arguments in a lane


class Reader(Reading):
    """What is read over one connection."""

    def __init__(self, connection: Connection, aside: Aside) -> None:
        self.connection = connection
        self._aside = aside

    async def aside(self, rows: int, call: Callable[..., T], *args: Any) -> T:
        if rows <= limits.VIEW_AT_ONCE_ROWS:
            return call(*args)
        result: T = await self._aside(call, *args)
        return result

    async def rows(self, text: str, args: Sequence[Any] = ()) -> Sequence[Any]:
        found: Sequence[Any] = await self.connection.fetch(text_of(text), *args)
        return found

    async def one(self, text: str, args: Sequence[Any] = ()) -> Any:
        return await self.connection.fetchrow(text_of(text), *args)

    async def rows_in(
        self, head: str, values: Sequence[Any], tail: str = "", before: Sequence[Any] = (), after: Sequence[Any] = ()
    ) -> list[Any]:
        if not values:
            return []
        found: list[Any] = await self.connection.fetch(_list_text(head, tail), *before, list(values), *after)
        return found


_ASKED = ("epoch", "catching_up", "waiting")
_STATED = "SELECT " + "".join(f"(SELECT value FROM counters WHERE name = '{name}'), " for name in _ASKED)


class StatedReader(Reader):
    """Each row of a statement says whether listings might be short when it was read (P7): one look instead of a transaction.

    `counters` is empty as long as no row has said so: then it is to be asked in another way.
    """

    def __init__(self, connection: Connection, aside: Aside) -> None:
        super().__init__(connection, aside)
        self.counters: dict[str, int] = {}

    async def rows(self, text: str, args: Sequence[Any] = ()) -> Sequence[Any]:
        found = await super().rows(self._stated(text), args)
        return [self._told(row) for row in found]

    async def one(self, text: str, args: Sequence[Any] = ()) -> Any:
        row = await super().one(self._stated(text), args)
        return None if row is None else self._told(row)

    @staticmethod
    def _stated(text: str) -> str:
        assert text.startswith("SELECT "), text
        return _STATED + text.removeprefix("SELECT ")

    def _told(self, row: Sequence[Any]) -> Sequence[Any]:
        self.counters = dict(zip(_ASKED, row[: len(_ASKED)], strict=True))
        return row[len(_ASKED) :]


def set_number(nodes: str, generation: int) -> int:
    """The number of a set of nodes: who makes the same set at the same time gives it the same one. A set that a node was
    expelled from keeps its number, and the next of the old shape is of a later generation.
    """
    digest = blake2b(f"{generation} {nodes}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


class NewSets(Exception):
    """Sets of nodes that have no numbers yet get these, before the transaction that needs them runs again."""

    def __init__(self, sets: Mapping[int, str]) -> None:
        super().__init__(f"{len(sets)} sets of nodes are new")
        self.sets = sets


class SharedPlacements(Placements):
    """The sets of nodes, as this transaction finds them."""

    def __init__(self, db: Writer) -> None:
        self._db = db
        self._nodes: dict[int, tuple[str, ...]] = {0: ()}
        self._ids: dict[str, int] = {"": 0}

    async def id(self, nodes: Iterable[str]) -> int:
        text = " ".join(sorted(nodes))
        await self.need([text])
        return self._ids[text]

    async def need(self, texts: Iterable[str]) -> None:
        """Finds the numbers of these. Raises NewSets with those that have none."""
        new: dict[int, str] = {}
        for text in texts:
            generation = count()
            while text not in self._ids and text not in new.values():
                number = set_number(text, next(generation))
                row = await self._db.one("SELECT nodes FROM placements WHERE id = ?", (number,))
                if row is None:
                    new[number] = text
                elif row[0] == text:
                    self._ids[text], self._nodes[number] = number, split(text)
        if new:
            raise NewSets(new)

    async def make(self, sets: Mapping[int, str]) -> None:
        """Numbers sets that are new. Who expels one of their nodes waits until they can be seen, and takes it out of them too;
        or this waits, and the set is one that only what law 7 undoes may name.
        """
        members = sorted({node for text in sets.values() for node in split(text)})
        lock = 'SELECT id FROM nodes WHERE id = ANY(?) ORDER BY id COLLATE "C" FOR KEY SHARE'  # reconcile goes on meanwhile
        await self._db.rows(lock, (members,))
        await self._db.many("INSERT INTO placements VALUES (?, ?) ON CONFLICT DO NOTHING", sorted(sets.items()))

    async def changed(self, numbers: Iterable[int], node: str, present: bool) -> dict[int, int]:
        """All that are new are asked for at once; what was read of a set is read again behind what was found by it."""
        before = {number: await self.nodes(number) for number in numbers}
        after = {
            number: " ".join(sorted({*nodes, node} if present else {*nodes} - {node}))
            for number, nodes in before.items()
            if (node in nodes) != present
        }
        await self.need(after.values())
        rows = await self._db.rows("SELECT id, nodes FROM placements WHERE id = ANY(?)", (sorted(after),)) if after else ()
        if any(split(nodes) != before[number] for number, nodes in rows):
            raise Again("a node was expelled meanwhile")
        return {number: self._ids[after[number]] if number in after else number for number in before}

    async def nodes(self, number: int) -> tuple[str, ...]:
        found = self._nodes.get(number)
        if found is None:
            row = await self._db.one("SELECT nodes FROM placements WHERE id = ?", (number,))
            found = self._nodes[number] = split(row[0])
        return found

    async def expel(self, node: str) -> None:
        await self._db.rows("SELECT id FROM nodes WHERE id = ? FOR UPDATE", (node,))  # see `make`
        for number, nodes in await self._db.rows("SELECT id, nodes FROM placements ORDER BY id FOR UPDATE"):
            if node in split(nodes):
                rest = " ".join(other for other in split(nodes) if other != node)
                await self._db.change("UPDATE placements SET nodes = ? WHERE id = ?", (rest, number))
        self._nodes, self._ids = {0: ()}, {"": 0}


class History(NamedTuple):
    """Which database server it is, and on which timeline; empty where an engine has neither."""

    system: str
    timeline: str

    def is_later(self, other: History) -> bool:
        """True if the other is what this server was on before its timeline began, or one that began beside it."""
        numbers = self.timeline.isdecimal() and other.timeline.isdecimal()
        return self.system == other.system and numbers and int(self.timeline) > int(other.timeline)


class Ids(Protocol):
    """Where the ids of new rows come from."""

    def take(self, table: str) -> int:
        """One that no row of this table has."""

    def give_back(self, tables: Sequence[str]) -> None:
        """The last ones taken, by their tables, were used by no row."""


class RandomIds:
    """Numbers of 63 bits: no counter is shared by those who write, and none is worth giving back."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy

    def take(self, table: str) -> int:
        return (int.from_bytes(self._entropy.octets(8), "big") >> 1) or 1

    def give_back(self, tables: Sequence[str]) -> None:
        """They are never taken again."""


class Writer(Reader, Transaction):
    """One transaction. `found` is what it leaves behind, if it changed what marks tell of."""

    alone = False
    placements: SharedPlacements

    def __init__(
        self,
        connection: Connection,
        history: History,
        slot: Slot,
        tag: Callable[[], str],
        new_id: Callable[[str], int],
        now: float,
        aside: Aside,
        kept: Views,
    ) -> None:
        Transaction.__init__(self)
        Reader.__init__(self, connection, aside)
        self.placements = SharedPlacements(self)
        self.found: Found | None = None
        self.history = history
        self.ids: list[str] = []  # tables that it took ids for
        self.made: list[tuple[int, str]] = []  # mailboxes that it made and has not named yet, and whose
        self._slot = slot
        self._tag = tag
        self._new_id = new_id
        self._now = now
        self._changes = 0
        self._counters: dict[str, int] = {}
        self._members: dict[str, NodeRow] | None = None
        self._kept = kept

    @property
    def changes(self) -> int:
        return self._changes

    @property
    def slot(self) -> Slot:
        return self._slot

    def new_id(self, table: str) -> int:
        self.ids.append(table)
        return self._new_id(table)

    async def rows(self, text: str, args: Sequence[Any] = ()) -> Sequence[Any]:
        return self._counted(text, await super().rows(text, args))

    async def one(self, text: str, args: Sequence[Any] = ()) -> Any:
        row = await super().one(text, args)
        self._counted(text, () if row is None else (row,))
        return row

    async def rows_in(
        self, head: str, values: Sequence[Any], tail: str = "", before: Sequence[Any] = (), after: Sequence[Any] = ()
    ) -> list[Any]:
        found = await super().rows_in(head, values, tail, before, after)
        self._counted(head, found)
        return found

    def _counted(self, text: str, found: Sequence[Any]) -> Sequence[Any]:
        if not text.startswith("SELECT "):
            self._changes += len(found)  # RETURNING
        return found

    async def known_view(self, mailbox: int) -> View | None:
        """Of this transaction; else one that the process has read. The row is locked: it shows what is committed."""
        own = self.forget_view(mailbox)
        kept = self._kept.find(mailbox, await self.counter("epoch")) if own is None else None
        return own if kept is None else kept.copy()

    def keep_view(self, mailbox: int, view: View) -> None:
        """Before this transaction has changed anything it is what others see, too."""
        super().keep_view(mailbox, view)
        if not self._changes and "epoch" in self._counters:
            kept = self._kept.find(mailbox, self._counters["epoch"])
            if kept is None or kept.modseq < view.modseq:
                self._kept.keep(mailbox, self._counters["epoch"], view.copy())

    async def change(self, text: str, args: Sequence[Any] = ()) -> int:
        changed = _affected(await self.connection.execute(text_of(text), *args))
        self._changes += changed
        return changed

    async def many(self, text: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            await self.connection.executemany(text_of(text), rows)
            self._changes += len(rows)

    async def change_in(self, head: str, values: Sequence[Any], before: Sequence[Any] = ()) -> None:
        if values:
            self._changes += _affected(await self.connection.execute(_list_text(head, ""), *before, list(values)))

    async def put(self, head: str, width: int, rows: Sequence[Sequence[Any]], tail: str = "") -> None:
        marks = ", ".join("?" * width)
        await self.many(f"{head} VALUES ({marks}){tail}", rows)

    def know_counters(self, counters: dict[str, int]) -> None:
        """So some were found by a statement that asked for them beside other things."""
        self._counters = {**counters, **self._counters}

    async def counter(self, name: str) -> int:
        if name not in self._counters:
            self._counters = {**dict(await self.rows("SELECT name, value FROM counters")), **self._counters}
        return self._counters[name]

    async def members(self) -> Mapping[str, NodeRow]:
        if self._members is None:
            self._members = {row.id: row for row in await read_nodes(self)}
        return self._members

    async def member(self, node: str) -> NodeRow | None:
        row = await self.one(f"SELECT {NODE_COLUMNS} FROM nodes WHERE id = ? FOR NO KEY UPDATE", (node,))
        return None if row is None else node_row(row)

    async def new_slot(self) -> None:
        """Its count is raised at the end of this transaction, as any slot's."""
        row = await self.one("UPDATE counters SET value = value + 1 WHERE name = 'sequence' RETURNING value")
        self._slot = Slot(row[0], self._tag(), 0)
        await self.change("INSERT INTO writers VALUES (?, ?, 0, 0, 0, ?)", (row[0], self._slot.tag, self._now))
        self.stale = True

    async def raise_count(self) -> bool:
        """Law 10, last in each transaction; False if the slot is not where this connection left it, or in no mark any more:
        nodes would refuse whatever names it again.
        """
        raised = await self.change(_RAISE, (int(self.resting), self._now, *self._ours()))
        self._count()
        return raised == 1

    async def run_counted(self, text: str, args: Sequence[Any]) -> tuple[bool, bool]:
        """Outside of any transaction. Was the slot where it was left; was something changed, and counted."""
        ours = self._ours()
        there, changed = await self.one(text, (*ours, *args, 0, self._now, *ours))
        if changed:
            self._count()
        return bool(there), bool(changed)

    def _count(self) -> None:
        self._slot = self._slot._replace(commits=self._slot.commits + 1)

    def _ours(self) -> tuple[int, str, int, int]:
        return (*self._slot, LEFT_OUT)
