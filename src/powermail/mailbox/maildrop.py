"""Owns the maildrop: POP3's view of INBOX, fixed at login, exclusive to one session at a time.

The stated rule: one POP3 session per account, whatever process serves it; a second gets [IN-USE]. Numbers are fixed for the
session;
what arrives later is seen next time. DELE takes effect at `update` only (P11). The unique-id is the message key.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from typing import NamedTuple

from powermail.base import limits
from powermail.base.tasks import Tasks
from powermail.cluster.packing import Small
from powermail.index.contract import Index, MailboxFacts
from powermail.mailbox.exclusive import Exclusive
from powermail.message.opener import Opener

_KEY_OCTETS = 16


class InUse(Exception):
    """Another session has this maildrop."""


class Listed(NamedTuple):
    """One message of the maildrop."""

    number: int
    octets: int
    key: bytes

    @property
    def unique_id(self) -> str:
        """RFC 1939 §7: 1 to 70 characters, never used for another message."""
        return self.key.hex()


class Maildrop:
    """INBOX of one account for one session. Numbers begin with 1."""

    def __init__(self, drops: Maildrops, account: str, facts: MailboxFacts | None) -> None:
        self.count = facts.messages if facts else 0
        self.octets = facts.octets if facts else 0
        self._drops = drops
        self._account = account
        self._facts = facts
        self._loaded = facts is None or not facts.messages
        self._uids = array("L")
        self._sizes = array("Q")
        self._keys = bytearray()
        self._deleted: dict[int, None] = {}
        self._ahead: dict[int, Small] = {}
        self._ahead_octets = 0
        self._places: dict[bytes, tuple[str, ...]] = {}  # of messages to come
        self._reading: asyncio.Task[None] | None = None
        self._last = 0
        self._released = False

    async def load(self) -> None:
        """Takes the whole snapshot: 28 octets a message. Raises IndexTrouble: never a short listing (P7)."""
        while await self.load_page():
            pass

    async def load_page(self) -> bool:
        """Takes some more of the snapshot; False when all is there. Raises IndexTrouble."""
        if self._loaded or self._facts is None:
            return False
        after = self._uids[-1] if self._uids else 0
        rows = await self._drops.index.entries(self._facts.id, after, self._facts.uid_next, limits.INDEX_PAGE_ROWS)
        for row in rows:
            self._uids.append(row.uid)
            self._sizes.append(row.octets)
            self._keys += row.key
        if len(rows) == limits.INDEX_PAGE_ROWS:
            return True
        self.count = len(self._uids)
        self.octets = sum(self._sizes)
        self._loaded = True
        return False

    @property
    def listed(self) -> int:
        """How many messages of the snapshot have been taken so far."""
        return len(self._uids)

    def get(self, number: int) -> Listed | None:
        """A message that exists and is not marked deleted."""
        if not 1 <= number <= len(self._uids) or number in self._deleted:
            return None
        return Listed(number, self._sizes[number - 1], self.key(number))

    def octets_of(self, number: int) -> int:
        """What a message of the snapshot has, as its reader gets it."""
        return self._sizes[number - 1]

    def key(self, number: int) -> bytes:
        """The key of a message of the snapshot."""
        start = (number - 1) * _KEY_OCTETS
        return bytes(self._keys[start : start + _KEY_OCTETS])

    def totals(self) -> tuple[int, int]:
        """(messages, octets) without those marked deleted."""
        gone = sum(self._sizes[number - 1] for number in self._deleted)
        return self.count - len(self._deleted), self.octets - gone

    def mark(self, number: int) -> None:
        """Marks for deletion."""
        self._deleted[number] = None

    def unmark_all(self) -> None:
        """RSET."""
        self._deleted.clear()

    def ready(self, number: int) -> Small | None:
        """A message that was read ahead, at once; each is given once."""
        small = self._ahead.pop(number, None)
        if small is None:
            return None
        self._hold(-len(small.octets))
        if number in self._deleted:
            return None
        self._last = number
        if len(self._ahead) == limits.READ_AHEAD_MESSAGES // 2 and self._reading is None:
            work = self._read_ahead(max(self._ahead) + 1, limits.READ_AHEAD_MESSAGES // 2)
            self._reading = self._drops.tasks.start(work, "read-ahead")
            self._reading.add_done_callback(self._have_read)
        return small

    async def whole(self, number: int) -> Small | None:
        """A small message; None if it must be taken piece by piece.

        Who asks for one message after the other finds the next ones read already, some while the last ones are sent.
        """
        if number not in self._ahead and self._reading is not None:
            await asyncio.wait([self._reading])
        small = self.ready(number)
        if small is None:
            in_turn = number == self._last + 1
            self._forget()
            await self._read_ahead(number, limits.READ_AHEAD_MESSAGES if in_turn else 1)
            self._last = number
            small = self.ready(number)
        return small

    def _have_read(self, _: asyncio.Task[None]) -> None:
        self._reading = None
        if self._released:
            self._forget()

    def _hold(self, octets: int) -> None:
        self._ahead_octets += octets
        self._drops.ahead_octets += octets

    def _forget(self) -> None:
        self._ahead.clear()
        self._hold(-self._ahead_octets)

    async def _read_ahead(self, first: int, count: int) -> None:
        """Takes up to `count` messages into `_ahead`, as far as they are small and there is room."""
        numbers: dict[bytes, int] = {}
        room = limits.READ_AHEAD_OCTETS_MAX - self._ahead_octets
        room = min(room, limits.READ_AHEAD_ALL_OCTETS_MAX - self._drops.ahead_octets)
        for number in range(first, min(first + count, self.count + 1)):
            room -= self._sizes[number - 1]
            if room < 0:
                break
            if number not in self._deleted:
                numbers[self.key(number)] = number
        if not numbers:
            return
        if numbers.keys() - self._places.keys():
            await self._look_up(first, count)
        wanted = {key: self._places[key] for key in numbers if key in self._places}
        found = await self._drops.opener.read_small_at(wanted)  # whoever asks for one that is left out will see why
        for key, small in found.items():
            self._ahead[numbers[key]] = small
        self._hold(sum([len(small.octets) for small in found.values()]))

    async def _look_up(self, first: int, count: int) -> None:
        """Where the messages are, for more of them than are read now by who goes through them."""
        end = min(first + (limits.READ_AHEAD_PLACES if count > 1 else 1), self.count + 1)
        self._places = await self._drops.opener.places([self.key(number) for number in range(first, end)])

    def read(self, key: bytes) -> AsyncIterator[bytes]:
        """A message's octets in pieces. Raises IndexTrouble, MessageUnreadable."""
        return self._drops.opener.read(key)

    async def update(self) -> list[bytes]:
        """Deletes what is marked, and gives its keys; durable when it returns. Raises IndexTrouble."""
        if not self._deleted or self._facts is None:
            return []
        numbers = sorted(self._deleted)
        await self._drops.keep(self._account)
        await self._drops.index.expunge(self._facts.id, [self._uids[number - 1] for number in numbers])
        self._deleted.clear()
        return [self.key(number) for number in numbers]

    def release(self) -> None:
        """Lets the next session in. Idempotent."""
        self._released = True
        self._forget()
        self._drops.leave(self._account, self)

    async def close(self) -> None:
        """The same, and waits until the next session gets in, whatever process serves it."""
        self.release()
        await self._drops.given(self._account)


class Maildrops:
    """Opens maildrops."""

    def __init__(self, index: Index, opener: Opener, tasks: Tasks, exclusive: Exclusive | None = None) -> None:
        """`tasks` own what reads ahead of a session. `exclusive` where other processes serve the same maildrops."""
        self.index = index
        self.opener = opener
        self.tasks = tasks
        self.ahead_octets = 0  # of all that was read ahead
        self._exclusive = exclusive
        self._held: dict[str, Maildrop | None] = {}

    async def open(self, account: str) -> Maildrop:
        """Raises InUse, IndexTrouble."""
        if account in self._held:
            raise InUse
        self._held[account] = None
        try:
            if self._exclusive is not None and not await self._exclusive.take(account):
                raise InUse
            facts = await self.index.find_mailbox(account, "INBOX")
        except BaseException:
            self._free(account)
            raise
        drop = Maildrop(self, account, facts)
        self._held[account] = drop
        return drop

    async def keep(self, account: str) -> None:
        """Before a session deletes: it still has the maildrop for itself. Raises IndexTrouble."""
        if self._exclusive is not None:
            await self._exclusive.keep(account)

    async def given(self, account: str) -> None:
        """Waits until who asks elsewhere gets a maildrop that was left here."""
        if self._exclusive is not None:
            await self._exclusive.given(account)

    def leave(self, account: str, drop: Maildrop) -> None:
        """The session is over."""
        if self._held.get(account) is drop:
            self._free(account)

    def _free(self, account: str) -> None:
        del self._held[account]
        if self._exclusive is not None:
            self._exclusive.give(account)
