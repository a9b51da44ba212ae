"""Owns the storage node that keeps everything in dictionaries: the second implementation that keeps the contract honest.

It has a log with positions like a real one, made of segments that compaction empties; what it holds is durable as long as
the object lives. Tests use the hooks below to damage, hold, hang, fail or lose things, and to put an older disk back.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from powermail.base import limits
from powermail.base.errors import (
    CommitRefused,
    CopyDamaged,
    CopyMissing,
    MarkRefused,
    NodeReadOnly,
    NodeTrouble,
    OlderCheckpoint,
)
from powermail.storage.contract import (
    NO_RANK,
    START,
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
    Scanned,
    Stamp,
    Unread,
    Whole,
)
from powermail.storage.frames import Inflater, flaw_of

T = TypeVar("T")
_HEADER_OCTETS: Final = 48
_FIRST_OFFSET: Final = 128
_STEP_OCTETS: Final = 4096  # moved in one step of compaction


@dataclass(slots=True, eq=False)
class _Record:
    """One record of the log. A copy's chunks and its commit are one here."""

    kind: str  # copy, tombstone, other
    key: bytes
    place: Position
    room: int
    written_at: float
    origin: Origin = Origin.DELIVERY
    first: Position = START  # where this copy was first written
    stated_at: float = 0.0  # of a tombstone: the keeper's date
    commit: bytes = b""
    chunks: dict[int, Chunk] = field(default_factory=dict)


@dataclass(slots=True)
class Disk:
    """All that is durable: what `snapshot` copies and `put_back` brings back."""

    incarnation: str
    segments: dict[int, list[_Record]] = field(default_factory=dict)
    live: dict[bytes, _Record] = field(default_factory=dict)
    dead: dict[bytes, _Record] = field(default_factory=dict)
    checkpoints: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    ranks: dict[bytes, Rank] = field(default_factory=dict)
    mark: Mark = field(default_factory=Mark)
    boots: tuple[str, ...] = ()
    began: tuple[Position, ...] = ()
    birth: Position = START
    end: Position = START


@dataclass(slots=True)
class _Waiting:
    """A write that was asked for and not done yet."""

    call: str
    act: Callable[[], Any]
    answer: asyncio.Future[Any]


class MemoryNode:
    """Implements `StorageNode`.

    Hooks: `damage`, `hide`, `lose` (a copy), `doubt` (absence), `hold`, `hang`, `release`, `fail_next`, `fail`, `fill`,
    `miss` (the node), `restart`, `snapshot`, `put_back`, `initialise` (the disk), `calls` (what was asked).
    """

    def __init__(
        self,
        node: str,
        group: str,
        priority: int = 1,
        monotonic: Callable[[], float] | None = None,
        segment_octets: int = 8192,
    ) -> None:
        self._inflater = Inflater()
        self.id = node
        self.group = group
        self.priority = priority
        self.free_octets = 1 << 40
        self.deadline_s = limits.NODE_CALL_TIMEOUT_S
        self.calls: list[str] = []
        self._monotonic = monotonic or (lambda: asyncio.get_running_loop().time())
        self._segment_octets = segment_octets
        self._made = 0  # incarnations and boots, never the same again whatever disk is put back
        self._disk = Disk(self._fresh())
        self._state = NodeState.CLOSED
        self._reason = ""
        self._blocked = False
        self._boot = ""
        self._stamped_at = float("-inf")
        self._floor: Stamp | None = None
        self._open: dict[bytes, dict[int, Chunk]] = {}  # chunks without a commit
        self._bad: dict[bytes, None] = {}
        self._hidden: dict[bytes, None] = {}
        self._doubtful = False
        self._damaged = False
        self._planned: dict[str, deque[tuple[bool, Exception]]] = {}
        self._waiting: deque[_Waiting] = deque()
        self._held = False
        self._hung: asyncio.Event | None = None

    def _fresh(self) -> str:
        self._made += 1
        return f"{self.id}-{self._made:016x}"  # no two nodes have the same

    # -- hooks of tests -------------------------------------------------------------------------------------------

    def damage(self, key: bytes) -> None:
        """From now on this copy fails its check, as rot does on a disk."""
        self._bad[key] = None

    def lose(self, key: bytes) -> None:
        """The copy is gone and nothing in the log says why."""
        record = self._disk.live.pop(key)
        self._disk.segments[record.place.segment].remove(record)

    def hide(self, key: bytes, hidden: bool = True) -> None:
        """The record of a key cannot be read in the log, until it is shown again."""
        if hidden:
            self._hidden[key] = None
        else:
            self._hidden.pop(key, None)

    def doubt(self, doubtful: bool = True) -> None:
        """The log was found damaged: what is not here is unknown."""
        self._doubtful = self._damaged = doubtful

    def hold(self) -> None:
        """Writes wait from now on, until `release`; the node reads on."""
        self._held = True

    def hang(self) -> None:
        """Nothing ends from now on but by its deadline (law 14), until `release`."""
        self._held = True
        self._hung = self._hung or asyncio.Event()

    def release(self) -> None:
        """What was asked while the node held or hung is done now, also when nobody waits any more."""
        self._held = False
        if self._hung is not None:
            self._hung.set()
            self._hung = None
        self._work()

    def fail_next(self, call: str, done: bool = False, error: Exception | None = None, times: int = 1) -> None:
        """The next calls of that name raise; with `done` they have done what was asked, and only the answer is lost."""
        planned = self._planned.setdefault(call, deque())
        planned.extend([(done, error or NodeTrouble(f"node {self.id}: injected"))] * times)

    def fail(self, reason: str = "injected") -> None:
        """A write failed: reads only from now on (P18), until it is opened again."""
        self._set(NodeState.FAILED, reason)

    def fill(self, full: bool = True) -> None:
        """Under its reserve: reads and deletes only."""
        self._set(NodeState.FULL if full else NodeState.READ_WRITE, "less than the reserve free" if full else "")

    def miss(self) -> None:
        """Its directory is away, until it is opened again."""
        self._let_go()
        self._set(NodeState.MISSING, "missing")

    async def restart(self) -> None:
        """The process dies and starts anew: open streams, and writes that wait, are gone."""
        self._let_go()
        self._set(NodeState.CLOSED, "")
        await self.open()

    def snapshot(self) -> Disk:
        """The disk as it is, to be put back later."""
        return copy.deepcopy(self._disk)

    def put_back(self, disk: Disk) -> None:
        """An older disk of this node takes the place of the present one; while the node is not open (law 12)."""
        assert not self._boot, "a disk is swapped while nothing serves it"
        self._disk = copy.deepcopy(disk)

    def _let_go(self) -> None:
        self._boot = ""
        self._floor = None
        self._open.clear()
        self._held = False
        if self._hung is not None:
            self._hung.set()
            self._hung = None
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            _refuse(one.answer, NodeTrouble(f"node {self.id} went away"))

    def _set(self, state: NodeState, reason: str) -> None:
        self._state, self._reason = state, reason

    # -- life -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> NodeState:
        return self._state

    @property
    def incarnation(self) -> str:
        return self._disk.incarnation if self._boot else ""

    def stat(self) -> NodeStat:
        disk = self._disk
        octets = sum(record.room for records in disk.segments.values() for record in records)
        live = sum(record.room for record in disk.live.values())
        return NodeStat(
            state=self._state.value,
            reason=self._reason,
            free_octets=self.free_octets,
            total_octets=1 << 40,
            log_octets=octets,
            live_octets=live,
            segments=len(disk.segments),
            messages=len(disk.live),
            damaged=int(self._damaged),
            waiting_octets=0,
            probe_s=0.0,
            write_s=0.0,
        )

    def stamp(self) -> Stamp | None:
        if not self._boot or self._hung is not None:
            return None
        now = self._monotonic()
        if now <= self._stamped_at:  # no two moments are one, also while the clock stands still
            now = math.nextafter(self._stamped_at, math.inf)
        self._stamped_at = now
        return Stamp(self._boot, now)

    def stamp_age_s(self) -> float:
        return 0.0

    async def fresh_stamp(self) -> Stamp | None:
        await self._reading("fresh_stamp")
        return self.stamp()

    async def open(self) -> None:
        if self._boot:
            return
        if self._planned.get("open"):
            raise self._planned["open"].popleft()[1]
        disk = self._disk
        self._boot = self._fresh()
        disk.boots = (*disk.boots, self._boot)[-limits.BOOTS_MAX :]
        disk.began = (*disk.began, disk.end)[-limits.BOOTS_MAX :]
        self._write("other", b"", 24 * len(disk.boots))
        self._set(NodeState.BLOCKED if self._blocked else NodeState.READ_WRITE, "by the operator" if self._blocked else "")

    async def initialise(self) -> None:
        assert not self._boot, "a directory is made anew while nothing serves it"
        self._disk = Disk(self._fresh())
        self._bad.clear()
        self._hidden.clear()

    async def facts(self) -> NodeFacts:
        await self._reading("facts")
        disk = self._disk
        return NodeFacts(disk.incarnation, disk.end, disk.boots, disk.began, disk.birth, self._damaged, disk.mark)

    async def probe(self) -> None:
        await self._reading("probe")

    def block(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked and self._state in (NodeState.READ_WRITE, NodeState.FULL):
            self._set(NodeState.BLOCKED, "by the operator")
        elif not blocked and self._state is NodeState.BLOCKED:
            self._set(NodeState.READ_WRITE, "")

    async def close(self) -> None:
        if self._hung is None:
            self.release()
        self._let_go()
        self._set(NodeState.CLOSED, "")

    # -- the log --------------------------------------------------------------------------------------------------

    def _write(self, kind: str, key: bytes, octets: int) -> _Record:
        disk = self._disk
        room = (_HEADER_OCTETS + octets + 7) & -8
        segment, offset = disk.end
        if not segment or offset + room > self._segment_octets:
            segment, offset = segment + 1, _FIRST_OFFSET
        place = Position(segment, offset)
        record = _Record(kind, key, place, room, self._monotonic(), first=place)
        disk.segments.setdefault(segment, []).append(record)
        disk.end = Position(segment, offset + room)
        return record

    def _records(self, after: Position) -> Iterator[_Record]:
        for segment in sorted(self._disk.segments):
            for record in self._disk.segments[segment] if segment >= after.segment else ():
                if record.place >= after:
                    yield record

    def _counts(self, record: _Record) -> bool:
        return record is self._disk.live.get(record.key) or record is self._disk.dead.get(record.key)

    # -- waiting, failing, hanging --------------------------------------------------------------------------------

    def _opened(self) -> None:
        if not self._boot:
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self._reason}")

    async def _reading(self, call: str) -> None:
        self.calls.append(call)
        self._opened()
        if self._planned.get(call):
            raise self._planned[call].popleft()[1]
        if self._hung is not None:
            try:
                async with asyncio.timeout(self.deadline_s):
                    await self._hung.wait()
            except TimeoutError as error:
                raise NodeTrouble(f"node {self.id} does not answer") from error
            self._opened()

    def _submit(self, call: str, act: Callable[[], T]) -> asyncio.Future[T]:
        """Writes are done in the order in which they were asked for."""
        self.calls.append(call)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        if not self._boot:
            answer.set_exception(NodeTrouble(f"node {self.id} is {self._state.value}: {self._reason}"))
            return answer
        self._waiting.append(_Waiting(call, act, answer))
        if self._held:
            late = NodeTrouble(f"node {self.id} does not answer: the outcome is unknown")
            timer = loop.call_later(self.deadline_s, _refuse, answer, late)
            answer.add_done_callback(lambda _: timer.cancel())
        else:
            self._work()
        return answer

    def _work(self) -> None:
        while self._waiting and not self._held:
            one = self._waiting.popleft()
            done, error = True, None
            if self._planned.get(one.call):
                done, error = self._planned[one.call].popleft()
            try:
                result = one.act() if done else None
            except (NodeTrouble, CopyMissing, CopyDamaged) as refused:
                error = refused
            if error is not None:
                _refuse(one.answer, error)
            elif not one.answer.done():
                one.answer.set_result(result)

    # -- copies ---------------------------------------------------------------------------------------------------

    def _taking(self) -> None:
        if self._state is not NodeState.READ_WRITE:
            raise NodeReadOnly(f"node {self.id} takes no new mail: it is {self._state.value}")

    def _writing(self) -> None:
        if self._state is NodeState.FAILED:
            raise NodeReadOnly(f"node {self.id} failed: {self._reason}")

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        if flaw := _flaw_of(chunks):
            raise NodeTrouble(f"node {self.id}: {flaw}")
        await self._submit("append", lambda: self._append(key, chunks))

    def _append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        self._taking()
        if key in self._disk.dead:
            raise NodeTrouble("a tombstone stands here")
        if key not in self._disk.live:
            have = self._open.setdefault(key, {})
            for chunk in chunks:
                have.setdefault(chunk.number, chunk)

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        late = self._late(stamp) or _flaw_of(chunks)  # law 2: judged when it is asked for
        return self._submit("commit", lambda: self._commit(key, chunks, commit, count, origin, late))

    def _late(self, stamp: Stamp | None) -> str:
        """Why a commit with this stamp is refused, or "" (law 2)."""
        if stamp is None or not self._boot:
            return ""
        if stamp.boot != self._boot:
            return "its stamp is of another boot"
        if self._monotonic() - stamp.at > limits.COMMIT_WINDOW_S:
            return "its stamp is too old"
        if self._floor is not None and stamp.at <= self._floor.at:
            return "its stamp is not newer than a round or walk that has begun"
        return ""

    def _commit(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, origin: Origin, late: str) -> Receipt:
        disk = self._disk
        why = late
        if self._state is not NodeState.READ_WRITE:
            why = why or f"it is {self._state.value}"
        record = disk.live.get(key)
        if key in disk.dead or (record is not None and (late or self._state is NodeState.FAILED)):
            raise NodeTrouble(f"node {self.id}: {why or 'a tombstone stands here'}")  # no definite refusal (law 5)
        if record is None:
            have = {**{chunk.number: chunk for chunk in chunks}, **self._open.get(key, {})}
            if not why and (len(have) != count or any(number not in have for number in range(count))):
                why = f"commit of {count} chunks, but {len(have)} are here"
            if why:
                raise CommitRefused(f"node {self.id}: {why}")
            self._open.pop(key, None)
            record = self._write("copy", key, len(commit) + sum(len(chunk.stored) for chunk in have.values()))
            record.origin, record.commit, record.chunks = origin, commit, have
            disk.live[key] = record
        return Receipt(self.id, disk.incarnation, record.first)

    async def cancel(self, key: bytes) -> None:
        await self._submit("cancel", lambda: self._open.pop(key, None))

    async def delete(self, keys: Sequence[bytes], mark: Mark, at: float, stamp: Stamp | None = None) -> End:
        late = self._late(stamp)
        end = await self._submit("delete", lambda: self._delete(keys, mark, at))
        if late:  # law 5: written, but it proves nothing about the time before
            raise NodeTrouble(f"node {self.id}: {late}")
        return end

    def _end(self) -> End:
        return End(self._disk.incarnation, self._disk.end)

    def _delete(self, keys: Sequence[bytes], mark: Mark, at: float) -> End:
        self._writing()
        self._remember(mark)  # law 10: with the act
        for key in keys:
            self._open.pop(key, None)
            self._disk.live.pop(key, None)
            record = self._disk.dead.get(key)
            if record is None:
                record = self._disk.dead[key] = self._write("tombstone", key, 8)
            record.stated_at = max(record.stated_at, at)
        return self._end()

    async def drop(self, copies: Sequence[tuple[bytes, Position]], mark: Mark) -> Dropped:
        return await self._submit("drop", lambda: self._drop(copies, mark))

    def _drop(self, copies: Sequence[tuple[bytes, Position]], mark: Mark) -> Dropped:
        self._writing()
        self._remember(mark)
        for key, position in copies:
            record = self._disk.live.get(key)
            if record is not None and record.first == position:  # law 1: this copy, wherever it lies now
                del self._disk.live[key]
                self._bad.pop(key, None)
                self._write("other", key, 16)
        live = tuple([key for key in dict.fromkeys(key for key, _ in copies) if key in self._disk.live])
        return Dropped(live, self._end())

    async def discard(self, key: bytes, mark: Mark) -> Held:
        return await self._submit("discard", lambda: self._discard(key, mark))

    def _discard(self, key: bytes, mark: Mark) -> Held:
        self._writing()
        record = self._disk.live.get(key)
        if record is not None and key in self._bad:
            self._drop([(key, record.first)], mark)
        if key in self._disk.dead:
            return Held.DEAD
        return Held.LIVE if key in self._disk.live else Held.ABSENT

    # -- reading --------------------------------------------------------------------------------------------------

    def _get(self, key: bytes) -> _Record:
        record = self._disk.live.get(key)
        if record is None:
            raise CopyMissing(f"no message {key.hex()} on node {self.id}")
        if key in self._bad or key in self._hidden:
            raise CopyDamaged(f"the copy of {key.hex()} is bad")
        return record

    async def read_commit(self, key: bytes) -> bytes:
        await self._reading("read_commit")
        return self._get(key).commit

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        await self._reading("read_chunk")
        chunks = self._open[key] if key in self._open else self._get(key).chunks
        if number not in chunks:
            raise CopyMissing(f"no chunk {number} of {key.hex()} on node {self.id}")
        return chunks[number]

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        await self._reading("read_small")
        found: list[Whole | None] = []
        left = limits.READ_SMALL_ALL_OCTETS_MAX
        for key in keys:
            whole = None
            with suppress(CopyMissing, CopyDamaged):
                record = self._get(key)
                octets = len(record.commit) + sum(chunk.octets for chunk in record.chunks.values())
                if record.room <= limits.READ_SMALL_OCTETS_MAX and octets <= left:
                    whole = Whole(record.commit, [self._inflater.octets(record.chunks[n]) for n in sorted(record.chunks)])
                    left -= octets
            found.append(whole)
        return found

    async def has(self, keys: Sequence[bytes]) -> list[Held]:
        await self._reading("has")
        absent = Held.UNKNOWN if self._doubtful else Held.ABSENT
        disk = self._disk
        return [Held.LIVE if key in disk.live else Held.DEAD if key in disk.dead else absent for key in keys]

    async def verify(self, key: bytes) -> Position:
        await self._reading("verify")
        return self._get(key).first

    # -- keeping --------------------------------------------------------------------------------------------------

    async def fence(self, stamp: Stamp) -> Position:
        if stamp.boot == self._boot and (self._floor is None or self._floor.at < stamp.at):
            self._floor = stamp  # laws 9, 11: at once; then behind all that passed the check before
        return await self._submit("fence", lambda: self._disk.end)

    async def scan(self, after: Position, limit: int, age_s: float) -> Scan:
        await self._reading("scan")
        disk = self._disk
        before = self._monotonic() - age_s
        items: list[Scanned] = []
        unread: list[Unread] = []
        following = after
        for record in self._records(after):
            if len(items) >= limit or (age_s > 0 and record.written_at > before):
                return Scan(disk.incarnation, items, following, disk.end, unread)
            following = Position(record.place.segment, record.place.offset + record.room)
            if record.key in self._hidden:
                unread.append(Unread(record.place, record.room))
            elif self._counts(record):
                items.append(_scanned(record))
        return Scan(disk.incarnation, items, max(following, disk.end), disk.end, unread)

    async def reread(self, unread: Unread) -> Scan | None:
        await self._reading("reread")
        disk = self._disk
        start = unread.position
        if start.segment not in disk.segments:
            return None
        end = Position(start.segment, start.offset + unread.octets)
        inside = [record for record in disk.segments[start.segment] if start <= record.place < end or record.place == start]
        left = [Unread(record.place, record.room) for record in inside if record.key in self._hidden]
        items = [_scanned(record) for record in inside if self._counts(record) and record.key not in self._hidden]
        return Scan(disk.incarnation, items, end, disk.end, left)

    async def inventory(self, after: bytes, limit: int) -> list[Item]:
        await self._reading("inventory")
        disk = self._disk
        keys = sorted(key for key in (*disk.live, *disk.dead) if key > after)[:limit]
        found = []
        for key in keys:
            held = Held.LIVE if key in disk.live else Held.DEAD
            record = disk.live[key] if held is Held.LIVE else disk.dead[key]
            found.append(Item(key, held, record.first, record.origin))
        return found

    def _remember(self, mark: Mark) -> None:
        if why := self._disk.mark.refusal(mark):  # law 10
            raise MarkRefused(f"node {self.id}: {why}")
        merged = self._disk.mark.with_seen(mark)
        if merged != self._disk.mark:
            self._disk.mark = merged
            self._write("other", b"", 64)

    async def put_mark(self, mark: Mark) -> None:
        await self._submit("put_mark", lambda: self._put_mark(mark))

    def _put_mark(self, mark: Mark) -> None:
        self._writing()
        self._remember(mark)

    async def rebirth(self) -> Position:
        return await self._submit("rebirth", self._rebirth)

    def _rebirth(self) -> Position:
        self._writing()
        self._disk.incarnation = self._fresh()  # law 12
        self._disk.birth = self._disk.end
        self._write("other", b"", 24)
        return self._disk.birth

    async def lift_birth(self) -> None:
        await self._submit("lift_birth", self._lift_birth)

    def _lift_birth(self) -> None:
        self._writing()
        self._disk.birth = START

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes, mark: Mark, rank: Rank = NO_RANK) -> None:
        await self._submit("put_checkpoint", lambda: self._put_checkpoint(name, number, octets, mark, rank))

    def _put_checkpoint(self, name: bytes, number: int, octets: bytes, mark: Mark, rank: Rank) -> None:
        self._taking()
        self._remember(mark)
        if self._disk.ranks.get(name, NO_RANK) > rank:  # law 11
            raise OlderCheckpoint(f"node {self.id}: a newer checkpoint is here")
        self._write("other", name, len(octets))
        if not number:
            self._disk.checkpoints[name] = {}
            self._disk.ranks[name] = rank
        self._disk.checkpoints.setdefault(name, {})[number] = octets

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        await self._reading("checkpoints")
        kept = self._disk.checkpoints
        names = sorted(name for name in kept if name > after)[:limit]
        return [(name, number, octets) for name in names for number, octets in sorted(kept[name].items())]

    async def checkpoints_page(self, after: bytes, limit: int, skip: int) -> tuple[list[tuple[bytes, int, bytes]], int]:
        records = await self.checkpoints(after, limit)
        octets = 0
        for number, (_, _, record) in enumerate(records[skip:], skip):
            octets += len(record)
            if number > skip and octets > limits.NODE_PAGE_OCTETS:
                return records[skip:number], number
        return records[skip:], 0

    def _worth(self, below: Position) -> int:
        """The sealed segment whole behind `below` that holds most that no longer counts, 0 when none is worth it."""
        best, most = 0, 0
        for number, records in self._disk.segments.items():
            if number >= min(self._disk.end.segment, below.segment):
                continue
            dead = sum(record.room for record in records if not self._counts(record))
            if dead > most and dead >= limits.COMPACT_DEAD_FRACTION * sum(record.room for record in records):
                best, most = number, dead
        return best

    async def compactable(self, below: Position, at: float) -> list[bytes] | None:
        await self._reading("compactable")
        number = self._worth(below)
        if not number:
            return None
        records = self._disk.segments[number]
        return [r.key for r in records if r.kind == "tombstone" and self._counts(r) and r.stated_at < at]

    async def compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        return await self._submit("compact", lambda: self._compact(below, forgotten, mark))

    def _compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        self._writing()
        number = self._worth(below)
        if not number:
            return 0
        self._remember(mark)
        disk = self._disk
        elsewhere = {record.key for record in self._records(START) if record.kind == "copy" and record.place.segment != number}
        moved = 0
        for record in [record for record in disk.segments[number] if self._counts(record)]:
            if record.kind == "tombstone" and record.key in forgotten and record.key not in elsewhere:
                del disk.dead[record.key]  # law 9: its row is forgotten, and no dead record of its key is left
                continue
            if moved >= _STEP_OCTETS:
                return 0
            self._move(record)
            moved += record.room
        freed = sum(record.room for record in disk.segments.pop(number))
        return max(1, freed - moved)

    def _move(self, record: _Record) -> None:
        kept = self._disk.live if record.kind == "copy" else self._disk.dead
        fresh = self._write(record.kind, record.key, record.room - _HEADER_OCTETS)
        fresh.origin = Origin.MOVED
        fresh.first, fresh.stated_at = record.first, record.stated_at
        fresh.commit, fresh.chunks = record.commit, record.chunks
        kept[record.key] = fresh


def _flaw_of(chunks: Sequence[Chunk]) -> str:
    """Why chunks are not to be written; "" if they may be."""
    return next((flaw for chunk in chunks if (flaw := flaw_of(chunk))), "")


def _scanned(record: _Record) -> Scanned:
    return Scanned(record.key, record.first, record.origin if record.kind == "copy" else None)


def _refuse(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
