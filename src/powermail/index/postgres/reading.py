"""Owns what readers ask most often of PostgreSQL: a whole mailbox, and which mailboxes have changed."""

from __future__ import annotations

from collections.abc import Mapping

from powermail.index import laws
from powermail.index.contract import MailboxFacts
from powermail.index.postgres.connection import PostgresCore
from powermail.index.postgres.views import is_base
from powermail.index.sql.engine import Reading, parts
from powermail.index.sql.mailboxes import MailboxPart
from powermail.index.sql.numbers import MAILBOX, follow, read_view
from powermail.index.view import View

_STATE = (
    "SELECT (SELECT value FROM counters WHERE name = 'epoch'),"
    " coalesce((SELECT v.modseq FROM views v WHERE v.mailbox = mailboxes.id AND v.part = 0), 0),"
    f" {MAILBOX} FROM mailboxes WHERE id = ?"
)
# What has not changed does not travel.
_CHANGED = (
    "SELECT w.id FROM unnest(?::bigint[], ?::bigint[]) AS w(id, modseq) LEFT JOIN mailboxes m ON m.id = w.id"
    " WHERE m.id IS NULL OR m.modseq > w.modseq"
)
_NOTICE_PART = 5000  # mailboxes asked for in one statement of the change notice


class ReadPart(MailboxPart, PostgresCore):
    """`view` and `changed` of `index.contract.Mailboxes` on PostgreSQL."""

    async def view(self, mailbox: int) -> View:
        """As the contract says. One that nobody has changed since it was read costs one statement."""
        kept = await self._show_one(self._unchanged, mailbox)
        return kept.copy() if kept is not None else await super().view(mailbox)

    async def _unchanged(self, db: Reading, mailbox: int) -> View | None:
        row = await db.one(_STATE, (mailbox,))
        if row is None:
            return None
        epoch, stored, *values = row
        kept, facts = self._views.find(mailbox, epoch), MailboxFacts(*values)
        if kept is None or not is_base(kept, facts, stored):
            return None
        return kept if (kept.uid_next, kept.modseq) == (facts.uid_next, facts.modseq) else None

    async def _view(self, db: Reading, mailbox: int) -> tuple[View, bool]:
        stored, view = await self._stored(db, mailbox)
        rows = (await db.one("SELECT count(*) FROM changes WHERE mailbox = ? AND modseq > ?", (mailbox, stored)))[0]
        return view.copy(), laws.wants_whole(1, len(view), rows, holders_gone=False, skipped=False)

    async def _stored(self, db: Reading, mailbox: int) -> tuple[int, View]:
        """The MODSEQ of the stored view, and the view now, which nobody may change."""
        row = await db.one(_STATE, (mailbox,))
        if row is None:
            raise KeyError(mailbox)
        epoch, stored, *values = row
        kept, facts = self._views.find(mailbox, epoch), MailboxFacts(*values)
        if kept is None or not is_base(kept, facts, stored):
            view = await read_view(db, mailbox)
        else:
            view = kept.copy()
            await follow(db, view, facts)
        self._views.keep(mailbox, epoch, view)
        return stored, view

    async def changed(self, known: Mapping[int, int]) -> list[int]:
        return await self._ask(self._changed, dict(known))

    async def _changed(self, db: Reading, known: dict[int, int]) -> list[int]:
        changed: set[int] = set()
        for part in parts(list(known), _NOTICE_PART):
            changed.update(row[0] for row in await db.rows(_CHANGED, (part, [known[mailbox] for mailbox in part])))
        return [mailbox for mailbox in known if mailbox in changed]
