"""Owns why a login fails: a closed list, for the log and the counters. The client is told the same words for all (U07)."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """The value is what the log says; `auth.failed_` and the name in lower case is the counter."""

    NO_ACCOUNT = "no such account"
    DISABLED = "account disabled"
    FORWARDS_ONLY = "account only forwards"
    NO_PASSWORD = "account has no password"
    WRONG_PASSWORD = "wrong password"
    ACTS_FOR_ANOTHER = "acts for another"
    UNKNOWN_SCHEME = "scheme unknown"
    MALFORMED = "digest malformed"
    TOO_COSTLY = "digest too costly to check"
    NO_SCRAM = "stored form serves no SCRAM"
    NO_APOP = "stored form serves no APOP"
    ADDRESS_BLOCKED = "address blocked"
    NEEDS_TLS = "TLS needed"
    UNREADABLE = "exchange unreadable"
    CANCELLED = "exchange cancelled"
    UNDECIDED = "cannot be decided now"


class Unusable(ValueError):
    """A stored password that admits nobody, whatever is sent."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason
