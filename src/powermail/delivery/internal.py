"""Owns mail that we send ourselves: the null reverse-path, the same transaction as anybody's."""

from __future__ import annotations

from powermail.base.errors import OutcomeUnknown, Trouble
from powermail.delivery.srs import Rewriter, SrsError
from powermail.delivery.transaction import DeliveryService, Sender
from powermail.mail.address import AddressError, parse


class Postmaster:
    """Delivers our own messages."""

    def __init__(self, service: DeliveryService, rewriter: Rewriter) -> None:
        self._service = service
        self._rewriter = rewriter

    async def submit(self, to: str, octets: bytes) -> bool:
        """Delivers to a mailbox of ours, or by the queue. False if it must be tried again later."""
        service = self._service
        recipients = service.recipients(len(octets))
        try:
            address = parse(to)
        except AddressError:
            return True  # nobody can be told
        if self._rewriter.is_ours(address):
            try:
                address = parse(self._rewriter.reverse(address, service.world.clock.now()))
            except (SrsError, AddressError):
                return True
        status = await recipients.add_return(address)
        if not status.positive:
            return not status.temporary
        sender = Sender("localhost", service.hostname, "local", "", "", len(octets), "8BITMIME", not octets.isascii(), "", "")
        try:
            transaction = service.begin(sender, recipients)
            await transaction.write(octets)
            status = await transaction.finish()
        except (Trouble, OutcomeUnknown):
            return False
        return status.positive
