"""A whole way out, with nodes and an index in memory, and scripted hops at its end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from powermail.base.net import Network
from powermail.base.settings import OutboundSettings
from powermail.base.tasks import Tasks
from powermail.cluster.fetch import Fetcher
from powermail.delivery.internal import Postmaster
from powermail.delivery.srs import Rewriter
from powermail.index.contract import QueueRow
from powermail.mail.address import parse
from powermail.mail.envelope import Envelope, Peer
from powermail.message.opener import Opener
from powermail.outbound.bounce import Bouncer
from powermail.outbound.routing import Route
from powermail.outbound.schedule import Outbound
from tests.cluster.support import read_whole
from tests.delivery.support import ACCOUNT, Office
from tests.outbound.hop import ScriptedHop

SENDER = ACCOUNT.address
BODY = b"Subject: it\r\n\r\ntext\r\n"


class Routes:
    """Next hops by domain; the rest go to the first."""

    def __init__(self, routes: Mapping[str, Route | None]) -> None:
        self.routes = dict(routes)

    async def route(self, domain: str) -> Route | None:
        return self.routes.get(domain, next(iter(self.routes.values()), None))


class Rig:
    """`await Rig.open()`; then `queue`, `push`, and look."""

    office: Office
    hop: ScriptedHop
    outbound: Outbound
    route: Route

    @classmethod
    async def open(
        cls, hop: ScriptedHop | None = None, settings: OutboundSettings | None = None, net: Network | None = None
    ) -> Rig:
        """`net`: real sockets instead of the simulated network."""
        rig = cls()
        rig.office = office = await Office().open()
        if net is not None:
            office.world.net = net
        rig.hop = hop or ScriptedHop()
        await rig.hop.start(office.world.net)
        rig.route = Route("127.0.0.1", rig.hop.port)
        rig.settings = settings or OutboundSettings()
        rig.start()
        return rig

    settings: OutboundSettings

    def start(self) -> None:
        """A process that begins; what an earlier one had in memory is lost."""
        office = self.office
        opener = Opener(office.index, Fetcher(office.world, office.cluster, office.index.note_bad))
        self.postmaster = Postmaster(office.service, Rewriter("here.example", [b"key"]))
        bouncer = Bouncer(office.world, opener, "here.example", self.postmaster.submit)
        self.tasks = Tasks(office.world.log, office.bugs.append)
        self.outbound = Outbound(
            office.world, office.index, opener, bouncer, self.settings, "here.example", Routes({"": self.route}), self.tasks
        )

    async def queue(
        self,
        *to: str,
        sender: str = SENDER,
        body: bytes = BODY,
        notify: str = "",
        orcpt: str = "",
        ret: str = "",
        smtputf8: bool = False,
    ) -> bytes:
        """A message to addresses elsewhere; its key."""
        service = self.office.service
        recipients = service.recipients(len(body))
        for address in to:
            parsed = parse(address if "@" in address else f"{address}@far.example")
            assert (await recipients.add(parsed, notify, orcpt, ACCOUNT)).positive
        envelope = Envelope(sender, "8BITMIME", smtputf8, ret, "envelope-1" if notify else "")
        transaction = service.begin(Peer("[192.0.2.1]", "client", "ESMTP"), envelope, recipients)
        for start in range(0, len(body), 50_000):
            await transaction.write(body[start : start + 50_000])
        assert (await transaction.finish()).positive
        return transaction.key

    async def push(self) -> None:
        """Tries everything that is due, to its end."""
        while True:
            before = len(self.outbound._in_hand)
            rest_s = await self.outbound.step()
            if rest_s and not before:
                break
            await self.outbound.idle()

    async def hurry(self) -> None:
        """Everything is due now, and is tried."""
        await self.office.index.queue_set([], None, self.office.world.clock.now())
        await self.push()

    async def rows(self) -> dict[str, QueueRow]:
        """What waits, by local part."""
        return {row.destination.split("@")[0]: row for row in await self.office.index.queue_rows(0, 1000)}

    async def notices(self) -> list[bytes]:
        """The DSNs that came back."""
        fetcher = Fetcher(self.office.world, self.office.cluster, self.office.index.note_bad)
        return [await read_whole(fetcher, key, ()) for key in await self.office.listed()]

    async def refused(self) -> list[str]:
        """Local parts that failure notices name, sorted."""
        found = []
        for notice in await self.notices():
            if b"Action: failed" in notice:
                found += re.findall(rb"Final-Recipient: [^;]*; ([^@]*)@", notice)
        return sorted(word.decode() for word in found)

    def log(self, event: str) -> list[str]:
        """Lines of the log."""
        return [line for line in self.office.world.log.lines if f" {event} " in f" {line} "]  # type: ignore[attr-defined]

    def counted(self, name: str) -> int:
        """A counter."""
        return self.office.world.counters.get(name)

    async def close(self) -> None:
        """Ends in good order."""
        await self.outbound.stop()
        self.hop.close()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not self.office.bugs
        assert not self.log("bug"), self.log("bug")
