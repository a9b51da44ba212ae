"""Owns statements with named parameters: one text, bound as each engine binds.

`:name` is a parameter wherever it stands outside of strings, quoted names and comments; `::` and `:=` are the engines' own.

SQLite and PostgreSQL get the values beside the text, by their protocols. MySQL's driver has no such way: it writes values into
the text. Here they go into it as hexadecimal literals, which no mode, character set or backslash makes anything else of.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from powermail.base.errors import OperatorError
from powermail.directory.rows import Value

_TOKEN = re.compile(
    r"""
      (?P<skip> [eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*`
        | (?P<tag>\$[A-Za-z_0-9]*\$).*?(?P=tag) | --[^\n]* | /\*.*?\*/ | :: | := )
    | :(?P<name>[A-Za-z_][A-Za-z_0-9]*)
    | (?P<end>;)
    """,
    re.VERBOSE | re.DOTALL,
)


class Statement:
    """A statement of which the parameters are known. Engines use `numbered` and `order`, `marked` and `names`, or `written`."""

    def __init__(self, text: str, known: Collection[str] | None = None, what: str = "statement") -> None:
        """`known` are the names that may be used. Raises OperatorError that begins with `what`."""
        pieces: list[str] = []
        names: list[str] = []
        text = text.strip().removesuffix(";").rstrip()
        after = 0
        for token in _TOKEN.finditer(text):
            if token["end"]:
                raise OperatorError(f"{what}: one statement, without a ; in it")
            name = token["name"]
            if name is None:
                continue
            if known is not None and name not in known:
                raise OperatorError(f"{what}: there is no parameter :{name}; there are {', '.join(f':{k}' for k in known)}")
            pieces.append(text[after : token.start()])
            names.append(name)
            after = token.end()
        pieces.append(text[after:])
        self.text = text
        self.names = tuple(names)  # one for each place
        self.order = tuple(dict.fromkeys(names))  # one for each number
        self._pieces = tuple(pieces)
        self.marked = "?".join(pieces)
        numbers = [f"${self.order.index(name) + 1}" for name in names]
        self.numbered = "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))

    def written(self, values: Mapping[str, Value]) -> str:
        """The text with its values in it, for MySQL."""
        made = [literal(values[name]) for name in self.names]
        return "".join(piece + value for piece, value in zip(self._pieces, [*made, ""], strict=True))


def literal(value: Value) -> str:
    """A value that no setting of a MySQL server reads as anything but this value."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        return f"_utf8mb4 X'{value.encode().hex()}'"
    if isinstance(value, bytes):
        return f"X'{value.hex()}'"
    return str(int(value)) if isinstance(value, int) else repr(value)
