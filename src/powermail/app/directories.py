"""Owns which directory a process opens: our table in a file or in a database, or the operator's own statements."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from powermail.base.errors import OperatorError
from powermail.base.settings import Settings, inside
from powermail.base.tls import client_context
from powermail.base.world import World
from powermail.directory.contract import Backend
from powermail.directory.sqlite import SqliteDirectory

if TYPE_CHECKING:
    from powermail.directory.database import Address

LastKnown = Callable[[Sequence[str]], Awaitable[dict[str, str]]]


def make_directory(world: World, settings: Settings, data: str, last_known: LastKnown) -> Backend:
    """The directory of the settings, not opened yet. `last_known`: the addresses ids were seen with. Raises OperatorError."""
    chosen = settings.directory
    if chosen.in_file:
        return SqliteDirectory(world, inside(data, chosen.path))
    if not chosen.find:
        from powermail.directory.accounts import SqlDirectory

        return SqlDirectory(world, chosen.backend, address_of(world, settings, data), chosen.connections)
    from powermail.directory.file import SqliteFile
    from powermail.directory.foreign import ForeignDirectory, Texts
    from powermail.directory.server import Server

    texts = Texts(chosen.find, chosen.serves, chosen.identify, chosen.listing)
    if chosen.backend == "sqlite":
        return ForeignDirectory(world, SqliteFile(world, inside(data, chosen.path)), texts, last_known)
    server = Server(world, chosen.backend, address_of(world, settings, data), chosen.connections, read_only=True)
    return ForeignDirectory(world, server, texts, last_known)


def address_of(world: World, settings: Settings, data: str) -> Address:
    """Where the directory's database is. Raises OperatorError."""
    from powermail.directory.database import parse

    chosen = settings.directory
    tls = (
        None
        if chosen.database_tls == "none"
        else client_context(True, inside(data, chosen.database_ca) if chosen.database_ca else "")
    )
    password = ""
    if chosen.database_password_file:
        try:
            password = world.disk.read_file(inside(data, chosen.database_password_file)).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise OperatorError(f"directory.database_password_file: {getattr(error, 'strerror', error)}") from error
    return parse(chosen.backend, chosen.database, tls, password)


async def initialise_directory(world: World, settings: Settings, data: str) -> list[int]:
    """Makes our table in the database of the settings, or brings it on; the versions that were reached. Raises OperatorError,
    DirectoryTrouble.
    """
    chosen = settings.directory
    if chosen.find:
        raise OperatorError("directory.find reads tables of your own: nothing is made there")
    if chosen.in_file:
        raise OperatorError(
            f"the directory is the file {inside(data, chosen.path)}: it is made, and brought on, when it is opened"
        )
    from powermail.directory.accounts import SqlDirectory

    directory = SqlDirectory(world, chosen.backend, address_of(world, settings, data), 1)
    try:
        return await directory.initialise()
    finally:
        await directory.close()
