"""Owns what status and tests ask of the index on SQLite: sizes, and the audit that recounts what can be recounted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from powermail.index.contract import Fate
from powermail.index.sqlite.connection import Core
from powermail.index.sqlite.numbers import read_view

_TOTALS = {
    "mailboxes": "SELECT count(*) FROM mailboxes",
    "entries": "SELECT coalesce(sum(messages), 0) FROM mailboxes",
    "messages": "SELECT count(*) FROM messages WHERE fate = 1",
    "queue": "SELECT count(*) FROM queue",
    "orders": "SELECT count(*) FROM orders",
    "drops": "SELECT count(*) FROM drops",
    "suspects": "SELECT count(*) FROM suspects",
}


class TotalsPart(Core):
    """`totals` and `audit` of `index.contract.Index` on SQLite."""

    async def totals(self) -> dict[str, int]:
        return await self._read(self._totals)

    def _totals(self) -> dict[str, int]:
        return {name: int(self._reader.execute(sql).fetchone()[0]) for name, sql in _TOTALS.items()}

    async def audit(self) -> list[str]:
        return await self._read(lambda: list(_problems(self._reader)))


def _problems(db: sqlite3.Connection) -> Iterator[str]:
    yield from _mailboxes(db)
    yield from _references(db)
    yield from _copies(db)


def _mailboxes(db: sqlite3.Connection) -> Iterator[str]:
    rows = db.execute("SELECT id, account, name, messages, octets, uid_next, modseq, due_at, checkpoint_modseq FROM mailboxes")
    for number, account, name, messages, octets, uid_next, modseq, due_at, written in rows.fetchall():
        what = f"mailbox {account}/{name}"
        entries = db.execute(
            "SELECT uid, key, octets, modseq FROM entries WHERE mailbox = ? ORDER BY uid", (number,)
        ).fetchall()
        counted = len(entries), sum(row[2] for row in entries)
        if (messages, octets) != counted:
            yield f"{what}: counts {messages}/{octets}, entries {counted[0]}/{counted[1]}"
        if any(uid >= uid_next or mine > modseq for uid, _, _, mine in entries):
            yield f"{what}: UIDNEXT {uid_next} or MODSEQ {modseq} is behind its entries"
        if [(uid, key) for uid, key, _, _ in entries] != [(uid, key) for uid, key, *_ in read_view(db, number).rows()]:
            yield f"{what}: its view does not show its entries"
        if modseq > written and not due_at:
            yield f"{what}: it changed since its checkpoint, and none is due"


def _references(db: sqlite3.Connection) -> Iterator[str]:
    rows = db.execute(
        "SELECT m.key, m.refs, m.fate, (SELECT count(*) FROM queue q WHERE q.key = m.key) + coalesce(n.count, 0)"
        " FROM messages m LEFT JOIN (SELECT key, count(*) AS count FROM entries GROUP BY key) n ON n.key = m.key"
    )
    for key, refs, fate, count in rows:
        if refs != count or (fate == Fate.LIVE) != (refs > 0):
            yield f"message {key.hex()}: {refs} references, {count} found, {Fate(fate).name}"
    for table in ("entries", "queue"):
        for (key,) in db.execute(f"SELECT key FROM {table} EXCEPT SELECT key FROM messages"):
            yield f"message {key.hex()}: in {table}, but not known"


def _copies(db: sqlite3.Connection) -> Iterator[str]:
    for (key,) in db.execute(
        "SELECT m.key FROM messages m LEFT JOIN placements p ON p.id = m.placement"
        " WHERE p.id IS NULL OR (m.fate > 1 AND p.nodes <> '')"
    ):
        yield f"message {key.hex()}: not live, but believed somewhere"
    for (key,) in db.execute(
        "SELECT s.key FROM suspects s LEFT JOIN messages m ON m.key = s.key WHERE coalesce(m.fate, 0) <> 1"
    ):
        yield f"message {key.hex()}: not live, but suspected somewhere"
    for node, key in db.execute("SELECT o.node, o.key FROM orders o JOIN messages m ON m.key = o.key WHERE m.fate = 1"):
        yield f"message {key.hex()}: live, but a tombstone is ordered on {node}"
