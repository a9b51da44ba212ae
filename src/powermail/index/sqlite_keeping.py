"""Owns the keeper's statements: watermarks, which nodes hold what, deletions that wait, checkpoints, totals."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

from powermail.index.contract import CheckpointPlan, EntryFacts, MailboxFacts, MessageFacts, NodeRow
from powermail.index.rows import Placements, in_list

_PART = 500


class KeepingStatements:
    """The keeper's part of the SQLite index."""

    _db: sqlite3.Connection
    _reader: sqlite3.Connection
    _placements: Placements
    _epoch: int
    _write: Callable[..., Coroutine[Any, Any, Any]]
    _read: Callable[..., Coroutine[Any, Any, Any]]
    _mailbox_ids: dict[tuple[str, str], tuple[int, int]]

    # -- nodes ---------------------------------------------------------------------------------------------------

    async def node_rows(self) -> list[NodeRow]:
        """What is remembered of all nodes."""
        rows = await self._read(lambda: self._reader.execute("SELECT * FROM nodes ORDER BY id").fetchall())
        return [NodeRow(r[0], r[1], r[2], r[3], bool(r[4]), r[5]) for r in rows]

    async def set_node(self, node: str, incarnation: str, segment: int, offset: int) -> None:
        """Sets incarnation and watermark."""
        await self._write(
            lambda: self._db.execute(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, 0, 0) ON CONFLICT (id) DO UPDATE SET"
                " incarnation = excluded.incarnation, segment = excluded.segment, place = excluded.place",
                (node, incarnation, segment, offset),
            )
        )

    async def set_node_flags(self, node: str, blocked: bool | None, missing_since: float | None) -> None:
        """Sets what is not None."""
        await self._write(
            lambda: self._db.execute(
                "UPDATE nodes SET blocked = coalesce(?, blocked), missing_since = coalesce(?, missing_since) WHERE id = ?",
                (blocked, missing_since, node),
            )
        )

    # -- copies --------------------------------------------------------------------------------------------------

    async def note_copies(self, node: str, keys: Sequence[bytes]) -> list[bytes]:
        """Believes that `node` holds these; returns the keys the index has never seen."""
        unknown: list[bytes] = []
        for start in range(0, len(keys), _PART):
            part = list(keys[start : start + _PART])
            news, missing = await self._read(self._compare_copies, node, part)
            if news:
                await self._write(self._change_copies, node, news, True)
            unknown += missing
        return unknown

    def _compare_copies(self, node: str, keys: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        rows = self._reader.execute(
            f"SELECT m.key, p.nodes FROM messages m JOIN placements p ON p.id = m.placement WHERE m.key IN ({in_list(keys)})",
            keys,
        )
        known = {key: nodes.split(" ") for key, nodes in rows}
        doubted = self._reader.execute(f"SELECT key FROM suspects WHERE node = ? AND key IN ({in_list(keys)})", (node, *keys))
        skip = {row[0] for row in doubted}
        news = [key for key, nodes in known.items() if node not in nodes and key not in skip]
        rest = [key for key in keys if key not in known]
        for table in ("deletions", "aborted"):
            if rest:
                gone = self._reader.execute(f"SELECT key FROM {table} WHERE key IN ({in_list(rest)})", rest)
                seen = {row[0] for row in gone}
                rest = [key for key in rest if key not in seen]
        return news, rest

    async def drop_copies(self, node: str, keys: Sequence[bytes]) -> None:
        """No longer believes that `node` holds these."""
        for start in range(0, len(keys), _PART):
            await self._write(self._change_copies, node, list(keys[start : start + _PART]), False)

    def _change_copies(self, node: str, keys: list[bytes], present: bool) -> None:
        rows = self._db.execute(f"SELECT key, placement FROM messages WHERE key IN ({in_list(keys)})", keys).fetchall()
        changes = []
        for key, placement in rows:
            nodes = set(self._placements.nodes(placement))
            if present:
                nodes.add(node)
            else:
                nodes.discard(node)
            changes.append((self._placements.id(sorted(nodes)), key))
        self._db.executemany("UPDATE messages SET placement = ? WHERE key = ?", changes)

    async def add_copy(self, key: bytes, node: str) -> bool:
        """A repaired copy is durable. False if the message went away meanwhile: the copy must be deleted."""
        alive: bool = await self._write(self._add_copy, key, node)
        return alive

    def _add_copy(self, key: bytes, node: str) -> bool:
        self._change_copies(node, [key], True)
        self._db.execute("DELETE FROM suspects WHERE key = ? AND node = ?", (key, node))
        if self._db.execute("SELECT 1 FROM messages WHERE key = ?", (key,)).fetchone():
            return True
        self._db.execute("INSERT OR IGNORE INTO deletions VALUES (?, ?)", (node, key))
        return False

    async def copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        """Keys believed to be on a node, in order, behind `after`."""
        keys: list[bytes] = await self._read(self._copies_on, node, after, limit)
        return keys

    def _placements_where(self, db: sqlite3.Connection, wanted: Callable[[list[str]], bool]) -> list[int]:
        rows = db.execute("SELECT id, nodes FROM placements")
        return [number for number, nodes in rows if wanted(nodes.split(" ") if nodes else [])]

    def _copies_on(self, node: str, after: bytes, limit: int) -> list[bytes]:
        numbers = self._placements_where(self._reader, lambda nodes: node in nodes)
        found: list[bytes] = []
        for number in numbers:
            rows = self._reader.execute(
                "SELECT key FROM messages WHERE placement = ? AND key > ? ORDER BY key LIMIT ?", (number, after, limit)
            )
            found += [row[0] for row in rows]
        return sorted(found)[:limit]

    async def under_copied(self, groups: Mapping[str, str], required: int, after: bytes, limit: int) -> list[MessageFacts]:
        """Messages whose copies on the nodes in `groups` (node to group) span fewer than `required` groups."""
        found: list[MessageFacts] = await self._read(self._under_copied, groups, required, after, limit)
        return found

    def _thin(self, groups: Mapping[str, str], required: int) -> list[int]:
        return self._placements_where(
            self._reader, lambda nodes: len({groups[node] for node in nodes if node in groups}) < required
        )

    def _under_copied(self, groups: Mapping[str, str], required: int, after: bytes, limit: int) -> list[MessageFacts]:
        found = []
        for number in self._thin(groups, required):
            rows = self._reader.execute(
                "SELECT m.key, m.octets, m.sha256, p.nodes, m.refs FROM messages m JOIN placements p"
                " ON p.id = m.placement WHERE m.placement = ? AND m.key > ? ORDER BY m.key LIMIT ?",
                (number, after, limit),
            )
            found += [MessageFacts(r[0], r[1], r[2], tuple(r[3].split(" ")) if r[3] else (), r[4]) for r in rows]
        return sorted(found)[:limit]

    async def under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        """(messages, octets) of the same; with required = 1 it is what cannot be read from `groups`."""
        total: tuple[int, int] = await self._read(self._under_copied_total, groups, required)
        return total

    def _under_copied_total(self, groups: Mapping[str, str], required: int) -> tuple[int, int]:
        messages = octets = 0
        for number in self._thin(groups, required):
            row = self._reader.execute(
                "SELECT count(*), coalesce(sum(octets), 0) FROM messages WHERE placement = ?", (number,)
            ).fetchone()
            messages += row[0]
            octets += row[1]
        return messages, octets

    # -- deletions -----------------------------------------------------------------------------------------------

    async def deletions_due(self, node: str, limit: int) -> list[bytes]:
        """Keys whose tombstone that node has not confirmed."""
        rows = await self._read(
            lambda: self._reader.execute("SELECT key FROM deletions WHERE node = ? LIMIT ?", (node, limit)).fetchall()
        )
        return [row[0] for row in rows]

    async def deletions_total(self, node: str) -> int:
        """How many wait for a node."""
        row = await self._read(
            lambda: self._reader.execute("SELECT count(*) FROM deletions WHERE node = ?", (node,)).fetchone()
        )
        return int(row[0])

    async def confirm_deletions(self, node: str, keys: Sequence[bytes]) -> list[bytes]:
        """The tombstones are durable there; returns the keys that no other node still owes."""
        done: list[bytes] = await self._write(self._confirm_deletions, node, keys)
        return done

    def _confirm_deletions(self, node: str, keys: Sequence[bytes]) -> list[bytes]:
        self._db.executemany("DELETE FROM deletions WHERE node = ? AND key = ?", [(node, key) for key in keys])
        owed: set[bytes] = set()
        for start in range(0, len(keys), _PART):
            part = keys[start : start + _PART]
            owed.update(row[0] for row in self._db.execute(f"SELECT key FROM deletions WHERE key IN ({in_list(part)})", part))
        return [key for key in keys if key not in owed]

    async def order_deletions(self, node: str, keys: Sequence[bytes]) -> None:
        """Orders tombstones for keys a node should not hold."""
        await self._write(
            lambda: self._db.executemany("INSERT OR IGNORE INTO deletions VALUES (?, ?)", [(node, k) for k in keys])
        )

    async def expel_node(self, node: str) -> None:
        """Forgets a node for good: its copies no longer count, its deletions are no longer owed."""
        await self._write(self._expel_node, node)

    def _expel_node(self, node: str) -> None:
        for number, nodes in self._placements.all().items():
            if node in nodes:
                rest = self._placements.id([other for other in nodes if other != node])
                self._db.execute("UPDATE messages SET placement = ? WHERE placement = ?", (rest, number))
        self._db.execute("DELETE FROM deletions WHERE node = ?", (node,))
        self._db.execute("DELETE FROM nodes WHERE id = ?", (node,))

    async def forget_aborted(self, before: float) -> None:
        """Drops old abort notes; the nodes' records or reconcile's watermark stand for them."""
        await self._write(lambda: self._db.execute("DELETE FROM aborted WHERE at < ?", (before,)))

    # -- repairs -------------------------------------------------------------------------------------------------

    async def note_repair(self, key: bytes, node: str, why: str) -> None:
        """A bad copy was met: its node is no longer believed to hold one."""
        await self._write(self._note_repair, key, node, why)

    def _note_repair(self, key: bytes, node: str, why: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO suspects VALUES (?, ?, ?)", (key, node, why[:200]))
        self._change_copies(node, [key], False)

    async def suspects(self, after: tuple[bytes, str], limit: int) -> list[tuple[bytes, str]]:
        """(key, node) of copies that do not count, in order, behind `after`."""
        rows: list[tuple[bytes, str]] = await self._read(
            lambda: self._reader.execute(
                "SELECT key, node FROM suspects WHERE (key, node) > (?, ?) ORDER BY key, node LIMIT ?", (*after, limit)
            ).fetchall()
        )
        return rows

    async def clear_suspect(self, key: bytes, node: str) -> None:
        """The node holds no copy of it any more."""
        await self._write(lambda: self._db.execute("DELETE FROM suspects WHERE key = ? AND node = ?", (key, node)))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    async def checkpoint_due(self, before: float, limit: int) -> list[int]:
        """Mailboxes that changed since their last checkpoint, which was before that time."""
        rows = await self._read(
            lambda: self._reader.execute(
                "SELECT id FROM mailboxes WHERE modseq > checkpoint_modseq AND checkpoint_at <= ? ORDER BY id LIMIT ?",
                (before, limit),
            ).fetchall()
        )
        return [row[0] for row in rows]

    async def checkpoint_plan(self, mailbox: int) -> CheckpointPlan | None:
        """What must be written: a delta, or all when the deltas outweigh the mailbox."""
        plan: CheckpointPlan | None = await self._read(self._checkpoint_plan, mailbox)
        return plan

    def _checkpoint_plan(self, mailbox: int) -> CheckpointPlan | None:
        row = self._reader.execute(
            "SELECT id, account, name, uidvalidity, uid_next, modseq, messages, octets, checkpoint_modseq,"
            " checkpoint_number, checkpoint_rows, checkpoint_side FROM mailboxes WHERE id = ?",
            (mailbox,),
        ).fetchone()
        if row is None:
            return None
        facts = MailboxFacts(*row[:8])
        since, number, rows, side = row[8:]
        if since == 0 or rows > facts.messages + 1000:
            return CheckpointPlan(facts, 0, 0, 1 - side)
        return CheckpointPlan(facts, since, number, side)

    async def checkpoint_entries(self, plan: CheckpointPlan, after_uid: int, limit: int) -> list[EntryFacts]:
        """Some of its entries, in order of UID."""
        rows = await self._read(
            lambda: self._reader.execute(
                "SELECT uid, key, flags, modseq, octets, received_at FROM entries"
                " WHERE mailbox = ? AND uid > ? AND modseq > ? ORDER BY uid LIMIT ?",
                (plan.mailbox.id, after_uid, plan.since_modseq, limit),
            ).fetchall()
        )
        return [EntryFacts(*row) for row in rows]

    async def checkpoint_expunged(self, plan: CheckpointPlan, after_uid: int, limit: int) -> list[int]:
        """Some of its expunged UIDs, in order; a whole checkpoint needs none."""
        if not plan.since_modseq:
            return []
        rows = await self._read(
            lambda: self._reader.execute(
                "SELECT uid FROM expunged WHERE mailbox = ? AND uid > ? AND modseq > ? ORDER BY uid LIMIT ?",
                (plan.mailbox.id, after_uid, plan.since_modseq, limit),
            ).fetchall()
        )
        return [row[0] for row in rows]

    async def checkpoint_done(self, plan: CheckpointPlan, records: int, rows: int, at: float) -> None:
        """All its records are on R nodes."""
        await self._write(
            lambda: self._db.execute(
                "UPDATE mailboxes SET checkpoint_modseq = ?, checkpoint_number = ?, checkpoint_at = ?, checkpoint_side = ?,"
                " checkpoint_rows = CASE WHEN ? = 0 THEN 0 ELSE checkpoint_rows + ? END WHERE id = ?",
                (plan.mailbox.modseq, plan.number + records, at, plan.side, plan.since_modseq, rows, plan.mailbox.id),
            )
        )

    async def restore_mailbox(
        self, facts: MailboxFacts, entries: Sequence[EntryFacts], held: Mapping[bytes, tuple[int, bytes, tuple[str, ...]]]
    ) -> int:
        """Rebuild: enters a mailbox as of its checkpoint. `held` gives (octets, sha256, nodes) of keys the nodes have.

        Entries whose message is on no node are left out and counted in the result.
        """
        lost: int = await self._write(self._restore_mailbox, facts, entries, held)
        return lost

    def _restore_mailbox(
        self, facts: MailboxFacts, entries: Sequence[EntryFacts], held: Mapping[bytes, tuple[int, bytes, tuple[str, ...]]]
    ) -> int:
        db = self._db
        number = db.execute(
            "INSERT INTO mailboxes (account, name, uidvalidity, uid_next, modseq, epoch, messages, octets)"
            " VALUES (?, ?, ?, ?, ?, ?, 0, 0) RETURNING id",
            (facts.account, facts.name, facts.uidvalidity, facts.uid_next, facts.modseq, self._epoch - 1),
        ).fetchone()[0]
        messages = octets = lost = 0
        for entry in entries:
            copy = held.get(entry.key)
            if copy is None:
                lost += 1
                continue
            db.execute(
                "INSERT INTO messages VALUES (?, ?, ?, ?, 1) ON CONFLICT (key) DO UPDATE SET refs = refs + 1",
                (entry.key, copy[0], copy[1], self._placements.id(copy[2])),
            )
            db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", (number, *entry))
            messages += 1
            octets += entry.octets
        db.execute("UPDATE mailboxes SET messages = ?, octets = ? WHERE id = ?", (messages, octets, number))
        row = db.execute("SELECT value FROM meta WHERE name = 'uidvalidity'").fetchone()
        if row is None or int(row[0]) < facts.uidvalidity:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('uidvalidity', ?)", (str(facts.uidvalidity),))
        return lost

    # -- totals --------------------------------------------------------------------------------------------------

    async def totals(self) -> dict[str, int]:
        """Sizes for status."""
        return dict(await self._read(self._totals))

    def _totals(self) -> dict[str, int]:
        statements = {
            "mailboxes": "SELECT count(*) FROM mailboxes",
            "entries": "SELECT coalesce(sum(messages), 0) FROM mailboxes",
            "messages": "SELECT count(*) FROM messages",
            "queue": "SELECT count(*) FROM queue",
            "deletions": "SELECT count(*) FROM deletions",
            "suspects": "SELECT count(*) FROM suspects",
        }
        return {name: self._reader.execute(sql).fetchone()[0] for name, sql in statements.items()}

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        """(account, messages, octets) of accounts that have mailboxes, in order."""
        rows = await self._read(
            lambda: self._reader.execute(
                "SELECT account, sum(messages), sum(octets) FROM mailboxes WHERE account > ? GROUP BY account"
                " ORDER BY account LIMIT ?",
                (after, limit),
            ).fetchall()
        )
        return [(row[0], row[1], row[2]) for row in rows]

    async def audit(self) -> list[str]:
        """Recounts what can be recounted: mailbox totals and references. Returns what does not agree."""
        problems: list[str] = await self._read(self._audit)
        return problems

    def _audit(self) -> list[str]:
        problems = []
        rows = self._reader.execute(
            "SELECT m.id, m.account, m.name, m.messages, m.octets, count(e.uid), coalesce(sum(e.octets), 0),"
            " coalesce(max(e.uid), 0), m.uid_next, coalesce(max(e.modseq), 0), m.modseq"
            " FROM mailboxes m LEFT JOIN entries e ON e.mailbox = m.id GROUP BY m.id"
        )
        for _, account, name, messages, octets, count, total, high, uid_next, high_modseq, modseq in rows:
            if (messages, octets) != (count, total):
                problems.append(f"mailbox {account}/{name}: counts {messages}/{octets}, entries {count}/{total}")
            if high >= uid_next or high_modseq > modseq:
                problems.append(f"mailbox {account}/{name}: UIDNEXT {uid_next} or MODSEQ {modseq} is behind its entries")
        references: Collection[tuple[bytes, int, int]] = self._reader.execute(
            "SELECT m.key, m.refs, (SELECT count(*) FROM queue q WHERE q.key = m.key) + coalesce(n.count, 0)"
            " FROM messages m LEFT JOIN (SELECT key, count(*) AS count FROM entries GROUP BY key) n ON n.key = m.key"
        ).fetchall()
        for key, refs, count in references:
            if refs != count:
                problems.append(f"message {key.hex()}: {refs} references, {count} found")
        orphans = self._reader.execute(
            "SELECT e.mailbox, e.uid FROM entries e LEFT JOIN messages m ON m.key = e.key WHERE m.key IS NULL"
        ).fetchall()
        problems += [f"mailbox {mailbox} UID {uid}: its message is unknown" for mailbox, uid in orphans]
        return problems
