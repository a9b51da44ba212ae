"""Owns the PROXY protocol, version 1 and 2 (HAProxy's specification): who really connects, told by a listed balancer."""

from __future__ import annotations

import ipaddress
import struct

from powermail.base import limits

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def plain_address(client: str) -> str:
    """An address in its one form: IPv4 that was mapped into IPv6 (RFC 4291 §2.5.5.2) is IPv4, and no zone stays.

    Names of no address stay as they are.
    """
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    mapped = address.ipv4_mapped if address.version == 6 else None
    return str(mapped or address)


def literal(client: str) -> str:
    """An address as it stands in a Received field (RFC 5321 §4.1.3): [192.0.2.1], [IPv6:2001:db8::1]."""
    return f"[IPv6:{client}]" if ":" in client else f"[{client}]"


class ProxyError(Exception):
    """The header is broken: the connection must close."""


def parse_proxy(octets: bytes) -> tuple[tuple[str, int] | None, int] | None:
    """Reads a header from the start of a connection.

    Returns None if more octets are needed, else ((client address, port) or None for a health check, octets used).
    Raises ProxyError.
    """
    if _SIGNATURE.startswith(octets[:12]):
        return _version_2(octets)
    if b"PROXY ".startswith(octets[:6]):
        return _version_1(octets)
    raise ProxyError("no PROXY header")


def _version_1(octets: bytes) -> tuple[tuple[str, int] | None, int] | None:
    end = octets.find(b"\r\n", 0, 107)
    if end < 0:
        if len(octets) >= 107:
            raise ProxyError("PROXY line too long")
        return None
    words = octets[:end].split(b" ")
    if words[1:2] == [b"UNKNOWN"]:
        return None, end + 2
    if len(words) != 6 or words[1] not in (b"TCP4", b"TCP6"):
        raise ProxyError("bad PROXY line")
    try:
        address = ipaddress.ip_address(words[2].decode("ascii"))
        port = int(words[4])
    except ValueError as error:
        raise ProxyError("bad address in PROXY line") from error
    if not 0 <= port <= 65535:
        raise ProxyError("bad port in PROXY line")
    return (plain_address(str(address)), port), end + 2


def _version_2(octets: bytes) -> tuple[tuple[str, int] | None, int] | None:
    if len(octets) < 16:
        return None
    kind, family, length = struct.unpack_from(">BBH", octets, 12)
    if kind >> 4 != 2 or kind & 15 > 1:
        raise ProxyError("bad PROXY version or command")
    if 16 + length > limits.PROXY_HEADER_OCTETS_MAX:
        raise ProxyError("PROXY header too long")
    if len(octets) < 16 + length:
        return None
    body = octets[16 : 16 + length]
    if kind & 15 == 0:
        return None, 16 + length
    if family == 0x11 and length >= 12:
        return (str(ipaddress.IPv4Address(body[:4])), struct.unpack_from(">H", body, 8)[0]), 16 + length
    if family == 0x21 and length >= 36:
        return (plain_address(str(ipaddress.IPv6Address(body[:16]))), struct.unpack_from(">H", body, 32)[0]), 16 + length
    return None, 16 + length


def is_listed(networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network], client: str) -> bool:
    """True if the address lies in one of the networks."""
    if not networks:
        return False
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    return any(address in network for network in networks if network.version == address.version)
