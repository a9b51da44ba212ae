"""Owns the tables of the index. The shape was chosen by measurement: docs/decisions/0001-index-shape.md."""

from __future__ import annotations

from powermail.base import limits

VERSION = 1

TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # A set of nodes that hold copies. There are few distinct sets, so a message names its set by number.
    "CREATE TABLE IF NOT EXISTS placements (id INTEGER PRIMARY KEY, nodes TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS messages (key BLOB PRIMARY KEY, octets INTEGER NOT NULL, sha256 BLOB NOT NULL,"
    " placement INTEGER NOT NULL, refs INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS messages_by_placement ON messages(placement, key)",
    "CREATE TABLE IF NOT EXISTS mailboxes (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,"
    " name TEXT NOT NULL, uidvalidity INTEGER NOT NULL, uid_next INTEGER NOT NULL, modseq INTEGER NOT NULL,"
    " epoch INTEGER NOT NULL, messages INTEGER NOT NULL, octets INTEGER NOT NULL,"
    " checkpoint_modseq INTEGER NOT NULL DEFAULT 0, checkpoint_number INTEGER NOT NULL DEFAULT 0,"
    " checkpoint_at REAL NOT NULL DEFAULT 0, checkpoint_rows INTEGER NOT NULL DEFAULT 0,"
    " checkpoint_side INTEGER NOT NULL DEFAULT 0, UNIQUE (account, name))",
    "CREATE TABLE IF NOT EXISTS entries (mailbox INTEGER NOT NULL, uid INTEGER NOT NULL, key BLOB NOT NULL,"
    " flags INTEGER NOT NULL, modseq INTEGER NOT NULL, octets INTEGER NOT NULL, received_at REAL NOT NULL,"
    " PRIMARY KEY (mailbox, uid)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS expunged (mailbox INTEGER NOT NULL, uid INTEGER NOT NULL, modseq INTEGER NOT NULL,"
    " PRIMARY KEY (mailbox, uid)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL,"
    " destination TEXT NOT NULL, domain TEXT NOT NULL, reverse_path TEXT NOT NULL, recipient TEXT NOT NULL,"
    " notify TEXT NOT NULL, orcpt TEXT NOT NULL, envid TEXT NOT NULL, ret TEXT NOT NULL, smtputf8 INTEGER NOT NULL,"
    " octets INTEGER NOT NULL, created_at REAL NOT NULL, due_at REAL NOT NULL, attempts INTEGER NOT NULL,"
    " held INTEGER NOT NULL, last_status TEXT NOT NULL, lease_owner TEXT NOT NULL, lease_until REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS queue_due ON queue(held, due_at)",
    "CREATE INDEX IF NOT EXISTS queue_key ON queue(key)",
    "CREATE INDEX IF NOT EXISTS queue_domain ON queue(domain)",
    # Tombstones that a node has not confirmed yet; a node that is away gets them when it returns (P8).
    "CREATE TABLE IF NOT EXISTS deletions (node TEXT NOT NULL, key BLOB NOT NULL, PRIMARY KEY (node, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS deletions_key ON deletions(key)",
    "CREATE TABLE IF NOT EXISTS aborted (key BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
    # Copies that do not count: bad, or on a node that was given up on while it stored. What dies is deleted there too (P8).
    "CREATE TABLE IF NOT EXISTS suspects (key BLOB NOT NULL, node TEXT NOT NULL, why TEXT NOT NULL,"
    " PRIMARY KEY (key, node)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS nodes (id TEXT PRIMARY KEY, incarnation TEXT NOT NULL, segment INTEGER NOT NULL,"
    " place INTEGER NOT NULL, blocked INTEGER NOT NULL, missing_since REAL NOT NULL) WITHOUT ROWID",
)

# What a delivery does, as one statement: a row of `arrivals` is one recipient's copy, the first row of a message carries its
# `refs`. SQLite then runs a whole batch in one call, in which the interpreter lock is given up once and not once a statement.
# The last row of a statement that is a transaction by itself carries the count of transactions.
# A mailbox last numbered in an older epoch jumps: commits may be lost, and no number is ever given twice (P10).
_JUMPED = f"(epoch < NEW.epoch) * {limits.EPOCH_JUMP}"
ARRIVALS = (
    "CREATE TEMP VIEW arrivals AS SELECT NULL AS key, NULL AS octets, NULL AS sha256, NULL AS placement, NULL AS refs,"
    " NULL AS mailbox, NULL AS flags, NULL AS received_at, NULL AS epoch, NULL AS commits",
    "CREATE TEMP TRIGGER arrive INSTEAD OF INSERT ON arrivals BEGIN"
    " INSERT INTO messages SELECT NEW.key, NEW.octets, NEW.sha256, NEW.placement, NEW.refs WHERE NEW.refs > 0;"
    f" UPDATE mailboxes SET uid_next = uid_next + 1 + {_JUMPED}, modseq = modseq + 1 + {_JUMPED},"
    " messages = messages + 1, octets = octets + NEW.octets, epoch = NEW.epoch WHERE id = NEW.mailbox;"
    " SELECT RAISE(ABORT, 'the mailbox is gone or has used up its UIDs') WHERE NEW.mailbox IS NOT NULL AND NOT EXISTS"
    f" (SELECT 1 FROM mailboxes WHERE id = NEW.mailbox AND uid_next <= {limits.UID_MAX});"
    " INSERT INTO entries SELECT id, uid_next - 1, NEW.key, NEW.flags, modseq, NEW.octets, NEW.received_at"
    " FROM mailboxes WHERE id = NEW.mailbox;"
    " UPDATE meta SET value = NEW.commits WHERE name = 'commits' AND NEW.commits IS NOT NULL; END",
)
