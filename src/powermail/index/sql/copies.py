"""Owns which nodes are believed to hold what: messages, fates, beliefs, suspicions, orders and drops (laws 6, 8).

Beliefs are numbered sets of nodes: what lies on too few groups is found by the few sets that span too few, each by key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from powermail.index.contract import Damage, DropOrder, Fate, MessageFacts
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import Again, Reading, Transaction, Untouched, split
from powermail.index.sql.references import References, is_late
from powermail.storage.contract import Dropped, End, Position, Receipt

_FACTS = "m.key, m.octets, m.sha256, p.nodes, m.refs FROM messages m JOIN placements p ON p.id = m.placement"


async def placements_where(db: Reading, wanted: Callable[[tuple[str, ...]], bool]) -> list[int]:
    """Numbers of the sets of nodes that are as wanted."""
    return [number for number, nodes in await db.rows("SELECT id, nodes FROM placements ORDER BY id") if wanted(split(nodes))]


def _facts(rows: Sequence[tuple[bytes, int, bytes, str, int]]) -> list[MessageFacts]:
    return [MessageFacts(key, octets, sha256, split(nodes), refs) for key, octets, sha256, nodes, refs in rows]


class CopyPart(References):
    """The part of `index.contract.Copies` about copies."""

    async def message(self, key: bytes) -> MessageFacts | None:
        found = await self._ask(self._messages, [key])
        return found[0] if found else None

    async def messages(self, keys: Sequence[bytes]) -> list[MessageFacts]:
        return await self._read(self._messages, keys)

    async def _messages(self, db: Reading, keys: Sequence[bytes]) -> list[MessageFacts]:
        rows = await db.rows_in(f"SELECT {_FACTS} WHERE m.fate = 1 AND m.key IN", sorted(set(keys)), "ORDER BY m.key")
        return _facts(rows)

    async def fates(self, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        return await self._read(self._fates, list(keys))

    async def _fates(self, db: Reading, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        return {key: Fate(fate) for key, fate in await db.rows_in("SELECT key, fate FROM messages WHERE key IN", keys)}

    # -- deciding against ----------------------------------------------------------------------------------------------

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate:
        return await self._write(self._in_abort, key, asked)

    async def _in_abort(self, db: Transaction, key: bytes, asked: Sequence[str]) -> Fate | Untouched[Fate]:
        """Meets deliveries on one row (laws 3, 4)."""
        await db.change(
            "INSERT INTO messages VALUES (?, 0, ?, ?, 0, ?, (SELECT value FROM counters WHERE name = 'round'))"
            " ON CONFLICT (key) DO NOTHING",
            (key, b"", NO_NODES, int(Fate.ABORTED)),
        )
        fate = (await self._in_fates(db, [key])).get(key)
        if fate is None:
            raise Again("a key was forgotten meanwhile")
        if fate is not Fate.ABORTED:
            return Untouched(fate)
        await self._in_order(db, [(node, key) for node in asked])  # law 5: nodes are told only after this was decided
        return fate

    # -- belief --------------------------------------------------------------------------------------------------------

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return await self._read(self._copies_on, node, after, limit)

    async def _copies_on(self, db: Reading, node: str, after: bytes, limit: int) -> list[bytes]:
        found: list[bytes] = []
        for number in await placements_where(db, lambda nodes: node in nodes):
            rows = await db.rows(
                "SELECT key FROM messages WHERE fate = 1 AND placement = ? AND key > ? ORDER BY key LIMIT ?",
                (number, after, limit),
            )
            found += [row[0] for row in rows]
        return sorted(found)[:limit]

    async def under_copied(
        self, groups: Mapping[str, str], required: int, after: bytes, limit: int, least: int = 0
    ) -> list[MessageFacts]:
        return await self._read(self._under_copied, groups, required, after, limit, least)

    async def _thin(self, db: Reading, groups: Mapping[str, str], required: int, least: int) -> list[int]:
        return await placements_where(
            db, lambda nodes: least <= len({groups[node] for node in nodes if node in groups}) < required
        )

    async def _under_copied(
        self, db: Reading, groups: Mapping[str, str], required: int, after: bytes, limit: int, least: int
    ) -> list[MessageFacts]:
        found: list[MessageFacts] = []
        for number in await self._thin(db, groups, required, least):
            rows = await db.rows(
                f"SELECT {_FACTS} WHERE m.fate = 1 AND m.placement = ? AND m.key > ? ORDER BY m.key LIMIT ?",
                (number, after, limit),
            )
            found += _facts(rows)
        return sorted(found)[:limit]

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        return await self._read(self._under_copied_total, groups, required)

    async def _under_copied_total(self, db: Reading, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        messages = octets = 0
        for number in await self._thin(db, groups, required, 0):
            row = await db.one(
                "SELECT count(*), coalesce(CAST(sum(octets) AS BIGINT), 0) FROM messages WHERE fate = 1 AND placement = ?",
                (number,),
            )
            messages += row[0]
            octets += row[1]
        return messages, octets

    async def believe(self, keys: Sequence[bytes], node: str, end: End) -> list[bytes]:
        return await self._write(self._in_believe_repaired, keys, node, end)

    async def _in_believe_repaired(
        self, db: Transaction, keys: Sequence[bytes], node: str, end: End
    ) -> list[bytes] | Untouched[list[bytes]]:
        row = await db.member(node)
        fates = await self._in_fates(db, keys)  # for a key without one reconcile will order a drop (law 6)
        if row is None:
            return Untouched([])
        died = sorted(key for key, fate in fates.items() if fate is not Fate.LIVE)
        await self._in_order(db, [(node, key) for key in died])  # law 8
        live = [] if is_late(row, end) else sorted(key for key, fate in fates.items() if fate is Fate.LIVE)
        if live:
            await self._in_believe(db, node, live, True)
            await db.change_in("DELETE FROM suspects WHERE node = ? AND key IN", live, before=(node,))
        return live if live or died else Untouched(live)

    async def let_go(self, key: bytes, copy: Receipt, end: Position, groups: Mapping[str, str], required: int) -> bool:
        return await self._write(self._in_let_go, key, copy, end, groups, required)

    async def _in_let_go(
        self, db: Transaction, key: bytes, copy: Receipt, end: Position, groups: Mapping[str, str], required: int
    ) -> bool | Untouched[bool]:
        member = await db.member(copy.node)
        await db.lock_keys([key])
        row = await db.one("SELECT placement FROM messages WHERE key = ? AND fate = 1", (key,))
        if row is None or member is None or is_late(member, End(copy.incarnation, end)):
            return Untouched(False)
        nodes = await db.placements.nodes(row[0])
        others = {groups[node] for node in nodes if node != copy.node and node in groups}
        if copy.node not in nodes or len(others) < required:
            return Untouched(False)
        await self._in_believe(db, copy.node, [key], False)
        await self._in_drop(db, copy.node, [(key, copy.position)])
        return True

    async def disbelieve(self, node: str, keys: Sequence[bytes], end: End) -> bool:
        return await self._write(self._in_disbelieve, node, keys, end)

    async def _in_disbelieve(self, db: Transaction, node: str, keys: Sequence[bytes], end: End) -> bool | Untouched[bool]:
        """Law 8: a copy that was made since would be without a belief, and get no tombstone when its message dies."""
        row = await db.member(node)
        if row is None or row.incarnation != end.incarnation:
            return Untouched(False)
        changed = await self._in_believe(db, node, keys, False)
        return Untouched(not changed) if not changed or is_late(row, end) else True

    async def note_bad(self, key: bytes, node: str, why: str) -> None:
        await self._write(self._in_note_bad, key, node, why)

    async def _in_note_bad(self, db: Transaction, key: bytes, node: str, why: str) -> Untouched[None] | None:
        if await db.member(node) is None or (await self._in_fates(db, [key])).get(key) is not Fate.LIVE:
            return Untouched(None)
        await self._in_believe(db, node, [key], False)
        if not await db.one("SELECT 1 FROM suspects WHERE node = ? AND key = ?", (node, key)):
            await db.change(
                "INSERT INTO damages VALUES (?, 1, ?) ON CONFLICT (node) DO UPDATE SET count = damages.count + 1,"
                " last_at = excluded.last_at",
                (node, self._world.clock.now()),
            )
        await db.change(
            "INSERT INTO suspects VALUES (?, ?, ?) ON CONFLICT (node, key) DO UPDATE SET why = excluded.why",
            (node, key, why[:200]),
        )
        return None

    async def damages(self) -> dict[str, Damage]:
        return await self._ask(self._damages)

    async def _damages(self, db: Reading) -> dict[str, Damage]:
        return {row[0]: Damage(row[1], row[2]) for row in await db.rows("SELECT node, count, last_at FROM damages")}

    async def forget_damages(self, node: str) -> None:
        await self._write(self._in_forget_damages, node)

    async def _in_forget_damages(self, db: Transaction, node: str) -> None:
        await db.change("DELETE FROM damages WHERE node = ?", (node,))

    async def suspects(self, node: str, after: bytes, limit: int) -> list[bytes]:
        return await self._ask(self._keys_of, "suspects", node, after, limit)

    async def _keys_of(self, db: Reading, table: str, node: str, after: bytes, limit: int) -> list[bytes]:
        rows = await db.rows(f"SELECT key FROM {table} WHERE node = ? AND key > ? ORDER BY key LIMIT ?", (node, after, limit))
        return [row[0] for row in rows]

    async def clear_suspect(self, key: bytes, node: str, end: End) -> None:
        await self._write(self._in_clear_suspect, key, node, end)

    async def _in_clear_suspect(self, db: Transaction, key: bytes, node: str, end: End) -> Untouched[None] | None:
        row = await db.member(node)
        if row is None or is_late(row, end):  # law 8: there may be a copy by now
            return Untouched(None)
        await db.change("DELETE FROM suspects WHERE node = ? AND key = ?", (node, key))
        return None

    async def _in_clear(self, db: Transaction, statement: str, values: Sequence[tuple[object, ...]]) -> None:
        await db.many(statement, values)

    # -- orders and drops ----------------------------------------------------------------------------------------------

    async def orders(self, node: str, limit: int) -> list[bytes]:
        return await self._ask(self._keys_of, "orders", node, b"", limit)

    async def confirm_orders(self, node: str, keys: Sequence[bytes], end: End) -> None:
        await self._write(self._in_confirm_orders, node, keys, end)

    async def _in_confirm_orders(self, db: Transaction, node: str, keys: Sequence[bytes], end: End) -> Untouched[None] | None:
        if not await self._in_see(db, node, end):
            return Untouched(None)
        await self._in_clear(db, "DELETE FROM orders WHERE node = ? AND key = ?", [(node, key) for key in keys])
        return None

    async def _in_see(self, db: Transaction, node: str, end: End) -> bool:
        """Law 12: what was confirmed lies before this end. Nothing is confirmed by another disk: False."""
        row = await db.member(node)
        if row is None or row.incarnation != end.incarnation:
            return False
        if end.position > row.end_seen:
            await db.change("UPDATE nodes SET end_segment = ?, end_place = ? WHERE id = ?", (*end.position, node))
            db.stale = True
        return True

    async def drops(self, node: str, limit: int) -> list[DropOrder]:
        return await self._ask(self._drops, node, limit)

    async def _drops(self, db: Reading, node: str, limit: int) -> list[DropOrder]:
        rows = await db.rows(
            "SELECT key, segment, place FROM drops WHERE node = ? ORDER BY key, segment, place LIMIT ?", (node, limit)
        )
        return [DropOrder(key, Position(segment, place)) for key, segment, place in rows]

    async def confirm_drops(self, node: str, drops: Sequence[DropOrder], done: Dropped) -> None:
        await self._write(self._in_confirm_drops, node, drops, done)

    async def _in_confirm_drops(
        self, db: Transaction, node: str, drops: Sequence[DropOrder], done: Dropped
    ) -> Untouched[None] | None:
        row = await db.member(node)
        if row is None or not await self._in_see(db, node, done.end):
            return Untouched(None)
        statement = "DELETE FROM drops WHERE node = ? AND key = ? AND segment = ? AND place = ?"
        gone = [key for key, position in drops if await db.change(statement, (node, key, *position))]
        ended = await self._in_believe(db, node, [key for key in gone if key not in done.live], False)  # law 6
        if ended and is_late(row, done.end):
            return Untouched(None)  # law 8: another copy may have been made since
        return None

    async def orders_total(self, node: str) -> tuple[int, int]:
        return await self._read(self._orders_total, node)

    async def _orders_total(self, db: Reading, node: str) -> tuple[int, int]:
        totals = [(await db.one(f"SELECT count(*) FROM {table} WHERE node = ?", (node,)))[0] for table in ("orders", "drops")]
        return totals[0], totals[1]
