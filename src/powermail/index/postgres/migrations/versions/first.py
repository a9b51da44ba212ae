"""Owns the first version of the tables on PostgreSQL.

They are those of `index.sqlite.schema`, with these differences: ids are random numbers of 63 bits that the writer gives, so
that no sequence is shared; text is compared octet by octet; a writer slot says when it was last used, and what it was used by;
the way from a key to its entries is an index that is always there, because one cannot be made under load by a transaction.
Truths are 0 and 1, as SQLite has them: one text asks both.
"""

from __future__ import annotations

from alembic import op

from powermail.base import limits

revision = "1"
down_revision = None

_TEXT = 'TEXT COLLATE "C" NOT NULL'
_NUMBER = "BIGINT NOT NULL"
_TIME = "DOUBLE PRECISION NOT NULL"
# A mailbox never gets more than JUMP numbers beyond its last durable checkpoint, whoever writes the row (law 11).
_NUMBERS_BOUND = (
    f"CHECK (uid_next <= {limits.UID_MAX + 1} AND uid_next - base_uid <= {limits.EPOCH_JUMP}"
    f" AND modseq - base_modseq <= {limits.EPOCH_JUMP})"
)
# Rows that change all the time keep room in their page for the next version: no index is touched then.
_ROOM = "WITH (fillfactor = 60)"

_TABLES = (
    f"CREATE TABLE meta (name {_TEXT} PRIMARY KEY, value {_TEXT})",
    f"CREATE TABLE counters (name {_TEXT} PRIMARY KEY, value {_NUMBER})",
    f"CREATE TABLE writers (id {_NUMBER} PRIMARY KEY, tag {_TEXT}, count {_NUMBER}, stopped {_NUMBER}, round {_NUMBER},"
    f" used_at {_TIME}) {_ROOM}",
    f"CREATE TABLE retired (incarnation {_TEXT} PRIMARY KEY)",
    f"CREATE TABLE placements (id {_NUMBER} PRIMARY KEY, nodes {_TEXT})",
    f"CREATE TABLE messages (key BYTEA NOT NULL PRIMARY KEY, octets {_NUMBER}, sha256 BYTEA NOT NULL, placement {_NUMBER},"
    f" refs {_NUMBER}, fate {_NUMBER}, round {_NUMBER})",
    "CREATE INDEX messages_live ON messages(placement, key) WHERE fate = 1",
    "CREATE INDEX messages_dead ON messages(round, key) WHERE fate > 1",
    f"CREATE TABLE mailboxes (id {_NUMBER} PRIMARY KEY, account {_TEXT}, name {_TEXT}, uidvalidity {_NUMBER},"
    f" uid_next {_NUMBER}, modseq {_NUMBER},"
    f" epoch {_NUMBER}, start {_NUMBER}, base_uid {_NUMBER}, base_modseq {_NUMBER}, messages {_NUMBER},"
    f" octets {_NUMBER}, due_at {_TIME} DEFAULT 0, checkpoint_modseq {_NUMBER} DEFAULT 0, whole_modseq {_NUMBER} DEFAULT 0,"
    f" whole_uid {_NUMBER} DEFAULT 0, whole_side {_NUMBER} DEFAULT 1, tail_side {_NUMBER} DEFAULT 1,"
    f" holders {_NUMBER} DEFAULT 0, skipped {_NUMBER} DEFAULT 0, UNIQUE (account, name), {_NUMBERS_BOUND}) {_ROOM}",
    "CREATE INDEX mailboxes_due ON mailboxes(due_at, id) WHERE due_at > 0",
    "CREATE INDEX mailboxes_held ON mailboxes(holders, id) WHERE holders > 0",
    f"CREATE TABLE holders (id {_NUMBER} PRIMARY KEY, nodes {_TEXT} UNIQUE)",
    f"CREATE TABLE entries (mailbox {_NUMBER}, uid {_NUMBER}, key BYTEA NOT NULL, flags {_NUMBER}, modseq {_NUMBER},"
    f" octets {_NUMBER}, received_at {_TIME}, PRIMARY KEY (mailbox, uid))",
    "CREATE INDEX entries_by_key ON entries(key)",
    f"CREATE TABLE changes (mailbox {_NUMBER}, modseq {_NUMBER}, op {_NUMBER}, flags {_NUMBER}, uids BYTEA NOT NULL,"
    " PRIMARY KEY (mailbox, modseq))",
    f"CREATE TABLE views (mailbox {_NUMBER}, part {_NUMBER}, modseq {_NUMBER}, uid_next {_NUMBER}, state BYTEA NOT NULL,"
    " PRIMARY KEY (mailbox, part))",
    f"CREATE TABLE keywords (mailbox {_NUMBER}, bit {_NUMBER}, name {_TEXT}, PRIMARY KEY (mailbox, bit))",
    f"CREATE TABLE gone (mailbox {_NUMBER}, key BYTEA NOT NULL, modseq {_NUMBER}, to_mailbox {_NUMBER}, to_modseq {_NUMBER},"
    " PRIMARY KEY (mailbox, key))",
    "CREATE INDEX gone_key ON gone(key)",
    f"CREATE TABLE purged (account {_TEXT} PRIMARY KEY)",
    f"CREATE TABLE owners (account {_TEXT} PRIMARY KEY, address {_TEXT})",
    f"CREATE TABLE queue (id {_NUMBER} PRIMARY KEY, key BYTEA NOT NULL, destination {_TEXT}, domain {_TEXT},"
    f" reverse_path {_TEXT}, recipient {_TEXT}, notify {_TEXT}, orcpt {_TEXT}, envid {_TEXT}, ret {_TEXT},"
    f" smtputf8 {_NUMBER}, octets {_NUMBER}, created_at {_TIME}, due_at {_TIME}, attempts {_NUMBER}, held {_NUMBER},"
    f" last_status {_TEXT}, lease_owner {_TEXT}, lease_until {_TIME}, delay_told {_NUMBER} DEFAULT 0)",
    "CREATE INDEX queue_due ON queue(held, due_at)",
    "CREATE INDEX queue_key ON queue(key)",
    "CREATE INDEX queue_domain ON queue(domain)",
    "CREATE INDEX queue_leased ON queue(lease_owner) WHERE lease_owner <> ''",
    f"CREATE TABLE attempts (queue {_NUMBER}, number {_NUMBER}, at {_TIME}, host {_TEXT}, tls {_TEXT}, seconds {_TIME},"
    f" status {_TEXT}, PRIMARY KEY (queue, number))",
    f"CREATE TABLE held_domains (domain {_TEXT} PRIMARY KEY)",
    f"CREATE TABLE returns (address {_TEXT} PRIMARY KEY, original {_TEXT}, until {_TIME})",
    f"CREATE TABLE orders (node {_TEXT}, key BYTEA NOT NULL, PRIMARY KEY (node, key))",
    "CREATE INDEX orders_key ON orders(key)",
    f"CREATE TABLE drops (node {_TEXT}, key BYTEA NOT NULL, segment {_NUMBER}, place {_NUMBER},"
    " PRIMARY KEY (node, key, segment, place))",
    f"CREATE TABLE suspects (node {_TEXT}, key BYTEA NOT NULL, why {_TEXT}, PRIMARY KEY (node, key))",
    "CREATE INDEX suspects_key ON suspects(key)",
    f"CREATE TABLE damages (node {_TEXT} PRIMARY KEY, count {_NUMBER}, last_at {_TIME})",
    f"CREATE TABLE unread (node {_TEXT}, segment {_NUMBER}, place {_NUMBER}, octets {_NUMBER},"
    " PRIMARY KEY (node, segment, place))",
    f"CREATE TABLE nodes (id {_TEXT} PRIMARY KEY, site {_TEXT}, incarnation {_TEXT}, segment {_NUMBER}, place {_NUMBER},"
    f" end_segment {_NUMBER}, end_place {_NUMBER}, boot {_TEXT}, scan_round {_NUMBER}, owes_walk {_NUMBER}, blocked {_NUMBER},"
    f" missing_since {_TIME}, owes_compare {_NUMBER}) {_ROOM}",
    "INSERT INTO placements VALUES (0, '')",
    "INSERT INTO counters VALUES ('epoch', 1), ('round', 1), ('sequence', 0), ('starts', 0), ('uidvalidity', 0),"
    " ('catching_up', 0), ('waiting', 0)",
)


def upgrade() -> None:
    """Makes them all."""
    for statement in _TABLES:
        op.execute(statement)
