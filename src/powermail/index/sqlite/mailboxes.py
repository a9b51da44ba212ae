"""Owns what mailboxes show, on SQLite: listings, views and tails, STORE, COPY, MOVE, EXPUNGE, merging and purging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from powermail.base import limits
from powermail.index import laws
from powermail.index.contract import EntryFacts, FlagChange, MailboxFacts, Release, Stored, Tail
from powermail.index.sqlite.connection import Untouched
from powermail.index.sqlite.numbers import (
    ENTRY,
    MAILBOX,
    read_arrived,
    read_changes,
    read_facts,
    read_view,
    trimmed,
)
from powermail.index.sqlite.references import Moved, References
from powermail.index.sqlite.rows import in_list, insert_many, parts, select_in
from powermail.index.view import Op, View, changed_flags

_OPS = {FlagChange.REPLACE: Op.REPLACE_FLAGS, FlagChange.ADD: Op.ADD_FLAGS, FlagChange.REMOVE: Op.REMOVE_FLAGS}
_PURGE_ROWS = 5000  # entries removed in one transaction
_NOTICE_PART = 5000  # mailboxes asked for in one statement of the change notice


class MailboxPart(References):
    """`index.contract.Mailboxes` on SQLite."""

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        self._complete()
        return await self._ask(self._find_mailbox, account, name)

    def _find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        row = self._reader.execute(
            f"SELECT {MAILBOX} FROM mailboxes WHERE account = ? AND name = ?", (account, name)
        ).fetchone()
        return MailboxFacts(*row) if row else None

    async def make_mailbox(self, account: str, name: str) -> MailboxFacts:
        return await self._write(self._in_make_mailbox, account, name)

    def _in_make_mailbox(self, account: str, name: str) -> MailboxFacts | Untouched[MailboxFacts]:
        db = self._db
        if db.execute("SELECT 1 FROM purged WHERE account = ?", (account,)).fetchone():
            raise KeyError(account)  # law 13: nothing is entered for it again
        row = db.execute("SELECT id FROM mailboxes WHERE account = ? AND name = ?", (account, name)).fetchone()
        if row:
            return Untouched(read_facts(db, row[0]))
        number = self._in_make(account, name)
        db.execute(
            "UPDATE mailboxes SET due_at = ? WHERE id = ?", (self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S, number)
        )
        return read_facts(db, number)

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        return await self._ask(self._mailboxes, after, limit)

    def _mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        rows = self._reader.execute(f"SELECT {MAILBOX} FROM mailboxes WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [MailboxFacts(*row) for row in rows]

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        return await self._ask(self._accounts, after, limit)

    def _accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        rows = self._reader.execute(
            "SELECT account, sum(messages), sum(octets) FROM mailboxes WHERE account > ? GROUP BY account ORDER BY account"
            " LIMIT ?",
            (after, limit),
        )
        return [(account, messages, octets) for account, messages, octets in rows]

    async def usage(self, account: str) -> int:
        """Octets, from memory where nothing changed since: exact, because only this process writes."""
        used = self._used.get(account)
        if used is not None:
            return used
        changes, quiet = self._changes, not self._under_way
        used = await self._ask(self._usage, account)
        if quiet and changes == self._changes:  # else a change came between, and the figure may be old
            if len(self._used) >= limits.DIRECTORY_CACHE_MAX:
                self._used.clear()
            self._used[account] = used
        return used

    def _usage(self, account: str) -> int:
        row = self._reader.execute("SELECT sum(octets) FROM mailboxes WHERE account = ?", (account,)).fetchone()
        return row[0] or 0

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        self._complete()
        return await self._ask(self._entries, mailbox, after_uid, below_uid, limit)

    def _entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        rows = self._reader.execute(
            f"SELECT {ENTRY} FROM entries WHERE mailbox = ? AND uid > ? AND uid < ? ORDER BY uid LIMIT ?",
            (mailbox, after_uid, below_uid, limit),
        )
        return [EntryFacts(*row) for row in rows]

    # -- views ---------------------------------------------------------------------------------------------------------

    async def view(self, mailbox: int) -> View:
        """As the contract says; a tail that outweighs the mailbox is folded in passing."""
        self._complete()
        view, outgrown = await self._read(self._view, mailbox)
        if outgrown:
            await self.merge(mailbox)
        return view

    def _view(self, mailbox: int) -> tuple[View, bool]:
        db = self._reader
        rows = db.execute(
            "SELECT count(*) FROM changes WHERE mailbox = ? AND modseq > ?", (mailbox, trimmed(db, mailbox))
        ).fetchone()[0]
        view = read_view(db, mailbox)
        return view, laws.wants_whole(1, len(view), rows, holders_gone=False, skipped=False)

    async def tail(self, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        self._complete()
        return await self._read(self._tail, mailbox, modseq, uid_next)

    def _tail(self, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        db = self._reader
        facts = read_facts(db, mailbox)
        if trimmed(db, mailbox) > modseq:
            return None  # without this look a view goes on from changes it never saw
        return Tail(facts, read_arrived(db, mailbox, uid_next), read_changes(db, mailbox, modseq))

    async def changed(self, known: Mapping[int, int]) -> list[int]:
        return await self._read(self._changed, dict(known))

    def _changed(self, known: dict[int, int]) -> list[int]:
        now: dict[int, int] = {}
        for part in parts(list(known), _NOTICE_PART):
            now.update(self._reader.execute(f"SELECT id, modseq FROM mailboxes WHERE id IN ({in_list(part)})", part).fetchall())
        return [mailbox for mailbox, modseq in known.items() if mailbox not in now or now[mailbox] > modseq]

    async def merge(self, mailbox: int) -> bool:
        """The state is packed in the reading lane, so that deliveries do not wait for it."""
        old, view = await self._read(lambda: (trimmed(self._reader, mailbox), read_view(self._reader, mailbox)))
        if view.modseq == old:
            return False
        packed = await self._read(view.pack)
        return await self._write(self._in_merge, mailbox, old, view, packed)

    def _in_merge(self, mailbox: int, old: int, view: View, packed: list[bytes]) -> bool | Untouched[bool]:
        db = self._db
        row = db.execute("SELECT uidvalidity FROM mailboxes WHERE id = ?", (mailbox,)).fetchone()
        if row is None or row[0] != view.uidvalidity or trimmed(db, mailbox) != old:
            return Untouched(False)
        self._in_put_view(mailbox, packed, view.modseq, view.uid_next)
        db.execute("DELETE FROM changes WHERE mailbox = ? AND modseq <= ?", (mailbox, view.modseq))
        return True

    # -- flags ---------------------------------------------------------------------------------------------------------

    async def store(
        self, mailbox: int, uids: Sequence[int], how: FlagChange, flags: int, unchanged_since: int | None
    ) -> Stored:
        return await self._write(self._in_store, mailbox, uids, _OPS[how], flags, unchanged_since)

    def _in_store(
        self, mailbox: int, uids: Sequence[int], op: Op, flags: int, unchanged_since: int | None
    ) -> Stored | Untouched[Stored]:
        view = self._in_view(mailbox)
        changed, conflicts = [], []
        for uid in sorted(set(uids)):
            if (place := view.place(uid)) < 0:
                continue
            if unchanged_since is not None and view.modseqs[place] > unchanged_since:
                conflicts.append(uid)  # RFC 7162 §3.1.3
            elif changed_flags(view.flags[place], op, flags) != view.flags[place]:
                changed.append(uid)
        if not changed:
            return Untouched(Stored(0, (), tuple(conflicts)))
        return Stored(self._in_change(mailbox, op, flags, changed), tuple(changed), tuple(conflicts))

    async def keyword(self, mailbox: int, name: str) -> int:
        return await self._write(self._in_assign_keyword, mailbox, name)

    def _in_assign_keyword(self, mailbox: int, name: str) -> int | Untouched[int]:
        read_facts(self._db, mailbox)
        before = self._db.total_changes
        flag = self._in_keyword(mailbox, name)
        return flag if self._db.total_changes != before else Untouched(flag)

    def _in_keyword(self, mailbox: int, name: str) -> int:
        """The flag bit of a keyword, which is the same in upper and lower case. Raises ValueError."""
        known = self._db.execute("SELECT bit, name FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,)).fetchall()
        for bit, each in known:
            if each.lower() == name.lower():
                return int(bit)
        number = 0
        while known and laws.keyword_flag(number) <= known[-1][0]:
            number += 1
        flag = laws.keyword_flag(number)
        self._db.execute("INSERT INTO keywords VALUES (?, ?, ?)", (mailbox, flag, name))
        return flag

    async def keywords(self, mailbox: int) -> dict[str, int]:
        return await self._read(self._keywords, mailbox)

    def _keywords(self, mailbox: int) -> dict[str, int]:
        read_facts(self._reader, mailbox)
        return dict(
            self._reader.execute("SELECT name, bit FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,)).fetchall()
        )

    def _in_flags_there(self, mailbox: int, to: int, flags: Iterable[int]) -> dict[int, int]:
        """Flags of messages that go to another mailbox, where keywords have other bits; what has no room there is left out."""
        rows = self._db.execute("SELECT bit, name FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,)).fetchall()
        there = dict.fromkeys(flags, 0)
        used = 0
        for each in there:
            there[each] = each & (laws.keyword_flag(0) - 1)
            used |= each
        for bit, name in rows:
            if not used & bit:
                continue
            try:
                new = self._in_keyword(to, name)
            except ValueError:
                continue
            for each in there:
                there[each] |= new if each & bit else 0
        return there

    # -- COPY, MOVE, EXPUNGE -------------------------------------------------------------------------------------------

    async def copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        return await self._write(self._in_copy, mailbox, uids, to)

    def _in_copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]] | Untouched[list[tuple[int, int]]]:
        db = self._db
        read_facts(db, to)
        view = self._in_view(mailbox)
        found = [(uid, place) for uid in sorted(set(uids)) if (place := view.place(uid)) >= 0]
        if not found:
            return Untouched([])
        laws.check_at_once(len(found))
        # Law 8: the keys are locked first, then the entries are read; here one transaction at a time writes.
        keys = [view.key(place) for _, place in found]
        taken = [db.execute("UPDATE messages SET refs = refs + 1 WHERE key = ? AND fate = 1", (key,)).rowcount for key in keys]
        if not all(taken):
            return Untouched([])
        here = [uid for uid, _ in found]
        dates = dict(select_in(db, "SELECT uid, received_at FROM entries WHERE mailbox = ? AND uid IN", here, "", (mailbox,)))
        flags = self._in_flags_there(mailbox, to, [view.flags[place] for _, place in found])
        octets = [view.octets[place] for _, place in found]
        first, modseq = self._in_take(to, len(found))
        rows = [
            (to, first + number, keys[number], flags[view.flags[place]], modseq, octets[number], dates[uid])
            for number, (uid, place) in enumerate(found)
        ]
        insert_many(db, "INSERT INTO entries", 7, rows)
        db.execute(
            "UPDATE mailboxes SET messages = messages + ?, octets = octets + ? WHERE id = ?", (len(rows), sum(octets), to)
        )
        db.executemany("DELETE FROM gone WHERE mailbox = ? AND key = ?", [(to, key) for key in keys])
        return [(uid, first + number) for number, uid in enumerate(here)]

    async def move(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        return await self._write(self._in_move, mailbox, uids, to)

    def _in_move(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]] | Untouched[list[tuple[int, int]]]:
        pairs = self._in_copy(mailbox, uids, to)
        if isinstance(pairs, Untouched):
            return pairs
        self._in_leave(mailbox, [uid for uid, _ in pairs], Moved(to, read_facts(self._db, to).modseq))
        return pairs

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        return await self._write(self._in_expunge, mailbox, uids)

    def _in_expunge(self, mailbox: int, uids: Sequence[int]) -> Release | Untouched[Release]:
        release = self._in_leave(mailbox, uids)
        return release if release.removed else Untouched(release)

    # -- purging -------------------------------------------------------------------------------------------------------

    async def note_purged(self, account: str) -> None:
        await self._write(self._in_note_purged, account)

    def _in_note_purged(self, account: str) -> None:
        self._db.execute("INSERT INTO purged VALUES (?) ON CONFLICT DO NOTHING", (account,))
        self._in_forget_boxes(account)

    def _in_forget_boxes(self, account: str) -> None:
        for at in [at for at in self._boxes if at[0] == account]:
            del self._boxes[at]

    async def purged(self, after: str, limit: int) -> list[str]:
        return await self._ask(self._purged, after, limit)

    def _purged(self, after: str, limit: int) -> list[str]:
        rows = self._reader.execute("SELECT account FROM purged WHERE account > ? ORDER BY account LIMIT ?", (after, limit))
        return [row[0] for row in rows]

    async def note_owners(self, owners: Mapping[str, str]) -> None:
        await self._write(self._in_note_owners, list(owners.items()))

    def _in_note_owners(self, owners: list[tuple[str, str]]) -> Untouched[None] | None:
        if not owners:
            return Untouched(None)
        self._db.executemany(
            "INSERT INTO owners VALUES (?, ?) ON CONFLICT (account) DO UPDATE SET address = excluded.address", owners
        )
        return None

    async def owners(self, accounts: Sequence[str]) -> dict[str, str]:
        return await self._ask(self._owners, accounts)

    def _owners(self, accounts: Sequence[str]) -> dict[str, str]:
        return dict(select_in(self._reader, "SELECT account, address FROM owners WHERE account IN", accounts))

    async def purge(self, account: str) -> Release:
        removed = dead = 0
        while (part := await self._write(self._in_purge_some, account)) is not None:
            removed += part.removed
            dead += part.dead
        return Release(removed, dead)

    def _in_purge_some(self, account: str) -> Release | Untouched[Release | None] | None:
        """A bounded part of a mailbox, which needs no numbers: nobody reads it any more. Then the mailbox itself."""
        db = self._db
        row = db.execute("SELECT id FROM mailboxes WHERE account = ? ORDER BY id LIMIT 1", (account,)).fetchone()
        if row is None:
            return Untouched(None)
        mailbox = row[0]
        self._in_forget_boxes(account)
        self._in_forget_view(mailbox)
        for table in ("views", "changes"):
            db.execute(f"DELETE FROM {table} WHERE mailbox = ?", (mailbox,))
        rows = db.execute(
            "DELETE FROM entries WHERE mailbox = ?1 AND uid IN (SELECT uid FROM entries WHERE mailbox = ?1 LIMIT ?2)"
            " RETURNING key, octets",
            (mailbox, _PURGE_ROWS),
        ).fetchall()
        if not rows:
            for table, column in (("gone", "mailbox"), ("keywords", "mailbox"), ("mailboxes", "id")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (mailbox,))
            return Release(0, 0)
        db.execute(
            "UPDATE mailboxes SET messages = messages - ?, octets = octets - ? WHERE id = ?",
            (len(rows), sum(octets for _, octets in rows), mailbox),
        )
        return Release(len(rows), len(self._in_release(key for key, _ in rows)))
