"""Owns changing a settings file by program: one value at a time, with every other line, and every comment, as it was."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import msgspec

from powermail.base.errors import OperatorError
from powermail.base.secrets import shown

Value = str | list[str]


def written(value: Value) -> str:
    """A text, or a list of them, as TOML reads it: what is one in JSON is one in TOML."""
    return msgspec.json.encode(value).decode()


def _put(lines: list[str], section: str, key: str, value: Value) -> list[str]:
    """The lines with one value in its section: where it stood, else below the head of the section, else at the end."""
    head = re.compile(rf"\s*\[\s*{re.escape(section)}\s*\]\s*(#.*)?")
    there = re.compile(rf"\s*{re.escape(key)}\s*=")
    line = f"{key} = {written(value)}"
    start = next((number for number, text in enumerate(lines) if head.fullmatch(text)), None)
    if start is None:
        return [*lines, "", f"[{section}]", line]
    for number in range(start + 1, len(lines)):
        if lines[number].lstrip().startswith("["):
            break
        if there.match(lines[number]):
            return [*lines[:number], line, *lines[number + 1 :]]
    return [*lines[: start + 1], line, *lines[start + 1 :]]


def with_values(text: str, values: Mapping[str, Value], origin: str) -> str:
    """The text of a settings file in which each `section.key` has this value. Raises OperatorError where it is written in a way
    that this does not understand; then the sentence says what to write.
    """
    wanted: dict[str, Any] = tomllib.loads(text)
    lines = text.splitlines()
    for name, value in values.items():
        section, _, key = name.partition(".")
        wanted.setdefault(section, {})[key] = value
        lines = _put(lines, section, key, value)
    changed = "\n".join(lines) + "\n"
    try:
        right = tomllib.loads(changed) == wanted
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        said = "; ".join(f"{name} = {written(shown(name, value))}" for name, value in values.items())
        hidden = any(shown(name, value) != value for name, value in values.items())
        note = " (whole, as it was given: what may be a password is not shown here)" if hidden else ""
        raise OperatorError(f"{origin} is written in a way that this command does not change: set there {said}{note}")
    return changed
