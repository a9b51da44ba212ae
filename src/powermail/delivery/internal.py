"""Owns mail that we send ourselves: the null reverse-path, the same transaction as anybody's.

There is no connection to close. A delivery whose outcome is unknown is decided in the index before the same work is tried
again with a new key (law 5); until then its work is not done and not tried.
"""

from __future__ import annotations

from powermail.base import limits
from powermail.base.errors import OutcomeUnknown, Trouble
from powermail.base.log import Event
from powermail.delivery.srs import Rewriter, SrsError
from powermail.delivery.transaction import DeliveryService
from powermail.index.contract import Fate
from powermail.mail.address import Address, AddressError, parse
from powermail.mail.envelope import Envelope, Peer


class Postmaster:
    """Delivers our own messages."""

    def __init__(self, service: DeliveryService, rewriter: Rewriter) -> None:
        self._service = service
        self._rewriter = rewriter
        self._undecided: dict[str, tuple[bytes, tuple[str, ...]]] = {}  # work: its key, and who was asked to commit it

    async def submit(self, to: str, octets: bytes, work: str) -> bool:
        """Delivers to a mailbox of ours, or by the queue. False if it must be tried again later.

        `work` names what this message is for: however often it is tried, at most one of its messages is delivered.
        """
        if work in self._undecided:
            fate = await self._decide(work)
            if fate is not Fate.ABORTED:
                return fate is not None
        elif len(self._undecided) >= limits.INTERNAL_UNDECIDED_MAX:
            await self._decide(next(iter(self._undecided)))
            return False
        service = self._service
        recipients = service.recipients(len(octets))
        try:
            address = await self._address(to)
            to = address.text
            status = await recipients.add_return(address)
            status = await recipients.refusal(len(octets)) or status if status.positive else status
        except (SrsError, AddressError) as error:
            return self._dropped(to, work, f"nobody: {error}")
        except Trouble:
            return False
        if not status.positive:
            return not status.temporary and self._dropped(to, work, f"{status.code} {status.text}")
        envelope = Envelope(body="8BITMIME", smtputf8=not to.isascii())
        try:
            transaction = service.begin(Peer("localhost", service.hostname, "local"), envelope, recipients)
        except Trouble:
            return False
        try:
            await transaction.write(octets)
            status = await transaction.finish()
        except OutcomeUnknown:
            self._undecided[work] = transaction.key, transaction.replication.undecided
            return await self._decide(work) in (Fate.LIVE, Fate.DEAD)
        except Trouble:
            transaction.cancel()
            return False
        return status.positive

    async def _decide(self, work: str) -> Fate | None:
        """What became of an earlier message of this work; None while the index does not answer."""
        key, asked = self._undecided[work]
        fate = await self._service.abort(key, asked)
        if fate is not None:
            self._undecided.pop(work, None)
        return fate

    def _dropped(self, to: str, work: str, why: str) -> bool:
        """Nobody can be told; and nobody is told of that but the operator."""
        world = self._service.world
        world.counters.add("delivery.notices_dropped")
        world.log.event(Event.NOTICE_DROPPED, to=f"<{to}>", work=work, reason=why)
        return True

    async def _address(self, to: str) -> Address:
        """Where a bounce to this return address goes. Raises SrsError, AddressError, IndexTrouble."""
        address = parse(to)
        if self._rewriter.is_ours(address):
            return await self._rewriter.origin(address, self._service.world.clock.now())
        return address
