"""Owns the users who work on mailboxes through the index's contract, as IMAP sessions will: STORE, COPY, MOVE, EXPUNGE; and the
observer, who looks at all numbers all the time (P10).

What a user was told binds: a message that was acknowledged and that no user has expunged must be in some mailbox of its
account; what somebody expunged, and was told so, must not come back.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from powermail.base.errors import Trouble
from powermail.index.contract import FlagChange, Index, MailboxFacts

IMAP_MAILBOXES = ("imap0@sim.example", "imap1@sim.example")
FOLDERS = ("INBOX", "Archive", "Trash")
_PAGE = 500
_PATIENCE_S = 20.0
_WHOLE_EVERY = 8  # looks of which one reads all entries, also of a mailbox that says it has not changed


@dataclass
class Ledger:
    """What users did and were told, by account and key."""

    gone_asked: dict[tuple[str, bytes], float] = field(default_factory=dict)  # an expunge of it was asked for
    gone_told: dict[tuple[str, bytes], float] = field(default_factory=dict)  # its last place was expunged, and we were told so
    doubtful: dict[tuple[str, bytes], None] = field(default_factory=dict)  # an answer never came: it may be anywhere
    operations: dict[str, int] = field(default_factory=dict)


class MailboxUser:
    """Works on one account."""

    def __init__(self, account: str, index: Callable[[], Index | None], chance: random.Random, ledger: Ledger) -> None:
        """`index` gives the index of the process that runs now, or None."""
        self.stopping = False
        self._account = account
        self._index = index
        self._chance = chance
        self._ledger = ledger
        self._in_doubt: dict[bytes, None] = {}  # an operation on it was never answered

    async def run(self) -> None:
        """One operation after the other until told to stop."""
        while not self.stopping:
            await asyncio.sleep(self._chance.expovariate(1 / 0.7))
            index = self._index()
            if index is None:
                continue
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await self._work(index)
            except (Trouble, TimeoutError, KeyError):
                continue

    async def _work(self, index: Index) -> None:
        name = self._chance.choice(FOLDERS)
        facts = await index.find_mailbox(self._account, name)
        if facts is None or not facts.messages:
            return
        entries = await index.entries(facts.id, 0, facts.uid_next, _PAGE)
        if not entries:
            return
        chosen = sorted(self._chance.sample(entries, min(len(entries), self._chance.randint(1, 3))))
        uids, keys = [entry.uid for entry in chosen], [entry.key for entry in chosen]
        what = self._chance.choice(["store", "store", "copy", "move", "move", "expunge"])
        if what == "store":
            how = self._chance.choice(list(FlagChange))
            await index.store(facts.id, uids, how, 1 << self._chance.randrange(5), None)
        else:
            for key in keys:  # until an answer comes; one that never comes may still be obeyed, whenever
                self._ledger.doubtful[self._account, key] = None
            sure = [key for key in keys if key not in self._in_doubt]
            self._in_doubt.update(dict.fromkeys(keys))
            if what == "expunge":
                await self._expunge(index, facts, uids, keys)
            else:
                to = await index.make_mailbox(self._account, self._chance.choice([f for f in FOLDERS if f != name]))
                await (index.copy if what == "copy" else index.move)(facts.id, uids, to.id)
            for key in sure:
                del self._in_doubt[key]
                self._ledger.doubtful.pop((self._account, key), None)
        self._ledger.operations[what] = self._ledger.operations.get(what, 0) + 1

    async def _expunge(self, index: Index, facts: MailboxFacts, uids: list[int], keys: list[bytes]) -> None:
        """Told only what is certain: a key whose last place in this account this was (one user works on each account)."""
        ledger, now = self._ledger, asyncio.get_running_loop().time()
        left = await self._places(index)
        for uid, key in zip(uids, keys, strict=True):
            left[key].discard((facts.id, uid))
            ledger.gone_asked.setdefault((self._account, key), now)
        await index.expunge(facts.id, uids)
        for key in keys:
            if not left[key]:
                ledger.gone_told[self._account, key] = asyncio.get_running_loop().time()

    async def _places(self, index: Index) -> dict[bytes, set[tuple[int, int]]]:
        """Where each key of the account stands: (mailbox, UID)."""
        found: dict[bytes, set[tuple[int, int]]] = {}
        for name in FOLDERS:
            facts = await index.find_mailbox(self._account, name)
            if facts is not None:
                for entry in await index.entries(facts.id, 0, facts.uid_next, 1 << 20):
                    found.setdefault(entry.key, set()).add((facts.id, entry.uid))
        return found


class Observer:
    """Looks at every mailbox and remembers which message stood under which number."""

    def __init__(self, index: Callable[[], Index | None], problem: Callable[[str], None]) -> None:
        self.looks = 0
        self.calm = False  # no faults any more, and no senders
        self.stopping = False
        self._index = index
        self._problem = problem
        self._shown: dict[tuple[str, str, int, int], bytes] = {}
        self._numbers: dict[tuple[str, str], tuple[int, int, int]] = {}  # UIDVALIDITY, UIDNEXT, MODSEQ seen last
        self._read: dict[tuple[str, str], MailboxFacts] = {}  # what was so when its entries were read last

    async def run(self) -> None:
        """Looks every second or so; in calm, when hardly anything is numbered, less often."""
        while not self.stopping:
            await asyncio.sleep(6.5 if self.calm else 1.3)
            index = self._index()
            if index is None:
                continue
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await self.look(index)
            except (Trouble, TimeoutError, KeyError):
                continue

    def forget_counters(self) -> None:
        """Commits were lost: until the next number is given, counters may be shown that are lower than before."""
        self._numbers.clear()

    async def look(self, index: Index) -> None:
        """One look at everything. Raises Trouble."""
        for facts in await index.mailboxes(0, _PAGE):
            found = await index.find_mailbox(facts.account, facts.name)
            if found is None:
                continue
            self._counters(found)
            if self._read.get((found.account, found.name)) == found and self.looks % _WHOLE_EVERY:
                continue
            self._read[found.account, found.name] = found
            for entry in await index.entries(found.id, 0, found.uid_next, 1 << 20):
                name = (found.account, found.name, found.uidvalidity, entry.uid)
                before = self._shown.setdefault(name, entry.key)
                if before != entry.key:
                    self._problem(
                        f"{found.account}/{found.name}: UID {entry.uid} of UIDVALIDITY {found.uidvalidity} was message"
                        f" {before.hex()} and is {entry.key.hex()} (P10)"
                    )
                if entry.uid >= found.uid_next or entry.modseq > found.modseq:
                    self._problem(f"{found.account}/{found.name}: UID {entry.uid} or its MODSEQ is beyond the mailbox's (P10)")
        self.looks += 1

    def _counters(self, facts: MailboxFacts) -> None:
        name = (facts.account, facts.name)
        before = self._numbers.get(name)
        now = (facts.uidvalidity, facts.uid_next, facts.modseq)
        if before is not None and (now[0] < before[0] or (now[0] == before[0] and (now[1] < before[1] or now[2] < before[2]))):
            self._problem(f"{facts.account}/{facts.name}: (UIDVALIDITY, UIDNEXT, MODSEQ) fell from {before} to {now} (P10)")
        self._numbers[name] = now
