"""Owns whose the files of an installation are: a command as root works as the owner of the data directory, and a file that is
somebody else's is named with its cure.

Danger: a file that root made in the directory of another user stops the server at its next start.
"""

from __future__ import annotations

import importlib
import os
import pwd
import stat
from collections.abc import Iterator, Sequence

from powermail.admin.control import user_name
from powermail.base.errors import OperatorError
from powermail.base.sqlite_files import SUFFIXES


def become_owner(data: str) -> None:
    """As root: from now on with the rights of the owner of the data directory, for good. Who is not root stays who he is."""
    if os.geteuid() != 0:
        return
    try:
        facts = os.stat(data)
    except OSError:
        return
    if facts.st_uid != 0:
        importlib.import_module("powermail.app.compose")  # the program's own files may be root's alone
        try:
            owner = pwd.getpwuid(facts.st_uid)
            os.environ["HOME"] = owner.pw_dir  # where drivers of databases look for what is his
            os.initgroups(owner.pw_name, facts.st_gid)
        except KeyError:
            os.setgroups([])
        os.setgid(facts.st_gid)
        os.setuid(facts.st_uid)


def check(data: str, more: Sequence[str]) -> None:
    """Raises OperatorError that names a file we cannot use, whose it is, and the cure."""
    for path in _files(data, more):
        try:
            facts = os.stat(path)
        except FileNotFoundError:
            continue
        except PermissionError:
            path = os.path.dirname(path)
            facts = os.stat(path)
        want = os.R_OK | os.W_OK | (os.X_OK if stat.S_ISDIR(facts.st_mode) else 0)
        if os.access(path, want, effective_ids=True):
            continue
        me = user_name(os.geteuid())
        if facts.st_uid == os.geteuid():
            mode = "u+rwx" if stat.S_ISDIR(facts.st_mode) else "u+rw"
            raise OperatorError(f"{path} may not be read and written by its owner {me}: run `chmod {mode} {path}`")
        if _read_only(path):
            continue  # a disk that takes no writes is said by who writes there
        raise OperatorError(
            f"{path} belongs to {user_name(facts.st_uid)} and cannot be used by {me}: run "
            f"`chown -R {me.removeprefix('uid ')} {path}` as root, or this command as {user_name(facts.st_uid)}"
        )


def _read_only(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _files(data: str, more: Sequence[str]) -> Iterator[str]:
    """The data directory and what lies in it, but for nodes: trouble of one of them is its own."""
    yield data
    for name in (
        "powermail.toml",
        "lock",
        "srs.keys",
        "places.json",
        "purges.json",
        "purges.json.lock",
        "scrub.state",
        "tls",
        "tls/certificate.pem",
        "tls/key.pem",
        "tls/peer.pem",
        "tls/peer.key",
        "tls/authority.pem",
        "authority",
        "authority/key.pem",
    ):
        yield f"{data}/{name}"
    for path in more:
        for suffix in SUFFIXES:
            yield f"{path}{suffix}"


def give(path: str, uid: int, gid: int) -> None:
    """Makes a tree that root has just made the owner's."""
    for directory, _, names in os.walk(path):
        for name in (directory, *(os.path.join(directory, name) for name in names)):
            os.chown(name, uid, gid, follow_symlinks=False)
