"""Owns a node served in this process: the store behind two lanes, group commit, health and states.

Appends that arrive while a batch is being written wait and form the next batch: one gathered write, one fdatasync.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from powermail.base import limits
from powermail.base.errors import CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.storage import record as rec
from powermail.storage.contract import Chunk, NodeStat, NodeState, Position, Scanned, Whole
from powermail.storage.identity import make_store
from powermail.storage.keyindex import KeyIndex
from powermail.storage.store import Operation, Options, SegmentStore

T = TypeVar("T")


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
        self._cluster = cluster
        self._options = options
        self._make_keys = make_keys
        self._write_lane = world.lane(f"{node}-write")
        self._read_lane = world.lane(f"{node}-read")
        self._store: SegmentStore | None = None
        self._closing: asyncio.Future[None] | None = None
        self._state = NodeState.OPENING
        self._blocked = False
        self._waiting: list[tuple[Operation, asyncio.Future[None] | None]] = []
        self._waiting_octets = 0
        self._room = asyncio.Event()
        self._room.set()
        self._busy = False
        self._free_octets = 0
        self._total_octets = 0
        self._probe_s = 0.0
        self._writing = False
        self._wrote_at = 0.0  # when the last write was handed to the lane
        self._write_s = 0.0

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens and recovers. Raises OperatorError or NodeTrouble with the reason; may be tried again."""
        if self._store is not None:
            return
        if self._closing is not None:
            await asyncio.wait([self._closing])
        world = self._world
        try:
            store = await self._write_lane.run(
                SegmentStore.open,
                world.disk,
                self.path,
                self._cluster,
                self.id,
                self._make_keys,
                self._options,
                world.clock.monotonic,
            )
        except OperatorError as error:
            self._set(NodeState.MISSING, str(error))
            raise
        except OSError as error:
            self._set(NodeState.MISSING, str(error))
            raise NodeTrouble(f"node {self.id}: {error}") from error
        self._store = store
        found = store.recovery
        if not found.clean or found.damaged:
            world.log.event(
                Event.NODE_DAMAGE if found.damaged else Event.NODE_RECOVERED,
                node=self.id,
                records=found.records,
                torn_octets=found.torn_octets,
                damaged=found.damaged,
                incomplete=found.incomplete,
                rebuilt=found.rebuilt or None,
            )
        await self._measure()
        self._set(NodeState.BLOCKED if self._blocked else NodeState.READ_WRITE, "")
        self._check_space()

    async def initialise(self) -> None:
        """Makes an empty directory this node's store, with a new incarnation. Raises OperatorError."""
        await self._write_lane.run(make_store, self._world.disk, self.path, self._cluster, self.id, self._world.entropy)

    async def close(self) -> None:
        while self._busy or self._waiting:
            await asyncio.sleep(0.001)
        store, self._store = self._store, None
        if store is not None:
            self._close_store(store)
        if self._closing is not None:
            await asyncio.wait([self._closing])
            error = self._closing.exception()
            if error is not None and not isinstance(error, FileNotFoundError):
                self._world.log.event(Event.TROUBLE, node=self.id, error=str(error))
        self._set(NodeState.CLOSED, "")
        self._write_lane.close()
        self._read_lane.close()

    def _set(self, state: NodeState, reason: str) -> None:
        if state is self._state and reason == self.reason:
            return
        if self._state is not NodeState.OPENING and state is not NodeState.CLOSED:
            self._world.log.event(Event.NODE_STATE, node=self.id, state=state.value, reason=reason or None)
        self._state, self.reason = state, reason

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
            live_octets=store.live() if store else 0,
            segments=store.segment_count() if store else 0,
            messages=store.messages() if store else 0,
            damaged=store.damaged if store else 0,
            waiting_octets=self._waiting_octets,
            probe_s=self._probe_s,
            write_s=max(self._write_s, self._world.clock.monotonic() - self._wrote_at if self._writing else 0.0),
        )

    def block(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked and self._state in (NodeState.READ_WRITE, NodeState.FULL):
            self._set(NodeState.BLOCKED, "by the operator")
        elif not blocked and self._state is NodeState.BLOCKED:
            self._set(NodeState.READ_WRITE, "")
            self._check_space()

    # -- health ----------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        store = self._opened()
        began = self._world.clock.monotonic()
        try:
            async with asyncio.timeout(limits.NODE_PROBE_TIMEOUT_S):
                await self._write_lane.run(store.probe)
                await self._measure()
        except TimeoutError as error:
            self._set(NodeState.FAILED, "a write took longer than 10 s")
            raise NodeTrouble(f"node {self.id} does not answer") from error
        except OSError as error:
            self._went_away(error)
            raise NodeTrouble(f"node {self.id}: {error}") from error
        self._probe_s = self._world.clock.monotonic() - began
        self._write_s = 0.0
        if self._state is NodeState.FAILED and not store.failed:
            self._set(NodeState.READ_WRITE, "")
        self._check_space()

    async def _measure(self) -> None:
        store = self._opened()
        self._free_octets = await self._write_lane.run(store.free_octets)
        self._total_octets = await self._write_lane.run(store.total_octets)

    def _check_space(self) -> None:
        reserve = self._options.reserve_octets
        store = self._store
        if store is None or self._state not in (NodeState.READ_WRITE, NodeState.FULL):
            return
        if self._state is NodeState.READ_WRITE and (store.full or self._free_octets < reserve):
            self._set(NodeState.FULL, store.full or f"less than {reserve} octets free")
        elif self._state is NodeState.FULL and self._free_octets > reserve * limits.NODE_RESUME_FACTOR:
            store.resume()
            self._set(NodeState.READ_WRITE, "")

    def _went_away(self, error: OSError) -> None:
        """The directory cannot be used: let go of it, so that it can be opened again when it is back."""
        if isinstance(error, FileNotFoundError):
            self._release(f"missing: {error.strerror}")
        else:
            self._set(NodeState.FAILED, str(error.strerror or error))

    def _release(self, reason: str) -> None:
        store, self._store = self._store, None
        self._set(NodeState.MISSING, reason)
        if store is not None:
            store.failed = store.failed or reason
            self._close_store(store)

    def _close_store(self, store: SegmentStore) -> None:
        """Closes it on the writing lane, behind the reads that have begun: nothing is closed under a reader's hands."""
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = closing

        def closed(result: asyncio.Future[None]) -> None:
            error = result.exception()
            if error is None:
                closing.set_result(None)
            else:
                closing.set_exception(error)
                closing.exception()  # seen: a directory that is gone cannot be settled

        def close(_: asyncio.Future[None]) -> None:
            self._write_lane.run(store.close).add_done_callback(closed)

        self._read_lane.run(_nothing).add_done_callback(close)

    def _opened(self) -> SegmentStore:
        if self._store is None:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self.reason}")
        return self._store

    # -- writing ---------------------------------------------------------------------------------------------------

    def _submit(self, operation: Operation, octets: int, answer: bool) -> asyncio.Future[None] | None:
        self._opened()
        future = asyncio.get_running_loop().create_future() if answer else None
        self._waiting.append((operation, future))
        self._waiting_octets += octets
        if self._waiting_octets > limits.APPEND_WAITING_OCTETS_MAX:
            self._room.clear()
        if not self._busy:
            self._busy = True  # behind what else is ready now, so that all of it goes into one write
            asyncio.get_running_loop().call_soon(self._write_next)
        return future

    def _write_next(self) -> None:
        store = self._store
        batch, self._waiting = self._waiting, []
        if store is None:
            _answer(batch, [NodeTrouble(f"node {self.id} is away")] * len(batch))
            self._waiting_octets = 0
            self._room.set()
            self._busy = False
            return
        self._busy = True
        self._writing, self._wrote_at = True, self._world.clock.monotonic()
        written = self._waiting_octets
        writable = self._state is NodeState.READ_WRITE
        done = self._write_lane.run(store.write, [operation for operation, _ in batch], writable)
        done.add_done_callback(lambda result: self._written(batch, written, store, result))

    def _written(
        self,
        batch: list[tuple[Operation, asyncio.Future[None] | None]],
        octets: int,
        store: SegmentStore,
        result: asyncio.Future[list[Exception | None]],
    ) -> None:
        self._busy = self._writing = False
        self._write_s = max(self._write_s, self._world.clock.monotonic() - self._wrote_at)
        self._waiting_octets -= octets
        self._room.set()
        error = result.exception()
        if error is not None:
            _answer(batch, [error] * len(batch))
            self._set(NodeState.FAILED, f"{type(error).__name__}: {error}")
            store.failed = store.failed or "internal error"
        else:
            _answer(batch, result.result())
        if store.failed and store is self._store:
            if store.failed.startswith("missing"):
                self._release(store.failed)
            else:
                self._set(NodeState.FAILED, store.failed)
        elif store.full:
            self._check_space()
        if self._waiting:
            self._write_next()
        elif self._store is store and not store.failed and store.due():
            self._settle(store)

    def _settle(self, store: SegmentStore) -> None:
        self._busy = True
        self._write_lane.run(store.settle).add_done_callback(lambda result: self._settled(store, result))

    def _settled(self, store: SegmentStore, result: asyncio.Future[bool]) -> None:
        self._busy = False
        error = result.exception()
        if error is not None:
            self._set(NodeState.FAILED, f"{type(error).__name__}: {error}")
            store.failed = store.failed or str(error)
        if self._waiting:
            self._write_next()
        elif error is None and result.result() and self._store is store:
            self._settle(store)

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        await self._room.wait()
        octets = sum(len(chunk.stored) for chunk in chunks)
        future = self._submit(Operation(rec.CHUNK, key, chunks), octets, answer=True)
        assert future is not None
        await future

    def commit(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int) -> Awaitable[None]:
        if self._room.is_set():
            return self._commit_now(key, chunks, commit, count)
        return self._commit_later(key, chunks, commit, count)

    def _commit_now(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int) -> asyncio.Future[None]:
        octets = len(commit)
        for chunk in chunks:
            octets += len(chunk.stored)
        future = self._submit(Operation(rec.COMMIT, key, chunks, commit, count), octets, answer=True)
        assert future is not None
        return future

    async def _commit_later(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int) -> None:
        await self._room.wait()
        await self._commit_now(key, chunks, commit, count)

    async def abort(self, key: bytes) -> None:
        future = self._submit(Operation(rec.ABORT, key), 0, answer=True)
        assert future is not None
        await future

    async def delete(self, keys: Sequence[bytes]) -> None:
        futures = [self._submit(Operation(rec.TOMBSTONE, key), 0, answer=True) for key in keys]
        for future in futures:
            assert future is not None
            await future

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes) -> None:
        future = self._submit(Operation(rec.CHECKPOINT, name, (), octets, number), len(octets), answer=True)
        assert future is not None
        await future

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _call(self, call: Callable[..., T], *args: Any) -> T:
        """What concerns the whole node: an error of the disk is the node's trouble."""
        try:
            return await self._read_lane.run(call, *args)
        except OSError as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        """What concerns one copy: an error of the disk is that copy's, unless the disk is away."""
        try:
            return await self._read_lane.run(call, *args)
        except FileNotFoundError as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error
        except OSError as error:
            raise CopyDamaged(f"node {self.id}: {error}") from error

    async def read_commit(self, key: bytes) -> bytes:
        return await self._read(self._opened().read_commit, key)

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        return await self._read(self._opened().read_chunk, key, number)

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        return await self._call(self._opened().read_small, keys)

    async def has(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._call(self._opened().has, keys)

    async def deleted(self, keys: Sequence[bytes]) -> list[bool]:
        return await self._call(self._opened().deleted, keys)

    async def verify(self, key: bytes) -> None:
        await self._read(self._opened().verify, key)

    async def discard(self, key: bytes) -> None:
        await self._write_lane.run(self._opened().discard, key)

    async def scan(self, after: Position, limit: int, age_s: float, moved: bool) -> tuple[list[Scanned], Position]:
        return await self._call(self._opened().scan, after, limit, age_s, moved)

    async def live_keys(self, after: bytes, limit: int) -> list[bytes]:
        return await self._call(self._opened().live_keys, after, limit)

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        return await self._call(self._opened().checkpoints, after, limit)

    async def end(self) -> Position:
        return self._opened().end()

    # -- keeping ---------------------------------------------------------------------------------------------------

    async def new_incarnation(self) -> str:
        store = self._opened()
        fresh = self._world.entropy.octets(8).hex()
        try:
            await self._write_lane.run(store.new_incarnation, fresh)
        except OSError as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error
        return fresh

    async def forget_tombstones(self, keys: Sequence[bytes]) -> None:
        await self._write_lane.run(self._opened().forget_tombstones, keys)

    async def compact(self, below: Position) -> int:
        store = self._opened()
        try:
            freed = await self._write_lane.run(store.compact, below)
        except (OSError, CopyMissing) as error:
            raise NodeTrouble(f"node {self.id}: {error}") from error
        if freed:
            self._world.log.event(Event.COMPACTED, node=self.id, freed_octets=freed)
        return freed


def _answer(batch: list[tuple[Operation, asyncio.Future[None] | None]], outcomes: Sequence[BaseException | None]) -> None:
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if future is None or future.done():
            continue
        if outcome is None:
            future.set_result(None)
        elif isinstance(outcome, NodeTrouble):
            # One object may answer many waiters; each gets its own, so that tracebacks do not grow together.
            future.set_exception(type(outcome)(*outcome.args))
        else:
            future.set_exception(NodeReadOnly(f"{type(outcome).__name__}: {outcome}"))


def _nothing() -> None:
    """What a lane runs when only its turn matters."""
