"""Owns the order of repair: thin messages in the fewest groups first, and those in equally many by key.

A turn goes through those in no group that counts, then those in one, and so on below R. One that got a copy and is still thin
comes again among its new equals. Every few seconds the turn looks for others that are worse off by now than those it is at, as
when a second disk went, and goes back to them.

Danger: a turn that goes back meets once more what could not be helped, and the rest would wait for ever. So what could not be
helped is remembered, and tried once in a turn; when that is too much to remember, it goes back no more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from powermail.base import limits
from powermail.base.world import World
from powermail.index.contract import Index, MessageFacts

_LOOK_S = 5.0
_REMEMBERED_MAX = 10_000  # messages of 16 octets; a look passes them in some 160 questions


def spanned(message: MessageFacts, groups: Mapping[str, str]) -> int:
    """In how many groups its copies on the nodes in `groups` (node to group) lie."""
    return len({groups[node] for node in message.nodes if node in groups})


class Turn:
    """One turn. `met` says whether there was anything thin."""

    def __init__(self, world: World, index: Index) -> None:
        self._world = world
        self._index = index
        self._at = 0  # in how many groups those lie that were tried last
        self._after: dict[int, bytes] = {}  # by number of groups: behind which key it goes on
        self._joined = set[int]()  # numbers of groups to which some came that got a copy
        self._not_helped = set[bytes]()
        self._remembers_all = True
        self._look_at = world.clock.monotonic() + _LOOK_S
        self.met = False

    async def next(self, groups: Mapping[str, str], required: int) -> list[MessageFacts]:
        """The next of those whose copies on the nodes in `groups` span fewer than `required` groups, at most a batch; none: the
        turn is over. Raises IndexTrouble.
        """
        begin = self._at
        if self._remembers_all:
            self._after = {at: key for at, key in self._after.items() if at >= self._at and at not in self._joined}
            self._joined.clear()
            if self._world.clock.monotonic() >= self._look_at:
                self._look_at = self._world.clock.monotonic() + _LOOK_S
                begin = 0
        found: list[MessageFacts] = []
        for at in range(begin, required):
            found += await self._page(groups, at, limits.REPAIR_BATCH - len(found))
            if len(found) == limits.REPAIR_BATCH:
                break
        self.met = self.met or bool(found)
        return found

    def passed(self, messages: Sequence[MessageFacts], helped: Collection[bytes], groups: Mapping[str, str]) -> None:
        """These were tried, in the order in which they were given, and those got a copy in one more group."""
        for message in messages:
            self._at = spanned(message, groups)
            self._after[self._at] = message.key
            if message.key not in helped:
                self._remember(message.key)
            else:
                self._joined.add(self._at + 1)

    def _remember(self, key: bytes) -> None:
        if len(self._not_helped) < _REMEMBERED_MAX:
            self._not_helped.add(key)
        else:
            self._remembers_all = False

    async def _page(self, groups: Mapping[str, str], at: int, limit: int) -> list[MessageFacts]:
        """The next in that many groups that were not tried in vain."""
        page: list[MessageFacts] = []
        after = self._after.get(at, b"")
        while len(page) < limit:
            found = await self._index.under_copied(groups, at + 1, after, limits.REPAIR_BATCH, at)
            if not found:
                break
            page += [message for message in found if message.key not in self._not_helped]
            after = found[-1].key
        return page[:limit]
