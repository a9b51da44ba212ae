"""Owns the small pieces of SQL that several parts of the index share: lists of values, many rows at once, numbered sets."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import parts, split

ROWS_MAX = 64  # rows of one statement


def in_list(values: Sequence[Any] | range) -> str:
    """Placeholders for an IN list; the values themselves are always bound."""
    return ", ".join("?" * len(values))


def insert_many(db: sqlite3.Connection, head: str, width: int, rows: Sequence[Sequence[Any]], tail: str = "") -> None:
    """Inserts rows with few statements: the interpreter lock is given up once a statement, not once a row."""
    one = f"({in_list(range(width))})"
    for part in parts(rows, ROWS_MAX):
        db.execute(f"{head} VALUES {', '.join([one] * len(part))}{tail}", [value for row in part for value in row])


def select_in(
    db: sqlite3.Connection,
    head: str,
    keys: Sequence[Any],
    tail: str = "",
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
) -> list[Any]:
    """Rows of a statement that ends in an IN list, whatever its length; in the order of each part only."""
    found: list[Any] = []
    for part in parts(keys):
        found += db.execute(f"{head} ({in_list(part)}) {tail}", [*before, *part, *after]).fetchall()
    return found


def change_in(db: sqlite3.Connection, head: str, keys: Sequence[Any], before: Sequence[Any] = ()) -> None:
    """Runs a statement that ends in an IN list, whatever its length: few statements, as in `insert_many`."""
    for part in parts(keys):
        db.execute(f"{head} ({in_list(part)})", [*before, *part])


def set_counter(db: sqlite3.Connection, name: str, value: int) -> None:
    """Sets a number of the whole index."""
    db.execute("UPDATE counters SET value = ? WHERE name = ?", (value, name))


class Sets:
    """Sets of nodes, numbered (`sql.engine.Placements`): a copy in memory of a table that only this process writes.

    `of_receipts`: their numbers by nodes in the order of receipts.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.of_receipts: dict[tuple[str, ...], int] = {}
        self.load()

    def load(self) -> None:
        """Reads the table again, after a transaction that was rolled back."""
        self._ids: dict[tuple[str, ...], int] = {}
        self._nodes: dict[int, tuple[str, ...]] = {}
        self.of_receipts.clear()
        for number, nodes in self._db.execute("SELECT id, nodes FROM placements ORDER BY id").fetchall():
            self._nodes[number] = split(nodes)
            self._ids.setdefault(split(nodes), number)

    def find(self, nodes: Iterable[str]) -> int | None:
        """The number of a set, if it has one; any order of nodes."""
        return self._ids.get(tuple(sorted(nodes)))

    def id(self, nodes: Iterable[str]) -> int:
        """The number of a set, new if needed; inside a transaction."""
        wanted = tuple(sorted(nodes))
        number = self._ids.get(wanted)
        if number is None:
            row = self._db.execute("INSERT INTO placements (nodes) VALUES (?) RETURNING id", (" ".join(wanted),)).fetchone()
            number = int(row[0])
            self._ids[wanted] = number
            self._nodes[number] = wanted
        return number

    def nodes(self, number: int) -> tuple[str, ...]:
        """The set with that number."""
        return self._nodes[number]

    def expel(self, node: str) -> None:
        """Takes a node out of every set, without a look at messages; inside a transaction."""
        for number, nodes in self._nodes.items():
            if node in nodes:
                rest = " ".join(other for other in nodes if other != node)
                self._db.execute("UPDATE placements SET nodes = ? WHERE id = ?", (rest, number))
        self.load()


def make_empty_placement(db: sqlite3.Connection) -> None:
    """The set of no nodes has a number that is known."""
    db.execute("INSERT INTO placements VALUES (?, '') ON CONFLICT DO NOTHING", (NO_NODES,))
