"""Owns what a stored password says and whether one that was sent is it: {argon2id} (new ones), {scram-sha-256}, {plain}, and
those of other systems (`directory.schemes`); a bare value is clear text.

Blocking and expensive: only called in a lane. Comparison is constant in time. An empty stored password admits nobody. What
cannot be used says why, is never an exception of a library, and costs what an unknown user does.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stringprep
import unicodedata
from typing import NamedTuple

import argon2

from powermail.base import limits
from powermail.directory import schemes
from powermail.directory.reasons import Reason, Unusable
from powermail.directory.schemes import Check, Cost

_hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)  # OWASP's second profile: 19 MiB
# As costly to check as a new one (U07); written down, so that no process spends that at its start.
DUMMY = "{argon2id}$argon2id$v=19$m=19456,t=2,p=1$iJj+yqfTMe4nIp676MoMQQ$qF5TaQVoBw3kMSYn97UjKwtZiazvqtomoEP/wUB/aaU"
_ARGONS = ("argon2id", "argon2i", "argon2d", "argon2")
_ARGON_MS_PER_KIB = 0.001  # and pass
_CLEAR = ("plain", "cleartext", "clear")
_SCRAMS = {"scram-sha-1": "sha1", "scram-sha-256": "sha256"}
SCHEMES = frozenset((*_ARGONS, *_CLEAR, *_SCRAMS)) | schemes.SCHEMES
_ENCODINGS = {"hex": "hex", "b64": "base64", "base64": "base64"}


class Stored(NamedTuple):
    """A stored password: its scheme in lower case, how the rest is written where that is said, the rest."""

    scheme: str
    encoding: str
    rest: str


def parse_stored(stored: str) -> Stored:
    """Reads `{SCHEME}rest`, `{SCHEME.HEX}rest`, `{SCHEME.B64}rest` (Dovecot's ways), or a bare value: clear text, unless it has
    the form of a hash.
    """
    if stored.startswith("{") and "}" in stored:
        scheme, _, rest = stored[1:].partition("}")
        name, _, suffix = scheme.lower().partition(".")
        encoding = _ENCODINGS.get(suffix, "")
        return Stored(name if encoding else scheme.lower(), encoding, rest)
    if stored.startswith("$argon2"):
        return Stored("argon2id", "", stored)
    return Stored(schemes.is_bare(stored) or "plain", "", stored)


def scheme_of(stored: str) -> str:
    """The name of a stored password's scheme."""
    return parse_stored(stored).scheme


def has_scheme(stored: str) -> bool:
    """True if a value says how it is to be read; a bare one is clear text."""
    return parse_stored(stored) != ("plain", "", stored)


def prepare(stored: str) -> Check:
    """How passwords are compared with a stored one; nothing is hashed yet. Raises Unusable for one that admits nobody (U15)."""
    scheme, encoding, rest = parse_stored(stored)
    if not stored or not rest:
        raise Unusable(Reason.NO_PASSWORD)
    if scheme not in SCHEMES:
        raise Unusable(Reason.UNKNOWN_SCHEME)
    if scheme in _CLEAR:
        known = [form.encode() for form in forms(_text(encoding, rest))]
        return lambda password: any(hmac.compare_digest(form, password.encode()) for form in known)
    if not rest.isascii():
        raise Unusable(Reason.MALFORMED)
    if scheme in schemes.DIGESTS:
        return schemes.prepare(scheme, encoding, rest)
    text = _text(encoding, rest)
    if scheme in _ARGONS or text.startswith("$argon2"):
        return _argon(text)
    return _scram(scheme, text) if scheme in _SCRAMS else schemes.prepare(scheme, "", text)


def _text(encoding: str, rest: str) -> str:
    """A text that may be written in hex or base64. Raises Unusable."""
    try:
        return schemes.decode(encoding, rest).decode() if encoding else rest
    except UnicodeDecodeError as error:
        raise Unusable(Reason.MALFORMED) from error


def clear_text(stored: str) -> str:
    """The password itself, of a scheme that keeps it; else ""."""
    scheme, encoding, rest = parse_stored(stored)
    try:
        return _text(encoding, rest) if scheme in _CLEAR else ""
    except Unusable:
        return ""


def complaint(stored: str) -> str:
    """Why a stored password admits nobody, as far as can be said without hashing; "" if it may admit somebody."""
    try:
        prepare(stored)
    except Unusable as error:
        if error.reason is Reason.UNKNOWN_SCHEME:
            return f"password scheme {{{scheme_of(stored)}}} is not known"
        return f"password in {{{scheme_of(stored)}}}: {error}"
    return ""


def judge(stored: str, password: str) -> Reason | None:
    """None if the password is right, else why not."""
    try:
        is_it = prepare(stored)
        # NUL is in no password (RFC 4616 §2); to crypt(3) it is an end, to HMAC it is nothing.
        if password and "\0" not in password and any(is_it(form) for form in forms(password)):
            return None
    except Unusable as error:
        return error.reason
    return Reason.WRONG_PASSWORD


def check(stored: str, password: str) -> Reason | None:
    """`judge`, and as much work for a wrong password of any scheme as for an unknown user (U07)."""
    reason = judge(stored, password)
    if reason is not None and (scheme_of(stored) != "argon2id" or reason is not Reason.WRONG_PASSWORD):
        judge(DUMMY, password or "x")
    return reason


def forms(password: str) -> tuple[str, ...]:
    """A password as it was sent, and as SASLprep has it (RFC 4013): keyboards differ in how they compose characters."""
    if password.isascii():
        return (password,)
    mapped = "".join(" " if stringprep.in_table_c12(c) else c for c in password if not stringprep.in_table_b1(c))
    prepared = unicodedata.normalize("NFKC", mapped)
    composed = unicodedata.normalize("NFC", password)
    return tuple(dict.fromkeys(form for form in (password, composed, prepared) if form))


def _argon(text: str) -> Check:
    try:
        form = argon2.extract_parameters(text)
    except argon2.exceptions.InvalidHashError as error:
        raise Unusable(Reason.MALFORMED) from error
    Cost(form.memory_cost * form.time_cost * _ARGON_MS_PER_KIB, form.memory_cost * limits.KIB).bound()

    def is_it(password: str) -> bool:
        try:
            return bool(_hasher.verify(text, password))
        except argon2.exceptions.VerifyMismatchError:
            return False
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError) as error:
            raise Unusable(Reason.MALFORMED) from error

    return is_it


class ScramKeys(NamedTuple):
    """What a server keeps for SCRAM (RFC 5802 §3), in the order in which scramp takes it."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int


_SCRAM_HEX = re.compile(r"([0-9]{1,9})\$([0-9a-f]*)\$([0-9a-f]+)\$([0-9a-f]+)", re.IGNORECASE)  # as we write it
# As Dovecot writes it, and RFC 5803 (PostgreSQL, LDAP).
_SCRAM_BASE64 = re.compile(
    r"(?:SCRAM-SHA-(?:1|256)\$)?([0-9]{1,9})[,:]([A-Za-z0-9+/=]+)[,$]([A-Za-z0-9+/=]+)[,:]([A-Za-z0-9+/=]+)", re.IGNORECASE
)


def _scram_keys(text: str, name: str = "sha256") -> ScramKeys:
    """Reads what stands behind {scram-sha-256}, in any of three ways of writing it. Raises Unusable."""
    found, encoding = _SCRAM_HEX.fullmatch(text), "hex"
    if found is None:
        found, encoding = _SCRAM_BASE64.fullmatch(text), "base64"
    if found is None:
        raise Unusable(Reason.MALFORMED)
    salt, stored_key, server_key = (schemes.decode(encoding, found[number]) for number in (2, 3, 4))
    keys = ScramKeys(salt, stored_key, server_key, int(found[1]))
    octets = hashlib.new(name, usedforsecurity=False).digest_size
    if keys.iterations < 1 or (len(keys.stored_key), len(keys.server_key)) != (octets, octets):
        raise Unusable(Reason.MALFORMED)
    schemes.pbkdf2_cost(name, keys.iterations).bound()
    return keys


def stored_scram_keys(stored: str) -> ScramKeys:
    """The keys of a {scram-sha-256} password. Raises Unusable."""
    _, encoding, rest = parse_stored(stored)
    return _scram_keys(_text(encoding, rest))


def _scram(scheme: str, text: str) -> Check:
    name = _SCRAMS[scheme]
    keys = _scram_keys(text, name)

    def is_it(password: str) -> bool:
        salted = hashlib.pbkdf2_hmac(name, password.encode(), keys.salt, keys.iterations)
        client_key = hmac.digest(salted, b"Client Key", name)
        return hmac.compare_digest(hashlib.new(name, client_key, usedforsecurity=False).digest(), keys.stored_key)

    return is_it


def hash_password(password: str) -> str:
    """A new stored value of the default scheme."""
    return "{argon2id}" + _hasher.hash(password)


def hash_scram(password: str, salt: bytes, iterations: int = 4096) -> str:
    """A stored value with which SCRAM-SHA-256 works without the password being kept (RFC 5802 §3)."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"{{scram-sha-256}}{iterations}${salt.hex()}${hashlib.sha256(client_key).hexdigest()}${server_key.hex()}"


def is_old(stored: str) -> bool:
    """True if a login may re-hash it to the default scheme."""
    return scheme_of(stored) not in ("argon2id", "scram-sha-256", *_CLEAR)
