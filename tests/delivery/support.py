"""Makes a delivery service over nodes and an index in memory, and an index that can be silent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powermail.base import limits
from powermail.base.errors import OutcomeUnknown
from powermail.base.tasks import Tasks
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.delivery.srs import Rewritten
from powermail.delivery.transaction import DeliveryService, Transaction
from powermail.directory.contract import Account
from powermail.directory.resolve import DirectoryCache, Resolver
from powermail.index.contract import Batch, Delivery, Fate, Outcome
from powermail.index.memory import MemoryIndex
from powermail.mail.address import parse
from powermail.mail.envelope import Commit, Envelope, Peer
from powermail.mail.status import Status
from powermail.sim.memory import MemoryNode
from powermail.storage.contract import End, Mark, StorageNode
from tests.cluster.support import make_world

PEER = Peer("[192.0.2.1]", "elsewhere.example", "ESMTP")
ENVELOPE = Envelope("from@elsewhere.example")
ACCOUNT = Account("7", "to@here.example")


class Addresses:
    """A directory of one address."""

    async def find(self, address: str) -> Account | None:
        return ACCOUNT if address == ACCOUNT.address else None

    async def serves(self, domain: str) -> bool:
        return domain == "here.example"


class Index(MemoryIndex):
    """An index in memory that can be silent, and that remembers in which order it was asked."""

    def __init__(self, world: World, told: list[str]) -> None:
        super().__init__(world)
        self.silent = False
        self._told = told

    def deliver(self, delivery: Delivery) -> asyncio.Future[Outcome]:
        self._told.append("deliver")
        return asyncio.get_running_loop().create_future() if self.silent else super().deliver(delivery)

    async def abort(self, key: bytes, asked: Sequence[str]) -> Fate:
        self._told.append("abort")
        if self.silent:
            await asyncio.Event().wait()
        return await super().abort(key, asked)


class Node(MemoryNode):
    """A node in memory that says in the common list when it was told to delete."""

    def __init__(self, node: str, group: str, priority: int, told: list[str]) -> None:
        super().__init__(node, group, priority)
        self._told = told

    def _delete(self, keys: Sequence[bytes], mark: Mark, at: float) -> End:
        self._told.append(f"delete {self.id}")
        return super()._delete(keys, mark, at)


class Office:
    """Three nodes in three groups, the third used last, an index, and the service."""

    def __init__(self, nodes: int = 3) -> None:
        self.world = make_world()
        self.told: list[str] = []
        self.nodes = [Node(name, f"g{name}", 1 + (name == "c"), self.told) for name in "abc"[:nodes]]
        self.index = Index(self.world, self.told)
        self.cluster = Cluster(self.world, self.nodes, 2, "random")
        self.bugs: list[BaseException] = []
        self.tasks = Tasks(self.world.log, self.bugs.append)
        clock, counters = self.world.clock, self.world.counters
        self.service = DeliveryService(
            self.world,
            self.cluster,
            self.index,
            Resolver(DirectoryCache(Addresses(), clock, counters, 30.0, 3600.0), "+"),
            self.tasks,
            "here.example",
            True,
            limits.INDEX_WAIT_S_DEFAULT,
            False,
            lambda reverse_path, now: Rewritten(reverse_path),
        )

    async def open(self) -> Office:
        """Opens everything and admits the nodes."""
        await self.index.open("cluster")
        await self.cluster.start(self._admit)
        return self

    async def _admit(self, node: StorageNode) -> None:
        facts = await node.facts()
        await self.index.admit_node(node.id, node.group, facts.incarnation, facts.boots[-1], facts.end, facts.end)

    async def begin(self, octets: bytes = b"Subject: it\r\n\r\ntext\r\n") -> Transaction:
        """A message that has streamed in."""
        recipients = self.service.recipients(len(octets))
        assert (await recipients.add(parse(ACCOUNT.address), "", "", None)).positive
        transaction = self.service.begin(PEER, ENVELOPE, recipients)
        for start in range(0, len(octets), 50_000):
            await transaction.write(octets[start : start + 50_000])
        return transaction

    async def outcome(self, transaction: Transaction) -> str:
        """What the sender is told: the reply's code, or that the connection closes."""
        try:
            status: Status = await transaction.finish()
        except OutcomeUnknown:
            return "closed"
        return str(status.code)

    async def listed(self) -> list[bytes]:
        """Keys that the recipient sees."""
        facts = await self.index.find_mailbox(ACCOUNT.id, "INBOX")
        return [entry.key for entry in await self.index.entries(facts.id, 0, facts.uid_next, 100)] if facts else []

    def copies(self, key: bytes) -> list[str]:
        """Nodes that hold a live copy now."""
        return [node.id for node in self.nodes if key in node._disk.live]

    async def reconcile(self, name: str) -> None:
        """The keeper comes by a node and enters what it finds behind the watermark (law 6)."""
        node = next(node for node in self.nodes if node.id == name)
        (row,) = [row for row in await self.index.node_rows() if row.id == name]
        scan = await node.scan(row.watermark, 100, 0.0)
        found = [(item.key, item.position, item.origin) for item in scan.items if item.origin is not None]
        buried = [item.key for item in scan.items if item.origin is None]
        commits = {key: Commit.parse(await node.read_commit(key)) for key, _, _ in found}
        batch = Batch(name, scan.incarnation, row.watermark, scan.following, scan.end, found, buried, commits)
        assert (await self.index.reconcile(batch)).moved

    async def settled(self) -> None:
        """All that was begun is over."""
        while self.tasks.count():
            await asyncio.sleep(1.0)
        assert not self.bugs
