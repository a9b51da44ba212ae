"""Owns `powermail trace`: a message's story out of the log, whoever it is asked by: its key, an address, a Message-ID.

Two passes over the lines: the first finds who is meant and notes the keys and sessions (`cid`) that speak of it, the second
tells every line of those. A log is text or JSON lines, as the settings say; lines in front of which a service manager wrote
something are read too.
"""

from __future__ import annotations

import codecs
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime

import msgspec
from msgspec import Struct

from powermail.base.errors import OperatorError

_TEXT = re.compile(r"(?P<at>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) +(?P<event>[a-z-]+)(?P<facts>(?: .*)?)$")
_FACT = re.compile(r'(?P<name>[a-z_0-9]+)=(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^ ]*))')
_SPLIT = re.compile(r"[\s,<>]+")


_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)")


def _unescaped(found: re.Match[str]) -> str:
    return codecs.decode(found[0].encode("ascii", "replace"), "unicode_escape")


class Line(Struct):
    """One event of the log."""

    at: str
    event: str
    facts: dict[str, str]

    def told(self) -> str:
        """The line for people: local time, event, facts."""
        try:
            at = datetime.fromisoformat(self.at.replace("Z", "+00:00")).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        except ValueError:
            at = self.at
        return f"{at}  {self.event:<17}  " + "  ".join(f"{name}={value}" for name, value in self.facts.items())

    def tells_of(self, word: str) -> bool:
        """True if a fact is, or names among others, this key, address or Message-ID."""
        return any(word == part for value in self.facts.values() for part in (value.lower(), *_SPLIT.split(value.lower())))


def parse(text: str) -> Line | None:
    """The event that a line is; None if it is none."""
    at = text.find('{"at":')
    if at >= 0:
        try:
            tree = msgspec.json.decode(text[at:], type=dict[str, object])
        except msgspec.DecodeError:
            return None
        facts = {name: str(value) for name, value in tree.items() if name not in ("at", "level", "event")}
        return Line(str(tree.get("at")), str(tree.get("event")), facts)
    found = _TEXT.search(text.rstrip("\r\n"))
    if found is None:
        return None
    facts = {}
    for fact in _FACT.finditer(found["facts"]):
        quoted = fact["quoted"]
        facts[fact["name"]] = fact["plain"] if quoted is None else _ESCAPE.sub(_unescaped, quoted)
    return Line(found["at"], found["event"], facts)


def read(path: str) -> Iterator[str]:
    """Lines of a file, of standard input (`-`), or, with no path, of the journal. Raises OperatorError."""
    if path == "-":
        yield from sys.stdin
        return
    if path:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                yield from file
        except OSError as error:
            raise OperatorError(f"cannot read {path}: {error.strerror}") from error
        return
    command = shutil.which("journalctl")
    if command is None:
        raise OperatorError("there is no journal on this machine; name the log with --log FILE")
    with subprocess.Popen(
        [command, "-u", "powermail", "-o", "cat", "--no-pager"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout


def normal(word: str) -> str:
    """As it is compared: in lower case, without angle brackets."""
    return word.strip().strip("<>").lower()


def story(lines: Iterable[str], word: str) -> Iterator[Line]:
    """The lines that tell of it, and those of the same message; not those of other messages of the same session."""
    wanted = normal(word)
    events = [line for text in lines if (line := parse(text)) is not None]
    keys: dict[str, None] = {}
    sessions: dict[str, None] = {}
    for line in events:
        if not line.tells_of(wanted):
            continue
        if "key" in line.facts:
            keys[line.facts["key"]] = None
        if "cid" in line.facts:
            sessions[line.facts["cid"]] = None
    for line in events:
        key = line.facts.get("key")
        if key is not None:
            told = key in keys or line.tells_of(wanted)
        else:
            told = line.tells_of(wanted) or line.facts.get("cid") in sessions
        if told:
            yield line
