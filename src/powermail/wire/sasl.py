"""Owns the octets of SASL exchanges: base64 lines, PLAIN (RFC 4616), LOGIN; SCRAM's first message (RFC 5802)."""

from __future__ import annotations

import base64
import binascii

from powermail.base import limits


class SaslError(ValueError):
    """The client's response cannot be read."""


def decode(text: str) -> bytes:
    """Strict base64; `=` alone is the empty response (RFC 4954 §4). Raises SaslError."""
    if text == "=":
        return b""
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise SaslError("not base64") from error


def encode(octets: bytes) -> str:
    """base64 of a challenge."""
    return base64.b64encode(octets).decode("ascii")


def parse_plain(octets: bytes) -> tuple[str, str, str]:
    """`[authzid] NUL authcid NUL passwd` (RFC 4616 §2). Raises SaslError."""
    parts = octets.split(b"\0")
    if len(parts) != 3 or not parts[1] or not parts[2]:
        raise SaslError("not a PLAIN message")
    return credential(parts[0]), credential(parts[1]), credential(parts[2])


def credential(octets: bytes) -> str:
    """A user name or password as text. Raises SaslError when it is too long or not UTF-8."""
    if len(octets) > limits.PASSWORD_OCTETS_MAX:
        raise SaslError("credential too long")
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SaslError("not UTF-8") from error


def scram_user(client_first: str) -> str:
    """The user name of a SCRAM client-first message `n,,n=user,r=nonce` (RFC 5802 §7). Raises SaslError."""
    parts = client_first.split(",")
    if len(parts) < 4 or parts[0] not in ("n", "y") or not parts[2].startswith("n="):
        raise SaslError("not a SCRAM first message")
    if parts[1] not in ("", "a=" + parts[2][2:]):
        raise SaslError("acting for somebody else is not supported")
    return parts[2][2:].replace("=2C", ",").replace("=3D", "=")
