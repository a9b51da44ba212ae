"""Several processes on one database, and what lies between them and its server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from powermail.index.postgres import PostgresIndex
from tests.index.support import PostgresRig
from tests.servers import Postgres

WAIT_S = 30.0
SHARED_TIMES = ("INDEX_CONNECT_S", "INDEX_COMMAND_S", "INDEX_TURN_S", "INDEX_LOCK_S", "INDEX_IDLE_S", "INDEX_CLOSE_S")


@asynccontextmanager
async def another(rig: PostgresRig, url: str = "") -> AsyncIterator[PostgresIndex]:
    """A second process that uses the same database."""
    process = PostgresRig(Path(), 99, url or rig.url, rig.ids)
    await process.start()
    index: PostgresIndex = process.running
    try:
        yield index
    finally:
        await process.die()


async def blocked(connection: Any, count: int = 1) -> None:
    """Waits until so many transactions of this database wait for a lock."""
    question = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with asyncio.timeout(WAIT_S):
        while await connection.fetchval(question) < count:
            await asyncio.sleep(0.01)


class Wire:
    """Stands between a process and its server; it falls silent, or cuts every connection when the process says a word."""

    def __init__(self, server: Postgres) -> None:
        self._to = server.port
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self.word = b"COMMIT"
        self.cut: Callable[[], bool] | None = None  # asked once, at that word: does the server still get to hear it
        self.cuts = 0
        self.port = 0
        self._speaks = asyncio.Event()
        self._speaks.set()

    def fall_silent(self) -> None:
        """From now on nothing comes through, either way, and no connection breaks: as when a machine is gone."""
        self._speaks.clear()

    def speak(self) -> None:
        """All that was held back goes on its way."""
        self._speaks.set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self.speak()
        self.break_all()
        self._server.close()
        await self._server.wait_closed()

    def break_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        back = asyncio.ensure_future(self._copy(far_reader, writer))
        await self._copy(reader, far_writer, watched=True)
        far_writer.close()  # in good order: the server does what it was sent
        back.cancel()
        writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watched: bool = False) -> None:
        with suppress(OSError):
            while octets := await reader.read(1 << 16):
                await self._speaks.wait()
                if watched and self.cut is not None and self.word in octets:
                    heard, self.cut = self.cut, None
                    self.cuts += 1
                    for each in self._writers:
                        each.transport.abort()  # the process hears no answer
                    if heard():
                        writer.write(octets)
                        await writer.drain()
                    return
                writer.write(octets)
                await writer.drain()

    def url(self, of: str) -> str:
        return of.replace(f":{urlsplit(of).port}/", f":{self.port}/")


def between(monkeypatch: Any, where: Any, name: str, act: Callable[[], Awaitable[Any]]) -> list[str]:
    """Once, before `where.name` runs, others act; what it returns has one item from then on."""
    method = getattr(where, name)
    acted: list[str] = []

    async def first_others(*args: Any, **named: Any) -> Any:
        if not acted:
            acted.append(name)
            await act()
        return await method(*args, **named)

    monkeypatch.setattr(where, name, first_others)
    return acted


@asynccontextmanager
async def counted_statements(index: PostgresIndex) -> AsyncIterator[list[str]]:
    """What is asked of the server over the connections that there are."""
    texts: list[str] = []

    def note(record: Any) -> None:
        texts.append(record.query)

    links = [*index._writers.all, *index._readers.all]
    known = [link.connection for link in links if link.connection is not None]
    for connection in known:
        connection.add_query_logger(note)
    yield texts
    await asyncio.sleep(0)  # the driver tells it in the next turn of the loop
    for connection in known:
        connection.remove_query_logger(note)


async def standby_has_all(primary: Postgres, standby: Postgres) -> None:
    """The standby has all that was committed until now."""
    where = await asyncio.to_thread(primary.sql, "", "SELECT pg_current_wal_lsn()")
    async with asyncio.timeout(WAIT_S):
        while (await asyncio.to_thread(
            standby.sql, "", f"SELECT pg_last_wal_replay_lsn() >= '{where.strip()}'::pg_lsn"
        )).strip() != "t":  # fmt: skip
            await asyncio.sleep(0.02)
