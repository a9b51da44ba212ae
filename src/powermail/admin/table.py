"""Owns the form of the operator's table: an operation is a name, a typed request, a typed result and what it does.

Command line, control socket, help, completion and manual page are all derived from the rows (`admin.operations.TABLE`): a field
of a request says by its annotation how it is written on a command line (`word`, `option`, `secret` ...).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
from msgspec import Meta, Struct

if TYPE_CHECKING:
    from powermail.admin.desk import Desk

Progress = Callable[[int, int], Awaitable[None]]


async def unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Request(Struct, forbid_unknown_fields=True):
    """What an operation is asked. A field without a mark is for programs only and has a default."""


Q = TypeVar("Q", bound=Request)
R = TypeVar("R")

Names = str | list[str]  # one name or several; several are all done, or none


def several(names: Names) -> list[str]:
    """The names, each once, in their order."""
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def _mark(kind: str, text: str, flag: str = "") -> Meta:
    return Meta(description=text, extra={"kind": kind, "flag": flag})


def word(text: str) -> Meta:
    """A word of the command line: `powermail where KEY`."""
    return _mark("word", text)


def words(text: str) -> Meta:
    """One or more words."""
    return _mark("words", text)


def maybe(text: str) -> Meta:
    """As many words as there are, also none."""
    return _mark("maybe", text)


def option(text: str) -> Meta:
    """`--name VALUE`; of a bool, `--name` for true; of an optional bool, `--name yes|no`."""
    return _mark("option", text)


def yes(text: str) -> Meta:
    """`--yes`: without it, the operation only says what it would do."""
    return _mark("option", text, "--yes")


def duration(text: str) -> Meta:
    """`--name 90s`, `2h`, `3d`: seconds; the option is named without `_s`."""
    return _mark("duration", text)


def size(text: str) -> Meta:
    """`--name 20M`: a number of octets; the option is named without `_octets`."""
    return _mark("size", text)


def secret(text: str) -> Meta:
    """`--password`, `--password-stdin`, or asked for at a terminal."""
    return _mark("secret", text)


def file(text: str) -> Meta:
    """A word that names a file whose lines are read where the command runs; `-` is standard input."""
    return _mark("file", text)


def place(text: str) -> Meta:
    """A word that names a file or directory, made absolute where the command runs."""
    return _mark("place", text)


_UNITS = {"option": "", "size": "_octets", "duration": "_s"}


@dataclass(frozen=True)
class Field:
    """How one field of a request stands on the command line."""

    name: str  # of the field
    kind: str
    text: str
    flag: str  # `--name`; "" for words
    boolean: bool = False  # is set by its presence
    choice: bool = False  # yes or no
    whole: bool = False  # takes a whole number
    many: bool = False  # may be repeated
    real: bool = False  # takes a number with a fraction


@dataclass(frozen=True)
class Operation(Generic[Q, R]):
    """One row of the table."""

    name: str  # on the control socket; words of the command line have blanks for the first underscore
    command: str  # "node block"; "" if only programs ask it
    request: type[Q]
    result: type[R]
    run: Callable[[Desk, Q, Progress], Awaitable[R]]
    text: str  # one line for people
    changes: bool = False  # the log gets a line: who, what
    long: bool = False  # may take longer than the few seconds in which the others answer or say why not


def fields_of(request: type[Request]) -> list[Field]:
    """The fields of a request that have a mark."""
    found = []
    info = msgspec.inspect.type_info(request)
    assert isinstance(info, msgspec.inspect.StructType)
    for entry in info.fields:
        kind, text, flag, plain = "", "", "", entry.type
        if isinstance(plain, msgspec.inspect.Metadata):
            extra = plain.extra or {}
            kind, flag = str(extra.get("kind", "")), str(extra.get("flag", ""))
            text = str((plain.extra_json_schema or {}).get("description", ""))
            plain = plain.type
        if not kind:
            continue
        inner = plain.types if isinstance(plain, msgspec.inspect.UnionType) else (plain,)
        boolean = any(isinstance(one, msgspec.inspect.BoolType) for one in inner)
        whole = any(isinstance(one, msgspec.inspect.IntType) for one in inner) or any(
            isinstance(one, msgspec.inspect.ListType) and isinstance(one.item_type, msgspec.inspect.IntType) for one in inner
        )
        if kind in _UNITS and not flag:
            flag = "--" + entry.name.removesuffix(_UNITS[kind]).replace("_", "-")
        many = any(isinstance(one, msgspec.inspect.ListType) for one in inner)
        only = boolean and len(inner) == 1
        real = any(isinstance(one, msgspec.inspect.FloatType) for one in inner)
        found.append(Field(entry.name, kind, text, flag, only, boolean and not only, whole, many, real))
    return found
