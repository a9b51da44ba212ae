"""Owns the event log: a closed list of events, ids first, one line each.

No message text, no credential is ever a field. Control characters are escaped, so one event is one line (X01).
Lines are written by a thread; when its output blocks, mail goes on and lines are dropped and counted (F43).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from powermail.base import limits


class Event(Enum):
    """What can happen. The value is (name in the log, level), which are attributes too: reading `value` is a call in Python."""

    def __init__(self, word: str, level: str) -> None:
        self.word = word
        self.level = level

    STARTED = ("started", "info")
    LISTENING = ("listening", "info")
    DRAINING = ("draining", "info")
    STOPPED = ("stopped", "info")
    DELIVERED = ("delivered", "info")
    RECIPIENT_REFUSED = ("recipient-refused", "info")
    MESSAGE_REFUSED = ("message-refused", "info")
    DELIVERY_TROUBLE = ("delivery-trouble", "warning")
    INDEX_LATE = ("index-late", "warning")
    CONNECTION_REFUSED = ("connection-refused", "info")
    LOGIN = ("login", "info")
    LOGOUT = ("logout", "info")
    LOGIN_FAILED = ("login-failed", "info")
    RETRIEVED = ("retrieved", "info")
    DELETED = ("deleted", "info")
    LAYOUT = ("layout", "info")
    NODE_STATE = ("node-state", "warning")
    NODE_RECOVERED = ("node-recovered", "info")
    NODE_DAMAGE = ("node-damage", "error")
    COPY_BAD = ("copy-bad", "error")
    COPY_REPAIRED = ("copy-repaired", "info")
    MOVE = ("move", "info")
    RECONCILED = ("reconciled", "info")
    COLLECTED = ("collected", "info")
    COLLECT_HELD = ("collect-held", "error")
    EPOCH_RAISED = ("epoch-raised", "warning")
    COMPACTED = ("compacted", "info")
    SENT = ("sent", "info")
    DEFERRED = ("deferred", "info")
    BOUNCED = ("bounced", "info")
    IN_CLEAR = ("in-clear", "warning")
    NOTICE = ("notice", "info")
    NOTICE_DROPPED = ("notice-dropped", "warning")
    JOINED = ("joined", "info")
    EXPELLED = ("expelled", "warning")
    CERTIFICATE = ("certificate", "info")
    CERTIFICATE_BAD = ("certificate-bad", "error")
    TROUBLE = ("trouble", "warning")
    JOB = ("job", "info")
    PART = ("part", "info")
    OPERATOR = ("operator", "info")
    PURGED = ("purged", "info")
    RELOADED = ("reloaded", "info")
    BUG = ("bug", "error")


_EACH = ("to", "key")  # which fields may have a value for each of several lines
# What binds the lines of one session, and of what it began: tasks take it over from who starts them.
CID: ContextVar[str] = ContextVar("cid", default="")


class Log(Protocol):
    """Where events go; `dropped` counts those that were lost because nothing took them."""

    dropped: int

    def event(self, event: Event, **fields: Any) -> None:
        """Writes one event. Fields are short facts: str, int, float, bytes (as hex) or None (left out); `to` may be a tuple
        of recipients, `key` one of messages, which get a line each.
        """


class NullLog:
    """Keeps nothing."""

    dropped = 0

    def event(self, event: Event, **fields: Any) -> None:
        """Drops it."""


class MemoryLog:
    """Keeps events for tests and for the simulator's trace."""

    dropped = 0

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, event: Event, **fields: Any) -> None:
        self.lines += text_lines("", event, bound(fields))


def bound(fields: dict[str, Any]) -> dict[str, Any]:
    """The facts of an event with the session they belong to, if any."""
    cid = CID.get()
    return {"cid": cid, **fields} if cid else fields


def escape(value: Any) -> str:
    """A field's value as one printable word or quoted string, cut at the limit."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    if len(text) > limits.LOG_FIELD_CHARS_MAX:
        text = text[: limits.LOG_FIELD_CHARS_MAX] + "…"
    if text.isascii() and text.isprintable() and '"' not in text and " " not in text and text:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    """One that could end the quotes or the line is written as programs write it: what was said never looks like a fact."""
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def format_stamp(at: float) -> str:
    """A time as it stands in the log: UTC with milliseconds."""
    return f"{_format_second(int(at))}.{int(at * 1000) % 1000:03d}Z"


def format_text(stamp: str, event: Event, fields: dict[str, Any]) -> str:
    """One line for people: time, level, event, facts."""
    name, level = event.word, event.level
    words = [f"{k}={escape(v)}" for k, v in fields.items() if v is not None]
    return " ".join([*([stamp] if stamp else []), level.upper().ljust(7), name, *words])


def _several(fields: dict[str, Any]) -> str:
    """The field that has a value for each of several lines, if one has."""
    for name in _EACH:
        if isinstance(fields.get(name), tuple):
            return name
    return ""


def text_lines(stamp: str, event: Event, fields: dict[str, Any]) -> list[str]:
    """A line, or one for each of `to` or `key` when it is several: what they share is formatted once."""
    each = _several(fields)
    if not each:
        return [format_text(stamp, event, fields)]
    names = list(fields)
    at = names.index(each)
    before = format_text(stamp, event, {name: fields[name] for name in names[:at]})
    after = "".join([f" {name}={escape(fields[name])}" for name in names[at + 1 :] if fields[name] is not None])
    return [f"{before} {each}={escape(one)}{after}" for one in fields[each]]


_encode = msgspec.json.Encoder(enc_hook=str).encode


def format_json(stamp: str, event: Event, fields: dict[str, Any]) -> str:
    """One line for machines."""
    record = {"at": stamp, "level": event.level, "event": event.word}
    for key, value in fields.items():
        if value is not None:
            record[key] = value.hex() if isinstance(value, bytes) else value
    return _encode(record).decode()


def json_lines(stamp: str, event: Event, fields: dict[str, Any]) -> list[str]:
    """The same for machines."""
    each = _several(fields)
    if not each:
        return [format_json(stamp, event, fields)]
    if len(fields[each]) == 1:
        return [format_json(stamp, event, {**fields, each: fields[each][0]})]
    shared = format_json(stamp, event, {name: value for name, value in fields.items() if name != each}).removesuffix("}")
    values = [one.hex() if isinstance(one, bytes) else one for one in fields[each]]
    return [f'{shared},"{each}":{msgspec.json.encode(value).decode()}}}' for value in values]


_FLUSH_EVERY_S = 0.05
_LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}


class StreamLog:
    """Writes lines to a stream from a thread of its own."""

    def __init__(self, now: Callable[[], float], level: str = "info", json: bool = False, stream: Any = None) -> None:
        self._now = now
        self._threshold = _LEVELS[level]
        self._lines = json_lines if json else text_lines
        self._stream = stream if stream is not None else sys.stderr
        self._waiting: deque[tuple[float, Event, dict[str, Any]]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def event(self, event: Event, **fields: Any) -> None:
        if _LEVELS[event.level] < self._threshold:
            return
        if len(self._waiting) >= limits.LOG_LINES_WAITING_MAX:
            self.dropped += 1
            return
        self._waiting.append((self._now(), event, bound(fields)))

    def set_level(self, level: str) -> None:
        """From now on, events below this level are left out."""
        self._threshold = _LEVELS[level]

    def close(self) -> None:
        """Writes what waits, for at most a second, and ends the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=1.0)

    def _write(self) -> None:
        while True:
            # A look every 50 ms: waking this thread for each event would cost more than writing the line.
            if len(self._waiting) < limits.LOG_LINES_WRITTEN_MAX:
                self._wake.wait(_FLUSH_EVERY_S)
            lines: list[str] = []
            while self._waiting and len(lines) < limits.LOG_LINES_WRITTEN_MAX:
                at, event, fields = self._waiting.popleft()
                stamp = format_stamp(at)
                lines += self._lines(stamp, event, fields)
            if lines:
                try:
                    self._stream.write("\n".join(lines) + "\n")
                    self._stream.flush()
                except (OSError, ValueError):
                    self.dropped += len(lines)
            if self._closing and not self._waiting:
                return
