"""Owns bounces: the DSN is a message like any other, stored on R nodes before the failed recipient is forgotten."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import MessageUnreadable
from powermail.base.world import World
from powermail.cluster.fetch import Fetcher
from powermail.index.contract import Index, QueueRow
from powermail.mail.dsn import Failure, format_failure
from powermail.mail.header import header_of

Submit = Callable[[str, bytes], Awaitable[bool]]


class Bouncer:
    """Makes DSNs. `submit(address, octets)` delivers a message with the null reverse-path; False: try later."""

    def __init__(self, world: World, index: Index, fetcher: Fetcher, hostname: str, submit: Submit) -> None:
        self._world = world
        self._index = index
        self._fetcher = fetcher
        self._hostname = hostname
        self._submit = submit

    async def bounce(self, row: QueueRow, failures: list[Failure]) -> bool:
        """Tells the sender of `row`'s message. Never called for the null reverse-path."""
        world = self._world
        known = await self._index.message(row.key)
        nodes = known.nodes if known is not None else ()
        head = b""
        try:
            commit = await self._fetcher.commit(row.key, nodes)
            async for part in self._fetcher.chunks(row.key, nodes, commit):
                head = header_of(part[: limits.DSN_HEADER_OCTETS_MAX])
                break
        except MessageUnreadable:
            pass  # the sender is told all the same
        octets = format_failure(
            self._hostname,
            row.reverse_path,
            world.keys.next(),
            f"powermail-{world.entropy.octets(12).hex()}",
            utc(world.clock.now()),
            utc(row.created_at),
            row.envid,
            failures,
            head,
        )
        return await self._submit(row.reverse_path, octets)
