"""Owns which next hop takes a recipient's mail: the seam where MX comes in. Today a smarthost takes all, or there is none."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Login(NamedTuple):
    """Who we are to a hop. `secret` gives the password or the token, asked anew for each connection; it blocks, and raises
    OSError.
    """

    user: str
    secret: Callable[[], str]
    token: bool = False  # a bearer token for XOAUTH2


class Route(NamedTuple):
    """Where to send and how. Equal routes share connections."""

    host: str
    port: int
    tls: str = "none"  # none, opportunistic, required, implicit
    context: ssl.SSLContext | None = None
    login: Login | None = None

    @property
    def name(self) -> str:
        """As it stands in the log and in notices."""
        return f"{self.host}:{self.port}"


class Router(Protocol):
    """Knows next hops."""

    async def route(self, domain: str) -> Route | None:
        """The next hop for mail to this domain; None if there is none, which waiting may change."""


class Smarthost:
    """All mail goes to one hop; without one, all of it waits."""

    def __init__(self, route: Route | None) -> None:
        self._route = route

    async def route(self, domain: str) -> Route | None:
        return self._route
