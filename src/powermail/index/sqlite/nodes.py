"""Owns member nodes and the rounds of forgetting, on SQLite (laws 9, 12)."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base.errors import OperatorError
from powermail.base.world import World
from powermail.index.contract import NodeRow
from powermail.index.sqlite import schema
from powermail.index.sqlite.connection import Untouched, read_nodes
from powermail.index.sqlite.references import References
from powermail.index.sqlite.rows import parts, select_in
from powermail.index.sqlite.schema import NODE_COLUMNS
from powermail.storage.contract import Position, Unread

_Place = tuple[int, bytes]


class NodePart(References):
    """The part of `index.contract.Copies` about nodes and forgetting, on SQLite."""

    def __init__(self, world: World, path: str) -> None:
        super().__init__(world, path)
        self._forgot: _Place = (0, b"")  # (round, key) up to which this pass has looked

    async def node_rows(self) -> list[NodeRow]:
        return await self._read(read_nodes, self._reader)

    async def admit_node(self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position) -> None:
        await self._write(self._in_admit, node, group, incarnation, boot, watermark, end)

    def _in_admit(self, node: str, group: str, incarnation: str, boot: str, watermark: Position, end: Position) -> None:
        """The round begins anew, and a walk that was owed is owed by whatever comes in its place (laws 9, 11)."""
        db, old = self._db, self._members.get(node)
        if db.execute("SELECT 1 FROM retired WHERE incarnation = ?", (incarnation,)).fetchone():
            raise OperatorError(f"node {node}: this disk was expelled; it returns only emptied")  # law 9
        self._stale = True
        if old is not None and old.incarnation == incarnation:  # nothing new but the names
            db.execute("UPDATE nodes SET site = ?, boot = ? WHERE id = ?", (group, boot, node))
            return
        if old is not None:  # that disk never comes back as it is (law 9)
            db.execute("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (old.incarnation,))
        owes_walk = self.catching_up or (old is not None and old.owes_walk)
        blocked = old is not None and old.blocked
        marks = ", ".join("?" * 13)
        db.execute("DELETE FROM nodes WHERE id = ?", (node,))
        db.execute(
            f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ({marks})",
            (node, group, incarnation, *watermark, *end, boot, 0, int(owes_walk), int(blocked), 0.0, 0),
        )
        # Nothing that lies before a new incarnation's birth is ever entered: what could not be read there matters no more.
        db.execute("DELETE FROM unread WHERE node = ?", (node,))

    async def note_boot(self, node: str, incarnation: str, boot: str) -> None:
        await self._write(
            self._in_update, "UPDATE nodes SET boot = ? WHERE id = ? AND incarnation = ?", (boot, node, incarnation)
        )

    async def note_compared(self, node: str) -> None:
        await self._write(self._in_update, "UPDATE nodes SET owes_compare = 0 WHERE id = ?", (node,))

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        statement = "UPDATE nodes SET blocked = coalesce(?, blocked), missing_since = coalesce(?, missing_since) WHERE id = ?"
        await self._write(self._in_update, statement, (None if blocked is None else int(blocked), missing_since, node))

    def _in_update(self, statement: str, values: Sequence[object]) -> None:
        self._db.execute(statement, values)
        self._stale = True

    async def expel(self, node: str) -> None:
        await self._write(self._in_expel, node)

    def _in_expel(self, node: str) -> None:
        """Its beliefs go with one look at the sets of nodes, not at messages; its incarnation never comes back (law 9)."""
        db = self._db
        row = self._members.get(node)
        if row is not None:
            db.execute("INSERT INTO retired VALUES (?) ON CONFLICT DO NOTHING", (row.incarnation,))
        self._placements.expel(node)
        for table in ("orders", "drops", "suspects", "unread", "damages"):
            db.execute(f"DELETE FROM {table} WHERE node = ?", (node,))
        db.execute("DELETE FROM nodes WHERE id = ?", (node,))
        self._sets.clear()
        self._stale = True

    async def unread(self, node: str, limit: int) -> list[Unread]:
        return await self._ask(self._unread, node, limit)

    def _unread(self, node: str, limit: int) -> list[Unread]:
        rows = self._reader.execute(
            "SELECT segment, place, octets FROM unread WHERE node = ? ORDER BY segment, place LIMIT ?", (node, limit)
        )
        return [Unread(Position(segment, place), octets) for segment, place, octets in rows]

    async def clear_unread(self, node: str, unread: Unread) -> None:
        await self._write(
            self._in_update,
            "DELETE FROM unread WHERE node = ? AND segment = ? AND place = ? AND octets = ?",
            (node, *unread.position, unread.octets),
        )

    # -- forgetting ----------------------------------------------------------------------------------------------------

    async def raise_round(self) -> int:
        return await self._write(self._in_raise_round)

    def _in_raise_round(self) -> int:
        """Law 10: after a round that was completed since they stopped, slots are left out of marks; when one more was, in which
        every node was told so and compared, they are pruned.
        """
        done = "id <> ? AND round < (SELECT min(scan_round) FROM nodes)"
        number = self._round() + 1
        self._db.execute(f"DELETE FROM writers WHERE stopped = {schema.LEFT_OUT} AND {done}", (self._slot.number,))
        self._db.execute(
            f"UPDATE writers SET stopped = {schema.LEFT_OUT}, round = ? WHERE stopped = 1 AND {done}",
            (number - 1, self._slot.number),
        )
        self._in_set("round", number)
        return number

    async def dead_total(self) -> int:
        return await self._ask(self._dead_total)

    def _dead_total(self) -> int:
        return int(self._reader.execute("SELECT count(*) FROM messages WHERE fate > 1").fetchone()[0])

    async def forget(self, limit: int) -> int:
        """As law 9 says; a pass goes on behind the rows it has looked at, so that those that wait for a node cost one look."""
        found, last = await self._ask(self._forgettable, self._forgot, limit)
        if not found and self._forgot != (0, b""):
            found, last = await self._ask(self._forgettable, (0, b""), limit)
        self._forgot = last if len(found) == limit else (0, b"")
        return await self._write(self._in_forget, found) if found else 0

    def _forgettable(self, after: _Place, limit: int) -> tuple[list[bytes], _Place]:
        rows = self._reader.execute(
            "SELECT round, key FROM messages m WHERE fate > 1 AND (round, key) > (?, ?)"
            " AND round < (SELECT min(scan_round) FROM nodes)"
            " AND NOT EXISTS (SELECT 1 FROM orders o JOIN nodes n ON n.id = o.node WHERE o.key = m.key)"
            " ORDER BY round, key LIMIT ?",
            (*after, limit),
        ).fetchall()
        return [key for _, key in rows], (rows[-1] if rows else after)

    def _in_forget(self, keys: Sequence[bytes]) -> int | Untouched[int]:
        """Law 9, whole: decided before a round that every member was scanned for, nothing ordered, owed or unread."""
        db = self._db
        if db.execute("SELECT 1 FROM nodes WHERE owes_walk = 1 UNION ALL SELECT 1 FROM unread LIMIT 1").fetchone():
            return Untouched(0)
        gone: list[bytes] = []
        for part in parts(list(keys)):
            marks = ", ".join("?" * len(part))
            rows = db.execute(
                f"DELETE FROM messages WHERE key IN ({marks}) AND fate > 1 AND round < (SELECT min(scan_round) FROM nodes)"
                " AND NOT EXISTS (SELECT 1 FROM orders o JOIN nodes n ON n.id = o.node WHERE o.key = messages.key)"
                " RETURNING key",
                part,
            ).fetchall()
            gone += [row[0] for row in rows]
        for table in ("orders", "gone"):  # what is forgotten has tombstones wherever it lay: no checkpoint names it any more
            db.executemany(f"DELETE FROM {table} WHERE key = ?", [(key,) for key in gone])
        return len(gone) if gone else Untouched(0)

    async def forgotten(self, keys: Sequence[bytes]) -> list[bytes]:
        return await self._read(self._forgotten, keys)

    def _forgotten(self, keys: Sequence[bytes]) -> list[bytes]:
        known = {row[0] for row in select_in(self._reader, "SELECT key FROM messages WHERE key IN", list(keys))}
        return [key for key in keys if key not in known]
