"""Makes indexes, and puts them through what a machine and its operator can do to them: stop, die, be copied and put back."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import asyncpg

from powermail.base.disk import SystemDisk
from powermail.base.log import NullLog
from powermail.base.net import SocketNetwork
from powermail.base.world import World
from powermail.index.contract import Batch, Delivery, Head, Index, Outcome, Reconciled
from powermail.index.memory import MemoryIndex, MemoryStore
from powermail.index.postgres import PostgresIndex
from powermail.index.postgres.schema import VERSION_TABLE
from powermail.index.sqlite import SqliteIndex
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.sim.world import SimEntropy
from powermail.storage.contract import START, End, Mark, Origin, Position, Receipt, Unread

T = TypeVar("T")
CLUSTER = "00" * 16
NODES = {"a": "north", "b": "south", "c": "west"}
NOW = 1_800_000_000.0
FAR = Position(9, 0)  # an end of a log that lies behind all


class Ticks:
    """Both clocks; a test moves them."""

    def __init__(self) -> None:
        self.at = NOW

    def monotonic(self) -> float:
        return self.at

    def now(self) -> float:
        return self.at


class InlineLane:
    """A lane that runs each call at once: these tests ask what comes out, not what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is queued."""


class Rig(ABC):
    """One installation's index: what is on its disk, and the process that has it open."""

    def __init__(self, seed: int = 1) -> None:
        self.clock = Ticks()
        entropy = SimEntropy(random.Random(seed))
        self.world = World(self.clock, SystemDisk(), SocketNetwork(), entropy, InlineLane, NullLog())
        self.running: Any = None
        self.settles = True  # what nodes hold is entered at once at each start: there is nothing
        self.entropy = entropy

    @property
    def index(self) -> Index:
        """The process that runs."""
        running: Index = self.running
        return running

    @abstractmethod
    async def start(self) -> Index:
        """Opens it."""

    async def die(self) -> None:
        """The process ends without a word."""
        await self.running.close()

    async def stop(self) -> None:
        """The process stops in good order."""
        await self.running.rest()
        await self.running.close()

    @abstractmethod
    async def backup(self) -> Any:
        """A copy of what is committed now, also while it runs."""

    @abstractmethod
    async def put_back(self, backup: Any) -> None:
        """Replaces what is on the disk; nothing runs."""

    @abstractmethod
    async def plant(self, fault: str) -> None:
        """Makes something disagree: `totals`, `refs`, `entry` (one is missing), `fate` (a shown message is dead)."""

    async def lose(self, backup: Any, clean: bool = False) -> Index:
        """The process ends, an older backup is put back, and it starts again."""
        await (self.stop() if clean else self.die())
        await self.put_back(backup)
        return await self.start()


class MemoryRig(Rig):
    """`index.memory`."""

    alone = True  # as where one process alone writes

    def __init__(self, path: Path, seed: int = 1) -> None:
        super().__init__(seed)
        self.store = MemoryStore()

    async def start(self) -> Index:
        self.running = MemoryIndex(self.world, self.store, self.alone)
        await self.running.open(CLUSTER)
        if self.settles:
            self.index.settled()
        return self.index

    async def backup(self) -> Any:
        return self.store.snapshot()

    async def put_back(self, backup: Any) -> None:
        self.store.restore(backup)

    async def plant(self, fault: str) -> None:
        state = self.store.state
        at, entry = next(iter(state.entries.items()))
        if fault == "totals":
            state.mailboxes[at[0]] = state.mailboxes[at[0]]._replace(octets=1)
        elif fault == "refs":
            state.keys[entry.key] = state.keys[entry.key]._replace(refs=7)
        elif fault == "entry":
            del state.entries[at]
        else:
            del state.keys[entry.key]


class SqliteRig(Rig):
    """`index.sqlite`."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        super().__init__(seed)
        self.path = path / f"index-{seed}.db"
        self.backups = 0

    async def start(self) -> Index:
        await asyncio.sleep(0)
        self.running = SqliteIndex(self.world, str(self.path))
        await self.running.open(CLUSTER)
        if self.settles:
            self.index.settled()
        return self.index

    async def backup(self) -> Any:
        self.backups += 1
        to = self.path.with_suffix(f".{self.backups}")
        source, target = sqlite3.connect(self.path), sqlite3.connect(to)
        source.backup(target)
        source.close()
        target.close()
        return to

    async def put_back(self, backup: Any) -> None:
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        shutil.copy(backup, self.path)

    async def plant(self, fault: str) -> None:
        await self.die()
        database = sqlite3.connect(self.path, isolation_level=None)
        database.execute(_FAULTS[fault])
        database.close()
        await self.start()


class SharedMemoryRig(MemoryRig):
    """`index.memory`, as where others write too."""

    alone = False


_FAULTS = {
    "totals": "UPDATE mailboxes SET octets = 1",
    "refs": "UPDATE messages SET refs = 7",
    "entry": "DELETE FROM entries",
    "fate": "DELETE FROM messages",
}
_FIRST = (
    "INSERT INTO placements VALUES (0, ''); INSERT INTO counters VALUES ('epoch', 1), ('round', 1), ('sequence', 0),"
    " ('starts', 0), ('uidvalidity', 0), ('catching_up', 0), ('waiting', 0)"
)


class CountedIds:
    """Ids as one writer alone would give them, so that answers can be compared."""

    def __init__(self) -> None:
        self.last: Counter[str] = Counter()

    def take(self, table: str) -> int:
        self.last[table] += 1
        return self.last[table]

    def give_back(self, tables: Sequence[str]) -> None:
        self.last.subtract(tables)


class TimedPostgresIndex(PostgresIndex):
    """The test's clock is the database's."""

    def _clock(self) -> str:
        return f"CAST({self._world.clock.now()!r} AS DOUBLE PRECISION)"


class PostgresRig(Rig):
    """`index.postgres`, over a database of the server that this test process runs."""

    reach: ClassVar[Callable[[], str]]  # the URL of a database with the tables of an index and nothing else; set by a fixture

    def __init__(self, path: Path, seed: int = 1, url: str = "", ids: CountedIds | None = None) -> None:
        super().__init__(seed)
        self.url = url or PostgresRig.reach()
        self.ids = ids or CountedIds()
        self.fresh = not url

    async def start(self) -> Index:
        if self.fresh:
            await self._empty(_FIRST)
            self.fresh = False
        self.running = TimedPostgresIndex(self.world, self.url, self.ids)
        await self.running.open(CLUSTER)
        if self.settles:
            self.index.settled()
        return self.index

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[Any]:
        """The database, as somebody else uses it."""
        connection = await asyncpg.connect(self.url)
        try:
            yield connection
        finally:
            await connection.close()

    async def _tables(self, connection: Any) -> list[str]:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
        return [row[0] for row in rows if row[0] != VERSION_TABLE]

    async def _empty(self, then: str = "SELECT 1") -> None:
        async with self.beside() as connection:
            tables = await self._tables(connection)
            await connection.execute(f"TRUNCATE {', '.join(tables)}; {then}")

    async def backup(self) -> Any:
        async with self.beside() as connection, connection.transaction(isolation="repeatable_read"):
            rows = {table: await connection.fetch(f"SELECT * FROM {table}") for table in await self._tables(connection)}
        return rows, Counter(self.ids.last)

    async def put_back(self, backup: Any) -> None:
        rows, last = backup
        await self._empty()
        async with self.beside() as connection:
            for table, records in rows.items():
                if records:
                    await connection.copy_records_to_table(table, records=records)
        self.ids.last = Counter(last)

    async def plant(self, fault: str) -> None:
        async with self.beside() as connection:
            await connection.execute(_FAULTS[fault])


RIGS: dict[str, Callable[[Path, int], MemoryRig | SqliteRig | PostgresRig]] = {
    "memory": MemoryRig,
    "postgres": PostgresRig,
    "sqlite": SqliteRig,
}
ALONE = ("memory", "sqlite")  # where one process writes: a start after one that died makes numbers leap (law 10)
SHARED = {"memory": SharedMemoryRig, "postgres": PostgresRig}


# -- messages ---------------------------------------------------------------------------------------------------------


def key(number: int) -> bytes:
    """A key that rises with the number."""
    return number.to_bytes(16, "big")


def inbox(account: str = "ann", mailbox: str = "INBOX", flags: int = 0) -> Target:
    """A recipient with a mailbox here."""
    return Target(account=account, mailbox=mailbox, flags=flags)


def elsewhere(address: str = "far@example.net") -> Target:
    """A recipient somewhere else."""
    return Target(destination=address, reverse_path="from@example.org", recipient="to@example.org")


def commit(number: int, *targets: Target) -> Commit:
    """The commit record of a message."""
    return Commit(
        100 + number, f"{number:064x}", [100 + number], NOW + number, Envelope("from@example.org"), list(targets or (inbox(),))
    )


def place(number: int) -> Position:
    """Where nodes have the commit record of a message, unless a test says otherwise."""
    return Position(1, 1000 * number)


def incarnation(node: str) -> str:
    """Of a node that was never made anew."""
    return f"{node}-1"


def end_of(node: str, end: Position = FAR) -> End:
    """Where the log of a node that was never made anew ends."""
    return End(incarnation(node), end)


def delivery(number: int, *targets: Target, nodes: Sequence[str] = ("a", "b")) -> Delivery:
    """A message with a receipt of each of `nodes`."""
    receipts = tuple(Receipt(node, incarnation(node), place(number)) for node in nodes)
    return Delivery(key(number), commit(number, *targets), receipts)


async def admit(index: Index, *nodes: str) -> None:
    """Nodes become members, with empty logs."""
    for node in nodes or tuple(NODES):
        await index.admit_node(node, NODES[node], incarnation(node), "boot", START, START)


async def deliver(index: Index, *numbers: int, to: Sequence[Target] = (), nodes: Sequence[str] = ("a", "b")) -> None:
    """Enters messages in that order."""
    for start in range(0, len(numbers), 50):
        await asyncio.sleep(0)  # each step of the loop stays short
        outcomes = await asyncio.gather(
            *[index.deliver(delivery(number, *to, nodes=nodes)) for number in numbers[start : start + 50]]
        )
        assert {*outcomes} <= {Outcome.ENTERED, Outcome.KNOWN}


async def watermark(index: Index, node: str) -> Position:
    """Where reconcile of a node goes on."""
    return next(row.watermark for row in await index.node_rows() if row.id == node)


async def reconcile(
    index: Index,
    node: str,
    to: Position,
    copies: Sequence[tuple[int, Position, Origin]] = (),
    tombstones: Sequence[int] = (),
    commits: Sequence[tuple[int, Commit]] = (),
    birth: Position = START,
    unread: Sequence[Unread] = (),
    round_: int | None = None,
    read: Sequence[Unread] = (),
) -> Reconciled:
    """One batch from the watermark to `to`, which is the end."""
    found = [(key(number), position, origin) for number, position, origin in copies]
    records = {key(number): record for number, record in commits}
    dead = [key(number) for number in tombstones]
    start = await watermark(index, node)
    batch = Batch(node, incarnation(node), start, to, to, found, dead, records, birth, unread, round_, read)
    return await index.reconcile(batch)


async def scan_all(index: Index) -> None:
    """A whole round of law 9: every member's log is read to its end."""
    number = await index.raise_round()
    for row in await index.node_rows():
        await index.reconcile(
            Batch(row.id, row.incarnation, row.watermark, row.watermark, row.end_seen, [], [], {}, START, (), number)
        )


async def walk_all(index: Index) -> None:
    """Ends the walks that all members owe, which found nothing."""
    number = await index.raise_round()
    for row in await index.node_rows():
        assert await index.walked(row.id, row.incarnation, row.watermark, row.end_seen, number, index.epoch)
    await index.caught_up(index.epoch)


async def begin_again(index: Index, *marks: Mark, heads: Sequence[Head] = (), far: list[Head] | None = None) -> int:
    """What a keeper does when commits were lost; nodes hold nothing that the index does not know. `far`: what it wrote."""
    epoch = await index.raise_epoch(marks, "a test says so")
    await index.learn_heads(heads)
    reached = await index.far_heads(1000)
    await index.heads_written(reached, index.epoch)
    if far is not None:
        far += reached
    await index.begin_epoch(index.epoch)
    await walk_all(index)
    return epoch


async def mailbox(index: Index, account: str = "ann", name: str = "INBOX") -> int:
    """Id of a mailbox that is there."""
    facts = await index.find_mailbox(account, name)
    assert facts is not None
    return facts.id


async def uids(index: Index, number: int) -> list[int]:
    """UIDs of all entries of a mailbox."""
    return [entry.uid for entry in await index.entries(number, 0, 2**32, 1 << 20)]


async def numbers_of(index: Index, number: int) -> list[int]:
    """Which messages a mailbox shows, by the numbers the tests gave them."""
    return [int.from_bytes(entry.key, "big") for entry in await index.entries(number, 0, 2**32, 1 << 20)]
