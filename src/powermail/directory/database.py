"""Owns the address of a database: which engine, which hosts, as whom; a password is no part of it.

    postgresql://USER@HOST[:PORT][,HOST[:PORT]...]/NAME        mysql:// likewise

A host that begins with a slash (written %2F) is a unix socket: its directory for PostgreSQL, the socket itself for MySQL.
Several hosts are copies of one database, of which one takes changes.
"""

from __future__ import annotations

import re
import ssl
from typing import NamedTuple
from urllib.parse import unquote

from powermail.base.errors import OperatorError

_URL = re.compile(r"(?P<kind>[a-z]+)://(?:(?P<user>[^:@/]*)(?::(?P<password>[^@/]*))?@)?(?P<hosts>[^/@]+)/(?P<name>[^/?#]+)")
_PORTS = {"postgresql": 5432, "mysql": 3306}


class Host(NamedTuple):
    """One server: a name or address and its port, or the path of a unix socket."""

    name: str
    port: int

    def __str__(self) -> str:
        return self.name if self.name.startswith("/") else f"{self.name}:{self.port}"


class Address(NamedTuple):
    """Where a database is. `tls` is None for connections in the clear."""

    hosts: tuple[Host, ...]
    user: str
    password: str
    name: str
    tls: ssl.SSLContext | None = None


def _host(text: str, kind: str) -> Host:
    name, separator, port = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        name, separator, port = text, "", ""
    elif not separator:
        name, port = text, ""
    if separator and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise OperatorError(f"directory.database: {text!r} is not host or host:port")
    return Host(unquote(name).removeprefix("[").removesuffix("]"), int(port) if port else _PORTS[kind])


def parse(kind: str, url: str, tls: ssl.SSLContext | None = None, password: str = "") -> Address:
    """The address that a setting says. Raises OperatorError."""
    found = _URL.fullmatch(url)
    if found is not None and found["password"] is not None:
        raise OperatorError("directory.database: a password belongs in a file of its own: directory.database_password_file")
    if found is None or found["kind"] != kind:
        raise OperatorError(f"directory.database is not {kind}://USER@HOST[:PORT][,HOST[:PORT]...]/NAME")
    hosts = tuple(_host(text, kind) for text in found["hosts"].split(","))
    if any(not host.name for host in hosts) or not found["user"]:
        raise OperatorError("directory.database names no user, or an empty host")
    return Address(hosts, unquote(found["user"]), password, unquote(found["name"]), tls)
