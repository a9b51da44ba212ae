"""Owns what follows from what nodes hold: reconcile, inventories, the walk (laws 6, 11, 12).

Everything is looked at before anything is written: what is missing, or proves a loss, leaves the index as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from powermail.index import laws
from powermail.index.contract import Batch, Fate, NodeRow, Reconciled
from powermail.index.laws import Deed
from powermail.index.sql.engine import Again, Transaction, Untouched
from powermail.index.sql.references import References, is_late
from powermail.mail.envelope import Commit
from powermail.storage.contract import End, Held, Position

_Found = list[tuple[bytes, Position, Deed]]


class ComparingPart(References):
    """`reconcile` and `settle_inventory` of `index.contract.Copies`."""

    async def reconcile(self, batch: Batch) -> Reconciled:
        return await self._write(self._in_reconcile, batch)

    async def _in_reconcile(self, db: Transaction, batch: Batch) -> Reconciled | Untouched[Reconciled]:
        """Law 6, whole: the batch, the watermark and the end seen are one transaction."""
        node = await db.member(batch.node)
        if node is None or node.incarnation != batch.incarnation or node.watermark != batch.from_:
            return Untouched(Reconciled(False))
        new = {key for key, at, origin in batch.copies if laws.deed(None, origin, at < batch.birth) is Deed.ENTER}
        claimed = await self._in_claim(db, sorted(new.intersection(batch.commits)))
        fates = await self._in_fates(db, [*(key for key, _, _ in batch.copies), *batch.tombstones])
        self._check_claims(db, new.intersection(batch.commits), fates)
        fates = {key: fate for key, fate in fates.items() if key not in claimed}
        died = [key for key in batch.tombstones if fates.get(key) is Fate.LIVE]
        if died and not node.owes_walk:
            return Untouched(Reconciled(False, lost=True))  # law 11: it died, and the index has forgotten that
        found: _Found = []
        for key, position, origin in batch.copies:
            deed = laws.deed(fates.get(key), origin, position < batch.birth)
            if deed is Deed.ENTER and key in batch.commits:
                fates[key] = Fate.LIVE  # a second record of it is believed
            found.append((key, position, deed))
        missing = self._missing(found, batch.commits)
        if missing:
            return Untouched(Reconciled(False, missing=missing))
        await self._in_hold_boxes(db, self._entering(found, batch.commits), died)
        entered, adds = await self._in_do(db, batch.node, found, batch.commits)
        if adds and batch.end < node.end_seen:
            return Untouched(Reconciled(False))  # law 8: what was found may have gone since
        if died:  # that commits were lost is known, and this node's walk is still owed (law 11)
            await self._in_bury(db, died)
        await db.many(
            "DELETE FROM unread WHERE node = ? AND segment = ? AND place = ? AND octets = ?",
            [(batch.node, *note.position, note.octets) for note in batch.read],
        )
        await self._in_note_unread(db, batch.node, batch.unread)
        await self._in_move_watermark(db, node, batch)
        return Reconciled(True, entered)

    @staticmethod
    def _check_claims(db: Transaction, wanted: Iterable[bytes], fates: Mapping[bytes, Fate]) -> None:
        """Somebody had a row for each key that was not claimed; one that is gone was forgotten between the two looks."""
        if not db.alone and any(key not in fates for key in wanted):
            raise Again("a key was forgotten meanwhile")

    async def _in_move_watermark(self, db: Transaction, node: NodeRow, batch: Batch) -> None:
        """Compare-and-set, also here where nobody else can have moved it: another deployment has many keepers (law 6)."""
        end = max(node.end_seen, batch.end)
        scanned = node.scan_round if batch.round is None else max(node.scan_round, batch.round)  # law 9
        await db.change(
            "UPDATE nodes SET segment = ?, place = ?, end_segment = ?, end_place = ?, scan_round = ?"
            " WHERE id = ? AND incarnation = ? AND segment = ? AND place = ?",
            (*batch.to, *end, scanned, batch.node, batch.incarnation, *batch.from_),
        )
        db.stale = True

    @staticmethod
    def _missing(found: _Found, commits: Mapping[bytes, Commit]) -> tuple[bytes, ...]:
        """Keys whose commit records are needed first."""
        return tuple(sorted({key for key, _, deed in found if deed is Deed.ENTER and key not in commits}))

    @staticmethod
    def _entering(found: _Found, commits: Mapping[bytes, Commit]) -> list[tuple[bytes, Commit]]:
        return [(key, commits[key]) for key, _, deed in found if deed is Deed.ENTER]

    async def _in_do(self, db: Transaction, node: str, found: _Found, commits: Mapping[bytes, Commit]) -> tuple[int, bool]:
        """Does what was decided; how many messages were entered live, and whether a belief was added."""
        entering = self._entering(found, commits)
        if entering:
            await self._in_may_number(db)
        entered = await self._in_enter_found(db, node, entering)
        adds = bool(entering)
        believed = sorted({key for key, _, deed in found if deed is Deed.BELIEVE})
        if believed:  # what failed its check counts no more until the keeper has looked
            doubted = await db.rows_in("SELECT key FROM suspects WHERE node = ? AND key IN", believed, "", (node,))
            adds = await self._in_believe(db, node, sorted({*believed} - {row[0] for row in doubted}), True) or adds
        await self._in_order(db, [(node, key) for key, _, deed in found if deed is Deed.BURY])
        await self._in_drop(db, node, [(key, position) for key, position, deed in found if deed is Deed.DROP])
        return entered, adds

    # -- inventories ---------------------------------------------------------------------------------------------------

    async def settle_inventory(
        self, node: str, end: End, items: Sequence[tuple[bytes, Held, Position]], birth: Position,
        commits: Mapping[bytes, Commit], enter: bool,
    ) -> Reconciled:  # fmt: skip
        return await self._write(self._in_settle, node, end, items, birth, commits, enter)

    async def _in_settle(
        self, db: Transaction, node: str, end: End, items: Sequence[tuple[bytes, Held, Position]], birth: Position,
        commits: Mapping[bytes, Commit], enter: bool,
    ) -> Reconciled | Untouched[Reconciled]:  # fmt: skip
        row = await db.member(node)
        if row is None or row.incarnation != end.incarnation:
            return Untouched(Reconciled(False))
        keys = [key for key, _, _ in items]
        found_here = await db.rows_in("SELECT key FROM drops WHERE node = ? AND key IN", keys, "", (node,))
        dropping = {each[0] for each in found_here}
        new = {
            key
            for key, held, at in items
            if held is Held.LIVE and key not in dropping and self._deed(row, None, at, birth, enter) is Deed.ENTER
        }
        buried = {key for key, held, _ in items if enter and held is Held.DEAD}
        claimed = await self._in_claim(db, sorted(buried.union(new.intersection(commits))))
        fates = await self._in_fates(db, keys)
        self._check_claims(db, new.intersection(commits), fates)
        fates = {key: fate for key, fate in fates.items() if key not in claimed}
        died = [key for key, held, _ in items if held is Held.DEAD and fates.get(key) is Fate.LIVE]
        if died and not (enter or row.owes_walk or row.owes_compare):
            return Untouched(Reconciled(False, lost=True))
        found: _Found = []
        for key, held, position in items:
            deed = self._deed(row, fates.get(key), position, birth, enter) if held is Held.LIVE else None
            if deed is not None and (key in fates or key not in dropping):
                found.append((key, position, deed))
        missing = self._missing(found, commits)
        if missing:
            return Untouched(Reconciled(False, missing=missing))
        before = db.changes
        await self._in_hold_boxes(db, self._entering(found, commits), died if enter else [])
        entered, adds = await self._in_do(db, node, found, commits)
        if adds and is_late(row, end):
            return Untouched(Reconciled(False))  # law 8: what was found may have gone since
        if enter:
            await self._in_bury_found(db, sorted(buried.difference(fates)), claimed, died)
        else:
            # While a walk is owed it decides. What the first release aborted on one node only says nothing about the key.
            await self._in_believe(db, node, died, False)
        outcome = Reconciled(True, entered)
        return outcome if db.changes != before else Untouched(outcome)

    @staticmethod
    def _deed(row: NodeRow, fate: Fate | None, position: Position, birth: Position, enter: bool) -> Deed | None:
        """What a live copy in an inventory comes to (laws 11, 12); None: nothing."""
        if fate is not None:
            return Deed.BELIEVE if fate is Fate.LIVE else Deed.BURY
        if enter:
            return Deed.DROP if position < birth else Deed.ENTER  # the walk enters whatever the origin
        if row.owes_walk:
            return None  # what has no row may have been lost with it
        return Deed.DROP if position < row.watermark else None  # what lies at or above it is reconcile's

    async def _in_bury_found(
        self, db: Transaction, unknown: Sequence[bytes], claimed: set[bytes], died: Sequence[bytes]
    ) -> None:
        """The walk found tombstones: those keys are dead, whatever the index has kept of them (law 11)."""
        if db.alone:
            rows = [(key, 0, b"", 0, 0, int(Fate.DEAD), await db.counter("round")) for key in unknown]
            await db.put("INSERT INTO messages", 7, rows)
        elif not claimed.issuperset(unknown):
            raise Again("a key was forgotten meanwhile")
        else:
            head = "UPDATE messages SET fate = 2, round = (SELECT value FROM counters WHERE name = 'round') WHERE key IN"
            await db.change_in(head, unknown)
        if died:
            await self._in_bury(db, died)
