"""Owns the small pieces of SQL that several parts of the index share: placements and the release of references."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

ROWS_MAX = 64  # rows of one statement


def in_list(values: Sequence[Any]) -> str:
    """Placeholders for an IN list; the values themselves are always bound."""
    return ", ".join("?" * len(values))


def insert_many(db: sqlite3.Connection, head: str, width: int, rows: Sequence[Sequence[Any]]) -> None:
    """Inserts rows with few statements: the interpreter lock is given up once a statement, not once a row."""
    for start in range(0, len(rows), ROWS_MAX):
        part = rows[start : start + ROWS_MAX]
        one = f"({in_list(range(width))})"
        db.execute(f"{head} VALUES {', '.join([one] * len(part))}", [value for row in part for value in row])


class Placements:
    """Sets of nodes, numbered. A row of `messages` names the set of nodes that hold its copies."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.load()

    def load(self) -> None:
        """Reads the table again, after a transaction that was rolled back."""
        rows = self._db.execute("SELECT id, nodes FROM placements").fetchall()
        self._ids: dict[tuple[str, ...], int] = {tuple(n.split(" ")) if n else (): i for i, n in rows}
        self._nodes = {number: nodes for nodes, number in self._ids.items()}

    def id(self, nodes: Sequence[str]) -> int:
        """The number of a set, new if needed; inside a transaction."""
        wanted = tuple(sorted(nodes))
        number = self._ids.get(wanted)
        if number is None:
            row = self._db.execute("INSERT INTO placements (nodes) VALUES (?) RETURNING id", (" ".join(wanted),)).fetchone()
            number = int(row[0])
            self._ids[wanted] = number
            self._nodes[number] = wanted
        return number

    def has(self, nodes: Sequence[str]) -> bool:
        """True if the set has a number."""
        return tuple(sorted(nodes)) in self._ids

    def nodes(self, number: int) -> tuple[str, ...]:
        """The set with that number."""
        return self._nodes[number]

    def all(self) -> dict[int, tuple[str, ...]]:
        """Every known set."""
        return dict(self._nodes)


def release(db: sqlite3.Connection, placements: Placements, keys: Sequence[bytes]) -> int:
    """Takes one reference from each key; a message without references is due for deletion on each of its nodes."""
    db.executemany("UPDATE messages SET refs = refs - 1 WHERE key = ?", [(key,) for key in keys])
    dead = 0
    for start in range(0, len(keys), 500):
        part = keys[start : start + 500]
        rows = db.execute(
            f"DELETE FROM messages WHERE key IN ({in_list(part)}) AND refs <= 0 RETURNING key, placement", part
        ).fetchall()
        dead += len(rows)
        db.executemany(
            "INSERT OR IGNORE INTO deletions VALUES (?, ?)",
            [(node, key) for key, placement in rows for node in placements.nodes(placement)],
        )
        for key, _ in rows:
            db.execute("INSERT OR IGNORE INTO deletions SELECT node, key FROM suspects WHERE key = ?", (key,))
            db.execute("DELETE FROM suspects WHERE key = ?", (key,))
    return dead
