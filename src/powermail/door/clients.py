"""Owns how many connections each client address has, and lists of networks that a setting names."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from powermail.wire.proxy import is_listed


def place(client: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 one, which a single host has all of."""
    if ":" not in client:
        return client
    try:
        return str(ipaddress.ip_network((client, 64), strict=False))
    except ValueError:
        return client


class Clients:
    """Connections by client, at most so many each."""

    def __init__(self, per_address_max: int) -> None:
        self._max = per_address_max
        self._count: dict[str, int] = {}

    def come(self, client: str) -> bool:
        """Counts one more; False over the cap."""
        client = place(client)
        count = self._count.get(client, 0)
        if count >= self._max:
            return False
        self._count[client] = count + 1
        return True

    def go(self, client: str) -> None:
        """Counts one less."""
        client = place(client)
        left = self._count[client] - 1
        if left:
            self._count[client] = left
        else:
            del self._count[client]


class Networks:
    """The networks of a setting."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises ValueError for what is no network."""
        self._networks = [ipaddress.ip_network(text, strict=False) for text in texts]

    def __contains__(self, client: str) -> bool:
        return is_listed(self._networks, client)
