"""Owns the layout and the moves of copies, in memory."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.index.memory.transaction import Transactions, Undo
from powermail.index.sharing import MoveRow
from powermail.storage.layout import Layout, LayoutChange, changed_layout, costs, in_epoch, restored


class MembershipPart(Transactions):
    """`index.contract.Membership` in memory."""

    async def layout_version(self) -> int:
        return self._layout().version

    async def layout_fence(self) -> int:
        return self.state.layout_fence

    async def layout(self) -> Layout:
        return self._layout()

    def _layout(self) -> Layout:
        return in_epoch(self.state.layout, self.state.epoch)

    async def change_layout(self, changes: Sequence[LayoutChange], version: int | None = None) -> Layout | None:
        def changing() -> Layout | None:
            before = self._layout()
            found = changed_layout(before, changes, version)
            if found is None or found is before:
                raise Undo(found)
            self._go_by(found)
            return found

        return self.transact(changing)

    def _go_by(self, layout: Layout) -> None:
        """A member is of the group that the layout says from now on."""
        if costs(self.state.layout, layout):
            self.state.layout_fence = layout.version
        self.state.layout = layout
        for row in layout.rows:
            if (member := self.state.nodes.get(row.id)) is not None:
                self.state.nodes[row.id] = member._replace(group=row.group)

    async def restore_layout(self, layout: Layout) -> Layout:
        def restoring() -> Layout:
            found = restored(self.state.layout, layout, self.state.epoch)
            if found is None:
                raise Undo(self._layout())
            self._go_by(found)
            return found

        return self.transact(restoring)

    async def moves(self) -> list[MoveRow]:
        return [move for _, move in sorted(self.state.moves.items())]

    async def note_move(self, move: MoveRow) -> None:
        def noting() -> None:
            self.state.moves[move.name] = move

        self.transact(noting)

    async def end_move(self, name: str, began_at: float | None = None) -> None:
        def ending() -> None:
            move = self.state.moves.get(name)
            if move is None or began_at not in (None, move.began_at):
                raise Undo(None)
            del self.state.moves[name]

        self.transact(ending)
