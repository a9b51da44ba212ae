"""Owns notices: a DSN is a message like any other, stored on R nodes before what it is about is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence

from powermail.base import limits
from powermail.base.clock import utc
from powermail.base.errors import MessageUnreadable, Trouble
from powermail.base.log import Event
from powermail.base.world import World
from powermail.mail.dsn import Action, Notice, Report, format_notice
from powermail.mail.envelope import Envelope
from powermail.mail.header import header_of
from powermail.message.opener import Message, Opener

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

    async def tell(self, key: bytes, envelope: Envelope, arrived_at: float, reports: Sequence[Report]) -> bool:
        """Tells the sender of a message what became of recipients, all by the same action. False: try later.

        Never called for the null reverse-path (RFC 5321 §4.5.5).
        """
        assert envelope.reverse_path and reports
        world = self._world
        action = reports[0].action
        # RFC 3461 §4.3: RET is about failures; other notices give the header.
        returned, whole = await self._returned(key, action is Action.FAILED and envelope.ret.upper() == "FULL")
        octets = format_notice(
            Notice(
                self._hostname,
                envelope.reverse_path,
                world.keys.next(),
                f"powermail-{world.entropy.octets(12).hex()}",
                utc(world.clock.now()),
                utc(arrived_at),
                envelope.envid,
                list(reports),
                returned,
                whole,
            )
        )
        whom = repr(sorted((report.recipient, report.orcpt, report.diagnostic) for report in reports))
        work = f"{action.value} {key.hex()} for {hashlib.sha256(whom.encode()).hexdigest()}"
        told = await self._submit(envelope.reverse_path, octets, work)
        if told:
            world.counters.add("outbound.notices")
            world.log.event(
                Event.NOTICE, key=key, to=f"<{envelope.reverse_path}>", action=action.value, recipients=len(reports)
            )
        return told

    async def _returned(self, key: bytes, whole: bool) -> tuple[bytes, bool]:
        """What goes back of the message, and whether that is all of it."""
        try:
            message = await self._opener.open(key)
            if whole and message.commit.octets <= limits.DSN_FULL_OCTETS_MAX:
                return await _all(message), True
            return header_of((await message.first())[: limits.DSN_HEADER_OCTETS_MAX]), False
        except (MessageUnreadable, Trouble):
            return b"", False  # the sender is told all the same


async def _all(message: Message) -> bytes:
    """The octets as they came: without our Return-Path, which is for final delivery (RFC 5321 §4.4)."""
    octets = b"".join([part async for part in message.chunks()])
    return octets[octets.index(b"\r\n") + 2 :] if octets.startswith(b"Return-Path:") else octets
