"""Owns how we log in to others: PLAIN (RFC 4616), LOGIN, SCRAM-SHA-256 (RFC 5802, 7677), XOAUTH2, chosen by what they offer.

A mechanism answers challenges with octets and knows no lines; base64 is its caller's. None is used without TLS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scramp import ScramClient, ScramException

from powermail.base import limits
from powermail.wire.sasl import SaslError


class Mechanism(Protocol):
    """One exchange."""

    name: str
    slow: bool  # `answer` may take long: not on the event loop
    listens: bool  # what a challenge says matters

    @property
    def proven(self) -> bool:
        """False as long as the server owes its own proof."""

    def first(self) -> bytes | None:
        """The initial response (RFC 4954 §4), or None if the server speaks first."""

    def answer(self, challenge: bytes) -> bytes:
        """The response to a challenge. Raises SaslError."""


class _Recited:
    """Responses that are known beforehand, whatever is asked."""

    name, slow, listens, proven = "", False, False, True

    def __init__(self, first: bytes | None, left: list[bytes]) -> None:
        self._first = first
        self._left = left

    def first(self) -> bytes | None:
        return self._first

    def answer(self, challenge: bytes) -> bytes:
        if not self._left:
            raise SaslError("more is asked than there is to say")
        return self._left.pop(0)


class Plain(_Recited):
    """RFC 4616. A server that did not take the initial response asks for it once."""

    name = "PLAIN"

    def __init__(self, user: str, password: str, nonce: str) -> None:
        response = f"\0{user}\0{password}".encode()
        super().__init__(response, [response])


class Login(_Recited):
    """Two questions, user and password; what they say differs, their order does not."""

    name = "LOGIN"

    def __init__(self, user: str, password: str, nonce: str) -> None:
        super().__init__(None, [user.encode(), password.encode()])


class XOAuth2(_Recited):
    """A bearer token as the large providers take it; a refusal comes as a challenge, to be answered by nothing."""

    name = "XOAUTH2"

    def __init__(self, user: str, token: str, nonce: str) -> None:
        super().__init__(f"user={user}\x01auth=Bearer {token}\x01\x01".encode(), [b""])


class ScramSha256:
    """The server proves that it knows the password, too."""

    name, slow, listens = "SCRAM-SHA-256", True, True

    def __init__(self, user: str, password: str, nonce: str) -> None:
        self._client = ScramClient([self.name], user, password, c_nonce=nonce)
        self._turn = 0

    def first(self) -> bytes | None:
        return str(self._client.get_client_first()).encode()

    def answer(self, challenge: bytes) -> bytes:
        text = challenge.decode("utf-8", "replace")
        self._turn += 1
        try:
            if self._turn == 1:
                self._bounded(text)
                self._client.set_server_first(text)
                return str(self._client.get_client_final()).encode()
            if self._turn == 2:
                self._client.set_server_final(text)  # raises when the server's proof is wrong
                return b""
        except (ScramException, ValueError, KeyError, IndexError) as error:
            raise SaslError(f"SCRAM-SHA-256: {error}") from error
        raise SaslError("SCRAM-SHA-256 asks too often")

    @property
    def proven(self) -> bool:
        """True when the server has shown that it knows the password."""
        return self._turn >= 2

    @staticmethod
    def _bounded(server_first: str) -> None:
        """Refuses to count longer than a server may ask for (P16)."""
        for part in server_first.split(","):
            if part.startswith("i=") and not (part[2:].isdigit() and int(part[2:]) <= limits.SCRAM_ITERATIONS_MAX):
                raise SaslError("SCRAM-SHA-256: too many iterations are asked for")


_WITH_PASSWORD = (ScramSha256, Plain, Login)  # the best first
_WITH_TOKEN = (XOAuth2,)


def mechanisms(offered: Sequence[str], user: str, secret: str, token: bool, nonce: str) -> list[Mechanism]:
    """Those to be tried, the best first; none if the hop offers nothing that serves."""
    found: list[Mechanism] = []
    for kind in _WITH_TOKEN if token else _WITH_PASSWORD:
        if kind.name in offered:
            try:
                found.append(kind(user, secret, nonce))
            except (ScramException, ValueError):
                continue  # characters that SASLprep forbids: others take them as they are
    return found
