"""Owns the file: opening it, one writing lane and one reading lane, and the transaction in which everything is changed.

Every change is one transaction whose last statement raises this opening's writer slot (law 10); what a transaction taught the
copies in memory is thrown away when it is rolled back. Those copies (node rows, counters, mailboxes by name, placements,
views, the octets an account uses) are right only because this process is the only writer of the file: another deployment
must read them in the transaction.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble, OperatorError
from powermail.base.lane import Lane
from powermail.base.world import World
from powermail.index.laws import NumbersSpent
from powermail.index.sql.core import LEFT_OUT, STARTS_BEHIND, Change, Look
from powermail.index.sql.engine import NODE_COLUMNS, Reading, Slot, Transaction, Untouched, node_row
from powermail.index.sql.gathering import Gathering
from powermail.index.sqlite import migration, schema
from powermail.index.sqlite.statements import Reader, Writer, drive
from powermail.storage.contract import Mark

T = TypeVar("T")


class Shared(NamedTuple):
    """What is committed of the whole index but for the slot; replaced whole, so that any thread may read it."""

    epoch: int
    round: int
    sequence: int
    starts: int
    uidvalidity: int
    slots: dict[int, tuple[str, int]]  # of other openings
    retired: tuple[str, ...]


# What a disk is to blame for, and no database: it may be as good as new when there is room, or the disk is back.
_OF_THE_DISK = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN}
)


def _cure(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _OF_THE_DISK:
        return "is its disk full, failing or read-only? Nothing was changed"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program has it locked"
    return "`powermail rebuild` sets it aside and makes it anew"


def connect(path: str, write: bool, create: bool = False) -> sqlite3.Connection:
    """Opens the file as this program needs it; one that is missing is made only if asked for. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        f"file:{quote(path)}?mode={'rwc' if create else 'rw'}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=512,
        timeout=limits.INDEX_BUSY_TIMEOUT_S,
    )
    if write:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA wal_autocheckpoint=8000")
    else:
        connection.execute("PRAGMA query_only=ON")
    connection.execute("PRAGMA cache_size=-32768")
    return connection


def copy(path: str, to: str) -> None:
    """Copies the file as it is at one moment, while it is used, and checks the copy. Raises sqlite3.Error."""
    source = connect(path, write=False)
    target = sqlite3.connect(f"file:{quote(to)}?mode=rwc", uri=True)
    try:
        source.execute("BEGIN")
        source.execute("SELECT count(*) FROM meta").fetchone()  # from here on it is the same moment
        source.backup(target)
        if target.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("the copy is damaged")
    finally:
        target.close()
        source.close()


def cluster_of(path: str) -> str:
    """The cluster that the index in a file belongs to; "" if it is none that can be used. Nothing is changed by the look."""
    try:
        db = connect(path, write=False)
        try:
            row = db.execute("SELECT value FROM meta WHERE name = 'cluster'").fetchone()
            return str(row[0]) if row and db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok" else ""
        finally:
            db.close()
    except sqlite3.Error:
        return ""


class SqliteCore(Gathering):
    """The file and its lanes. Methods whose names begin with `_in_` run in the writing lane."""

    alone = True

    def __init__(self, world: World, path: str) -> None:
        super().__init__(world)
        self._path = path
        self._write_lane: Lane = world.lane("index-write")
        self._read_lane: Lane = world.lane("index-read")
        self._db_open: sqlite3.Connection | None = None
        self._reader_open: sqlite3.Connection | None = None
        self._writer_open: Writer | None = None
        self._slot = Slot(0, "", 0)
        self._shared = Shared(0, 0, 0, 0, 0, {}, ())
        self._published = self._slot, self._shared  # as the last transaction left both; what other threads read
        self._under_way = 0  # transactions on their way to the lane, or in it
        self._changes = 0
        self._begin_gathering()
        self._used: dict[str, int] = {}  # octets of accounts asked for lately

    @property
    def _db(self) -> sqlite3.Connection:
        """The writing lane's connection."""
        if self._db_open is None:
            raise IndexTrouble("the index is not open")
        return self._db_open

    @property
    def _reader(self) -> sqlite3.Connection:
        """The reading lane's connection."""
        if self._reader_open is None:
            raise IndexTrouble("the index is not open")
        return self._reader_open

    @property
    def _writer(self) -> Writer:
        """The writing lane's transactions, one after the other, with what they remember."""
        if self._writer_open is None:
            raise IndexTrouble("the index is not open")
        return self._writer_open

    @property
    def connection(self) -> int:
        """A file is opened once in the life of this object, and stays that file whatever has its name."""
        return 1

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self, cluster: str = "") -> None:
        """Opens or, with `cluster`, makes the database. Raises OperatorError."""
        try:
            await self._write_lane.run(self._in_open, cluster)
            self._reader_open = await self._read_lane.run(connect, self._path, False)
        except sqlite3.DatabaseError as error:
            if "unable to open" in str(error):
                raise OperatorError(
                    f"the index {self._path} is missing or cannot be opened; if it is lost, `powermail rebuild` makes it anew"
                ) from error
            raise OperatorError(f"the index {self._path} cannot be used: {error}; {_cure(error)}") from error

    async def copy_to(self, path: str) -> None:
        """Copies the file as it is at one moment, on a lane of its own, and checks the copy. Raises IndexTrouble."""
        lane = self._world.lane("index-copy")
        try:
            await self._guard(lane.run(copy, self._path, path))
        finally:
            lane.close()

    def _in_open(self, cluster: str) -> None:
        db = self._db_open = connect(self._path, write=True, create=bool(cluster))
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("integrity check failed")
        db.execute("BEGIN IMMEDIATE")
        try:
            migration.prepare(db, self._path, cluster, self._world.clock.now())
            self._in_take_slot()
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._writer_open = Writer(db, self)
        self._in_forget_caches()
        self.cluster = str(db.execute("SELECT value FROM meta WHERE name = 'cluster'").fetchone()[0])

    def _in_take_slot(self) -> None:
        """A fresh writer slot. If the one before does not say that it stopped, each mailbox leaps at its first numbering, and
        so does UIDVALIDITY: a hot copy of the file, put back at once, leaves no other sign (law 10).
        """
        db = self._db
        unclean = db.execute("SELECT count(*) FROM writers WHERE stopped = 0").fetchone()[0]
        self.unsettled = bool(unclean)
        if unclean:
            db.execute("UPDATE counters SET value = value + 1 WHERE name = 'starts'")
            db.execute("UPDATE counters SET value = value + ? WHERE name = 'uidvalidity'", (limits.UNCLEAN_JUMP,))
            # What was not numbered for many starts is checkpointed behind its leap, before the leap is too far (law 11).
            db.execute(
                "UPDATE mailboxes SET due_at = ? WHERE due_at = 0 AND start + ? <="
                " (SELECT value FROM counters WHERE name = 'starts')",
                (self._world.clock.now(), STARTS_BEHIND),
            )
        # This file has one writer at a time: whatever slot is open but mine is one whose process died.
        db.execute(
            "UPDATE writers SET stopped = 1, round = (SELECT value FROM counters WHERE name = 'round') WHERE stopped = 0"
        )
        self._in_new_slot()

    def _in_new_slot(self) -> None:
        """The next writer slot is ours from now on; inside a transaction that no count is raised for."""
        number = self._db.execute("UPDATE counters SET value = value + 1 WHERE name = 'sequence' RETURNING value").fetchone()[0]
        tag = self._world.entropy.octets(8).hex()
        self._db.execute("INSERT INTO writers VALUES (?, ?, 1, 0, 0)", (number, tag))
        self._slot = Slot(number, tag, 1)

    async def close(self) -> None:
        """Finishes what waits and closes."""
        if self._reader_open is not None:
            await self._read_lane.run(self._reader_open.close)
        if self._db_open is not None:
            await self._write_lane.run(self._db_open.close)
        self._reader_open = self._db_open = self._writer_open = None
        self._write_lane.close()
        self._read_lane.close()

    def abandon(self) -> None:
        """Lets go of the file as it is; the lanes are dead."""
        for connection in (self._reader_open, self._db_open):
            if connection is not None:
                connection.close()

    # -- transactions --------------------------------------------------------------------------------------------------

    async def _write(self, call: Change[T], *args: Any) -> T:
        """Runs `call` in one transaction on the writing lane. Raises IndexTrouble."""
        self._begin_change()
        done = self._write_lane.run(self._in_transaction, call, args)
        done.add_done_callback(self._end_change)
        # Who waits may be cancelled; what has begun goes on, and is under way until it ends.
        return await self._guard(asyncio.shield(done))

    def _begin_change(self, clear: bool = True) -> None:
        """Figures in memory that a change makes old are not kept while it is under way."""
        self._changes += 1
        self._under_way += 1
        if clear:
            self._used.clear()

    def _end_change(self, done: asyncio.Future[Any] | None = None) -> None:
        self._changes += 1
        self._under_way -= 1
        if done is not None and not done.cancelled():
            done.exception()  # who waited has seen it, or has gone: then what it was about is asked for again

    async def _ask(self, call: Look[T], *args: Any) -> T:
        """Runs `call`, which reads by one statement, on the reading lane. Raises IndexTrouble."""
        return await self._guard(self._read_lane.run(self._in_one, call, args))

    async def _read(self, call: Look[T], *args: Any) -> T:
        """Runs `call` on the reading lane, in one snapshot. Raises IndexTrouble."""
        return await self._guard(self._read_lane.run(self._in_snapshot, call, args))

    async def _show(self, call: Look[T], *args: Any) -> T:
        self._complete()
        return await self._read(call, *args)

    async def _show_one(self, call: Look[T], *args: Any) -> T:
        self._complete()
        return await self._ask(call, *args)

    async def _in_now(self, db: Reading) -> float:
        return self._world.clock.now()

    async def _aside(self, call: Callable[..., T], *args: Any) -> T:
        return await self._guard(self._read_lane.run(call, *args))

    @staticmethod
    async def _guard(future: Awaitable[T]) -> T:
        try:
            return await future
        except (sqlite3.Error, NumbersSpent) as error:
            raise IndexTrouble(f"index: {error}") from error

    def _in_one(self, call: Look[T], args: tuple[Any, ...]) -> T:
        return drive(call(Reader(self._reader), *args))

    def _in_snapshot(self, call: Look[T], args: tuple[Any, ...]) -> T:
        reader = self._reader
        reader.execute("BEGIN")
        try:
            return drive(call(Reader(reader), *args))
        finally:
            if reader.in_transaction:
                reader.execute("ROLLBACK")

    def _in_transaction(self, call: Change[T], args: tuple[Any, ...]) -> T:
        db, writer = self._db, self._writer
        before, slot = db.total_changes, self._slot
        db.execute("BEGIN IMMEDIATE")
        try:
            result = drive(call(writer, *args))
            if isinstance(result, Untouched):
                db.execute("ROLLBACK")
                if db.total_changes != before:
                    self._in_forget_caches()
                return result.value
            self._in_raise_count()
            db.execute("COMMIT")
            writer.resting = False
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self._slot = slot
            self._in_forget_caches()
            raise
        self._slot = self._slot._replace(commits=self._slot.commits + 1)
        if writer.stale:
            self._in_load()
        elif writer.fresh:
            self._shared = self._shared._replace(uidvalidity=writer.fresh)
        writer.fresh = 0
        self._published = self._slot, self._shared
        return result

    def _in_raise_count(self) -> None:
        """Last in each transaction. The file has one writer, so a row that is not as we left it is not our file (law 10)."""
        slot = self._slot
        raised = self._db.execute(
            "UPDATE writers SET count = count + 1, stopped = ?, round = (SELECT value FROM counters WHERE name = 'round')"
            " WHERE id = ? AND tag = ? AND count = ?",
            (int(self._writer.resting), slot.number, slot.tag, slot.commits),
        )
        if raised.rowcount != 1:
            self._why_lost = f"writer slot {slot.number} is not where this process left it"
            raise IndexLost(self._why_lost)

    # -- copies in memory ----------------------------------------------------------------------------------------------

    def _in_forget_caches(self) -> None:
        """What is in memory may be wrong after a transaction that was rolled back. Parts add theirs."""
        self._in_load()
        self._writer.forget()

    def _in_load(self) -> None:
        """Reads node rows and counters again."""
        db, writer = self._db, self._writer
        writer.fresh, writer.resting, writer.stale = 0, False, False
        before = self._shared
        counters = dict(db.execute("SELECT name, value FROM counters").fetchall())
        writer.counters = counters
        writer.know([node_row(row) for row in db.execute(f"SELECT {NODE_COLUMNS} FROM nodes ORDER BY id")])
        rows = db.execute("SELECT id, tag, count FROM writers WHERE stopped <> ? ORDER BY id", (LEFT_OUT,))
        others = {number: (tag, count) for number, tag, count in rows if number != self._slot.number}
        self._shared = Shared(
            counters["epoch"],
            counters["round"],
            counters["sequence"],
            counters["starts"],
            counters["uidvalidity"],
            others,
            tuple(row[0] for row in db.execute("SELECT incarnation FROM retired ORDER BY incarnation")),
        )
        self.catching_up = bool(counters["catching_up"])
        self.numbering = not counters["waiting"]
        self._published = self._slot, self._shared
        if (before.epoch, before.starts) != (self._shared.epoch, self._shared.starts):
            self._in_renumber_all()

    def _in_renumber_all(self) -> None:
        """Another epoch, or another start: what deliveries know of numbers is made anew."""
        for statement in schema.arrivals(self._shared.epoch, self._shared.starts, self._slot.number, self._slot.tag):
            self._db.execute(statement)
        self._writer.boxes.clear()

    async def _in_find_by_key(self, db: Transaction) -> None:
        await db.change(schema.ENTRIES_BY_KEY)

    async def _in_find_by_key_no_more(self, db: Transaction) -> None:
        await db.change(schema.DROP_ENTRIES_BY_KEY)

    # -- what was committed --------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._shared.epoch

    def mark(self) -> Mark:
        """What is committed now. A count that is a moment old is fine: a mark never says more than is true (law 10).

        What goes to a node because of something that was read needs `proof`: a reading lane may be quicker than this copy.
        """
        slot, shared = self._published
        slots: dict[int, tuple[str, int]] = {**shared.slots, slot.number: (slot.tag, slot.commits)}
        return Mark(shared.sequence, slots, shared.epoch, shared.uidvalidity, shared.retired)

    async def _in_stop_silent(self, db: Transaction) -> None:
        """A start has noted all others as stopped."""

    async def _in_epoch_raised(self, db: Transaction) -> None:
        """A file says nothing of itself."""

    def _mine(self) -> tuple[int, tuple[Slot, ...]]:
        slot, shared = self._published
        return shared.epoch, (slot,)
