"""Owns `powermail rebuild`: an index made anew from the nodes, in a file or in a database (law 13).

An index in a file grows under another name; the old one is set aside when the new one is whole, so that one which can be used
stays in its place for as long as it is not known that the nodes can be read.

For one in a database the file is made just so, and never served. Then it is moved into a schema of its own (`index.moving`:
killed, it goes on), and takes the old one's place in one transaction. The old one stays in a schema that is named for the day.
What was read by a run that was killed is taken up only if the nodes are those that it read, and have heard of no index since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import msgspec

from powermail.app.core import MakeKeys, kept_layout, make_nodes
from powermail.app.indexes import refuse_moved, refuse_without
from powermail.app.setup import cluster_of_nodes
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import IndexTrouble, NodeTrouble, OperatorError, Trouble
from powermail.base.log import Event
from powermail.base.settings import Settings, inside
from powermail.base.sqlite_files import name_aside, remove, set_aside
from powermail.base.world import World
from powermail.index.moving import CLUSTER, LEAVING, MOVED, MOVED_AS, MOVED_FROM, MOVING, move
from powermail.index.sqlite import cluster_of
from powermail.index.sqlite.moving import SqliteSide
from powermail.keeper.rebuild import Progress, Rebuilder, Rebuilt
from powermail.storage.contract import StorageNode
from powermail.storage.layout import Layout, parse_layout

FILE = "index.rebuilding.db"  # while it is on its way into a database


class Wanted(NamedTuple):
    """What an operator asked for."""

    without: tuple[str, ...] = ()  # nodes that are not read
    replace: bool = False  # also an index that can be used
    by_settings: bool = False  # the settings name all nodes: the layout that was kept here is lost


class _Read(NamedTuple):
    """What nodes were when they were read, as far as it tells whether that is still all."""

    at: float
    without: tuple[str, ...]
    groups: dict[str, str]
    incarnations: dict[str, str]  # of those that were read
    epoch: int  # the highest that they know of: whoever served an index since has raised it (law 11)


class Rebuild:
    """One run."""

    def __init__(
        self, world: World, settings: Settings, data: str, make_keys: MakeKeys, progress: Progress, wanted: Wanted
    ) -> None:
        self._world = world
        self._settings = settings
        self._data = data
        self._make_keys = make_keys
        self._progress = progress
        self._wanted = wanted
        self._nodes: Sequence[StorageNode] = ()
        self._cluster = ""

    async def run(self, stack: AsyncExitStack) -> Rebuilt:
        """Makes the index of the settings anew; `stack` closes what was opened. Raises OperatorError, Trouble."""
        if self._settings.index.database:
            return await self._into_database(stack)
        return await self._into_file(stack)

    # -- the nodes ----------------------------------------------------------------------------------------------------

    async def _open_nodes(self, stack: AsyncExitStack) -> None:
        """All nodes, also those of other machines. Raises OperatorError."""
        world, settings, data = self._world, self._settings, self._data
        self._cluster = cluster_of_nodes(world, settings, data)
        kept = kept_layout(world, settings, data, self._cluster, self._wanted.by_settings)
        while True:
            newer: dict[int, bytes] = {}
            without = self._wanted.without
            nodes = make_nodes(world, settings, data, self._cluster, self._make_keys, kept, without, newer.__setitem__)
            for node in nodes:
                stack.push_async_callback(node.close)
                if node.id not in without:
                    await self._open_node(node)
            known = kept.version if kept is not None else 0
            if max(newer, default=0) <= known:
                break
            kept = self._told(newer[max(newer)])  # a machine of nodes was told another since: that names more of them
            for node in nodes:
                await node.close()
        self._nodes = nodes

    async def _open_node(self, node: StorageNode) -> None:
        try:
            await node.open()
        except (OperatorError, Trouble) as error:
            self._world.log.event(Event.TROUBLE, node=node.id, error=str(error))  # the rebuild says what that costs

    def _told(self, octets: bytes) -> Layout:
        try:
            return parse_layout(octets, self._cluster)
        except ValueError as error:
            raise OperatorError(f"a node knows of a newer layout, which cannot be read: {error}") from error

    async def _read(self, path: str, make_room: Callable[[], None]) -> Rebuilt:
        required = self._settings.cluster.copies_required
        rebuilder = Rebuilder(
            self._world, self._nodes, path, self._cluster, required, self._progress, self._wanted.without, make_room
        )
        return await rebuilder.run()

    async def _nodes_now(self) -> _Read | None:
        """What the nodes are now; None if one that was to be read does not say."""
        groups = {node.id: node.group for node in self._nodes}
        incarnations, epoch = {}, 0
        for node in self._nodes:
            if node.id in self._wanted.without:
                continue
            try:
                facts = await node.facts()
            except NodeTrouble:
                return None
            incarnations[node.id] = facts.incarnation
            epoch = max(epoch, facts.mark.epoch)
        return _Read(self._world.clock.now(), tuple(sorted(self._wanted.without)), groups, incarnations, epoch)

    # -- a file -------------------------------------------------------------------------------------------------------

    async def _into_file(self, stack: AsyncExitStack) -> Rebuilt:
        world, path = self._world, inside(self._data, self._settings.index.path)
        refuse_without(self._settings)
        refuse_moved(world, path)
        if world.disk.exists(path) and cluster_of(path) and not self._wanted.replace:
            raise OperatorError(
                f"{path} is there and can be used; `powermail rebuild --yes` sets it aside and makes it anew. Nothing was "
                "changed"
            )
        await self._open_nodes(stack)

        def make_room() -> None:
            set_aside(world.disk, path, name_aside(world.disk, path, "before-rebuild", world.clock))

        return await self._read(path, make_room)

    # -- a database -----------------------------------------------------------------------------------------------------

    async def _into_database(self, stack: AsyncExitStack) -> Rebuilt:
        from powermail.index.postgres.migrating import migrate
        from powermail.index.postgres.moving import PostgresSide
        from powermail.index.postgres.swapping import beside, make_room, swap

        url, halfway = self._settings.index.database, _Halfway(self._world, self._data)
        there = PostgresSide(url)
        try:
            await there.open()
            notes = await there.notes()
            if (done := await halfway.at_its_end(there, notes)) is not None:
                return done
            _refuse_to_replace(there.name, notes, self._wanted.replace)
            if users := await there.users():
                raise OperatorError(
                    f"{users} connections of PowerMail use {there.name}: stop every process that serves it first; nothing was "
                    "changed"
                )
        finally:
            await there.close()
        await self._open_nodes(stack)
        if (owner := notes.get(CLUSTER)) and owner != self._cluster:
            raise OperatorError(
                f"the index in {there.name} belongs to cluster {owner}, the nodes to {self._cluster}: set index.database to "
                "the database of this cluster. Nothing was changed"
            )
        result, why = halfway.result(await self._nodes_now(), self._world.clock.now())
        await make_room(url, anew=result is None)
        if result is None:
            read = await self._read(halfway.path, halfway.clear)
            result = read._replace(began_anew=why)
            halfway.note(result, await self._nodes_now())
        source, target = SqliteSide(self._world, halfway.path), PostgresSide(beside(url))
        try:
            await source.open()
            await target.open()
            if not await target.is_current():
                await migrate(beside(url))
            await move(source, target, self._progress)
        finally:
            await source.close()
            await target.close()
        await swap(url, f"{utc(self._world.clock.now()):%Y%m%d_%H%M%S}", notes)
        halfway.clear()
        return result


def _refuse_to_replace(name: str, notes: dict[str, str], replace: bool) -> None:
    """Raises OperatorError for an index that is elsewhere, or can be used."""
    if MOVED in notes:  # two indexes of one history would give one number twice
        raise OperatorError(f"the index in {name} was moved to {notes[MOVED]}: set index.database to where it is")
    if LEAVING in notes:
        raise OperatorError(
            f"the index in {name} is being moved {notes[LEAVING]}: run that command again, to its end, or `powermail index "
            "move --undo`, and it is served where it is"
        )
    if MOVING in notes and not notes.get(CLUSTER) and not replace:
        raise OperatorError(
            f"an index is on its way into {name}: run `powermail index move` again, to its end; if it is lost where it was, "
            "`powermail rebuild --yes` makes it anew. Nothing was changed"
        )
    if notes.get(CLUSTER) and not replace:
        raise OperatorError(
            f"the index in {name} can be used; `powermail rebuild --yes` sets it aside and makes it anew. Nothing was changed"
        )


class _Noted(NamedTuple):
    """What a finished reading came to, and what the nodes were behind it. `read` is None if that is not known."""

    result: Rebuilt
    read: _Read | None = None


class _Halfway:
    """What a run that was killed behind the reading of the nodes has left: the finished file, and what the reading came to."""

    def __init__(self, world: World, data: str) -> None:
        self._disk = world.disk
        self._world = world
        self.path = inside(data, FILE)
        self._result = f"{self.path}.result"

    def _noted(self) -> _Noted | None:
        """What was read, if all of it was."""
        if not self._disk.exists(self.path) or not self._disk.exists(self._result):
            return None
        try:
            return msgspec.json.decode(self._disk.read_file(self._result), type=_Noted)
        except ValueError:  # of an earlier release, or damaged
            return None

    def result(self, now: _Read | None, at: float) -> tuple[Rebuilt | None, str]:
        """What an earlier run has read, if it is what would be read now; else why it is not."""
        noted = self._noted()
        if noted is None:
            return None, ""
        if not cluster_of(self.path):
            return None, f"what an earlier run had read was not used: {self.path} is damaged"
        before, age = noted.read, at - (noted.read.at if noted.read is not None else 0.0)
        why = ""
        if before is None or now is None:
            why = "it is not known whether the nodes are what they were"
        elif before.without != now.without:
            why = f"it was read {_without(before.without)}, and is wanted {_without(now.without)}"
        elif before.groups != now.groups:
            why = "there are other nodes now, or other groups"
        elif before.incarnations != now.incarnations:
            why = "a node is another disk now, or an older state of one"
        elif before.epoch != now.epoch:
            why = "an index was served since"
        elif not 0 <= age < limits.REBUILD_LEFT_S:
            why = f"it is older than {limits.REBUILD_LEFT_S / 3600:g} hours"
        return (None, f"what an earlier run had read was not used: {why}") if why else (noted.result, "")

    def note(self, result: Rebuilt, read: _Read | None) -> None:
        """All was read."""
        self._disk.replace_file(self._result, msgspec.json.encode(_Noted(result, read)))

    def clear(self) -> None:
        """It is of no use any more: it is not an index that was ever served."""
        if self._disk.exists(self._result):
            self._disk.unlink(self._result)
        remove(self._disk, self.path)

    async def at_its_end(self, there: Any, notes: dict[str, str]) -> Rebuilt | None:
        """What a run came to that was killed when all was done, unless that index was used since: then its leavings go."""
        noted = self._noted()
        if noted is None or (state := await self._moved_as()) is None or notes.get(MOVED_FROM) != state:
            return None
        self.clear()
        return None if await there.rows("SELECT id FROM writers LIMIT 1") else noted.result

    async def _moved_as(self) -> str | None:
        """As what it went into the database, if it has come so far."""
        side = SqliteSide(self._world, self.path)
        try:
            await side.open()
            return (await side.notes()).get(MOVED_AS)
        except IndexTrouble:
            return None  # damaged: it is read anew
        finally:
            await side.close()


def _without(names: Sequence[str]) -> str:
    return f"without {', '.join(names)}" if names else "from all nodes"
