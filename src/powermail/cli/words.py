"""Owns the words of the command line: the parser made from the tables, what a typing error was meant to be, sizes and times.

`--data`, `--set` and `--json` work before and behind the command: they are taken out first.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from powermail.admin.table import Field
from powermail.base import limits
from powermail.base.errors import OperatorError
from powermail.base.settings import DATA_VARIABLE

COMMON = (
    ("--data", "DIR", "data directory (or the variable POWERMAIL_DATA_DIRECTORY; else `data`)"),
    ("--set", "SECTION.KEY=VALUE", "overrides a setting; may be repeated"),
    ("--json", "", "print JSON, also of errors"),
)
GROUPS = {
    "account": "mailboxes",
    "forward": "forwards",
    "node": "storage nodes",
    "cluster": "machines and their certificates",
    "queue": "mail that waits to leave",
    "index": "what each mailbox shows, in a database",
    "directory": "who exists",
    "config": "print the settings in force",
    "password": "password hashes",
}


@dataclass
class Common:
    """What every command is told."""

    data: str
    overrides: list[str] = field(default_factory=list)
    json: bool = False


class Misuse(OperatorError):
    """Words that are no command, with the usage."""


def take_common(words: Sequence[str]) -> tuple[Common, list[str]]:
    """The common options, and the rest. What stands behind `--` is left alone. Raises Misuse."""
    common = Common(os.environ.get(DATA_VARIABLE, "data"))
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if word == "--":
            return common, [*rest, word, *left]
        if word == "--json":
            common.json = True
        elif name in ("--data", "--set"):
            if not equals:
                value = next(left, "")
            if not value:
                raise Misuse(f"{name} needs a value")
            if name == "--data":
                common.data = value.rstrip("/") or "/"
            else:
                common.overrides.append(value)
        else:
            rest.append(word)
    return common, rest


def octets(text: str) -> int:
    """`250k`, `1G` or a plain number of octets. Raises OperatorError: a quota is never read as unlimited by mistake."""
    units = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    number, unit = (text[:-1], units.get(text[-1:].lower(), 0)) if text[-1:].isalpha() else (text, 1)
    if not number.isascii() or not number.isdigit() or not unit or len(number) > _DIGITS_MAX:
        raise OperatorError(f"{_cut(text)!r} is not a size like 250k, 20M or 1G")
    return int(number) * unit


def seconds(text: str) -> int:
    """`90s`, `30m`, `2h`, `3d` or a plain number of seconds. Raises OperatorError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    number, unit = (text[:-1], units.get(text[-1:].lower(), 0)) if text[-1:].isalpha() else (text, 1)
    if not number.isascii() or not number.isdigit() or not unit or len(number) > _DIGITS_MAX:
        raise OperatorError(f"{_cut(text)!r} is not a time like 90s, 30m, 2h or 3d")
    return int(number) * unit


_DIGITS_MAX = 19  # of a number that is given; more are in no column


def _cut(text: str) -> str:
    """Enough of it to be known again."""
    return text if len(text) <= limits.LOG_FIELD_CHARS_MAX // 8 else text[: limits.LOG_FIELD_CHARS_MAX // 8] + "…"


def whole(text: str) -> int:
    """A whole number. Raises ArgumentTypeError."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS_MAX:
        raise argparse.ArgumentTypeError(f"{_cut(text)!r} is not a whole number of at most {_DIGITS_MAX} digits")
    return int(text)


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of leaving the process, and says what a typing error was meant to be."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What is left over is refused here, where it is known what could have been meant."""
        self._words = list(args or ())
        found, left = super().parse_known_args(args, namespace)
        if left:
            known = [option for action in self._actions for option in action.option_strings]
            options = [word.partition("=")[0] for word in left if word.startswith("-")]
            meant = nearest(options[0], known) if options else ""
            unknown = bool(options) and options[0] not in known  # one that is known stood behind `--`
            self.error(f"unknown option {options[0]!r}{meant}" if unknown else f"{left[0]!r} is too much")
        return found, left

    def error(self, message: str) -> NoReturn:
        if "required" in message and any(word[0] == "-" and "@" in word for word in self._words if word):
            message += "; what begins with a dash and is no option stands behind `--`"
        raise Misuse(f"{message}\n{self.format_usage().strip()}")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        choices: Iterable[str] = action.choices or ()
        if action.choices is None or value in choices:
            return
        names = list(choices)
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"unknown command {value!r}{nearest(value, names)}")
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(names)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """What was probably meant, as the end of a sentence."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Entry:
    """A command as the parser knows it."""

    command: str  # "node block"
    text: str
    fields: Sequence[Field]


def parser(entries: Sequence[Entry]) -> Parser:
    """The parser of the whole command line; its result has `command`, and the values of the command's fields by name."""
    top = Parser(prog="powermail", description="Redundant mail: receive, store, forward, read.", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version")
    _add_common(top)
    words = top.add_subparsers(metavar="COMMAND", dest="command")
    groups: dict[str, argparse._SubParsersAction[Parser]] = {}
    single: dict[str, Parser] = {}  # commands of one word: one of them may have actions beside what it does by itself
    for entry in entries:
        group, _, name = entry.command.rpartition(" ")
        where = words
        if group:
            if group in single and group not in groups:
                groups[group] = single[group].add_subparsers(metavar="ACTION")
            elif group not in groups:
                made = words.add_parser(group, help=GROUPS[group], description=GROUPS[group], allow_abbrev=False)
                _add_common(made)
                groups[group] = made.add_subparsers(metavar="ACTION", required=True)
            where = groups[group]
        made = where.add_parser(name, help=entry.text, description=f"{entry.text}.", allow_abbrev=False)
        _add_common(made)
        made.set_defaults(full=entry.command)
        if not group:
            single[entry.command] = made
        for one in entry.fields:
            _add_field(made, one)
    return top


def _add_common(made: Parser) -> None:
    """They are taken out before; here they are for the help."""
    for name, metavar, text in COMMON:
        if metavar:
            made.add_argument(name, metavar=metavar, help=text, default=argparse.SUPPRESS, dest="_")
        else:
            made.add_argument(name, action="store_true", help=text, default=argparse.SUPPRESS, dest="_")


_NARGS = {"words": "+", "maybe": "*"}


def _add_field(made: Parser, one: Field) -> None:
    metavar = one.name.upper().replace("_OCTETS", "").replace("_S", "") if one.kind != "duration" else "TIME"
    if one.kind == "secret":
        made.add_argument("--password", help="visible to other users of this machine; better --password-stdin")
        made.add_argument("--password-stdin", action="store_true", help="read it as one line of standard input")
    elif one.boolean:
        made.add_argument(one.flag, action="store_true", help=one.text, dest=one.name, default=None)
    elif one.choice:
        made.add_argument(one.flag, choices=["yes", "no"], help=one.text, dest=one.name)
    elif one.flag:
        kind = str if one.kind != "option" else whole if one.whole else float if one.real else str
        action = "append" if one.many else "store"
        made.add_argument(one.flag, type=kind, action=action, help=one.text, dest=one.name, metavar=metavar)
    elif one.kind in _NARGS:
        made.add_argument(one.name, type=int if one.whole else str, nargs=_NARGS[one.kind], help=one.text, metavar=metavar)
    else:
        made.add_argument(one.name, type=int if one.whole else str, help=one.text, metavar=metavar)
