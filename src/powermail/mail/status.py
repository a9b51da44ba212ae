"""Owns the outcome of a mail command: reply code, enhanced code (RFC 3463), public text, private cause.

Rules: no reply string outside this module and `wire`; public texts hold no paths, hosts or SQL.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Status(NamedTuple):
    """One reply. `cause` is for the log only."""

    code: int
    enhanced: str
    text: str
    cause: str = ""

    @property
    def positive(self) -> bool:
        """2xx or 3xx."""
        return self.code < 400

    @property
    def temporary(self) -> bool:
        """4xx: try again later."""
        return 400 <= self.code < 500

    def because(self, cause: object) -> Status:
        """The same reply with a private cause for the log."""
        return self._replace(cause=str(cause))


OK: Final = Status(250, "2.0.0", "OK")
SENDER_OK: Final = Status(250, "2.1.0", "Sender OK")
RECIPIENT_OK: Final = Status(250, "2.1.5", "Recipient OK")
CHUNK_OK: Final = Status(250, "2.0.0", "Chunk OK")
DELIVERED: Final = Status(250, "2.6.0", "Stored")
START_INPUT: Final = Status(354, "", "End data with <CR><LF>.<CR><LF>")
START_TLS: Final = Status(220, "2.0.0", "Ready to start TLS")
BYE: Final = Status(221, "2.0.0", "Bye")
LOGGED_IN: Final = Status(235, "2.7.0", "Authentication successful")
CANNOT_VERIFY: Final = Status(252, "2.5.2", "Cannot VRFY user, but will accept message and attempt delivery")
HELP: Final = Status(214, "2.0.0", "See RFC 5321")

SHUTTING_DOWN: Final = Status(421, "4.3.2", "Service shutting down")
TOO_MANY_CONNECTIONS: Final = Status(421, "4.7.0", "Too many connections, try again later")
TIMED_OUT: Final = Status(421, "4.4.2", "Timeout")
TOO_MANY_ERRORS: Final = Status(421, "4.7.0", "Too many errors")
TOO_MANY_TRANSACTIONS: Final = Status(421, "4.7.0", "Too many transactions on this connection")
ACCOUNT_CHANGED: Final = Status(421, "4.7.0", "The account was changed, log in again")
TOO_SLOW: Final = Status(421, "4.4.2", "Data arrives too slowly")
NOT_REDUNDANT: Final = Status(451, "4.3.0", "Cannot store redundantly now, try again later")
STORAGE_TROUBLE: Final = Status(451, "4.3.0", "Storage trouble, try again later")
DIRECTORY_TROUBLE: Final = Status(451, "4.3.0", "Directory unavailable, try again later")
QUEUE_FULL: Final = Status(451, "4.3.1", "Too much mail waits for this destination, try again later")
TOO_MANY_RECIPIENTS: Final = Status(452, "4.5.3", "Too many recipients")
RATE_LIMITED: Final = Status(451, "4.7.1", "Sending limit reached, try again later")
AUTH_TROUBLE: Final = Status(454, "4.7.0", "Temporary authentication failure")

LINE_TOO_LONG: Final = Status(500, "5.5.2", "Line too long")
UNRECOGNISED: Final = Status(500, "5.5.2", "Command not recognised")
SYNTAX: Final = Status(501, "5.5.4", "Syntax error in parameters")
HELLO_SYNTAX: Final = Status(501, "5.5.4", "That is not a domain or address literal")
BAD_SENDER: Final = Status(501, "5.1.7", "Bad sender address syntax")
BAD_RECIPIENT: Final = Status(501, "5.1.3", "Bad recipient address syntax")
BAD_SEQUENCE: Final = Status(503, "5.5.1", "Bad sequence of commands")
NO_VALID_RECIPIENTS: Final = Status(503, "5.5.1", "No valid recipients")
NEEDS_SMTPUTF8: Final = Status(553, "5.6.7", "Address needs SMTPUTF8")
PARAMETER_UNKNOWN: Final = Status(555, "5.5.4", "Parameter not recognised")
NOT_IMPLEMENTED: Final = Status(502, "5.5.1", "Command not implemented")
SPEAKS_OTHER: Final = Status(554, "5.5.1", "Error: this is a mail server")
TALKED_EARLY: Final = Status(554, "5.5.0", "Client talked before the greeting")
NEEDS_AUTH: Final = Status(530, "5.7.0", "Authentication required")
AUTH_NEEDS_TLS: Final = Status(538, "5.7.11", "Encryption required for requested authentication mechanism")
AUTH_UNKNOWN: Final = Status(504, "5.5.4", "Mechanism not supported")
AUTH_CANCELLED: Final = Status(501, "5.7.0", "Authentication cancelled")
AUTH_SYNTAX: Final = Status(501, "5.5.2", "Cannot decode")
AUTH_FAILED: Final = Status(535, "5.7.8", "Authentication credentials invalid")
AUTH_LIMITED: Final = Status(421, "4.7.0", "Too many authentication failures, try again later")
UNKNOWN_RECIPIENT: Final = Status(550, "5.1.1", "No such mailbox")
RELAY_DENIED: Final = Status(550, "5.7.1", "Relaying denied")
BAD_SRS: Final = Status(550, "5.1.1", "No such mailbox (bad or expired return address)")
ALIAS_LOOP: Final = Status(550, "5.4.6", "Address forwards in a loop")
MAILBOX_FULL: Final = Status(552, "5.2.2", "Mailbox full")
TOO_LARGE: Final = Status(552, "5.3.4", "Message too large")
NOT_YOUR_ADDRESS: Final = Status(553, "5.7.1", "Sender address does not belong to you")
NO_REMOTE_ROUTE: Final = Status(550, "5.4.4", "No route for mail to other hosts is configured")
TOO_MANY_HOPS: Final = Status(554, "5.4.6", "Too many hops")
HEADER_SYNTAX: Final = Status(550, "5.6.0", "Message content refused")
