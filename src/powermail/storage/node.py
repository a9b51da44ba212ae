"""Owns a node served in this process: the store behind two lanes, group commit, the window of law 2, health and states.

Appends that arrive while a batch is being written wait and form the next batch: one gathered write, one fdatasync.
Whatever goes wrong here is this node's state, with its reason, and nobody else's (law 14): each call has its deadline, and
the reading lane does not wait for the writing one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.storage.contract import (
    NO_RANK,
    Chunk,
    Dropped,
    End,
    Held,
    Item,
    Mark,
    NodeFacts,
    NodeStat,
    NodeState,
    Origin,
    Position,
    Rank,
    Receipt,
    Scan,
    Stamp,
    Unread,
    Whole,
)
from powermail.storage.frames import flaw_of
from powermail.storage.identity import make_store
from powermail.storage.log import record as rec
from powermail.storage.log.keys import BROKEN, KeyIndex
from powermail.storage.log.store import Options, SegmentStore
from powermail.storage.log.write import CANCEL, FENCE, REFUSE, Operation, Outcome
from powermail.storage.turns import Overdue, Turns

T = TypeVar("T")
_Waiting = tuple[Operation, "asyncio.Future[Any] | None"]
_COMMIT: Final = rec.COMMIT
_DELIVERY: Final = Origin.DELIVERY
_NO_MOMENT: Final = float("-inf")


class LocalNode:
    """A storage node on a local disk. Implements `StorageNode`."""

    def __init__(
        self,
        world: World,
        cluster: str,
        node: str,
        path: str,
        group: str,
        priority: int,
        options: Options,
        make_keys: Callable[[str, bytes], KeyIndex],
    ) -> None:
        self.id = node
        self.group = group
        self.priority = priority
        self.path = path
        self.reason = ""
        self._world = world
        self._monotonic = world.clock.monotonic
        self._cluster = cluster
        self._options = options
        self._make_keys = make_keys
        self._writes = Turns(world.lane(f"{node}-write"), f"node {node}: a write", self._monotonic)
        self._reads = Turns(world.lane(f"{node}-read"), f"node {node}: a read", self._monotonic)
        self._store: SegmentStore | None = None
        self._opening: asyncio.Future[SegmentStore] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._probing: tuple[SegmentStore, asyncio.Future[tuple[int, int]], asyncio.Future[None]] | None = None
        self._state = NodeState.OPENING
        self._trouble = ""  # why it is FAILED until a probe succeeds
        self._hung = False  # writes are not even queued
        self._blocked = False
        self._scarce = False  # under its reserve, and not yet well above it again
        self._remade = False  # it was let go of once, to have its key index on the disk again
        self._boot = ""  # the opening whose record is durable; "" while there is none
        self._stamped_at = _NO_MOMENT
        self._floor = _NO_MOMENT  # commits with an older stamp are refused (law 2)
        self._waiting: list[_Waiting] = []
        self._waiting_octets = 0
        self._room = asyncio.Event()
        self._room.set()
        self._busy = False
        self._compacting = asyncio.Lock()
        self._freed_octets = 0
        self._free_octets = 0
        self._total_octets = 0
        self._probe_s = 0.0
        self._writing = False
        self._wrote_at = 0.0  # when the last write was handed to the lane
        self._write_s = 0.0
        self._took = world.counters.timing("node.write", node)

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._store is not None:
            return
        if self._closing is not None and not self._closing.done():
            await asyncio.wait([self._closing], timeout=limits.NODE_CALL_TIMEOUT_S)
            if not self._closing.done():
                raise NodeTrouble(f"node {self.id} still hangs: {self.reason}")
        world = self._world
        if self._opening is None:
            self._opening = self._writes.lane.run(
                SegmentStore.open,
                world.disk,
                self.path,
                self._cluster,
                self.id,
                self._make_keys,
                self._options,
                self._monotonic,
                world.entropy.octets(8),
            )
            self._opening.add_done_callback(_seen)
        opening = self._opening
        # Who gives up waiting leaves the opening to whoever asks next.
        await asyncio.wait([opening], timeout=limits.NODE_OPEN_TIMEOUT_S)
        if not opening.done():
            self._set(NodeState.MISSING, "opening it takes too long")
            raise NodeTrouble(f"node {self.id}: opening it takes too long")
        if self._opening is opening:
            self._opening = None
            self._opened_as(opening)
        if self._store is None:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}")

    def _opened_as(self, opening: asyncio.Future[SegmentStore]) -> None:
        """Takes over what opening gave. Raises what it raised."""
        error = opening.exception()
        if error is not None:
            self._set(NodeState.MISSING, str(error))
            if isinstance(error, OperatorError):
                raise error
            if not isinstance(error, OSError):
                self._world.log.event(Event.BUG, node=self.id, error=f"{type(error).__name__}: {error}")
            raise NodeTrouble(f"node {self.id}: {error}") from error
        store = self._store = opening.result()
        self._trouble, self._hung, self._floor = "", False, _NO_MOMENT
        self._free_octets, self._total_octets = store.opened_with
        found = store.recovery
        if not found.clean or found.damaged:
            self._world.log.event(
                Event.NODE_DAMAGE if found.damaged else Event.NODE_RECOVERED,
                node=self.id,
                records=found.records,
                torn_octets=found.torn_octets,
                damaged=found.damaged,
                incomplete=found.incomplete,
                rebuilt=found.rebuilt or None,
            )
        if store.makeshift:
            self._world.log.event(Event.TROUBLE, node=self.id, error=f"key index in memory: {store.makeshift}")
        else:
            self._remade = False
        self._judge()

    async def initialise(self) -> None:
        try:
            await self._writes.run(make_store, self._world.disk, self.path, self._cluster, self.id, self._world.entropy)
        except PermissionError as error:
            raise OperatorError(
                f"node {self.id}: {error.filename or self.path} may not be written: give all of it back to the owner of the "
                "data directory: `chown -R OWNER` and `chmod -R u+rwX`; nothing was replaced"
            ) from error
        except OSError as error:
            raise OperatorError(f"node {self.id}: {self.path}: {error}") from error

    async def close(self) -> None:
        deadline = self._monotonic() + limits.NODE_CLOSE_WAIT_S
        if self._opening is not None:
            await asyncio.wait([self._opening], timeout=limits.NODE_CLOSE_WAIT_S)
            opening, self._opening = self._opening, None
            if not opening.done():
                opening.add_done_callback(self._close_late)
            elif opening.exception() is None:
                self._store = opening.result()
        while (self._busy or self._waiting) and self._monotonic() < deadline:
            await asyncio.sleep(0.001)
        store, self._store = self._store, None
        if store is not None:
            self._close_store(store)
        if self._closing is not None:
            await asyncio.wait([self._closing], timeout=max(0.001, deadline - self._monotonic()))
            error = self._closing.exception() if self._closing.done() else NodeTrouble("it hangs, and was left as it is")
            if error is not None and not isinstance(error, FileNotFoundError):
                self._world.log.event(Event.TROUBLE, node=self.id, error=str(error))
        self._set(NodeState.CLOSED, "")
        self._writes.lane.close()
        self._reads.lane.close()

    def _close_late(self, opening: asyncio.Future[SegmentStore]) -> None:
        """An opening that nobody waited for any more gives the directory back."""
        if opening.cancelled() or opening.exception() is not None:
            return
        lane = self._world.lane(f"{self.id}-late")  # the node's own are closed by now

        def closed(done: asyncio.Future[None]) -> None:
            _seen(done)
            lane.close()

        lane.run(opening.result().close).add_done_callback(closed)

    def abandon(self) -> None:
        """Lets go of the files as they are: the process was killed (simulator)."""
        store, self._store = self._store, None
        if self._opening is not None and self._opening.done() and self._opening.exception() is None:
            store = self._opening.result()
        if store is not None:
            store.abandon()
        self._waiting = []
        self._writes.abandon()
        self._reads.abandon()

    def look(self, keys: Sequence[bytes]) -> list[Held] | None:
        """What it holds, at once and without its lanes, for a checker (simulator); None while it is not open."""
        return self._store.reader.has(keys) if self._store is not None else None

    def tombstones(self) -> list[bytes]:
        """Keys of all its tombstones, in the same way."""
        store, found, after = self._store, list[bytes](), b""
        while store is not None and (page := store.reader.inventory(after, 1000)):
            found += [item.key for item in page if item.held is Held.DEAD]
            after = page[-1].key
        return found

    def _set(self, state: NodeState, reason: str) -> None:
        if self._store is None:
            self._boot = ""
        if state is self._state and reason == self.reason:
            return
        if self._state is not NodeState.OPENING and state is not NodeState.CLOSED:
            self._world.log.event(Event.NODE_STATE, node=self.id, state=state.value, reason=reason or None)
        self._state, self.reason = state, reason

    def _judge(self) -> None:
        """Sets the state by what is known now."""
        store = self._store
        if store is None:
            return
        self._boot = store.boot
        reserve = self._options.reserve_octets
        if store.full or self._free_octets < reserve:
            self._scarce = True
        elif self._free_octets > reserve * limits.NODE_RESUME_FACTOR:
            self._scarce = False
        if store.failed or self._trouble:
            self._set(NodeState.FAILED, store.failed or self._trouble)
        elif store.unready and not store.full:
            self._set(NodeState.FAILED, store.unready)
        elif self._blocked:
            self._set(NodeState.BLOCKED, "by the operator")
        elif self._scarce or not store.boot:
            self._set(NodeState.FULL, store.full or f"less than {reserve} octets free")
        else:
            self._set(NodeState.READ_WRITE, "")

    @property
    def state(self) -> NodeState:
        return self._state

    @property
    def incarnation(self) -> str:
        return self._store.identity.incarnation if self._store is not None else ""

    def stat(self) -> NodeStat:
        store = self._store
        return NodeStat(
            state=self._state.value,
            reason=self.reason,
            free_octets=self._free_octets,
            total_octets=self._total_octets,
            log_octets=store.log_octets() if store else 0,
            live_octets=store.live_octets() if store else 0,
            segments=store.segment_count() if store else 0,
            messages=store.messages() if store else 0,
            damaged=store.damaged() if store else 0,
            waiting_octets=self._waiting_octets,
            probe_s=self._probe_s,
            write_s=max(self._write_s, self._monotonic() - self._wrote_at if self._writing else 0.0),
        )

    def stamp(self) -> Stamp | None:
        if not self._boot:
            return None
        now = self._monotonic()
        if now <= self._stamped_at:  # no two moments are one: what a walk names is newer than all that were given before
            now = math.nextafter(self._stamped_at, math.inf)
        self._stamped_at = now
        return Stamp(self._boot, now)

    def stamp_age_s(self) -> float:
        return 0.0

    async def fresh_stamp(self) -> Stamp | None:
        return self.stamp()

    async def facts(self) -> NodeFacts:
        return self._opened().facts()

    def block(self, blocked: bool) -> None:
        self._blocked = blocked
        self._judge()

    # -- health ----------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        store = self._opened()
        began = self._monotonic()
        if self._probing is None or self._probing[0] is not store:
            self._probing = (store, self._writes.lane.run(store.probe), self._reads.lane.run(_nothing))
            for future in self._probing[1:]:
                future.add_done_callback(_seen)
        # One that hangs is not joined by another behind it: it is the same one that is waited for.
        _, writing, reading = probing = self._probing
        both: list[asyncio.Future[Any]] = [writing, reading]
        await asyncio.wait(both, timeout=limits.NODE_PROBE_TIMEOUT_S)
        if not (writing.done() and reading.done()):
            what = "read" if writing.done() else "write"
            self._trouble = f"a {what} takes longer than {limits.NODE_PROBE_TIMEOUT_S:.0f} s"
            self._hung = not writing.done()
            self._judge()
            raise NodeTrouble(f"node {self.id} does not answer")
        if self._probing is probing:
            self._probing = None
        if self._store is not store:
            raise NodeTrouble(f"node {self.id} was let go of meanwhile")
        error = writing.exception()
        if error is not None:
            self._went_wrong(error)
            raise NodeTrouble(f"node {self.id}: {error}") from error
        self._free_octets, self._total_octets = writing.result()
        self._probe_s = self._monotonic() - began
        self._write_s = 0.0
        self._trouble, self._hung = "", False
        await self._resume(store)
        self._judge()

    async def _resume(self, store: SegmentStore) -> None:
        """The disk is well: what could not be written before may go on."""
        roomy = self._free_octets > self._options.reserve_octets * limits.NODE_RESUME_FACTOR
        if not store.failed and (not store.boot or (store.full and roomy)):
            try:
                await self._writes.run(store.resume)
            except OSError as error:
                self._trouble = str(error.strerror or error)
            except Overdue as error:
                self._overdue(error)
        if store.makeshift and store.boot and roomy and not self._remade and self._store is store:
            self._remade = True
            self._release("opened anew, to have its key index on the disk")

    def _went_wrong(self, error: BaseException) -> None:
        """What an error of the whole node means for its state."""
        if isinstance(error, FileNotFoundError):  # let go of it, so that it can be opened again when it is back
            self._release(f"missing: {error.strerror}")
        elif isinstance(error, BROKEN):  # opened again, it makes a new one
            if self._store is not None:
                self._store.spoilt = True
            self._release(f"key index: {error}")
        elif isinstance(error, OSError):
            self._trouble = str(error.strerror or error)
            self._judge()
        elif isinstance(error, Overdue):
            self._overdue(error)
        elif not isinstance(error, NodeTrouble) and self._store is not None:
            self._world.log.event(Event.BUG, node=self.id, error=f"{type(error).__name__}: {error}")
            self._store.fail(f"{type(error).__name__}: {error}")
            self._judge()

    def _overdue(self, error: Overdue) -> None:
        self._trouble, self._hung = str(error), True
        self._judge()

    def _release(self, reason: str) -> None:
        store, self._store = self._store, None
        self._set(NodeState.MISSING, reason)
        if store is not None:
            store.fail(reason)
            self._close_store(store)

    def _close_store(self, store: SegmentStore) -> None:
        """Closes it on the writing lane, behind the reads that have begun: nothing is closed under a reader's hands."""
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        closing.add_done_callback(_seen)  # a directory that is gone cannot be settled
        self._closing = closing

        def closed(result: asyncio.Future[None]) -> None:
            error = result.exception()
            if error is None:
                closing.set_result(None)
            else:
                closing.set_exception(error)

        def close(_: asyncio.Future[None]) -> None:
            self._writes.lane.run(store.close).add_done_callback(closed)

        self._reads.lane.run(_nothing).add_done_callback(close)

    def _opened(self) -> SegmentStore:
        if self._store is None:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}")
        return self._store

    # -- writing ---------------------------------------------------------------------------------------------------

    def _submit(self, operation: Operation, octets: int, answer: bool) -> asyncio.Future[Any] | None:
        if self._store is None or self._hung:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}")
        loop = asyncio.get_running_loop()
        future = loop.create_future() if answer else None
        self._waiting.append((operation, future))
        self._waiting_octets += octets
        if self._waiting_octets > limits.APPEND_WAITING_OCTETS_MAX:
            self._room.clear()
        if not self._busy:
            self._busy = True  # behind what else is ready now, so that all of it goes into one write
            loop.call_soon(self._write_next)
        return future

    async def _ask(self, operations: Iterable[Operation], octets: int = 0) -> Any:
        """Operations that follow each other in the log; the answer of the last. Nothing comes between them."""
        *before, last = operations
        for operation in before:
            self._submit(operation, 0, answer=False)
        future = self._submit(last, octets, answer=True)
        assert future is not None
        return await future

    def _write_next(self) -> None:
        store = self._store
        batch, self._waiting = self._waiting, []
        if store is None or self._hung:
            self._refuse(batch, NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}"))
            self._waiting_octets = 0
            self._room.set()
            self._busy = False
            return
        self._busy = True
        self._writing, self._wrote_at = True, self._monotonic()
        written = self._waiting_octets
        writable = self._state is NodeState.READ_WRITE
        done = self._writes.run(store.write, [operation for operation, _ in batch], writable)
        done.add_done_callback(lambda result: self._written(batch, written, store, result))

    def _written(self, batch: list[_Waiting], octets: int, store: SegmentStore, result: asyncio.Future[list[Outcome]]) -> None:
        self._busy = self._writing = False
        took_s = self._monotonic() - self._wrote_at
        self._took.observe(took_s)
        self._write_s = max(self._write_s, took_s)
        self._waiting_octets -= octets
        self._room.set()
        error = result.exception()
        if error is not None:
            self._refuse(batch, error)
            if store is self._store:
                self._went_wrong(error)
        else:
            self._answer(batch, result.result(), store.identity.incarnation)
        if store is self._store and (store.failed or store.full):
            if store.failed.startswith("missing"):
                self._release(store.failed)
            else:
                self._judge()
        if self._waiting:
            self._write_next()
        elif self._store is store and not store.failed and not self._hung and store.due():
            self._settle(store)

    def _answer(self, batch: list[_Waiting], outcomes: Sequence[Outcome], incarnation: str) -> None:
        node = self.id
        for (operation, future), outcome in zip(batch, outcomes, strict=True):
            if future is None or future.done():
                continue
            if outcome.__class__ is Position:
                future.set_result(Receipt(node, incarnation, outcome) if operation[0] == _COMMIT else outcome)
            elif isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _refuse(self, batch: list[_Waiting], error: BaseException) -> None:
        """None of it is known to be done, nor not to be."""
        text = str(error) if isinstance(error, NodeTrouble) else f"node {self.id}: {type(error).__name__}: {error}"
        for _, future in batch:
            if future is not None and not future.done():
                future.set_exception(NodeTrouble(text))  # one each, so that tracebacks do not grow together

    def _settle(self, store: SegmentStore) -> None:
        self._busy = True
        self._writes.run(store.settle).add_done_callback(lambda result: self._settled(store, result))

    def _settled(self, store: SegmentStore, result: asyncio.Future[bool]) -> None:
        self._busy = False
        error = result.exception()
        if error is not None and store is self._store:
            self._went_wrong(error) if not store.full else self._judge()
        if self._waiting:
            self._write_next()
        elif error is None and result.result() and self._store is store:
            self._settle(store)

    async def _roomy(self) -> None:
        """Waits until what waits to be written fits in memory."""
        try:
            async with asyncio.timeout(limits.NODE_CALL_TIMEOUT_S):
                await self._room.wait()
        except TimeoutError as error:
            raise NodeTrouble(f"node {self.id} is too slow") from error

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if flaw := flaw_of(chunk):
                self._world.counters.add("node.chunks_refused")
                raise NodeTrouble(f"node {self.id}: {flaw}")
        if not self._room.is_set():
            await self._roomy()
        await self._ask([Operation(rec.CHUNK, key, chunks)], sum(len(chunk.stored) for chunk in chunks))

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        if not self._room.is_set():
            return self._commit_later(key, chunks, commit, count, stamp, origin)
        why = self._too_late(stamp) if stamp is not None else ""
        if why:
            self._world.counters.add("law.2.refused")
        octets = len(commit)
        for chunk in chunks:
            octets += len(chunk[2])
            if (chunk[1] or len(chunk[2]) != chunk[3]) and (flaw := flaw_of(chunk)):
                self._world.counters.add("node.chunks_refused")
                why = why or flaw
        if why:  # law 5: whether that is definite is said behind all that was asked before
            operation = Operation(REFUSE, key, (), why.encode())
        else:
            operation = Operation(_COMMIT, key, chunks, commit, count, rec.FLAG_REPAIR if origin is not _DELIVERY else 0)
        try:
            future = self._submit(operation, octets, answer=True)
        except NodeTrouble as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        assert future is not None
        return future

    async def _commit_later(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Receipt:
        await self._roomy()
        return await self.commit(key, chunks, commit, count, stamp, origin)

    def _too_late(self, stamp: Stamp) -> str:
        """Why a commit is refused by its stamp; "" if it is not (law 2)."""
        boot, at = stamp
        if boot != self._boot and self._store is not None:
            return "the stamp is of another opening of this node"
        if self._monotonic() - at > limits.COMMIT_WINDOW_S:
            return "the stamp is too old"
        return "the stamp is not newer than one that a walk has named" if at <= self._floor else ""

    async def cancel(self, key: bytes) -> None:
        await self._ask([Operation(CANCEL, key)])

    async def delete(self, keys: Sequence[bytes], mark: Mark, at: float, stamp: Stamp | None = None) -> End:
        late = self._too_late(stamp) if stamp is not None else ""
        date, incarnation = rec.pack_date(at), self.incarnation
        tombstones = [Operation(rec.TOMBSTONE, key, (), date, mark=mark) for key in keys]
        end = await self._ask([Operation(rec.MARK, mark=mark), *tombstones])
        if late:  # law 5: written, but it proves nothing about the time before
            self._world.counters.add("law.5.unconfirmed")
            raise NodeTrouble(f"node {self.id}: {late}")
        return End(incarnation, end)

    async def drop(self, copies: Sequence[tuple[bytes, Position]], mark: Mark) -> Dropped:
        drops = [Operation(rec.DROP, key, (), rec.pack_position(position), mark=mark) for key, position in copies]
        incarnation = self.incarnation
        end = await self._ask([Operation(rec.MARK, mark=mark), *drops])
        keys = list(dict.fromkeys(key for key, _ in copies))
        held = await self.has(keys)
        return Dropped(tuple([key for key, state in zip(keys, held, strict=True) if state is Held.LIVE]), End(incarnation, end))

    async def discard(self, key: bytes, mark: Mark) -> Held:
        held, position = await self._call(self._opened().reader.held, key)
        if held is not Held.LIVE:
            return Held.DEAD if held is Held.DEAD else Held.ABSENT
        try:
            await self.verify(key)
        except CopyMissing:
            return Held.ABSENT
        except CopyDamaged:
            await self.drop([(key, position)], mark)
            return Held.ABSENT
        return Held.LIVE

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes, mark: Mark, rank: Rank = NO_RANK) -> None:
        if not self._room.is_set():
            await self._roomy()
        checkpoint = Operation(rec.CHECKPOINT, name, (), rec.pack_rank(rank) + octets, number, mark=mark)
        await self._ask([Operation(rec.MARK, mark=mark), checkpoint], len(octets))

    async def put_mark(self, mark: Mark) -> None:
        await self._ask([Operation(rec.MARK, mark=mark)])

    async def fence(self, stamp: Stamp) -> Position:
        if self._opened().boot == stamp.boot:
            self._floor = max(self._floor, stamp.at)  # from now on; commits of other openings are refused anyway
        end = await self._ask([Operation(FENCE)])
        assert isinstance(end, Position)
        return end

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        """What concerns the whole node: an error of the disk is the node's trouble."""
        store = self._store
        try:
            return await self._reads.run(call, *args)
        except OSError as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error
        except BROKEN as error:
            if store is self._store:
                self._went_wrong(error)
            raise NodeTrouble(f"node {self.id}: key index: {error}") from error

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        """What concerns one copy: an error of the disk is that copy's, unless the disk is away."""
        store = self._store
        try:
            return await self._reads.run(call, *args)
        except FileNotFoundError as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error
        except OSError as error:
            raise CopyDamaged(f"node {self.id}: {error}") from error
        except BROKEN as error:
            if store is self._store:
                self._went_wrong(error)
            raise NodeTrouble(f"node {self.id}: key index: {error}") from error

    async def read_commit(self, key: bytes) -> bytes:
        return await self._read(self._opened().reader.read_commit, key)

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        return await self._read(self._opened().reader.read_chunk, key, number)

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        return await self._call(self._opened().reader.read_small, keys)

    async def has(self, keys: Sequence[bytes]) -> list[Held]:
        return await self._call(self._opened().reader.has, keys)

    async def verify(self, key: bytes) -> Position:
        return await self._read(self._opened().reader.verify, key)

    async def inventory(self, after: bytes, limit: int) -> list[Item]:
        return await self._call(self._opened().reader.inventory, after, limit)

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        return await self._call(self._opened().reader.checkpoints, after, limit)

    async def checkpoints_page(self, after: bytes, limit: int, skip: int) -> tuple[list[tuple[bytes, int, bytes]], int]:
        return await self._call(self._opened().reader.checkpoints_page, after, limit, skip)

    async def scan(self, after: Position, limit: int, age_s: float) -> Scan:
        return await self._call(self._opened().scanner.scan, after, limit, age_s)

    async def reread(self, unread: Unread) -> Scan | None:
        store = self._opened()
        again = await self._call(store.scanner.look_again, unread)
        if again is None:
            return None
        if again.records or not again.bad:
            await self._change(store, store.admit, unread, again)
        return await self._call(store.scanner.shown_again, unread, again)

    # -- keeping ---------------------------------------------------------------------------------------------------

    async def _change(self, store: SegmentStore, call: Callable[..., T], *args: Any) -> T:
        """Something on the writing lane that is no batch."""
        if self._hung:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}")
        try:
            return await self._writes.run(call, *args)
        except (OSError, *BROKEN) as error:
            if store is self._store:
                self._went_wrong(error) if not store.full else self._judge()
            raise NodeTrouble(f"node {self.id}: {error}") from error
        except Overdue as error:
            self._overdue(error)
            raise

    async def rebirth(self) -> Position:
        store = self._opened()
        return await self._change(store, store.rebirth, self._world.entropy.octets(8).hex())

    async def lift_birth(self) -> None:
        store = self._opened()
        await self._change(store, store.lift_birth)

    async def compactable(self, below: Position, at: float) -> list[bytes] | None:
        async with self._compacting:
            looking = self._opened().compaction.looking(below, at)
            answer: list[bytes] | None = None
            deadline = self._monotonic() + limits.NODE_COMPACT_TIMEOUT_S
            while True:
                step = await self._call(next, looking, _END)
                if step is _END:
                    return answer
                answer = step
                if self._monotonic() > deadline:
                    return None  # it goes on with the next segments when it is asked again

    async def compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        async with self._compacting:
            store = self._opened()
            freed = await self._change(store, store.compaction.compact, below, forgotten, mark)
            self._freed_octets += freed
            if self._freed_octets and not store.compaction.busy():
                self._world.log.event(Event.COMPACTED, node=self.id, freed_octets=self._freed_octets)
                self._freed_octets = 0
            return freed


_END: Final = object()


def _seen(future: asyncio.Future[Any]) -> None:
    """Whoever wants to know what became of it asks; nobody need."""
    if not future.cancelled():
        future.exception()


def _nothing() -> None:
    """What a lane runs when only its turn matters."""
