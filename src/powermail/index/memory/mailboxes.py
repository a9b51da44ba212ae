"""Owns what mailboxes show, in memory: listings, views and their tails, STORE, COPY, MOVE, EXPUNGE, purging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from powermail.index import laws
from powermail.index.contract import EntryFacts, FlagChange, MailboxFacts, Release, Stored, Tail
from powermail.index.memory.state import Gone
from powermail.index.memory.transaction import Transactions, Undo
from powermail.index.view import Op, View, changed_flags

_OPS = {FlagChange.REPLACE: Op.REPLACE_FLAGS, FlagChange.ADD: Op.ADD_FLAGS, FlagChange.REMOVE: Op.REMOVE_FLAGS}
_PURGE_ROWS = 5000  # entries removed in one transaction


class MailboxPart(Transactions):
    """`index.contract.Mailboxes` in memory."""

    async def find_mailbox(self, account: str, name: str) -> MailboxFacts | None:
        self.complete()
        for row in self.state.mailboxes.values():
            if (row.account, row.name) == (account, name):
                return row.facts()
        return None

    async def make_mailbox(self, account: str, name: str) -> MailboxFacts:
        if account in self.state.purged:
            raise KeyError(account)
        return self.mailbox(self.transact(lambda: self.make(account, name))).facts()

    async def mailboxes(self, after: int, limit: int) -> list[MailboxFacts]:
        return [row.facts() for number, row in sorted(self.state.mailboxes.items()) if number > after][:limit]

    async def accounts(self, after: str, limit: int) -> list[tuple[str, int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for row in self.state.mailboxes.values():
            messages, octets = found.get(row.account, (0, 0))
            found[row.account] = messages + row.messages, octets + row.octets
        return [(account, *totals) for account, totals in sorted(found.items()) if account > after][:limit]

    async def usage(self, account: str) -> int:
        return sum(row.octets for row in self.state.mailboxes.values() if row.account == account)

    async def entries(self, mailbox: int, after_uid: int, below_uid: int, limit: int) -> list[EntryFacts]:
        self.complete()
        return [entry for entry in self.rows_of(mailbox) if after_uid < entry.uid < below_uid][:limit]

    # -- views ----------------------------------------------------------------------------------------------------------

    async def view(self, mailbox: int) -> View:
        self.complete()
        return self.view_of(mailbox)

    async def tail(self, mailbox: int, modseq: int, uid_next: int) -> Tail | None:
        self.complete()
        row = self.mailbox(mailbox)
        if row.trimmed > modseq:
            return None  # without this look a view goes on from changes it never saw
        entries = [entry for entry in self.rows_of(mailbox) if entry.uid >= uid_next]
        return Tail(row.facts(), entries, self.changes_of(mailbox, modseq))

    async def changed(self, known: Mapping[int, int]) -> list[int]:
        rows = self.state.mailboxes
        return [each for each, modseq in known.items() if each not in rows or rows[each].numbers.modseq > modseq]

    async def merge(self, mailbox: int) -> bool:
        def merging() -> bool:
            if self.state.views[mailbox].modseq == self.mailbox(mailbox).numbers.modseq:
                raise Undo(False)
            self.fold(mailbox)
            return True

        return self.transact(merging)

    def fold(self, mailbox: int) -> None:
        """Folds the tail into the stored view and trims the changes."""
        s = self.state
        view = s.views[mailbox] = self.view_of(mailbox)
        s.changes = {at: change for at, change in s.changes.items() if at[0] != mailbox}
        s.mailboxes[mailbox] = s.mailboxes[mailbox]._replace(trimmed=view.modseq)

    # -- changing -------------------------------------------------------------------------------------------------------

    async def store(
        self, mailbox: int, uids: Sequence[int], how: FlagChange, flags: int, unchanged_since: int | None
    ) -> Stored:
        def storing() -> Stored:
            view, op = self.view_of(mailbox), _OPS[how]
            changed, conflicts = [], []
            for uid in sorted(set(uids)):
                if (place := view.place(uid)) < 0:
                    continue
                if unchanged_since is not None and view.modseqs[place] > unchanged_since:
                    conflicts.append(uid)
                elif changed_flags(view.flags[place], op, flags) != view.flags[place]:
                    changed.append(uid)
            if not changed:
                raise Undo(Stored(0, (), tuple(conflicts)))
            return Stored(self.change(mailbox, op, flags, changed), tuple(changed), tuple(conflicts))

        return self.transact(storing)

    async def keyword(self, mailbox: int, name: str) -> int:
        def assigning() -> int:
            before = self.mailbox(mailbox).keywords
            flag = self._keyword(mailbox, name)
            if self.mailbox(mailbox).keywords == before:
                raise Undo(flag)
            return flag

        return self.transact(assigning)

    def _keyword(self, mailbox: int, name: str) -> int:
        row = self.mailbox(mailbox)
        known = [each.lower() for each in row.keywords]
        if name.lower() in known:
            return laws.keyword_flag(known.index(name.lower()))
        flag = laws.keyword_flag(len(known))
        self.state.mailboxes[mailbox] = row._replace(keywords=(*row.keywords, name))
        return flag

    async def keywords(self, mailbox: int) -> dict[str, int]:
        return {name: laws.keyword_flag(number) for number, name in enumerate(self.mailbox(mailbox).keywords)}

    def _flags_there(self, mailbox: int, flags: int, to: int) -> int:
        """The flags of a message that goes to another mailbox, where keywords have other bits; those without room are left."""
        there = flags & (laws.keyword_flag(0) - 1)
        for number, name in enumerate(self.mailbox(mailbox).keywords):
            if flags & laws.keyword_flag(number):
                try:
                    there |= self._keyword(to, name)
                except ValueError:
                    continue
        return there

    async def copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        return self.transact(lambda: self._copy(mailbox, uids, to))

    def _copy(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        view = self.view_of(mailbox)
        if to not in self.state.mailboxes:
            raise KeyError(to)
        places = [(uid, view.place(uid)) for uid in sorted(set(uids))]
        found = [(uid, place) for uid, place in places if place >= 0]
        if not found:
            raise Undo([])
        laws.check_at_once(len(found))
        entries = [self.state.entries[mailbox, uid] for uid, _ in found]
        flags = [self._flags_there(mailbox, view.flags[place], to) for _, place in found]
        rows = [(each.key, there, each.octets, each.received_at) for each, there in zip(entries, flags, strict=True)]
        for key, _, _, _ in rows:
            self.refer(key, 1)  # law 8: the row is live, or nothing is copied
        return list(zip((uid for uid, _ in found), self.arrive(to, rows, together=True), strict=True))

    async def move(self, mailbox: int, uids: Sequence[int], to: int) -> list[tuple[int, int]]:
        def moving() -> list[tuple[int, int]]:
            pairs = self._copy(mailbox, uids, to)
            modseq = self.mailbox(to).numbers.modseq
            moved = {self.state.entries[to, there].key: Gone(0, to, modseq) for _, there in pairs}
            self.leave(mailbox, [uid for uid, _ in pairs], moved)
            return pairs

        return self.transact(moving)

    async def expunge(self, mailbox: int, uids: Sequence[int]) -> Release:
        def expunging() -> Release:
            release = self.leave(mailbox, uids)
            if not release.removed:
                raise Undo(release)
            return release

        return self.transact(expunging)

    # -- purging --------------------------------------------------------------------------------------------------------

    async def note_purged(self, account: str) -> None:
        def noting() -> None:
            self.state.purged[account] = None

        self.transact(noting)

    async def purged(self, after: str, limit: int) -> list[str]:
        return sorted(account for account in self.state.purged if account > after)[:limit]

    async def note_owners(self, owners: Mapping[str, str]) -> None:
        self.transact(lambda: self.state.owners.update(owners))

    async def owners(self, accounts: Sequence[str]) -> dict[str, str]:
        return {account: self.state.owners[account] for account in accounts if account in self.state.owners}

    async def purge(self, account: str) -> Release:
        removed = dead = 0
        while parts := [row.id for row in self.state.mailboxes.values() if row.account == account]:
            part = self.transact(partial(self._purge_some, parts[0]))
            removed, dead = removed + part.removed, dead + part.dead
        return Release(removed, dead)

    def _purge_some(self, mailbox: int) -> Release:
        """A bounded part of a mailbox, which needs no numbers: nobody reads it any more. Then the mailbox itself."""
        s = self.state
        entries = self.rows_of(mailbox)[:_PURGE_ROWS]
        for entry in entries:
            del s.entries[mailbox, entry.uid]
        dead = sum([self.dereference(entry.key) for entry in entries])
        row, octets = s.mailboxes[mailbox], sum(entry.octets for entry in entries)
        s.mailboxes[mailbox] = row._replace(messages=row.messages - len(entries), octets=row.octets - octets)
        if not self.rows_of(mailbox):
            self._remove(mailbox)
        return Release(len(entries), dead)

    def _remove(self, mailbox: int) -> None:
        s = self.state
        del s.mailboxes[mailbox], s.views[mailbox]
        s.changes = {at: change for at, change in s.changes.items() if at[0] != mailbox}
        s.gone = {at: gone for at, gone in s.gone.items() if at[0] != mailbox}
