"""Owns the judgement of a torture: what clients were told, held against what they are shown.

Every message is sent once and never again, under a number of its own. So the rules are strict:

- *lost*: acknowledged, nobody asked to delete it, and it is not there at the end (P1).
- *damaged*: its octets are not those that were sent, or at the end it cannot be read (P2, P3).
- *ghost*: it is shown although it was refused or never sent whole, or to a mailbox that it was not sent to, or after a broken
  connection to some of its recipients only (P4).
- *doubled*: a mailbox has it twice (P5).
- *short*: a listing leaves out what an earlier one has shown, or what was acknowledged and entered before it began (P7).
- *resurrected*: a listing that began after its deletion was confirmed shows it (P8).
- *number*: a UID names two messages, a message has two UIDs, or a new one is not higher than those before it (P10).
- *refused*: a good message was refused for good (P12).

What the index was late for is shown later (P14): a front end says so in its log, and `late` takes these keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from msgspec import Struct


class Outcome(Enum):
    """What a sender knows of a message."""

    PENDING = "under way"
    ACKED = "acked"
    REFUSED = "refused"  # or never sent whole: it must not be seen
    UNKNOWN = "unknown"  # sent whole, and no answer


class Violation(Struct):
    """A promise that did not hold. `rule` names it; `number` is -1 where it is about no one message."""

    kind: str
    rule: str
    text: str
    number: int = -1
    key: str = ""


KINDS = {
    "lost": "P1",
    "damaged": "P2",
    "ghost": "P4",
    "doubled": "P5",
    "short": "P7",
    "resurrected": "P8",
    "number": "P10",
    "refused": "P12",
    "gap": "P20",
    "healing": "P13",
    "store": "P3",
    "down": "P13",
    "bug": "law 14",
}
_KEPT_MAX = 100  # violations of one kind that are kept whole; all are counted


@dataclass
class Message:
    """One message and what its sender knows."""

    mailboxes: tuple[str, ...]
    digest: bytes
    outcome: Outcome = Outcome.PENDING
    key: str = ""
    acked_at: float = 0.0


@dataclass
class Box:
    """What is known of one mailbox, by message key."""

    shown_at: dict[str, float] = field(default_factory=dict)  # when the listing ended that first showed it
    awaited: dict[str, int] = field(default_factory=dict)  # acked, not shown yet: its number
    asked: dict[str, None] = field(default_factory=dict)  # a deletion was asked for
    gone_at: dict[str, float] = field(default_factory=dict)  # and confirmed then
    numbers: dict[str, int] = field(default_factory=dict)  # which message it is
    keys: dict[int, str] = field(default_factory=dict)  # of a message
    uids: dict[int, str] = field(default_factory=dict)
    uid_of: dict[str, int] = field(default_factory=dict)
    highest: int = 0  # UID that the last look showed


class Checker:
    """Hears of every call of the clients in the order in which they end; `finish` judges what is left at the end."""

    def __init__(self, mailboxes: Iterable[str]) -> None:
        self.messages: dict[int, Message] = {}
        self.violations: list[Violation] = []
        self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._boxes = {name: Box() for name in mailboxes}
        self._suspected: dict[tuple[str, str], tuple[int, float, float]] = {}  # (mailbox, key): number, acked, listing began

    def violation(self, kind: str, text: str, number: int = -1, key: str = "") -> None:
        """Something that must never be."""
        self.counts[kind] += 1
        if self.counts[kind] <= _KEPT_MAX:
            self.violations.append(Violation(kind, KINDS[kind], text, number, key))

    # -- what senders know --------------------------------------------------------------------------------------------

    def sending(self, number: int, mailboxes: Sequence[str], digest: bytes) -> None:
        """A message is about to be sent, for the first and last time."""
        self.messages[number] = Message(tuple(mailboxes), digest)

    def sent(self, number: int, outcome: Outcome, at: float, key: str = "") -> None:
        """What came of it."""
        message = self.messages[number]
        message.outcome, message.key, message.acked_at = outcome, key, at
        if outcome is Outcome.ACKED:
            for name in message.mailboxes:
                box = self._boxes[name]
                self._is(name, key, number)
                if key not in box.shown_at:
                    box.awaited[key] = number

    def refused_for_good(self, number: int, reply: str) -> None:
        """All our messages are good: trouble is temporary."""
        self.violation("refused", f"message {number} was refused for good: {reply}", number)

    # -- what readers see ---------------------------------------------------------------------------------------------

    def listed(self, mailbox: str, began: float, ended: float, keys: Sequence[str]) -> None:
        """A whole listing."""
        box, now = self._boxes[mailbox], dict.fromkeys(keys)
        if len(now) != len(keys):
            twice = next(key for key in now if keys.count(key) > 1)
            self.violation("doubled", f"{mailbox}: one listing shows {twice} twice", box.numbers.get(twice, -1), twice)
        for key, first in box.shown_at.items():
            if first < began and key not in now and key not in box.asked:
                number = box.numbers.get(key, -1)
                self.violation("short", f"{mailbox}: {key} was listed at {first:.2f} and is not at {began:.2f}", number, key)
        for key, number in box.awaited.items():
            acked_at = self.messages[number].acked_at
            if acked_at < began and key not in now and key not in box.asked:
                self._suspected.setdefault((mailbox, key), (number, acked_at, began))
        for key in now:
            gone = box.gone_at.get(key)
            if gone is not None and gone < began:
                text = f"{mailbox}: {key} was deleted at {gone:.2f} and is listed at {began:.2f}"
                self.violation("resurrected", text, box.numbers.get(key, -1), key)
            if key not in box.shown_at:
                box.shown_at[key] = ended
                box.awaited.pop(key, None)

    def is_known(self, mailbox: str, key: str) -> bool:
        """False for a key that nobody has read yet, and whose number nobody was told."""
        return key in self._boxes[mailbox].numbers

    def read(self, mailbox: str, key: str, number: int, digest: bytes) -> None:
        """A message that was retrieved; `number` is -1 if it carries none of ours."""
        message = self.messages.get(number)
        if message is None:
            self.violation("ghost", f"{mailbox}: {key} is a message that nobody sent", number, key)
        elif mailbox not in message.mailboxes:
            self.violation("ghost", f"{mailbox}: message {number} was sent to {', '.join(message.mailboxes)}", number, key)
        elif message.digest != digest:
            self.violation("damaged", f"{mailbox}: message {number}, {key}, is not what was sent", number, key)
        else:
            self._is(mailbox, key, number)

    def _is(self, mailbox: str, key: str, number: int) -> None:
        box = self._boxes[mailbox]
        was, other = box.numbers.setdefault(key, number), box.keys.setdefault(number, key)
        if was != number:
            self.violation("number", f"{mailbox}: {key} is message {number} and was message {was}", number, key)
        if other != key:
            self.violation("doubled", f"{mailbox}: message {number} is there as {other} and as {key}", number, key)

    def deleting(self, mailbox: str, keys: Iterable[str]) -> None:
        """Their deletion is asked for now (QUIT): from here on they may be gone."""
        self._boxes[mailbox].asked.update(dict.fromkeys(keys))

    def deleted(self, mailbox: str, keys: Iterable[str], at: float) -> None:
        """It was confirmed."""
        box = self._boxes[mailbox]
        for key in keys:
            box.gone_at.setdefault(key, at)
            box.awaited.pop(key, None)
            box.shown_at.pop(key, None)

    def numbered(self, mailbox: str, pairs: Sequence[tuple[int, str]]) -> None:
        """What the index shows of a mailbox, UIDs and keys; one look begins when the last one has ended."""
        box = self._boxes[mailbox]
        for uid, key in pairs:
            other, had = box.uids.setdefault(uid, key), box.uid_of.get(key)
            number = box.numbers.get(key, -1)
            if other != key:
                self.violation("number", f"{mailbox}: UID {uid} is {key} and was {other}", number, key)
            if had is not None and had != uid:
                self.violation("number", f"{mailbox}: {key} has UID {uid} and had {had}", number, key)
            if had is None and uid <= box.highest:
                text = f"{mailbox}: {key} came with UID {uid}, and {box.highest} was given before"
                self.violation("number", text, number, key)
            box.uid_of.setdefault(key, uid)
        box.highest = max([box.highest, *(uid for uid, _ in pairs)])

    # -- the end ------------------------------------------------------------------------------------------------------

    def late(self, keys: Iterable[str]) -> None:
        """Keys that the index was late for: they are entered by the keeper, and no listing before that is short of them."""
        excused = dict.fromkeys(keys)
        self._suspected = {at: why for at, why in self._suspected.items() if at[1] not in excused}

    def waited_for(self) -> dict[str, int]:
        """Mailboxes in which something acknowledged was not shown yet, and how many of it."""
        found = {name: sum(key not in box.asked for key in box.awaited) for name, box in self._boxes.items() if box.awaited}
        return {name: count for name, count in found.items() if count}

    def finish(self, last: Mapping[str, Sequence[str]]) -> None:
        """Judges what the last listings show; they were heard and read before."""
        for (mailbox, key), (number, acked, began) in self._suspected.items():
            text = f"{mailbox}: message {number}, {key}, acked at {acked:.2f}, is not listed at {began:.2f}"
            self.violation("short", text, number, key)
        for number, message in self.messages.items():
            if message.outcome is Outcome.ACKED:
                self._whole(number, message, last)
            elif message.outcome is Outcome.UNKNOWN:
                self._all_or_none(number, message, last)
            else:
                self._unseen(number, message)

    def _whole(self, number: int, message: Message, last: Mapping[str, Sequence[str]]) -> None:
        for name in message.mailboxes:
            if message.key not in self._boxes[name].asked and message.key not in last[name]:
                text = f"{name}: message {number}, {message.key}, acked at {message.acked_at:.2f}, is lost"
                self.violation("lost", text, number, message.key)

    def _all_or_none(self, number: int, message: Message, last: Mapping[str, Sequence[str]]) -> None:
        has = {name: self._boxes[name].keys.get(number, "") for name in message.mailboxes}
        without = [name for name, key in has.items() if not key]
        if without and len(without) < len(has):
            text = f"message {number} came to some of its recipients and not to {', '.join(without)}"
            self.violation("ghost", text, number, next(key for key in has.values() if key))
        for name, key in has.items():
            if key and key not in self._boxes[name].asked and key not in last[name]:
                self.violation("lost", f"{name}: message {number}, {key}, was shown and is lost", number, key)

    def _unseen(self, number: int, message: Message) -> None:
        for name in message.mailboxes:
            if key := self._boxes[name].keys.get(number):
                self.violation("ghost", f"{name}: message {number}, {key}, was refused and is shown", number, key)
