"""Owns the derived key index of a node: which records belong to a key. It can always be thrown away and made again.

Two forms: in memory (the simulator, tests) and in an SQLite file that lags behind the log and is brought forward in small
steps; what is not in the file yet is in memory. The file says up to which place of the log it is complete; recovery
reads the log from there.

Messages are found by their key of 16 octets; all else (checkpoints, drops, the mark, the boot, the birth) by a `Name`.
"""

from __future__ import annotations

import errno
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from powermail.storage.contract import NO_RANK, START, Origin, Position, Rank

OPEN: Final = 0  # chunks, or a commit whose chunks are not all here
LIVE: Final = 1
DEAD: Final = 2  # a tombstone stands for it
NAMED: Final = 3  # not a message

# What a key index raises when its file is damaged, locked or gone, or was closed meanwhile.
BROKEN: Final = (sqlite3.Error, struct.error, msgspec.DecodeError, UnicodeDecodeError)

_SCHEMA: Final = 2
_BUSY_S: Final = 1.0  # nobody else has any business in this file
_LOOK_KEYS: Final = 500  # keys of one statement
_PLACE: Final = struct.Struct("<IQI")
_MORE: Final = struct.Struct("<BQQ")
_RANK: Final = struct.Struct("<QQQ")
_RANKED: Final = 0x80  # beside the origin: a rank follows
_SEGMENT: Final = struct.Struct("<I")


class Place(NamedTuple):
    """Where a record is and the room it takes."""

    segment: int
    offset: int
    room: int


NOWHERE: Final = Place(0, 0, 0)
BEFORE_ALL: Final = Position(0, 1)  # where something was first written of which nobody knows where


class Name(NamedTuple):
    """What is found in the log but is not a message. `kind` is the type of its records.

    `key` is the name of a checkpoint, or the key of the message that was dropped; `position` that of the dropped copy, or
    (number, 0) for a part of a checkpoint. Of marks, boots and births there is one each, without either.
    """

    kind: int
    key: bytes
    position: Position = START


class Entry(NamedTuple):
    """What a node knows of a key or name.

    `mark` is the place of the commit, the tombstone or the named record; `chunks` are the places of a message's chunks by
    number. `first` is where a copy, or a part of a checkpoint, that moved was first written. `older` are segments in which
    records of this key may stand that count no more: copies that compaction moved, other copies; of a dead key or a drop, all
    that it killed. A tombstone or drop may go when these segments are gone. Of a checkpoint's number 0 they are the numbers of
    its other parts, and `rank` says how new it is.
    """

    state: int
    mark: Place
    chunks: tuple[Place, ...]
    origin: int = 0
    first: Position | None = None
    older: tuple[int, ...] = ()
    rank: Rank = NO_RANK

    def position(self) -> Position:
        """Where the copy was first written."""
        return self.first if self.first is not None else Position(self.mark.segment, self.mark.offset)


def pack_chunks(chunks: Iterable[Place]) -> bytes:
    """Places as octets."""
    return b"".join(_PLACE.pack(*place) for place in chunks)


def unpack_chunks(octets: bytes) -> tuple[Place, ...]:
    """Places back from octets."""
    return tuple(Place(*values) for values in _PLACE.iter_unpack(octets))


def _pack_more(entry: Entry) -> bytes:
    """What most entries do not have, in as few octets."""
    _, _, _, origin, first, older, rank = entry
    if not origin and first is None and not older and rank is NO_RANK:
        return b""
    ranked = _RANK.pack(*rank) if rank != NO_RANK else b""
    head = _MORE.pack(origin | (_RANKED if ranked else 0), *(first or START))
    return head + ranked + b"".join([_SEGMENT.pack(number) for number in older])


def _entry(state: int, segment: int, offset: int, room: int, chunks: bytes, more: bytes) -> Entry:
    if not more:
        return Entry(state, Place(segment, offset, room), unpack_chunks(chunks))
    origin, *first = _MORE.unpack_from(more)
    start, rank = _MORE.size, NO_RANK
    if origin & _RANKED:
        origin, rank, start = origin & ~_RANKED, Rank(*_RANK.unpack_from(more, start)), start + _RANK.size
    older = tuple(number for (number,) in _SEGMENT.iter_unpack(more[start:]))
    position = Position(*first)
    return Entry(
        state,
        Place(segment, offset, room),
        unpack_chunks(chunks),
        Origin(origin),
        position if position != START else None,
        older,
        rank,
    )


class Facts(Struct, frozen=True):
    """What a key index says of the log it was made from.

    `complete` is the end of the log that it contains, `last` the place of the last record before it. `live` are the octets
    of records that count in each segment, `passing` those of them that may go one day (tombstones and drops), `sizes` says
    where the last record of each segment ends.
    """

    complete: Position = START
    last: Place = NOWHERE
    live: dict[int, int] = {}
    passing: dict[int, int] = {}
    sizes: dict[int, int] = {}


class KeyIndex(Protocol):
    """Keys and names to entries. Written by the store's writing lane only; `find` and what says so by one other lane."""

    def get(self, key: bytes | Name) -> Entry | None:
        """The entry of a key or name; for the writing lane."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Those of the keys that have entries, found with one look; for the writing lane."""

    def find(self, key: bytes | Name) -> Entry | None:
        """The same for the reading lane."""

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Those of the keys that have entries; for the reading lane."""

    def put(self, key: bytes | Name, entry: Entry | None, before: Entry | None) -> None:
        """Sets or (None) forgets an entry; `before` is what `get` says now."""

    def put_new(self, entries: dict[bytes, Entry]) -> None:
        """Sets entries of live messages that were unknown. Keeps no reference to the dictionary."""

    def inventory(self, after: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """Live and dead keys behind `after`, in order; for the reading lane."""

    def open_keys(self) -> list[bytes]:
        """Keys in state OPEN; for the writing lane."""

    def names(self, kind: int, after: bytes, limit: int) -> list[tuple[Name, Entry]]:
        """Names of a kind whose key lies behind `after`, those of at most `limit` keys, in order; for the reading lane."""

    def everything(self) -> Iterable[tuple[bytes | Name, Entry]]:
        """All of it, for the writing lane, while nothing else is done."""

    def count(self) -> int:
        """How many live messages."""

    def facts(self) -> Facts:
        """As of what is durable in it."""

    def lasts(self) -> bool:
        """True if it is meant to outlive the process: then an empty one was lost."""

    def due(self) -> bool:
        """True if `settle` has something worth doing."""

    def settle(self, facts: Facts, everything: bool = False) -> bool:
        """Does a little of what waits; `facts` describe the log now. True if more waits.

        Raises one of `BROKEN`, or OSError when the disk is full: then what waits is kept.
        """

    def close(self) -> None:
        """Closes without settling."""


class MemoryKeyIndex:
    """All in memory; complete up to nowhere, so recovery reads the whole log."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._names: dict[Name, Entry] = {}
        self._live = 0

    def get(self, key: bytes | Name) -> Entry | None:
        return self._names.get(key) if isinstance(key, Name) else self._entries.get(key)

    find = get

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        return {key: self._entries[key] for key in keys if key in self._entries}

    get_many = find_many

    def put(self, key: bytes | Name, entry: Entry | None, before: Entry | None) -> None:
        self._live += (entry is not None and entry.state == LIVE) - (before is not None and before.state == LIVE)
        table: dict[Any, Entry] = self._names if isinstance(key, Name) else self._entries
        if entry is None:
            table.pop(key, None)
        else:
            table[key] = entry

    def put_new(self, entries: dict[bytes, Entry]) -> None:
        self._live += len(entries)
        self._entries.update(entries)

    def inventory(self, after: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        found = ((key, entry) for key, entry in list(self._entries.items()) if key > after and entry.state in (LIVE, DEAD))
        return sorted(found)[:limit]

    def open_keys(self) -> list[bytes]:
        return [key for key, entry in self._entries.items() if entry.state == OPEN]

    def names(self, kind: int, after: bytes, limit: int) -> list[tuple[Name, Entry]]:
        found = sorted((name, entry) for name, entry in list(self._names.items()) if name.kind == kind and name.key > after)
        return _of_keys(found, limit)

    def everything(self) -> Iterable[tuple[bytes | Name, Entry]]:
        return [*self._entries.items(), *self._names.items()]

    def count(self) -> int:
        return self._live

    def facts(self) -> Facts:
        return Facts()

    def lasts(self) -> bool:
        return False

    def due(self) -> bool:
        return False

    def settle(self, facts: Facts, everything: bool = False) -> bool:
        return False

    def close(self) -> None:
        self._entries.clear()
        self._names.clear()


def _of_keys(found: list[tuple[Name, Entry]], limit: int) -> list[tuple[Name, Entry]]:
    """Those of the first `limit` keys."""
    keys = sorted({name.key for name, _ in found})[:limit]
    return [pair for pair in found if keys and pair[0].key <= keys[-1]]


_Table = dict[bytes | Name, Entry | None]


class SqliteKeyIndex:
    """An SQLite file behind a memory table.

    `_active` takes what is new; when it is large it becomes `_frozen` and is written in slices, in one transaction
    that also says up to which place of the log the file is now complete.
    """

    _SLICE = 256
    _FREEZE_AT = 4096

    def __init__(self, path: str, store: bytes) -> None:
        """Raises one of `BROKEN` when the file is damaged, locked, or of another store: delete it and open anew."""
        self._write = self._open(path)
        try:
            self._start(path, store)
        except BaseException:
            self._write.close()
            raise

    def _start(self, path: str, store: bytes) -> None:
        write = self._write
        write.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
        known = self._meta("store")
        if known is None:
            write.execute(
                "CREATE TABLE keys (key BLOB PRIMARY KEY, state INTEGER NOT NULL, segment INTEGER NOT NULL,"
                " place INTEGER NOT NULL, room INTEGER NOT NULL, chunks BLOB NOT NULL, more BLOB NOT NULL) WITHOUT ROWID"
            )
            write.execute("CREATE INDEX opened ON keys(key) WHERE state = 0")
            write.execute(
                "CREATE TABLE names (kind INTEGER NOT NULL, key BLOB NOT NULL, of_segment INTEGER NOT NULL,"
                " of_offset INTEGER NOT NULL, segment INTEGER NOT NULL, place INTEGER NOT NULL, room INTEGER NOT NULL,"
                " chunks BLOB NOT NULL, more BLOB NOT NULL,"
                " PRIMARY KEY (kind, key, of_segment, of_offset)) WITHOUT ROWID"
            )
            write.execute(
                "INSERT INTO meta VALUES ('store', ?), ('schema', ?), ('live', 0), ('facts', ?)",
                (store, _SCHEMA, msgspec.json.encode(Facts())),
            )
        elif known != store or self._meta("schema") != _SCHEMA:
            raise sqlite3.DatabaseError("key index is of another store or release")
        self._facts = msgspec.json.decode(bytes(self._meta("facts")), type=Facts)
        self._live = int(self._meta("live") or 0)
        highest = write.execute("SELECT max(key) FROM keys").fetchone()[0]
        self._highest: bytes = highest or b""
        self._active: _Table = {}
        self._frozen: _Table = {}
        self._frozen_rows: list[tuple[bytes | Name, Entry | None]] = []
        self._frozen_facts: tuple[Facts, int] = (self._facts, self._live)
        self._read = self._open(path)

    @staticmethod
    def _open(path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint=4000")
        except BaseException:
            connection.close()
            raise
        return connection

    def _meta(self, name: str) -> Any:
        row = self._write.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def get(self, key: bytes | Name) -> Entry | None:
        return self._look(key, self._write)

    def find(self, key: bytes | Name) -> Entry | None:
        return self._look(key, self._read)

    def _look(self, key: bytes | Name, connection: sqlite3.Connection) -> Entry | None:
        for table in (self._active, self._frozen):
            if key in table:
                return table[key]
        if isinstance(key, Name):
            row = connection.execute(
                "SELECT segment, place, room, chunks, more FROM names"
                " WHERE kind = ? AND key = ? AND of_segment = ? AND of_offset = ?",
                (key.kind, key.key, *key.position),
            ).fetchone()
            return _entry(NAMED, *row) if row else None
        if key > self._highest:  # keys rise with time: new ones need no look at the file
            return None
        row = connection.execute("SELECT state, segment, place, room, chunks, more FROM keys WHERE key = ?", (key,)).fetchone()
        return _entry(*row) if row else None

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        return self._look_all(keys, self._write)

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        return self._look_all(keys, self._read)

    def _look_all(self, keys: Sequence[bytes], connection: sqlite3.Connection) -> dict[bytes, Entry]:
        found: dict[bytes, Entry] = {}
        rest = []
        for key in keys:
            for table in (self._active, self._frozen):
                if key in table:
                    entry = table[key]
                    if entry is not None:
                        found[key] = entry
                    break
            else:
                if key <= self._highest:
                    rest.append(key)
        for first in range(0, len(rest), _LOOK_KEYS):
            part = rest[first : first + _LOOK_KEYS]
            marks = ", ".join("?" * len(part))
            rows = connection.execute(
                f"SELECT key, state, segment, place, room, chunks, more FROM keys WHERE key IN ({marks})", part
            )
            for key, *values in rows:
                found[key] = _entry(*values)
        return found

    def put(self, key: bytes | Name, entry: Entry | None, before: Entry | None) -> None:
        self._live += (entry is not None and entry.state == LIVE) - (before is not None and before.state == LIVE)
        self._active[key] = entry

    def put_new(self, entries: dict[bytes, Entry]) -> None:
        self._live += len(entries)
        self._active.update(entries.items())

    def _recent(self) -> _Table:
        return {**self._frozen, **self._active}

    def inventory(self, after: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        recent = {key: entry for key, entry in self._recent().items() if isinstance(key, bytes) and key > after}
        # As many more as there are recent changes, so that what they hide does not shorten the answer.
        rows = self._read.execute(
            "SELECT key, state, segment, place, room, chunks, more FROM keys WHERE key > ? AND state <> 0 ORDER BY key LIMIT ?",
            (after, limit + len(recent)),
        ).fetchall()
        found = {key: _entry(*values) for key, *values in rows if key not in recent}
        found.update((key, entry) for key, entry in recent.items() if entry is not None and entry.state in (LIVE, DEAD))
        return sorted(found.items())[:limit]

    def open_keys(self) -> list[bytes]:
        recent = self._recent()
        rows = self._write.execute("SELECT key FROM keys WHERE state = 0").fetchall()
        found = [key for key, entry in recent.items() if isinstance(key, bytes) and entry is not None and entry.state == OPEN]
        return [*found, *(key for (key,) in rows if key not in recent)]

    def names(self, kind: int, after: bytes, limit: int) -> list[tuple[Name, Entry]]:
        recent = {
            key: entry
            for key, entry in self._recent().items()
            if isinstance(key, Name) and key.kind == kind and key.key > after
        }
        rows = self._read.execute(
            "SELECT kind, key, of_segment, of_offset, segment, place, room, chunks, more FROM names WHERE kind = ? AND key > ?"
            " AND key <= coalesce((SELECT max(key) FROM"
            " (SELECT DISTINCT key FROM names WHERE kind = ? AND key > ? ORDER BY key LIMIT ?)), x'')"
            " ORDER BY key, of_segment, of_offset",
            (kind, after, kind, after, limit + len(recent)),
        ).fetchall()
        found = {}
        for of_kind, key, segment, offset, *values in rows:
            name = Name(of_kind, key, Position(segment, offset))
            if name not in recent:
                found[name] = _entry(NAMED, *values)
        found.update((name, entry) for name, entry in recent.items() if entry is not None)
        return _of_keys(sorted(found.items()), limit)

    def everything(self) -> Iterable[tuple[bytes | Name, Entry]]:
        recent = self._recent()
        for key, *values in self._write.execute("SELECT key, state, segment, place, room, chunks, more FROM keys"):
            if key not in recent:
                yield key, _entry(*values)
        for kind, key, segment, offset, *values in self._write.execute(
            "SELECT kind, key, of_segment, of_offset, segment, place, room, chunks, more FROM names"
        ):
            name = Name(kind, key, Position(segment, offset))
            if name not in recent:
                yield name, _entry(NAMED, *values)
        for known, entry in recent.items():
            if entry is not None:
                yield known, entry

    def count(self) -> int:
        return self._live

    def facts(self) -> Facts:
        return self._facts

    def lasts(self) -> bool:
        return True

    def due(self) -> bool:
        return bool(self._frozen) or len(self._active) >= self._FREEZE_AT

    def settle(self, facts: Facts, everything: bool = False) -> bool:
        try:
            return self._settle(facts, everything)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_FULL:
                raise
            self._thaw()
            raise OSError(errno.ENOSPC, "no room for the key index") from error

    def _settle(self, facts: Facts, everything: bool) -> bool:
        while True:
            if not self._frozen:
                if not everything and len(self._active) < self._FREEZE_AT:
                    return False
                if not self._active and facts.complete == self._facts.complete:
                    return False
                self._freeze(facts)
            self._write_slice()
            if self._frozen_rows:
                if everything:
                    continue
                return True
            self._finish()
            if not everything or not self._active:
                return False

    def _thaw(self) -> None:
        """Takes back what could not be written."""
        if self._write.in_transaction:
            self._write.execute("ROLLBACK")
        self._active = {**self._frozen, **self._active}
        self._frozen, self._frozen_rows = {}, []

    def _freeze(self, facts: Facts) -> None:
        self._write.execute("BEGIN IMMEDIATE")
        self._frozen_facts = (facts, self._live)
        self._frozen_rows = list(self._active.items())
        highest = max((key for key in self._active if isinstance(key, bytes)), default=b"")
        self._highest = max(self._highest, highest)
        self._frozen, self._active = self._active, {}

    def _write_slice(self) -> None:
        part, self._frozen_rows = self._frozen_rows[: self._SLICE], self._frozen_rows[self._SLICE :]
        values: list[int | bytes] = []
        named: list[int | bytes] = []
        for key, entry in part:
            if isinstance(key, Name):
                place = (key.kind, key.key, *key.position)
                if entry is not None:
                    named += (*place, *entry.mark, pack_chunks(entry.chunks), _pack_more(entry))
                else:
                    self._write.execute(
                        "DELETE FROM names WHERE kind = ? AND key = ? AND of_segment = ? AND of_offset = ?", place
                    )
            elif entry is not None:
                values += (key, entry.state, *entry.mark, pack_chunks(entry.chunks), _pack_more(entry))
            else:
                self._write.execute("DELETE FROM keys WHERE key = ?", (key,))
        # One statement for all rows: the interpreter lock is given up once, not once a row.
        if values:
            rows = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * (len(values) // 7))
            self._write.execute(f"INSERT OR REPLACE INTO keys VALUES {rows}", values)
        if named:
            rows = ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * (len(named) // 9))
            self._write.execute(f"INSERT OR REPLACE INTO names VALUES {rows}", named)

    def _finish(self) -> None:
        facts, live = self._frozen_facts
        self._write.executemany(
            "UPDATE meta SET value = ? WHERE name = ?", [(msgspec.json.encode(facts), "facts"), (live, "live")]
        )
        self._write.execute("COMMIT")
        self._facts = facts
        self._frozen = {}

    def close(self) -> None:
        self._read.close()
        self._write.close()
