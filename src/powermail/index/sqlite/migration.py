"""Owns how a file becomes one of this version: made new, or brought on from the first release in one transaction.

The first release had tables of deletions and of aborted keys where there is now the fate of a key, no groups, no logs' ends,
and repaired copies that do not say so: each node owes one comparison of what it has with the index. Its rows of expunged UIDs
are not needed: nobody held a view.
"""

from __future__ import annotations

import sqlite3

from powermail.base.errors import OperatorError
from powermail.index import laws
from powermail.index.contract import Fate
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import NODE_COLUMNS
from powermail.index.sqlite import schema
from powermail.index.sqlite.rows import make_empty_placement


def prepare(db: sqlite3.Connection, path: str, cluster: str, now: float) -> None:
    """Makes or migrates the tables; inside a transaction. Raises OperatorError, sqlite3.Error."""
    found = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'meta'").fetchone()
    meta = dict(db.execute("SELECT name, value FROM meta").fetchall()) if found else {}
    if "moved" in meta:  # two indexes of one history would give one number twice
        raise OperatorError(
            f"the index {path} was moved to {meta['moved']}, and is what it was then: set index.database, or run"
            " `powermail index move` again if it did not come to its end"
        )
    version = int(meta.get("version", schema.VERSION))
    if version > schema.VERSION:
        raise OperatorError(f"the index {path} was written by a newer version of this program")
    if version == 1:
        _set_aside(db)
    for statement in schema.TABLES:
        db.execute(statement)
    for table, column, kind in schema.ADDED:
        if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
    make_empty_placement(db)
    for name, value in schema.COUNTERS:
        db.execute("INSERT INTO counters VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value))
    if version == 1:
        _from_first(db, meta, now)
    # What leaps (laws 10, 11) leaps from where numbers were given before, also when nothing was given yet.
    db.execute("UPDATE counters SET value = ? WHERE name = 'uidvalidity' AND value = 0", (laws.fresh_uidvalidity(0, now),))
    for name, text in (("version", str(schema.VERSION)), ("cluster", cluster)):
        db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO NOTHING", (name, text))


_REPLACED = ("messages", "mailboxes", "placements", "suspects", "nodes")


def _set_aside(db: sqlite3.Connection) -> None:
    """Tables whose shape is another one now are renamed; their indexes go with the rename, under names of their own."""
    for table in _REPLACED:
        db.execute(f"ALTER TABLE {table} RENAME TO first_{table}")
    db.execute("DROP INDEX IF EXISTS messages_by_placement")


def _from_first(db: sqlite3.Connection, meta: dict[str, str], now: float) -> None:
    db.execute("UPDATE counters SET value = ? WHERE name = 'epoch'", (int(meta["epoch"]),))
    db.execute("UPDATE counters SET value = ? WHERE name = 'uidvalidity'", (int(meta.get("uidvalidity") or 0),))
    catching_up = int(bool(meta.get("catching_up")))
    db.execute("UPDATE counters SET value = ? WHERE name = 'catching_up'", (catching_up,))
    # The first release said nowhere that it stopped in good order: its slot counts as one that did not (law 10).
    db.execute("INSERT INTO writers VALUES (0, 'first', 0, 0, 0)")
    db.execute("INSERT INTO placements SELECT id, nodes FROM first_placements")
    _keys(db)
    db.execute(
        "INSERT INTO mailboxes (id, account, name, uidvalidity, uid_next, modseq, epoch, start, base_uid, base_modseq,"
        " messages, octets, due_at) SELECT id, account, name, uidvalidity, uid_next, modseq, epoch, 0, uid_next, modseq,"
        " messages, octets, ? FROM first_mailboxes",
        (now,),
    )
    db.execute(
        "UPDATE sqlite_sequence SET seq = (SELECT max(seq) FROM sqlite_sequence WHERE name IN ('mailboxes', 'first_mailboxes'))"
        " WHERE name = 'mailboxes'"
    )
    db.execute("INSERT INTO suspects SELECT node, key, why FROM first_suspects")
    db.execute(
        f"INSERT INTO nodes ({NODE_COLUMNS}) SELECT id, '', incarnation, segment, place, segment, place, '', 0, ?,"
        " blocked, missing_since, 1 FROM first_nodes",
        (catching_up,),
    )
    for table in (*(f"first_{name}" for name in _REPLACED), "deletions", "aborted", "expunged"):
        db.execute(f"DROP TABLE {table}")
    db.execute("DELETE FROM meta WHERE name NOT IN ('version', 'cluster')")
    db.execute("UPDATE meta SET value = ? WHERE name = 'version'", (str(schema.VERSION),))


def _keys(db: sqlite3.Connection) -> None:
    """Every key that the first release knew anything of gets its row: live, dead, or aborted with orders for all nodes."""
    live, dead, aborted = int(Fate.LIVE), int(Fate.DEAD), int(Fate.ABORTED)
    db.execute("INSERT INTO messages SELECT key, octets, sha256, placement, refs, ?, 0 FROM first_messages", (live,))
    head = f"INSERT INTO messages SELECT DISTINCT key, 0, x'', {NO_NODES}, 0, ?, 1 FROM"
    db.execute(f"{head} deletions WHERE true ON CONFLICT DO NOTHING", (dead,))
    db.execute(f"{head} aborted WHERE true ON CONFLICT DO NOTHING", (aborted,))
    # A tombstone for a live key would be proof of lost commits (law 6): what was ordered against one copy is compared instead.
    db.execute("INSERT INTO orders SELECT d.node, d.key FROM deletions d JOIN messages m ON m.key = d.key WHERE m.fate > 1")
    db.execute(
        "INSERT INTO orders SELECT n.id, m.key FROM first_nodes n, messages m WHERE m.fate = ? ON CONFLICT DO NOTHING",
        (aborted,),
    )
