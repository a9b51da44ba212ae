"""Owns making an index anew that is in a database: from the nodes into a file, and from there beside the old one (law 13).

The file is made as that of an installation of one machine is: never served, whole before it has its name, its epoch durable on
nodes of R groups. Then it is moved into a schema of its own (`index.moving`: killed, it goes on), and takes the old one's place
in one transaction. The old one stays in a schema that is named for the day.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from powermail.base.clock import utc
from powermail.base.errors import OperatorError
from powermail.base.settings import Settings, inside
from powermail.base.world import World
from powermail.index.moving import CLUSTER, MOVED, MOVED_AS, MOVED_FROM, move
from powermail.index.sqlite.moving import SqliteSide
from powermail.keeper.rebuild import SUFFIXES, Rebuilt

Progress = Callable[[int, int], Awaitable[None]]
FILE = "index.rebuilding.db"  # while it is on its way


class _Halfway:
    """What a run that was killed behind the reading of the nodes has left: the finished file, and what the reading came to."""

    def __init__(self, world: World, data: str) -> None:
        self._disk = world.disk
        self._world = world
        self.path = inside(data, FILE)
        self._result = f"{self.path}.result"

    def result(self) -> Rebuilt | None:
        """What was read, if all of it was."""
        if not self._disk.exists(self.path) or not self._disk.exists(self._result):
            return None
        return msgspec.json.decode(self._disk.read_file(self._result), type=Rebuilt)

    def note(self, result: Rebuilt) -> None:
        """All was read."""
        self._disk.replace_file(self._result, msgspec.json.encode(result))

    def clear(self) -> None:
        """It is of no use any more: it is not an index that was ever served."""
        for path in (self._result, *(f"{self.path}{suffix}" for suffix in SUFFIXES)):
            if self._disk.exists(path):
                self._disk.unlink(path)

    async def moved_as(self) -> str | None:
        """As what it went into the database, if it has come so far."""
        side = SqliteSide(self._world, self.path)
        try:
            await side.open()
            return (await side.notes()).get(MOVED_AS)
        finally:
            await side.close()


async def into_database(
    world: World, settings: Settings, data: str, read: Callable[[str], Awaitable[Rebuilt]], progress: Progress, replace: bool
) -> Rebuilt:
    """Makes the index in the database of the settings anew. `read` makes one from the nodes at a path. Raises OperatorError,
    Trouble; run again it goes on.
    """
    from powermail.index.postgres.migrating import migrate
    from powermail.index.postgres.moving import PostgresSide
    from powermail.index.postgres.swapping import beside, make_room, swap

    url, halfway = settings.index.database, _Halfway(world, data)
    result = halfway.result()
    there = PostgresSide(url)
    try:
        await there.open()
        notes = await there.notes()
        if result is not None and (state := await halfway.moved_as()) is not None and notes.get(MOVED_FROM) == state:
            halfway.clear()  # killed when all was done
            return result
        if notes.get(CLUSTER) and MOVED not in notes and not replace:
            raise OperatorError(
                f"the index in {there.name} can be used; `powermail rebuild --yes` sets it aside and makes it anew. Nothing was"
                " changed"
            )
        if users := await there.users():
            raise OperatorError(f"{users} connections of PowerMail use {there.name}: stop every process that serves it first")
        await make_room(url, anew=result is None)
        if result is None:
            halfway.clear()
            result = await read(halfway.path)
            halfway.note(result)
        source, target = SqliteSide(world, halfway.path), PostgresSide(beside(url))
        try:
            await source.open()
            await target.open()
            if not await target.is_current():
                await migrate(beside(url))
            await move(source, target, progress)
        finally:
            await source.close()
            await target.close()
        if users := await there.users():
            raise OperatorError(f"{users} connections of PowerMail use {there.name}: stop them, and run this again")
    finally:
        await there.close()
    await swap(url, f"{utc(world.clock.now()):%Y%m%d_%H%M%S}")
    halfway.clear()
    return result
