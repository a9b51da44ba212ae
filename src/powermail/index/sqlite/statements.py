"""Owns how SQLite runs the shared text: at once, in the lane that calls, so that no coroutine ever waits.

What transactions remember (node rows, counters, mailboxes by name, placements, views) is right only because this process is the
only writer of the file; it is thrown away when one is rolled back.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from powermail.index.contract import NodeRow
from powermail.index.sql.engine import Placements, Reading, Slot, Transaction
from powermail.index.sqlite.rows import Sets, change_in, insert_many, select_in
from powermail.storage.contract import Position

T = TypeVar("T")
_LOCKS = re.compile(r" ?FOR UPDATE(?: OF \w+)?")
_texts: dict[str, str] = {}


def text_of(shared: str) -> str:
    """A shared text as SQLite reads it: nothing is locked row by row, and the greater of two is their `max`."""
    text = _texts.get(shared)
    if text is None:
        text = _texts[shared] = _LOCKS.sub("", shared).replace("greatest(", "max(")
    return text


def drive(body: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine over `Reader` or `Writer` to its end."""
    try:
        body.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    body.close()
    raise RuntimeError("a transaction on SQLite waited for something")


class _Statements(Reading):
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    async def rows(self, text: str, args: Sequence[Any] = ()) -> list[Any]:
        return self._db.execute(text_of(text), args).fetchall()

    async def one(self, text: str, args: Sequence[Any] = ()) -> Any:
        return self._db.execute(text_of(text), args).fetchone()

    async def rows_in(
        self, head: str, values: Sequence[Any], tail: str = "", before: Sequence[Any] = (), after: Sequence[Any] = ()
    ) -> list[Any]:
        return select_in(self._db, head, values, text_of(tail), before, after)


class Reader(_Statements):
    """The reading lane's connection."""


class _Numbered(Placements):
    """The sets of nodes, from memory."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets

    async def id(self, nodes: Iterable[str]) -> int:
        return self._sets.id(nodes)

    async def nodes(self, number: int) -> tuple[str, ...]:
        return self._sets.nodes(number)

    async def expel(self, node: str) -> None:
        self._sets.expel(node)


class Owner(Protocol):
    """Whose writing lane it is."""

    @property
    def _slot(self) -> Slot: ...

    def _in_new_slot(self) -> None: ...


class Writer(_Statements, Transaction):
    """The writing lane's transactions, one after the other, with what they remember.

    `members`, `passed` (incarnation and watermark, law 7) and `counters` are as the last one left them.
    """

    alone = True

    def __init__(self, connection: sqlite3.Connection, owner: Owner) -> None:
        Transaction.__init__(self)
        self._db = connection
        self._owner = owner
        self.counters: dict[str, int] = {}
        self.passed: dict[str, tuple[str, Position]] = {}
        self._members: dict[str, NodeRow] = {}

    def forget(self) -> None:
        """What is in memory may be wrong after a transaction that was rolled back."""
        self.sets = Sets(self._db)
        self.placements = _Numbered(self.sets)
        self.boxes.clear()
        self.views.clear()
        self.views_messages = 0

    def know(self, members: Iterable[NodeRow]) -> None:
        """These are the member nodes."""
        self._members = {row.id: row for row in members}
        self.passed = {row.id: (row.incarnation, row.watermark) for row in self._members.values()}

    @property
    def changes(self) -> int:
        return self._db.total_changes

    @property
    def slot(self) -> Slot:
        return self._owner._slot

    async def new_slot(self) -> None:
        self._owner._in_new_slot()

    async def change(self, text: str, args: Sequence[Any] = ()) -> int:
        return self._db.execute(text_of(text), args).rowcount

    async def many(self, text: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._db.executemany(text_of(text), rows)

    async def change_in(self, head: str, values: Sequence[Any], before: Sequence[Any] = ()) -> None:
        change_in(self._db, text_of(head), values, before)

    async def put(self, head: str, width: int, rows: Sequence[Sequence[Any]], tail: str = "") -> None:
        insert_many(self._db, head, width, rows, tail)

    async def counter(self, name: str) -> int:
        return self.counters[name]

    async def members(self) -> Mapping[str, NodeRow]:
        return self._members

    async def member(self, node: str) -> NodeRow | None:
        return self._members.get(node)
