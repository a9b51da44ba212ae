"""Owns reading accounts to be imported: JSON lines, or CSV with a head; strict, each refusal with its line.

CSV columns are named as in JSON: address, password, quota_octets, forward (separated by blanks), keep_copy, enabled (yes or
no), send_per_hour, send_as (separated by blanks). An empty cell is as if the column were not there. A file that begins with `{`
is JSON lines.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import msgspec
from msgspec import UNSET, UnsetType

from powermail.admin.accounts import AccountRow
from powermail.base.errors import OperatorError
from powermail.cli.words import nearest, octets

_COLUMNS = tuple(field.name for field in msgspec.structs.fields(AccountRow))
_WORDS = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}


def read(lines: Iterable[str]) -> Iterator[tuple[int, AccountRow]]:
    """(line, row) of each. Raises OperatorError that names line, address if known, and what is wrong."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip("\ufeff \t").startswith("{"):
        yield from _json(chain([(first[0], first[1].lstrip("\ufeff"))], numbered))
    else:
        yield from _csv(first[1].lstrip("\ufeff"), numbered)


def parts(rows: Sequence[tuple[int, AccountRow]], octets_max: int) -> Iterator[list[tuple[int, AccountRow]]]:
    """The rows in lists that take at most about so many octets as JSON: each is one request and one transaction."""
    part: list[tuple[int, AccountRow]] = []
    total = 0
    for number, row in rows:
        size = len(msgspec.json.encode(row))
        if part and total + size > octets_max:
            yield part
            part, total = [], 0
        part.append((number, row))
        total += size
    if part:
        yield part


def refuse_twice(rows: Sequence[tuple[int, AccountRow]]) -> None:
    """An address that stands on two lines is a mistake. Raises OperatorError."""
    seen: dict[str, int] = {}
    for number, row in rows:
        before = seen.setdefault(row.address.lower(), number)
        if before != number:
            raise OperatorError(f"line {number}, {row.address}: stands on line {before} already; nothing was changed")


def _json(numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, AccountRow]]:
    decode = msgspec.json.Decoder(AccountRow).decode
    for number, line in numbered:
        try:
            yield number, decode(line)
        except msgspec.DecodeError as error:
            raise OperatorError(f"line {number}{_named(line)}: {error}; nothing was changed") from error


def _named(line: str) -> str:
    """The address of a line that is refused, if it can be had."""
    try:
        tree = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return ""
    address = tree.get("address") if isinstance(tree, dict) else None
    return f", {address}" if isinstance(address, str) else ""


def _csv(head: str, numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, AccountRow]]:
    names = [name.strip() for name in next(csv.reader([head]))]
    for name in names:
        if name not in _COLUMNS:
            raise OperatorError(f"line 1: unknown column {name!r}{nearest(name, _COLUMNS)}; nothing was changed")
    if "address" not in names or len(set(names)) != len(names):
        raise OperatorError("line 1: a CSV file begins with the names of its columns, address among them, each once")
    for number, line in numbered:
        try:
            cells = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise OperatorError(f"line {number}: {error}; nothing was changed") from error
        if len(cells) != len(names):
            raise OperatorError(f"line {number}: {len(cells)} cells where the head has {len(names)}; nothing was changed")
        values = dict(zip(names, cells, strict=True))
        try:
            yield number, _row(values)
        except OperatorError as error:
            raise OperatorError(f"line {number}, {values['address']}: {error}; nothing was changed") from error


def _row(values: dict[str, str]) -> AccountRow:
    def flag(name: str) -> bool | UnsetType:
        text = values.get(name, "").strip().lower()
        if text and text not in _WORDS:
            raise OperatorError(f"{name} is {text!r}, neither yes nor no")
        return _WORDS[text] if text else UNSET

    def number(name: str) -> int | UnsetType:
        text = values.get(name, "").strip()
        return octets(text) if text else UNSET

    password, forward = values.get("password", ""), values.get("forward", "").split()
    return AccountRow(
        values["address"].strip(),
        password or UNSET,
        number("quota_octets"),
        forward or UNSET,
        flag("keep_copy"),
        flag("enabled"),
        number("send_per_hour"),
        values.get("send_as", "").split() or UNSET,
    )
