"""Owns queue rows as SQL: the one list of their columns, by which they are written, read and made again.

The envelope's `body` has no column: who sends reads the message's commit record anyway.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from powermail.index.contract import QueueRow
from powermail.index.sqlite.rows import insert_many
from powermail.mail.envelope import Envelope

_COLUMNS = (
    "key, destination, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, held, last_status,"
    " reverse_path, smtputf8, ret, envid, delay_told"
)
SELECT = f"SELECT id, {_COLUMNS} FROM queue"
_INSERT = f"INSERT INTO queue ({_COLUMNS}, lease_owner, lease_until)"
_WIDTH = 19


def read(values: Sequence[Any]) -> QueueRow:
    """A row that `SELECT` found."""
    number, key, to, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, held, last_status = values[:13]
    reverse_path, smtputf8, ret, envid, delay_told = values[13:]
    return QueueRow(
        number, key, to, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, bool(held), last_status,
        Envelope(reverse_path, "", bool(smtputf8), ret, envid), bool(delay_told),
    )  # fmt: skip


def insert(db: sqlite3.Connection, rows: Sequence[QueueRow]) -> None:
    """Writes rows, leased by nobody; their ids are the table's to give."""
    insert_many(db, _INSERT, _WIDTH, [_values(row) for row in rows])


def _values(row: QueueRow) -> tuple[Any, ...]:
    e = row.envelope
    return (
        row.key, row.destination, row.domain, row.recipient, row.notify, row.orcpt, row.octets, row.created_at, row.due_at,
        row.attempts, int(row.held), row.last_status, e.reverse_path, int(e.smtputf8), e.ret, e.envid, int(row.delay_told),
        "", 0,
    )  # fmt: skip
