"""Owns the names in certificates of a cluster: `powermail://CLUSTER/ROLE/ID`, each a URI in the subject's alternative names.

A certificate may name several roles of one id, and a process that serves several nodes names each; names of other kinds, and
roles that this version does not know, say nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from powermail.wire.node_verbs import Role

_NAME: Final = re.compile(r"powermail://([A-Za-z0-9._-]{1,64})/([a-z]{1,16})/([A-Za-z0-9._-]{1,64})")
_ROLES: Final = {role.value: role for role in Role}


class Name(NamedTuple):
    """One name."""

    cluster: str
    role: Role
    id: str


class Peer(NamedTuple):
    """Who asks: one id, with all its roles."""

    id: str
    roles: frozenset[Role]


class NotOurs(Exception):
    """A certificate that admits nobody; `why` is a word for counting, the text says it to people."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


def parse_names(alternatives: Iterable[tuple[str, str]]) -> list[Name]:
    """The names among a certificate's alternative names, given as (kind, value)."""
    names = []
    for kind, value in alternatives:
        match = _NAME.fullmatch(value) if kind == "URI" else None
        if match and match[2] in _ROLES:
            names.append(Name(match[1], _ROLES[match[2]], match[3]))
    return names


def uri_of(name: Name) -> str:
    """A name as it stands in a certificate."""
    return f"powermail://{name.cluster}/{name.role.value}/{name.id}"


def peer_of(names: Iterable[Name], cluster: str) -> Peer:
    """Who a client is in this cluster: a process that serves nodes is none of them when it asks as something else.

    Raises NotOurs.
    """
    known = list(names)
    if not known:
        raise NotOurs("no_name", "the certificate has no name of a PowerMail cluster")
    ours = [name for name in known if name.cluster == cluster]
    if not ours:
        raise NotOurs("cluster", f"the certificate is of cluster {known[0].cluster}, and this is {cluster}")
    asking = [name for name in ours if name.role is not Role.NODE] or ours
    ids = {name.id for name in asking}
    if len(ids) > 1:
        raise NotOurs("name", f"the certificate has {len(ids)} ids of this cluster")
    return Peer(asking[0].id, frozenset(name.role for name in ours))


def is_node(names: Iterable[Name], cluster: str, node: str) -> bool:
    """True if the certificate is that of this node."""
    return Name(cluster, Role.NODE, node) in names
