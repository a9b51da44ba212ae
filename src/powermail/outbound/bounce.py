"""Owns bounces: the DSN is a message like any other, stored on R nodes before the failed recipient is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import MessageUnreadable
from powermail.base.world import World
from powermail.index.contract import QueueRow
from powermail.mail.dsn import Failure, format_failure
from powermail.mail.header import header_of
from powermail.message.opener import Opener

Submit = Callable[[str, bytes, str], Awaitable[bool]]


class Bouncer:
    """Makes DSNs. `submit(address, octets, work)` delivers a message with the null reverse-path, at most one for the same
    work; False: try later.
    """

    def __init__(self, world: World, opener: Opener, hostname: str, submit: Submit) -> None:
        self._world = world
        self._opener = opener
        self._hostname = hostname
        self._submit = submit

    async def bounce(self, row: QueueRow, failures: list[Failure]) -> bool:
        """Tells the sender of `row`'s message. Never called for the null reverse-path."""
        world = self._world
        head = b""
        try:
            message = await self._opener.open(row.key)
            head = header_of((await message.first())[: limits.DSN_HEADER_OCTETS_MAX])
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
        told = hashlib.sha256(repr(sorted(failure.destination for failure in failures)).encode()).hexdigest()
        return await self._submit(row.reverse_path, octets, f"bounce of {row.key.hex()} for {told}")
