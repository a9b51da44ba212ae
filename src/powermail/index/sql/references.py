"""Owns the life of a message in the index: its references, its death, the orders and drops that follow (laws 6, 8, 11).

References are entries and queue rows. When the last one goes, the row becomes dead and tombstones are ordered for every node
believed or suspected to hold a copy, in one transaction (law 8).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from powermail.index.contract import Fate, NodeRow, Release
from powermail.index.sql.core import NO_NODES
from powermail.index.sql.engine import Transaction, parts
from powermail.index.sql.numbers import Numbering
from powermail.index.view import Op
from powermail.storage.contract import End, Position, Unread

_IN_ORDER = "ORDER BY key FOR UPDATE"
_BY_KEY = itemgetter(1)


class Moved(NamedTuple):
    """Where keys went that left a mailbox: the mailbox, and its MODSEQ that shows them."""

    mailbox: int
    modseq: int


def is_late(row: NodeRow, end: End) -> bool:
    """What was found there is of another disk, or older than what the index has seen since (law 8)."""
    return row.incarnation != end.incarnation or end.position < row.end_seen


class References(Numbering):
    """What takes references away, and what decides that a key is dead."""

    async def _in_fates(self, db: Transaction, keys: Iterable[bytes]) -> dict[bytes, Fate]:
        """Fates of those keys that have a row; they stay as they are until the transaction ends."""
        found = await db.rows_in("SELECT key, fate FROM messages WHERE key IN", sorted(set(keys)), _IN_ORDER)
        return {key: Fate(fate) for key, fate in found}

    async def _in_refer(self, db: Transaction, keys: Iterable[bytes]) -> bool:
        """One reference more for each time a key is named. False if one is not live: then nothing may be committed (law 8)."""
        counts = Counter(keys)
        for times in sorted(set(counts.values())):
            some = sorted(key for key, count in counts.items() if count == times)
            head = "UPDATE messages SET refs = refs + ? WHERE fate = 1 AND key IN"
            if len(await db.rows_in(head, some, "RETURNING key", before=(times,))) != len(some):
                return False
        return True

    async def _in_release(self, db: Transaction, keys: Iterable[bytes]) -> list[bytes]:
        """Takes one reference away for each time a key is named; those that died. Keys are taken in order (law 8)."""
        counts = Counter(keys)
        rows = await db.rows_in("SELECT key, refs FROM messages WHERE fate = 1 AND key IN", sorted(counts), _IN_ORDER)
        dying = [key for key, refs in rows if refs <= counts[key]]
        await db.many(
            "UPDATE messages SET refs = refs - ? WHERE key = ?",
            [(counts[key], key) for key, refs in rows if refs > counts[key]],
        )
        await self._in_die(db, dying)
        return dying

    async def _in_die(self, db: Transaction, keys: Sequence[bytes]) -> None:
        """live -> dead, with orders for believed and suspected nodes, in this transaction and in its round (law 8)."""
        rows = await db.rows_in("SELECT key, placement FROM messages WHERE key IN", keys)
        pairs = [(node, key) for key, placement in rows for node in await db.placements.nodes(placement)]
        pairs += await db.rows_in("SELECT node, key FROM suspects WHERE key IN", keys)
        await self._in_order(db, pairs)
        await db.change_in(
            f"UPDATE messages SET refs = 0, fate = 2, placement = {NO_NODES},"
            " round = (SELECT value FROM counters WHERE name = 'round') WHERE key IN",
            keys,
        )
        await db.change_in("DELETE FROM suspects WHERE key IN", keys)

    async def _in_order(self, db: Transaction, pairs: Sequence[tuple[str, bytes]]) -> None:
        """Tombstones that members are to write; whoever orders raises the key's round (law 8)."""
        members = await db.members() if pairs else {}
        wanted = sorted({(node, key): None for node, key in pairs if node in members}, key=_BY_KEY)
        await db.put("INSERT INTO orders", 2, wanted, " ON CONFLICT DO NOTHING")
        await db.change_in(
            "UPDATE messages SET round = (SELECT value FROM counters WHERE name = 'round') WHERE key IN",
            list(dict.fromkeys(key for _, key in wanted)),
        )

    async def _in_drop(self, db: Transaction, node: str, copies: Sequence[tuple[bytes, Position]]) -> None:
        """Copies that a member is to drop; that says nothing about the key (law 6)."""
        rows = [(node, key, *position) for key, position in copies]
        await db.put("INSERT INTO drops", 4, rows, " ON CONFLICT DO NOTHING")

    async def _in_note_unread(self, db: Transaction, node: str, notes: Sequence[Unread]) -> None:
        """What could not be read holds back forgetting (law 9). Of two notes that begin at one place the longer stays."""
        await db.many(
            "INSERT INTO unread VALUES (?, ?, ?, ?) ON CONFLICT (node, segment, place)"
            " DO UPDATE SET octets = greatest(unread.octets, excluded.octets)",
            [(node, *note.position, note.octets) for note in notes],
        )

    async def _in_believe(self, db: Transaction, node: str, keys: Sequence[bytes], present: bool) -> bool:
        """Believes, or no longer believes, that a node holds these; whether anything changed. Only live keys have copies."""
        rows = await db.rows_in("SELECT key, placement FROM messages WHERE fate = 1 AND key IN", sorted(set(keys)), _IN_ORDER)
        after = await db.placements.changed({placement for _, placement in rows}, node, present)
        changes = [(after[placement], key) for key, placement in rows if after[placement] != placement]
        await db.many("UPDATE messages SET placement = ? WHERE key = ?", changes)
        return bool(changes)

    # -- leaving a mailbox -----------------------------------------------------------------------------------------------

    async def _in_leave(self, db: Transaction, mailbox: int, uids: Sequence[int], moved: Moved | None = None) -> Release:
        """Expunges those of `uids` that exist, as one change. Their keys are noted as gone from here, also of what died: that
        no node has its tombstone yet may go on for long (law 13).
        """
        uids = await db.lock_entries(mailbox, uids)
        left: list[tuple[int, bytes, int]] = []
        for part in parts(sorted(set(uids))):
            marks = ", ".join("?" * len(part))
            left += await db.rows(
                f"DELETE FROM entries WHERE mailbox = ? AND uid IN ({marks}) RETURNING uid, key, octets", (mailbox, *part)
            )
        if not left:
            return Release(0, 0)
        modseq = await self._in_change(db, mailbox, Op.EXPUNGE, 0, sorted(uid for uid, _, _ in left))
        await db.change(
            "UPDATE mailboxes SET messages = messages - ?, octets = octets - ? WHERE id = ?",
            (len(left), sum(octets for _, _, octets in left), mailbox),
        )
        dead = set(await self._in_release(db, (key for _, key, _ in left)))
        await self._in_note_gone(db, mailbox, list(dict.fromkeys(key for _, key, _ in left)), dead, modseq, moved)
        return Release(len(left), len(dead))

    async def _in_note_gone(
        self, db: Transaction, mailbox: int, keys: Sequence[bytes], dead: set[bytes], modseq: int, moved: Moved | None
    ) -> None:
        """Keys that left a mailbox, until they are forgotten; a key that stays in it under another UID is not gone."""
        if moved is not None and moved.mailbox == mailbox:
            return
        stay = set()
        if alive := [key for key in keys if key not in dead]:
            # Messages with other references are few, and are in the same mailbox again only by COPY to itself.
            stay = {
                row[0]
                for row in await db.rows_in("SELECT key FROM entries WHERE mailbox = ? AND key IN", alive, "", (mailbox,))
            }
        to = moved or Moved(0, 0)
        rows = [(mailbox, key, modseq, *to) for key in sorted(keys) if key not in stay]
        await db.many(
            "INSERT INTO gone VALUES (?, ?, ?, ?, ?) ON CONFLICT (mailbox, key) DO UPDATE SET modseq = excluded.modseq,"
            " to_mailbox = excluded.to_mailbox, to_modseq = excluded.to_modseq",
            rows,
        )
        if moved is not None:  # what came here by a move, and moves on, is where it moves to now
            await db.many(
                "UPDATE gone SET to_mailbox = ?, to_modseq = ? WHERE key = ? AND to_mailbox = ?",
                [(*moved, key, mailbox) for _, key, *_ in rows],
            )

    async def _in_bury(self, db: Transaction, keys: Sequence[bytes]) -> None:
        """Tombstones were found of keys the index has as live: it had lost that they died (law 11)."""
        await self._in_may_number(db)
        await db.lock_keys(keys)
        await self._in_find_by_key(db)
        shown: Mapping[int, list[int]] = defaultdict(list)
        for mailbox, uid in sorted(await db.rows_in("SELECT mailbox, uid FROM entries WHERE key IN", keys)):
            shown[mailbox].append(uid)
        for mailbox, uids in shown.items():
            await self._in_leave(db, mailbox, uids)
        await db.lock_queue_of(keys)  # whatever the order in which the next statement finds them
        for part in parts(list(keys)):
            marks = ", ".join("?" * len(part))
            rows = await db.rows(f"DELETE FROM queue WHERE key IN ({marks}) RETURNING key, id, attempts", part)
            await self._in_finished(db, rows)
        await self._in_die(db, [key for key, fate in (await self._in_fates(db, keys)).items() if fate is Fate.LIVE])

    async def _in_finished(self, db: Transaction, rows: Iterable[Sequence[Any]]) -> None:
        """Queue rows (key, id, attempts) were deleted: what was remembered of their attempts goes, and their references."""
        gone = list(rows)
        await db.many("DELETE FROM attempts WHERE queue = ?", [(number,) for _, number, attempts in gone if attempts])
        await self._in_release(db, (key for key, _, _ in gone))
