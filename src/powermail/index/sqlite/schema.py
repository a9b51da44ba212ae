"""Owns the tables of the index on SQLite, version 2: why each stands, and the statement by which deliveries enter.

The shape was chosen by measurement: docs/decisions/0001-index-shape.md. `messages` holds one row a key, whatever its fate:
the row that says so is the only decider (law 3). Copies are a numbered set of nodes, because there are few distinct sets.
Entries are only inserted and removed; flags change by rows of `changes`, folded into `views` by a merge.
"""

from __future__ import annotations

from powermail.base import limits

VERSION = 2

# A mailbox never gets more than JUMP numbers beyond its last durable checkpoint, whoever writes the row (law 11).
_NUMBERS_BOUND = (
    f"CHECK (uid_next <= {limits.UID_MAX + 1} AND uid_next - base_uid <= {limits.EPOCH_JUMP}"
    f" AND modseq - base_modseq <= {limits.EPOCH_JUMP})"
)

TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # epoch, round, sequence of writer slots, unclean starts, the highest UIDVALIDITY, and whether readers and numbers wait.
    "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    # One row a writing connection; `round` is the one in which it stopped, or in which marks began to leave it out, so that
    # a later one may prune it (law 10).
    "CREATE TABLE IF NOT EXISTS writers (id INTEGER PRIMARY KEY, tag TEXT NOT NULL, count INTEGER NOT NULL,"
    " stopped INTEGER NOT NULL, round INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS retired (incarnation TEXT PRIMARY KEY) WITHOUT ROWID",
    # A number may stand for the same set as another: expulsion takes a node out of all sets at once.
    "CREATE TABLE IF NOT EXISTS placements (id INTEGER PRIMARY KEY, nodes TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS messages (key BLOB PRIMARY KEY, octets INTEGER NOT NULL, sha256 BLOB NOT NULL,"
    " placement INTEGER NOT NULL, refs INTEGER NOT NULL, fate INTEGER NOT NULL, round INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS messages_live ON messages(placement, key) WHERE fate = 1",
    "CREATE INDEX IF NOT EXISTS messages_dead ON messages(round, key) WHERE fate > 1",
    # `base_uid` and `base_modseq`: the last durable checkpoint, or where it began in this epoch. `due_at` 0: no change since.
    # `whole_modseq`, `whole_uid`: where the last whole checkpoint stands, which its tails go on from (law 13).
    "CREATE TABLE IF NOT EXISTS mailboxes (id INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,"
    " name TEXT NOT NULL, uidvalidity INTEGER NOT NULL, uid_next INTEGER NOT NULL, modseq INTEGER NOT NULL,"
    " epoch INTEGER NOT NULL, start INTEGER NOT NULL, base_uid INTEGER NOT NULL, base_modseq INTEGER NOT NULL,"
    " messages INTEGER NOT NULL, octets INTEGER NOT NULL, due_at REAL NOT NULL DEFAULT 0,"
    " checkpoint_modseq INTEGER NOT NULL DEFAULT 0, whole_modseq INTEGER NOT NULL DEFAULT 0,"
    " whole_uid INTEGER NOT NULL DEFAULT 0, whole_side INTEGER NOT NULL DEFAULT 1, tail_side INTEGER NOT NULL DEFAULT 1,"
    f" holders INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, UNIQUE (account, name), {_NUMBERS_BOUND})",
    "CREATE INDEX IF NOT EXISTS mailboxes_due ON mailboxes(due_at, id) WHERE due_at > 0",
    "CREATE INDEX IF NOT EXISTS mailboxes_held ON mailboxes(holders, id) WHERE holders > 0",
    # Sets of nodes on which whole checkpoints and their tails lie; as they were, whoever was expelled since.
    "CREATE TABLE IF NOT EXISTS holders (id INTEGER PRIMARY KEY, nodes TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS entries (mailbox INTEGER NOT NULL, uid INTEGER NOT NULL, key BLOB NOT NULL,"
    " flags INTEGER NOT NULL, modseq INTEGER NOT NULL, octets INTEGER NOT NULL, received_at REAL NOT NULL,"
    " PRIMARY KEY (mailbox, uid)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS changes (mailbox INTEGER NOT NULL, modseq INTEGER NOT NULL, op INTEGER NOT NULL,"
    " flags INTEGER NOT NULL, uids BLOB NOT NULL, PRIMARY KEY (mailbox, modseq)) WITHOUT ROWID",
    # The whole state as of `modseq`; all changes up to it were trimmed. Every part names it.
    "CREATE TABLE IF NOT EXISTS views (mailbox INTEGER NOT NULL, part INTEGER NOT NULL, modseq INTEGER NOT NULL,"
    " uid_next INTEGER NOT NULL, state BLOB NOT NULL, PRIMARY KEY (mailbox, part))",
    "CREATE TABLE IF NOT EXISTS keywords (mailbox INTEGER NOT NULL, bit INTEGER NOT NULL, name TEXT NOT NULL,"
    " PRIMARY KEY (mailbox, bit)) WITHOUT ROWID",
    # Keys expunged from a mailbox, until they are forgotten; where to, if they moved (law 13).
    "CREATE TABLE IF NOT EXISTS gone (mailbox INTEGER NOT NULL, key BLOB NOT NULL, modseq INTEGER NOT NULL,"
    " to_mailbox INTEGER NOT NULL, to_modseq INTEGER NOT NULL, PRIMARY KEY (mailbox, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS gone_key ON gone(key)",
    "CREATE TABLE IF NOT EXISTS purged (account TEXT PRIMARY KEY) WITHOUT ROWID",
    # The address that an account was last known by: an id that the directory gives to another is refused.
    "CREATE TABLE IF NOT EXISTS owners (account TEXT PRIMARY KEY, address TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS queue (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL,"
    " destination TEXT NOT NULL, domain TEXT NOT NULL, reverse_path TEXT NOT NULL, recipient TEXT NOT NULL,"
    " notify TEXT NOT NULL, orcpt TEXT NOT NULL, envid TEXT NOT NULL, ret TEXT NOT NULL, smtputf8 INTEGER NOT NULL,"
    " octets INTEGER NOT NULL, created_at REAL NOT NULL, due_at REAL NOT NULL, attempts INTEGER NOT NULL,"
    " held INTEGER NOT NULL, last_status TEXT NOT NULL, lease_owner TEXT NOT NULL, lease_until REAL NOT NULL,"
    " delay_told INTEGER NOT NULL DEFAULT 0)",
    "CREATE INDEX IF NOT EXISTS queue_due ON queue(held, due_at)",
    "CREATE INDEX IF NOT EXISTS queue_key ON queue(key)",
    "CREATE INDEX IF NOT EXISTS queue_domain ON queue(domain)",
    "CREATE TABLE IF NOT EXISTS attempts (queue INTEGER NOT NULL, number INTEGER NOT NULL, at REAL NOT NULL,"
    " host TEXT NOT NULL, tls TEXT NOT NULL, seconds REAL NOT NULL, status TEXT NOT NULL, PRIMARY KEY (queue, number))"
    " WITHOUT ROWID",
    "DROP TRIGGER IF EXISTS queue_gone",  # whoever deletes a row deletes its attempts
    "CREATE TABLE IF NOT EXISTS held_domains (domain TEXT PRIMARY KEY) WITHOUT ROWID",
    # Senders that a rewritten reverse-path of ours stands for, when it has no room to say so itself.
    "CREATE TABLE IF NOT EXISTS returns (address TEXT PRIMARY KEY, original TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
    # Incarnations that were admitted since the index was last known to be whole (law 11).
    "CREATE TABLE IF NOT EXISTS newcomers (node TEXT PRIMARY KEY, incarnation TEXT NOT NULL) WITHOUT ROWID",
    # What several processes count together, each kind in windows of its own: nothing where one does everything.
    "CREATE TABLE IF NOT EXISTS tallies (kind TEXT NOT NULL, name TEXT NOT NULL, period INTEGER NOT NULL,"
    " count INTEGER NOT NULL, PRIMARY KEY (kind, name)) WITHOUT ROWID",
    # Who does which background job, and until when.
    "CREATE TABLE IF NOT EXISTS leases (job TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
    # Which nodes the cluster has; its version is a counter.
    "CREATE TABLE IF NOT EXISTS layout (id TEXT PRIMARY KEY, failure_group TEXT NOT NULL, address TEXT NOT NULL,"
    " site TEXT NOT NULL, priority INTEGER NOT NULL, state TEXT NOT NULL, told TEXT NOT NULL) WITHOUT ROWID",
    # Copies that a keeper is moving: what is left if its process ends.
    "CREATE TABLE IF NOT EXISTS moves (name TEXT PRIMARY KEY, phase TEXT NOT NULL, total INTEGER NOT NULL,"
    " done INTEGER NOT NULL, began_at REAL NOT NULL, after BLOB NOT NULL, note TEXT NOT NULL) WITHOUT ROWID",
    # Who may join once, as what; of the secret only its SHA-256. `used_at` is NULL until then; `request` is the SHA-256 of what
    # it was used with, which gets the same answer again.
    "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, secret BLOB NOT NULL, identity TEXT NOT NULL, roles TEXT NOT NULL,"
    " site TEXT NOT NULL, priority INTEGER NOT NULL, address TEXT NOT NULL, expires_at REAL NOT NULL, used_at REAL,"
    " request BLOB NOT NULL, answer BLOB NOT NULL, failures INTEGER NOT NULL) WITHOUT ROWID",
    # Who was given a certificate, until when, and since when he is expelled (0: he is not).
    "CREATE TABLE IF NOT EXISTS identities (id TEXT PRIMARY KEY, roles TEXT NOT NULL, ends_at REAL NOT NULL,"
    " expelled_at REAL NOT NULL) WITHOUT ROWID",
    # Tombstones that a node has not confirmed yet; a node that is away gets them when it returns (law 8).
    "CREATE TABLE IF NOT EXISTS orders (node TEXT NOT NULL, key BLOB NOT NULL, PRIMARY KEY (node, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS orders_key ON orders(key)",
    # Copies that a node is to drop, each named by where it was first written (law 6).
    "CREATE TABLE IF NOT EXISTS drops (node TEXT NOT NULL, key BLOB NOT NULL, segment INTEGER NOT NULL,"
    " place INTEGER NOT NULL, PRIMARY KEY (node, key, segment, place)) WITHOUT ROWID",
    # Copies that failed a check: they do not count, but what dies is deleted there too (law 8).
    "CREATE TABLE IF NOT EXISTS suspects (node TEXT NOT NULL, key BLOB NOT NULL, why TEXT NOT NULL,"
    " PRIMARY KEY (node, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS suspects_key ON suspects(key)",
    # A dying disk leaves a trace, also when all of it was repaired.
    "CREATE TABLE IF NOT EXISTS damages (node TEXT PRIMARY KEY, count INTEGER NOT NULL, last_at REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS unread (node TEXT NOT NULL, segment INTEGER NOT NULL, place INTEGER NOT NULL,"
    " octets INTEGER NOT NULL, PRIMARY KEY (node, segment, place)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS nodes (id TEXT PRIMARY KEY, site TEXT NOT NULL, incarnation TEXT NOT NULL,"
    " segment INTEGER NOT NULL, place INTEGER NOT NULL, end_segment INTEGER NOT NULL, end_place INTEGER NOT NULL,"
    " boot TEXT NOT NULL, scan_round INTEGER NOT NULL, owes_walk INTEGER NOT NULL, blocked INTEGER NOT NULL,"
    " missing_since REAL NOT NULL, owes_compare INTEGER NOT NULL) WITHOUT ROWID",
)
ADDED = (("queue", "delay_told", "INTEGER NOT NULL DEFAULT 0"),)  # columns that files of version 2 may lack
COUNTERS = (("epoch", 1), ("round", 1), ("sequence", 0), ("starts", 0), ("uidvalidity", 0), ("catching_up", 0), ("waiting", 0))

# Where the entries of a key are is asked only by a walk that finds tombstones of live messages (law 11): the index is made
# then, and goes when nobody owes a walk, so that deliveries do not pay for it.
ENTRIES_BY_KEY = "CREATE INDEX IF NOT EXISTS entries_by_key ON entries(key)"
DROP_ENTRIES_BY_KEY = "DROP INDEX IF EXISTS entries_by_key"


def arrivals(epoch: int, start: int, slot: int, tag: str) -> tuple[str, ...]:
    """What a delivery does, as one statement: a row of `arrivals` is one recipient's copy, the first row of a message carries
    its `refs`. SQLite then runs a whole batch in one call, in which the interpreter lock is given up once and not once a
    statement. The last row of a statement that is a transaction by itself raises the writer slot's count to `count` (law 10).

    A mailbox that was not numbered in this epoch since this start must be renumbered first: it aborts here (laws 10, 11).
    """
    assert tag.isalnum()
    return (
        "DROP VIEW IF EXISTS temp.arrivals",
        "CREATE TEMP VIEW arrivals AS SELECT NULL AS key, NULL AS octets, NULL AS sha256, NULL AS placement, NULL AS refs,"
        " NULL AS mailbox, NULL AS flags, NULL AS received_at, NULL AS due_at, NULL AS count",
        "CREATE TEMP TRIGGER arrive INSTEAD OF INSERT ON arrivals BEGIN"
        " INSERT INTO messages SELECT NEW.key, NEW.octets, NEW.sha256, NEW.placement, NEW.refs, 1, 0 WHERE NEW.refs > 0;"
        " UPDATE mailboxes SET uid_next = uid_next + 1, modseq = modseq + 1, messages = messages + 1,"
        f" octets = octets + NEW.octets WHERE id = NEW.mailbox AND epoch = {epoch} AND start = {start};"
        " SELECT RAISE(ABORT, 'the mailbox is gone or must be renumbered') WHERE NEW.mailbox IS NOT NULL AND changes() = 0;"
        " INSERT INTO entries SELECT id, uid_next - 1, NEW.key, NEW.flags, modseq, NEW.octets, NEW.received_at"
        " FROM mailboxes WHERE id = NEW.mailbox;"
        " UPDATE mailboxes SET due_at = NEW.due_at WHERE id = NEW.mailbox AND NEW.due_at IS NOT NULL AND due_at = 0;"
        f" UPDATE writers SET count = NEW.count, stopped = 0 WHERE NEW.count IS NOT NULL AND id = {slot} AND tag = '{tag}'"
        " AND count = NEW.count - 1;"
        " SELECT RAISE(ABORT, 'the writer slot is not what it was') WHERE NEW.count IS NOT NULL AND changes() = 0; END",
    )
