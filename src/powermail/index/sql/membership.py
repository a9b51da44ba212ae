"""Owns the layout and the moves of copies.

The version is a counter; whoever changes the layout holds its row until the end, so that changes come one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from powermail.index.sharing import MoveRow
from powermail.index.sql.core import Core
from powermail.index.sql.engine import Reading, Transaction, Untouched
from powermail.storage.layout import Layout, LayoutChange, LayoutRow, Standing, changed_layout, costs, in_epoch, restored

_COLUMNS = "id, failure_group, address, site, priority, state, told"
_MOVES = "name, phase, total, done, began_at, after, note"
_HOLD = "INSERT INTO counters VALUES ('layout', 0) ON CONFLICT (name) DO UPDATE SET value = counters.value RETURNING value"
_KNOWN = "SELECT name, value FROM counters WHERE name IN ('layout', 'epoch')"


class MembershipPart(Core):
    """`index.contract.Membership`."""

    async def layout_version(self) -> int:
        return await self._ask(self._layout_version)

    async def _layout_version(self, db: Reading) -> int:
        known = dict(await db.rows(_KNOWN))
        return in_epoch(Layout(known.get("layout", 0), ()), known["epoch"]).version

    async def layout_fence(self) -> int:
        return await self._ask(self._layout_fence)

    async def _layout_fence(self, db: Reading) -> int:
        row = await db.one("SELECT value FROM counters WHERE name = 'layout_fence'")
        return int(row[0]) if row else 0

    async def layout(self) -> Layout:
        return await self._read(self._layout)

    async def _layout(self, db: Reading) -> Layout:
        return Layout(await self._layout_version(db), await self._layout_rows(db))

    async def _layout_rows(self, db: Reading) -> tuple[LayoutRow, ...]:
        found = await db.rows(f"SELECT {_COLUMNS} FROM layout ORDER BY id")
        return tuple([LayoutRow(r[0], r[1], r[2], r[3], r[4], Standing(r[5]), r[6]) for r in found])

    async def change_layout(self, changes: Sequence[LayoutChange], version: int | None = None) -> Layout | None:
        return await self._write(self._in_change_layout, changes, version)

    async def _in_change_layout(
        self, db: Transaction, changes: Sequence[LayoutChange], version: int | None
    ) -> Layout | Untouched[Layout | None] | None:
        before = in_epoch(*await self._in_hold_layout(db))
        after = changed_layout(before, changes, version)
        if after is None or after is before:
            return Untouched(after)
        await self._in_write_layout(db, before, after)
        return after

    async def _in_hold_layout(self, db: Transaction) -> tuple[Layout, int]:
        """The layout as it was written, and the epoch; they stay as they are until the transaction ends.

        Rows are read behind the lock, by a later statement. Who raises the epoch takes every slot away, and so this transaction
        begins again (law 10).
        """
        version = int((await db.one(_HOLD))[0])
        epoch = dict(await db.rows(_KNOWN))["epoch"]
        return Layout(version, await self._layout_rows(db)), epoch

    async def _in_end_membership(self, db: Transaction, node: str, version: int | None) -> bool:
        """The row of a node says from now on that it is no member; False if the layout has another version than was given."""
        before = in_epoch(*await self._in_hold_layout(db))
        if version is not None and version != before.version:
            return False
        if before.row(node) is not None:
            after = changed_layout(before, [LayoutChange(node, state=Standing.EXPELLED)], before.version)
            assert after is not None
            await self._in_write_layout(db, before, after)
        return True

    async def _in_write_layout(self, db: Transaction, before: Layout, after: Layout) -> None:
        old = {row.id: row for row in before.rows}
        new = [row for row in after.rows if old.get(row.id) != row]
        gone = old.keys() - {row.id for row in after.rows}
        await db.many("DELETE FROM layout WHERE id = ?", [(node,) for node in sorted({*gone, *[row.id for row in new]})])
        await db.put(
            f"INSERT INTO layout ({_COLUMNS})",
            7,
            [(row.id, row.group, row.address, row.site, row.priority, row.state.value, row.told) for row in new],
        )
        for row in new:  # a member is of the group that the layout says from now on; whatever it is admitted as next
            await db.change("UPDATE nodes SET site = ? WHERE id = ? AND site <> ?", (row.group, row.id, row.group))
        await self._in_set(db, "layout", after.version)
        if costs(before, after):
            await db.change(
                "INSERT INTO counters VALUES ('layout_fence', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (after.version,),
            )

    async def restore_layout(self, layout: Layout) -> Layout:
        return await self._write(self._in_restore_layout, layout)

    async def _in_restore_layout(self, db: Transaction, layout: Layout) -> Layout | Untouched[Layout]:
        before, epoch = await self._in_hold_layout(db)
        after = restored(before, layout, epoch)
        if after is None:
            return Untouched(in_epoch(before, epoch))
        await self._in_write_layout(db, before, after)
        return after

    async def moves(self) -> list[MoveRow]:
        return await self._ask(self._moves)

    async def _moves(self, db: Reading) -> list[MoveRow]:
        found = await db.rows(f"SELECT {_MOVES} FROM moves ORDER BY name")
        return [MoveRow(r[0], r[1], r[2], r[3], r[4], bytes(r[5]), r[6]) for r in found]

    async def note_move(self, move: MoveRow) -> None:
        await self._write(self._in_note_move, move)

    async def _in_note_move(self, db: Transaction, move: MoveRow) -> None:
        await db.change(
            f"INSERT INTO moves ({_MOVES}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
            " phase = excluded.phase, total = excluded.total, done = excluded.done, began_at = excluded.began_at,"
            " after = excluded.after, note = excluded.note",
            move,
        )

    async def end_move(self, name: str, began_at: float | None = None) -> None:
        await self._write(self._in_end_move, name, began_at)

    async def _in_end_move(self, db: Transaction, name: str, began_at: float | None) -> Untouched[None] | None:
        ended = await db.change("DELETE FROM moves WHERE name = ? AND began_at = coalesce(?, began_at)", (name, began_at))
        return None if ended else Untouched(None)
