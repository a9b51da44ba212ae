"""Owns the delivery of one message: trace fields, replication, entering the index, and what the sender is told.

The promise rule: once nodes have been asked to commit, the delivery runs to its outcome in the service's own tasks,
whether the client is still there or not. Order: R nodes durable, index commit, reply.

Laws 4 and 5 say what the reply may be; everything else is OutcomeUnknown, and the connection closes without an answer:

    R receipts, and the index  entered or knew it             250
                               aborted it, or settled it      close
                               does not answer in time        250: the nodes' records are enough, reconcile enters it
    fewer, and                 no node can hold a commit      451: none was asked, or each asked one refused definitely
                               the index aborted it           451 once each asked node confirmed a tombstone, with the
                                                              stamp of this delivery still good there; else close
                               the index says live or dead    close
                               the index does not answer      close, and no node is told anything
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from powermail.base import limits
from powermail.base.deadline import Patience
from powermail.base.errors import IndexTrouble, OutcomeUnknown, Trouble
from powermail.base.log import Event
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.packing import Packer
from powermail.cluster.replicate import NotStored, Replication
from powermail.delivery.recipients import Recipients
from powermail.delivery.srs import Rewritten
from powermail.directory.resolve import Resolver
from powermail.index.contract import Delivery, Fate, Index, Outcome
from powermail.mail import header
from powermail.mail import status as st
from powermail.mail.dsn import Action, Report
from powermail.mail.envelope import Commit, Envelope, Peer
from powermail.mail.status import Status

_VISIBLE = (Outcome.ENTERED, Outcome.KNOWN)
Announce = Callable[[bytes, Envelope, float, Sequence[Report]], Awaitable[bool]]


class DeliveryService:
    """Makes transactions; owns the tasks that finish them."""

    def __init__(
        self,
        world: World,
        cluster: Cluster,
        index: Index,
        resolver: Resolver,
        tasks: Tasks,
        hostname: str,
        compress: bool,
        index_wait_s: float,
        quota_strict: bool,
        rewrite: Callable[[str, float], Rewritten],
    ) -> None:
        self.world = world
        self.cluster = cluster
        self.index = index
        self.resolver = resolver
        self.hostname = hostname
        self._tasks = tasks
        self._packer = Packer(compress)
        self._index_patience = Patience(index_wait_s)
        self._quota_strict = quota_strict
        self._rewrite = rewrite
        self.replies = world.counters.timing("delivery.reply")
        self.announce: Announce | None = None  # tells senders of success, where they asked

    def recipients(self, size: int) -> Recipients:
        """An empty list of recipients for a message that is said to have `size` octets."""
        return Recipients(self.resolver, self.index.usage, self._quota_strict, size)

    def begin(self, peer: Peer, envelope: Envelope, recipients: Recipients) -> Transaction:
        """Starts a message. Raises NotRedundant when too few groups take mail (P6)."""
        return Transaction(self, peer, envelope, recipients)

    def replication(self) -> Replication:
        """A new message on its way to the nodes."""
        return Replication(self.world, self.cluster, self._packer, self.world.keys.next())

    def rewritten(self, reverse_path: str) -> Rewritten:
        """The reverse-path for a forward."""
        return self._rewrite(reverse_path, self.world.clock.now())

    async def settle(self, transaction: Transaction) -> Status:
        """Runs a transaction to its outcome; a cancelled caller does not stop it."""
        outcome: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._tasks.start(transaction.run(outcome), "delivery")
        return await outcome

    def let_go(self, replication: Replication) -> None:
        """Clears away what nodes hold of streams that were never asked to commit."""
        if replication.abandoned:
            self._tasks.start(replication.cancel(), "cancel")

    def tell_delivered(self, key: bytes, envelope: Envelope, at: float, recipients: Sequence[tuple[str, str]]) -> None:
        """Sends the notices of success that were asked for (RFC 3461 §4.1); a crash right behind the 250 loses them."""
        if self.announce is not None and envelope.reverse_path:
            reports = [Report(name, orcpt, Action.DELIVERED, "2.1.5", "X-PowerMail; delivered") for name, orcpt in recipients]
            self._tasks.start(self._announce(self.announce, key, envelope, at, reports), "notice")

    async def _announce(self, announce: Announce, key: bytes, envelope: Envelope, at: float, reports: list[Report]) -> None:
        why = "it was not stored in three tries"
        for pause_s in (0.0, 2.0, 8.0):
            await asyncio.sleep(pause_s)
            try:
                if await announce(key, envelope, at, reports):
                    return
            except Trouble as error:
                why = str(error)
        self.world.counters.add("delivery.notices_dropped")
        self.world.log.event(Event.NOTICE_DROPPED, key=key, to=f"<{envelope.reverse_path}>", reason=why)

    async def enter(self, delivery: Delivery) -> Outcome | None:
        """Enters a durable message in the index, waiting at most `index_wait_s`. None: no answer, reconcile enters it."""
        try:
            return await self._index_patience.wait(self.index.deliver(delivery))
        except (IndexTrouble, TimeoutError) as error:
            self.world.counters.add("delivery.index_late")
            self.world.log.event(Event.INDEX_LATE, key=delivery.key, error=str(error) or "no answer in time")
            return None

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate | None:
        """Asks the index to decide against a delivery; the key's fate, or None if it did not answer (law 5)."""
        try:
            return await self._index_patience.wait(self.index.abort(key, asked))
        except (IndexTrouble, TimeoutError) as error:
            self.world.counters.add("delivery.index_late")
            self.world.log.event(Event.INDEX_LATE, key=key, error=str(error) or "no answer in time")
            return None

    async def bury(self, replication: Replication, connection: int) -> bool:
        """Tombstones where an abort that was decided over that connection may find commits; with a proof of it (law 10). False
        if not every node has confirmed one, or the index did not answer.
        """
        try:
            mark = await self._index_patience.wait(self.index.proof(connection))
        except (IndexTrouble, TimeoutError) as error:
            self.world.counters.add("delivery.index_late")
            self.world.log.event(Event.INDEX_LATE, key=replication.key, error=str(error) or "no answer in time")
            return False
        return await replication.bury(mark, self.world.clock.now())


class Transaction:
    """One message. `write` while it streams, then `finish`, or `cancel`."""

    def __init__(self, service: DeliveryService, peer: Peer, envelope: Envelope, recipients: Recipients) -> None:
        self.replication = service.replication()
        self.key = self.replication.key
        self.octets = 0
        self.plain = False  # what was written has only CRLF line ends and no line that begins with a dot
        self.added = 0  # octets that readers get more than were written, of a binary message
        self.header = b""  # known when its end, or as much as is looked at, has come
        self._service = service
        self._peer = peer
        self._envelope = envelope
        self._recipients = recipients
        self._received_at = service.world.clock.now()
        self._head: list[bytes] | None = []
        self._head_octets = 0
        self._hops = 0

    async def _open(self) -> None:
        to = self._recipients.names
        trace = header.return_path_field(self._envelope.reverse_path) + header.received_field(
            self._peer,
            self._service.hostname,
            self.key,
            header.format_second(int(self._received_at)),
            to[0] if len(to) == 1 else "",
        )
        await self.replication.write(trace)

    async def write(self, octets: bytes) -> None:
        """Adds octets of the message as received. Raises NotRedundant, NodeTrouble."""
        if not octets:
            return
        if not self.octets:
            await self._open()
        self.octets += len(octets)
        if self._head is not None:
            self._head.append(octets)
            self._head_octets += len(octets)
            if self._head_octets >= limits.HEADER_SCAN_OCTETS_MAX or b"\r\n\r\n" in octets:
                self._count_hops()
        await self.replication.write(octets)

    def _count_hops(self) -> None:
        if self._head is not None:
            self.header = header.header_of(b"".join(self._head))
            self._hops = header.count_received(self.header)
            self._head = None

    def refusal(self) -> Status | None:
        """A reason to refuse what was received, before anything is committed."""
        self._count_hops()
        if self._hops > limits.HOPS_MAX:
            return st.TOO_MANY_HOPS
        return None

    @property
    def shown_octets(self) -> int:
        """What counts in mailboxes, once all is written."""
        return self.replication.octets + self.added

    async def finish(self) -> Status:
        """The outcome: 250 with the key, or 4xx with nothing visible. Raises OutcomeUnknown."""
        if not self.octets:
            await self._open()
        return await self._service.settle(self)

    def cancel(self) -> None:
        """Drops the message, which no node was asked to commit; nothing of it will be seen."""
        self._service.let_go(self.replication)

    def _record(self, octets: int, sha256: str, sizes: list[int]) -> Commit:
        return Commit(
            octets=octets,
            sha256=sha256,
            sizes=sizes,
            received_at=self._received_at,
            envelope=self._envelope,
            targets=self._recipients.targets(self._envelope.reverse_path, self._service.rewritten),
            hops=self._hops,
            plain=self.plain,
            as_text=octets + self.added if self.added else 0,
        )

    async def run(self, outcome: asyncio.Future[Status]) -> None:
        """Commits and says what came of it; called by the service in its own task. Who waits may have gone meanwhile."""
        self._service.index.expect(1)
        began = self._service.world.clock.monotonic()
        try:
            status = await self._run()
            if not outcome.done():
                outcome.set_result(status)
        except OutcomeUnknown as error:
            if not outcome.done():
                outcome.set_exception(error)
        finally:
            self._service.replies.observe(self._service.world.clock.monotonic() - began)
            self._service.index.expect(-1)
            if not outcome.done():
                outcome.set_exception(OutcomeUnknown("the delivery ended without an outcome"))

    async def _run(self) -> Status:
        service = self._service
        try:
            commit, receipts = await self.replication.commit(self._record)
        except NotStored as error:
            return await self._not_stored(error)
        outcome = await service.enter(Delivery(self.key, commit, receipts))
        service.let_go(self.replication)
        if outcome is not None and outcome not in _VISIBLE:
            service.world.counters.add(f"law.7.{outcome.value}")
            raise OutcomeUnknown(f"the index says {outcome.value}")  # laws 4, 7
        return self._delivered()

    def _delivered(self) -> Status:
        world = self._service.world
        if self._recipients.success:
            self._service.tell_delivered(self.key, self._envelope, self._received_at, self._recipients.success)
        world.counters.add("delivery.messages")
        world.counters.add("delivery.recipients", len(self._recipients))
        world.log.event(
            Event.DELIVERED,
            key=self.key,
            client=self._peer.client,
            sender=f"<{self._envelope.reverse_path}>",
            to=tuple(self._recipients.names),  # a line each
            message_id=header.message_id(self.header) or None,
            octets=self.replication.octets,
            seconds=world.clock.now() - self._received_at,
            nodes=",".join([receipt.node for receipt in self.replication.receipts]),
        )
        return Status(st.DELIVERED.code, st.DELIVERED.enhanced, f"{st.DELIVERED.text} as {self.key.hex()}")

    async def _not_stored(self, error: NotStored) -> Status:
        """Fewer than R receipts: 451 if no node can hold a commit, else it is the index's decision (laws 4, 5)."""
        service, world, replication = self._service, self._service.world, self.replication
        world.counters.add("delivery.failed")
        world.log.event(Event.DELIVERY_TROUBLE, key=self.key, error=str(error))
        service.let_go(replication)
        if not error.undecided:
            world.counters.add("law.5.refused")
            return st.NOT_REDUNDANT.because(error)
        connection = service.index.connection
        fate = await service.abort(self.key, error.undecided)  # before any node is told (law 5)
        if fate is Fate.ABORTED:
            if await service.bury(replication, connection):
                world.counters.add("law.5.buried")
                return st.NOT_REDUNDANT.because(error)
            world.counters.add("law.5.closed")
            raise OutcomeUnknown("aborted, but not every node that was asked has confirmed it") from error
        world.counters.add("law.5.closed")
        raise OutcomeUnknown(f"not decided against: {fate.name.lower() if fate else 'the index does not answer'}") from error
