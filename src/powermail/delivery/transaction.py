"""Owns the delivery of one message: trace fields, replication, entering the index, and what the sender is told.

The promise rule: once nodes have been asked to commit, the delivery runs to its outcome in the service's own tasks,
whether the client is still there or not. Order: R nodes durable, index commit, reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from powermail.base import limits
from powermail.base.deadline import Patience
from powermail.base.errors import IndexTrouble, NotRedundant, OutcomeUnknown, Trouble
from powermail.base.log import Event
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.cluster.replicate import Packer, Replication
from powermail.delivery.recipients import Recipients
from powermail.directory.resolve import Resolver
from powermail.index.contract import Delivery, Index
from powermail.mail import header
from powermail.mail import status as st
from powermail.mail.envelope import Commit
from powermail.mail.status import Status


class Sender(NamedTuple):
    """Who gives us a message and how."""

    client: str
    hello: str
    protocol: str  # SMTP, ESMTP, ESMTPS, ESMTPSA, LMTP … (RFC 3848)
    cipher: str
    reverse_path: str
    size: int
    body: str
    smtputf8: bool
    ret: str
    envid: str


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
        rewrite: Callable[[str, float], str],
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

    def recipients(self, size: int) -> Recipients:
        """An empty list of recipients for a message that is said to have `size` octets."""
        return Recipients(self.resolver, self.index.usage, self._quota_strict, size)

    def begin(self, sender: Sender, recipients: Recipients) -> Transaction:
        """Starts a message. Raises NotRedundant when too few groups take mail (P6)."""
        return Transaction(self, sender, recipients)

    def replication(self) -> Replication:
        """A new message on its way to the nodes."""
        return Replication(self.world, self.cluster, self._packer, self.world.keys.next())

    def rewritten(self, reverse_path: str) -> str:
        """The reverse-path for a forward."""
        return self._rewrite(reverse_path, self.world.clock.now())

    async def settle(self, transaction: Transaction) -> Status:
        """Runs a transaction to its outcome; a cancelled caller does not stop it."""
        outcome: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._tasks.start(transaction.run(outcome), "delivery")
        return await outcome

    def abandon(self, transaction: Transaction) -> None:
        """Clears away what nodes hold of a message that will not be committed."""
        self._tasks.start(transaction.replication.abort(), "abandon")

    async def enter(self, delivery: Delivery) -> None:
        """Enters a durable message in the index, waiting at most `index_wait_s`: reconcile enters it otherwise."""
        try:
            await self._index_patience.wait(self.index.deliver(delivery))
        except (IndexTrouble, TimeoutError) as error:
            self.world.counters.add("delivery.index_late")
            self.world.log.event(Event.INDEX_LATE, key=delivery.key, error=str(error) or "no answer in time")


class Transaction:
    """One message. `write` while it streams, then `finish`, or `cancel`."""

    def __init__(self, service: DeliveryService, sender: Sender, recipients: Recipients) -> None:
        self.replication = service.replication()
        self.key = self.replication.key
        self.octets = 0
        self.plain = False  # what was written has only CRLF line ends and no line that begins with a dot
        self.header = b""  # known when its end, or as much as is looked at, has come
        self._service = service
        self._sender = sender
        self._recipients = recipients
        self._received_at = service.world.clock.now()
        self._head: list[bytes] | None = []
        self._head_octets = 0
        self._hops = 0

    async def _open(self) -> None:
        sender = self._sender
        to = self._recipients.accepted
        trace = header.return_path_field(sender.reverse_path) + header.received_field(
            sender.hello,
            sender.client,
            self._service.hostname,
            sender.protocol,
            self.key,
            header.format_second(int(self._received_at)),
            to[0] if len(to) == 1 else "",
            sender.cipher,
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

    async def finish(self) -> Status:
        """The outcome: 250 with the key, or 4xx with nothing visible. Raises OutcomeUnknown."""
        if not self.octets:
            await self._open()
        return await self._service.settle(self)

    def cancel(self) -> None:
        """Drops the message; nothing of it will be seen."""
        self._service.abandon(self)

    def _record(self, octets: int, sha256: str, sizes: list[int]) -> Commit:
        sender = self._sender
        return Commit(
            octets=octets,
            sha256=sha256,
            sizes=sizes,
            received_at=self._received_at,
            reverse_path=sender.reverse_path,
            targets=self._recipients.targets(sender.reverse_path, self._service.rewritten),
            envid=sender.envid,
            ret=sender.ret,
            body=sender.body,
            smtputf8=sender.smtputf8,
            hops=self._hops,
            plain=self.plain,
            mark=self._service.index.commits,
        )

    async def run(self, outcome: asyncio.Future[Status]) -> None:
        """Commits and says what came of it; called by the service in its own task. Who waits may have gone meanwhile."""
        self._service.index.expect(1)
        try:
            status = await self._run()
            if not outcome.done():
                outcome.set_result(status)
        except OutcomeUnknown as error:
            if not outcome.done():
                outcome.set_exception(error)
        finally:
            self._service.index.expect(-1)
            if not outcome.done():
                outcome.set_exception(OutcomeUnknown("the delivery ended without an outcome"))

    async def _run(self) -> Status:
        world, service = self._service.world, self._service
        try:
            commit, nodes = await self.replication.commit(self._record)
        except Trouble as error:
            world.counters.add("delivery.failed")
            world.log.event(Event.DELIVERY_TROUBLE, key=self.key, error=str(error))
            if self.replication.undecided and not await self._note_abort():
                return st.DELIVERED._replace(text=f"Stored as {self.key.hex()}")
            status = st.NOT_REDUNDANT if isinstance(error, NotRedundant) else st.STORAGE_TROUBLE
            return status.because(error)
        await service.enter(Delivery(self.key, commit, nodes))
        for node in self.replication.given_up:
            await self._note_given_up(node)
        world.counters.add("delivery.messages")
        world.counters.add("delivery.recipients", len(self._recipients))
        world.log.event(
            Event.DELIVERED,
            key=self.key,
            client=self._sender.client,
            sender=f"<{self._sender.reverse_path}>",
            recipients=len(self._recipients),
            octets=commit.octets,
            nodes=",".join(nodes),
        )
        return st.DELIVERED._replace(text=f"Stored as {self.key.hex()}")

    async def _note_given_up(self, node: str) -> None:
        """The node may have stored it after all: when the message is deleted, it is deleted there too (P8)."""
        try:
            await self._service.index.note_repair(self.key, node, "it did not answer in time")
        except IndexTrouble as error:
            self._service.world.log.event(Event.TROUBLE, key=self.key, node=node, error=str(error))

    async def _note_abort(self) -> bool:
        """Some node may hold a commit and could not be told: the index remembers. False if it is mail already."""
        try:
            return await self._service.index.abort(self.key, self._service.world.clock.now())
        except IndexTrouble as error:
            raise OutcomeUnknown("neither nodes nor index could note the abort") from error
