"""Owns the address of the directory's database: which engine, which hosts, as whom; a password is no part of it.

    postgresql://USER@HOST[:PORT][,HOST[:PORT]...]/NAME        mysql:// likewise

A host that begins with a slash (written %2F) is a unix socket: its directory for PostgreSQL, the socket itself for MySQL.
Several hosts are copies of one database, of which one takes changes.
"""

from __future__ import annotations

import ssl
from typing import NamedTuple

from powermail.base.database_url import Host, parse_database_url
from powermail.base.errors import OperatorError

PORTS = {"postgresql": 5432, "mysql": 3306}
_SETTING = "directory.database"


class Address(NamedTuple):
    """Where a database is. `tls` is None for connections in the clear."""

    hosts: tuple[Host, ...]
    user: str
    password: str
    name: str
    tls: ssl.SSLContext | None = None


def parse(kind: str, url: str, tls: ssl.SSLContext | None = None, password: str = "") -> Address:
    """The address that a setting says. Raises OperatorError."""
    form = f"{_SETTING} is not {kind}://USER@HOST[:PORT][,HOST[:PORT]...]/NAME"
    if not url.startswith(f"{kind}://"):
        raise OperatorError(form)
    found = parse_database_url(url, {kind: PORTS[kind]}, _SETTING)
    if found.password is not None:
        raise OperatorError(f"{_SETTING}: a password belongs in a file of its own: directory.database_password_file")
    if found.query or not found.name:
        raise OperatorError(form)
    if any(not host.name for host in found.hosts) or not found.user:
        raise OperatorError(f"{_SETTING} names no user, or an empty host")
    return Address(found.hosts, found.user, password, found.name, tls)
