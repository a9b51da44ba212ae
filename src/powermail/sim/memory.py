"""Owns the storage node that keeps everything in dictionaries: the second implementation that keeps the contract honest."""

from __future__ import annotations

from collections.abc import Sequence

from powermail.base.errors import CopyDamaged, CopyMissing, NodeReadOnly, NodeTrouble
from powermail.storage.contract import START, Chunk, NodeStat, NodeState, Position, Scanned, Whole


class MemoryNode:
    """Implements `StorageNode`; durable as long as the object lives. `damage` makes a copy bad, as rot does on a disk."""

    def __init__(self, node: str, group: str, priority: int = 1) -> None:
        self.id = node
        self.group = group
        self.priority = priority
        self.incarnation = "1"
        self._state = NodeState.CLOSED
        self._open: dict[bytes, dict[int, Chunk]] = {}  # chunks without a commit
        self._live: dict[bytes, tuple[bytes, dict[int, Chunk]]] = {}
        self._dead: dict[bytes, bool] = {}  # True: a tombstone, False: an abort
        self._log: list[bytes] = []
        self._checkpoints: dict[bytes, dict[int, bytes]] = {}
        self._bad: dict[bytes, None] = {}

    def damage(self, key: bytes) -> None:
        """From now on this copy fails its check."""
        self._bad[key] = None

    # -- life -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> NodeState:
        return self._state

    def stat(self) -> NodeStat:
        octets = sum(len(c.stored) for _, chunks in self._live.values() for c in chunks.values())
        return NodeStat(self._state.value, "", 1 << 40, 1 << 40, octets, octets, 1, len(self._live), 0, 0, 0.0, 0.0)

    async def open(self) -> None:
        if self._state is NodeState.CLOSED:
            self._state = NodeState.READ_WRITE

    async def initialise(self) -> None:
        """There is nothing to make."""

    async def probe(self) -> None:
        self._opened()

    def block(self, blocked: bool) -> None:
        self._state = NodeState.BLOCKED if blocked else NodeState.READ_WRITE

    async def close(self) -> None:
        self._state = NodeState.CLOSED

    def _opened(self) -> None:
        if self._state is NodeState.CLOSED:
            raise NodeTrouble(f"node {self.id} is closed")

    def _writable(self) -> None:
        self._opened()
        if self._state is not NodeState.READ_WRITE:
            raise NodeReadOnly(f"node {self.id} takes no new mail")

    # -- writing --------------------------------------------------------------------------------------------------

    async def append(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        self._take(key, chunks)

    def _take(self, key: bytes, chunks: Sequence[Chunk]) -> dict[int, Chunk]:
        self._writable()
        if key in self._dead:
            raise NodeTrouble("this key was deleted or aborted here")
        if key in self._live:
            return self._live[key][1]
        have = self._open.setdefault(key, {})
        for chunk in chunks:
            have.setdefault(chunk.number, chunk)
        return have

    async def commit(self, key: bytes, chunks: Sequence[Chunk], commit: bytes, count: int) -> None:
        have = self._take(key, chunks)
        if key in self._live:
            return
        if len(have) != count:
            raise NodeTrouble(f"commit of {count} chunks, but {len(have)} are here")
        self._live[key] = commit, self._open.pop(key)
        self._log.append(key)

    async def abort(self, key: bytes) -> None:
        self._bury(key, False)

    async def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._bury(key, True)

    def _bury(self, key: bytes, tombstone: bool) -> None:
        self._opened()
        self._open.pop(key, None)
        self._live.pop(key, None)
        self._dead[key] = tombstone or self._dead.get(key, False)

    async def put_checkpoint(self, name: bytes, number: int, octets: bytes) -> None:
        self._writable()
        if not number:
            self._checkpoints[name] = {}
        self._checkpoints.setdefault(name, {})[number] = octets

    # -- reading --------------------------------------------------------------------------------------------------

    def _get(self, key: bytes) -> tuple[bytes, dict[int, Chunk]]:
        self._opened()
        if key not in self._live:
            raise CopyMissing(f"no message {key.hex()} on node {self.id}")
        if key in self._bad:
            raise CopyDamaged(f"the copy of {key.hex()} is bad")
        return self._live[key]

    async def read_commit(self, key: bytes) -> bytes:
        return self._get(key)[0]

    async def read_chunk(self, key: bytes, number: int) -> Chunk:
        self._opened()
        chunks = self._open[key] if key in self._open else self._get(key)[1]
        if number not in chunks:
            raise CopyMissing(f"no chunk {number} of {key.hex()} on node {self.id}")
        return chunks[number]

    async def read_small(self, keys: Sequence[bytes]) -> list[Whole | None]:
        self._opened()
        found: list[Whole | None] = []
        for key in keys:
            try:
                commit, chunks = self._get(key)
            except (CopyMissing, CopyDamaged):
                found.append(None)
            else:
                found.append(Whole(commit, [chunks[number] for number in sorted(chunks)]))
        return found

    async def has(self, keys: Sequence[bytes]) -> list[bool]:
        self._opened()
        return [key in self._live for key in keys]

    async def deleted(self, keys: Sequence[bytes]) -> list[bool]:
        self._opened()
        return [self._dead.get(key, False) for key in keys]

    async def verify(self, key: bytes) -> None:
        self._get(key)

    async def discard(self, key: bytes) -> None:
        self._opened()
        if key in self._bad:
            del self._bad[key]
            self._live.pop(key, None)

    async def scan(self, after: Position, limit: int, age_s: float, moved: bool) -> tuple[list[Scanned], Position]:
        self._opened()
        places = [(Position(1, number + 1), key) for number, key in enumerate(self._log)]
        found = [Scanned(key, place) for place, key in places if place > after and key in self._live][:limit]
        if len(found) == limit:
            return found, found[-1].position
        return found, max(after, await self.end())

    async def live_keys(self, after: bytes, limit: int) -> list[bytes]:
        self._opened()
        return sorted(key for key in self._live if key > after)[:limit]

    async def checkpoints(self, after: bytes, limit: int) -> list[tuple[bytes, int, bytes]]:
        self._opened()
        names = sorted(name for name in self._checkpoints if name > after)[:limit]
        return [(name, number, octets) for name in names for number, octets in sorted(self._checkpoints[name].items())]

    async def end(self) -> Position:
        return Position(1, len(self._log)) if self._log else START

    # -- keeping --------------------------------------------------------------------------------------------------

    async def new_incarnation(self) -> str:
        self.incarnation = str(int(self.incarnation) + 1)
        return self.incarnation

    async def forget_tombstones(self, keys: Sequence[bytes]) -> None:
        """They cost nothing here."""

    async def compact(self, below: Position) -> int:
        return 0
