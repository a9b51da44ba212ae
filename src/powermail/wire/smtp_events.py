"""Owns the events of the SMTP machine: what `wire.smtp_server` tells its session, and asks it."""

from __future__ import annotations

from msgspec import Struct

from powermail.wire.smtp import MailCommand, RcptCommand


class StartTls(Struct, frozen=True):
    """The client asks for TLS."""


class Login(Struct, frozen=True):
    """AUTH with a mechanism that is offered; `initial` is its response in base64, empty if it comes later."""

    mechanism: str
    initial: str


class Response(Struct, frozen=True):
    """A line of a SASL exchange; what is no line at all comes as `!`, which is not base64."""

    text: str


class Begin(Struct, frozen=True):
    """A message comes."""


class Body(Struct, frozen=True):
    """Octets of it, un-stuffed, in lines with CRLF unless they are binary."""

    octets: bytes


class End(Struct, frozen=True):
    """It is complete. `plain`: every line ends in CRLF and none begins with a dot. `added`: octets that it has more as text."""

    plain: bool
    added: int = 0


class Aborted(Struct, frozen=True):
    """A message that was begun is given up."""


class Close(Struct, frozen=True):
    """The connection ends."""

    why: str


Event = MailCommand | RcptCommand | StartTls | Login | Response | Begin | Body | End | Aborted | Close
