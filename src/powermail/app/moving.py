"""Owns `powermail index move` and `powermail directory move`: what is in a file goes into a database, or back, by one command.

Nobody serves meanwhile: the lock of the data directory says so, and a database its connections. The settings are changed once
the new place is whole; the old file is set aside, never deleted. Run again after anything at all, the command goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import NamedTuple

import msgspec

from powermail.app.core import refuse_restoring
from powermail.app.directories import initialise_directory, make_directory
from powermail.app.indexes import note_of
from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.database_url import shown_url
from powermail.base.errors import OperatorError
from powermail.base.settings import SETTINGS_NAME, Settings, check, inside
from powermail.base.settings_text import with_values
from powermail.base.sqlite_files import name_aside, present, put_in_place, remove, set_aside
from powermail.base.world import World
from powermail.directory.contract import Backend
from powermail.directory.sqlite import SqliteDirectory
from powermail.index.moving import (
    CLUSTER,
    LEAVING,
    MOVED,
    MOVED_AS,
    MOVED_FROM,
    MOVING,
    MovedTable,
    Side,
    counted,
    let_stay,
    move,
    state_of,
)
from powermail.index.sqlite import SqliteIndex
from powermail.index.sqlite.moving import SqliteSide

Progress = Callable[[int, int], Awaitable[None]]
TO_FILE = "sqlite"  # `--to sqlite`: back into a file


async def _nobody(ids: Sequence[str]) -> dict[str, str]:
    """The addresses that ids were seen with: our own table asks nobody."""
    return {}


class IndexMoved(NamedTuple):
    """What a move came to. `tables` is empty if an earlier run had copied and compared everything."""

    to: str
    set_aside: str
    tables: list[MovedTable]


class DirectoryMoved(NamedTuple):
    """What a move of the directory came to; the SHA-256 is of its rows in the order of addresses, which both have."""

    to: str
    set_aside: str
    accounts: int
    sha256: str


class Mover:
    """Moves what an installation keeps."""

    def __init__(self, world: World, settings: Settings, data: str, progress: Progress) -> None:
        self._world = world
        self._settings = settings
        self._data = data
        self._progress = progress

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """No server of this data directory runs meanwhile. Raises OperatorError."""
        try:
            lock = self._world.disk.lock(f"{self._data}/lock")
        except BlockingIOError as error:
            raise OperatorError(f"a server runs on {self._data}: stop it first; nothing was changed") from error
        try:
            refuse_restoring(self._world, self._data)
            yield
        finally:
            lock.release()

    # -- the index --------------------------------------------------------------------------------------------------------

    async def index(self, to: str) -> IndexMoved:
        """Moves the index into the database at `to`, or back into the file of the settings. Raises OperatorError, Trouble."""
        async with self._alone():
            return await (self._index_to_file() if to == TO_FILE else self._index_to_database(to))

    async def look(self, to: str) -> IndexMoved:
        """What `index` would move; nothing is changed. Raises OperatorError, Trouble."""
        from powermail.index.postgres.moving import PostgresSide

        whence = self._settings.index.database
        database = PostgresSide(whence if to == TO_FILE else to)
        file = SqliteSide(self._world, self._path)
        async with self._alone():
            try:
                await database.open()
                if to != TO_FILE:
                    await file.open()
                source, target = (database, None) if to == TO_FILE else (file, database)
                tables = await counted(source, target)
            finally:
                await file.close()
                await database.close()
        return IndexMoved(self._path if target is None else target.name, "", tables)

    async def undo(self) -> bool:
        """Takes back a move out of a database that did not come to its end; False if none was ordered. Raises OperatorError,
        IndexTrouble.
        """
        from powermail.index.postgres.moving import PostgresSide

        whence, building = self._settings.index.database, f"{self._path}.moving"
        if not whence:
            raise OperatorError(f"the index is the file {self._path}, which stays until a move is at its end: nothing to undo")
        async with self._alone():
            source = PostgresSide(whence)
            try:
                await source.open()
                done = await let_stay(source)
            finally:
                await source.close()
            found = bool(present(self._world.disk, building))
            remove(self._world.disk, building)
            return done or found

    @property
    def _path(self) -> str:
        return inside(self._data, self._settings.index.path)

    async def _index_to_database(self, to: str) -> IndexMoved:
        from powermail.index.postgres.migrating import migrate
        from powermail.index.postgres.moving import PostgresSide

        disk, path = self._world.disk, self._path
        named = self._settings.index.database
        if named and (shown_url(named) != shown_url(to) or not disk.exists(path)):
            raise OperatorError(f"the index is in {shown_url(named)} already: nothing was changed")
        if not disk.exists(path):
            raise OperatorError(f"there is no index {path} to be moved: nothing was changed")
        target, source = PostgresSide(to), SqliteSide(self._world, path)
        try:
            await target.open()
            if not (await target.notes()).get(CLUSTER) and not await target.is_current():
                await migrate(to)
            await source.open()
            if not await self._is_as_it_was(source, (await target.notes()).get(MOVING, "")):
                await source.close()
                await self._close_well(path)
                source = SqliteSide(self._world, path)
                await source.open()
            tables = await move(source, target, self._progress)
        finally:
            await source.close()
            await target.close()
        self._set({"index.database": to})
        if not disk.exists(note_of(path)):
            when = f"{utc(self._world.clock.now()):%Y-%m-%d %H:%M:%S} UTC"
            disk.replace_file(note_of(path), f"moved to {target.name} on {when}\n".encode())
        return IndexMoved(target.name, self._set_aside(path), tables)

    @staticmethod
    async def _is_as_it_was(source: SqliteSide, state: str) -> bool:
        """True if an earlier run has begun with this very state, or has come to the last step: it goes on."""
        return MOVED in await source.notes() or (bool(state) and (await state_of(source)).id == state)

    async def _close_well(self, path: str) -> None:
        """Brings a file of an earlier release on; and one whose process died, or that was put back, begins where it must
        (law 10), before what it says is taken over.
        """
        index = SqliteIndex(self._world, path)
        try:
            await index.open()
            if not index.cluster:
                raise OperatorError(f"{path} belongs to no cluster: `powermail rebuild` sets it aside and makes it anew")
            await index.rest()
        finally:
            await index.close()

    async def _index_to_file(self) -> IndexMoved:
        from powermail.index.postgres.moving import PostgresSide

        disk, path, whence = self._world.disk, self._path, self._settings.index.database
        if not whence:
            raise OperatorError(f"the index is the file {path} already: nothing was changed")
        building = f"{path}.moving"
        source, target = PostgresSide(whence), SqliteSide(self._world, building)
        tables: list[MovedTable] = []
        try:
            await source.open()
            if not disk.exists(path):
                notes = await source.notes()
                if not disk.exists(building) and MOVED not in notes and LEAVING not in notes:
                    await self._rest(whence)
                await target.open(make=True)
                tables = await move(source, target, self._progress)
            elif not await self._is_that(path, source):
                raise OperatorError(f"{path} exists: move it away first; nothing was changed")
        finally:
            await target.close()
            await source.close()
        if not disk.exists(path):
            set_aside(disk, path, name_aside(disk, path, "left-behind", self._world.clock))  # of a file that went before
            put_in_place(disk, building, path)
        if disk.exists(note_of(path)):
            disk.unlink(note_of(path))
        self._set({"index.database": ""})
        return IndexMoved(path, f"the tables in {source.name}", tables)

    async def _rest(self, url: str) -> None:
        """The writer slots of processes that died say so, if it is long ago; that there is an index is looked at too."""
        from powermail.index.postgres import PostgresIndex

        index = PostgresIndex(self._world, url)
        try:
            await index.open()
            await index.rest()
        finally:
            await index.close()

    async def _is_that(self, path: str, source: Side) -> bool:
        """True if the file is what an earlier run has made of that database."""
        file = SqliteSide(self._world, path)
        try:
            await file.open()
            state = (await source.notes()).get(MOVED_AS)
            return state is not None and (await file.notes()).get(MOVED_FROM) == state
        finally:
            await file.close()

    # -- the directory ----------------------------------------------------------------------------------------------------

    async def directory(self, to: str, password_file: str) -> DirectoryMoved:
        """Moves the accounts, with their ids, from the file into the table made at `to`. Raises OperatorError, Trouble."""
        async with self._alone():
            chosen = self._settings.directory
            path, disk = inside(self._data, chosen.path), self._world.disk
            note = f"{path}.moved"
            if not chosen.in_file:
                return await self._directory_at_its_end(path, note, to)
            there = msgspec.structs.replace(
                chosen, backend=to.partition("://")[0], database=to,
                database_password_file=password_file or chosen.database_password_file,
            )  # fmt: skip
            settings = msgspec.structs.replace(self._settings, directory=there)
            check(settings)
            await initialise_directory(self._world, settings, self._data)
            source = SqliteDirectory(self._world, path)
            target = make_directory(self._world, settings, self._data, _nobody)
            try:
                await source.open(make=False)
                await target.open(make=False)
                await self._refuse_foreign(source, target)
                count, digest = await self._accounts(source, target)
            finally:
                await source.close()
                await target.close()
            disk.replace_file(note, msgspec.json.encode(DirectoryMoved(to, "", count, digest)))  # all is there
            values = {"directory.backend": there.backend, "directory.database": to}
            if password_file:
                values["directory.database_password_file"] = password_file
            self._set(values)
            return self._directory_set_aside(path, note, DirectoryMoved(to, "", count, digest))

    async def _directory_at_its_end(self, path: str, note: str, to: str) -> DirectoryMoved:
        """The settings name the database: a run that was killed then had only the file to set aside. It was served since, for
        all that is known: nothing of the file goes there any more. Raises OperatorError.
        """
        disk, chosen = self._world.disk, self._settings.directory
        if chosen.find or chosen.backend == "sqlite":
            raise OperatorError("the directory is of the operator's own statements (directory.find): nothing was changed")
        if chosen.database != to or not present(disk, path):
            raise OperatorError(f"the directory is in {shown_url(chosen.database)} already: nothing was changed")
        try:
            done = msgspec.json.decode(disk.read_file(note), type=DirectoryMoved) if disk.exists(note) else None
        except ValueError:
            done = None
        if done is None or done.to != to or await self._digest(path) != done.sha256:
            raise OperatorError(
                f"the settings name {shown_url(to)}, and {path} was not moved there: move it away if it is of no use; or set "
                "directory.backend and directory.database as they were, and say this again. Nothing was changed"
            )
        return self._directory_set_aside(path, note, done)

    def _directory_set_aside(self, path: str, note: str, done: DirectoryMoved) -> DirectoryMoved:
        aside = self._set_aside(path)
        self._world.disk.unlink(note)
        self._world.disk.sync_directory(self._data)
        return done._replace(set_aside=aside)

    async def _refuse_foreign(self, source: Backend, target: Backend) -> None:
        """Before anything is put there: all that the table has must be what an earlier run has put. Raises OperatorError."""
        cure = (
            "name a database without accounts, or empty that table (`DELETE FROM accounts`) if nobody uses it. Nothing was "
            "changed"
        )
        (total, doubts), count, after = await target.doubts(), 0, ""
        while page := await target.all(after, limits.MOVE_PAGE_ROWS):
            mine = await source.among([account.address for account in page])
            for account in page:
                here = mine.get(account.address.lower())
                if here is None:
                    raise OperatorError(f"{account.address} is in the new table already, and not in the file; {cure}")
                if source.check(here) != account:
                    raise OperatorError(f"{account.address} is in the new table already, and is another row there; {cure}")
            count, after = count + len(page), page[-1].address
        if count != total:
            said = next((f": {doubt.address}: {doubt.problem}" for doubt in doubts), "")
            raise OperatorError(f"{total - count} rows of the new table cannot be read{said}; {cure}")

    async def _digest(self, path: str) -> str:
        """The SHA-256 of the accounts of a file."""
        source, digest, after = SqliteDirectory(self._world, path), sha256(), ""
        try:
            await source.open(make=False)
            while page := await source.all(after, limits.MOVE_PAGE_ROWS):
                for account in page:
                    digest.update(msgspec.msgpack.encode(source.check(account)))
                after = page[-1].address
        finally:
            await source.close()
        return digest.hexdigest()

    async def _accounts(self, source: Backend, target: Backend) -> tuple[int, str]:
        """Copies what is not there yet, and compares each row; how many, and the SHA-256 of them. Raises OperatorError."""
        total, doubts = await source.doubts()
        digest, count, after = sha256(), 0, ""
        while page := await source.all(after, limits.MOVE_PAGE_ROWS):
            wanted = {account.address.lower(): source.check(account) for account in page}
            there = await target.among(list(wanted))
            await target.put([account for address, account in wanted.items() if address not in there], ())
            there = await target.among(list(wanted))
            for address, account in wanted.items():
                if there.get(address) != account:
                    raise OperatorError(f"{address} is not as it was in the new table: who changes it there? Run this again")
                digest.update(msgspec.msgpack.encode(account))
            count, after = count + len(page), page[-1].address
            await self._progress(count, total)
        if count != total:
            said = next((f": {doubt.address}: {doubt.problem}" for doubt in doubts), "")
            raise OperatorError(f"{total - count} rows cannot be read{said}; `powermail directory check` names them")
        if (await target.doubts())[0] != total:
            raise OperatorError("the new table has other accounts too: name a database that is empty")
        return count, digest.hexdigest()

    # -- files --------------------------------------------------------------------------------------------------------------

    def _set(self, values: dict[str, str]) -> None:
        """Changes values of the settings file. Raises OperatorError."""
        path, disk = f"{self._data}/{SETTINGS_NAME}", self._world.disk
        text = disk.read_file(path).decode()
        changed = with_values(text, values, path)
        if changed != text:
            disk.replace_file(path, changed.encode(), disk.mode(path) & 0o777)

    def _set_aside(self, path: str) -> str:
        disk = self._world.disk
        aside = name_aside(disk, path, "moved", self._world.clock)
        set_aside(disk, path, aside)
        return aside
