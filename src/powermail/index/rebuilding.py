"""Owns the index side of a rebuild: a database under another name, scratch tables in it, and the rows it ends with (law 13).

Whoever rebuilds (`keeper.rebuild`) decides; this room keeps what was read until it is decided, in tables of the file that is
being built, so that memory does not grow with the number of messages. Everything is keyed as it is asked for: copies,
tombstones, entries and expunged keys of one message lie beside each other, and are taken a page of keys at a time.

Danger: the file is not durable before `finish`, and means nothing before it: it must lie under a name that is never served.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.base.world import World
from powermail.index import laws
from powermail.index.contract import Fate, Head, NodeRow, QueueRow
from powermail.index.laws import Numbers
from powermail.index.sql import queue_form
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import NODE_COLUMNS
from powermail.index.sqlite import migration
from powermail.index.sqlite.rows import Sets, insert_many, set_counter
from powermail.index.sqlite.statements import text_of
from powermail.index.view import Entry
from powermail.mail.envelope import Commit, Target
from powermail.storage.contract import Mark

T = TypeVar("T")
_UID_ROOM_BELOW = limits.UID_MAX // 2  # beyond it a mailbox begins anew, so that what is entered never reaches the end
HELD_BY_REBUILD = "held by rebuild: sent or not is unknown"


class RecordPlace(NamedTuple):
    """Where one complete checkpoint record lies, and what it says of itself; `kind` and `tag` are the keeper's.

    `rank`: among those of the same MODSEQ the higher says more.
    """

    kind: int
    tag: bytes
    node: str
    name: bytes
    uidvalidity: int
    base: int
    modseq: int
    rank: int


class Found(NamedTuple):
    """What was found out about one key that some node holds.

    `settled` has a bit for each state of the queue whose watermark a copy lies behind; `open` are the (state, destination)
    that waited to leave. `gone`: (account, mailbox, left). `old`: every copy lies before its node's birth mark.
    """

    key: bytes
    nodes: tuple[str, ...]
    buried: bool
    old: bool
    settled: int
    shown: tuple[tuple[str, str], ...]
    gone: tuple[tuple[str, str, bool], ...]
    open: frozenset[tuple[int, str]]


class Verdict(NamedTuple):
    """What becomes of a key. LIVE: `enter` are mailboxes beside those that show it, `hold` are recipients elsewhere.

    DEAD: tombstones are ordered on `nodes`. None: nothing is known of it.
    """

    key: bytes
    fate: Fate | None
    nodes: tuple[str, ...]
    commit: Commit | None = None
    enter: tuple[Target, ...] = ()
    hold: tuple[Target, ...] = ()


class LostEntry(NamedTuple):
    """An entry of a checkpoint whose message no node holds. `key` is in hex."""

    account: str
    mailbox: str
    uid: int
    key: str


class Settled(NamedTuple):
    """What settling came to: entries, rows of the queue."""

    entries: int
    held: int


class Rebuilding(Protocol):
    """A database that is being made. Every method raises IndexTrouble."""

    async def note_records(self, account_records: Sequence[tuple[str, str, RecordPlace]]) -> None:
        """Remembers where complete records of (account, mailbox) lie."""

    async def note_numbers(self, group: str, seen: Sequence[Head]) -> None:
        """Remembers the highest numbers that a group shows of each (account, mailbox, UIDVALIDITY, epoch), also of records that
        are not complete.
        """

    async def numbers(self, account: str, mailbox: str) -> list[tuple[str, Head]]:
        """All that was noted of one, each with the group that shows it; of the earliest UIDVALIDITY first."""

    async def boxes(self, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
        """(account, mailbox) that have records, in order, but those of purged accounts."""

    async def records(self, account: str, mailbox: str) -> list[RecordPlace]:
        """All that was noted of one."""

    async def note_purged(self, accounts: Sequence[str]) -> None:
        """Nothing is entered for these accounts, ever."""

    async def purged(self, accounts: Sequence[str]) -> set[str]:
        """Those of them that are purged."""

    async def note_open(self, state: int, rows: Sequence[tuple[bytes, str]]) -> None:
        """(key, destination) that waited to leave in a state of the queue."""

    async def begin_numbers(self, epoch: int, uidvalidity: int) -> None:
        """From now on mailboxes can be put: the epoch, and the highest UIDVALIDITY that may have been given."""

    async def put_mailbox(
        self, account: str, name: str, numbers: Numbers, keywords: dict[str, int], entries: Iterable[Entry],
        gone: Iterable[tuple[bytes, bool]],
    ) -> None:  # fmt: skip
        """A mailbox as its checkpoints show it. `uidvalidity` 0 asks for a fresh one. `gone`: (key, left)."""

    async def note_copies(self, node: str, copies: Sequence[tuple[bytes, bool, int]]) -> None:
        """(key, old, settled) that a node holds."""

    async def note_tombstones(self, node: str, keys: Sequence[bytes]) -> None:
        """Keys that are dead there."""

    async def total(self) -> int:
        """How many keys some node holds."""

    async def found(self, after: bytes, limit: int) -> list[Found]:
        """What is known of keys that some node holds, in order."""

    async def settle(self, verdicts: Sequence[Verdict]) -> Settled:
        """Enters what was decided."""

    async def bury_on(self, nodes: Sequence[str]) -> None:
        """Nodes that were left out may hold what others know to be dead: rows for all tombstones, orders for those nodes."""

    async def lost(self, limit: int) -> tuple[int, list[LostEntry]]:
        """How many entries have no message, once all is settled; and the first of them."""

    async def finish(self, nodes: Sequence[NodeRow], sequence: int, retired: Sequence[str]) -> Mark:
        """The last rows; scratch tables go; the file is closed and whole, but not yet synced.

        What nodes of R groups must remember before it is served (law 11).
        """

    async def close(self) -> None:
        """Lets go of the file, finished or not."""


_SCRATCH = (
    "CREATE TABLE rebuild_records (account TEXT, mailbox TEXT, kind INTEGER, tag BLOB, node TEXT, name BLOB,"
    " uidvalidity INTEGER, base INTEGER, modseq INTEGER, rank INTEGER, PRIMARY KEY (account, mailbox, kind, tag, node, name))"
    " WITHOUT ROWID",
    # Only numbers of one epoch are compared as they are (law 11).
    "CREATE TABLE rebuild_numbers (site TEXT, account TEXT, mailbox TEXT, uidvalidity INTEGER, uid_next INTEGER,"
    " modseq INTEGER, epoch INTEGER, PRIMARY KEY (account, mailbox, uidvalidity, epoch, site)) WITHOUT ROWID",
    "CREATE TABLE rebuild_copies (key BLOB, node INTEGER, old INTEGER, settled INTEGER, PRIMARY KEY (key, node)) WITHOUT ROWID",
    "CREATE TABLE rebuild_tombstones (key BLOB PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE rebuild_entries (key BLOB, mailbox INTEGER, uid INTEGER, flags INTEGER, modseq INTEGER, octets INTEGER,"
    " received_at REAL, PRIMARY KEY (key, mailbox, uid)) WITHOUT ROWID",
    "CREATE TABLE rebuild_gone (key BLOB, mailbox INTEGER, from_all INTEGER, PRIMARY KEY (key, mailbox)) WITHOUT ROWID",
    "CREATE TABLE rebuild_open (key BLOB, state INTEGER, destination TEXT, PRIMARY KEY (key, state, destination))"
    " WITHOUT ROWID",
)
_TABLES = ("records", "numbers", "copies", "tombstones", "entries", "gone", "open")


class SqliteRebuilding:
    """`Rebuilding` on SQLite: one connection in one lane. Nothing of it is durable before the end, so nothing is synced."""

    def __init__(self, world: World, path: str) -> None:
        self._world = world
        self._path = path
        self._lane = world.lane("rebuild")
        self._open: sqlite3.Connection | None = None
        self._nodes: list[str] = []  # numbers of nodes in the scratch tables
        self._epoch = 0
        self._uidvalidity = 0

    async def open(self, cluster: str) -> None:
        """Makes the file; nothing may lie under its name. Raises IndexTrouble."""
        await self._run(self._make, cluster)

    def _make(self, cluster: str) -> None:
        self._open = db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, cached_statements=256)
        for pragma in ("journal_mode = MEMORY", "synchronous = OFF", "cache_size = -65536", "locking_mode = EXCLUSIVE"):
            db.execute(f"PRAGMA {pragma}")
        self._in_transaction(self._prepare, cluster)

    def _prepare(self, db: sqlite3.Connection, cluster: str) -> None:
        migration.prepare(db, self._path, cluster, self._world.clock.now())
        for statement in _SCRATCH:
            db.execute(statement)
        self._placements = Sets(db)

    async def _run(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._lane.run(call, *args)
        except sqlite3.Error as error:
            raise IndexTrouble(f"{self._path}: {error}") from error

    async def _write(self, call: Callable[..., T], *args: Any) -> T:
        return await self._run(self._in_transaction, call, *args)

    async def _ask(self, statement: str, *values: Any) -> list[Any]:
        return await self._run(lambda: self._db.execute(statement, values).fetchall())

    @property
    def _db(self) -> sqlite3.Connection:
        if self._open is None:
            raise IndexTrouble(f"{self._path} is closed")
        return self._open

    def _in_transaction(self, call: Callable[..., T], *args: Any) -> T:
        db = self._db
        db.execute("BEGIN")
        try:
            result = call(db, *args)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        return result

    async def _insert(self, statement: str, rows: Sequence[Any]) -> None:
        if rows:
            await self._write(self._in_insert, statement, rows)

    @staticmethod
    def _in_insert(db: sqlite3.Connection, statement: str, rows: Sequence[Any]) -> None:
        db.executemany(statement, rows)

    # -- what the nodes say -------------------------------------------------------------------------------------------

    async def note_records(self, account_records: Sequence[tuple[str, str, RecordPlace]]) -> None:
        await self._insert(
            "INSERT OR REPLACE INTO rebuild_records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(account, mailbox, *record) for account, mailbox, record in account_records],
        )

    async def note_numbers(self, group: str, seen: Sequence[Head]) -> None:
        await self._insert(
            "INSERT INTO rebuild_numbers VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " uid_next = max(uid_next, excluded.uid_next), modseq = max(modseq, excluded.modseq)",
            [(group, *head) for head in seen],
        )

    async def numbers(self, account: str, mailbox: str) -> list[tuple[str, Head]]:
        rows = await self._ask(
            "SELECT * FROM rebuild_numbers WHERE account = ? AND mailbox = ? ORDER BY uidvalidity, epoch, site",
            account,
            mailbox,
        )
        return [(group, Head(*head)) for group, *head in rows]

    async def boxes(self, after: tuple[str, str], limit: int) -> list[tuple[str, str]]:
        return await self._ask(
            "SELECT DISTINCT account, mailbox FROM rebuild_records WHERE (account, mailbox) > (?, ?)"
            " AND account NOT IN (SELECT account FROM purged) ORDER BY account, mailbox LIMIT ?",
            *after,
            limit,
        )

    async def records(self, account: str, mailbox: str) -> list[RecordPlace]:
        rows = await self._ask(
            "SELECT kind, tag, node, name, uidvalidity, base, modseq, rank FROM rebuild_records"
            " WHERE account = ? AND mailbox = ?",
            account,
            mailbox,
        )
        return [RecordPlace(*row) for row in rows]

    async def note_purged(self, accounts: Sequence[str]) -> None:
        await self._insert("INSERT OR IGNORE INTO purged VALUES (?)", [(account,) for account in accounts])

    async def purged(self, accounts: Sequence[str]) -> set[str]:
        def ask() -> set[str]:
            one = "SELECT 1 FROM purged WHERE account = ?"
            return {account for account in set(accounts) if self._db.execute(one, (account,)).fetchone()}

        return await self._run(ask)

    async def note_open(self, state: int, rows: Sequence[tuple[bytes, str]]) -> None:
        await self._insert("INSERT OR IGNORE INTO rebuild_open VALUES (?, ?, ?)", [(key, state, to) for key, to in rows])

    async def note_copies(self, node: str, copies: Sequence[tuple[bytes, bool, int]]) -> None:
        number = self._number(node)
        rows = [(key, number, int(old), settled) for key, old, settled in copies]
        await self._insert("INSERT OR REPLACE INTO rebuild_copies VALUES (?, ?, ?, ?)", rows)

    async def note_tombstones(self, node: str, keys: Sequence[bytes]) -> None:
        await self._insert("INSERT OR IGNORE INTO rebuild_tombstones VALUES (?)", [(key,) for key in keys])

    def _number(self, node: str) -> int:
        if node not in self._nodes:
            self._nodes.append(node)
        return self._nodes.index(node)

    # -- mailboxes ----------------------------------------------------------------------------------------------------

    async def begin_numbers(self, epoch: int, uidvalidity: int) -> None:
        self._epoch, self._uidvalidity = epoch, uidvalidity

    async def put_mailbox(
        self, account: str, name: str, numbers: Numbers, keywords: dict[str, int], entries: Iterable[Entry],
        gone: Iterable[tuple[bytes, bool]],
    ) -> None:  # fmt: skip
        def put(db: sqlite3.Connection) -> None:
            mine, rows = numbers, entries
            if not mine.uidvalidity or self._spent(mine):
                # law 11: nothing is known, or UIDs run short: a fresh UIDVALIDITY, under which UIDs begin anew.
                rows = list(entries)
                count = len(rows)
                rows = [(uid, *entry[1:]) for uid, entry in enumerate(rows, 1)]
                modseq = mine.modseq + limits.EPOCH_JUMP * max(1, self._epoch - mine.epoch)
                mine = Numbers(count + 1, modseq, self._fresh(), self._epoch, 0, count + 1, modseq)
            mailbox = self._mailbox_row(db, account, name, mine)
            db.executemany(
                "INSERT INTO rebuild_entries VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((key, mailbox, uid, flags, modseq, octets, at) for uid, key, flags, modseq, octets, at in rows),
            )
            db.executemany(
                "INSERT OR IGNORE INTO rebuild_gone VALUES (?, ?, ?)", ((key, mailbox, int(left)) for key, left in gone)
            )
            db.executemany(
                "INSERT OR IGNORE INTO keywords VALUES (?, ?, ?)", [(mailbox, bit, word) for word, bit in keywords.items()]
            )

        await self._write(put)

    def _spent(self, numbers: Numbers) -> bool:
        return numbers.uid_next + limits.EPOCH_JUMP * (self._epoch - numbers.epoch) > _UID_ROOM_BELOW

    def _fresh(self) -> int:
        self._uidvalidity = laws.fresh_uidvalidity(self._uidvalidity, self._world.clock.now())
        return self._uidvalidity

    def _mailbox_row(self, db: sqlite3.Connection, account: str, name: str, n: Numbers) -> int:
        # Nobody knows who holds the checkpoints that it was made from.
        row = db.execute(
            "INSERT INTO mailboxes (account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq,"
            " messages, octets, due_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, ?) RETURNING id",
            (account, name, n.uidvalidity, n.uid_next, n.modseq, n.epoch, n.start, n.base_uid, n.base_modseq, laws.LOST_DUE),
        ).fetchone()
        return int(row[0])

    def _take_uids(self, db: sqlite3.Connection, target: Target, count: int) -> tuple[int, int, int]:
        """(mailbox, first UID, first MODSEQ) of `count` new entries; the mailbox is made if there was no checkpoint of it."""
        select = "SELECT id, uid_next, modseq, uidvalidity, epoch, start, base_uid, base_modseq FROM mailboxes"
        where = f"{select} WHERE account = ? AND name = ?"
        row = db.execute(where, (target.account, target.mailbox)).fetchone()
        if row is None:
            mailbox, numbers = 0, Numbers(1, 1, self._fresh(), self._epoch, 0, 1, 1)
            mailbox = self._mailbox_row(db, target.account, target.mailbox, numbers)
        else:
            mailbox, numbers = row[0], Numbers(*row[1:])
        try:
            numbers = laws.renumbered(numbers, self._epoch, 0, 0, count)  # laws 10, 11
        except laws.NumbersSpent:  # a fresh UIDVALIDITY makes all numbers new
            numbers = numbers._replace(uidvalidity=self._fresh(), base_uid=numbers.uid_next, base_modseq=numbers.modseq)
        assert numbers.uidvalidity, "`put_mailbox` left room for the leap"
        db.execute(
            "UPDATE mailboxes SET uid_next = ?, modseq = ?, uidvalidity = ?, epoch = ?, start = ?, base_uid = ?,"
            " base_modseq = ? WHERE id = ?",
            (
                numbers.uid_next + count,
                numbers.modseq + count,
                numbers.uidvalidity,
                numbers.epoch,
                numbers.start,
                numbers.base_uid,
                numbers.base_modseq,
                mailbox,
            ),
        )
        return mailbox, numbers.uid_next, numbers.modseq + 1

    # -- deciding -----------------------------------------------------------------------------------------------------

    async def total(self) -> int:
        return int((await self._ask("SELECT count(DISTINCT key) FROM rebuild_copies"))[0][0])

    async def found(self, after: bytes, limit: int) -> list[Found]:
        return await self._run(self._found, after, limit)

    def _found(self, after: bytes, limit: int) -> list[Found]:
        db = self._db
        keys = [
            row[0]
            for row in db.execute("SELECT DISTINCT key FROM rebuild_copies WHERE key > ? ORDER BY key LIMIT ?", (after, limit))
        ]
        if not keys:
            return []
        span = (after, keys[-1])
        copies = _by_key(db, "SELECT key, node, old, settled FROM rebuild_copies WHERE key > ? AND key <= ?", span)
        dead = _by_key(db, "SELECT key FROM rebuild_tombstones WHERE key > ? AND key <= ?", span)
        shown = _by_key(
            db,
            "SELECT e.key, m.account, m.name FROM rebuild_entries e JOIN mailboxes m ON m.id = e.mailbox"
            " WHERE e.key > ? AND e.key <= ?",
            span,
        )
        gone = _by_key(
            db,
            "SELECT g.key, m.account, m.name, g.from_all FROM rebuild_gone g JOIN mailboxes m ON m.id = g.mailbox"
            " WHERE g.key > ? AND g.key <= ?",
            span,
        )
        waiting = _by_key(db, "SELECT key, state, destination FROM rebuild_open WHERE key > ? AND key <= ?", span)
        found = []
        for key in keys:
            settled = 0
            for _, _, bits in copies[key]:
                settled |= bits
            found.append(
                Found(
                    key=key,
                    nodes=tuple(self._nodes[number] for number, _, _ in copies[key]),
                    buried=key in dead,
                    old=all(old for _, old, _ in copies[key]),
                    settled=settled,
                    shown=tuple(shown.get(key, ())),
                    gone=tuple((account, name, bool(left)) for account, name, left in gone.get(key, ())),
                    open=frozenset(waiting.get(key, ())),
                )
            )
        return found

    async def settle(self, verdicts: Sequence[Verdict]) -> Settled:
        return await self._write(self._settle, verdicts)

    def _settle(self, db: sqlite3.Connection, verdicts: Sequence[Verdict]) -> Settled:
        held = entries = 0
        new: list[tuple[Target, Verdict]] = []
        for verdict in verdicts:
            key, commit = verdict.key, verdict.commit
            if verdict.fate is Fate.DEAD:
                self._bury(db, key, verdict.nodes)
            if verdict.fate is not Fate.LIVE or commit is None:
                continue
            kept = db.execute(
                "INSERT INTO entries SELECT mailbox, uid, key, flags, modseq, octets, received_at FROM rebuild_entries"
                " WHERE key = ?",
                (key,),
            ).rowcount
            # What is named as expunged: the next checkpoints must name it too (law 13).
            db.execute(
                "INSERT INTO gone (mailbox, key, modseq, to_mailbox, to_modseq) SELECT g.mailbox, g.key, b.modseq, 0, 0"
                " FROM rebuild_gone g JOIN mailboxes b ON b.id = g.mailbox WHERE g.key = ?"
                " AND g.mailbox NOT IN (SELECT mailbox FROM rebuild_entries WHERE key = g.key)",
                (key,),
            )
            db.execute("DELETE FROM rebuild_entries WHERE key = ?", (key,))
            rows = [QueueRow.of(0, key, commit, to, True, HELD_BY_REBUILD) for to in verdict.hold]
            insert_many(db, queue_form.INSERT, queue_form.WIDTH, [queue_form.values(row, None) for row in rows])
            until = commit.received_at + limits.RETURN_S
            returns = [(to.reverse_path.lower(), to.original, until) for to in commit.targets if to.original]
            db.executemany(text_of(queue_form.ADD_RETURN), returns)
            new += [(target, verdict) for target in verdict.enter]
            refs = kept + len(verdict.enter) + len(verdict.hold)
            octets, sha256, placement = commit.shown_octets, bytes.fromhex(commit.sha256), self._placements.id(verdict.nodes)
            db.execute(
                "INSERT INTO messages (key, octets, sha256, placement, refs, fate, round) VALUES (?, ?, ?, ?, ?, ?, 0)",
                (key, octets, sha256, placement, refs, int(Fate.LIVE)),
            )
            entries += kept
            held += len(verdict.hold)
        new.sort(key=lambda pair: (pair[0].account, pair[0].mailbox, pair[1].key))
        for _, group in groupby(new, key=lambda pair: (pair[0].account, pair[0].mailbox)):
            self._enter(db, list(group))
        return Settled(entries + len(new), held)

    def _enter(self, db: sqlite3.Connection, arrivals: list[tuple[Target, Verdict]]) -> None:
        mailbox, uid, modseq = self._take_uids(db, arrivals[0][0], len(arrivals))
        rows = []
        for number, (target, verdict) in enumerate(arrivals):
            commit = verdict.commit
            assert commit is not None
            db.execute("DELETE FROM gone WHERE mailbox = ? AND key = ?", (mailbox, verdict.key))
            octets, at = commit.shown_octets, commit.received_at
            rows.append((mailbox, uid + number, verdict.key, target.flags, modseq + number, octets, at))
        db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _bury(self, db: sqlite3.Connection, key: bytes, nodes: Sequence[str]) -> None:
        """Its mailboxes name it until it is forgotten: the tombstones that are ordered now may be long in coming (law 13)."""
        db.execute(
            "INSERT INTO gone (mailbox, key, modseq, to_mailbox, to_modseq) SELECT b.id, ?1, b.modseq, 0, 0 FROM mailboxes b"
            " WHERE b.id IN (SELECT mailbox FROM rebuild_entries WHERE key = ?1"
            " UNION SELECT mailbox FROM rebuild_gone WHERE key = ?1)",
            (key,),
        )
        db.execute("DELETE FROM rebuild_entries WHERE key = ?", (key,))
        db.execute(
            "INSERT INTO messages (key, octets, sha256, placement, refs, fate, round) VALUES (?, 0, x'', ?, 0, ?,"
            " (SELECT value FROM counters WHERE name = 'round'))",
            (key, NO_NODES, int(Fate.DEAD)),
        )
        db.executemany("INSERT OR IGNORE INTO orders (node, key) VALUES (?, ?)", [(node, key) for node in nodes])

    async def bury_on(self, nodes: Sequence[str]) -> None:
        def bury(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR IGNORE INTO messages (key, octets, sha256, placement, refs, fate, round)"
                " SELECT key, 0, x'', ?, 0, ?, (SELECT value FROM counters WHERE name = 'round') FROM rebuild_tombstones",
                (NO_NODES, int(Fate.DEAD)),
            )
            for node in nodes:
                dead = f"SELECT ?, key FROM messages WHERE fate = {int(Fate.DEAD)}"
                db.execute(f"INSERT OR IGNORE INTO orders (node, key) {dead}", (node,))

        await self._write(bury)

    # -- the end --------------------------------------------------------------------------------------------------------

    async def lost(self, limit: int) -> tuple[int, list[LostEntry]]:
        def ask(db: sqlite3.Connection) -> tuple[int, list[LostEntry]]:
            db.execute("DELETE FROM rebuild_entries WHERE key IN (SELECT key FROM rebuild_tombstones)")
            count = int(db.execute("SELECT count(*) FROM rebuild_entries").fetchone()[0])
            rows = db.execute(
                "SELECT m.account, m.name, e.uid, lower(hex(e.key)) FROM rebuild_entries e JOIN mailboxes m ON m.id = e.mailbox"
                " LIMIT ?",
                (limit,),
            )
            return count, [LostEntry(*row) for row in rows]

        return await self._write(ask)

    async def finish(self, nodes: Sequence[NodeRow], sequence: int, retired: Sequence[str]) -> Mark:
        await self._write(self._finish, nodes, sequence, retired)
        await self._run(self._let_go)
        return Mark(sequence, {}, self._epoch, self._uidvalidity, tuple(sorted(retired)))

    def _finish(self, db: sqlite3.Connection, nodes: Sequence[NodeRow], sequence: int, retired: Sequence[str]) -> None:
        db.execute(
            "UPDATE mailboxes SET (messages, octets) = (SELECT count(*), coalesce(sum(octets), 0) FROM entries"
            " WHERE mailbox = mailboxes.id)"
        )
        for row in nodes:
            place = (*row.watermark, *row.end_seen)
            flags = (row.boot, row.scan_round, int(row.owes_walk), int(row.blocked), row.missing_since, int(row.owes_compare))
            db.execute(
                f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.id, row.group, row.incarnation, *place, *flags),
            )
        for name, value in (("epoch", self._epoch), ("uidvalidity", self._uidvalidity), ("sequence", sequence)):
            set_counter(db, name, value)
        db.executemany("INSERT OR IGNORE INTO retired VALUES (?)", [(incarnation,) for incarnation in retired])
        for table in _TABLES:
            db.execute(f"DROP TABLE rebuild_{table}")

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    async def close(self) -> None:
        await self._run(self._let_go)
        self._lane.close()


def _by_key(db: sqlite3.Connection, statement: str, span: tuple[bytes, bytes]) -> dict[bytes, list[Any]]:
    found: dict[bytes, list[Any]] = {}
    for key, *rest in db.execute(statement, span):
        found.setdefault(key, []).append(tuple(rest))
    return found


async def begin(world: World, path: str, cluster: str) -> Rebuilding:
    """A new database at `path`, where nothing lies. Raises IndexTrouble."""
    rebuilding = SqliteRebuilding(world, path)
    try:
        await rebuilding.open(cluster)
    except BaseException:
        await rebuilding.close()
        raise
    return rebuilding
