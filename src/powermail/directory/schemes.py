"""Owns the stored passwords of other systems: their forms, what a check of one costs, and the check.

Digests of LDAP and Dovecot ({SSHA}, {SHA512}, {PLAIN-MD5} ...), crypt(3) in all its kinds, Apache's {APR1}, phpass, PBKDF2.
crypt(3) is done by libcrypt, in C and without the interpreter's lock; the rest, and what a libcrypt lacks, by libpass.

Danger: whoever wrote the directory chose the cost. Everything is read and reckoned before anything is hashed, and what is no
such form, or would hold a lane or the interpreter for longer than the limits say, is Unusable. libpass is imported when it
is first needed, in the lane: no other process pays for it.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import ctypes.util
import hmac
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from powermail.base import limits
from powermail.directory.reasons import Reason, Unusable

Check = Callable[[str], bool]

# scheme: (libpass's name, octets of the digest)
_BARE = {
    "sha": ("hex_sha1", 20),
    "sha1": ("hex_sha1", 20),
    "sha256": ("hex_sha256", 32),
    "sha512": ("hex_sha512", 64),
    "md5": ("hex_md5", 16),
    "plain-md5": ("hex_md5", 16),
    "ldap-md5": ("hex_md5", 16),
    "plain-md4": ("hex_md4", 16),
}
_SALTED = {
    "smd5": ("ldap_salted_md5", 16),
    "ssha": ("ldap_salted_sha1", 20),
    "ssha256": ("ldap_salted_sha256", 32),
    "ssha512": ("ldap_salted_sha512", 64),
}
# Names of kinds of crypt(3) do not bind: as elsewhere, the value itself says which kind it is.
_CRYPTS = {
    *("crypt", "des-crypt", "md5-crypt", "sha256-crypt", "sha512-crypt", "blf-crypt", "bcrypt", "yescrypt"),
    *("apr1", "apr-md5-crypt", "phpass"),
}
_PBKDF2 = {"pbkdf2": "pbkdf2", "pbkdf2-sha1": "pbkdf2", "pbkdf2-sha256": "pbkdf2-sha256", "pbkdf2-sha512": "pbkdf2-sha512"}
DIGESTS = frozenset((*_BARE, *_SALTED))
SCHEMES = frozenset((*DIGESTS, *_CRYPTS, *_PBKDF2))

_ITOA64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_C = r"[./0-9A-Za-z]"
_SALT = r"[^$:\s]"
_PASSPHRASE_OCTETS_MAX = 511  # of libxcrypt


class Cost(NamedTuple):
    """What one check takes on a plain core that has nothing else to do; `held`: with the interpreter's lock."""

    ms: float
    octets: int = 0
    held: bool = False

    def bound(self) -> None:
        """Raises Unusable beyond the limits."""
        ms_max = limits.PASSWORD_CHECK_HELD_MS_MAX if self.held else limits.PASSWORD_CHECK_MS_MAX
        if self.ms > ms_max or self.octets > limits.PASSWORD_CHECK_OCTETS_MAX:
            raise Unusable(Reason.TOO_COSTLY)


class _Kind(NamedTuple):
    """A kind of crypt(3)."""

    form: re.Pattern[str]
    cost: Callable[[re.Match[str]], Cost]
    libpass: str = ""  # its name there
    native: bool = True  # libcrypt knows it


def _number(text: str) -> int:
    return sum(_ITOA64.index(c) << 6 * place for place, c in enumerate(text))


def _yescrypt(found: re.Match[str]) -> Cost:
    blocks = 2 ** min(64, _number(found[1]) + 1) * (_number(found[2]) + 1)
    return Cost(blocks * 0.00015, blocks * 128)


def _scrypt(found: re.Match[str]) -> Cost:
    blocks = 2 ** min(64, _number(found[1])) * _number(found[2])
    return Cost(blocks * 0.0003 * max(1, _number(found[3])), blocks * 128)


def _kind(form: str, cost: Callable[[re.Match[str]], Cost], libpass: str = "", native: bool = True) -> _Kind:
    return _Kind(re.compile(form), cost, libpass, native)


_SHA_ROUNDS = r"(?:rounds=([0-9]{1,12})\$)?"
_KINDS = (
    _kind(rf"\$1\${_SALT}{{0,8}}\${_C}{{22}}", lambda _: Cost(1.0), "md5_crypt"),
    _kind(rf"\$5\${_SHA_ROUNDS}{_SALT}{{0,16}}\${_C}{{43}}", lambda m: Cost(int(m[1] or 5000) * 0.0008), "sha256_crypt"),
    _kind(rf"\$6\${_SHA_ROUNDS}{_SALT}{{0,16}}\${_C}{{86}}", lambda m: Cost(int(m[1] or 5000) * 0.0008), "sha512_crypt"),
    _kind(rf"\$2[abxy]\$([0-9]{{2}})\${_C}{{53}}", lambda m: Cost(2 ** int(m[1]) * 0.055)),
    _kind(rf"\$g?y\$j([./0-9A-Za-j])([./0-9A-Za-j])\${_C}{{0,86}}\${_C}{{43}}", _yescrypt),
    _kind(rf"\$7\$({_C})({_C}{{5}})({_C}{{5}}){_SALT}{{0,86}}\${_C}{{43}}", _scrypt),
    _kind(rf"\$sha1\$([0-9]{{1,10}})\${_SALT}{{1,64}}\${_C}{{28}}", lambda m: Cost(int(m[1]) * 0.001), "sha1_crypt"),
    _kind(rf"_({_C}{{4}}){_C}{{15}}", lambda m: Cost(_number(m[1]) * 0.0003), "bsdi_crypt"),
    _kind(rf"{_C}{{13}}", lambda _: Cost(1.0), "des_crypt"),
    _kind(rf"\$apr1\${_SALT}{{0,8}}\${_C}{{22}}", lambda _: Cost(1.0, held=True), "apr_md5_crypt", native=False),
    _kind(rf"\$[PH]\$({_C}){_C}{{30}}", lambda m: Cost(2 ** _number(m[1]) * 0.0015, held=True), "phpass", native=False),
)
_PBKDF2_HASHES = {"pbkdf2": "sha1", "pbkdf2-sha256": "sha256", "pbkdf2-sha512": "sha512"}
_PBKDF2_MS = {"sha1": 0.0005, "sha256": 0.0007, "sha512": 0.001}  # a round
_MODULAR = re.compile(r"(?:\$(pbkdf2|pbkdf2-sha256|pbkdf2-sha512)\$)?([1-9][0-9]{0,9})\$([./0-9A-Za-z]*)\$([./0-9A-Za-z]+)")
_DOVECOT_PBKDF2 = re.compile(r"\$1\$([^$]{1,255})\$([1-9][0-9]{0,9})\$([0-9A-Fa-f]{40})")


def prepare(scheme: str, encoding: str, text: str) -> Check:
    """How passwords are compared with a stored one; nothing is hashed yet. Raises Unusable."""
    if scheme == "md5" and text.startswith("$"):
        scheme = "md5-crypt"
    if scheme in _BARE:
        name, octets = _BARE[scheme]
        kept = _octets(encoding, text, octets)
        return _by_libpass(name, kept.hex()) if len(kept) == octets else _malformed()
    if scheme in _SALTED:
        name, octets = _SALTED[scheme]
        kept = _octets(encoding, text, 0)
        salt = len(kept) - octets
        if not limits.PASSWORD_SALT_OCTETS_MIN <= salt <= limits.PASSWORD_SALT_OCTETS_MAX:
            raise Unusable(Reason.MALFORMED)
        return _by_libpass(name, f"{{{scheme.upper()}}}{base64.b64encode(kept).decode()}")
    return _pbkdf2(scheme, text) if scheme in _PBKDF2 or text.startswith("$pbkdf2") else _crypt(text)


def is_bare(stored: str) -> str:
    """The scheme of a value that names none but has the form of one; else ""."""
    if re.fullmatch(r"\$[PH]\$.{31}", stored):
        return "phpass"
    for mark, scheme in (("$apr1$", "apr1"), ("$pbkdf2", "pbkdf2")):
        if stored.startswith(mark):
            return scheme
    return "crypt" if stored.startswith("$") and stored.count("$") >= 3 else ""


def decode(encoding: str, text: str) -> bytes:
    """The octets that a text in hex or base64 stands for. Raises Unusable."""
    try:
        return bytes.fromhex(text) if encoding == "hex" else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise Unusable(Reason.MALFORMED) from error


def _octets(encoding: str, text: str, octets: int) -> bytes:
    """A digest is in hex if it says so, or has just the length of that (Dovecot's rule)."""
    text = text.strip()
    return decode(encoding or ("hex" if octets and len(text) == 2 * octets else "base64"), text)


def _malformed() -> Check:
    raise Unusable(Reason.MALFORMED)


# -- crypt(3) -----------------------------------------------------------------------------------------------------------


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


_LIBCRYPT = _load_crypt()


def _crypt(stored: str) -> Check:
    for kind in _KINDS:
        found = kind.form.fullmatch(stored)
        if found is not None:
            break
    else:
        raise Unusable(Reason.MALFORMED)
    cost = kind.cost(found)
    cost.bound()
    if not kind.native:
        return _by_libpass(kind.libpass, stored)
    library = _LIBCRYPT

    def check(password: str) -> bool:
        octets = password.encode()
        if len(octets) > _PASSPHRASE_OCTETS_MAX:
            return False
        answer: bytes | None = None
        if library is not None:
            data = _CryptData()
            answer = library.crypt_r(octets, stored.encode("ascii"), ctypes.byref(data))
        if answer is not None and not answer.startswith(b"*"):
            return hmac.compare_digest(answer, stored.encode("ascii"))
        if not kind.libpass:  # neither knows it
            raise Unusable(Reason.UNKNOWN_SCHEME)
        cost._replace(held=True).bound()
        return _by_libpass(kind.libpass, stored)(password)

    return check


# -- libpass ------------------------------------------------------------------------------------------------------------


def _handler(name: str) -> Any:
    import passlib.hash  # a tenth of a second of CPU, once

    handler = getattr(passlib.hash, name)
    if name.startswith("ldap_salted_"):  # it takes salts of 4 to 16 octets; others write longer ones
        handler = type(name, (handler,), {"max_salt_size": limits.PASSWORD_SALT_OCTETS_MAX})
    return handler


def _by_libpass(name: str, text: str) -> Check:
    def check(password: str) -> bool:
        handler = _handler(name)
        try:
            handler.from_string(text)
        except ValueError as error:
            raise Unusable(Reason.MALFORMED) from error
        try:
            return bool(handler.verify(password, text))
        except ValueError:  # no such password can be: it has a NUL, or is too long for the scheme
            return False

    return check


def _pbkdf2(scheme: str, text: str) -> Check:
    kind = _PBKDF2.get(scheme, "")  # {CRYPT} has it in the value
    found = _MODULAR.fullmatch(text)
    if found is not None:
        kind, rounds, salt, digest = found[1] or kind or "pbkdf2", found[2], found[3], found[4]
    else:
        found = _DOVECOT_PBKDF2.fullmatch(text) if scheme == "pbkdf2" else None
        if found is None:
            raise Unusable(Reason.MALFORMED)
        rounds, salt, digest = found[2], _adapted(found[1].encode()), _adapted(bytes.fromhex(found[3]))
    name = _PBKDF2_HASHES[kind]
    pbkdf2_cost(name, int(rounds)).bound()
    return _by_libpass(f"pbkdf2_{name}", f"${kind}${rounds}${salt}${digest}")


def pbkdf2_cost(name: str, rounds: int) -> Cost:
    """What PBKDF2 with this hash takes, in C."""
    return Cost(rounds * _PBKDF2_MS[name])


def _adapted(octets: bytes) -> str:
    """Base64 as libpass writes it: `.` for `+`, no padding."""
    return base64.b64encode(octets).decode().rstrip("=").replace("+", ".")
