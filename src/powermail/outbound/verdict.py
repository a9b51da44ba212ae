"""Owns what became of each recipient at one attempt: the replies of a transaction, judged.

    2yz to RCPT, 354 to DATA, 2yz to the message    sent
    5yz to MAIL, RCPT, DATA or the message          refused, and the sender hears of it
    anything else, and no reply at all              later

A reply that was read counts, however the connection ends. But a refusal is believed only while replies are in step: 503, an
unknown command, a reply to nothing or of a kind that cannot be, mean that hop and we differ about what is spoken of, and
then nothing it refused was refused. What a hop says about us (a login is missing, TLS is) is no fault of the message.

RFC 5321 §4.2.1 (the first digit alone decides), §4.5.3.1.10 (552 for too many recipients), RFC 3463 §3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from powermail.mail.dsn import printable
from powermail.wire.smtp_client import End, Fault, Reply

_ABOUT_US = (530, 534, 535, 538)  # RFC 4954 §6, RFC 3207 §4: the session lacks a login or TLS


class Ruling(Enum):
    """One of three; nobody is without."""

    __hash__ = object.__hash__
    SENT = "sent"
    LATER = "later"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """What became of one recipient. `enhanced` is of the class that the ruling has, or empty; `text` is one printable line."""

    ruling: Ruling
    enhanced: str
    text: str
    reply: bool = True  # a hop said so
    full: bool = False  # the transaction had too many recipients: another one may take this one at once


@dataclass
class Transcript:
    """What was said in one transaction. A reply that is None was not read."""

    mail: Reply | None = None
    recipients: list[Reply | None] = field(default_factory=list)
    data: Reply | None = None
    final: Reply | None = None
    end: End | None = None  # how the session ended, if it did
    missing: bool = False  # a reply was: the last one that was read is to something else
    complete: bool = False  # the message was sent to its end: the hop may have it, whatever it says

    @property
    def taken(self) -> bool:
        """Somebody may get the message."""
        return any(reply is not None and reply.kind == 2 for reply in self.recipients)

    @property
    def all_taken(self) -> bool:
        """Everybody may get it."""
        return all(reply is not None and reply.kind == 2 for reply in self.recipients)

    @property
    def begins(self) -> bool:
        """The message may be sent."""
        if self.data is None or self.data.code != 354 or self.mail is None:
            return False
        return self.mail.kind == 2 and self.taken

    @property
    def disordered(self) -> bool:
        """It would not hear of DATA behind recipients that it took."""
        return self.data is not None and self.data.code == 503 and self.taken

    @property
    def stale(self) -> bool:
        """Of a session that was used before: it had ended before it was used again, or what it still had to say then came
        between. The message was not sent, and nobody was refused.
        """
        if self.complete or self.confused or self.end is None:
            return self.confused and not self.complete
        gone = self.end.fault in (Fault.CLOSED, Fault.LEFT) and (self.mail is None or self.mail.code == 421)
        return gone or self.end.fault is Fault.NONSENSE

    @property
    def late(self) -> bool:
        """A reply did not come in time."""
        return self.end is not None and self.end.fault is Fault.LATE

    @property
    def negative(self) -> bool:
        """Somebody may have been refused for good."""
        return any(reply is not None and reply.kind == 5 for reply in (self.mail, *self.recipients, self.data, self.final))

    @property
    def confused(self) -> bool:
        """The replies cannot be told apart. What follows a sender that was refused is refused too, with 503 by most."""
        if self.end is not None and self.end.fault is Fault.OUT_OF_STEP:
            return True
        if self.mail is not None and self.mail.kind != 2:
            return _out_of_step(self.mail) or (self.taken and self.mail.code != 421)
        if any(map(_out_of_step, self.recipients)):
            return True
        # Behind recipients that were all refused, DATA is refused too, with 503 by most.
        return self.taken and (_out_of_step(self.data) or _out_of_step(self.final))


def _out_of_step(reply: Reply | None) -> bool:
    """503, and 500 and 502 for commands that every server knows (RFC 5321 §4.5.1)."""
    if reply is None:
        return False
    return reply.code == 503 or (reply.code in (500, 502) and reply.enhanced[:4] in ("", "5.5."))


def _no_room(reply: Reply) -> bool:
    """To RCPT: too many recipients, not a mailbox that is full (5.2.2). RFC 5321 §4.5.3.1.10 takes 552 for 452 there."""
    return reply.code == 452 or (reply.code == 552 and reply.enhanced in ("", "5.5.3"))


def judge(said: Transcript) -> list[Verdict]:
    """A verdict for each recipient, in order."""
    why = said.end.text if said.end is not None else "no answer"
    confused = said.confused
    verdicts = []
    for answer in said.recipients:
        reply = _decisive(said, answer)
        if reply is None:
            verdicts.append(Verdict(Ruling.LATER, "", printable(why), reply=False))
            continue
        verdict = of(reply)
        if reply is said.final and said.missing:
            verdict = Verdict(Ruling.LATER, "", printable(f"out of step, not believed: {reply.code} {reply.text}"))
        elif reply is not said.final and reply.kind == 2:
            verdict = Verdict(Ruling.LATER, "", printable(f"unexpected reply {reply.code} {reply.text}"))
        elif verdict.ruling is Ruling.REFUSED and confused:
            text = printable(f"out of step, not believed: {reply.code} {reply.text}")
            verdict = Verdict(Ruling.LATER, "", text)
        elif reply is answer and _no_room(reply):
            verdict = Verdict(Ruling.LATER, "4.5.3", verdict.text, full=True)
        verdicts.append(verdict)
    return verdicts


def _decisive(said: Transcript, answer: Reply | None) -> Reply | None:
    """The reply by which a recipient stands or falls: the first that is not what was hoped for, or the last."""
    if said.mail is None or said.mail.kind != 2:
        return said.mail
    if answer is None or answer.kind != 2:
        return answer
    if said.data is None or said.data.code != 354:
        return said.data
    return said.final


def of(reply: Reply) -> Verdict:
    """What one reply means for those whom it is about."""
    text = printable(f"{reply.code} {reply.text}")
    if reply.kind == 2:
        return Verdict(Ruling.SENT, "", text)
    if reply.kind == 5 and reply.code not in _ABOUT_US:
        return Verdict(Ruling.REFUSED, reply.enhanced if reply.enhanced.startswith("5") else "5.0.0", text)
    return Verdict(Ruling.LATER, reply.enhanced if reply.enhanced.startswith("4") else "", text)


def all_later(count: int, text: str) -> list[Verdict]:
    """Nobody was spoken of."""
    return [Verdict(Ruling.LATER, "", printable(text), reply=False)] * count


def progress(verdicts: Sequence[Verdict]) -> bool:
    """Somebody's fate was decided: those whom the hop had no room for may be sent at once."""
    return any(verdict.ruling is not Ruling.LATER for verdict in verdicts)
