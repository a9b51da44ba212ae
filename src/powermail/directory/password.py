"""Owns password schemes: {argon2id} (new ones), {bcrypt}, SHA-crypt, yescrypt, {crypt}, {md5}, digests, {plain}, bare = plain.

Blocking and expensive: only called in a lane. Comparison is constant in time. An empty stored password admits nobody.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import hmac
import stringprep
import unicodedata

import argon2

from powermail.directory import digests

_hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)  # OWASP's second profile: 19 MiB
# As costly to check as a new one (U07); written down, so that no process spends that at its start.
DUMMY = "{argon2id}$argon2id$v=19$m=19456,t=2,p=1$iJj+yqfTMe4nIp676MoMQQ$qF5TaQVoBw3kMSYn97UjKwtZiazvqtomoEP/wUB/aaU"
_CRYPTS = ("crypt", "bcrypt", "blf-crypt", "sha256-crypt", "sha512-crypt", "yescrypt", "md5-crypt", "des-crypt")
_ARGONS = ("argon2id", "argon2i", "argon2d", "argon2")
_CLEAR = ("plain", "cleartext", "clear")
SCHEMES = frozenset((*_ARGONS, *_CRYPTS, *_CLEAR, "md5", "scram-sha-256")) | digests.SCHEMES


class _CryptData(ctypes.Structure):
    """struct crypt_data of libxcrypt: 32 KiB."""

    _fields_ = (("octets", ctypes.c_char * 32768),)


def _load_crypt() -> ctypes.CDLL | None:
    for name in ("libcrypt.so.1", "libcrypt.so.2", ctypes.util.find_library("crypt") or ""):
        try:
            library = ctypes.CDLL(name) if name else None
        except OSError:
            continue
        if library is not None and hasattr(library, "crypt_r"):
            library.crypt_r.restype = ctypes.c_char_p
            library.crypt_r.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
            return library
    return None


_CRYPT = _load_crypt()


def _crypt_matches(stored: str, password: str) -> bool:
    if _CRYPT is None or "\0" in password or not stored.isascii():
        return False
    data = _CryptData()
    answer: bytes | None = _CRYPT.crypt_r(password.encode(), stored.encode("ascii"), ctypes.byref(data))
    if answer is None or answer.startswith(b"*"):
        return False
    return hmac.compare_digest(answer, stored.encode("ascii"))


def split_scheme(stored: str) -> tuple[str, str]:
    """(scheme in lower case, rest). A bare value is plain, as in the original; a bare `$id$` hash is crypt."""
    if stored.startswith("{") and "}" in stored:
        scheme, _, rest = stored[1:].partition("}")
        return scheme.lower(), rest
    if stored.startswith("$argon2"):
        return "argon2id", stored
    if stored.startswith("$apr1$"):
        return "apr1", stored
    if stored.startswith("$") and stored.count("$") >= 3:
        return "crypt", stored
    return "plain", stored


def has_scheme(stored: str) -> bool:
    """True if a value says how it is to be read; a bare one is clear text."""
    return split_scheme(stored) != ("plain", stored)


def matches(stored: str, password: str) -> bool:
    """True if the password is right. An unknown scheme or an empty value never is (U15)."""
    if not stored or not password:
        return False
    scheme, rest = split_scheme(stored)
    if not rest or (scheme not in _CLEAR and not rest.isascii()):
        return False
    if scheme in _ARGONS:
        try:
            return bool(_hasher.verify(rest, password))
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False
    if scheme in digests.SCHEMES:
        return digests.matches(scheme, rest, password)
    if scheme in _CRYPTS:
        return _crypt_matches(rest, password)
    if scheme == "md5":
        digest = hashlib.md5(password.encode(), usedforsecurity=False).hexdigest()
        return hmac.compare_digest(digest.encode(), rest.lower().strip().encode())
    if scheme in _CLEAR:
        return any(hmac.compare_digest(form.encode(), password.encode()) for form in forms(rest))
    if scheme == "scram-sha-256":
        return _scram_matches(rest, password)
    return False


def check(stored: str, password: str) -> bool:
    """`matches`, and as much work for a wrong password of any scheme as for an unknown user (U07)."""
    if any(matches(stored, form) for form in forms(password)):
        return True
    if split_scheme(stored)[0] != "argon2id" or not stored:
        matches(DUMMY, password or "x")
    return False


def forms(password: str) -> tuple[str, ...]:
    """A password as it was sent, and as SASLprep has it (RFC 4013): keyboards differ in how they compose characters."""
    if password.isascii():
        return (password,)
    mapped = "".join(" " if stringprep.in_table_c12(c) else c for c in password if not stringprep.in_table_b1(c))
    prepared = unicodedata.normalize("NFKC", mapped)
    composed = unicodedata.normalize("NFC", password)
    return tuple(dict.fromkeys(form for form in (password, composed, prepared) if form))


def _scram_matches(rest: str, password: str) -> bool:
    parsed = parse_scram(rest)
    if parsed is None:
        return False
    salt, stored_key, _, iterations = parsed
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)


def parse_scram(rest: str) -> tuple[bytes, bytes, bytes, int] | None:
    """`iterations$salt$storedkey$serverkey`, all but the first in hex; None if it is not that."""
    parts = rest.split("$")
    try:
        iterations = int(parts[0])
        salt, stored_key, server_key = (bytes.fromhex(part) for part in parts[1:])
    except ValueError:
        return None
    return (salt, stored_key, server_key, iterations) if 4096 <= iterations <= 1_000_000 else None


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
    return split_scheme(stored)[0] not in ("argon2id", "scram-sha-256", *_CLEAR)
