"""Owns a storage node on another machine: the contract of storage over the node protocol (docs/peer-protocol.md).

What `state`, `stat` and `stamp` say is what was last pushed or heard: nothing here waits for that. A call on a node that is
not connected is NodeTrouble at once; one whose connection is lost meanwhile has an unknown outcome, and is never a definite
refusal (law 5). The link is made again by itself, with growing pauses, until the node is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from powermail.base import limits
from powermail.base.errors import NodeTrouble, OperatorError
from powermail.base.log import Event
from powermail.base.world import World
from powermail.cluster import node_values as values
from powermail.cluster.node_link import NodeLink, Where
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
from powermail.wire import node_forms as forms
from powermail.wire.node_client import Answer
from powermail.wire.node_frames import NO_BODY, Pieces, pieces_of
from powermail.wire.node_verbs import VERBS

T = TypeVar("T")
_APPEND: Final = VERBS["APPEND"]
_encode: Final = forms.encode
_STATES: Final = {state.value: state for state in NodeState}
_SERVES: Final = (NodeState.READ_WRITE, NodeState.BLOCKED, NodeState.FULL)
_NO_FIGURES: Final = NodeStat("opening", "", 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)


_ChunkForm = tuple[int, int, int, int]  # a `forms.ChunkForm`, as it is made most cheaply


class Bodies:
    """What goes to R nodes is put together and summed up once: the last body is kept until another is asked for."""

    def __init__(self) -> None:
        self._record: bytes | None = None
        self._chunks: Sequence[Chunk] = ()
        self._forms: list[_ChunkForm] = []
        self._pieces: Pieces = NO_BODY
        self._octets = 0

    def of(self, chunks: Sequence[Chunk], record: bytes = b"") -> tuple[list[_ChunkForm], Pieces, int]:
        """Chunks without their octets, the body in pieces, and its octets."""
        if record is not self._record or not _same(chunks, self._chunks):
            if len(chunks) == 1:  # what nearly all are
                ((number, flags, stored, octets),) = chunks
                body = record + stored
                self._forms = [(number, flags, len(stored), octets)]
            else:
                body = b"".join([record, *[stored for _, _, stored, _ in chunks]])
                self._forms = [(number, flags, len(stored), octets) for number, flags, stored, octets in chunks]
            self._pieces, self._octets = pieces_of(body), len(body)
            self._record, self._chunks = record, chunks
        return self._forms, self._pieces, self._octets


def _same(some: Sequence[Chunk], others: Sequence[Chunk]) -> bool:
    """True for the same chunks, not for equal ones."""
    return some is others or (len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True)))


class RemoteNode:
    """A node over the network. Implements `StorageNode`."""

    def __init__(self, world: World, node: str, group: str, priority: int, where: Where, bodies: Bodies | None = None) -> None:
        """`bodies` is shared by the nodes of a process."""
        self.id = node
        self.group = group
        self.priority = priority
        self._world = world
        self._monotonic = world.clock.monotonic
        self._bodies = bodies or Bodies()
        self.where = where
        self._link = NodeLink(world, node, where, self._pushed, self._lost)
        self._state = NodeState.OPENING
        self._reason = "not connected yet"
        self._figures = _NO_FIGURES
        self._latest: forms.StatForm | None = None  # what this link was last told
        self._incarnation = ""
        self._shut = False
        self._connecting: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._switch = False  # the operator's, as it was last told to the node here; what counts is what the node says
        self._switching = 0  # settings of it that the node has not confirmed
        self._probe_s = 0.0  # how long the last probe took, seen from here

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> NodeState:
        state = self._state
        if self._switching and state in (NodeState.READ_WRITE, NodeState.BLOCKED):
            return NodeState.BLOCKED if self._switch else NodeState.READ_WRITE
        return state

    @property
    def incarnation(self) -> str:
        return self._incarnation

    @property
    def session(self) -> int:
        """Another one whenever it was connected anew: the process that serves it may be another since."""
        return self._link.session

    def stat(self) -> NodeStat:
        figures, write_s = self._figures, self._link.write_s()
        if write_s <= figures.write_s and self._probe_s <= figures.probe_s:
            return figures
        write_s, probe_s = max(figures.write_s, write_s), max(figures.probe_s, self._probe_s)
        return msgspec.structs.replace(figures, write_s=write_s, probe_s=probe_s)  # P20: slow is what is slow from here

    def stamp(self) -> Stamp | None:
        link = self._link
        if not link.up or self._monotonic() - link.stamp_at > limits.STAMP_AGE_MAX_S:
            return None  # law 2
        return link.stamp

    def stamp_age_s(self) -> float:
        return max(0.0, self._monotonic() - self._link.stamp_at)

    async def fresh_stamp(self) -> Stamp | None:
        return await self._link.hear()

    async def hear(self) -> None:
        """Asks for stamp and figures now, beside the pings that do so all the time. Raises NodeTrouble."""
        await self._link.hear()

    def cut(self) -> None:
        """Cuts the connections, as a pulled cable does."""
        self._link.cut("the cable was pulled")

    def _pushed(self, form: forms.StatForm) -> None:
        self._latest = form
        if self._link.up:  # before, nothing can be asked yet
            self._show(form)

    def _show(self, form: forms.StatForm) -> None:
        state = _STATES.get(form.state, NodeState.FAILED)  # a state of a newer version takes no mail of ours
        self._incarnation = form.incarnation
        self._figures = values.stat_of(form)
        self._set(state, form.reason)

    def _set(self, state: NodeState, reason: str) -> None:
        if state is self._state and reason == self._reason:
            return
        if self._state is not NodeState.OPENING and state is not NodeState.CLOSED:
            self._world.log.event(Event.NODE_STATE, node=self.id, state=state.value, reason=reason or None)
        self._state, self._reason = state, reason

    def _lost(self, why: str) -> None:
        self._world.counters.add("cluster.links_lost")
        self._away(NodeState.CLOSED if self._shut else NodeState.MISSING, why)
        self._wake.set()

    def _away(self, state: NodeState, why: str) -> None:
        self._incarnation, self._latest, self._probe_s = "", None, 0.0
        self._figures = msgspec.structs.replace(self._figures, state=state.value, reason=why)
        self._set(state, why)

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._connected()
        if self._state in _SERVES:
            return
        await self._ask("OPEN", within_s=limits.NODE_OPEN_TIMEOUT_S)
        await self.hear()
        if self._state in (NodeState.OPENING, NodeState.MISSING, NodeState.CLOSED):
            raise NodeTrouble(f"node {self.id} is {self._state.value}: {self._reason}")

    async def initialise(self) -> None:
        await self._connected()
        await self._ask("INITIALISE")

    async def _connected(self) -> None:
        """Connects, joined by whoever asks meanwhile. Raises OperatorError, NodeTrouble."""
        self._shut = False
        if self._link.up:
            return
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(), name=f"link to {self.id}")
            self._connecting.add_done_callback(_seen)
        connecting = self._connecting
        await asyncio.wait([connecting])
        if self._connecting is connecting:
            self._connecting = None
        if connecting.cancelled():
            raise NodeTrouble(f"node {self.id} was closed")
        connecting.result()

    async def _connect(self) -> None:
        said = self.where.fence
        try:
            await self._link.connect()
            if self.where.fence != said:  # a newer layout came meanwhile
                self.follow(self.where.fence)
            await self.hear()
            if self._latest is not None:  # told on this link, before anything could be asked
                self._show(self._latest)
        except (OperatorError, NodeTrouble) as error:
            if not self._shut:
                self._away(NodeState.MISSING, str(error))
            raise
        finally:
            if self._keeping is None and not self._shut:
                self._keeping = asyncio.get_running_loop().create_task(self._keep(), name=f"keeps the link to {self.id}")
        self._world.counters.add("cluster.links_made")

    async def _keep(self) -> None:
        """Makes the link again whenever it is lost, with growing pauses."""
        pause_s = limits.NODE_RECONNECT_FIRST_S
        while not self._shut:
            if self._link.up:
                pause_s = limits.NODE_RECONNECT_FIRST_S
                self._wake.clear()
                await self._wake.wait()
                continue
            await asyncio.sleep(self._world.entropy.uniform(pause_s / 2, pause_s))
            pause_s = min(limits.NODE_RECONNECT_MAX_S, pause_s * 2)
            try:
                await self._connected()
            except (OperatorError, NodeTrouble):
                continue  # it is in the state

    def block(self, blocked: bool) -> None:
        """Nothing of it is remembered here: others may set it too. Whoever admits the node anew says what the index says."""
        if not self._link.up:
            return
        self._switch = blocked
        self._switching += 1
        asked = self._link.ask(VERBS["BLOCK"], _encode(forms.Block(blocked)))
        asked.add_done_callback(self._switched)

    def _switched(self, asked: asyncio.Future[Any]) -> None:
        self._switching -= 1
        if not asked.cancelled() and (error := asked.exception()) is not None:
            self._world.log.event(Event.TROUBLE, node=self.id, error=f"it was not told to block or unblock: {error}")

    async def close(self) -> None:
        self._shut = True
        for task in (self._keeping, self._connecting):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._keeping = self._connecting = None
        self._link.end("this end was closed")
        self._away(NodeState.CLOSED, "")

    async def _ask(
        self, name: str, meta: Any = forms.NOTHING, body: bytes = b"", within_s: float = limits.NODE_CALL_TIMEOUT_S
    ) -> Answer:
        """The answer. Raises what the node raised, NodeTrouble."""
        pieces = pieces_of(body) if body else NO_BODY
        answer: Answer = await self._link.ask(VERBS[name], _encode(meta), pieces, len(body), within_s)
        return answer

    # -- copies ----------------------------------------------------------------------------------------------------

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        found, pieces, octets = self._bodies.of(chunks)
        await self._link.ask(_APPEND, _encode((key, found)), pieces, octets)  # `forms.Append`

    def commit(
        self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int, stamp: Stamp | None, origin: Origin
    ) -> Awaitable[Receipt]:
        found, pieces, octets = self._bodies.of(chunks, commit)
        boot, at = stamp if stamp is not None else ("", 0.0)
        meta = _encode((key, count, boot, at, origin, len(commit), found))  # `forms.Commit`
        return self._link.commit(meta, pieces, octets)

    async def cancel(self, key: bytes) -> None:
        await self._ask("CANCEL", forms.KeyForm(key))

    async def delete(self, keys: Sequence[bytes], mark: Mark, at: float, stamp: Stamp | None = None) -> End:
        octets, body = values.join_mark(mark, values.join_keys(dict.fromkeys(keys)))
        if stamp is None:
            answer = await self._ask("DELETE", forms.Delete(at, octets), body)
        else:
            answer = await self._ask("ABORT", forms.Abort(at, octets, values.stamp_form(stamp)), body)
        return End(answer.meta.incarnation, values.position_of(answer.meta))

    async def drop(self, copies: Sequence[tuple[bytes, Position]], mark: Mark) -> Dropped:
        octets, body = values.join_mark(mark, values.join_copies(copies))
        answer = await self._ask("DROP", forms.Marked(octets), body)
        live = tuple(_keys(self, answer.body))
        return Dropped(live, End(answer.meta.incarnation, values.position_of(answer.meta)))

    async def discard(self, key: bytes, mark: Mark) -> Held:
        octets, body = values.join_mark(mark)
        answer = await self._ask("DISCARD", forms.Discard(key, octets), body)
        return values.HELD[answer.meta.held]

    # -- reading ---------------------------------------------------------------------------------------------------

    async def read_commit(self, key: bytes) -> bytes:
        return (await self._ask("READ_COMMIT", forms.KeyForm(key))).body

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        answer = await self._ask("READ_CHUNK", forms.ReadChunk(key, number))
        try:
            (chunk,) = values.chunks_of([answer.meta], answer.body, 0)
        except (values.Malformed, values.Unsupported) as error:
            raise self._nonsense(error) from error
        return chunk

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        once = dict.fromkeys(keys)  # no key is named twice in one operation
        answer = await self._ask("READ_SMALL", body=values.join_keys(once))
        try:
            found = [values.whole_of(form) for form in forms.decode_wholes(answer.body)]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._nonsense(error) from error
        if len(found) != len(once):
            raise self._nonsense(f"{len(found)} messages for {len(once)} keys")
        return found if len(once) == len(keys) else _for_all(keys, once, found)

    async def has(self, keys: Sequence[bytes]) -> list[Held]:
        once = dict.fromkeys(keys)
        answer = await self._ask("HAS", body=values.join_keys(once))
        try:
            found = values.split_held(answer.body, len(once))
        except values.Malformed as error:
            raise self._nonsense(error) from error
        return found if len(once) == len(keys) else _for_all(keys, once, found)

    async def verify(self, key: bytes) -> Position:
        return values.position_of((await self._ask("VERIFY", forms.KeyForm(key))).meta)

    # -- keeping ---------------------------------------------------------------------------------------------------

    async def facts(self) -> NodeFacts:
        answer = await self._ask("END")
        try:
            return values.facts_of(forms.decode_facts(answer.body))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._nonsense(error) from error

    async def probe(self) -> None:
        began = self._monotonic()
        try:
            await self._ask("PROBE", within_s=limits.NODE_PROBE_TIMEOUT_S)
        finally:
            self._probe_s = self._monotonic() - began
            self._link.probed()

    async def fence(self, stamp: Stamp) -> Position:
        return values.position_of((await self._ask("FENCE", values.stamp_form(stamp))).meta)

    async def scan(self, after: Position, limit: int, age_s: float) -> Scan:
        limit = min(limit, limits.NODE_PAGE_ITEMS_MAX)
        return self._scan(await self._ask("SCAN", forms.ScanAsk(*after, limit, age_s)))

    async def reread(self, unread: Unread) -> Scan | None:
        answer = await self._ask("REREAD", forms.UnreadForm(*unread.position, unread.octets))
        return None if answer.meta.gone else self._scan(answer)

    def _scan(self, answer: Answer) -> Scan:
        try:
            return values.scan_of(answer.meta, answer.body)
        except (msgspec.DecodeError, ValueError) as error:
            raise self._nonsense(error) from error

    async def inventory(self, after: bytes, limit: int) -> list[Item]:
        answer = await self._ask("LIVE_KEYS", forms.Page(after, min(limit, limits.NODE_PAGE_ITEMS_MAX)))
        try:
            return values.items_of(answer.body)
        except (msgspec.DecodeError, ValueError) as error:
            raise self._nonsense(error) from error

    async def put_mark(self, mark: Mark) -> None:
        octets, body = values.join_mark(mark)
        await self._ask("MARK", forms.Marked(octets), body)

    async def rebirth(self) -> Position:
        answer = await self._ask("REBIRTH")
        self._incarnation = answer.meta.incarnation
        return values.position_of(answer.meta)

    async def lift_birth(self) -> None:
        await self._ask("LIFT_BIRTH")

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes, mark: Mark, rank: Rank = NO_RANK) -> None:
        mark_octets, body = values.join_mark(mark, octets)
        await self._ask("PUT_CHECKPOINT", forms.PutCheckpoint(name, number, mark_octets, *rank), body)

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        found: list[tuple[bytes, int, bytes]] = []
        while limit > 0:
            names, skip, page = min(limit, limits.NODE_PAGE_NAMES), 0, dict[bytes, None]()
            while True:
                part, following = await self.checkpoints_page(after, names, skip)
                found += part
                page.update(dict.fromkeys([name for name, _, _ in part]))
                if following <= skip:
                    break
                skip = following
            if len(page) < names:
                break
            limit -= len(page)
            after = found[-1][0]
        return found

    async def checkpoints_page(self, after: bytes, limit: int, skip: int) -> tuple[list[tuple[bytes, int, bytes]], int]:
        answer = await self._ask("CHECKPOINTS", forms.CheckpointsAsk(after, min(limit, limits.NODE_PAGE_NAMES), skip))
        try:
            part = [(form.name, form.number, form.octets) for form in forms.decode_checkpoints(answer.body)]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._nonsense(error) from error
        return part, answer.meta.following

    async def compactable(self, below: Position, at: float) -> list[bytes] | None:
        answer = await self._ask("COMPACTABLE", forms.Compactable(*below, at), within_s=limits.NODE_COMPACT_TIMEOUT_S)
        return _keys(self, answer.body) if answer.meta.worth else None

    async def compact(self, below: Position, forgotten: Sequence[bytes], mark: Mark) -> int:
        octets, body = values.join_mark(mark, values.join_keys(forgotten))
        answer = await self._ask("COMPACT", forms.Compact(*below, octets), body, limits.NODE_COMPACT_TIMEOUT_S)
        return int(answer.meta.octets)

    # -- membership: what the machine of the node obeys ------------------------------------------------------------

    async def layout(self) -> tuple[int, int, bytes]:
        """The newest layout that is known there: its version, the fence, and the layout as it is written down; 0 and nothing if
        there is none. Raises NodeTrouble.
        """
        answer = await self._ask("LAYOUT")
        return answer.meta.version, answer.meta.fence, answer.body

    async def set_layout(self, version: int, fence: int, layout: bytes) -> tuple[int, int, bytes]:
        """Tells of a layout. When it returns that is durable there, with the fence: who goes by an older layout is cut off and
        refused, and nothing of theirs is still to be written. What is known there then: the octets only of a newer one.

        Raises OperatorError for another layout of a version that is known there, NodeTrouble.
        """
        answer = await self._ask("SET_LAYOUT", forms.LayoutForm(version, fence), layout)
        return answer.meta.version, answer.meta.fence, answer.body

    def follow(self, version: int) -> None:
        """This process goes by that version of the layout from now on. Its machine is told, so that a fence cuts nobody off who
        does; one that cannot be told hears it in the next HELLO.
        """
        self.where.fence = version
        if self._link.up:
            self._link.ask(VERBS["FOLLOW"], _encode(forms.Follow(version))).add_done_callback(_seen)

    async def expel(self, ids: Sequence[str]) -> None:
        """Certificates of these ids, which are all that are known, admit nobody there any more; durable when it returns. Raises
        OperatorError, NodeTrouble.
        """
        for start in range(0, len(ids), limits.NODE_EXPEL_IDS_MAX):
            some = tuple(ids[start : start + limits.NODE_EXPEL_IDS_MAX])
            await self._ask("EXPEL", forms.Expel(some, start + len(some) < len(ids)))

    async def expelled(self) -> dict[str, tuple[str, ...]]:
        """Ids that are refused there, each with some who said so. Raises NodeTrouble, also where an older program serves it."""
        answer = await self._ask("EXPELLED")
        try:
            return {form.id: form.by for form in forms.decode_expelled(answer.body)}
        except (msgspec.DecodeError, ValueError) as error:
            raise self._nonsense(error) from error

    def _nonsense(self, why: object) -> NodeTrouble:
        """An answer that makes no sense: the node is not to be believed in this."""
        self._world.counters.add("cluster.nonsense")
        return NodeTrouble(f"node {self.id}: its answer makes no sense: {why}")


def _for_all(keys: Sequence[bytes], once: Iterable[bytes], found: Iterable[T]) -> list[T]:
    """What was said of each key, for keys of which some are asked for more than once."""
    said = dict(zip(once, found, strict=True))
    return [said[key] for key in keys]


def _keys(node: RemoteNode, body: bytes) -> list[bytes]:
    try:
        return values.split_keys(body)
    except values.Malformed as error:
        raise node._nonsense(error) from error


def _seen(task: asyncio.Future[Any]) -> None:
    """Whoever waits for it hears of its end; nobody need."""
    if not task.cancelled():
        task.exception()
