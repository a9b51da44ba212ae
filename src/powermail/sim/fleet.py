"""Owns the client fleet: senders and readers that write down what they asked and what they were told.

The history is what the checkers judge: a message is acked, refused for good, or unknown (no answer came); a deletion is
acked when QUIT was answered, else unknown.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from powermail.base.net import Network
from powermail.sim.client import LineClient, Lost, number_of
from powermail.sim.users import IMAP_MAILBOXES

SMTP_PORT, LMTP_PORT, POP_PORT, PEER_PORT = 25, 24, 110, 26
BETWEEN_DOORS = 1000
PASSWORD = "secret"
MAILBOXES = [f"user{number}@sim.example" for number in range(5)]
FORWARDS = {"away@sim.example": "someone@elsewhere.example", "both@sim.example": "other@elsewhere.example"}
KEEPS = "both@sim.example"  # a forward that keeps a copy


@dataclass
class Message:
    """One message of the fleet."""

    number: int
    octets: bytes
    recipients: list[str]
    attempts: int = 0
    acked_at: float = -1.0
    acks: int = 0
    unknown: int = 0
    keys: list[bytes] = field(default_factory=list)  # under which it was acknowledged

    @property
    def acked(self) -> bool:
        """True if a 250 came."""
        return self.acks > 0


@dataclass
class History:
    """What the clients know."""

    messages: list[Message] = field(default_factory=list)
    expunged: dict[tuple[str, int], float] = field(default_factory=dict)  # (mailbox, number): when QUIT was asked
    expunged_acked: dict[tuple[str, int], float] = field(default_factory=dict)
    uidls: dict[tuple[str, bytes], int] = field(default_factory=dict)  # (mailbox, UIDL): number
    shown: dict[tuple[str, int], None] = field(default_factory=dict)  # (mailbox, number) that a listing has shown
    problems: list[str] = field(default_factory=list)
    listings: int = 0
    retrieved: int = 0
    refused: int = 0

    def problem(self, text: str) -> None:
        """Something a client must never see."""
        if len(self.problems) < 20:
            self.problems.append(text)


class Fleet:
    """The clients."""

    def __init__(
        self,
        net: Network,
        chance: random.Random,
        acknowledged: Callable[[bytes], None],
        entered_late: Callable[[bytes], bool],
        doors: int = 1,
    ) -> None:
        """`acknowledged` is told the key of each message when its 250 is read; `entered_late` says which of them the index did
        not answer for in time. There are `doors` front ends, whose ports are `BETWEEN_DOORS` apart.
        """
        self.told: Callable[[], None] = lambda: None  # called when a deletion was acknowledged
        self._doors = doors
        self._entered_late = entered_late
        self.history = History()
        self._acknowledged = acknowledged
        self.stopping = False
        self._net = net
        self._chance = chance

    async def _open(self, port: int) -> LineClient:
        """A connection to one of the front ends. Raises Lost."""
        door = self._chance.randrange(self._doors) if self._doors > 1 else 0
        return await LineClient.open(self._net, port + door * BETWEEN_DOORS)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _compose(self) -> Message:
        chance, number = self._chance, len(self.history.messages)
        recipients = chance.sample(MAILBOXES, chance.choice([1, 1, 1, 2, 5]))
        if chance.random() < 0.15:
            recipients.append(chance.choice(list(FORWARDS)))
        if chance.random() < 0.4:
            recipients.append(chance.choice(IMAP_MAILBOXES))
        size = chance.choice([200, 1500, 4000, 4000, 30_000]) if chance.random() > 0.02 else 600_000
        first = chance.randrange(10**7)
        lines = [b"%08d " % (first + 7 * line) * 8 for line in range(size // 72 + 1)]
        if chance.random() < 0.2:
            lines.append(b".")  # a line that must be stuffed
        octets = b"Subject: sim\r\nX-Number: %d\r\n\r\n" % number + b"\r\n".join(lines) + b"\r\n"
        message = Message(number, octets, recipients)
        self.history.messages.append(message)
        return message

    async def sender(self) -> None:
        """Sends message after message, each until it is acked or was tried often enough."""
        while not self.stopping:
            message = self._compose()
            for _ in range(6):
                try:
                    await self._send(message)
                except Lost:
                    pass
                if message.acked:
                    break
                await asyncio.sleep(self._chance.uniform(0.2, 2.0))
            await asyncio.sleep(self._chance.expovariate(1 / 0.5))

    async def _send(self, message: Message) -> None:
        lmtp = self._chance.random() < 0.2
        client = await self._open(LMTP_PORT if lmtp else SMTP_PORT)
        try:
            await client.reply()
            await client.ask(b"LHLO fleet" if lmtp else b"EHLO fleet")
            if self._refused(await client.ask(b"MAIL FROM:<sender@elsewhere.example>")):
                return
            for recipient in message.recipients:
                if self._refused(await client.ask(b"RCPT TO:<%s>" % recipient.encode())):
                    return
            if self._refused(await client.ask(b"DATA")):
                return
            await self._data(client, message, lmtp)
        finally:
            client.close()

    def _refused(self, reply: bytes) -> bool:
        """Counts a refusal. All our senders and recipients are good: trouble is temporary, never for good (P12)."""
        if reply[:1] in (b"2", b"3"):
            return False
        self.history.refused += 1
        if reply[:1] == b"5":
            self.history.problem(f"a good message was refused for good: {reply.decode().strip()} (P12)")
        return True

    async def _data(self, client: LineClient, message: Message, lmtp: bool) -> None:
        octets = message.octets.replace(b"\r\n.", b"\r\n..")
        if self._chance.random() < 0.03:
            client.send(octets[: len(octets) // 2])
            raise Lost  # the client dies in the middle: nothing may be seen of it
        message.attempts += 1
        message.unknown += 1  # until we know
        client.send(octets + b".\r\n")
        replies = [await client.reply() for _ in range(len(message.recipients) if lmtp else 1)]
        message.unknown -= 1
        if all(reply[:1] == b"2" for reply in replies):
            message.acks += 1
            message.acked_at = asyncio.get_running_loop().time()
            stored = re.search(rb"Stored as ([0-9a-f]{32})", replies[0])
            if stored is None:
                self.history.problem(f"message {message.number}: a 250 without its key: {replies[0]!r}")
            else:
                message.keys.append(bytes.fromhex(stored[1].decode()))
                self._acknowledged(message.keys[-1])
            client.send(b"QUIT\r\n")
        else:
            for reply in replies:
                self._refused(reply)

    # -- reading --------------------------------------------------------------------------------------------------------

    async def reader(self) -> None:
        """Reads mailbox after mailbox; checks each listing, deletes now and then."""
        while not self.stopping:
            try:
                await self.read(self._chance.choice(MAILBOXES), self._chance.random() < 0.4)
            except Lost:
                pass
            await asyncio.sleep(self._chance.expovariate(1 / 1.5))

    async def read(self, mailbox: str, delete: bool) -> dict[int, int] | None:
        """One session: how often each message is listed, or None if the mailbox could not be opened."""
        began = asyncio.get_running_loop().time()
        client = await self._open(POP_PORT)
        try:
            await client.until(b"\r\n")
            await client.command(b"USER " + mailbox.encode())
            if not (await client.command(b"PASS " + PASSWORD.encode())).startswith(b"+OK"):
                return None
            listed = await self._list(client, mailbox, began)
            if delete and listed:
                await self._delete(client, mailbox, listed)
            else:
                client.send(b"QUIT\r\n")
            counts: dict[int, int] = {}
            for number in listed.values():
                counts[number] = counts.get(number, 0) + 1
            return counts
        finally:
            client.close()

    async def _list(self, client: LineClient, mailbox: str, began: float) -> dict[int, int]:
        """Place in the listing to message number; checks it against what was acked before the session began."""
        listing = await client.listing(b"UIDL")
        if listing is None:
            raise Lost
        history = self.history
        listed: dict[int, int] = {}
        for line in listing.split(b"\r\n"):
            if not line:
                continue
            place, uidl = line.split()
            number = history.uidls.get((mailbox, uidl))
            if number is None or self._chance.random() < 0.05:
                found = await self._retrieve(client, mailbox, int(place))
                if found is None:
                    continue  # cannot be read now: that is said, not hidden
                if number is not None and number != found:
                    history.problem(f"{mailbox}: UIDL {uidl.decode()} was message {number} and is {found} now (P10)")
                number = history.uidls[mailbox, uidl] = found
            listed[int(place)] = number
        history.listings += 1
        seen = dict.fromkeys(listed.values())
        if len([1 for line in listing.split(b"\r\n") if line]) == len(listed):
            for message in history.messages:
                if (
                    mailbox in kept_in(message)
                    and 0 <= message.acked_at < began
                    and (mailbox, message.number) not in history.expunged
                    and message.number not in seen
                    # What was accepted while the index was away appears when it is back (P14); once shown, it stays (P7).
                    and ((mailbox, message.number) in history.shown or not self._entered_late(message.keys[-1]))
                ):
                    history.problem(
                        f"{mailbox}: message {message.number}, acked at {message.acked_at:.3f}, is not listed"
                        f" at {began:.3f} (P1, P7)"
                    )
        for number in seen:
            history.shown[mailbox, number] = None
            gone_at = history.expunged_acked.get((mailbox, number))
            if gone_at is not None and gone_at < began and history.messages[number].attempts == 1:
                history.problem(f"{mailbox}: message {number}, deleted at {gone_at:.3f}, is listed at {began:.3f} (P8)")
        return listed

    async def _retrieve(self, client: LineClient, mailbox: str, place: int) -> int | None:
        octets = await client.listing(b"RETR %d" % place)
        if octets is None:
            return None
        self.history.retrieved += 1
        number = number_of(octets)
        if not 0 <= number < len(self.history.messages):
            self.history.problem(f"{mailbox}: a message that nobody sent (P2)")
            return -1
        message = self.history.messages[number]
        if octets[octets.find(b"Subject: sim") :] != message.octets:
            self.history.problem(f"{mailbox}: message {number} is not what was sent (P2, P3)")
        if mailbox not in kept_in(message):
            self.history.problem(f"{mailbox}: message {number} was not sent to it")
        return number

    async def _delete(self, client: LineClient, mailbox: str, listed: dict[int, int]) -> None:
        places = self._chance.sample(sorted(listed), min(len(listed), self._chance.randint(1, 5)))
        for place in places:
            await client.command(b"DELE %d" % place)
        now = asyncio.get_running_loop().time()
        # A message that was sent again after an unknown outcome may be listed twice: only the last goes for good.
        gone = {listed[place] for place in places}
        for number in sorted(gone):
            self.history.expunged.setdefault((mailbox, number), now)
        if (await client.command(b"QUIT")).startswith(b"+OK"):
            now = asyncio.get_running_loop().time()
            for number in sorted(gone):
                self.history.expunged_acked.setdefault((mailbox, number), now)
            self.told()


def kept_in(message: Message) -> list[str]:
    """The mailboxes a message belongs in."""
    return [name for name in message.recipients if name in MAILBOXES]
