"""Owns how an installation becomes a cluster, and how a machine joins one.

`cluster init` adds an authority and this machine's certificate to what is there: no file of mail, index or node is moved.
`join` makes the machine's own key, which never leaves it, and writes down what the authority answers. Both may be run again
after anything at all: what was made is kept, and the settings, which say that it is done, are written last. All files are mode
0600.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from powermail.app.authority import is_shared
from powermail.app.core import SRS_KEYS
from powermail.app.setup import cluster_of_nodes
from powermail.authority import asking
from powermail.base.certificates import (
    Authority,
    as_pem,
    facts_of,
    make_authority,
    make_key,
    make_request,
    pin_of,
)
from powermail.base.clock import utc
from powermail.base.errors import OperatorError
from powermail.base.net import parse_host_port
from powermail.base.settings import SETTINGS_NAME, Settings, inside, is_site, load
from powermail.base.settings_text import Value, with_values, written
from powermail.base.tls import make_self_signed
from powermail.base.world import World
from powermail.storage.identity import make_store, read_identity
from powermail.wire.enrolment import Issued, Token, parse_token
from powermail.wire.node_identity import Name, NotOurs, parse_names, peer_of, uri_of
from powermail.wire.node_verbs import Role

_KEY, _CERTIFICATE, _AUTHORITY = "tls/peer.key", "tls/peer.pem", "tls/authority.pem"  # as the settings have them
_REQUEST = "tls/peer.request"  # kept until it was answered: the same again gets the same answer
_OURS = ("tls", "nodes", SRS_KEYS, "lost+found")  # what an empty directory may have, or an earlier run has left
_SETTING = re.compile(r"[a-z]+(\.[a-z0-9_]+)+")
_FIRST_ROLES = (Role.FRONT, Role.KEEPER, Role.OPERATOR, Role.AUTHORITY)


# -- the first machine --------------------------------------------------------------------------------------------------


class Founded(NamedTuple):
    """What `cluster init` made."""

    cluster: str
    identity: str
    pin: str
    key: str  # the file of the authority's key


def make_cluster(world: World, settings: Settings, data: str, identity: str, listen: str) -> Founded:
    """Makes an authority, and a certificate of this machine that names all its roles and nodes. Raises OperatorError.

    A server may run meanwhile; it takes what is new when it starts again.
    """
    host, port = parse_host_port(listen)
    peers, disk = settings.peers, world.disk
    paths = [inside(data, name) for name in (peers.authority_key, peers.authority, peers.key, peers.certificate)]
    key_at, authority_at, own_key_at, certificate_at = paths
    if peers.authority_listen or (disk.exists(authority_at) and not disk.exists(key_at)):
        raise OperatorError(f"{data} is of a cluster already; nothing was changed")
    cluster = cluster_of_nodes(world, settings, data)
    names = [Name(cluster, role, identity) for role in _FIRST_ROLES]
    names += [Name(cluster, Role.NODE, node.id) for node in settings.cluster.nodes if node.path]
    uris = [uri_of(name) for name in names]
    if len(parse_names([("URI", uri) for uri in uris])) != len(names):
        raise OperatorError(f"{identity!r} is not a name of letters, digits, - and _")
    for path in paths:
        disk.make_directory(os.path.dirname(path))
    authority, pem = _found_authority(world, cluster, key_at, authority_at)
    if not disk.exists(own_key_at):
        disk.replace_file(own_key_at, make_key())
    issued = authority.issue(make_request(disk.read_file(own_key_at)), identity, uris, world.clock.now())
    disk.replace_file(certificate_at, as_pem(issued))
    here = "127.0.0.1" if host in ("", "0.0.0.0") else "::1" if host == "::" else host  # noqa: S104  compared, not bound
    reached = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
    _change_settings(world, data, {"peers.authority_listen": [listen], "peers.authority_at": [reached]})
    return Founded(cluster, identity, pin_of(pem), key_at)


def _found_authority(world: World, cluster: str, key_at: str, certificate_at: str) -> tuple[Authority, bytes]:
    """The authority that an earlier run has made, or a new one."""
    disk = world.disk
    if disk.exists(key_at) and disk.exists(certificate_at):
        try:
            pem = disk.read_file(certificate_at)
            return Authority(pem, disk.read_file(key_at)), pem
        except ValueError:
            pass  # broken off between the two: nobody has seen it
    pem, key = make_authority(cluster, world.clock.now())
    disk.replace_file(key_at, key)
    disk.replace_file(certificate_at, pem)
    return Authority(pem, key), pem


def _change_settings(world: World, data: str, values: Mapping[str, Value]) -> None:
    path = f"{data}/{SETTINGS_NAME}"
    before = world.disk.read_file(path).decode()
    changed = with_values(before, values, path)
    load(changed, {}, (), path)
    world.disk.replace_file(path, changed.encode(), world.disk.mode(path) & 0o777)


# -- every other machine ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a machine that joins has its things; a relative path is below the data directory."""

    data: str
    node: str = ""  # directory of the node, if it is one; "": `nodes/ID`
    address: str = ""  # where others reach the node; "": as its token says
    listen: str = ""  # where it listens; "": at that address
    hostname: str = ""  # of a front end, in banners and trace fields
    site: str = ""  # where the machine stands


class Member(NamedTuple):
    """What a machine is now."""

    identity: str
    roles: tuple[str, ...]
    cluster: str
    days: float  # until its certificate ends
    node: str  # directory of its node, "" if it is none
    renewed: bool  # it was a member before: only its certificate is new


async def join_cluster(world: World, text: str, authority: str, place: Place) -> Member:
    """Joins with a token. Raises OperatorError, Trouble; run again, it goes on."""
    try:
        token = parse_token(text)
    except ValueError as error:
        raise OperatorError(str(error)) from error
    parse_host_port(authority)
    for address in (place.address, place.listen):
        if address:
            parse_host_port(address)
    if not is_site(place.site):
        raise OperatorError(f"--site {place.site!r}: the name of a site is a word")
    disk, data = world.disk, place.data
    again = disk.exists(f"{data}/{SETTINGS_NAME}")
    if again and not disk.exists(f"{data}/{_CERTIFICATE}"):
        raise OperatorError(f"{data} is an installation of its own and cannot join another; nothing was changed")
    if not again and disk.exists(data) and (present := [name for name in disk.list(data) if name not in _OURS]):
        raise OperatorError(f"{data} is not empty ({', '.join(present[:3])}); nothing was changed")
    disk.make_directory(f"{data}/tls")
    key, request = _kept_request(world, data, token)
    joined = await asking.join(world, authority, token, key, request, place.address, place.site)
    issued = joined.issued
    if again:
        _check_same(world, data, issued)
    node = ""
    if Role.NODE.value in issued.roles:
        node = inside(data, place.node or f"nodes/{issued.identity}").rstrip("/")
        _make_node(world, node, issued)
    disk.replace_file(f"{data}/{_AUTHORITY}", as_pem(joined.authority))
    certificate = as_pem(issued.certificate)
    disk.replace_file(f"{data}/{_CERTIFICATE}", certificate)
    if not again:
        _make_front(world, issued, place)
        text = settings_of(issued, authority, place)
        load(text, {}, (), "what the authority says")
        disk.replace_file(f"{data}/{SETTINGS_NAME}", text.encode())
    disk.unlink(f"{data}/{_REQUEST}")
    disk.sync_directory(f"{data}/tls")
    days = (facts_of(certificate).ends_at - world.clock.now()) / 86_400.0
    return Member(issued.identity, issued.roles, issued.cluster, days, node, again)


def _kept_request(world: World, data: str, token: Token) -> tuple[bytes, bytes]:
    """(key, request): made once for each token, and durable before anybody is asked; a key that there is stays."""
    disk, key_at, request_at = world.disk, f"{data}/{_KEY}", f"{data}/{_REQUEST}"
    if not disk.exists(key_at):
        disk.replace_file(key_at, make_key())
    key = disk.read_file(key_at)
    head = f"{token.id}\n".encode()
    if disk.exists(request_at) and (kept := disk.read_file(request_at)).startswith(head):
        return key, kept[len(head) :]
    try:
        request = make_request(key)
    except ValueError as error:
        raise OperatorError(f"{key_at} is no key of use: {error}") from error
    disk.replace_file(request_at, head + request)
    return key, request


def _check_same(world: World, data: str, issued: Issued) -> None:
    """A machine that has joined before is given the next certificate of the same name only. Raises OperatorError."""
    own = facts_of(world.disk.read_file(f"{data}/{_CERTIFICATE}"))
    names = parse_names([("URI", uri) for uri in own.uris])
    cluster = names[0].cluster if names else ""
    try:
        before = peer_of(names, cluster).id
    except NotOurs:
        before = ""
    if (before, cluster) != (issued.identity, issued.cluster):
        raise OperatorError(
            f"{data} is {before or 'nobody'}, and the token was for {issued.identity} of cluster {issued.cluster}, and is used "
            "up by this: join with a new token, in a new directory. Nothing was changed here"
        )


def _make_front(world: World, issued: Issued, place: Place) -> None:
    """What a front end has beside its settings: what all have in common, and a certificate to begin with, as `init` makes."""
    if Role.FRONT.value in issued.roles and not world.disk.exists(f"{place.data}/tls/key.pem"):
        certificate, key = make_self_signed(place.hostname or "localhost", utc(world.clock.now()))
        world.disk.replace_file(f"{place.data}/tls/certificate.pem", certificate, 0o644)
        world.disk.replace_file(f"{place.data}/tls/key.pem", key)
    for name in (SRS_KEYS,):  # and no other, whatever is sent
        if name in issued.files:
            world.disk.replace_file(f"{place.data}/{name}", issued.files[name])


def _make_node(world: World, path: str, issued: Issued) -> None:
    """The node's directory; one that an earlier run has made is taken. Raises OperatorError."""
    if world.disk.exists(f"{path}/identity"):
        read_identity(world.disk, path, issued.cluster, issued.identity)
        return
    world.disk.make_directory(os.path.dirname(path))
    make_store(world.disk, path, issued.cluster, issued.identity, world.entropy)


def settings_of(issued: Issued, authority: str, place: Place) -> str:
    """The settings of a machine that has joined. Raises OperatorError for what another machine has no say in."""
    lines = ["# PowerMail settings, made by `powermail join`. Every key with its default and meaning: docs/settings.md"]
    if place.hostname:
        lines.append(f"hostname = {written(place.hostname)}")
    if place.site:
        lines.append(f"site = {written(place.site)}")
    sections: dict[str, list[str]] = {}
    for name, value in issued.settings.items():
        if not is_shared(name) or not _SETTING.fullmatch(name) or not value.isprintable():
            raise OperatorError(
                f"the authority says {name[:80]!r}, which is no setting that machines of a cluster have in common"
            )
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    peers = sections.setdefault("peers", [])
    peers.append(f"authority_at = {written([authority])}")
    is_node = Role.NODE.value in issued.roles
    if is_node:
        peers.append(f"listen = {written([place.listen or issued.address])}")
        sections.setdefault("cluster", []).insert(0, "copies_required = 1")
    for section, values in sections.items():
        lines += ["", f"[{section}]", *values]
    if is_node:
        path = place.node or f"nodes/{issued.identity}"
        lines += ["", "[[cluster.nodes]]", f"id = {written(issued.identity)}", f"path = {written(path.rstrip('/'))}"]
        lines += [f"group = {written(issued.group)}", f"priority = {issued.priority}"]
    return "\n".join(lines) + "\n"
