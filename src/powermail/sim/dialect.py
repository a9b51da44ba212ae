"""Owns how the simulated database server reads PostgreSQL's text: as SQLite's, for values that are there.

Only what PowerMail says is read: arrays as `unnest` and `ANY`, an UPDATE whose rows an INSERT joins, named parts that change
rows, the clock, `array_agg`, and which rows a SELECT locks. What a new statement needs beyond that is added here; until then a
simulation says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

# Rows are known by the columns of their primary key; where another set of columns is unique too, a new row takes both.
UNIQUE = {"mailboxes": ("account", "name"), "holders": ("nodes",)}
_ARRAY = "\x00array:"
_UNNEST = re.compile(r"unnest\(([^()]*)\)\s+AS\s+(\w+)\(([^()]*)\)")
_ANY = re.compile(r"= ANY\(\$(\d+)(?:::\w+\[\])?\)")
_NUMBER = re.compile(r"\$(\d+)")
_LOCKING = re.compile(r"\s*FOR (KEY SHARE|NO KEY UPDATE|UPDATE)(?: OF (\w+))?")
_ALIAS = re.compile(r"^(UPDATE|DELETE FROM) (\w+) ([a-z]) (SET|WHERE|FROM)\b")
_JOINED = re.compile(r"^WITH (\w+) AS \((UPDATE .*?) RETURNING (.*?)\) (INSERT INTO .*)$", re.DOTALL)
_PART = re.compile(r"(?:WITH|,) (\w+) AS \(")
_COLUMN = re.compile(r"^SELECT (\w+) FROM\b|\bRETURNING (\w+)$")
_PIECES = re.compile(r"\x00(\d+)\x00")


class Mode(IntEnum):
    """How strongly a row is locked; the weaker two go together, all others stand in each other's way."""

    SHARE = 0  # FOR KEY SHARE
    CHANGE = 1  # an UPDATE, FOR NO KEY UPDATE
    OWN = 2  # DELETE, INSERT, FOR UPDATE

    def bears(self, other: Mode) -> bool:
        """True if two transactions may hold both."""
        return Mode.SHARE in (self, other) and Mode.OWN not in (self, other)


class Locking(NamedTuple):
    """Which rows a SELECT locks: a statement that gives the table and the name of each."""

    text: str
    mode: Mode


class Joined(NamedTuple):
    """An UPDATE whose changed rows an INSERT joins, as three statements that come to the same. The columns of what `changed`
    gives are arrays behind the values of the whole statement, for `insert`.
    """

    update: str
    changed: str
    insert: str
    width: int


@cache
def joined(text: str) -> Joined | None:
    """The parts of a statement in which an INSERT joins what an UPDATE returns; None for any other."""
    match = _JOINED.match(text)
    if match is None:
        return None
    name, update, returned, insert = match.groups()
    head = re.match(r"UPDATE (\w+) (\w) SET ", update)
    assert head is not None, text
    table, alias = head.groups()
    _, source, where = _cut(update, "FROM", "WHERE")
    columns = [part.strip().replace(".", " ").split(" ")[-1] for part in returned.split(",")]
    first = max(int(number) for number in _NUMBER.findall(text)) + 1
    arrays = ", ".join(f"${number}" for number in range(first, first + len(columns)))
    insert = re.sub(rf"\b{name} (\w+)", rf"unnest({arrays}) AS \1({', '.join(columns)})", insert)
    return Joined(update, f"SELECT {returned} FROM {table} {alias}, {source} WHERE {where}", insert, len(columns))


@cache
def steps(text: str) -> tuple[str, ...] | None:
    """The named parts of a statement that change rows, and the SELECT behind them, each a statement; None for any other. What
    each one gives, one column, is an array behind the values of the whole statement, for those that come later.

    In PostgreSQL no part sees in a table what another has changed, only what that returns: a statement must not ask for it.
    """
    if not text.startswith("WITH ") or joined(text) is not None or " RETURNING " not in text:
        return None
    found: list[str] = []
    names: dict[str, str] = {}
    at = 0
    behind = max(int(number) for number in _NUMBER.findall(text)) + 1
    while (match := _PART.match(text, at)) is not None:
        start, at = match.end(), _closing(text, match.end())
        part = text[start:at]
        column = _COLUMN.search(part)
        assert column is not None, part
        found.append(_of_arrays(part, names))
        names[match[1]] = f"unnest(${behind + len(names)}) AS {match[1]}({column[1] or column[2]})"
        at += 1
    return (*found, _of_arrays(text[at:].strip(), names))


def _closing(text: str, at: int) -> int:
    """Where the parenthesis is closed that was opened before `at`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _of_arrays(text: str, names: Mapping[str, str]) -> str:
    for name, rows in names.items():
        text = re.sub(rf"\bFROM {name}\b", f"FROM {rows}", text)
    return text


def _cut(text: str, *words: str) -> list[str]:
    """The text between these words where they stand outside of all parentheses, each the first behind the one before."""
    pieces, start = [], 0
    for word in words:
        at = find_outside(text, word, start)
        assert at >= 0, f"{word} in {text}"
        pieces.append(text[start:at].strip())
        start = at + len(word)
    return [*pieces, text[start:].strip()]


def find_outside(text: str, word: str, start: int = 0) -> int:
    """Where a word stands outside of all parentheses; -1 if it does not."""
    depth = 0
    for match in re.finditer(rf"[()]|\b{word}\b", text[start:]):
        if match[0] == "(":
            depth += 1
        elif match[0] == ")":
            depth -= 1
        elif depth == 0:
            return start + match.start()
    return -1


def locking(text: str, names: Callable[[str, str], str]) -> Locking | None:
    """What a SELECT locks; None if it locks nothing. `names` gives what names a row of a table, by its alias."""
    match = _LOCKING.search(text)
    if match is None:
        return None
    start = 0
    depth = 0
    for at in range(match.start() - 1, -1, -1):  # the innermost statement that it stands in
        if text[at] == ")":
            depth += 1
        elif text[at] == "(":
            if depth == 0:
                start = at + 1
                break
            depth -= 1
    inner = text[start : match.start()].strip()
    at = find_outside(inner, "FROM")
    rest = inner[at:]
    found = re.match(r"FROM (\w+)(?: (?!WHERE\b|JOIN\b|LEFT\b|ORDER\b|FOR\b)(\w+))?", rest)
    assert found is not None, text
    table, alias = found[1], match[2] or found[2] or found[1]
    mode = {"KEY SHARE": Mode.SHARE, "NO KEY UPDATE": Mode.CHANGE, "UPDATE": Mode.OWN}[match[1]]
    return Locking(f"SELECT '{table}', {names(table, alias)} {rest}", mode)


@cache
def _prepared(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A text with places for what depends on the values, and what those places are."""
    places: list[tuple[str, Any]] = []

    def place(kind: str, what: Any) -> str:
        places.append((kind, what))
        return f"\x00{len(places) - 1}\x00"

    def unnested(match: re.Match[str]) -> str:
        numbers = tuple([int(number) for number in _NUMBER.findall(match[1])])
        columns = tuple([column.strip() for column in match[3].split(",")])
        return place("unnest", (numbers, columns)) + f" AS {match[2]}"

    text = _LOCKING.sub("", text).replace(' COLLATE "C"', "")
    text = text.replace("greatest(", "max(").replace("extract(epoch FROM now())", "server_now()")
    text = _ALIAS.sub(r"\1 \2 AS \3 \4", text)
    text = _UNNEST.sub(unnested, text)
    text = _ANY.sub(lambda match: place("any", int(match[1])), text)
    text = _NUMBER.sub(lambda match: place("value", int(match[1])), text)
    return text, tuple(places)


def translated(text: str, args: Sequence[Any]) -> tuple[str, list[Any]]:
    """A statement and its values as SQLite takes them."""
    text, places = _prepared(text)
    if not places:
        return text, []
    values: list[Any] = []

    def put(match: re.Match[str]) -> str:
        kind, what = places[int(match[1])]
        if kind == "value":
            values.append(args[what - 1])
            return "?"
        if kind == "any":
            values.extend(args[what - 1])
            return f"IN ({', '.join('?' * len(args[what - 1]))})"
        numbers, columns = what
        rows = list(zip(*(args[number - 1] for number in numbers), strict=True))
        if not rows:
            return f"(SELECT {', '.join(f'NULL AS {column}' for column in columns)} WHERE 0)"
        named = ", ".join(f"column{number} AS {column}" for number, column in enumerate(columns, 1))
        one = f"({', '.join('?' * len(columns))})"
        for row in rows:
            values.extend(row)
        return f"(SELECT {named} FROM (VALUES {', '.join([one] * len(rows))}))"

    return _PIECES.sub(put, text), values


class ArrayAgg:
    """`array_agg`: SQLite gives one value, which `plain` makes a list again; none, if there was no row."""

    def __init__(self) -> None:
        self._values: list[Any] = []

    def step(self, value: Any) -> None:
        """One row."""
        self._values.append(value)

    def finalize(self) -> str | None:
        """All of them."""
        return _ARRAY + json.dumps(self._values) if self._values else None


def plain(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows with their arrays as lists."""
    if not any(isinstance(value, str) and value.startswith(_ARRAY) for row in rows[:1] for value in row):
        return rows
    return [
        tuple([json.loads(v[len(_ARRAY) :]) if isinstance(v, str) and v.startswith(_ARRAY) else v for v in row]) for row in rows
    ]


def table_text(postgres: str) -> str:
    """What makes a table or an index."""
    text = postgres.replace(' COLLATE "C"', "").replace("BYTEA", "BLOB")
    return re.sub(r"\s*WITH \(fillfactor = \d+\)", "", text)
