"""Owns what the simulated database server keeps: committed rows, and transactions at READ COMMITTED with locks on rows.

SQLite has one writer, PostgreSQL many. So a transaction's changes are a list of rows that is laid over the committed ones
while a statement of it runs, and taken off again when a statement of another comes: each statement sees what is committed by
then and its own transaction's changes. A row that it changes or locks is its own until it ends; who comes to it meanwhile
waits, and then runs the whole statement again. A ring of those who wait is found at once.

What PostgreSQL does and this does not: locks are taken by a statement all at once or not at all; a statement that waited reads
everything anew, and not the locked rows only; serializable transactions.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

from powermail.index.postgres.schema import VERSION, VERSION_TABLE
from powermail.sim import dialect
from powermail.sim.dialect import Locking, Mode

_MIGRATIONS = "powermail.index.postgres.migrations.versions"
STRANGE = "PostgresSyntaxError"  # what `dialect` cannot translate yet
_Lock = tuple[str, str]  # a table, and what names a row of it: a condition


class Refused(Exception):
    """A statement that was not done; `name` is asyncpg's for the error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Answer(NamedTuple):
    """What a statement comes to: its rows, and how many it changed."""

    rows: list[tuple[Any, ...]]
    status: str


class Work:
    """A transaction that has not ended."""

    def __init__(self, snapshot: sqlite3.Connection | None = None) -> None:
        self.snapshot = snapshot  # of one that only reads, and sees one moment
        self.failed = False  # an error was answered: it can only be rolled back
        self.over = False
        self.locks: dict[_Lock, Mode] = {}
        self.changes: dict[_Lock, tuple[Any, ...] | None] = {}  # rows as they are in it; None: deleted
        self.touched: dict[_Lock, None] = {}  # rows that were changed since its changes were laid over
        self.waits_for: Work | None = None
        self.ended = asyncio.get_running_loop().create_future()

    @property
    def writes(self) -> bool:
        """True if it has changed anything."""
        return bool(self.changes or self.touched)


class Store:
    """The rows. All of it runs at once, but for waiting."""

    def __init__(self, path: str, now: Callable[[], float]) -> None:
        """Makes an empty index at `path`, a file of the real machine. `now` is the server's clock, UTC."""
        self._path = path
        self._now = now
        self._keys: dict[str, tuple[str, ...]] = {}
        self._widths: dict[str, int] = {}
        self._locking: dict[str, Locking | None] = {}
        self._locks: dict[_Lock, dict[Work, Mode]] = {}
        self._laid: Work | None = None  # whose changes lie over the committed rows now
        self._readers: list[sqlite3.Connection] = []
        self._lent: list[sqlite3.Connection] = []
        self._open: dict[Work, None] = {}
        self.commits = 0
        self._begin()
        for statement in _statements():
            self._db.execute(dialect.table_text(statement))
        self._db.execute(f"CREATE TABLE {VERSION_TABLE} (version_num TEXT)")
        self._db.execute(f"INSERT INTO {VERSION_TABLE} VALUES ('{VERSION}')")
        self._learn()

    # -- SQLite --------------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, cached_statements=1024)
        db.create_function("server_now", 0, self._now)
        db.create_aggregate("array_agg", 1, dialect.ArrayAgg)  # type: ignore[arg-type]
        return db

    def _begin(self) -> None:
        self._db = self._connect()
        for pragma in ("journal_mode=WAL", "synchronous=OFF", "temp_store=MEMORY"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TEMP TABLE touched (place TEXT, name TEXT, mode INTEGER)")

    def _learn(self) -> None:
        """What names the rows of each table, and what notes that one was touched."""
        tables = [row[0] for row in self._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
        for table in tables:
            columns = self._db.execute(f"PRAGMA table_info({table})").fetchall()
            self._widths[table] = len(columns)
            keys = sorted((place, name) for _, name, *_, place in columns if place)
            self._keys[table] = tuple([name for _, name in keys])
            if keys:
                self._watch(table)

    def _watch(self, table: str) -> None:
        also = dialect.UNIQUE.get(table)
        for event, row, mode in (("INSERT", "NEW", Mode.OWN), ("UPDATE", "NEW", Mode.CHANGE), ("DELETE", "OLD", Mode.OWN)):
            notes = [f"INSERT INTO touched VALUES ('{table}', {self._naming(table, row)}, {int(mode)});"]
            if also is not None and event == "INSERT":
                notes.append(f"INSERT INTO touched VALUES ('{table}', {_named(also, row)}, {int(mode)});")
            self._db.execute(
                f"CREATE TEMP TRIGGER touched_{table}_{event} AFTER {event} ON main.{table} BEGIN {' '.join(notes)} END"
            )

    def _naming(self, table: str, alias: str) -> str:
        """An expression that gives the condition for a row."""
        return _named(self._keys[table], alias)

    def _reader(self) -> sqlite3.Connection:
        reader = self._readers.pop() if self._readers else self._connect()
        self._lent.append(reader)
        return reader

    def _give_back(self, reader: sqlite3.Connection) -> None:
        if reader in self._lent:
            self._lent.remove(reader)
            if reader.in_transaction:
                reader.execute("ROLLBACK")
            self._readers.append(reader)

    def close(self) -> None:
        """Lets go of the file; what was not committed did not happen."""
        for work in list(self._open):
            self.rollback(work)
        for db in (self._db, *self._readers, *self._lent):
            db.close()
        self._readers, self._lent = [], []

    # -- histories -----------------------------------------------------------------------------------------------------

    def copy(self, name: str) -> None:
        """What is committed now, as a standby or a backup has it."""
        self._lift()
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        target = sqlite3.connect(f"{self._path}.{name}")
        source = sqlite3.connect(self._path)
        source.backup(target)
        source.close()
        target.close()

    def become(self, name: str) -> None:
        """What is committed is from now on what it was at that copy."""
        self.close()
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(f"{self._path}{suffix}"):
                os.unlink(f"{self._path}{suffix}")
        shutil.copy(f"{self._path}.{name}", self._path)
        self._begin()
        for table, keys in self._keys.items():
            if keys:
                self._watch(table)

    # -- transactions --------------------------------------------------------------------------------------------------

    def begin(self, snapshot: bool) -> Work:
        """A transaction; with `snapshot` it only reads, all of it at one moment."""
        reader = self._reader() if snapshot else None
        if reader is not None:
            reader.execute("BEGIN")
            reader.execute("SELECT 1 FROM counters LIMIT 1").fetchone()  # from here on it is the same moment
        work = Work(reader)
        self._open[work] = None
        return work

    def commit(self, work: Work) -> None:
        """What it changed is there for all. Raises Refused: then it was rolled back."""
        if work.failed:
            self.rollback(work)
            return
        if work.writes:
            self._lay(work)
            self._db.execute("COMMIT")
            self._laid = None
            self.commits += 1
        self._end(work)

    def rollback(self, work: Work) -> None:
        """Nothing of it happened. Idempotent."""
        if self._laid is work:
            self._db.execute("ROLLBACK")
            self._laid = None
        self._end(work)

    def fail(self, work: Work) -> None:
        """An error was answered: nothing of it happened, it holds nothing any more, and it can only be rolled back."""
        if self._laid is work:
            self._db.execute("ROLLBACK")
            self._laid = None
        work.failed = True
        work.changes.clear()
        work.touched.clear()
        self._release(work)

    def _release(self, work: Work) -> None:
        for lock in work.locks:
            holders = self._locks[lock]
            del holders[work]
            if not holders:
                del self._locks[lock]
        work.locks.clear()
        ended, work.ended = work.ended, asyncio.get_running_loop().create_future()
        ended.set_result(None)

    def _end(self, work: Work) -> None:
        if work.over:
            return
        work.over = True
        self._open.pop(work, None)
        self._release(work)
        if work.snapshot is not None:
            self._give_back(work.snapshot)

    def _lift(self) -> None:
        """Takes the changes that lie over the committed rows off again, and remembers them."""
        work, self._laid = self._laid, None
        if work is None:
            return
        for lock in work.touched:
            work.changes[lock] = self._db.execute(f"SELECT * FROM {lock[0]} WHERE {lock[1]}").fetchone()
        work.touched.clear()
        self._db.execute("ROLLBACK")

    def _lay(self, work: Work) -> None:
        if self._laid is work:
            return
        self._lift()
        self._db.execute("BEGIN")
        for table, name in work.changes:
            self._db.execute(f"DELETE FROM {table} WHERE {name}")
        for (table, _), row in work.changes.items():
            if row is not None:
                self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * self._widths[table])})", row)
        self._db.execute("DELETE FROM touched")
        self._laid = work

    # -- statements ----------------------------------------------------------------------------------------------------

    def run_at_once(self, work: Work | None, text: str, args: Sequence[Any], many: bool) -> Answer | None:
        """The same if it need not wait, else None and nothing was done. Raises Refused."""
        if work is None:
            return self._look(text, args) if is_read(text) and self._locked_by(text) is None else None
        if work.failed:
            raise Refused("InFailedSQLTransactionError", "current transaction is aborted")
        try:
            if work.snapshot is not None:
                return _asked(work.snapshot, text, args)
            answer = self._try(work, text, args, many)
        except Refused:
            self.fail(work)
            raise
        return answer if isinstance(answer, Answer) else None

    async def run(self, work: Work | None, text: str, args: Sequence[Any], many: bool, lock_s: float) -> Answer:
        """Runs a statement, for each of the rows if there are `many`; outside of a transaction it is one of its own.

        Waits for rows that others hold, at most `lock_s`. Raises Refused.
        """
        if work is None:
            if is_read(text) and self._locked_by(text) is None:
                return self._look(text, args)
            return await self._alone(text, args, many, lock_s)
        if work.failed:
            raise Refused("InFailedSQLTransactionError", "current transaction is aborted")
        try:
            if work.snapshot is not None:
                return _asked(work.snapshot, text, args)
            return await self._changed(work, text, args, many, lock_s)
        except Refused:
            self.fail(work)
            raise

    async def _alone(self, text: str, args: Sequence[Any], many: bool, lock_s: float) -> Answer:
        work = self.begin(False)
        try:
            answer = await self.run(work, text, args, many, lock_s)
            self.commit(work)
        finally:
            self.rollback(work)
        return answer

    def _look(self, text: str, args: Sequence[Any]) -> Answer:
        reader = self._reader()
        try:
            return _asked(reader, text, args)
        finally:
            self._give_back(reader)

    async def _changed(self, work: Work, text: str, args: Sequence[Any], many: bool, lock_s: float) -> Answer:
        loop = asyncio.get_running_loop()
        until = loop.time() + lock_s
        while True:
            answer = self._try(work, text, args, many)
            if isinstance(answer, Answer):
                return answer
            other: Work | None = answer
            while other is not None:
                if other is work:
                    raise Refused("DeadlockDetectedError", "deadlock detected")
                other = other.waits_for
            work.waits_for = answer
            ended = answer.ended
            await asyncio.wait([ended], timeout=max(0.0, until - loop.time()))
            work.waits_for = None
            if work.over:
                raise Refused("ConnectionDoesNotExistError", "the session has ended")
            if not ended.done():
                raise Refused("LockNotAvailableError", "canceling statement due to lock timeout")

    def _locked_by(self, text: str) -> Locking | None:
        if text not in self._locking:
            self._locking[text] = dialect.locking(text, self._naming)
        return self._locking[text]

    def _try(self, work: Work, text: str, args: Sequence[Any], many: bool) -> Answer | Work:
        """What it comes to; or who holds what it needs, and then nothing was done."""
        locking = self._locked_by(text)
        if is_read(text):
            if not work.writes and locking is None:
                return self._look(text, args)
            if work.writes:
                self._lay(work)
                db = self._db
            else:
                self._lift()
                db = self._db
            if locking is not None:
                wanted = dict.fromkeys(_asked(db, locking.text, args).rows, locking.mode)
                if (holder := self._in_the_way(work, wanted)) is not None:
                    return holder
                self._take(work, wanted)
            return _asked(db, text, args)
        self._lay(work)
        self._db.execute("SAVEPOINT statement")
        try:
            answer = self._written(text, args) if not many else self._written_all(text, args)
        except Refused:
            self._undo()
            raise
        rows = self._db.execute("SELECT place, name, max(mode) FROM touched GROUP BY place, name").fetchall()
        wanted = {(table, name): Mode(mode) for table, name, mode in rows}
        if (holder := self._in_the_way(work, wanted)) is not None:
            self._undo()
            return holder
        self._db.execute("DELETE FROM touched")
        self._db.execute("RELEASE statement")
        self._take(work, wanted)
        work.touched.update(dict.fromkeys(wanted))
        return answer

    def _undo(self) -> None:
        self._db.execute("ROLLBACK TO statement")
        self._db.execute("RELEASE statement")
        self._db.execute("DELETE FROM touched")

    def _in_the_way(self, work: Work, wanted: dict[_Lock, Mode]) -> Work | None:
        for lock, mode in wanted.items():
            for holder, held in self._locks.get(lock, {}).items():
                if holder is not work and not held.bears(mode):
                    return holder
        return None

    def _take(self, work: Work, wanted: dict[_Lock, Mode]) -> None:
        for lock, mode in wanted.items():
            strongest = max(mode, work.locks.get(lock, mode))
            work.locks[lock] = strongest
            self._locks.setdefault(lock, {})[work] = strongest

    def _written_all(self, text: str, rows: Sequence[Sequence[Any]]) -> Answer:
        answer = Answer([], "")
        for row in rows:
            answer = self._written(text, row)
        return answer

    def _written(self, text: str, args: Sequence[Any]) -> Answer:
        if (steps := dialect.steps(text)) is not None:
            return self._stepped(steps, args)
        joined = dialect.joined(text)
        if joined is None:
            return _asked(self._db, text, args)
        _asked(self._db, joined.update, args)
        rows = _asked(self._db, joined.changed, args).rows
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(joined.width)]
        return _asked(self._db, joined.insert, [*args, *columns])

    def _stepped(self, steps: Sequence[str], args: Sequence[Any]) -> Answer:
        answer, given = Answer([], ""), list(args)
        for step in steps:
            answer = _asked(self._db, step, given)
            given.append([row[0] for row in answer.rows])
        return answer


def is_read(text: str) -> bool:
    """True for what changes no row; it may lock some."""
    return text.startswith("SELECT") or (text.startswith("WITH") and not (dialect.joined(text) or dialect.steps(text)))


def _named(columns: Sequence[str], alias: str) -> str:
    return "||' AND '||".join(f"'{column}='||quote({alias}.{column})" for column in columns)


def _asked(db: sqlite3.Connection, text: str, args: Sequence[Any]) -> Answer:
    with _told(text):
        cursor = db.execute(*dialect.translated(text, args))
        rows = dialect.plain(cursor.fetchall())
    verb = text.split(" ", 1)[0]
    changed = cursor.rowcount if cursor.rowcount >= 0 else len(rows)
    return Answer(rows, f"{verb} 0 {changed}" if verb == "INSERT" else f"{verb} {changed}")


@contextmanager
def _told(text: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        kind = "UniqueViolationError" if "UNIQUE" in str(error) else "CheckViolationError"
        raise Refused(kind, str(error)) from error
    except OverflowError as error:
        raise Refused("NumericValueOutOfRangeError", str(error)) from error
    except sqlite3.Error as error:
        raise Refused(STRANGE, f"{error}: {text}") from error


class _Recorder:
    """Stands for alembic while the tables are made."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def execute(self, text: str) -> None:
        self.texts.append(str(text))


_made: list[str] = []


def _statements() -> list[str]:
    """What the product's own migrations do to an empty database, from the first to the last."""
    if not _made:
        package = import_module(_MIGRATIONS)
        modules: list[Any] = [import_module(f"{_MIGRATIONS}.{each.name}") for each in iter_modules(package.__path__)]
        behind = {module.down_revision: module for module in modules}
        at = None
        while at in behind:
            module, recorder = behind[at], _Recorder()
            before, module.op = module.op, recorder
            try:
                module.upgrade()
            finally:
                module.op = before
            _made.extend(recorder.texts)
            at = module.revision
        assert at == VERSION, f"the migrations end at {at}"
    return _made
