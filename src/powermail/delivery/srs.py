"""Owns sender rewriting: SRS0 and SRS1 reverse-paths, so that forwarded mail passes SPF and bounces find their way back.

    SRS0=HHHH=TT=domain=local@ours        SRS1=HHHH=srs0-domain==rest@ours        SRST=HHHH=TT=token@ours

The hash covers lower-cased text, because relays change case. Keys rotate: the first signs, all verify. A sender that would
grow past 64 octets (RFC 5321 §4.5.3.1.1: every host takes so many) is rewritten to a token; what it stands for stands in the
commit record's target, and enters the index with the queue row, for as long as the hash is good.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from powermail.base import limits
from powermail.base.errors import IndexTrouble
from powermail.mail.address import Address, AddressError, parse

_DAYS_MAX = int(limits.RETURN_S // 86_400)
_LOCAL_OCTETS_MAX = 64
_TOKEN_CHARS = 16  # 80 bits
Find = Callable[[str, float], Awaitable[str | None]]
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_HASH_CHARS = 8


class SrsError(ValueError):
    """Forged, cut or expired: refused as unknown, never relayed (F06)."""


class Rewritten(NamedTuple):
    """The reverse-path of a forwarded message, and the sender that it stands for if it is a token."""

    reverse_path: str
    original: str = ""


async def _find_nothing(address: str, now: float) -> str | None:
    return None


class Rewriter:
    """Rewrites and reverses. `find` knows what tokens stand for (`index.contract.Queue.find_return`)."""

    def __init__(self, domain: str, keys: Sequence[bytes], find: Find = _find_nothing) -> None:
        self.domain = domain.lower()
        self._keys = list(keys)
        self._find = find

    def _hash(self, key: bytes, text: str) -> str:
        digest = hmac.digest(key, text.lower().encode(), hashlib.sha256)
        return base64.b32encode(digest).decode().lower()[:_HASH_CHARS]

    def _good(self, given: str, text: str) -> bool:
        return any(hmac.compare_digest(self._hash(key, text).encode(), given.lower().encode()) for key in self._keys)

    def forward(self, reverse_path: str, now: float) -> Rewritten:
        """The reverse-path for a forwarded message; <> stays <>, and ours stays as it is."""
        if not reverse_path:
            return Rewritten("")
        try:
            address = parse(reverse_path)
        except AddressError:
            return Rewritten(reverse_path)
        if address.domain == self.domain:
            return Rewritten(reverse_path)
        kind = address.local[:5].upper()
        if kind == "SRS0=" or (kind == "SRS1=" and address.local.count("=") >= 3):
            if kind == "SRS1=":
                rest = address.local.split("=", 2)[2]
            else:
                rest = f"{address.domain}=={address.local[5:]}"
            local = f"SRS1={self._hash(self._keys[0], rest)}={rest}"
        else:
            rest = f"{_stamp(now)}={address.domain}={address.local}"
            local = f"SRS0={self._hash(self._keys[0], rest)}={rest}"
        fresh = Address(local, self.domain)
        try:
            if len(local.encode()) <= _LOCAL_OCTETS_MAX:
                return Rewritten(parse(fresh.text).text)
        except AddressError:
            pass  # as with one that is too long
        return self._token(reverse_path, now)

    def _token(self, reverse_path: str, now: float) -> Rewritten:
        """The same for all mail of one sender and day, so that mail in bulk takes one row."""
        digest = hmac.digest(self._keys[0], b"token " + reverse_path.encode(), hashlib.sha256)
        rest = f"{_stamp(now)}={base64.b32encode(digest).decode().lower()[:_TOKEN_CHARS]}"
        local = f"SRST={self._hash(self._keys[0], rest)}={rest}"
        return Rewritten(Address(local, self.domain).text, reverse_path)

    def is_ours(self, address: Address) -> bool:
        """True for an SRS address at our domain."""
        return address.domain == self.domain and address.local[:5].upper() in ("SRS0=", "SRS1=", "SRST=")

    async def origin(self, address: Address, now: float) -> Address:
        """Where mail to one of our SRS addresses goes. Raises SrsError, and IndexTrouble for a good token that is not known
        here: its row may not have been entered yet.
        """
        parts = address.local.split("=", 2)
        try:
            if parts[0].upper() != "SRST":
                return parse(self.reverse(address, now))
            if len(parts) != 3 or not self._good(parts[1], parts[2]):
                raise SrsError("hash")
            _check_stamp(parts[2].partition("=")[0], now)
            original = await self._find(address.text, now)
            if original is None:
                raise IndexTrouble("this return address is not known yet, or no more")
            return parse(original)
        except AddressError as error:
            raise SrsError(str(error)) from error

    def reverse(self, address: Address, now: float) -> str:
        """Where mail to one of our SRS addresses that says it itself goes. Raises SrsError."""
        parts = address.local.split("=", 2)
        if len(parts) != 3 or not self._good(parts[1], parts[2]):
            raise SrsError("hash")
        rest = parts[2]
        if parts[0].upper() == "SRS1":
            domain, separator, local = rest.partition("==")
            if not separator or not domain:
                raise SrsError("form")
            return f"SRS0={local}@{domain}"
        stamp, _, tail = rest.partition("=")
        domain, separator, local = tail.partition("=")
        if not separator or not local:
            raise SrsError("form")
        _check_stamp(stamp, now)
        return Address(local, domain).text


def _stamp(now: float) -> str:
    """The day, modulo 1024, as two characters."""
    day = int(now // 86_400) % 1024
    return _ALPHABET[day >> 5] + _ALPHABET[day & 31]


def _check_stamp(stamp: str, now: float) -> None:
    if len(stamp) != 2:
        raise SrsError("form")
    try:
        day = _ALPHABET.index(stamp[0].lower()) << 5 | _ALPHABET.index(stamp[1].lower())
    except ValueError as error:
        raise SrsError("time stamp") from error
    if (int(now // 86_400) - day) % 1024 > _DAYS_MAX:
        raise SrsError("expired")
