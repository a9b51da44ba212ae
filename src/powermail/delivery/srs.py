"""Owns sender rewriting: SRS0 and SRS1 reverse-paths, so that forwarded mail passes SPF and bounces find their way back.

    SRS0=HHHH=TT=domain=local@ours        SRS1=HHHH=srs0-domain==rest@ours

The hash covers lower-cased text, because relays change case. Keys rotate: the first signs, all verify.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from powermail.mail.address import Address, AddressError, parse

_DAYS_MAX = 21
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_HASH_CHARS = 8


class SrsError(ValueError):
    """Forged, cut or expired: refused as unknown, never relayed (F06)."""


class Rewriter:
    """Rewrites and reverses."""

    def __init__(self, domain: str, keys: Sequence[bytes]) -> None:
        self.domain = domain.lower()
        self._keys = list(keys)

    def _hash(self, key: bytes, text: str) -> str:
        digest = hmac.digest(key, text.lower().encode(), hashlib.sha256)
        return base64.b32encode(digest).decode().lower()[:_HASH_CHARS]

    def _good(self, given: str, text: str) -> bool:
        return any(hmac.compare_digest(self._hash(key, text).encode(), given.lower().encode()) for key in self._keys)

    def forward(self, reverse_path: str, now: float) -> str:
        """The reverse-path for a forwarded message; <> stays <>. One that would be too long stays as it is."""
        if not reverse_path:
            return ""
        try:
            address = parse(reverse_path)
        except AddressError:
            return reverse_path
        if address.domain == self.domain:
            return reverse_path
        kind = address.local[:5].upper()
        if kind == "SRS0=" or (kind == "SRS1=" and address.local.count("=") >= 3):
            if kind == "SRS1=":
                rest = address.local.split("=", 2)[2]
            else:
                rest = f"{address.domain}=={address.local[5:]}"
            local = f"SRS1={self._hash(self._keys[0], rest)}={rest}"
        else:
            day = int(now // 86_400) % 1024
            stamp = _ALPHABET[day >> 5] + _ALPHABET[day & 31]
            rest = f"{stamp}={address.domain}={address.local}"
            local = f"SRS0={self._hash(self._keys[0], rest)}={rest}"
        fresh = Address(local, self.domain)
        try:
            return parse(fresh.text).text
        except AddressError:
            return reverse_path

    def is_ours(self, address: Address) -> bool:
        """True for an SRS address at our domain."""
        return address.domain == self.domain and address.local[:5].upper() in ("SRS0=", "SRS1=")

    def reverse(self, address: Address, now: float) -> str:
        """Where a bounce to one of our SRS addresses goes. Raises SrsError."""
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
        if len(stamp) != 2 or not separator or not local:
            raise SrsError("form")
        try:
            day = _ALPHABET.index(stamp[0].lower()) << 5 | _ALPHABET.index(stamp[1].lower())
        except ValueError as error:
            raise SrsError("time stamp") from error
        if (int(now // 86_400) - day) % 1024 > _DAYS_MAX:
            raise SrsError("expired")
        return Address(local, domain).text
