"""Makes a small installation for tests of checkpoints and of what is rebuilt from them: three nodes, an index, both clocks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from powermail.base.disk import SystemDisk
from powermail.base.lane import ThreadLane
from powermail.base.log import MemoryLog
from powermail.base.net import SocketNetwork
from powermail.base.sqlite_files import SUFFIXES
from powermail.base.world import World
from powermail.cluster.cluster import Cluster
from powermail.index.contract import Batch, Delivery, EntryFacts, Index, Outcome
from powermail.index.memory import MemoryIndex, MemoryStore
from powermail.index.sqlite import SqliteIndex
from powermail.keeper.checkpoint import Checkpointer
from powermail.keeper.rebuild import Rebuilder, Rebuilt
from powermail.mail.envelope import Commit, Envelope, Target
from powermail.sim.memory import MemoryNode
from powermail.sim.world import SimEntropy
from powermail.storage.contract import START, Chunk, Held, Origin, StorageNode
from tests.index.support import inbox, key

CLUSTER = "00" * 16
NOW = 1_800_000_000.0
GROUPS = {"a": "north", "b": "south", "c": "west"}
COPIES = 2
SOON = 10.0  # longer than anything these tests wait for


class Ticks:
    """Both clocks; a test moves them, each by itself."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.wall = NOW

    def monotonic(self) -> float:
        return self.passed

    def now(self) -> float:
        return self.wall

    def pass_by(self, seconds: float) -> None:
        """Time goes on."""
        self.passed += seconds
        self.wall += seconds


class Installation:
    """Nodes that stay, an index that can be lost and made anew."""

    def __init__(self, path: Path, seed: int = 1, sqlite: bool = False, groups: Mapping[str, str] = GROUPS) -> None:
        """`sqlite`: also the index that is lost is one on SQLite. `groups`: the nodes, each with its group."""
        self.clock = Ticks()
        self.log = MemoryLog()
        self.path = path / "index.db"
        self.world = World(self.clock, SystemDisk(), SocketNetwork(), SimEntropy(random.Random(seed)), ThreadLane, self.log)
        self.nodes = {name: MemoryNode(name, group, 1, self.clock.monotonic) for name, group in groups.items()}
        self.index: MemoryIndex | SqliteIndex
        if sqlite:
            self.index = SqliteIndex(self.world, str(path / f"lost-{seed}.db"))
        else:
            self.index = MemoryIndex(self.world, MemoryStore())
        self.cluster = Cluster(self.world, list(self.nodes.values()), COPIES, "random")
        self.checkpointer = Checkpointer(self.world, self.cluster, self.index)

    async def start(self) -> None:
        """Opens all."""
        await self.index.open(CLUSTER)
        await self.cluster.start(self.admit)

    async def admit(self, node: StorageNode) -> None:
        """Makes a node a member, its log unread."""
        facts = await node.facts()
        await self.index.admit_node(node.id, node.group, facts.incarnation, facts.boots[-1], START, facts.end)

    async def store(
        self, number: int, *targets: Target, nodes: Sequence[str] = ("a", "b"), at: float | None = None
    ) -> Delivery:
        """A message durable on `nodes` that the index has not heard of."""
        octets = b"message %d\r\n" % number
        received_at = self.clock.wall if at is None else at
        to = list(targets or (inbox(),))
        commit = Commit(len(octets), f"{number:064x}", [len(octets)], received_at, Envelope("from@example.org"), to)
        record, chunks = commit.format(), [Chunk(0, 0, octets, len(octets))]
        receipts = []
        for name in nodes:
            node = self.nodes[name]
            receipts.append(await node.commit(key(number), chunks, record, 1, node.stamp(), Origin.DELIVERY))
        return Delivery(key(number), commit, tuple(receipts))

    async def deliver(self, number: int, *targets: Target, nodes: Sequence[str] = ("a", "b")) -> None:
        """A message, acknowledged."""
        assert await self.index.deliver(await self.store(number, *targets, nodes=nodes)) is Outcome.ENTERED

    async def mailbox(self, account: str = "ann", name: str = "INBOX") -> int:
        """Id of a mailbox that is there."""
        facts = await self.index.find_mailbox(account, name)
        assert facts is not None
        return facts.id

    async def uids(self, *numbers: int, account: str = "ann", name: str = "INBOX") -> list[int]:
        """UIDs that messages have in a mailbox."""
        wanted = {key(number) for number in numbers}
        return [entry.uid for entry in await entries(self.index, account, name) if entry.key in wanted]

    async def expunge(self, *numbers: int, account: str = "ann", name: str = "INBOX") -> None:
        """Deletes messages from a mailbox; nodes are not told yet."""
        uids = await self.uids(*numbers, account=account, name=name)
        assert len(uids) == len(numbers)
        await self.index.expunge(await self.mailbox(account, name), uids)

    async def tell_nodes(self) -> None:
        """Tombstones that wait are written."""
        for name, node in self.nodes.items():
            keys = await self.index.orders(name, 1000)
            if keys:
                end = await node.delete(keys, self.index.mark(), self.clock.wall)
                await self.index.confirm_orders(name, keys, end)

    async def settle_logs(self) -> None:
        """All logs were read to their end, and held nothing new."""
        for row in await self.index.node_rows():
            end = (await self.nodes[row.id].facts()).end
            assert (await self.index.reconcile(Batch(row.id, row.incarnation, row.watermark, end, end, [], [], {}))).moved

    async def checkpoint(self) -> int:
        """Whatever changed is checkpointed."""
        self.clock.pass_by(1000.0)
        written = await self.checkpointer.write_due(float("inf"))
        await self.checkpointer.write_queue()
        return written

    def rebuilder(self, without: Sequence[str] = (), steps: list[int] | None = None) -> Rebuilder:
        """The index is lost; this makes it anew."""

        async def progress(done: int, total: int) -> None:
            if steps is not None:
                steps.append(done)

        nodes = list(self.nodes.values())
        return Rebuilder(self.world, nodes, str(self.path), CLUSTER, COPIES, progress, without)

    async def rebuild(self, without: Sequence[str] = ()) -> Rebuilt:
        """The index is lost and made anew; `index` is the new one from now on."""
        done = await self.rebuilder(without).run()
        await self.serve()
        assert await self.index.audit() == []
        return done

    async def serve(self) -> None:
        """Opens the rebuilt index."""
        index = SqliteIndex(self.world, str(self.path))
        await index.open()
        self.index = index
        self.cluster = Cluster(self.world, list(self.nodes.values()), COPIES, "random")
        self.checkpointer = Checkpointer(self.world, self.cluster, self.index)
        await self.cluster.start(self.rejoin)

    async def rejoin(self, node: StorageNode) -> None:
        """The new index knows the node already."""

    async def lose_index(self) -> None:
        """The database is gone."""
        await self.index.close()
        for suffix in SUFFIXES:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    async def stop(self) -> None:
        """Closes all."""
        self.checkpointer.close()
        await self.index.close()
        await self.cluster.close()


async def entries(index: Index, account: str = "ann", name: str = "INBOX") -> list[EntryFacts]:
    """What a mailbox shows; nothing if there is none."""
    facts = await index.find_mailbox(account, name)
    return [] if facts is None else await index.entries(facts.id, 0, 2**32, 1 << 20)


async def shown(index: Index, account: str = "ann", name: str = "INBOX") -> list[int]:
    """The same by the numbers the tests gave the messages."""
    return [int.from_bytes(entry.key, "big") for entry in await entries(index, account, name)]


async def numbers(place: Installation, account: str = "ann", name: str = "INBOX") -> dict[int, int]:
    """UID by message."""
    return {int.from_bytes(entry.key, "big"): entry.uid for entry in await entries(place.index, account, name)}


async def held(place: Installation, number: int, nodes: Sequence[str] = ("a", "b")) -> list[Held]:
    """What nodes say of a message, once all that was ordered is done."""
    await place.tell_nodes()
    return [(await place.nodes[node].has([key(number)]))[0] for node in nodes]
