"""Owns the life of a message in the index: its references, its death, the orders and drops that follow (laws 6, 8, 11).

References are entries and queue rows. When the last one goes, the row becomes dead and tombstones are ordered for every node
believed or suspected to hold a copy, in one transaction (law 8).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from powermail.index.contract import Fate, Release
from powermail.index.sqlite.numbers import Numbering
from powermail.index.sqlite.rows import change_in, insert_many, parts, select_in
from powermail.index.sqlite.schema import ENTRIES_BY_KEY, NO_NODES
from powermail.index.view import Op
from powermail.storage.contract import Position


class Moved(NamedTuple):
    """Where keys went that left a mailbox: the mailbox, and its MODSEQ that shows them."""

    mailbox: int
    modseq: int


class References(Numbering):
    """What takes references away, and what decides that a key is dead."""

    def _in_fates(self, keys: Sequence[bytes]) -> dict[bytes, Fate]:
        """Fates of those keys that have a row."""
        return {key: Fate(fate) for key, fate in select_in(self._db, "SELECT key, fate FROM messages WHERE key IN", keys)}

    def _in_release(self, keys: Iterable[bytes]) -> list[bytes]:
        """Takes one reference away for each time a key is named; those that died. Keys are taken in order (law 8)."""
        counts = Counter(keys)
        rows = select_in(self._db, "SELECT key, refs FROM messages WHERE fate = 1 AND key IN", sorted(counts), "ORDER BY key")
        dying = [key for key, refs in rows if refs <= counts[key]]
        self._db.executemany(
            "UPDATE messages SET refs = refs - ? WHERE key = ?",
            [(counts[key], key) for key, refs in rows if refs > counts[key]],
        )
        self._in_die(dying)
        return dying

    def _in_die(self, keys: Sequence[bytes]) -> None:
        """live -> dead, with orders for believed and suspected nodes, in this transaction and in its round (law 8)."""
        db = self._db
        rows = select_in(db, "SELECT key, placement FROM messages WHERE key IN", keys)
        pairs = [(node, key) for key, placement in rows for node in self._placements.nodes(placement)]
        pairs += select_in(db, "SELECT node, key FROM suspects WHERE key IN", keys)
        self._in_order(pairs)
        change_in(
            db,
            f"UPDATE messages SET refs = 0, fate = 2, placement = {NO_NODES},"
            " round = (SELECT value FROM counters WHERE name = 'round') WHERE key IN",
            keys,
        )
        change_in(db, "DELETE FROM suspects WHERE key IN", keys)

    def _in_order(self, pairs: Sequence[tuple[str, bytes]]) -> None:
        """Tombstones that members are to write; whoever orders raises the key's round (law 8)."""
        wanted = [(node, key) for node, key in pairs if node in self._members]
        insert_many(self._db, "INSERT INTO orders", 2, wanted, " ON CONFLICT DO NOTHING")
        change_in(
            self._db,
            "UPDATE messages SET round = (SELECT value FROM counters WHERE name = 'round') WHERE key IN",
            list(dict.fromkeys(key for _, key in wanted)),
        )

    def _in_drop(self, node: str, copies: Sequence[tuple[bytes, Position]]) -> None:
        """Copies that a member is to drop; that says nothing about the key (law 6)."""
        rows = [(node, key, *position) for key, position in copies]
        insert_many(self._db, "INSERT INTO drops", 4, rows, " ON CONFLICT DO NOTHING")

    def _in_believe(self, node: str, keys: Sequence[bytes], present: bool) -> None:
        """Believes, or no longer believes, that a node holds these. Only live keys have copies."""
        rows = select_in(self._db, "SELECT key, placement FROM messages WHERE fate = 1 AND key IN", keys)
        changes = []
        for key, placement in rows:
            after = self._placements.with_node(placement, node) if present else self._placements.without(placement, node)
            if after != placement:
                changes.append((after, key))
        self._db.executemany("UPDATE messages SET placement = ? WHERE key = ?", changes)

    # -- leaving a mailbox -----------------------------------------------------------------------------------------------

    def _in_leave(self, mailbox: int, uids: Sequence[int], moved: Moved | None = None) -> Release:
        """Expunges those of `uids` that exist, as one change. Their keys are noted as gone from here, also of what died: that
        no node has its tombstone yet may go on for long (law 13).
        """
        db = self._db
        left: list[tuple[int, bytes, int]] = []
        for part in parts(sorted(set(uids))):
            marks = ", ".join("?" * len(part))
            left += db.execute(
                f"DELETE FROM entries WHERE mailbox = ? AND uid IN ({marks}) RETURNING uid, key, octets", (mailbox, *part)
            ).fetchall()
        if not left:
            return Release(0, 0)
        modseq = self._in_change(mailbox, Op.EXPUNGE, 0, sorted(uid for uid, _, _ in left))
        db.execute(
            "UPDATE mailboxes SET messages = messages - ?, octets = octets - ? WHERE id = ?",
            (len(left), sum(octets for _, _, octets in left), mailbox),
        )
        dead = set(self._in_release(key for _, key, _ in left))
        self._in_note_gone(mailbox, list(dict.fromkeys(key for _, key, _ in left)), dead, modseq, moved)
        return Release(len(left), len(dead))

    def _in_note_gone(self, mailbox: int, keys: Sequence[bytes], dead: set[bytes], modseq: int, moved: Moved | None) -> None:
        """Keys that left a mailbox, until they are forgotten; a key that stays in it under another UID is not gone."""
        db = self._db
        if moved is not None and moved.mailbox == mailbox:
            return
        stay = set()
        if alive := [key for key in keys if key not in dead]:
            # Messages with other references are few, and are in the same mailbox again only by COPY to itself.
            stay = {
                row[0] for row in select_in(db, "SELECT key FROM entries WHERE mailbox = ? AND key IN", alive, "", (mailbox,))
            }
        to = moved or Moved(0, 0)
        rows = [(mailbox, key, modseq, *to) for key in keys if key not in stay]
        db.executemany(
            "INSERT INTO gone VALUES (?, ?, ?, ?, ?) ON CONFLICT (mailbox, key) DO UPDATE SET modseq = excluded.modseq,"
            " to_mailbox = excluded.to_mailbox, to_modseq = excluded.to_modseq",
            rows,
        )
        if moved is not None:  # what came here by a move, and moves on, is where it moves to now
            db.executemany(
                "UPDATE gone SET to_mailbox = ?, to_modseq = ? WHERE key = ? AND to_mailbox = ?",
                [(*moved, key, mailbox) for _, key, *_ in rows],
            )

    def _in_bury(self, keys: Sequence[bytes]) -> None:
        """Tombstones were found of keys the index has as live: it had lost that they died (law 11)."""
        db = self._db
        self._may_number()
        db.execute(ENTRIES_BY_KEY)
        shown: Mapping[int, list[int]] = defaultdict(list)
        for mailbox, uid in sorted(select_in(db, "SELECT mailbox, uid FROM entries WHERE key IN", keys)):
            shown[mailbox].append(uid)
        for mailbox, uids in shown.items():
            self._in_leave(mailbox, uids)
        for part in parts(list(keys)):
            marks = ", ".join("?" * len(part))
            rows = db.execute(f"DELETE FROM queue WHERE key IN ({marks}) RETURNING key", part).fetchall()
            self._in_release(row[0] for row in rows)
        self._in_die([key for key, fate in self._in_fates(keys).items() if fate is Fate.LIVE])
