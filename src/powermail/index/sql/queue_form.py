"""Owns queue rows as SQL: the one list of their columns, by which they are written, read and made again.

The envelope's `body` has no column: who sends reads the message's commit record anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powermail.index.contract import QueueRow
from powermail.mail.envelope import Envelope

_COLUMNS = (
    "key, destination, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, held, last_status,"
    " reverse_path, smtputf8, ret, envid, delay_told"
)
SELECT = f"SELECT id, {_COLUMNS} FROM queue"
DUE_AT = 9  # where it stands in a row that SELECT found
INSERT = f"INSERT INTO queue (id, {_COLUMNS}, lease_owner, lease_until)"
WIDTH = 20
ADD_RETURN = (
    "INSERT INTO returns VALUES (?, ?, ?) ON CONFLICT (address) DO UPDATE SET until = greatest(returns.until, excluded.until)"
)


def read(values: Sequence[Any]) -> QueueRow:
    """A row that `SELECT` found."""
    number, key, to, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, held, last_status = values[:13]
    reverse_path, smtputf8, ret, envid, delay_told = values[13:]
    return QueueRow(
        number, key, to, domain, recipient, notify, orcpt, octets, created_at, due_at, attempts, bool(held), last_status,
        Envelope(reverse_path, "", bool(smtputf8), ret, envid), bool(delay_told),
    )  # fmt: skip


def values(row: QueueRow, number: int | None) -> tuple[Any, ...]:
    """What `INSERT` writes: leased by nobody, under `number`, or under one of the table's own giving."""
    e = row.envelope
    return (
        number, row.key, row.destination, row.domain, row.recipient, row.notify, row.orcpt, row.octets, row.created_at,
        row.due_at, row.attempts, int(row.held), row.last_status, e.reverse_path, int(e.smtputf8), e.ret, e.envid,
        int(row.delay_told), "", 0,
    )  # fmt: skip
