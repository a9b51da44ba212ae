"""Owns member nodes and the rounds of forgetting (laws 9, 12)."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base.errors import OperatorError
from powermail.index.contract import NodeRow
from powermail.index.sharing import hand_on_row
from powermail.index.sql.core import LEFT_OUT
from powermail.index.sql.engine import NODE_COLUMNS, Reading, Transaction, Untouched, parts, read_nodes
from powermail.index.sql.membership import MembershipPart
from powermail.index.sql.references import References
from powermail.storage.contract import Position, Unread

_Place = tuple[int, bytes]
_LEFT_ROWS = 5000  # of what an expelled node leaves, removed in one transaction


class NodePart(References, MembershipPart):
    """The part of `index.contract.Copies` about nodes and forgetting."""

    async def node_rows(self) -> list[NodeRow]:
        return await self._ask(read_nodes)

    async def admit_node(
        self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position,
        instead_of: str | None = None,
    ) -> bool:  # fmt: skip
        return await self._write(self._in_admit, node, group, incarnation, boot, watermark, end, instead_of)

    async def _in_admit(
        self, db: Transaction, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position,
        instead_of: str | None,
    ) -> bool | Untouched[bool]:  # fmt: skip
        """The round begins anew, and a walk that was owed is owed by whatever comes in its place (laws 9, 11)."""
        old = await db.member(node)
        if instead_of is not None and instead_of != (old.incarnation if old is not None else ""):
            return Untouched(False)  # law 12: what was seen there is over
        if await db.one("SELECT 1 FROM retired WHERE incarnation = ?", (incarnation,)):
            raise OperatorError(f"node {node}: this disk was expelled; it returns only emptied")  # law 9
        db.stale = True
        if old is not None and old.incarnation == incarnation:  # nothing new but the names
            await db.change("UPDATE nodes SET site = ?, boot = ? WHERE id = ?", (group, boot, node))
            return True
        if old is not None:  # that disk never comes back as it is (law 9)
            await db.change("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (old.incarnation,))
            await self._in_note_move(db, hand_on_row(node, self._world.clock.now()))
        blocked = old is not None and old.blocked
        marks = ", ".join("?" * 13)
        await db.change("DELETE FROM nodes WHERE id = ?", (node,))
        owes_walk = old is not None and old.owes_walk
        await db.change(
            f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ({marks})",
            (node, group, incarnation, *watermark, *end, boot, 0, int(owes_walk), int(blocked), 0.0, 0),
        )
        # Who raises the epoch sets this counter first and looks for nodes then: one of both sees the other (law 11).
        row = await db.one("SELECT value FROM counters WHERE name = 'catching_up' FOR UPDATE")
        if row[0]:
            await db.change("UPDATE nodes SET owes_walk = 1 WHERE id = ?", (node,))
        await db.change(
            "INSERT INTO newcomers VALUES (?, ?) ON CONFLICT (node) DO UPDATE SET incarnation = excluded.incarnation",
            (node, incarnation),
        )
        # Nothing that lies before a new incarnation's birth is ever entered: what could not be read there matters no more.
        await db.change("DELETE FROM unread WHERE node = ?", (node,))
        return True

    async def note_boot(self, node: str, incarnation: str, boots: Sequence[str]) -> None:
        await self._write(self._in_note_boot, node, incarnation, boots)

    async def _in_note_boot(self, db: Transaction, node: str, incarnation: str, boots: Sequence[str]) -> Untouched[None] | None:
        row = await db.member(node)
        if row is None or row.incarnation != incarnation or (row.boot and row.boot not in boots):
            return Untouched(None)  # law 12: a later opening was noted, which an older disk lacks
        await self._in_update(
            db,
            "UPDATE nodes SET boot = ? WHERE id = ?"
            " AND (boot <> '' OR (SELECT value FROM counters WHERE name = 'catching_up') = 0)",  # law 11
            (boots[-1], node),
        )
        return None

    async def note_compared(self, node: str) -> None:
        await self._write(self._in_update, "UPDATE nodes SET owes_compare = 0 WHERE id = ?", (node,))

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        statement = "UPDATE nodes SET blocked = coalesce(?, blocked), missing_since = coalesce(?, missing_since) WHERE id = ?"
        await self._write(self._in_update, statement, (None if blocked is None else int(blocked), missing_since, node))

    async def _in_update(self, db: Transaction, statement: str, values: Sequence[object]) -> None:
        await db.change(statement, values)
        db.stale = True

    async def expel(self, node: str, version: int | None = None) -> bool:
        return await self._write(self._in_expel, node, version)

    async def _in_expel(self, db: Transaction, node: str, version: int | None) -> bool | Untouched[bool]:
        """Its beliefs go with one look at the sets of nodes, not at messages; its incarnation never comes back (law 9)."""
        if not await self._in_end_membership(db, node, version):  # the layout is locked before any node
            return Untouched(False)
        row = await db.member(node)
        if row is not None:
            await db.change("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (row.incarnation,))
            await self._in_note_move(db, hand_on_row(node, self._world.clock.now()))
        await db.placements.expel(node)
        for table in ("unread", "damages", "newcomers"):
            await db.change(f"DELETE FROM {table} WHERE node = ?", (node,))
        await db.change("DELETE FROM nodes WHERE id = ?", (node,))
        db.stale = True
        return True

    async def clear_left(self, node: str) -> None:
        """What was ordered of a node that is no member any more, and suspected there, goes: part by part, because one that was
        away for long has more of it than one transaction is given time for. Forgetting passes it over until then (law 9).
        """
        while await self._write(self._in_clear_left, node):
            pass

    async def _in_clear_left(self, db: Transaction, node: str) -> int | Untouched[int]:
        if await db.member(node) is not None:
            return Untouched(0)
        for table in ("orders", "drops", "suspects"):
            rows = await db.rows(f"SELECT key FROM {table} WHERE node = ? ORDER BY key LIMIT ?", (node, _LEFT_ROWS))
            keys = list(dict.fromkeys(row[0] for row in rows))
            if keys:
                await db.lock_keys(keys)  # what dies takes its suspects along, in whatever order
                await db.change_in(f"DELETE FROM {table} WHERE node = ? AND key IN", keys, (node,))
                return len(keys)
        return Untouched(0)

    async def unread(self, node: str, limit: int) -> list[Unread]:
        return await self._ask(self._unread, node, limit)

    async def _unread(self, db: Reading, node: str, limit: int) -> list[Unread]:
        rows = await db.rows(
            "SELECT segment, place, octets FROM unread WHERE node = ? ORDER BY segment, place LIMIT ?", (node, limit)
        )
        return [Unread(Position(segment, place), octets) for segment, place, octets in rows]

    # -- forgetting ----------------------------------------------------------------------------------------------------

    async def raise_round(self) -> int:
        return await self._write(self._in_raise_round)

    async def _in_raise_round(self, db: Transaction) -> int:
        """Law 10: after a round that was completed since they stopped, slots are left out of marks; when one more was, in which
        every node was told so and compared, they are pruned.
        """
        done = "id <> ? AND round < (SELECT min(scan_round) FROM nodes)"
        row = await db.one("UPDATE counters SET value = value + 1 WHERE name = 'round' RETURNING value")
        number: int = row[0]
        await db.lock_slots()
        await self._in_stop_silent(db)
        await db.change(f"DELETE FROM writers WHERE stopped = {LEFT_OUT} AND {done}", (db.slot.number,))
        await db.change(
            f"UPDATE writers SET stopped = {LEFT_OUT}, round = ? WHERE stopped = 1 AND {done}",
            (number - 1, db.slot.number),
        )
        db.stale = True
        return number

    async def dead_total(self) -> int:
        return await self._ask(self._dead_total)

    async def _dead_total(self, db: Reading) -> int:
        return int((await db.one("SELECT count(*) FROM messages WHERE fate > 1"))[0])

    async def forget(self, limit: int) -> int:
        """As law 9 says; a pass goes on behind the rows it has looked at, so that those that wait for a node cost one look."""
        found, last = await self._ask(self._forgettable, self._forgot, limit)
        if not found and self._forgot != (0, b""):
            found, last = await self._ask(self._forgettable, (0, b""), limit)
        self._forgot = last if len(found) == limit else (0, b"")
        return await self._write(self._in_forget, found) if found else 0

    async def _forgettable(self, db: Reading, after: _Place, limit: int) -> tuple[list[bytes], _Place]:
        rows = await db.rows(
            "SELECT round, key FROM messages m WHERE fate > 1 AND (round, key) > (?, ?)"
            " AND round < (SELECT min(scan_round) FROM nodes)"
            " AND NOT EXISTS (SELECT 1 FROM orders o JOIN nodes n ON n.id = o.node WHERE o.key = m.key)"
            " ORDER BY round, key LIMIT ?",
            (*after, limit),
        )
        return [key for _, key in rows], ((rows[-1][0], rows[-1][1]) if rows else after)

    async def _in_forget(self, db: Transaction, keys: Sequence[bytes]) -> int | Untouched[int]:
        """Law 9, whole: decided before a round that every member was scanned for, nothing ordered, owed or unread."""
        gone: list[bytes] = []
        await db.lock_keys(keys)
        for part in parts(list(keys)):
            marks = ", ".join("?" * len(part))
            rows = await db.rows(
                f"DELETE FROM messages WHERE key IN ({marks}) AND fate > 1 AND round < (SELECT min(scan_round) FROM nodes)"
                " AND NOT EXISTS (SELECT 1 FROM orders o JOIN nodes n ON n.id = o.node WHERE o.key = messages.key)"
                " AND NOT EXISTS (SELECT 1 FROM nodes WHERE owes_walk = 1) AND NOT EXISTS (SELECT 1 FROM unread)"
                " RETURNING key",
                part,
            )
            gone += [row[0] for row in rows]
        gone.sort()
        for table in ("orders", "gone"):  # what is forgotten has tombstones wherever it lay: no checkpoint names it any more
            await db.many(f"DELETE FROM {table} WHERE key = ?", [(key,) for key in gone])
        return len(gone) if gone else Untouched(0)

    async def forgotten(self, keys: Sequence[bytes]) -> list[bytes]:
        return await self._read(self._forgotten, keys)

    async def _forgotten(self, db: Reading, keys: Sequence[bytes]) -> list[bytes]:
        known = {row[0] for row in await db.rows_in("SELECT key FROM messages WHERE key IN", list(keys))}
        return [key for key in keys if key not in known]
