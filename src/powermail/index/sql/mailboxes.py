"""Owns what mailboxes show: listings, views and tails, STORE, COPY, MOVE, EXPUNGE, merging and purging."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.index import laws
from powermail.index.contract import EntryFacts, FlagChange, MailboxFacts, Release, Stored, Tail
from powermail.index.sql.engine import Again, Reading, Transaction, Untouched, parts
from powermail.index.sql.numbers import (
    ENTRY,
    MAILBOX,
    read_arrived,
    read_changes,
    read_facts,
    read_view,
    trimmed,
)
from powermail.index.sql.references import Moved, References
from powermail.index.view import Op, View, changed_flags

_OPS = {FlagChange.REPLACE: Op.REPLACE_FLAGS, FlagChange.ADD: Op.ADD_FLAGS, FlagChange.REMOVE: Op.REMOVE_FLAGS}
_PURGE_ROWS = 5000  # entries removed in one transaction
_NOTICE_PART = 5000  # mailboxes asked for in one statement of the change notice


class MailboxPart(References):
    """`index.contract.Mailboxes`."""

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        return await self._show_one(self._find_mailbox, account, name)

    async def _find_mailbox(self, db: Reading, account: str, name: str) -> MailboxFacts | None:
        row = await db.one(f"SELECT {MAILBOX} FROM mailboxes WHERE account = ? AND name = ?", (account, name))
        return MailboxFacts(*row) if row else None

    async def make_mailbox(self, account: str, name: str) -> MailboxFacts:
        return await self._write(self._in_make_mailbox, account, name)

    async def _in_make_mailbox(self, db: Transaction, account: str, name: str) -> MailboxFacts | Untouched[MailboxFacts]:
        if await db.one("SELECT 1 FROM purged WHERE account = ?", (account,)):
            raise KeyError(account)  # law 13: nothing is entered for it again
        row = await db.one("SELECT id FROM mailboxes WHERE account = ? AND name = ?", (account, name))
        if row:
            return Untouched(await read_facts(db, row[0]))
        number = await self._in_make(db, account, name)
        await db.change(
            "UPDATE mailboxes SET due_at = ? WHERE id = ?", (self._world.clock.now() + limits.CHECKPOINT_INTERVAL_S, number)
        )
        return await read_facts(db, number)

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        return await self._ask(self._mailboxes, after, limit)

    async def _mailboxes(self, db: Reading, after: int, limit: int) -> list[MailboxFacts]:
        rows = await db.rows(f"SELECT {MAILBOX} FROM mailboxes WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [MailboxFacts(*row) for row in rows]

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        return await self._ask(self._accounts, after, limit)

    async def _accounts(self, db: Reading, after: str, limit: int) -> list[tuple[str, int, int]]:
        rows = await db.rows(
            "SELECT account, CAST(sum(messages) AS BIGINT), CAST(sum(octets) AS BIGINT) FROM mailboxes"
            " WHERE account > ? GROUP BY account ORDER BY account"
            " LIMIT ?",
            (after, limit),
        )
        return [(account, messages, octets) for account, messages, octets in rows]

    async def usage(self, account: str) -> int:
        return await self._ask(self._usage, account)

    async def _usage(self, db: Reading, account: str) -> int:
        row = await db.one("SELECT CAST(sum(octets) AS BIGINT) FROM mailboxes WHERE account = ?", (account,))
        return row[0] or 0

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        return await self._show_one(self._entries, mailbox, after_uid, below_uid, limit)

    async def _entries(self, db: Reading, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        rows = await db.rows(
            f"SELECT {ENTRY} FROM entries WHERE mailbox = ? AND uid > ? AND uid < ? ORDER BY uid LIMIT ?",
            (mailbox, after_uid, below_uid, limit),
        )
        return [EntryFacts(*row) for row in rows]

    # -- views ---------------------------------------------------------------------------------------------------------

    async def view(self, mailbox: int) -> View:
        """As the contract says; a tail that outweighs the mailbox is folded in passing."""
        view, outgrown = await self._show(self._view, mailbox)
        if outgrown:
            with contextlib.suppress(IndexTrouble):  # who folds it next time may have more luck: it was read
                await self.merge(mailbox)
        return view

    async def _view(self, db: Reading, mailbox: int) -> tuple[View, bool]:
        rows = (
            await db.one("SELECT count(*) FROM changes WHERE mailbox = ? AND modseq > ?", (mailbox, await trimmed(db, mailbox)))
        )[0]
        view = await read_view(db, mailbox)
        return view, laws.wants_whole(1, len(view), rows, holders_gone=False, skipped=False)

    async def tail(self, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        return await self._show(self._tail, mailbox, modseq, uid_next)

    async def _tail(self, db: Reading, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        facts = await read_facts(db, mailbox)
        if await trimmed(db, mailbox) > modseq:
            return None  # without this look a view goes on from changes it never saw
        arrived = await read_arrived(db, mailbox, uid_next) if facts.uid_next != uid_next else []
        changes = await read_changes(db, mailbox, modseq, facts.messages) if facts.modseq != modseq else []
        return Tail(facts, arrived, changes)

    async def changed(self, known: Mapping[int, int]) -> list[int]:
        return await self._read(self._changed, dict(known))

    async def _changed(self, db: Reading, known: dict[int, int]) -> list[int]:
        now: dict[int, int] = {}
        for part in parts(list(known), _NOTICE_PART):
            now.update(await db.rows_in("SELECT id, modseq FROM mailboxes WHERE id IN", part))
        return [mailbox for mailbox, modseq in known.items() if mailbox not in now or now[mailbox] > modseq]

    async def merge(self, mailbox: int) -> bool:
        """The state is packed aside, so that deliveries do not wait for it."""
        connection = self.connection
        epoch, old, view = await self._read(self._stored_in, mailbox)
        if view.modseq == old:
            return False
        packed = await self._aside(view.pack)
        return await self._write(self._in_merge, mailbox, (connection, epoch, old), view, packed)

    async def _stored_in(self, db: Reading, mailbox: int) -> tuple[int, int, View]:
        """The epoch, and what `_stored` finds in it."""
        row = await db.one("SELECT value FROM counters WHERE name = 'epoch'")
        return int(row[0]), *await self._stored(db, mailbox)

    async def _stored(self, db: Reading, mailbox: int) -> tuple[int, View]:
        return await trimmed(db, mailbox), await read_view(db, mailbox)

    async def _in_merge(
        self, db: Transaction, mailbox: int, read_in: tuple[int, int, int], view: View, packed: list[bytes]
    ) -> bool | Untouched[bool]:
        """`read_in`: the connection, the epoch and the stored view by which it was read. What another history showed may be
        lost, and another view of it was never stored.
        """
        connection, epoch, old = read_in
        self._check_found()
        if connection != self.connection or epoch != await db.counter("epoch"):
            return Untouched(False)
        row = await db.one("SELECT uidvalidity FROM mailboxes WHERE id = ? FOR UPDATE", (mailbox,))
        if row is None or row[0] != view.uidvalidity or await trimmed(db, mailbox) != old:
            return Untouched(False)
        await self._in_put_view(db, mailbox, packed, view.modseq, view.uid_next)
        await db.change("DELETE FROM changes WHERE mailbox = ? AND modseq <= ?", (mailbox, view.modseq))
        return True

    # -- flags ---------------------------------------------------------------------------------------------------------

    async def store(
        self, mailbox: int, uids: Sequence[int], how: FlagChange, flags: int, unchanged_since: int | None
    ) -> Stored:
        return await self._write(self._in_store, mailbox, uids, _OPS[how], flags, unchanged_since)

    async def _in_store(
        self, db: Transaction, mailbox: int, uids: Sequence[int], op: Op, flags: int, unchanged_since: int | None
    ) -> Stored | Untouched[Stored]:
        view = await self._in_view(db, mailbox)
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
        return Stored(await self._in_change(db, mailbox, op, flags, changed), tuple(changed), tuple(conflicts))

    async def keyword(self, mailbox: int, name: str) -> int:
        return await self._write(self._in_assign_keyword, mailbox, name)

    async def _in_assign_keyword(self, db: Transaction, mailbox: int, name: str) -> int | Untouched[int]:
        await read_facts(db, mailbox, lock=True)
        before = db.changes
        flag = await self._in_keyword(db, mailbox, name)
        return flag if db.changes != before else Untouched(flag)

    async def _in_keyword(self, db: Transaction, mailbox: int, name: str) -> int:
        """The flag bit of a keyword, which is the same in upper and lower case. Raises ValueError."""
        known = await db.rows("SELECT bit, name FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,))
        for bit, each in known:
            if each.lower() == name.lower():
                return int(bit)
        number = 0
        while known and laws.keyword_flag(number) <= known[-1][0]:
            number += 1
        flag = laws.keyword_flag(number)
        await db.change("INSERT INTO keywords VALUES (?, ?, ?)", (mailbox, flag, name))
        return flag

    async def keywords(self, mailbox: int) -> dict[str, int]:
        return await self._read(self._keywords, mailbox)

    async def _keywords(self, db: Reading, mailbox: int) -> dict[str, int]:
        await read_facts(db, mailbox)
        return dict(await db.rows("SELECT name, bit FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,)))

    async def _in_flags_there(self, db: Transaction, mailbox: int, to: int, flags: Iterable[int]) -> dict[int, int]:
        """Flags of messages that go to another mailbox, where keywords have other bits; what has no room there is left out."""
        rows = await db.rows("SELECT bit, name FROM keywords WHERE mailbox = ? ORDER BY bit", (mailbox,))
        there = dict.fromkeys(flags, 0)
        used = 0
        for each in there:
            there[each] = each & (laws.keyword_flag(0) - 1)
            used |= each
        for bit, name in rows:
            if not used & bit:
                continue
            try:
                new = await self._in_keyword(db, to, name)
            except ValueError:
                continue
            for each in there:
                there[each] |= new if each & bit else 0
        return there

    # -- COPY, MOVE, EXPUNGE -------------------------------------------------------------------------------------------

    async def copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        return await self._write(self._in_copy, mailbox, uids, to)

    async def _in_copy(
        self, db: Transaction, mailbox: int, uids: Sequence[int], to: int
    ) -> list[tuple[int, int]] | Untouched[list[tuple[int, int]]]:
        uids = await db.lock_entries(mailbox, uids, to)
        await read_facts(db, to)
        view = await self._in_view(db, mailbox)
        found = [(uid, place) for uid in sorted(set(uids)) if (place := view.place(uid)) >= 0]
        if not found:
            return Untouched([])
        laws.check_at_once(len(found))
        # Law 8: the keys were locked first, then the entries read.
        keys = [view.key(place) for _, place in found]
        if not await self._in_refer(db, keys):
            return Untouched([])
        here = [uid for uid, _ in found]
        dates = dict(
            await db.rows_in("SELECT uid, received_at FROM entries WHERE mailbox = ? AND uid IN", here, "", (mailbox,))
        )
        flags = await self._in_flags_there(db, mailbox, to, [view.flags[place] for _, place in found])
        octets = [view.octets[place] for _, place in found]
        first, modseq = await self._in_take(db, to, len(found))
        rows = [
            (to, first + number, keys[number], flags[view.flags[place]], modseq, octets[number], dates[uid])
            for number, (uid, place) in enumerate(found)
        ]
        await db.put("INSERT INTO entries", 7, rows)
        await db.change(
            "UPDATE mailboxes SET messages = messages + ?, octets = octets + ? WHERE id = ?", (len(rows), sum(octets), to)
        )
        await db.many("DELETE FROM gone WHERE mailbox = ? AND key = ?", [(to, key) for key in sorted(set(keys))])
        return [(uid, first + number) for number, uid in enumerate(here)]

    async def move(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        return await self._write(self._in_move, mailbox, uids, to)

    async def _in_move(
        self, db: Transaction, mailbox: int, uids: Sequence[int], to: int
    ) -> list[tuple[int, int]] | Untouched[list[tuple[int, int]]]:
        pairs = await self._in_copy(db, mailbox, uids, to)
        if isinstance(pairs, Untouched):
            return pairs
        await self._in_leave(db, mailbox, [uid for uid, _ in pairs], Moved(to, (await read_facts(db, to)).modseq))
        return pairs

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        return await self._write(self._in_expunge, mailbox, uids)

    async def _in_expunge(self, db: Transaction, mailbox: int, uids: Sequence[int]) -> Release | Untouched[Release]:
        release = await self._in_leave(db, mailbox, uids)
        return release if release.removed else Untouched(release)

    # -- purging -------------------------------------------------------------------------------------------------------

    async def note_purged(self, account: str) -> None:
        await self._write(self._in_note_purged, account)

    async def _in_note_purged(self, db: Transaction, account: str) -> None:
        await db.change("INSERT INTO purged VALUES (?) ON CONFLICT DO NOTHING", (account,))
        await db.one("SELECT value FROM counters WHERE name = 'uidvalidity' FOR UPDATE")  # see `_in_name`
        self._in_forget_boxes(db, account)

    @staticmethod
    def _in_forget_boxes(db: Transaction, account: str) -> None:
        for at in [at for at in db.boxes if at[0] == account]:
            del db.boxes[at]

    async def purged(self, after: str, limit: int) -> list[str]:
        return await self._ask(self._purged, after, limit)

    async def _purged(self, db: Reading, after: str, limit: int) -> list[str]:
        rows = await db.rows("SELECT account FROM purged WHERE account > ? ORDER BY account LIMIT ?", (after, limit))
        return [row[0] for row in rows]

    async def note_owners(self, owners: Mapping[str, str]) -> None:
        await self._write(self._in_note_owners, list(owners.items()))

    async def _in_note_owners(self, db: Transaction, owners: list[tuple[str, str]]) -> Untouched[None] | None:
        if not owners:
            return Untouched(None)
        statement = "INSERT INTO owners VALUES (?, ?) ON CONFLICT (account) DO UPDATE SET address = excluded.address"
        await db.many(statement, sorted(owners))
        return None

    async def owners(self, accounts: Sequence[str]) -> dict[str, str]:
        return await self._ask(self._owners, accounts)

    async def _owners(self, db: Reading, accounts: Sequence[str]) -> dict[str, str]:
        return dict(await db.rows_in("SELECT account, address FROM owners WHERE account IN", accounts))

    async def purge(self, account: str) -> Release:
        removed = dead = 0
        while (part := await self._write(self._in_purge_some, account)) is not None:
            removed += part.removed
            dead += part.dead
        return Release(removed, dead)

    async def _in_purge_some(self, db: Transaction, account: str) -> Release | Untouched[Release | None] | None:
        """A bounded part of a mailbox, which needs no numbers: nobody reads it any more. Then the mailbox itself."""
        row = await db.one("SELECT id FROM mailboxes WHERE account = ? ORDER BY id LIMIT 1", (account,))
        if row is None:
            return Untouched(None)
        mailbox = row[0]
        self._in_forget_boxes(db, account)
        db.forget_view(mailbox)
        first = await db.rows("SELECT uid FROM entries WHERE mailbox = ? ORDER BY uid LIMIT ?", (mailbox, _PURGE_ROWS))
        await db.lock_entries(mailbox, [row[0] for row in first])
        for table in ("views", "changes"):
            await db.change(f"DELETE FROM {table} WHERE mailbox = ?", (mailbox,))
        rows = await db.rows(
            "DELETE FROM entries WHERE mailbox = ? AND uid <= ? RETURNING key, octets", (mailbox, first[-1][0] if first else -1)
        )
        if not rows:
            if not db.alone and await db.one("SELECT 1 FROM entries WHERE mailbox = ? LIMIT 1", (mailbox,)):
                raise Again("something came between")
            # In the order in which those touch them who know their keys, and not this mailbox.
            text = "SELECT key FROM gone WHERE mailbox = ? ORDER BY key LIMIT ? FOR UPDATE"
            if gone := await db.rows(text, (mailbox, _PURGE_ROWS)):
                await db.change("DELETE FROM gone WHERE mailbox = ? AND key <= ?", (mailbox, gone[-1][0]))
                return Release(0, 0)
            for table, column in (("gone", "mailbox"), ("keywords", "mailbox"), ("mailboxes", "id")):
                await db.change(f"DELETE FROM {table} WHERE {column} = ?", (mailbox,))
            return Release(0, 0)
        await db.change(
            "UPDATE mailboxes SET messages = messages - ?, octets = octets - ? WHERE id = ?",
            (len(rows), sum(octets for _, octets in rows), mailbox),
        )
        return Release(len(rows), len(await self._in_release(db, (key for key, _ in rows))))
