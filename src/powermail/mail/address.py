r"""Owns addresses: parsing paths of SMTP commands (RFC 5321 §4.1.2, RFC 6531 §3.3) and their canonical form.

    Mailbox    = Local-part "@" ( Domain / address-literal )
    Local-part = Dot-string / Quoted-string
    Domain     = sub-domain *("." sub-domain)

The canonical form, by which the directory knows an address, is lower case, composed (NFC), with needless quotes removed and
the domain in Unicode (U-labels, RFC 5890), however it was written. Local parts are compared without case: RFC 5321 §2.4 leaves
that to the receiving host. What stands on the wire stays as it was given. No address ever becomes a path or SQL text.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from powermail.base import limits

# RFC 5321 §4.1.2: atext of RFC 5322 §3.2.3; RFC 6531 §3.3 adds UTF-8.
_ATOM = r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~\u0080-\U0010ffff]+"
_DOT_STRING = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
# qtextSMTP = %d32-33 / %d35-91 / %d93-126; quoted-pairSMTP = %d92 %d32-126
_QUOTED = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e\u0080-\U0010ffff]|\\[\x20-\x7e])*)"')
# sub-domain = Let-dig [Ldh-str]; underscore is seen in the wild and harmless.
_LABEL = r"[A-Za-z0-9_\u0080-\U0010ffff](?:[A-Za-z0-9_\-\u0080-\U0010ffff]{0,61}[A-Za-z0-9_\u0080-\U0010ffff])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_SOURCE_ROUTE = re.compile(rf"@{_LABEL}(?:\.{_LABEL})*(?:,@{_LABEL}(?:\.{_LABEL})*)*:")
# What nearly every path looks like; anything else takes the long way, to the same result.
_PLAIN_PATH = re.compile(
    r"<([A-Za-z0-9+_\-]+(?:\.[A-Za-z0-9+_\-]+)*)@((?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63})>"
)
# What clients call themselves, for a comment of ours: anything but blanks and the marks of comments, paths and lists.
_HELLO = re.compile(r"""[^\s<>()\[\]\\",;]+""")
_CONTROL = re.compile("[\x00-\x1f\x7f\u0080-\u009f\u2028\u2029\ud800-\udfff\ufffd]")  # U+FFFD: was not UTF-8


class AddressError(ValueError):
    """The text is not an address."""


class Address(NamedTuple):
    """local-part@domain with the local part unquoted. `text` is the form on the wire, `canonical` the directory's."""

    local: str
    domain: str

    @property
    def text(self) -> str:
        """The address as it stands between angle brackets."""
        return f"{_quote(self.local)}@{self.domain}" if self.domain else _quote(self.local)

    @property
    def canonical(self) -> str:
        """The key in the directory."""
        return _canonical(self)

    @property
    def canonical_domain(self) -> str:
        """The domain in its canonical form."""
        return canonical_domain(self.domain)

    @property
    def ascii_only(self) -> bool:
        """True if no SMTPUTF8 is needed to carry it."""
        return self.local.isascii() and self.domain.isascii()


@lru_cache(maxsize=4096)
def _canonical(address: Address) -> str:
    text = address.text
    if text.isascii() and "xn--" not in address.domain:
        return text.lower()
    local = unicodedata.normalize("NFC", unicodedata.normalize("NFC", _quote(address.local)).lower())
    return f"{local}@{canonical_domain(address.domain)}" if address.domain else local


@lru_cache(maxsize=4096)
def canonical_domain(domain: str) -> str:
    """The one form of a domain: lower case, U-labels. What IDNA does not allow is only composed and in lower case."""
    domain = domain.lower()
    if domain.isascii() and "xn--" not in domain:
        return domain
    import idna  # its tables are large, and most processes never need them

    try:
        return idna.decode(idna.encode(domain, uts46=True))
    except idna.IDNAError:
        return unicodedata.normalize("NFC", domain)


def load_idna() -> None:
    """Loads the tables of IDNA, some 40 ms, before anybody waits for it."""
    spellings("b\u00fccher.example")


def spellings(canonical: str) -> tuple[str, ...]:
    """How a canonical address or domain may stand in a table that others write too: with U-labels, with A-labels."""
    local, at, domain = canonical.rpartition("@")
    if domain.isascii():
        return (canonical,)
    import idna

    try:
        return canonical, f"{local}{at}{idna.encode(domain, uts46=True).decode('ascii')}"
    except idna.IDNAError:
        return (canonical,)


def _quote(local: str) -> str:
    if _DOT_STRING.fullmatch(local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def has_control(text: str) -> bool:
    """True if some character must not stand in one line of text: controls, line separators, what was not UTF-8."""
    return _CONTROL.search(text) is not None


def parse(text: str) -> Address:
    """Parses local-part@domain. Raises AddressError."""
    address, rest = _parse_prefix(text)
    if rest:
        raise AddressError("something follows the address")
    return address


def _parse_prefix(text: str) -> tuple[Address, str]:
    if _CONTROL.search(text):
        raise AddressError("control character in address")
    if text.startswith('"'):
        match = _QUOTED.match(text)
        if not match:
            raise AddressError("unterminated quoted local part")
        local = re.sub(r"\\(.)", r"\1", match.group(1))
    else:
        match = _DOT_STRING.match(text)
        if not match:
            raise AddressError("no local part")
        local = match.group()
    if not local:
        raise AddressError("empty local part")
    if len(local.encode()) > limits.LOCAL_PART_OCTETS_MAX:
        raise AddressError(f"local part longer than {limits.LOCAL_PART_OCTETS_MAX} octets")
    rest = text[match.end() :]
    if not rest.startswith("@"):
        raise AddressError("no @ after the local part")
    domain, rest = _domain_prefix(rest[1:])
    return Address(local, domain), rest


def _domain_prefix(text: str) -> tuple[str, str]:
    if text.startswith("["):
        end = text.find("]")
        if end < 0:
            raise AddressError("unterminated address literal")
        literal = text[1:end]
        check_literal(literal)
        return text[: end + 1].lower(), text[end + 1 :]
    match = _DOMAIN.match(text)
    if not match:
        raise AddressError("no domain after the @")
    domain = match.group().removesuffix(".")
    if len(domain.encode()) > limits.DOMAIN_OCTETS_MAX:
        raise AddressError("domain longer than 255 octets")
    return domain.lower(), text[match.end() :]


def check_literal(literal: str) -> None:
    """Checks the inside of an address literal (RFC 5321 §4.1.3). Raises AddressError."""
    try:
        if literal.upper().startswith("IPV6:"):
            ipaddress.IPv6Address(literal[5:])
        else:
            ipaddress.IPv4Address(literal)
    except ValueError as error:
        raise AddressError("bad address literal") from error


def is_hello_name(text: str) -> bool:
    """True for a Domain or address literal, leniently (RFC 5321 §4.1.4 forbids refusing for a mere mismatch)."""
    if not text or len(text.encode()) > limits.SMTP_HELLO_OCTETS_MAX or _CONTROL.search(text):
        return False
    if text.startswith("["):
        inside = text[1:-1].partition("%")[0]  # a zone means nothing elsewhere
        try:
            ipaddress.ip_address(inside[5:] if inside[:5].upper() == "IPV6:" else inside)
        except ValueError:
            return False
        return text.endswith("]")
    return _HELLO.fullmatch(text) is not None


def parse_path(text: str) -> tuple[Address | None, str]:
    """Parses the path of MAIL FROM or RCPT TO and returns (address or None for <>, parameters behind it).

    Accepts `<path>`, and a bare address for the sake of old clients; a source route is read and dropped
    (RFC 5321 appendix C). `<postmaster>` without a domain is the one local name allowed (§4.5.1).
    Raises AddressError.
    """
    plain = _PLAIN_PATH.match(text)
    if plain is not None:
        local, domain = plain.groups()
        if len(local) <= limits.LOCAL_PART_OCTETS_MAX and len(domain) <= limits.DOMAIN_OCTETS_MAX:
            return Address(local, domain.lower()), text[plain.end() :]
    if text.startswith("<"):
        if text.startswith("<>"):
            return None, text[2:]
        inner = text[1:]
        if inner.startswith("@"):
            route = _SOURCE_ROUTE.match(inner)
            if not route:
                raise AddressError("bad source route")
            inner = inner[route.end() :]
        if inner[:11].lower() == "postmaster>":
            return Address("postmaster", ""), inner[11:]
        address, rest = _parse_prefix(inner)
        if not rest.startswith(">"):
            raise AddressError("no > after the address")
        if len(text) - len(rest) > limits.PATH_OCTETS_MAX + limits.DOMAIN_OCTETS_MAX:
            raise AddressError("path too long")
        return address, rest[1:]
    word, separator, rest = text.partition(" ")
    address, tail = _parse_prefix(word)
    if tail:
        raise AddressError("something follows the address")
    return address, separator + rest


def parse_canonical(text: str) -> str:
    """The canonical form of an address, or of a catch-all `*@domain`. Raises AddressError."""
    if text.startswith("*@"):
        domain, rest = _domain_prefix(text[2:])
        if rest or _CONTROL.search(text):
            raise AddressError("bad domain in catch-all")
        return f"*@{canonical_domain(domain)}"
    return parse(text).canonical


def one_form(address: str) -> str:
    """The canonical form of an address as it stands in somebody's table; what is none is only put in lower case."""
    try:
        return parse_canonical(address)
    except AddressError:
        return address.lower()
