"""Owns which index a process opens: a file of its own, or a database that others use too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powermail.app.setup import cluster_of_nodes
from powermail.base.errors import IndexTrouble, OperatorError
from powermail.base.settings import Settings, inside
from powermail.base.world import World
from powermail.index.sqlite import SqliteIndex

if TYPE_CHECKING:
    from powermail.index.postgres import PostgresIndex


def make_index(world: World, settings: Settings, data: str) -> SqliteIndex | PostgresIndex:
    """The index of the settings, not opened yet. Raises OperatorError."""
    if settings.index.database:
        from powermail.index.postgres import PostgresIndex

        return PostgresIndex(world, settings.index.database)
    refuse_without(settings)
    path = inside(data, settings.index.path)
    refuse_moved(world, path)
    return SqliteIndex(world, path)


def refuse_without(settings: Settings) -> None:
    """An index in a file is the first machine's, whose one process opens it. Raises OperatorError on one that has joined: what
    was made here would be a second index of the nodes, which would take that for lost commits (law 11).
    """
    if settings.peers.authority_at and not settings.peers.authority_listen and not settings.index.database:
        raise OperatorError(
            "this machine has joined a cluster and has no index (index.database is not set): it serves nodes, with `powermail "
            "serve --roles node`; say this on a front end or a keeper, or on the first machine. Nothing was changed"
        )


def note_of(path: str) -> str:
    """The file that says where the index with this path was moved to."""
    return f"{path}.moved"


def refuse_moved(world: World, path: str) -> None:
    """Two indexes of one history would give one number twice. Raises OperatorError if the one there was moved, also if an older
    backup of it was put back.
    """
    if world.disk.exists(note_of(path)):
        said = world.disk.read_file(note_of(path)).decode(errors="replace").strip()
        raise OperatorError(
            f"the index {path} was {said}: set index.database to it. If that database is lost for good, remove {note_of(path)}"
        )


async def migrate_index(world: World, settings: Settings, data: str) -> None:
    """Makes the tables of the index in the database of the settings, or brings them on; a new index belongs to the cluster of
    the nodes. Raises OperatorError, also if the file that was used before shows mail: nothing would be lost, but what was
    deleted and is not forgotten yet would show again.
    """
    if not settings.index.database:
        raise OperatorError("index.database is not set: the index is a file, and brings itself on at the start")
    from powermail.index.postgres import PostgresIndex
    from powermail.index.postgres.migrating import migrate

    cluster = cluster_of_nodes(world, settings, data)
    await migrate(settings.index.database)
    index = PostgresIndex(world, settings.index.database)
    try:
        try:
            await index.open()
        except OperatorError:
            await _refuse_used(world, inside(data, settings.index.path))
            await index.open(cluster)
        if index.cluster != cluster:
            raise OperatorError(f"the index in the database belongs to cluster {index.cluster}, the nodes to {cluster}")
        await index.rest()
    except IndexTrouble as error:
        raise OperatorError(f"the database of the index cannot be used: {error}") from error
    finally:
        await index.close()


async def _refuse_used(world: World, path: str) -> None:
    if not world.disk.exists(path):
        return
    file = SqliteIndex(world, path)
    try:
        await file.open()
        totals = await file.totals()
        await file.rest()
    finally:
        await file.close()
    if totals["mailboxes"] or totals["messages"] or totals["queue"]:
        raise OperatorError(f"the index {path} shows mail already: `powermail index move --to` takes it along")
