"""Owns the table of SMTP's commands: where each is allowed, where it leads, what it needs, and what a door offers."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from powermail.wire.smtp import Need


class Kind(Enum):
    """Which door a session came through."""

    SMTP = "smtpd"
    SUBMISSION = "submission"
    LMTP = "lmtpd"


class State(Enum):
    """Where a session stands (RFC 5321 §4.1.4)."""

    SILENT = "before our greeting"
    START = "no greeting of the client's yet"
    READY = "greeted"
    MAIL = "sender given"
    RCPT = "recipients given"
    BDAT = "between the chunks of a message"
    BODY = "in the octets of a message"
    CHALLENGED = "in a SASL exchange"
    CLOSED = "over"

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call in Python for each command


class Rule(NamedTuple):
    """One command: where it is allowed, where a positive and a negative answer lead (None: it stays where it was).

    `counts`: a permanent refusal by the session is an error; what the machine refuses by itself always is. `behind_kept`: what
    was pipelined behind it is read after it; else it is thrown away (RFC 3207 §4.2).
    """

    before: frozenset[State]
    after: State | None = None
    refused: State | None = None
    argument: bool | None = None  # True: needed, False: forbidden, None: either
    tls: Need = Need.EITHER
    login: Need = Need.EITHER  # where the door has logins
    counts: bool = False
    behind_kept: bool = True
    capability: str = ""  # without it the command is not implemented
    lmtp: Need = Need.EITHER


_ANY: Final = frozenset({State.START, State.READY, State.MAIL, State.RCPT, State.BDAT})
_GREETED: Final = frozenset({State.READY})
_OPEN: Final = frozenset({State.MAIL, State.RCPT})
_CHUNKS: Final = frozenset({State.MAIL, State.RCPT, State.BDAT})

COMMANDS: Final[dict[str, Rule]] = {
    "EHLO": Rule(_ANY, State.READY, argument=True, lmtp=Need.NEVER),
    "HELO": Rule(_ANY, State.READY, argument=True, lmtp=Need.NEVER),
    "LHLO": Rule(_ANY, State.READY, argument=True, lmtp=Need.ONLY),  # RFC 2033 §4.1
    "MAIL": Rule(_GREETED, State.MAIL, argument=True, login=Need.ONLY),
    "RCPT": Rule(_OPEN, State.RCPT, argument=True, counts=True),
    "DATA": Rule(_OPEN, State.BODY, State.READY, argument=False),
    "BDAT": Rule(_CHUNKS, State.BODY, State.BODY, argument=True, capability="CHUNKING"),
    "RSET": Rule(_ANY, argument=False),
    "NOOP": Rule(_ANY),
    "HELP": Rule(_ANY),
    "VRFY": Rule(_ANY, argument=True),
    "EXPN": Rule(_ANY, argument=True),
    "QUIT": Rule(_ANY, State.CLOSED, argument=False),
    "STARTTLS": Rule(_GREETED, State.START, argument=False, tls=Need.NEVER, behind_kept=False, capability="STARTTLS"),
    "AUTH": Rule(_GREETED, argument=True, tls=Need.ONLY, login=Need.NEVER, counts=True, capability="AUTH"),
}


class Offer(NamedTuple):
    """What a door offers. `mechanisms` is empty where nobody logs in."""

    host: str
    message_octets_max: int
    recipients_max: int
    tls: bool
    mechanisms: tuple[str, ...] = ()
