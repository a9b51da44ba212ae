"""Owns `powermail backup` and `restore`: directory, index, settings, keys and certificates as one set, checked when written and
before anything is replaced.

The databases are copied while they are used, the index first: what the directory knows more than it is an account without mail.
What is in a database of its own is backed up there: what that must do is said, and stands in the backup.
Messages are not in it: they lie on the nodes, R times. After a restore, the nodes tell the index what it missed (laws 10, 11).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from powermail import __version__
from powermail.admin.control import user_name
from powermail.admin.system import CopyTo, copy_databases_row
from powermail.base.database_url import shown_url
from powermail.base.disk import Disk
from powermail.base.errors import OperatorError
from powermail.base.log import NullLog
from powermail.base.settings import RESTORING, SETTINGS_NAME, Settings, inside, load_file
from powermail.base.sqlite_files import present
from powermail.base.world import system_world
from powermail.cli import ownership
from powermail.cli.reach import reach, settings_of
from powermail.cli.words import Common
from powermail.storage.layout import LAYOUT_NAME

MANIFEST = "backup.json"
_COMING = ".restoring"  # a file that was copied whole, before it has its name
_PIECE = 1 << 20


class Part(Struct):
    """One file of a backup."""

    octets: int
    sha256: str
    mode: int


class Manifest(Struct):
    """What a backup holds. `cluster` is that of the nodes it belongs to; `made_at` is UTC, in seconds."""

    program: str
    cluster: str
    made_at: float
    files: dict[str, Part]
    elsewhere: list[str] = []  # what is in a database, and so not in here


class BackedUp(Struct):
    """A backup that was made and read again; `elsewhere` says what must be backed up by other means, and how."""

    path: str
    files: int
    octets: int
    elsewhere: list[str]


class Restored(Struct):
    """What was put back, or would be; `set_aside` holds what was there before, `elsewhere` says what is not in the backup."""

    path: str
    files: list[str]
    set_aside: str
    restored: bool
    elsewhere: list[str]


def _measure(path: str) -> Part:
    digest, total = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            total += len(piece)
    return Part(total, digest.hexdigest(), os.stat(path).st_mode & 0o777)


def _copy(source: str, target: str) -> None:
    """Copies a file with its mode, durably."""
    os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
    shutil.copyfile(source, target)
    shutil.copymode(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain_files(data: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """(name in the backup, path) of what is no database. What lies outside of the data directory is not ours to copy."""
    names = [SETTINGS_NAME, "srs.keys", settings.tls.certificate, settings.tls.key, settings.outbound.smarthost_password_file]
    names.append(settings.directory.database_password_file)
    names.append(LAYOUT_NAME)  # a rebuild finds the nodes of other machines by it
    peers = settings.peers
    names += [peers.certificate, peers.key, peers.authority, peers.authority_key]
    for name in dict.fromkeys(names):
        if name and not name.startswith("/") and os.path.exists(f"{data}/{name}"):
            yield f"files/{name}", f"{data}/{name}"


def _databases(data: str, settings: Settings) -> dict[str, str]:
    """Those that are files of ours: a directory in a database of its own, or of somebody else, has backups of its own."""
    index = {} if settings.index.database else {"index.db": inside(data, settings.index.path)}
    directory = {"directory.db": inside(data, settings.directory.path)} if settings.directory.in_file else {}
    return {**index, **directory}


def _elsewhere(settings: Settings) -> list[str]:
    """What is in a database, and what a backup of that must do."""
    said = []
    if settings.index.database:
        said.append(
            f"the index is in {shown_url(settings.index.database)}: back it up there, as of one moment (`pg_dump`, or a"
            " base backup with WAL), at most cluster.tombstone_days old when it is put back; then the nodes tell what it missed"
        )
    if not settings.directory.in_file:
        directory = settings.directory
        place = shown_url(directory.database) if directory.database else directory.path
        said.append(f"the directory is in {place}: back it up there, after the index or with it")
    return said


async def backup(common: Common, to: str) -> BackedUp:
    """Makes a backup in an empty or new directory. Raises OperatorError: then nothing of it stays."""
    if os.path.exists(to) and os.listdir(to):
        raise OperatorError(f"{to} is not empty; nothing was written")
    try:
        made = not os.path.isdir(to)
        os.makedirs(to, mode=0o700, exist_ok=True)
        owner = os.stat(common.data)
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.chown(to, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise OperatorError(f"cannot write a backup to {to}: {error.strerror}") from error
    ownership.become_owner(common.data)
    try:
        return await _fill(common, settings_of(common), to)
    except BaseException as error:
        for name in os.listdir(to):
            path = f"{to}/{name}"
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.unlink(path)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(to)
        if isinstance(error, OSError):
            raise OperatorError(f"cannot write a backup to {to}: {error.strerror or error}") from error
        raise


async def _fill(common: Common, settings: Settings, to: str) -> BackedUp:
    async with reach(common) as installation:
        await installation.call(copy_databases_row, CopyTo(to))
    for name, path in _plain_files(common.data, settings):
        _copy(path, f"{to}/{name}")
    files = {}
    for directory, _, names in os.walk(to):
        for name in names:
            path = os.path.join(directory, name)
            if path.endswith(".db"):
                os.chmod(path, 0o600)
            files[os.path.relpath(path, to)] = _measure(path)
    from powermail.app.setup import cluster_of_nodes

    cluster = cluster_of_nodes(system_world(NullLog()), settings, common.data)
    elsewhere = _elsewhere(settings)
    manifest = Manifest(__version__, cluster, time.time(), dict(sorted(files.items())), elsewhere)
    system_world(NullLog()).disk.replace_file(f"{to}/{MANIFEST}", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _verified(to)
    return BackedUp(to, len(files), sum(part.octets for part in files.values()), elsewhere)


def _verified(path: str) -> Manifest:
    """The manifest of a backup whose files are what it says. Raises OperatorError."""
    try:
        with open(f"{path}/{MANIFEST}", "rb") as file:
            manifest = msgspec.json.decode(file.read(), type=Manifest)
        for name, part in manifest.files.items():
            if name.startswith("/") or ".." in name.split("/"):
                raise OperatorError(f"{path}/{MANIFEST} names {name}, which is no file of a backup; nothing was changed")
            found = _measure(f"{path}/{name}")
            if (found.octets, found.sha256) != (part.octets, part.sha256):
                raise OperatorError(
                    f"{path}/{name} is not what was backed up: {found.octets} octets of {part.octets}, or damaged"
                )
    except PermissionError as error:
        raise OperatorError(
            f"{error.filename} may not be read by {user_name(os.geteuid())}: run this as its owner, or as root"
        ) from error
    except OSError as error:
        raise OperatorError(f"{path} is no complete backup: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise OperatorError(f"{path}/{MANIFEST} cannot be read: {error}") from error
    return manifest


async def restore(common: Common, source: str, yes: bool) -> Restored:
    """Puts a backup back. Without `yes` nothing that is there is replaced. Raises OperatorError: nothing was changed."""
    manifest = _verified(source)
    data, world = common.data, system_world(NullLog())
    os.makedirs(data, mode=0o700, exist_ok=True)
    settings = load_file(f"{source}/files/{SETTINGS_NAME}", common.overrides)
    try:
        lock = world.disk.lock(f"{data}/lock")
    except BlockingIOError as error:
        raise OperatorError(f"a server runs on {data}: stop it first; nothing was changed") from error
    try:
        _same_cluster(settings, data, manifest.cluster)
        _refuse_moved(settings, data)
        places = {name: f"{data}/{name.removeprefix('files/')}" for name in manifest.files if name.startswith("files/")}
        places |= {name: path for name, path in _databases(data, settings).items() if name in manifest.files}
        there = [one for path in places.values() for one in present(world.disk, path)]
        aside = _aside(data) if there else ""
        if there and not yes:
            return Restored(data, sorted(places.values()), aside, False, manifest.elsewhere)
        for name, path in places.items():
            _copy(f"{source}/{name}", f"{path}{_COMING}")
        world.disk.replace_file(f"{data}/{RESTORING}", f"powermail restore {shlex.quote(source)} --yes".encode())
        for path in places.values():
            _replace(world.disk, path, data, aside)
        world.disk.unlink(f"{data}/{RESTORING}")
        world.disk.sync_directory(data)
        owner = os.stat(data)
        if os.geteuid() == 0 and owner.st_uid != 0:
            ownership.give(data, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise OperatorError(f"cannot restore to {data}: {error.filename}: {error.strerror}") from error
    finally:
        lock.release()
    return Restored(data, sorted(places.values()), aside, True, manifest.elsewhere)


def _replace(disk: Disk, path: str, data: str, aside: str) -> None:
    """Sets aside what lies under a name, also beside a file that is gone, and puts in its place what came. Raises OSError."""
    for one in present(disk, path):
        target = f"{aside}/{os.path.relpath(one, data) if one.startswith(f'{data}/') else os.path.basename(one)}"
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        shutil.move(one, target)
    disk.rename(f"{path}{_COMING}", path)
    disk.sync_directory(os.path.dirname(path))


def _aside(data: str) -> str:
    """A name nobody has, for what was there before: also for the second restore of a second."""
    aside = f"{data}/before-restore-{time.strftime('%Y%m%d-%H%M%S')}"
    while os.path.exists(aside):
        aside += "-"
    return aside


def _refuse_moved(settings: Settings, data: str) -> None:
    """A backup of before a move would be a second index of one history. Raises OperatorError."""
    from powermail.app.indexes import refuse_moved

    if not settings.index.database:
        refuse_moved(system_world(NullLog()), inside(data, settings.index.path))


def _same_cluster(settings: Settings, data: str, cluster: str) -> None:
    from powermail.app.setup import cluster_of_nodes

    try:
        found = cluster_of_nodes(system_world(NullLog()), settings, data)
    except OperatorError:
        return  # no node is here yet
    if found != cluster:
        raise OperatorError(f"the nodes of {data} belong to cluster {found}, the backup to {cluster}; nothing was changed")
