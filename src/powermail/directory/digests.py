"""Owns the salted and bare digests of other systems: LDAP's and Dovecot's {SSHA}, {SHA512}, {PLAIN-MD5} ..., Apache's {APR1}.

They are fast to guess; a login re-hashes them to the default scheme where the operator allows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

# scheme: (name of the hash, octets of the digest, whether a salt follows it)
_DIGESTS = {
    "sha": ("sha1", 20, False),
    "sha1": ("sha1", 20, False),
    "ssha": ("sha1", 20, True),
    "sha256": ("sha256", 32, False),
    "ssha256": ("sha256", 32, True),
    "sha512": ("sha512", 64, False),
    "ssha512": ("sha512", 64, True),
    "smd5": ("md5", 16, True),
    "ldap-md5": ("md5", 16, False),
    "plain-md5": ("md5", 16, False),
}
SCHEMES = frozenset(_DIGESTS) | {"apr1"}
_APR1_ROUNDS = 1000  # fixed by the scheme
_ITOA64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _digest(name: str, *parts: bytes) -> bytes:
    return hashlib.new(name, b"".join(parts), usedforsecurity=False).digest()


def matches(scheme: str, stored: str, password: str) -> bool:
    """True if the password is right; digests are Base64 or hex (RFC 2307 §5.3 and Dovecot's ways). Constant in time."""
    if scheme == "apr1":
        return _apr1_matches(stored, password)
    name, octets, salted = _DIGESTS[scheme]
    try:
        kept = bytes.fromhex(stored) if len(stored) == 2 * octets else base64.b64decode(stored, validate=True)
    except (ValueError, binascii.Error):
        return False
    if len(kept) < octets or (len(kept) > octets) is not salted:
        return False
    return hmac.compare_digest(_digest(name, password.encode(), kept[octets:]), kept[:octets])


def _apr1_matches(stored: str, password: str) -> bool:
    """`$apr1$SALT$DIGEST`, as htpasswd writes it."""
    parts = stored.split("$")
    if len(parts) != 4 or parts[1] != "apr1" or not 1 <= len(parts[2]) <= 8 or not stored.isascii():
        return False
    return hmac.compare_digest(apr1(password.encode(), parts[2].encode()).encode(), parts[3].encode())


def apr1(password: bytes, salt: bytes) -> str:
    """The 22 characters of Apache's variant of md5-crypt."""
    once = _digest("md5", password, salt, password)
    first = password + b"$apr1$" + salt + (once * (len(password) // 16 + 1))[: len(password)]
    bits = len(password)
    while bits:
        first += b"\0" if bits & 1 else password[:1]
        bits >>= 1
    final = _digest("md5", first)
    for turn in range(_APR1_ROUNDS):
        parts = [password if turn & 1 else final]
        if turn % 3:
            parts.append(salt)
        if turn % 7:
            parts.append(password)
        parts.append(final if turn & 1 else password)
        final = _digest("md5", *parts)
    text = ""
    for a, b, c in ((0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5)):
        text += _itoa(final[a] << 16 | final[b] << 8 | final[c], 4)
    return text + _itoa(final[11], 2)


def _itoa(value: int, width: int) -> str:
    return "".join(_ITOA64[value >> 6 * n & 63] for n in range(width))
