"""Owns the derived key index of a node: which records belong to a key. It can always be thrown away and made again.

Two forms: in memory (the simulator, tests) and in an SQLite file that lags behind the log and is brought forward in small
steps; what is not in the file yet is in memory. The file says up to which place of the log it is complete; recovery
reads the log from there.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from powermail.storage.contract import START, Position

OPEN: Final = 0  # chunks without a commit
LIVE: Final = 1
DELETED: Final = 2  # a tombstone stands for it
ABORTED: Final = 3
FORGOTTEN: Final = 4  # a tombstone that every holder has confirmed
CHECKPOINTED: Final = 5  # a mailbox's checkpoints; `chunks` are their places

_PLACE: Final = struct.Struct("<IQI")


class Place(NamedTuple):
    """Where a record is and the room it takes."""

    segment: int
    offset: int
    room: int


NOWHERE: Final = Place(0, 0, 0)


class Entry(NamedTuple):
    """What a node knows of a key.

    `mark` is the place of the commit, tombstone or abort. `chunks` are the places of the chunks by number; for a dead key
    they are the places of all its dead records, so that its tombstone can go when their segments are gone.
    """

    state: int
    mark: Place
    chunks: tuple[Place, ...]


def pack_chunks(chunks: Iterable[Place]) -> bytes:
    """Places as octets."""
    return b"".join(_PLACE.pack(*place) for place in chunks)


def unpack_chunks(octets: bytes) -> tuple[Place, ...]:
    """Places back from octets."""
    return tuple(Place(*values) for values in _PLACE.iter_unpack(octets))


class KeyIndex(Protocol):
    """Keys to entries. Written by the store's own lane only; `find` may be called from one other lane."""

    def get(self, key: bytes) -> Entry | None:
        """The entry of a key; for the writing lane."""

    def find(self, key: bytes) -> Entry | None:
        """The same for the reading lane."""

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Those of the keys that have entries; for the reading lane."""

    def put(self, key: bytes, entry: Entry | None, before: Entry | None) -> None:
        """Sets or (None) forgets an entry; `before` is what `get` says now."""

    def keys(self, state: int, after: bytes, limit: int) -> list[bytes]:
        """Keys in that state behind `after`, in order; for the reading lane."""

    def count(self) -> int:
        """How many live messages."""

    def complete_up_to(self) -> Position:
        """The log is contained up to here."""

    def live_octets(self) -> dict[int, int]:
        """Octets of live records in each segment, as of `complete_up_to`."""

    def due(self) -> bool:
        """True if `settle` has something worth doing."""

    def settle(self, position: Position, live_octets: dict[int, int], everything: bool = False) -> bool:
        """Does a little of what waits; the arguments describe the log now. True if more waits."""

    def close(self) -> None:
        """Closes without settling."""


class MemoryKeyIndex:
    """All in memory; complete up to nowhere, so recovery reads the whole log."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._live = 0

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def find(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        return {key: self._entries[key] for key in keys if key in self._entries}

    def put(self, key: bytes, entry: Entry | None, before: Entry | None) -> None:
        self._live += (entry is not None and entry.state == LIVE) - (before is not None and before.state == LIVE)
        if entry is None:
            self._entries.pop(key, None)
        else:
            self._entries[key] = entry

    def keys(self, state: int, after: bytes, limit: int) -> list[bytes]:
        return sorted(k for k, e in self._entries.items() if e.state == state and k > after)[:limit]

    def count(self) -> int:
        return self._live

    def complete_up_to(self) -> Position:
        return START

    def live_octets(self) -> dict[int, int]:
        return {}

    def due(self) -> bool:
        return False

    def settle(self, position: Position, live_octets: dict[int, int], everything: bool = False) -> bool:
        return False

    def close(self) -> None:
        self._entries.clear()


class SqliteKeyIndex:
    """An SQLite file behind a memory table.

    `_active` takes what is new; when it is large it becomes `_frozen` and is written in slices, in one transaction
    that also says up to which place of the log the file is now complete.
    """

    _SLICE = 256
    _FREEZE_AT = 4096

    def __init__(self, path: str, store: bytes) -> None:
        """Raises sqlite3.DatabaseError when the file is damaged or of another store: delete it and open anew."""
        self._write = self._open(path)
        self._write.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
        self._write.execute(
            "CREATE TABLE IF NOT EXISTS keys (key BLOB PRIMARY KEY, state INTEGER NOT NULL, segment INTEGER NOT NULL,"
            " place INTEGER NOT NULL, room INTEGER NOT NULL, chunks BLOB NOT NULL) WITHOUT ROWID"
        )
        self._write.execute("CREATE INDEX IF NOT EXISTS special ON keys(state, key) WHERE state <> 1")
        known = self._meta("store")
        if known is None:
            self._write.execute(
                "INSERT INTO meta VALUES ('store', ?), ('position', '0 0'), ('live', 0), ('segments', '{}')", (store,)
            )
        elif known != store:
            raise sqlite3.DatabaseError("key index is of another store")
        segment, offset = str(self._meta("position")).split()
        self._complete = Position(int(segment), int(offset))
        self._live = int(self._meta("live") or 0)
        self._live_octets = msgspec.json.decode(str(self._meta("segments")), type=dict[int, int])
        self._read = self._open(path)
        # Of messages only: names of checkpoints begin with the highest octet.
        highest = self._write.execute("SELECT max(key) FROM keys WHERE key < x'ff'").fetchone()[0]
        self._highest: bytes = highest or b""
        self._active: dict[bytes, Entry | None] = {}
        self._frozen: dict[bytes, Entry | None] = {}
        self._frozen_rows: list[tuple[bytes, Entry | None]] = []
        self._frozen_facts: tuple[Position, int, dict[int, int]] = (self._complete, self._live, {})

    @staticmethod
    def _open(path: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint=4000")
        return connection

    def _meta(self, name: str) -> int | str | bytes | None:
        row = self._write.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        value: int | str | bytes | None = row[0] if row else None
        return value

    def get(self, key: bytes) -> Entry | None:
        return self._look(key, self._write)

    def find(self, key: bytes) -> Entry | None:
        return self._look(key, self._read)

    def _look(self, key: bytes, connection: sqlite3.Connection) -> Entry | None:
        for table in (self._active, self._frozen):
            if key in table:
                return table[key]
        if self._highest < key < b"\xff":  # keys rise with time: new ones need no look at the file
            return None
        row = connection.execute("SELECT state, segment, place, room, chunks FROM keys WHERE key = ?", (key,)).fetchone()
        return Entry(row[0], Place(row[1], row[2], row[3]), unpack_chunks(row[4])) if row else None

    def find_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
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
                rest.append(key)
        if rest:
            marks = ", ".join("?" * len(rest))
            rows = self._read.execute(f"SELECT key, state, segment, place, room, chunks FROM keys WHERE key IN ({marks})", rest)
            for key, state, segment, place, room, chunks in rows:
                found[key] = Entry(state, Place(segment, place, room), unpack_chunks(chunks))
        return found

    def put(self, key: bytes, entry: Entry | None, before: Entry | None) -> None:
        self._live += (entry is not None and entry.state == LIVE) - (before is not None and before.state == LIVE)
        self._active[key] = entry

    def keys(self, state: int, after: bytes, limit: int) -> list[bytes]:
        recent = {**self._frozen, **self._active}
        found = [k for k, e in recent.items() if e is not None and e.state == state and k > after]
        # As many more as there are recent changes, so that what they hide does not shorten the answer.
        rows = self._read.execute(
            "SELECT key FROM keys WHERE state = ? AND key > ? ORDER BY key LIMIT ?", (state, after, limit + len(recent))
        ).fetchall()
        return sorted({*found, *(row[0] for row in rows if row[0] not in recent)})[:limit]

    def count(self) -> int:
        return self._live

    def complete_up_to(self) -> Position:
        return self._complete

    def live_octets(self) -> dict[int, int]:
        return dict(self._live_octets)

    def due(self) -> bool:
        return bool(self._frozen) or len(self._active) >= self._FREEZE_AT

    def settle(self, position: Position, live_octets: dict[int, int], everything: bool = False) -> bool:
        if not self._frozen:
            if not everything and len(self._active) < self._FREEZE_AT:
                return False
            if not self._active and position == self._complete:
                return False
            self._frozen_facts = (position, self._live, dict(live_octets))
            self._frozen_rows = list(self._active.items())
            self._highest = max(self._highest, max((key for key in self._active if key < b"\xff"), default=b""))
            self._frozen, self._active = self._active, {}
            self._write.execute("BEGIN")
        part, self._frozen_rows = self._frozen_rows[: self._SLICE], self._frozen_rows[self._SLICE :]
        gone = [(key,) for key, entry in part if entry is None]
        if gone:
            self._write.executemany("DELETE FROM keys WHERE key = ?", gone)
        values: list[int | bytes] = []
        for key, entry in part:
            if entry is not None:
                values += (key, entry.state, *entry.mark, pack_chunks(entry.chunks))
        if values:
            # One statement for all rows: the interpreter lock is given up once, not once a row.
            rows = ", ".join(["(?, ?, ?, ?, ?, ?)"] * (len(values) // 6))
            self._write.execute(f"INSERT OR REPLACE INTO keys VALUES {rows}", values)
        if not self._frozen_rows:
            self._finish()
            if not everything or not self._active:
                return False
        return self.settle(position, live_octets, everything=True) if everything else True

    def _finish(self) -> None:
        position, live, live_octets = self._frozen_facts
        facts = [
            (f"{position.segment} {position.offset}", "position"),
            (live, "live"),
            (msgspec.json.encode(live_octets).decode(), "segments"),
        ]
        self._write.executemany("UPDATE meta SET value = ? WHERE name = ?", facts)
        self._write.execute("COMMIT")
        self._complete = position
        self._frozen = {}

    def close(self) -> None:
        self._read.close()
        self._write.close()
