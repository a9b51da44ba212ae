"""Owns which nodes are believed to hold what, on SQLite: messages, fates, beliefs, suspicions, orders and drops (laws 6, 8).

Beliefs are numbered sets of nodes: what lies on too few groups is found by the few sets that span too few, each by key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence

from powermail.index.contract import Damage, DropOrder, Fate, MessageFacts
from powermail.index.sqlite.connection import Untouched
from powermail.index.sqlite.references import References
from powermail.index.sqlite.rows import select_in, split
from powermail.storage.contract import Dropped, End, Position

_FACTS = "m.key, m.octets, m.sha256, p.nodes, m.refs FROM messages m JOIN placements p ON p.id = m.placement"


def placements_where(db: sqlite3.Connection, wanted: Callable[[tuple[str, ...]], bool]) -> list[int]:
    """Numbers of the sets of nodes that are as wanted."""
    return [number for number, nodes in db.execute("SELECT id, nodes FROM placements ORDER BY id") if wanted(split(nodes))]


def _facts(rows: Sequence[tuple[bytes, int, bytes, str, int]]) -> list[MessageFacts]:
    return [MessageFacts(key, octets, sha256, split(nodes), refs) for key, octets, sha256, nodes, refs in rows]


class CopyPart(References):
    """The part of `index.contract.Copies` about copies, on SQLite."""

    async def message(self, key: bytes) -> MessageFacts | None:
        found = await self._ask(self._messages, [key])
        return found[0] if found else None

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        return await self._read(self._messages, keys)

    def _messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        rows = select_in(self._reader, f"SELECT {_FACTS} WHERE m.fate = 1 AND m.key IN", sorted(set(keys)), "ORDER BY m.key")
        return _facts(rows)

    async def fates(self, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        rows = await self._read(select_in, self._reader, "SELECT key, fate FROM messages WHERE key IN", list(keys))
        return {key: Fate(fate) for key, fate in rows}

    # -- belief --------------------------------------------------------------------------------------------------------

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return await self._read(self._copies_on, node, after, limit)

    def _copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        found: list[bytes] = []
        for number in placements_where(self._reader, lambda nodes: node in nodes):
            rows = self._reader.execute(
                "SELECT key FROM messages WHERE fate = 1 AND placement = ? AND key > ? ORDER BY key LIMIT ?",
                (number, after, limit),
            )
            found += [row[0] for row in rows]
        return sorted(found)[:limit]

    async def under_copied(self, groups: Mapping[str, str], required: int, after: bytes, limit: int) -> list[MessageFacts]:
        return await self._read(self._under_copied, groups, required, after, limit)

    def _thin(self, groups: Mapping[str, str], required: int) -> list[int]:
        return placements_where(self._reader, lambda nodes: len({groups[node] for node in nodes if node in groups}) < required)

    def _under_copied(self, groups: Mapping[str, str], required: int, after: bytes, limit: int) -> list[MessageFacts]:
        found: list[MessageFacts] = []
        for number in self._thin(groups, required):
            rows = self._reader.execute(
                f"SELECT {_FACTS} WHERE m.fate = 1 AND m.placement = ? AND m.key > ? ORDER BY m.key LIMIT ?",
                (number, after, limit),
            )
            found += _facts(rows.fetchall())
        return sorted(found)[:limit]

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        return await self._read(self._under_copied_total, groups, required)

    def _under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        messages = octets = 0
        for number in self._thin(groups, required):
            row = self._reader.execute(
                "SELECT count(*), coalesce(sum(octets), 0) FROM messages WHERE fate = 1 AND placement = ?", (number,)
            ).fetchone()
            messages += row[0]
            octets += row[1]
        return messages, octets

    def _is_late(self, node: str, end: End) -> bool:
        """What was found there is of another disk, or older than what the index has seen since (law 8)."""
        row = self._members[node]
        return row.incarnation != end.incarnation or end.position < row.end_seen

    async def believe(self, key: bytes, node: str, end: End) -> bool:
        return await self._write(self._in_believe_repaired, key, node, end)

    def _in_believe_repaired(self, key: bytes, node: str, end: End) -> bool | Untouched[bool]:
        fate = self._in_fates([key]).get(key)
        if fate is None or node not in self._members:
            return Untouched(False)  # reconcile will order a drop (law 6)
        if fate is not Fate.LIVE:
            self._in_order([(node, key)])  # law 8
            return False
        if self._is_late(node, end):
            return Untouched(False)
        self._in_believe(node, [key], True)
        self._db.execute("DELETE FROM suspects WHERE node = ? AND key = ?", (node, key))
        return True

    async def disbelieve(self, node: str, keys: Sequence[bytes]) -> None:
        await self._write(self._in_believe, node, list(keys), False)

    async def note_bad(self, key: bytes, node: str, why: str) -> None:
        await self._write(self._in_note_bad, key, node, why)

    def _in_note_bad(self, key: bytes, node: str, why: str) -> Untouched[None] | None:
        if self._in_fates([key]).get(key) is not Fate.LIVE or node not in self._members:
            return Untouched(None)
        self._in_believe(node, [key], False)
        if not self._db.execute("SELECT 1 FROM suspects WHERE node = ? AND key = ?", (node, key)).fetchone():
            self._db.execute(
                "INSERT INTO damages VALUES (?, 1, ?) ON CONFLICT (node) DO UPDATE SET count = count + 1,"
                " last_at = excluded.last_at",
                (node, self._world.clock.now()),
            )
        self._db.execute(
            "INSERT INTO suspects VALUES (?, ?, ?) ON CONFLICT (node, key) DO UPDATE SET why = excluded.why",
            (node, key, why[:200]),
        )
        return None

    async def damages(self) -> dict[str, Damage]:
        return await self._ask(self._damages)

    def _damages(self) -> dict[str, Damage]:
        return {row[0]: Damage(row[1], row[2]) for row in self._reader.execute("SELECT node, count, last_at FROM damages")}

    async def forget_damages(self, node: str) -> None:
        await self._write(self._in_forget_damages, node)

    def _in_forget_damages(self, node: str) -> None:
        self._db.execute("DELETE FROM damages WHERE node = ?", (node,))

    async def suspects(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return await self._ask(self._keys_of, "suspects", node, after, limit)

    def _keys_of(self, table: str, node: str, after: bytes, limit: int) -> list[bytes]:
        rows = self._reader.execute(
            f"SELECT key FROM {table} WHERE node = ? AND key > ? ORDER BY key LIMIT ?", (node, after, limit)
        )
        return [row[0] for row in rows]

    async def clear_suspect(self, key: bytes, node: str) -> None:
        await self._write(self._in_clear, "DELETE FROM suspects WHERE node = ? AND key = ?", [(node, key)])

    def _in_clear(self, statement: str, values: Sequence[tuple[object, ...]]) -> None:
        self._db.executemany(statement, values)

    # -- orders and drops ----------------------------------------------------------------------------------------------

    async def orders(self, node: str, limit: int) -> list[bytes]:
        return await self._ask(self._keys_of, "orders", node, b"", limit)

    async def confirm_orders(self, node: str, keys: Sequence[bytes], end: End) -> None:
        await self._write(self._in_confirm_orders, node, keys, end)

    def _in_confirm_orders(self, node: str, keys: Sequence[bytes], end: End) -> Untouched[None] | None:
        if not self._in_see(node, end):
            return Untouched(None)
        self._in_clear("DELETE FROM orders WHERE node = ? AND key = ?", [(node, key) for key in keys])
        return None

    def _in_see(self, node: str, end: End) -> bool:
        """Law 12: what was confirmed lies before this end. Nothing is confirmed by another disk: False."""
        row = self._members.get(node)
        if row is None or row.incarnation != end.incarnation:
            return False
        if end.position > row.end_seen:
            self._db.execute("UPDATE nodes SET end_segment = ?, end_place = ? WHERE id = ?", (*end.position, node))
            self._stale = True
        return True

    async def drops(self, node: str, limit: int) -> list[DropOrder]:
        return await self._ask(self._drops, node, limit)

    def _drops(self, node: str, limit: int) -> list[DropOrder]:
        rows = self._reader.execute(
            "SELECT key, segment, place FROM drops WHERE node = ? ORDER BY key, segment, place LIMIT ?", (node, limit)
        )
        return [DropOrder(key, Position(segment, place)) for key, segment, place in rows]

    async def confirm_drops(self, node: str, drops: Sequence[DropOrder], done: Dropped) -> None:
        await self._write(self._in_confirm_drops, node, drops, done)

    def _in_confirm_drops(self, node: str, drops: Sequence[DropOrder], done: Dropped) -> Untouched[None] | None:
        if not self._in_see(node, done.end):
            return Untouched(None)
        statement = "DELETE FROM drops WHERE node = ? AND key = ? AND segment = ? AND place = ?"
        gone = [key for key, position in drops if self._db.execute(statement, (node, key, *position)).rowcount]
        self._in_believe(node, [key for key in gone if key not in done.live], False)  # law 6: the belief goes too
        return None

    async def orders_total(self, node: str) -> tuple[int, int]:
        return await self._read(self._orders_total, node)

    def _orders_total(self, node: str) -> tuple[int, int]:
        totals = [
            self._reader.execute(f"SELECT count(*) FROM {table} WHERE node = ?", (node,)).fetchone()[0]
            for table in ("orders", "drops")
        ]
        return totals[0], totals[1]
