"""Owns the address of a database, as an operator writes it (RFC 3986, section 3, with a list of hosts).

    KIND://[USER[:PASSWORD]@][HOST[:PORT][,HOST[:PORT]...]][/NAME][?PARAMETER=VALUE[&...]]

It is read here before any driver sees it: a driver's own reading of a mistake is a traceback, or a connection to another host.
In a user, password or name the characters of the grammar are written as %40 (@), %2F (/), %3A (:), %3F (?), %23 (#), %25 (%).

Danger: it may hold a password, and a part that is written wrong may be a piece of one. No sentence of this room repeats
anything of it; `shown_url` shows what is known to be none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode

from powermail.base.errors import OperatorError
from powermail.base.net import is_host

_WORD = r"[^@/?#\s\x00-\x1f\x7f]*"
_URL = re.compile(
    r"(?P<kind>[a-z]+)://"
    rf"(?:(?P<user>{_WORD.replace('@', '@:')})(?::(?P<password>{_WORD}))?@)?"
    rf"(?P<hosts>{_WORD})(?:/(?P<name>{_WORD}))?(?:\?(?P<query>[^@#\s\x00-\x1f\x7f]*))?"
)
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")
_ESCAPES = "in a user or password write @ as %40, / as %2F, : as %3A, ? as %3F, # as %23 and % as %25"


class Host(NamedTuple):
    """One server: a name or address and its port, or the path of a unix socket."""

    name: str
    port: int

    def __str__(self) -> str:
        return self.name if self.name.startswith("/") else f"{self.name}:{self.port}"


class DatabaseUrl(NamedTuple):
    """The parts of an address. `texts` are the hosts as they are written, `password` is None if there is none in it."""

    user: str
    password: str | None
    hosts: tuple[Host, ...]
    texts: tuple[str, ...]
    name: str
    query: tuple[tuple[str, str], ...]


def parse_database_url(url: str, kinds: Mapping[str, int], setting: str) -> DatabaseUrl:
    """The parts of an address. `kinds`: what it may begin with, each with its usual port; `setting`: its name.

    Raises OperatorError: what is wrong, and nothing of what was written.
    """
    found = _URL.fullmatch(url)
    if found is None or found["kind"] not in kinds:
        form = f"{next(iter(kinds))}://USER@HOST[:PORT][,HOST[:PORT]...]/NAME"
        raise OperatorError(f"{setting} is not an address like {form}; {_ESCAPES}")
    texts = tuple(found["hosts"].split(","))
    hosts = tuple(_host(text, number, kinds[found["kind"]], setting) for number, text in enumerate(texts, 1))
    query = tuple(parse_qsl(found["query"] or "", keep_blank_values=True))
    for name, value in query:
        if name == "port" and not all(part.isdecimal() and part.isascii() and _is_port(part) for part in value.split(",")):
            raise OperatorError(f"{setting}: the parameter port is no number from 1 to 65535")
    password = None if found["password"] is None else _decoded(found["password"], setting)
    user, name = _decoded(found["user"] or "", setting), _decoded(found["name"] or "", setting)
    return DatabaseUrl(user, password, hosts, texts, name, query)


def _host(text: str, number: int, port: int, setting: str) -> Host:
    found = _HOST.fullmatch(text)
    if found is None or (found["port"] is not None and not _is_port(found["port"])):
        raise OperatorError(f"{setting}: the port of host {number} is no number from 1 to 65535; {_ESCAPES}")
    name = _decoded(found["name"], setting).removeprefix("[").removesuffix("]")
    if name and not name.startswith("/") and not is_host(name):
        raise OperatorError(f"{setting}: host {number} is neither a name nor an IP address; {_ESCAPES}")
    return Host(name, int(found["port"]) if found["port"] else port)


def _is_port(text: str) -> bool:
    return len(text) <= 5 and 0 < int(text) < 65536


def _decoded(text: str, setting: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise OperatorError(f"{setting}: what it has as %XX is not UTF-8") from error
    if "\0" in decoded:
        raise OperatorError(f"{setting} has %00 in it, which no part of an address may have")
    return decoded


def with_parameters(url: str, parameters: Mapping[str, str]) -> str:
    """The same address with these parameters behind it instead of its own."""
    return url.partition("?")[0] + (f"?{urlencode(parameters)}" if parameters else "")


def shown_url(url: str) -> str:
    """The address as people may see it: kind, user, hosts and name, if it is one; else only its kind."""
    found = _URL.fullmatch(url)
    # Where an @ stands outside of its place, or a port is no number, what looks like a host may be a piece of a password.
    whole = found is not None and all(
        (host := _HOST.fullmatch(text)) is not None and (host["port"] is None or _is_port(host["port"]))
        for text in found["hosts"].split(",")
    )
    if found is None or not whole:
        kind = re.match(r"[a-z]+(?=://)", url)
        return f"{kind[0]}://***" if kind is not None else "***"
    user = f"{found['user']}@" if found["user"] is not None else ""
    name = f"/{found['name']}" if found["name"] is not None else ""
    return f"{found['kind']}://{user}{found['hosts']}{name}"
