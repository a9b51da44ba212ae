"""Owns opening a stored message by its key: look it up, read its commit record, then its octets from whichever copy is good.

A key that the index does not know as live is read wherever a copy can be found: who has it listed may still be shown it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from powermail.base.errors import IndexTrouble
from powermail.cluster.fetch import Fetcher
from powermail.cluster.packing import Small
from powermail.index.contract import Index, MessageFacts
from powermail.mail.envelope import Commit


class Message:
    """A stored message that was opened. `facts` is None if the index does not know it as live."""

    def __init__(self, fetcher: Fetcher, key: bytes, facts: MessageFacts | None, commit: Commit) -> None:
        self.key = key
        self.facts = facts
        self.commit = commit
        self._fetcher = fetcher
        self._nodes = facts.nodes if facts is not None else ()

    async def first(self) -> bytes:
        """The octets of its first chunk. Raises MessageUnreadable."""
        return await self._fetcher.chunk(self.key, self._nodes, self.commit, 0)

    def chunks(self) -> AsyncIterator[bytes]:
        """All octets, chunk by chunk. Raises MessageUnreadable, also in the middle."""
        return self._fetcher.chunks(self.key, self._nodes, self.commit)


class Opener:
    """Opens messages."""

    def __init__(self, index: Index, fetcher: Fetcher) -> None:
        self._index = index
        self._fetcher = fetcher

    async def open(self, key: bytes) -> Message:
        """A message by its key. Raises IndexTrouble, MessageUnreadable."""
        facts = await self._index.message(key)
        commit = await self._fetcher.commit(key, facts.nodes if facts is not None else ())
        return Message(self._fetcher, key, facts, commit)

    async def read(self, key: bytes) -> AsyncIterator[bytes]:
        """A message's octets, chunk by chunk. Raises IndexTrouble, MessageUnreadable."""
        message = await self.open(key)
        async for octets in message.chunks():
            yield octets

    async def places(self, keys: Sequence[bytes]) -> dict[bytes, tuple[str, ...]]:
        """The nodes believed to hold messages, many at once; empty while the index is in trouble."""
        try:
            return {message.key: message.nodes for message in await self._index.messages(keys)}
        except IndexTrouble:
            return {}

    async def read_small(self, keys: Sequence[bytes]) -> dict[bytes, Small]:
        """Small messages, many at once. What is left out is not small or in trouble: `open` says which."""
        return await self._fetcher.read_small(await self.places(keys))

    async def read_small_at(self, places: Mapping[bytes, tuple[str, ...]]) -> dict[bytes, Small]:
        """The same for who has asked for their `places` before."""
        return await self._fetcher.read_small(places)
