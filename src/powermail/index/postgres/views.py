"""Owns the views of mailboxes that a process has read: whoever reads one again goes on from there.

A view is only a place to go on from. Whether it is one is decided by the mailbox's row, read in the statement, or in the
snapshot, that shows it: the same UIDVALIDITY, no change since trimmed, and the same epoch, because numbers of one that was lost
stand for nothing (law 11). So it does not matter who else writes. A view in here is never changed: who brings it forward
copies it first.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.index.contract import MailboxFacts
from powermail.index.view import View


class Views:
    """At most so many views, and messages in them; the longest unused go first."""

    def __init__(self) -> None:
        self._views: dict[int, View] = {}
        self._messages = 0
        self._epoch = 0  # that all of them were read in

    def find(self, mailbox: int, epoch: int) -> View | None:
        """The view that was read last in this epoch."""
        view = self._views.get(mailbox) if epoch == self._epoch else None
        if view is not None:
            self._views[mailbox] = self._views.pop(mailbox)
        return view

    def keep(self, mailbox: int, epoch: int, view: View) -> None:
        """This one was read in a snapshot of that epoch; one that shows more stays."""
        if epoch < self._epoch:
            return
        if epoch > self._epoch:
            self.forget()
            self._epoch = epoch
        old = self._views.get(mailbox)
        if old is not None and (old.uidvalidity, old.modseq) >= (view.uidvalidity, view.modseq):
            return
        self._drop(mailbox)
        self._views[mailbox] = view
        self._messages += len(view)
        while self._messages > limits.INDEX_VIEWS_MESSAGES_MAX or len(self._views) > limits.INDEX_VIEWS_MAX:
            self._drop(next(iter(self._views)))

    def _drop(self, mailbox: int) -> None:
        view = self._views.pop(mailbox, None)
        self._messages -= len(view) if view is not None else 0

    def forget(self) -> None:
        """None of them is worth anything."""
        self._views.clear()
        self._messages = 0


def is_base(view: View, facts: MailboxFacts, trimmed: int) -> bool:
    """True if the mailbox is where the view is, or behind it by changes that are all there still."""
    if view.uidvalidity != facts.uidvalidity or view.uid_next > facts.uid_next:
        return False
    return trimmed <= view.modseq <= facts.modseq
