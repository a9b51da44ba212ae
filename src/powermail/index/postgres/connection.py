"""Owns the connections to PostgreSQL, and the transaction in which everything is changed there.

Two connections write, each with a writer slot of its own (law 10); a few read. A transaction is a body that may run again: it
does when others stood in its way, and when its connection broke before COMMIT was sent. When it broke in COMMIT, the slot's
count says what became of it. What may be done twice is one statement without BEGIN, which counts itself. Nothing waits
without a bound: what is away is IndexTrouble.

Other processes write too, on other machines: nothing that was read is kept for the next transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import asyncpg

from powermail.base import limits
from powermail.base.errors import IndexLost, IndexTrouble, OperatorError
from powermail.base.lane import Lane
from powermail.base.world import World
from powermail.index import laws
from powermail.index.laws import NumbersSpent
from powermail.index.postgres import schema
from powermail.index.postgres.addresses import OUT_OF_REACH, connect
from powermail.index.postgres.statements import (
    Connection,
    History,
    Ids,
    NewSets,
    RandomIds,
    Reader,
    StatedReader,
    Writer,
)
from powermail.index.postgres.views import Views
from powermail.index.sql.core import LEFT_OUT, Change, Look
from powermail.index.sql.engine import Again, Reading, Slot, Transaction, Untouched
from powermail.index.sql.epochs import EpochPart, Found, find
from powermail.index.sql.gathering import Gathering
from powermail.storage.contract import Mark

T = TypeVar("T")
_LOCKED = asyncpg.LockNotAvailableError  # somebody holds a row for longer than anybody waits
IN_THE_WAY = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.UniqueViolationError, _LOCKED, Again)
_SLOW = (TimeoutError, asyncio.TimeoutError, asyncpg.QueryCanceledError)  # asked again it takes as long again
_CLOCK = "CAST(extract(epoch FROM now()) AS DOUBLE PRECISION)"
_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_KNOWN = (
    "SELECT (SELECT value FROM counters WHERE name = 'epoch'), (SELECT value FROM counters WHERE name = 'sequence'),"
    " (SELECT value FROM meta WHERE name = 'system'), (SELECT value FROM meta WHERE name = 'timeline'),"
    f" ({schema.MOVED})"
)


class Broken(Exception):
    """A connection is of no use any more; what was not committed over it did not happen."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error) or type(error).__name__)


class Link:
    """A connection that is made when it is needed, and its writer slot if it writes."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.history = History("", "")
        self.slot: Slot | None = None
        self.old: Slot | None = None  # of the connection before: it must be looked at first (law 10)

    def drop(self) -> None:
        """Lets go of the connection as it is; the slot is looked at over the next one."""
        if self.connection is not None:
            self.connection.terminate()
        self.connection = None
        if self.slot is not None:
            self.old, self.slot = self.slot, None


class Links:
    """A bounded number of connections, taken in turn."""

    def __init__(self, count: int) -> None:
        self.all = [Link() for _ in range(count)]
        self._free = deque(self.all)
        self._turn = asyncio.Semaphore(count)

    async def take(self) -> Link:
        """One that nobody uses, the one used last if it can be. Raises IndexTrouble."""
        try:
            async with asyncio.timeout(limits.INDEX_TURN_S):
                await self._turn.acquire()
        except TimeoutError as error:
            raise IndexTrouble("index: all connections to the database are busy") from error
        return self._free.popleft()

    def give(self, link: Link) -> None:
        """It is free again."""
        self._free.appendleft(link)
        self._turn.release()


class PostgresCore(EpochPart, Gathering):
    """The connections. Methods whose names begin with `_in_` run inside a transaction."""

    alone = False
    SPOILT = (asyncpg.PostgresError, asyncpg.exceptions.DataError, NumbersSpent, OverflowError)  # a body that cannot be run
    _batches_max = limits.INDEX_WRITERS
    _batch_max = limits.INDEX_SHARED_BATCH_MAX
    _enough = limits.INDEX_SHARED_ENOUGH

    def __init__(self, world: World, url: str, ids: Ids | None = None) -> None:
        super().__init__(world)
        self._url = url
        self._ids = ids or RandomIds(world.entropy)
        self._writers = Links(limits.INDEX_WRITERS)
        self._readers = Links(limits.INDEX_READERS_MAX)
        self._lane: Lane = world.lane("index-pack")
        self._views = Views()
        self._known = Mark()  # the highest of all that was read, and this process's counts
        self._seen_in = 0  # the epoch of which `numbering` and `catching_up` are known
        self._connection = 1
        self._history: History | None = None  # that of the connection that was compared last
        self._lost_in = 0  # the epoch in which `_why_lost` was found
        self._new_timeline = False  # it is all that `_why_lost` says
        self._slot_lost = False  # a writer slot says it: nothing at all is changed but by a new epoch
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.unsettled = True  # this process has compared nothing yet (law 10)
        self._begin_gathering()

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self, cluster: str = "") -> None:
        """Looks at the tables; with `cluster`, an index that is new gets that name. Raises OperatorError, IndexTrouble."""
        link = await self._writers.take()
        link.connection, link.history = await connect(self._url)
        try:
            await schema.check(link.connection)
            row = await link.connection.fetchrow("SELECT value FROM meta WHERE name = 'cluster'")
            if row is None and not cluster:
                raise OperatorError("the database has an index that belongs to no cluster yet")
            if row is None:
                await self._begin(link.connection, link.history, cluster)
                row = await link.connection.fetchrow("SELECT value FROM meta WHERE name = 'cluster'")
            self.cluster = row[0] if row else ""  # of who was first
            await self._compare(link)
        except BaseException as error:
            link.drop()
            if isinstance(error, (*OUT_OF_REACH, asyncpg.PostgresError)):
                raise IndexTrouble(f"index: {error}") from error
            raise
        finally:
            self._writers.give(link)
        await self._write(self._in_look_round)

    async def _begin(self, connection: Connection, history: History, cluster: str) -> None:
        """What leaps leaps from where numbers were given before, also when nothing was given yet (laws 10, 11)."""
        first = laws.fresh_uidvalidity(0, self._world.clock.now())
        async with connection.transaction():
            await connection.execute("UPDATE counters SET value = $1 WHERE name = 'uidvalidity' AND value = 0", first)
            for name, value in (("cluster", cluster), ("system", history.system), ("timeline", history.timeline)):
                await connection.execute("INSERT INTO meta VALUES ($1, $2) ON CONFLICT (name) DO NOTHING", name, value)

    async def _in_look_round(self, db: Transaction) -> bool | Untouched[bool]:
        """The first transaction takes the process's slot and learns what is there."""
        return Untouched(True)

    async def close(self) -> None:
        """Finishes what waits and closes. A database that is away does not hold up a stop: what was not entered by then is
        given up, and its outcome is unknown, as if the process had died.
        """
        try:
            async with asyncio.timeout(limits.INDEX_CLOSE_S):
                await self._gathered()
                while self._tasks:
                    await asyncio.wait(list(self._tasks))
        except TimeoutError:
            await self._give_up()
        self._closed = True
        for link in (*self._writers.all, *self._readers.all):
            link.drop()
        self._lane.close()

    async def _give_up(self) -> None:
        """Nobody waits any longer for what waits, nor for what is under way."""
        self._closed = True
        self._refuse_waiting(IndexTrouble("the index was closed"))
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def abandon(self) -> None:
        """Lets go of the connections as they are."""
        for link in (*self._writers.all, *self._readers.all):
            link.drop()

    # -- connections -----------------------------------------------------------------------------------------------------

    @property
    def connection(self) -> int:
        return self._connection

    def _break(self, link: Link) -> None:
        """What was read over the connections there were may be of another database than what comes (law 10)."""
        if link.connection is not None:
            link.drop()
            self._connection += 1

    async def _ready(self, link: Link) -> Connection:
        """Its connection, made if there is none, and compared (law 10). Raises IndexTrouble."""
        if self._closed:
            raise IndexTrouble("the index is not open")
        if link.connection is None or link.connection.is_closed() or link.history != self._history:
            self._break(link)  # also one to a primary that was left behind, however well it answers
            try:
                link.connection, link.history = await connect(self._url)
            except OperatorError as error:
                raise IndexTrouble(str(error)) from error
        elif not self._why_lost:
            return link.connection
        try:
            await self._compare(link)
        except BaseException:
            self._break(link)  # who was cancelled here leaves none that the next one would use uncompared
            raise
        return link.connection

    async def _compare(self, link: Link) -> None:
        """A history other than the one the index knows: commits may be lost until a new epoch says otherwise (law 10)."""
        assert link.connection is not None
        known = self._known  # before the look: all of it must be there
        row = await link.connection.fetchrow(_KNOWN)
        epoch, sequence, system, timeline, moved = row or (0, 0, "", "", None)
        if moved is not None:  # two indexes of one history would give one number twice
            raise IndexTrouble(f"index: it {moved}")
        self._take_history(link.history)
        if self._why_lost and epoch > self._lost_in:
            self._found_again()  # another process has dealt with it
        if not self._why_lost:
            await self._compare_slots(link.connection, known, epoch, sequence)
        there, here = History(system or "", timeline or ""), link.history
        if there != here and not self._why_lost:
            only_timeline = there.system == here.system
            what = "timeline" if only_timeline else "database server"
            self._lose(f"the index is on {what} {here[only_timeline]}, and was on {there[only_timeline]}", epoch, only_timeline)

    def _take_history(self, here: History) -> None:
        """Law 10: what this process has listed may be missing on another history, whoever has made the index content with it.
        Raises IndexTrouble for one that is over.
        """
        before, self._history = self._history, here
        if before is None or before == here:
            return
        if before.is_later(here):
            self._history = before
            raise IndexTrouble(
                f"index: a server on timeline {here.timeline} answers, which was left for {before.timeline}: stop it; or start"
                " every process anew, if it is the one that counts"
            )
        self._doubt()

    def _doubt(self) -> None:
        """What was read before proves nothing any more (law 10), and readers wait until logs were entered to their ends."""
        self.unsettled = True
        self._connection += 1
        self._views.forget()

    async def _compare_slots(self, connection: Connection, known: Mark, epoch: int, sequence: int) -> None:
        """A database that was put back by a copy of its rows says so nowhere but in the slots of who wrote to it, and in what
        this process knew of all of them (law 10).
        """
        mine = {slot.number: slot for link in self._writers.all for slot in (link.slot, link.old) if slot is not None}
        rows = await connection.fetch("SELECT id, tag, count FROM writers WHERE id = ANY($1)", [*mine, *known.slots])
        there = {number: (tag, count) for number, tag, count in rows}
        why = laws.loss(known, epoch, sequence, there, "this process")
        for number, slot in sorted(mine.items()):
            tag, count = there.get(number, ("", -1) if number > sequence else (slot.tag, slot.commits))  # else pruned
            if tag != slot.tag or count < slot.commits:
                why = f"writer slot {number} is not where this process left it"
        if why:
            self._lose(why, epoch)
            self._slot_lost = True

    def _lose(self, why: str, epoch: int, only_timeline: bool = False) -> None:
        """What was read before may be of a history that is over (law 10). Whoever raises the epoch: readers of this process
        wait, and so it goes on looking.
        """
        self._why_lost, self._lost_in, self._new_timeline = why, epoch, only_timeline
        self._doubt()

    def _found_again(self) -> None:
        """A new epoch began: what was lost is known to all, and slots are numbered anew."""
        self._connection += 1
        self._why_lost, self._new_timeline, self._slot_lost = "", False, False
        for link in self._writers.all:
            link.old = None

    async def raise_epoch(self, marks: Sequence[Mark], why: str, found_in: int | None = None, asked: bool = False) -> int:
        epoch = await super().raise_epoch(marks, why, found_in, asked)
        if epoch:
            self._found_again()
        return epoch

    async def _in_epoch_raised(self, db: Transaction) -> None:
        """The history that the index is on now is the one that it knows."""
        assert isinstance(db, Writer)
        for name, value in zip(("system", "timeline"), db.history, strict=True):
            await db.change(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
            )

    def _doubted(self) -> bool:
        return self._new_timeline

    def _needs_walk(self, found: Found, marks: Sequence[Mark], asked: bool) -> bool:
        """Law 10: where only the timeline has changed, and nobody remembers more than is here, nothing need be looked for."""
        return not (asked and self._new_timeline) or any(found.loss(mark) for mark in (self.mark(), *marks))

    async def _in_find_by_key(self, db: Transaction) -> None:
        """The index is always there."""

    async def _in_find_by_key_no_more(self, db: Transaction) -> None:
        """It stays."""

    async def _in_stop_silent(self, db: Transaction) -> None:
        """Law 10: a process that died says nothing. Whoever is only slow finds its slot gone, and takes another."""
        before = self._world.clock.now() - limits.SLOT_SILENT_S
        await db.change(
            "UPDATE writers SET stopped = 1, round = (SELECT value FROM counters WHERE name = 'round')"
            " WHERE stopped = 0 AND used_at < ?",
            (before,),
        )

    async def rest(self) -> None:
        """Each writer slot says that it stopped; a later transaction says again that it goes on (law 10)."""
        async with contextlib.AsyncExitStack() as stack:
            links = []
            for _ in self._writers.all:
                links.append(link := await self._writers.take())
                stack.callback(self._writers.give, link)
            for link in links:
                if link.slot is not None or link.old is not None:
                    await self._repeat(link, lambda link: self._attempt(link, self._in_rest, ()), limits.INDEX_TRIES_MAX)

    # -- reading ---------------------------------------------------------------------------------------------------------

    async def _ask(self, call: Look[T], *args: Any) -> T:
        return await self._look(call, args, snapshot=False, complete=False)

    async def _read(self, call: Look[T], *args: Any) -> T:
        return await self._look(call, args, snapshot=True, complete=False)

    async def _show(self, call: Look[T], *args: Any) -> T:
        return await self._look(call, args, snapshot=True, complete=True)

    async def _show_one(self, call: Look[T], *args: Any) -> T:
        """Its rows say at once whether they may be shown; what finds none is asked again, in a snapshot."""
        stated, found = await self._look(self._stated, (call, *args), snapshot=False, complete=True)
        return found if stated else await self._look(call, args, snapshot=True, complete=True)

    async def _stated(self, db: Reading, call: Look[T], *args: Any) -> tuple[bool, T]:
        assert isinstance(db, Reader)
        stated = StatedReader(db.connection, self._aside)
        found = await call(stated, *args)
        if not stated.counters:
            return False, found
        self._check_complete(stated.counters)
        return True, found

    async def _in_now(self, db: Reading) -> float:
        return float((await db.one(f"SELECT {self._clock()}"))[0])

    def _clock(self) -> str:
        """The database's clock, as a statement has it, when its transaction began: a later one would take a lease for over
        before it is.
        """
        return _CLOCK

    async def _aside(self, call: Callable[..., T], *args: Any) -> T:
        return await self._lane.run(call, *args)

    async def _look(self, call: Look[T], args: tuple[Any, ...], snapshot: bool, complete: bool) -> T:
        """A read is asked again once if its connection turns out to be broken. Raises IndexTrouble."""
        link = await self._readers.take()
        try:
            for attempt in (1, 2):
                fresh = link.connection is None
                try:
                    return await self._look_over(link, call, args, snapshot, complete)
                except Broken as error:
                    self._break(link)
                    if attempt == 2 or fresh or isinstance(error.__cause__, _SLOW):
                        raise IndexTrouble(f"index: {error}") from error
                except BaseException as error:
                    given_up = not isinstance(error, Exception)  # perhaps in BEGIN, which was heard for all we know
                    if link.connection is not None and (given_up or link.connection.is_in_transaction()):
                        link.drop()
                    if isinstance(error, asyncpg.PostgresError):
                        raise IndexTrouble(f"index: {error}") from error
                    raise
            raise AssertionError("two attempts end in one of the ways above")
        finally:
            self._readers.give(link)

    async def _look_over(self, link: Link, call: Look[T], args: tuple[Any, ...], snapshot: bool, complete: bool) -> T:
        try:
            connection = await self._ready(link)
            if complete and self._why_lost:
                raise IndexLost(self._why_lost)
            db = Reader(connection, self._aside)
            if not snapshot:
                return await call(db, *args)
            await connection.execute(_SNAPSHOT)
            try:
                if complete:
                    await self._complete_there(connection)
                found = await call(db, *args)
            except (KeyError, IndexTrouble):  # an answer, over a connection that serves on
                await connection.execute("ROLLBACK")
                raise
            await connection.execute("ROLLBACK")
            return found
        except asyncpg.DataError as error:
            raise IndexTrouble(f"index: {error}") from error
        except OUT_OF_REACH as error:
            raise Broken(error) from error

    async def _complete_there(self, connection: Connection) -> None:
        """Raises IndexTrouble while a listing in this snapshot might be short (P7)."""
        self._check_complete(dict(await connection.fetch("SELECT name, value FROM counters")))

    def _check_complete(self, counters: dict[str, int]) -> None:
        """The same, by the counters of that snapshot."""
        self._note_counters(counters)
        if counters["catching_up"]:  # here, whatever another look has seen
            raise IndexTrouble("the index is catching up with the storage nodes")
        self._complete()

    def _note_counters(self, counters: dict[str, int]) -> None:
        """Of one epoch each wait ends once; of two looks neither need be the later one."""
        epoch, catching_up, numbering = counters["epoch"], bool(counters["catching_up"]), not counters["waiting"]
        if epoch > self._seen_in:
            self._seen_in, self.catching_up, self.numbering = epoch, catching_up, numbering
        elif epoch == self._seen_in:
            self.catching_up, self.numbering = self.catching_up and catching_up, self.numbering or numbering

    # -- changing --------------------------------------------------------------------------------------------------------

    async def _write(self, call: Change[T], *args: Any) -> T:
        """Runs `call` in one transaction, whoever waits for it. Raises IndexTrouble."""
        return await self._whoever_waits(self._change(call, args, limits.INDEX_TRIES_MAX))

    async def _write_counted(self, text: str, args: Sequence[Any]) -> bool:
        """Runs a `counted_text`, which may run again when it was done, whoever waits for it; True if it changed something.
        Raises IndexTrouble.
        """

        def attempt(link: Link) -> Awaitable[bool]:
            return self._attempt_counted(link, text, args)

        return await self._whoever_waits(self._over_a_link(attempt, limits.INDEX_TRIES_MAX))

    async def _whoever_waits(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._start(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if task.cancelled() and me is not None and not me.cancelling():
                raise IndexTrouble("the index was closed") from None
            raise

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """What has begun goes on, whoever is cancelled; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # who waited has seen it, or has gone: then what it was about is asked for again

    async def _change(self, call: Change[T], args: tuple[Any, ...], tries: int) -> T:
        """Raises IndexTrouble; `__cause__` is in `IN_THE_WAY` when others stood in the way each time."""
        return await self._over_a_link(lambda link: self._attempt(link, call, args), tries)

    async def _over_a_link(self, attempt: Callable[[Link], Awaitable[T]], tries: int) -> T:
        link = await self._writers.take()
        try:
            return await self._repeat(link, attempt, tries)
        finally:
            self._writers.give(link)

    async def _repeat(self, link: Link, attempt: Callable[[Link], Awaitable[T]], tries: int) -> T:
        """Runs it until it comes to an end. Who waits for a row as long as anybody does, waits few times; what it names that is
        new is made first, as a transaction of its own.
        """
        number = waited = made = 0
        new: Mapping[int, str] = {}
        try:
            while True:
                try:
                    if new:
                        await self._attempt(link, self._in_make_sets, (new,))
                        new = {}
                    return await attempt(link)
                except NewSets as error:
                    new, made = error.sets, made + 1
                    if made > limits.INDEX_TRIES_MAX:
                        raise IndexTrouble(f"index: {error}, again and again") from error
                except IN_THE_WAY as error:
                    number += 1
                    waited += isinstance(error, _LOCKED)
                    if number == tries or waited >= min(tries - 1, limits.INDEX_LOCK_TRIES):
                        raise IndexTrouble(f"index: {error}") from error
                except Broken as error:
                    number += 1
                    self._break(link)
                    if number == tries or isinstance(error.__cause__, _SLOW):
                        raise IndexTrouble(f"index: {error}") from error
        except self.SPOILT as error:
            raise IndexTrouble(f"index: {error}") from error

    async def _in_make_sets(self, db: Writer, sets: Mapping[int, str]) -> None:
        await db.placements.make(sets)

    async def _attempt(self, link: Link, call: Change[T], args: tuple[Any, ...]) -> T:
        """Runs it once. Raises Broken, what is in `IN_THE_WAY`, or what the body raises."""
        committing = False
        try:
            db = await self._ready_to_write(link, call == self._in_raise_epoch)
            connection = db.connection
            await connection.execute("BEGIN")
            try:
                result = await call(db, *args)
                if isinstance(result, Untouched):
                    await connection.execute("ROLLBACK")
                    self._ids.give_back(db.ids)
                    return result.value
                await self._raise_count(link, db)
                if db.stale:
                    db.found = await find(db)
                committing = True
                if (said := await connection.execute("COMMIT")) != "COMMIT":
                    raise Again(f"a statement of it had failed: {said}")
            except BaseException as error:
                broken = isinstance(error, OUT_OF_REACH) and not isinstance(error, asyncpg.DataError)
                if not isinstance(error, Exception):
                    self._break(link)  # cancelled: what became of the statement under way is not waited for
                elif not committing and not broken and not connection.is_closed():
                    await connection.execute("ROLLBACK")
                if not committing or not broken:
                    self._ids.give_back(db.ids)
                raise
        except asyncpg.DataError:
            raise
        except OUT_OF_REACH as error:
            if not committing:
                raise Broken(error) from error
            if not await self._was_committed(link):
                self._ids.give_back(db.ids)
                raise Again("the connection broke in COMMIT, and it did not happen") from error
        else:
            link.slot = db.slot
        self._committed(db)
        assert not isinstance(result, Untouched), "nothing of it was committed"
        return result

    async def _attempt_counted(self, link: Link, text: str, args: Sequence[Any]) -> bool:
        """Runs it once. If its connection breaks nobody knows whether it was done, nor asks: it runs again, behind a look at
        its slot, which may count one more (law 10). Raises Broken, or what is in `IN_THE_WAY`.
        """
        try:
            db = await self._ready_to_write(link)
            there, changed = await db.run_counted(text, args)
            if not there:
                await self._miss_slot(link, db.connection, db.slot)
        except asyncpg.DataError:
            raise
        except OUT_OF_REACH as error:
            raise Broken(error) from error
        except BaseException as error:
            if not isinstance(error, Exception):
                self._break(link)  # cancelled: what became of it is not waited for
            raise
        if changed:
            link.slot = db.slot
            self._committed(db)
        return changed

    async def _ready_to_write(self, link: Link, anew: bool = False) -> Writer:
        """A connection with a writer slot; `anew`: a new epoch begins, which needs none. Raises IndexTrouble, IndexLost."""
        await self._ready(link)
        if self._slot_lost and not anew:
            raise IndexLost(self._why_lost)
        if link.slot is None and not anew:
            await self._take_slot(link)
        return self._writer(link)

    def _writer(self, link: Link) -> Writer:
        assert link.connection is not None
        slot = link.slot or Slot(0, "", 0)
        now = self._world.clock.now()
        return Writer(link.connection, link.history, slot, self._tag, self._ids.take, now, self._aside, self._views)

    async def _raise_count(self, link: Link, db: Writer) -> None:
        """Law 10, last in each transaction."""
        before = db.slot
        if not await db.raise_count():
            await self._miss_slot(link, db.connection, before)

    async def _miss_slot(self, link: Link, connection: Connection, slot: Slot) -> NoReturn:
        """Law 10. A slot that is not where it was left: it was pruned, and another is taken; or commits were lost."""
        row = await connection.fetchrow("SELECT tag, count, stopped FROM writers WHERE id = $1", slot.number)
        epoch, sequence, *_ = await connection.fetchrow(_KNOWN) or (0, 0)
        link.slot = None
        if slot.number <= sequence if row is None else tuple(row) == (slot.tag, slot.commits, LEFT_OUT):
            raise Again("the writer slot was pruned, or is in no mark any more")
        self._lose_slot(slot, epoch)

    def _lose_slot(self, slot: Slot, epoch: int) -> NoReturn:
        self._lose(f"writer slot {slot.number} is not where this process left it", epoch)
        self._slot_lost = True
        raise IndexLost(self._why_lost)

    def _note_found(self, found: Found) -> None:
        """Others write too, and what was read first may be heard of last: nothing that is known goes back (law 10). What was
        read in an epoch that is over proves nothing in the next.
        """
        if 0 < self._known.epoch < found.mark.epoch:
            self._connection += 1
        self._known = laws.later(self._known, found.mark)
        self._note_counters(found.counters)

    def _committed(self, db: Writer) -> None:
        """What the transaction has found and done is known to be committed."""
        if db.found is not None:
            self._note_found(db.found)
        known, (number, tag, commits) = self._known, db.slot
        slots = {**known.slots, number: (tag, commits)}
        self._known = Mark(known.sequence, slots, known.epoch, max(known.uidvalidity, db.fresh), known.retired)

    # -- writer slots ----------------------------------------------------------------------------------------------------

    def _tag(self) -> str:
        return self._world.entropy.octets(8).hex()

    async def _take_slot(self, link: Link) -> bool | None:
        """A slot for a connection that has none, behind a look at the one before (law 10). True if that one counts a
        transaction more than was known: it was committed; None if it was pruned, or there was none. Raises IndexLost.
        """
        db, committed = self._writer(link), None
        await db.connection.execute("BEGIN")
        try:
            await db.lock_counters("sequence")
            if moved := (await db.one(schema.MOVED))[0]:  # who moves it away locks that counter too
                raise IndexTrouble(f"index: it {moved}")
            if link.old is not None:
                committed = await self._look_at_old(db, link.old)
            await db.new_slot()
            db.found = await find(db)
            await db.connection.execute("COMMIT")
        except IndexLost:
            await db.connection.execute("ROLLBACK")
            raise
        except BaseException:
            self._break(link)  # a transaction that failed is never left open for the next one
            raise
        link.slot, link.old = db.slot, None
        self._committed(db)
        return committed

    async def _look_at_old(self, db: Writer, old: Slot) -> bool | None:
        """Waits for what may still be on its way to a commit there: that holds the row. Then the slot is over."""
        row = await db.one("SELECT tag, count FROM writers WHERE id = ? FOR UPDATE", (old.number,))
        if row is None and old.number <= await db.counter("sequence"):
            return None
        if row is None or row[0] != old.tag or not old.commits <= row[1] <= old.commits + 1:
            self._lose_slot(old, await db.counter("epoch"))
        await db.change(  # one that is in no mark any more stays out of them
            "UPDATE writers SET stopped = 1, round = (SELECT value FROM counters WHERE name = 'round')"
            " WHERE id = ? AND stopped < ?",
            (old.number, LEFT_OUT),
        )
        return bool(row[1] > old.commits)

    async def _was_committed(self, link: Link) -> bool:
        """What became of a transaction whose connection broke in COMMIT, as its slot says (law 10). Raises IndexTrouble if that
        is not to be learned now.
        """
        self._break(link)
        try:
            await self._ready(link)
            committed = await self._take_slot(link)
        except (*OUT_OF_REACH, *IN_THE_WAY) as error:
            self._break(link)
            raise IndexTrouble(f"index: the connection broke in COMMIT, and its outcome is unknown: {error}") from error
        if committed is None:
            raise IndexTrouble("index: the connection broke in COMMIT, and its writer slot is gone")
        return committed

    def _mine(self) -> tuple[int, tuple[Slot, ...]]:
        return self._known.epoch, tuple(link.slot for link in self._writers.all if link.slot is not None)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._known.epoch

    def mark(self) -> Mark:
        """What this process knows to be committed (law 10)."""
        return self._known
