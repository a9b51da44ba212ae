"""Owns what the SQL of the index is run by: reading in one snapshot, and changing in one transaction.

Texts are PostgreSQL's but for the placeholders, which are `?`: whoever runs them translates each text once. SQLite knows no
`FOR UPDATE` and needs none, because it has one writer; its `greatest` is `max`. Only what PostgreSQL-compatible databases have
is used: no sequences, triggers, advisory locks, SKIP LOCKED, savepoints or notices.

Rows are locked in the order that stands in `powermail.index.sql`. A body may run again when the engine asks for it, so it keeps
nothing but in its transaction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from powermail.base import limits
from powermail.index.contract import NodeRow
from powermail.index.view import View
from powermail.storage.contract import Position

T = TypeVar("T")
PART = 500  # values of one IN list
COUNTERS = ("epoch", "round", "sequence", "uidvalidity", "catching_up", "waiting")  # in the order in which they are locked


class Untouched(Generic[T]):
    """What a call returns that turned out to change nothing: its transaction is rolled back, no number is used."""

    def __init__(self, value: T) -> None:
        self.value = value


class Again(Exception):
    """Somebody else was quicker: the transaction is rolled back and runs again. Never raised where nobody else writes."""


class Slot(NamedTuple):
    """A writer slot: its number, its random tag, the count of its transactions (law 10)."""

    number: int
    tag: str
    commits: int


class Reading(ABC):
    """What can be read. Rows are sequences of the columns asked for."""

    @abstractmethod
    async def rows(self, text: str, args: Sequence[Any] = ()) -> Sequence[Any]:
        """All rows of a statement."""

    @abstractmethod
    async def one(self, text: str, args: Sequence[Any] = ()) -> Any:
        """The first row of a statement, or None."""

    @abstractmethod
    async def rows_in(
        self, head: str, values: Sequence[Any], tail: str = "", before: Sequence[Any] = (), after: Sequence[Any] = ()
    ) -> list[Any]:
        """Rows of a statement whose `head` ends in IN, whatever the length of the list; in the order of each part only.

        `before` and `after` are bound in `head` and `tail`.
        """

    async def aside(self, rows: int, call: Callable[..., T], *args: Any) -> T:
        """Runs what only computes, over about so many rows, where it holds up nobody: here, if all of this is in a lane."""
        return call(*args)


class Placements(ABC):
    """Sets of nodes, numbered. A row of `messages` names the set of nodes that are believed to hold its copies."""

    @abstractmethod
    async def id(self, nodes: Iterable[str]) -> int:
        """The number of a set, new if needed."""

    @abstractmethod
    async def nodes(self, number: int) -> tuple[str, ...]:
        """The set with that number."""

    @abstractmethod
    async def expel(self, node: str) -> None:
        """Takes a node out of every set, without a look at messages."""

    async def changed(self, numbers: Iterable[int], node: str, present: bool) -> dict[int, int]:
        """For each of these sets, the number of the one with `node`, or without it."""
        found = {}
        for number in sorted(numbers):
            nodes = await self.nodes(number)
            if (node in nodes) != present:
                found[number] = await self.id((*nodes, node) if present else [other for other in nodes if other != node])
        return {number: found.get(number, number) for number in numbers}


class Box:
    """A mailbox by its name, for deliveries: `left` numbers may be given before its row must be looked at again; `due` tells
    that its next checkpoint has a date. A copy in memory, right only where one process alone writes.
    """

    __slots__ = ("due", "id", "left")

    def __init__(self, number: int, left: int, due: bool) -> None:
        self.id = number
        self.left = left
        self.due = due


class Transaction(Reading):
    """One transaction. What it keeps in memory is thrown away with it; where nobody else writes, only if it is rolled back.

    `alone`: nobody else writes, so that nothing is locked and what was read stays true. `stale`: it changed nodes or counters.
    `fresh`: the UIDVALIDITY it gave. `resting`: it is the last one of its process. `views` were used lately, the longest
    unused first.
    """

    alone: bool
    placements: Placements

    def __init__(self) -> None:
        self.stale = False
        self.fresh = 0
        self.resting = False
        self.boxes: dict[tuple[str, str], Box] = {}
        self.views: dict[int, View] = {}
        self.views_messages = 0

    @property
    @abstractmethod
    def changes(self) -> int:
        """How many rows were changed so far, or more: it says whether anything was between two looks."""

    @property
    @abstractmethod
    def slot(self) -> Slot:
        """The writer slot that counts it."""

    @abstractmethod
    async def change(self, text: str, args: Sequence[Any] = ()) -> int:
        """Runs a statement; how many rows it changed."""

    @abstractmethod
    async def many(self, text: str, rows: Sequence[Sequence[Any]]) -> None:
        """Runs a statement for each of the rows."""

    @abstractmethod
    async def change_in(self, head: str, values: Sequence[Any], before: Sequence[Any] = ()) -> None:
        """Runs a statement whose `head` ends in IN, whatever the length of the list. `before` is bound in `head`."""

    @abstractmethod
    async def put(self, head: str, width: int, rows: Sequence[Sequence[Any]], tail: str = "") -> None:
        """Inserts rows of `width` columns; `head` ends before VALUES."""

    @abstractmethod
    async def counter(self, name: str) -> int:
        """A number of the whole index, as this transaction has found it first."""

    @abstractmethod
    async def members(self) -> Mapping[str, NodeRow]:
        """All member nodes, by id."""

    @abstractmethod
    async def member(self, node: str) -> NodeRow | None:
        """A member node; its row stays as it is until the transaction ends. Before any key is locked."""

    @abstractmethod
    async def new_slot(self) -> None:
        """The next writer slot is this process's from now on; no count is raised for it."""

    def keep_view(self, mailbox: int, view: View) -> None:
        """Remembers a view, and forgets those used longest ago when they are too many."""
        self.views[mailbox] = view
        self.views_messages += len(view)
        while self.views_messages > limits.INDEX_VIEWS_MESSAGES_MAX or len(self.views) > limits.INDEX_VIEWS_MAX:
            oldest = next(iter(self.views))
            if oldest == mailbox:  # alone it may be larger
                break
            self.forget_view(oldest)

    def forget_view(self, mailbox: int) -> View | None:
        """Takes a view out of memory."""
        view = self.views.pop(mailbox, None)
        self.views_messages -= len(view) if view is not None else 0
        return view

    async def known_view(self, mailbox: int) -> View | None:
        """A view to go on from, whatever it shows; it is the caller's."""
        return self.forget_view(mailbox)

    def new_id(self, table: str) -> int | None:
        """An id for a new row of `mailboxes`, `queue`, `holders`; None where the table gives one itself."""
        return None

    async def lock_nodes(self) -> list[str]:
        """The rows of all member nodes stay as they are until the transaction ends; their ids, where others write too."""
        text = 'SELECT id FROM nodes ORDER BY id COLLATE "C" FOR NO KEY UPDATE'
        return [] if self.alone else [row[0] for row in await self.rows(text)]

    async def lock_counters(self, *names: str) -> None:
        """These numbers of the whole index stay as they are until the transaction ends. In the order of `COUNTERS`."""
        if not self.alone:
            for name in sorted(names, key=COUNTERS.index):
                await self.one("SELECT value FROM counters WHERE name = ? FOR UPDATE", (name,))

    async def lock_slots(self) -> None:
        """No transaction of anybody ends until this one has. Behind all other locks."""
        if not self.alone:
            await self.rows("SELECT id FROM writers ORDER BY id FOR UPDATE")

    async def lock_keys(self, keys: Iterable[bytes]) -> None:
        """The fates and references of these stay as they are until the transaction ends."""
        if not self.alone:
            await self.rows_in("SELECT key FROM messages WHERE key IN", sorted(set(keys)), "ORDER BY key FOR UPDATE")

    async def lock_queue_of(self, keys: Iterable[bytes]) -> None:
        """The queue rows of these stay as they are until the transaction ends."""
        if not self.alone:
            await self.rows_in("SELECT id FROM queue WHERE key IN", sorted(set(keys)), "ORDER BY id FOR UPDATE")

    async def lock_mailboxes(self, *mailboxes: int) -> None:
        """Nobody else gives numbers in these until the transaction ends."""
        if not self.alone:
            await self.rows_in("SELECT id FROM mailboxes WHERE id IN", sorted(set(mailboxes)), "ORDER BY id FOR UPDATE")

    async def lock_entries(self, mailbox: int, uids: Sequence[int], *mailboxes: int) -> Sequence[int]:
        """Law 8: the keys that these entries refer to are locked, then the mailboxes; what was read before is read again. The
        UIDs that it was done for: what arrives meanwhile is left alone.
        """
        if self.alone:
            return uids
        found = await self.rows_in("SELECT uid, key FROM entries WHERE mailbox = ? AND uid IN", uids, before=(mailbox,))
        await self.lock_keys(row[1] for row in found)
        await self.lock_mailboxes(mailbox, *mailboxes)
        return [row[0] for row in found]


NODE_COLUMNS = (
    "id, site, incarnation, segment, place, end_segment, end_place, boot, scan_round, owes_walk, blocked, missing_since,"
    " owes_compare"
)


def node_row(r: Sequence[Any]) -> NodeRow:
    """A row of `nodes`, read as NODE_COLUMNS."""
    return NodeRow(r[0], r[1], r[2], Position(r[3], r[4]), Position(r[5], r[6]), r[7], r[8], bool(r[9]), bool(r[10]), r[11],
                   bool(r[12]))  # fmt: skip


async def read_nodes(db: Reading) -> list[NodeRow]:
    """All member nodes, by id."""
    return [node_row(row) for row in await db.rows(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id")]


def split(nodes: str) -> tuple[str, ...]:
    """A set of nodes as it is stored."""
    return tuple(nodes.split(" ")) if nodes else ()


def parts(values: Sequence[T], size: int = PART) -> Iterable[list[T]]:
    """The values in lists of at most `size`."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
