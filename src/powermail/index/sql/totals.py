"""Owns what status and tests ask of the index on SQLite: sizes, and the audit that recounts what can be recounted."""

from __future__ import annotations

from powermail.index.contract import Fate
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Reading
from powermail.index.sql.numbers import read_view

_TOTALS = {
    "mailboxes": "SELECT count(*) FROM mailboxes",
    "entries": "SELECT coalesce(CAST(sum(messages) AS BIGINT), 0) FROM mailboxes",
    "messages": "SELECT count(*) FROM messages WHERE fate = 1",
    "queue": "SELECT count(*) FROM queue",
    "orders": "SELECT count(*) FROM orders",
    "drops": "SELECT count(*) FROM drops",
    "suspects": "SELECT count(*) FROM suspects",
}


class TotalsPart(Core):
    """`totals` and `audit` of `index.contract.Index`."""

    async def totals(self) -> dict[str, int]:
        return await self._read(self._totals)

    async def _totals(self, db: Reading) -> dict[str, int]:
        return {name: int((await db.one(sql))[0]) for name, sql in _TOTALS.items()}

    async def audit(self) -> list[str]:
        return await self._read(_problems)


async def _problems(db: Reading) -> list[str]:
    return [*await _mailboxes(db), *await _references(db), *await _copies(db)]


async def _mailboxes(db: Reading) -> list[str]:
    problems: list[str] = []
    rows = await db.rows(
        "SELECT id, account, name, messages, octets, uid_next, modseq, due_at, checkpoint_modseq FROM mailboxes ORDER BY id"
    )
    for number, account, name, messages, octets, uid_next, modseq, due_at, written in rows:
        what = f"mailbox {account}/{name}"
        entries = await db.rows("SELECT uid, key, octets, modseq FROM entries WHERE mailbox = ? ORDER BY uid", (number,))
        counted = len(entries), sum(row[2] for row in entries)
        if (messages, octets) != counted:
            problems.append(f"{what}: counts {messages}/{octets}, entries {counted[0]}/{counted[1]}")
        if any(uid >= uid_next or mine > modseq for uid, _, _, mine in entries):
            problems.append(f"{what}: UIDNEXT {uid_next} or MODSEQ {modseq} is behind its entries")
        shown = (await read_view(db, number)).rows()
        if [(uid, key) for uid, key, _, _ in entries] != [(uid, key) for uid, key, *_ in shown]:
            problems.append(f"{what}: its view does not show its entries")
        if modseq > written and not due_at:
            problems.append(f"{what}: it changed since its checkpoint, and none is due")
    return problems


async def _references(db: Reading) -> list[str]:
    problems: list[str] = []
    rows = await db.rows(
        "SELECT m.key, m.refs, m.fate, (SELECT count(*) FROM queue q WHERE q.key = m.key) + coalesce(n.found, 0)"
        " FROM messages m LEFT JOIN (SELECT key, count(*) AS found FROM entries GROUP BY key) n ON n.key = m.key"
    )
    for key, refs, fate, count in rows:
        if refs != count or (fate == Fate.LIVE) != (refs > 0):
            problems.append(f"message {key.hex()}: {refs} references, {count} found, {Fate(fate).name}")
    for table in ("entries", "queue"):
        lost = await db.rows(f"SELECT key FROM {table} EXCEPT SELECT key FROM messages")
        problems += [f"message {row[0].hex()}: in {table}, but not known" for row in lost]
    return problems


async def _copies(db: Reading) -> list[str]:
    believed = await db.rows(
        "SELECT m.key FROM messages m LEFT JOIN placements p ON p.id = m.placement"
        " WHERE p.id IS NULL OR (m.fate > 1 AND p.nodes <> '')"
    )
    suspected = await db.rows(
        "SELECT s.key FROM suspects s LEFT JOIN messages m ON m.key = s.key WHERE coalesce(m.fate, 0) <> 1"
    )
    ordered = await db.rows("SELECT o.key, o.node FROM orders o JOIN messages m ON m.key = o.key WHERE m.fate = 1")
    return [
        *(f"message {row[0].hex()}: not live, but believed somewhere" for row in believed),
        *(f"message {row[0].hex()}: not live, but suspected somewhere" for row in suspected),
        *(f"message {row[0].hex()}: live, but a tombstone is ordered on {row[1]}" for row in ordered),
    ]
