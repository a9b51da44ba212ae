"""Owns rows for every table of an index, made of what the schema says: a table that is added later has rows too."""

from __future__ import annotations

import random
import sqlite3
from typing import Any

ROWS = 40  # of each table, more than the first page of a move
ONE_ROW = ("counters", "meta")  # their rows have names
SKIPPED = ("writers", "nodes")  # what an index makes of itself, and keeps right


def _value(chance: random.Random, kind: str, number: int, in_key: bool) -> Any:
    if kind == "BLOB":
        octets = bytes(chance.randrange(256) for _ in range(chance.choice((0, 1, 16, 300))))
        return number.to_bytes(2, "big") + octets if in_key else octets
    if kind == "REAL":
        return chance.choice((0.0, 1_800_000_000.25, 0.1))
    if kind == "INTEGER":
        return number if in_key else chance.randrange(1000)
    text = chance.choice(("", "ann@example.org", "Entwürfe", "日本語 😀", "a b\tc", "zz'\"\\"))
    return f"{text}{number}" if in_key else text


def fill(path: str, seed: int = 1) -> dict[str, int]:
    """Puts rows in every table of a file; how many each has then."""
    chance = random.Random(seed)
    db = sqlite3.connect(path, isolation_level=None)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]
    db.execute("BEGIN")
    for table in tables:
        if table in (*ONE_ROW, *SKIPPED):
            continue
        columns = db.execute(f"SELECT name, type, pk FROM pragma_table_info('{table}')").fetchall()
        unique = {name for index in db.execute(f"SELECT name FROM pragma_index_list('{table}') WHERE \"unique\"").fetchall()
                  for (name,) in db.execute(f"SELECT name FROM pragma_index_info('{index[0]}')")}  # fmt: skip
        for number in range(1, ROWS + 1):
            values = [_value(chance, kind, number, bool(pk) or name in unique) for name, kind, pk in columns]
            marks = ", ".join("?" * len(values))
            db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values)
    db.execute("COMMIT")
    counts = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    db.close()
    return counts


def contents(path: str) -> dict[str, list[Any]]:
    """All rows of all tables of a file, in no order."""
    db = sqlite3.connect(path)
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]
    found = {table: sorted(db.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for table in tables}
    db.close()
    return found
